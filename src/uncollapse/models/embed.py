"""What an encoder makes of images: features, projections, projections of views.

Of a model in training, at the size and precision that it trains at, kept in memory. `evaluate.extract` is another
thing: any encoder, tokens of its last blocks, shards on disk. Both see the images of `data.workers.eval_batches`.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn

from uncollapse.config.schema import ViewConfig
from uncollapse.data.batched import multicrop
from uncollapse.data.images import ImageSet, MemoryImages
from uncollapse.data.views import ViewSpec, view_specs
from uncollapse.data.workers import eval_batches, view_loader
from uncollapse.models.network import Encoder

VIEWS = 6
"""Augmented views of every held-out image behind the view information."""
VIEW_STEP = 2**31
"""A step no training reaches: the key of the evaluation's views."""
PATCHES = 16
"""Most patches of an image that are looked at, where the prototypes divide up patches."""


class SomePatches(nn.Module):
    """Images → at most ``most`` of their patch tokens each, (n · most, d), image by image.

    Args:
        backbone: that gives patch tokens (n, P, d), such as `PatchTokens`.
        most: so many, or all where there are fewer.
    """

    def __init__(self, backbone: nn.Module, most: int = PATCHES) -> None:
        super().__init__()
        self.backbone, self.most = backbone, most
        self.each = 0
        """Patches of an image that the last call returned."""

    def forward(self, x: Tensor) -> Tensor:
        tokens: Tensor = self.backbone(x)
        self.each = min(self.most, tokens.shape[1])
        # The place in the batch decides which patches, so that the same call always sees the same ones.
        order = torch.rand(tokens.shape[:2], generator=torch.Generator().manual_seed(0)).argsort(1)
        chosen = order[:, : self.each].sort(1).values.to(tokens.device)
        return tokens.gather(1, chosen[..., None].expand(-1, -1, tokens.shape[2])).flatten(0, 1)


@torch.no_grad()
def embed(
    encoder: Encoder, images: ImageSet, views: ViewConfig, workers: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Of unaugmented images: backbone features ``(n, d)``, projections ``(n, D)`` and labels ``(n,)``, on the CPU.

    Images that turn out to be unreadable are left out of all three.
    """
    encoder.eval()
    features, projections, read = [], [], []
    for indices, batch in eval_batches(images, views.global_size, views.mean, views.std, 256, workers, device):
        read.append(indices)
        f = encoder.backbone(batch)
        features.append(f.float().cpu())
        projections.append(encoder.head(f).float().cpu())
    encoder.train()
    labels = None if images.labels is None else images.labels[torch.cat(read)]
    return torch.cat(features), torch.cat(projections), labels


@torch.no_grad()
def projected(head: nn.Module, features: Tensor, device: torch.device) -> Tensor:
    """Projections ``(n, D)`` of features ``(n, d)``, in evaluation mode, on the CPU."""
    was = head.training
    head.eval()
    rows = [head(part.to(device)).float().cpu() for part in features.split(4096)]
    head.train(was)
    return torch.cat(rows)


@torch.no_grad()
def project_views(
    encoder: Encoder,
    images: ImageSet,
    views: ViewConfig,
    seed: int,
    workers: int,
    device: torch.device,
    count: int = VIEWS,
) -> Tensor:
    """Projections ``(count, n, D)`` of first global views, keyed by the seed: equal views for every arm."""
    encoder.eval()
    specs: list[ViewSpec] = view_specs(views)[:1] * count
    n = len(images)
    chunks = [range(i, min(i + 256, n)) for i in range(0, n, 256)]
    if isinstance(images, MemoryImages):
        batches: Iterator[list[Tensor]] = (multicrop(images, c, seed, VIEW_STEP, specs, c) for c in chunks)
    else:
        plan = [(VIEW_STEP, c, c) for c in chunks]
        batches = view_loader(images, plan, specs, seed, workers)
    rows = []
    for batch in batches:
        rows.append(torch.stack([encoder.head(encoder.backbone(v.to(device))).float().cpu() for v in batch]))
    encoder.train()
    return torch.cat(rows, dim=1)


def nearest_images(chosen: Tensor, z: Tensor, held_out: ImageSet, each: int = 8, size: int = 64) -> np.ndarray:
    """uint8 ``(g, each, H, W, 3)``: the held-out images nearest to each chosen prototype.

    ``z (n, p, D)``: an image is as near as the nearest of its p projections.
    """
    from PIL import Image

    nearest = (z @ chosen.T).amax(1).T.topk(min(each, len(z)), dim=1).indices
    rows = []
    for row in nearest.tolist():
        small = [held_out.image(i) for i in row]
        side = min(size, max(32, *(max(i.size) for i in small)))
        rows.append([np.asarray(i.resize((side, side), Image.Resampling.BICUBIC)) for i in small])
    side = max(image.shape[0] for row in rows for image in row)
    same = [[np.asarray(Image.fromarray(i).resize((side, side))) for i in row] for row in rows]
    return np.array(same, dtype=np.uint8)
