"""Configuration files of any content: a configuration, or one line that says what is wrong. Never more."""

import random
import time
from contextlib import suppress

import pytest
import yaml

from uncollapse.config.load import dump_config, load_config
from uncollapse.errors import ConfigError

LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (LAUGHS.encode(), "more than 10,000 values"),
        (b"seed: &s [*s]", "more than 10,000 values"),
        (b"seed: " + b"[" * 10_000, "too deep"),
        (b"run: " * 3000 + b"1", "not valid YAML"),
        ("data: {path: Stra\xdfe}".encode("latin-1"), "not text in UTF-8"),
        (b"seed: 2020-01-01", "seed: should be a valid integer, got '2020-01-01'"),
        (b"seed: " + b"9" * 5000, "not valid YAML"),
        (b"seed: " + b"9" * 4000, "seed: "),
        (b"seed: 0x" + b"f" * 90_000, "integer"),
        (b"seed: !!int ''", "not valid YAML"),
        (b"seed: !!binary AAAA", "JSON"),
        (b"seed: !!python/object/apply:os.getcwd []", "not valid YAML"),
        (b"? [1, 2]\n: 3", "not valid YAML"),
        (b"seed: .inf", "seed"),
        (b"# nothing but words\n" * 60_000, "too large"),
        (b"\x00\x01\x02", "not valid YAML"),
    ],
    ids=range(16),
)
def test_a_file_that_is_no_recipe_is_one_line(content, expected, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_bytes(content)
    began = time.monotonic()
    with pytest.raises(ConfigError) as error:
        load_config(path)
    message = str(error.value)
    assert message.startswith(str(path))
    assert expected in message
    assert "\n" not in message
    assert len(message) < 600 + len(str(path))
    assert time.monotonic() - began < 5


def test_a_folder_in_place_of_the_file_is_no_recipe(tmp_path):
    (tmp_path / "config.yaml").mkdir()
    with pytest.raises(ConfigError, match="no recipe"):
        load_config(tmp_path / "config.yaml")


def test_aliases_within_bounds_are_read(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("views: {mean: &m [0.5, 0.5, 0.5], std: *m}")
    assert load_config(path).views.std == (0.5, 0.5, 0.5)


def test_damaged_configurations_raise_our_errors_only(tmp_path):
    whole = dump_config(load_config("demo")).encode()
    rng = random.Random(0)
    path = tmp_path / "config.yaml"
    refused = 0
    for _ in range(150):
        path.write_bytes(damaged(whole, rng))
        with suppress(ConfigError):
            load_config(path)
            refused -= 1
        refused += 1
    assert refused > 50


def damaged(content: bytes, rng: random.Random) -> bytes:
    """One to three random changes: cut, flipped bytes, pieces doubled or replaced by what YAML reads in its own way."""
    odd = [
        b"&a ",
        b"*a",
        b"!!int ",
        b"!!float x",
        b"[",
        b"{",
        b": ",
        b"- ",
        b"\t",
        b"~",
        b"1e999",
        b"\xff",
        b"? ",
        b"|",
    ]
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(len(content) + 1)
        kind = rng.randrange(4)
        if kind == 0:
            content = content[:at]
        elif kind == 1:
            content = content[:at] + bytes([rng.randrange(256)]) + content[at + 1 :]
        elif kind == 2:
            content = content[:at] + rng.choice(odd) + content[at + rng.randrange(4) :]
        else:
            end = min(len(content), at + rng.randrange(60))
            content = content[:end] + content[at:end] + content[end:]
    return content


def test_what_is_written_is_plain_yaml():
    assert yaml.safe_load(dump_config(load_config("demo")))["seed"] == 0
