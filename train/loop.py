"""The loop of training: step, log, validate, save, stop."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterable, Iterator
from functools import partial
from itertools import chain, groupby
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from ..configs.settings import Settings
from ..configs.signals import StopRequest
from ..data.files import encode_json, encode_line, file_sha256, write_atomic
from ..data.store import Store
from ..models.checkpoint import WEIGHTS
from ..models.draft import Eagle3Draft
from ..models.rollout import supervised
from ..models.shapes import draft_config
from ..models.start import begin, feature_scale
from . import checkpoint
from .batches import Collated, Schedule, blank, collate, divide, some_states
from .feed import Clock, Planned, feed
from .launch import any_rank, description, gather_parameters, prepare
from .module import Trained, TrainingTimeTest
from .optimizer import kinds, learning_rate, make_optimizer
from .progress import TrainProgress
from .samples import Batch, Samples, refuse
from .speed import figures, peak_of
from .state import WEIGHT, gathered, restore
from .validate import Tally, Validation, validation_parts

DONE, BEST, METRICS, CHECKPOINTS = "done.json", "progress.json", "metrics.jsonl", "checkpoints"


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
        self._kinds = kinds(draft, chosen.optimizer)
        self._saved = self._newest(draft)
        # As they are stored on a GPU, whose kernels widen what they read; plain torch has all in one dtype.
        ends = (head.embedding, head.lm_head)
        if accelerator.device.type != "cuda":
            ends = (head.embedding.float(), head.lm_head.float())
        embedding, lm_head = (tensor.to(accelerator.device) for tensor in ends)
        module = TrainingTimeTest(draft, embedding, lm_head, chosen)
        optimizer = make_optimizer(draft, feature_scale(draft, states), chosen)
        self.module, self.optimizer = prepare(accelerator, module, optimizer)
        if accelerator.is_main_process:
            print(f"train: {description(accelerator, self.module)}", flush=True)
        self.schedule = Schedule(samples.passes, samples.lengths, chosen.batch_tokens, settings.run.seed)
        self.best: dict[str, Any] = {"step": 0, "acceptance_length": 0.0}
        peak = peak_of(accelerator.device)
        self._clock, self._peak = Clock(), None if peak is None else peak * accelerator.num_processes

    def run(self, stop: StopRequest) -> None:
        """Step, log, validate, save, stop: in this order, until the last epoch ends."""
        done, total = self._resume(), self.schedule.steps
        self._cover(done)
        progress = TrainProgress(total, done)
        if not done:
            self._check(0, progress)
        step = done
        for planned, micros in self._feed(done):
            if self._stale(step):
                break
            line, step = self._step(planned, micros), planned.batch.step
            self._log(line)
            if self.accelerator.is_main_process:
                progress.show(line)
            last, due = step == total, step % self.settings.train.validate_every == 0
            if last or due:
                self._check(step, progress)
            stopping = any_rank(self.accelerator, stop.requested)
            if last or due or stopping:
                self._save(step)
            if stopping and not last:
                stop.requested = True  # here too, if only another rank heard the signal
                stop.check(f"step {step} of {total} is saved")
        if self.accelerator.is_main_process:
            write_atomic(self.folder / DONE, encode_json(self.best | {"steps": step}))
            print(progress.summary(), flush=True)
            print(f"best head: step {self.best['step']}, simulated AL {self.best['acceptance_length']:.2f}", flush=True)

    def _check(self, step: int, progress: TrainProgress) -> None:
        validation = self._validate(step)
        progress.validated(validation.acceptance_length)
        self._log({"step": step, "validation": validation.as_json()})

    def _stale(self, step: int) -> bool:
        """Whether the last ``train.patience`` validations brought no better head."""
        chosen = self.settings.train
        if chosen.patience is None:
            return False
        # The main process knows of the best head; all of them must stop at once.
        return any_rank(self.accelerator, step - self.best["step"] >= chosen.patience * chosen.validate_every)

    def _feed(self, done: int) -> Iterator[tuple[Planned, Iterator[Collated]]]:
        """The steps that are left, with their micro-batches; what is loaded ahead is of the same pass."""
        left = self.schedule.from_step(done)
        for _, batches in groupby(left, key=lambda batch: self.schedule.finished(batch.step - 1)):
            first = next(batches)
            self._make_room(first.step - 1)
            steps = (self._planned(batch) for batch in chain([first], batches))
            yield from feed(steps, partial(self._collate, self.samples), self._clock)

    def _planned(self, batch: Batch) -> Planned:
        """This rank's micro-batches, with about as many supervised tokens in each of every rank's."""
        masks = [self.samples.loss_mask(index) for index in batch.samples]
        lengths = torch.tensor([len(mask) for mask in masks])
        counts = [part.sum().item() for part in supervised(torch.cat(masks), lengths, 1)[0].split(lengths.tolist())]
        rows = dict(zip(batch.samples, map(int, counts), strict=True))
        ranks = self.accelerator.num_processes
        parts = divide(batch.samples, rows, ranks * self.settings.train.accumulation)
        return Planned(batch, tuple(parts[self.accelerator.process_index :: ranks]), sum(rows.values()))

    def _make_room(self, done: int) -> None:
        """Before a pass that is not all recorded, save: the recorder may be waiting until what was read may go."""
        number = self.schedule.finished(done)
        opens = done == self.schedule.starts[number]
        if done and opens and any_rank(self.accelerator, not self.samples.ready(number)):
            self._save(done)

    def _save(self, step: int) -> None:
        keep = self.settings.train.keep_checkpoints
        state = gathered(self.module, self.optimizer, self._kinds)
        checkpoint.save(self.accelerator, state, self.folder / CHECKPOINTS, step, keep)
        self._cover(step)

    def _checkpoints(self) -> list[Path]:
        return checkpoint.checkpoints(self.folder / CHECKPOINTS)

    def _cover(self, step: int) -> None:
        """Let go of what no checkpoint will ask for again."""
        if self.accelerator.is_main_process:
            self.samples.covered(self.schedule.finished(step))

    def _step(self, planned: Planned, parts: Iterable[Collated]) -> dict[str, Any]:
        """One optimiser step; returns the line of metrics.jsonl."""
        started, chosen, accelerator, batch = time.perf_counter(), self.settings.train, self.accelerator, planned.batch
        rate = learning_rate(batch.step - 1, self.schedule.steps, chosen)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["scale"]
        # Gradients are averaged over ranks and micro-batches; every row of the global batch shall count the same.
        scale = accelerator.num_processes * chosen.accumulation / max(1, planned.rows)
        sums, norm = torch.zeros(1 + 2 * chosen.ttt_steps, device=accelerator.device), None
        for part in parts:
            with accelerator.accumulate(self.module):
                trained: Trained = self.module(part.on(accelerator.device))
                accelerator.backward(trained.loss * scale)
                if accelerator.sync_gradients:
                    norm = accelerator.clip_grad_norm_(self.module.parameters(), chosen.clip)
                self.optimizer.step()
                self.optimizer.zero_grad()
            sums += _sums(trained)
        sums = accelerator.reduce(sums, "sum")  # the step's one wait beside that for the gradients
        hits, counts = sums[1:].view(2, -1).tolist()
        loss = sums[0].item() / max(counts[0], 1)
        # DeepSpeed would leave out a step whose gradients are not finite, and say nothing.
        for name, value in (("loss", loss), ("gradient norm", 0.0 if norm is None else float(norm))):
            if not math.isfinite(value):
                found = f"the {name} of step {batch.step} is {value}"
                refuse(self.samples, batch.samples, found, self._checkpoints()[-1:])
        seconds, rows = time.perf_counter() - started, [int(count) for count in counts]
        tokens = sum(self.samples.lengths[index] for index in batch.samples)
        return {
            "step": batch.step,
            "epoch": batch.epoch,
            "loss": round(loss, 7),
            "accuracy": [round(hit / max(count, 1), 4) for hit, count in zip(hits, counts, strict=True)],
            "learning_rate": rate,
            "grad_norm": None if norm is None else round(float(norm), 7),  # DeepSpeed's stage 0 in float32 has none
            **figures(self.config, tokens, rows, seconds, self._clock.lap(), self._peak),
        }

    @torch.no_grad()
    def _validate(self, step: int) -> Validation:
        """Measure on the validation split, and keep the head if it is the best so far."""
        accelerator = self.accelerator
        tally = Tally(self.settings.train.ttt_steps, self._chain)
        self.module.eval()
        indices, lengths = self.store.indices("validation"), self.store.lengths()
        for part in validation_parts(indices, lengths, accelerator.process_index, accelerator.num_processes):
            batch = self._collate(self.store, part).on(accelerator.device)
            tally.add(batch, self.module(batch))
        self.module.train()
        tally.sums = accelerator.reduce(tally.sums.to(accelerator.device), "sum").cpu()
        validation = tally.result()
        if not math.isfinite(validation.loss):
            refuse(
                self.store,
                indices,
                f"the validation loss of step {step} is {validation.loss}",
                self._checkpoints()[-1:],
            )
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
        return min(self.settings.eval.fixed_chain, self.settings.train.ttt_steps)

    def _collate(self, source: Samples | Store, indices: tuple[int, ...]) -> Collated:
        """The samples at ``indices``; where there are none, one from which nothing is learnt."""
        samples = [source[index] for index in indices] or [blank(self.store[0])]
        return collate(samples, pin=self.accelerator.device.type == "cuda")

    def _provenance(self) -> dict[str, Any]:
        target = self.store.manifest.target
        kept = ("name", "revision", "weights_sha256", "num_layers", "dtype")
        chosen = self.settings.train
        trained = self.best | {"objective": chosen.objective, "ttt_steps": chosen.ttt_steps, "warm_start": self._origin}
        return {"eagle3_target": {key: target[key] for key in kept}, "eagle3_training": trained}

    def _newest(self, draft: Eagle3Draft) -> tuple[int, dict[str, Tensor]]:
        """The steps behind the newest checkpoint, and its state, whose weights the head now has; 0 where there is none."""
        found = self._checkpoints()
        if not found:
            return 0, {}
        state = checkpoint.read(found[-1], draft, self._kinds)
        draft.load_state_dict(
            draft.state_dict() | {name: state[f"{name}/{WEIGHT}"] for name, _ in draft.named_parameters()}
        )
        return checkpoint.step_of(found[-1]), state

    def _resume(self) -> int:
        """Go on from the newest checkpoint; returns the steps behind it. Later lines of metrics.jsonl are dropped."""
        step, state = self._saved
        if step:
            restore(self.module, self.optimizer, self._kinds, state, step)
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


def _sums(trained: Trained) -> Tensor:
    """Loss, then hits of every step, then rows of every step, float32 ``[1 + 2K]``."""
    hits = [result.hits.sum() for result in trained.results]
    counts = [trained.loss.new_tensor(len(rows)) for rows in trained.rows]
    return torch.stack([value.float() for value in (trained.loss.detach(), *hits, *counts)])
