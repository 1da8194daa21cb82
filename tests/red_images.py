"""Image files that tell their number: the red of their pixels is it."""

from pathlib import Path

from PIL import Image

from uncollapse.data.images import ImageSet


def save(path: Path, red: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (6, 4), (red, 100, 200)).save(path)


def folders(root: Path, counts: dict[str, int], first: int = 0) -> Path:
    """A folder for each class with so many images, numbered through."""
    for name, count in counts.items():
        for k in range(count):
            save(root / name / f"{k:03}.png", first)
            first += 1
    return root


def reds(*sets: ImageSet) -> list[int]:
    """The numbers of all images of some sets."""
    return [images.image(i).getpixel((0, 0))[0] for images in sets for i in range(len(images))]  # type: ignore[index]
