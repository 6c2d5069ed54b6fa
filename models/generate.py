"""Batched answers in which every answer is its own: neither its tokens nor its draws depend on its neighbours.

Shapes: B batch, T tokens, H hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .target import Target

COMPACT_BELOW = 0.8  # share of rows still running under which the finished ones are dropped: copying a cache costs too


class Answer(NamedTuple):
    """Token ids, the end token included where ``finished``; otherwise cut at the limit."""

    ids: list[int]
    finished: bool


def draw(probabilities_BV: Tensor, uniform_B: Tensor) -> Tensor:
    """The tokens ``[B]`` at which the cumulated probabilities pass ``uniform_B`` in [0, 1); never one of probability 0.

    ``probabilities_BV`` need not be normalised. Inverting the distribution uses one number per token, so that a
    sequence's draws are fixed by its own seed, whatever is computed beside it. The sums are float64 for probabilities of
    any dtype: in float32 an unlikely token behind the likely ones of a large vocabulary would fall between two floats.
    """
    cumulated_BV = probabilities_BV.cumsum(-1, dtype=torch.float64)
    at_B1 = uniform_B.unsqueeze(1) * cumulated_BV[:, -1:]
    found_B1 = torch.searchsorted(cumulated_BV, at_B1, right=True)
    return found_B1.squeeze(1).clamp_max(probabilities_BV.shape[-1] - 1)


def draw_one(probabilities_V: Tensor, uniform_1: Tensor) -> Tensor:
    """:func:`draw` of one row, as ``[1]``, in fewer operations: between two forwards each is slow for being called once."""
    cumulated_V = probabilities_V.cumsum(0, dtype=torch.float64)
    # Without the last sum nothing is found behind the last token; in front of it the product never reaches the sum.
    return torch.searchsorted(cumulated_V[:-1], uniform_1 * cumulated_V[-1:], right=True)


def choose(logits_BV: Tensor, temperature_B: Tensor, uniform_B: Tensor) -> Tensor:
    """The next tokens ``[B]``: the most likely where the temperature is 0, else sampled."""
    greedy_B = logits_BV.argmax(-1)
    warm_B = temperature_B > 0
    if not warm_B.any():
        return greedy_B
    scale_B1 = torch.where(warm_B, temperature_B, 1.0)[:, None]
    sampled_B = draw((logits_BV.double() / scale_B1).softmax(-1), uniform_B)
    return torch.where(warm_B, sampled_B, greedy_B)


@torch.inference_mode()
def generate(
    target: Target,
    prompts: Sequence[Sequence[int]],
    temperatures: Sequence[float],
    max_new_tokens: int,
    seeds: Sequence[int] | None = None,
) -> list[Answer]:
    """Answer ``prompts`` together; see :meth:`.target.Target.generate`."""
    lengths = [len(prompt) for prompt in prompts]
    count, longest = len(prompts), max(lengths) + max_new_tokens
    if count > 1 and longest > target.uniform_positions:
        return [
            generate(target, [prompt], [temperature], max_new_tokens, [seed])[0]
            for prompt, temperature, seed in zip(prompts, temperatures, seeds or range(count), strict=True)
        ]
    device = target.device
    uniform_BT = torch.stack([_uniform(seed, max_new_tokens) for seed in seeds or range(count)]).to(device)
    temperature_B = torch.tensor(temperatures, dtype=torch.float64, device=device)
    padded_BT = torch.zeros(count, max(lengths), dtype=torch.long)
    for row, prompt in enumerate(prompts):
        padded_BT[row, : len(prompt)] = torch.tensor(prompt)
    cache = target.new_cache(longest, count)
    states_BTH = target.forward(padded_BT, cache).last_hidden
    last_BH = states_BTH[torch.arange(count, device=device), torch.tensor(lengths, device=device) - 1]
    cache.set_lengths(lengths, device)

    answers: list[list[int]] = [[] for _ in prompts]
    finished = [False] * count
    rows = list(range(count))  # whose answer each row of the batch is
    for step in range(max_new_tokens):
        token_B = choose(target.logits(last_BH), temperature_B, uniform_BT[:, step])
        for row, token in zip(rows, token_B.tolist(), strict=True):
            if not finished[row]:
                answers[row].append(token)
                finished[row] = token in target.info.eos_ids
        running = [index for index, row in enumerate(rows) if not finished[row]]
        if not running or step + 1 == max_new_tokens:
            break
        if len(running) <= COMPACT_BELOW * len(rows):
            cache.keep(running)
            rows = [rows[index] for index in running]
            token_B, temperature_B, uniform_BT = token_B[running], temperature_B[running], uniform_BT[running]
        last_BH = target.forward(token_B[:, None], cache).last_hidden[:, 0]
    return [Answer(ids, done) for ids, done in zip(answers, finished, strict=True)]


def _uniform(seed: int, count: int) -> Tensor:
    return torch.rand(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
