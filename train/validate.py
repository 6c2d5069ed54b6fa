"""How good the head is now: loss, accuracy by step and acceptance length on held-out conversations, without decoding."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from ..data.store import Store
from ..models.rollout import RolloutBatch, StepOutput
from ..models.walk import walk
from .objective import StepResult


@dataclass(frozen=True)
class Validation:
    """``acceptance_length`` is simulated along greedy answers, by a chain of the recipe's length."""

    loss: float
    acceptance_length: float
    rounds: int
    accuracy: list[float]

    def as_json(self) -> dict[str, Any]:
        """The figures, rounded for the log."""
        fields = asdict(self)
        return fields | {
            "loss": round(self.loss, 5),
            "acceptance_length": round(self.acceptance_length, 4),
            "accuracy": [round(value, 4) for value in self.accuracy],
        }


class Tally:
    """Sums over validation samples that can be added up over ranks, one float64 vector."""

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.sums = torch.zeros(3 + 2 * steps, dtype=torch.float64)

    def add(self, batch: RolloutBatch, outputs: list[StepOutput], results: list[StepResult], loss: Tensor, chain: int) -> None:
        """Count one batch; ``loss`` is its weighted sum."""
        self.sums[0] += loss.item()
        hits_KBT = torch.zeros(len(outputs), *batch.input_ids.shape, dtype=torch.bool)
        for step, (output, result) in enumerate(zip(outputs, results, strict=True)):
            sample, row = output.rows.cpu().unbind(1)
            hits_KBT[step, sample, row] = result.hits.cpu()
            self.sums[3 + step] += result.hits.sum().item()
            self.sums[3 + self.steps + step] += len(row)
        for row, mask in enumerate(batch.loss_mask.cpu()):
            answer = mask.nonzero()[:, 0]
            if len(answer):
                accepted = walk(hits_KBT[:, row, : answer[-1] + 1], int(answer[0]) - 1, chain)
                self.sums[1] += len(accepted)
                self.sums[2] += sum(accepted)

    def result(self) -> Validation:
        """The figures of everything that was added."""
        loss, rounds, accepted, *rest = self.sums.tolist()
        hits, counts = rest[: self.steps], rest[self.steps :]
        return Validation(
            loss=loss / max(counts[0], 1),
            acceptance_length=1 + accepted / max(rounds, 1),
            rounds=int(rounds),
            accuracy=[hit / max(count, 1) for hit, count in zip(hits, counts, strict=True)],
        )


def validation_batches(store: Store, indices: list[int], rank: int, world: int) -> list[list[int]]:
    """The samples one rank validates on, a few at a time, of similar length."""
    lengths = store.lengths()
    mine = sorted(indices, key=lambda index: lengths[index])[rank::world]
    return [mine[start : start + 8] for start in range(0, len(mine), 8)] or [[]]


