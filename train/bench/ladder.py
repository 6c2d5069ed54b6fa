"""From the reference formulation of the training-time test to ours, one cause of the gain at a time.

Every rung computes the same losses and gradients and keeps what those below it gained. The first is all of
:mod:`.reference`, the last is :class:`~eagle3.train.module.TrainingTimeTest` as it is trained.

Shape suffixes: B documents, T tokens, H hidden, V vocabulary, K steps, n supervised rows.
"""

from __future__ import annotations

import re
from enum import IntEnum
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ...configs.settings import TrainSettings
from ...models.draft import DraftConfig, Eagle3Draft
from ...models.rollout import RolloutBatch, StepOutput, rollout
from ..module import TrainingTimeTest
from ..objective import StepResult, objective, teacher_of
from . import reference
from .head import Preset
from .reference import Documents, StepSums, Teacher, restricted, row_results, supervised

PRESETS = {
    "cpu": Preset(DraftConfig(256, 1024, 8, 2, 32, 32768, 8192, (1, 2, 3), 1e-5, 10000.0, 4096), 2, 512),
    "tiny": Preset(DraftConfig(32, 48, 4, 2, 8, 8000, 2000, (1, 2, 3), 1e-5, 10000.0, 4096), 2, 64),
}
FEW = 16  # tokens of the document that a first step is taken on


class Rung(IntEnum):
    """What is as in ours, from here on up."""

    REFERENCE = 0
    ONCE = 1
    ROWS = 2
    TILED = 3
    FUSED = 4
    MERGED = 5
    OURS = 6


CAUSES = {
    Rung.REFERENCE: "reference formulation",
    Rung.ONCE: "+ teacher's probabilities once a batch",
    Rung.ROWS: "+ teacher and loss of supervised rows alone",
    Rung.TILED: "+ teacher in tiles",
    Rung.FUSED: "+ loss with its gradient, in chunks",
    Rung.MERGED: "+ scores merged by their log-sum-exp",
    Rung.OURS: "+ rollout of supervised rows alone: ours",
}


class SupervisedRows(NamedTuple):
    """Rows ``[n]`` as places in ``[B * T]``, those of most steps first, and how many take part in each step."""

    places: Tensor
    counts: list[int]


class Found(NamedTuple):
    """Loss of every step, and the gradient of every weight."""

    losses: list[Tensor]
    gradients: list[Tensor]


class Ladder:
    """A head in float32 with its optimiser, the target's ends, and documents.

    Args:
        preset: shapes.
        prompt: tokens of each document before its answer.
        kind: "kl" or "lk".
    """

    def __init__(self, preset: Preset, prompt: int, kind: str) -> None:
        torch.manual_seed(0)
        config = preset.config
        stride = config.vocab_size // config.draft_vocab_size
        self.draft = Eagle3Draft(config, torch.arange(config.draft_vocab_size) * stride)
        # A target of some confidence; a flat one would teach every row the same.
        self.embedding, self.lm_head = (
            3 * torch.randn(2, config.vocab_size, config.hidden_size) * config.hidden_size**-0.5
        )
        self.settings = TrainSettings(objective=kind)
        self.ours = TrainingTimeTest(self.draft, self.embedding, self.lm_head, self.settings)
        self.documents = random_documents(preset, prompt)
        self.optimizer = torch.optim.AdamW(
            self.draft.parameters(),
            lr=self.settings.learning_rate,
            betas=self.settings.betas,
            weight_decay=self.settings.weight_decay,
        )

    def step_sums(self, rung: Rung, documents: Documents) -> list[StepSums]:
        """Every step's sums over its supervised rows."""
        steps, kind = self.settings.ttt_steps, self.settings.objective
        if rung is Rung.OURS:
            return _sums(self.ours(batch_of(documents)).results)
        if rung < Rung.ROWS:
            once = rung is Rung.ONCE
            return reference.step_sums(self.draft, self.embedding, self.lm_head, documents, steps, kind, once)
        rows = rows_of(documents, steps)
        if rung >= Rung.FUSED:
            outputs = [StepOutput(rows.places[: len(y)], y) for y in self._outputs(rung, documents, rows)]
            return _sums(objective(self.draft, outputs, batch_of(documents), self.lm_head, kind))
        teacher = self._teacher(documents.last_hidden.flatten(0, 1)[rows.places + 1], tiled=rung is Rung.TILED)
        # Step j of row t is taught at t+1+j, as step 0 of row t+j is.
        index = torch.full_like(documents.input_ids.flatten(), -1)
        index[rows.places] = torch.arange(len(rows.places))
        found = []
        for step, y in enumerate(self._outputs(rung, documents, rows)):
            at = index[rows.places[: len(y)] + step]
            losses, hits = row_results(self.draft, y, Teacher(*(each[at] for each in teacher)), kind)
            found.append(StepSums(losses.sum(), hits.sum()))
        return found

    def _teacher(self, states_nH: Tensor, tiled: bool) -> Teacher:
        draft_ids = self.draft.draft_ids
        if tiled:
            found = teacher_of(states_nH, self.lm_head, draft_ids)
            return Teacher(found.p, found.p_log_p, found.top)
        logits_nV = F.linear(states_nH, self.lm_head)
        return restricted(logits_nV, logits_nV.logsumexp(-1), logits_nV.argmax(-1), draft_ids)

    def _outputs(self, rung: Rung, documents: Documents, rows: SupervisedRows) -> list[Tensor]:
        """Outputs ``[n, H]`` of the supervised rows; those of all rows are computed."""
        steps = self.settings.ttt_steps
        if rung >= Rung.MERGED:
            every = documents._replace(loss_mask=torch.ones_like(documents.loss_mask))
            outputs = [spread(output, every) for output in rollout(self.draft, self.embedding, batch_of(every), steps)]
        else:
            outputs = [y.flatten(0, 1) for y in reference.rollout(self.draft, self.embedding, documents, steps)]
        return [y.index_select(0, rows.places[:count]) for y, count in zip(outputs, rows.counts, strict=True)]

    def loss(self, sums: list[StepSums], documents: Documents) -> Tensor:
        """What is differentiated: as the trainer's, a mean over the rows of step 0."""
        losses = [self.settings.step_decay**step * each.loss for step, each in enumerate(sums)]
        return torch.stack(losses).sum() / supervised(documents.loss_mask, 1).sum()

    def step(self, rung: Rung, documents: Documents | None = None) -> None:
        """One micro-batch that is a batch, by default of all documents: forward, backward, optimiser."""
        documents = documents or self.documents
        self.loss(self.step_sums(rung, documents), documents).backward()
        torch.nn.utils.clip_grad_norm_(self.draft.parameters(), self.settings.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def errors(self, rung: Rung, wanted: Found) -> tuple[float, float]:
        """How far a rung is from what is wanted, relative: the worst loss of a step, and the worst gradient of a weight."""
        found = self.losses_and_gradients(rung)
        return largest_error(found.losses, wanted.losses), largest_error(found.gradients, wanted.gradients)

    def losses_and_gradients(self, rung: Rung) -> Found:
        """What is compared of the documents."""
        sums = self.step_sums(rung, self.documents)
        gradients = torch.autograd.grad(self.loss(sums, self.documents), list(self.draft.parameters()))
        return Found([each.loss.detach() for each in sums], list(gradients))


def _sums(results: list[StepResult]) -> list[StepSums]:
    return [StepSums(result.loss, result.hits.sum()) for result in results]


def largest_error(found: list[Tensor], wanted: list[Tensor]) -> float:
    """The largest relative error of a tensor; NaN where one has any."""
    errors = [(mine - theirs).norm() / theirs.norm() for mine, theirs in zip(found, wanted, strict=True)]
    return torch.stack(errors).amax().item()


def random_documents(preset: Preset, prompt: int) -> Documents:
    """Documents whose first ``prompt`` tokens are a prompt, and the rest one answer."""
    config, shape = preset.config, (preset.documents, preset.length)
    return Documents(
        torch.randint(config.vocab_size, shape),
        (torch.arange(preset.length) >= prompt).expand(shape).contiguous(),
        torch.randn(*shape, len(config.target_layers), config.hidden_size),
        torch.randn(*shape, config.hidden_size),
    )


def batch_of(documents: Documents) -> RolloutBatch:
    """The documents as ours takes them, one behind the other."""
    count, length = documents.input_ids.shape
    ids, mask, features, last_hidden = (each.flatten(0, 1) for each in documents)
    return RolloutBatch(ids, mask, features, last_hidden, torch.full((count,), length))


def spread(output: StepOutput, documents: Documents) -> Tensor:
    """Outputs of ours at their places in ``[B * T, H]``; zeros at those of no row."""
    return output.y.new_zeros(documents.input_ids.numel(), output.y.shape[1]).index_copy(0, output.rows, output.y)


def rows_of(documents: Documents, steps: int) -> SupervisedRows:
    """The supervised rows of all documents."""
    masks_KBT = supervised(documents.loss_mask, steps)
    depth = masks_KBT.sum(0).flatten()
    order = depth.argsort(descending=True, stable=True)
    counts = masks_KBT.sum((1, 2)).tolist()
    return SupervisedRows(order[: counts[0]], counts)


def memory_of(preset: Preset, prompt: int, kind: str, rung: Rung) -> int | None:
    """Bytes that a step of a rung takes at most, above what is resident before it; None where that cannot be asked.

    To be called in a process of its own; one thread computes. By the time that counts the optimiser's state is there,
    and so is what libraries allocate when they are first used: a step was taken on a document of a few tokens.
    """
    torch.set_num_threads(1)
    ladder = Ladder(preset, prompt, kind)
    ladder.step(rung, Documents(*(tensor[:1, -FEW:].contiguous() for tensor in ladder.documents)))
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the most that was ever resident becomes what is
    except OSError:
        return None
    before = _most_resident()
    ladder.step(rung)
    return _most_resident() - before


def _most_resident() -> int:
    said = re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())
    assert said
    return 1024 * int(said[1])
