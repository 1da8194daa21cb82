"""Groups of parameters and rates, beside the formulas in float64."""

import math

import pytest
import torch
from torch import nn

from steps import Steps, small
from uncollapse.errors import ConfigError
from uncollapse.training.optim import build_optimizer

KEYS = {"optim.name": "lars", "optim.lr": 0.3, "optim.weight_decay": 0.1, "optim.weight_decay_end": 0.1}


def roles(state):
    return {id(p): g["role"] for g in state.optimizer.param_groups for p in g["params"]}


@pytest.mark.parametrize("decay_biases", [False, True])
def test_biases_decay_only_where_the_recipe_says_so(decay_biases):
    state = Steps(small("swav", **{"optim.decay_biases": decay_biases})).state
    found = roles(state)
    for parameter in state.student.parameters():
        plain = parameter.ndim == 1 and not decay_biases
        assert found[id(parameter)] == ("plain" if plain else "decay")
    assert found[id(state.prototypes().student_v)] == "prototypes"


@pytest.mark.parametrize("decay_biases", [False, True])
def test_lars_adapts_what_decays(decay_biases):
    """SwAV's optimiser adapts the rate of every tensor to its norm, DINO's and CARP's of matrices alone."""
    c = small("swav", **KEYS, **{"optim.decay_biases": decay_biases})
    model = nn.Linear(4, 3).double()
    optimizer = build_optimizer(c, model, nn.Module())
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    for group in optimizer.param_groups:
        group["lr"], group["weight_decay"] = 0.3, 0.0 if group["role"] == "plain" else 0.1
    optimizer.step()
    for name, p in model.named_parameters():
        w, g = before[name], p.grad
        adapted = 0.001 * w.norm() / (g.norm() + 0.1 * w.norm()) * (g + 0.1 * w)
        expected = w - 0.3 * (adapted if name == "weight" or decay_biases else g)
        torch.testing.assert_close(p.detach(), expected, rtol=1e-6, atol=1e-12)


def test_the_warm_up_may_start_above_zero():
    for start in (0.0, 0.001):
        keys = {"optim.warmup_start": start, "optim.lr": 0.01, "optim.lr_batch": 64, "optim.warmup_epochs": 3 / 44}
        steps = Steps(small("dino", **keys))  # 16 images a step, 44 steps an epoch
        rates = []
        for _ in range(3):
            steps.take()
            rates.append(steps.state.optimizer.param_groups[0]["lr"])
        assert rates == pytest.approx([start / 4, (start + 0.01) / 8, 0.01 / 4])


@pytest.mark.parametrize("of", ["tensor", "encoder"])
def test_gradients_are_clipped_one_by_one_or_as_a_whole(of):
    """As a whole the prototypes are left out, as in MSN's released code."""
    c = small("dino", **{"optim.clip": 0.25, "optim.clip_of": of})
    free, clipped = Steps(small("dino")), Steps(c)
    for steps in (free, clipped):
        steps.take()

    def gradients(steps):
        return [p.grad for p in steps.state.student.parameters()], [steps.state.prototypes().student_v.grad]

    (encoder, prototypes), found = gradients(free), gradients(clipped)
    whole = torch.cat([g.flatten() for g in encoder]).norm()
    assert whole > 0.25
    for was, now in zip(encoder, found[0], strict=True):
        norm = whole if of == "encoder" else was.norm()
        torch.testing.assert_close(now, was * min(1, 0.25 / (norm.item() + 1e-6)), rtol=1e-5, atol=1e-8)
    norm = 0.0 if of == "encoder" else prototypes[0].norm().item()
    torch.testing.assert_close(found[1][0], prototypes[0] * min(1, 0.25 / (norm + 1e-6)), rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("method", ["dinov2", "dinov2-separate", "ibot-separate"])
def test_gradients_are_clipped_network_by_network(method):
    """Backbone, and each head with the prototypes behind it: the patches' own, or those that the class tokens' has."""
    free = Steps(small(method, **{"optim.clip": 0.0}))
    clipped = Steps(small(method, **{"optim.clip": 0.02, "optim.clip_of": "network"}))
    for steps in (free, clipped):
        steps.take()

    def networks(steps):
        state = steps.state
        sets = {name: [p.grad for p in s.parameters() if p.grad is not None] for name, s in state.sets.items()}
        heads = {name: [p.grad for p in head.parameters()] for name, head in state.student.heads.items()}
        backbone = [p.grad for p in state.student.backbone.parameters()]
        if method == "dinov2-separate":
            return [backbone, heads["cls"] + sets["cls"], heads["patch"] + sets["patch"]]
        return [backbone, heads["cls"] + [g for of in sets.values() for g in of]]

    for was, now in zip(networks(free), networks(clipped), strict=True):
        norm = torch.cat([g.flatten() for g in was]).norm()
        assert norm > 0.02
        for a, b in zip(was, now, strict=True):
            torch.testing.assert_close(b, a * 0.02 / norm, rtol=1e-4, atol=1e-8)


def test_rates_decay_from_the_last_block_down():
    """A backbone of two blocks: norm and heads at the full rate, then 0.5, 0.25, and 0.125 of the embeddings."""
    keys = {
        "optim.layer_decay": 0.5,
        "optim.patch_embed_lr": 0.2,
        "optim.warmup_epochs": 0.0,
    }
    state = Steps(small("dinov2", **keys)).state
    scale = {id(p): g.get("lr_scale", 1.0) for g in state.optimizer.param_groups for p in g["params"]}
    expected = {
        "heads.cls.mlp.0.weight": 1,
        "backbone.vit.norm.weight": 1,
        "backbone.vit.blocks.1.attn.qkv.weight": 0.5,
        "backbone.vit.blocks.0.norm1.bias": 0.25,
        "backbone.vit.pos_embed": 0.125,
        "backbone.vit.cls_token": 0.125,
        "backbone.mask_token": 0.125,
        "backbone.vit.patch_embed.proj.weight": 0.025,
        "backbone.vit.patch_embed.proj.bias": 0.025,
    }
    named = dict(state.student.named_parameters())
    assert {name: scale[id(named[name])] for name in expected} == expected
    assert len(scale) == len(named) + sum(p.requires_grad for p in state.sets.parameters())


def test_a_backbone_without_blocks_has_no_layer_decay():
    with pytest.raises(ConfigError, match=r"optim\.layer_decay: this backbone has no blocks"):
        Steps(small("dino", **{"optim.layer_decay": 0.9}))


def test_stochastic_depth_may_be_the_same_in_every_block():
    for uniform, expected in ((False, 2), (True, 4)):
        keys = {"backbone.drop_path": 0.3, "backbone.drop_path_uniform": uniform}
        options = {"patch_size": 8, "img_size": 32, "embed_dim": 48, "depth": 2, "num_heads": 2}
        c = small("dinov2", **keys, **{"backbone.options": options, "backbone.name": "vit_tiny_patch16_224"})
        state = Steps(c).state
        assert [d.probability for d in state.student.drops] == pytest.approx([0.3] * expected)
        assert state.teacher.drops == []


def test_schedules_may_be_planned_for_longer_than_the_run():
    """MSN's recipe: 1.25 times as long, the teacher's momentum on a straight line."""
    keys = {"run.schedule_span": 1.25, "teacher.momentum_shape": "linear", "optim.lr": 0.01, "optim.lr_batch": 16}
    steps = Steps(small("dino", **keys, **{"optim.weight_decay": 0.1, "optim.weight_decay_end": 0.5}), total=4)
    for step in range(4):
        before = steps.snapshot()
        steps.take()
        group, share = steps.state.optimizer.param_groups[0], 0.5 * (1 + math.cos(math.pi * step / 5))
        assert group["lr"] == pytest.approx(1e-5 + (0.01 - 1e-5) * share)
        assert group["weight_decay"] == pytest.approx(0.5 - 0.4 * share)
        momentum = 0.99 + 0.01 * step / 5
        name, now = next(iter(steps.state.teacher.named_parameters()))
        student, was = (net.get_parameter(name) for net in (steps.state.student, before.teacher))
        torch.testing.assert_close(now, momentum * was + (1 - momentum) * student.detach(), rtol=1e-6, atol=1e-8)
