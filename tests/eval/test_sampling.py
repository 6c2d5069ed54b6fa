"""Speculative sampling keeps the target's distribution, whatever the draft proposes, and the test would notice if not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from eagle3.eval.sampling import (
    Judgement,
    Proposal,
    distribution,
    judge_greedy,
    judge_sampled,
    residual,
    spread,
)
from eagle3.models.generate import draw

V, K = 6, 3
#: Draft tokens 0..3 are these target tokens; 0 and 3 the draft cannot say.
VOCABULARY = torch.tensor([1, 2, 4, 5])
ROUNDS, DRAWS = 3000, 100_000
Rule = Callable[[torch.Tensor, Proposal, float, torch.Tensor], Judgement]


def tables(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of the next token given the last one: the target's over V, the draft's over its own vocabulary."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(V, V, generator=generator), torch.randn(V, len(VOCABULARY), generator=generator)


def propose(draft: torch.Tensor, last: int, temperature: float, greedy: bool, generator: torch.Generator) -> Proposal:
    tokens, rows = [], []
    for _ in range(K):
        q = distribution(draft[last][None], temperature)
        drawn = q.argmax(-1) if greedy else draw(q, torch.rand(1, generator=generator, dtype=torch.float64))
        last = int(VOCABULARY[drawn])
        tokens.append(last)
        rows.append(q)
    probabilities = None if greedy else spread(torch.cat(rows), VOCABULARY, V)
    return Proposal(torch.tensor(tokens), probabilities)


def emit(rule: Rule, greedy: bool, temperature: float, rounds: int = ROUNDS) -> list[int]:
    """The tokens of one long answer of a target whose next token depends on the last one only."""
    target, draft = tables(3)
    drafting, judging = (torch.Generator().manual_seed(seed) for seed in (0, 1))
    answer = [0]
    for _ in range(rounds):
        proposal = propose(draft, answer[-1], temperature, greedy, drafting)
        after = [answer[-1], *proposal.tokens.tolist()]
        uniform = torch.rand(K + 1, generator=judging, dtype=torch.float64)
        judgement = rule(target[after], proposal, temperature, uniform)
        answer += judgement.tokens
    return answer


def chi_square(answer: list[int], temperature: float) -> float:
    """Pairs of neighbours against the target's transition probabilities; V * (V - 1) degrees of freedom, nearly."""
    p = distribution(tables(3)[0], temperature)
    counts = torch.zeros(V, V, dtype=torch.float64)
    counts.index_put_((torch.tensor(answer[:-1]), torch.tensor(answer[1:])), torch.ones(1).double(), accumulate=True)
    expected = counts.sum(1, keepdim=True) * p
    return float(((counts - expected) ** 2 / expected).sum())


LIMIT = 66.6  # the 1 - 1e-4 quantile of chi-square with 30 degrees of freedom


@pytest.mark.parametrize("greedy", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_emits_the_targets_distribution(greedy: bool, temperature: float) -> None:
    assert chi_square(emit(judge_sampled, greedy, temperature), temperature) < LIMIT


@pytest.mark.slow
@pytest.mark.parametrize("greedy", [False, True])
def test_emits_the_targets_distribution_in_long(greedy: bool) -> None:
    answer = emit(judge_sampled, greedy, 1.0, DRAWS)
    assert len(answer) > DRAWS
    assert chi_square(answer, 1.0) < LIMIT


def mistake_the_temperature(logits: torch.Tensor, proposal: Proposal, temperature: float, u: torch.Tensor) -> Judgement:
    """Wrong: takes the draft's probabilities at half the temperature that its tokens were drawn at."""
    assert proposal.probabilities is not None
    colder = proposal.probabilities**2
    return judge_sampled(logits, Proposal(proposal.tokens, colder / colder.sum(-1, keepdim=True)), temperature, u)


def keep_the_whole_distribution(
    logits: torch.Tensor, proposal: Proposal, temperature: float, u: torch.Tensor
) -> Judgement:
    """Wrong: draws the replacement from p and not from the residual."""
    right = judge_sampled(logits, proposal, temperature, u)
    p = distribution(logits[len(right.rows)][None], temperature)
    return Judgement(right.rows, [*right.tokens[:-1], int(draw(p, u[-1:]))])


@pytest.mark.parametrize("rule", [mistake_the_temperature, keep_the_whole_distribution])
def test_would_notice_a_wrong_rule(rule: Rule) -> None:
    assert chi_square(emit(rule, False, 1.0), 1.0) > 2 * LIMIT


def test_would_notice_a_wrong_rule_for_greedy_drafts() -> None:
    assert chi_square(emit(keep_the_whole_distribution, True, 1.0), 1.0) > 2 * LIMIT


def test_rejection_by_hand() -> None:
    """p = (.5, .3, .2), q = (.1, .6, .3): token 1 stands with probability 1/2; the residual is all on token 0."""
    logits = torch.tensor([[0.5, 0.3, 0.2], [0.2, 0.3, 0.5]]).log()
    proposal = Proposal(torch.tensor([1]), torch.tensor([[0.1, 0.6, 0.3]], dtype=torch.float64))
    half = torch.tensor([0.499, 0.0], dtype=torch.float64)
    assert judge_sampled(logits, proposal, 1.0, half) == Judgement([1], [1, 0])
    assert judge_sampled(logits, proposal, 1.0, half + torch.tensor([0.002, 0.99])) == Judgement([], [0])
    p = distribution(logits[:1], 1.0)
    first, all_stood = torch.tensor([0]), torch.tensor([1])
    for asked, expected in ((proposal, [0.4, 0.0, 0.0]), (Proposal(proposal.tokens), [0.5, 0.0, 0.2])):
        torch.testing.assert_close(residual(p, asked, first), torch.tensor([expected]).double())
        assert residual(p, asked, all_stood).equal(p)


def test_equal_distributions_always_agree() -> None:
    logits = torch.randn(4, V, generator=torch.Generator().manual_seed(0))
    q = distribution(logits[:3], 0.5)
    for number in (0.0, 0.5, 1 - 1e-12):
        uniform = torch.full((4,), number, dtype=torch.float64)
        assert judge_sampled(logits, Proposal(torch.tensor([1, 2, 3]), q), 0.5, uniform).rows == [1, 2, 3]
    assert torch.equal(residual(q[:1], Proposal(torch.tensor([1]), q[:1]), torch.tensor([0])), q[:1])


@pytest.mark.parametrize(
    ("drafted", "expected"),
    [([], ([], [2])), ([2, 0], ([1, 2], [2, 0, 1])), ([2, 3], ([1], [2, 0])), ([1, 0], ([], [2]))],
)
def test_greedy_judgement(drafted: list[int], expected: tuple[list[int], list[int]]) -> None:
    logits = torch.eye(4)[[2, 0, 1]][: len(drafted) + 1]
    assert judge_greedy(logits, torch.tensor(drafted, dtype=torch.long)) == expected


def test_tokens_the_draft_cannot_say_have_no_probability() -> None:
    q = torch.tensor([[0.1, 0.2, 0.3, 0.4]])
    assert spread(q, VOCABULARY, V).tolist() == [pytest.approx([0.0, 0.1, 0.2, 0.0, 0.3, 0.4])]
