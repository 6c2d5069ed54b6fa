"""Draft, rollout and objective as one module with one forward, which is what DeepSpeed and DDP wrap."""

from __future__ import annotations

from dataclasses import asdict, fields
from pathlib import Path
from typing import NamedTuple

from torch import Tensor, nn

from ..configs.errors import UserError
from ..configs.settings import DraftSettings, Settings, TrainSettings
from ..data.store import Store
from ..models.checkpoint import load_draft
from ..models.draft import Eagle3Draft
from ..models.rollout import RolloutBatch, rollout
from ..models.shapes import draft_config
from .objective import StepResult, objective, weighted


class Trained(NamedTuple):
    """``loss`` is the weighted sum over supervised rows and steps; the lists hold one entry a step.

    ``rows [n]`` are those of :class:`~eagle3.models.rollout.StepOutput`; its outputs are not kept, since mixed precision
    would widen a copy of all that a forward returns.
    """

    loss: Tensor
    rows: list[Tensor]
    results: list[StepResult]


class TrainingTimeTest(nn.Module):
    """What is trained.

    The target's embedding and LM head are constants ``[V, H]``: they are neither parameters, so nothing shards or
    optimises them, nor buffers, so no checkpoint holds them.
    """

    def __init__(self, draft: Eagle3Draft, embedding: Tensor, lm_head: Tensor, settings: TrainSettings) -> None:
        super().__init__()
        self.draft, self.settings = draft, settings
        self._constants = (embedding, lm_head)

    def forward(self, batch: RolloutBatch) -> Trained:
        """The rollout of ``batch`` and its loss."""
        embedding, lm_head = self._constants
        outputs = rollout(self.draft, embedding, batch, self.settings.ttt_steps)
        results = objective(self.draft, outputs, batch, lm_head, self.settings.objective)
        return Trained(weighted(results, self.settings.step_decay), [output.rows for output in outputs], results)


def warm_draft(settings: Settings, store: Store) -> Eagle3Draft:
    """The head in ``train.warm_start``, with its own vocabulary.

    Raises:
        UserError: there is no head, or it is not of the shape that the recipe and the store ask for.
    """
    path = Path(settings.train.warm_start or "")
    draft, wanted = load_draft(path), draft_config(settings.draft, store.manifest.target)
    theirs = asdict(draft.config)
    for key in ("hidden_size", "vocab_size", "target_layers"):
        if theirs[key] != (recorded := getattr(wanted, key)):
            problem = f"its {key} is {theirs[key]}, and the store's {recorded}"
            raise UserError("train.warm_start", path, problem, "take a head for these recordings, or record for it")
    chosen = {"vocab_size": "draft_vocab_size"}
    differing = [
        f"draft.{field.name}={theirs[key]}"
        for field in fields(DraftSettings)
        if theirs[key := chosen.get(field.name, field.name)] != getattr(wanted, key)
    ]
    if differing:
        problem, remedy = "it has another shape than the recipe says", f"set {' '.join(differing)}"
        raise UserError("train.warm_start", path, problem, remedy)
    return draft
