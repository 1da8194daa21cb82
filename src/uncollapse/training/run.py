"""One training run: checks, set-up, the loop, and the numbers at its end."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import torch
from lightning.fabric import Fabric
from lightning.fabric.plugins import MixedPrecision

from uncollapse.config.facts import method_name, mode_name
from uncollapse.config.load import dump_config
from uncollapse.config.schema import Config
from uncollapse.data.fingerprint import image_digests
from uncollapse.data.images import MemoryImages
from uncollapse.data.load import described, load_images
from uncollapse.errors import ConfigError, TrainingError
from uncollapse.run_folder import held as runfolder
from uncollapse.run_folder.checkpoint import load_checkpoint
from uncollapse.run_folder.files import write_atomically
from uncollapse.run_folder.log import RunLog
from uncollapse.run_folder.sinks import refuse_missing_wandb
from uncollapse.shown import in_words, shown
from uncollapse.training.branch import branch_off
from uncollapse.training.job import Job
from uncollapse.training.loop import Loop, Progress
from uncollapse.training.resume import check_same_run, refuse_foreign
from uncollapse.training.state import build_state, load_state_dicts, refuse_misfit


def train(
    config: Config,
    out: Path,
    max_steps: int | None = None,
    resume: bool = False,
    progress: Progress | None = None,
    say: Callable[[str], None] = print,
    accelerator: str = "auto",
) -> dict[str, Any]:
    """Runs (or continues) one training run in the folder ``out`` and evaluates it on held-out images.

    Args:
        config: validated; ``config.data.path`` names the images.
        out: the run folder. Must be new unless ``resume``.
        max_steps: stop after this many steps in all; schedules are still those of the whole recipe.
        resume: continue from the newest good checkpoint of ``out``; bit for bit the same on the CPU.
        progress: called after every step.
        say: receives the lines a user should see.
        accelerator: ``auto``, ``cpu`` or ``cuda``.

    Returns:
        The summary that is also written to ``out/summary.json``.

    Raises:
        ConfigError, DataError: something does not fit, found before any training.
        CheckpointError: there are checkpoints, but none can be used.
        TrainingError: training or the evaluation after it cannot go on; says what was kept.
    """
    with ExitStack() as held:
        return _train(config, out, max_steps, resume, progress, say, accelerator, held)


def _train(
    config: Config,
    out: Path,
    max_steps: int | None,
    resume: bool,
    progress: Progress | None,
    say: Callable[[str], None],
    accelerator: str,
    held: ExitStack,
) -> dict[str, Any]:
    fabric = _fabric(config, accelerator)
    if config.run.batch % (fabric.world_size * config.run.accumulate):
        raise ConfigError(
            f"run.batch: {config.run.batch} images do not divide over {fabric.world_size} ranks"
            + (f" in {config.run.accumulate} parts each" if config.run.accumulate > 1 else "")
        )
    refuse_missing_wandb(config.log.wandb)
    main = fabric.is_global_zero
    if main and resume:
        held.enter_context(runfolder.held(out))
    elif main:
        runfolder.refuse_what_is_there(out)
    saved = load_checkpoint(out / "checkpoints") if resume else None
    if saved is not None:
        refuse_foreign(saved, out)
    elif resume:
        runfolder.refuse_lost_checkpoints(out)
    train_images, held_out = load_images(
        config.data.path,
        config.data,
        config.seed,
        config.data.val_path or None,
        progress=main,
    )
    steps_per_epoch = len(train_images) // config.run.batch
    if steps_per_epoch < 1:
        raise ConfigError(
            f"run.batch: a batch of {config.run.batch} needs as many training images, "
            f"{config.data.path} has {len(train_images)}; set run.batch lower"
        )
    digests = image_digests(train_images, held_out)
    notes = [] if saved is None else check_same_run(config, digests, saved)
    total = max(1, round(config.run.epochs * steps_per_epoch))
    job = Job(config, out, fabric, train_images, held_out, digests, steps_per_epoch, total)
    start = config.change.branch_step if saved is None else int(saved["step"])
    stop = max(start, total if max_steps is None else min(total, max_steps))
    if start == stop and (finished := _finished(out, stop)) is not None:
        say(f"finished    at step {stop} already; its summary.json stands")
        return finished if main else {}
    state = build_state(config)
    if saved is None and config.backbone.init:
        from uncollapse.checkpoints.pretrained import start_from

        notes += start_from(state.student, config.backbone.init)
        if state.teacher is not None:
            state.teacher.load_state_dict(state.student.state_dict())
    refuse_misfit(state, config)
    state.to(fabric.device)
    if saved is None and config.change.branch:
        notes += branch_off(state, config, digests)
    if saved is not None:
        load_state_dicts(state, saved)
    if main and not resume:
        out.mkdir(parents=True, exist_ok=True)
        held.enter_context(runfolder.held(out))
        runfolder.refuse_what_is_there(out)  # another process may have been quicker
    if main:
        write_atomically(out / "config.yaml", dump_config(config).encode())
        for line in [*banner(job, start, stop), *notes]:
            say(line)
        _note_bad(out, [*train_images.bad, *held_out.bad], say)
    log = RunLog(out, start, config) if main else None
    loop = Loop(job, state, log, say)
    if saved is not None:
        loop.take_step.precision.load_state_dict(saved.get("scaler", {}))
        loop.watch_seconds, loop.last_loss = dict(saved["seconds"]), float(saved["loss"])
    torch.set_flush_denormal(True)  # sharp softmaxes are full of denormals, which a CPU handles 10 × slower
    try:
        loop.run(start, stop, progress, fresh=saved is None)
    finally:
        torch.set_flush_denormal(False)
        with suppress(OSError):
            _note_bad(out, train_images.bad, say)
        if log is not None:
            log.close()
    if not main:
        return {}
    from uncollapse.training.summary import finish_run

    try:
        return finish_run(job, state, stop, loop.last_loss, loop.all_seconds())
    except Exception as error:
        raise TrainingError(
            f"trained and saved to step {stop}, but the evaluation failed ({type(error).__name__}: "
            f"{in_words(error)}); mend that and run: uncollapse train --resume {out}"
        ) from error


def _finished(out: Path, step: int) -> dict[str, Any] | None:
    """The summary of a run that was trained and evaluated up to ``step``, or None."""
    try:
        summary = json.loads((out / "summary.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    # Written last, so it says that nothing of the evaluation is missing.
    whole = isinstance(summary, dict) and summary.get("steps") == step and (out / "diagnosis.npz").is_file()
    return summary if whole else None


def _fabric(config: Config, accelerator: str) -> Fabric:
    """One process, or as many as torchrun started."""
    if accelerator == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: torch finds no CUDA device here; leave it out to use the CPU")
    world = int(os.environ.get("WORLD_SIZE", "1"))
    local = int(os.environ.get("LOCAL_WORLD_SIZE", str(world)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fabric = Fabric(
            accelerator=accelerator,
            devices=local,
            num_nodes=world // local,
            strategy="ddp" if world > 1 else "auto",
            precision=None if config.run.precision == "fp16-mixed" else config.run.precision,
            plugins=_half(accelerator) if config.run.precision == "fp16-mixed" else None,
        )
        fabric.launch()
    return fabric


def _half(accelerator: str) -> MixedPrecision:
    """float16 with a gradient scaler, on a CPU too, where Fabric would quietly take bfloat16."""
    return MixedPrecision("16-mixed", "cuda" if accelerator != "cpu" and torch.cuda.is_available() else "cpu")


def banner(job: Job, start: int, stop: int) -> list[str]:
    """What was chosen and why, for the top of the output."""
    config, fabric = job.config, job.fabric
    run, optim, protos = config.run, config.optim, config.prototypes
    device = torch.cuda.get_device_name(fabric.device) if fabric.device.type == "cuda" else "CPU"
    where = "in memory" if isinstance(job.images, MemoryImages) else f"read by {config.data.workers} workers"
    lr = optim.lr * run.batch / optim.lr_batch
    lines = [
        f"device      {fabric.world_size} × {device}, {run.precision}, {torch.get_num_threads()} threads",
        f"data        {shown(config.data.path)} ({where}): {described(job.images, job.held_out)}",
        f"encoder     {config.backbone.name} → {config.head.bottleneck}-d projections",
        f"method      {method_name(config)}",
        f"prototypes  {protos.count}, {mode_name(config)}",
        f"optimiser   {optim.name}, learning rate {optim.lr:g} × {run.batch}/{optim.lr_batch} = {lr:g}",
        f"steps       {stop} of {job.total} ({run.epochs:g} epochs), effective batch {run.batch}"
        + (f" in {run.accumulate} parts" if run.accumulate > 1 else "")
        + (f"; continuing after step {start}" if start else ""),
    ]
    if protos.vmf and protos.kind == "capi":
        lines.append(
            "note        prototypes.vmf changes nothing here: a clustering has a bias in the normaliser's place"
        )
    elif protos.vmf and not (protos.kind in ("joint", "koleo") and protos.learn_norm and config.method.name != "swav"):
        lines.append("note        prototypes.vmf changes nothing here: prototypes of one length have one normaliser")
    if fabric.device.type == "cuda" and torch.cuda.device_count() > fabric.world_size:
        lines.append(
            f"note        {fabric.world_size} of {torch.cuda.device_count()} GPUs used; for all of them: "
            f"torchrun --nproc-per-node {torch.cuda.device_count()} -m uncollapse train …"
        )
    return lines


def _note_bad(out: Path, bad: Sequence[str], say: Callable[[str], None]) -> None:
    """Adds what is new to the list of unreadable images; every rank and every part of a resumed run adds to one."""
    path = out / "bad_images.txt"
    known = set(path.read_text(encoding="utf-8").splitlines()) if path.is_file() else set()
    if new := [line for line in bad if line not in known]:
        with path.open("a", encoding="utf-8") as file:
            file.write("".join(f"{line}\n" for line in new))
        say(f"skipped     {len(new)} unreadable images, listed in {path}")
