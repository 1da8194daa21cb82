"""Files made to hurt: nothing in them runs, is set, is written or read elsewhere, or takes for ever."""

import io
import os
import pathlib
import pickle
import struct
import subprocess
import sys
import warnings
import zipfile

import numpy as np
import pytest
import torch

from layouts import EPS, T
from uncollapse.checkpoints.read import flatten, read_tensors
from uncollapse.checkpoints.sharded import INDEX
from uncollapse.diagnosis.run import diagnose
from uncollapse.errors import InputError

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def op(value) -> bytes:
    """Opcodes that push a value; a name is written ``"@module name"``."""
    if isinstance(value, str) and value.startswith("@"):
        return b"c" + value[1:].replace(" ", "\n").encode() + b"\n"
    if isinstance(value, bytes):
        return b"B" + struct.pack("<I", len(value)) + value
    if isinstance(value, tuple):
        return b"(" + b"".join(map(op, value)) + b"t"
    return pickle.dumps(value, 2)[2:-1]


def zipped(data: bytes, records: dict[str, bytes] | None = None, method: int = zipfile.ZIP_STORED) -> bytes:
    """A file of torch.save with this pickle."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, content in {"data.pkl": data, "version": b"3\n", **(records or {})}.items():
            archive.writestr(f"archive/{name}", content)
    return buffer.getvalue()


def call(name: str, *arguments, state: bytes = b"") -> bytes:
    return op(f"@{name}") + b"(" + b"".join(a if isinstance(a, bytes) else op(a) for a in arguments) + b"tR" + state


PROTO, STOP = b"\x80\x02", b"."


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    import torch.distributed.checkpoint as dcp

    folder = tmp_path_factory.mktemp("dcp") / "9"
    dcp.save({"model": {"teacher.dino_head.last_layer.weight": T.w}}, checkpoint_id=folder, no_dist=True)
    return folder


@pytest.fixture
def folder(sharded, tmp_path):
    import shutil

    return pathlib.Path(shutil.copytree(sharded, tmp_path / "9"))


# -------------------------------------------------------------------------------------------- memory


def test_no_array_is_laid_over_an_address(tmp_path):
    """An array of objects over eight raw bytes, and then a list of it, would count up what lies at that address."""
    address = call("_codecs encode", "\x01\x00AAAA\x00\x00", "latin1")
    array = call("numpy ndarray", (1,), call("numpy dtype", "O8"), address)
    (tmp_path / "a.pt").write_bytes(zipped(PROTO + call("__builtin__ list", array) + STOP))
    script = (
        "import sys, pathlib; from uncollapse.checkpoints.read import *; print(read_tensors(pathlib.Path(sys.argv[1])))"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path / "a.pt")], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "[]\n"), (done.returncode, done.stderr[-400:])


# ------------------------------------------------------------------------------------- what is set and read


def test_an_index_sets_nothing(folder):
    """BUILD on a class would change it for the whole process."""
    setting = op("@pathlib PurePosixPath") + op(({}, {"suffix": "changed"})) + b"b0"
    (folder / INDEX).write_bytes(PROTO + setting + (folder / INDEX).read_bytes()[2:])
    with pytest.raises(InputError, match="is damaged"):
        diagnose(folder)
    assert pathlib.PurePosixPath("a.b").suffix == ".b"


@pytest.mark.parametrize(
    "name", ["os system", "builtins getattr", "builtins eval", "pathlib Path.read_text", "torch load"]
)
def test_names_beyond_the_list_are_refused_wherever_they_stand(name, folder, tmp_path):
    data = PROTO + op(f"@{name}") + b"0" + pickle.dumps({"prototypes.weight": 1}, 2)[2:]
    (tmp_path / "a.pt").write_bytes(zipped(data))
    with pytest.raises(InputError, match=r"not loaded, because it would run .*--trust"):
        diagnose(tmp_path / "a.pt")
    (folder / INDEX).write_bytes(PROTO + op(f"@{name}") + b"0" + (folder / INDEX).read_bytes()[2:])
    with pytest.raises(InputError, match="names something that no index"):
        diagnose(folder)


def test_a_shard_is_not_read_through_a_link_out_of_the_folder(folder, tmp_path):
    shard = folder / "__0_0.distcp"
    shard.rename(tmp_path / "elsewhere")
    shard.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InputError, match="outside of the folder"):
        diagnose(folder)


# --------------------------------------------------------------------------------- every number exactly once


def two_shards(folder, second_offset: int, second_rows: int = 10, again: bool = False) -> None:
    """20 rows in two shards of which the second lies where it is told."""
    from torch.distributed.checkpoint.filesystem import _StorageInfo
    from torch.distributed.checkpoint.metadata import MetadataIndex

    folder.mkdir()
    places, content = {}, b""
    for i, (offset, rows) in enumerate([(0, 10), (second_offset, second_rows)]):
        buffer = io.BytesIO()
        torch.save(T.w[:rows], buffer)
        at = 0 if again else len(content)
        places[MetadataIndex("w", torch.Size([offset, 0]), i)] = _StorageInfo(
            "__0_0.distcp", at, len(buffer.getvalue())
        )
        content += buffer.getvalue()
    (folder / "__0_0.distcp").write_bytes(content)
    from torch.distributed.checkpoint.metadata import Metadata, TensorProperties, TensorStorageMetadata

    entry = TensorStorageMetadata(TensorProperties(), torch.Size([20, T.w.shape[1]]), [])
    (folder / INDEX).write_bytes(pickle.dumps(Metadata({"w": entry}, None, places)))


@pytest.mark.parametrize(
    ("place", "says"),
    [
        ({"second_offset": 10}, None),
        ({"second_offset": 5}, "overlap"),
        ({"second_offset": 5, "second_rows": 15}, "doubled"),
        ({"second_offset": 12, "second_rows": 8}, "960|864 of 960|are files missing"),
        ({"second_offset": 10, "again": True}, "no place of its own"),
    ],
)
def test_every_number_is_covered_once_or_the_folder_is_refused(place, says, tmp_path):
    two_shards(tmp_path / "9", **place)
    if says is None:
        assert torch.equal(read_tensors(tmp_path / "9")["w"], torch.cat([T.w[:10], T.w[:10]]))
        return
    with pytest.raises(InputError, match=says):
        diagnose(tmp_path / "9")


# ----------------------------------------------------------------------------------------------- for ever


def doubled(start: bytes, pair: bytes, levels: int = 60) -> bytes:
    """A value that holds itself twice, again and again: 2 to the 60 of the first, in 500 bytes."""
    return start + b"q\x00" + b"".join(pair + b"q\x00" for _ in range(levels))


LISTS = doubled(b"]", b"0](h\x00h\x00e")
TUPLES = doubled(b")", b"0h\x00h\x00\x86")


@pytest.mark.parametrize("kind", ["lists", "tuples", "key", "config"])
def test_values_inside_values_do_not_hang(kind, tmp_path):
    value = LISTS if kind == "lists" else TUPLES
    tensor = pickled_tensor((4, 3), (3, 1), 12)
    if kind == "key":
        data = b"}" + b"}" + TUPLES + op(1) + b"s" + b"0" + op("prototypes.weight") + tensor + b"s"
    elif kind == "config":
        data = b"}" + op("config") + b"}" + op("prototypes") + LISTS + b"ss" + op("prototypes")
        data += b"}" + op("cls") + b"}" + op("mixture.mean") + tensor + b"sss"
    else:
        data = b"}" + op("x") + value + b"s" + op("prototypes.weight") + tensor + b"s"
    (tmp_path / "a.pt").write_bytes(zipped(PROTO + data + STOP, {"data/0": bytes(48)}))
    assert diagnose(tmp_path / "a.pt").zero_rows == 4


def pickled_tensor(size, stride, count, offset=0, kind="torch FloatStorage") -> bytes:
    saved = b"(" + op("storage") + op(f"@{kind}") + op("0") + op("cpu") + op(count) + b"tQ"
    return call("torch._utils _rebuild_tensor_v2", saved, offset, size, stride, False, call("collections OrderedDict"))


def test_tensors_that_hold_themselves_in_every_list_are_refused(tmp_path):
    lists = doubled(b"](" + pickled_tensor((4, 3), (3, 1), 12) + b"e", b"0](h\x00h\x00e", 30)
    (tmp_path / "a.pt").write_bytes(zipped(PROTO + lists + STOP, {"data/0": bytes(48)}))
    with pytest.raises(InputError, match="hold one another without end"):
        diagnose(tmp_path / "a.pt")


def test_tuples_as_keys_of_an_index_do_not_hang(folder):
    data = b"}" + TUPLES + op(1) + b"s0"
    index = pickle.loads((folder / INDEX).read_bytes())
    (folder / INDEX).write_bytes(PROTO + data + pickle.dumps(index, 2)[2:])
    assert diagnose(folder, EPS).unique == {EPS: T.unique}


def test_pipes_inside_folders_are_not_waited_for(folder, tmp_path):
    (folder / "__0_0.distcp").unlink()
    os.mkfifo(folder / "__0_0.distcp")
    with pytest.raises(InputError, match="not an ordinary file"):
        diagnose(folder)
    for name in ("step-00000001.json", "step-00000001.pt"):
        os.mkfifo(tmp_path / name)
    with pytest.raises(InputError, match="every checkpoint"):
        diagnose(tmp_path)


# ----------------------------------------------------------------------------------- more than there is


@pytest.mark.parametrize(
    ("size", "stride", "count", "offset", "says"),
    [
        ((4, 3), (3, 1), 12, 0, None),
        ((10**9, 3), (0, 1), 12, 0, "repeated"),
        ((4, 3), (3, 1), 12, 1, "reaches beyond"),
        ((4, 3), (3, 1), 13, 0, "storage 0 has 48 bytes"),
        ((4, 3), (-3, 1), 12, 11, "shape"),
        ((1 << 40, 1 << 40), (0, 0), 12, 0, "repeated"),
        ((4, 3, 1), (3, 1), 12, 0, "differ in length"),
        (("4", 3), (3, 1), 12, 0, "shape"),
    ],
)
@pytest.mark.parametrize("old", [False, True])
def test_a_tensor_has_no_more_than_its_storage(size, stride, count, offset, says, old, tmp_path):
    data = PROTO + b"}" + op("prototypes.weight") + pickled_tensor(size, stride, count, offset) + b"s" + STOP
    if old:
        data = data.replace(b"tQ", b"NtQ")
        head = b"".join(pickle.dumps(v, 2) for v in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}))
        end = pickle.dumps(["0"], 2) + struct.pack("<q", 12) + bytes(48)
        (tmp_path / "a").write_bytes(head + data + end)
        says = "another length" if says and "bytes" in says else says
    else:
        (tmp_path / "a").write_bytes(zipped(data, {"data/0": bytes(48)}))
    if says is None:
        assert diagnose(tmp_path / "a").zero_rows == 4
        return
    with pytest.raises(InputError, match=says):
        diagnose(tmp_path / "a")


def test_a_storage_that_is_not_aligned_is_read_all_the_same(tmp_path):
    data = PROTO + b"}" + op("w") + pickled_tensor((4, 3), (3, 1), 12, kind="torch DoubleStorage") + b"s" + STOP
    for pad in range(8):
        content = zipped(data, {"x" * (pad + 1): b"", "data/0": np.arange(12.0).tobytes()})
        (tmp_path / "a").write_bytes(content)
        assert read_tensors(tmp_path / "a")["w"].flatten().tolist() == list(range(12))


def test_zeros_that_shrank_a_thousandfold_are_not_unpacked(tmp_path, monkeypatch):
    monkeypatch.setattr("uncollapse.checkpoints.torchfile._INFLATED", 1 << 20)
    data = PROTO + b"}" + op("w") + pickled_tensor((4, 3), (3, 1), 12) + b"s" + STOP
    (tmp_path / "a").write_bytes(zipped(data, {"data/0": bytes(1 << 21)}, zipfile.ZIP_DEFLATED))
    with pytest.raises(InputError, match="unpack to far more"):
        diagnose(tmp_path / "a")


# ------------------------------------------------------------------------------------ said to be what it is


def test_a_compressed_archive_is_read(tmp_path):
    torch.save({"prototypes.weight": T.w}, tmp_path / "a")
    with zipfile.ZipFile(tmp_path / "a") as old, zipfile.ZipFile(tmp_path / "b", "w", zipfile.ZIP_DEFLATED) as new:
        for info in old.infolist():
            new.writestr(info.filename, old.read(info))
    assert diagnose(tmp_path / "b", EPS).unique == {EPS: T.unique}


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("zip_format", [True, False])
def test_every_pickle_protocol_is_read(protocol, zip_format, tmp_path):
    content = {"prototypes.weight": torch.nn.Parameter(T.w), "a": np.float64(3), "b": {1, 2}, "n": np.arange(6.0)}
    torch.save(content, tmp_path / "a", pickle_protocol=protocol, _use_new_zipfile_serialization=zip_format)
    assert diagnose(tmp_path / "a", EPS).unique == {EPS: T.unique}
    assert flatten(read_tensors(tmp_path / "a"))["n"].tolist() == list(range(6))


def test_a_newer_archive_is_not_called_damaged(tmp_path):
    with zipfile.ZipFile(tmp_path / "a", "w") as archive:
        archive.writestr("archive/data.pkl", PROTO + b"}" + STOP)
        archive.writestr("archive/version", b"11\n")
    with pytest.raises(InputError, match="version 11, newer than the 10") as caught:
        diagnose(tmp_path / "a")
    assert "damaged" not in str(caught.value)
    (tmp_path / "b").write_bytes(zipped(b"\x80\x07}."))
    with pytest.raises(InputError, match="protocol 7, newer than"):
        diagnose(tmp_path / "b")
    np.save(tmp_path / "c.npy", np.ones((3, 4)))
    (tmp_path / "c").write_bytes(b"\x93NUMPY\x04\x00" + (tmp_path / "c.npy").read_bytes()[8:])
    with pytest.raises(InputError, match="a numpy file of a newer format") as caught:
        diagnose(tmp_path / "c")
    assert "damaged" not in str(caught.value)


def test_an_encrypted_archive_is_said_to_be_one(tmp_path):
    content = bytearray(zipped(PROTO + b"}" + STOP))
    for sign, at in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        place = content.find(sign)
        while place >= 0:
            content[place + at] |= 1
            place = content.find(sign, place + 1)
    (tmp_path / "a").write_bytes(content)
    with pytest.raises(InputError, match="an encrypted archive"):
        diagnose(tmp_path / "a")


@pytest.mark.parametrize("save", ["torch", "safetensors", "npy", "npz"])
def test_names_that_are_not_utf8_are_only_names(save, tmp_path):
    from safetensors.torch import save_file

    plain = tmp_path / ("a.npz" if save == "npz" else "a.npy")
    if save == "torch":
        torch.save(T.w, plain)
    elif save == "safetensors":
        save_file({"x": T.w}, plain)
    else:
        (np.save if save == "npy" else np.savez)(plain, T.w.numpy())
    odd = os.fsdecode(os.fsencode(tmp_path) + b"/\xff\x1b[31m\n.pt")
    os.rename(plain, odd)
    assert diagnose(odd, EPS).unique == {EPS: T.unique}
    with pytest.raises(InputError, match=r"\\xff\\x1b\[31m\\n\.pt2: no such file"):
        diagnose(odd + "2")


def test_quantised_and_four_bit_weights_are_said_to_be_that(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.save({"prototypes.weight": torch.quantize_per_tensor(T.w, 0.1, 0, torch.qint8)}, tmp_path / "q")
    with pytest.raises(InputError, match="quantised weights have to be dequantised"):
        diagnose(tmp_path / "q")
    if not hasattr(torch, "float4_e2m1fn_x2"):
        return
    torch.save({"prototypes.weight": torch.zeros(4, 6, dtype=torch.uint8).view(torch.float4_e2m1fn_x2)}, tmp_path / "f")
    with pytest.raises(InputError, match="float4_e2m1fn_x2"):
        diagnose(tmp_path / "f")
