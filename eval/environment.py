"""What a measurement ran on and with, since a number without it means nothing."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from pathlib import Path

import torch

from ..data.stage import Json

ENGINE = f"transformers {metadata.version('transformers')}"
PACKAGES = ("torch", "transformers", "accelerate", "safetensors", "numpy")


def environment(device: torch.device, processes: int = 1) -> dict[str, Json]:
    """Versions, processor, threads and device, as report.json holds them; ``processes`` hold the target together."""
    return {
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in PACKAGES},
        "system": f"{platform.system()} {platform.release()}",
        "processor": _processor(),
        "cores": os.cpu_count(),
        "processes": processes,
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
    }


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()
