"""How fast a step was: tokens and needed FLOP a second, and how much of it was waiting for data."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..models.costs import step_flop
from ..models.draft import DraftConfig

#: Dense bfloat16 FLOP a second of GPUs by a part of their name, as their makers say; others get no MFU.
PEAK = {"H100": 989e12, "H200": 989e12, "B200": 2250e12, "A100": 312e12}


def peak_of(device: torch.device) -> float | None:
    """What the device could do at best, where that is known."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((peak for part, peak in PEAK.items() if part in name), None)


def figures(
    config: DraftConfig, tokens: int, rows: Sequence[int], seconds: float, waited: float, peak: float | None
) -> dict[str, float]:
    """The timing fields of a step's line in metrics.jsonl.

    Args:
        config: the head.
        tokens: of the whole batch.
        rows: its supervised rows, step by step of the rollout.
        seconds: that the step took.
        waited: seconds of them in which there was no batch.
        peak: FLOP a second of all devices together; None where that is not known.
    """
    flop = step_flop(config, tokens, rows)
    found = {
        "seconds": round(seconds, 6),
        "tokens_per_s": round(tokens / seconds),
        "tflop_per_s": round(flop / seconds / 1e12, 4),
        "waited": round(waited / seconds, 4),
    }
    return found if peak is None else found | {"mfu": round(flop / seconds / peak, 4)}
