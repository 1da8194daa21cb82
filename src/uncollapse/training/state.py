"""What a run trains: student, teacher, sets of prototypes, memory and optimiser, built from the configuration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from uncollapse.config.facts import has_teacher
from uncollapse.config.schema import Config
from uncollapse.errors import ConfigError
from uncollapse.measure.monitor import PrototypeMonitor
from uncollapse.methods.balance import balance_memory
from uncollapse.methods.contract import Memory, Parts, method_of
from uncollapse.models.network import Encoder, build_encoder
from uncollapse.prototypes.build import initial_prototypes
from uncollapse.prototypes.sets import Prototypes
from uncollapse.shown import in_words
from uncollapse.training.optim import build_optimizer


@dataclass
class TrainState:
    """Everything a checkpoint holds besides the step. Sets, memory and what else has several are keyed by name."""

    student: Encoder
    teacher: Encoder | None
    """None where the method has none; targets come from the student then."""
    sets: nn.ModuleDict
    memory: Memory
    optimizer: torch.optim.Optimizer
    parts: Parts
    monitors: dict[str, PrototypeMonitor]
    """One for each set."""

    @property
    def evaluated(self) -> Encoder:
        """The network that is looked at: the teacher, or the student where there is none."""
        return self.student if self.teacher is None else self.teacher

    def prototypes(self, name: str = "cls") -> Prototypes:
        return self.by_name[name]

    @property
    def by_name(self) -> dict[str, Prototypes]:
        """The sets with their type, as methods take them."""
        return cast(dict[str, Prototypes], dict(self.sets.items()))

    def to(self, device: torch.device) -> TrainState:
        for module in (self.student, self.teacher, self.sets, *self.monitors.values()):
            if module is not None:
                module.to(device)
        self.memory = {name: tensor.to(device) for name, tensor in self.memory.items()}
        return self


def build_state(config: Config) -> TrainState:
    """A fresh state on the CPU.

    Raises:
        ConfigError: a backbone, head or set of prototypes that cannot be built.
    """
    try:
        return _built(config)
    except ConfigError:
        raise
    except Exception as error:  # memory, or sizes that a backbone's constructor cannot work with
        raise ConfigError(f"the model cannot be built: {in_words(error)}") from None


def _built(config: Config) -> TrainState:
    method = method_of(config)
    parts = method.parts(config)
    student = build_encoder(config, drop_path=True)
    teacher = build_encoder(config, drop_path=False) if has_teacher(config) else None
    if teacher is not None:
        teacher.load_state_dict(student.state_dict())
        teacher.requires_grad_(False)
        assert_separate(student, teacher)
    sets = nn.ModuleDict(
        {name: initial_prototypes(config, i, len(parts.levels(name)), name) for i, name in enumerate(parts.names())}
    )
    optimizer = build_optimizer(config, student, sets)
    window = config.log.alive_window
    monitors = {name: PrototypeMonitor(config.prototypes.count, config.run.batch, window) for name in sets}
    memory = {**method.memory(config), **balance_memory(config, parts)}
    return TrainState(student, teacher, sets, memory, optimizer, parts, monitors)


@torch.no_grad()
def refuse_misfit(state: TrainState, config: Config) -> None:
    """Tries one image of each size before any training; leaves the state as it is.

    Raises:
        ConfigError: the encoder does not take views of these sizes.
    """
    views = config.views
    sizes = [views.global_size, *([views.local_size] if views.local_count else [])]
    encoder = state.evaluated.eval()
    try:
        for size in sizes:
            try:
                encoder([torch.zeros(2, 3, size, size)])
            except Exception as error:
                raise ConfigError(
                    f"backbone.name: {config.backbone.name} does not take views of {size} pixels "
                    f"({in_words(error)[:200]}); change views.global_size or views.local_size"
                ) from None
    finally:
        encoder.train()


def assert_separate(student: nn.Module, teacher: nn.Module) -> None:
    """Checks that no storage is shared: a teacher that *is* the student keeps the loss at ln K for ever.

    Raises:
        RuntimeError: naming the first shared parameter.
    """
    ours = {p.untyped_storage().data_ptr() for p in student.parameters()}
    for name, parameter in teacher.named_parameters():
        if parameter.untyped_storage().data_ptr() in ours:
            raise RuntimeError(f"the teacher's {name} shares its storage with the student: copy it")


def state_dicts(state: TrainState) -> dict[str, Any]:
    return {
        "student": state.student.state_dict(),
        **({} if state.teacher is None else {"teacher": state.teacher.state_dict()}),
        "prototypes": {name: module.state_dict() for name, module in state.sets.items()},
        "memory": dict(state.memory),
        "optimizer": state.optimizer.state_dict(),
        "monitor": {name: monitor.state_dict() for name, monitor in state.monitors.items()},
    }


def load_state_dicts(state: TrainState, saved: dict[str, Any]) -> None:
    """Raises :class:`ConfigError` when the checkpoint belongs to another configuration."""
    try:
        state.student.load_state_dict(saved["student"])
        if state.teacher is not None:
            state.teacher.load_state_dict(saved["teacher"])
        for name, module in state.sets.items():
            module.load_state_dict(saved["prototypes"][name])
        memory: dict[str, Tensor] = saved["memory" if "memory" in saved else "objective"]  # its name of before
        for name, tensor in state.memory.items():
            if memory[name].shape != tensor.shape:
                raise ValueError(f"{name} has the shape {tuple(memory[name].shape)}, not {tuple(tensor.shape)}")
            tensor.copy_(memory[name])
        state.optimizer.load_state_dict(saved["optimizer"])
        watched = saved["monitor"]  # there was one, without a name, before
        for name, monitor in state.monitors.items():
            monitor.load_state_dict(watched.get(name, watched))
    except (RuntimeError, KeyError, ValueError, AttributeError, TypeError) as error:
        raise ConfigError(f"the checkpoint does not fit config.yaml: {str(error).splitlines()[0]}") from None


def non_finite(state: TrainState) -> list[str]:
    """Names of tensors of the state that hold NaN or infinity."""
    modules = {"student": state.student, "teacher": state.teacher, "prototypes": state.sets}
    named: list[tuple[str, Tensor]] = [
        (f"{m}.{n}", t) for m, module in modules.items() if module is not None for n, t in module.state_dict().items()
    ]
    named += [(f"memory.{n}", t) for n, t in state.memory.items()]
    return [name for name, tensor in named if tensor.is_floating_point() and not tensor.isfinite().all()]
