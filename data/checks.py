"""Whether recorded states can be the target's: stale, empty or misplaced ones would train a head that is quietly bad.

Shapes: T tokens, F captured layers, H hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..configs.errors import Incomplete
from ..models.target import Target
from ..models.target_files import TargetEnds
from .answers import Answer
from .chat import Sequence as Ids
from .recorders import States
from .shards import Kept

#: How far a recorded greedy token's logit may lie below the top one: batches of another shape round differently.
TIE = {"float32": 1e-3, "bfloat16": 0.5}
#: Of the greedy tokens of a shard, how many may lie further below: rounding can send a token to another expert.
DISAGREEING_SHARE, DISAGREEING_TOKENS = 0.02, 2


def check_states(answer: Answer, ids: Ids, states: States, target: Target | TargetEnds) -> int:
    """Compare the states of one conversation with what they must be.

    Returns:
        How many tokens of a greedy answer have a logit clearly below the top one.

    Raises:
        Incomplete: states have another shape, are not finite, or zero.
    """
    tokens, width = len(ids.input_ids), target.info.hidden_size
    expected = ((tokens, len(target.info.layers), width), (tokens, width))
    for name, found, shape in zip(States._fields, states, expected, strict=True):
        of = f"{name} of conversation {answer.id}"
        if found.shape != shape:
            raise Incomplete(f"{of} are {tuple(found.shape)} and not {shape}; the capture is at fault")
        if not found.isfinite().all():
            raise Incomplete(f"{of} are not finite; the target or its dtype is at fault")
        if (found.abs().amax(-1) == 0).any():
            raise Incomplete(f"{of} are zero; the capture is at fault")
    if answer.temperature > 0.0:
        return 0
    at = torch.from_numpy(ids.loss_mask.nonzero()[0]).to(states.last_hidden.device)
    logits_TV = target.logits(states.last_hidden[at - 1])
    said = torch.from_numpy(ids.input_ids).to(logits_TV.device, torch.long)[at]
    gaps = logits_TV.amax(1) - logits_TV.gather(1, said[:, None])[:, 0]
    return int((gaps > TIE[target.info.dtype]).sum())


def check_agreement(kept: Sequence[Kept], shard: int) -> None:
    """Refuse a shard whose states do not predict its greedy tokens, where that is more than rounding.

    Raises:
        Incomplete: naming the conversation with most of them.
    """
    tokens = sum(sample.supervised for sample in kept if sample.identity.temperature == 0.0)
    disagreeing = sum(sample.disagreeing for sample in kept)
    if disagreeing > DISAGREEING_TOKENS + DISAGREEING_SHARE * tokens:
        worst = max(kept, key=lambda sample: sample.disagreeing)
        raise Incomplete(
            f"shard {shard}: the states predict other tokens for {disagreeing:,} of {tokens:,} greedy ones, most in "
            f"conversation {worst.identity.id}; the capture is at fault, or the answers are another target's: delete "
            "conversations/answers.jsonl"
        )
