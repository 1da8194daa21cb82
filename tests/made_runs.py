"""Run folders made up for tests of the report: real shapes, arranged numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from uncollapse.config.load import dump_config, load_config
from uncollapse.run_folder.read import RunRecord, read_run

K, HELD_OUT = 256, 360
# per arm: distinct at the four ε (%), used, alive, N_eff(.025), N_eff(.25), bits, kNN, linear
ARMS: dict[str, tuple[tuple[float, ...], int, int, float, float, float, float, float]] = {
    "joint": ((11.5, 10.2, 8.5, 3.9), 64, 99, 38.5, 32.0, 3.99, 0.46, 0.51),
    "koleo": ((100, 100, 98.3, 94.7), 40, 90, 24.1, 18.3, 3.44, 0.443, 0.5),
    "decoupled": ((97.8, 86.9, 70.3, 19.9), 133, 200, 74.2, 23.1, 4.40, 0.4475, 0.52),
    "decoupled-paper": ((100, 98, 97.6, 96.5), 10, 44, 9.6, 1.8, 1.03, 0.30, 0.33),
    "fixed": ((100, 100, 100, 99.4), 12, 14, 10.6, 10.6, 3.12, 0.423, 0.45),
}
EPS = ("0.025", "0.1", "0.25", "0.5")


def make_summary(arm: str, seed: int = 0, **changes: Any) -> dict[str, Any]:
    shares, used, alive, n_eff, n_wide, bits, knn, linear = ARMS[arm]
    unique = {eps: round(K * share / 100) for eps, share in zip(EPS, shares, strict=True)}
    parts = {
        "views": 0.006,
        "teacher": 0.005,
        "prototypes": 0.001,
        "student": 0.009,
        "backward": 0.016,
        "optimiser": 0.002,
        "ema": 0.001,
        "diagnosis": 0.0008,
    }
    if arm.startswith("decoupled"):
        parts["prototypes"] = 0.004
    summary = {
        "name": arm,
        "seed": seed,
        "prototypes": K,
        "dim": 64,
        "steps": 1200,
        "n_held_out": HELD_OUT,
        "n_train": 1437,
        "unique": unique,
        "unique_used": {eps: min(used, count) for eps, count in unique.items()},
        "used": used + seed,
        "alive": alive,
        "alive_window": 200,
        "effective": {"0.025": n_eff, "0.1": (n_eff + n_wide) / 2, "0.25": n_wide, "0.5": n_wide / 2},
        "view_information": {
            "bits": bits,
            "standard_error": 0.05,
            "fitted_on": "training images",
            "n_fit": 1437,
            "n": HELD_OUT,
            "views": 6,
        },
        "unique_means": {eps: n // 2 if arm.startswith("decoupled") else n for eps, n in unique.items()},
        "used_by_target": used + 5,
        "target_agreement": 0.28,
        "knn_balanced": knn - 0.01,
        "linear_balanced": linear - 0.02,
        "data": "digits",
        "data_digest": f"train-{seed}",
        "held_out_digest": f"held-{seed}",
        "knn": knn + 0.002 * seed,
        "knn_ci95": [knn - 0.02, knn + 0.02],
        "linear": linear,
        "linear_ci95": [linear - 0.02, linear + 0.02],
        "knn_untrained": 0.33,
        "seconds_per_step": sum(parts.values()),
        "step_parts": parts,
        "diagnosis_share": 0.02,
        "device": "cpu",
        "loss": 3.2,
    }
    return summary | changes


def make_set(arm: str, **changes: Any) -> dict[str, Any]:
    """What a run of ``arm`` says of a further set of prototypes, half as many of which are used by patches."""
    of_run = make_summary(arm)
    names = ("prototypes", "dim", "unique", "unique_used", "unique_means", "used", "alive", "alive_window", "effective")
    own = {"used": of_run["used"] // 2, "n": 5000, "unit": "patches", "movement": 0.25}
    return {name: of_run[name] for name in names} | own | changes


def make_run(
    root: Path,
    arm: str,
    seed: int = 0,
    name: str = "",
    config: dict[str, Any] | None = None,
    method: str = "",
    **changes: Any,
) -> Path:
    """Write a run folder the way training does: its numbers are arranged, its shapes are real.

    Args:
        arm: the mode.
        method: none is a folder of before there were several.
    """
    folder = root / (name or f"{f'{method}-' if method else ''}{arm}-{seed}")
    folder.mkdir(parents=True)
    summary = make_summary(arm, seed, **changes)
    keys = {"prototypes.kind": arm.removesuffix("-sinkhorn"), "prototypes.count": summary["prototypes"], "seed": seed}
    keys |= {"data.path": str(root / "images")} | (config or {})
    if method:
        summary["method"] = method
        keys |= {"method.name": method.removesuffix("-vmf"), "prototypes.vmf": method.endswith("-vmf")}
        needed = {"carp": {"method.block": 32}, "ibot": {"backbone.name": "vit_tiny_patch16_224"}}
        keys |= needed.get(method.removesuffix("-vmf"), {})
    (folder / "config.yaml").write_text(dump_config(load_config("demo", keys)))
    (folder / "summary.json").write_text(json.dumps(summary))
    rng = np.random.default_rng([seed, *arm.encode()])
    rows: list[dict[str, Any]] = []
    for step in range(0, 1201, 10):
        fall = float(np.exp(-step / 250))
        rows.append(
            {
                "step": step,
                "epoch": step / 11,
                "kind": "step",
                "lr": 0.003,
                "loss": 3.2 + 2.3 * fall + 0.05 * rng.normal(),
                "teacher_entropy": 1 + 4.5 * fall + 0.03 * rng.normal(),
                "alive": round(summary["alive"] + (K - summary["alive"]) * fall),
            }
        )
        if step % 100 == 0:
            sets = {"unique": summary["unique"]}
            sets |= {f"unique/{part}": of["unique"] for part, of in summary.get("sets", {}).items() if "unique" in of}
            swept = {of: {eps: round(n + (K - n) * fall) for eps, n in counts.items()} for of, counts in sets.items()}
            rows.append({"step": step, "epoch": step / 11, "kind": "sweep", **swept})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    centres = rng.normal(size=(6, 2)) if arm == "joint" else rng.normal(size=(K, 2))
    circle = np.repeat(centres, -(-K // len(centres)), axis=0)[:K] + 0.05 * rng.normal(size=(K, 2))
    usage = np.zeros(K, dtype=int)
    weights = 1 / np.arange(1, summary["used"] + 1)
    chosen = rng.choice(summary["used"], HELD_OUT - summary["used"], p=weights / weights.sum())
    usage[rng.permutation(K)[: summary["used"]]] = 1 + np.bincount(chosen, minlength=summary["used"])
    ids = np.flatnonzero(usage)[:4]
    shade = np.linspace(0, 1, 16)[:, None] * np.linspace(0, 1, 16)
    motifs = (255 * np.stack([np.rot90(shade, turn) for turn in range(4)])).astype(np.uint8)
    unique = np.repeat(np.repeat(motifs[:, None, :, :, None], 6, 1), 3, -1)
    group = len(ids) if arm == "joint" else 0
    eps = np.linspace(0, 0.5, 41)
    # The same images are hard for every arm, so that their differences vary less than each of them does.
    image = np.random.default_rng([seed, 7])
    hard, chance = 1.5 * image.normal(size=HELD_OUT), image.permutation(np.linspace(0, 1, HELD_OUT))
    bits = summary["view_information"]["bits"] if isinstance(summary["view_information"], dict) else 1.0
    information = hard - hard.mean() + bits + 0.1 * rng.normal(size=HELD_OUT)
    np.savez(
        folder / "diagnosis.npz",
        view_information_of_image=information.astype(np.float32),
        knn_correct=chance < (summary["knn"] or 0),
        linear_correct=chance < (summary["linear"] or 0),
        circle=circle / np.linalg.norm(circle, axis=1, keepdims=True),
        usage=usage,
        sweep_eps=eps,
        sweep_unique=np.interp(eps, [0, *map(float, EPS)], [K, *summary["unique"].values()]),
        movement=rng.random(K) * (0.02 if arm == "decoupled-paper" else 1.0),
        duplicate_ids=ids[:group],
        duplicate_images=np.repeat(unique[:1], 4, 0)[:group],
        unique_ids=ids,
        unique_images=unique,
    )
    return folder


def make_all(root: Path, seeds: int = 1, **changes: Any) -> list[RunRecord]:
    return [read_run(make_run(root, arm, seed, **changes)) for arm in ARMS for seed in range(seeds)]
