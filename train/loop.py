"""Stage 4: train the head.

    eagle3 train configs/tiny.yaml
    accelerate launch --config_file configs/accelerate/8gpu.yaml -m eagle3.train configs/maverick.yaml

One process or many, with or without DeepSpeed: the batches, their order and the gradients are the same.
"""

from __future__ import annotations

import json
import math
import time
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from ..configs.errors import Incomplete
from ..configs.settings import Settings, TrainSettings
from ..configs.signals import StopRequest
from ..data.files import encode_json, encode_line, exclusive, file_sha256, write_atomic
from ..data.spool import SPOOL, SpoolReader, wait_for
from ..data.stage import Json, Stage
from ..data.store import MANIFEST, Store
from ..models.checkpoint import WEIGHTS
from ..models.draft import Eagle3Draft
from ..models.rollout import RolloutBatch, supervised
from ..models.shapes import draft_config
from ..models.start import begin, feature_scale
from . import checkpoint
from .batches import Batch, Schedule, blank, collate, divide, some_states
from .launch import any_rank, gather_parameters, make_accelerator
from .module import Trained, TrainingTimeTest, parameter_groups, warm_draft
from .progress import TrainProgress
from .samples import Recorded, Samples, Streamed
from .state import WEIGHT, restore
from .validate import Tally, Validation, validation_parts

DONE, BEST, METRICS, CHECKPOINTS = "done.json", "progress.json", "metrics.jsonl", "checkpoints"
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
    with lock, StopRequest(stage.resume) as stop:
        samples = _samples(settings, run_dir, store, stop)
        Trainer(settings, run_dir, store, samples, accelerator, warm).run(stop)
    accelerator.end_training()


def _samples(settings: Settings, run_dir: Path, store: Store, stop: StopRequest) -> Samples:
    """What is trained on: the store's, or what is recorded meanwhile."""
    limit = settings.record.spool_shards
    if limit is None:
        return Recorded(store, settings.train.epochs)
    return Streamed(SpoolReader(run_dir / SPOOL, store.manifest, stop.check), limit)


class Trainer:
    """The state of one training run and its loop."""

    def __init__(
        self,
        settings: Settings,
        run_dir: Path,
        store: Store,
        samples: Samples,
        accelerator: Accelerator,
        warm: Eagle3Draft | None,
    ) -> None:
        self.settings, self.store, self.samples, self.accelerator = settings, store, samples, accelerator
        self.folder, self.draft_folder = run_dir / "train", run_dir / "draft"
        chosen = settings.train
        torch.manual_seed(settings.run.seed)
        head = store.head()
        states, tokens = some_states(store)
        if warm is None:
            vocabulary = store.draft_vocabulary(settings.draft.vocab_size)
            if accelerator.is_main_process:
                print(vocabulary, flush=True)
            draft = Eagle3Draft(draft_config(settings.draft, store.manifest.target), vocabulary.ids)
            begin(draft, head, states, tokens)
        else:
            draft = warm
        self._origin = None if chosen.warm_start is None else file_sha256(Path(chosen.warm_start) / WEIGHTS)
        self.config, self.vocabulary = draft.config, draft.draft_ids.clone() if draft.mapped else None
        self._saved = self._newest(draft)
        embedding, lm_head = (tensor.float().to(accelerator.device) for tensor in (head.embedding, head.lm_head))
        module = TrainingTimeTest(draft, embedding, lm_head, chosen)
        optimizer = torch.optim.AdamW(
            parameter_groups(draft, feature_scale(draft, states)),
            lr=chosen.learning_rate,
            betas=chosen.betas,
            weight_decay=chosen.weight_decay,
        )
        self.module, self.optimizer = accelerator.prepare(module, optimizer)
        self.schedule = Schedule(samples.passes, samples.lengths, chosen.batch_tokens, settings.run.seed)
        self.best: dict[str, Any] = {"step": 0, "acceptance_length": 0.0}

    def run(self, stop: StopRequest) -> None:
        """Step, log, validate, save, stop: in this order, until the last epoch ends."""
        done, total = self._resume(), self.schedule.steps
        self._cover(done)
        progress = TrainProgress(total, done) if self.accelerator.is_main_process else None
        if not done:
            self._log({"step": 0, "validation": self._validate(0).as_json()})
        for batch in self.schedule.from_step(done):
            self._make_room(batch.step - 1)
            line = self._step(batch)
            self._log(line)
            if progress:
                progress.show(line)
            last, due = batch.step == total, batch.step % self.settings.train.validate_every == 0
            if last or due:
                self._log({"step": batch.step, "validation": self._validate(batch.step).as_json()})
            stopping = any_rank(self.accelerator, stop.requested)
            if last or due or stopping:
                self._save(batch.step)
            if stopping and not last:
                stop.requested = True  # here too, if only another rank heard the signal
                stop.check(f"step {batch.step} of {total} is saved")
        if self.accelerator.is_main_process:
            write_atomic(self.folder / DONE, encode_json(self.best | {"steps": total}))
            print(f"best head: step {self.best['step']}, simulated AL {self.best['acceptance_length']:.2f}", flush=True)

    def _make_room(self, done: int) -> None:
        """Before a pass that is not all recorded, save: the recorder may be waiting until what was read may go."""
        number = self.schedule.finished(done)
        opens = done == self.schedule.starts[number]
        if done and opens and any_rank(self.accelerator, not self.samples.ready(number)):
            self._save(done)

    def _save(self, step: int) -> None:
        keep = self.settings.train.keep_checkpoints
        checkpoint.save(self.accelerator, self.module, self.optimizer, self.folder / CHECKPOINTS, step, keep)
        self._cover(step)

    def _cover(self, step: int) -> None:
        """Let go of what no checkpoint will ask for again."""
        if self.accelerator.is_main_process:
            self.samples.covered(self.schedule.finished(step))

    def _step(self, batch: Batch) -> dict[str, Any]:
        """One optimiser step; returns the line of metrics.jsonl."""
        started, chosen, accelerator = time.perf_counter(), self.settings.train, self.accelerator
        rate = learning_rate(batch.step - 1, self.schedule.steps, chosen)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["scale"]
        # Gradients are averaged over ranks and micro-batches; every row of the global batch shall count the same.
        ranks, micros = accelerator.num_processes, chosen.accumulation
        masks = (self.samples.loss_mask(index) for index in batch.samples)
        scale = ranks * micros / max(1, sum(int(supervised(mask[None], 1).sum()) for mask in masks))
        sums, norm = torch.zeros(1 + 2 * chosen.ttt_steps, device=accelerator.device), 0.0
        lengths = self.samples.lengths
        for part in divide(batch.samples, lengths, ranks * micros)[accelerator.process_index :: ranks]:
            with accelerator.accumulate(self.module):
                trained: Trained = self.module(self._load(self.samples, part))
                accelerator.backward(trained.loss * scale)
                if accelerator.sync_gradients:
                    norm = float(accelerator.clip_grad_norm_(self.module.parameters(), chosen.clip) or 0.0)
                self.optimizer.step()
                self.optimizer.zero_grad()
            sums += _sums(trained)
        sums = accelerator.reduce(sums, "sum")  # the step's one wait beside that for the gradients
        hits, counts = sums[1:].view(2, -1).tolist()
        loss = sums[0].item() / max(counts[0], 1)
        if not math.isfinite(loss):
            names = ", ".join(self.samples[index].id for index in batch.samples[:4])
            raise Incomplete(
                f"the loss of step {batch.step} is {loss}; its batch begins with {names}; lower train.learning_rate"
            )
        return {
            "step": batch.step,
            "epoch": batch.epoch,
            "loss": round(loss, 7),
            "accuracy": [round(hit / max(count, 1), 4) for hit, count in zip(hits, counts, strict=True)],
            "learning_rate": rate,
            "grad_norm": round(norm, 4),
            "tokens_per_s": round(sum(lengths[i] for i in batch.samples) / (time.perf_counter() - started)),
        }

    @torch.no_grad()
    def _validate(self, step: int) -> Validation:
        """Measure on the validation split, and keep the head if it is the best so far."""
        accelerator = self.accelerator
        tally = Tally(self.settings.train.ttt_steps, self._chain)
        self.module.eval()
        indices, lengths = self.store.indices("validation"), self.store.lengths()
        for part in validation_parts(indices, lengths, accelerator.process_index, accelerator.num_processes):
            batch = self._load(self.store, part)
            tally.add(batch, self.module(batch))
        self.module.train()
        tally.sums = accelerator.reduce(tally.sums.to(accelerator.device), "sum").cpu()
        validation = tally.result()
        parameters = gather_parameters(accelerator, self.module)
        if accelerator.is_main_process and validation.acceptance_length > self.best["acceptance_length"]:
            self.best = {"step": step, "acceptance_length": validation.acceptance_length, "chain": self._chain}
            draft = Eagle3Draft(self.config, self.vocabulary)
            draft.load_state_dict(draft.state_dict() | parameters)
            checkpoint.save_best(draft, self.draft_folder, self._provenance())
            write_atomic(self.folder / BEST, encode_json(self.best))
        return validation

    @property
    def _chain(self) -> int:
        """The chain that validation simulates: evaluation's, as far as the rollout reaches."""
        return min(self.settings.eval.chain, self.settings.train.ttt_steps)

    def _load(self, source: Samples | Store, indices: tuple[int, ...]) -> RolloutBatch:
        """The samples at ``indices``; where there are none, one from which nothing is learnt."""
        batch = collate([source[index] for index in indices] or [blank(self.store[0])])
        return RolloutBatch(*(tensor.to(self.accelerator.device, non_blocking=True) for tensor in batch))

    def _provenance(self) -> dict[str, Any]:
        target = self.store.manifest.target
        kept = ("name", "revision", "weights_sha256", "num_layers", "dtype")
        chosen = self.settings.train
        trained = self.best | {"objective": chosen.objective, "ttt_steps": chosen.ttt_steps, "warm_start": self._origin}
        return {"eagle3_target": {key: target[key] for key in kept}, "eagle3_training": trained}

    def _newest(self, draft: Eagle3Draft) -> tuple[int, dict[str, Tensor]]:
        """The steps behind the newest checkpoint, and its state, whose weights the head now has; 0 where there is none."""
        found = checkpoint.checkpoints(self.folder / CHECKPOINTS)
        if not found:
            return 0, {}
        state = checkpoint.read(found[-1], draft)
        draft.load_state_dict(
            draft.state_dict() | {name: state[f"{name}/{WEIGHT}"] for name, _ in draft.named_parameters()}
        )
        return checkpoint.step_of(found[-1]), state

    def _resume(self) -> int:
        """Go on from the newest checkpoint; returns the steps behind it. Later lines of metrics.jsonl are dropped."""
        step, state = self._saved
        if step:
            restore(self.module, self.optimizer, state, step)
        self._saved = (step, {})
        if self.accelerator.is_main_process:
            log, best = self.folder / METRICS, self.folder / BEST
            lines = log.read_bytes().splitlines(keepends=True) if step and log.exists() else []
            whole = [line for line in lines if line.endswith(b"\n") and json.loads(line)["step"] <= step]
            write_atomic(log, b"".join(whole))
            if step and best.exists():
                self.best = json.loads(best.read_bytes())
        return step

    def _log(self, line: dict[str, Any]) -> None:
        """To metrics.jsonl, and to the tracker under ``train/`` or ``validation/``."""
        if self.accelerator.is_main_process:
            with (self.folder / METRICS).open("ab") as file:
                file.write(encode_line(line))
        values = line.get("validation", line)
        flat = {key: value for key, value in values.items() if isinstance(value, int | float)}
        flat |= {f"accuracy/{step}": value for step, value in enumerate(values["accuracy"])}
        prefix = "validation" if "validation" in line else "train"
        self.accelerator.log({f"{prefix}/{key}": value for key, value in flat.items()}, step=line["step"])


def learning_rate(step: int, total: int, settings: TrainSettings) -> float:
    """Linear warm-up, then a cosine to zero; a pure function of the steps done, so there is no scheduler to save."""
    warmup = max(1, round(settings.warmup * total))
    if step < warmup:
        return settings.learning_rate * (step + 1) / warmup
    return settings.learning_rate * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


def _sums(trained: Trained) -> Tensor:
    """Loss, then hits of every step, then rows of every step, float32 ``[1 + 2K]``."""
    hits = [result.hits.sum() for result in trained.results]
    counts = [trained.loss.new_tensor(len(output.rows)) for output in trained.outputs]
    return torch.stack([value.float() for value in (trained.loss.detach(), *hits, *counts)])


def _inputs(settings: Settings, store: Store) -> dict[str, Json]:
    """What the head depends on."""
    trained = {f"train.{key}": value for key, value in asdict(settings.train).items() if key not in FREE}
    if settings.train.warm_start is not None:
        weights = Path(settings.train.warm_start) / WEIGHTS
        trained["train.warm_start"] = file_sha256(weights) if weights.is_file() else settings.train.warm_start
    shape = {f"draft.{key}": value for key, value in asdict(settings.draft).items()}
    store_hash = file_sha256(store.path / MANIFEST)
    named = {"run.seed": settings.run.seed, "store/manifest.json": store_hash, "eval.chain": settings.eval.chain}
    named["record.spool_shards"] = settings.record.spool_shards  # which says how a spool is shuffled
    inputs: dict[str, Json] = json.loads(json.dumps(trained | shape | named))  # tuples as the file will have them
    return inputs
