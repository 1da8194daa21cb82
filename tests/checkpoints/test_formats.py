"""Every family's layout, found by content and counted; and everything that is no such file."""

import io
import os
import pickle
import subprocess
import sys
import warnings
import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from layouts import EPS, LAYOUTS, T, norm_old, planted
from uncollapse.checkpoints.prototypes import clean, find_prototypes
from uncollapse.checkpoints.read import flatten, read_tensors
from uncollapse.diagnosis.run import diagnose, diagnose_file
from uncollapse.errors import InputError
from uncollapse.measure.unique import unique_prototypes


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_is_found_and_counted(name, tmp_path):
    content, family, expected = LAYOUTS[name]
    path = tmp_path / "file.without.meaning"
    torch.save(content, path)
    found = diagnose_file(path, EPS)
    assert [(d.source.side, d.source.set) for d in found] == [(side, kind) for side, kind, _ in expected]
    for d, (_, _, p) in zip(found, expected, strict=True):
        assert d.source.family == family
        assert (d.prototypes, d.dim) == tuple(p.w.shape)
        assert d.unique == {EPS: p.unique}
        assert d.components == {EPS: p.components}
        assert d.no_neighbour == {EPS: p.no_neighbour}
        assert d.verdict.label == "partial collapse"


def test_a_shared_head_is_counted_once_and_said_so(tmp_path):
    torch.save(LAYOUTS["iBOT, shared"][0], tmp_path / "a")
    found = diagnose_file(tmp_path / "a", EPS)
    assert len(found) == 2
    assert all("shared head" in d.notes[0] for d in found)


def test_the_old_file_format_is_read_too(tmp_path):
    torch.save(LAYOUTS["DINO"][0], tmp_path / "a", _use_new_zipfile_serialization=False)
    assert [d.unique[EPS] for d in diagnose_file(tmp_path / "a", EPS)] == [p.unique for *_, p in LAYOUTS["DINO"][2]]


def test_a_negative_g_turns_the_prototype_round(tmp_path):
    w = torch.eye(4).repeat(2, 1)
    state = {"head.last_layer.weight_v": w, "head.last_layer.weight_g": torch.tensor([1.0] * 4 + [-2.0] * 4)[:, None]}
    torch.save(state, tmp_path / "a")
    d = diagnose(tmp_path / "a", EPS)
    assert d.unique[EPS] == 8
    assert d.norms["max"] == 2


def test_bare_matrices(tmp_path):
    save_file({"x": T.w}, tmp_path / "a")
    np.save(tmp_path / "b.npy", T.w.numpy())
    np.savez(tmp_path / "c.npz", x=T.w.numpy())
    torch.save(T.w, tmp_path / "d")
    torch.save(torch.nn.Parameter(T.w), tmp_path / "e")
    for name in ("a", "b.npy", "c.npz", "d", "e"):
        d = diagnose(tmp_path / name, EPS)
        assert d.unique == {EPS: T.unique}, name
    assert diagnose(T.w, EPS).unique == diagnose(T.w.numpy(), EPS).unique == {EPS: T.unique}


def test_key_picks_a_tensor(tmp_path):
    torch.save(
        {"a": {"codebook": T.w, "other": torch.randn(9, 3)}, **{str(i): torch.ones(2) for i in range(4)}},
        tmp_path / "x",
    )
    with pytest.raises(InputError, match=r"--key.*codebook"):
        diagnose(tmp_path / "x")
    assert diagnose(tmp_path / "x", EPS, key="a/codebook").unique == {EPS: T.unique}
    assert diagnose(tmp_path / "x", EPS, key="a.codebook").unique == {EPS: T.unique}
    with pytest.raises(InputError, match=r"no tensor 'b'.*a/codebook"):
        diagnose(tmp_path / "x", key="b")
    with pytest.raises(InputError, match="not prototypes × dimensions"):
        diagnose(tmp_path / "x", key="0")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtypes_are_counted_exactly(dtype, tmp_path):
    w = T.w.to(dtype)
    torch.save(norm_old(planted(seed=1), "head.last_layer") | {"head.last_layer.weight_v": w}, tmp_path / "a")
    d = diagnose(tmp_path / "a", EPS)
    assert d.dtype == str(dtype).removeprefix("torch.")
    assert d.unique[EPS] == unique_prototypes(w.double(), EPS)


def test_wrappers_are_stripped():
    assert clean("student/module._orig_mod.head.last_layer.weight_v") == "student/head.last_layer.weight_v"
    assert clean("model/_fsdp_wrapped_module.a._fsdp_wrapped_module.b") == "model/a.b"


def test_backbones_get_told_where_prototypes_are(tmp_path):
    state = {f"blocks.{i}.attn.qkv.weight": torch.randn(6, 2) for i in range(5)}
    torch.save(state, tmp_path / "a")
    with pytest.raises(InputError, match=r"backbone without prototypes.*full_checkpoint"):
        diagnose(tmp_path / "a")


# ------------------------------------------------------------------------------------------- bad files


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.mark.parametrize("zipped", [True, False])
def test_a_malicious_pickle_runs_nothing_without_trust(zipped, tmp_path):
    mark = tmp_path / "ran"
    content = {"teacher": {"head.last_layer.weight": T.w}, "args": Evil(str(mark))}
    torch.save(content, tmp_path / "evil", _use_new_zipfile_serialization=zipped)
    with pytest.raises(InputError, match=r"open.*--trust") as caught:
        diagnose(tmp_path / "evil")
    assert "\n" not in str(caught.value)
    assert not mark.exists()
    assert diagnose(tmp_path / "evil", EPS, trust=True).unique == {EPS: T.unique}
    assert mark.exists()  # the same file does run it once trusted, so the test above can fail


def test_a_raw_pickle_is_refused_too(tmp_path):
    mark = tmp_path / "ran"
    (tmp_path / "raw").write_bytes(pickle.dumps(Evil(str(mark))))
    with pytest.raises(InputError):
        diagnose(tmp_path / "raw")
    np.save(tmp_path / "o.npy", np.array([Evil(str(mark))], dtype=object), allow_pickle=True)
    with pytest.raises(InputError, match="holds objects"):
        diagnose(tmp_path / "o.npy")
    assert not mark.exists()


def test_configuration_classes_that_are_not_installed_are_stood_in_for(tmp_path):
    """A Lightning checkpoint with omegaconf inside is read without omegaconf, and without running it."""
    script = (
        "import sys, types, torch\n"
        "m = types.ModuleType('omegaconf.dictconfig'); p = types.ModuleType('omegaconf')\n"
        "DictConfig = type('DictConfig', (), {'__module__': 'omegaconf.dictconfig'})\n"
        "m.DictConfig = DictConfig; sys.modules.update({'omegaconf': p, 'omegaconf.dictconfig': m})\n"
        "c = DictConfig(); c.__dict__['_content'] = {'lr': 1}\n"
        "torch.save({'hyper_parameters': c, 'state_dict': {'prototypes.weight': torch.eye(5)}}, sys.argv[1])\n"
    )
    subprocess.run([sys.executable, "-c", script, str(tmp_path / "a")], check=True)
    assert diagnose(tmp_path / "a", EPS).unique == {EPS: 5}


def _saved(content) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def _zip(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def _script() -> bytes:
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated, but such files are about
        torch.jit.save(torch.jit.script(torch.nn.Linear(3, 4)), buffer)
    return buffer.getvalue()


def _npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "empty"),
        (b"hello, this is a text file", "not a checkpoint"),
        (b"<html>404</html>", "not a checkpoint"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        (_saved(LAYOUTS["DINO"][0])[:-500], "cut off"),
        (_saved(LAYOUTS["DINO"][0])[:60], "cut off"),
        (b"\x80\x02}q\x00", "damaged"),
        (b"\x80\x02\x8a\n" + bytes(40), "damaged"),
        (b"\x93NUMPY\x01\x00", "damaged"),
        (b'\x10\x00\x00\x00\x00\x00\x00\x00{"a":', "damaged"),
        (_saved({"epoch": 3}), "no tensors"),
        (_saved("hello"), "no tensors"),
        (_saved({"optimizer": {"state": {0: {"exp_avg": T.w}}}}), r"no tensors \(states of optimisers aside\).*full"),
        (_saved({"state": {0: {"exp_avg": T.w}}, "param_groups": [{"lr": 1}]}), "states of optimisers"),
        (_saved({"prototypes.weight": T.w.to_sparse()}), "sparse"),
        (_saved({"prototypes.weight": T.w.to("meta")}), "without values"),
        (_zip({"x/data.pkl": b"hello"}), "damaged"),
        (_zip({"readme.txt": b"hello"}), "a zip archive, but not a checkpoint"),
        (_zip({}), "a zip archive|not a checkpoint"),
        (_script(), "TorchScript.*state_dict"),
        (_npy(np.ones((3, 4), dtype=np.longdouble)), "an array of float128"),
        (_npy(np.ones((3, 4), dtype=np.complex64)), "an array of complex64"),
        (_saved(torch.randn(3)), "not prototypes × dimensions"),
        (_saved(torch.randn(3, 4, 5)), "not prototypes × dimensions"),
        (_saved(torch.zeros(0, 5)), "not prototypes × dimensions"),
        (_saved({"prototypes.weight": torch.ones(4, 5, dtype=torch.int8)}), "int8"),
        (_saved({"prototypes.weight": torch.ones(4, 5, dtype=torch.complex64)}), "complex64"),
        (_saved({"last_layer.weight_v": torch.ones(4, 5), "last_layer.weight_g": torch.ones(3, 1)}), "lengths"),
        (_saved({"_flat_param": torch.ones(99), **{str(i): torch.ones(2) for i in range(4)}}), "full state dict"),
    ],
)
def test_one_clear_line_for_every_bad_file(content, says, tmp_path):
    path = tmp_path / "bad.pth"
    path.write_bytes(content)
    with pytest.raises(InputError, match=says) as caught:
        diagnose(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


def test_missing_and_folders(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        diagnose(tmp_path / "none")
    with pytest.raises(InputError, match="folder without checkpoints"):
        diagnose(tmp_path)
    (tmp_path / "__0_0.distcp").touch()
    with pytest.raises(InputError, match="without their index"):
        diagnose(tmp_path)


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match="not an ordinary file"):
        diagnose(tmp_path / "pipe")


def test_what_the_system_refuses_is_one_line(tmp_path, monkeypatch):
    torch.save(T.w, tmp_path / "a")
    refused = PermissionError(13, "Permission denied")
    monkeypatch.setattr("pathlib.Path.open", lambda *_, **__: (_ for _ in ()).throw(refused))
    with pytest.raises(InputError, match=r"cannot be read \(Permission denied\)"):
        diagnose(tmp_path / "a")


def test_links_are_followed_and_a_dangling_one_is_named(tmp_path):
    torch.save(T.w, tmp_path / "a")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    (tmp_path / "c").symlink_to(tmp_path / "nothing")
    assert diagnose(tmp_path / "b", EPS).unique == {EPS: T.unique}
    with pytest.raises(InputError, match="no such file"):
        diagnose(tmp_path / "c")


def test_lists_are_looked_into_and_knots_are_not_followed(tmp_path):
    content = {"models": [{"head.last_layer.weight": T.w}, ({"x": 1},)]}
    content["again"] = content
    torch.save(content, tmp_path / "a")
    (d,) = diagnose_file(tmp_path / "a", EPS)
    assert d.source.key == "models/0/head.last_layer.weight"


def test_a_set_that_cannot_be_used_does_not_hide_the_others(tmp_path):
    torch.save({"prototypes.weight": torch.zeros(0, 5), "head.last_layer.weight": T.w}, tmp_path / "a")
    (d,) = diagnose_file(tmp_path / "a", EPS)
    assert d.unique == {EPS: T.unique}
    assert "left out: prototypes.weight: shape (0, 5)" in d.notes[0]


def test_one_storage_under_two_names_counts_once(tmp_path):
    w = T.w.clone()
    names = ("teacher.dino_head.last_layer.weight", "model_ema.dino_head.last_layer.weight")
    torch.save({"model": dict.fromkeys(names, w)}, tmp_path / "a")
    (d,) = diagnose_file(tmp_path / "a", EPS)
    assert "saved under two names" in d.notes[0]


def test_a_matrix_without_a_known_name_says_so(tmp_path):
    torch.save(
        {"state_dict": {"module.linear.weight": T.w, "module.linear.bias": T.w[:, 0]}, "epoch": 1}, tmp_path / "a"
    )
    assert "nothing in it says that these are prototypes" in " ".join(diagnose(tmp_path / "a", EPS).notes)


def test_byte_orders(tmp_path):
    np.save(tmp_path / "a.npy", T.w.numpy().astype(">f4"))
    torch.save({"prototypes.weight": T.w.double().numpy().astype(">f8")}, tmp_path / "b")
    for name in ("a.npy", "b"):
        assert diagnose(tmp_path / name, EPS).unique == {EPS: T.unique}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e5m2, torch.int8, torch.bool])
def test_safetensors_of_every_type(dtype, tmp_path):
    save_file({"prototypes.weight": torch.eye(6).to(dtype)}, tmp_path / "a")
    if dtype.is_floating_point:
        assert diagnose(tmp_path / "a", EPS).unique == {EPS: 6}
        return
    with pytest.raises(InputError, match="floating-point"):
        diagnose(tmp_path / "a")


def test_a_file_of_eight_bit_floats_is_counted(tmp_path):
    torch.save({"prototypes.weight": torch.eye(6).to(torch.float8_e4m3fn)}, tmp_path / "a")
    d = diagnose(tmp_path / "a", EPS)
    assert d.unique == {EPS: 6}
    assert "stored as float8_e4m3fn" in d.notes[0]


def test_only_the_matrix_is_read_of_a_large_file(tmp_path):
    """The rest of the file stays on disk: 400 MB beside the prototypes cost next to no memory."""
    torch.save({"teacher": {"head.last_layer.weight": T.w}, "x": torch.zeros(100_000_000)}, tmp_path / "big")
    script = (
        "import sys, resource, torch\n"
        "from uncollapse.diagnosis.run import diagnose\n"
        "diagnose(torch.eye(50)); before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "diagnose(sys.argv[1]); print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "big")], capture_output=True, text=True, check=True
    )
    assert int(done.stdout) < 150


def test_optimiser_states_are_not_taken_for_prototypes():
    content = {"optimizer": {"prototypes": T.w}, "opt": {"prototypes": T.w}, "x": {"prototypes": T.w}}
    assert list(flatten(content)) == ["x/prototypes"]


def test_reading_never_needs_the_extension(tmp_path):
    save_file({"prototypes": T.w}, tmp_path / "checkpoint.pth")
    tensors = flatten(read_tensors(tmp_path / "checkpoint.pth"))
    assert [s.name for s in find_prototypes(tensors, "x")] == ["cls"]
