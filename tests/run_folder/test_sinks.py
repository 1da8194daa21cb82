"""Metrics as a CSV table and in Weights & Biases, beside ``metrics.jsonl``."""

import csv
import importlib.util
import sys
import types

import pytest

from uncollapse.config.load import load_config
from uncollapse.config.tiny import tiny
from uncollapse.errors import ConfigError
from uncollapse.run_folder.log import read_rows
from uncollapse.training.run import train


def run(out, steps, resume=False, **keys):
    config = tiny(load_config("demo", {"prototypes.kind": "fixed", **keys}))
    return train(config, out, steps, resume, say=lambda line: None, accelerator="cpu")


class Project:
    """Stands in for the package: keeps what it is told."""

    def __init__(self):
        self.inits, self.logged, self.finished = [], [], 0

    def module(self):
        module = types.ModuleType("wandb")
        module.__spec__ = importlib.util.spec_from_loader("wandb", None)
        module.init = self.init
        return module

    def init(self, **named):
        self.inits.append(named)
        return self

    def log(self, scalars, step):
        if step == 3:
            raise ConnectionError("no network")
        self.logged.append((step, scalars))

    def finish(self):
        self.finished += 1


def test_csv_holds_what_the_json_lines_hold_also_after_a_resume(tmp_path):
    run(tmp_path / "run", 4, **{"log.csv": True})
    (tmp_path / "run" / "metrics.csv").unlink()  # it is made anew from the rows
    run(tmp_path / "run", 6, True, **{"log.csv": True})
    with (tmp_path / "run" / "metrics.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    rows = [r for r in read_rows(tmp_path / "run" / "metrics.jsonl") if r["kind"] in ("step", "sweep")]
    assert [int(line["step"]) for line in table] == [r["step"] for r in rows]
    losses = [float(line["step/loss"]) for line in table if line["step/loss"]]
    assert losses == [r["loss"] for r in rows if r["kind"] == "step"]
    assert len(losses) == 6
    assert next(line for line in table if line["sweep/unique/0.025"])["sweep/unique/0.025"] == "64"


def test_wandb_gets_the_scalars_and_its_failure_costs_no_training(tmp_path, monkeypatch):
    project = Project()
    monkeypatch.setitem(sys.modules, "wandb", project.module())
    run(tmp_path / "run", 2, **{"log.wandb": "prototypes"})
    assert [step for step, _ in project.logged] == [0, 1, 2, 2]  # sweeps at the start and the end
    assert project.logged[1][1]["step/loss"] > 0
    assert project.inits[0]["project"] == "prototypes"
    assert project.inits[0]["config"]["prototypes"]["kind"] == "fixed"
    assert project.finished == 1
    with pytest.warns(UserWarning, match="WeightsAndBiases stops at step 3: no network"):
        assert run(tmp_path / "run", 4, True, **{"log.wandb": "prototypes"})["steps"] == 4
    assert project.inits[1]["id"] == project.inits[0]["id"]


def test_wandb_that_is_not_installed_is_said_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'uncollapse\[wandb\]'"):
        run(tmp_path / "run", 1, **{"log.wandb": "prototypes"})
    assert not (tmp_path / "run").exists()
