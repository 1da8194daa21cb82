"""``uncollapse export``."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

from uncollapse.cli.terminal import print_json
from uncollapse.errors import ConfigError
from uncollapse.export.formats import FORMATS
from uncollapse.shown import shown


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "export",
        help="hand encoder, head and prototypes of a run to timm, the Hugging Face hub, or DINO's readers",
        epilog="timm: weights that timm loads. hf: a folder as the Hugging Face hub has them (nothing is uploaded). "
        "safetensors: the same tensors for any encoder, conv3 too. dino: a .pth in the layout of DINO's checkpoints, "
        "student and teacher. Each holds head.safetensors, with the prototypes, and a model card.",
    )
    parser.add_argument("folder", type=Path, metavar="RUN", help="a run folder, or a checkpoint file of one")
    parser.add_argument("--to", required=True, choices=FORMATS, help="format")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder to write (default: RUN/export-FORMAT)")
    parser.add_argument("--side", choices=("teacher", "student"), help="which network (default: the teacher)")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier export in --out")
    parser.add_argument("--json", action="store_true", help="print one JSON object, and nothing else on stdout")
    parser.set_defaults(run=_export)


def _export(arguments: argparse.Namespace, overrides: dict[str, Any]) -> None:
    if overrides:
        raise ConfigError(f"export takes no {', '.join('--' + name for name in overrides)}")
    from uncollapse.export.write import export

    written = export(arguments.folder, arguments.to, arguments.out, arguments.side, arguments.overwrite)
    if arguments.json:
        print_json({**dataclasses.asdict(written), "out": str(written.out)})
        return
    print(f"exported    {written.side} of step {written.step:,} → {shown(written.out)}")
    for name, facts in written.sets.items():
        eps, count = next(iter(facts.unique.items()))
        print(f"prototypes  {name}: {facts.K:,} × {facts.D}, {facts.kind}; {count:,} unique at ε = {eps}")
    for name, size in written.files.items():
        print(f"file        {name} ({size:,} bytes)")
    for note in written.notes:
        print(f"note        {note}")
