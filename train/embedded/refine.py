"""Teaches the embedded target not to loop: unlikelihood on its own greedy answers, beside ordinary training.

Sequence-level unlikelihood training (Welleck et al., arXiv 1908.04319): answer training questions greedily, and wherever
the answer's last 8 tokens stood in it before, push the probability of that token down. Half of every step is ordinary
cross-entropy on the training stream, so that the distribution elsewhere stays what the text made it.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from transformers import Llama4ForCausalLM

from ...models.repeats import repeated, repeated_rate
from . import forward
from .pretrain import average_gradients, loss_of, precision

Generate = Callable[[list[list[int]]], list[list[int]]]


@dataclass(frozen=True)
class Refinement:
    """A step is ``answers`` greedy answers and ``rows`` windows of the training stream."""

    steps: int = 50
    answers: int = 8
    rows: int = 2
    length: int = 768
    learning_rate: float = 2e-4
    unlikelihood: float = 0.1


def refine(
    model: Llama4ForCausalLM,
    questions: list[list[int]],
    ids: np.ndarray,
    recipe: Refinement,
    generate: Generate,
    log: Path,
) -> None:
    """Refine ``model`` in place.

    Args:
        model: fp32 weights, trained.
        questions: prompts of training examples, as token ids; taken in order, ``recipe.answers`` a step and rank.
        ids: the training stream; its end is used, which pretraining saw last or not at all.
        recipe: sizes and rates.
        generate: answers prompts greedily with ``model``'s current weights.
        log: a JSONL file that gets the loss and the rate of repeated 8-grams of every step's answers.
    """
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    optimiser = torch.optim.AdamW(model.parameters(), lr=recipe.learning_rate, betas=(0.9, 0.95), weight_decay=0.0)
    window = recipe.rows * recipe.length
    for step in range(recipe.steps):
        optimiser.param_groups[0]["lr"] = recipe.learning_rate * min(1.0, (step + 1) / 10, 1 - step / recipe.steps)
        turn = step * world + rank
        prompts = [questions[(turn * recipe.answers + i) % len(questions)] for i in range(recipe.answers)]
        answers = generate(prompts)
        penalty = _unlikelihood(model, prompts, answers)
        if penalty is not None:
            (recipe.unlikelihood * penalty).backward()
        start = len(ids) - 1 - (turn + 1) * window
        rows = torch.from_numpy(ids[start : start + window + 1].astype(np.int64))
        loss, _ = loss_of(
            model, torch.stack([rows[i : i + recipe.length + 1] for i in range(0, window, recipe.length)])
        )
        loss.backward()
        average_gradients(model, world)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        if rank == 0:
            line = {"refinement": step + 1, "loss": round(loss.item(), 4), "repeated": round(repeated_rate(answers), 4)}
            with log.open("a") as file:
                file.write(json.dumps(line) + "\n")
            print(json.dumps(line), flush=True)


def _unlikelihood(model: Llama4ForCausalLM, prompts: list[list[int]], answers: list[list[int]]) -> Tensor | None:
    """The mean of -log(1 - p) over the repeated tokens of ``answers``, or None where nothing is repeated."""
    rows = [
        (prompt + answer, [False] * len(prompt) + repeated(answer))
        for prompt, answer in zip(prompts, answers, strict=True)
        if any(repeated(answer))
    ]
    if not rows:
        return None
    chunk: int = model.config.to_dict()["attention_chunk_size"]
    length = max(len(ids) for ids, _ in rows) - 1
    length += -length % chunk if length > chunk else 0
    ids_BT = torch.zeros(len(rows), length + 1, dtype=torch.long)
    marks_BT = torch.zeros(len(rows), length + 1, dtype=torch.bool)
    for row, (ids, marks) in enumerate(rows):
        ids_BT[row, : len(ids)] = torch.tensor(ids)
        marks_BT[row, : len(marks)] = torch.tensor(marks)
    with precision():
        states_BTH, _ = forward.hidden_states(model, ids_BT[:, :-1])
        at = marks_BT[:, 1:]
        logits = F.linear(states_BTH[at], model.model.embed_tokens.weight).float()
    chance = logits.softmax(-1).gather(1, ids_BT[:, 1:][at][:, None])
    return -torch.log((1 - chance).clamp_min(1e-5)).mean()
