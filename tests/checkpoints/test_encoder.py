"""Encoders rebuilt from checkpoints, and what images tell about their prototypes."""

import dataclasses
import json
import os
import re

import numpy as np
import pytest
import torch
from PIL import Image
from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from timm.models.vision_transformer import VisionTransformer

from layouts import EPS, T, norm_old, planted, prefixed
from uncollapse.checkpoints.encoder import rebuild_encoder
from uncollapse.checkpoints.prototypes import find_prototypes
from uncollapse.checkpoints.read import flatten
from uncollapse.config.load import load_config
from uncollapse.config.tiny import tiny
from uncollapse.diagnosis.run import diagnose, diagnose_file
from uncollapse.errors import DataError, InputError


def head(prefix: str, features: int, dim: int, bn: bool = False) -> tuple[torch.nn.Module, dict]:
    layers = [torch.nn.Linear(features, 20)]
    for _ in range(2):
        layers += [torch.nn.BatchNorm1d(20)] if bn else []
        layers += [torch.nn.GELU(), torch.nn.Linear(20, 20)]
    layers[-1] = torch.nn.Linear(20, dim)
    module = torch.nn.Sequential(*layers).eval()
    return module, {f"{prefix}{name}": t for name, t in module.state_dict().items()}


def vit(**options) -> VisionTransformer:
    torch.manual_seed(0)
    model = VisionTransformer(
        img_size=16, patch_size=8, embed_dim=64, depth=2, num_heads=1, num_classes=0, dynamic_img_size=True, **options
    ).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return model


def rebuilt_of(content, side="teacher", where="x"):
    tensors = flatten(content)
    s = next(s for s in find_prototypes(tensors, where) if s.side in (side, "unstated", "shared"))
    return rebuild_encoder(content, tensors, s, where)


def test_a_dino_vit_is_rebuilt_and_measured(tmp_path):
    model, p = vit(), planted(dim=48)
    mlp, weights = head("head.mlp.", 64, 48)
    net = {**prefixed("backbone.", model.state_dict()), **weights, **norm_old(p, "head.last_layer")}
    content = {"teacher": net, "student": prefixed("module.", net), "dino_loss": {"center": torch.zeros(1, len(p.w))}}
    x = torch.randn(3, 3, 16, 16)
    for side in ("teacher", "student"):
        rebuilt = rebuilt_of(content, side)
        expected = torch.nn.functional.normalize(mlp(model.forward_features(x)[:, 0]), dim=-1)
        torch.testing.assert_close(rebuilt.head(rebuilt.backbone(x)), expected)
        assert rebuilt.size == 16
    torch.save(content, tmp_path / "a")
    teacher, student = diagnose_file(tmp_path / "a", EPS, data="builtin:digits", limit=40)
    found = teacher.to_json()
    assert (found["n"], found["n_train"], found["views"]) == (40, 40, 6)
    assert 1 <= found["used"] <= 40
    assert found["alive"] >= 1
    assert found["dead"] <= found["prototypes"] - max(found["used"], found["alive"])
    assert 1 <= found["effective"]["0.025"] <= found["used"]
    assert found["unique_used"]["0.025"] <= found["used"]
    assert set(found["health"]) >= {"effective_rank_features", "uniformity", "alignment"}
    assert 0 <= found["marginal"]["entropy_distinct"] <= np.log(found["marginal"]["distinct"]) + 1e-9
    assert found["used"] == student.to_json()["used"]
    assert int(teacher.images.usage.sum()) == 40
    json.dumps(found, allow_nan=False)
    for group in teacher.images.shared:
        assert group.prototypes > 1
        assert group.images > 0
        assert group.pictures.shape[:2] == (len(group.members), 8)


def test_what_images_cannot_tell_is_said_in_a_line(tmp_path):
    """An encoder of NaN, prototypes of NaN, and too few images: no traceback, and the counts stay."""
    model, p = vit(), planted(dim=48)
    weights = head("head.mlp.", 64, 48)[1]
    backbone = prefixed("backbone.", model.state_dict())
    net = {**backbone, **weights, "head.last_layer.weight": p.w}
    torch.save({"teacher": {**net, "head.last_layer.weight": torch.full_like(p.w, torch.nan)}}, tmp_path / "nan")
    (d,) = diagnose_file(tmp_path / "nan", EPS, data="builtin:digits", limit=20)
    assert d.verdict.label == "damaged"
    assert "no prototype has a direction" in d.notes[-1]
    broken = {n: t * float("nan") if "qkv" in n else t for n, t in net.items()}
    torch.save({"teacher": broken}, tmp_path / "encoder")
    with pytest.raises(InputError, match="projections of 20 of 20 views are zero, NaN or infinite"):
        diagnose_file(tmp_path / "encoder", EPS, data="builtin:digits", limit=20)
    torch.save({"teacher": net}, tmp_path / "whole")
    (tmp_path / "few").mkdir()
    for i in range(3):
        Image.new("RGB", (9, 9), (60 * i, 0, 0)).save(tmp_path / "few" / f"{i}.png")
    with pytest.raises(DataError, match=r"1 held-out image.* at least two of each are needed"):
        diagnose_file(tmp_path / "whole", EPS, data=str(tmp_path / "few"))


def test_the_images_of_a_group_have_names(tmp_path):
    p = planted(dim=48, copies=30)
    weights = head("head.mlp.", 64, 48)[1]
    net = {**prefixed("backbone.", vit().state_dict()), **weights, "head.last_layer.weight": p.w}
    torch.save({"teacher": net}, tmp_path / "a")
    rng = np.random.default_rng(0)
    (tmp_path / "images").mkdir()
    for i in range(60):
        pixels = rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / f"{i}.png")
    (d,) = diagnose_file(tmp_path / "a", EPS, data=str(tmp_path / "images"))
    names = {name for group in d.to_json()["shared_groups"] for row in group["nearest"] for name in row}
    assert names
    assert all(os.path.isfile(name) for name in names)


def test_duplicates_skew_the_marginal_away_from_the_prior():
    """Ten copies of one prototype and one of each of five others: uniform over K is not uniform over the six."""
    from uncollapse.diagnosis.images import _marginal

    w = torch.eye(6)[[0] * 10 + [1, 2, 3, 4, 5]]
    group = torch.tensor([0] * 10 + [10, 11, 12, 13, 14])
    flat = _marginal(w, torch.eye(6), group, 1e6)[0]
    assert flat["entropy"] == pytest.approx(np.log(15), abs=1e-6)
    share = np.array([10, 1, 1, 1, 1, 1]) / 15
    skew = np.log(6) + (share * np.log(share)).sum()
    assert flat["kl_of_duplication"] == pytest.approx(skew)
    assert flat["kl_distinct_to_uniform"] == pytest.approx(skew, abs=1e-6)
    assert flat["largest"] == pytest.approx(10 / 15, abs=1e-6)
    sharp = _marginal(w, torch.eye(6), group, 1e-3)[0]
    assert sharp["kl_distinct_to_uniform"] == pytest.approx(0, abs=1e-6)


def test_a_dinov2_vit_with_registers_and_layer_scale_is_rebuilt():
    model = vit(init_values=0.5, reg_tokens=3, no_embed_class=True)
    state = model.state_dict()
    state["register_tokens"] = state.pop("reg_token")
    # DINOv2 adds the class token's position to it; timm's layout has none, so any split of the sum will do.
    position = torch.randn(1, 1, 64)
    state["pos_embed"] = torch.cat([position, state["pos_embed"]], 1)
    state["cls_token"] = state["cls_token"] - position
    state = {re.sub(r"^blocks\.(\d+)\.", r"blocks.0.\1.", n): t for n, t in state.items()}
    state["mask_token"] = torch.zeros(1, 64)
    weights = head("dino_head.mlp.", 64, 48)[1]
    net = {**prefixed("backbone.", state), **weights, **norm_old(T, "dino_head.last_layer")}
    rebuilt = rebuilt_of({"teacher": net})
    x = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(rebuilt.backbone(x), model.forward_features(x)[:, 0])
    assert rebuilt.head(rebuilt.backbone(x)).shape == (2, 48)


@pytest.mark.parametrize("block", [BasicBlock, Bottleneck])
def test_a_resnet_with_a_batch_norm_head_is_rebuilt(block):
    torch.manual_seed(0)
    model = ResNet(block, (1, 1, 1, 1), num_classes=0).eval()
    mlp, weights = head("head.mlp.", model.num_features, 48, bn=True)
    net = {**prefixed("backbone.", model.state_dict()), **weights, **norm_old(T, "head.last_layer")}
    rebuilt = rebuilt_of({"student": prefixed("module.", net), "teacher": prefixed("module.", net)})
    x = torch.randn(2, 3, 48, 48)
    expected = torch.nn.functional.normalize(mlp(model(x)), dim=-1)
    torch.testing.assert_close(rebuilt.head(rebuilt.backbone(x)), expected)


def test_an_msn_vit_is_rebuilt_from_its_target_encoder():
    model = vit()
    mlp, _ = head("", 64, 48, bn=True)
    names = ["fc1", "bn1", None, "fc2", "bn2", None, "fc3"]
    own = [m for m, n in zip(mlp, names, strict=True) if n]
    state = dict(model.state_dict())
    for name, module in zip([n for n in names if n], own, strict=True):
        state |= prefixed(f"fc.{name}.", module.state_dict())
    zeros = {n: torch.zeros_like(t) for n, t in state.items()}
    content = {"encoder": prefixed("module.", zeros), "target_encoder": prefixed("module.", state), "prototypes": T.w}
    rebuilt = rebuilt_of(content)
    x = torch.randn(2, 3, 16, 16)
    expected = torch.nn.functional.normalize(mlp(model.forward_features(x)[:, 0]), dim=-1)
    torch.testing.assert_close(rebuilt.head(rebuilt.backbone(x)), expected)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda net: {n: t for n, t in net.items() if "blocks.1.attn.proj" not in n}, "missing blocks.1.attn.proj"),
        (lambda net: {**net, "backbone.blocks.1.strange": torch.ones(3)}, "unknown blocks.1.strange"),
        (lambda net: {n: t for n, t in net.items() if ".mlp.4." not in n or "backbone" in n}, "head ends in 20"),
        (lambda net: {n: t for n, t in net.items() if "head.mlp" not in n}, "no projection head"),
        (lambda net: {n: t for n, t in net.items() if "backbone" not in n}, "no encoder"),
        (lambda net: {n: t for n, t in net.items() if "pos_embed" not in n}, "position embedding"),
        (lambda net: {n.replace("patch_embed.proj", "stem.conv"): t for n, t in net.items()}, "not understood"),
    ],
)
def test_what_cannot_be_rebuilt_is_named(change, says):
    _, weights = head("head.mlp.", 64, 48)
    net = {**prefixed("backbone.", vit().state_dict()), **weights, **norm_old(T, "head.last_layer")}
    with pytest.raises(InputError, match=says) as caught:
        rebuilt_of({"teacher": change(net)})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["joint", "decoupled", "fixed"])
def test_our_own_runs_end_to_end(kind, tmp_path):
    from uncollapse.run_folder.checkpoint import save_checkpoint
    from uncollapse.training.state import build_state, state_dicts

    config = tiny(load_config("demo", {"prototypes.kind": kind}))
    state = build_state(config)
    save_checkpoint(tmp_path / "checkpoints", 3, {**state_dicts(state), "config": dataclasses.asdict(config)}, 2)
    found = diagnose_file(tmp_path, data="builtin:digits", limit=50)
    assert [d.source.side for d in found] == (["teacher", "student"] if kind == "joint" else ["shared"])
    d = found[0]
    expected = state.prototypes().vectors("teacher")
    torch.testing.assert_close(torch.nn.functional.normalize(d.vectors, dim=1), expected)
    assert d.verdict.label == "untrained or unused"
    assert "held-out images use" in d.verdict.sentence
    assert d.images.encoder == "conv3"
    # The newest checkpoint is damaged: the one before it is taken.
    save_checkpoint(tmp_path / "checkpoints", 4, {**state_dicts(state), "config": dataclasses.asdict(config)}, 2)
    newest = tmp_path / "checkpoints" / "step-00000004.pt"
    newest.write_bytes(newest.read_bytes()[:-9])
    assert diagnose(tmp_path).unique == d.unique
    os.remove(tmp_path / "checkpoints" / "step-00000003.pt")
    with pytest.raises(InputError, match="every checkpoint"):
        diagnose(tmp_path)
