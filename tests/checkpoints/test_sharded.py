"""Folders of torch.distributed.checkpoint, as torch writes them, and such that want to run something."""

import copy
import os
import pickle
import subprocess
import sys

import pytest
import torch
from test_encoder import head, vit

from layouts import EPS, S, T, X, prefixed
from uncollapse.checkpoints.read import flatten, read_tensors
from uncollapse.checkpoints.sharded import INDEX
from uncollapse.diagnosis.run import diagnose, diagnose_file
from uncollapse.errors import InputError

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

TWO_RANKS = """
import sys, torch, torch.distributed as dist, torch.multiprocessing as mp
import torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

def save(rank, folder, content):
    dist.init_process_group("gloo", init_method=f"file://{folder}.start", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    content["model"] = {n: distribute_tensor(t, mesh, [Shard(0)]) for n, t in content["model"].items()}
    dcp.save(content, checkpoint_id=folder)
    dist.barrier(); dist.destroy_process_group()

if __name__ == "__main__":
    mp.spawn(save, (sys.argv[1], torch.load(sys.argv[2])), nprocs=2)
"""


def dinov3_run() -> dict:
    """What DINOv3's training code saves every few thousand iterations."""
    model = {
        "student.dino_head.last_layer.weight": S.w,
        "model_ema.dino_head.last_layer.weight": T.w,
        "model_ema.ibot_head.last_layer.weight": X.w,
        "model_ema.backbone.cls_token": torch.ones(8),
    }
    return {"iteration": 199, "model": model, "optimizer": {"state": {"a.exp_avg": torch.randn(9, 5)}}}


@pytest.fixture
def folder(tmp_path):
    import torch.distributed.checkpoint as dcp

    dcp.save(dinov3_run(), checkpoint_id=tmp_path / "199", no_dist=True)
    return tmp_path / "199"


def expect(folder) -> None:
    found = diagnose_file(folder, EPS)
    sets = [(d.source.side, d.source.set, d.source.key) for d in found]
    assert sets == [
        ("teacher", "cls", "model/model_ema.dino_head.last_layer.weight"),
        ("teacher", "patch", "model/model_ema.ibot_head.last_layer.weight"),
        ("student", "cls", "model/student.dino_head.last_layer.weight"),
    ]
    assert [d.unique[EPS] for d in found] == [p.unique for p in (T, X, S)]


def test_a_folder_of_one_rank_is_counted(folder):
    expect(folder)
    tensors = flatten(read_tensors(folder))
    assert all(torch.equal(tensors[f"model/{n}"], t) for n, t in dinov3_run()["model"].items())
    assert not any("optimizer" in path for path in tensors)


def test_shards_of_two_ranks_are_joined(tmp_path):
    """69 rows over two ranks: the shards differ in size."""
    content = dinov3_run()
    del content["model"]["model_ema.backbone.cls_token"]
    torch.save(content, tmp_path / "content")
    (tmp_path / "save.py").write_text(TWO_RANKS)
    done = subprocess.run(
        [sys.executable, tmp_path / "save.py", tmp_path / "199", tmp_path / "content"],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-800:]
    assert len(list((tmp_path / "199").glob("*.distcp"))) == 2
    expect(tmp_path / "199")
    (tmp_path / "199" / "__1_0.distcp").unlink()
    with pytest.raises(InputError, match=r"__1_0\.distcp is missing"):
        diagnose(tmp_path / "199")


def test_only_prototypes_are_read_where_nothing_else_is_asked(folder):
    found = flatten(read_tensors(folder, only=lambda path: "last_layer" in path))
    assert found["model/model_ema.backbone.cls_token"].is_meta
    assert torch.equal(found["model/student.dino_head.last_layer.weight"], S.w)


def test_a_folder_is_run_on_images(tmp_path):
    import torch.distributed.checkpoint as dcp

    net = {**prefixed("backbone.", vit().state_dict()), **head("dino_head.mlp.", 64, 48)[1]}
    model = prefixed("teacher.", {**net, "dino_head.last_layer.weight": T.w})
    dcp.save({"model": model}, checkpoint_id=tmp_path / "9", no_dist=True)
    (d,) = diagnose_file(tmp_path / "9", EPS, data="builtin:digits", limit=20)
    assert d.images.n == 20


# ------------------------------------------------------------------------------------------- bad folders


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.mark.parametrize("where", ["index", "shard"])
def test_nothing_in_a_folder_is_run(where, folder, tmp_path):
    mark = tmp_path / "ran"
    if where == "index":
        index = pickle.loads((folder / INDEX).read_bytes())
        index.planner_data = Evil(str(mark))
        (folder / INDEX).write_bytes(pickle.dumps(index))
    else:
        (folder / "__0_0.distcp").write_bytes(pickle.dumps(Evil(str(mark))) * 2000)
    with pytest.raises(InputError) as caught:
        diagnose(folder, trust=where == "index")  # nobody needs to trust an index
    assert "\n" not in str(caught.value)
    assert not mark.exists()
    if where == "index":
        assert "io.open" in str(caught.value)
        pickle.loads((folder / INDEX).read_bytes())
        assert mark.exists()  # the same file does run it where everything is allowed


def changed(index, name, **fields):
    """The index with the place of one tensor's values changed."""
    at = next(at for at in index.storage_data if at.fqn.endswith(name))
    place = copy.copy(index.storage_data[at])
    for field, value in fields.items():
        setattr(place, field, value)
    index.storage_data[at] = place


LAYER = "student.dino_head.last_layer.weight"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda index: changed(index, LAYER, relative_path="../secret"), "outside of the folder"),
        (lambda index: changed(index, LAYER, relative_path="/etc/hostname"), "outside of the folder"),
        (lambda index: changed(index, LAYER, offset=10**12), "damaged or cut off"),
        (lambda index: changed(index, LAYER, length="x"), "damaged or cut off"),
        (lambda index: changed(index, LAYER, transform_descriptors=["zstd"]), "compressed"),
        (lambda index: index.storage_data.clear(), "0 of .* values"),
        (lambda index: index.state_dict_metadata.update({f"model.{LAYER}": None}), None),
        (
            lambda index: setattr(index.state_dict_metadata[f"model.{LAYER}"], "size", torch.Size([3, 3])),
            "does not fit",
        ),
        (lambda index: setattr(index, "state_dict_metadata", 3), "no index"),
    ],
)
def test_a_damaged_index_is_one_line(change, says, folder):
    index = pickle.loads((folder / INDEX).read_bytes())
    change(index)
    (folder / INDEX).write_bytes(pickle.dumps(index))
    if says is None:
        assert len(diagnose_file(folder, EPS)) == 2
        return
    with pytest.raises(InputError, match=says) as caught:
        diagnose(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("size", [0, 40])
def test_a_cut_off_index_or_shard_is_one_line(size, folder):
    shard, index = folder / "__0_0.distcp", folder / INDEX
    whole = shard.read_bytes()
    shard.write_bytes(whole[:size])
    with pytest.raises(InputError, match="damaged or cut off"):
        diagnose(folder)
    shard.write_bytes(whole)
    index.write_bytes(index.read_bytes()[:size])
    with pytest.raises(InputError, match="is damaged"):
        diagnose(folder)


def test_a_folder_of_folders_is_told_apart(folder):
    folder.rename(folder.with_name("99"))
    with pytest.raises(InputError, match=r"distributed checkpoints \(99\); name one"):
        diagnose(folder.parent)


def test_one_ranks_own_file_gets_advice(tmp_path, monkeypatch):
    """FSDP's sharded state dicts hold a class that only the trainer can join."""
    import torch.distributed._shard.sharded_tensor.api as api

    fake = type("ShardedTensor", (), {"__module__": api.__name__})
    with monkeypatch.context() as patch:
        patch.setattr(api, "ShardedTensor", fake)
        torch.save({"model": {"a": fake()}}, tmp_path / "model_0009.rank_0.pth")
    with pytest.raises(InputError, match=r"one rank's shard.*teacher_checkpoint"):
        diagnose(tmp_path / "model_0009.rank_0.pth")
