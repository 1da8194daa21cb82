"""Everything that decides what a run computes: nested dataclasses, read from a YAML recipe and validated.

A recipe names only what differs from the defaults below. :func:`load_config` merges recipe and overrides,
checks types and ranges, and reports the first problem as one line that names the key.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, get_args

from pydantic import ConfigDict, Field

from uncollapse.config.methods import DINO, Method

PrototypeKind = Literal["joint", "koleo", "decoupled", "decoupled-paper", "memory", "fixed", "capi"]
KINDS: tuple[PrototypeKind, ...] = ("joint", "koleo", "decoupled", "decoupled-paper", "memory", "fixed", "capi")
TargetKind = Literal["centred", "sinkhorn", "sinkhorn-queue", "power-law", "floor", "softmax", "posterior"]
TARGETS: tuple[TargetKind, ...] = get_args(TargetKind)
DiversityKind = Literal["koleo", "repulsion", "energy", "orthogonality", "mst"]
RIVALS: tuple[DiversityKind, ...] = get_args(DiversityKind)[1:]
"""What stands for KoLeo-Proto in the mode ``koleo``, and names a mode of its own."""
DEMO_ARMS = ("joint", "joint-sinkhorn", "koleo", "decoupled", "decoupled-paper", "fixed")
"""The modes of the demonstration."""
ARMS = (*DEMO_ARMS[:-1], "memory", "fixed")
"""The modes that a comparison of one method should hold: every way to learn prototypes, and joint ones with balanced
targets, which tell the effect of decoupling from that of balancing. Other pairs of a way and targets are modes too."""

Positive = Annotated[int, Field(ge=1, le=2**62)]
Count = Annotated[int, Field(ge=0, le=2**62)]
Rate = Annotated[float, Field(ge=0, le=1e30)]
Above0 = Annotated[float, Field(gt=0, le=1e30)]
Unit = Annotated[float, Field(ge=0, le=1)]
Scale = tuple[Annotated[float, Field(gt=0, le=1)], Annotated[float, Field(gt=0, le=1)]]
Triple = tuple[float, float, float]

_strict = ConfigDict(extra="forbid", allow_inf_nan=False)


@dataclass(frozen=True)
class DataConfig:
    """Where images come from and which of them are kept for evaluation."""

    path: str = ""
    """Image folder, Parquet file or folder, CSV of paths and labels, or ``builtin:digits``; ``--data`` sets it."""
    val_path: str = ""
    """Held-out images, where they are not found beside the training images."""
    held_out: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """Share of the images held out (by class, where there are labels) when the data have no test split."""
    held_out_max: Positive = 5000
    """At most this many held-out images are used by the evaluations."""
    memory_gb: Rate = 2.0
    """Image sets whose decoded pixels fit in this are kept in memory; larger ones are read by workers."""
    workers: Count = 4
    """Loader processes per rank for image sets that do not fit in memory."""
    max_bad: Unit = 0.05
    """Largest share of unreadable images that is tolerated (they are skipped and listed)."""
    image: str = ""
    """Column of Parquet or CSV that holds the images (CSV: their paths); "": the usual names."""
    label: str = ""
    """Column of Parquet or CSV that holds the labels; "": the usual names."""
    long_tail: Annotated[float, Field(ge=1, le=1e9)] = 1.0
    """Imbalance factor, largest by smallest class, to which the training images are cut (100: CIFAR-10-LT's), class by
    class in the order of their numbers. The held-out images stay as they are. 1: no cut."""


@dataclass(frozen=True)
class ViewConfig:
    """Multi-crop views; the defaults are DINO's published augmentation for ViTs."""

    global_count: Positive = 2
    """Views that the teacher sees too."""
    global_size: Positive = 224
    """Side of a global view, in pixels."""
    global_scale: Scale = (0.25, 1.0)
    """Share of the image's area that a global view is cropped from: uniform between these."""
    local_size: Positive = 96
    """Side of a local view, in pixels."""
    local_scale: Scale = (0.05, 0.25)
    """Share of the image's area that a local view is cropped from."""
    local_count: Count = 10
    """Views that the student alone sees."""
    flip: Unit = 0.5
    """Probability of a horizontal flip."""
    jitter: Unit = 0.8
    """Probability of a change of colours."""
    jitter_strength: tuple[Rate, Rate, Rate, Annotated[float, Field(ge=0, le=0.5)]] = (0.4, 0.4, 0.2, 0.1)
    """Largest relative change of brightness, contrast, saturation, and largest shift of hue (turns)."""
    grey: Unit = 0.2
    """Probability of a view in shades of grey."""
    blur: tuple[Unit, Unit, Unit] = (1.0, 0.1, 0.5)
    """Probability of Gaussian blur on the first global, second global and local views."""
    blur_sigma: tuple[Above0, Above0] = (0.1, 2.0)
    """Standard deviation of the blur, in pixels of the view."""
    solarise: tuple[Unit, Unit, Unit] = (0.0, 0.2, 0.0)
    """Probability of solarisation on the first global, second global and local views."""
    mean: Triple = (0.485, 0.456, 0.406)
    """Of each channel, from 0 to 1, subtracted from every view."""
    std: Triple = (0.229, 0.224, 0.225)
    """Of each channel, which every view is divided by."""


@dataclass(frozen=True)
class BackboneConfig:
    """A timm model by name, or ``conv3`` (three convolutions, for images of a few pixels)."""

    name: str = "vit_small_patch16_224"
    """The model."""
    drop_path: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Stochastic depth of the student (the teacher has none): of the last block, rising from 0 at the first."""
    drop_path_uniform: bool = False
    """Whether it is the same in every block, as in DINOv2."""
    options: dict[str, Any] = field(default_factory=dict)
    """Further keyword arguments of ``timm.create_model``."""
    init: str = ""
    """File or run folder whose weights the encoder starts from; ``--init`` sets it. Empty: a random start."""


@dataclass(frozen=True)
class HeadConfig:
    """Projection head: an MLP to ``bottleneck`` dimensions, then the unit sphere."""

    hidden: Positive = 2048
    """Width of the hidden layers."""
    layers: Count = 3
    """0: no MLP, as in CAPI; ``bottleneck`` is the length of the encoder's features then."""
    bottleneck: Positive = 256
    """D, the length of projections and prototypes."""
    batch_norm: bool = False
    """Whether a batch norm follows each hidden layer."""
    activation: Literal["gelu", "relu"] = "gelu"
    """After each hidden layer."""
    normalise: bool = True
    """Whether projections are put on the unit sphere; CARP's are not."""


@dataclass(frozen=True)
class MixtureConfig:
    """The online Gaussian mixture of the decoupled modes. ``null`` means: the mode's own default."""

    covariance: Literal["shared", "isotropic", "diagonal"] | None = None
    """One variance for all components, for each, or for each dimension of each."""
    memory_steps: Above0 | None = None
    """Forgetting, as the number of training steps after which half of a component's evidence is new."""
    balance: Literal["none", "sinkhorn"] | None = None
    """How the E-step keeps components alive: not at all, or by equal masses over the batch."""
    renewed: Unit | None = None
    """Share of a step's projections each of which takes the place of the oldest component."""
    temperature: Above0 | None = None
    """Fixed temperature of the E-step over cosines; null with no default of the mode: the variances rule."""
    centred: bool | None = None
    """Whether prototypes are the means' directions from the middle of all means, or from the origin."""
    anneal_start: Annotated[float, Field(gt=0, le=1)] | None = None
    """First inverse temperature β of the annealed E-step, and of the mixture's own targets (1: no annealing)."""
    anneal_steps: Unit | None = None
    """Share of training after which β has reached 1."""


@dataclass(frozen=True)
class ClusteringConfig:
    """The clustering of the ``capi`` mode; the defaults are those that CAPI was published with."""

    lr: Above0 = 5e-4
    """Of its AdamW; the batch does not scale it."""
    weight_decay: Rate = 0.01
    """Of its AdamW."""
    warmup: Unit = 0.1
    """Share of training in which the rate rises to ``lr``."""
    schedule_span: Annotated[float, Field(ge=1, le=1e6)] = 1.225
    """The rate is planned for so many times the run, so that it ends at a tenth of ``lr`` and not at 0."""
    temperature: Above0 = 0.12
    """Of the softmax that learns to predict the assignments."""
    target_temperature: Above0 = 0.06
    """Of the assignments."""
    iterations: Positive = 3
    """Of Sinkhorn."""


@dataclass(frozen=True)
class PrototypeConfig:
    kind: PrototypeKind = "joint"
    """The way to learn them; ``--prototypes`` sets it."""
    targets: TargetKind | None = None
    """The teacher's target: DINO's centred softmax over the teacher's logits; balanced by Sinkhorn over the batch, over
    the batch and a queue, or to shares of a power law; with a floor under the size of every cluster; plain softmax; or
    the mixture's posterior. null: the posterior for ``decoupled``, ``sinkhorn`` for ``memory`` in place of ``centred``,
    else the method's own."""
    queue: Positive = 3840
    """Of ``sinkhorn-queue``: projections of earlier batches, of all ranks, balanced with the batch once it is full."""
    power: Annotated[float, Field(ge=0, le=100)] = 0.25
    """Of ``power-law``: prototype k gets a share that falls as ``k^-power``."""
    floor: Annotated[float, Field(gt=0, le=1)] = 0.4
    """Of ``floor``: the least size of a cluster, as a share of equal sizes; CoKe's 0.4."""
    floor_rate: Above0 = 20.0
    """How fast the duals of ``floor`` learn; CoKe's 20."""
    count: Annotated[int, Field(ge=2)] = 65536
    """K."""
    start: Literal["random", "simplex"] = "random"
    """Where ``fixed`` prototypes stand: random directions, or as far apart as they can be, which takes a
    ``head.bottleneck`` of at least ``count - 1``."""
    learn_norm: bool = True
    """Whether the length of each prototype is learned (DINO's ``norm_last_layer=False``)."""
    vmf: bool = False
    """Whether logits have the von Mises–Fisher normaliser, which lengths of their own need. Prototypes of one length
    (decoupled, fixed, SwAV's, or without ``learn_norm``) have one normaliser, which changes nothing."""
    freeze_epochs: Rate = 1.0
    """Joint prototypes get no gradient during these first epochs."""
    lr_scale: Rate = 1.0
    """Learning rate of joint prototypes relative to the encoder's."""
    weight_decay: Rate | None = None
    """Weight decay of joint prototypes; null: the encoder's."""
    diversity: DiversityKind = "koleo"
    """What pushes prototypes apart in the mode ``koleo``: KoLeo-Proto, or a rival: pairwise Gaussian repulsion,
    hyperspherical energy, orthogonality, or the length of their minimum spanning tree."""
    koleo_weight: Rate = 0.1
    """Its weight, whichever it is."""
    koleo_every: Positive = 1
    """Nearest neighbours of KoLeo-Proto, or the spanning tree, are looked for every so many steps; in between the last
    ones serve."""
    memory_length: Positive | None = None
    """Teacher projections of earlier images that ``memory`` keeps. Of more than ``count``, so many are drawn anew every
    step; null: as many, and all are prototypes."""
    patch_rows: Positive | None = None
    """At most this many patches of a step (over all ranks, chosen at random) are observed by prototypes that learn from
    projections. null: all, for ``memory`` as many as there are images."""
    mixture: MixtureConfig = field(default_factory=MixtureConfig)
    clustering: ClusteringConfig = field(default_factory=ClusteringConfig)


@dataclass(frozen=True)
class TeacherConfig:
    momentum: Unit = 0.996
    """Share of the teacher that stays at each step, as training begins."""
    momentum_start: Unit | None = None
    """Momentum of the first step, which becomes ``momentum`` as the learning rate warms up; null: no warm-up."""
    momentum_end: Unit = 1.0
    """The same as training ends."""
    momentum_shape: Literal["cosine", "linear"] = "cosine"
    """How the momentum goes from the one to the other."""
    temperature: Above0 = 0.07
    """Of the targets, after the warm-up."""
    temperature_start: Above0 = 0.04
    """Of the targets in the first epoch."""
    temperature_warmup_epochs: Rate = 30
    """Epochs in which it goes from the one to the other."""
    temperature_by: Literal["epoch", "step"] = "epoch"
    """Whether the warm-up moves the temperature once an epoch (DINO, iBOT) or at every step (DINOv2)."""
    center_momentum: Unit = 0.9
    """Share of the centre that stays at each step."""
    student_temperature: Above0 = 0.1
    """Of the student's predictions."""


@dataclass(frozen=True)
class OptimConfig:
    name: Literal["adamw", "sgd", "lars"] = "adamw"
    """The optimiser; SGD and LARS with momentum 0.9."""
    lr: Above0 = 5e-4
    """Learning rate per ``lr_batch`` images; the rate used is lr × batch / lr_batch."""
    lr_batch: Positive = 256
    """See ``lr``."""
    min_lr: Rate = 1e-5
    """Final learning rate, not scaled by the batch."""
    warmup_epochs: Rate = 10.0
    """Epochs in which the rate rises."""
    warmup_start: Rate = 0.0
    """Learning rate of the first step where there is a warm-up, per ``lr_batch`` images as ``lr`` is."""
    weight_decay: Rate = 0.04
    """As training begins."""
    weight_decay_end: Rate = 0.4
    """As training ends."""
    decay_biases: bool = False
    """Whether biases and norms decay too, and LARS adapts their rate: in SwAV, not in DINO, iBOT and CARP."""
    betas: tuple[Unit, Unit] = (0.9, 0.999)
    """Of AdamW."""
    patch_embed_lr: Rate = 1.0
    """Learning rate of a transformer's patch embedding relative to the rest of it; 0.2 in CAPI and DINOv2."""
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Learning rate of each of a transformer's blocks relative to the one above it; its embeddings count as below the
    first, heads and last norm as above the last. 0.9 in DINOv2's ViT-L/16."""
    clip: Rate = 0.0
    """Largest gradient norm, of what ``clip_of`` says; 0: no clipping."""
    clip_of: Literal["tensor", "encoder", "network"] = "tensor"
    """Each parameter tensor on its own, prototypes too, as DINO does; the encoder with its heads as a whole, as MSN
    does, whose prototypes are not clipped; or the backbone, and each head with its prototypes, as DINOv2 does."""


@dataclass(frozen=True)
class RunConfig:
    epochs: Above0 = 800.0
    """Passes over the training images; parts of one too."""
    schedule_span: Annotated[float, Field(ge=1, le=1e6)] = 1.0
    """Learning rate, weight decay and the teacher's momentum are planned for so many times these epochs, so that above
    1 the run ends before they do: MSN's recipe has 1.25."""
    batch: Positive = 1024
    """Images per step over all ranks together."""
    accumulate: Positive = 1
    """Each rank's share of a batch goes through the student in so many equal parts, one after the other, so that a
    large batch fits a small GPU. Targets, centre and mixture see the whole batch, and so does the loss; only batch
    norms see their part alone."""
    precision: Literal["32-true", "bf16-mixed", "fp16-mixed"] = "32-true"
    """``fp16-mixed`` scales the loss so that small gradients survive, and skips a step whose gradients overflow.
    Losses, prototypes and mixture are in float32 in all three."""


@dataclass(frozen=True)
class LogConfig:
    """How often things are written. None of these changes what is learned."""

    every_steps: Positive = 10
    """Steps between lines of ``metrics.jsonl``."""
    sweep_epochs: Above0 = 1.0
    """The ε-sweep over the prototypes runs every so many epochs."""
    checkpoint_steps: Count = 1000
    """Steps between checkpoints; 0: none in between."""
    keep_checkpoints: Positive = 2
    """So many of the newest stay."""
    alive_window: Count = 0
    """Steps within which a prototype must have been an argmax to count as alive; 0: 20·K / batch. Counted
    on the teacher's first global view."""
    evaluate_train: Positive = 10000
    """At most this many training images (a fixed random choice) feed the kNN bank and the linear probe."""
    csv: bool = False
    """Also write the metrics as a table, ``metrics.csv``."""
    wandb: str = ""
    """Also send the metrics to this project of Weights & Biases; needs the extra ``uncollapse[wandb]``."""


@dataclass(frozen=True)
class ChangeConfig:
    """A change in mid-run, which tells cause from correlation; `uncollapse compare` makes them, no recipe has one."""

    freeze: Annotated[str, Field(pattern=r"^((encoder|prototypes)@\d{1,18})?$")] = ""
    """``encoder@STEP`` or ``prototypes@STEP``: what is learned no more from that step on. Both sides stay as they
    are, the teacher's too; statistics of batch norms go on."""
    branch: str = ""
    """Folder of a run that this one leaves; ``train --branch`` sets it."""
    branch_step: Count = 0
    """Its step at which."""


@dataclass(frozen=True)
class Config:
    """One run. See the recipes for complete examples."""

    seed: Count = 0
    """Of everything that is drawn: weights, order of images, views, masks."""
    method: Method = field(default_factory=DINO)
    data: DataConfig = field(default_factory=DataConfig)
    views: ViewConfig = field(default_factory=ViewConfig)
    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    head: HeadConfig = field(default_factory=HeadConfig)
    prototypes: PrototypeConfig = field(default_factory=PrototypeConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    run: RunConfig = field(default_factory=RunConfig)
    log: LogConfig = field(default_factory=LogConfig)
    change: ChangeConfig = field(default_factory=ChangeConfig)


for _cls in (
    DataConfig,
    ViewConfig,
    BackboneConfig,
    HeadConfig,
    MixtureConfig,
    ClusteringConfig,
    PrototypeConfig,
    TeacherConfig,
    OptimConfig,
    RunConfig,
    LogConfig,
    ChangeConfig,
    Config,
):
    _cls.__pydantic_config__ = _strict  # type: ignore[union-attr]
