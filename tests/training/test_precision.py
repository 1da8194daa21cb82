"""Batches in parts and half precision: the run stays the one that was asked for."""

from dataclasses import replace

import pytest
import torch

from uncollapse.config.load import load_config
from uncollapse.config.tiny import tiny
from uncollapse.errors import ConfigError
from uncollapse.run_folder.checkpoint import load_checkpoint
from uncollapse.run_folder.log import read_rows
from uncollapse.training.run import train


def small_vit(**keys):
    """No batch norm, no stochastic depth, and an optimiser in which a rounding error stays one."""
    keys = {"data.path": "builtin:digits", "optim.name": "sgd", "optim.warmup_epochs": 0.0, "optim.lr": 0.5, **keys}
    config = tiny(load_config("dino-vits16", {"prototypes.freeze_epochs": 0.0, **keys}), keys)
    return replace(config, backbone=replace(config.backbone, drop_path=0.0))


GENTLE, HALF = {"optim.lr": 0.01}, {"run.precision": "fp16-mixed"}


def run(config, out, steps=3, **options):
    train(config, out, steps, say=lambda line: None, accelerator="cpu", **options)
    return load_checkpoint(out / "checkpoints"), [r["loss"] for r in steps_of(out)]


def steps_of(out):
    return [r for r in read_rows(out / "metrics.jsonl") if r["kind"] == "step"]


@pytest.mark.parametrize(
    "keys",
    [
        {"prototypes.kind": "koleo", "optim.clip": 3.0},
        {"prototypes.kind": "joint", "prototypes.targets": "sinkhorn"},
        {"prototypes.kind": "decoupled"},
        {"prototypes.kind": "decoupled-paper"},
    ],
)
def test_a_batch_in_parts_is_the_batch(keys, tmp_path):
    """Loss, encoder, centre, prototypes and mixture: what the parts add up to is what one batch gives."""
    whole, losses = run(small_vit(**keys), tmp_path / "whole")
    parts, losses_in_parts = run(small_vit(**keys, **{"run.accumulate": 4}), tmp_path / "parts")
    assert losses_in_parts == pytest.approx(losses, rel=1e-6, abs=1e-6)
    start = run(small_vit(**keys), tmp_path / "start", 1)[0]
    for part in ("student", "teacher", "memory"):
        for name, tensor in whole[part].items():
            torch.testing.assert_close(parts[part][name], tensor, rtol=1e-4, atol=1e-6, msg=f"{part} {name}")
    for name, tensor in whole["prototypes"]["cls"].items():
        torch.testing.assert_close(parts["prototypes"]["cls"][name], tensor, rtol=1e-4, atol=1e-5, msg=name)
    moved = max(float((whole["student"][n] - t).abs().max()) for n, t in start["student"].items())
    assert moved > 1e-3  # far above the tolerance: the steps did something


def test_a_batch_that_does_not_divide_into_parts_is_refused():
    with pytest.raises(ConfigError, match=r"run\.accumulate.*32.*3 equal parts"):
        small_vit(**{"run.batch": 32, "run.accumulate": 3})


def test_half_precision_learns_and_resumes_with_the_scale_of_its_loss(tmp_path):
    """The first steps overflow and are skipped until the scale fits; each halves it."""
    plain = run(small_vit(**GENTLE), tmp_path / "plain", 1)[1]
    half, losses = run(small_vit(**GENTLE, **HALF), tmp_path / "half", 12)
    assert losses[0] == pytest.approx(plain[0], rel=2e-2)
    assert losses[0] != plain[0]
    assert losses[-1] < 1 < losses[0]
    assert 1 < half["scaler"]["scale"] < 2.0**16
    assert all(t.dtype == torch.float32 for t in half["prototypes"]["cls"].values())
    run(small_vit(**GENTLE, **HALF), tmp_path / "parts", 5)
    again = run(small_vit(**GENTLE, **HALF), tmp_path / "parts", 12, resume=True)[0]
    assert again["scaler"] == half["scaler"]
    assert all(torch.equal(again["student"][n], t) for n, t in half["student"].items())


def test_a_later_step_whose_gradient_overflows_is_skipped(tmp_path, monkeypatch):
    from uncollapse.methods import dino

    plain, calls = dino.objective, []

    def steep(*args):
        calls.append(1)
        value = plain(*args)["cls"]
        # As large, but far steeper.
        return {"cls": value + (value - value.detach()) * (1e35 if len(calls) == 11 else 0.0)}

    usual = run(small_vit(**GENTLE, **HALF), tmp_path / "usual", 11)[0]
    monkeypatch.setattr(dino, "objective", steep)
    skipped = run(small_vit(**GENTLE, **HALF), tmp_path / "run", 11)[0]
    assert skipped["scaler"]["scale"] == usual["scaler"]["scale"] / 2
    assert all(bool(t.isfinite().all()) for t in skipped["student"].values())


def test_bf16_keeps_projections_and_prototypes_in_fp32(tmp_path):
    config = tiny(load_config("dino-vits16", {"data.path": "builtin:digits", "run.precision": "bf16-mixed"}))
    losses = {}
    for precision in ("32-true", "bf16-mixed"):
        config = replace(config, run=replace(config.run, precision=precision))
        losses[precision] = run(config, tmp_path / precision)[1]
    assert losses["bf16-mixed"] == pytest.approx(losses["32-true"], rel=2e-2)
    assert losses["bf16-mixed"] != losses["32-true"]  # it really ran in bf16
    tensors = load_checkpoint(tmp_path / "bf16-mixed" / "checkpoints")["prototypes"]["cls"].values()
    assert all(t.dtype == torch.float32 for t in tensors)
