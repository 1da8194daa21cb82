"""What a configuration amounts to: answers that several rooms need, each worked out in one place."""

from __future__ import annotations

import difflib
from typing import Any

from uncollapse.config.methods import OWN_TARGETS, WESSL, DINOv2, SwAV
from uncollapse.config.schema import KINDS, RIVALS, TARGETS, Config, TargetKind
from uncollapse.errors import ConfigError


def targets_of(config: Config) -> TargetKind:
    """The teacher's target that is in force: the recipe's, the mode's, or the method's own."""
    return config.prototypes.targets or _own_targets(config)


def _own_targets(config: Config) -> TargetKind:
    own = OWN_TARGETS[config.method.name]
    if config.prototypes.kind == "memory" and own == "centred":
        return "sinkhorn"  # a centre follows prototypes by number, and these change
    return "posterior" if config.prototypes.kind == "decoupled" else own


def queue_of(config: Config) -> tuple[int, float]:
    """Projections of earlier batches that targets are balanced with, and the epoch from which they are kept; SwAV has
    its own."""
    if targets_of(config) == "sinkhorn-queue":
        return config.prototypes.queue, 0.0
    own = config.method if targets_of(config) == "sinkhorn" else None
    return (own.queue, own.queue_epoch) if isinstance(own, SwAV) else (0, 0.0)


def has_teacher(config: Config) -> bool:
    """Whether a network follows the student; SwAV's targets come from the student itself."""
    return config.method.name != "swav"


def head_names(config: Config) -> tuple[str, ...]:
    """The method's projection heads by the level that each projects; "cls" comes first."""
    method = config.method
    if isinstance(method, WESSL):
        return ("cls", *(f"head{i}" for i in range(2, method.heads + 1)))
    if isinstance(method, DINOv2) and not method.shared:
        return ("cls", "patch")
    return ("cls", "region") if method.name == "esvit" else ("cls",)


def hides_patches(config: Config) -> bool:
    """Whether a learned token stands in for some of the student's patches."""
    return config.method.name in ("ibot", "dinov2")


def bottleneck_of(config: Config, level: str) -> int:
    """The length of a level's projections: the head's, or of a head of its own."""
    own = getattr(config.method, "patch_bottleneck", None) if level == "patch" else None
    return own or config.head.bottleneck


def teacher_follows_prototypes(config: Config) -> bool:
    """Whether joint prototypes have a teacher's side of their own; MSN's two sides look at the same ones."""
    return has_teacher(config) and config.method.name != "msn"


def views_assigned(config: Config) -> int:
    """Of how many views of each image targets are made: of the global ones, and in MSN of the first alone."""
    return 1 if config.method.name == "msn" else config.views.global_count


def frozen(config: Config, step: int) -> str:
    """What is learned no more at a step: ``encoder``, ``prototypes``, or nothing."""
    part, _, start = config.change.freeze.partition("@")
    return part if part and step >= int(start) else ""


def centres_probabilities(config: Config) -> bool:
    """Whether the centre is one of probabilities, subtracted after the division by the temperature, not of logits."""
    return getattr(config.method, "center", "logits") == "probabilities"


def method_name(config: Config) -> str:
    """The method of an arm, such as ``carp``; with von Mises–Fisher prototypes one of its own, such as ``dino-vmf``.

    MSN with a power law for its prior is ``pmsn``.
    """
    name = "pmsn" if getattr(config.method, "prior", "uniform") == "power" else config.method.name
    vmf = config.prototypes.vmf or centres_probabilities(config)
    return f"{name}-vmf" if vmf else name


def mode_name(config: Config) -> str:
    """The mode of an arm: how prototypes are learned, and their targets where those are not the mode's own."""
    targets, protos = targets_of(config), config.prototypes
    kind = protos.diversity if protos.kind == "koleo" else protos.kind
    return kind if targets == _own_targets(config) else f"{kind}-{targets}"


def _modes() -> tuple[dict[str, dict[str, Any]], dict[str, dict[str, Any]]]:
    """Ways to learn prototypes, alone and with targets of another kind, each with the keys that make it."""
    ways: dict[str, dict[str, Any]] = {kind: {"prototypes.kind": kind} for kind in KINDS}
    ways |= {d: {"prototypes.kind": "koleo", "prototypes.diversity": d} for d in ("koleo", *RIVALS)}
    pairs = {f"{way}-{t}": {**keys, "prototypes.targets": t} for way, keys in ways.items() for t in TARGETS}
    return ways, pairs


def mode_names() -> list[str]:
    """Every mode that `arm_keys` knows."""
    return [name for modes in _modes() for name in modes]


def arm_keys(arm: str) -> dict[str, Any]:
    """The keys of a recipe that make a mode, ``KIND`` or ``KIND-TARGETS``; the inverse of `mode_name`.

    Raises:
        ConfigError: no such mode.
    """
    ways, pairs = _modes()
    if arm in ways or arm in pairs:
        return (ways | pairs)[arm]
    close = difflib.get_close_matches(arm, [*ways, *pairs], n=1)
    hint = f"did you mean {close[0]}? " if close else ""
    raise ConfigError(
        f"no way to learn prototypes {arm!r}: {hint}one of {', '.join(ways)}, alone or with targets of another kind, "
        f"as joint-{TARGETS[1]} ({', '.join(TARGETS)})"
    )
