"""A run that leaves another one in mid-run with a way of its own to learn prototypes: cause, not correlation.

Everything else goes on as it was: encoder, teacher, optimiser, clock, order of images. With the same way to learn
prototypes it is the other run, to the bit.
"""

from __future__ import annotations

from pathlib import Path

from uncollapse.config.load import build_config
from uncollapse.config.schema import Config
from uncollapse.errors import CheckpointError, ConfigError
from uncollapse.prototypes.build import carry_over
from uncollapse.run_folder.checkpoint import load_checkpoint
from uncollapse.training.resume import check_same_run, refuse_foreign
from uncollapse.training.state import TrainState, build_state, load_state_dicts


def branch_off(state: TrainState, config: Config, digests: dict[str, str]) -> list[str]:
    """Puts ``state`` where the run ``change.branch`` was at step ``change.branch_step``; lines about what differs.

    Prototypes learned in the same way go on with all they have; others start from where the prototypes are.

    Raises:
        CheckpointError: no checkpoint of that step.
        ConfigError: a run of another configuration or other images, prototypes and ``log`` aside.
    """
    folder, step = Path(config.change.branch), config.change.branch_step
    saved = load_checkpoint(folder / "checkpoints", step)
    if saved is None:
        raise CheckpointError(f"{folder}: no checkpoint of step {step} to branch off; train it up to there")
    refuse_foreign(saved, folder)
    then = build_config(saved["config"], "the checkpoint's configuration")
    if then.prototypes.count != config.prototypes.count:
        raise ConfigError(
            f"prototypes.count: {config.prototypes.count:,}, but {folder} has {then.prototypes.count:,}; "
            "a branch has as many"
        )
    notes = check_same_run(config, digests, saved, ("prototypes.", "change."))
    trunk = build_state(then)
    load_state_dicts(trunk, saved)
    state.student.load_state_dict(trunk.student.state_dict())
    if state.teacher is not None and trunk.teacher is not None:
        state.teacher.load_state_dict(trunk.teacher.state_dict())
    for name, tensor in state.memory.items():
        if name in trunk.memory and trunk.memory[name].shape == tensor.shape:
            tensor.copy_(trunk.memory[name])
    parameters = list(zip(trunk.student.parameters(), state.student.parameters(), strict=True))
    for name, prototypes in state.by_name.items():
        parameters += carry_over(trunk.by_name[name], prototypes)
        state.monitors[name].load_state_dict(trunk.monitors[name].state_dict())
    of_trunk, optimizer = trunk.optimizer.state, state.optimizer.state_dict()
    place = {p: i for i, p in enumerate(p for group in state.optimizer.param_groups for p in group["params"])}
    optimizer["state"] = {place[new]: of_trunk[old] for old, new in parameters if new in place and old in of_trunk}
    state.optimizer.load_state_dict(optimizer)
    return notes
