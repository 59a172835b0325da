"""Processes: the cores that one may use; which of torchrun's this is, and sums over these."""
import os

import torch
import torch.distributed as dist

# Cores that this process may use: a container's or taskset's may be fewer than the machine's
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
RANK = int(os.environ.get("RANK", 0))  # which process this is
WORLD = int(os.environ.get("WORLD_SIZE", 1))  # of how many
LOCAL = int(os.environ.get("LOCAL_RANK", 0))  # and which GPU of its machine it has


def sum_over_processes(x: torch.Tensor) -> torch.Tensor:
    """Sums a tensor over the processes, in place."""
    if WORLD > 1:
        dist.all_reduce(x)
    return x


def merge_over_processes(bad: dict[int, str]) -> dict[int, str]:
    """Merges the pictures {index: reason} that each of the processes couldn't read."""
    found = [bad] * WORLD
    if WORLD > 1:
        dist.all_gather_object(found, bad)
    merged = {}
    for part in found:
        merged |= part
    return merged
