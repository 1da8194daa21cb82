"""An encoder as the evaluation tasks see it: blocks, patch maps and attention of any backbone, behind one interface."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from uncollapse.models.tokens import is_vit, last_blocks

BLOCKS = 4
"""Last blocks whose tokens are kept: DINO's linear probe of small vision transformers takes as many."""
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass
class EvalEncoder:
    """A frozen encoder with its preprocessing, its projection head and its prototypes, as far as it has them."""

    module: nn.Module
    """The backbone: images → features (n, d). A timm model, or our `Conv3`; in evaluation mode, without gradients
    (fine-tuning works on a copy that has them)."""
    size: int
    """Side of the square images that it takes, in pixels."""
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    head: nn.Module | None = None
    """Features (n, d) → unit vectors (n, D) in the prototypes' space."""
    vectors: Tensor | None = None
    """(K, D) float32 unit rows: the prototypes (the teacher's, unless the student was asked for); None without."""
    described: str = ""
    """Architecture in words."""
    name: str = ""
    """What the user called it: a run folder, a file or ``timm:NAME``."""
    side: str = "teacher"
    """``teacher``, ``student``, or ``model`` where there is only one."""
    step: int = 0
    """Training step of the weights; 0 where the file does not say."""
    config: Any = None
    """The run's configuration, for our own runs."""
    notes: list[str] = field(default_factory=list)
    """What the user should know, such as why there is no head."""
    patch_tokens: nn.Module | None = field(default=None, repr=False)
    """Images → patch tokens (n, hw, d) of a square grid, for encoders whose ``module`` does not give them (CAPI)."""
    untrained: Callable[[], EvalEncoder] | None = field(default=None, repr=False)
    """Makes the same architecture at a random start: the control."""

    def __post_init__(self) -> None:
        self.module.eval().requires_grad_(False)
        if self.head is not None:
            self.head.eval().requires_grad_(False)
        self._hash = ""

    @property
    def weights_hash(self) -> str:
        """sha256 of backbone and head: names, types, shapes and bytes. The key of cached features."""
        if not self._hash:
            self._hash = _hash([self.module] if self.head is None else [self.module, self.head])
        return self._hash

    @property
    def tokens(self) -> bool:
        """Whether it is a vision transformer: blocks of class and patch tokens."""
        return is_vit(self.module)

    @property
    def width(self) -> int:
        """Length d of a feature."""
        return int(getattr(self.module, "head_hidden_size", None) or self.module.num_features)  # type: ignore[arg-type]

    @property
    def blocks(self) -> int:
        """L of `layers`: the last 4 blocks of a vision transformer, or all of fewer; 1 for a CNN."""
        return min(BLOCKS, len(self.module.blocks)) if self.tokens else 1  # type: ignore[arg-type]

    def to(self, device: torch.device | str) -> EvalEncoder:
        """Moves backbone and head; prototypes stay where they are."""
        self.module.to(device)
        if self.head is not None:
            self.head.to(device)
        return self

    def layers(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Class tokens and mean patch tokens of the last L blocks, each after the final norm.

        Args:
            x: (n, 3, size, size) normalised images, on the module's device.

        Returns:
            (n, L, d) class tokens, the last block last, and (n, L, d) means of the patch tokens. For a CNN, and
            for transformers without blocks of one width such as Swin: the pooled map (n, 1, d) and None. A
            transformer without class token gives what its own classifier would see.
        """
        if not self.tokens:
            return self.module(x)[:, None], None
        cls, mean = [], []
        for feature, patches in last_blocks(self.module, x, self.blocks):
            cls.append(feature)
            mean.append(patches.mean(1))
        return torch.stack(cls, 1), torch.stack(mean, 1)

    def features(self, x: Tensor) -> Tensor:
        """(n, d): what the projection head takes, the last of `layers`. Keeps the graph for fine-tuning."""
        out: Tensor = self.module(x)
        return out

    def project(self, features: Tensor) -> Tensor | None:
        """(n, D) unit vectors of `features` (n, d), in float32; None without a head."""
        return None if self.head is None else self.head(features.float()).float()

    def patches(self, x: Tensor) -> Tensor | None:
        """(n, h, w, d): the last block's patch tokens after the final norm, or the last map of a CNN; else None."""
        if self.tokens:
            return last_blocks(self.module, x, 1)[0][1].unflatten(1, self._grid(x))
        if not hasattr(self.module, "forward_features"):
            if self.patch_tokens is None:
                return None
            tokens = self.patch_tokens(x)
            side = round(tokens.shape[1] ** 0.5)
            return tokens.unflatten(1, (side, side)) if side * side == tokens.shape[1] else None
        maps = self.module.forward_features(x)  # type: ignore[operator]
        if maps.ndim != 4:
            return None
        return maps if getattr(self.module, "output_fmt", "NCHW") == "NHWC" else maps.permute(0, 2, 3, 1)

    def attention(self, x: Tensor) -> Tensor | None:
        """(n, heads, h, w): what the class token of the last block attends to, over patches; None for others.

        A row of the softmax: the part that goes to the class token itself and to registers is left out, so the
        maps sum to at most 1.
        """
        if not self.tokens or not self._prefix():
            return None
        attn: Any = self.module.blocks[-1].attn  # type: ignore[index, union-attr]
        if not hasattr(attn, "attn_drop"):
            return None
        seen: list[Tensor] = []
        # The dropout right after the softmax is the one place where every variant of attention has it.
        handle = attn.attn_drop.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0]))
        fused = getattr(attn, "fused_attn", False)
        attn.fused_attn = False
        try:
            self.module.forward_features(x)  # type: ignore[operator]
        finally:
            attn.fused_attn = fused
            handle.remove()
        if not seen or seen[0].ndim != 4:
            return None
        rows = seen[0][:, :, 0, self._prefix() :]
        h, w = self._grid(x)
        return rows.unflatten(2, (h, w)) if rows.shape[2] == h * w else None

    def _prefix(self) -> int:
        return int(getattr(self.module, "num_prefix_tokens", 0))

    def _grid(self, x: Tensor) -> tuple[int, int]:
        h, w = self.module.patch_embed.patch_size  # type: ignore[union-attr, misc]
        return x.shape[2] // int(h), x.shape[3] // int(w)


def _hash(modules: Sequence[nn.Module]) -> str:
    digest = hashlib.sha256()
    for i, module in enumerate(modules):
        for name, tensor in module.state_dict().items():
            digest.update(f"{i}/{name}/{tensor.dtype}/{tuple(tensor.shape)}".encode())
            flat = tensor.detach().cpu().contiguous().reshape(-1)
            # numpy has no bfloat16; bytes are bytes
            digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def reset(module: nn.Module, seed: int = 0) -> nn.Module:
    """A copy of a module started anew from ``seed``: each layer's own initialisation, then the model's."""
    fresh = copy.deepcopy(module)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        parts: list[Any] = list(fresh.modules())
        for part in parts:
            if hasattr(part, "reset_parameters"):
                part.reset_parameters()
        if hasattr(parts[0], "init_weights"):
            parts[0].init_weights()
    return fresh
