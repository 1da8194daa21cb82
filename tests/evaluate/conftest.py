"""A run folder, stand-ins for the tasks, and what tests of the command share."""

import dataclasses

import pytest
import torch

from uncollapse.config.load import dump_config, load_config
from uncollapse.config.tiny import tiny
from uncollapse.evaluate.catalogue import TASKS
from uncollapse.evaluate.result import Result
from uncollapse.run_folder.checkpoint import save_checkpoint
from uncollapse.training.state import build_state, state_dicts


@pytest.fixture
def run(tmp_path):
    """A run folder of the tiny demo, untrained but for a nudge."""
    config = tiny(load_config("demo", {"data.path": "builtin:digits"}))
    state = build_state(config)
    with torch.no_grad():
        for p in state.teacher.parameters():
            p.add_(0.01 * torch.randn_like(p))
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.yaml").write_text(dump_config(config))
    save_checkpoint(folder / "checkpoints", 7, {"config": dataclasses.asdict(config), **state_dicts(state)}, 1)
    return folder


@pytest.fixture
def tasks(monkeypatch):
    """Stand-ins that say what they were given, so that these tests are of the command and not of the protocols."""
    calls = []

    def stand_in(name):
        def work(context):
            calls.append((name, context))
            n = len(context.test) if context.test is not None else 9
            return Result(name, {"top1": 0.5, "count": 12.0}, (0.4, 0.6), n, f"protocol of {name}", f"source of {name}")

        return work

    for name, task in list(TASKS.items()):
        monkeypatch.setitem(TASKS, name, dataclasses.replace(task, run=stand_in(name)))
    return calls
