"""What a target takes, known from its configuration before anything is loaded.

check_memory(settings, config, capacity=700, device=torch.device("cuda"), dtype=torch.bfloat16)
"""

from __future__ import annotations

import os
from pathlib import Path

import torch

from ...configs.errors import UserError
from .cache import cache_bytes
from .config import DecoderConfig
from .families import SETTING
from .parallel import Group, neighbours
from .weights import allocate, total_bytes

GB = 10**9
MEMINFO = Path("/proc/meminfo")


def needed_bytes(config: DecoderConfig, capacity: int, dtype: torch.dtype) -> tuple[int, int]:
    """What the weights take, and what a cache of ``capacity`` tokens takes, in the process that has this share."""
    weights = total_bytes(allocate(config, torch.device("meta"), dtype))
    return weights, cache_bytes(config, capacity, dtype.itemsize)


def free_bytes(device: torch.device) -> int:
    """The memory of ``device`` that nothing uses, or that is used for what can be read again."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    for line in MEMINFO.read_text().splitlines() if MEMINFO.exists() else ():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def check_memory(
    name: str,
    config: DecoderConfig,
    capacity: int,
    device: torch.device,
    dtype: torch.dtype,
    group: Group | None = None,
    beside: int = 0,
) -> None:
    """Refuse a target that does not fit.

    Args:
        name: of the target, for the error.
        config: what it computes.
        capacity: tokens of all its caches.
        device: where it shall be.
        dtype: its numerics.
        group: the processes that hold it together, all of which ask, and all of which are refused where one has to be. Those
            of one machine share its memory; each has a GPU of its own.
        beside: bytes of a draft head that comes beside it.

    Raises:
        UserError: weights, cache and head take more than is free.
    """
    weights, cache = needed_bytes(config, capacity, dtype)
    free = free_bytes(device)
    if group is not None:
        free = group.least(free if device.type == "cuda" else free // neighbours())
    if weights + cache + beside > free:
        where = f"on each of {config.share.size} processes " if config.share.size > 1 else ""
        head = f", the draft head {beside / GB:,.1f} GB" if beside else ""
        problem = (
            f"{where}its weights take {weights / GB:,.1f} GB and a cache of {capacity:,} tokens {cache / GB:,.1f} GB{head}, "
            f"and {free / GB:,.1f} GB of {device} are free"
        )
        remedy = (
            "take a device with more memory, more processes (record.tensor_parallel, eval.tensor_parallel), or bfloat16 "
            "(target.dtype, for eval eval.dtype)"
        )
        raise UserError(SETTING, name, problem, remedy)
