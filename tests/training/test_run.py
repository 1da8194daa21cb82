"""Training through the command line on real digits: resume, bad input, failures that must lose nothing."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from uncollapse.cli.main import main
from uncollapse.config.facts import arm_keys
from uncollapse.config.load import build_config, load_config
from uncollapse.config.schema import ARMS
from uncollapse.config.tiny import tiny
from uncollapse.errors import TrainingError
from uncollapse.run_folder.checkpoint import load_checkpoint
from uncollapse.run_folder.log import read_rows
from uncollapse.training.optim import clip_each
from uncollapse.training.run import train
from uncollapse.training.state import assert_separate, build_state


def tiny_demo(arm="joint", **overrides):
    return tiny(load_config("demo", {**arm_keys(arm), **overrides}))


def run(config, out, **options):
    return train(config, out, say=lambda line: None, accelerator="cpu", **options)


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return a == b


def learned(folder):
    state = load_checkpoint(Path(folder) / "checkpoints")
    return {k: state[k] for k in ("step", "student", "teacher", "prototypes", "memory", "optimizer", "monitor")}


@pytest.mark.parametrize("arm", ARMS)
def test_resume_reaches_the_same_bits(arm, tmp_path):
    config = tiny_demo(arm)
    run(config, tmp_path / "whole", max_steps=11)
    run(config, tmp_path / "parts", max_steps=4)
    run(config, tmp_path / "parts", max_steps=11, resume=True)
    assert same(learned(tmp_path / "whole"), learned(tmp_path / "parts"))
    whole, parts = (
        [{k: v for k, v in r.items() if k != "time"} for r in read_rows(tmp_path / n / "metrics.jsonl")]
        for n in ("whole", "parts")
    )
    assert [r for r in whole if r["kind"] == "step"] == [r for r in parts if r["kind"] == "step"]


@pytest.mark.slow
def test_kill_9_at_any_moment_then_resume_reaches_the_same_bits(tmp_path):
    config = tiny_demo()
    run(config, tmp_path / "whole", max_steps=40)
    command = [sys.executable, "-m", "uncollapse", "train", "demo", "--tiny", "--device", "cpu"]
    out = tmp_path / "killed"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([*command, "--out", out], env=environment, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not list((out / "checkpoints").glob("step-*[1-9].json")):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert learned(out)["step"] < 40, "the run was too fast to be killed midway"
    command = [sys.executable, "-m", "uncollapse", "train", "--resume", out, "--max-steps", "40", "--device", "cpu"]
    subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)
    assert same(learned(tmp_path / "whole"), learned(out))
    steps = [r["step"] for r in read_rows(out / "metrics.jsonl") if r["kind"] == "step"]
    assert steps == list(range(1, 41))


def test_arms_share_their_start_and_their_batches(tmp_path):
    states = [build_state(tiny_demo(arm)) for arm in ARMS]
    first = states[0].student.state_dict()
    assert all(same(first, s.student.state_dict()) for s in states)
    other = build_state(tiny_demo(seed=1)).student.state_dict()
    assert not same(first, other)


def test_decoupled_prototypes_are_out_of_every_optimisers_reach(tmp_path):
    for kind in ("decoupled", "decoupled-paper", "fixed"):
        state = build_state(tiny_demo(kind))
        ours = {p.data_ptr() for p in state.student.parameters()}
        assert {p.data_ptr() for g in state.optimizer.param_groups for p in g["params"]} == ours
        assert not [p for p in state.sets.parameters() if p.requires_grad]


def test_what_moves_and_what_does_not(tmp_path):
    for kind in ARMS:
        config = tiny_demo(kind)
        before = build_state(config).prototypes().vectors("student")
        run(config, tmp_path / kind, max_steps=3)
        state = build_state(config)
        state.prototypes().load_state_dict(learned(tmp_path / kind)["prototypes"]["cls"])
        moved = float((state.prototypes().vectors("student") - before).abs().max())
        assert (moved == 0) == (kind == "fixed"), (kind, moved)


def test_frozen_prototypes_stay_during_the_first_epochs(tmp_path):
    config = tiny_demo(**{"prototypes.freeze_epochs": 1.0})
    start = build_state(config).prototypes().state_dict()["student_v"]
    run(config, tmp_path / "a", max_steps=3)
    assert torch.equal(learned(tmp_path / "a")["prototypes"]["cls"]["student_v"], start)
    run(config, tmp_path / "b", max_steps=46)
    assert not torch.equal(learned(tmp_path / "b")["prototypes"]["cls"]["student_v"], start)


def test_teacher_that_is_the_student_is_refused():
    state = build_state(tiny_demo())
    with pytest.raises(RuntimeError, match="shares its storage"):
        assert_separate(state.student, state.student)


def test_clipping_is_per_tensor():
    a, b = torch.nn.Parameter(torch.ones(4)), torch.nn.Parameter(torch.ones(4))
    a.grad, b.grad = torch.full((4,), 10.0), torch.full((4,), 0.1)
    clip_each([a, b], 3.0)
    assert float(a.grad.norm()) == pytest.approx(3.0, rel=1e-4)
    assert torch.equal(b.grad, torch.full((4,), 0.1))


def test_ctrl_c_ends_after_a_whole_step_and_resume_reaches_the_same_bits(tmp_path):
    config = tiny_demo()
    run(config, tmp_path / "whole", max_steps=8)

    def interrupt(done, total, loss):
        if done == 3:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        run(config, tmp_path / "parts", max_steps=8, progress=interrupt)
    assert learned(tmp_path / "parts")["step"] == 4
    run(config, tmp_path / "parts", max_steps=8, resume=True)
    assert same(learned(tmp_path / "whole"), learned(tmp_path / "parts"))


def test_resuming_a_finished_run_changes_nothing(tmp_path):
    first = run(tiny_demo(), tmp_path / "run", max_steps=4)
    before = learned(tmp_path / "run")
    again = run(tiny_demo(), tmp_path / "run", max_steps=2, resume=True)
    timing = ("seconds_per_step", "step_parts", "diagnosis_share")
    assert {k: v for k, v in again.items() if k not in timing} == {k: v for k, v in first.items() if k not in timing}
    assert same(before, learned(tmp_path / "run"))


def test_gone_bad_weights_are_never_saved_over_good_ones(tmp_path, monkeypatch):
    import uncollapse.training.step as step

    plain = step.update_teacher

    def poison(teacher, student, momentum):
        plain(teacher, student, momentum)
        calls.append(1)
        if len(calls) == 6:
            next(student.parameters()).data[0] = float("nan")

    calls: list[int] = []
    monkeypatch.setattr(step, "update_teacher", poison)
    config = tiny_demo(**{"log.checkpoint_steps": 2})
    with pytest.raises(TrainingError, match="NaN or infinite by step 6"):
        run(config, tmp_path / "run", max_steps=12)
    assert learned(tmp_path / "run")["step"] == 4


def test_full_disk_loses_nothing(tmp_path, monkeypatch):
    """No checkpoint can be written to the run's own folder: training ends, and its state is put elsewhere."""
    import uncollapse.training.loop as loop

    save, spare = loop.save_checkpoint, tmp_path / "spare"
    spare.mkdir()

    def full(folder, step, *rest):
        return save(folder, step, *rest) if spare in folder.parents or step == 0 else False

    monkeypatch.setattr(loop, "save_checkpoint", full)
    monkeypatch.setattr(loop.tempfile, "tempdir", str(spare))
    with pytest.raises(TrainingError, match="could not be written") as error:
        run(tiny_demo(), tmp_path / "full", max_steps=7)
    monkeypatch.undo()
    rescued = Path(str(error.value).split()[-1])
    run(tiny_demo(), tmp_path / "whole", max_steps=7)
    assert same(learned(rescued), learned(tmp_path / "whole"))
    assert run(load_config(rescued / "config.yaml"), rescued, max_steps=7, resume=True)["steps"] == 7


def test_a_nan_stops_the_run_and_keeps_the_last_good_weights(tmp_path, monkeypatch):
    from uncollapse.methods import dino

    plain, calls = dino.objective, []

    def poisoned(*args):
        calls.append(1)
        return {"cls": plain(*args)["cls"] * (float("nan") if len(calls) == 4 else 1.0)}

    monkeypatch.setattr(dino, "objective", poisoned)
    config = tiny_demo(**{"log.checkpoint_steps": 0})
    with pytest.raises(TrainingError, match="NaN or infinite at step 3") as error:
        run(config, tmp_path / "bad", max_steps=8)
    assert "optim.lr" in str(error.value)
    monkeypatch.undo()
    run(config, tmp_path / "good", max_steps=3)
    kept, expected = learned(tmp_path / "bad"), learned(tmp_path / "good")
    assert kept["step"] == 3
    assert same(kept["optimizer"]["state"], expected["optimizer"]["state"])
    assert same(dict(kept["prototypes"]), dict(expected["prototypes"]))
    assert [r["step"] for r in read_rows(tmp_path / "bad" / "metrics.jsonl") if r["kind"] == "step"] == [1, 2, 3]


def test_a_loss_that_stays_at_ln_k_is_explained(tmp_path):
    lines = []
    config = tiny_demo(**{"optim.lr": 1e-12, "optim.min_lr": 0.0, "teacher.student_temperature": 100.0})
    config = replace(config, run=replace(config.run, epochs=5.0))
    train(config, tmp_path / "run", 210, say=lines.append, accelerator="cpu")
    assert any("stayed at 4.159" in line for line in lines)
    assert any(r["kind"] == "warning" for r in read_rows(tmp_path / "run" / "metrics.jsonl"))


def test_mostly_dead_components_are_pointed_out(tmp_path):
    lines = []
    config = tiny_demo("joint", **{"log.alive_window": 40})
    config = replace(config, prototypes=replace(config.prototypes, count=2048))  # 40 × 64 rows could use them all
    train(config, tmp_path / "run", 40, say=lines.append, accelerator="cpu")
    assert any("were any image's nearest" in line for line in lines)


def test_summary_is_what_the_readme_promises(tmp_path):
    summary = run(tiny_demo("koleo"), tmp_path / "run", max_steps=5)
    written = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert written == json.loads(json.dumps(summary))
    assert set(written["unique"]) == {"0.025", "0.1", "0.25", "0.5"} == set(written["effective"])
    assert written["used"] <= written["prototypes"] == 64
    assert 1 <= written["effective"]["0.025"] <= written["used"]
    assert written["n_held_out"] == 359
    assert 0 <= written["knn"] <= 1
    assert 0 <= written["linear"] <= 1
    assert sum(written["step_parts"].values()) == pytest.approx(written["seconds_per_step"])
    rows = read_rows(tmp_path / "run" / "metrics.jsonl")
    assert {r["kind"] for r in rows} >= {"step", "sweep"}


# --- the command line --------------------------------------------------------------------------------------


def call(capsys, *argv):
    with pytest.raises(SystemExit) as stop:
        main([str(a) for a in argv])
    return stop.value.code, capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["train"], "name a recipe"),
        (["train", "demo", "--run.batch", "0"], "run.batch"),
        (["train", "demo", "--run.bach", "8"], "did you mean 'batch'"),
        (["train", "demo", "--run.batch"], "needs a value"),
        (["train", "demo", "extra", "--out", "x"], "unexpected argument 'extra'"),
        (["train", "dino-small32"], "--data"),
        (["train", "dino-small32", "--data", "/no/such/place"], "/no/such/place"),
        (["train", "demo", "--max-steps", "0"], "--max-steps"),
        (["train", "--resume", "/no/such/run"], "no config.yaml"),
        (["train", "demo", "--tiny", "--run.batch", "5000", "--data", "builtin:digits"], ""),
        (["demo", "--seeds", "0"], "--seeds"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(argv, expected, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if not expected:
        argv = ["train", "demo", "--run.batch", "5000", "--optim.min_lr", "0.0"]
        expected = "needs as many training images"
    code, err = call(capsys, *argv)
    assert code == 2
    assert expected in err
    assert err.count("\n") == 1


def test_a_second_run_never_overwrites_the_first(tmp_path, capsys):
    run(tiny_demo(), tmp_path / "run", max_steps=2)
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    code, err = call(capsys, "train", "demo", "--tiny", "--out", tmp_path / "run")
    assert code == 2
    assert "already holds a run" in err
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before


def test_resume_takes_nothing_but_the_folder(tmp_path, capsys):
    run(tiny_demo(), tmp_path / "run", max_steps=2)
    code, err = call(capsys, "train", "--resume", tmp_path / "run", "--optim.lr", "1")
    assert code == 2
    assert "optim.lr" in err
    main(["train", "--resume", str(tmp_path / "run"), "--max-steps", "4"])
    assert learned(tmp_path / "run")["step"] == 4
    assert (tmp_path / "run" / "report.html").stat().st_size > 10_000
    assert list((tmp_path / "run" / "tensorboard").iterdir())


def test_a_folder_of_odd_and_broken_images_trains(tmp_path, capsys):
    rng = np.random.default_rng(0)
    for i in range(60):
        folder = tmp_path / "images" / f"class{i % 3}"
        folder.mkdir(parents=True, exist_ok=True)
        mode = ["RGB", "L", "RGBA", "P", "CMYK", "1"][i % 6]
        pixels = rng.integers(0, 256, (20 + i % 5, 24, 3), dtype=np.uint8)
        Image.fromarray(pixels).convert(mode).save(folder / f"{i}.{'jpg' if mode == 'CMYK' else 'png'}")
    Image.fromarray(rng.integers(0, 2**16, (20, 20)).astype(np.uint16)).save(tmp_path / "images/class0/deep.png")
    (tmp_path / "images" / "class1" / "broken.png").write_bytes(b"not an image")
    argv = ["train", "dino-small32", "--tiny", "--data", str(tmp_path / "images"), "--out", str(tmp_path / "run")]
    main([*argv, "--run.batch", "16", "--max-steps", "3", "--data.max_bad", "0.1", "--device", "cpu"])
    assert "broken.png" in (tmp_path / "run" / "bad_images.txt").read_text()
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["knn"] is not None


def test_images_read_by_workers_give_the_same_run_as_images_in_memory(tmp_path):
    rng = np.random.default_rng(0)
    for i in range(40):
        folder = tmp_path / "images" / f"class{i % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        smooth = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)).resize((40, 36))
        smooth.save(folder / f"{i}.png")
    losses = []
    for memory in (1.0, 0.0):
        content = {"data": {"path": str(tmp_path / "images"), "memory_gb": memory}, "run": {"batch": 16}}
        config = build_config(
            {**content, "backbone": {"name": "conv3", "drop_path": 0.0}, "head": {"batch_norm": True}}
        )
        run(tiny(config), tmp_path / str(memory), max_steps=2)
        losses.append([r["loss"] for r in read_rows(tmp_path / str(memory) / "metrics.jsonl") if r["kind"] == "step"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-2)


@pytest.mark.slow
def test_two_ranks_equal_one(tmp_path):
    """torchrun with two CPU processes, each with its half in two parts: the same views, prototypes and weights as one
    process with the batch in one."""
    from uncollapse.config.load import dump_config

    config = tiny(load_config("dino-vits16", {"data.path": "builtin:digits", "prototypes.kind": "decoupled"}))
    config = replace(config, backbone=replace(config.backbone, drop_path=0.0))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(dump_config(config))
    run(config, tmp_path / "one", max_steps=3)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    arguments = ["train", recipe, "--max-steps", "3", "--device", "cpu", "--out", tmp_path / "two"]
    arguments += ["--run.accumulate", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([*command, "-m", "uncollapse", *arguments], env=environment, check=True, stdout=subprocess.DEVNULL)
    one, two = learned(tmp_path / "one"), learned(tmp_path / "two")
    for part in ("student", "teacher", "prototypes"):
        for name, value in one[part].items():
            tensors = value.items() if isinstance(value, dict) else [(name, value)]
            other = two[part][name]
            for key, tensor in tensors:
                expected = other[key] if isinstance(other, dict) else other
                torch.testing.assert_close(tensor, expected, rtol=1e-4, atol=1e-5, msg=f"{part} {key}")


def test_report_and_recipe_commands(tmp_path, capsys):
    for kind in ("joint", "fixed"):
        run(tiny_demo(kind), tmp_path / kind, max_steps=2)
    main(["report", str(tmp_path / "joint"), str(tmp_path / "fixed"), "--out", str(tmp_path / "both.html")])
    page = (tmp_path / "both.html").read_text()
    assert "joint" in page
    assert "fixed" in page
    code, err = call(capsys, "report", tmp_path / "joint", tmp_path / "nothing", "--out", tmp_path / "one.html")
    assert code == 2
    assert "nothing" in err
    assert (tmp_path / "one.html").is_file(), "one bad folder does not cost the others"
    capsys.readouterr()
    main(["recipe", "dino-vits16", "--optim.lr", "1e-3"])
    shown = tmp_path / "shown.yaml"
    shown.write_text(capsys.readouterr().out)
    assert load_config(shown) == load_config("dino-vits16", {"optim.lr": 1e-3})


def test_a_long_run_begins_without_drawing_up_the_order_of_all_its_epochs(tmp_path, monkeypatch):
    """A recipe of 800 epochs of a million images has a billion places in its plan."""
    import uncollapse.training.loop as loop

    plain, drawn, after_first = loop.epoch_order, [], []

    def counted(seed, epoch, images):
        drawn.append(epoch)
        return plain(seed, epoch, images)

    monkeypatch.setattr(loop, "epoch_order", counted)
    config = tiny_demo(**{"run.batch": 512, "log.checkpoint_steps": 0})
    config = replace(config, run=replace(config.run, batch=512, epochs=4.0))
    run(config, tmp_path, progress=lambda done, total, loss: after_first.append(list(drawn)))
    assert after_first[0] == [0]
    assert len(after_first[-1]) == 4
