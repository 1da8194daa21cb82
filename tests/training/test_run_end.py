"""Whatever a run accepts it runs to its end: nothing after the training may cost the training."""

import json

import numpy as np
import pytest
from PIL import Image

from uncollapse.cli.main import main
from uncollapse.config.load import load_config
from uncollapse.config.tiny import tiny
from uncollapse.errors import DataError
from uncollapse.training.run import train


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


def noise(path, rng):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(rng.integers(0, 256, (12, 12, 3), dtype=np.uint8)).save(path)


def test_twelve_unlabelled_images_run_to_their_end(tmp_path):
    rng = np.random.default_rng(0)
    for i in range(12):
        noise(tmp_path / "images" / f"{i}.png", rng)
    summary = finished(tmp_path / "run", **{"data.path": str(tmp_path / "images"), "run.batch": 8})
    assert (summary["n_train"], summary["n_held_out"], summary["knn"]) == (10, 2, None)


@pytest.mark.parametrize("most", [1, 5000])
def test_one_held_out_image_is_refused_before_the_first_step(tmp_path, most):
    rng = np.random.default_rng(0)
    for i in range(20):
        noise(tmp_path / "images" / "train" / "a" / f"{i}.png", rng)
    noise(tmp_path / "images" / "val" / "a" / "0.png", rng)
    keys = {"data.path": str(tmp_path / "images"), "data.held_out_max": most, "run.batch": 8}
    with pytest.raises(DataError, match="1 held-out image"):
        finished(tmp_path / "run", **keys)
    assert not (tmp_path / "run").exists()


def test_unreadable_images_of_a_set_that_is_not_in_memory_are_listed_and_cost_no_run(tmp_path):
    rng = np.random.default_rng(0)
    for part, n in (("train", 16), ("val", 12)):
        for i in range(n):
            noise(tmp_path / "images" / part / "ab"[i % 2] / f"{i:02}.png", rng)
    (tmp_path / "images" / "train" / "a" / "02.png").write_bytes(b"junk")
    (tmp_path / "images" / "val" / "b" / "03.png").write_bytes(b"junk")
    keys = {"data.path": str(tmp_path / "images"), "data.memory_gb": 0, "data.workers": 0, "data.max_bad": 0.1}
    summary = finished(tmp_path / "run", **keys, **{"run.batch": 8})  # two steps are one epoch
    assert (summary["steps"], summary["n_held_out"]) == (2, 11)
    listed = (tmp_path / "run" / "bad_images.txt").read_text().splitlines()
    assert ["/val/b/03.png: not an image" in listed[0], "/train/a/02.png: not an image" in listed[1]] == [True, True]


@pytest.mark.parametrize(
    "keys", [{"log.evaluate_train": 7}, {"log.evaluate_train": 1}, {"seed": 5_000_000_000}, {"seed": 2**62}]
)
def test_extreme_settings_run_to_their_end(keys, tmp_path):
    summary = finished(tmp_path / "run", **keys)
    assert summary["steps"] == 2
    assert summary["knn"] is not None
    assert summary["n_bank"] == summary["knn_k"] or summary["knn_k"] == 20


def test_a_long_tail_is_reported_by_classes_too_and_image_by_image(tmp_path):
    """Accuracy beside the mean over classes, and for each held-out image what paired comparisons need."""
    rng = np.random.default_rng(0)
    for name, count in (("common", 40), ("rare", 8)):
        for i in range(count):
            noise(tmp_path / "images" / "train" / name / f"{i}.png", rng)
            if i < 3 + 9 * (name == "common"):
                noise(tmp_path / "images" / "val" / name / f"{i}.png", rng)
    summary = finished(tmp_path / "run", **{"data.path": str(tmp_path / "images"), "run.batch": 8})
    with np.load(tmp_path / "run" / "diagnosis.npz") as arrays:
        right, share = arrays["knn_correct"], arrays["view_information_of_image"]
        assert arrays["linear_correct"].mean() == pytest.approx(summary["linear"])
        assert arrays["knn_balanced_of_image"].mean() == pytest.approx(summary["knn_balanced"])
    assert len(right) == len(share) == summary["n_held_out"] == 15
    assert right.mean() == pytest.approx(summary["knn"])
    assert (right[:12].mean() + right[12:].mean()) / 2 == pytest.approx(summary["knn_balanced"])
    assert share.mean() == pytest.approx(summary["view_information"]["bits"], abs=1e-5)
    assert share.std(ddof=1) / 15**0.5 == pytest.approx(summary["view_information"]["standard_error"], abs=1e-5)
    assert summary["unique_means"] == summary["unique"]
    assert summary["used_by_target"] >= 1
    assert 0 <= summary["target_agreement"] <= 1
