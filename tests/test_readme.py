"""The Python of the README and of docs/loop.md runs as printed, and its loop keeps its prototypes."""

import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import uncollapse


def blocks(name):
    text = (Path(__file__).parent.parent / name).read_text(encoding="utf-8")
    return re.findall(r"^```python\n(.*?)^```", text, flags=re.S | re.M)


BLOCKS = blocks("docs/loop.md")
MIXTURE = "mixture = OnlineMixture(components=256, dim=64, rows=2 * 64)"


def run(block, **names):
    torch.manual_seed(0)
    exec(compile(block, "docs/loop.md", "exec"), names)
    return names


def test_there_is_something_to_run():
    assert sum(MIXTURE in block for block in BLOCKS) == 1
    assert len(BLOCKS) >= 3


@pytest.mark.parametrize("block", [block for block in BLOCKS if MIXTURE not in block])
def test_every_other_block_runs_as_printed(block, capsys):
    run(block)


def test_the_five_lines_run_inside_a_step(capsys):
    (five,) = blocks("README.md")
    assert len(five.replace("\n\n", "\n").splitlines()) == 5
    head = torch.nn.Linear(64, 1024, bias=False)
    names = run(five, head=head, z=torch.randn(256, 64), loss=torch.zeros(()))
    names["loss"].backward()
    assert head.weight.grad.abs().sum() > 0
    assert re.fullmatch(r"\d+ alive, 1024 unique of 1024\n", capsys.readouterr().out)


def distinct_in_use(names):
    """Prototypes that are some digit's nearest, and further than 0.025 from one another."""
    directions = names["mixture"].directions()
    with torch.no_grad():
        z = F.normalize(names["teacher"](names["images"]), dim=-1)
    return uncollapse.unique_prototypes(directions[(z @ directions.T).argmax(1).unique()], eps=0.025)


def test_the_loop_runs_as_printed_and_its_prototypes_stay_apart(capsys):
    """228 of 256 prototypes are in use and distinct after 200 steps. With the form that the README had before, one
    temperature for all and directions from the origin, it is 38 after 100 and 11 after 200."""
    block = next(block for block in BLOCKS if MIXTURE in block)
    names = run(block)
    assert re.fullmatch(r"\d+ alive, \d+ unique of 256\n", capsys.readouterr().out)
    before = 'OnlineMixture(256, 64, 128, "diagonal", 20.0, "sinkhorn", 0.05, False)'
    old = run(block.replace(MIXTURE, f"mixture = {before}").replace("range(200)", "range(100)"))
    assert old["mixture"].temperature == 0.05
    assert distinct_in_use(names) > 128
    assert distinct_in_use(names) > 4 * distinct_in_use(old)
    assert float(names["loss"].detach()) < 0.95 * float(torch.tensor(256.0).log())
