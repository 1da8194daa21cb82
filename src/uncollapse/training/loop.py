"""The loop of one run: the order of a step is the objective's, the order of everything around it is here."""

from __future__ import annotations

import math
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from uncollapse.config.facts import mode_name
from uncollapse.config.load import dump_config
from uncollapse.data.batched import multicrop
from uncollapse.data.images import MemoryImages
from uncollapse.data.masks import around_blocks, crop_masks, dropped_patches
from uncollapse.data.views import ViewSpec, view_specs
from uncollapse.data.workers import view_loader
from uncollapse.errors import TrainingError
from uncollapse.measure.monitor import nearest_cosine
from uncollapse.methods.contract import Batch
from uncollapse.models.drop_path import row_keys
from uncollapse.models.tokens import patches_of
from uncollapse.run_folder.checkpoint import newest_step, save_checkpoint
from uncollapse.run_folder.held import identity
from uncollapse.run_folder.log import RunLog
from uncollapse.targets.softmax import entropies
from uncollapse.training.alarms import LossWatch
from uncollapse.training.interrupt import StopRequest, deaths_wait
from uncollapse.training.job import Job
from uncollapse.training.state import TrainState, non_finite, state_dicts
from uncollapse.training.step import Done, Stepper
from uncollapse.training.stopwatch import Stopwatch

Progress = Callable[[int, int, float], None]
"""Called after every step with (steps done, steps to do, loss)."""


def of_set(measure: str, name: str, first: str) -> str:
    """What a log calls a measure of one of several sets, or of one of several targets; the first set's go without."""
    return measure if name == first else f"{measure}/{name}"


def epoch_order(seed: int, epoch: int, images: int) -> np.ndarray:
    """The order of one epoch's images, from (seed, epoch) alone."""
    return np.random.default_rng([seed, 1, epoch]).permutation(images)


class Loop:
    """One run's loop and the values its parts share."""

    def __init__(self, job: Job, state: TrainState, log: RunLog | None, say: Callable[[str], None]) -> None:
        self.job, self.config, self.fabric, self.images, self.out = job, job.config, job.fabric, job.images, job.out
        self.state, self.log, self.say = state, log, say
        self.specs: list[ViewSpec] = view_specs(self.config.views)
        self.places = np.arange(self.config.run.batch).reshape(self.fabric.world_size, -1)[self.fabric.global_rank]
        if state.parts.hide is not None or state.parts.predict is not None or state.parts.drop:
            self.patches = patches_of(state.student.backbone, self.config.views.global_size)
        self.watch = Stopwatch(job.device)
        self.watch_seconds: dict[str, float] = {}
        self.alarms = LossWatch(self.config.prototypes.count, state.parts.uninformed, mode=mode_name(self.config))
        self.last_loss = math.nan
        self.folder = identity(self.out)
        self.inside = False  # a step is under way: the state is neither of before nor of after
        self.stop_request = StopRequest(self.fabric.is_global_zero)
        self.stopping = False  # what all ranks agree on; a request that comes later waits for the next step
        self.take_step = Stepper(job, state, self.watch, self._check_finite)

    # --- order of images -------------------------------------------------------------------------------

    def _plan(self, start: int, stop: int) -> Iterator[tuple[int, list[int], list[int]]]:
        """(step, image indices, positions in the global batch) of this rank."""
        order, current = np.empty(0, dtype=np.int64), -1
        for step in range(start, stop):
            epoch, within = divmod(step, self.job.steps_per_epoch)
            if epoch != current:
                order, current = epoch_order(self.config.seed, epoch, len(self.images)), epoch
            yield step, order[within * self.config.run.batch + self.places].tolist(), self.places.tolist()

    def _batches(self, start: int, stop: int) -> Iterator[tuple[int, Batch]]:
        config, plan = self.config, self._plan(start, stop)
        if isinstance(self.images, MemoryImages):
            for step, indices, positions in plan:
                views = multicrop(
                    self.images, indices, config.seed, step, self.specs, positions, device=self.fabric.device
                )
                yield step, self._batch(step, views)
            return
        loader = view_loader(self.images, plan, self.specs, config.seed, config.data.workers)
        yield start, self._batch(start, next(loader))
        with deaths_wait(lambda: self.inside) as check:
            for step in range(start + 1, stop):
                check()
                yield step, self._batch(step, next(loader))

    def _batch(self, step: int, views: list[Tensor]) -> Batch:
        seed, positions = self.config.seed, self.places
        groups: dict[str, list[Tensor]] = {}
        for spec, view in zip(self.specs, views, strict=True):
            groups.setdefault(spec.name, []).append(view)
        masks: dict[str, Tensor] = {}
        if (hide := self.state.parts.hide) is not None:
            evenly = self.config.run.batch if self.state.parts.hide_evenly else None
            count = len(groups["global"])
            masks["global"] = crop_masks(self.patches, count, *hide, seed, step, positions.tolist(), evenly)
        if drop := self.state.parts.drop:
            dropped = dropped_patches(self.patches, drop, seed, step)
            masks["global"] = dropped.expand(len(groups["global"]), len(positions), -1)
        if (predict := self.state.parts.predict) is not None:
            masks["global"], masks["predicted"] = around_blocks(
                self.patches, len(groups["global"]), *predict, seed, step, positions.tolist()
            )
        return Batch(groups, masks, row_keys(seed, step, torch.from_numpy(positions), len(views)))

    def _check_finite(self, tensor: Tensor, what: str, step: int) -> None:
        """Stops before the bad values reach the weights."""
        if bool(torch.isfinite(tensor).all()):
            return
        if not non_finite(self.state) and self._save(step):
            kept = f"the weights before this step are finite and saved as step {step}"
        else:
            kept = self._last_kept()
        raise TrainingError(
            f"{what} became NaN or infinite at step {step} (learning rate "
            f"{self.take_step.optimizer.param_groups[0]['lr']:.3g}); {kept}. Try a lower optim.lr, optim.clip 3.0, or "
            f"run.precision 32-true, in a new run; {self.out} keeps everything up to here."
        )

    # --- the run ----------------------------------------------------------------------------------------

    def run(self, start: int, stop: int, progress: Progress | None, fresh: bool = True) -> None:
        """Steps ``start`` to ``stop``; ``fresh``: there is no checkpoint of ``start`` yet.

        A run has a checkpoint before its first step, so one without any has lost them.
        """
        if fresh and not self._save(start):
            raise TrainingError(f"no checkpoint can be written to {self.out}; nothing was trained")
        done = start
        self.watch.begin()
        with self.stop_request.listening():
            try:
                if start == 0:
                    self._sweep(0)
                for step, batch in self._batches(start, stop):
                    self.watch.lap("views")
                    self.inside = True
                    result = self.take_step(step, batch, self.stop_request.asked)
                    self.last_loss, self.stopping = result.loss, result.asked
                    self.inside, done = False, step + 1
                    self._after_step(done, stop, result)
                    if progress is not None:
                        progress(done, stop, self.last_loss)
                    if self.stopping:
                        self.say(f"stopped at step {done}; continue with: uncollapse train --resume {self.out}")
                        raise KeyboardInterrupt
            except TrainingError:
                raise
            except Exception as error:
                raise self._interrupted(error, done, start) from error
        if start < stop and not self._save(stop):
            raise TrainingError(
                f"the final checkpoint (step {stop}) could not be written to {self.out}. {self._rescue(stop)}"
            )

    def _after_step(self, done: int, stop: int, result: Done) -> None:
        log = self.config.log
        sweep_every = max(1, round(log.sweep_epochs * self.job.steps_per_epoch))
        if done % log.every_steps == 0 or done == stop:
            self._log(done, result)
        if done % sweep_every == 0 or done == stop:
            self._sweep(done)
        self._warn(self.alarms.loss(result.terms), done)
        self.watch.lap("diagnosis")
        due = log.checkpoint_steps and done % log.checkpoint_steps == 0
        if self.stopping or (due and done < stop):
            self._save(done)
            self.watch.lap("checkpoint")

    def _interrupted(self, error: Exception, done: int, start: int) -> Exception:
        """What to raise for an error that ends the run: whole steps are saved first, and it says so."""
        saved = not self.inside and done > start and self._save(done)
        kept = f"step {done} is saved" if saved else self._last_kept()
        again = f"{kept}; continue with: uncollapse train --resume {self.out}"
        if "DataLoader worker" in str(error):
            return TrainingError(
                f"a process that reads images was killed or crashed after step {done}, most often for want of memory "
                f"(fewer data.workers need less); {again}"
            )
        if isinstance(error, MemoryError | torch.OutOfMemoryError) or "not enough memory" in str(error):
            return TrainingError(
                f"out of memory in step {done}; {kept}. In a new run, run.accumulate {2 * self.config.run.accumulate} "
                "takes the batch in smaller parts"
            )
        self.say(f"failed at step {done}: {again}")
        return error

    def _last_kept(self) -> str:
        newest = newest_step(self.out / "checkpoints")
        return f"the newest checkpoint is of step {newest}" if newest is not None else "there is no checkpoint"

    def _log(self, done: int, result: Done) -> None:
        first = self.state.parts.names()[0]
        lasting = {name: m for name, m in self.state.monitors.items() if self.state.prototypes(name).lasting}
        alive = {name: monitor.alive() for name, monitor in lasting.items()}
        if self.log is not None:
            row: dict[str, Any] = {"epoch": round(self.job.epoch(done), 4), "loss": result.loss}
            row["lr"] = self.take_step.optimizer.param_groups[0]["lr"]
            row["terms"] = result.terms
            for name in self.state.monitors:
                vectors = self.state.prototypes(name).vectors("teacher")
                if name in alive:
                    row[of_set("alive", name, first)] = alive[name]
                row[of_set("nearest_cosine", name, first)] = nearest_cosine(vectors)
            for name, targets in result.targets.items():
                if not targets.z.numel():
                    continue  # no hidden patch on this rank
                of_teacher, of_marginal = (of_set(m, name, first) for m in ("teacher_entropy", "marginal_entropy"))
                row[of_teacher], row[of_marginal] = entropies(targets)
            self.log.row("step", done, time=time.time(), **row)
        for name, monitor in lasting.items():
            if monitor.window_full:
                self._warn(self.alarms.alive(alive[name], monitor.window, name), done)

    def _sweep(self, done: int) -> None:
        if self.log is not None:
            first = self.state.parts.names()[0]
            counts = {
                of_set("unique", name, first): monitor.sweep(self.state.prototypes(name).vectors("teacher"))
                for name, monitor in self.state.monitors.items()
            }
            self.log.row("sweep", done, epoch=round(self.job.epoch(done), 4), **counts)

    def _warn(self, message: str | None, done: int) -> None:
        if message and self.fabric.is_global_zero:
            self.say(f"warning: step {done}: {message}")
            if self.log is not None:
                self.log.row("warning", done, message=message)

    def all_seconds(self) -> dict[str, float]:
        """Seconds per part since step 0, resumed parts included."""
        now = self.watch.totals()
        return {k: now.get(k, 0.0) + self.watch_seconds.get(k, 0.0) for k in {**self.watch_seconds, **now}}

    def _rescue(self, step: int) -> str:
        """Puts the finished weights where there may still be room; says where, and how to go on."""
        with suppress(OSError):
            elsewhere = Path(tempfile.mkdtemp(prefix="uncollapse-rescue-"))
            (elsewhere / "config.yaml").write_text(dump_config(self.config))
            if self._save(step, elsewhere):
                return f"Its state is in {elsewhere}: finish with uncollapse train --resume {elsewhere}"
        return f"Free some space and run: uncollapse train --resume {self.out}"

    def _save(self, step: int, out: Path | None = None) -> bool:
        """Writes a checkpoint on rank 0, unless the state has gone bad: the last good one must stay the newest."""
        bad = non_finite(self.state)
        if bad:
            raise TrainingError(
                f"{bad[0]} became NaN or infinite by step {step}; it was not saved, {self._last_kept()}. Try a lower "
                f"optim.lr or optim.clip 3.0 in a new run; {self.out} keeps everything up to here."
            )
        if not self.fabric.is_global_zero:
            return True
        if out is None and identity(self.out) != self.folder:
            warnings.warn(
                f"checkpoint at step {step} not written: {self.out} was moved or deleted while the run was writing to "
                "it. Move it back; training goes on and tries again at the next one.",
                stacklevel=2,
            )
            return False
        state = {**state_dicts(self.state), "seconds": self.all_seconds()}
        state["loss"], state["images"] = self.last_loss, self.job.digests
        state["scaler"] = self.take_step.precision.state_dict()
        state["config"] = asdict(self.config)
        return save_checkpoint((out or self.out) / "checkpoints", step, state, self.config.log.keep_checkpoints)
