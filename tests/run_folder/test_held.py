"""Work that is saved stays saved: what a run folder refuses, and what a run survives."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from uncollapse.cli.main import main
from uncollapse.config.load import dump_config, load_config
from uncollapse.config.tiny import tiny
from uncollapse.errors import CheckpointError, ConfigError, TrainingError
from uncollapse.run_folder.checkpoint import load_checkpoint
from uncollapse.run_folder.held import held
from uncollapse.run_folder.log import RunLog, read_rows
from uncollapse.training.run import train
from uncollapse.training.step import Stepper


def config(**keys):
    """The cheapest run: no prototypes that learn, one checkpoint in five steps."""
    return tiny(load_config("demo", {"prototypes.kind": "fixed", **keys}))


def run(out, steps=3, settings=None, **options):
    return train(settings or config(), out, steps, say=lambda line: None, accelerator="cpu", **options)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A finished run of three steps; copy it."""
    out = tmp_path_factory.mktemp("made") / "run"
    run(out)
    return out


@pytest.fixture
def copy(made, tmp_path):
    return Path(shutil.copytree(made, tmp_path / "run"))


def contents(out):
    return {p: p.read_bytes() for p in sorted(out.rglob("*")) if p.is_file() and p.name != ".lock"}


def saved_step(out):
    return load_checkpoint(out / "checkpoints")["step"]


# --- what is refused ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("lost", ["digests", "checkpoints"])
def test_a_run_that_lost_its_checkpoints_never_starts_again_over_itself(lost, copy):
    if lost == "digests":
        for path in (copy / "checkpoints").glob("*.json"):
            path.unlink()
    else:
        shutil.rmtree(copy / "checkpoints")
    before = contents(copy)
    with pytest.raises(ConfigError, match="digest by which" if lost == "digests" else "made 3 steps"):
        run(copy, 5, resume=True)
    assert contents(copy) == before


@pytest.mark.parametrize("name", ["config.yaml", "metrics.jsonl", "summary.json"])
def test_a_strangers_files_are_never_written_over(name, tmp_path):
    (tmp_path / name).write_text("precious")
    with pytest.raises(ConfigError, match=f"holds a {name}"):
        run(tmp_path)
    assert contents(tmp_path) == {tmp_path / name: b"precious"}


def test_two_processes_never_share_a_run_folder(copy):
    code = (
        "import sys, time\nfrom pathlib import Path\nfrom uncollapse.run_folder.held import held\n"
        "with held(Path(sys.argv[1])):\n    print('held', flush=True)\n    time.sleep(60)"
    )
    other = subprocess.Popen([sys.executable, "-c", code, copy], stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(ConfigError, match=f"in use by process {other.pid} on '"):
            run(copy, 5, resume=True)
    finally:
        other.kill()  # leaves its lock file behind, which means nothing now
        other.wait()
    assert json.loads((copy / ".lock").read_text())["pid"] == other.pid
    with held(copy):
        assert json.loads((copy / ".lock").read_text())["pid"] == os.getpid()
    assert (copy / ".lock").read_text() == ""


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"optim.lr": 1e-2}, r"optim\.lr 0\.003 → 0\.01"),
        ({"seed": 1}, "seed 0 → 1"),
        ({"run.batch": 16}, r"run\.batch 32 → 16"),
        ({"run.epochs": 5.0}, r"run\.epochs 2\.0 → 5\.0"),
        ({"data.held_out_max": 100}, r"data\.held_out_max"),
        ({"data.long_tail": 10.0}, r"data\.long_tail 1\.0 → 10\.0"),
    ],
)
def test_what_changes_what_is_learned_is_refused_by_name(keys, expected, copy):
    settings = tiny(config(), {}) if not keys else tiny(load_config("demo", {"prototypes.kind": "fixed", **keys}), keys)
    (copy / "config.yaml").write_text(dump_config(settings))
    before = contents(copy)
    with pytest.raises(ConfigError, match=expected):
        run(copy, 5, settings, resume=True)
    assert contents(copy) == before


def test_what_changes_nothing_is_said(copy):
    lines = []
    settings = config(**{"log.sweep_epochs": 0.5, "data.workers": 0})
    train(settings, copy, 4, True, say=lines.append, accelerator="cpu")
    assert any("log.sweep_epochs" in line for line in lines)
    assert saved_step(copy) == 4


def test_other_images_are_refused(tmp_path):
    from PIL import Image

    for i in range(40):
        path = tmp_path / "images" / f"class{i % 2}" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (9, 9), (i, 2 * i, 0)).save(path)
    settings = config(**{"data.path": str(tmp_path / "images"), "run.batch": 8})
    run(tmp_path / "run", 2, settings)
    shutil.copytree(tmp_path / "images", tmp_path / "moved")
    moved = config(**{"data.path": str(tmp_path / "moved"), "run.batch": 8})
    run(tmp_path / "run", 3, moved, resume=True)  # the same images elsewhere are the same images
    (tmp_path / "moved" / "class0" / "0.png").unlink()
    with pytest.raises(ConfigError, match="does not hold the training images"):
        run(tmp_path / "run", 4, moved, resume=True)
    assert saved_step(tmp_path / "run") == 3


def test_views_that_the_encoder_does_not_take_are_refused_before_the_first_step(tmp_path):
    keys = {"data.path": "builtin:digits", "backbone.name": "mixer_s32_224", "backbone.drop_path": 0.0}
    with pytest.raises(ConfigError, match="does not take views of"):
        run(tmp_path / "run", 1, tiny(load_config("dino-small32", keys), keys))
    assert not (tmp_path / "run").exists()


def test_a_device_that_is_not_there(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(ConfigError, match="finds no CUDA device"):
        train(config(), tmp_path / "run", 1, accelerator="cuda")


# --- what a run survives -----------------------------------------------------------------------------------


def at_step(step, action):
    """A progress callback that does something to the run once."""
    return lambda done, total, loss: action() if done == step else None


def test_a_hang_up_ends_after_a_whole_step_and_is_saved(tmp_path, capfd):
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "run", 9, progress=at_step(2, lambda: os.kill(os.getpid(), signal.SIGHUP)))
    assert saved_step(tmp_path / "run") == 3
    assert "finishing this step" in capfd.readouterr().err  # said at once, not after it


def test_nohup_is_respected(tmp_path):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        run(tmp_path / "run", 4, progress=at_step(2, lambda: os.kill(os.getpid(), signal.SIGHUP)))
    finally:
        signal.signal(signal.SIGHUP, before)
    assert saved_step(tmp_path / "run") == 4


def test_a_reader_that_leaves_does_not_end_the_run(tmp_path, monkeypatch):
    """As in ``uncollapse train … | head -1``."""
    read, write = os.pipe()
    os.close(read)
    monkeypatch.setattr(sys, "stdout", os.fdopen(write, "w", buffering=1))
    argv = ["train", "demo", "--tiny", "--prototypes", "fixed", "--max-steps", "3", "--device", "cpu"]
    main([*argv, "--out", str(tmp_path / "run")])
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["steps"] == 3
    assert (tmp_path / "run" / "report.html").is_file()


@pytest.mark.filterwarnings(
    "ignore:checkpoint at step",
    "ignore:.*rows are kept",
    "ignore:TensorBoard stops",
    "ignore::pytest.PytestUnhandledThreadExceptionWarning",
)
@pytest.mark.parametrize("what", ["checkpoints", "run folder"])
def test_a_folder_that_can_no_longer_be_written_costs_nothing(what, tmp_path, monkeypatch):
    """Checkpoints that became a file stand for a read-only folder, which root could still write to."""
    import tempfile

    out, spare = tmp_path / "run", tmp_path / "spare"
    spare.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(spare))

    def spoil():
        if what == "run folder":
            out.rename(tmp_path / "moved")
        else:
            (out / "checkpoints").rename(tmp_path / "moved")
            (out / "checkpoints").write_text("")

    with pytest.raises(TrainingError, match="could not be written") as error:
        run(out, 7, progress=at_step(2, spoil))
    rescued = Path(str(error.value).split()[-1])
    assert saved_step(rescued) == 7
    assert run(rescued, 7, load_config(rescued / "config.yaml"), resume=True)["steps"] == 7
    if what == "run folder":
        assert not out.exists()
        rows = [r for r in read_rows(tmp_path / "moved" / "metrics.jsonl") if r["kind"] == "step"]
        assert [r["step"] for r in rows] == [1, 2]


@pytest.mark.slow
def test_a_killed_loader_process_ends_the_run_with_a_checkpoint(tmp_path):
    from PIL import Image

    for i in range(40):
        path = tmp_path / "images" / f"class{i % 2}" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 40), (i, 2 * i, 0)).save(path)
    keys = {"data.path": str(tmp_path / "images"), "data.memory_gb": 0.0, "run.batch": 8, "data.workers": 1}
    settings = config(**keys)

    def kill():
        children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
        os.kill(int(children[-1]), signal.SIGKILL)
        time.sleep(0.2)  # the signal of its death has come

    with pytest.raises(TrainingError, match=r"killed or crashed after step \d.*step \d is saved; continue"):
        run(tmp_path / "run", 8, settings, progress=at_step(3, kill))
    assert saved_step(tmp_path / "run") >= 3
    assert run(tmp_path / "run", 8, settings, resume=True)["steps"] == 8


def test_an_error_between_two_steps_saves_the_steps(tmp_path):
    def fail():
        raise RuntimeError("from outside")

    with pytest.raises(RuntimeError, match="from outside"):
        run(tmp_path / "run", 9, progress=at_step(3, fail))
    assert saved_step(tmp_path / "run") == 3


def test_an_error_within_a_step_leaves_the_last_whole_one(tmp_path, monkeypatch):
    plain = Stepper.__call__

    def fail(self, step, *rest):
        if step == 3:
            raise torch.OutOfMemoryError("no room for 40 GiB")
        return plain(self, step, *rest)

    monkeypatch.setattr(Stepper, "__call__", fail)
    with pytest.raises(
        TrainingError, match=r"out of memory in step 3; the newest checkpoint is of step 0.*accumulate 2"
    ):
        run(tmp_path / "run", 9)
    assert saved_step(tmp_path / "run") == 0


def test_a_checkpoint_of_something_else_is_no_run(copy):
    from uncollapse.run_folder.checkpoint import save_checkpoint

    save_checkpoint(copy / "checkpoints", 9, {"model": torch.ones(3)}, 2)
    with pytest.raises(CheckpointError, match="no usable 'config'"):
        run(copy, 12, resume=True)


def test_a_failed_evaluation_leaves_the_training(tmp_path, monkeypatch):
    import uncollapse.training.summary

    def fail(*args):
        raise RuntimeError("no memory for it")

    monkeypatch.setattr(uncollapse.training.summary, "embed", fail)
    with pytest.raises(TrainingError, match="trained and saved to step 2, but the evaluation failed"):
        run(tmp_path / "run", 2)
    monkeypatch.undo()
    assert run(tmp_path / "run", 2, resume=True)["steps"] == 2


def test_nan_before_any_later_checkpoint_names_one_that_exists(tmp_path, monkeypatch):
    import uncollapse.training.step as taken

    def poison(teacher, student, momentum):
        next(student.parameters()).data[0] = float("nan")

    monkeypatch.setattr(taken, "update_teacher", poison)
    with pytest.raises(TrainingError, match="the newest checkpoint is of step 0"):
        run(tmp_path / "run", 1)
    assert saved_step(tmp_path / "run") == 0


# --- metrics.jsonl -----------------------------------------------------------------------------------------


def test_rows_survive_a_write_that_failed_half_way(tmp_path, monkeypatch):
    log = RunLog(tmp_path)
    log.row("step", 1, loss=1.0)
    plain, calls = RunLog._append, []

    def full(self, content):
        calls.append(1)
        if len(calls) == 1:
            raise OSError(28, "No space left on device")
        plain(self, content)

    monkeypatch.setattr(RunLog, "_append", full)
    with pytest.warns(UserWarning, match="rows are kept"):
        log.row("step", 2, loss=2.0)
    log.row("step", 3, loss=3.0)
    log.close()
    assert [r["step"] for r in read_rows(tmp_path / "metrics.jsonl")] == [1, 2, 3]


def test_a_resume_on_a_full_disk_leaves_the_metrics_as_they_were(copy, monkeypatch):
    import uncollapse.run_folder.log as runlog

    before = (copy / "metrics.jsonl").read_bytes()

    def full(path, content):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(runlog, "write_atomically", full)
    with pytest.raises(OSError, match="No space"):
        run(copy, 5, resume=True)
    assert (copy / "metrics.jsonl").read_bytes() == before


# --- damage ------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:skipping damaged checkpoint")
def test_resuming_a_damaged_folder_works_or_raises_our_errors(copy, tmp_path):
    """Seeded damage to each text file of a run folder, beside files that only look like checkpoints."""
    rng = random.Random(1)
    names = ["metrics.jsonl", "config.yaml", "summary.json", "checkpoints/step-00000003.json"]
    originals = {name: (copy / name).read_bytes() for name in names}
    (copy / "checkpoints" / "step-00000040 (1).json").write_text("{}")
    (copy / "checkpoints" / "step-x.json").write_text("{}")
    finished = 0
    for i in range(12):
        folder = Path(shutil.copytree(copy, tmp_path / f"damaged{i}"))
        name = names[i % len(names)]
        (folder / name).write_bytes(damaged(originals[name], rng))
        try:
            settings = load_config(folder / "config.yaml")
            assert run(folder, 3, settings, resume=True)["steps"] == 3
            finished += 1
        except (ConfigError, CheckpointError) as error:
            assert "\n" not in str(error)  # noqa: PT017
        shutil.rmtree(folder)
    assert finished >= 3  # damaged metrics cost nothing


def damaged(content, rng):
    at = rng.randrange(len(content))
    odd = [b"", b"[" * 2000, b"9" * 5000, b"null", b'{"step": "x"}\n', b"\xff\xfe", b'"step": -1e999,']
    return content[:at] + rng.choice(odd) + content[at + rng.randrange(30) :]
