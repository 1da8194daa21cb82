"""Whatever a run accepts it runs to its end: nothing after the training may cost the training."""

import json

import numpy as np
import pytest
from PIL import Image

from uncollapse.cli import main
from uncollapse.config import load_config
from uncollapse.tiny import tiny
from uncollapse.train import train


def finished(out, **keys):
    config = tiny(load_config("demo", {"prototypes.kind": "fixed", **keys}))
    return train(config, out, 2, say=lambda line: None, accelerator="cpu")


def test_one_class_ends_with_a_note_instead_of_a_probe(tmp_path):
    rng = np.random.default_rng(0)
    (tmp_path / "images" / "only").mkdir(parents=True)
    for i in range(30):
        pixels = rng.integers(0, 256, (12, 12, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / "only" / f"{i}.png")
    argv = ["train", "dino-small32", "--tiny", "--data", str(tmp_path / "images"), "--out", str(tmp_path / "run")]
    main([*argv, "--run.batch", "8", "--max-steps", "2", "--device", "cpu"])
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["steps"] == 2
    assert summary["linear"] is None
    assert any("linear" in note and "one class" in note for note in summary["notes"])
    main(["train", "--resume", str(tmp_path / "run"), "--max-steps", "3", "--device", "cpu"])
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["steps"] == 3


@pytest.mark.parametrize(
    "keys", [{"log.evaluate_train": 7}, {"log.evaluate_train": 1}, {"seed": 5_000_000_000}, {"seed": 2**62}]
)
def test_extreme_settings_run_to_their_end(keys, tmp_path):
    summary = finished(tmp_path / "run", **keys)
    assert summary["steps"] == 2
    assert summary["knn"] is not None
    assert summary["n_bank"] == summary["knn_k"] or summary["knn_k"] == 20
