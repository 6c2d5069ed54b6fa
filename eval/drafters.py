"""What drafts: the EAGLE-3 head, a chain or a tree at a time.

    head = NativeDraft(draft, target.head.embedding, capacity=700, drafted=70)
    drafter = ChainDrafter(head, chain=5)
    drafter = TreeDrafter(head, TreeShape(total=60, depth=7, top_k=10))

Row t of the head pairs the target's features of token t with the embedding of token t+1. Tokens that stand enter its
cache as rows with real features, all at once; the last of them drafts the next round's first token.

Shapes: T tokens, H hidden, F features, K drafted tokens, R = K + 1 rows, D draft vocabulary, k nodes of a tree's level, S drafted rows.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from .sampling import Drawn, Proposal, UniformNumbers, draw_token
from .speculate import Sampling, Verdict
from .trees import Tree, TreeShape


class Head(Protocol):
    """A draft head over one sequence. :class:`~..models.native.draft.NativeDraft` says what each member does."""

    device: torch.device
    vocabulary: Tensor

    def restart(self) -> None: ...

    def extend(self, tokens: Tensor, features: Tensor) -> None: ...

    def begin(self) -> Tensor: ...

    def step(self, tokens: Tensor, y_kH: Tensor, seen_kS: Tensor | None = None) -> Tensor: ...

    def logits(self, y: Tensor) -> Tensor: ...


class HeadDrafter:
    """What chains and trees have in common.

    Args:
        head: with room for the longest request and one proposal.
    """

    def __init__(self, head: Head) -> None:
        self._head = head
        self._sampling, self._uniform = Sampling(), UniformNumbers(head.device)

    def start(self, sampling: Sampling) -> None:
        """See :class:`~.speculate.Drafter`."""
        self._head.restart()
        self._sampling = sampling
        self._uniform.restart(2 * sampling.seed)

    def update(self, verdict: Verdict) -> None:
        """See :class:`~.speculate.Drafter`."""
        self._head.extend(torch.tensor(verdict.tokens).to(self._head.device, non_blocking=True), verdict.features)


class ChainDrafter(HeadDrafter):
    """The head, drafting ``chain`` tokens, 1 or more, one after the other; the rest as for :class:`HeadDrafter`."""

    def __init__(self, head: Head, chain: int) -> None:
        super().__init__(head)
        self._chain = chain
        self._nothing = torch.zeros(len(head.vocabulary), device=head.device)

    def propose(self) -> Proposal:
        """See :class:`~.speculate.Drafter`."""
        if self._sampling.temperature == 0 or self._sampling.drafting == "greedy":
            return self._greedy()
        head, y_1H = self._head, self._head.begin()
        chosen, rows = list[Tensor](), list[Tensor]()
        for uniform_1 in self._uniform.take(self._chain).unsqueeze(1).unbind():
            if chosen:
                y_1H = head.step(chosen[-1], y_1H)
            id_1, q_D = draw_token(head.logits(y_1H).squeeze(0), self._sampling.temperature, uniform_1)
            chosen.append(id_1)
            rows.append(q_D)
        ids_K, q_RD = torch.cat(chosen), torch.stack((*rows, self._nothing))
        return Proposal(head.vocabulary.index_select(0, ids_K), Drawn(ids_K, q_RD, head.vocabulary))

    def _greedy(self) -> Proposal:
        head, y_1H = self._head, self._head.begin()
        chosen = [head.logits(y_1H).argmax(-1)]
        while len(chosen) < self._chain:
            y_1H = head.step(chosen[-1], y_1H)
            chosen.append(head.logits(y_1H).argmax(-1))
        return Proposal(head.vocabulary.index_select(0, torch.cat(chosen)))


class TreeDrafter(HeadDrafter):
    """The head, drafting a tree of ``shape``; the rest as for :class:`HeadDrafter`."""

    def __init__(self, head: Head, shape: TreeShape) -> None:
        super().__init__(head)
        self._shape = shape
        self._wide = min(shape.top_k, len(head.vocabulary))
        self._eye = torch.eye(self._wide, dtype=torch.bool, device=head.device)

    def propose(self) -> Tree:
        """See :class:`~.speculate.Drafter`; the same at every temperature."""
        wide, head = self._wide, self._head
        y_kH = head.begin()
        best = self._children(y_kH)
        # Of all candidates, by level: draft ids, log-probability of the path, and the row of the parent among them.
        tokens, scores = [best.indices[0]], [best.values[0]]
        parents = [best.indices.new_zeros(wide)]
        level_token, level_score, level_row = tokens[0], scores[0], torch.arange(1, wide + 1, device=head.device)
        y_kH, seen_kS = y_kH.expand(wide, -1), self._eye
        first = wide + 1
        for depth in range(1, self._shape.depth):
            y_kH = head.step(level_token, y_kH, seen_kS)
            best = self._children(y_kH)
            scores_kk = best.values + level_score[:, None]
            tokens.append(best.indices.flatten())
            scores.append(scores_kk.flatten())
            parents.append(level_row.repeat_interleave(wide))
            if depth + 1 < self._shape.depth:
                level_score, chosen = scores[-1].topk(wide)
                level_token, level_row = tokens[-1][chosen], first + chosen
                y_kH, seen_kS = y_kH[chosen // wide], torch.cat((seen_kS[chosen // wide], self._eye), 1)
                first += wide * wide
        return self._likeliest(torch.cat(tokens), torch.cat(scores), torch.cat(parents))

    def _likeliest(self, tokens: Tensor, scores: Tensor, parents: Tensor) -> Tree:
        """The tree of the candidates with the best scores; of equal ones the earlier, so that parents are in."""
        kept, _ = scores.sort(descending=True, stable=True).indices[: self._shape.total].sort()
        place = parents.new_zeros(len(tokens) + 1)
        place[kept + 1] = torch.arange(1, len(kept) + 1, device=kept.device)
        return Tree(self._head.vocabulary[tokens[kept]], place[parents[kept]], self._shape.depth)

    def _children(self, y_kH: Tensor) -> torch.return_types.topk:
        """The likeliest tokens behind each row: log-probabilities and draft ids, ``[k, top_k]``."""
        return self._head.logits(y_kH).float().log_softmax(-1).topk(self._wide)
