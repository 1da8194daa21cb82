"""The one reader of tokens in training beside timm's own forward pass, and what a mask changes."""

import pytest
import timm
import torch

from steps import small
from uncollapse.config.schema import BackboneConfig
from uncollapse.errors import ConfigError
from uncollapse.models.backbones import build_backbone
from uncollapse.models.tokens import MaskedViT, patches_of, plain, seen_without, tokens
from uncollapse.training.state import build_state

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 2}
ARCHITECTURES = {
    "class token": ("vit_tiny_patch16_224", {}),
    "registers": ("vit_tiny_patch16_224", {"reg_tokens": 3}),
    "registers without positions": ("vit_tiny_patch16_224", {"reg_tokens": 3, "no_embed_class": True}),
    "mean of patches": ("vit_tiny_patch16_224", {"class_token": False, "global_pool": "avg"}),
    "mean beside a class token": ("vit_tiny_patch16_224", {"global_pool": "avg"}),
    "attention pooling": ("vit_tiny_patch16_224", {"class_token": False, "global_pool": "map"}),
    "norm before": ("vit_tiny_patch16_224", {"pre_norm": True, "init_values": 0.1}),
    "two tokens": ("deit_tiny_distilled_patch16_224", {}),
}


def made(architecture):
    """A backbone as training builds it, with every weight moved off its start."""
    name, options = ARCHITECTURES[architecture]
    torch.manual_seed(0)
    vit, _ = build_backbone(BackboneConfig(name, 0.0, options={**SMALL, **options}))
    with torch.no_grad():
        for p in vit.parameters():
            p.add_(0.05 * torch.randn_like(p))
        masked = MaskedViT(vit.eval())
        masked.mask_token.normal_()
    return masked.eval()


def embedded(masked, x, mask):
    """What enters the first block: tokens with their positions."""
    seen = []
    handle = masked.vit.blocks.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        masked.tokens(x, mask)
    handle.remove()
    return seen[0]


@pytest.mark.parametrize("size", [32, 16])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_without_a_mask_tokens_are_timms_own(architecture, size):
    masked, x = made(architecture), torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        features, patches = masked.tokens(x)
        nothing = masked.tokens(x, torch.zeros(3, (size // 8) ** 2, dtype=torch.bool))
        vit = plain(masked)
        expected = vit.forward_features(x)[:, vit.num_prefix_tokens :]
        torch.testing.assert_close(features, vit(x))
        torch.testing.assert_close(masked(x), vit(x))
        torch.testing.assert_close(patches, expected)
    assert patches.shape == (3, patches_of(masked, size), 48)
    assert torch.equal(nothing[0], features)
    assert torch.equal(nothing[1], patches)


@pytest.mark.parametrize("architecture", ["class token", "registers", "mean of patches", "two tokens"])
def test_a_mask_changes_the_embeddings_of_hidden_patches_alone(architecture):
    masked, x = made(architecture), torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    mask = torch.rand(3, 16, generator=torch.Generator().manual_seed(1)) < 0.4
    mask[1] = False
    prefix = plain(masked).num_prefix_tokens
    before, after = embedded(masked, x, None), embedded(masked, x, mask)
    changed = (before != after).any(-1)
    assert not changed[:, :prefix].any()
    assert torch.equal(changed[:, prefix:], mask)
    # All that is left of a hidden patch is the token, and where it is.
    bias = plain(masked).patch_embed.proj.bias
    empty = embedded(masked, torch.zeros_like(x), None)[:, prefix:] - bias
    torch.testing.assert_close(after[:, prefix:][mask], (empty + masked.mask_token)[mask], rtol=0, atol=1e-5)


def test_the_mask_token_learns_only_where_something_is_hidden():
    masked, x = made("class token"), torch.randn(2, 3, 32, 32)
    for hidden in (True, False):
        mask = torch.zeros(2, 16, dtype=torch.bool)
        mask[0, 3] = hidden
        (gradient,) = torch.autograd.grad(
            masked.tokens(x, mask)[0].square().sum(), masked.mask_token, allow_unused=True
        )
        assert bool(gradient.any()) == hidden


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"backbone.name": "vit_small_patch16_rope_224", "backbone.options": {"depth": 1}}, "Eva has no patch tokens"),
        ({"views.global_size": 36}, r"views\.global_size: 36 pixels do not divide into patches of 8"),
    ],
)
def test_a_run_whose_patches_cannot_be_hidden_is_refused_when_it_is_built(keys, expected):
    with pytest.raises(ConfigError, match=expected):
        build_state(small("ibot", **keys))


def test_what_has_no_patches_to_hide_is_refused():
    with pytest.raises(ConfigError, match="ResNet has no patch tokens to hide; take a vit_"):
        patches_of(timm.create_model("resnet10t", num_classes=0), 32)
    with pytest.raises(ConfigError, match=r"views\.global_size: 36 pixels do not divide into patches of 8"):
        patches_of(made("class token"), 36)
    assert patches_of(made("registers"), 48) == 36
    hybrid = timm.create_model("vit_tiny_r_s16_p8_224", num_classes=0, depth=1)
    assert patches_of(hybrid, 224) == hybrid.patch_embed.num_patches == 49
    resnet = timm.create_model("resnet10t", num_classes=0)
    assert plain(resnet) is resnet


@pytest.mark.parametrize("size", [32, 16])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_patches_that_are_left_out_do_not_matter_and_others_keep_their_places(architecture, size):
    vit, g = plain(made(architecture)), torch.Generator().manual_seed(0)
    side = size // 8
    x, other = torch.randn(2, 3, 3, size, size, generator=g)
    mask = torch.zeros(3, side * side, dtype=torch.bool)
    for row in mask:
        row[torch.randperm(side * side, generator=g)[: side * side // 4]] = True
    pixels = mask.view(3, 1, side, 1, side, 1).expand(-1, -1, -1, 8, -1, 8).reshape(3, 1, size, size)
    with torch.no_grad():
        features = seen_without(vit, x, mask)
        assert tokens(vit, x, mask)[1].shape == (3, side * side - side * side // 4, 48)
        assert torch.equal(seen_without(vit, torch.where(pixels, other, x), mask), features)
        assert (seen_without(vit, torch.where(pixels, x, other), mask) - features).abs().max() > 1e-3
        assert (
            seen_without(vit, x.flip(-1), mask.view(3, side, side).flip(-1).flatten(1)) - features
        ).abs().max() > 1e-3
        torch.testing.assert_close(seen_without(vit, x, torch.zeros_like(mask)), vit(x))
        mask[0] = ~mask[0]
        with pytest.raises(ValueError, match="as many patches"):
            seen_without(vit, x, mask)
