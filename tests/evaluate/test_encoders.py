"""Encoders of every kind behind one interface: run folders, checkpoints of other families, timm models."""

import dataclasses

import pytest
import timm
import torch
from timm.models.resnet import BasicBlock, ResNet
from timm.models.vision_transformer import VisionTransformer

from layouts import norm_old, planted, prefixed
from uncollapse.config.load import load_config
from uncollapse.config.tiny import tiny
from uncollapse.errors import ConfigError, InputError
from uncollapse.evaluate.encoder import EvalEncoder, reset
from uncollapse.evaluate.source import open_encoder
from uncollapse.models.backbones import Conv3
from uncollapse.models.tokens import is_vit
from uncollapse.run_folder.checkpoint import save_checkpoint
from uncollapse.training.state import build_state, state_dicts


def vit(seed=0, depth=5, **options) -> VisionTransformer:
    torch.manual_seed(seed)
    options = {"num_classes": 0, "dynamic_img_size": True} | options
    model = VisionTransformer(img_size=16, patch_size=8, embed_dim=64, depth=depth, num_heads=1, **options).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return model


def mlp(features, dim):
    linear, gelu = torch.nn.Linear, torch.nn.GELU
    layers = torch.nn.Sequential(linear(features, 20), gelu(), linear(20, 20), gelu(), linear(20, dim)).eval()
    return layers, {f"head.mlp.{name}": t for name, t in layers.state_dict().items()}


def dino(path, seed=0):
    """A DINO checkpoint whose sides differ, and what it was made of."""
    content, parts = {}, {}
    for i, side in enumerate(("teacher", "student")):
        model, p = vit(seed + i), planted(dim=48, seed=i)
        head, weights = mlp(64, 48)
        net = {**prefixed("backbone.", model.state_dict()), **weights, **norm_old(p, "head.last_layer")}
        content[side] = net if side == "teacher" else prefixed("module.", net)
        parts[side] = (model, head, p)
    torch.save({**content, "epoch": 3, "dino_loss": {"center": torch.zeros(1, len(p.w))}}, path)
    return parts


def own_run(folder, step=7):
    """A run folder with a checkpoint whose sides differ."""
    config = tiny(load_config("demo", {"data.path": "builtin:digits"}))
    state = build_state(config)
    with torch.no_grad():
        for i, side in enumerate((state.student, state.teacher)):
            for p in side.parameters():
                p.add_(0.02 * (i + 1) * torch.randn_like(p))
    from uncollapse.config.load import dump_config

    folder.mkdir()
    (folder / "config.yaml").write_text(dump_config(config))
    save_checkpoint(folder / "checkpoints", step, {"config": dataclasses.asdict(config), **state_dicts(state)}, 1)
    return config, state


# ---------------------------------------------------------------------------------------- the interface


@pytest.mark.parametrize("pool", ["token", "avg"])
def test_layers_are_the_last_blocks_and_end_in_what_the_model_gives(pool):
    model = vit(global_pool=pool)
    encoder, x = EvalEncoder(model, 16), torch.randn(3, 3, 16, 16)
    cls, mean = encoder.layers(x)
    assert cls.shape == mean.shape == (3, 4, 64)
    torch.testing.assert_close(cls[:, -1], model(x))
    torch.testing.assert_close(encoder.features(x), model(x))
    if pool == "token":
        tokens = model.forward_features(x)
        torch.testing.assert_close(mean[:, -1], tokens[:, 1:].mean(1))
        # the block before the last, by hand
        hidden = model._pos_embed(model.patch_embed(x))
        for block in model.blocks[:-1]:
            hidden = block(hidden)
        torch.testing.assert_close(cls[:, -2], model.norm(hidden)[:, 0])


def test_fewer_blocks_than_four_give_as_many_layers():
    encoder = EvalEncoder(vit(depth=2), 16)
    assert encoder.blocks == 2
    assert encoder.layers(torch.randn(1, 3, 16, 16))[0].shape == (1, 2, 64)


def test_patches_are_in_their_places():
    model = vit(pos_embed="none", depth=1)
    model.blocks = torch.nn.Sequential(torch.nn.Identity())  # each patch then depends on its pixels alone
    model.blocks[0].attn = None
    encoder, x = EvalEncoder(model, 16), torch.zeros(1, 3, 16, 24)
    x[:, :, 8:, 16:] = 1.0
    found = encoder.patches(x)
    assert found.shape == (1, 2, 3, 64)
    different = (found - found[:, :1, :1]).abs().amax(-1)[0] > 1e-6
    assert different.tolist() == [[False, False, False], [False, False, True]]


def test_attention_of_the_class_token_is_the_last_block_s_softmax():
    model = vit(reg_tokens=2)
    encoder, x = EvalEncoder(model, 16), torch.randn(2, 3, 16, 16)
    before = encoder.features(x)
    maps = encoder.attention(x)
    assert maps.shape == (2, 1, 2, 2)
    hidden = model._pos_embed(model.patch_embed(x))
    for block in model.blocks[:-1]:
        hidden = block(hidden)
    q, k, _ = model.blocks[-1].attn.qkv(model.blocks[-1].norm1(hidden)).chunk(3, -1)
    expected = (q[:, :1] @ k.transpose(1, 2) / 64**0.5).softmax(-1)
    torch.testing.assert_close(maps.flatten(1), expected[:, 0, 3:])
    assert bool((maps.sum((2, 3)) < 1).all())
    torch.testing.assert_close(encoder.features(x), before)  # and it leaves the model as it was
    assert model.blocks[-1].attn.fused_attn


def test_a_cnn_has_one_layer_a_map_and_no_attention():
    torch.manual_seed(0)
    model = ResNet(BasicBlock, (1, 1, 1, 1), num_classes=0).eval()
    encoder, x = EvalEncoder(model, 64), torch.randn(2, 3, 64, 64)
    cls, mean = encoder.layers(x)
    assert cls.shape == (2, 1, 512)
    assert mean is None
    assert encoder.attention(x) is None
    found = encoder.patches(x)
    assert found.shape == (2, 2, 2, 512)
    torch.testing.assert_close(found.mean((1, 2)), cls[:, 0])


def test_swin_s_map_has_its_channels_last():
    model = timm.create_model("swin_tiny_patch4_window7_224", num_classes=0, img_size=64, depths=(1, 1, 1, 1)).eval()
    assert not is_vit(model)
    encoder, x = EvalEncoder(model, 64), torch.randn(1, 3, 64, 64)
    assert encoder.layers(x)[0].shape == (1, 1, 768)
    torch.testing.assert_close(encoder.patches(x).mean((1, 2)), encoder.features(x))


def test_the_hash_is_of_values_shapes_and_head():
    a, b = EvalEncoder(vit(), 16), EvalEncoder(vit(), 224)
    assert a.weights_hash == b.weights_hash
    changed = vit()
    with torch.no_grad():
        changed.cls_token[0, 0, 0] += 1e-6
    assert EvalEncoder(changed, 16).weights_hash != a.weights_hash
    assert EvalEncoder(vit(), 16, head=torch.nn.Linear(64, 2)).weights_hash != a.weights_hash
    assert EvalEncoder(vit().bfloat16(), 16).weights_hash != a.weights_hash


def test_reset_changes_every_weight_matrix_but_not_the_original():
    for model in (vit(), ResNet(BasicBlock, (1, 1, 1, 1), num_classes=0).eval()):
        before = {n: p.clone() for n, p in model.named_parameters()}
        fresh = reset(model, 3)
        again = reset(model, 3)
        for name, p in fresh.named_parameters():
            assert torch.equal(p, again.get_parameter(name)), name
            assert torch.equal(model.get_parameter(name), before[name])
            if p.ndim > 1:
                assert not torch.equal(p, before[name]), name


# ---------------------------------------------------------------------------------------------- opening


@pytest.mark.parametrize("side", ["teacher", "student"])
def test_a_run_folder_gives_its_newest_weights(tmp_path, side):
    config, state = own_run(tmp_path / "run")
    encoder = open_encoder(tmp_path / "run", side)
    expected = getattr(state, side)
    size = config.views.global_size
    x = torch.randn(4, 3, size, size)
    expected.eval()
    torch.testing.assert_close(encoder.features(x), expected.backbone(x))
    torch.testing.assert_close(encoder.project(encoder.features(x)), expected.head(expected.backbone(x)))
    torch.testing.assert_close(encoder.vectors, state.prototypes().vectors(side).float())
    assert (encoder.step, encoder.side, encoder.size) == (7, side, size)
    assert encoder.mean == config.views.mean
    start = encoder.untrained()
    fresh = build_state(config)
    torch.testing.assert_close(start.features(x), fresh.teacher.eval().backbone(x))
    torch.testing.assert_close(start.vectors, fresh.prototypes().vectors("teacher").float())


@pytest.mark.parametrize("side", ["teacher", "student"])
def test_a_dino_checkpoint_is_taken_side_by_side(tmp_path, side):
    model, head, p = dino(tmp_path / "a.pth")[side]
    encoder = open_encoder(tmp_path / "a.pth", side)
    x = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(encoder.features(x), model(x))
    z = torch.nn.functional.normalize(head(model(x)), dim=-1)
    torch.testing.assert_close(encoder.project(encoder.features(x)), z)
    torch.testing.assert_close(encoder.vectors, torch.nn.functional.normalize(p.w, dim=1))
    assert encoder.tokens
    assert (encoder.side, encoder.notes) == (side, [])
    assert encoder.untrained().vectors is None


@pytest.mark.parametrize("wrap", ["", "module.", "backbone.", "module.backbone."])
def test_a_backbone_alone_is_evaluated(tmp_path, wrap):
    model = vit(num_classes=10)
    torch.save({"state_dict": prefixed(wrap, model.state_dict())}, tmp_path / "a.pth")
    encoder = open_encoder(tmp_path / "a.pth")
    x = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(encoder.features(x), model.forward_features(x)[:, 0])
    assert encoder.head is None
    assert encoder.vectors is None
    assert encoder.side == "model"
    assert "only the backbone" in encoder.notes[0]


def test_a_resnet_in_safetensors_is_evaluated(tmp_path):
    from safetensors.torch import save_file

    torch.manual_seed(0)
    model = ResNet(BasicBlock, (1, 1, 1, 1), num_classes=5).eval()
    save_file(model.state_dict(), tmp_path / "a.safetensors")
    encoder = open_encoder(tmp_path / "a.safetensors", size=48)
    assert encoder.size == 48
    assert encoder.layers(torch.randn(1, 3, 48, 48))[0].shape == (1, 1, 512)


def test_a_head_that_is_not_understood_leaves_the_backbone(tmp_path):
    model, p = vit(), planted(dim=48)
    net = {**prefixed("backbone.", model.state_dict()), **norm_old(p, "head.last_layer")}
    torch.save({"teacher": net}, tmp_path / "a.pth")
    encoder = open_encoder(tmp_path / "a.pth")
    assert encoder.head is None
    assert encoder.vectors is None
    assert "no projection head" in encoder.notes[0]


def test_prototypes_that_are_not_finite_are_nobody_s(tmp_path):
    model, p = vit(), planted(dim=48)
    p.w[3] = float("nan")
    weights = mlp(64, 48)[1]
    net = {**prefixed("backbone.", model.state_dict()), **weights, "head.last_layer.weight": p.w}
    torch.save({"teacher": net}, tmp_path / "a.pth")
    encoder = open_encoder(tmp_path / "a.pth")
    assert len(encoder.vectors) == len(p.w) - 1
    assert bool(torch.isfinite(encoder.vectors).all())
    assert f"1 of {len(p.w)} prototypes are zero, NaN or infinite and are left out" in encoder.notes[0]


def test_capi_has_a_mean_and_a_map(tmp_path):
    import encoders

    state = encoders.capi()
    torch.save({"model": prefixed("teacher.backbone.", state)}, tmp_path / "a.pth")
    encoder, x = open_encoder(tmp_path / "a.pth", size=32), torch.randn(2, 3, 32, 32)
    tokens = encoders.capi_tokens(state, x)
    torch.testing.assert_close(encoder.layers(x)[0][:, 0], tokens.mean(1))
    torch.testing.assert_close(encoder.patches(x).flatten(1, 2), tokens)
    assert encoder.width == tokens.shape[2]
    assert encoder.attention(x) is None


def test_models_of_large_images_are_evaluated_at_224(tmp_path):
    model = VisionTransformer(img_size=280, patch_size=28, embed_dim=64, depth=1, num_heads=1, num_classes=0)
    torch.save(model.state_dict(), tmp_path / "a.pth")
    assert open_encoder(tmp_path / "a.pth", size=280).size == 280
    encoder = open_encoder(tmp_path / "a.pth")
    assert encoder.size == 224
    assert "made for 280" in encoder.notes[-1]
    assert encoder.patches(torch.randn(1, 3, 224, 224)).shape == (1, 8, 8, 64)


def test_a_timm_model_by_name_with_and_without_a_file(tmp_path):
    torch.manual_seed(5)
    model = timm.create_model("resnet10t", num_classes=7).eval()
    torch.save({"state_dict": prefixed("module.", model.state_dict())}, tmp_path / "w.pth")
    state = torch.random.get_rng_state()
    first, second = (open_encoder("timm:resnet10t", seed=seed) for seed in (0, 1))
    assert torch.equal(state, torch.random.get_rng_state())
    assert first.weights_hash == open_encoder("timm:resnet10t").weights_hash != second.weights_hash
    assert "random weights" in first.notes[0]
    assert first.untrained is None
    loaded = open_encoder("timm:resnet10t", weights=tmp_path / "w.pth")
    x = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(loaded.features(x), model.forward_head(model.forward_features(x), pre_logits=True))
    assert loaded.untrained().weights_hash == first.weights_hash
    assert open_encoder("timm:vit_tiny_patch16_224", size=64).layers(x)[0].shape == (2, 4, 192)


@pytest.mark.parametrize(
    ("source", "options", "words"),
    [
        ("timm:resnet10", {}, "close to it: resnet10t"),
        ("timm:vit_tiy_patch16_224", {}, "vit_tiny_patch16_224"),
        ("timm:nothing_like_it", {}, "list_models"),
        ("timm:resnet10t", {"weights": "x", "pretrained": True}, "exclude each other"),
        ("timm:resnet10t", {"size": 4}, "--size"),
        ("a.pth", {"pretrained": True}, "brings its own"),
    ],
)
def test_options_that_do_not_fit(source, options, words):
    with pytest.raises(ConfigError, match=words):
        open_encoder(source, **options)


def test_files_that_do_not_fit(tmp_path):
    torch.save(vit().state_dict(), tmp_path / "vit.pth")
    torch.save({"a": torch.randn(3, 3)}, tmp_path / "odd.pth")
    torch.save({"lr": 1.0}, tmp_path / "empty.pth")
    with pytest.raises(InputError, match="not the weights of timm:resnet10t"):
        open_encoder("timm:resnet10t", weights=tmp_path / "vit.pth")
    with pytest.raises(InputError, match="holds no student"):
        open_encoder(tmp_path / "vit.pth", "student")
    with pytest.raises(InputError, match="no encoder"):
        open_encoder(tmp_path / "odd.pth")
    with pytest.raises(InputError, match="no tensor"):
        open_encoder(tmp_path / "empty.pth")
    with pytest.raises(InputError, match="no such file"):
        open_encoder(tmp_path / "none.pth")


def test_pretrained_without_internet_is_one_clear_line(monkeypatch):
    real = timm.create_model

    def offline(name, pretrained=False, **options):
        if pretrained:
            raise OSError("name or service\nnot known")
        return real(name, **options)

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(ConfigError, match=r"needs internet .name or service not known.*--weights FILE") as caught:
        open_encoder("timm:resnet10t", pretrained=True)
    assert "\n" not in str(caught.value)


def test_the_map_of_our_own_small_cnn_is_what_its_pooling_sees():
    encoder = EvalEncoder(Conv3(8), 32)
    x = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    patches = encoder.patches(x)
    assert patches.shape == (3, 4, 4, 32)
    torch.testing.assert_close(patches.mean((1, 2)), encoder.features(x))
