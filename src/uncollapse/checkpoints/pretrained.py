"""Starting an encoder from weights of before: a run of ours, a timm model's state dict, or a family's checkpoint."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from uncollapse.checkpoints.read import flatten, newest_of, read_tensors
from uncollapse.errors import ConfigError
from uncollapse.models.network import Encoder
from uncollapse.models.tokens import plain
from uncollapse.shown import shown

COUNTERS = "num_batches_tracked"
"""Batch norm's counters, which many files leave out and nothing here reads."""


@torch.no_grad()
def start_from(encoder: Encoder, file: str) -> list[str]:
    """Puts the weights of a file into the backbone and, where the file has the same one, into the head.

    The backbone's tensors are looked for by name and shape under every prefix of the file, and the prefix with most of
    them wins; of student and teacher the teacher. Position embeddings of another grid are resized, as timm does it.
    No file runs code.

    Args:
        encoder: changed in place.
        file: of torch.save, safetensors or numpy, or a run folder.

    Returns:
        Lines that say what was loaded, what was missing, and what was left over.

    Raises:
        InputError: the file cannot be read.
        ConfigError: it has fewer than half of the backbone's tensors, or one that is NaN or infinite.
    """
    path, lines = newest_of(Path(file))
    tensors = flatten(read_tensors(path), path)
    backbone = plain(encoder.backbone)
    wanted = {n: t for n, t in backbone.state_dict().items() if not n.endswith(COUNTERS)}
    prefix, fitting = _best_prefix(tensors, wanted)
    ready = {n: _fitted(tensors[prefix + n], n, backbone) for n in wanted if prefix + n in tensors}
    fits = {n: t for n, t in ready.items() if t.shape == wanted[n].shape}
    name = shown(str(path))
    if 2 * fitting < len(wanted):
        raise ConfigError(
            f"backbone.init: {name} has {fitting} of the {len(wanted)} tensors of this backbone by name and shape; it "
            f"looks for {next(iter(wanted))}, {list(wanted)[-1]} … (is it the architecture of backbone.name?)"
        )
    _put(backbone, fits, name)
    missing = [n for n in wanted if n not in fits]
    lines += [f"started     {len(fits)} of {len(wanted)} tensors of the backbone from {name}, under {shown(prefix)!r}"]
    if missing:
        lines.append(f"not there   {', '.join(missing[:4])}{' …' if len(missing) > 4 else ''}; these start at random")
    for level, own in encoder.heads.items():
        if head := _head(tensors, prefix, own, level):
            _put(own, head, name)
            which = "" if level == "cls" else f" of {level}"
            lines.append(f"started     the projection head{which} too ({len(head)} tensors)")
    return lines


def _best_prefix(tensors: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> tuple[str, int]:
    """The prefix under which most of the wanted tensors lie, and how many of their shape."""
    count: Counter[str] = Counter()
    for path, tensor in tensors.items():
        for at in [0, *(i + 1 for i, letter in enumerate(path) if letter in "./")]:
            name = path[at:]
            if name in wanted and tensor.shape == wanted[name].shape:
                count[path[:at]] += 1
    if not count:
        return "", 0
    return max(count.items(), key=lambda entry: (entry[1], "teacher" in entry[0], -len(entry[0])))


def _fitted(tensor: Tensor, name: str, backbone: nn.Module) -> Tensor:
    """The position embedding of another image size, resized to this one's grid; anything else as it is."""
    grid = getattr(getattr(backbone, "patch_embed", None), "grid_size", None)
    own = backbone.state_dict()[name]
    if name != "pos_embed" or grid is None or tensor.shape == own.shape or tensor.shape[-1] != own.shape[-1]:
        return tensor
    from timm.layers import resample_abs_pos_embed

    extra = own.shape[1] - grid[0] * grid[1]
    side = round((tensor.shape[1] - extra) ** 0.5)
    if side * side != tensor.shape[1] - extra:
        return tensor
    resized: Tensor = resample_abs_pos_embed(tensor.float(), list(grid), num_prefix_tokens=extra)
    return resized


def _head(tensors: Mapping[str, Tensor], prefix: str, head: nn.Module, level: str) -> dict[str, Tensor]:
    """The tensors of the same projection head beside the backbone, all of them or none."""
    root = prefix.removesuffix("vit.").removesuffix("backbone.")
    if not prefix.endswith(("backbone.", "backbone.vit.")):
        return {}
    beside = f"{root}heads.{level}."
    if level == "cls" and not any(name.startswith(beside) for name in tensors):
        beside = f"{root}head."
    wanted = {n: t for n, t in head.state_dict().items() if not n.endswith(COUNTERS)}
    state = {n: tensors[beside + n] for n in wanted if beside + n in tensors}
    whole = len(state) == len(wanted) and all(state[n].shape == t.shape for n, t in wanted.items())
    return state if whole else {}


def _put(module: nn.Module, state: Mapping[str, Tensor], where: str) -> None:
    own = module.state_dict()
    for name, tensor in state.items():
        if not bool(tensor.float().isfinite().all()):
            raise ConfigError(f"backbone.init: {name} in {where} is NaN or infinite; take an earlier checkpoint")
        own[name].copy_(tensor)
