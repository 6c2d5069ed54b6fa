"""Acceptance length without decoding: a walk along a recorded greedy answer.

Serving drafts from one row, accepts the draft's prefix that agrees with the target, and goes on behind it. An average
over all rows would count easy stretches too often, since accepted drafts jump over them.
"""

from __future__ import annotations

from torch import Tensor


def walk(hits: Tensor, first: int, chain: int) -> list[int]:
    """Accepted tokens of every round along one answer.

    Args:
        hits: bool ``[K, T]`` over the tokens of a document that ends with the answer: step j of row t has the target's
            top token as its own.
        first: row of the first round: the index of the answer's first token, minus 1.
        chain: drafted tokens per round, at most K.

    Returns:
        one count in 0..chain a round. The round that crosses the end of the answer is left out, since what the draft
        would have said behind it is not known; where this is compared with decoding, it is left out there too. It is
        the one whose accepted tokens reach the answer's last, so that the target's own token behind them lies outside.
    """
    joint_T = hits[:chain].int().cumprod(0).sum(0).tolist()
    accepted: list[int] = []
    row, last = first, len(joint_T) - 2
    while row + joint_T[row] < last:
        accepted.append(joint_T[row])
        row += joint_T[row] + 1
    return accepted
