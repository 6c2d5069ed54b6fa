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

from typing import NamedTuple

import torch
from torch import Tensor

from ..models.generate import draw
from .sampling import Judgement, distribution


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
        own = torch.eye(len(self.parents) + 1, dtype=torch.bool, device=self.parents.device)
        parents = torch.cat((self.parents.new_zeros(1), self.parents))
        found = own
        for _ in range(self.depth):
            found = own | found[parents]
        return found


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
    children = tree.parents, tree.tokens
    left_RV = p_RV.index_put(children, p_RV.new_zeros(()))
    left_RV = torch.where(left_RV.any(1, keepdim=True), left_RV, p_RV)  # rounding can leave nothing
    # Of every row what would be added if its children were all rejected, so that there is one wait.
    added_R = draw(left_RV, uniform[:1].expand(len(left_RV)))
    count = len(tree.tokens)
    numbers = p_RV[children], uniform[1:], tree.parents.double(), tree.tokens.double(), added_R.double()
    flat = torch.cat(numbers).tolist()
    p, chances, parents, tokens = (flat[at * count : (at + 1) * count] for at in range(4))
    rows, row, left = list[int](), 0, 1.0
    for node, parent in enumerate(parents):
        if parent != row:
            continue
        if chances[node] * left < p[node]:
            rows.append(node + 1)
            row, left = node + 1, 1.0
        else:
            left -= p[node]
    return Judgement(rows, [*(int(tokens[row - 1]) for row in rows), int(flat[4 * count + row])])
