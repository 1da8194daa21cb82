"""MSN and PMSN beside brute force in float64, and which side sees which view, without which patches."""

import math

import pytest
import torch
import torch.nn.functional as F

from steps import Steps, batch_of, small
from uncollapse.config.load import load_config
from uncollapse.errors import ConfigError
from uncollapse.methods import msn
from uncollapse.methods.contract import At, Seen
from uncollapse.prototypes.sets import JointPrototypes

N, D, K, VIEWS = 6, 5, 11, 4
START = At(0, 0.0, 0.0, 0, None)


def config(**keys):
    return load_config("msn-vits16", {"prototypes.count": K, "head.bottleneck": D, "run.batch": N, **keys})


def made():
    """Projections of the student's and the teacher's views, and prototypes of one side and of many lengths; float64."""
    g = torch.Generator().manual_seed(0)
    z = F.normalize(torch.randn(VIEWS + 1, N, D, generator=g, dtype=torch.float64), dim=-1)
    prototypes = JointPrototypes(K, D, False, 0.0, g, followed=False).double()
    return z[1:].requires_grad_(), z[:1], prototypes


def terms(c, z, teacher, prototypes):
    sets = {"cls": prototypes}
    targets = msn.assign(c, Seen({"cls": teacher}), sets, msn.memory(c), START)
    return msn.objective(c, Seen({"cls": z}), targets, sets, START), targets


def brute(z, teacher, prototypes, shares, balanced):
    """Section 3 and the released loss, row by row: sharpening is a power, Sinkhorn is over probabilities."""
    w = prototypes.student_v / prototypes.student_v.norm(dim=1, keepdim=True)
    target = torch.stack([torch.softmax(w.detach() @ x / 0.1, 0) ** (1 / 0.25) for x in teacher[0]])
    target = target / target.sum(1, keepdim=True)
    for _ in range(3 if balanced else 0):
        target = target / target.sum(0, keepdim=True) * shares * N
        target = target / target.sum(1, keepdim=True)
    p = [[torch.softmax(w @ x / 0.1, 0) for x in view] for view in z]
    rows = [row for view in p for row in view]
    cross = sum(-(target[i] * p[v][i].log()).sum() for v in range(VIEWS) for i in range(N)) / (VIEWS * N)
    mean = sum(rows) / len(rows)
    divergence = (mean * (mean / shares).log()).sum()
    entropy = sum(-(row * row.log()).sum() for row in rows) / len(rows)
    return cross, divergence, entropy, target


@pytest.mark.parametrize("targets", ["sinkhorn", "softmax"])
@pytest.mark.parametrize("prior", ["uniform", "power"])
def test_terms_and_gradients_are_the_papers(prior, targets):
    own = {"prior": prior, "exponent": 0.6, "prior_weight": 2.0, "entropy_weight": 0.5}
    c = config(**{f"method.{n}": v for n, v in own.items()}, **{"prototypes.targets": targets})
    z, teacher, prototypes = made()
    shares = torch.tensor([(k + 1.0) ** -0.6 if prior == "power" else 1.0 for k in range(K)], dtype=torch.float64)
    shares = shares / shares.sum()
    found, assigned = terms(c, z, teacher, prototypes)
    cross, divergence, entropy, target = brute(z, teacher, prototypes, shares, targets == "sinkhorn")
    torch.testing.assert_close(assigned["cls"].dense()[0], target, rtol=1e-9, atol=1e-12)
    expected = {"cls": cross, "prior": 2.0 * divergence, "entropy": 0.5 * entropy}
    assert found.keys() == expected.keys()
    for name, term in expected.items():
        torch.testing.assert_close(found[name], term, rtol=0, atol=1e-10)
    if prior == "uniform":
        assert found["prior"].item() / 2 <= math.log(K)
    wanted = [z, prototypes.student_v]
    one = torch.autograd.grad(sum(found.values()), wanted)
    other = torch.autograd.grad(sum(expected.values()), wanted)
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


def test_what_weighs_nothing_is_no_term():
    z, teacher, prototypes = made()
    assert terms(config(), z, teacher, prototypes)[0].keys() == {"cls", "prior"}
    assert terms(config(**{"method.prior_weight": 0.0}), z, teacher, prototypes)[0].keys() == {"cls"}


def test_a_student_that_knows_nothing_has_the_loss_that_the_alarm_expects():
    z, teacher, prototypes = made()
    nothing = terms(config(), 0 * z, teacher, prototypes)[0]
    assert nothing["cls"].item() == pytest.approx(msn.parts(config()).uninformed["cls"], abs=1e-9)
    assert nothing["prior"].item() == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("normalise", [True, False])
def test_each_side_sees_its_own_views_and_the_large_one_without_some_patches(normalise):
    """The head's batch norm, too, sees each size on its own; the teacher sees the first view, with all patches."""
    steps = Steps(small("msn", **{"views.local_count": 3, "head.batch_norm": normalise}))
    c, state = steps.config, steps.state
    batch = batch_of(c, state, 0)
    large, dropped = batch.views["global"], batch.masks["global"]
    assert [len(batch.views[group]) for group in ("global", "local")] == [2, 3]
    assert dropped.shape == (2, c.run.batch, 16)
    assert dropped[0, 0].sum() == 16 - math.floor(16 * 0.85)
    assert (dropped == dropped[0, 0]).all()
    vit, kept = state.student.backbone, (~dropped[0, 0]).nonzero()[:, 0] + 1

    def without(x):
        """By timm's own parts, an image at a time."""
        x = vit._pos_embed(vit.patch_embed(x[None]))
        return vit.norm(vit.blocks(torch.cat([x[:, :1], x[:, kept]], 1)))[0, 0]

    with torch.no_grad():
        student = msn.see_student(c, state.student, batch).z["cls"]
        teacher = msn.see_teacher(c, state.teacher, batch, None).z["cls"]
        anchor = state.student.head(torch.stack([without(x) for x in large[1]]))
        focal = state.student.head(vit(torch.cat(batch.views["local"]))).unflatten(0, (3, -1))
        target = state.teacher.head(state.teacher.backbone(large[0]))
    close = {"rtol": 0, "atol": 2e-5}
    torch.testing.assert_close(student, torch.cat([anchor[None], focal]), **close)
    torch.testing.assert_close(teacher, target[None], **close)


def test_without_patches_left_out_any_encoder_will_do():
    steps = Steps(small("msn", **{"method.drop": 0.0, "backbone.name": "conv3", "backbone.options": {"width": 8}}))
    assert "global" not in batch_of(steps.config, steps.state, 0).masks
    assert math.isfinite(steps.take().loss)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"backbone.name": "resnet50"}, "method.drop: resnet50 has no patches to leave out"),
        ({"run.accumulate": 2}, "run.accumulate: must be 1: MSN's mean prediction"),
        ({"prototypes.targets": "centred"}, "prototypes.targets"),
        ({"method.prior": "power", "prototypes.kind": "memory"}, "method.prior: a power law gives"),
        ({"views.global_count": 1, "views.local_count": 0}, "views.local_count"),
    ],
)
def test_what_cannot_be_is_refused_before_training(keys, message):
    with pytest.raises(ConfigError, match=message):
        config(**keys)
