"""iBOT's two terms and two centres beside brute force in float64, and which tokens the network gives for them."""

import pytest
import torch

from made_tokens import LOCALS, D, K, Made, N
from steps import Steps, batch_of, small
from uncollapse.config.load import load_config
from uncollapse.config.schema import KINDS
from uncollapse.methods import ibot
from uncollapse.methods.contract import At

SGD = {"optim.name": "sgd", "optim.lr": 1.0, "optim.lr_batch": 16, "optim.weight_decay_end": 0.0}
START = At(0, 0.0, 0.0, 0, None)


def config(shared, **keys):
    few = {"prototypes.count": K, "head.bottleneck": D, "run.batch": N, "method.shared": shared}
    temperatures = {"teacher.temperature_start": 0.05, "method.patch_temperature_start": 0.06}
    return load_config("ibot-vits16", {**few, **temperatures, **keys})


def found_by_the_method(c, made):
    student = ibot.see_student(c, made.net, made.batch)
    teacher = ibot.see_teacher(c, made.net, made.batch, None)
    targets = ibot.assign(c, teacher, made.sets, made.memory, START)
    return ibot.objective(c, student, targets, made.sets, START), teacher


def brute(made, patch_set):
    """Equations 2 and 3, one cross-entropy at a time."""

    def cross(student, teacher, name, center, tau):
        logits = made.weights(name, "teacher") @ teacher
        target = torch.softmax((logits - made.memory[center]) / tau, 0).detach()
        return -(target * torch.log_softmax(made.weights(name, "student") @ student / 0.1, 0)).sum()

    pairs = [(v, t) for v in range(2 + LOCALS) for t in range(2) if v != t]
    cls = sum(
        cross(made.student[v, i], made.teacher[t, i], "cls", "center", 0.05) for v, t in pairs for i in range(N)
    ) / (N * len(pairs))
    patch = torch.zeros((), dtype=torch.float64)
    for crop in range(2):
        for i in range(N):
            hidden = made.mask[crop, i].nonzero()[:, 0].tolist()
            for j in hidden:
                a, b = made.student_patches[crop, i, j], made.teacher_patches[crop, i, j]
                patch = patch + cross(a, b, patch_set, "center_patch", 0.06) / len(hidden) / (2 * N)
    return {"cls": cls, "patch": patch}


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("weight", [1.0, 0.25])
def test_terms_and_gradients_are_the_papers(shared, weight):
    c, made = config(shared, **{"method.patch_weight": weight}), Made(shared)
    found, _ = found_by_the_method(c, made)
    assert list(found) == ["cls", "patch"]
    expected = brute(made, "cls" if shared else "patch")
    expected["patch"] = weight * expected["patch"]
    learned = [p for s in made.sets.values() for p in (s.student_v, s.student_g)]
    wanted = [made.student, made.student_patches, *learned]
    for name, term in expected.items():
        torch.testing.assert_close(found[name], term, rtol=1e-7, atol=0)  # a patch's weight is float32
    one = torch.autograd.grad(sum(found.values()), wanted)
    other = torch.autograd.grad(sum(expected.values()), wanted)
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-7)
    assert not one[1][~made.mask].any()


@pytest.mark.parametrize("shared", [True, False])
def test_centres_are_of_all_class_tokens_and_of_all_patches(shared):
    c, made = config(shared), Made(shared)
    _, teacher = found_by_the_method(c, made)
    was = {n: t.clone() for n, t in made.memory.items()}
    ibot.remember(c, teacher, made.sets, made.memory, START)
    tokens = {
        "center": (made.teacher, "cls"),
        "center_patch": (made.teacher_patches, "cls" if shared else "patch"),
    }
    for name, (z, of) in tokens.items():
        logits = torch.stack([made.weights(of, "teacher") @ row for row in z.reshape(-1, D)])
        torch.testing.assert_close(made.memory[name], 0.9 * was[name] + 0.1 * logits.mean(0).detach())


@pytest.mark.parametrize("shared", [True, False])
def test_a_batch_without_any_hidden_patch(shared):
    c, made = config(shared), Made(shared, hidden=False)
    found, _ = found_by_the_method(c, made)
    assert found["patch"].item() == 0
    torch.testing.assert_close(found["cls"], brute(made, "cls")["cls"], rtol=0, atol=1e-7)
    (gradient,) = torch.autograd.grad(found["patch"], made.student_patches, retain_graph=True)
    assert not gradient.any()


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_without_any_hidden_patch_leaves_the_patches_prototypes(kind):
    """They have no gradient and nothing to be observed; the class tokens' learn as ever."""
    steps = Steps(small("ibot-separate", kind, **{"method.masked_crops": 0.0, "optim.weight_decay": 0.0, **SGD}))
    start = steps.snapshot()
    done = steps.take()
    assert done.terms["patch"] == 0
    moved = {
        name: (steps.state.prototypes(name).vectors("student") - start.prototypes(name).vectors("student")).abs().max()
        for name in ("cls", "patch")
    }
    assert (moved["patch"] > 1e-6) == (kind == "koleo")
    assert (moved["cls"] > 1e-6) == (kind not in ("fixed", "capi"))  # a clustering's rate starts at 0


@pytest.mark.parametrize("method", ["ibot", "ibot-separate"])
def test_the_network_gives_the_tokens_of_one_image_at_a_time(method):
    """Ragged tokens in the order of views, images, patches; masks on the student's global views alone."""
    steps = Steps(small(method))
    c, state = steps.config, steps.state
    with torch.no_grad():
        state.student.backbone.mask_token.normal_()
    batch, mask = batch_of(c, state, 0), batch_of(c, state, 0).masks["global"]
    assert mask.any()
    assert (mask.sum(-1) == 0).any()
    for net, seen, hide in (
        (state.student.eval(), ibot.see_student(c, state.student.eval(), batch), True),
        (state.teacher.eval(), ibot.see_teacher(c, state.teacher.eval(), batch, None), False),
    ):
        views = batch.views["global"] + (batch.views["local"] if hide else [])
        cls, hidden, everything = [], [], []
        for v, view in enumerate(views):
            for i in range(c.run.batch):
                masked = mask[v, i][None] if v < 2 and hide else None
                feature, tokens = net.backbone.tokens(view[i : i + 1], masked)
                cls.append(net.head(feature)[0])
                if v < 2:
                    z = net.head(tokens[0])
                    everything.append(z)
                    hidden += [
                        (z[j], i, 1 / int(mask[v, i].sum()) / (2 * c.run.batch)) for j in mask[v, i].nonzero()[:, 0]
                    ]
        close = {"rtol": 0, "atol": 2e-5}
        torch.testing.assert_close(seen.z["cls"].flatten(0, 1), torch.stack(cls), **close)
        torch.testing.assert_close(seen.z["patch"], torch.stack([z for z, _, _ in hidden]), **close)
        assert seen.image["patch"].tolist() == [i for _, i, _ in hidden]
        torch.testing.assert_close(seen.weight["patch"], torch.tensor([w for _, _, w in hidden]))
        if not hide:
            torch.testing.assert_close(seen.mean["patch"], torch.cat(everything).mean(0), **close)
