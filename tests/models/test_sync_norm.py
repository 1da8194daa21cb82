"""Batch norm over ranks against one batch norm that sees the whole batch.

Tolerances: 1e-9 in float64, where only the order of sums differs; stated where float32 is used.
"""

import copy
import multiprocessing

import pytest
import torch
from timm.layers import BatchNormAct2d
from torch import nn

from ranks import on_ranks
from uncollapse.models.sync_norm import SyncedNorm, convert

multiprocessing.set_forkserver_preload(["timm.layers", "uncollapse.models.sync_norm", "ranks"])
SHAPES = {2: [5, 3], 4: [4, 1, 0, 3]}  # rows per rank; a rank may have none


def models():
    torch.manual_seed(0)
    plain = [
        nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Flatten(), nn.Linear(24, 5), nn.BatchNorm1d(5)),
        nn.Sequential(nn.Conv2d(3, 6, 3), BatchNormAct2d(6, act_layer=nn.PReLU, inplace=False), nn.Flatten()),
        nn.Sequential(nn.BatchNorm2d(3, affine=False, momentum=None), nn.Flatten()),
        nn.Sequential(nn.BatchNorm2d(3, track_running_stats=False, eps=1e-3), nn.Flatten()),
    ]
    for model in plain:
        for parameter in model.parameters():
            nn.init.normal_(parameter, 1.0, 0.5)
    return [m.double() for m in plain]


def images(n):
    return 3 + torch.randn(n, 3, 4, 4, generator=torch.Generator().manual_seed(1)).double()


def pull(x):
    """A loss that is a sum over rows, with a gradient of another kind in every entry."""
    return (x * torch.linspace(-1, 2, x.shape[1]).double() + x.pow(3) / 3).sum()


def two_steps(model, x):
    """Output, input gradient and parameter gradients of the second of two steps; then the buffers and eval mode."""
    with torch.no_grad():
        model(x.flip(1))
    x = x.clone().requires_grad_()
    out = model(x)
    pull(out).backward()
    grads = [p.grad for p in model.parameters()]
    seen = dict(model.state_dict())
    return [out.detach(), x.grad], grads, seen, model.eval()(x.detach()).detach()


def on_rank(group, counts):
    rank = torch.distributed.get_rank()
    part = slice(sum(counts[:rank]), sum(counts[: rank + 1]))
    return [two_steps(convert(model, group), images(sum(counts))[part]) for model in models()]


@pytest.mark.parametrize("size", [2, 4])
def test_equals_batch_norm_over_the_concatenated_batch(size, tmp_path):
    counts = SHAPES[size]
    ranks = on_ranks(on_rank, size, tmp_path, counts)
    tolerance = {"rtol": 1e-9, "atol": 1e-9}
    for i, model in enumerate(models()):
        rows, grads, seen, evaluated = two_steps(model, images(sum(counts)))
        for j, expected in enumerate(rows):
            torch.testing.assert_close(torch.cat([r[i][0][j] for r in ranks]), expected, **tolerance)
        for j, expected in enumerate(grads):
            torch.testing.assert_close(sum(r[i][1][j] for r in ranks), expected, **tolerance)
        for r in ranks:
            assert list(r[i][2]) == list(seen)
            for name, expected in seen.items():
                torch.testing.assert_close(r[i][2][name], expected, **tolerance)
        if model[0].__class__ is not nn.BatchNorm2d or model[0].track_running_stats:
            torch.testing.assert_close(torch.cat([r[i][3] for r in ranks]), evaluated, **tolerance)


def large_mean(group):
    rank = torch.distributed.get_rank()
    norm = convert(nn.BatchNorm1d(4), group)
    x = 1000 + torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        half = norm(x[32 * rank :][:32].bfloat16())
    norm.running_var.zero_()
    out = norm(x[32 * rank :][:32])
    try:
        convert(nn.BatchNorm1d(4), group)(torch.ones(1 - rank, 4))
        message = ""
    except ValueError as error:
        message = str(error)
    return out.detach(), norm.running_var, str(half.dtype), message


class Own(nn.BatchNorm1d):
    pass


def kept(group):
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    before, names = model[1].weight, list(model.state_dict())
    convert(model)
    assert model[1].weight is before
    assert list(model.state_dict()) == names
    assert isinstance(copy.deepcopy(model[1]), SyncedNorm)
    assert isinstance(convert(nn.BatchNorm1d(4), group), SyncedNorm)
    with pytest.raises(TypeError, match="Own has a forward pass"):
        convert(nn.Sequential(Own(3)), group)
    return large_mean(group)


def test_what_is_kept_and_what_float32_survives(tmp_path):
    ranks = on_ranks(kept, 2, tmp_path)
    x = 1000 + torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
    wide = x.double()
    expected = (wide - wide.mean(0)) / (wide.var(0, correction=0) + 1e-5).sqrt()
    # 2e-3: float32 holds 1000 to 3e-5, and the mean comes off after scaling, as in torch.
    torch.testing.assert_close(torch.cat([r[0] for r in ranks]).double(), expected, rtol=0, atol=2e-3)
    torch.testing.assert_close(ranks[0][1].double(), 0.1 * wide.var(0), rtol=1e-4, atol=0)
    assert ranks[0][2] == "torch.bfloat16"
    assert all("more than one value per channel" in r[3] for r in ranks)


def test_one_process_keeps_its_own_norms():
    model = nn.Sequential(nn.BatchNorm1d(4))
    assert convert(model) is model
    assert type(model[0]) is nn.BatchNorm1d
