"""What each objective has of its own, one record a method; what several share is in `schema`. Free of torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import ConfigDict, Field

Targets = Literal["centred", "sinkhorn", "softmax"]
"""How a method makes the teacher's target of its logits, where the prototypes have no posterior of their own."""

_Share = Annotated[float, Field(ge=0, le=1)]
_strict = ConfigDict(extra="forbid", allow_inf_nan=False)


@dataclass(frozen=True)
class DINO:
    """Caron et al. 2021; with ``prototypes.vmf`` DINO-vMF (Govindarajan et al. 2023)."""

    name: Literal["dino"] = "dino"
    center: Literal["logits", "probabilities"] = "logits"
    """What the centre averages: raw logits (DINO), or the log of the teacher's probabilities (DINO-vMF)."""


@dataclass(frozen=True)
class IBOT:
    """Zhou et al. 2022; with ``prototypes.vmf`` iBOT-vMF."""

    name: Literal["ibot"] = "ibot"
    center: Literal["logits", "probabilities"] = "logits"
    """As DINO's."""
    shared: bool = True
    """Whether class and patch tokens share their prototypes; they always share the head's MLP."""
    patch_weight: Annotated[float, Field(ge=0)] = 1.0
    """Of the patches' term."""
    masked_crops: _Share = 0.5
    """Share of the global crops of which some patches are hidden from the student."""
    mask_ratio: tuple[_Share, _Share] = (0.1, 0.5)
    """Share of the patches that are hidden in such a crop: uniform between these."""
    patch_temperature_start: Annotated[float, Field(gt=0)] = 0.04
    """The teacher's first temperature over patches; it rises to ``teacher.temperature`` with the other."""


@dataclass(frozen=True)
class DINOv2:
    """Oquab et al. 2023; the numbers are its released code's for ViT-L/16 on ImageNet-1K."""

    name: Literal["dinov2"] = "dinov2"
    shared: bool = True
    """Whether class and patch tokens share one head and its prototypes; else each has an MLP and prototypes of its
    own."""
    patch_bottleneck: Annotated[int, Field(ge=1, le=2**16)] | None = None
    """Length of the patches' projections with a head of their own; null: ``head.bottleneck``."""
    patch_weight: Annotated[float, Field(ge=0)] = 1.0
    """Of the patches' term."""
    masked_crops: _Share = 0.5
    """Share of a batch's global crops of which some patches are hidden from the student: exactly this one."""
    mask_ratio: tuple[_Share, _Share] = (0.1, 0.5)
    """Shares of the patches that are hidden in these crops: spread evenly between the two."""
    koleo_weight: Annotated[float, Field(ge=0)] = 0.1
    """Of KoLeo over the backbone's class features, for each of the two global crops."""
    koleo_images: Annotated[int, Field(ge=2)] = 64
    """Images whose features are compared with one another; in the released code, those of one GPU."""


@dataclass(frozen=True)
class SwAV:
    """Caron et al. 2020. It has no teacher: targets are the student's own projections of the global views."""

    name: Literal["swav"] = "swav"
    iterations: Annotated[int, Field(ge=1)] = 3
    """Of Sinkhorn."""
    queue: Annotated[int, Field(ge=0)] = 0
    """Projections of earlier batches, over all ranks, that are balanced together with the batch; a multiple of it."""
    queue_epoch: Annotated[float, Field(ge=0)] = 15.0
    """Epoch from which the queue is filled; it is used once it is full."""


@dataclass(frozen=True)
class CARP:
    """Silva & Ramírez Rivera 2023."""

    name: Literal["carp"] = "carp"
    block: Annotated[int, Field(ge=2)] = 512
    """Prototypes in each random block."""
    entropy_weight: Annotated[float, Field(ge=0)] = 1.0
    """Of the term that keeps the mean assignment even."""


@dataclass(frozen=True)
class ESVIT:
    """Li et al. 2022."""

    name: Literal["esvit"] = "esvit"
    center: Literal["logits", "probabilities"] = "logits"
    """As DINO's."""
    region_weight: _Share = 0.5
    """Of the regions' term; the views' term has the rest. The released code has a half of each."""


@dataclass(frozen=True)
class WESSL:
    """Ruan et al. 2023, over DINO; the numbers are those of its ViT-S/16 with 16 heads (Table 7)."""

    name: Literal["wessl"] = "wessl"
    center: Literal["logits", "probabilities"] = "logits"
    """As DINO's."""
    heads: Annotated[int, Field(ge=1, le=64)] = 16
    """Projection heads, each with prototypes of its own."""
    weighting: Literal["entropy", "probability", "uniform"] = "entropy"
    """How much each head counts for an image: the paper's ENT, PROB and UNIF."""
    gamma: Annotated[float, Field(gt=0, le=1e30)] = 0.05
    """Temperature of the weights by entropy, in units of ln K."""
    gamma_start: Annotated[float, Field(gt=0, le=1e30)] = 0.5
    """Its first value; it goes to ``gamma`` epoch by epoch."""
    gamma_epochs: Annotated[int, Field(ge=0)] = 30
    """Epochs in which it does."""


@dataclass(frozen=True)
class MSN:
    """Assran et al. 2022; with ``prior: power`` PMSN (Assran et al. 2023)."""

    name: Literal["msn"] = "msn"
    drop: Annotated[float, Field(ge=0, lt=1)] = 0.15
    """Share of the patches that the student's large view is seen without."""
    prior_weight: Annotated[float, Field(ge=0)] = 1.0
    """Of the divergence of the mean prediction from the prior; over a uniform one, of mean-entropy maximisation."""
    prior: Literal["uniform", "power"] = "uniform"
    """Which share of the images each prototype should get; balanced targets (``sinkhorn``) follow it too."""
    exponent: Annotated[float, Field(ge=0)] = 0.25
    """Of the power law, ``k^(-exponent)``."""
    entropy_weight: Annotated[float, Field(ge=0)] = 0.0
    """Of the mean entropy of each prediction; 0: not computed. The released recipe has 0."""


@dataclass(frozen=True)
class CAPI:
    """Darcet et al. 2025; the defaults are those of its released configuration."""

    name: Literal["capi"] = "capi"
    hidden: _Share = 0.65
    """Share of a view's patches that the student does not see; it sees one block."""
    predicted: _Share = 0.05
    """Share of the hidden patches that it predicts; at least one."""
    decoder_depth: Annotated[int, Field(ge=1)] = 12
    """Blocks of the predictor, which is as wide as the encoder."""
    iterations: Annotated[int, Field(ge=1)] = 3
    """Of Sinkhorn."""


Method = Annotated[DINO | IBOT | DINOv2 | ESVIT | WESSL | SwAV | CARP | MSN | CAPI, Field(discriminator="name")]
METHODS: dict[str, type[DINO | IBOT | DINOv2 | ESVIT | WESSL | SwAV | CARP | MSN | CAPI]] = {
    "dino": DINO,
    "ibot": IBOT,
    "dinov2": DINOv2,
    "esvit": ESVIT,
    "wessl": WESSL,
    "swav": SwAV,
    "carp": CARP,
    "msn": MSN,
    "capi": CAPI,
}
OWN_TARGETS: dict[str, Targets] = {
    "dino": "centred",
    "ibot": "centred",
    "dinov2": "centred",
    "esvit": "centred",
    "wessl": "sinkhorn",
    "swav": "sinkhorn",
    "carp": "softmax",
    "msn": "sinkhorn",
    "capi": "sinkhorn",
}
CENTRED = frozenset({"dino", "ibot", "dinov2", "esvit", "wessl"})
"""Methods that have a centre to be asked for."""

for _cls in METHODS.values():
    _cls.__pydantic_config__ = _strict  # type: ignore[union-attr]
