"""DINOv2's three terms, its centres, masks and temperature beside brute force in float64, and its network's heads."""

import pytest
import torch

from made_tokens import LOCALS, D, K, Made, N
from steps import Steps, batch_of, small
from uncollapse.config.load import load_config
from uncollapse.data.masks import crop_masks
from uncollapse.errors import ConfigError
from uncollapse.methods import dinov2
from uncollapse.methods.centre import temperature_at
from uncollapse.methods.contract import At

START = At(0, 0.0, 0.0, 0, None)
OTHER = 4
"""Length of a patch's projection where it has a head of its own."""


def config(shared, **keys):
    few = {"prototypes.count": K, "head.bottleneck": D, "run.batch": N, "method.shared": shared}
    few |= {"teacher.temperature_start": 0.05, "method.koleo_images": 3}
    return load_config("dinov2-vitl16", few | ({} if shared else {"method.patch_bottleneck": OTHER}) | keys)


def made(shared, hidden=True):
    return Made(shared, hidden, D if shared else OTHER)


def terms_of(c, made):
    student = dinov2.see_student(c, made.net, made.batch)
    teacher = dinov2.see_teacher(c, made.net, made.batch, None)
    targets = dinov2.assign(c, teacher, made.sets, made.memory, START)
    return dinov2.objective(c, student, targets, made.sets, START), teacher


def logits(made, name, side, z):
    return (made.weights(name, side) @ z.reshape(-1, z.shape[-1]).T).T


def centred(made, name, z, center):
    return torch.softmax((logits(made, name, "teacher", z) - made.memory[center]) / 0.05, 1)


def balanced(made, name, z, center):
    """Three rounds of Sinkhorn, as a dense matrix: prototypes alike, then rows."""
    q = torch.exp(logits(made, name, "teacher", z) / 0.05)
    for _ in range(3):
        q = q / q.sum(0) / q.shape[1]
        q = q / q.sum(1, keepdim=True)
    return q


def brute(made, patch_set, assigned):
    """The three terms, one cross-entropy and one pair of images at a time."""

    def cross(target, z, name):
        return -(target.detach() * torch.log_softmax(logits(made, name, "student", z)[0] / 0.1, 0)).sum()

    targets = assigned(made, "cls", made.teacher, "center").reshape(2, N, K)
    pairs = [(v, t) for v in range(2 + LOCALS) for t in range(2) if v != t]
    each = [cross(targets[t, i], made.student[v, i], "cls") for v, t in pairs for i in range(N)]
    patch = torch.zeros((), dtype=torch.float64)
    if made.mask.any():
        of_patches = assigned(made, patch_set, made.teacher_patches[made.mask], "center_patch")
        for target, (crop, i, j) in zip(of_patches, made.mask.nonzero().tolist(), strict=True):
            share = 1 / int(made.mask[crop, i].sum()) / (2 * N)
            patch = patch + share * cross(target, made.student_patches[crop, i, j], patch_set)
    koleo = torch.zeros((), dtype=torch.float64)
    for crop in range(2):
        unit = made.features[crop] / made.features[crop].norm(dim=1, keepdim=True)
        for group in (range(3), range(3, N)):  # three images at a time
            for i in group:
                nearest = min((unit[i] - unit[j]).norm() for j in group if j != i)
                koleo = koleo - nearest.log() / N
    return {"cls": sum(each) / len(each), "patch": patch, "koleo": koleo}


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize(("kind", "assigned"), [("centred", centred), ("sinkhorn", balanced)])
def test_terms_and_gradients_are_the_papers(shared, kind, assigned):
    weights = {"method.patch_weight": 0.5, "method.koleo_weight": 0.3}
    c, m = config(shared, **{"prototypes.targets": kind}, **weights), made(shared)
    terms, _ = terms_of(c, m)
    expected = brute(m, "cls" if shared else "patch", assigned)
    expected = {"cls": expected["cls"], "patch": 0.5 * expected["patch"], "koleo": 0.3 * expected["koleo"]}
    assert list(terms) == list(expected)
    for name, term in expected.items():
        # A patch's weight, Sinkhorn's offsets and the features are float32.
        torch.testing.assert_close(terms[name].double(), term, rtol=1e-5, atol=1e-6)
    learned = [p for s in m.sets.values() for p in (s.student_v, s.student_g)]
    wanted = [m.student, m.student_patches, m.features, *learned]
    one, other = (torch.autograd.grad(sum(t.values()), wanted) for t in (terms, expected))
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert not one[1][~m.mask].any()
    assert not one[2][2:].any()  # KoLeo is of the global views


@pytest.mark.parametrize("shared", [True, False])
def test_the_patches_centre_is_that_of_the_hidden_ones(shared):
    c, m = config(shared), made(shared)
    _, teacher = terms_of(c, m)
    was = {n: t.clone() for n, t in m.memory.items()}
    dinov2.remember(c, teacher, m.sets, m.memory, START)
    hidden = logits(m, "cls" if shared else "patch", "teacher", m.teacher_patches[m.mask]).mean(0)
    everyone = logits(m, "cls", "teacher", m.teacher).mean(0)
    for name, new in (("center", everyone), ("center_patch", hidden)):
        torch.testing.assert_close(m.memory[name], 0.9 * was[name] + 0.1 * new.detach())


def test_a_batch_without_any_hidden_patch_has_no_patch_term_and_leaves_its_centre():
    c, m = config(True), made(True, hidden=False)
    terms, teacher = terms_of(c, m)
    was = m.memory["center_patch"].clone()
    dinov2.remember(c, teacher, m.sets, m.memory, START)
    assert terms["patch"].item() == 0
    assert torch.equal(m.memory["center_patch"], was)


def test_the_temperature_rises_at_every_step():
    c = load_config("dinov2-vitl16")
    rising = [temperature_at(c, At(0, epoch, 0.0, 0, None)) for epoch in (0.0, 15.0, 15.5, 60.0, 100.0)]
    assert rising == pytest.approx([0.04, 0.0475, 0.04775, 0.07, 0.07])
    none = load_config("dinov2-vitl16", {"teacher.temperature_warmup_epochs": 0})
    assert temperature_at(none, START) == 0.07


def test_half_of_a_batchs_crops_are_masked_and_their_ratios_are_spread_evenly():
    """As the released code draws them: 10 of 20 crops, one ratio in each tenth of the range; parts agree."""
    whole = crop_masks(196, 2, 0.5, (0.1, 0.5), 3, 5, list(range(10)), evenly=10)
    hidden = whole.flatten(0, 1).sum(1)
    assert int((hidden > 0).sum()) == 10
    lower = 196 * torch.linspace(0.1, 0.5, 11)[:-1]
    # Blocks mostly fall a few patches short, and never exceed what was asked for.
    ordered = hidden[hidden > 0].sort().values
    assert (ordered <= lower + 196 * 0.04).all()
    assert (ordered >= lower - 20).all()
    parts = [crop_masks(196, 2, 0.5, (0.1, 0.5), 3, 5, part, evenly=10) for part in ([0, 1, 2], [3, 4, 5, 6, 7, 8, 9])]
    assert torch.equal(torch.cat(parts, 1), whole)
    assert not torch.equal(crop_masks(196, 2, 0.5, (0.1, 0.5), 3, 6, list(range(10)), evenly=10), whole)


def test_patches_have_a_head_of_their_own_where_asked():
    """Its MLP, its length and its prototypes; the class tokens' is not touched by the patches."""
    steps = Steps(small("dinov2-separate"))
    state = steps.state
    assert state.parts.names() == ["cls", "patch"]
    assert {n: p.vectors("teacher").shape[1] for n, p in state.by_name.items()} == {"cls": 32, "patch": 24}
    net, batch = state.student.eval(), batch_of(steps.config, state, 0)
    seen = dinov2.see_student(steps.config, net, batch)
    mask = batch.masks["global"]
    _, tokens = net.backbone.tokens(torch.cat(batch.views["global"]), mask.flatten(0, 1))
    expected = net.heads["patch"](tokens.unflatten(0, mask.shape[:2])[mask])
    torch.testing.assert_close(seen.z["patch"], expected)
    torch.testing.assert_close(seen.features["cls"][2:].flatten(0, 1), net.backbone(torch.cat(batch.views["local"])))
    seen.z["patch"].sum().backward()
    assert all(p.grad is None for p in net.heads["cls"].parameters())


def test_koleo_spreads_the_features():
    """Nothing but KoLeo: it falls, and only the backbone learns."""
    alone = {"method.koleo_weight": 1.0, "optim.weight_decay": 0.0, "optim.weight_decay_end": 0.0}
    steps = Steps(small("dinov2", **alone))
    batch = batch_of(steps.config, steps.state, 0)
    first, *_, last = [steps.take(batch).terms["koleo"] for _ in range(6)]
    assert last < first


@pytest.mark.parametrize("recipe", ["ibot-vits16", "dinov2-vitl16"])
@pytest.mark.parametrize(
    ("keys", "key", "why"),
    [
        ({"backbone.options": {"patch_drop_rate": 0.5}}, "backbone.options", "patch_drop_rate drops patches"),
        ({"method.mask_ratio": [0.5, 0.1]}, "method.mask_ratio", "must not exceed"),
        ({"backbone.name": "resnet18"}, "backbone.name", "hides patches"),
    ],
)
def test_what_hidden_patches_do_not_go_with_is_refused(recipe, keys, key, why):
    with pytest.raises(ConfigError, match=f"{key}: .*{why}"):
        load_config(recipe, keys)


@pytest.mark.parametrize(
    ("keys", "why"),
    [
        ({"method.patch_bottleneck": 8}, "only with method.shared false"),
        ({"run.batch": 256, "run.accumulate": 8}, "run.accumulate: parts of 32 images are not a multiple of"),
    ],
)
def test_impossible_settings_of_its_own_are_refused(keys, why):
    with pytest.raises(ConfigError, match=why):
        load_config("dinov2-vitl16", keys)
