"""Checkpoints that are whole or not there, and the best head so far.

runs/<name>/train/checkpoints/step-000200/     everything that exact resuming needs: state.safetensors (:mod:`.state`)
runs/<name>/train/progress.json                where the best head came from
runs/<name>/draft/                             the best head, in serving format
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from ..configs.errors import UserError
from ..data.files import make_folder, read_tensors, sync_folder, tensor_file, write_atomic
from ..models.checkpoint import save_draft
from ..models.draft import Eagle3Draft
from .state import parts_of

PREFIX, STATE = "step-", "state.safetensors"


def checkpoints(folder: Path) -> list[Path]:
    """The finished checkpoints, oldest first."""
    return sorted(path for path in folder.glob(f"{PREFIX}*") if path.suffix != ".tmp")


def step_of(checkpoint: Path) -> int:
    """The number of optimiser steps behind a checkpoint."""
    return int(checkpoint.name.removeprefix(PREFIX))


def save(accelerator: Accelerator, state: Iterator[tuple[str, Tensor]], folder: Path, step: int, keep: int) -> None:
    """Write the ``state`` after ``step`` steps, then delete all but the newest ``keep`` checkpoints. Every rank calls this.

    Raises:
        UserError: it cannot be written; what was there stays.
    """
    final = folder / f"{PREFIX}{step:06d}"
    there, main = final.exists(), accelerator.is_main_process
    accelerator.wait_for_everyone()  # all have looked before it can be there
    if there:
        return
    tensors = {name: tensor for name, tensor in state if main}
    if main:
        temporary = final.with_suffix(".tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        make_folder(temporary)
        write_atomic(temporary / STATE, *tensor_file(tensors, {"step": str(step)}))
        _publish(temporary, final)
        for old in checkpoints(folder)[:-keep]:
            shutil.rmtree(old)
    accelerator.wait_for_everyone()


def read(checkpoint: Path, draft: Eagle3Draft, kinds: Mapping[str, str]) -> dict[str, Tensor]:
    """The state in a checkpoint of ``draft``, mapped, whose parameters have updates of ``kinds``.

    Raises:
        UserError: it is damaged, or another head's or optimizer's.
    """
    path = checkpoint / STATE
    remedy = f"delete {checkpoint} to go on from an earlier one, or else {checkpoint.parents[1]}"
    try:
        tensors, metadata = read_tensors(path)
    except (OSError, UserError) as error:
        raise UserError("train", path, f"the checkpoint cannot be read ({error})", remedy) from None
    shapes = {name: parameter.shape for name, parameter in draft.named_parameters()}
    wanted = {f"{name}/{part}": shapes[name] for name, part in parts_of(kinds)}
    if {name: tensor.shape for name, tensor in tensors.items()} != wanted or metadata["step"] != str(
        step_of(checkpoint)
    ):
        raise UserError("train", path, "it is not a checkpoint of this head and optimizer", remedy)
    return tensors


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
