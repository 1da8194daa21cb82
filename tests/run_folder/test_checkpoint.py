"""Checkpoints: whole or not at all, verified, and safe to load."""

import errno
import pickle

import pytest
import torch

from uncollapse.errors import CheckpointError
from uncollapse.run_folder import checkpoint
from uncollapse.run_folder.checkpoint import load_checkpoint, save_checkpoint


def save(folder, step, keep=3):
    return save_checkpoint(folder, step, {"w": torch.full((1000,), float(step))}, keep)


def test_newest_comes_back_and_old_ones_go(tmp_path):
    assert load_checkpoint(tmp_path) is None
    for step in (1, 2, 3, 4):
        assert save(tmp_path, step, keep=2)
    state = load_checkpoint(tmp_path)
    assert state["step"] == 4
    assert torch.equal(state["w"], torch.full((1000,), 4.0))
    assert sorted(p.name for p in tmp_path.glob("*.pt")) == ["step-00000003.pt", "step-00000004.pt"]
    assert not list(tmp_path.glob("*.tmp"))


@pytest.mark.parametrize("damage", ["truncate", "flip", "empty", "remove", "no digest"])
def test_a_damaged_one_is_passed_over_with_a_warning(tmp_path, damage):
    save(tmp_path, 1)
    save(tmp_path, 2)
    path = tmp_path / "step-00000002.pt"
    content = bytearray(path.read_bytes())
    if damage == "truncate":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "flip":
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "remove":
        path.unlink()
    else:
        path.with_suffix(".json").unlink()  # a kill between the two writes
        assert load_checkpoint(tmp_path)["step"] == 1
        return
    with pytest.warns(UserWarning, match="step-00000002"):
        assert load_checkpoint(tmp_path)["step"] == 1


def test_all_damaged_is_an_error(tmp_path):
    save(tmp_path, 1)
    (tmp_path / "step-00000001.pt").write_bytes(b"x")
    with pytest.warns(UserWarning, match="damaged"), pytest.raises(CheckpointError, match="every checkpoint"):
        load_checkpoint(tmp_path)


def test_full_disk_keeps_what_is_there_and_says_so(tmp_path, monkeypatch):
    save(tmp_path, 1)

    def full(state, file):
        file.write(b"part of it")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint.torch, "save", full)
    with pytest.warns(UserWarning, match="disk is full"):
        assert not save(tmp_path, 2)
    monkeypatch.undo()
    assert load_checkpoint(tmp_path)["step"] == 1
    assert not list(tmp_path.glob(".*"))


def test_a_pickle_cannot_run_code(tmp_path):
    save(tmp_path, 1)
    flag = tmp_path / "ran"

    class Evil:
        def __reduce__(self):
            return (open, (str(flag), "w"))

    path = tmp_path / "step-00000002.pt"
    torch.save({"format": 1, "step": 2, "w": Evil()}, path, pickle_module=pickle)
    digest = checkpoint._digest(path)
    path.with_suffix(".json").write_text(f'{{"step": 2, "sha256": "{digest}"}}')
    with pytest.warns(UserWarning, match="step-00000002"):
        assert load_checkpoint(tmp_path)["step"] == 1
    assert not flag.exists()
