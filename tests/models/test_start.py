"""What a head can do before training."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from eagle3.models.draft import Eagle3Draft, rotation_table
from eagle3.models.rollout import RolloutBatch, rollout
from eagle3.models.start import SELF_SCORE, begin, feature_scale
from eagle3.models.target_info import TargetHead
from torch import Tensor

from . import conftest

HIDDEN, TOKENS = 128, 300
CONFIG = replace(
    conftest.CONFIG,
    hidden_size=HIDDEN,
    intermediate_size=64,
    head_dim=64,
    vocab_size=200,
    draft_vocab_size=200,
    rope_theta=1e6,
)


def states_of(tokens: Tensor, head: TargetHead) -> Tensor:
    """Features ``[N, 3, H]`` of very different size, in which a token's identity is mixed with other things."""
    mixers = torch.randn(3, HIDDEN, HIDDEN, generator=torch.Generator().manual_seed(5)) / HIDDEN**0.5
    identity = torch.einsum("nh,fhk->nfk", head.embedding[tokens], mixers)
    return (identity + torch.randn(identity.shape) * 0.5) * torch.tensor([1.0, 30.0, 200.0])[:, None]


def begun(**changes: object) -> tuple[Eagle3Draft, TargetHead]:
    torch.manual_seed(3)
    draft = Eagle3Draft(replace(CONFIG, **changes))
    embedding = torch.randn(CONFIG.vocab_size, HIDDEN)
    head = TargetHead(embedding, torch.ones(HIDDEN), 1e-5, embedding)
    tokens = torch.randint(CONFIG.vocab_size, (4000,))
    begin(draft, head, states_of(tokens, head), tokens)
    return draft, head


def test_it_reads_out_by_the_targets_rows() -> None:
    ids = torch.arange(0, 200, 2)
    draft, head = Eagle3Draft(replace(CONFIG, draft_vocab_size=100), ids), begun()[1]
    begin(draft, head, torch.randn(50, 3, HIDDEN), torch.arange(50))
    assert torch.equal(draft.lm_head.weight, head.lm_head[ids])


@torch.no_grad()
@pytest.mark.parametrize("heads", [1, 2])
def test_rows_attend_to_themselves(heads: int) -> None:
    """Whatever stands at the positions: a row's score with itself lies above those with all others."""
    draft = begun(num_kv_heads=heads)[0]
    x = torch.nn.functional.rms_norm(torch.randn(40, 2 * HIDDEN), (2 * HIDDEN,))
    rotation = rotation_table(draft.config, 40, x)
    query, key = draft.queries(x, rotation)[:, 0], draft.keys_values(x, rotation)[0][:, 0]
    scores = query @ key.T * CONFIG.head_dim**-0.5
    assert scores.diagonal().mean() == pytest.approx(SELF_SCORE, rel=0.1)
    assert (scores.argmax(-1) == torch.arange(40)).float().mean() > 0.95


@torch.no_grad()
@pytest.mark.parametrize("fc_norm", [False, True])
def test_the_combined_state_has_variance_one(fc_norm: bool) -> None:
    """However large the captured layers are, and although the first token dwarfs the rest."""
    draft, head = begun(fc_norm=fc_norm)
    states = states_of(torch.randint(CONFIG.vocab_size, (500,)), head)
    states[0] *= 1000
    assert draft.combine(states)[1:].std() == pytest.approx(1.0, rel=0.1)
    if not fc_norm:
        expected = torch.tensor([1.0, 30.0, 200.0]) * 1.25**0.5
        torch.testing.assert_close(feature_scale(draft, states), expected, rtol=0.1, atol=0.0)


@torch.no_grad()
@pytest.mark.parametrize("width", [64, 128, 192])
def test_it_copies_what_followed_the_same_token_before(width: int) -> None:
    """Random tokens, and all of them again: only the second time can they be known."""
    draft, head = begun(head_dim=width)
    first = torch.randperm(CONFIG.vocab_size)[: TOKENS // 2]
    ids = torch.cat((first, first))
    batch = RolloutBatch(
        input_ids=ids,
        loss_mask=torch.ones(TOKENS, dtype=torch.bool),
        features=states_of(ids, head),
        last_hidden=torch.zeros(TOKENS, HIDDEN),
        lengths=torch.tensor([TOKENS]),
    )
    output = rollout(draft, head.embedding, batch, 1)[0]
    rows = output.rows
    repeated = rows >= TOKENS // 2
    hits = draft.logits(output.y).argmax(-1) == ids[rows + 2]
    assert hits[repeated].float().mean() > 0.9
    assert hits[rows < TOKENS // 2 - 2].float().mean() < 0.1
