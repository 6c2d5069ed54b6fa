"""Checkpoints that are whole or not there, and the best head so far.

runs/<name>/train/checkpoints/step-000200/     everything that exact resuming needs, written by accelerate
runs/<name>/train/progress.json                where the best head came from
runs/<name>/draft/                             the best head, in serving format
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from ..data.files import sync_folder
from ..models.checkpoint import save_draft
from ..models.draft import Eagle3Draft

PREFIX = "step-"


def checkpoints(folder: Path) -> list[Path]:
    """The finished checkpoints, oldest first."""
    return sorted(path for path in folder.glob(f"{PREFIX}*") if path.suffix != ".tmp")


def step_of(checkpoint: Path) -> int:
    """The number of optimiser steps behind a checkpoint."""
    return int(checkpoint.name.removeprefix(PREFIX))


def save(accelerator: Accelerator, folder: Path, step: int, keep: int) -> None:
    """Write the state after ``step`` steps, then delete all but the newest ``keep`` checkpoints. Every rank calls this."""
    final = folder / f"{PREFIX}{step:06d}"
    if final.exists():
        return
    temporary = final.with_suffix(".tmp")
    if accelerator.is_main_process:
        shutil.rmtree(temporary, ignore_errors=True)
        folder.mkdir(parents=True, exist_ok=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(temporary))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        _publish(temporary, final)
        for old in checkpoints(folder)[:-keep]:
            shutil.rmtree(old)
    accelerator.wait_for_everyone()


def save_best(draft: Eagle3Draft, folder: Path, provenance: dict[str, Any]) -> None:
    """Replace the head in ``folder``; a crash leaves the old one or the new one (the main process calls this)."""
    temporary, old = folder.with_suffix(".tmp"), folder.with_suffix(".old")
    for path in (temporary, old):
        shutil.rmtree(path, ignore_errors=True)
    save_draft(draft, temporary, torch.bfloat16, provenance)
    if folder.exists():
        folder.rename(old)
    _publish(temporary, folder)
    shutil.rmtree(old, ignore_errors=True)


def _publish(temporary: Path, final: Path) -> None:
    """Give a folder its name once every byte of it is durable."""
    for path in temporary.rglob("*"):
        if path.is_file():
            handle = os.open(path, os.O_RDONLY)
            os.fsync(handle)
            os.close(handle)
    sync_folder(temporary)
    temporary.rename(final)
    sync_folder(final.parent)
