"""Speculative decoding: the figures of drafts that are known beforehand, the target's own answer at T=0, its own
distribution at T>0, and tests that would notice if not.

Shapes: T tokens, K drafted tokens, D draft vocabulary, V vocabulary.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import pytest
import torch
from eagle3.eval import speculate
from eagle3.eval.drafters import ChainDrafter
from eagle3.eval.metrics import Acceptance, acceptance
from eagle3.eval.sampling import Judgement, Proposal, distribution, judge_sampled
from eagle3.eval.speculate import Decoded, Limits, Sampling, TargetVerifier, Verdict, decode
from eagle3.eval.traces import SPECULATIVE, Round, Trace
from eagle3.models.draft import Eagle3Draft
from eagle3.models.generate import draw
from eagle3.models.native.draft import NativeDraft
from eagle3.models.target import Target, TargetOutput
from torch import Tensor

K = 3
PROMPT = [90, 91, 92]
TEXT = list(range(10, 60))
ALWAYS, NEVER, SOMETIMES = [K], [0], [0, 1, 2, 3]


class TextVerifier:
    """A target that says ``text`` whatever happens. It keeps what it was asked to verify."""

    def __init__(self, text: Sequence[int]) -> None:
        self.text, self.at = list(text), 0

    def start(self, prompt: Sequence[int], sampling: Sampling) -> Verdict:
        self.at = 1
        return Verdict([*prompt[1:], self.text[0]], torch.zeros(len(prompt), 1, 1))

    def verify(self, proposal: Proposal | None) -> Verdict:
        drafted = [] if proposal is None else proposal.tokens.tolist()
        ahead = self.text[self.at :]
        accepted = 0
        while accepted < len(drafted) and drafted[accepted] == ahead[accepted]:
            accepted += 1
        self.at += accepted + 1
        return Verdict(ahead[: accepted + 1], torch.zeros(accepted + 1, 1, 1))


class TextDrafter:
    """Knows ``text``; its rounds are right up to each of ``depths`` in turn, and wrong from there on."""

    def __init__(self, text: Sequence[int], depths: Sequence[int], length: int = K) -> None:
        self.text, self.depths, self.length = list(text), itertools.cycle(depths), length
        self.told: list[int] = []
        self.before = 0

    def start(self, sampling: Sampling) -> None:
        self.told = []

    def update(self, verdict: Verdict) -> None:
        assert len(verdict.tokens) == len(verdict.features)
        if not self.told:
            self.before = len(verdict.tokens) - 1
        self.told += verdict.tokens

    def propose(self) -> Proposal:
        at, depth = len(self.told) - self.before, next(self.depths)
        right = self.text[at : at + self.length]
        drafted = [token if i < depth else abs(token - 1) for i, token in enumerate(right)]
        return Proposal(torch.tensor(drafted, dtype=torch.long))


def trace_of(answer: Decoded) -> Trace:
    """What metrics are made of."""
    count = len(answer.ids)
    return Trace(
        prompt_id="p", source="s", prompt="", temperature=0.0, mode=SPECULATIVE, drafting="chain 3", seed=0, input_tokens=1,
        ids=tuple(answer.ids), pieces=("",) * count, authors=tuple(answer.authors), repeated=(False,) * count,
        finish="length", rounds=tuple(answer.rounds), ttft_s=answer.ttft_s, total_s=answer.total_s,
    )  # fmt: skip


def figures(counted: Acceptance) -> tuple[float, float, list[float], list[float]]:
    """AL, rate, by position, conditional; NaN, which equals nothing, as -1."""
    found = [counted.length.value, counted.rate, *(p.value for p in counted.by_position), *counted.conditional]
    length, rate, *rest = (-1 if math.isnan(value) else value for value in found)
    return length, rate, rest[: len(rest) // 2], rest[len(rest) // 2 :]


# Everything below is for chains of 3: (depths, end token's index or None, limit) -> rounds, ids, finished.
BY_HAND = {
    "always": (ALWAYS, None, 9, [(3, 3, 4), (3, 3, 4)], 9, False),
    "never": (NEVER, None, 4, [(3, 0, 1)] * 3, 4, False),
    "sometimes": ([0, 2, 1], None, 7, [(3, 0, 1), (3, 2, 3), (3, 1, 2)], 7, False),
    "one token": (ALWAYS, None, 1, [], 1, False),
    "limit inside a round": (ALWAYS, None, 7, [(3, 3, 4), (3, 3, 2)], 7, False),
    "limit before the target's own": (ALWAYS, None, 8, [(3, 3, 4), (3, 3, 3)], 8, False),
    "ends at once": (ALWAYS, 0, 9, [], 1, True),
    "ends inside a round": (ALWAYS, 2, 9, [(3, 3, 2)], 3, True),
    "ends with the last drafted": (ALWAYS, 3, 9, [(3, 3, 3)], 4, True),
    "ends with the target's own": (ALWAYS, 4, 9, [(3, 3, 4)], 5, True),
    "ends behind a rejection": ([1], 4, 9, [(3, 1, 2), (3, 1, 2)], 5, True),
    "ends at the limit": (ALWAYS, 3, 4, [(3, 3, 3)], 4, True),
    "ends behind the limit": (ALWAYS, 3, 3, [(3, 3, 2)], 3, False),
}  # fmt: skip


@pytest.mark.parametrize(("depths", "end", "limit", "rounds", "count", "finished"), BY_HAND.values(), ids=BY_HAND)
def test_rounds_by_hand(
    depths: list[int], end: int | None, limit: int, rounds: list[tuple[int, int, int]], count: int, finished: bool
) -> None:
    drafter = TextDrafter(TEXT, depths)
    ends = () if end is None else (TEXT[end],)
    answer = decode(PROMPT, TextVerifier(TEXT), drafter, Limits(limit, ends), Sampling())
    assert answer.rounds == [Round(*entry) for entry in rounds]
    assert (answer.ids, answer.finished) == (TEXT[:count], finished)
    authors = ["target"] + [
        name for _, accepted, emitted in rounds for name in (["draft"] * accepted + ["target"])[:emitted]
    ]
    assert answer.authors == authors
    assert 0 < answer.ttft_s <= answer.total_s
    # The drafter was told everything but the last verdict, in order and without gaps.
    told = [*PROMPT[1:], *TEXT]
    assert drafter.told == told[: len(drafter.told)]
    assert len(drafter.told) == (len(PROMPT) + sum(accepted + 1 for _, accepted, _ in rounds[:-1]) if rounds else 0)


@pytest.mark.parametrize(("end", "count"), [(None, 9), (4, 5), (0, 1)])
def test_plain_decoding_has_no_rounds(end: int | None, count: int) -> None:
    ends = () if end is None else (TEXT[end],)
    answer = decode(PROMPT, TextVerifier(TEXT), None, Limits(9, ends), Sampling())
    assert (answer.ids, answer.rounds, answer.authors) == (TEXT[:count], [], ["target"] * count)
    assert answer.finished == (end is not None)


# Two times (0, 1, 2, 3) accepted: 8 rounds, 24 drafted, 12 accepted; 6, 4 and 2 rounds reach positions 1, 2 and 3.
SCRIPTED = [
    (ALWAYS, (4.0, 1.0, [1.0, 1.0, 1.0], [1.0, 1.0, 1.0])),
    (NEVER, (1.0, 0.0, [0.0, 0.0, 0.0], [0.0, -1, -1])),
    (SOMETIMES, (1 + 12 / 8, 12 / 24, [6 / 8, 4 / 8, 2 / 8], [6 / 8, 4 / 6, 2 / 4])),
]


@pytest.mark.parametrize(("depths", "expected"), SCRIPTED)
def test_acceptance_by_hand(depths: list[int], expected: tuple[Any, ...]) -> None:
    answer = decode(PROMPT, TextVerifier(TEXT), TextDrafter(TEXT, depths), Limits(21, ()), Sampling())
    assert figures(acceptance([trace_of(answer)])) == expected


def test_rounds_that_drafted_nothing_are_kept_but_not_counted() -> None:
    drafter = TextDrafter(TEXT, ALWAYS)
    drafter.length = 0
    nothing = decode(PROMPT, TextVerifier(TEXT), drafter, Limits(4, ()), Sampling())
    assert (nothing.ids, nothing.authors, nothing.rounds) == (TEXT[:4], ["target"] * 4, [Round(0, 0, 1)] * 3)
    counted = decode(PROMPT, TextVerifier(TEXT), TextDrafter(TEXT, SOMETIMES), Limits(21, ()), Sampling())
    assert figures(acceptance([trace_of(nothing), trace_of(counted)])) == SCRIPTED[2][1]


# --- the real target


PROMPT_LENGTHS = (2, 15, 16, 21)  # chunks of 16: boundaries fall on different tokens of a proposal
ANSWER = 21
LONGEST = max(PROMPT_LENGTHS) + ANSWER + K + 1


@pytest.fixture(scope="module")
def prompts(tiny_target: Target) -> list[list[int]]:
    """Random tokens."""
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(256, (length,), generator=generator).tolist() for length in PROMPT_LENGTHS]


@pytest.fixture(scope="module")
def texts(tiny_target: Target, prompts: list[list[int]]) -> list[list[int]]:
    """The target's greedy continuations, made without any cache: longer than the answers by a chain."""
    rows = [list(prompt) for prompt in prompts]
    for _ in range(ANSWER + K):
        padded = [row + [0] * (max(map(len, rows)) - len(row)) for row in rows]
        states = tiny_target.forward(torch.tensor(padded)).last_hidden
        for row, states_TH in zip(rows, states, strict=True):
            logits = tiny_target.logits(states_TH[len(row) - 1])
            best, second = logits.topk(2).values.tolist()
            assert best - second > 1e-3  # otherwise rounding could decide, and other prompts should be taken
            row.append(int(logits.argmax()))
    return [row[len(prompt) :] for row, prompt in zip(rows, prompts, strict=True)]


@pytest.fixture(scope="module")
def verifier(tiny_target: Target) -> TargetVerifier:
    """One for all: what it keeps from request to request must not matter."""
    return TargetVerifier(tiny_target, LONGEST)


@pytest.mark.parametrize(("depths", "expected"), SCRIPTED)
def test_scripted_drafts_have_the_acceptance_of_their_script(
    verifier: TargetVerifier,
    prompts: list[list[int]],
    texts: list[list[int]],
    depths: list[int],
    expected: tuple[Any, ...],
) -> None:
    traces = []
    for prompt, text in zip(prompts, texts, strict=True):
        answer = decode(prompt, verifier, TextDrafter(text, depths), Limits(ANSWER, ()), Sampling())
        assert answer.ids == text[:ANSWER]
        traces.append(trace_of(answer))
    assert figures(acceptance(traces)) == expected


def test_an_end_token_inside_a_proposal_ends_the_answer(
    verifier: TargetVerifier, prompts: list[list[int]], texts: list[list[int]]
) -> None:
    text = texts[0]
    end = next(index for index in range(2, len(text)) if text[index] not in text[:index])
    limits = Limits(ANSWER, (text[end],))
    plain = decode(prompts[0], verifier, None, limits, Sampling())
    fast = decode(prompts[0], verifier, TextDrafter(text, [end + 9], end + 1), limits, Sampling())
    assert plain.ids == fast.ids == text[: end + 1] and plain.finished and fast.finished
    assert fast.rounds == [Round(end + 1, end + 1, end)]


@torch.inference_mode()
def test_what_stands_is_as_if_nothing_had_been_rejected(
    tiny_target: Target, verifier: TargetVerifier, prompts: list[list[int]], texts: list[list[int]]
) -> None:
    """Features and tokens of all verdicts together are those of one forward without cache over the whole text."""
    for prompt, text in zip(prompts, texts, strict=True):
        drafter = TextDrafter(text, [0, 2, 1, 3])
        drafter.start(Sampling())
        verdicts = [verifier.start(prompt, Sampling())]
        while len(drafter.told) < len(prompt) + ANSWER - K:
            drafter.update(verdicts[-1])
            verdicts.append(verifier.verify(drafter.propose()))
        tokens = [token for verdict in verdicts for token in verdict.tokens]
        assert tokens == [*prompt[1:], *text][: len(tokens)]
        whole = torch.tensor([[prompt[0], *tokens[:-1]]])
        expected = tiny_target.forward(whole).features[0]
        torch.testing.assert_close(torch.cat([v.features for v in verdicts]), expected, atol=1e-4, rtol=1e-4)


# --- the real draft


class Helped(ChainDrafter):
    """A chain whose first tokens are replaced by the right ones, to each of ``depths`` in turn; all else is its own.

    It keeps its own proposals, and how many tokens it had been told.
    """

    def __init__(self, draft: Eagle3Draft, target: Target, text: Sequence[int], depths: Sequence[int]) -> None:
        super().__init__(NativeDraft(draft, target.head.embedding, LONGEST, K), K)
        self.text, self.depths = text, itertools.cycle(depths)
        self.told = self.before = 0
        self.own: list[tuple[int, Proposal]] = []

    def update(self, verdict: Verdict) -> None:
        self.before = self.before or len(verdict.tokens) - 1
        self.told += len(verdict.tokens)
        super().update(verdict)

    def propose(self) -> Proposal:
        own = super().propose()
        self.own.append((self.told, own))
        at, depth = self.told - self.before, next(self.depths)
        helped = [*self.text[at : at + depth], *own.tokens.tolist()[depth:]]
        return own._replace(tokens=torch.tensor(helped))


def chain_without_cache(draft: Eagle3Draft, target: Target, text: Sequence[int], choose: Any) -> tuple[Tensor, Tensor]:
    """K drafted tokens and their distributions ``[K, D]``, the head running over everything anew for each of them.

    Args:
        draft: the head.
        target: its target.
        text: the tokens that stand.
        choose: step and logits ``[D]`` to a draft id.
    """
    embedding, ids = target.head.embedding, torch.tensor(text)
    h_TH = draft.combine(target.forward(ids[None, :-1]).features[0])
    tokens: list[int] = []
    rows: list[Tensor] = []
    for step in range(K):
        embedded = embedding[torch.tensor([*text[1:], *tokens])]
        positions = torch.arange(len(embedded))[None]
        y_TH = draft.decode(embedded[None], h_TH[None], positions, draft.new_cache(1, len(embedded)))[0]
        rows.append(draft.logits(y_TH[-1]))
        tokens.append(int(draft.draft_ids[choose(step, rows[-1])]))
        h_TH = torch.cat((h_TH, draft.feedback(y_TH[-1:])))
    return torch.tensor(tokens), torch.stack(rows)


@pytest.mark.parametrize("changes", [{}, {"norm_output": True, "fc_norm": True}, {"draft_vocab_size": 263}])
@torch.inference_mode()
def test_chains_are_lossless_and_those_of_a_head_without_cache(
    tiny_target: Target,
    verifier: TargetVerifier,
    prompts: list[list[int]],
    texts: list[list[int]],
    new_draft: Callable[..., Eagle3Draft],
    changes: dict[str, Any],
) -> None:
    if "draft_vocab_size" in changes:
        changes = {"draft_vocab_size": tiny_target.info.vocab_size}
    draft = new_draft(**changes)
    said: set[int] = set()
    for prompt, text in zip(prompts, texts, strict=True):
        drafter = Helped(draft, tiny_target, text, [0, 2, 1, 3])
        answer = decode(prompt, verifier, drafter, Limits(ANSWER, ()), Sampling())
        assert answer.ids == text[:ANSWER]
        for told, own in drafter.own[:4]:
            standing = [*prompt, *text][: told + 1]
            expected, logits = chain_without_cache(draft, tiny_target, standing, lambda _, row: int(row.argmax()))
            best = logits.topk(2).values
            assert (best[:, 0] - best[:, 1]).min() > 1e-4  # otherwise rounding could decide
            assert torch.equal(own.tokens, expected) and own.drawn is None
            said |= set(expected.tolist())
    assert said <= set(draft.draft_ids.tolist())
    assert len(said) > 4


def test_the_bare_chain_is_lossless(
    tiny_target: Target,
    verifier: TargetVerifier,
    prompts: list[list[int]],
    texts: list[list[int]],
    new_draft: Callable[..., Eagle3Draft],
) -> None:
    """One drafter for all requests, without any help."""
    drafter = ChainDrafter(NativeDraft(new_draft(1), tiny_target.head.embedding, LONGEST, K), K)
    for prompt, text in zip(prompts, texts, strict=True):
        answer = decode(prompt, verifier, drafter, Limits(ANSWER, ()), Sampling())
        assert answer.ids == text[:ANSWER]
        assert 1 + sum(entry.emitted for entry in answer.rounds) == len(answer.ids)
        assert {entry.drafted for entry in answer.rounds} == {K}


@torch.inference_mode()
def test_sampled_chains_state_the_distributions_they_were_drawn_from(
    tiny_target: Target,
    verifier: TargetVerifier,
    prompts: list[list[int]],
    texts: list[list[int]],
    new_draft: Callable[..., Eagle3Draft],
) -> None:
    draft, temperature = new_draft(), 0.7
    drafter = Helped(draft, tiny_target, texts[1], [0])
    drafter.start(Sampling(temperature, "sampled", 11))
    drafter.update(verifier.start(prompts[1], Sampling()))
    drafter.propose()
    ((told, own),) = drafter.own
    uniform = torch.rand(K, generator=torch.Generator().manual_seed(22), dtype=torch.float64)
    standing = [*prompts[1], *texts[1]][: told + 1]
    tokens, rows = chain_without_cache(
        draft,
        tiny_target,
        standing,
        lambda step, row: int(draw(distribution(row, temperature)[None], uniform[step : step + 1])),
    )
    assert own.drawn is not None and torch.equal(own.tokens, tokens)
    ids, probabilities, vocabulary = own.drawn
    assert vocabulary.equal(draft.draft_ids) and vocabulary[ids].equal(tokens)
    torch.testing.assert_close(probabilities[:-1], distribution(rows, temperature), atol=1e-4, rtol=1e-3)
    assert bool((probabilities.gather(1, ids[:, None]) > 0).all()) and not probabilities[-1].any()


# --- T > 0: the real loop, verifier and drafter over models that are tables


V, CHAIN = 4, 2
LENGTH, ANSWERS = 4, 1500  # tokens that are looked at jointly, so that most answers take two rounds
VOCABULARY = torch.tensor([0, 1, 3])


class TextCache:
    """The tokens so far; what is not rolled back is still there."""

    def __init__(self) -> None:
        self.tokens: list[int] = []

    @property
    def length(self) -> int:
        return len(self.tokens)

    def rollback(self, length: int) -> None:
        del self.tokens[length:]


class TableTarget:
    """A target whose next token depends on the last two: ``logits_VVV[before, last]``. Hidden states are logits."""

    device = torch.device("cpu")

    def __init__(self, logits_VVV: Tensor) -> None:
        self.logits_VVV = logits_VVV

    def new_cache(self, capacity: int) -> TextCache:
        return TextCache()

    def forward(self, input_ids: Tensor, cache: TextCache) -> TargetOutput:
        before = cache.tokens[-1:] or [0]
        new = input_ids[0].tolist()
        cache.tokens += new
        rows = self.logits_VVV[[*before, *new[:-1]], new]
        return TargetOutput(rows[None], (rows[None],))

    def logits(self, last_hidden: Tensor) -> Tensor:
        return last_hidden


class TableHead:
    """A head whose next token depends on the last one: ``logits_VD``."""

    device, vocabulary = torch.device("cpu"), VOCABULARY

    def __init__(self, logits_VD: Tensor) -> None:
        self.logits_VD = logits_VD
        self.last = 0

    def restart(self) -> None:
        self.last = 0

    def extend(self, tokens: Tensor, features: Tensor) -> None:
        assert len(tokens) == len(features)
        self.last = int(tokens[-1])

    def begin(self) -> Tensor:
        return self.logits_VD[[self.last]]

    def step(self, tokens: Tensor, y_kH: Tensor, seen_kS: Tensor | None = None) -> Tensor:
        return self.logits_VD[VOCABULARY[tokens]]

    def logits(self, y: Tensor) -> Tensor:
        return y


class Tables(NamedTuple):
    """Logits ``[V, V, V]`` of a :class:`TableTarget`, and ``[V, D]`` of a :class:`TableHead`."""

    target: Tensor
    draft: Tensor

    def decoders(self, drafter: type[ChainDrafter] = ChainDrafter) -> tuple[TargetVerifier, ChainDrafter]:
        """Verifier and drafter (chains of 2)."""
        return TargetVerifier(TableTarget(self.target), 99), drafter(TableHead(self.draft), CHAIN)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def tables() -> Tables:
    generator = torch.Generator().manual_seed(2)
    return Tables(torch.randn(V, V, V, generator=generator), torch.randn(V, len(VOCABULARY), generator=generator))


def excess(tables: Tables, sampling: Sampling, drafter: type[ChainDrafter] = ChainDrafter) -> float:
    """How far the first tokens of many answers, jointly, are from the target's distribution.

    Chi-square over all texts against the product of conditional probabilities, as a part of its 1 - 1e-4 quantile.
    """
    verifier, drafts = tables.decoders(drafter)
    counts = torch.zeros((V,) * LENGTH, dtype=torch.float64)
    # Anywhere, as the seeds of the stage are.
    seeds = torch.randint(1 << 31, (ANSWERS,), generator=torch.Generator().manual_seed(4)).tolist()
    for seed in seeds:
        answer = decode([1, 2], verifier, drafts, Limits(LENGTH, ()), sampling._replace(seed=seed))
        counts[tuple(answer.ids)] += 1
    p = distribution(tables.target, sampling.temperature)
    expected = torch.einsum("a,ab,abc,bcd->abcd", p[1, 2], p[2], p, p) * ANSWERS
    rare = expected < 4
    seen = torch.cat((counts[~rare], counts[rare].sum()[None]))
    wanted = torch.cat((expected[~rare], expected[rare].sum()[None]))
    freedom = len(wanted) - 1
    width = 2 / (9 * freedom)
    quantile = freedom * (1 - width + 3.719 * width**0.5) ** 3  # Wilson and Hilferty's approximation
    return float(((seen - wanted) ** 2 / wanted).sum()) / quantile


@pytest.mark.parametrize("drafting", ["sampled", "greedy"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_sampled_answers_have_the_targets_distribution(tables: Tables, temperature: float, drafting: str) -> None:
    assert excess(tables, Sampling(temperature, drafting)) < 1


def accept_always(logits: Tensor, proposal: Proposal, temperature: float, uniform: Tensor) -> Judgement:
    """Wrong: takes whatever is drafted."""
    last = distribution(logits[-1:], temperature)
    tokens = proposal.tokens.tolist()
    return Judgement(list(range(1, len(tokens) + 1)), [*tokens, int(draw(last, uniform[-1:]))])


def draw_from_the_whole(logits: Tensor, proposal: Proposal, temperature: float, uniform: Tensor) -> Judgement:
    """Wrong: a replacement from p and not from the residual."""
    rows, tokens = judge_sampled(logits, proposal, temperature, uniform)
    added = draw(distribution(logits[len(rows)][None], temperature), uniform[-1:])
    return Judgement(rows, [*tokens[:-1], int(added)])


@pytest.mark.parametrize(("rule", "drafting"), [(accept_always, "greedy"), (draw_from_the_whole, "sampled")])
def test_would_notice_a_wrong_rule(tables: Tables, monkeypatch: pytest.MonkeyPatch, rule: Any, drafting: str) -> None:
    monkeypatch.setattr(speculate, "judge_sampled", rule)
    assert excess(tables, Sampling(1.0, drafting)) > 1.5


class SameNumbers(ChainDrafter):
    """Wrong: draws with the very numbers by which the target judges."""

    def start(self, sampling: Sampling) -> None:
        super().start(sampling)
        self._uniform.restart(2 * sampling.seed + 1)


def test_would_notice_a_drafter_that_draws_with_the_verifiers_numbers(tables: Tables) -> None:
    assert excess(tables, Sampling(1.0, "sampled"), SameNumbers) > 1.5


def test_would_notice_rejected_tokens_that_stay_in_the_cache(tables: Tables, monkeypatch: pytest.MonkeyPatch) -> None:
    roll_back = TextCache.rollback
    monkeypatch.setattr(TextCache, "rollback", lambda cache, length: None if length else roll_back(cache, 0))
    assert excess(tables, Sampling(1.0, "sampled")) > 1.5


def long_answer(target_V: Sequence[float], draft_D: Sequence[float], drafting: str, temperature: float) -> Acceptance:
    """Acceptance of a target and a head that say tokens with probabilities that depend on nothing (given at T=1)."""
    flat = Tables(torch.tensor(target_V).log().expand(V, V, V), torch.tensor(draft_D).log().expand(V, -1))
    answer = decode([1, 2], *flat.decoders(), Limits(4000, ()), Sampling(temperature, drafting, 7))
    return acceptance([trace_of(answer)])


@pytest.mark.parametrize("drafting", ["sampled", "greedy"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_sampled_acceptance_is_what_the_distributions_say(temperature: float, drafting: str) -> None:
    """A drafted token stands with probability sum(min(p, q)); a greedy one with its own under the target."""
    p, q = (torch.tensor([0.3, 0.2, 0.3, 0.2]), torch.tensor([0.1, 0.3, 0.6]))
    p_V = distribution(p.log(), temperature)
    q_V = torch.zeros(V).index_copy(0, VOCABULARY, distribution(q.log(), temperature))
    stands = float(torch.minimum(p_V, q_V).sum() if drafting == "sampled" else p_V[q_V.argmax()])
    counted = long_answer(p.tolist(), q.tolist(), drafting, temperature)
    for position, found in enumerate(counted.by_position, 1):
        share = stands**position
        assert abs(found.value - share) < 4 * math.sqrt(share * (1 - share) / counted.rounds)
    assert len(counted.by_position) == CHAIN


def test_sampled_drafts_that_always_or_never_agree() -> None:
    assert figures(long_answer([0.5, 0.3, 0.0, 0.2], [0.5, 0.3, 0.2], "sampled", 0.7))[:2] == (1 + CHAIN, 1.0)
    assert figures(long_answer([0.0, 0.6, 0.4, 0.0], [0.5, 0.0, 0.5], "sampled", 1.0))[:2] == (1.0, 0.0)
    assert figures(long_answer([0.0, 1.0, 0.0, 0.0], [0.1, 0.8, 0.1], "greedy", 1.0))[:2] == (1 + CHAIN, 1.0)


def test_an_answer_is_its_seeds_alone(tables: Tables) -> None:
    """Whatever was answered before, by the same verifier and drafter."""
    limits = Limits(30, ())
    alone = [decode([1, 2], *tables.decoders(), limits, Sampling(1.0, "sampled", seed)) for seed in (0, 1)]
    verifier, drafter = tables.decoders()
    together = [decode([1, 2], verifier, drafter, limits, Sampling(1.0, "sampled", seed)) for seed in (1, 0, 1)]
    assert [a.ids for a in together] == [alone[1].ids, alone[0].ids, alone[1].ids]
    assert [a.rounds for a in together] == [alone[1].rounds, alone[0].rounds, alone[1].rounds]
    assert alone[0].ids != alone[1].ids
