"""Multi-crop views: two implementations that agree, and randomness that depends on nothing but its key."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
import torchvision.transforms.v2 as T
import torchvision.transforms.v2.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from uncollapse.config.schema import DataConfig, ViewConfig
from uncollapse.data.batched import apply_batch, multicrop
from uncollapse.data.images import Files, LazyImages, MemoryImages
from uncollapse.data.load import load_images
from uncollapse.data.views import eval_shorter_side, sample_params, uniforms, view_specs
from uncollapse.data.workers import apply_one, eval_batches, eval_crop, view_loader
from uncollapse.errors import DataError

SMALL = ViewConfig(global_size=24, local_size=12, local_count=2)
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)


def smooth_images(n: int = 24, canvas: int = 48, seed: int = 0) -> MemoryImages:
    """Colourful low-frequency images of different sizes on one canvas."""
    rng = np.random.default_rng(seed)
    sizes = rng.integers(canvas // 2, canvas + 1, (n, 2))
    sizes[0] = canvas
    pixels = torch.zeros(n, 3, canvas, canvas, dtype=torch.uint8)
    for i, (h, w) in enumerate(sizes.tolist()):
        coarse = torch.from_numpy(rng.random((1, 3, 5, 5)))
        fine = torch.nn.functional.interpolate(coarse, (h, w), mode="bicubic").clamp(0, 1)
        pixels[i, :, :h, :w] = (fine[0] * 255).round().to(torch.uint8)
    return MemoryImages(pixels, torch.from_numpy(sizes))


def digits() -> MemoryImages:
    images = load_images("builtin:digits", DataConfig(), 0)[0]
    assert isinstance(images, MemoryImages)
    return MemoryImages(images.canvas[:64], images.sizes[:64])


@pytest.fixture
def folder(tmp_path):
    """24 lossless files and the same images in memory."""
    images = smooth_images()
    names = [f"{i:02}.png" for i in range(len(images))]
    for i, name in enumerate(names):
        images.image(i).save(tmp_path / name)
    lazy = LazyImages(Files(str(tmp_path), names), np.arange(len(images)), max_bad=0.2)
    return tmp_path, lazy, images


def levels(a: torch.Tensor, b: torch.Tensor, std: tuple[float, float, float]) -> torch.Tensor:
    """Absolute differences of normalised views in grey levels (0..255)."""
    return (a - b).abs() * torch.tensor(std).view(3, 1, 1) * 255


OPERATIONS = {
    "crop": {},
    "brightness": {"jitter": 1.0, "jitter_strength": (0.8, 0.0, 0.0, 0.0)},
    "contrast": {"jitter": 1.0, "jitter_strength": (0.0, 0.8, 0.0, 0.0)},
    "saturation": {"jitter": 1.0, "jitter_strength": (0.0, 0.0, 0.8, 0.0)},
    "hue": {"jitter": 1.0, "jitter_strength": (0.0, 0.0, 0.0, 0.5)},
    "jitter": {"jitter": 0.8, "jitter_strength": (0.4, 0.4, 0.2, 0.1)},
    "grey": {"grey": 0.5},
    "blur": {"blur": 1.0},
    "wide blur": {"blur": 1.0, "blur_sigma": (3.0, 9.0)},
    "solarise": {"solarise": 0.5},
}


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("size", [12, 40])
def test_batched_views_equal_torchvisions(name, size):
    plain = view_specs(dataclasses.replace(SMALL, mean=MEAN, std=STD))[0]
    off = {"jitter": 0.0, "grey": 0.0, "blur": 0.0, "solarise": 0.0}
    spec = dataclasses.replace(plain, size=size, **{**off, **OPERATIONS[name]})
    for images in (smooth_images(), digits()):
        params = sample_params(uniforms(1, 2, 0, len(images)), images.sizes, spec)
        batched = apply_batch(images.canvas, params, spec)
        single = torch.stack([apply_one(images.image(i), params, i, spec) for i in range(len(images))])
        assert batched.shape == (len(images), 3, size, size)
        assert batched.dtype == torch.float32
        # Pillow also rounds between its two passes; colour operations can magnify that. Solarising or turning
        # the hue of a nearly grey pixel is discontinuous, so only the mean is bounded tightly.
        assert levels(batched, single, STD).mean() < 0.6
        assert levels(batched, single, STD).quantile(0.99) < 4


@pytest.mark.parametrize("spec", view_specs(SMALL)[:3])
def test_full_augmentation_agrees(spec):
    images = smooth_images(n=48)
    params = sample_params(uniforms(0, 5, 1, len(images)), images.sizes, spec)
    single = torch.stack([apply_one(images.image(i), params, i, spec) for i in range(len(images))])
    assert levels(apply_batch(images.canvas, params, spec), single, spec.std).mean() < 0.2


@pytest.mark.parametrize("count", [1, 2, 3])
def test_there_are_as_many_global_views_as_asked_for(count):
    """The first may be made otherwise than the others."""
    specs = view_specs(dataclasses.replace(SMALL, global_count=count, local_count=2, blur=(1.0, 0.1, 0.5)))
    assert [spec.name for spec in specs] == ["global"] * count + ["local"] * 2
    assert [spec.blur for spec in specs] == [1.0, *[0.1] * (count - 1), 0.5, 0.5]


def test_identity_view_is_the_image():
    image = smooth_images().canvas[:1]
    spec = dataclasses.replace(
        view_specs(SMALL)[0],
        size=48,
        scale=(1.0, 1.0),
        flip=1.0,
        jitter=0,
        grey=0,
        blur=0,
        mean=(0.0, 0.0, 0.0),
        std=(1.0, 1.0, 1.0),
    )
    params = sample_params(uniforms(0, 0, 0, 1), [[48, 48]], spec)
    params = dataclasses.replace(
        params, top=torch.tensor([0]), left=torch.tensor([0]), height=torch.tensor([48]), width=torch.tensor([48])
    )
    assert torch.equal((apply_batch(image, params, spec) * 255).round().to(torch.uint8), image.flip(-1))


def test_canvas_outside_the_image_is_never_seen():
    images = smooth_images()
    dirty = images.canvas.clone()
    for i, (h, w) in enumerate(images.sizes.tolist()):
        dirty[i, :, h:, :] = 255
        dirty[i, :, :, w:] = 255
    specs = view_specs(SMALL)
    params = sample_params(uniforms(0, 0, 0, len(images)), images.sizes, specs[0])
    assert torch.equal(apply_batch(images.canvas, params, specs[0]), apply_batch(dirty, params, specs[0]))


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 400), st.integers(1, 400), st.floats(0.01, 1), st.floats(0.01, 1), st.integers(0, 1000))
def test_crops_lie_within_the_image(height, width, low, high, seed):
    spec = dataclasses.replace(view_specs(SMALL)[0], scale=(min(low, high), max(low, high)))
    p = sample_params(uniforms(seed, 0, 0, 16), [[height, width]] * 16, spec)
    assert (p.top >= 0).all()
    assert (p.left >= 0).all()
    assert (p.height >= 1).all()
    assert (p.width >= 1).all()
    assert (p.top + p.height <= height).all()
    assert (p.left + p.width <= width).all()
    assert (p.order.sort(1).values == torch.arange(4)).all()


@pytest.mark.parametrize(
    ("size", "scale"), [((60, 80), (0.25, 1.0)), ((30, 200), (0.5, 1.0)), ((64, 64), (0.05, 0.25))]
)
def test_crop_distribution_is_torchvisions(size, scale):
    n = 3000
    torch.manual_seed(0)
    theirs = T.RandomResizedCrop(8, scale=scale)
    blank = torch.zeros(3, *size, dtype=torch.uint8)
    drawn = [theirs.make_params([blank]) for _ in range(n)]
    p = sample_params(uniforms(0, 0, 0, n), [list(size)] * n, dataclasses.replace(view_specs(SMALL)[0], scale=scale))
    for key in ("top", "left", "height", "width"):
        a = np.sort(getattr(p, key).numpy())
        b = np.sort([d[key] for d in drawn])
        both = np.union1d(a, b)
        gap = np.abs(np.searchsorted(a, both, "right") - np.searchsorted(b, both, "right")).max() / n
        assert gap < 1.95 * np.sqrt(2 / n), key  # Kolmogorov-Smirnov, 0.1 %


def test_probabilities_and_ranges():
    spec = view_specs(ViewConfig())[1]
    n = 4000
    p = sample_params(uniforms(3, 0, 1, n), [[32, 32]] * n, spec)
    for name in ("flip", "jitter", "grey", "blur", "solarise"):
        assert getattr(p, name).float().mean() == pytest.approx(getattr(spec, name), abs=0.04), name
    assert p.factors.amin(0).tolist() == pytest.approx([0.6, 0.6, 0.8, -0.1], abs=0.01)
    assert p.factors.amax(0).tolist() == pytest.approx([1.4, 1.4, 1.2, 0.1], abs=0.01)
    assert 0.1 <= p.sigma.min() < 0.12
    assert 1.98 < p.sigma.max() <= 2
    first = p.order[:, 0].bincount(minlength=4) / n
    assert first.tolist() == pytest.approx([0.25] * 4, abs=0.04)


def test_specs_are_dinos():
    specs = view_specs(ViewConfig())
    assert [s.name for s in specs] == ["global"] * 2 + ["local"] * 10
    assert [s.blur for s in specs[:3]] == [1.0, 0.1, 0.5]
    assert [s.solarise for s in specs[:3]] == [0.0, 0.2, 0.0]
    assert [s.size for s in specs[1:3]] == [224, 96]


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**40), st.integers(0, 2**40), st.integers(0, 12), st.integers(0, 500), st.integers(1, 20))
def test_uniforms_of_a_position_depend_on_its_key_only(seed, step, view, first, batch):
    rows = uniforms(seed, step, view, batch, first)
    assert np.array_equal(uniforms(seed, step, view, first + batch)[first:], rows)
    assert not np.array_equal(uniforms(seed, step + 1, view, batch, first), rows)
    assert not np.array_equal(uniforms(seed + 1, step, view, batch, first), rows)
    assert not np.array_equal(uniforms(seed, step, view + 1, batch, first), rows)


def test_views_repeat_and_do_not_depend_on_the_number_of_ranks():
    images, specs = smooth_images(), view_specs(SMALL)
    indices = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:16]
    whole = multicrop(images, indices, 7, 3, specs, range(16))
    again = multicrop(images, indices, 7, 3, specs, range(16))
    other = multicrop(images, indices, 7, 4, specs, range(16))
    halves = [multicrop(images, indices[r], 7, 3, specs, range(16)[r]) for r in (slice(0, 8), slice(8, 16))]
    strided = [multicrop(images, indices[r::2], 7, 3, specs, range(r, 16, 2)) for r in (0, 1)]
    assert [v.shape[-1] for v in whole] == [24, 24, 12, 12]
    for k, view in enumerate(whole):
        assert torch.equal(view, again[k])
        assert not torch.equal(view, other[k])
        # Batched products may round differently with the batch, by far less than a grey level.
        torch.testing.assert_close(torch.cat([h[k] for h in halves]), view, atol=1e-4, rtol=0)
        torch.testing.assert_close(torch.stack([h[k] for h in strided], 1).flatten(0, 1), view, atol=1e-4, rtol=0)
    assert not torch.equal(whole[2], whole[3])


def plan() -> list[tuple[int, list[int], list[int]]]:
    return [(0, [3, 1, 2], [0, 1, 2]), (1, [23, 3, 9], [4, 5, 6]), (2, [7], [0])]


def test_workers_change_nothing_and_match_memory(folder):
    _, lazy, memory = folder
    specs = view_specs(SMALL)
    state = torch.get_rng_state()
    here = list(view_loader(lazy, plan(), specs, 5, workers=0))
    there = list(view_loader(lazy, iter(plan()), specs, 5, workers=2))
    assert torch.equal(state, torch.get_rng_state())
    assert len(here) == len(there) == 3
    for a, b, (step, indices, positions) in zip(here, there, plan(), strict=True):
        batched = multicrop(memory, indices, 5, step, specs, positions)
        for x, y, z, spec in zip(a, b, batched, specs, strict=True):
            assert torch.equal(x, y)
            assert levels(x, z, spec.std).mean() < 0.2


@pytest.mark.parametrize("workers", [0, 1])
def test_unreadable_files_are_replaced_and_reported(folder, workers):
    path, lazy, _ = folder
    (path / "03.png").write_bytes(b"")
    specs = view_specs(SMALL)
    views = next(view_loader(lazy, [(0, [3], [0])], specs, 5, workers))
    expected = next(view_loader(lazy, [(0, [4], [0])], specs, 5, 0))
    assert all(torch.equal(a, b) for a, b in zip(views, expected, strict=True))
    assert len(lazy.bad) == 1
    assert "03.png: no" in lazy.bad[0] or "03.png: not an image" in lazy.bad[0]


@pytest.mark.parametrize("workers", [0, 1])
def test_too_many_unreadable_files_stop_the_loader_in_one_line(folder, workers):
    path, lazy, _ = folder
    for i in range(6):
        (path / f"{i:02}.png").write_bytes(b"broken")
    with pytest.raises(DataError, match=r"5 of 24 images cannot be read.*data\.max_bad=0\.2") as error:
        list(view_loader(lazy, [(0, [0], [0])], view_specs(SMALL), 5, workers))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("size", [16, 48, 64, 80])
def test_evaluation_views_agree(folder, size):
    _, lazy, memory = folder
    batched = list(eval_batches(memory, size, MEAN, STD, batch=10))
    loaded = list(eval_batches(lazy, size, MEAN, STD, batch=10, workers=0))
    assert torch.cat([i for i, _ in batched]).tolist() == list(range(24))
    assert torch.cat([i for i, _ in loaded]).tolist() == list(range(24))
    a, b = torch.cat([x for _, x in batched]), torch.cat([x for _, x in loaded])
    assert a.shape == (24, 3, size, size)
    assert levels(a, b, STD).mean() < 0.2
    assert levels(a, b, STD).max() < 2.5


def test_evaluation_view_is_resize_then_centre_crop():
    image = smooth_images().image(1)
    assert eval_shorter_side(224) == 256
    assert eval_shorter_side(32) == 32
    cropped = F.pil_to_tensor(T.CenterCrop(96)(T.Resize(110, T.InterpolationMode.BICUBIC)(image)))
    assert torch.equal(eval_crop(image, 96), cropped)


def test_evaluation_views_of_files_are_normalised_crops(folder):
    _, lazy, _ = folder
    ((_, x),) = eval_batches(lazy, 16, MEAN, STD, batch=24)
    for i in (0, 7):
        crop = F.to_dtype(eval_crop(lazy.image(i), 16), torch.float32, scale=True)
        assert torch.equal(x[i], F.normalize(crop, list(MEAN), list(STD)))


def test_evaluation_leaves_out_unreadable_images(folder):
    path, lazy, _ = folder
    (path / "03.png").write_bytes((path / "03.png").read_bytes()[:60])
    batches = list(eval_batches(lazy, 16, MEAN, STD, batch=8, workers=1))
    assert torch.cat([i for i, _ in batches]).tolist() == [i for i in range(24) if i != 3]
    assert [b.split(": ")[0][-6:] for b in lazy.bad] == ["03.png"]


def test_autocast_does_not_touch_pixels():
    images, specs = smooth_images(), view_specs(SMALL)
    plain = multicrop(images, range(8), 0, 0, specs, range(8))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = multicrop(images, range(8), 0, 0, specs, range(8))
    assert all(torch.equal(a, b) for a, b in zip(plain, mixed, strict=True))


@pytest.mark.gpu
def test_cuda_views_equal_cpu_views():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    images, specs = smooth_images(), view_specs(SMALL)
    cpu = multicrop(images, range(16), 0, 0, specs, range(16))
    gpu = multicrop(images, range(16), 0, 0, specs, range(16), device="cuda")
    for a, b, spec in zip(cpu, gpu, specs, strict=True):
        assert levels(a, b.cpu(), spec.std).mean() < 0.2


def test_one_pixel_image():
    images = MemoryImages(torch.full((1, 3, 1, 1), 200, dtype=torch.uint8), torch.ones(1, 2, dtype=torch.int64))
    for view in multicrop(images, [0], 0, 0, view_specs(SMALL), [0]):
        assert view.isfinite().all()
    params = sample_params(uniforms(0, 0, 0, 1), images.sizes, view_specs(SMALL)[0])
    assert apply_one(Image.new("RGB", (1, 1)), params, 0, view_specs(SMALL)[0]).shape == (3, 24, 24)
