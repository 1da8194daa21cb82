"""Prototypes that divide up patches, looked at with images; and logits with lengths and a bias of their own."""

import json

import pytest
import torch
import torch.nn.functional as F
from test_encoder import head

import encoders
from layouts import EPS, S, T, X, norm_old, prefixed
from uncollapse.checkpoints.prototypes import find_prototypes
from uncollapse.diagnosis.images import PATCHES, _marginal, _shared
from uncollapse.diagnosis.page import write_page
from uncollapse.diagnosis.run import diagnose_file
from uncollapse.diagnosis.text import facts
from uncollapse.measure.usage import prototype_argmax
from uncollapse.models.embed import SomePatches


def ibot(shared: bool) -> dict:
    model = encoders.vit(img_size=48)
    weights = head("head.mlp.", 64, 48)[1]
    other = norm_old(T if shared else X, "head.last_layer2")
    net = {**prefixed("backbone.", model.state_dict()), **weights, **norm_old(T, "head.last_layer"), **other}
    return {"teacher": net, "student": prefixed("module.", net), "ibot_loss": {"center": torch.zeros(1, len(T.w))}}


def test_patch_prototypes_are_counted_on_patches(tmp_path):
    torch.save(ibot(shared=False), tmp_path / "a")
    found = diagnose_file(tmp_path / "a", EPS, data="builtin:digits", limit=30)
    assert [(d.source.side, d.source.set) for d in found[:2]] == [("teacher", "cls"), ("teacher", "patch")]
    classes, patches = (d.images for d in found[:2])
    assert (classes.unit, classes.n, classes.n_images) == ("images", 30, 30)
    assert (patches.unit, patches.n, patches.n_images) == ("patches", 30 * PATCHES, 30)
    assert patches.n_train == 30 * PATCHES
    assert int(patches.usage.sum()) == patches.n
    assert patches.view_information is None
    assert patches.health["alignment"] is None
    assert classes.health["alignment"] is not None
    assert patches.alive >= 1
    assert any(f"{30 * PATCHES:,} patches" in note and "view information" in note for note in found[1].notes)
    assert any("480 held-out patches of 30 images" in line for line in facts(found[1]))
    assert "held-out patches" in found[1].verdict.sentence
    said = found[1].to_json()
    assert (said["unit"], said["n"], said["n_images"]) == ("patches", 480, 30)
    json.dumps(said, allow_nan=False)
    for group in patches.shared:
        assert 1 <= group.images <= 30
        assert all(len(set(row)) == len(row) == 8 for row in group.nearest)
    assert any(g.pictures is not None and g.pictures.shape[:2] == (len(g.members), 8) for g in patches.shared)
    again = diagnose_file(tmp_path / "a", EPS, data="builtin:digits", limit=30)[1]
    assert (again.images.usage == patches.usage).all()
    write_page(found, tmp_path / "p.html")
    assert "480 held-out patches" in (tmp_path / "p.html").read_text()


def test_a_shared_head_is_counted_on_class_tokens_and_says_so(tmp_path):
    torch.save(ibot(shared=True), tmp_path / "a")
    teacher = diagnose_file(tmp_path / "a", EPS, data="builtin:digits", limit=20)[0]
    assert teacher.images.unit == "images"
    assert any("class token alone" in note for note in teacher.notes)


def test_capis_clusters_use_their_lengths_and_their_bias(tmp_path):
    state = encoders.capi()
    w = T.w[:, :16] * torch.linspace(0.1, 4, len(T.w))[:, None]
    bias = torch.zeros(len(w))
    bias[3] = 1e4
    teacher = {**prefixed("backbone.", state), "head.layer.weight": w, "head.layer.bias": bias}
    student = {**prefixed("backbone.", state), **norm_old(S, "head.last_layer")}
    model = {**prefixed("student.", student), **prefixed("teacher.", teacher)}
    torch.save({"iteration": 1, "model": model}, tmp_path / "a")
    teacher, student = diagnose_file(tmp_path / "a", EPS, data="builtin:digits", limit=20)
    assert teacher.images.marginal["temperature"] == 0.06
    assert teacher.images.marginal["biased"]
    assert teacher.images.marginal["entropy"] == pytest.approx(0, abs=1e-6)  # the bias takes everything
    assert teacher.images.used_by_logits == 1
    assert teacher.images.used > 1
    assert any("by the layer's own logits" in line for line in facts(teacher))
    assert any("bias" in note for note in teacher.notes)
    assert student.images is None
    assert "decoder" in student.notes[-1]


def test_patches_are_some_of_each_image_and_always_the_same():
    tokens = torch.arange(5 * 40, dtype=torch.float32).view(5, 40, 1)
    some = SomePatches(torch.nn.Identity(), most=7)
    found = some(tokens)
    assert some.each == 7
    assert torch.equal(found, some(tokens))
    rows = found.view(5, 7)
    assert all(len(set(row.tolist())) == 7 and (row // 40 == i).all() for i, row in enumerate(rows))
    assert len({tuple((row % 40).tolist()) for row in rows}) > 1
    assert torch.equal(SomePatches(torch.nn.Identity(), most=99)(tokens), tokens.flatten(0, 1))


def test_an_image_is_near_a_group_by_its_nearest_patch():
    w = torch.eye(4)[[0, 0, 1, 2]]
    z = torch.eye(4)[torch.tensor([[3, 0], [1, 3], [0, 2]])]  # three images of two patches
    group = torch.tensor([0, 0, 2, 3])
    (shared,) = _shared(w, z, group, prototype_argmax(z.flatten(0, 1), w), torch.arange(4), None)
    assert (shared.prototypes, shared.members) == (2, [0, 1])
    # Patches of no prototype go to the lowest index, as every tie does.
    assert shared.images == 3
    assert {"#0", "#2"} == set(shared.nearest[0][:2])


def test_logits_take_lengths_and_bias():
    w, z = torch.eye(3), F.normalize(torch.tensor([[1.0, 0.9, 0.0], [1.0, 0.0, 0.9]]), dim=1)
    alone = torch.arange(3)
    plain, used = _marginal(w, z, alone, 1e-3)
    assert (used, plain["biased"]) == (1, False)
    assert plain["entropy"] == pytest.approx(0, abs=1e-6)
    long, used = _marginal(w, z, alone, 1e-3, lengths=torch.tensor([1.0, 3.0, 3.0]))
    assert used == 2
    assert long["entropy"] == pytest.approx(0.6931, abs=1e-3)
    biased, used = _marginal(w, z, alone, 1e-3, bias=torch.tensor([0.0, 0.0, 9.0]))
    assert (used, biased["biased"], biased["largest"]) == (1, True, pytest.approx(1))


@pytest.mark.parametrize(
    ("state", "lengths"),
    [
        ({"teacher.dino_head.last_layer.weight": T.w}, T.w.norm(dim=1)),  # DINOv3: a plain linear layer
        (norm_old(T, "teacher.head.last_layer", g=-2.0), torch.full((len(T.w),), 2.0)),
        ({"prototypes.weight": T.w}, None),  # SwAV normalises them
        ({"prototypes.heads.0.weight": T.w, "prototypes.heads.0.bias": torch.ones(len(T.w))}, None),
    ],
)
def test_lengths_in_the_logits_are_those_of_the_family(state, lengths):
    (s,) = find_prototypes(state, "x")
    if lengths is None:
        assert s.lengths() is None
    else:
        torch.testing.assert_close(s.lengths(), lengths)
    assert (s.bias is not None) == any(n.endswith("bias") for n in state)


def test_lightlys_bias_reaches_the_mean_target(tmp_path):
    """Two heads of lightly's SwAV on one backbone; its projection head is batch-normed and has ReLUs."""
    from timm.models.resnet import BasicBlock, ResNet

    model = encoders.noisy(ResNet(BasicBlock, (1, 1, 1, 1), num_classes=0))
    first, last = torch.nn.Linear(512, 20, bias=False), torch.nn.Linear(20, 48)
    norm = encoders.noisy(torch.nn.BatchNorm1d(20))
    layers = torch.nn.Sequential(first, norm, torch.nn.ReLU(), last)
    bias = torch.zeros(len(T.w))
    bias[5] = 1e3
    state = {
        **prefixed("backbone.", model.state_dict()),
        **prefixed("projection_head.layers.", layers.state_dict()),
        "prototypes.heads.0.weight": T.w,
        "prototypes.heads.0.bias": bias,
    }
    from uncollapse.checkpoints.encoder import rebuild_encoder

    (s,) = find_prototypes(state, "x")
    rebuilt = rebuild_encoder(state, state, s, "x")
    f = torch.randn(7, 512)
    with torch.no_grad():
        torch.testing.assert_close(rebuilt.head(f), F.normalize(layers.eval()(f), dim=-1))
    torch.save({"state_dict": state}, tmp_path / "a")
    (d,) = diagnose_file(tmp_path / "a", EPS, data="builtin:digits", limit=4)
    assert d.images.marginal["temperature"] == 0.05
    assert d.images.marginal["largest"] == pytest.approx(1)
    assert d.images.used_by_logits == 1


def test_carps_projections_keep_their_length_in_the_mean_target(tmp_path):
    """CARP's softmax has no temperature; the length of a projection does its work."""
    from timm.models.resnet import BasicBlock, ResNet

    model = encoders.noisy(ResNet(BasicBlock, (1, 1, 1, 1), num_classes=0))
    weights = head("head.mlp.", 512, 48, bn=True)[1]
    weights = {n: 30 * t if n == "head.mlp.6.weight" else t for n, t in weights.items()}
    net = {**prefixed("backbone.", model.state_dict()), **weights, **norm_old(T, "head.last_layer")}
    content = {"student": prefixed("module.", net), "teacher": prefixed("module.", net)}
    torch.save(content, tmp_path / "a")
    teacher = diagnose_file(tmp_path / "a", EPS, data="builtin:digits", limit=4)[0]
    assert teacher.source.family == "CARP"
    marginal = teacher.images.marginal
    assert marginal["temperature"] == 1
    flat = torch.log(torch.tensor(float(len(T.w))))
    assert marginal["entropy"] < 0.9 * flat  # of unit length, logits in [-1, 1] could never be this sharp


def test_each_set_has_its_own_centre():
    """iBOT and EsViT keep one per head, which a recipe may make equally long."""
    from uncollapse.checkpoints.encoder import center_of
    from uncollapse.checkpoints.read import flatten

    k = len(T.w)
    loss = {"center": torch.ones(1, k), "center2": 2 * torch.ones(1, 1, k), "center_grid": 3 * torch.ones(1, k)}
    for layer, value in (("head.last_layer", 1), ("head.last_layer2", 2), ("head_dense.last_layer", 3)):
        tensors = flatten({"teacher": norm_old(T, layer), "dino_loss": loss})
        (s,) = find_prototypes(tensors, "x")
        assert center_of(tensors, s).tolist() == [value] * k
