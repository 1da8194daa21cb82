"""Our own checkpoints: encoder and directions as the configuration inside says, within what the file can hold.

The configuration is as much a stranger's as the tensors are. Only names from timm's own list and plain numbers of a
sensible size reach timm, and nothing is built that is larger than the weights that are there to fill it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

import torch.nn.functional as F
from torch import Tensor, nn

from uncollapse.checkpoints.files import line_of
from uncollapse.checkpoints.prototypes import OWN, PrototypeSet
from uncollapse.checkpoints.within import Within
from uncollapse.errors import InputError

if TYPE_CHECKING:
    from uncollapse.config.schema import Config
    from uncollapse.models.network import Encoder

M = TypeVar("M", bound=nn.Module)
_ENTRIES, _DEEP, _LONG = 2000, 8, 1000
"""Of a configuration: its most entries, levels and letters of a text."""
_LARGEST, _PIXELS, _BLUR = 16_384, 1024, 100.0
"""Most blocks, widths or heads; sides of an image; and standard deviation of a blur."""


def own_config(loaded: Any, where: object) -> Config:
    """The configuration in one of our checkpoints.

    Raises:
        InputError: none there, or one that no run of ours can have had.
    """
    from uncollapse.config.load import build_config
    from uncollapse.config.schema import DataConfig
    from uncollapse.errors import ConfigError

    content = loaded.get("config") if isinstance(loaded, dict) else None
    if not isinstance(content, dict):
        raise InputError(f"{where}: a checkpoint without its configuration, so the encoder cannot be rebuilt")
    try:
        config = build_config(_plain(content, where), str(where), retired=True)
    except (ConfigError, AttributeError) as error:
        raise InputError(f"{where}: its configuration was not understood ({line_of(error)})") from None
    sizes = {f"backbone.options: {name}": value for name, value in config.backbone.options.items()}
    sizes |= {f"head.{name}": getattr(config.head, name) for name in ("hidden", "layers", "bottleneck")}
    for name, value in sizes.items():
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, dict) or (isinstance(number, int | float) and not abs(number) <= _LARGEST):
                raise InputError(f"{where}: {name} {line_of(ValueError(value))} in its configuration; it was not built")
    if config.views.global_size > _PIXELS or config.views.blur_sigma[1] > _BLUR:
        raise InputError(
            f"{where}: views of {config.views.global_size} pixels, blurred by up to {config.views.blur_sigma[1]:g}, in "
            f"its configuration; at most {_PIXELS} and {_BLUR:g} are looked at"
        )
    # How much memory and how many processes the reader may use is not the file's to say.
    data = replace(config.data, memory_gb=DataConfig().memory_gb, workers=min(config.data.workers, 8))
    return replace(config, data=data)


def _plain(content: Any, where: object) -> Any:
    """A copy of plain values; of anything else, or too much of it, an `InputError`."""
    left = _ENTRIES

    def copied(value: Any, depth: int) -> Any:
        nonlocal left
        left -= 1
        if left < 0 or depth > _DEEP:
            raise InputError(f"{where}: a configuration of more entries or levels than any of ours; it was not read")
        if isinstance(value, dict):
            return {copied(name, depth + 1): copied(inner, depth + 1) for name, inner in value.items()}
        if isinstance(value, list | tuple):
            return [copied(inner, depth + 1) for inner in value]
        if isinstance(value, str) and len(value) <= _LONG:
            return value
        if value is None or isinstance(value, bool | float) or (isinstance(value, int) and value.bit_length() <= 64):
            return value
        raise InputError(
            f"{where}: its configuration holds a {type(value).__name__} or a value too long to be one of ours"
        )

    return copied(content, 0)


def own_encoder(loaded: Any, side: str, where: object) -> tuple[Encoder, Config]:
    """The encoder of one side (``student`` or ``teacher``), in evaluation mode; SwAV's only one for either.

    Raises:
        InputError: no configuration, no weights, or the two do not fit.
    """
    from uncollapse.config.facts import has_teacher
    from uncollapse.models.network import build_encoder

    config = own_config(loaded, where)
    weights = _weights(loaded, side if has_teacher(config) else "student", where)
    return _filled(lambda: build_encoder(config, drop_path=False), weights, where), config


def own_backbone(loaded: Any, side: str, where: object) -> tuple[nn.Module, Config]:
    """The backbone alone of one side, in evaluation mode, as `own_encoder` has it; no head is needed.

    Raises:
        InputError: no configuration, no weights, or the two do not fit.
    """
    from uncollapse.config.facts import has_teacher, hides_patches
    from uncollapse.models.backbones import build_backbone

    config = own_config(loaded, where)
    prefix = "backbone.vit." if hides_patches(config) else "backbone."
    weights = _weights(loaded, side if has_teacher(config) else "student", where)
    weights = {name.removeprefix(prefix): t for name, t in weights.items() if name.startswith(prefix)}
    return _filled(lambda: build_backbone(config.backbone, drop_path=False)[0], weights, where), config


def _weights(loaded: Any, side: str, where: object) -> dict[str, Tensor]:
    weights = loaded.get(side)
    if not isinstance(weights, Mapping) or not all(isinstance(t, Tensor) for t in weights.values()):
        other = next((name for name in ("teacher", "student") if isinstance(loaded.get(name), Mapping)), "")
        raise InputError(f"{where}: it holds no weights of a {side}" + (f", only of a {other}" if other else ""))
    return dict(weights)


def _filled(build: Callable[[], M], weights: dict[str, Tensor], where: object) -> M:
    """What is built no larger than the weights, and filled with all of them."""
    try:
        with Within(weights.values()):
            module = build()
        module.load_state_dict(weights)
    except Exception as error:  # timm may fail in any way on options that are not its own
        raise InputError(f"{where}: its encoder does not fit its configuration ({line_of(error)})") from None
    return module.eval()


def own_directions(loaded: Any, s: PrototypeSet, tensors: Mapping[str, Tensor]) -> PrototypeSet:
    """A set as it enters the logits of training: a mixture's directions, its means kept beside them; a vMF model's

    rows with their normalisers. Any other set as it is.
    """
    stem = s.key.removesuffix("mean")
    of = loaded.get("prototypes_of") if isinstance(loaded, dict) else None
    if OWN.match(s.key) and of in ("student", "teacher"):
        s = replace(s, side=of)  # an export has one side's alone
    if OWN.match(s.key) and s.scale is not None:
        return _with_normaliser(loaded, s)
    if OWN.match(s.key) and s.bias is not None and s.side == "shared":
        unit = s.weight.shape[1] ** 0.5  # what a clustering's layer is divided by where both sides are the layer
        return replace(s, weight=s.weight / unit, bias=s.bias / unit)
    if s.family != "uncollapse" or stem == s.key:
        return s
    notes: tuple[str, ...] = ()
    stated = tensors.get(f"{stem}is_centred")
    if stated is not None and stated.numel() == 1:
        centred = bool(stated)
    elif OWN.match(s.key) and isinstance(loaded, dict) and isinstance(loaded.get("config"), dict):
        centred, notes = _centred_by_config(loaded)
    else:
        centred = f"{stem}beta" in tensors  # the default since mixtures have one
        notes = (f"the file does not say whether the mixture is centred: taken as {'' if centred else 'not '}centred",)
    s = replace(s, notes=(*s.notes, *notes))
    return replace(s, weight=s.weight - s.weight.mean(0), means=s.weight) if centred else s


def _with_normaliser(loaded: Any, s: PrototypeSet) -> PrototypeSet:
    from uncollapse.prototypes.vmf import vmf_bias

    try:
        if loaded["config"]["prototypes"]["vmf"] is not True:
            return s
        tau = own_config(loaded, "").teacher.temperature
    except (InputError, KeyError, TypeError, AttributeError):
        return s  # of before there was one, or a configuration that no run of ours can have had
    assert s.scale is not None
    rows = F.normalize(s.weight.float(), dim=1) * s.scale[:, None]
    return replace(s, bias=tau * vmf_bias(rows, tau))  # a layer's bias is divided by the temperature too


def _centred_by_config(loaded: Any) -> tuple[bool, tuple[str, ...]]:
    from uncollapse.prototypes.decoupled import mixture_defaults

    try:
        mixture = _plain(loaded["config"], "")["prototypes"]["mixture"]
        if "centred" not in mixture:
            return False, ()  # written before mixtures could be
        chosen = own_config(loaded, "").prototypes
        return bool(mixture_defaults(chosen.kind, chosen.mixture).centred), ()
    except (InputError, KeyError, TypeError, AttributeError):
        return False, ("its configuration is of another version, or damaged: means taken as they are",)
