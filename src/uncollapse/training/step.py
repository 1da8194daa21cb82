"""One training step, in the order the contract fixes; the loop around it knows no method."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from uncollapse.config.facts import frozen
from uncollapse.distributed import gather_ragged, gather_rows, sum_over_ranks, world
from uncollapse.methods.balance import balanced, remember_balance
from uncollapse.methods.contract import At, Batch, Seen, Targets, method_of, part_of
from uncollapse.models.network import Encoder
from uncollapse.models.sync_norm import convert
from uncollapse.schedules import cosine, linear
from uncollapse.training.job import Job
from uncollapse.training.observed import observed, watched
from uncollapse.training.optim import clip_gradients, update_teacher
from uncollapse.training.state import TrainState
from uncollapse.training.stopwatch import Stopwatch


class Done(NamedTuple):
    """What a step leaves to be logged."""

    loss: float
    """Sum of the method's terms, mean over ranks; without what pushes prototypes apart."""
    terms: dict[str, float]
    """Every term by name; beside the method's, regularisers (``regulariser/SET``) and the loss of a set's own learner
    (``own/SET``)."""
    targets: Targets
    asked: bool
    """Whether some rank was asked to stop."""


class Stepper:
    """Takes the steps of one run."""

    def __init__(
        self, job: Job, state: TrainState, watch: Stopwatch, check_finite: Callable[[Tensor, str, int], None]
    ) -> None:
        self.job, self.config, self.method = job, job.config, method_of(job.config)
        self.state, self.watch, self.check_finite = state, watch, check_finite
        self.fabric = fabric = job.fabric
        if fabric.world_size > 1:
            for encoder in (state.student, state.teacher):
                if encoder is not None:
                    _synchronise(encoder, fabric.device)
        self.student = fabric.setup_module(state.student)
        optimizer: Any = fabric.setup_optimizers(state.optimizer)
        self.optimizer: torch.optim.Optimizer = optimizer
        self.precision = fabric.strategy.precision  # holds the gradient scaler of 16-mixed
        self.span = round(job.config.run.schedule_span * job.total)
        """Steps that schedules are planned for."""
        self.learned = [p for p in state.sets.parameters() if p.requires_grad]

    def __call__(self, step: int, batch: Batch, asked: bool) -> Done:
        """Views to updated teacher; ``batch`` has this rank's images, ``asked`` is whether it was asked to stop."""
        config, state, watch, method = self.config, self.state, self.watch, self.method
        at = At(step, self.job.epoch(step), step / self.job.total, config.seed, world())
        self._set_rates(step)
        images = batch.keys.shape[1]
        size = images // config.run.accumulate
        parts = [slice(i, i + size) for i in range(0, images, size)]
        if len(parts) == 1:
            batch = self._on_device(batch)  # once; otherwise part by part, twice
        student = self._see_student(batch) if state.teacher is None else None
        teacher = self._see_teacher(batch, parts, student)
        everyone = _of_all_ranks(teacher)
        watch.lap("teacher")
        for z in everyone.z.values():
            self.check_finite(z, "the teacher's projections", step)
        sets, still = state.by_name, frozen(config, step)
        moving = {} if still == "prototypes" else sets
        for name, prototypes in moving.items():
            levels = state.parts.levels(name)
            every = teacher.every.get(levels[0])
            if every is None or not prototypes.observe_positions(every, at.progress, at.group):
                prototypes.observe(*observed(everyone, levels, prototypes, config, at))
        targets = balanced(config, method.assign(config, teacher, sets, state.memory, at), state.memory, at)
        watch.lap("prototypes")
        for name, monitor in state.monitors.items():
            if sets[name].lasting:
                rows = watched(everyone, state.parts.levels(name)[0], config, at)
                monitor.observe_projections(rows, sets[name].vectors("teacher"))
        watch.lap("diagnosis")
        self.optimizer.zero_grad()
        terms: dict[str, Tensor] = {}
        for part in parts:
            last = part is parts[-1]
            with self._waits(last):
                seen = student or self._see_student(self._on_device(batch.part(part)))
                if len(parts) > 1:
                    of_part = {n: part_of(t, part, teacher.image.get(n)) for n, t in targets.items()}
                else:
                    of_part = targets
                self._learn(seen, of_part, at, len(parts), terms, last)
        terms |= {f"own/{name}": p.own_loss for name, p in moving.items() if p.own_loss is not None}
        done = self._agree(terms, targets, asked, step)
        momentum = self._momentum(step)
        if state.parts.average == "before":
            self._follow(momentum, still)
        self._finish_gradients(step)
        watch.lap("backward")
        if self._gradients_left(still):
            self.optimizer.step()
        for prototypes in moving.values():
            prototypes.after_step()
        watch.lap("optimiser")
        method.remember(config, everyone, sets, state.memory, at)
        remember_balance(config, targets, teacher, state.memory, at)
        if state.parts.average == "after":
            self._follow(momentum, still)
        watch.lap("ema")
        return done

    # --- seeing -----------------------------------------------------------------------------------------

    def _see_student(self, batch: Batch) -> Seen:
        return self.method.see_student(self.config, cast(Encoder, self.student), batch)

    def _see_teacher(self, batch: Batch, parts: list[slice], student: Seen | None) -> Seen:
        state, method, config = self.state, self.method, self.config
        net = state.evaluated
        seen: list[Seen] = []
        with torch.no_grad(), self.fabric.autocast():
            for part in parts:
                images = batch if len(parts) == 1 else self._on_device(batch.part(part).only("global"))
                seen.append(method.see_teacher(config, net, images, student))
        return seen[0] if len(seen) == 1 else _joined(seen, parts)

    def _on_device(self, batch: Batch) -> Batch:
        return batch.to(self.fabric.device)

    def _waits(self, last: bool) -> AbstractContextManager[None]:
        """Ranks average gradients in a batch's last part alone."""
        alone = last or self.fabric.world_size == 1
        return nullcontext() if alone else self.fabric.no_backward_sync(self.student)

    # --- learning ---------------------------------------------------------------------------------------

    def _learn(self, seen: Seen, targets: Targets, at: At, of: int, terms: dict[str, Tensor], last: bool) -> None:
        """Adds the gradient of one part of ``of``, and its terms to ``terms``.

        Targets, memory and mixture come from the whole batch, so the sum over parts is the gradient of the whole.
        """
        sets = self.state.by_name
        with torch.autocast(self.fabric.device.type, enabled=False):
            named = self.method.objective(self.config, seen, targets, sets, at)
            named = {name: term / of for name, term in named.items()}
            if last:
                for name, prototypes in sets.items():
                    regulariser = prototypes.regulariser()
                    if regulariser is not None:
                        named[f"regulariser/{name}"] = regulariser
        self.watch.lap("student")
        total = sum(named.values(), torch.zeros((), device=self.fabric.device))
        self.fabric.backward(total)
        self.watch.lap("backward")
        for name, term in named.items():
            terms[name] = terms.get(name, torch.zeros((), device=term.device)) + term.detach()

    def _agree(self, terms: dict[str, Tensor], targets: Targets, asked: bool, step: int) -> Done:
        """Means over ranks; a stop asked of one rank reaches all with them."""
        own = [term for name, term in terms.items() if "/" not in name]
        loss = sum(own[1:], own[0])
        every = torch.stack([loss.float(), loss.new_tensor(float(asked)), *(t.float() for t in terms.values())])
        if self.fabric.world_size > 1:
            gathered: Any = self.fabric.all_reduce(every, reduce_op="mean")
            every = gathered
        self.check_finite(every, "the loss", step)
        value, stop, *rest = every.tolist()
        return Done(value, dict(zip(terms, rest, strict=True)), targets, stop > 0)

    def _finish_gradients(self, step: int) -> None:
        """Averages the prototypes' gradients over ranks, clips, and freezes the prototypes at first."""
        config = self.config
        if self.fabric.world_size > 1:
            for parameter in self.learned:
                if parameter.grad is not None:
                    parameter.grad = self.fabric.all_reduce(parameter.grad, reduce_op="mean")  # type: ignore[assignment]
        self.precision.unscale_gradients(self.state.optimizer)
        clip_gradients(self.state.student, self.state.sets, config.optim)
        if step < round(config.prototypes.freeze_epochs * self.job.steps_per_epoch):
            for parameter in self.learned:
                parameter.grad = None

    def _gradients_left(self, still: str) -> bool:
        """Drops the gradients of what is frozen; whether there are others."""
        if still:
            for parameter in self.learned if still == "prototypes" else self.state.student.parameters():
                parameter.grad = None
        return any(p.grad is not None for group in self.optimizer.param_groups for p in group["params"])

    def _follow(self, momentum: float, still: str) -> None:
        if self.state.teacher is None:
            return
        if still != "encoder":
            update_teacher(self.state.teacher, self.state.student, momentum)
        if still != "prototypes":
            for prototypes in self.state.by_name.values():
                prototypes.update_teacher(momentum)

    def _momentum(self, step: int) -> float:
        teacher = self.config.teacher
        if teacher.momentum_shape == "linear":
            return linear(step, self.span, teacher.momentum, teacher.momentum_end)
        first, warmup = teacher.momentum_start, round(self.config.optim.warmup_epochs * self.job.steps_per_epoch)
        if first is None:
            return cosine(step, self.span, teacher.momentum, teacher.momentum_end)
        return cosine(step, self.span, teacher.momentum, teacher.momentum_end, warmup, first)

    def _set_rates(self, step: int) -> None:
        config, optim = self.config, self.config.optim
        scale, total = config.run.batch / optim.lr_batch, self.span
        warmup = round(optim.warmup_epochs * self.job.steps_per_epoch)
        lr = cosine(step, total, optim.lr * scale, optim.min_lr, warmup, optim.warmup_start * scale)
        decay = cosine(step, total, optim.weight_decay, optim.weight_decay_end)
        for group in self.optimizer.param_groups:
            own = group["role"] == "prototypes"
            group["lr"] = lr * (config.prototypes.lr_scale if own else group.get("lr_scale", 1.0))
            fixed = config.prototypes.weight_decay if own else None
            group["weight_decay"] = 0.0 if group["role"] == "plain" else decay if fixed is None else fixed


def _of_all_ranks(seen: Seen) -> Seen:
    """Views in the order one rank would have them, tokens in rank order."""
    group = world()
    if group is None:
        return seen
    z = {
        name: gather_rows(z.transpose(0, 1), group).transpose(0, 1) if z.ndim > 2 else gather_ragged(z, group)
        for name, z in seen.z.items()
    }
    ranks = torch.distributed.get_world_size(group)
    mean = {name: sum_over_ranks(mean.clone(), group) / ranks for name, mean in seen.mean.items()}
    return Seen(z, key={name: gather_ragged(key, group) for name, key in seen.key.items()}, mean=mean)


def _joined(seen: list[Seen], parts: list[slice]) -> Seen:
    """The whole batch's, of its parts one after the other."""

    def cat(name: str) -> Tensor:
        tensors = [s.z[name] for s in seen]
        return torch.cat(tensors, dim=1 if tensors[0].ndim > 2 else 0)

    image = {n: torch.cat([s.image[n] + p.start for s, p in zip(seen, parts, strict=True)]) for n in seen[0].image}
    weight = {n: torch.cat([s.weight[n] for s in seen]) for n in seen[0].weight}
    key = {n: torch.cat([s.key[n] for s in seen]) for n in seen[0].key}
    mean = {n: torch.stack([s.mean[n] for s in seen]).mean(0) for n in seen[0].mean}
    features = {n: torch.cat([s.features[n] for s in seen], dim=1) for n in seen[0].features}
    place = {n: torch.cat([s.place[n] for s in seen]) for n in seen[0].place}
    every = {n: torch.cat([s.every[n] for s in seen], dim=1) for n in seen[0].every}
    return Seen({name: cat(name) for name in seen[0].z}, weight, image, mean, features, key, place, every)


def _synchronise(encoder: nn.Module, device: torch.device) -> None:
    """Makes batch norms see the batches of all ranks, so that a run does not depend on how many there are."""
    if device.type == "cuda":
        from timm.layers import convert_sync_batchnorm

        convert_sync_batchnorm(encoder)  # timm's keeps the activations that its own norms contain
    else:
        convert(encoder)
