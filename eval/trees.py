"""Trees of drafted tokens, EAGLE-2's: grown where the head is confident, judged node by node.

    drafter = TreeDrafter(head, TreeShape(total=60, depth=7, top_k=10))
    tree = drafter.propose()                       # Tree
    judge_tree(logits, tree)                       # Judgement: which nodes stand, and the target's own token

A level holds the ``top_k`` nodes on the likeliest paths, by the product of the head's probabilities; each proposes
``top_k`` tokens. Of all that were proposed the ``total`` likeliest are verified: a node is never likelier than its
parent, so they are a tree. Source: arXiv 2406.16858, section 4.

At T > 0 the tree is the same, since nothing of it is drawn, and its nodes are judged as greedily drafted tokens are: the
children of a node one after the other, each accepted with the probability that the target gives it among what was not
rejected before. What is emitted is distributed as the target's own samples (arXiv 2305.09781, section 4.3).

Shapes: N nodes, root excluded; R = N + 1 rows; V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..models.generate import draw_one
from .sampling import REJECTED, Judgement, distribution


class TreeShape(NamedTuple):
    """``total``: most nodes that are verified, root excluded. ``depth``: levels. ``top_k``: nodes of a level."""

    total: int
    depth: int
    top_k: int


class Tree(NamedTuple):
    """Drafted ``tokens`` ``[N]``. Row 0 is the root, the last token that stands; row i + 1 is node i.

    ``parents`` ``[N]``: rows; none is behind its child. ``depth``: no path is longer.
    """

    tokens: Tensor
    parents: Tensor
    depth: int

    def ancestors(self) -> Tensor:
        """Which rows are on the path to each, itself included: bool ``[N + 1, N + 1]``."""
        found = torch.eye(len(self.parents) + 1, dtype=torch.bool, device=self.parents.device)
        for above in self._above():
            found = found | found.index_select(0, above)
        return found

    def on_path(self, accepted: Tensor) -> Tensor:
        """Which rows are ``accepted`` with all their ancestors: bool ``[N + 1]`` to bool ``[N + 1]``."""
        for above in self._above():
            accepted = accepted & accepted.index_select(0, above)
        return accepted

    def _above(self) -> Iterator[Tensor]:
        """Of each row the row 1, 2, 4, ... levels above it, the root at most: a path in as few steps as its length has bits."""
        above = torch.cat((self.parents.new_zeros(1), self.parents))
        yield above
        for _ in range(self.depth.bit_length() - 1):
            above = above.index_select(0, above)
            yield above


def judge_tree(logits: Tensor, tree: Tree) -> Judgement:
    """Go down while a child is the most likely token.

    Args:
        logits: ``[N + 1, V]``; row i is the target's at row i of the tree.
        tree: it.
    """
    flat = torch.cat((logits.argmax(-1), tree.tokens, tree.parents)).tolist()  # one wait
    count = len(tree.tokens)
    best, tokens, parents = flat[: count + 1], flat[count + 1 : 2 * count + 1], flat[2 * count + 1 :]
    children = {pair: row for row, pair in enumerate(zip(parents, tokens, strict=True), 1)}
    rows, row = list[int](), 0
    while (child := children.get((row, best[row]))) is not None:
        rows.append(child)
        row = child
    return Judgement(rows, [*(tokens[row - 1] for row in rows), best[row]])


def judge_tree_sampled(logits: Tensor, tree: Tree, temperature: float, uniform: Tensor) -> Judgement:
    """Accept so that what is emitted is distributed as the target's own samples.

    Args:
        logits: ``[N + 1, V]``.
        tree: it; what it holds must not depend on ``uniform``.
        temperature: above 0.
        uniform: ``[N + 1]`` independent numbers in [0, 1): row 0's draws the token that is added, each other's judges
            its node.
    """
    p_RV = distribution(logits, temperature)
    children, count = (tree.parents, tree.tokens), len(tree.tokens)
    p_N = p_RV[children]
    p_RV.index_put_(children, p_N * REJECTED)
    # A node is judged by what is left when its earlier siblings are rejected, as if its parent and all of them were.
    p_N = p_N.double()
    earlier_NN = (tree.parents.unsqueeze(1) == tree.parents).tril(-1).double()
    passed_N = (uniform[1:] * (1 - earlier_NN @ p_N) < p_N).double()
    first_N = passed_N > earlier_NN @ passed_N
    # The first that pass are on one path from the root, and no node is behind its child: the last one is its end.
    standing_R = tree.on_path(torch.cat((first_N.new_ones(1), first_N)))
    last_1 = (standing_R * torch.arange(count + 1, device=standing_R.device)).amax(0, keepdim=True)
    added_1 = draw_one(p_RV.index_select(0, last_1).squeeze(0), uniform[:1])
    row, added, *flat = torch.cat((last_1, added_1, tree.parents, tree.tokens)).tolist()  # one wait
    parents, tokens, rows = flat[:count], flat[count:], list[int]()
    while row:
        rows.append(row)
        row = parents[row - 1]
    rows.reverse()
    return Judgement(rows, [*(tokens[row - 1] for row in rows), added])
