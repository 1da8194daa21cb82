"""What ``uncollapse evaluate`` names: a run folder, a checkpoint of any known family, or a timm model."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from uncollapse.checkpoints.backbone import Backbone
from uncollapse.checkpoints.backbones import backbone_of, renamed
from uncollapse.checkpoints.encoder import Rebuilt, backbone_part, one_side, own_parts
from uncollapse.checkpoints.encoder import rebuild_encoder as rebuild
from uncollapse.checkpoints.files import damage_is_said
from uncollapse.checkpoints.own import own_backbone, own_directions
from uncollapse.checkpoints.prototypes import OWN, PrototypeSet, clean, find_prototypes, side_of
from uncollapse.checkpoints.read import flatten, newest_of, read_tensors
from uncollapse.config.facts import has_teacher
from uncollapse.errors import ConfigError, InputError
from uncollapse.evaluate.encoder import EvalEncoder, reset
from uncollapse.models.tokens import ClassToken, is_vit
from uncollapse.shown import in_words

TIMM = "timm:"
SIZE = 224
"""Of other people's models, where they were made for larger images: what DINO's protocols crop."""


def open_encoder(
    source: str | Path,
    side: str = "teacher",
    *,
    size: int | None = None,
    weights: str | Path | None = None,
    pretrained: bool = False,
    trust: bool = False,
    seed: int = 0,
) -> EvalEncoder:
    """The encoder that ``source`` names, in evaluation mode on the CPU.

    Args:
        source: one of our run folders (its newest whole checkpoint), a checkpoint file of any family that
            `uncollapse.checkpoints.encoder` understands, with or without prototypes, or ``timm:NAME``.
        side: ``teacher`` or ``student``; a file of one network has only one.
        size: side of the images, in pixels; None: what the model was made for.
        weights: for ``timm:NAME``, a file with its weights. pretrained: download timm's own instead.
        trust: let a file run code while it loads. seed: of a timm model's random start.

    Raises:
        InputError: a file that cannot be read or understood. ConfigError: options that do not fit the source.
    """
    name = str(source)
    if size is not None and size < 8:
        raise ConfigError(f"--size: must be at least 8 pixels, got {size}")
    if name.startswith(TIMM):
        return _timm(name, size, weights, pretrained, trust, seed)
    for option, asked in (("--weights", weights is not None), ("--pretrained", pretrained)):
        if asked:
            raise ConfigError(f"{option} is for timm:NAME; {name} brings its own weights")
    with damage_is_said(source):
        file, passed_over = newest_of(Path(source))
    loaded = read_tensors(file, trust)
    tensors = flatten(loaded, file)
    encoder = _checkpoint(loaded, tensors, side, name)
    encoder.notes = [*encoder.notes, *passed_over]
    encoder.step = int(loaded.get("step") or 0) if isinstance(loaded, dict) and _is_int(loaded.get("step")) else 0
    if size is not None:
        encoder.size = size
    elif encoder.config is None:
        _cropped_as_dino(encoder)
    return encoder


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


# ------------------------------------------------------------------------------------------ checkpoints


def _checkpoint(loaded: Any, tensors: Mapping[str, Tensor], side: str, where: str) -> EvalEncoder:
    """With head and prototypes where the file has them and they were understood, else the backbone alone."""
    notes: list[str] = []
    try:
        sets = find_prototypes(tensors, where)
    except InputError:
        sets = []  # a backbone alone: nothing to diagnose, but everything to evaluate
        notes.append("no prototypes in the file: only the backbone is evaluated")
    own = any(OWN.match(s.key) for s in sets)
    if side == "student" and not own and not any(side_of(clean(path)) == "student" for path in tensors):
        raise InputError(f"{where}: it holds no student to evaluate, only one network; leave out --side")
    for s in _of_side(sets, side):
        try:
            with damage_is_said(where):
                rebuilt = rebuild(loaded, tensors, s, where)
        except InputError as error:
            if own:
                raise
            notes.append(f"evaluated without projections: {str(error).removeprefix(f'{where}: ')}")
            continue
        return _encoder(rebuilt, own_directions(loaded, s, tensors), side, where, notes)
    if sets and not notes:
        notes.append("its prototypes divide up patches, not images: only the backbone is evaluated")
    if own or (isinstance(loaded, dict) and loaded.get("exported") is True):
        return _own_backbone(loaded, side, where, notes)
    found_backbone = _backbone(tensors, side, where)
    stated = any(side_of(clean(path)) == side for path in tensors)
    return _made(
        EvalEncoder(
            _plain(found_backbone.module, found_backbone.width),
            found_backbone.size,
            described=found_backbone.described,
            name=where,
            side=side if stated else "model",
            notes=notes[:1],
            patch_tokens=found_backbone.tokens,
        )
    )


def _own_backbone(loaded: Any, side: str, where: str, notes: list[str]) -> EvalEncoder:
    """Of one of our runs whose prototypes are of no use for whole images."""
    backbone, config = own_backbone(loaded, side, where)
    made = EvalEncoder(
        backbone,
        config.views.global_size,
        config.views.mean,
        config.views.std,
        described=config.backbone.name,
        name=where,
        side=side if has_teacher(config) else "model",
        config=config,
        notes=notes,
    )
    made.untrained = lambda: _own_start(made)
    return made


def _of_side(sets: list[PrototypeSet], side: str) -> list[PrototypeSet]:
    """Sets whose prototypes divide up images, of the side or of no side, the side's own first."""
    fitting = [s for s in sets if s.name not in ("patch", "region", "clusters")]
    exact = [s for s in fitting if s.side == side]
    # Prototypes that both sides share go with the encoder of the side that was asked for.
    shared = [replace(s, side=side) for s in fitting if s.side in ("shared", "unstated")]  # type: ignore[arg-type]
    return exact + shared


def _encoder(rebuilt: Rebuilt, s: PrototypeSet, side: str, where: str, notes: list[str]) -> EvalEncoder:
    rows = s.directions().float()
    usable = torch.isfinite(rows).all(1) & (rows != 0).any(1)
    if not bool(usable.all()):
        lost = f"{int((~usable).sum())} of {len(rows)} prototypes"
        if not bool(usable.any()):
            raise InputError(f"{where}: all {len(rows)} prototypes are zero, NaN or infinite; the file is damaged")
        notes = [*notes, f"{lost} are zero, NaN or infinite and are left out: no image is theirs"]
        rows = rows[usable]
    encoder = EvalEncoder(
        _plain(rebuilt.backbone),
        rebuilt.size,
        head=rebuilt.head,
        vectors=F.normalize(rows, dim=1),
        described=rebuilt.described,
        name=where,
        side=side,
        config=rebuilt.config,
        notes=notes,
    )
    if rebuilt.config is not None:
        encoder.mean, encoder.std = rebuilt.config.views.mean, rebuilt.config.views.std
        encoder.side = side if has_teacher(rebuilt.config) else "model"
        encoder.untrained = lambda: _own_start(encoder)
        return encoder
    return _made(encoder)


def _plain(module: nn.Module, width: int | None = None) -> nn.Module:
    """A vision transformer without the wrapper that reduces it to its class token; anything else as it is."""
    if isinstance(module, ClassToken):
        if is_vit(module.vit):
            return module.vit
        width = width or int(module.vit.num_features)  # type: ignore[arg-type]
    if width is not None and not hasattr(module, "num_features"):
        module.num_features = width  # type: ignore[assignment]
    return module


def _cropped_as_dino(encoder: EvalEncoder) -> None:
    module: Any = encoder.module
    patch = int(module.patch_embed.patch_size[0]) if encoder.tokens else 0
    if patch and encoder.size > SIZE and SIZE % patch == 0:
        encoder.notes.append(f"evaluated at {SIZE} pixels, with interpolated positions; it was made for {encoder.size}")
        encoder.size = SIZE


def _own_start(encoder: EvalEncoder) -> EvalEncoder:
    """Encoder and prototypes of our run before its first step."""
    from uncollapse.models.network import build_encoder
    from uncollapse.prototypes.build import initial_prototypes

    backbone, head = own_parts(build_encoder(encoder.config, drop_path=False))
    if encoder.vectors is None:
        return _started(encoder, backbone, None, None)
    vectors = initial_prototypes(encoder.config).vectors("teacher").detach().float()
    return _started(encoder, backbone, head, vectors)


def _made(encoder: EvalEncoder) -> EvalEncoder:
    """Of other people's checkpoints the start is not known: each layer is initialised anew, without prototypes."""
    encoder.untrained = lambda: _started(encoder, reset(encoder.module), None, None)
    return encoder


def _started(encoder: EvalEncoder, module: nn.Module, head: nn.Module | None, vectors: Tensor | None) -> EvalEncoder:
    return EvalEncoder(
        module,
        encoder.size,
        encoder.mean,
        encoder.std,
        head,
        vectors,
        f"{encoder.described}, untrained",
        encoder.name,
        "untrained",
        0,
        encoder.config,
    )


def _backbone(tensors: Mapping[str, Tensor], side: str, where: str) -> Backbone:
    asked = PrototypeSet("", "", side, "", torch.empty(1, 1))  # type: ignore[arg-type]
    weights = backbone_part(one_side(tensors, asked))
    if not weights:
        first = ", ".join(list(tensors)[:3]) or "no tensor at all"
        raise InputError(
            f"{where}: no encoder in it was understood (it begins with {first}); a timm model's weights are evaluated "
            "by `timm:NAME --weights FILE`"
        )
    return backbone_of(weights, where)


# ------------------------------------------------------------------------------------------ timm models


def _timm(
    source: str, size: int | None, weights: str | Path | None, pretrained: bool, trust: bool, seed: int
) -> EvalEncoder:
    import timm
    from timm.data import resolve_model_data_config

    name = source.removeprefix(TIMM)
    if not timm.is_model(name):
        plain = name.split(".")[0]
        begun = [m for m in timm.list_models() if m.startswith(plain)]
        close = (begun or difflib.get_close_matches(plain, timm.list_models()))[:5]
        hint = f"close to it: {', '.join(close)}" if close else "timm.list_models() names what it has"
        raise ConfigError(f"{source}: timm {timm.__version__} has no model {name!r} ({hint})")
    if pretrained and weights is not None:
        raise ConfigError("--pretrained and --weights FILE exclude each other: both say where the weights are from")
    module = _create(source, name, pretrained, size, seed)
    if weights is not None:
        _load(module, Path(weights), trust, source)
    data = resolve_model_data_config(module)
    where = "downloaded weights" if pretrained else f"weights of {Path(weights).name}" if weights else "random weights"
    notes = [] if pretrained or weights else [f"{source}: random weights; --weights FILE or --pretrained gives trained"]
    encoder = EvalEncoder(
        module,
        size or int(data["input_size"][-1]),
        tuple(data["mean"]),
        tuple(data["std"]),
        described=f"timm {name}, {where}",
        name=source,
        side="model",
        notes=notes,
    )
    if pretrained or weights:
        encoder.untrained = lambda: _started(encoder, _create(source, name, False, size, seed), None, None)
    return encoder


def _create(source: str, name: str, pretrained: bool, size: int | None, seed: int) -> nn.Module:
    import timm

    options: dict[str, Any] = {"num_classes": 0}
    # Transformers fix their position embedding to a size; those that cannot be told another one say so.
    tries = [options] if size is None else [{**options, "img_size": size}, options]
    reason = ""
    for arguments in tries:
        try:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                return timm.create_model(name, pretrained=pretrained, **arguments)
        except TypeError as error:
            reason = str(error)
        except Exception as error:  # offline, no weights for this model, a proxy: each has its own class
            reason = in_words(error)[:160]
            if pretrained:
                raise ConfigError(
                    f"{source} --pretrained: timm's weights could not be downloaded, which needs internet ({reason}); "
                    "give a file with --weights FILE, or leave it out for random weights"
                ) from None
            break
    raise ConfigError(f"{source}: timm cannot build it ({reason})")


def _load(module: nn.Module, file: Path, trust: bool, source: str) -> None:
    """Weights of a file into a timm model: backbone by name, through timm's own conversions where it has any."""
    if file.is_dir():
        raise InputError(f"{file}: a folder; --weights takes a file")
    tensors = flatten(read_tensors(file, trust), file)
    weights = {path.rpartition("/")[2]: t for path, t in ((clean(p), t) for p, t in tensors.items())}
    convert = getattr(sys.modules[type(module).__module__], "checkpoint_filter_fn", None)
    wanted = module.state_dict()
    part = backbone_part(one_side(tensors, PrototypeSet("", "", "teacher", "", torch.empty(1, 1))))
    tried = [weights, part, renamed(weights), renamed(part)]
    best: tuple[int, str] = (len(wanted) + 1, "")
    for candidate in [w for w in tried if w]:
        try:
            ready = convert(dict(candidate), module) if convert is not None else candidate
            result = module.load_state_dict({n: t.float() for n, t in ready.items() if n in wanted}, strict=False)
        except Exception as error:  # a conversion meant for other files can fail in any way
            best = min(best, (len(wanted), in_words(error)[:160]))
            continue
        missing = [n for n in result.missing_keys if not n.endswith("num_batches_tracked")]
        if not missing:
            return
        best = min(best, (len(missing), f"{len(missing)} of {len(wanted)} tensors are missing: {missing[0]}"))
    raise InputError(f"{file}: these are not the weights of {source} ({best[1] or 'it holds no tensors'})")
