"""Where the prototypes are on a live model, by the names that their layers have in the code of others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from uncollapse.checkpoints.prototypes import SPELLINGS, PrototypeSet, find_prototypes
from uncollapse.errors import InputError

Where = str | nn.Module | Tensor | Callable[[Any], Tensor] | None


def prototypes_of(module: nn.Module, where: Where = None) -> Tensor:
    """The prototypes of a model as they are now: ``(K, D)``, rows of any length, with a gradient if they learn by one.

    Looking for them by name costs some milliseconds: pass ``where`` in every step.

    Args:
        module: any model.
        where: the path of their layer or of the matrix itself (``"student_head.last_layer"``), the layer, the matrix,
            or a function of ``module`` that gives it. None: looked for by the names that DINO, iBOT, DINOv2, SwAV, MSN,
            CARP, CAPI, lightly and solo-learn have for it; the teacher's, where a student's stands beside it.

    Raises:
        ValueError: no prototypes found, several sets of them, or something that is no floating (K, D) matrix.
    """
    return _vectors(locate(module, where), module)


def locate(module: nn.Module, where: Where = None) -> nn.Module | Tensor | Callable[[Any], Tensor]:
    """The layer, matrix or function that `prototypes_of` reads the prototypes from; arguments and errors as there."""
    path = _found(module) if where is None else where
    place = _at(module, path) if isinstance(path, str) else path
    _vectors(place, module)
    return place


def vectors_of(place: nn.Module | Tensor | Callable[[Any], Tensor], module: nn.Module) -> Tensor:
    """What `prototypes_of` gives, without gradient, of what `locate` found.

    Raises:
        ValueError: no floating (K, D) matrix.
    """
    with torch.no_grad():
        return _vectors(place, module).detach()


def _vectors(place: nn.Module | Tensor | Callable[[Any], Tensor], module: nn.Module) -> Tensor:
    w: Any = place
    if isinstance(place, nn.Module):
        w = _matrix(place)
    elif not isinstance(place, Tensor):
        w = place(module)
    if not isinstance(w, Tensor) or w.ndim != 2 or not w.is_floating_point() or 0 in w.shape:
        what = f"shape {tuple(w.shape)} of {w.dtype}" if isinstance(w, Tensor) else type(w).__name__
        name = type(place).__name__ if isinstance(place, nn.Module) else "what was passed as prototypes"
        raise ValueError(
            f"{name} gives {what}, not prototypes (K, D): pass prototypes=, a path such as 'head.last_layer'"
        )
    return w


def _matrix(layer: nn.Module) -> Any:
    if callable(directions := getattr(layer, "directions", None)):  # a mixture
        return directions()
    if isinstance(v := getattr(layer, "weight_v", None), Tensor):
        # The older weight norm leaves in ``weight`` what it was in the last forward pass.
        g = getattr(layer, "weight_g", None)
        return v * g.sign() if isinstance(g, Tensor) else v
    return getattr(layer, "weight", None)


def _at(module: nn.Module, path: str) -> nn.Module | Tensor:
    place: Any = module
    for part in path.split("."):
        place = getattr(place, part, None)
    if not isinstance(place, nn.Module | Tensor):
        raise ValueError(f"no layer {path!r} on {type(module).__name__}; {_candidates(module)}")
    return place


def _found(module: nn.Module) -> str:
    tensors = {name: x.detach() for name, x in (*module.named_parameters(), *module.named_buffers())}
    name = type(module).__name__
    try:
        sets = find_prototypes(tensors, name)
    except InputError:
        raise ValueError(f"no prototypes found on {name}; {_candidates(module)}") from None
    sets = [s for s in sets if s.side == sets[0].side]
    if len(sets) > 1:
        listed = ", ".join(repr(_layer(s)) for s in sets)
        raise ValueError(f"{name} has several sets of prototypes: pass prototypes= one of {listed}")
    return _layer(sets[0])


def _layer(found: PrototypeSet) -> str:
    """The path of the layer whose tensor was found."""
    for name in ("mean", *(name for name, _ in SPELLINGS if name)):
        if found.key.endswith(f".{name}"):
            return found.key.removesuffix(f".{name}")
    return found.key


def _candidates(module: nn.Module) -> str:
    matrices = [(name, tuple(x.shape)) for name, x in module.named_parameters() if x.ndim == 2]
    if not matrices:
        return "it has no matrix either: pass prototypes=, a function of the module that gives them, (K, D)"
    # Prototypes come last, as a rule.
    listed = ", ".join(f"{name!r} {shape}" for name, shape in matrices[:-9:-1])
    return f"pass prototypes=, the path of their layer or of a matrix: {listed}"
