"""Where prototypes are in a checkpoint: layouts as data, and the few lines that apply them.

A layer of prototypes is recognised by the end of its path (``LAYERS``), its weight by one of three spellings
(``SPELLINGS``), student or teacher by the words along the path. Repositories differ only in rows of these
tables. Sources: the code that writes each kind of checkpoint (facebookresearch/dino, bytedance/ibot,
facebookresearch/msn, microsoft/esvit, sthalles/carp, facebookresearch/capi, facebookresearch/dinov2 and dinov3,
facebookresearch/swav, lightly-ai/lightly, vturrisi/solo-learn).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from uncollapse.errors import InputError

Side = Literal["student", "teacher", "shared", "unstated"]

LAYERS: tuple[tuple[str, str], ...] = (
    (r"(^|\.)head_dense\.last_layer$", "region"),  # EsViT
    (r"(^|\.)last_layer2$", "patch"),  # iBOT; an alias of the class head where that is shared
    (r"(^|\.)\w*ibot_head\.last_layer$", "patch"),  # DINOv2, DINOv3, Web-SSL
    (r"(^|\.)\w*patch_head\.last_layer$", "patch"),  # lightly's iBOT
    (r"(^|\.)last_layer$", "cls"),  # DINO, iBOT, EsViT, CARP, CAPI's student, DINOv2, lightly, solo-learn
    (r"(^|\.)(\w*head|clustering\w*)\.layer$", "clusters"),  # CAPI's teacher
    (r"^layer$", "clusters"),  # the same module saved alone
    (r"(^|\.)\w*prototypes(\.prototypes\d+|\.heads\.\d+|\.\d+|\d+)?$", "cls"),  # MSN, SwAV, lightly, solo-learn
)
"""End of a layer's path, and the name of the set of prototypes it is. The first that fits counts."""

SPELLINGS: tuple[tuple[str, str | None], ...] = (
    ("weight_v", "weight_g"),  # weight norm as torch.nn.utils.weight_norm writes it
    ("parametrizations.weight.original1", "parametrizations.weight.original0"),  # as the newer one does
    ("weight", None),  # a plain linear layer: rows are normalised for the cosine, lengths are kept as norms
    ("", None),  # a bare parameter
)
"""Name of the directions in a layer and, where the prototype is ``g · v / |v|``, of g."""

WRAPPERS = frozenset(
    ["module", "_orig_mod", "_fsdp_wrapped_module", "_fpw_module", "_checkpoint_wrapped_module", "_forward_module"]
)
"""Path components that data-parallel, sharding, checkpointing and compiling wrappers insert."""

TEACHER = re.compile(r"teacher|target|momentum|(^|_)ema($|_)")
STUDENT = re.compile(r"student|^encoder$|(^|_)(online|anchor)($|_)")

OWN = re.compile(r"^prototypes/(\w+)/(?:(student|teacher)_v|weight|mixture\.mean)$")
"""Prototypes in a checkpoint of this package."""

MIXTURE = re.compile(r"^((?:.*[./])?)mean$")
"""Means of an `OnlineMixture`, where its variances, evidence and offsets stand beside them."""

FAMILIES: tuple[tuple[str, str], ...] = (
    ("uncollapse", r"^prototypes/\w+/((student|teacher)_v|weight|mixture\.mean)$"),
    ("EsViT", r"head_dense\."),
    ("iBOT", r"last_layer2\.|^ibot_loss"),
    ("DINOv2 / DINOv3", r"(^|[./])ibot_head\.|(^|[./])dino_head\."),
    ("CAPI", r"(^|[./])head\.layer\.weight$|^layer\.weight$|^clustering|\.residual1\.fn\."),
    ("MSN", r"^target_encoder/"),
    ("solo-learn", r"momentum_head\.|(^|[./])projector\.\d|^state_dict/classifier\."),
    ("lightly", r"(^|[./])(student|teacher|anchor)_(projection_)?head\.|prototypes\.heads\.\d"),
    ("SwAV", r"(^|[./])projection_head\.\d"),
    ("DINO", r"^dino_loss"),
    ("CARP", r"^teacher/(module\.)?head\.mlp\.1\.running_mean"),  # DINO's layout without its loss's centre
    ("DINO", r"head\.last_layer\."),
)
"""Name of a family, and the path of a tensor that gives it away. Informative only: nothing is decided by it."""

WHERE_ELSE = (
    "prototypes are in the full training checkpoint: DINO's *_full_checkpoint.pth, iBOT's checkpoint.pth, "
    "MSN's *.pth.tar, EsViT's and CARP's checkpoint*.pth, Web-SSL's *_ssl_heads.pth, DINOv2's "
    "teacher_checkpoint.pth (Meta released no DINOv2 or DINOv3 heads)"
)


@dataclass(frozen=True)
class PrototypeSet:
    """One matrix of prototypes found in a file."""

    key: str
    """Its path in the file, levels joined by ``/``; empty for a bare tensor."""
    name: str
    """``cls``, ``patch``, ``region``, ``clusters``, or the name a run of ours gave it."""
    side: Side
    family: str
    weight: Tensor
    """(K, D), any floating dtype: directions, of any length."""
    scale: Tensor | None = None
    """(K,) g of weight norm; None where the rows are what they are."""
    bias: Tensor | None = None
    """(K,) float32 that the layer adds to its logits; None without."""
    notes: tuple[str, ...] = ()
    means: Tensor | None = None
    """(K, D) means of a mixture whose logits use other directions, ``weight``; None where they are the same."""

    def directions(self) -> Tensor:
        """(K, D): the rows, turned round where g is negative, zero where g is, and NaN where g is not finite."""
        if self.scale is None:
            return self.weight
        sign = torch.where(torch.isfinite(self.scale), self.scale.sign(), torch.nan)
        return self.weight * sign[:, None].to(self.weight.dtype)

    def norms(self) -> Tensor:
        """(K,) float64: lengths of the effective prototypes, |g| under weight norm."""
        if self.scale is not None:
            return self.scale.double().abs()
        return torch.cat([_lengths(part.double()) for part in self.weight.split(1 << 14)])

    def lengths(self) -> Tensor | None:
        """(K,) float32: lengths of the prototypes in the logits of training; None where those are cosines.

        SwAV and MSN normalise their prototypes before every product. DINOv3's and CAPI's plain linear layers
        do not, nor does a clustering of ours, and weight norm gives each the length g.
        """
        if self.scale is not None:
            return self.scale.float().abs()
        clustered = self.bias is not None and OWN.match(self.key)
        linear = clustered or re.search(r"(^|[./])(last_layer2?|layer)\.weight$", self.key)
        return self.norms().float() if linear else None


def _lengths(rows: Tensor) -> Tensor:
    largest = rows.abs().amax(1).clamp_min(torch.finfo(torch.float64).tiny)  # squares of 1e200 overflow
    return largest * (rows / largest[:, None]).norm(dim=1)


def clean(key: str) -> str:
    """A path without the components that wrappers insert: ``student/module.head…`` → ``student/head…``."""
    levels = [".".join(p for p in level.split(".") if p not in WRAPPERS) for level in key.split("/")]
    return "/".join(level for level in levels if level)


def find_prototypes(tensors: Mapping[str, Tensor], where: str, key: str | None = None) -> list[PrototypeSet]:
    """The prototype sets among the tensors of a file (`flatten`), aliases left out, teachers first.

    Args:
        tensors: path → tensor. where: the file's name, for messages. key: take this tensor and no other.

    Raises:
        InputError: none found, or ``key`` names none or one that cannot be prototypes.
    """
    if key is not None:
        return [_picked(tensors, where, key)]
    sets: list[PrototypeSet] = []
    unusable: list[InputError] = []
    for path, tensor in tensors.items():
        try:
            s = _match(path, tensor, tensors, where)
        except InputError as error:
            unusable.append(error)
            continue
        sets += [] if s is None else [s]
    if not sets and unusable:
        raise unusable[0]
    if not sets:
        return [_bare(tensors, where)]
    left_out = tuple(f"left out: {str(error).removeprefix(f'{where}: ')}" for error in unusable)
    sets[0] = replace(sets[0], notes=(*sets[0].notes, *left_out))
    order = {"teacher": 0, "student": 1, "shared": 2, "unstated": 3}
    # Where a mixture stands beside a layer, its means are the prototypes and the layer is often an unused one.
    sets.sort(key=lambda s: (not s.key.endswith("mean"), order[s.side]))
    return _without_aliases(_told_apart(sets))


def may_be_prototypes(path: str) -> bool:
    """Whether a tensor at this path can be prototypes, or belongs to their layer."""
    cleaned = clean(path)
    last = cleaned.rpartition("/")[2]
    if re.search(r"(^|\.)(mean|variance|evidence|offset|beta|is_centred)$", last):
        return True  # of a mixture, perhaps
    layers = {last, *(last.removesuffix("." + n) for pair in (*SPELLINGS, ("bias", None)) for n in pair if n)}
    own = OWN.match(re.sub("/(bias|student_g|teacher_g)$", "/weight", cleaned))
    return bool(own) or any(re.search(sign, layer) for layer in layers for sign, _ in LAYERS)


def family_of(tensors: Mapping[str, Tensor]) -> str:
    paths = [clean(path) for path in tensors]
    return next((name for name, sign in FAMILIES if any(re.search(sign, p) for p in paths)), "unknown")


def _match(path: str, tensor: Tensor, tensors: Mapping[str, Tensor], where: str) -> PrototypeSet | None:
    cleaned = clean(path)
    if own := OWN.match(cleaned):
        folder = path.rpartition("/")[0]
        beside = {name for name in ("student_v", "teacher_v", "weight") if f"{folder}/{name}" in tensors}
        side: Side = own[2] or "shared"  # type: ignore[assignment]
        if side == "student" and not beside & {"teacher_v", "weight"}:
            side = "shared"  # nothing follows them, as in SwAV
        elif side == "shared" and "student_v" in beside:
            side = "teacher"  # a clustering, whose assignments a student's own weights predict
        scale = tensors.get(path.removesuffix("_v") + "_g") if own[2] else None
        bias, notes = _bias(tensor, None if own[2] else tensors.get(f"{folder}/bias"))
        return checked(PrototypeSet(path, own[1], side, family_of(tensors), tensor, _flat(scale), bias, notes), where)
    if _is_mixture(path, tensor, tensors):
        return checked(PrototypeSet(path, "mixture", "shared", "uncollapse", tensor), where)
    last = cleaned.rpartition("/")[2]
    for weight, g in SPELLINGS:
        if weight and not (last == weight or last.endswith("." + weight)):
            continue
        layer = last[: len(last) - len(weight)].rstrip(".") if weight else last
        name = next((name for sign, name in LAYERS if re.search(sign, layer)), None)
        if name is None or tensor.ndim != 2:
            continue
        stem = path[: len(path) - len(weight)]
        if name == "clusters" and stem + "bias" not in tensors:
            continue  # CAPI's layer has a bias; without it, a "layer" can be anything
        scale = tensors.get(stem + g) if g else None
        bias, notes = _bias(tensor, tensors.get(stem + "bias"))
        family = family_of(tensors)
        if family == "CAPI" and name == "cls":
            name = "patch"  # the student predicts the clusters of masked patches; CAPI has no class token
        return checked(PrototypeSet(path, name, side_of(cleaned), family, tensor, _flat(scale), bias, notes), where)
    return None


def _bias(weight: Tensor, bias: Tensor | None) -> tuple[Tensor | None, tuple[str, ...]]:
    """A layer's bias where it has one that fits, and what is said of it."""
    if bias is None or bias.shape != weight.shape[:1]:
        return None, ()
    return bias.float(), ("the layer has a bias too: the cosine does not see it, its logits do",)


def _is_mixture(path: str, tensor: Tensor, tensors: Mapping[str, Tensor]) -> bool:
    match = MIXTURE.match(path)
    beside = [tensors.get(f"{match[1]}{name}") for name in ("variance", "evidence", "offset")] if match else []
    if not beside or any(t is None for t in beside) or tensor.ndim != 2:
        return False
    return all(t is not None and t.shape == tensor.shape[:1] for t in beside[1:])


def side_of(cleaned: str) -> Side:
    """Student or teacher, by the first word along a cleaned path that says it."""
    for part in re.split(r"[/.]", cleaned):
        if TEACHER.search(part):
            return "teacher"
        if STUDENT.search(part):
            return "student"
    return "unstated"


def _told_apart(sets: list[PrototypeSet]) -> list[PrototypeSet]:
    """Sets that say nothing are the student's where a teacher's stands beside them, and shared otherwise.

    solo-learn writes ``head`` beside ``momentum_head``; MSN and SwAV have one matrix for both sides.
    """
    teachers = {s.name for s in sets if s.side == "teacher"}
    single = {s.family for s in sets if s.family in ("MSN", "SwAV")}
    out = []
    for s in sets:
        if s.side == "unstated" and s.name in teachers:
            s = replace(s, side="student")
        elif s.side == "unstated" and single:
            s = replace(s, side="shared")
        out.append(s)
    return out


def _without_aliases(sets: list[PrototypeSet]) -> list[PrototypeSet]:
    """Of equal matrices on one side the first is kept: a shared head is saved under two names."""
    kept: list[PrototypeSet] = []
    for s in sets:
        twin = next((i for i, other in enumerate(kept) if other.side == s.side and _equal(other, s)), None)
        if twin is None:
            kept.append(s)
        else:
            why = "a shared head" if s.name != kept[twin].name else "saved under two names"
            note = f"{s.key} ({s.name}) is the same matrix: {why}, counted once"
            kept[twin] = replace(kept[twin], notes=(*kept[twin].notes, note))
    return kept


def _equal(a: PrototypeSet, b: PrototypeSet) -> bool:
    if a.weight.shape != b.weight.shape or a.weight.dtype != b.weight.dtype:
        return False
    if (a.scale is None) != (b.scale is None):
        return False
    same_scale = a.scale is None or b.scale is None or torch.equal(a.scale, b.scale)
    # equal_nan, or a damaged shared head would count twice
    return same_scale and bool(torch.allclose(a.weight, b.weight, rtol=0, atol=0, equal_nan=True))


def _flat(scale: Tensor | None) -> Tensor | None:
    return None if scale is None else scale.reshape(-1).float()


def checked(s: PrototypeSet, where: str) -> PrototypeSet:
    """The set as it is, 8-bit floats widened.

    Raises:
        InputError: no dense floating (K, D) matrix with values.
    """
    spot = f"{where}{': ' + s.key if s.key else ''}"
    if s.weight.is_floating_point() and (s.weight.layout != torch.strided or s.weight.is_meta):
        raise InputError(f"{spot}: a sparse tensor, or one without values; save it as an ordinary dense one")
    if s.weight.ndim != 2 or 0 in s.weight.shape:
        raise InputError(f"{spot}: shape {tuple(s.weight.shape)} is not prototypes × dimensions")
    if not s.weight.is_floating_point():
        raise InputError(
            f"{spot}: holds {str(s.weight.dtype).removeprefix('torch.')}; prototypes are floating-point numbers "
            "(quantised weights have to be dequantised first)"
        )
    if s.weight.element_size() == 1:
        # 8-bit floats have no arithmetic of their own
        was = str(s.weight.dtype).removeprefix("torch.")
        try:
            wide = s.weight.float()
        except (RuntimeError, NotImplementedError):
            raise InputError(f"{spot}: holds {was}, which torch cannot widen; save it as float16 or wider") from None
        s = replace(s, weight=wide, notes=(*s.notes, f"stored as {was}, counted in float32"))
    if s.scale is not None and len(s.scale) not in (1, len(s.weight)):
        raise InputError(f"{spot}: {len(s.scale)} lengths g for {len(s.weight)} prototypes; one each was expected")
    if s.scale is not None and len(s.scale) == 1:
        s = replace(s, scale=s.scale.expand(len(s.weight)))
    return s


def _picked(tensors: Mapping[str, Tensor], where: str, key: str) -> PrototypeSet:
    wanted = key.replace(".", "/")
    matching = [p for p in tensors if p.replace(".", "/") == wanted]
    matching = matching or [p for p in tensors if clean(p).replace(".", "/") == wanted]
    if not matching:
        matrices = [p for p, t in tensors.items() if t.ndim == 2]
        listed = ", ".join(matrices[:8]) + (f" and {len(matrices) - 8} more" if len(matrices) > 8 else "")
        raise InputError(f"{where}: no tensor {key!r}; its matrices are {listed or 'none'}")
    path = matching[0]
    tensor = tensors[path]
    known = _match(path, tensor, tensors, where) if tensor.ndim == 2 else None
    return known or checked(PrototypeSet(path, "picked", side_of(clean(path)), family_of(tensors), tensor), where)


def _bare(tensors: Mapping[str, Tensor], where: str) -> PrototypeSet:
    """The only matrix of a file without any layer that is known."""
    matrices = [p for p, t in tensors.items() if t.ndim == 2]
    if len(tensors) <= 3 and len(matrices) == 1:
        notes = ("the only matrix of the file; nothing in it says that these are prototypes",) if matrices[0] else ()
        only = PrototypeSet(matrices[0], "bare", "unstated", "bare tensor", tensors[matrices[0]], notes=notes)
        return checked(only, where)
    if not tensors:
        raise InputError(
            f"{where}: it holds no tensors (states of optimisers aside), so there are no prototypes in it; {WHERE_ELSE}"
        )
    if len(tensors) <= 3 and not matrices:
        shapes = ", ".join(str(tuple(t.shape)) for t in tensors.values())
        raise InputError(f"{where}: shape {shapes} is not prototypes × dimensions")
    if any("_flat_param" in p or p.endswith("flat_param") for p in tensors):
        raise InputError(
            f"{where}: FSDP's flattened parameters, whose layers cannot be told apart; save a full state dict"
        )
    encoder = [p for p in tensors if re.search(r"patch_embed|blocks?\.\d+\.|layer[1-4]\.\d+\.|stages?\.\d+", p)]
    if encoder:
        raise InputError(f"{where}: a backbone without prototypes ({len(tensors)} tensors); {WHERE_ELSE}")
    listed = ", ".join(f"{p} {tuple(tensors[p].shape)}" for p in matrices[:6])
    raise InputError(
        f"{where}: no layer here is known to hold prototypes; "
        + (f"pick one with --key: {listed}" if matrices else "and it holds no matrix at all")
    )
