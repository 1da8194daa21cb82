"""``--init FILE``: what is in the file is in the encoder, and what is not is said."""

import pickle

import pytest
import torch
from safetensors.torch import save_file

from uncollapse.checkpoints.pretrained import start_from
from uncollapse.cli.main import main
from uncollapse.config.load import load_config
from uncollapse.config.tiny import tiny
from uncollapse.errors import ConfigError, InputError
from uncollapse.models.network import build_encoder
from uncollapse.run_folder.checkpoint import load_checkpoint


def vit(**keys):
    return tiny(load_config("dino-vits16", {"data.path": "builtin:digits", **keys}))


@pytest.fixture(scope="module")
def weights():
    """Of a backbone that another seed started."""
    return build_encoder(vit(seed=5), drop_path=False).backbone.state_dict()


def started(file, config=None):
    encoder = build_encoder(config or vit(), drop_path=True)
    return encoder, start_from(encoder, str(file))


@pytest.mark.parametrize("layout", ["timm", "safetensors", "dino", "nested"])
def test_weights_are_found_under_any_prefix(layout, weights, tmp_path):
    path = tmp_path / "weights"
    other = {n: torch.zeros_like(t) for n, t in weights.items()}
    if layout == "timm":
        torch.save({**weights, "head.weight": torch.ones(10, 48)}, path)
    elif layout == "safetensors":
        save_file({n: t.clone() for n, t in weights.items()}, path)
    elif layout == "dino":
        sides = {"student": other, "teacher": weights}
        torch.save({s: {f"module.backbone.{n}": t for n, t in w.items()} for s, w in sides.items()}, path)
    else:
        torch.save({"model": {"encoder": {"net": weights}}, "epoch": 3}, path)
    encoder, lines = started(path)
    assert all(torch.equal(t, weights[n]) for n, t in encoder.backbone.state_dict().items())
    assert f"{len(weights)} of {len(weights)} tensors" in lines[0]
    assert len(lines) == 1


def test_what_is_missing_is_named_and_half_is_too_little(weights, tmp_path):
    some = {n: t for n, t in weights.items() if not n.startswith("norm.")}
    torch.save(some, tmp_path / "some.pt")
    _, lines = started(tmp_path / "some.pt")
    assert any("norm.weight" in line and "start at random" in line for line in lines)
    torch.save({n: t for n, t in weights.items() if n.startswith("blocks.0")}, tmp_path / "few.pt")
    with pytest.raises(ConfigError, match=r"has 12 of the \d+ tensors"):
        started(tmp_path / "few.pt")


def test_positions_of_another_image_size_are_resized(weights, tmp_path):
    torch.save({**weights, "pos_embed": torch.ones(1, 1 + 7 * 7, 48)}, tmp_path / "large.pt")
    encoder, lines = started(tmp_path / "large.pt")
    assert torch.allclose(encoder.backbone.state_dict()["pos_embed"], torch.ones(1, 1 + 4 * 4, 48), atol=1e-5)
    assert len(lines) == 1


def test_bad_files_are_refused(weights, tmp_path):
    torch.save({**weights, "norm.weight": torch.full((48,), torch.nan)}, tmp_path / "nan.pt")
    with pytest.raises(ConfigError, match=r"norm\.weight.*NaN"):
        started(tmp_path / "nan.pt")

    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    torch.save({"model": weights, "x": Evil()}, tmp_path / "evil.pt", pickle_module=pickle)
    with pytest.raises(InputError):
        started(tmp_path / "evil.pt")
    assert not (tmp_path / "ran").exists()


def test_a_run_of_ours_starts_another_with_encoder_and_head(tmp_path, capsys):
    argv = ["train", "demo", "--tiny", "--prototypes", "fixed", "--device", "cpu"]
    main([*argv, "--max-steps", "4", "--out", str(tmp_path / "first")])
    capsys.readouterr()
    init = ["--init", str(tmp_path / "first"), "--optim.lr", "1e-9", "--optim.min_lr", "0.0"]
    main([*argv, *init, "--max-steps", "1", "--out", str(tmp_path / "second")])
    shown = capsys.readouterr().out
    assert "projection head too" in shown
    first, second = (load_checkpoint(tmp_path / n / "checkpoints") for n in ("first", "second"))
    for side in ("student", "teacher"):
        for name, tensor in first["teacher"].items():
            if "running" not in name and "num_batches" not in name:
                torch.testing.assert_close(second[side][name], tensor, rtol=0, atol=1e-6)
    main(["train", "--resume", str(tmp_path / "second"), "--max-steps", "2", "--device", "cpu"])
    assert "started " not in capsys.readouterr().out  # the checkpoint has it all


def test_a_file_that_is_not_there_is_named_at_once(capsys, tmp_path):
    with pytest.raises(SystemExit) as stop:
        main(["train", "demo", "--init", str(tmp_path / "nothing.pt")])
    assert stop.value.code == 2
    assert "nothing.pt: no such file" in capsys.readouterr().err
