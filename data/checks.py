"""Whether recorded states can be the target's: stale, empty or misplaced ones would train a head that is quietly bad.

Shapes: T tokens, F captured layers, H hidden, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from operator import itemgetter

import torch
from torch import Tensor

from ..configs.errors import Incomplete
from .answers import Answer
from .recorders import RecordedTarget, States

#: How far a recorded greedy token's logit may lie below the top one: batches of another shape round differently.
TIE = {"float32": 1e-3, "bfloat16": 0.5}
#: Of the greedy tokens of a shard, how many may lie further below: rounding can send a token to another expert.
DISAGREEING_SHARE, DISAGREEING_TOKENS = 0.02, 2
LOGITS = 1 << 26  # most that are computed at once: 134 MB in bfloat16, 332 tokens of Maverick's


def check_states(answer: Answer, states: States, target: RecordedTarget) -> int:
    """Compare the states of one conversation with what they must be.

    Returns:
        How many tokens of a greedy answer have a logit clearly below the top one.

    Raises:
        Incomplete: states have another shape, are not finite, or zero.
    """
    tokens, width = len(answer.ids), target.info.hidden_size
    expected = ((tokens, len(target.info.layers), width), (tokens, width))
    for name, found, shape in zip(States._fields, states, expected, strict=True):
        of = f"{name} of conversation {answer.id}"
        if found.shape != shape:
            raise Incomplete(f"{of} are {tuple(found.shape)} and not {shape}; the capture is at fault")
        smallest, largest = torch.stack(found.abs().amax(-1).aminmax()).tolist()  # both are NaN where one state is
        if not math.isfinite(largest):
            raise Incomplete(f"{of} are not finite; the target or its dtype is at fault")
        if smallest == 0:
            raise Incomplete(f"{of} are zero; the capture is at fault")
    return 0 if answer.temperature > 0.0 else _disagreeing(answer, states.last_hidden, target)


def _disagreeing(answer: Answer, last_hidden: Tensor, target: RecordedTarget) -> int:
    """Tokens of the answer whose logit lies clearly below the top one, counted over ``LOGITS`` of them at a time."""
    ids, found = torch.tensor(answer.ids, device=last_hidden.device), last_hidden.new_zeros((), dtype=torch.int64)
    rows = max(1, LOGITS // target.info.vocab_size)
    for turn, end in answer.turns:
        for start in range(turn, end, rows):
            said = slice(start, min(start + rows, end))
            logits_TV = target.logits(last_hidden[said.start - 1 : said.stop - 1])
            gaps = logits_TV.amax(1) - logits_TV.gather(1, ids[said, None])[:, 0]
            found += (gaps > TIE[target.info.dtype]).sum()
    return int(found)


def check_agreement(shard: int, answers: Sequence[Answer], missed: Sequence[int]) -> None:
    """Refuse a shard whose states do not predict its greedy tokens, where that is more than rounding.

    Args:
        shard: its number.
        answers: its samples.
        missed: for each, what :func:`check_states` returned.

    Raises:
        Incomplete: naming the conversation with most of them.
    """
    tokens = sum(len(answer.said) for answer in answers if answer.temperature == 0.0)
    if sum(missed) > DISAGREEING_TOKENS + DISAGREEING_SHARE * tokens:
        worst = max(zip(missed, answers, strict=True), key=itemgetter(0))[1]
        raise Incomplete(
            f"shard {shard}: the states predict other tokens for {sum(missed):,} of {tokens:,} greedy ones, most in "
            f"conversation {worst.id}; the capture is at fault, or the answers are another target's: delete "
            "conversations/answers.jsonl"
        )
