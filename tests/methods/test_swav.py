"""SwAV's codes and loss beside brute force in float64, and what happens to its prototypes."""

import pytest
import torch
import torch.nn.functional as F

from steps import Steps, small
from uncollapse.config.load import load_config
from uncollapse.methods import swav
from uncollapse.methods.balance import balance_memory, balanced
from uncollapse.methods.contract import At, Seen
from uncollapse.prototypes.sets import JointPrototypes

N, D, K = 7, 6, 11
EARLY = At(3, 2.0, 0.1, 0, None)


def config(**keys):
    few = {"prototypes.count": K, "head.bottleneck": D, "run.batch": N, "method.queue_epoch": 0.0}
    return load_config("swav-resnet50", {**few, **keys})


def made(views, seed=0):
    """Projections ``(views, N, D)`` and a set, both float64."""
    generator = torch.Generator().manual_seed(seed)
    z = F.normalize(torch.randn(views, N, D, generator=generator, dtype=torch.float64), dim=-1)
    return z.requires_grad_(), JointPrototypes(K, D, False, 0.0, generator, followed=False, on_sphere=True).double()


def codes_of(scores, iterations):
    """Algorithm 1's ``sinkhorn``: rows of prototypes, columns of images, both made even in turn."""
    q = (scores / 0.05).exp().T
    q = q / q.sum()
    for _ in range(iterations):
        for k in range(len(q)):
            q[k] = q[k] / q[k].sum() / len(q)
        for i in range(q.shape[1]):
            q[:, i] = q[:, i] / q[:, i].sum() / q.shape[1]
    return (q * q.shape[1]).T


def brute(z, prototypes, queue=None, iterations=3):
    """Both codes, each predicted by every other view, image by image."""
    total, codes = torch.zeros((), dtype=torch.float64), []
    for s in range(2):
        rows = z[s].detach() if queue is None else torch.cat([z[s].detach(), queue[s]])
        q = codes_of(rows @ prototypes.detach().T, iterations)[:N]
        codes.append(q)
        for v in range(len(z)):
            if v == s:
                continue
            for i in range(N):
                log_p = torch.log_softmax(prototypes @ z[v, i] / 0.1, dim=0)
                total = total - (q[i] * log_p).sum() / N / (len(z) - 1) / 2
    return total, codes


@pytest.mark.parametrize("views", [2, 5])
@pytest.mark.parametrize("queued", [False, True])
@pytest.mark.parametrize("iterations", [1, 3])
def test_codes_loss_and_gradients_are_the_papers(views, queued, iterations):
    c = config(**{"method.queue": 2 * N if queued else 0, "method.iterations": iterations})
    z, prototypes = made(views)
    memory = {n: t.double() if t.is_floating_point() else t for n, t in balance_memory(c, swav.parts(c)).items()}
    for view in range(2 if queued else 0):
        memory[f"queue_{view}"].copy_(F.normalize(torch.randn_like(memory[f"queue_{view}"]), dim=-1))
        memory[f"filled_{view}"].fill_(2 * N)
    student = Seen({"cls": z})
    teacher = swav.see_teacher(c, None, None, student)
    targets = balanced(c, swav.assign(c, teacher, {"cls": prototypes}, memory, EARLY), memory, EARLY)
    found = swav.objective(c, student, targets, {"cls": prototypes}, EARLY)
    assert list(found) == ["cls"]
    gradients = torch.autograd.grad(found["cls"], [z, prototypes.student_v])

    queue = [memory[f"queue_{view}"] for view in range(2)] if queued else None
    expected, codes = brute(z, prototypes.student_v, queue, iterations)
    wanted = torch.autograd.grad(expected, [z, prototypes.student_v])
    torch.testing.assert_close(found["cls"], expected, rtol=0, atol=1e-7)
    for view, code in enumerate(codes):
        torch.testing.assert_close(targets[str(view)].dense()[0], code, rtol=0, atol=1e-7)
    for one, other in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-7)


def test_a_view_is_balanced_on_its_own_and_never_predicts_itself():
    """Another second view changes neither the first one's codes nor what its own projections are pulled to by them."""
    c = config()
    z, prototypes = made(3)
    other = z.detach().clone()
    other[1] = made(3, seed=1)[0][1].detach()
    sets = {"cls": prototypes}
    one, two = (swav.assign(c, Seen({"cls": x[:2].detach()}), sets, {}, EARLY) for x in (z, other))
    assert torch.equal(one["0"].dense(), two["0"].dense())
    assert not torch.equal(one["1"].dense(), two["1"].dense())
    loss = swav.objective(c, Seen({"cls": z}), {"0": one["0"]}, sets, EARLY)["cls"]
    (gradient,) = torch.autograd.grad(loss, z)
    assert not gradient[0].any()
    assert (gradient[1:].abs().amax(-1) > 0).all()


def test_prototypes_stay_at_first_then_move_on_the_sphere():
    steps = Steps(small("swav", **{"prototypes.freeze_epochs": 2 / 44}))  # the helper's epochs are of 44 steps
    vectors = [steps.state.prototypes().student_v.detach().clone()]
    for _ in range(3):
        steps.take()
        vectors.append(steps.state.prototypes().student_v.detach().clone())
    torch.testing.assert_close(vectors[2], vectors[0], rtol=0, atol=1e-6)
    assert (vectors[3] - vectors[2]).abs().max() > 1e-4
    torch.testing.assert_close(vectors[3].norm(dim=1), torch.ones(64), rtol=0, atol=1e-6)
