"""Processes that hold a target together go the same way: that of rank 0.

    proposal = agreed(group, proposal)                                   # the tokens that rank 0 drafted
    rows, tokens = decided(group, len(proposal.tokens), judge)           # what rank 0 judges of them
    done = led(group, lambda: resume(path, sizes))                       # what rank 0 finds, or the end of all
    if stopping(group, stop):                                            # one of them was asked to

Each process drafts, and each has all logits. They should be the same, but a float that differs in its last bit between two
cards would turn a tie, or a draw, another way; from there on the processes would run the target over different tokens, and
what they add up would belong to nobody's text. So of everything that chooses a token rank 0's is taken: two broadcasts of
a few integers each round, and what is drawn at random is drawn by rank 0 alone.

Rank 0 alone looks at files and writes them, so that nobody else can find another state of things.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

from ..configs.errors import Eagle3Error, Told
from ..configs.signals import StopRequest
from ..models.native.parallel import Group
from .sampling import Judgement, Proposal
from .trees import Tree

Found = TypeVar("Found")


def agreed(group: Group, proposal: Proposal | Tree) -> Proposal | Tree:
    """Rank 0's proposal, of which every process has one of the same size.

    The probabilities that its tokens were drawn with stay each process's own: who judges is rank 0.
    """
    if isinstance(proposal, Tree):
        tokens, parents = group.first_(torch.stack((proposal.tokens, proposal.parents)))
        return proposal._replace(tokens=tokens, parents=parents)
    return proposal._replace(tokens=group.first_(proposal.tokens.clone()))


def decided(group: Group, most: int, judge: Callable[[], Judgement]) -> Judgement:
    """What ``judge`` says in rank 0, where alone it is asked: at most so many rows stand."""
    said = torch.zeros(2 + 2 * most, dtype=torch.long)
    if group.rank == 0:
        rows, tokens = judge()
        said[: 2 * len(tokens)] = torch.tensor([len(rows), *rows, *tokens])
    count, *flat = group.first_(said.to(group.device)).tolist()
    return Judgement(flat[:count], flat[count : 2 * count + 1])


def led(group: Group | None, work: Callable[[], Found]) -> Found:
    """What ``work`` returns in rank 0, where alone it is done; None: in this process.

    After a bug, or a signal, there is nothing to tell: the launcher ends the others.

    Raises:
        Eagle3Error: as ``work`` does.
        Told: it did, and this is another rank.
    """
    if group is None:
        return work()
    told: tuple[list[Found], int] = [], 0
    if group.rank == 0:
        try:
            told = [work()], 0
        except Eagle3Error as error:
            group.from_first(([], error.exit_code))
            raise
    found, exit_code = group.from_first(told)
    if not found:
        raise Told(exit_code)
    return found[0]


def stopping(group: Group | None, stop: StopRequest) -> bool:
    """Whether a signal came to any of them; all ask, and all are told the same."""
    if group is None:
        return stop.requested
    return bool(group.sum_(torch.tensor(int(stop.requested), device=group.device)))
