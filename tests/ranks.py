"""Several gloo processes on this machine, for tests of what ranks do together."""

import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

# A server that has imported torch once: processes start in a fraction of a second, and, unlike a fork of the test
# process itself, inherit none of its threads.
multiprocessing.set_forkserver_preload(["torch", "torch.distributed", "hypothesis", "uncollapse.prototypes.mixture"])


def _rank(rank: int, world: int, folder: str, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    torch.save(function(dist.group.WORLD, *args), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def on_ranks(function: Callable[..., Any], world: int, folder: Path, *args: Any) -> list[Any]:
    """``function(group, *args)`` on ``world`` ranks that meet in ``folder``: what each returned, in rank order."""
    mp.start_processes(_rank, (world, str(folder), function, args), nprocs=world, start_method="forkserver")
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(world)]
