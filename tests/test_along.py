"""The study's script that follows prototypes through a run's checkpoints."""

import importlib.util
from pathlib import Path

from uncollapse.config.load import load_config
from uncollapse.config.tiny import tiny
from uncollapse.training.run import train

SCRIPT = Path(__file__).parent.parent / "study" / "along.py"


def test_prototypes_leave_their_start_as_training_goes_on(tmp_path, capsys):
    spec = importlib.util.spec_from_file_location("along", SCRIPT)
    along = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(along)
    keys = {"prototypes.kind": "decoupled-paper", "log.checkpoint_steps": 5, "log.keep_checkpoints": 9}
    train(tiny(load_config("demo", keys)), tmp_path / "run", 10, say=lambda line: None, accelerator="cpu")
    along.follow(tmp_path / "run")
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if line.split()[0].isdigit()]
    assert [int(row[0]) for row in rows] == [0, 5, 10]
    cosines = [float(row[1]) for row in rows]
    assert cosines[0] == 1 > cosines[1] > cosines[2]
    assert rows[0][2] == "100.0%"
