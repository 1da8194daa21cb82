"""How the commands behave towards shells, pipes and programs: completion, JSON, colour, exit status, names."""

from __future__ import annotations

import io
import json
import os
import pty
import queue
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path

import pytest
from rich.console import Console

from made_runs import make_run, make_summary
from uncollapse.cli.grid import Cell, Outcome, follow, write_grid
from uncollapse.cli.main import EXIT_CODES, _parser, main
from uncollapse.config.load import all_keys, load_config, recipe_names
from uncollapse.errors import ConfigError, TrainingError
from uncollapse.evaluate.catalogue import TASKS
from uncollapse.evaluate.names import TASK_NAMES
from uncollapse.run_folder.checkpoint import load_checkpoint

DOCS = Path(__file__).parents[2] / "docs" / "cli.md"
COMMANDS = sorted(_parser()[1])
HEAVY = {"torch", "timm", "numpy", "scipy", "sklearn", "matplotlib", "pyarrow", "lightning", "PIL", "rich"}


def command(*words: str, **more: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, **more}
    return subprocess.run([sys.executable, "-m", "uncollapse", *words], capture_output=True, text=True, env=environment)


def said(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    main([*words])
    return capsys.readouterr().out


# ------------------------------------------------------------------------------------------------ help


def test_help_of_every_command_loads_nothing_heavy() -> None:
    code = (
        "import sys, uncollapse.cli.main\n"
        f"for words in {[[], *([name] for name in COMMANDS)]!r}:\n"
        "    try: uncollapse.cli.main.main([*words, '--help'])\n"
        "    except SystemExit as stop: assert not stop.code\n"
        "print('loaded', *{name.partition('.')[0] for name in sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = done.stdout.rpartition("loaded")[2].split()
    assert "pydantic" in loaded
    assert not HEAVY & set(loaded)


# ------------------------------------------------------------------------------------------- completion


@pytest.fixture(scope="module")
def scripts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder, made = tmp_path_factory.mktemp("completion"), {}
    for shell in ("bash", "zsh", "fish"):
        made[shell] = folder / shell
        made[shell].write_text(command("completion", shell).stdout)
    return made


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_script_has_every_command_and_option(shell: str, scripts: dict[str, Path]) -> None:
    text, (_, parsers) = scripts[shell].read_text(), _parser()
    dashes = "-l " if shell == "fish" else "--"
    for name, parser in parsers.items():
        assert re.search(rf"\b{name}\b", text)
        for option in re.findall(r"--([a-z][a-z-]*)", parser.format_usage()):
            assert f"{dashes}{option}" in text
    for key in all_keys():
        assert f"{dashes}{key}" in text


def test_a_script_is_understood_by_its_shell(scripts: dict[str, Path]) -> None:
    tried = [shell for shell in scripts if shutil.which(shell)]
    for shell in tried:
        subprocess.run([shell, "-n", str(scripts[shell])], check=True)
    if not tried:
        pytest.skip("none of bash, zsh and fish is installed")


COMPLETED = [
    ("uncollapse tra", ["train"]),
    ("uncollapse train dino-sm", ["dino-small32"]),
    ("uncollapse train demo --optim.l", ["--optim.layer_decay", "--optim.lr", "--optim.lr_batch"]),
    ("uncollapse train demo --prototypes fix", None),
    ("uncollapse evaluate RUN --tasks knn li", ["linear"]),
    ("uncollapse export RUN --to ti", ["timm"]),
    ("uncollapse export RUN --si", ["--side"]),
]


@pytest.mark.parametrize(("line", "expected"), COMPLETED)
@pytest.mark.parametrize("shell", ["bash", "fish"])
def test_what_tab_offers(shell: str, line: str, expected: list[str] | None, scripts: dict[str, Path]) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    ask = f"source {scripts[shell]}; "
    if shell == "bash":
        ask += f"COMP_WORDS=({line}); COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1)); _uncollapse; "
        ask += "printf '%s\\n' \"${COMPREPLY[@]}\""
    else:
        ask += f"complete -C '{line}'"
    done = subprocess.run([shell, "-c", ask], capture_output=True, text=True, cwd=scripts[shell].parent)
    offered = sorted(entry.partition("\t")[0] for entry in done.stdout.split("\n") if entry)
    if expected is None:
        assert {"fixed", "fixed-sinkhorn"} <= set(offered)
        assert all(name.startswith("fix") for name in offered)
    else:
        assert offered == expected


def test_names_of_tasks_are_those_of_the_catalogue() -> None:
    assert tuple(TASKS) == TASK_NAMES


# ------------------------------------------------------------------------------------------------- JSON


def test_every_command_has_json_and_the_documentation_says_what(capsys: pytest.CaptureFixture[str]) -> None:
    _, parsers = _parser()
    with_json = {name for name, parser in parsers.items() if "--json" in parser.format_usage()}
    assert with_json == set(parsers) - {"completion"}
    table = DOCS.read_text().partition("## For programs")[2].partition("##")[0]
    assert {
        name for row in re.findall(r"^\| (`.+?) \|", table, re.M) for name in re.findall(r"`(\w+)`", row)
    } == with_json


def test_recipes_and_reports_as_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    listed = json.loads(said(capsys, "recipes", "--json"))
    assert [row["name"] for row in listed] == recipe_names()
    assert {"method": "swav", "mode": "joint"}.items() <= next(r for r in listed if r["name"] == "swav-small32").items()
    recipe = json.loads(said(capsys, "recipe", "demo", "--optim.lr", "0.5", "--json"))
    assert recipe["optim"]["lr"] == 0.5
    run = make_run(tmp_path, "joint")
    of_run = json.loads(said(capsys, "report", str(run), "--out", str(tmp_path / "r.html"), "--json"))
    assert of_run[0]["summary"]["prototypes"] == 256
    assert (tmp_path / "r.html").is_file()


def test_training_prints_one_json_value_and_all_else_on_stderr(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["train", "demo", "--tiny", "--max-steps", "1", "--device", "cpu", "--out", str(tmp_path / "run")]
    main([*words, "--json"])
    out, err = capsys.readouterr()
    assert json.loads(out)["steps"] == 1
    assert json.loads(out)["run"] == str(tmp_path / "run")
    assert "prototypes  64, joint" in err


def test_a_comparison_as_json(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cells = [Cell(arm, load_config("demo"), make_run(tmp_path / "runs", arm)) for arm in ("joint", "fixed")]
    trained = Outcome(
        {"joint": make_summary("joint", loss=float("nan"), knn_k=20, n_bank=100)}, {"fixed": "it fell over"}
    )
    monkeypatch.setattr("uncollapse.cli.grid.run_grid", lambda *_: trained)
    with pytest.raises(TrainingError, match="1 of 2 runs failed"):
        write_grid(cells, tmp_path, None, 1, [], "again", "title", as_json=True)
    out, err = capsys.readouterr()
    value = json.loads(out)
    assert [(arm["name"], arm["loss"], arm["run"]) for arm in value["arms"]] == [("joint", None, str(cells[0].out))]
    assert value["failed"] == {"fixed": "it fell over"}
    assert "2 runs" in err


# ------------------------------------------------------------------------------------- colour and pipes


def on_a_terminal(*words: str, **more: str) -> str:
    """What a command writes on a terminal."""
    parent, child = pty.openpty()
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "80", **more}
    process = subprocess.Popen(
        [sys.executable, "-m", "uncollapse", *words], stdout=child, stderr=child, env=environment
    )
    os.close(child)
    text = b""
    while True:
        try:
            part = os.read(parent, 4096)
        except OSError:  # Linux's way to say that the other end is closed
            break
        if not part:
            break
        text += part
    os.close(parent)
    assert process.wait() == 0
    return text.decode()


COLOUR = re.compile(r"\x1b\[[0-9;]*(3[0-7]|38;|9[0-7])[0-9;]*m")


def test_no_colour_where_it_is_unwanted_and_no_escapes_in_a_pipe(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    matrix = str(make_matrix(tmp_path))
    wanted = on_a_terminal("diagnose", matrix, NO_COLOR="1")
    assert "unique" in wanted
    assert not COLOUR.search(wanted)
    assert "\x1b" not in (piped := said(capsys, "diagnose", matrix))
    assert "unique" in piped


def make_matrix(folder: Path) -> Path:
    import numpy as np

    np.save(folder / "w.npy", np.random.default_rng(0).normal(size=(64, 16)).astype(np.float32))
    return folder / "w.npy"


@pytest.mark.parametrize("words", [["recipe", "demo"], ["recipes"], ["diagnose", "FILE"]])
def test_a_reader_that_leaves_is_no_error(words: list[str], tmp_path: Path) -> None:
    words = [str(make_matrix(tmp_path)) if word == "FILE" else word for word in words]
    process = subprocess.Popen(
        [sys.executable, "-m", "uncollapse", *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait() == 0


# ------------------------------------------------------------------------------------------ exit status


def test_the_documented_exit_statuses_are_the_programs() -> None:
    table = DOCS.read_text().partition("## Exit status")[2].partition("##")[0]
    assert {int(code): text for code, text in re.findall(r"^\| (\d+) \| (.+) \|$", table, re.M)} == EXIT_CODES


@pytest.mark.parametrize(
    ("words", "status"),
    [
        (["recipes", "--names"], 0),
        (["diagnose", "COLLAPSED", "--fail-under", "0.9"], 1),
        (["train", "demo", "--optim.lr", "fast"], 2),
        (["train", "swav-small32", "--prototypes", "joint-centred", "--data", "builtin:digits"], 3),
    ],
)
def test_each_status_is_what_a_command_ends_with(
    words: list[str], status: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import numpy as np

    np.save(tmp_path / "one.npy", np.ones((64, 16), np.float32))
    words = [str(tmp_path / "one.npy") if word == "COLLAPSED" else word for word in words]
    assert exit_status(words) == status
    assert capsys.readouterr().err.count("\n") == (status != 0)


def exit_status(words: list[str]) -> int:
    try:
        main(words)
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def test_ctrl_c_is_130_without_a_traceback(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("uncollapse.cli.recipes.recipe_names", interrupted)
    with pytest.raises(SystemExit) as stop:
        main(["recipes", "--names"])
    assert stop.value.code == 130
    assert capsys.readouterr().err == ""


def test_ctrl_c_ends_training_with_the_command_that_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    @contextmanager
    def bar(*_: object) -> Iterator[tuple[Callable[[str], None], Callable[[int, int, float], None]]]:
        yield print, lambda done, total, loss: signal.raise_signal(signal.SIGINT) if done == 2 else None

    monkeypatch.setattr("uncollapse.progress.training_bar", bar)
    out = str(tmp_path / "run")
    assert exit_status(["train", "demo", "--tiny", "--device", "cpu", "--out", out]) == 130
    assert f"stopped at step 3; continue with: uncollapse train --resume {out}" in capsys.readouterr().out
    saved = load_checkpoint(tmp_path / "run" / "checkpoints")
    assert saved is not None
    assert saved["step"] == 3


def test_ctrl_c_ends_a_comparison_between_two_messages() -> None:
    """Within one, the manager's answer would be left for the next question."""
    asked = iter([False, True])
    console = Console(file=io.StringIO())
    with pytest.raises(KeyboardInterrupt):
        follow({Future(): "joint"}, queue.Queue(), console, lambda: next(asked))


# ------------------------------------------------------------------------------------------------ names


@pytest.mark.parametrize(
    ("words", "meant"),
    [
        (["exprot"], "export"),
        (["train", "dino-smal32"], "dino-small32"),
        (["train", "demo", "--prototypes", "decopled"], "decoupled"),
        (["train", "demo", "--prototypes.kind", "jiont"], "joint"),
        (["train", "demo", "--method.name", "ibto"], "ibot"),
        (["train", "demo", "--optim.name", "adamv"], "adamw"),
        (["train", "demo", "--optimm.lr", "1"], "optim"),
        (["train", "demo", "--device", "cdua"], "cuda"),
        (["train", "demo", "--backbone.name", "vit_tny_patch16_224", "--tiny", "--out", "OUT"], "vit_tiny_patch16_224"),
        (["demo", "--arms", "fixd"], "fixed"),
        (["compare", "--recipes", "demoo", "--out", "OUT"], "demo"),
        (["compare", "--recipes", "demo", "--out", "OUT", "--sweep", "optim.lrr=1,2"], "lr"),
        (["evaluate", "RUN", "--tasks", "linaer"], "linear"),
        (["evaluate", "RUN", "--side", "techer"], "teacher"),
        (["export", "RUN", "--to", "safetensor"], "safetensors"),
        (["completion", "bsh"], "bash"),
        (["report", "RUN", "--jsn"], "--json"),
    ],
)
def test_every_name_is_answered_with_the_one_that_was_meant(
    words: list[str], meant: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main([str(tmp_path / "out") if word == "OUT" else word for word in words])
    line = capsys.readouterr().err
    assert stop.value.code == 2
    assert line.count("\n") == 1
    assert re.search(rf"did you mean '?{re.escape(meant)}'?\?", line), line


def test_a_format_is_answered_by_the_function_too(tmp_path: Path) -> None:
    from uncollapse.export.write import export

    with pytest.raises(ConfigError, match=r"did you mean timm\?"):
        export(tmp_path, "tim")
