"""Every benchmark in one process: tables on the screen, all numbers in ``benchmarks/results.json``.

    python benchmarks/run.py [NAME ...] [--sizes 1024 8192 65536] [--device cuda] [--out FILE]

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

import torch

from common import SIZES, describe, print_rows, to_json

HERE = Path(__file__).parent
NAMES = sorted(p.stem for p in HERE.glob("*.py") if p.stem not in ("common", "run"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", choices=[*NAMES, []], help="default: all of them")
    parser.add_argument("--sizes", type=int, nargs="+", default=list(SIZES), help="numbers of prototypes")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=HERE / "results.json")
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
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
