"""Mixtures outside of our runs, other libraries' spellings of networks, and how sets are counted."""

import pytest
import timm
import torch
import torch.nn.functional as F
from test_encoder import head, rebuilt_of
from timm.models.resnet import BasicBlock, ResNet

import encoders
from layouts import EPS, S, T, norm_old, prefixed
from uncollapse.checkpoints.backbones import backbone_of
from uncollapse.diagnosis import run as diagnosis
from uncollapse.diagnosis.run import diagnose, diagnose_file
from uncollapse.evaluate.source import open_encoder
from uncollapse.measure.unique import unique_prototypes
from uncollapse.prototypes.mixture import OnlineMixture


def mixture(centred: bool = True) -> OnlineMixture:
    """Means in one corner: few are unique as they are, more as directions from their middle."""
    found = OnlineMixture(60, 8, rows=64, centred=centred, generator=torch.Generator().manual_seed(0))
    found.mean.copy_(F.normalize(torch.ones(8) + 0.3 * F.normalize(found.mean, dim=1), dim=1))
    return found


# ------------------------------------------------------------------------------------------- mixtures


@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("where", ["alone", "beside", "inside"])
def test_a_mixture_is_counted_as_its_directions_enter_the_logits(centred, where, tmp_path):
    m = mixture(centred)
    state = m.state_dict()
    content = {
        "alone": state,
        "beside": {"mixture": state, "model": {"prototypes.weight": T.w, "a.weight": torch.ones(3, 3)}},
        "inside": {"model": {**prefixed("mixture.", state), "prototypes.weight": T.w}},
    }[where]
    torch.save(content, tmp_path / "a")
    d = diagnose_file(tmp_path / "a", EPS)[0]
    assert (d.source.set, d.source.family, d.prototypes) == ("mixture", "uncollapse", 60)
    assert d.unique == {EPS: unique_prototypes(m.directions(), EPS)}
    assert d.unique_means == {EPS: unique_prototypes(m.mean, EPS)}
    assert d.to_json()["unique_means"] == {"0.025": d.unique_means[EPS]}
    assert (d.unique_means != d.unique) is centred
    key = d.source.key.replace("/", ".")
    assert diagnose(tmp_path / "a", EPS, key=key).unique == d.unique


def test_a_state_of_before_says_that_it_does_not_say(tmp_path):
    state = {n: t for n, t in mixture().state_dict().items() if n not in ("is_centred", "beta")}
    torch.save(state, tmp_path / "a")
    d = diagnose(tmp_path / "a", EPS)
    assert d.unique == {EPS: unique_prototypes(mixture().mean, EPS)}
    assert any("does not say whether the mixture is centred" in note for note in d.notes)


def test_means_are_unique_where_vectors_are_what_they_are():
    d = diagnose(T.w, (EPS, 0.1))
    assert d.unique_means == d.unique


# ------------------------------------------------------------------------------------ other spellings


def children(model: torch.nn.Module) -> dict:
    return torch.nn.Sequential(*list(model.children())[:-1]).state_dict()


def test_lightlys_tutorial_backbone_is_rebuilt(tmp_path):
    torch.manual_seed(0)
    model = encoders.noisy(ResNet(BasicBlock, (1, 1, 1, 1), num_classes=0))
    assert "7.0.conv1.weight" in children(model)
    mlp, weights = head("head.layers.", model.num_features, 48)
    side = {**prefixed("backbone.", children(model)), **weights, **norm_old(T, "head.last_layer")}
    content = {"state_dict": {**prefixed("student_", side), **prefixed("teacher_", side)}}
    rebuilt = rebuilt_of(content)
    x = torch.randn(2, 3, 48, 48)
    with torch.no_grad():
        torch.testing.assert_close(rebuilt.head(rebuilt.backbone(x)), F.normalize(mlp(model(x)), dim=-1))
        torch.save(children(model), tmp_path / "alone")
        torch.testing.assert_close(open_encoder(tmp_path / "alone").module(x), model(x))


@pytest.mark.parametrize("spelling", ["plain", "lightly", "torchvision"])
def test_weights_of_a_resnet_fit_timms(spelling, tmp_path):
    model = encoders.noisy(timm.create_model("resnet18", num_classes=10 if spelling == "torchvision" else 0))
    state = children(model) if spelling == "lightly" else model.state_dict()
    torch.save({"state_dict": prefixed("backbone.", state)} if spelling == "lightly" else state, tmp_path / "a")
    found = open_encoder("timm:resnet18", weights=tmp_path / "a")
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(found.module(x), model.forward_head(model.forward_features(x), pre_logits=True))


def test_lightlys_msn_is_rebuilt():
    """``backbone`` follows ``anchor_backbone``, which learns; the head is an MLP with batch norm and GELU."""
    target, anchor = encoders.noisy(encoders.vit()), encoders.noisy(encoders.vit(), seed=1)
    mlp, weights = head("projection_head.layers.", 64, 48, bn=True)
    state = {**prefixed("backbone.vit.", target.state_dict()), "backbone.mask_token": torch.zeros(1, 1, 64), **weights}
    state |= {**prefixed("anchor_backbone.vit.", anchor.state_dict()), **prefixed("anchor_", weights)}
    rebuilt = rebuilt_of({"state_dict": {**state, "prototypes": T.w}})
    x = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        expected = F.normalize(mlp(target.forward_features(x)[:, 0]), dim=-1)
        torch.testing.assert_close(rebuilt.head(rebuilt.backbone(x)), expected, rtol=1e-4, atol=1e-5)


def test_stable_pretrainings_wrapper_is_rebuilt():
    models = {side: encoders.noisy(encoders.vit(), seed=i) for i, side in enumerate(("teacher", "student"))}
    mlp, weights = head("", 64, 48)
    state = {}
    for side, p in (("teacher", T), ("student", S)):
        state |= prefixed(f"backbone.{side}.", models[side].state_dict())
        state |= {**prefixed(f"projector.{side}.mlp.", weights), **norm_old(p, f"projector.{side}.last_layer")}
    x = torch.randn(2, 3, 16, 16)
    for side in models:
        rebuilt = rebuilt_of({"state_dict": state}, side)
        with torch.no_grad():
            expected = F.normalize(mlp(models[side].forward_features(x)[:, 0]), dim=-1)
            torch.testing.assert_close(rebuilt.head(rebuilt.backbone(x)), expected, rtol=1e-4, atol=1e-5)


def test_torchvisions_vit_is_rebuilt():
    from torchvision.models import VisionTransformer

    torch.manual_seed(0)
    model = encoders.noisy(VisionTransformer(32, 16, 2, 1, 64, 128))
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        tokens = torch.cat([model.class_token.expand(2, -1, -1), model._process_input(x)], 1)
        expected = model.encoder(tokens)[:, 0]
        torch.testing.assert_close(backbone_of(model.state_dict(), "x").module(x), expected, rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------------------------- counting


def test_a_transposed_matrix_is_said_to_look_like_one():
    assert "look like a transposed matrix" in diagnose(torch.randn(24, 200)).notes[0]
    assert not diagnose(torch.randn(200, 24)).notes


def test_equal_sides_are_counted_once(tmp_path, monkeypatch):
    v = T.w.clone()
    net = {"head.last_layer.weight_v": v, "head.last_layer.weight_g": torch.ones(len(v), 1)}
    longer = {**net, "head.last_layer.weight_g": torch.full((len(v), 1), 3.0)}
    torch.save({"teacher": net, "student": longer}, tmp_path / "a")
    calls = []
    measure = diagnosis.measure
    monkeypatch.setattr(diagnosis, "measure", lambda *args, **options: calls.append(args) or measure(*args, **options))
    teacher, student = diagnose_file(tmp_path / "a", EPS)
    assert len(calls) == 1
    assert teacher.unique == student.unique == {EPS: T.unique}
    assert (teacher.source.side, student.source.side) == ("teacher", "student")
    assert (teacher.norms["max"], student.norms["max"]) == (1.0, 3.0)
    assert "counted once" in student.notes[-1]
    assert not teacher.notes


@pytest.mark.parametrize("complete", [True, False])
def test_progress_ends_at_the_end_and_never_falls(complete, tmp_path):
    w = torch.randn(3000, 48, generator=torch.Generator().manual_seed(0))
    torch.save({"teacher": {"head.last_layer.weight": w}, "student": {"head.last_layer.weight": w + 1}}, tmp_path / "a")
    told: list[tuple[str, float]] = []
    diagnose_file(tmp_path / "a", EPS, complete=complete, progress=lambda *one: told.append(one))
    assert told[0] == ("reading", 0.0)
    shares = [share for what, share in told if what == "counting"]
    assert shares == sorted(shares)
    assert shares[-1] == 1.0
    assert len(set(shares)) > 4
