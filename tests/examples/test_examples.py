"""Every example runs as a user would run it, and shows what its first lines say."""

import math
import runpy
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "examples"
pytestmark = pytest.mark.filterwarnings("ignore")


def run(name, **arguments):
    return runpy.run_path(str(FOLDER / f"{name}.py"))["main"](**arguments)


def needs_lightly():
    pytest.importorskip("lightly", reason="needs lightly: pip install 'uncollapse[examples]'")


def test_none_is_without_a_test():
    here = Path(__file__).read_text(encoding="utf-8")
    assert not [path.stem for path in FOLDER.glob("*.py") if f'run("{path.stem}"' not in here]


def test_koleo_proto_keeps_lightlys_dino_prototypes_apart(capsys):
    """196 of 512 unique at ε = 0.25 without, 511 with it; N_eff 37 and 46."""
    needs_lightly()
    results = run("lightly_dino_koleo")
    assert results[0.0]["unique"] < 300
    assert results[0.1]["unique"] > 450
    assert "unique at ε = 0.25" in capsys.readouterr().out


def test_the_mixture_keeps_lightlys_dino_prototypes_in_use():
    """N_eff 10 with DINO's own layer, 39 with the mixture."""
    needs_lightly()
    results = run("lightly_dino_mixture")
    assert results["decoupled"]["effective"] > 2 * results["joint"]["effective"]
    assert results["decoupled"]["used"] > 2 * results["joint"]["used"]


def test_the_callback_logs_in_a_run_that_is_not_ours(capsys):
    logged = run("lightning_callback", epochs=2)
    assert logged["prototypes/n"] == 500
    assert 1 < logged["prototypes/effective@0.025"] <= logged["prototypes/used"] <= 128
    assert logged["prototypes/view_information"] > 2 * logged["prototypes/view_information_error"] > 0
    assert {"prototypes/alive", "prototypes/unique@0.025"} < set(logged)
    assert "prototypes/unique@0.025" in capsys.readouterr().out


def test_the_swav_loop_learns_and_its_prototypes_live():
    result = run("swav_fused")
    assert result["losses"][-1] < 0.97 * math.log(512)  # what it is to know nothing
    assert result["alive"] > 350
    assert result["window"] == 80


def test_a_codebook_by_gradient_has_dead_codes_and_the_mixture_has_not():
    """N_eff 42 and 199 of 256, reconstruction error 0.032 and 0.027."""
    results = run("vq_codebook")
    assert results["mixture"]["effective"] > 2 * results["gradient"]["effective"]
    assert results["mixture"]["error"] < results["gradient"]["error"]


def test_a_router_without_balancing_leaves_its_experts():
    """N_eff 1.4 and 29 of 32, with most of the 32 unique in both: unique alone would not show it."""
    results = run("moe_router")
    assert results[0.0]["effective"] < 8 < 16 < results[0.1]["effective"]
    assert results[0.0]["unique"] > 16
