"""Every family's encoder, rebuilt from its names and shapes alone, computes what the original computes."""

import pytest
import torch
import torch.nn.functional as F
from test_encoder import head, rebuilt_of

import encoders
from layouts import S, T, X, norm_old, prefixed
from uncollapse.checkpoints.backbones import backbone_of
from uncollapse.checkpoints.encoder import rebuild_encoder
from uncollapse.checkpoints.prototypes import find_prototypes
from uncollapse.checkpoints.read import flatten
from uncollapse.errors import InputError


def same(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=2e-5)


def of_set(content: dict, name: str, side: str = "teacher"):
    tensors = flatten(content)
    s = next(s for s in find_prototypes(tensors, "x") if s.side in (side, "unstated") and s.name == name)
    return rebuild_encoder(content, tensors, s, "x")


@pytest.mark.parametrize("window", [2, 7])
def test_an_esvit_swin_is_rebuilt_with_both_heads(window):
    """Heads are attributes of the backbone: nothing is prefixed. Views are pooled, regions are the tokens."""
    model, state = encoders.swin(window)
    (view, first), (region, second) = head("head.mlp.", 48, 48), head("head_dense.mlp.", 48, 48)
    net = {**state, **first, **norm_old(T, "head.last_layer"), **second, **norm_old(X, "head_dense.last_layer")}
    content = {"student": prefixed("module.", net), "teacher": net, "dino_loss": {}}
    x = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        for side in ("teacher", "student"):
            rebuilt = of_set(content, "cls", side)
            assert (rebuilt.size, rebuilt.tokens) == (224, False)
            same(rebuilt.head(rebuilt.backbone(x)), F.normalize(view(model(x)), dim=-1))
        rebuilt = of_set(content, "region")
        tokens = model.forward_features(x).flatten(1, 2)
        same(rebuilt.head(rebuilt.backbone(x)), F.normalize(region(tokens), dim=-1))
        same(rebuilt.backbone(x).mean(1), model(x))


@pytest.mark.parametrize(("patch", "width"), [(16, 64), (8, 64), (16, 128)])
def test_a_dino_xcit_is_rebuilt(patch, width):
    """Width 128 is XCiT-nano, the one size that norms the class token alone."""
    model, state = encoders.xcit(patch, width)
    mlp, weights = head("head.mlp.", width, 48)
    net = prefixed("module.", {**prefixed("backbone.", state), **weights, **norm_old(T, "head.last_layer")})
    rebuilt = rebuilt_of({"student": net, "teacher": net})
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        same(rebuilt.head(rebuilt.backbone(x)), F.normalize(mlp(model(x)), dim=-1))


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("registers", [0, 3])
def test_a_dinov3_vit_is_rebuilt(gated, masked, registers):
    model, state = encoders.dinov3(gated, masked, registers)
    (mlp, first), (patches, second) = head("dino_head.mlp.", 64, 48), head("ibot_head.mlp.", 64, 48)
    layers = {"dino_head.last_layer.weight": T.w, "ibot_head.last_layer.weight": X.w}
    content = {"teacher": {**prefixed("backbone.", state), **first, **second, **layers}}
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        tokens = model.forward_features(x)
        rebuilt = of_set(content, "cls")
        same(rebuilt.head(rebuilt.backbone(x)), F.normalize(mlp(tokens[:, 0]), dim=-1))
        rebuilt = of_set(content, "patch")
        same(rebuilt.head(rebuilt.backbone(x)), F.normalize(patches(tokens[:, 1 + registers :]), dim=-1))


def test_dinov3_can_norm_class_token_and_patches_apart():
    model, state = encoders.dinov3()
    seen = []
    model.norm.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    own = encoders.noisy(torch.nn.LayerNorm(64, eps=1e-5), seed=5)
    found = backbone_of({**state, **prefixed("cls_norm.", own.state_dict())}, "x")
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        normed = model.forward_features(x)
        same(found.module(x), own(seen[0])[:, 0])
        same(found.tokens(x), normed[:, 4:])


def test_a_gated_dinov2_vit_is_rebuilt():
    model, state = encoders.gated_vit()
    x = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        found = backbone_of(state, "x")
        same(found.module(x), model.forward_features(x)[:, 0])
        # timm would gate with its own activation, were it not told: the MLP once more by hand
        mlp, y = found.module.vit.blocks[1].mlp, torch.randn(3, 64)
        one, two = (y @ state["blocks.0.1.mlp.w12.weight"].T + state["blocks.0.1.mlp.w12.bias"]).chunk(2, -1)
        by_hand = (F.silu(one) * two) @ state["blocks.0.1.mlp.w3.weight"].T + state["blocks.0.1.mlp.w3.bias"]
        same(mlp(y), by_hand)


def test_wide_web_ssl_models_have_wide_heads():
    model = encoders.vit(embed_dim=2688, depth=1, num_heads=21, mlp_ratio=0.01)
    found = backbone_of(model.state_dict(), "x")
    assert found.module.vit.blocks[0].attn.num_heads == 21


def test_an_ibot_vit_with_layer_scale_is_rebuilt():
    model = encoders.vit(init_values=0.5)
    state = {
        n.replace("ls1.gamma", "gamma_1").replace("ls2.gamma", "gamma_2"): t for n, t in model.state_dict().items()
    }
    x = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        same(backbone_of(state, "x").module(x), model.forward_features(x)[:, 0])


def test_capis_encoder_is_rebuilt():
    state = encoders.capi()
    teacher = {
        **prefixed("backbone.", state),
        "head.layer.weight": T.w[:, :16],
        "head.layer.bias": torch.zeros(len(T.w)),
    }
    student = {**prefixed("backbone.", state), **norm_old(S, "head.last_layer")}
    content = {"model": {**prefixed("teacher.", teacher), **prefixed("student.", student)}}
    rebuilt = of_set(content, "clusters")
    x = torch.randn(2, 3, 24, 32)
    assert rebuilt.tokens
    with torch.no_grad():
        same(rebuilt.backbone(x), encoders.capi_tokens(state, x))
        same(rebuilt.head(rebuilt.backbone(x)), F.normalize(encoders.capi_tokens(state, x), dim=-1))
    with pytest.raises(InputError, match="predictions of masked patches"):
        of_set(content, "patch", "student")


def test_each_set_gets_its_own_head():
    """DINOv2's two heads have the same names inside: the one of the class token must not get the patches' MLP."""
    model = encoders.vit()
    (mlp, first), (other, second) = head("dino_head.mlp.", 64, 48), head("ibot_head.mlp.", 64, 48)
    layers = {**norm_old(T, "dino_head.last_layer"), **norm_old(X, "ibot_head.last_layer")}
    content = {"teacher": {**prefixed("backbone.", model.state_dict()), **first, **second, **layers}}
    f = torch.randn(5, 64)
    with torch.no_grad():
        same(of_set(content, "cls").head(f), F.normalize(mlp(f), dim=-1))
        same(of_set(content, "patch").head(f), F.normalize(other(f), dim=-1))


def test_the_network_is_that_of_the_set():
    """A distilled DINOv3 run has three: the student, its average (model_ema) and the teacher that both learn from."""
    names = ("student", "teacher", "model_ema")
    models = {name: encoders.noisy(encoders.vit(), seed=i) for i, name in enumerate(names)}
    content: dict = {"model": {}}
    for (name, model), p in zip(models.items(), (S, T, X), strict=True):
        weights = {**head("dino_head.mlp.", 64, 48)[1], "dino_head.last_layer.weight": p.w}
        content["model"] |= prefixed(f"{name}.", {**prefixed("backbone.", model.state_dict()), **weights})
    tensors = flatten(content)
    x = torch.randn(2, 3, 16, 16)
    for s in find_prototypes(tensors, "x"):
        name = s.key.removeprefix("model/").split(".")[0]
        with torch.no_grad():
            same(rebuild_encoder(content, tensors, s, "x").backbone(x), models[name].forward_features(x)[:, 0])


@pytest.mark.parametrize(
    ("state", "says"),
    [
        (lambda: {**encoders.swin()[1], "absolute_pos_embed": torch.ones(1, 4, 24)}, "absolute positions"),
        (lambda: {n: t for n, t in encoders.swin()[1].items() if "patch_embed" not in n}, "Swin .* not understood"),
        (lambda: {n: t for n, t in encoders.xcit()[1].items() if "temperature" not in n}, "XCiT .* not understood"),
        (lambda: {**encoders.dinov3()[1], "strange": torch.ones(2)}, "unknown strange"),
        (lambda: {**encoders.dinov3()[1], "rope_embed.periods": torch.ones(5)}, "heads of 20"),
        (lambda: {**encoders.dinov3()[1], "blocks.0.attn.qkv.bias_mask": torch.full((192,), torch.nan)}, "not finite"),
        (lambda: {**encoders.capi(), "registers": torch.ones(1, 3, 16)}, "3 registers"),
        (lambda: {n: t for n, t in encoders.capi().items() if "freqs" not in n}, "rotary frequencies"),
        (lambda: {n: t for n, t in encoders.vit().state_dict().items() if ".mlp." not in n}, "without an MLP"),
        (lambda: {**encoders.vit().state_dict(), "pos_embed": torch.ones(1, 4, 64)}, "position embedding"),
        (dict, "not understood"),
    ],
)
def test_what_was_not_understood_is_named(state, says):
    with pytest.raises(InputError, match=says) as caught:
        backbone_of({n: t for n, t in state().items() if t.is_floating_point()}, "x")
    assert "\n" not in str(caught.value)
