"""CAPI beside brute force in float64, who sees which patches, and the schedules of its recipe."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from steps import Steps, batch_of, small
from uncollapse.config.load import load_config
from uncollapse.config.schema import ClusteringConfig
from uncollapse.data.masks import around_blocks
from uncollapse.errors import ConfigError
from uncollapse.methods import capi
from uncollapse.methods.contract import At, Batch, Seen
from uncollapse.models.decoder import CrossBlock, Predictor, edge, frequencies
from uncollapse.models.network import build_encoder
from uncollapse.prototypes.clustering import ClusteredPrototypes
from uncollapse.prototypes.sets import JointPrototypes
from uncollapse.targets.prior import power_law
from uncollapse.targets.sinkhorn import sinkhorn
from uncollapse.training.state import build_state

V, N, P, D, K = 2, 6, 9, 5, 7
START = At(0, 0.0, 0.0, 0, None)


def unit(*shape, seed=0):
    g = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(*shape, generator=g, dtype=torch.float64), dim=-1)


class Made:
    """Tokens of two views as a network would give them, masks, and a set."""

    def __init__(self, kind):
        self.student, self.teacher = unit(V, N, P, D).requires_grad_(), unit(V, N, P, D, seed=1)
        self.hidden, self.read = around_blocks(P, V, 0.7, 0.4, 0, 0, list(range(N)))
        g = torch.Generator().manual_seed(2)
        if kind == "capi":
            self.set = ClusteredPrototypes(K, D, ClusteringConfig(), g, own_student=True).double()
            self.set.bias.normal_(generator=g)
        else:
            self.set = JointPrototypes(K, D, True, 0.0, g).double()
            self.set.teacher_v.normal_(generator=g)
        self.batch = Batch(
            {"global": [torch.zeros(N, 3, 1, 1)] * V},
            {"global": self.hidden, "predicted": self.read},
            torch.zeros(V, N, dtype=torch.long),
        )

    def net(self, views, keys=None, hidden=None, read=None):
        if hidden is None:
            return self.teacher.flatten(0, 1)
        assert torch.equal(hidden, self.hidden)
        return self.student[read]


@pytest.mark.parametrize("kind", ["joint", "capi"])
@pytest.mark.parametrize("targets", [None, "power-law"])
def test_the_term_and_its_gradient_are_the_papers(kind, targets):
    c = load_config("capi-small32", {"prototypes.kind": kind, "prototypes.count": K, "prototypes.targets": targets})
    made = Made(kind)
    student = capi.see_student(c, made.net, made.batch)
    teacher = capi.see_teacher(c, made.net, made.batch, None)
    assigned = capi.assign(c, teacher, {"patch": made.set}, {}, START)
    terms = capi.objective(c, student, assigned, {"patch": made.set}, START)
    s = made.set
    own = s.student_v / s.student_v.norm(dim=1, keepdim=True) * s.student_g
    if kind == "capi":
        logits = made.teacher @ s.weight.T + s.bias
    else:
        logits = made.teacher @ (F.normalize(s.teacher_v, dim=1) * s.teacher_g).T
    shares = power_law(K, 0.25, logits) if targets else None
    losses = []
    for p in range(P):
        # Every view of every image at this place, balanced together, and no other place.
        balanced = sinkhorn(logits[:, :, p].flatten(0, 1) / 0.06, 3, shares).view(V, N, K)
        for v in range(V):
            for i in range(N):
                if made.read[v, i, p]:
                    log_p = torch.log_softmax(own @ made.student[v, i, p] / 0.12, 0)
                    losses.append(-(balanced[v, i] * log_p).sum())
    expected = torch.stack(losses).mean()
    assert terms.keys() == {"patch"}
    torch.testing.assert_close(terms["patch"], expected, rtol=1e-9, atol=0)
    wanted = [made.student, s.student_v, s.student_g]
    for a, b in zip(torch.autograd.grad(terms["patch"], wanted), torch.autograd.grad(expected, wanted), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


def test_rows_without_places_are_balanced_together():
    """As an evaluation has them."""
    c, made = load_config("capi-small32", {"prototypes.count": K}), Made("capi")
    z = made.teacher.flatten(0, 2)
    found = capi.assign(c, Seen({"patch": z}), {"patch": made.set}, {}, START)["patch"].dense()
    torch.testing.assert_close(found, sinkhorn((z @ made.set.weight.T + made.set.bias) / 0.06))


@pytest.fixture(scope="module")
def seen():
    """A network whose every part matters, a batch, and what student and teacher make of it."""
    c = small("capi")
    state = build_state(replace(c, backbone=replace(c.backbone, drop_path=0.0)))
    net = state.student.eval()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    batch = batch_of(c, state, 0)
    with torch.no_grad():
        return c, net, batch, capi.see_student(c, net, batch).z["patch"], capi.see_teacher(c, net, batch, None)


def changed(batch, which):
    """The same images with other pixels in the patches ``which (1, n, P)``."""
    (x,) = batch.views["global"]
    side, size = 4, 8
    pixels = which[0].view(-1, side, side).repeat_interleave(size, 1).repeat_interleave(size, 2)[:, None]
    return batch._replace(views={"global": [torch.where(pixels, 3.0, x)]})


@torch.no_grad()
def test_the_student_sees_what_is_visible_and_nothing_else(seen):
    c, net, batch, z, _ = seen
    hidden = batch.masks["global"]
    torch.testing.assert_close(capi.see_student(c, net, changed(batch, hidden)).z["patch"], z)
    assert (capi.see_student(c, net, changed(batch, ~hidden)).z["patch"] - z).norm(dim=1).min() > 1e-3


@torch.no_grad()
def test_the_teacher_sees_everything_and_rows_stand_for_the_same_patches(seen):
    c, net, batch, z, teacher = seen
    read = batch.masks["predicted"]
    assert (capi.see_teacher(c, net, changed(batch, read), None).z["patch"] - teacher.z["patch"]).abs().min() > 0
    (x,) = batch.views["global"]
    vit = net.backbone
    patches = F.normalize(vit.forward_features(x)[:, vit.num_prefix_tokens :], dim=-1)
    torch.testing.assert_close(teacher.every["patch"], patches.transpose(0, 1))
    rows = read[0].nonzero()
    assert len(rows) == len(z) == c.run.batch
    torch.testing.assert_close(teacher.z["patch"], torch.stack([patches[i, p] for i, p in rows]))
    assert teacher.image["patch"].tolist() == rows[:, 0].tolist()
    assert teacher.place["patch"].tolist() == rows[:, 1].tolist()


@torch.no_grad()
def test_a_prediction_is_of_its_image_and_its_place_alone(seen):
    c, net, batch, z, _ = seen
    one = capi.see_student(c, net, batch.part(slice(3, 4))).z["patch"]
    torch.testing.assert_close(one, z[3:4], rtol=1e-4, atol=1e-5)
    hidden, read = (batch.masks[name][0] for name in ("global", "predicted"))
    other = read.clone()
    for i in range(len(read)):  # another hidden patch of each
        other[i] = False
        other[i, (hidden[i] & ~read[i]).nonzero()[0]] = True
    moved = batch._replace(masks={"global": hidden[None], "predicted": other[None]})
    assert (capi.see_student(c, net, moved).z["patch"] - z).norm(dim=1).min() > 1e-3


@torch.no_grad()
def test_a_block_of_the_predictor_beside_one_head_at_a_time():
    torch.manual_seed(0)
    width, heads, queries, tokens = 16, 2, 3, 5
    block = CrossBlock(width, heads, 0.0).double()
    x, y = (torch.randn(1, n, width, dtype=torch.float64) for n in (queries, tokens))
    at, where = (torch.rand(1, n, 2, dtype=torch.float64) for n in (queries, tokens))
    turns = frequencies(width // heads).double()

    def normed(t, weight):
        return t / (t.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight

    def turn(t, place):
        half, angle = t.shape[-1] // 2, place @ turns
        partner = torch.cat([-t[..., half:], t[..., :half]], -1)
        return t * angle.cos() + partner * angle.sin()

    block.norm1.weight.normal_()
    out = []
    for h in range(heads):
        part = slice(h * width // heads, (h + 1) * width // heads)
        q = turn(normed(x[0], block.norm1.weight) @ block.q.weight[part].T, at[0])
        k, v = turn(y[0] @ block.k.weight[part].T, where[0]), y[0] @ block.v.weight[part].T
        out.append(torch.softmax(q @ k.T / math.sqrt(width // heads), -1) @ v)
    after = x[0] + torch.cat(out, -1) @ block.proj.weight.T
    expected = after + F.gelu(normed(after, 1.0) @ block.fc1.weight.T) @ block.fc2.weight.T
    angles = (p @ turns for p in (at, where))
    torch.testing.assert_close(block(x, y, *(a.unsqueeze(1) for a in angles))[0], expected)


@torch.no_grad()
def test_places_are_not_rounded_under_autocast():
    torch.manual_seed(0)
    predictor = Predictor(64, 2, 2)
    for parameter in predictor.parameters():
        parameter.mul_(3)
    seen, seen_at, at = torch.randn(4, 9, 64), torch.rand(4, 9, 2), torch.rand(4, 3, 2)
    exact = predictor(seen, seen_at, at)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = predictor(seen, seen_at, at)
    assert (rounded - exact).norm() < 0.03 * exact.norm()
    assert (exact[:, 0] - exact[:, 1]).norm(dim=1).min() > 0.03 * 8  # places matter more than that


def test_registers_stand_around_what_is_visible():
    assert edge(4).tolist() == [[0, 0], [1, 0], [1, 1], [0, 1]]
    assert edge(8)[:3].tolist() == [[0, 0], [0.5, 0], [1, 0]]
    assert edge(0).shape == (0, 2)
    assert 0 <= edge(5).min() <= edge(5).max() <= 1


def test_the_predictor_starts_as_the_released_code_does():
    torch.manual_seed(0)
    predictor = Predictor(64, 4, 2)
    assert predictor.mask_token.std().item() == pytest.approx(0.02, rel=0.3)
    bound = math.sqrt(6 / (64 + 256))
    for linear in (predictor.blocks[1].fc1, predictor.blocks[1].fc2):
        assert bound * 0.98 < linear.weight.abs().max() <= bound
    assert not [n for n, _ in predictor.named_parameters() if n.endswith("bias") or "frequencies" in n]


def test_the_clustering_and_the_student_leave_each_other_alone():
    """Its rate moves the layer and nothing else of this step; what it saw is the teacher's patches of before it."""
    runs = [Steps(small("capi", "capi", **{"prototypes.clustering.lr": lr})) for lr in (1e-3, 1e-2)]
    for run in runs:
        run.take()
    before = runs[1].snapshot()
    batch = batch_of(runs[1].config, runs[1].state, 1)
    with torch.no_grad():
        every = capi.see_teacher(runs[1].config, before.teacher, batch, None).every["patch"]
    by_hand = before.prototypes("patch")
    by_hand.observe(every, 1 / runs[1].total)
    by_hand.after_step()
    for run in runs:
        run.take()
    slow, fast = (run.state for run in runs)
    assert torch.equal(fast.prototypes("patch").weight, by_hand.weight)
    assert not torch.equal(slow.prototypes("patch").weight, by_hand.weight)
    # The first step is taken at the rate 0, so both had the same targets so far.
    for name, parameter in slow.student.named_parameters():
        assert torch.equal(dict(fast.student.named_parameters())[name], parameter), name
    for name in ("student_v", "student_g"):
        assert torch.equal(getattr(slow.prototypes("patch"), name), getattr(fast.prototypes("patch"), name))


def test_schedules_are_those_of_the_released_code():
    """Momentum from 1 down to .999 as the rate warms up; then 0.8 of half a cosine, there and back."""
    total, warmup = 20, 3
    steps = Steps(small("capi", **{"optim.warmup_epochs": warmup / 44, "optim.lr_batch": 16}), total)
    rates, embedding = [], []
    for step in range(6):
        before = steps.snapshot()
        steps.take()
        share = max(0.0, math.cos(0.8 * math.pi * (step - warmup) / (total - warmup)) / 2 + 0.5)
        slow = step / (warmup - 1)
        rate, momentum = (slow, 1 - 0.001 * slow) if step < warmup else (share, 1 - 0.001 * share)
        of = {name: group["lr"] for group in steps.state.optimizer.param_groups for name in [group["role"]]}
        groups = steps.state.optimizer.param_groups
        rates.append(groups[0]["lr"] == pytest.approx(1e-3 * rate, rel=1e-3, abs=1e-9))
        embedding.append([g["lr"] for g in groups if "lr_scale" in g] == pytest.approx([2e-4 * rate] * 2, rel=1e-3))
        assert of["prototypes"] == groups[0]["lr"]
        name, now = "backbone.patch_embed.proj.weight", dict(steps.state.teacher.named_parameters())
        was, ahead = dict(before.teacher.named_parameters())[name], dict(steps.state.student.named_parameters())[name]
        torch.testing.assert_close(now[name], momentum * was + (1 - momentum) * ahead, rtol=0, atol=1e-8)
    assert all(rates)
    assert all(embedding)
    assert {group["betas"] for group in steps.state.optimizer.param_groups} == {(0.9, 0.95)}


def test_published_numbers():
    """The default configuration of the released code; steps as epochs of 866 steps over ImageNet-22K."""
    c = load_config("capi-vitl14")
    p, o, t = c.prototypes, c.optim, c.teacher
    assert (c.run.batch, o.lr, o.lr_batch, o.min_lr, o.weight_decay, o.weight_decay_end) == (
        16384,
        1e-3,
        16384,
        0,
        0.1,
        0.1,
    )
    assert round(c.run.epochs * 866) == pytest.approx(500_000, rel=1e-4)
    assert round(o.warmup_epochs * 866) == pytest.approx(50_000, rel=1e-3)
    assert (o.betas, o.patch_embed_lr, c.run.schedule_span, p.clustering.schedule_span) == (
        (0.9, 0.95),
        0.2,
        1.225,
        1.225,
    )
    assert (t.momentum_start, t.momentum, t.momentum_end) == (1.0, 0.999, 1.0)
    assert (t.temperature, t.student_temperature) == (p.clustering.target_temperature, p.clustering.temperature)
    assert (p.count, p.clustering.lr, p.clustering.weight_decay) == (16384, 5e-4, 0.01)
    assert (c.method.hidden, c.method.predicted, c.method.decoder_depth, c.method.iterations) == (0.65, 0.05, 12, 3)
    assert (c.views.global_count, c.views.local_count, c.views.global_scale) == (1, 0, (0.6, 1.0))
    assert (c.views.jitter, c.views.grey, c.views.blur, c.views.solarise) == (0, 0, (0, 0, 0), (0, 0, 0))
    assert (c.head.layers, c.head.bottleneck, c.backbone.options["reg_tokens"]) == (0, 1024, 16)
    assert (c.backbone.drop_path, c.backbone.drop_path_uniform) == (0.2, True)


@pytest.mark.parametrize(
    ("recipe", "keys", "expected"),
    [
        ("capi-small32", {"views.local_count": 2}, "views.local_count: CAPI has no local views"),
        ("capi-small32", {"backbone": {"name": "resnet50"}}, "backbone.name: CAPI hides patches"),
        ("capi-small32", {"teacher.momentum_shape": "linear"}, "teacher.momentum_start: a straight line"),
        ("ibot-vits16", {"views.global_count": 1, "views.local_count": 0}, "views.local_count: a single view"),
    ],
)
def test_what_cannot_be_is_refused(recipe, keys, expected):
    with pytest.raises(ConfigError, match=expected):
        load_config(recipe, keys)


def test_swav_balances_each_of_any_number_of_global_views():
    run = Steps(small("swav", **{"views.global_count": 3}))
    assert list(run.take().targets) == ["0", "1", "2"]


def test_a_head_without_layers_has_the_length_of_the_features():
    with pytest.raises(ConfigError, match=r"head\.bottleneck: must be 128"):
        build_encoder(load_config("capi-small32", {"head.bottleneck": 64}), False)
