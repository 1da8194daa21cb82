"""How a run's prototypes move while it trains, from its checkpoints: ``python study/along.py RUN [RUN ...]``.

Train with ``--log.checkpoint_steps N --log.keep_checkpoints 99``. For each checkpoint, over held-out images:

- ``start``: mean cosine of each prototype's mean to its random start, and the share of means above .9 (never moved);
- ``mass``: share of components with at least a tenth of an equal share of the images (the mixture's own
  responsibilities, or the teacher's softmax), and the entropy of these masses as a number of components;
- ``nearest``: mean cosine of a mean to its nearest other one;
- ``rank``: effective rank of the projections.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.nn.functional as F

from uncollapse.checkpoints.own import own_encoder
from uncollapse.config.facts import targets_of
from uncollapse.config.load import load_config
from uncollapse.data.load import load_images
from uncollapse.measure.geometry import effective_rank
from uncollapse.measure.monitor import nearest_cosine
from uncollapse.measure.unique import cosine_argmax
from uncollapse.models.embed import embed
from uncollapse.prototypes.build import initial_prototypes
from uncollapse.run_folder.checkpoint import load_checkpoint
from uncollapse.targets.softmax import log_marginal

HEAD = "  step   cosine to start   moved not at all   mass ≥ .1 fair   by entropy   used   nearest   rank"


@torch.no_grad()
def follow(run: Path) -> None:
    config = load_config(run / "config.yaml")
    _, held_out = load_images(config.data.path, config.data, config.seed, config.data.val_path or None, progress=False)
    start = F.normalize(initial_prototypes(config).means(), dim=-1)
    print(f"{run.name}: {config.method.name}, {config.prototypes.kind}, {len(held_out):,} held-out images")
    print(HEAD)
    for file in sorted((run / "checkpoints").glob("step-*.json")):
        step = int(file.stem.removeprefix("step-"))
        saved = load_checkpoint(run / "checkpoints", step)
        assert saved is not None
        encoder, _ = own_encoder(saved, "teacher", run)
        prototypes = initial_prototypes(config)
        prototypes.load_state_dict(saved["prototypes"]["cls"])
        z = embed(encoder, held_out, config.views, config.data.workers, torch.device("cpu"))[1]
        means = F.normalize(prototypes.means(), dim=-1)
        cosine = (means * start).sum(-1)
        target = prototypes.posterior if targets_of(config) == "posterior" else prototypes.targets
        mass = log_marginal(target(z[None], config.teacher.temperature)).exp()
        used = len(cosine_argmax(z, prototypes.vectors("teacher")).unique())
        numbers = (
            f"{float(cosine.mean()):15.3f}",
            f"{float((cosine > 0.9).float().mean()):16.1%}",
            f"{float((mass * len(mass) >= 0.1).float().mean()):14.1%}",
            f"{float(torch.special.entr(mass).sum().exp()):10.1f}",
            f"{used:4d}",
            f"{nearest_cosine(means, len(means)):7.3f}",
            f"{effective_rank(z):4.1f}",
        )
        print("   ".join([f"{step:6d}", *numbers]))


if __name__ == "__main__":
    if len(sys.argv) < 2:
        raise SystemExit(__doc__)
    for folder in sys.argv[1:]:
        follow(Path(folder))
