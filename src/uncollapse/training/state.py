"""What a run trains: student, teacher, prototypes, objective and optimiser, built from the configuration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from uncollapse.config.schema import Config, targets_of
from uncollapse.errors import ConfigError
from uncollapse.methods.dino import DINO
from uncollapse.models.network import Encoder, build_encoder
from uncollapse.prototypes.build import initial_prototypes
from uncollapse.prototypes.sets import Prototypes
from uncollapse.training.optim import build_optimizer


@dataclass
class TrainState:
    """Everything a checkpoint holds besides the step."""

    student: Encoder
    teacher: Encoder
    prototypes: Prototypes
    objective: DINO
    optimizer: torch.optim.Optimizer

    def to(self, device: torch.device) -> TrainState:
        for module in (self.student, self.teacher, self.prototypes, self.objective):
            module.to(device)
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
        raise ConfigError(
            f"the model cannot be built: {' '.join(str(error).split()) or type(error).__name__}"
        ) from None


def _built(config: Config) -> TrainState:
    student = build_encoder(config, drop_path=True)
    teacher = build_encoder(config, drop_path=False)
    teacher.load_state_dict(student.state_dict())
    teacher.requires_grad_(False)
    assert_separate(student, teacher)
    prototypes = initial_prototypes(config)
    objective = DINO(config.prototypes.count, config.teacher.center_momentum, targets_of(config.prototypes))
    return TrainState(student, teacher, prototypes, objective, build_optimizer(config, student, prototypes))


@torch.no_grad()
def refuse_misfit(state: TrainState, config: Config) -> None:
    """Tries one image of each size before any training; leaves the state as it is.

    Raises:
        ConfigError: the encoder does not take views of these sizes.
    """
    views = config.views
    sizes = [views.global_size, *([views.local_size] if views.local_count else [])]
    encoder = state.teacher.eval()
    try:
        for size in sizes:
            try:
                encoder([torch.zeros(2, 3, size, size)])
            except Exception as error:
                raise ConfigError(
                    f"backbone.name: {config.backbone.name} does not take views of {size} pixels "
                    f"({' '.join(str(error).split())[:200]}); change views.global_size or views.local_size"
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
        "teacher": state.teacher.state_dict(),
        "prototypes": {"cls": state.prototypes.state_dict()},
        "objective": state.objective.state_dict(),
        "optimizer": state.optimizer.state_dict(),
    }


def load_state_dicts(state: TrainState, saved: dict[str, Any]) -> None:
    """Raises :class:`ConfigError` when the checkpoint belongs to another configuration."""
    try:
        state.student.load_state_dict(saved["student"])
        state.teacher.load_state_dict(saved["teacher"])
        state.prototypes.load_state_dict(saved["prototypes"]["cls"])
        state.objective.load_state_dict(saved["objective"])
        state.optimizer.load_state_dict(saved["optimizer"])
    except (RuntimeError, KeyError, ValueError) as error:
        raise ConfigError(f"the checkpoint does not fit config.yaml: {str(error).splitlines()[0]}") from None


def non_finite(state: TrainState) -> list[str]:
    """Names of tensors of the state that hold NaN or infinity."""
    modules = {
        "student": state.student,
        "teacher": state.teacher,
        "prototypes": state.prototypes,
        "objective": state.objective,
    }
    named: list[tuple[str, Tensor]] = [
        (f"{m}.{n}", t) for m, module in modules.items() for n, t in module.state_dict().items()
    ]
    return [name for name, tensor in named if tensor.is_floating_point() and not tensor.isfinite().all()]
