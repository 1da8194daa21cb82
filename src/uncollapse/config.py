"""Everything that decides what a run computes: nested dataclasses, read from a YAML recipe and validated.

A recipe names only what differs from the defaults below. :func:`load_config` merges recipe and overrides,
checks types and ranges, and reports the first problem as one line that names the key.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from uncollapse.errors import ConfigError
from uncollapse.plain_yaml import parse_yaml, read_yaml, shortened
from uncollapse.shown import shown

PrototypeKind = Literal["joint", "koleo", "decoupled", "decoupled-paper", "fixed"]
KINDS: tuple[PrototypeKind, ...] = ("joint", "koleo", "decoupled", "decoupled-paper", "fixed")
TargetKind = Literal["centred", "sinkhorn", "posterior"]
ARMS = ("joint", "joint-sinkhorn", "koleo", "decoupled", "decoupled-paper", "fixed")
"""What a comparison should hold: every way to learn prototypes, and joint ones with balanced targets, which tell the
effect of decoupling from that of balancing."""

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


@dataclass(frozen=True)
class ViewConfig:
    """Multi-crop views; the defaults are DINO's published augmentation for ViTs."""

    global_size: Positive = 224
    global_scale: Scale = (0.25, 1.0)
    local_size: Positive = 96
    local_scale: Scale = (0.05, 0.25)
    local_count: Count = 10
    flip: Unit = 0.5
    jitter: Unit = 0.8
    jitter_strength: tuple[Rate, Rate, Rate, Annotated[float, Field(ge=0, le=0.5)]] = (0.4, 0.4, 0.2, 0.1)
    """Largest relative change of brightness, contrast, saturation, and largest shift of hue (turns)."""
    grey: Unit = 0.2
    blur: tuple[Unit, Unit, Unit] = (1.0, 0.1, 0.5)
    """Probability of Gaussian blur on the first global, second global and local views."""
    blur_sigma: tuple[Above0, Above0] = (0.1, 2.0)
    """Standard deviation of the blur, in pixels of the view."""
    solarise: tuple[Unit, Unit, Unit] = (0.0, 0.2, 0.0)
    mean: Triple = (0.485, 0.456, 0.406)
    std: Triple = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class BackboneConfig:
    """A timm model by name, or ``conv3`` (three convolutions, for images of a few pixels)."""

    name: str = "vit_small_patch16_224"
    drop_path: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Stochastic depth of the student (the teacher has none)."""
    options: dict[str, Any] = field(default_factory=dict)
    """Further keyword arguments of ``timm.create_model``."""
    init: str = ""
    """File or run folder whose weights the encoder starts from; ``--init`` sets it. Empty: a random start."""


@dataclass(frozen=True)
class HeadConfig:
    """Projection head: an MLP to ``bottleneck`` dimensions, then the unit sphere."""

    hidden: Positive = 2048
    layers: Positive = 3
    bottleneck: Positive = 256
    batch_norm: bool = False


@dataclass(frozen=True)
class MixtureConfig:
    """The online Gaussian mixture of the decoupled modes. ``null`` means: the mode's own default."""

    covariance: Literal["shared", "isotropic", "diagonal"] | None = None
    memory_steps: Above0 | None = None
    """Forgetting, as the number of training steps after which half of a component's evidence is new."""
    balance: Literal["none", "sinkhorn"] | None = None
    """How the E-step keeps components alive: not at all, or by equal masses over the batch."""
    temperature: Above0 | None = None
    """Fixed temperature of the E-step over cosines; null with no default of the mode: the variances rule."""
    centred: bool | None = None
    """Whether prototypes are the means' directions from the middle of all means, or from the origin."""
    anneal_start: Annotated[float, Field(gt=0, le=1)] | None = None
    """First inverse temperature β of the annealed E-step, and of the mixture's own targets (1: no annealing)."""
    anneal_steps: Unit | None = None
    """Share of training after which β has reached 1."""
    top: Positive | None = None
    """Only each projection's so many largest responsibilities count in the M-step; null: all of them."""


@dataclass(frozen=True)
class PrototypeConfig:
    kind: PrototypeKind = "joint"
    targets: TargetKind | None = None
    """The teacher's target: DINO's centred softmax over cosines, the same balanced by Sinkhorn over the batch, or the
    mixture's posterior. null: the mode's own, the posterior for ``decoupled`` and ``centred`` for all others."""
    count: Annotated[int, Field(ge=2)] = 65536
    learn_norm: bool = True
    """Whether the length of each prototype is learned (DINO's ``norm_last_layer=False``)."""
    freeze_epochs: Rate = 1.0
    """Joint prototypes get no gradient during these first epochs."""
    lr_scale: Rate = 1.0
    """Learning rate of joint prototypes relative to the encoder's."""
    weight_decay: Rate | None = None
    """Weight decay of joint prototypes; null: the encoder's."""
    koleo_weight: Rate = 0.1
    koleo_every: Positive = 1
    """Nearest neighbours of KoLeo-Proto are looked for every so many steps; in between the last ones serve."""
    mixture: MixtureConfig = field(default_factory=MixtureConfig)


@dataclass(frozen=True)
class TeacherConfig:
    momentum: Unit = 0.996
    momentum_end: Unit = 1.0
    temperature: Above0 = 0.07
    temperature_start: Above0 = 0.04
    temperature_warmup_epochs: Count = 30
    center_momentum: Unit = 0.9
    student_temperature: Above0 = 0.1


@dataclass(frozen=True)
class OptimConfig:
    name: Literal["adamw", "sgd", "lars"] = "adamw"
    lr: Above0 = 5e-4
    """Learning rate per ``lr_batch`` images; the rate used is lr × batch / lr_batch."""
    lr_batch: Positive = 256
    min_lr: Rate = 1e-5
    """Final learning rate, not scaled by the batch."""
    warmup_epochs: Rate = 10.0
    weight_decay: Rate = 0.04
    weight_decay_end: Rate = 0.4
    clip: Rate = 0.0
    """Largest gradient norm of each parameter tensor on its own, as DINO does; 0: no clipping."""


@dataclass(frozen=True)
class RunConfig:
    epochs: Above0 = 800.0
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
    sweep_epochs: Above0 = 1.0
    """The ε-sweep over the prototypes runs every so many epochs."""
    checkpoint_steps: Count = 1000
    keep_checkpoints: Positive = 2
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
class Config:
    """One run. See the recipes for complete examples."""

    seed: Count = 0
    data: DataConfig = field(default_factory=DataConfig)
    views: ViewConfig = field(default_factory=ViewConfig)
    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    head: HeadConfig = field(default_factory=HeadConfig)
    prototypes: PrototypeConfig = field(default_factory=PrototypeConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    run: RunConfig = field(default_factory=RunConfig)
    log: LogConfig = field(default_factory=LogConfig)


for _cls in (DataConfig, ViewConfig, BackboneConfig, HeadConfig, MixtureConfig, PrototypeConfig,
             TeacherConfig, OptimConfig, RunConfig, LogConfig, Config):  # fmt: skip
    _cls.__pydantic_config__ = _strict  # type: ignore[union-attr]


def targets_of(prototypes: PrototypeConfig) -> TargetKind:
    """The teacher's target that is in force: the recipe's, or the mode's own."""
    return prototypes.targets or _own_targets(prototypes.kind)


def _own_targets(kind: PrototypeKind) -> TargetKind:
    return "posterior" if kind == "decoupled" else "centred"


def arm_name(prototypes: PrototypeConfig) -> str:
    """What a comparison calls such a run: its mode, and its targets where they are not the mode's own."""
    targets = targets_of(prototypes)
    return prototypes.kind if targets == _own_targets(prototypes.kind) else f"{prototypes.kind}-{targets}"


def arm_keys(arm: str) -> dict[str, Any]:
    """The keys of a recipe that make an arm of `ARMS`; the inverse of `arm_name`."""
    kind, balanced = arm.removesuffix("-sinkhorn"), arm.endswith("-sinkhorn")
    return {"prototypes.kind": kind, **({"prototypes.targets": "sinkhorn"} if balanced else {})}


def recipe_names() -> list[str]:
    """Names of the recipes that ship with the package."""
    folder = resources.files("uncollapse") / "recipes"
    return sorted(f.name.removesuffix(".yaml") for f in folder.iterdir() if f.name.endswith(".yaml"))


def read_recipe(recipe: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file, given by path or by the name of a recipe that ships with the package.

    Raises:
        ConfigError: no such recipe, unreadable YAML, or something other than a mapping.
    """
    path = Path(recipe)
    if str(recipe) in recipe_names():
        text = (resources.files("uncollapse") / "recipes" / f"{recipe}.yaml").read_text(encoding="utf-8")
        content = parse_yaml(text, str(recipe))
    elif path.is_file():
        content = read_yaml(path)
    else:
        close = difflib.get_close_matches(str(recipe), recipe_names(), n=1)
        hint = f"did you mean {close[0]}? " if close else ""
        raise ConfigError(
            f"no recipe {str(recipe)!r}: {hint}give the path of a YAML file or one of {', '.join(recipe_names())}"
        )
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f"{recipe}: expected keys and values, found a {type(content).__name__}")
    return content


def set_key(content: dict[str, Any], key: str, value: Any) -> None:
    """Sets a dotted key (``optim.lr``) in nested mappings, in place."""
    *parents, last = key.split(".")
    for i, parent in enumerate(parents):
        content = content.setdefault(parent, {})
        if not isinstance(content, dict):
            raise ConfigError(f"{key}: {'.'.join(parents[: i + 1])} is a value, it has no keys of its own")
    content[last] = value


def _known_keys(prefix: list[str]) -> list[str]:
    cls: Any = Config
    for name in prefix:
        types = {f.name: f.default_factory for f in dataclasses.fields(cls)}
        cls = types.get(name)
        if not dataclasses.is_dataclass(cls):
            return []
    return [f.name for f in dataclasses.fields(cls)]


def all_keys(prefix: Sequence[str] = ()) -> list[str]:
    """Every dotted key of a recipe."""
    inner = [[*prefix, name] for name in _known_keys(list(prefix))]
    return [key for path in inner for key in (all_keys(path) or [".".join(path)])]


def _one_line(error: ValidationError, source: str) -> str:
    first = error.errors()[0]
    location = [str(part) for part in first["loc"]]
    key = ".".join(location)
    if first["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        known = _known_keys(location[:-1])
        close = difflib.get_close_matches(location[-1], known, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"known here: {', '.join(known)}"
        return f"{source}: unknown key {shortened(key)!r} ({hint})"
    message = first["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
    message = message if first["type"] == "value_error" else f"should be {message}"
    return f"{source}: {key}: {message}, got {shortened(repr(first['input']))}"


@functools.cache
def _adapter() -> TypeAdapter[Config]:
    return TypeAdapter(Config)  # a fifth of a second to make


def build_config(content: dict[str, Any], source: str = "config", retired: bool = False) -> Config:
    """A validated :class:`Config` from nested mappings.

    Args:
        content: as YAML or a checkpoint has it.
        source: what to call it in an error.
        retired: whether options that no longer exist are left out, to look at what a run of before has made; without
            it, only where they change nothing.

    Raises:
        ConfigError: unknown key, wrong type or impossible value; one line that names the key.
    """
    content = _as_now(content, source, retired)
    try:
        config = _adapter().validate_json(json.dumps(content, ensure_ascii=False).encode(), strict=True)
    except ValidationError as error:
        raise ConfigError(_one_line(error, source)) from None
    except UnicodeEncodeError as error:  # of a path: nothing else can hold such bytes
        near = shown(error.object[max(0, error.start - 60) : error.end + 20])
        raise ConfigError(f"{source}: {near}: not UTF-8; reach it by another name, such as a symbolic link") from None
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{source}: {' '.join(str(error).split())}") from None
    from uncollapse.impossible import impossible

    for key, problem in impossible(config):
        raise ConfigError(f"{source}: {key}: {problem}")
    return config


def _as_now(content: dict[str, Any], source: str, retired: bool) -> dict[str, Any]:
    """Keys of run folders of before under their names of today; what no longer exists is refused where it was used."""
    prototypes = content.get("prototypes")
    if not isinstance(prototypes, dict):
        return content
    mixture = prototypes.get("mixture")
    if not isinstance(mixture, dict):
        return content
    if mixture.get("queue") and not retired:
        raise ConfigError(
            f"{source}: prototypes.mixture.queue: this option was removed, because rows of earlier steps took the "
            "balance and left the batch's own without; leave it out"
        )
    rest = {key: value for key, value in mixture.items() if key not in ("target", "queue")}
    targets = {"targets": mixture["target"]} if "target" in mixture else {}
    return {**content, "prototypes": {**targets, **prototypes, "mixture": rest}}


def load_config(recipe: str | Path, overrides: dict[str, Any] | None = None) -> Config:
    """Recipe and overrides (dotted keys), merged and validated.

    Raises:
        ConfigError: see :func:`read_recipe` and :func:`build_config`.
    """
    content = read_recipe(recipe)
    overrides = overrides or {}
    backbone = content.get("backbone")
    renamed = isinstance(backbone, dict) and overrides.get("backbone.name", backbone.get("name")) != backbone.get(
        "name"
    )
    if renamed and isinstance(backbone, dict):
        backbone.pop("options", None)  # those of the recipe's own model, which another one does not take
    for key, value in overrides.items():
        set_key(content, key, value)
    return build_config(content, str(recipe))


def dump_config(config: Config) -> str:
    """The configuration as YAML that :func:`load_config` reads back to an equal one."""
    return yaml.safe_dump(json.loads(json.dumps(dataclasses.asdict(config))), sort_keys=False)
