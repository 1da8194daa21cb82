"""Every benchmark in one process: tables on the screen, all numbers in ``benchmarks/results.json``.

    python benchmarks/run.py [NAME ...] [--sizes 1024 8192 65536] [--device cuda] [--out FILE] [--markdown FILE]

A module that fails is reported at the end and does not stop the others; what was measured is written after each.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import torch

from common import SIZES, describe, print_rows, to_json

HERE = Path(__file__).parent
NAMES = sorted(p.stem for p in HERE.glob("*.py") if p.stem not in ("common", "run"))


def markdown(results: dict[str, Any]) -> str:
    """All results as tables: others' time and memory as multiples of ours, ours as a multiple of the limit."""
    lines = ["# What each function costs", "", "Written by `make bench ARGS='--markdown docs/benchmarks.md'`.", ""]
    for device in results.values():
        for name, measured in device.items():
            lines += [f"## {name}", "", f"{measured['machine']}.", ""]
            lines += [
                "| function | size | ms | MiB | × limit | others: time, memory ÷ ours | target |",
                "|" + "---|" * 7,
            ]
            for row in measured["rows"]:
                limit = f"{row['times_limit']:.2f} {row['limit_is']}" if row["times_limit"] else ""
                others = [
                    f"{n} {row['time_over_ours'][n]:.2f}×, {row['memory_over_ours'][n]:.1f}×" if c else f"{n}: not run"
                    for n, c in row["others"].items()
                ]
                met = {None: "", True: ": met", False: ": **missed**"}[row["met"]]
                time, memory = 1e3 * row["ours"]["seconds"], row["ours"]["peak"] / 2**20
                notes = "; ".join([*others, row["note"]] if row["note"] else others)
                cells = [row["name"], row["size"], f"{time:.1f}", f"{memory:.0f}", limit, notes, row["target"] + met]
                lines.append("| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |")
            lines.append("")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", choices=[*NAMES, []], help="default: all of them")
    parser.add_argument("--sizes", type=int, nargs="+", default=list(SIZES), help="numbers of prototypes")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=HERE / "results.json")
    parser.add_argument("--markdown", type=Path, help="write all of the results file there as tables, too")
    options = parser.parse_args()
    device = torch.device(options.device)
    results = json.loads(options.out.read_text()) if options.out.is_file() else {}
    failed = []
    for name in options.names or NAMES:
        start = time.perf_counter()
        try:
            rows = list(importlib.import_module(name).rows(options.sizes, device))
        except Exception:
            traceback.print_exc()
            failed.append(name)
            continue
        print_rows(name, rows, device)
        print(f"{name}: {time.perf_counter() - start:.0f} s\n", flush=True)
        results.setdefault(device.type, {})[name] = {"machine": describe(device), "rows": to_json(rows)}
        options.out.write_text(json.dumps(results, indent=1) + "\n")
    print(f"written to {options.out}")
    if options.markdown:
        options.markdown.write_text(markdown(results))
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
