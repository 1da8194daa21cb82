"""Where the encoder looks: maps against hand-made gradients and attention, and the pictures of groups."""

import base64
import dataclasses
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from timm.models.convnext import ConvNeXt
from timm.models.resnet import BasicBlock, ResNet
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from uncollapse.data.images import MemoryImages
from uncollapse.evaluate.encoder import EvalEncoder
from uncollapse.evaluate.extract import extract
from uncollapse.evaluate.features import Features
from uncollapse.evaluate.tasks.prototype_maps import (
    ATTENTION,
    GRADIENT,
    SIDE,
    draw_groups,
    gradient_maps,
    group_maps,
    location_maps,
    overlay,
)
from uncollapse.models.backbones import Conv3
from uncollapse.models.heads import ProjectionHead


def head(width: int, dim: int = 8) -> nn.Module:
    made = ProjectionHead(width, hidden=32, bottleneck=dim)
    for p in made.parameters():
        p.data += 0.1 * torch.randn(p.shape)
    return made


def conv(size: int = 16) -> EvalEncoder:
    torch.manual_seed(0)
    return EvalEncoder(Conv3(8), size, (0.5,) * 3, (0.25,) * 3, head(32))


def vit() -> EvalEncoder:
    torch.manual_seed(0)
    model = VisionTransformer(img_size=16, patch_size=4, embed_dim=32, depth=2, num_heads=2, num_classes=0)
    for p in model.parameters():
        p.data += 0.1 * torch.randn(p.shape)
    return EvalEncoder(model, 16, (0.5,) * 3, (0.25,) * 3, head(32))


def images(n: int = 40, side: int = 16) -> MemoryImages:
    rng = torch.Generator().manual_seed(0)
    canvas = torch.randint(0, 256, (n, 3, side, side), generator=rng, dtype=torch.uint8)
    return MemoryImages(canvas, torch.full((n, 2), side), torch.arange(n) % 2, ["cat", "dog"])


def features(encoder: EvalEncoder, of: MemoryImages) -> Features:
    return extract(encoder, of, device=torch.device("cpu"), cache=None)


# ------------------------------------------------------------------------------------------------- the maps


@pytest.mark.parametrize("sign", [1, -1])
def test_gradient_maps_by_hand(sign: int) -> None:
    encoder, x = conv(32), torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    toward = sign * torch.randn(8, generator=torch.Generator().manual_seed(3))
    maps = gradient_maps(encoder, x, toward)
    spatial = nn.Sequential(*list(encoder.module)[:-2])(x).detach().requires_grad_()
    pooled = spatial.mean((2, 3))
    (encoder.head(pooled) @ toward).sum().backward()
    expected = F.relu((spatial * spatial.grad.mean((2, 3), keepdim=True)).sum(1))
    torch.testing.assert_close(maps, expected.detach())
    mean = torch.rand(32, generator=torch.Generator().manual_seed(4))
    expected = F.relu(((spatial - mean[:, None, None]) * spatial.grad.mean((2, 3), keepdim=True)).sum(1))
    torch.testing.assert_close(gradient_maps(encoder, x, toward, mean), expected.detach())
    speaks_against = gradient_maps(encoder, x, -toward)
    assert bool(((maps > 0) ^ (speaks_against > 0)).any())
    assert not bool(((maps > 0) & (speaks_against > 0)).any())


def test_gradient_maps_point_at_what_moves_the_component() -> None:
    # Finite differences: taking a location away lowers the component most where the map is largest.
    encoder, x = conv(32), torch.randn(1, 3, 32, 32)
    toward = torch.randn(8, generator=torch.Generator().manual_seed(3))
    found = gradient_maps(encoder, x, toward)[0].flatten()
    spatial = nn.Sequential(*list(encoder.module)[:-2])(x).detach()

    def component(s: torch.Tensor) -> float:
        return float(encoder.head(s.mean((2, 3)))[0] @ toward)

    drops = []
    for i in range(16):
        without = spatial.clone()
        without.flatten(2)[:, :, i] *= 0.99
        drops.append(component(spatial) - component(without))
    positive = np.clip(drops, 0, None)
    np.testing.assert_allclose(found.numpy() / found.sum(), positive / positive.sum(), atol=0.02)


@pytest.mark.parametrize("kind", ["resnet", "convnext", "swin"])
def test_timm_models_have_maps_in_their_own_layout(kind: str) -> None:
    torch.manual_seed(0)
    if kind == "resnet":
        model = ResNet(BasicBlock, [1, 1, 1, 1], num_classes=0, channels=[8, 8, 16, 16])
    elif kind == "convnext":
        model = ConvNeXt(depths=(1, 1, 1, 1), dims=(8, 8, 16, 16), num_classes=0)
    else:
        model = SwinTransformer(
            img_size=64, patch_size=4, embed_dim=8, depths=(1, 1, 1), num_heads=(1, 1, 2), window_size=4, num_classes=0
        )
    encoder = EvalEncoder(model, 64)
    encoder.head = head(encoder.width).eval()
    x = torch.randn(2, 3, 64, 64)
    maps, name = location_maps(encoder, x, torch.randn(8))
    assert name == GRADIENT
    assert maps.shape == (2, *encoder.patches(x).shape[1:3])
    assert bool((maps >= 0).all())
    assert float(maps.max()) > 0


def test_a_map_of_one_location_is_passed_over_for_an_earlier_one() -> None:
    encoder = conv(8)  # 4, 2 and 1 locations a side
    assert gradient_maps(encoder, torch.randn(2, 3, 8, 8), torch.randn(8)).shape == (2, 2, 2)


def test_transformers_show_their_own_attention() -> None:
    encoder, x = vit(), torch.randn(3, 3, 16, 16)
    maps, kind = location_maps(encoder, x, torch.randn(8))
    assert kind == ATTENTION
    tokens = encoder.module._pos_embed(encoder.module.patch_embed(x))
    tokens = encoder.module.blocks[0](tokens)
    block = encoder.module.blocks[1]
    q, k, _ = block.attn.qkv(block.norm1(tokens)).reshape(3, 17, 3, 2, 16).permute(2, 0, 3, 1, 4)
    attention = torch.softmax(q @ k.transpose(-2, -1) / 4, dim=-1)[:, :, 0, 1:].mean(1)
    torch.testing.assert_close(maps.flatten(1), attention, atol=1e-5, rtol=1e-4)


def test_nothing_is_left_behind_in_the_encoder() -> None:
    encoder = conv()
    before = encoder.features(torch.ones(1, 3, 16, 16))
    gradient_maps(encoder, torch.randn(2, 3, 16, 16), torch.randn(8))
    assert all(not m._forward_hooks for m in encoder.module.modules())
    assert all(p.grad is None and not p.requires_grad for p in encoder.module.parameters())
    assert torch.equal(encoder.features(torch.ones(1, 3, 16, 16)), before)
    encoder.head = None
    assert gradient_maps(encoder, torch.randn(2, 3, 16, 16), torch.randn(8)) is None


# ------------------------------------------------------------------------------------------------- groups


def groups_of(encoder: EvalEncoder, eps: float = 1e-5):
    """Three copies of where half of the images are, and single prototypes where others are."""
    of = images()
    found = features(encoder, of)
    z = F.normalize(found.projections, dim=1)
    w = torch.stack([z[0], z[5], z[0] + 1e-4, -z.mean(0), z[0] - 1e-4])
    return of, found, w, group_maps(encoder, of, found, w, eps)


@pytest.mark.parametrize("make", [conv, vit])
def test_groups_are_the_busiest_and_their_nearest_images(make) -> None:
    encoder = make()
    of, found, w, pictures = groups_of(encoder)
    unit = F.normalize(w, dim=1)
    cosines = F.normalize(found.projections, dim=1) @ unit.T
    in_group = torch.isin(cosines.argmax(1), torch.tensor([0, 2, 4]))
    first = pictures[0]
    assert (first.duplicates, first.prototypes, first.images) == (3, [0, 2, 4], int(in_group.sum()))
    rows = in_group.nonzero()[:, 0]
    expected = rows[cosines[rows, 0].argsort(descending=True, stable=True)][:6]
    assert first.indices == expected.tolist()
    assert first.indices[0] == 0
    share = torch.bincount(of.labels[rows]).max() / len(rows)
    assert first.label.startswith(f"{100 * float(share):.0f} %")
    assert [p.duplicates for p in pictures[1:]] == [1] * len(pictures[1:])
    assert all(p.prototypes[0] in (1, 3) for p in pictures[1:])
    for p in pictures:
        m = len(p.indices)
        assert p.pictures.shape == p.overlays.shape == (m, SIDE, SIDE, 3)
        assert p.pictures.dtype == p.overlays.dtype == np.uint8
        sums = p.maps.sum((1, 2))
        assert np.all(np.isclose(sums, 1, atol=1e-5) | (sums == 0))
        assert math.isnan(p.spread) or 0 < p.spread <= 1 + 1e-9


def test_group_maps_start_from_the_mean_activation_of_the_set() -> None:
    encoder = conv()
    of, _, w, pictures = groups_of(encoder)
    unit, x = F.normalize(w, dim=1), (of.canvas.float() / 255 - 0.5) / 0.25
    mean = nn.Sequential(*list(encoder.module)[:-1])(x).mean((0, 2, 3))
    maps = gradient_maps(encoder, x[pictures[0].indices], unit[0] - unit.mean(0), mean)
    total = maps.sum((1, 2), keepdim=True).clamp_min(1e-12)
    np.testing.assert_allclose(pictures[0].maps, (maps / total).numpy(), atol=1e-4)


def test_pictures_are_what_the_encoder_saw() -> None:
    of, _, _, pictures = groups_of(conv())
    seen = of.canvas[pictures[0].indices].permute(0, 2, 3, 1).numpy()
    np.testing.assert_array_equal(pictures[0].pictures, seen.repeat(SIDE // 16, 1).repeat(SIDE // 16, 2))


def test_indices_are_the_images_own_even_where_some_could_not_be_read() -> None:
    encoder = conv()
    of = images()
    some = features(encoder, of).take(torch.arange(1, 40, 2))
    pictures = group_maps(encoder, of, some, some.projections[:1])
    assert pictures[0].indices[0] == 1
    assert all(i % 2 for i in pictures[0].indices)
    assert pictures[0].label == "100 % dog"


def test_no_duplicates_only_duplicates_and_a_single_prototype() -> None:
    encoder, of = conv(), images()
    found = features(encoder, of)
    z = found.projections
    alone = group_maps(encoder, of, found, z[:4], eps=1e-6)
    assert {p.duplicates for p in alone} == {1}
    copies = group_maps(encoder, of, found, z[:1].repeat(5, 1))
    assert [(p.duplicates, p.images) for p in copies] == [(5, 40)]
    single = group_maps(encoder, of, dataclasses.replace(found, labels=None), z[:1])
    assert [(p.duplicates, p.label) for p in single] == [(1, "")]
    for pictures in (alone, copies, single):
        assert draw_groups(pictures)[0].startswith("data:image/svg+xml;base64,")


def test_the_figure_is_one_picture_with_words_and_the_same_bytes_again() -> None:
    pictures = groups_of(conv())[3]
    picture, alt = draw_groups(pictures)
    assert (picture, alt) == draw_groups(pictures)
    svg = base64.b64decode(picture.split(",")[1]).decode()
    assert svg.count("<image") == len(pictures)
    assert "3 duplicates (0, 2, 4)" in alt
    assert GRADIENT in alt
    plain = sum(int((p.maps.sum((1, 2)) == 0).sum()) for p in pictures) + int(pictures[0].maps[0].any())
    pictures[0].maps[0] = 0
    assert f"{plain} images without colour" in draw_groups(pictures)[1]
    with pytest.raises(ValueError, match="no group"):
        draw_groups([])


def test_overlays_brighten_where_the_map_is() -> None:
    maps = torch.zeros(1, 2, 2)
    maps[0, 0, 1] = 0.3
    seen, covered = overlay(torch.full((1, 3, 4, 4), 0.5), maps, 8)
    assert seen.shape == covered.shape == (1, 8, 8, 3)
    light = covered[0].astype(int).sum(2)
    assert light[:4, 4:].mean() > 2 * light[4:, :4].mean()


def test_what_cannot_be_pictured_says_so() -> None:
    encoder, of = conv(), images()
    found = features(encoder, of)
    with pytest.raises(ValueError, match="no projections"):
        group_maps(encoder, of, dataclasses.replace(found, projections=None), torch.eye(8))
    with pytest.raises(ValueError, match="features of image 39, but there are 30"):
        group_maps(encoder, images(30), found, torch.eye(8))
