"""torchrun's processes: which one this is, and sums over them."""
import os
import sys

import torch
import torch.distributed as dist

from support.machine import pick_device

RANK = int(os.environ.get("RANK", 0))  # which process this is
WORLD = int(os.environ.get("WORLD_SIZE", 1))  # of how many
LOCAL = int(os.environ.get("LOCAL_RANK", 0))  # and which GPU of its machine it has


def start_processes(name: str) -> torch.device:
    """Joins torchrun's other processes, if there are any; only the first goes on printing. Returns this one's
    device, for --device `name`."""
    if WORLD > 1 and torch.cuda.is_available() and name != "cpu":
        torch.cuda.set_device(LOCAL)  # which "cuda" means from here on
    device = pick_device(name)
    if WORLD > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    if RANK:
        sys.stdout = open(os.devnull, "w")
    return device


def total(x: torch.Tensor) -> torch.Tensor:
    """Sums a tensor over the processes, in place."""
    if WORLD > 1:
        dist.all_reduce(x)
    return x


def united(bad: dict[int, str]) -> dict[int, str]:
    """Merges the pictures {index: reason} that each of the processes couldn't read."""
    found = [bad] * WORLD
    if WORLD > 1:
        dist.all_gather_object(found, bad)
    merged = {}
    for part in found:
        merged |= part
    return merged
