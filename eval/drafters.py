"""What drafts: the EAGLE-3 head, a chain or a tree at a time.

    drafter = ChainDrafter(draft, target.head.embedding, chain=5, capacity=700)
    drafter = TreeDrafter(draft, target.head.embedding, TreeShape(total=60, depth=7, top_k=10), capacity=700)

Row t of the head pairs the target's features of token t with the embedding of token t+1. Tokens that stand enter its
cache as rows with real features, all at once; the last of them drafts the next round's first token.

Shapes: B batch (1), T tokens, H hidden, K drafted tokens, D draft vocabulary, k nodes of a tree's level, S rows of the cache.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..models.draft import DraftCache, Eagle3Draft
from ..models.generate import draw
from .sampling import Proposal, distribution, spread
from .speculate import Sampling, Verdict
from .trees import Tree, TreeShape


class HeadDrafter:
    """The EAGLE-3 head with its cache, which holds a row for every token that stands.

    Args:
        draft: the head, in the numerics it shall run in, on the target's device.
        embedding: the target's, ``[V, H]``.
        capacity: positions of the longest request.
        drafted: rows of a proposal.
    """

    def __init__(self, draft: Eagle3Draft, embedding: Tensor, capacity: int, drafted: int) -> None:
        self._draft, self._embedding = draft, embedding
        self._cache: DraftCache = draft.new_cache(1, capacity + drafted)
        self._device = embedding.device
        self._positions = torch.arange(capacity + drafted, device=embedding.device)[None]
        every = torch.arange(draft.config.draft_vocab_size, device=embedding.device)
        mapped = draft.config.draft_vocab_size < len(embedding)
        self._vocabulary = draft.target_ids(every) if mapped else None
        # Embeddings by draft id: one look-up less in every step.
        self._own_embedding = embedding[self._vocabulary] if self._vocabulary is not None else embedding
        self._sampling, self._random = Sampling(), torch.Generator()
        self._length = 0
        self._state = embedding.new_zeros(1, 1, embedding.shape[1])

    def start(self, sampling: Sampling) -> None:
        """See :class:`Drafter`."""
        self._cache.rollback(0)
        self._length = 0
        self._sampling, self._random = sampling, torch.Generator().manual_seed(2 * sampling.seed)

    def update(self, verdict: Verdict) -> None:
        """See :class:`Drafter`."""
        self._cache.rollback(self._length)
        tokens = torch.tensor(verdict.tokens, device=self._embedding.device)
        h_BTH = self._draft.combine(verdict.features)[None]
        y_BTH = self._run(self._embedding[tokens][None], h_BTH)
        self._length += len(verdict.tokens)
        self._state = y_BTH[:, -1:]

    def target_ids(self, tokens: Tensor) -> Tensor:
        """Draft ids to target ids."""
        return tokens if self._vocabulary is None else self._vocabulary[tokens]

    def _run(self, embed_BTH: Tensor, h_BTH: Tensor) -> Tensor:
        start = self._cache.length
        return self._draft.decode(embed_BTH, h_BTH, self._positions[:, start : start + embed_BTH.shape[1]], self._cache)


class ChainDrafter(HeadDrafter):
    """The head, drafting ``chain`` tokens, 1 or more, one after the other; the rest as for :class:`HeadDrafter`."""

    def __init__(self, draft: Eagle3Draft, embedding: Tensor, chain: int, capacity: int) -> None:
        super().__init__(draft, embedding, capacity, chain)
        self._chain = chain

    def propose(self) -> Proposal:
        """See :class:`Drafter`."""
        greedy = self._sampling.temperature == 0 or self._sampling.drafting == "greedy"
        uniform_K = torch.empty(0)
        if not greedy:
            uniform_K = torch.rand(self._chain, generator=self._random, dtype=torch.float64).to(self._embedding.device)
        y_BTH, chosen, rows = self._state, [], []
        for step in range(self._chain):
            logits_BD = self._draft.logits(y_BTH[:, 0])
            if greedy:
                chosen.append(logits_BD.argmax(-1))
            else:
                rows.append(distribution(logits_BD, self._sampling.temperature))
                chosen.append(draw(rows[-1], uniform_K[step : step + 1]))
            if step + 1 < self._chain:
                y_BTH = self._run(self._own_embedding[chosen[-1]][None], self._draft.feedback(y_BTH))
        tokens = self.target_ids(torch.cat(chosen))
        if greedy:
            return Proposal(tokens)
        return Proposal(tokens, spread(torch.cat(rows), self._vocabulary, len(self._embedding)))


class TreeDrafter(HeadDrafter):
    """The head, drafting a tree of ``shape``; the rest as for :class:`HeadDrafter`."""

    def __init__(self, draft: Eagle3Draft, embedding: Tensor, shape: TreeShape, capacity: int) -> None:
        super().__init__(draft, embedding, capacity, shape.depth * shape.top_k)
        self._shape = shape
        self._wide = min(shape.top_k, draft.config.draft_vocab_size)

    def propose(self) -> Tree:
        """See :class:`~.speculate.Drafter`; the same at every temperature."""
        wide, root = self._wide, self._length
        best = self._children(self._state[0])
        # Of all candidates, by level: draft ids, log-probability of the path, and the row of the parent among them.
        tokens, scores = [best.indices[0]], [best.values[0]]
        parents = [best.indices.new_zeros(wide)]
        level_token, level_score, level_row = tokens[0], scores[0], torch.arange(1, wide + 1, device=self._device)
        h_kH = self._draft.feedback(self._state[0]).expand(wide, -1)
        seen_kS = torch.ones(wide, root, dtype=torch.bool, device=self._device)
        first = wide + 1
        for depth in range(1, self._shape.depth):
            seen_kS = torch.cat((seen_kS, torch.eye(wide, dtype=torch.bool, device=self._device)), 1)
            y_kH = self._level(level_token, h_kH, root + depth - 1, seen_kS)
            best = self._children(y_kH)
            scores_kk = best.values + level_score[:, None]
            tokens.append(best.indices.flatten())
            scores.append(scores_kk.flatten())
            parents.append(level_row.repeat_interleave(wide))
            level_score, chosen = scores_kk.flatten().topk(wide)
            level_token, level_row = tokens[-1][chosen], first + chosen
            h_kH, seen_kS = self._draft.feedback(y_kH)[chosen // wide], seen_kS[chosen // wide]
            first += wide * wide
        return self._likeliest(torch.cat(tokens), torch.cat(scores), torch.cat(parents))

    def _likeliest(self, tokens: Tensor, scores: Tensor, parents: Tensor) -> Tree:
        """The tree of the candidates with the best scores; of equal ones the earlier, so that parents are in."""
        kept, _ = scores.sort(descending=True, stable=True).indices[: self._shape.total].sort()
        place = torch.zeros(len(tokens) + 1, dtype=torch.long, device=self._device)
        place[kept + 1] = torch.arange(1, len(kept) + 1, device=self._device)
        return Tree(self.target_ids(tokens[kept]), place[parents[kept]], self._shape.depth)

    def _children(self, y_kH: Tensor) -> torch.return_types.topk:
        """The likeliest tokens behind each row: log-probabilities and draft ids, ``[k, top_k]``."""
        logits = self._draft.logits(y_kH)
        return logits.float().log_softmax(-1).topk(self._wide)

    def _level(self, tokens: Tensor, h_kH: Tensor, position: int, seen_kS: Tensor) -> Tensor:
        """``y [k, H]`` of a level's nodes, which all stand at one position."""
        positions = self._positions[:, position : position + 1].expand(1, len(tokens))
        return self._draft.decode(self._own_embedding[tokens][None], h_kH[None], positions, self._cache, seen_kS)[0]
