"""What is typed: it counts, wherever it stands, or is refused in one line that says what was meant."""

import subprocess
import sys

import pytest

from uncollapse.cli.main import main
from uncollapse.config.load import load_config
from uncollapse.config.tiny import load_tiny
from uncollapse.errors import ConfigError


def refused(capsys, *words):
    with pytest.raises(SystemExit) as stop:
        main([str(word) for word in words])
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert error.count("\n") == 1
    return error


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["trian", "demo"], "did you mean train?"),
        (["train", "demo", "--lr", "1e-3"], "did you mean --optim.lr?"),
        (["train", "demo", "--epochs", "3"], "did you mean --run.epochs?"),
        (["demo", "--max-step=x"], "--max-steps"),
        (["train", "demo", "--pototypes", "joint"], "did you mean --prototypes?"),
        (["diagnose", "file.pt", "--quik"], "did you mean --quick?"),
        (["train", "dino-small23"], "did you mean dino-small32?"),
        (["train", "--resume", "RUN", "--optim.lr", "1e-2"], "no config.yaml"),
        (["train", "--optim.lr", "1e-3", "dino-small32"], "--data"),
        (["train", "demo", "--optim.lr", "--tiny"], "--optim.lr needs a value"),
        (["train", "demo", "--seed"], "--seed needs a value"),
        ([], "COMMAND"),
    ],
)
def test_a_slip_is_named(words, expected, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert expected in refused(capsys, *words)


def test_version(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out.startswith("uncollapse 0.")


def test_bad_paths_are_named_before_anything_heavy_is_imported(tmp_path):
    code = (
        "import sys\nfrom uncollapse.cli.main import main\n"
        "try:\n    main(['train', 'dino-small32', '--data', 'nowhere'])\n"
        "except SystemExit as stop:\n    print(stop.code, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["2", "False"]
    assert "nowhere: no such file" in done.stderr


def test_keys_may_stand_before_the_recipe_and_need_no_space(capsys):
    main(["recipe", "--optim.lr=1e-2", "--seed", "7", "demo", "--run.batch", "32"])
    shown = capsys.readouterr().out
    assert "lr: 0.01" in shown
    assert "seed: 7" in shown
    assert "batch: 32" in shown


def test_another_backbone_leaves_the_old_ones_options_behind(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("backbone: {name: conv3, options: {width: 64}}")
    assert load_config(recipe, {"backbone.name": "conv3"}).backbone.options == {"width": 64}
    assert load_config(recipe, {"backbone.name": "resnet18"}).backbone.options == {}
    typed = {"backbone.name": "resnet18", "backbone.options.in_chans": 3}
    assert load_config(recipe, typed).backbone.options == {"in_chans": 3}


def test_a_run_of_another_method_has_a_folder_and_a_title_of_its_own(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = ["train", "demo", "--data", "builtin:digits", "--tiny", "--max-steps", "1", "--device", "cpu"]
    main([*words, "--method.name", "carp", "--prototypes", "decoupled", "--views.local_count", "0"])
    assert "method      carp\nprototypes  64, decoupled" in capsys.readouterr().out
    page = (tmp_path / "runs" / "demo-carp-decoupled-seed0" / "report.html").read_text()
    assert "<h1>carp decoupled on " in page


def test_what_is_typed_wins_over_tiny():
    typed = {"prototypes.count": 100_000, "backbone.name": "resnet18", "run.batch": 48, "data.path": "builtin:digits"}
    config = load_tiny("dino-vits16", typed)
    assert (config.prototypes.count, config.backbone.name, config.run.batch) == (100_000, "resnet18", 48)
    assert config.head.hidden == 64  # not typed, so shrunk
    with pytest.raises(ConfigError, match=r"run\.accumulate"):
        load_tiny("dino-vits16", {"run.accumulate": 64})


@pytest.mark.parametrize(("typed", "queue"), [({"method.queue": 96}, 96), ({"run.batch": 48}, 96), ({}, 64)])
def test_what_is_typed_has_to_fit_the_small_batch(typed, queue, tmp_path):
    """96 rows are no multiple of the recipe's own batch, but of the small one they are; a typed batch has its queue."""
    recipe = tmp_path / "queued.yaml"
    recipe.write_text("method: {name: swav, queue: 3840}\nrun: {batch: 256}\n")
    assert load_tiny(recipe, typed).method.queue == queue
    with pytest.raises(ConfigError, match=r"^--tiny: method\.queue: 50 is not a multiple of run\.batch, 32"):
        load_tiny(recipe, {"method.queue": 50})
