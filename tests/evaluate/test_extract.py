"""Features made once: the same from memory, from files and from the cache, whatever interrupts."""

import errno
import os
import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from timm.models.vision_transformer import VisionTransformer

from uncollapse.data.images import Files, LazyImages, MemoryImages, subset
from uncollapse.errors import DataError
from uncollapse.evaluate import extract as module
from uncollapse.evaluate.encoder import EvalEncoder
from uncollapse.evaluate.extract import cache_key, extract, identity

N, SIZE = 23, 16


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(module, "SHARD", 8)


@pytest.fixture(scope="module")
def encoder():
    return made()


def made():
    torch.manual_seed(0)
    vit = VisionTransformer(img_size=SIZE, patch_size=8, embed_dim=16, depth=2, num_heads=2, num_classes=0)
    head = torch.nn.Sequential(torch.nn.Linear(16, 6), torch.nn.Tanh())
    return EvalEncoder(vit, SIZE, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4), head, name="test")


def pixels(seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 256, (18 + i % 5, 20, 3), dtype=np.uint8) for i in range(N)]


def memory(seed=0):
    canvas, sizes = torch.zeros(N, 3, 22, 20, dtype=torch.uint8), torch.zeros(N, 2, dtype=torch.int64)
    for i, p in enumerate(pixels(seed)):
        canvas[i, :, : p.shape[0], : p.shape[1]] = torch.from_numpy(p).permute(2, 0, 1)
        sizes[i] = torch.tensor(p.shape[:2])
    return MemoryImages(canvas, sizes, torch.arange(N) % 3, ["a", "b", "c"])


def lazy(folder, broken=(), max_bad=0.5):
    folder.mkdir(exist_ok=True)
    for i, p in enumerate(pixels()):
        path = folder / f"{i:02d}.png"
        Image.fromarray(p).save(path)
        if i in broken:
            path.write_bytes(b"no image")
    files = Files(str(folder), [f"{i:02d}.png" for i in range(N)])
    return LazyImages(files, np.arange(N), torch.arange(N) % 3, ["a", "b", "c"], max_bad=max_bad)


class Counting:
    """How many images went through the encoder."""

    def __init__(self, monkeypatch, stop_after=None):
        self.images, real = 0, module.forward

        def forward(encoder, x):
            if stop_after is not None and self.images + len(x) > stop_after:
                raise KeyboardInterrupt
            self.images += len(x)
            return real(encoder, x)

        monkeypatch.setattr(module, "forward", forward)


def equal(a, b):
    for name in ("cls", "mean", "projections", "indices", "labels"):
        left, right = getattr(a, name), getattr(b, name)
        assert (left is None) == (right is None), name
        if left is not None:
            torch.testing.assert_close(left, right, rtol=0, atol=2e-6, msg=name)


def test_features_are_the_encoder_s_on_central_crops(encoder):
    images = memory()
    found = extract(encoder, images, batch=5)
    assert found.cls.shape == found.mean.shape == (N, 2, 16)
    assert found.cls.dtype == torch.float32
    assert found.projections.shape == (N, 6)
    assert torch.equal(found.labels, images.labels)
    assert torch.equal(found.indices, torch.arange(N))
    assert found.classes == ["a", "b", "c"]


def test_an_image_is_resized_cropped_and_normalised_as_in_the_protocol(encoder, tmp_path):
    found = extract(encoder, lazy(tmp_path / "a"), batch=5)
    i = 4  # 22 rows of 20 pixels: the shorter side becomes 16, the longer 17 (17.6 cut off), then 16 rows are cut out
    image = Image.fromarray(pixels()[i]).resize((16, 17), Image.Resampling.BICUBIC)
    candidates = []
    for top in (0, 1):  # half a pixel has to be rounded somewhere
        x = torch.from_numpy(np.array(image)[top : top + 16]).permute(2, 0, 1).float() / 255
        x = (x - torch.tensor(encoder.mean).view(3, 1, 1)) / torch.tensor(encoder.std).view(3, 1, 1)
        candidates.append(encoder.layers(x[None])[0][0])
    assert min(float((c - found.cls[i]).abs().max()) for c in candidates) < 1e-5


def test_files_give_the_features_of_the_same_pixels_in_memory(encoder, tmp_path):
    from_files = extract(encoder, lazy(tmp_path / "a"), batch=5)
    in_memory = extract(encoder, memory(), batch=23)
    # one resizes bytes, the other floats: half a grey level apart
    torch.testing.assert_close(from_files.cls, in_memory.cls, rtol=0, atol=0.05)
    equal(from_files, extract(encoder, lazy(tmp_path / "a"), batch=4, workers=2))


@pytest.mark.parametrize("kind", ["memory", "lazy"])
def test_the_second_time_nothing_is_computed(encoder, tmp_path, monkeypatch, kind):
    images = memory() if kind == "memory" else lazy(tmp_path / "images")
    first = extract(encoder, images, cache=tmp_path / "cache", batch=5)
    counting, said = Counting(monkeypatch), []
    again = extract(encoder, images, cache=tmp_path / "cache", batch=7, say=said.append)
    assert counting.images == 0
    assert said == ["features from cache"]
    equal(first, again)


@pytest.mark.parametrize(("stop", "kept"), [(9, 8), (17, 16), (22, 16)])
@pytest.mark.parametrize("kind", ["memory", "lazy"])
def test_an_interrupted_extraction_goes_on_where_it_stopped(encoder, tmp_path, monkeypatch, kind, stop, kept):
    images = memory() if kind == "memory" else lazy(tmp_path / "images")
    whole = extract(encoder, images, batch=3)
    with monkeypatch.context() as patch:
        Counting(patch, stop)
        with pytest.raises(KeyboardInterrupt):
            extract(encoder, images, cache=tmp_path / "cache", batch=1)
    counting, said, seen = Counting(monkeypatch), [], []
    resumed = extract(
        encoder,
        images,
        cache=tmp_path / "cache",
        batch=3,
        say=said.append,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert counting.images == N - kept
    assert said == [f"features of {kept} of {N} images from cache"]
    assert seen[0][0] > kept
    assert seen[-1] == (N, N)
    equal(whole, resumed)


def test_a_killed_process_leaves_whole_shards(tmp_path):
    """For real: the process dies by SIGKILL in the middle of an extraction."""
    import os
    import signal
    import subprocess
    import sys
    from pathlib import Path

    code = f"""
import sys; sys.path[:0] = [{str(Path(__file__).parent)!r}]
import os, signal, pathlib, torch
import test_extract as t
t.module.SHARD = 8
real, seen = t.module.forward, [0]
def forward(encoder, x):
    seen[0] += len(x)
    if seen[0] > 19: os.kill(os.getpid(), signal.SIGKILL)
    return real(encoder, x)
t.module.forward = forward
t.extract(t.made(), t.memory(), cache=pathlib.Path({str(tmp_path)!r}), batch=2)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ}, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert len(list(tmp_path.glob("*/shard-*.sha256"))) == 2


@pytest.mark.parametrize("damage", ["cut", "flipped", "no digest", "gone"])
def test_a_damaged_shard_is_made_again_and_no_other(encoder, tmp_path, monkeypatch, damage):
    whole = extract(encoder, memory(), cache=tmp_path, batch=4)
    path = next(tmp_path.glob("*/shard-00001.safetensors"))
    content = bytearray(path.read_bytes())
    if damage == "cut":
        path.write_bytes(content[:-10])
    elif damage == "flipped":
        content[-3] ^= 1
        path.write_bytes(content)
    elif damage == "no digest":
        path.with_suffix(".sha256").unlink()
    else:
        path.unlink()
    counting = Counting(monkeypatch)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        again = extract(encoder, memory(), cache=tmp_path, batch=4)
    assert counting.images == 8
    assert any("damaged" in str(w.message) for w in caught) == (damage in ("cut", "flipped"))
    equal(whole, again)
    extract(encoder, memory(), cache=tmp_path)
    assert counting.images == 8


def test_the_key_is_of_everything_that_changes_a_feature(encoder, tmp_path):
    cpu, keys = torch.device("cpu"), []
    keys.append(cache_key(encoder, memory(), cpu))
    keys.append(cache_key(encoder, memory(seed=1), cpu))
    keys.append(cache_key(encoder, memory(), torch.device("cuda")))
    for field, value in (("size", 24), ("mean", (0.5, 0.4, 0.2)), ("std", (0.2, 0.3, 0.5))):
        other = EvalEncoder(encoder.module, encoder.size, encoder.mean, encoder.std, encoder.head)
        setattr(other, field, value)
        keys.append(cache_key(other, memory(), cpu))
    keys.append(cache_key(EvalEncoder(encoder.module, SIZE, encoder.mean, encoder.std), memory(), cpu))
    assert len(set(keys)) == len(keys)
    relabelled = memory()
    relabelled.labels = relabelled.labels.flip(0)
    assert cache_key(encoder, relabelled, cpu) == keys[0]


def test_a_changed_file_or_another_choice_is_other_data(tmp_path):
    images = lazy(tmp_path / "a")
    before = identity(images)
    assert before == identity(LazyImages(images.source, images.index.copy(), None))
    chosen = LazyImages(images.source, images.index[:-1])
    assert identity(chosen) != before
    path = tmp_path / "a" / "03.png"
    path.write_bytes(path.read_bytes() + b" ")
    assert identity(images) != before


def test_labels_come_from_the_data_and_not_from_the_cache(encoder, tmp_path):
    extract(encoder, memory(), cache=tmp_path)
    relabelled = memory()
    relabelled.labels = relabelled.labels.flip(0)
    assert torch.equal(extract(encoder, relabelled, cache=tmp_path).labels, relabelled.labels)


@pytest.mark.parametrize("broken", [{0, 7, 8}, {22}, set(range(8, 16))])
def test_unreadable_images_are_left_out_and_stay_out(encoder, tmp_path, monkeypatch, broken):
    images = lazy(tmp_path / "images", broken)
    found = extract(encoder, images, cache=tmp_path / "cache", batch=5)
    kept = torch.tensor([i for i in range(N) if i not in broken])
    assert torch.equal(found.indices, kept)
    assert torch.equal(found.labels, images.labels[kept])
    assert len(images.bad) == len(broken)
    equal(found.take(torch.arange(len(kept))), extract(encoder, lazy(tmp_path / "others", broken), batch=1))
    counting = Counting(monkeypatch)
    equal(found, extract(encoder, images, cache=tmp_path / "cache"))
    assert counting.images == 0


def test_a_part_of_a_set_answers_for_its_own_images_alone(encoder, tmp_path):
    images = lazy(tmp_path / "images", {5}, max_bad=0.1)
    extract(encoder, images)
    assert len(images.bad) == 1
    part = subset(images, [0, 1, 2])
    assert part.bad == []
    assert len(extract(encoder, part)) == 3  # one of three would be too many
    with pytest.raises(DataError, match="cannot be read"):
        extract(encoder, subset(images, [4, 5, 6]))


def test_names_that_are_not_utf8_are_names(encoder, tmp_path):
    images = lazy(tmp_path / "images")
    name = os.fsdecode(b"caf\xe9.png")
    try:
        (tmp_path / "images" / images.source.names[0]).rename(tmp_path / "images" / name)
    except OSError:
        pytest.skip("this file system takes UTF-8 alone")
    images.source.names[0] = name
    assert len(extract(encoder, images, cache=tmp_path / "cache")) == N


@pytest.mark.parametrize("workers", [0, 1])
def test_too_many_unreadable_images_are_an_error(encoder, tmp_path, workers):
    with pytest.raises(DataError, match="cannot be read"):
        extract(encoder, lazy(tmp_path / "a", set(range(6)), max_bad=0.1), workers=workers)


def test_features_that_are_not_finite_are_counted(tmp_path):
    torch.manual_seed(0)
    vit = VisionTransformer(img_size=SIZE, patch_size=8, embed_dim=16, depth=1, num_heads=2, num_classes=0)
    with torch.no_grad():
        vit.norm.weight[0] = float("nan")
    with pytest.raises(DataError, match=f"test: cls of {N} of {N} images are NaN or infinite"):
        extract(EvalEncoder(vit, SIZE, name="test"), memory())


def test_a_full_disk_costs_the_cache_and_nothing_else(encoder, tmp_path, monkeypatch):
    def full(path, content):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module, "write_atomically", full)
    with pytest.warns(UserWarning, match="No space left on device.*--cache") as caught:
        found = extract(encoder, memory(), cache=tmp_path)
    assert len(caught) == 1
    equal(found, extract(encoder, memory()))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kind", ["memory", "lazy"])
def test_a_gpu_gives_the_same_features_in_bfloat16_s_precision(encoder, tmp_path, kind):
    images = memory() if kind == "memory" else lazy(tmp_path / "images")
    expected = extract(encoder, images)
    found = extract(encoder, images, device="cuda", cache=tmp_path / "cache", batch=4, workers=1)
    encoder.to("cpu")
    assert found.cls.device.type == "cpu"
    assert float((found.cls - expected.cls).norm() / expected.cls.norm()) < 0.02
    assert torch.equal(found.indices, expected.indices)
