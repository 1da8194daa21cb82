"""Prototypes watched in anybody's Lightning run."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch import Callback
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from uncollapse.distributed import gather_ragged, max_over_ranks, world
from uncollapse.measure.monitor import nearest_cosine
from uncollapse.measure.unique import EPSILONS, epsilon_sweep
from uncollapse.measure.usage import prototype_report
from uncollapse.monitoring.layer import Where, locate, vectors_of
from uncollapse.monitoring.metrics import AlivePrototypesMetric, at

Target = str | Callable[[Any, Any], Tensor | None] | None


class PrototypeCallback(Callback):
    """Logs what is left of the prototypes of a `LightningModule`, ours or not.

    ::

        Trainer(callbacks=[PrototypeCallback()])                      # finds the layer, listens to what goes into it
        Trainer(callbacks=[PrototypeCallback(target="projection")])   # a key of what the steps return

    At the end of every training epoch, and every ``every_n_steps`` steps, of the prototypes alone:

    - ``prototypes/unique@0.025`` and at the other ε, ``prototypes/nearest_cosine``;
    - ``prototypes/alive``: how many were the nearest of a training image within the last ``window`` steps.

    At the end of every validation, of the last ``queue_length`` images of the first validation loader:

    - ``prototypes/used``, ``prototypes/unique_among_used@ε``, ``prototypes/effective@ε``, and ``prototypes/n``, which
      these are to be read with;
    - ``prototypes/effective_rank`` of the projections;
    - ``prototypes/view_information`` in bits and ``prototypes/view_information_error``, where ``target`` gives views.

    A run without validation has these of its training images, as ``prototypes/train/used`` and so on. Numbers are those
    of all ranks, equal on each. What cannot be measured is told once, and never stops the run.

    Args:
        name: what the keys begin with; one callback for each set of prototypes.
        target: where a step's projections are: a key of what it returns, or of its batch, or a function of both
            (``outputs, batch``) → tensor. ``(n, D)``; or ``(V, n, D)``, of V ≥ 2 views of the same images. None: what
            goes into the layer of the prototypes, of its first call in each step; `alive` is counted on that, too,
            where training steps do not have the target.
        queue_length: images whose projections are kept, over all ranks.
        target_shape: shape of one projection, where it is not ``(D,)``: the last dimensions of ``target``.
        prototypes: as `prototypes_of` takes it: a path, a layer, a matrix, a function of the module; None: by name.
        epsilons: cosine distances, at least one.
        window: steps; 0: ``20 · K / rows``.
        every_n_steps: 0: only at the end of an epoch.

    Raises:
        ValueError: at the start of the run, if there are no prototypes, or nothing to listen to and no ``target``.
    """

    def __init__(
        self,
        name: str = "prototypes",
        target: Target = None,
        queue_length: int = 4096,
        target_shape: int | Sequence[int] | None = None,
        prototypes: Where = None,
        epsilons: Sequence[float] = EPSILONS,
        window: int = 0,
        every_n_steps: int = 0,
    ) -> None:
        super().__init__()
        if queue_length < 4 or not epsilons or every_n_steps < 0 or window < 0:
            raise ValueError(
                "need queue_length ≥ 4, one of epsilons, every_n_steps ≥ 0 and window ≥ 0: "
                f"{queue_length}, {list(epsilons)}, {every_n_steps}, {window}"
            )
        self.name, self.target, self.prototypes = name, target, prototypes
        self.queue_length, self.epsilons = queue_length, tuple(epsilons)
        self.window, self.every_n_steps = window, every_n_steps
        shape = (target_shape,) if isinstance(target_shape, int) else target_shape
        self.target_shape = None if shape is None else tuple(shape)
        self.alive: AlivePrototypesMetric | None = None
        self._saved: dict[str, Any] = {}
        self._place: nn.Module | Tensor | Callable[[Any], Tensor] | None = None
        self._hook: Any = None
        self._heard: Tensor | None = None
        self._queue: deque[Tensor] = deque()
        self._logged_at = 0
        self._told: set[str] = set()

    # --- when ---------------------------------------------------------------------------------------------

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        self._begin(pl_module)

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        self._begin(pl_module)
        self._queue.clear()

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        self._queue.clear()

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self._heard = None

    def on_validation_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._heard = None

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        z = self._projections(outputs, batch, kept=not trainer.enable_validation)
        if z is not None:
            self._see(z, vectors_of(self._located(), pl_module))
            if not trainer.enable_validation:
                self._keep(z)
        if (
            self.every_n_steps
            and trainer.global_step % self.every_n_steps == 0
            and trainer.global_step != self._logged_at  # several batches make one step where gradients accumulate
        ):
            self._logged_at = trainer.global_step
            pl_module.log_dict(self._of_vectors(pl_module), on_step=True, on_epoch=False)

    def on_validation_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        z = self._projections(outputs, batch, kept=True)
        if z is not None and dataloader_idx == 0:
            self._keep(z)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        numbers = self._of_vectors(pl_module)
        if not trainer.enable_validation:
            numbers |= self._of_projections(pl_module, f"{self.name}/train")
        self._log(pl_module, numbers)

    def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        if not trainer.sanity_checking:
            self._log(pl_module, self._of_projections(pl_module, self.name))

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        if self._hook is not None:
            self._hook.remove()
        self._hook = self._place = self._heard = None
        self._queue.clear()

    # --- what is kept -------------------------------------------------------------------------------------

    @property
    def state_key(self) -> str:
        return f"PrototypeCallback[name={self.name}]"

    def state_dict(self) -> dict[str, Any]:
        return self._saved if self.alive is None else {**self.alive.state_dict(), "window": self.alive.window}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._saved = dict(state_dict)  # until the first step tells K and the device

    def _begin(self, pl_module: Any) -> None:
        if self._place is not None:
            return
        self._place = layer = locate(pl_module, self.prototypes)
        if isinstance(layer, nn.Module) and type(layer).forward is not nn.Module.forward:
            self._hook = layer.register_forward_pre_hook(self._listen)
        elif self.target is None:
            raise ValueError(
                f"PrototypeCallback {self.name!r}: nothing goes through these prototypes that could be listened to; "
                "pass target=, the key of the projections in what training_step and validation_step return"
            )

    def _listen(self, layer: nn.Module, inputs: tuple[Any, ...]) -> None:
        if self._heard is None and inputs and isinstance(inputs[0], Tensor):
            self._heard = inputs[0].detach().flatten(0, -2)

    def _located(self) -> nn.Module | Tensor | Callable[[Any], Tensor]:
        assert self._place is not None
        return self._place

    def _projections(self, outputs: Any, batch: Any, kept: bool) -> Tensor | None:
        """``(V, n, D)``, V = 1 where there are no views; None where a step has none.

        Of those that are not ``kept``, `alive` is counted on what goes into the layer where the target is not there.
        """
        heard, self._heard = self._heard, None
        z = heard if self.target is None else self._of_step(outputs, batch, kept or heard is None)
        if z is None and not kept and heard is not None:
            return heard.unsqueeze(0)
        if z is None:
            return None
        if self.target_shape is not None:
            if tuple(z.shape[-len(self.target_shape) :]) != self.target_shape:
                self._tell(f"projections are {tuple(z.shape)}, which does not end in target_shape {self.target_shape}")
                return None
            z = z.flatten(-len(self.target_shape))
        if z.ndim not in (2, 3) or not z.is_floating_point():
            self._tell(f"projections must be floating (n, D) or (views, n, D), got {z.dtype} {tuple(z.shape)}")
            return None
        return z.detach() if z.ndim == 3 else z.detach().unsqueeze(0)

    def _of_step(self, outputs: Any, batch: Any, needed: bool) -> Tensor | None:
        if callable(self.target):
            return self.target(outputs, batch)
        for where in (outputs, batch):
            if isinstance(where, Mapping) and isinstance(where.get(self.target), Tensor):
                return where[self.target]
        if needed:
            told = [sorted(map(str, x)) if isinstance(x, Mapping) else type(x).__name__ for x in (outputs, batch)]
            self._tell(f"no tensor {self.target!r} in what a step returned ({told[0]}) or in its batch ({told[1]})")
        return None

    def _see(self, z: Tensor, w: Tensor) -> None:
        if z.shape[-1] != w.shape[1]:
            return  # told when they are measured
        if self.alive is None:
            rows = z.shape[1] * (1 if world() is None else torch.distributed.get_world_size())
            window = self._saved.pop("window", 0)
            self.alive = AlivePrototypesMetric(len(w), rows, self.window or window).to(w.device)
            if self._saved and len(self._saved["last_used"]) == len(w):
                self.alive.load_state_dict(self._saved)
        if len(self.alive.last_used) == len(w):
            self.alive.update(z[0], w)

    def _keep(self, z: Tensor) -> None:
        """Puts ``(n, V, D)`` into the queue, and takes out what is too old."""
        self._queue.append(z.transpose(0, 1))
        own = math.ceil(self.queue_length / (1 if world() is None else torch.distributed.get_world_size()))
        while (total := sum(map(len, self._queue))) > own:
            first = self._queue.popleft()
            if total - len(first) < own:
                self._queue.appendleft(first[total - own :])

    # --- what is logged -----------------------------------------------------------------------------------

    def _of_vectors(self, pl_module: Any) -> dict[str, float]:
        w = vectors_of(self._located(), pl_module)
        numbers: dict[str, float] = {}
        try:
            counts = epsilon_sweep(w, self.epsilons)
            numbers = {f"{self.name}/{at('unique', eps)}": float(count) for eps, count in counts.items()}
            numbers[f"{self.name}/nearest_cosine"] = nearest_cosine(w)
        except ValueError as error:
            self._tell(str(error))
        if self.alive is not None:
            numbers[f"{self.name}/alive"] = float(self.alive.compute())
        return numbers

    def _of_projections(self, pl_module: Any, prefix: str) -> dict[str, float]:
        w, group = vectors_of(self._located(), pl_module), world()
        rows = torch.tensor([sum(map(len, self._queue))], device=w.device)
        if int(max_over_ranks(-rows, group)) == 0:  # the fewest of any rank
            what = "returned projections" if self.target is not None else "used the layer of the prototypes"
            where = "target=, or prototypes= for the layer that is used there"
            self._tell(f"no step {what} (on some rank), so the use of prototypes is not measured; pass {where}")
            return {}
        z = gather_ragged(torch.cat(list(self._queue)), group)
        self._queue.clear()
        usable = z.isfinite().flatten(1).all(1) & (z.abs().amax(-1) > 0).all(1)
        if bad := int((~usable).sum()):
            self._tell(f"{bad} of {len(z)} images have projections that are zero or not finite; these are left out")
        z = z[usable].transpose(0, 1).to(w.device)
        views = z if len(z) > 1 and z.shape[1] >= 4 else None
        try:
            report = prototype_report(w, z[0], views, epsilons=self.epsilons)
        except ValueError as error:
            self._tell(str(error))
            return {}
        numbers: dict[str, float] = {"n": report.n, "used": report.used, "effective_rank": report.effective_rank}
        for eps in self.epsilons:
            numbers[at("unique_among_used", eps)] = report.unique_used[eps]
            numbers[at("effective", eps)] = report.effective[eps]
        if (information := report.view_information) is not None:
            numbers["view_information"] = information.bits
            numbers["view_information_error"] = information.standard_error
        return {f"{prefix}/{key}": float(value) for key, value in numbers.items()}

    def _log(self, pl_module: Any, numbers: dict[str, float]) -> None:
        # Equal on all ranks already; Lightning warns where it is not told to reduce what it takes for a rank's own.
        pl_module.log_dict(numbers, on_step=False, on_epoch=True, sync_dist=world() is not None)

    def _tell(self, what: str) -> None:
        if what not in self._told:
            rank_zero_warn(f"PrototypeCallback {self.name!r}: {what}")
        self._told.add(what)
