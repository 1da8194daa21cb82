"""The mathematics where users meet its edges: half precision, common offsets, second derivatives, odd shapes, ranks."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ranks import on_ranks
from uncollapse.distributed import gather_rows
from uncollapse.losses.carp import fused_carp_loss, random_blocks
from uncollapse.losses.koleo import koleo_proto, nearest_neighbours
from uncollapse.losses.logits import fused_dino_loss_on_logits
from uncollapse.losses.mean_entropy import me_max
from uncollapse.losses.pairs import dino_loss, fused_dino_loss
from uncollapse.models.sync_norm import SyncedNorm, convert
from uncollapse.prototypes.mixture import OnlineMixture
from uncollapse.targets.softmax import SoftmaxTargets

RNG = torch.Generator().manual_seed(0)


def normal(*shape, **options):
    return torch.randn(*shape, generator=RNG, **options)


@pytest.mark.parametrize("offset", [0.0, 1e3, 1e4])
@pytest.mark.parametrize("views", [1, 3])
def test_a_part_that_all_logits_share_costs_no_digits_of_the_gradient(offset, views):
    """As a mixture's scores have it: -|x|²/2σ² for every component, ten thousand where the variance is small."""
    column = torch.full((1,), offset**0.5)
    w = torch.cat([0.1 * normal(3000, 16), column.expand(3000, 1)], 1)
    z = [torch.cat([normal(8, 16), column.expand(8, 1)], 1).requires_grad_() for _ in range(views)]
    z_teacher = torch.cat([normal(2 if views > 1 else 1, 8, 16), column.expand(2 if views > 1 else 1, 8, 1)], 2)
    weights = torch.ones(views, len(z_teacher)) - torch.eye(views, len(z_teacher)) * (views > 1)

    def expected():
        wide = [x.detach().double().requires_grad_() for x in z]
        t = torch.softmax(z_teacher.double() @ w.double().T, -1)
        cross = -torch.stack(
            [torch.stack([(q * F.log_softmax(x @ w.double().T, -1)).sum(-1).mean() for q in t]) for x in wide]
        )
        loss = (cross * weights).sum() / weights.sum()
        return loss, torch.autograd.grad(loss, wide)

    if views == 1:
        from uncollapse.losses.cross_entropy import fused_cross_entropy

        rows = torch.full((8,), 1 / 8)
        loss = fused_cross_entropy(z[0][None], w, SoftmaxTargets(z_teacher, w, 1.0), 1.0, torch.ones(1, 1), rows)
    else:
        loss = fused_dino_loss(z, w, SoftmaxTargets(z_teacher, w, 1.0), 1.0)
    grads = torch.autograd.grad(loss, z)
    wanted, wanted_grads = expected()
    assert float(loss.detach()) == pytest.approx(float(wanted.detach()), abs=1e-6 + 1e-7 * offset)
    for found, grad in zip(grads, wanted_grads, strict=True):
        # The column of the offset has nothing but rounding in its gradient.
        error = (found - grad)[:, :-1].norm() / grad[:, :-1].norm()
        assert error < 1e-5 + 1e-6 * offset


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_logits_are_summed_in_float32(dtype):
    logits = [(normal(6, 4096) / 0.1).to(dtype).requires_grad_() for _ in range(3)]
    targets = [torch.softmax(normal(6, 4096), -1) for _ in range(2)]
    loss = fused_dino_loss_on_logits(logits, targets)
    plain = dino_loss([x.double() for x in logits], [t.double() for t in targets])
    assert float(loss) == pytest.approx(float(plain), rel=1e-6)
    grads = torch.autograd.grad(loss, logits)
    wanted = torch.autograd.grad(plain, logits)
    for found, grad in zip(grads, wanted, strict=True):
        assert found.dtype == dtype
        torch.testing.assert_close(found, grad, rtol=1e-2, atol=1e-6)


def test_a_gradient_scaler_s_factor_does_not_overflow_koleo():
    w = F.normalize(normal(512, 64), dim=-1).half().requires_grad_()
    (koleo_proto(w) * 65536).backward()
    wide = w.detach().float().requires_grad_()
    (koleo_proto(wide) * 65536).backward()
    torch.testing.assert_close(w.grad.float(), wide.grad, rtol=2e-3, atol=1e-3)


def losses():
    z = [normal(4, 8) for _ in range(3)]
    targets = torch.stack([normal(4, 8) for _ in range(2)])
    w = normal(12, 8).requires_grad_()
    soft = SoftmaxTargets(targets, normal(12, 8), 1.0)
    blocks = random_blocks(12, 4, 0, 0)
    return {
        "koleo": (w, lambda: koleo_proto(w)),
        "dino": (w, lambda: fused_dino_loss(z, w, soft, 0.1)),
        "logits": (w, lambda: fused_dino_loss_on_logits([x @ w.T for x in z], [torch.softmax(normal(4, 12), -1)] * 2)),
        "carp": (w, lambda: fused_carp_loss(z, w, soft, blocks)),
        "me_max": (w, lambda: me_max(z[0], w, 0.5)),
    }


@pytest.mark.parametrize("name", losses())
def test_a_second_derivative_is_refused_and_not_wrong(name):
    w, loss = losses()[name]
    with pytest.raises(RuntimeError, match="cannot be differentiated a second time"):
        torch.autograd.grad(loss() + w.pow(3).sum(), w, create_graph=True)


@pytest.mark.parametrize("pair", [(torch.half, torch.float), (torch.float, torch.half), (torch.float, torch.double)])
def test_me_max_takes_any_two_float_types(pair):
    z, w = normal(5, 4).to(pair[0]).requires_grad_(), normal(7, 4).to(pair[1]).requires_grad_()
    value = me_max(z, w, 0.5)
    wanted = me_max(z.detach().double(), w.detach().double(), 0.5)
    assert float(value.detach()) == pytest.approx(float(wanted), abs=1e-5)
    value.backward()
    assert (z.grad.dtype, w.grad.dtype) == pair


@pytest.mark.parametrize("seed", range(20))
def test_neighbours_that_tie_do_not_depend_on_the_block(seed):
    g = torch.Generator().manual_seed(seed)
    w = torch.randn(6, 5, generator=g, dtype=torch.double)
    w[2], w[3] = w[1] * (1 + float(torch.rand(1, generator=g))), w[1] * 3.3
    whole = nearest_neighbours(w)
    assert whole[1:4].tolist() == [2, 1, 1]
    for block in (1, 2, 4, 8):
        assert torch.equal(nearest_neighbours(w, block), whole)


def test_koleo_inside_a_compiled_step():
    w = normal(40, 6).requires_grad_()
    value = torch.compile(koleo_proto, backend="eager")(w)
    assert float(value.detach()) == pytest.approx(float(koleo_proto(w).detach()))


def test_shapes_that_do_not_fit_are_named():
    z, w = [normal(8, 4) for _ in range(2)], normal(9, 4)
    good = torch.softmax(normal(8, 9), -1)
    with pytest.raises(ValueError, match=r"one is \(16, 9\)"):
        fused_dino_loss(z, w, [good, torch.softmax(normal(16, 9), -1)], 0.1)
    with pytest.raises(ValueError, match="5 dimensions, their prototypes 4"):
        fused_dino_loss(z, w, SoftmaxTargets(normal(2, 8, 5), w, 1.0), 0.1)
    with pytest.raises(ValueError, match=r"bias is \(3,\), not \(9,\)"):
        fused_dino_loss(z, w, [good, good], 0.1, normal(3))
    with pytest.raises(ValueError, match=r"of one shape: .*\(8, 1\)"):
        fused_dino_loss_on_logits([x @ w.T for x in z], [good, torch.ones(8, 1)])


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"balance": "Sinkhorn"}, "balance must be one of none, sinkhorn, got 'Sinkhorn'"),
        ({"covariance": "full"}, "covariance must be one of shared, isotropic, diagonal, got 'full'"),
        ({"temperature": 0.0}, "above 0: temperature = 0.0"),
        ({"rows": 0}, "above 0: rows = 0"),
        ({"memory_steps": 0}, "above 0: memory_steps = 0"),
    ],
)
def test_a_mixture_s_options_are_checked(options, says):
    with pytest.raises(ValueError, match=says):
        OnlineMixture(**{"components": 9, "dim": 4, "rows": 8, **options})


def test_rows_that_count_nothing_leave_a_shared_variance_alone():
    m = OnlineMixture(9, 4, 8, covariance="shared")
    before = m.variance.clone()
    m.observe(torch.eye(4), torch.zeros(4))
    assert torch.equal(m.variance, before)
    m.observe(torch.eye(4))
    assert bool(torch.isfinite(m.mean).all())
    assert bool(torch.isfinite(m.variance).all())


def test_a_mixture_goes_in_and_out_of_inference_mode():
    x = F.normalize(normal(8, 4), dim=-1)
    m, other = OnlineMixture(9, 4, 8, generator=torch.Generator().manual_seed(0)), None
    other = copy.deepcopy(m)
    with torch.inference_mode():
        m.observe(x)
    m.observe(x)
    with torch.inference_mode():
        m.observe(x)
    for _ in range(3):
        other.observe(x)
    assert torch.equal(m.mean, other.mean)


def uneven(group):
    rank = torch.distributed.get_rank()
    try:
        gather_rows(normal(6 + 3 * rank, 4), group)
    except ValueError as error:
        said = str(error)
    shared = nn.BatchNorm1d(4)
    model = nn.ModuleDict({"a": shared, "b": shared, "c": nn.Sequential(shared)})
    model = convert(model, group)
    same = isinstance(model["a"], SyncedNorm) and model["a"] is model["b"] is model["c"][0]
    return said, same


def test_on_ranks_uneven_batches_and_shared_norms(tmp_path):
    for said, same in on_ranks(uneven, 2, tmp_path):
        assert "between 6 and 9 rows" in said
        assert same
