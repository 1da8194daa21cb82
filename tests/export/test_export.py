"""A run goes out in each format and comes back the same: by our own readers, by timm, by who knows DINO's layout."""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
import torch.nn.functional as F
import yaml
from safetensors import safe_open

import uncollapse
from made_runs import make_summary
from steps import Steps, small
from uncollapse.checkpoints.encoder import own_parts
from uncollapse.checkpoints.own import own_encoder
from uncollapse.checkpoints.pretrained import start_from
from uncollapse.checkpoints.read import newest_of, read_tensors
from uncollapse.cli.main import main
from uncollapse.diagnosis.run import diagnose_file
from uncollapse.errors import ConfigError, InputError
from uncollapse.evaluate.source import open_encoder
from uncollapse.export.write import export
from uncollapse.models.network import build_encoder
from uncollapse.models.tokens import plain
from uncollapse.run_folder.checkpoint import save_checkpoint
from uncollapse.training.state import state_dicts

VIT = {
    "backbone.name": "vit_tiny_patch16_224",
    "backbone.options": {"patch_size": 8, "img_size": 32, "embed_dim": 64, "depth": 2, "num_heads": 1},
}
LOCAL = hasattr(timm.models._hub, "load_model_config_from_path")
"""Whether timm reads folders, as newer versions do; older ones read the same files from a hub alone."""
X = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))
FAST = {"optim.lr": 0.02, "optim.lr_batch": 16, "teacher.momentum": 0.5}


def trained(folder: Path, method: str, kind: str = "joint", **keys: object) -> Path:
    """A run of two steps, with a checkpoint and a configuration as a run writes them."""
    steps = Steps(small(method, kind, **FAST, **keys))
    for _ in range(2):
        steps.take()
    content = {**state_dicts(steps.state), "config": asdict(steps.config)}
    assert save_checkpoint(folder / "checkpoints", 2, content, 1)
    (folder / "config.yaml").write_text("")
    return folder


def network(run: Path, side: str = "teacher"):
    return own_encoder(read_tensors(newest_of(run)[0]), side, run)[0]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    made = {"conv3": trained(root / "conv3", "dino"), "vit": trained(root / "vit", "dino", **VIT)}
    made["decoupled"] = trained(root / "decoupled", "dino", "decoupled", **VIT)
    return made


@pytest.mark.parametrize(
    ("encoder", "to"),
    [("conv3", "safetensors"), ("vit", "safetensors"), ("vit", "timm"), ("vit", "hf"), ("vit", "dino")],
)
@torch.no_grad()
def test_what_comes_back_computes_the_same(encoder, to, runs, tmp_path):
    written = export(runs[encoder], to, tmp_path / "out")
    mine, back = network(runs[encoder]), uncollapse.load_export(written.out)
    features = plain(mine.backbone)(X)
    torch.testing.assert_close(back.encoder(X), features, rtol=0, atol=1e-6)
    torch.testing.assert_close(back.heads["cls"](features), mine.head(features), rtol=0, atol=1e-6)
    opened = open_encoder(written.out)
    torch.testing.assert_close(opened.features(X), features, rtol=0, atol=1e-6)
    torch.testing.assert_close(opened.vectors, open_encoder(runs[encoder]).vectors, rtol=0, atol=1e-6)
    assert opened.size == 32
    assert opened.untrained().described.endswith("untrained")
    started = build_encoder(small("dino", **(VIT if encoder == "vit" else {}), seed=5), drop_path=False)
    lines = start_from(started, str(written.out))
    for name, tensor in mine.state_dict().items():
        if not name.endswith("num_batches_tracked"):
            torch.testing.assert_close(started.state_dict()[name], tensor, msg=name)
    assert any("projection head too" in line for line in lines)


@torch.no_grad()
def test_timm_loads_the_encoder_by_itself(runs, tmp_path):
    export(runs["vit"], "timm", tmp_path / "timm")
    features = plain(network(runs["vit"]).backbone)(X)
    model = timm.create_model(VIT["backbone.name"], num_classes=0, dynamic_img_size=True, **VIT["backbone.options"])
    timm.models.load_checkpoint(model, str(tmp_path / "timm" / "encoder.safetensors"), strict=True)
    torch.testing.assert_close(model.eval()(X), features, rtol=0, atol=1e-6)
    if not LOCAL:
        pytest.skip("this timm reads no local folders")
    export(runs["vit"], "hf", tmp_path / "hf")
    model = timm.create_model(f"local-dir:{tmp_path / 'hf'}", pretrained=True).eval()
    torch.testing.assert_close(model(X), features, rtol=0, atol=1e-6)
    data = timm.data.resolve_model_data_config(model)
    assert data["input_size"] == (3, 32, 32)
    assert tuple(data["mean"]) == (0.485, 0.456, 0.406)
    assert (data["crop_pct"], data["interpolation"]) == (1.0, "bicubic")


@torch.no_grad()
def test_dinos_layout_is_recognised_by_who_knows_nothing_of_us(runs, tmp_path):
    out = export(runs["vit"], "dino", tmp_path / "dino").out
    file = out / "checkpoint.pth"
    saved = torch.load(file, weights_only=True)
    assert {"student", "teacher", "args", "dino_loss"} <= set(saved)
    assert all(name.startswith(("module.backbone.", "module.head.")) for name in saved["student"])
    layer = {n: tuple(t.shape) for n, t in saved["teacher"].items() if "last_layer" in n}
    assert layer == {"head.last_layer.weight_g": (64, 1), "head.last_layer.weight_v": (64, 32)}
    ours, theirs = diagnose_file(runs["vit"]), diagnose_file(file)
    assert [str(d.source) for d in theirs] == [str(d.source) for d in ours] == ["teacher cls", "student cls"]
    assert {d.source.family for d in theirs} == {"DINO"}
    for a, b in zip(ours, theirs, strict=True):
        assert (a.prototypes, a.dim, a.unique, a.components) == (b.prototypes, b.dim, b.unique, b.components)
    for side in ("teacher", "student"):
        opened, own = open_encoder(file, side), open_encoder(runs["vit"], side)
        torch.testing.assert_close(opened.features(X), own.features(X), rtol=0, atol=1e-5)
        torch.testing.assert_close(opened.project(own.features(X)), own.project(own.features(X)), rtol=0, atol=1e-6)
        torch.testing.assert_close(opened.vectors, own.vectors, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("method", "sets"), [("ibot", ["teacher cls", "student cls"]), ("ibot-separate", ["teacher cls", "teacher patch"])]
)
def test_ibots_prototypes_of_patches_stand_where_its_own_code_has_them(method, sets, tmp_path):
    run = trained(tmp_path / "run", method, **VIT)
    out = export(run, "dino", tmp_path / "out").out
    ours, theirs = diagnose_file(run), diagnose_file(out / "checkpoint.pth")
    assert [str(d.source) for d in theirs][:2] == [str(d.source) for d in ours][:2] == sets
    assert [d.unique for d in theirs] == [d.unique for d in ours]
    assert {d.source.family for d in theirs} == {"iBOT"}
    mine, back = network(run), network(out)
    assert all(torch.equal(back.state_dict()[name], tensor) for name, tensor in mine.state_dict().items())


def test_a_damaged_export_is_one_line(runs, tmp_path):
    out = export(runs["conv3"], "safetensors", tmp_path / "out").out
    head = safetensors.torch.load_file(out / "head.safetensors")
    with safe_open(out / "head.safetensors", "pt") as file:
        said = file.metadata()
    for facts in ("[1]", "{", '{"side": "teacher"}', '{"side": "teacher", "config": {"seed": "x"}}'):
        safetensors.torch.save_file(head, out / "head.safetensors", {**said, "uncollapse": facts})
        with pytest.raises(InputError):
            diagnose_file(out)
    for weight in (torch.zeros(3), torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2, 3, 4)):
        safetensors.torch.save_file({**head, "prototypes.cls.weight": weight}, out / "head.safetensors", said)
        with pytest.raises(InputError):
            diagnose_file(out)
    safetensors.torch.save_file(head, out / "head.safetensors", said)
    (out / "encoder.safetensors").unlink()
    with pytest.raises(InputError, match="no encoder"):
        open_encoder(out)


METHODS = [
    "swav",
    "msn",
    "carp",
    "ibot-separate",
    "dino-vmf",
    "esvit",
    "wessl",
    "capi capi",
    "carp capi",
    "dino decoupled-paper",
    "dino memory",
    "dino fixed",
    "esvit decoupled",
]


@pytest.mark.parametrize("method", METHODS)
def test_every_method_and_way_to_learn_prototypes_comes_back_as_it_was(method, tmp_path):
    run = trained(tmp_path / "run", *method.split())
    both = method in ("carp", "capi capi", "carp capi", "dino fixed", "msn")
    for side in ("student",) if method == "swav" else ("teacher", "student") if both else ("teacher",):
        out = export(run, "safetensors", tmp_path / side, side).out
        own, back = network(run, side), network(out, side)
        for name, tensor in own.state_dict().items():
            torch.testing.assert_close(back.state_dict()[name], tensor, rtol=0, atol=0, msg=name)
        ours = {d.source.set: d for d in reversed(diagnose_file(run)) if d.source.side in (side, "shared")}
        theirs = {d.source.set: d for d in diagnose_file(out)}
        assert ours.keys() == theirs.keys()
        for name, d in theirs.items():
            expected = ours[name]
            assert (d.source.side, d.prototypes, d.dim, d.unique) == (
                expected.source.side,
                expected.prototypes,
                expected.dim,
                expected.unique,
            )
            assert d.unique_means == expected.unique_means
            a, b = d.vectors, expected.vectors
            assert a is not None
            assert b is not None
            torch.testing.assert_close(F.normalize(a, dim=1), F.normalize(b, dim=1), rtol=0, atol=1e-6)
            assert d.norms == pytest.approx(expected.norms, rel=1e-5)
        open_encoder(out, side)
        assert uncollapse.load_export(out).facts.keys() == ours.keys()


@torch.no_grad()
def test_the_head_says_what_it_holds(runs, tmp_path):
    export(runs["decoupled"], "timm", tmp_path / "out")
    with safe_open(tmp_path / "out" / "head.safetensors", "pt") as file:
        names, said = set(file.keys()), file.metadata()
        weight, mean = file.get_tensor("prototypes.cls.weight"), file.get_tensor("prototypes.cls.mixture.mean")
    assert {f"prototypes.cls.mixture.{part}" for part in ("mean", "variance", "evidence", "offset")} < names
    of = json.loads(said["prototypes.cls"])
    assert (of["K"], of["D"], of["kind"], of["side"]) == (64, 32, "decoupled", "shared")
    assert of["temperature"] == small("dino").teacher.temperature
    assert of["unique"] == {f"{e:g}": uncollapse.unique_prototypes(weight, e) for e in (0.025, 0.1, 0.25, 0.5)}
    about = json.loads(said["uncollapse"])
    assert (about["method"], about["mode"], about["side"], about["step"]) == ("dino", "decoupled", "teacher", 2)
    torch.testing.assert_close(weight, F.normalize(mean - mean.mean(0), dim=1))


def test_a_file_alone_gives_what_is_in_it(runs, tmp_path):
    out = export(runs["conv3"], "safetensors", tmp_path / "out").out
    (tmp_path / "renamed.safetensors").write_bytes((out / "head.safetensors").read_bytes())
    for head in (out / "head.safetensors", tmp_path / "renamed.safetensors"):
        assert [str(d.source) for d in diagnose_file(head)] == ["teacher cls"]
    with pytest.raises(InputError, match="does not fit its configuration"):
        open_encoder(out / "head.safetensors")
    alone = open_encoder(out / "encoder.safetensors")
    torch.testing.assert_close(alone.features(X), network(runs["conv3"]).backbone(X), rtol=0, atol=1e-6)
    assert alone.vectors is None
    with pytest.raises(InputError, match="no weights of a student, only of a teacher"):
        open_encoder(out, "student")
    with pytest.raises(InputError, match="an export already"):
        export(out, "timm", tmp_path / "again")


# ------------------------------------------------------------------------------------------------ the card


def snippet(folder: Path) -> str:
    return re.search(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)[1]


@pytest.mark.parametrize(("method", "to"), [("conv3", "safetensors"), ("vit", "timm"), ("vit", "hf"), ("vit", "dino")])
@torch.no_grad()
def test_the_cards_lines_run_as_printed(method, to, runs, tmp_path, monkeypatch):
    if to == "hf" and not LOCAL:
        pytest.skip("this timm reads no local folders")
    out = export(runs[method], to, tmp_path / "out").out
    monkeypatch.chdir(out)
    space: dict = {}
    exec(snippet(out), space)
    backbone, head = own_parts(network(runs[method]))
    z = head(backbone(space["x"]))
    torch.testing.assert_close(space["z"], z, rtol=0, atol=1e-6)
    vectors = open_encoder(runs[method]).vectors
    torch.testing.assert_close(space["logits"], z @ vectors.T / small("dino").teacher.temperature, rtol=0, atol=1e-4)


@pytest.mark.parametrize("method", ["capi capi", "ibot decoupled"])
def test_the_cards_lines_run_for_patches_and_mixtures(method, tmp_path, monkeypatch):
    run = trained(tmp_path / "run", *method.split())
    out = export(run, "timm", tmp_path / "out").out
    monkeypatch.chdir(out)
    space: dict = {}
    exec(snippet(out), space)
    assert space["logits"].shape[-1] == 64


def test_the_card_of_a_run_that_measured_nothing_says_so(runs, tmp_path):
    out = export(runs["vit"], "hf", tmp_path / "out").out
    text = (out / "README.md").read_text()
    _, front, body = text.split("---\n", 2)
    front = yaml.safe_load(front)
    assert front["library_name"] == "timm"
    assert {"timm", "dino", "prototypes"} <= set(front["tags"])
    for measure in ("view information", "kNN", "used", "alive", "N_eff ε .025"):
        assert f"| {measure} | **not measured** |" in body
    assert re.search(r"\| unique ε .025 \| \d+ of 64 ", body)
    assert "no untrained encoder beside the numbers" in body
    config = json.loads((out / "config.json").read_text())
    assert config["architecture"] == "vit_tiny_patch16_224"
    assert config["pretrained_cfg"].get("tag") is None
    assert "license" not in config["pretrained_cfg"]


def test_the_card_carries_the_runs_own_numbers_of_this_step_alone(tmp_path):
    run = trained(tmp_path / "run", "dino", "fixed", **VIT)
    (run / "summary.json").write_text(json.dumps(make_summary("fixed", steps=2, movement=0.0)))
    text = (export(run, "timm", tmp_path / "a").out / "README.md").read_text()
    assert "3.12 ± 0.05 bits" in text
    assert "| kNN | 42.3 % (95 %: 40.3 to 44.3); **untrained encoder: 33.0 %** |" in text
    assert "| used | 12" in text
    assert "**A control: its prototypes are directions that never moved" in text
    (run / "summary.json").write_text(json.dumps(make_summary("fixed", steps=1)))
    text = (export(run, "timm", tmp_path / "b").out / "README.md").read_text()
    assert "| kNN | **not measured** |" in text


def test_nothing_of_the_machine_leaves_with_it(tmp_path):
    secret = tmp_path / "a-private-folder"
    run = trained(tmp_path / "run", "dino", **{"data.path": str(secret), "backbone.init": str(secret / "start.pt")})
    out = export(run, "safetensors", tmp_path / "out").out
    assert not [p.name for p in out.iterdir() if b"a-private-folder" in p.read_bytes()]


# -------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("method", "keys", "to", "why"),
    [
        ("dino", {}, "timm", "timm has no conv3"),
        ("dino", {}, "hf", "timm has no conv3"),
        ("dino", {}, "dino", "knows conv3"),
        ("swav", VIT, "dino", "swav has no teacher"),
        ("wessl", {}, "dino", "holds one head, and this run has 3"),
        ("capi", {}, "dino", "those of capi patches"),
        ("dino capi", VIT, "dino", "has no bias"),
        ("msn", {}, "dino", "how many attention heads"),
    ],
)
def test_what_a_format_cannot_hold_is_said_before_anything_is_written(method, keys, to, why, tmp_path):
    run = trained(tmp_path / "run", *method.split(), **keys)
    before = sorted(run.rglob("*"))
    with pytest.raises(ConfigError, match=why) as said:
        export(run, to)
    assert "--to safetensors" in str(said.value)
    assert sorted(run.rglob("*")) == before


def test_nothing_is_overwritten_unasked_and_nothing_half_written(runs, tmp_path, monkeypatch):
    out = tmp_path / "out"
    export(runs["conv3"], "safetensors", out)
    with pytest.raises(ConfigError, match="--overwrite"):
        export(runs["conv3"], "safetensors", out)
    (out / "mine.txt").write_text("")
    with pytest.raises(ConfigError, match=r"holds mine\.txt"):
        export(runs["conv3"], "safetensors", out, overwrite=True)
    (out / "mine.txt").unlink()
    before = (out / "README.md").read_bytes()

    def full(*_: object) -> str:
        raise OSError("full")

    with monkeypatch.context() as broken:
        broken.setattr("uncollapse.export.write.card", full)
        with pytest.raises(OSError, match="full"):
            export(runs["conv3"], "safetensors", out, overwrite=True)
    assert (out / "README.md").read_bytes() == before
    export(runs["vit"], "timm", out, overwrite=True)
    assert "vit_tiny" in (out / "README.md").read_text()
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    strange = tmp_path / "strange"
    strange.mkdir()
    (strange / "README.md").write_text("mine")
    with pytest.raises(ConfigError, match="no export"):
        export(runs["vit"], "timm", strange, overwrite=True)


def test_the_command_says_what_it_wrote(runs, tmp_path, capsys):
    main(["export", str(runs["vit"]), "--to", "dino", "--out", str(tmp_path / "out"), "--json"])
    said = json.loads(capsys.readouterr().out)
    assert set(said["files"]) == {"README.md", "checkpoint.pth", "head.safetensors"}
    assert said["sets"]["cls"]["K"] == 64
    main(["diagnose", str(tmp_path / "out"), "--json"])
    assert json.loads(capsys.readouterr().out)[0]["source"]["side"] == "teacher"


def test_evaluating_an_export_leaves_it_as_it_is(runs, tmp_path, capsys, monkeypatch):
    out = export(runs["conv3"], "safetensors", tmp_path / "out").out
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    monkeypatch.chdir(tmp_path)
    main(
        ["evaluate", "out", "--tasks", "knn", "--limit", "60", "--data", "builtin:digits", "--device", "cpu", "--json"]
    )
    assert json.loads(capsys.readouterr().out)["knn"]["n"] == 60
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before
    assert (tmp_path / "runs" / "evaluate-out" / "evaluation.json").is_file()
