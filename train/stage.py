"""Stage 4: train the head.

    eagle3 train configs/tiny.yaml
    accelerate launch --config_file configs/accelerate/8gpu.yaml -m eagle3.train configs/maverick.yaml

One process or many, with or without DeepSpeed: the batches, their order and the gradients are the same.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator

from ..configs.settings import Settings
from ..configs.signals import StopRequest
from ..data.files import exclusive, file_sha256
from ..data.manifest import MANIFEST
from ..data.spool import SPOOL, SpoolReader, wait_for
from ..data.stage import Json, Stage
from ..data.store import Store
from ..data.threads import Work, computing
from ..models.checkpoint import WEIGHTS
from ..models.costs import shapes
from ..models.draft import Eagle3Draft
from ..models.shapes import draft_config
from .launch import make_accelerator
from .loop import DONE, Trainer
from .module import warm_draft
from .samples import Recorded, Samples, Streamed

#: What may change between two starts of one run: who shares a batch, what is kept, and where it is logged.
FREE = {"accumulation", "keep_checkpoints", "tracker"}


def train(settings: Settings, run_dir: Path) -> None:
    """Train, validate, keep the best head in ``run_dir/draft``; goes on from the newest checkpoint.

    States in a spool (``record.spool_shards``) are waited for, from the held-out store on.

    Raises:
        UserError: the store does not fit the recipe, or the run was begun with other settings.
        Interrupted: a signal came; the last step is in a checkpoint.
        Incomplete: the loss is not finite.
    """
    if settings.record.spool_shards is not None:
        with StopRequest(f"eagle3 train {run_dir / 'config.yaml'}") as stop:
            manifest = run_dir / "store" / MANIFEST
            wait_for(manifest, "the held-out states are not recorded yet; run eagle3 record beside this", stop.check)
    store = Store(run_dir / "store")
    store.check(settings)
    stage = Stage("train", run_dir, run_dir / "train", _inputs(settings, store))
    if stage.begun() and (stage.folder / DONE).exists():
        return
    warm = None if settings.train.warm_start is None else warm_draft(settings, store)
    accelerator = make_accelerator(settings, run_dir)
    if accelerator.is_main_process:
        stage.begin()  # only now: a head that was refused shall not tie the run to it
    accelerator.wait_for_everyone()
    lock = exclusive(stage.folder / ".train.lock") if accelerator.is_main_process else nullcontext()
    with lock, _threads(settings, stage.folder, store, warm, accelerator), StopRequest(stage.resume) as stop:
        samples = _samples(settings, run_dir, store, stop)
        Trainer(settings, run_dir, store, samples, accelerator, warm).run(stop)
    accelerator.end_training()


def _threads(
    settings: Settings, folder: Path, store: Store, warm: Eagle3Draft | None, accelerator: Accelerator
) -> AbstractContextManager[None]:
    """Those of a CPU. A unit of work is what a micro-batch multiplies: a step itself would change the head."""
    config = draft_config(settings.draft, store.manifest.target) if warm is None else warm.config
    weights = [shape for shape in shapes(config) if len(shape) > 1]
    rows = settings.train.batch_tokens // (settings.train.accumulation * accelerator.num_processes)
    return computing("train", Work.of(weights, rows), accelerator.device, partial(multiply, weights), folder)


def multiply(weights: Sequence[tuple[int, ...]], rows: int) -> None:
    """The products of a forward and a backward pass of ``rows`` rows through matrices ``[out, in]``."""
    for out, into in weights:
        weight, given, gradient = torch.ones(out, into), torch.ones(rows, into), torch.ones(rows, out)
        F.linear(given, weight)
        gradient @ weight
        gradient.T @ given


def _samples(settings: Settings, run_dir: Path, store: Store, stop: StopRequest) -> Samples:
    """What is trained on: the store's, or what is recorded meanwhile."""
    limit = settings.record.spool_shards
    if limit is None:
        return Recorded(store, settings.train.epochs)
    return Streamed(SpoolReader(run_dir / SPOOL, store.manifest, stop.check), limit)


def _inputs(settings: Settings, store: Store) -> dict[str, Json]:
    """What the head depends on."""
    trained = {f"train.{key}": value for key, value in asdict(settings.train).items() if key not in FREE}
    if settings.train.warm_start is not None:
        weights = Path(settings.train.warm_start) / WEIGHTS
        trained["train.warm_start"] = file_sha256(weights) if weights.is_file() else settings.train.warm_start
    shape = {f"draft.{key}": value for key, value in asdict(settings.draft).items()}
    store_hash = file_sha256(store.path / MANIFEST)
    named = {"run.seed": settings.run.seed, "store/manifest.json": store_hash, "eval.chain": settings.eval.fixed_chain}
    named["record.spool_shards"] = settings.record.spool_shards  # which says how a spool is shuffled
    inputs: dict[str, Json] = json.loads(json.dumps(trained | shape | named))  # tuples as the file will have them
    return inputs
