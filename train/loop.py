"""Stage 4: train the head.

    eagle3 train configs/tiny.yaml
    accelerate launch -m eagle3.train configs/tiny.yaml

One process or many, with or without DeepSpeed: the batches, their order and the gradients are the same.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from ..configs.errors import Incomplete, UserError
from ..configs.settings import Settings, TrainSettings
from ..configs.signals import StopRequest
from ..data.files import encode_json, encode_line, file_sha256, write_atomic
from ..data.stage import Json, Stage
from ..data.store import MANIFEST, Store
from ..data.vocabulary import draft_ids
from ..models.draft import DraftConfig, Eagle3Draft
from ..models.rollout import RolloutBatch, StepOutput, rollout, supervised
from . import checkpoint
from .batches import collate, plan_epoch, share
from .launch import gather_parameters, make_accelerator
from .objective import StepResult, objective, weighted
from .progress import TrainProgress
from .validate import Tally, Validation, validation_batches


class TrainingTimeTest(nn.Module):
    """Draft, rollout and objective as one forward, so that DeepSpeed and DDP see a module with one entry.

    The target's embedding and LM head are constants: they are neither parameters nor part of a checkpoint.
    """

    def __init__(self, draft: Eagle3Draft, embedding: Tensor, lm_head: Tensor, settings: TrainSettings) -> None:
        super().__init__()
        self.draft, self.settings = draft, settings
        self._constants = (embedding, lm_head)

    def forward(self, batch: RolloutBatch) -> tuple[Tensor, list[StepOutput], list[StepResult]]:
        """The weighted loss summed over supervised rows and steps, and what it was made of."""
        embedding, lm_head = self._constants
        outputs = rollout(self.draft, embedding, batch, self.settings.ttt_steps)
        results = objective(self.draft, outputs, batch, lm_head, self.settings.objective)
        return weighted(results, self.settings.step_decay), outputs, results


def train(settings: Settings, run_dir: Path) -> None:
    """Train, validate, keep the best head in ``run_dir/draft``; goes on from the newest checkpoint.

    Raises:
        UserError: the store does not fit the recipe, or the run was begun with other settings.
        Interrupted: a signal came; the last step is in a checkpoint.
        Incomplete: the loss is not finite.
    """
    store = Store(run_dir / "store")
    store.check(settings)
    stage = Stage("train", run_dir, run_dir / "train", _inputs(settings, store))
    if stage.begun() and (stage.folder / "done.json").exists():
        return
    accelerator = make_accelerator(settings, run_dir)
    if accelerator.is_main_process:
        stage.begin()
    accelerator.wait_for_everyone()
    trainer = Trainer(settings, run_dir, store, accelerator)
    with StopRequest(stage.resume) as stop:
        trainer.run(stop)
    accelerator.end_training()


class Trainer:
    """The state of one training run and its loop."""

    def __init__(self, settings: Settings, run_dir: Path, store: Store, accelerator: Accelerator) -> None:
        self.settings, self.store, self.accelerator = settings, store, accelerator
        self.folder, self.draft_folder = run_dir / "train", run_dir / "draft"
        self.metrics = self.folder / "metrics.jsonl"
        torch.manual_seed(settings.run.seed)
        head = store.head()
        self.ids = draft_ids(store.token_counts(), settings.draft.vocab_size)
        draft = Eagle3Draft(draft_config(settings, store), self.ids)
        draft.start_from(head.lm_head.float())
        constants = (tensor.float().to(accelerator.device) for tensor in (head.embedding, head.lm_head))
        module = TrainingTimeTest(draft, *constants, settings.train)
        optimizer = torch.optim.AdamW(
            module.parameters(),
            lr=settings.train.learning_rate,
            betas=settings.train.betas,
            weight_decay=settings.train.weight_decay,
        )
        self.module, self.optimizer = accelerator.prepare(module, optimizer)
        self.lengths = store.lengths()
        self.training, self.validation = store.indices("train"), store.indices("validation")
        self.rows = [int(supervised(store[i].loss_mask[None], 1).sum()) for i in range(len(store))]
        epochs = range(settings.train.epochs)
        self.total = sum(len(self._plan(epoch)) for epoch in epochs)
        self.best: dict[str, Any] = {"step": 0, "acceptance_length": 0.0}

    def run(self, stop: StopRequest) -> None:
        """Validate, save, stop, step, log: in this order, until the last epoch ends."""
        step = self._resume()
        progress = TrainProgress(self.total, step) if self.accelerator.is_main_process else None
        every = self.settings.train.validate_every
        if not step:
            self._log({"step": 0, "validation": self._validate(0).as_json()})
        for epoch, batch in self._batches(step):
            line = self._step(step, epoch, batch)
            step += 1
            self._log(line)
            if progress:
                progress.show(line)
            last = step == self.total
            if last or step % every == 0:
                self._log({"step": step, "validation": self._validate(step).as_json()})
            stopping = self._any_rank(stop.requested)
            if last or stopping or step % every == 0:
                self._save(step)
            if stopping and not last:
                stop.requested = True
                stop.check(f"step {step} of {self.total} is saved")
        if self.accelerator.is_main_process:
            write_atomic(self.folder / "done.json", encode_json(self.best | {"steps": self.total}))
            print(f"best head: step {self.best['step']}, simulated AL {self.best['acceptance_length']:.2f}", flush=True)

    def _plan(self, epoch: int) -> list[list[int]]:
        settings = self.settings
        return plan_epoch(self.training, self.lengths, settings.train.batch_tokens, settings.run.seed, epoch)

    def _batches(self, done: int) -> Iterator[tuple[int, list[int]]]:
        """The global batches of all epochs behind the first ``done``, with their epoch."""
        for epoch in range(self.settings.train.epochs):
            batches = self._plan(epoch)
            for batch in batches[done:]:
                yield epoch, batch
            done = max(0, done - len(batches))

    def _step(self, step: int, epoch: int, batch: list[int]) -> dict[str, Any]:
        """One optimiser step; returns the line of metrics.jsonl."""
        started, settings, accelerator = time.perf_counter(), self.settings.train, self.accelerator
        rate = learning_rate(step, self.total, settings)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        # Gradients are averaged over ranks and micro-batches; every row of the global batch shall count the same.
        normaliser = accelerator.num_processes * settings.accumulation / max(1, sum(self.rows[i] for i in batch))
        sums = torch.zeros(1 + 2 * settings.ttt_steps, device=accelerator.device)
        norm = 0.0
        for indices in share(batch, accelerator.process_index, accelerator.num_processes, settings.accumulation):
            with accelerator.accumulate(self.module):
                loss, outputs, results = self.module(collate(self.store, indices, accelerator.device))
                accelerator.backward(loss * normaliser)
                if accelerator.sync_gradients:
                    norm = float(accelerator.clip_grad_norm_(self.module.parameters(), settings.clip) or 0.0)
                self.optimizer.step()
                self.optimizer.zero_grad()
            sums += _sums(loss, outputs, results)
        sums = accelerator.reduce(sums, "sum")  # the step's one synchronisation besides the gradients'
        hits, counts = sums[1:].clamp_min(0).view(2, -1).tolist()
        mean = sums[0].item() / max(counts[0], 1)
        if not math.isfinite(mean):
            names = ", ".join(self.store[index].id for index in batch[:4])
            raise Incomplete(f"the loss of step {step + 1} is {mean}; its batch begins with {names}; lower train.learning_rate")
        return {
            "step": step + 1,
            "epoch": epoch,
            "loss": round(mean, 5),
            "accuracy": [round(hit / max(count, 1), 4) for hit, count in zip(hits, counts, strict=True)],
            "learning_rate": rate,
            "grad_norm": round(norm, 4),
            "tokens_per_s": round(sum(self.lengths[index] for index in batch) / (time.perf_counter() - started)),
        }

    @torch.no_grad()
    def _validate(self, step: int) -> Validation:
        """Measure on the validation split, and keep the head if it is the best so far."""
        settings, accelerator = self.settings, self.accelerator
        chain = min(settings.eval.chain, settings.train.ttt_steps)
        tally = Tally(settings.train.ttt_steps)
        self.module.eval()
        for indices in validation_batches(self.store, self.validation, accelerator.process_index, accelerator.num_processes):
            batch = collate(self.store, indices, accelerator.device)
            loss, outputs, results = self.module(batch)
            tally.add(batch, outputs, results, loss, chain)
        self.module.train()
        tally.sums = accelerator.reduce(tally.sums.to(accelerator.device), "sum").cpu()
        validation = tally.result()
        parameters = gather_parameters(accelerator, self.module)
        if accelerator.is_main_process and validation.acceptance_length > self.best["acceptance_length"]:
            self.best = {"step": step, "acceptance_length": validation.acceptance_length, "chain": chain}
            draft = Eagle3Draft(draft_config(settings, self.store), self.ids)
            draft.load_state_dict({name.removeprefix("draft."): value for name, value in parameters.items()}, strict=False)
            checkpoint.save_best(draft, self.draft_folder, self._provenance())
            write_atomic(self.folder / "progress.json", encode_json(self.best))
        return validation

    def _provenance(self) -> dict[str, Any]:
        target = self.store.manifest.target
        kept = ("name", "revision", "weights_sha256", "dtype")
        trained = self.best | {"objective": self.settings.train.objective, "ttt_steps": self.settings.train.ttt_steps}
        return {"eagle3_target": {key: target[key] for key in kept}, "eagle3_training": trained}

    def _save(self, step: int) -> None:
        checkpoint.save(self.accelerator, self.folder / "checkpoints", step, self.settings.train.keep_checkpoints)

    def _resume(self) -> int:
        """Load the newest checkpoint; returns the steps behind it. Later lines of metrics.jsonl are dropped."""
        found = checkpoint.checkpoints(self.folder / "checkpoints")
        step = checkpoint.step_of(found[-1]) if found else 0
        if found:
            self.accelerator.load_state(str(found[-1]))
        if self.accelerator.is_main_process:
            lines = self.metrics.read_bytes().splitlines(keepends=True) if self.metrics.exists() and step else []
            whole = [line for line in lines if line.endswith(b"\n") and json.loads(line)["step"] <= step]
            write_atomic(self.metrics, b"".join(whole))
            best = self.folder / "progress.json"
            if step and best.exists():
                self.best = json.loads(best.read_bytes())
        return step

    def _log(self, line: dict[str, Any]) -> None:
        if self.accelerator.is_main_process:
            with self.metrics.open("ab") as file:
                file.write(encode_line(line))
        values = line.get("validation", line)
        flat = {key: value for key, value in values.items() if isinstance(value, int | float)}
        flat |= {f"accuracy/{step}": value for step, value in enumerate(values["accuracy"])}
        prefix = "validation" if "validation" in line else "train"
        self.accelerator.log({f"{prefix}/{key}": value for key, value in flat.items()}, step=line["step"])

    def _any_rank(self, requested: bool) -> bool:
        """Whether any rank was asked to stop: they must leave the loop together."""
        if self.accelerator.num_processes == 1:
            return requested
        flag = torch.tensor(float(requested), device=self.accelerator.device)
        return bool(self.accelerator.reduce(flag, "sum").item())


def draft_config(settings: Settings, store: Store) -> DraftConfig:
    """The head's shape: the recipe's, and the target's where the recipe says nothing.

    Raises:
        UserError: key/value heads that do not divide the heads.
    """
    target, chosen = store.manifest.target, settings.draft
    config = DraftConfig(
        hidden_size=target["hidden_size"],
        intermediate_size=chosen.intermediate_size,
        num_heads=chosen.num_heads or target["num_heads"],
        num_kv_heads=chosen.num_kv_heads or target["num_kv_heads"],
        head_dim=chosen.head_dim or target["head_dim"],
        vocab_size=target["vocab_size"],
        draft_vocab_size=chosen.vocab_size,
        target_layers=tuple(target["layers"]),
        rms_norm_eps=store.head().norm_eps,
        rope_theta=chosen.rope_theta or target["rope_theta"],
        max_positions=target["max_positions"],
        fc_norm=chosen.fc_norm,
        norm_output=chosen.norm_output,
    )
    if config.num_heads % config.num_kv_heads:
        problem = f"it does not divide the {config.num_heads} heads"
        raise UserError("draft.num_kv_heads", config.num_kv_heads, problem, "give a divisor of draft.num_heads")
    return config


def learning_rate(step: int, total: int, settings: TrainSettings) -> float:
    """Linear warm-up, then a cosine to zero; a pure function of the step, so there is no scheduler to save."""
    warmup = max(1, round(settings.warmup * total))
    if step < warmup:
        return settings.learning_rate * (step + 1) / warmup
    return settings.learning_rate * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


def _sums(loss: Tensor, outputs: list[StepOutput], results: list[StepResult]) -> Tensor:
    hits = [result.hits.sum() for result in results]
    counts = [torch.tensor(len(output.rows), device=loss.device) for output in outputs]
    return torch.stack([loss.detach(), *hits, *counts]).float()


def _inputs(settings: Settings, store: Store) -> dict[str, Json]:
    """What the head depends on; how often it is saved and where it is logged is not among it."""
    free = {"tracker", "keep_checkpoints"}
    trained = {f"train.{key}": value for key, value in asdict(settings.train).items() if key not in free}
    shape = {f"draft.{key}": value for key, value in asdict(settings.draft).items()}
    store_hash = file_sha256(store.path / MANIFEST)
    named = {"run.seed": settings.run.seed, "store/manifest.json": store_hash, "eval.chain": settings.eval.chain}
    return json.loads(json.dumps(trained | shape | named))
