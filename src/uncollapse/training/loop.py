"""The loop of one run: the order of a step is the objective's, the order of everything around it is here."""

from __future__ import annotations

import math
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.fabric import Fabric
from torch import Tensor, nn

from uncollapse.config.load import dump_config
from uncollapse.config.schema import Config, arm_name
from uncollapse.data.batched import multicrop
from uncollapse.data.images import ImageSet, MemoryImages
from uncollapse.data.views import ViewSpec, view_specs
from uncollapse.data.workers import view_loader
from uncollapse.distributed import gather_rows, world
from uncollapse.errors import TrainingError
from uncollapse.measure.monitor import PrototypeMonitor, assignment_statistics, nearest_cosine
from uncollapse.models.sync_norm import convert
from uncollapse.run_folder.checkpoint import newest_step, save_checkpoint
from uncollapse.run_folder.held import identity
from uncollapse.run_folder.log import RunLog
from uncollapse.schedules import cosine, linear_epochs
from uncollapse.targets.softmax import SoftmaxTargets
from uncollapse.training.alarms import LossWatch
from uncollapse.training.interrupt import StopRequest, deaths_wait
from uncollapse.training.optim import clip_each, update_teacher
from uncollapse.training.state import TrainState, non_finite, state_dicts
from uncollapse.training.stopwatch import Stopwatch

Progress = Callable[[int, int, float], None]
"""Called after every step with (steps done, steps to do, loss)."""


def epoch_order(seed: int, epoch: int, images: int) -> np.ndarray:
    """The order of one epoch's images, from (seed, epoch) alone."""
    return np.random.default_rng([seed, 1, epoch]).permutation(images)


def synchronise(encoder: nn.Module, device: torch.device) -> None:
    """Makes batch norms see the batches of all ranks, so that a run does not depend on how many there are."""
    if device.type == "cuda":
        from timm.layers import convert_sync_batchnorm

        convert_sync_batchnorm(encoder)  # timm's keeps the activations that its own norms contain
    else:
        convert(encoder)


class Loop:
    """One run's loop and the values its parts share."""

    def __init__(
        self, config: Config, fabric: Fabric, state: TrainState, images: ImageSet, monitor: PrototypeMonitor,
        log: RunLog | None, say: Callable[[str], None], out: Path, total: int, steps_per_epoch: int,
    ) -> None:  # fmt: skip
        self.config, self.fabric, self.state, self.images = config, fabric, state, images
        self.monitor, self.log, self.say, self.out = monitor, log, say, out
        self.total, self.steps_per_epoch = total, steps_per_epoch
        self.specs: list[ViewSpec] = view_specs(config.views)
        self.watch = Stopwatch(fabric.device)
        self.watch_seconds: dict[str, float] = {}
        self.alarms = LossWatch(config.prototypes.count, arm=arm_name(config.prototypes))
        self.last_loss = math.nan
        self.digests: dict[str, str] = {}
        self.folder = identity(out)
        self.inside = False  # a step is under way: the state is neither of before nor of after
        self.stop_request = StopRequest(fabric.is_global_zero)
        self.stopping = False  # what all ranks agree on; a request that comes later waits for the next step
        if fabric.world_size > 1:
            for encoder in (state.student, state.teacher):
                synchronise(encoder, fabric.device)
        self.student = fabric.setup_module(state.student)
        optimizer: Any = fabric.setup_optimizers(state.optimizer)
        self.optimizer: torch.optim.Optimizer = optimizer
        self.precision = fabric.strategy.precision  # holds the gradient scaler of 16-mixed
        self.learned = [p for p in state.prototypes.parameters() if p.requires_grad]

    # --- order of images -------------------------------------------------------------------------------

    def _plan(self, start: int, stop: int) -> Iterator[tuple[int, list[int], list[int]]]:
        """(step, image indices, positions in the global batch) of this rank."""
        batch, ranks, rank = self.config.run.batch, self.fabric.world_size, self.fabric.global_rank
        mine = np.arange(batch).reshape(ranks, -1)[rank]
        order, current = np.empty(0, dtype=np.int64), -1
        for step in range(start, stop):
            epoch, within = divmod(step, self.steps_per_epoch)
            if epoch != current:
                order, current = epoch_order(self.config.seed, epoch, len(self.images)), epoch
            yield step, order[within * batch + mine].tolist(), mine.tolist()

    def _views(self, start: int, stop: int) -> Iterator[tuple[int, list[Tensor]]]:
        config, device = self.config, self.fabric.device
        plan = self._plan(start, stop)
        if isinstance(self.images, MemoryImages):
            for step, indices, positions in plan:
                views = multicrop(self.images, indices, config.seed, step, self.specs, positions, device=device)
                yield step, views
            return
        loader = view_loader(self.images, plan, self.specs, config.seed, config.data.workers)
        yield start, next(loader)
        with deaths_wait(lambda: self.inside) as check:
            for step in range(start + 1, stop):
                check()
                yield step, next(loader)

    # --- one step ---------------------------------------------------------------------------------------

    def _set_rates(self, step: int) -> None:
        config, optim = self.config, self.config.optim
        lr = cosine(
            step, self.total, optim.lr * config.run.batch / optim.lr_batch, optim.min_lr,
            round(optim.warmup_epochs * self.steps_per_epoch),
        )  # fmt: skip
        decay = cosine(step, self.total, optim.weight_decay, optim.weight_decay_end)
        for group in self.optimizer.param_groups:
            own = group["role"] == "prototypes"
            group["lr"] = lr * (config.prototypes.lr_scale if own else 1.0)
            fixed = config.prototypes.weight_decay if own else None
            group["weight_decay"] = 0.0 if group["role"] == "plain" else decay if fixed is None else fixed

    def _gather(self, z: Tensor) -> Tensor:
        """``(views, n, D)`` of every rank in the order one rank would have them: ``(views, batch, D)``."""
        return gather_rows(z.transpose(0, 1), world()).transpose(0, 1)

    def step(self, step: int, views: list[Tensor]) -> tuple[float, SoftmaxTargets]:
        """Views to updated teacher, in the order the design fixes. Returns the loss and the targets."""
        config, state, watch = self.config, self.state, self.watch
        epoch = step // self.steps_per_epoch
        progress = step / self.total
        temperatures = config.teacher
        tau = linear_epochs(
            epoch, temperatures.temperature_start, temperatures.temperature,
            temperatures.temperature_warmup_epochs,
        )  # fmt: skip
        self._set_rates(step)
        torch.manual_seed(hash((config.seed, step, self.fabric.global_rank)) % 2**63)  # stochastic depth
        parts = self._parts(len(views[0]))
        if len(parts) == 1:
            views = self._on_device(views)  # once; otherwise part by part, twice
        with torch.no_grad(), self.fabric.autocast():
            z_parts = [torch.stack(state.teacher(self._on_device(views[:2], part))) for part in parts]
        z_teacher = torch.cat(z_parts, dim=1)
        z_all = self._gather(z_teacher)
        watch.lap("teacher")
        self._check_finite(z_all, "the teacher's projections", step)
        state.prototypes.observe(z_all.flatten(0, 1), progress)
        targets = state.objective.targets(z_teacher, state.prototypes, tau, world())
        watch.lap("prototypes")
        self.monitor.observe_projections(z_all[0], state.prototypes.vectors("teacher"))
        watch.lap("diagnosis")
        self.optimizer.zero_grad()
        loss = torch.zeros((), device=self.fabric.device)
        for part in parts:
            loss = loss + self._student_part(views, part, targets, last=part is parts[-1], of=len(parts))
        value = self._agree(loss, step)
        self._finish_gradients(step)
        watch.lap("backward")
        self.optimizer.step()
        state.prototypes.after_step()
        watch.lap("optimiser")
        state.objective.update_center(z_all.mean((0, 1)), state.prototypes)
        momentum = cosine(step, self.total, temperatures.momentum, temperatures.momentum_end)
        update_teacher(state.teacher, state.student, momentum)
        state.prototypes.update_teacher(momentum)
        watch.lap("ema")
        return value, targets

    def _parts(self, n: int) -> list[slice]:
        """This rank's ``n`` images in the parts that go through the student one after the other."""
        size = n // self.config.run.accumulate
        return [slice(i, i + size) for i in range(0, n, size)]

    def _on_device(self, views: list[Tensor], part: slice = slice(None)) -> list[Tensor]:
        return [v[part].to(self.fabric.device, non_blocking=True) for v in views]

    def _student_part(self, views: list[Tensor], part: slice, targets: SoftmaxTargets, last: bool, of: int) -> Tensor:
        """Adds the gradient of one part; returns its share of the loss. Ranks average gradients in the last one.

        Targets, centre and mixture come from the whole batch, so the sum over parts is the gradient of the whole.
        """
        state, watch = self.state, self.watch
        waits = nullcontext() if last or self.fabric.world_size == 1 else self.fabric.no_backward_sync(self.student)
        with waits:
            z_student = self.student(self._on_device(views, part))
            with torch.autocast(self.fabric.device.type, enabled=False):
                some = replace(targets, z=targets.z[:, part])
                temperature = self.config.teacher.student_temperature
                share = state.objective.loss(z_student, some, state.prototypes, temperature) / of
                regulariser = state.prototypes.regulariser() if last else None
            watch.lap("student")
            self.fabric.backward(share if regulariser is None else share + regulariser)
            watch.lap("backward")
        return share.detach()

    def _agree(self, loss: Tensor, step: int) -> float:
        """The mean loss over ranks; a stop asked of one rank reaches all with it."""
        both = torch.stack([loss.detach().float(), loss.new_tensor(float(self.stop_request.asked))])
        if self.fabric.world_size > 1:
            gathered: Any = self.fabric.all_reduce(both, reduce_op="mean")
            both = gathered
        self._check_finite(both, "the loss", step)
        value, asked = both.tolist()
        self.stopping = asked > 0
        return float(value)

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
            f"{self.optimizer.param_groups[0]['lr']:.3g}); {kept}. Try a lower optim.lr, optim.clip 3.0, or "
            f"run.precision 32-true, in a new run; {self.out} keeps everything up to here."
        )

    def _finish_gradients(self, step: int) -> None:
        """Averages the prototypes' gradients over ranks, clips, and freezes the prototypes at first."""
        config = self.config
        if self.fabric.world_size > 1:
            for parameter in self.learned:
                if parameter.grad is not None:
                    parameter.grad = self.fabric.all_reduce(parameter.grad, reduce_op="mean")  # type: ignore[assignment]
        self.precision.unscale_gradients(self.state.optimizer)
        if config.optim.clip:
            clip_each([*self.state.student.parameters(), *self.learned], config.optim.clip)
        if step < round(config.prototypes.freeze_epochs * self.steps_per_epoch):
            for parameter in self.learned:
                parameter.grad = None

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
                for step, views in self._views(start, stop):
                    self.watch.lap("views")
                    self.inside = True
                    self.last_loss, targets = self.step(step, views)
                    self.inside, done = False, step + 1
                    self._after_step(done, stop, targets)
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

    def _after_step(self, done: int, stop: int, targets: SoftmaxTargets) -> None:
        log = self.config.log
        sweep_every = max(1, round(log.sweep_epochs * self.steps_per_epoch))
        if done % log.every_steps == 0 or done == stop:
            self._log(done, targets)
        if done % sweep_every == 0 or done == stop:
            self._sweep(done)
        self._warn(self.alarms.loss(self.last_loss), done)
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

    def _log(self, done: int, targets: SoftmaxTargets) -> None:
        alive = self.monitor.alive()
        if self.log is not None:
            vectors = self.state.prototypes.vectors("teacher")
            self.log.row(
                "step", done, epoch=round(done / self.steps_per_epoch, 4), loss=self.last_loss,
                lr=self.optimizer.param_groups[0]["lr"], alive=alive, nearest_cosine=nearest_cosine(vectors),
                time=time.time(), **assignment_statistics(replace(targets, z=targets.z[0]).dense()),
            )  # fmt: skip
        if self.monitor.window_full:
            self._warn(self.alarms.alive(alive, self.monitor.window), done)

    def _sweep(self, done: int) -> None:
        if self.log is not None:
            unique = self.monitor.sweep(self.state.prototypes.vectors("teacher"))
            self.log.row("sweep", done, epoch=round(done / self.steps_per_epoch, 4), unique=unique)

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
        state = {**state_dicts(self.state), "monitor": self.monitor.state_dict(), "seconds": self.all_seconds()}
        state["loss"], state["images"] = self.last_loss, self.digests
        state["scaler"] = self.precision.state_dict()
        state["config"] = asdict(self.config)
        return save_checkpoint((out or self.out) / "checkpoints", step, state, self.config.log.keep_checkpoints)
