"""Speculative sampling keeps the target's distribution, whatever the draft proposes, and the test would notice if not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from eagle3.eval.drafters import ChainDrafter
from eagle3.eval.sampling import (
    BLOCK,
    Drawn,
    Judgement,
    Proposal,
    UniformNumbers,
    distribution,
    draw_token,
    judge_greedy,
    judge_sampled,
    residual,
)
from eagle3.eval.speculate import Sampling
from eagle3.models.generate import draw
from eagle3.models.native.cpu import sampling as cpu
from torch.overrides import TorchFunctionMode

V, K = 6, 3
#: Draft tokens 0..3 are these target tokens; 0 and 3 the draft cannot say.
VOCABULARY = torch.tensor([1, 2, 4, 5])
ROUNDS, DRAWS = 3000, 100_000


@pytest.fixture(params=["compiled", "torch"], autouse=True)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every rule holds for the compiled functions and for their plain reference."""
    if request.param == "torch":
        monkeypatch.setattr(cpu, "suits", lambda _: False)
    elif not cpu.suits(torch.zeros(1)):
        pytest.skip("there is no C++ compiler, or not the CPU's own device")
    return str(request.param)


Rule = Callable[[torch.Tensor, Proposal, float, torch.Tensor], Judgement]


def tables(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of the next token given the last one: the target's over V, the draft's over its own vocabulary."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(V, V, generator=generator), torch.randn(V, len(VOCABULARY), generator=generator)


def propose(draft: torch.Tensor, last: int, temperature: float, greedy: bool, generator: torch.Generator) -> Proposal:
    ids, rows = [], []
    for _ in range(K):
        rows.append(distribution(draft[last][None], temperature))
        uniform = torch.rand(1, generator=generator, dtype=torch.float64)
        ids.append(int(rows[-1].argmax() if greedy else draw(rows[-1], uniform)))
        last = int(VOCABULARY[ids[-1]])
    drawn = drawn_from(torch.tensor(ids), torch.cat(rows), VOCABULARY)
    return Proposal(VOCABULARY[drawn.ids], None if greedy else drawn)


def drawn_from(ids: torch.Tensor, q_KD: torch.Tensor, vocabulary: torch.Tensor) -> Drawn:
    return Drawn(ids, torch.cat((q_KD, torch.zeros_like(q_KD[:1]))), vocabulary)


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
    assert proposal.drawn is not None
    colder = proposal.drawn.probabilities[:-1] ** 2
    wrong = drawn_from(proposal.drawn.ids, colder / colder.sum(-1, keepdim=True), VOCABULARY)
    return judge_sampled(logits, Proposal(proposal.tokens, wrong), temperature, u)


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
    drawn = drawn_from(torch.tensor([1]), torch.tensor([[0.1, 0.6, 0.3]]), torch.arange(3))
    proposal = Proposal(drawn.ids, drawn)
    half = torch.tensor([0.499, 0.0], dtype=torch.float64)
    assert judge_sampled(logits, proposal, 1.0, half) == Judgement([1], [1, 0])
    rejected = half + torch.tensor([0.002, 0.99])
    assert judge_sampled(logits, proposal, 1.0, rejected) == Judgement([], [0])
    p = distribution(logits[0], 1.0)
    torch.testing.assert_close(residual(p, drawn.probabilities[0], drawn.vocabulary), torch.tensor([0.4, 0.0, 0.0]))
    assert residual(p, drawn.probabilities[1], drawn.vocabulary).equal(p)
    # Drafted greedily it stands with probability .3, and what is left is (.5, 0, .2).
    assert judge_sampled(logits, Proposal(drawn.ids), 1.0, half - 0.2) == Judgement([1], [1, 0])
    for number, token in ((0.71, 0), (0.72, 2)):
        uniform = torch.tensor([0.301, number], dtype=torch.float64)
        assert judge_sampled(logits, Proposal(drawn.ids), 1.0, uniform) == Judgement([], [token])


def test_equal_distributions_always_agree() -> None:
    logits = torch.randn(4, V, generator=torch.Generator().manual_seed(0))
    ids, everything = torch.tensor([1, 2, 3]), torch.arange(V)
    q = torch.stack([draw_token(row, 0.5, torch.zeros(1, dtype=torch.float64))[1] for row in logits[:3]])
    for number in (0.0, 0.5, 1 - 1e-12):
        uniform = torch.full((4,), number, dtype=torch.float64)
        assert judge_sampled(logits, Proposal(ids, drawn_from(ids, q, everything)), 0.5, uniform).rows == [1, 2, 3]


def test_a_residual_is_nowhere_negative_and_never_empty() -> None:
    """Where q takes all of p, or rounding says so, what is left is drawn from p; what p cannot say is never drawn."""
    p = torch.tensor([0.0, 0.25, 0.0, 0.5, 0.25, 0.0])
    uniform = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    for q in (p[VOCABULARY], p[VOCABULARY] + 1e-7, torch.ones(4)):
        left = residual(p, q, VOCABULARY)
        assert bool((left >= 0).all()) and bool((left[p > 0] > 0).all()) and not left[p == 0].any()
        expected = [0, 0, 0, 1000, 0, 0]  # the draft cannot say token 3
        assert draw(left.expand(1000, -1), uniform).bincount(minlength=V).tolist() == expected
    everything = torch.arange(V)
    for q in (p, p + 1e-7):
        left = residual(p, q, everything)
        assert draw(left.expand(1000, -1), uniform).bincount(minlength=V).tolist() == [0, 250, 0, 500, 250, 0]


def test_no_temperature_is_too_low() -> None:
    logits = torch.tensor([[-400.0, 300.0, 299.0]])
    for temperature in (1e-3, 1e-30, 1e-45, 1e-300):
        assert distribution(logits, temperature).tolist() == [[0.0, 1.0, 0.0]]


def reference(
    logits: torch.Tensor, proposal: Proposal, temperature: float, uniform: torch.Tensor
) -> tuple[Judgement, float]:
    """Rejection sampling in float64 over the whole vocabulary, and how near any decision was to going the other way."""
    p_RV = (logits.double() / temperature).softmax(-1)
    tokens, numbers = proposal.tokens.tolist(), uniform.tolist()
    q_KV = torch.zeros(len(tokens), p_RV.shape[1], dtype=torch.float64)
    if proposal.drawn is None:
        q_KV[range(len(tokens)), tokens] = 1.0
    else:
        q_KV[:, proposal.drawn.vocabulary] = proposal.drawn.probabilities[:-1].double()
    margin, accepted, left = 1.0, 0, p_RV[-1]
    for at, token in enumerate(tokens):
        p, q = float(p_RV[at, token]), float(q_KV[at, token])
        margin = min(margin, abs(numbers[at] - p / q))
        if numbers[at] >= p / q:
            left = (p_RV[at] - q_KV[at]).clamp_min(0)
            break
        accepted += 1
    passed = left.cumsum(0) / left.sum()
    added = int((passed > numbers[-1]).int().argmax())
    nearest = float((passed - numbers[-1]).abs().min() * left.sum())
    return Judgement([*range(1, accepted + 1)], [*tokens[:accepted], added]), min(margin, nearest)


ROUNDING = 1e-6


@pytest.mark.parametrize("greedy", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 0.7, 0.2, 3.0])
def test_judges_as_the_reference_in_float64(greedy: bool, temperature: float) -> None:
    """A draft that is often right, over half of the vocabulary: the same tokens for the same numbers."""
    size, rounds, compared = 400, 200, dict[int, int]()
    generator = torch.Generator().manual_seed(7)
    vocabulary = torch.randperm(size, generator=generator)[: size // 2].sort().values
    for _ in range(rounds):
        logits = 2 * torch.randn(K + 1, size, generator=generator)
        noise = torch.randn(K, size // 2, generator=generator)
        q = distribution(logits[:-1, vocabulary] + 0.5 * noise, temperature)
        ids = q.argmax(-1) if greedy else draw(q, torch.rand(K, generator=generator, dtype=torch.float64))
        proposal = Proposal(vocabulary[ids], None if greedy else drawn_from(ids, q, vocabulary))
        uniform = torch.rand(K + 1, generator=generator, dtype=torch.float64)
        expected, margin = reference(logits, proposal, temperature, uniform)
        if margin > ROUNDING:
            assert judge_sampled(logits, proposal, temperature, uniform) == expected
            compared[len(expected.rows)] = compared.get(len(expected.rows), 0) + 1
    assert sum(compared.values()) > 0.95 * rounds
    assert len(compared) > 1


def test_uniform_numbers_are_those_of_their_seed_however_many_are_taken() -> None:
    numbers, counts = UniformNumbers(torch.device("cpu")), (1, 6, 700, 61, 2, 3 * BLOCK, 5, 400)
    for seed in (3, 4, 3):
        numbers.restart(seed)
        taken = torch.cat([numbers.take(count) for count in counts])
        plain = torch.rand(sum(counts), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        assert taken.equal(plain)


class Recorded(TorchFunctionMode):
    """Counts calls of torch, and keeps the sizes of the float64 tensors that they return."""

    def __init__(self) -> None:
        super().__init__()
        self.calls, self.sizes = 0, list[int]()

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = function(*args, **(kwargs or {}))
        if isinstance(found, torch.Tensor):
            self.calls += 1
            if found.dtype == torch.float64:
                self.sizes.append(found.numel())
        return found


class Flat:
    """A head that says the same at each step."""

    device = torch.device("cpu")

    def __init__(self, size: int) -> None:
        self.vocabulary, self.y = torch.arange(size) * 2, torch.zeros(1, size)

    def restart(self) -> None: ...

    def begin(self) -> torch.Tensor:
        return self.y

    def step(self, tokens: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return self.y

    def logits(self, y: torch.Tensor) -> torch.Tensor:
        return self.y


@pytest.mark.parametrize("drafting", ["sampled", "greedy"])
def test_only_a_row_that_is_drawn_from_is_float64(drafting: str, way: str) -> None:
    """Five draft tokens: of all that a round computes beside the models, in large tensors and in calls."""
    chain, size = 5, 3 * BLOCK
    drafter = ChainDrafter(Flat(size), chain)  # type: ignore[arg-type]
    drafter.start(Sampling(1.0, drafting))
    logits, uniform = torch.zeros(chain + 1, 2 * size), torch.rand(chain + 1, dtype=torch.float64)
    with Recorded() as drafted:
        proposal = drafter.propose()
    with Recorded() as judged:
        judge_sampled(logits, proposal, 1.0, uniform)
    large = [entry for entry in drafted.sizes + judged.sizes if entry > 2 * BLOCK]
    # The sums of the one row, and a view of them.
    sums = [size, size - 1] * chain * (drafting == "sampled") + [2 * size, 2 * size - 1]
    assert large == ([] if way == "compiled" else sums)
    assert drafted.calls <= 11 * chain
    assert judged.calls <= 30


@pytest.mark.parametrize(
    ("drafted", "expected"),
    [([], ([], [2])), ([2, 0], ([1, 2], [2, 0, 1])), ([2, 3], ([1], [2, 0])), ([1, 0], ([], [2]))],
)
def test_greedy_judgement(drafted: list[int], expected: tuple[list[int], list[int]]) -> None:
    logits = torch.eye(4)[[2, 0, 1]][: len(drafted) + 1]
    assert judge_greedy(logits, torch.tensor(drafted, dtype=torch.long)) == expected
