"""Which rows are supervised, and that the rollout is what serving does."""

from __future__ import annotations

from itertools import accumulate

import pytest
import torch
from eagle3.models.draft import Eagle3Draft
from eagle3.models.rollout import AttendPast, RolloutBatch, rollout, supervised

from . import conftest
from .conftest import NARROW

H, V, F, K = NARROW.hidden_size, NARROW.vocab_size, 3, 4


def random_draft(fc_norm: bool = False, norm_output: bool = False) -> Eagle3Draft:
    flags = {"fc_norm": fc_norm, "norm_output": norm_output}
    return conftest.random_draft(NARROW, scale=0.5, rope_theta=100.0, **flags).double()


def batch_of(masks: list[str]) -> RolloutBatch:
    """Documents with random content; ``a`` is a token of the assistant, ``.`` another one."""
    generator = torch.Generator().manual_seed(1)
    mask = torch.tensor([letter == "a" for letter in "".join(masks)])
    return RolloutBatch(
        input_ids=torch.randint(V, mask.shape, generator=generator),
        loss_mask=mask,
        features=torch.randn(len(mask), F, H, dtype=torch.float64, generator=generator),
        last_hidden=torch.randn(len(mask), H, dtype=torch.float64, generator=generator),
        lengths=torch.tensor([len(text) for text in masks]),
    )


#: By hand: step j of row t needs the assistant's tokens t+1 .. t+2+j. An index over the text helps:
#:   0123456789a
BY_HAND: list[tuple[str, list[list[int]]]] = [
    ("...aaaa....", [[2, 3, 4], [2, 3], [2], []]),  # P = 3: row P-1 = 2 is the first that serving drafts from
    ("..aaaa..aaa", [[1, 2, 3, 7, 8], [1, 2, 7], [1], []]),  # no step reaches into the next turn
    ("......aaaaa", [[5, 6, 7, 8], [5, 6, 7], [5, 6], [5]]),  # nor over the end of the document
    (".a.a.aa", [[4], [], [], []]),  # one token leaves nothing to draft
    ("aaa", [[0], [], [], []]),  # a document that begins with an answer has no row -1
    ("....", [[], [], [], []]),
]


@pytest.mark.parametrize(("text", "expected"), BY_HAND)
def test_supervision_starts_and_ends_where_serving_drafts(text: str, expected: list[list[int]]) -> None:
    batch = batch_of([text])
    sets = supervised(batch.loss_mask, batch.lengths, K)
    assert [rows.nonzero()[:, 0].tolist() for rows in sets] == expected


def test_rollout_yields_the_supervised_rows_of_all_documents() -> None:
    draft, batch = random_draft(), batch_of([text for text, _ in BY_HAND])
    outputs = rollout(draft, torch.randn(V, H, dtype=torch.float64), batch, K)
    starts = [0, *accumulate(len(text) for text, _ in BY_HAND)]
    for step, (rows, y) in enumerate(outputs):
        wanted = [start + row for start, (_, sets) in zip(starts, BY_HAND, strict=False) for row in sets[step]]
        assert sorted(rows.tolist()) == wanted
        assert y.shape == (len(wanted), H)
        assert not step or torch.equal(rows, outputs[step - 1].rows[: len(rows)])


def test_nothing_supervised_still_reaches_every_parameter() -> None:
    """A rank whose share of a batch is empty must hand zeros to the others, not nothing and not NaN."""
    draft = random_draft(fc_norm=True)
    outputs = rollout(draft, torch.randn(V, H, dtype=torch.float64), batch_of(["....", ".a"]), K)
    assert [len(output.rows) for output in outputs] == [0] * K
    sum(draft.logits(output.y).sum() for output in outputs).backward()
    for name, parameter in draft.named_parameters():
        assert parameter.grad is not None and not parameter.grad.any(), name


@pytest.mark.parametrize(("fc_norm", "norm_output"), [(False, False), (True, True)])
@torch.no_grad()
def test_chains_served_from_the_cache_equal_the_rollout(fc_norm: bool, norm_output: bool) -> None:
    """Draft from every row along the answer's own tokens, take the chain back, let real features replace it, go on."""
    draft, embedding = random_draft(fc_norm, norm_output), torch.randn(V, H, dtype=torch.float64)
    batch = batch_of(["..aaaaa..aaaaaa", ".....aaaaaaaa"])
    trained = {
        (step, int(row)): y
        for step, output in enumerate(rollout(draft, embedding, batch, K))
        for row, y in zip(output.rows, output.y, strict=True)
    }
    served = 0
    lengths = batch.lengths.tolist()
    parts = zip(batch.input_ids.split(lengths), batch.features.split(lengths), strict=True)
    for (ids, features), length, first in zip(parts, lengths, (0, lengths[0]), strict=True):
        combined = draft.combine(features)
        cache = draft.new_cache(1, length + K)
        for row in range(length - 1):
            step, y = 0, None
            while (step, first + row) in trained:
                if step == 0:  # all rows since the last round, with real features: as after a verification
                    start = cache.length
                    h, positions = combined[None, start : row + 1], torch.arange(start, row + 1)[None]
                else:
                    h, positions = draft.feedback(y), torch.tensor([[row + step]])
                tokens = ids[positions[0] + 1]
                y = draft.decode(embedding[tokens][None], h, positions, cache)[:, -1:]
                wanted = trained[step, first + row]
                torch.testing.assert_close(y[0, 0], wanted, rtol=1e-10, atol=1e-10)
                torch.testing.assert_close(draft.logits(y)[0, 0], draft.logits(wanted), rtol=1e-10, atol=1e-10)
                step, served = step + 1, served + 1
            if step:
                cache.rollback(row + 1)
    assert served == len(trained) > 30


def test_attention_to_the_past_has_the_right_gradients() -> None:
    """Against finite differences, through outputs and log-sum-exps alike; place 3 of 0..3 holds no row."""
    torch.manual_seed(2)
    later = torch.tensor([[[0, 1, 1], [0, 0, 1]], [[0, 0, 0], [0, 1, 1]]], dtype=torch.bool)
    bias = torch.zeros(later.shape, dtype=torch.float64).masked_fill(later, -torch.inf)
    tensors = [torch.randn(*shape, dtype=torch.float64) for shape in ((3, 4, 2), (2, 2, 3, 2), (2, 2, 3, 2))]
    place = torch.tensor([2, 0, 1])
    inputs = [tensor.requires_grad_() for tensor in tensors]
    assert torch.autograd.gradcheck(lambda *qkv: AttendPast.apply(*qkv, place, bias), inputs)
