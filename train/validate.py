"""How good the head is now: loss, accuracy by step and acceptance length on held-out conversations, without decoding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from ..models.rollout import RolloutBatch
from ..models.walk import walk
from .module import Trained

BATCH = 8  # samples at once


@dataclass(frozen=True)
class Validation:
    """``acceptance_length`` is simulated along greedy answers, by a chain of the recipe's length."""

    loss: float
    acceptance_length: float
    rounds: int
    accuracy: list[float]

    def as_json(self) -> dict[str, Any]:
        """The figures, rounded for the log."""
        return asdict(self) | {
            "loss": round(self.loss, 5),
            "acceptance_length": round(self.acceptance_length, 4),
            "accuracy": [round(value, 4) for value in self.accuracy],
        }


class Tally:
    """Sums over validation samples that can be added up over ranks: one float32 vector, exact up to 16 M rounds.

    Args:
        steps: K, those of the rollout.
        chain: drafted tokens per simulated round, at most K.
    """

    def __init__(self, steps: int, chain: int) -> None:
        self.steps, self.chain = steps, chain
        self.sums = torch.zeros(3 + 2 * steps)  # loss, rounds, accepted, hits of each step, rows of each step

    def add(self, batch: RolloutBatch, trained: Trained) -> None:
        """Count one batch."""
        self.sums[0] += trained.loss.item()
        hits_KN = torch.zeros(self.steps, len(batch.input_ids), dtype=torch.bool)
        for step, (rows, result) in enumerate(zip(trained.rows, trained.results, strict=True)):
            hits_KN[step, rows.cpu()] = result.hits.cpu()
            self.sums[3 + step] += result.hits.sum().item()
            self.sums[3 + self.steps + step] += len(rows)
        lengths = batch.lengths.tolist()
        for mask, hits_KT in zip(batch.loss_mask.cpu().split(lengths), hits_KN.split(lengths, 1), strict=True):
            answer = mask.nonzero()[:, 0]
            if len(answer):
                accepted = walk(hits_KT[:, : answer[-1] + 1], int(answer[0]) - 1, self.chain)
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


def validation_parts(indices: Sequence[int], lengths: Sequence[int], rank: int, ranks: int) -> list[tuple[int, ...]]:
    """What one rank validates on, a few samples of similar length at a time; every rank gets as many parts."""
    ordered = sorted(indices, key=lambda index: (lengths[index], index))
    most = -(-len(ordered) // ranks)
    mine = ordered[rank::ranks]
    return [tuple(mine[start : start + BATCH]) for start in range(0, most, BATCH)]
