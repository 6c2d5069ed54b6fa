"""Figures on traces written by hand are those computed by hand."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from eagle3.eval.cautions import warnings
from eagle3.eval.metrics import Choice, acceptance, losslessness, ratio, results, rounds_of, speed
from eagle3.eval.traces import BASELINE, SPECULATIVE, Lossless, Round, Trace

#: Schema 1 of report.json, and what stands beside it here.
KEYS = (
    "benchmark", "category", "n_prompts", "engine", "dtype", "batch", "temperature", "seed", "input_tokens_mean",
    "output_tokens_mean", "source", "drafting", "rounds", "drafted", "accepted", "emitted_tokens",
    "acceptance_rate", "acceptance_length", "acceptance_length_ci95", "acceptance_by_position",
    "acceptance_by_position_ci95", "ttft_s", "tps_per_user", "tps_per_user_ci95", "tps_per_user_e2e",
    "baseline_tps_per_user", "speedup", "speedup_ci95", "losslessness", "without_repeats",
    "round_ms", "drafted_per_round", "baseline_token_ms",
)  # fmt: skip
EVALUATION: dict[str, Any] = {
    "benchmark": "bench", "seed": 5, "batch": 1, "engine": "engine 1",
    "settings": {"chain": 3, "tensor_parallel": 1, "beside": [], "sampling": "sampled", "dtype": "float32"},
}  # fmt: skip


def answer(
    prompt_id: str = "p",
    rounds: Sequence[tuple[int, int, int]] = (),
    *,
    tokens: int = 0,
    mode: str = SPECULATIVE,
    drafting: str = "chain 3",
    seconds: tuple[float, float] = (0.5, 2.5),
    repeated: Sequence[int] = (),
    source: str = "code",
    temperature: float = 0.0,
    lossless: Lossless | None = None,
    input_tokens: int = 10,
) -> Trace:
    """An answer of (drafted, accepted, emitted) rounds, or of so many tokens; ``repeated`` are indices of tokens."""
    count = tokens or 1 + sum(emitted for *_, emitted in rounds)
    return Trace(
        prompt_id=prompt_id, source=source, prompt="?", temperature=temperature, mode=mode,
        drafting=drafting if mode == SPECULATIVE else None, seed=0,
        input_tokens=input_tokens, ids=tuple(range(count)), pieces=("x",) * count, authors=("target",) * count,
        repeated=tuple(index in repeated for index in range(count)), finish="length",
        rounds=tuple(Round(*entry) for entry in rounds), ttft_s=seconds[0], total_s=seconds[1], lossless=lossless,
    )  # fmt: skip


# 6 rounds of 3 drafted tokens; 7 accepted; 4, 2 and 1 rounds reach positions 1, 2 and 3.
FIRST = answer("a", [(3, 0, 1), (3, 3, 4), (3, 1, 2), (3, 2, 2)])  # trimmed at its end
SECOND = answer("b", [(3, 0, 1), (0, 0, 1), (3, 1, 2)])  # a round that drafted nothing


def test_acceptance_by_hand() -> None:
    counted = acceptance([FIRST, SECOND, answer("a", tokens=9, mode=BASELINE)])
    assert (counted.rounds, counted.drafted, counted.accepted) == (6, 18, 7)
    assert counted.length.value == pytest.approx(1 + 7 / 6)
    assert counted.rate == pytest.approx(7 / 18)
    assert [p.value for p in counted.by_position] == pytest.approx([4 / 6, 2 / 6, 1 / 6])
    assert counted.conditional == pytest.approx([4 / 6, 2 / 4, 1 / 2])
    assert math.prod(counted.conditional) == pytest.approx(counted.by_position[-1].value)
    assert counted.length.value == pytest.approx(1 + sum(p.value for p in counted.by_position))


def test_positions_reach_as_far_as_anything_was_drafted() -> None:
    """A round that drafted less counts at every position all the same, as a round that did not get there."""
    counted = acceptance([answer("a", [(4, 0, 1), (2, 2, 3)])])
    assert [p.value for p in counted.by_position] == [1 / 2, 1 / 2, 0, 0]
    assert counted.conditional[:3] == [1 / 2, 1, 0] and math.isnan(counted.conditional[3])


def test_positions_of_a_tree_are_its_levels() -> None:
    """9 nodes in 3 levels, of which paths of 3, 0 and 1 stand."""
    counted = acceptance([answer("a", [(9, 3, 4), (9, 0, 1), (8, 1, 2)], drafting="tree 9/3/3")], levels=3)
    assert (counted.rounds, counted.drafted, counted.accepted, counted.rate) == (3, 26, 4, 4 / 26)
    assert [p.value for p in counted.by_position] == pytest.approx([2 / 3, 1 / 3, 1 / 3])
    assert counted.conditional == pytest.approx([2 / 3, 1 / 2, 1])
    assert counted.length.value == pytest.approx(1 + 4 / 3)


def test_sums_are_taken_over_prompts_before_dividing() -> None:
    """One round with 3 accepted and nine with 0: AL is 1.3, and not the mean 2.5 of the answers' own."""
    counted = acceptance([answer("a", [(3, 3, 4)]), answer("b", [(3, 0, 1)] * 9)])
    assert counted.length.value == pytest.approx(1.3)


@pytest.mark.parametrize("traces", [[], [answer("a", tokens=1)], [answer("a", [(0, 0, 1)])]])
def test_nothing_to_count(traces: list[Trace]) -> None:
    counted = acceptance(traces)
    assert (counted.rounds, counted.drafted, counted.accepted) == (0, 0, 0)
    assert counted.by_position == [] and counted.conditional == []
    assert math.isnan(counted.rate) and counted.length.json is None and counted.length.ci95 == [None, None]


# Tokens: 0 | 1 | 2 3 4 | 5 6 | 7. Rounds that emitted only repeated tokens are the second and the last.
LOOPING = answer("a", [(3, 0, 1), (3, 2, 3), (3, 1, 2), (3, 3, 1)], repeated=(0, 2, 3, 4, 6, 7))


@pytest.mark.parametrize(("chosen", "kept"), [("all", [0, 1, 2, 3]), ("without repeats", [0, 2]), ("whole", [0, 1, 2])])
def test_rounds_that_count(chosen: Choice, kept: list[int]) -> None:
    assert rounds_of(LOOPING, chosen) == [LOOPING.rounds[index] for index in kept]


def test_acceptance_without_repeats() -> None:
    counted = acceptance([LOOPING], "without repeats")
    assert (counted.rounds, counted.accepted, counted.length.value) == (2, 1, 1.5)


def test_whole_rounds_leave_out_the_one_that_crosses_the_end() -> None:
    assert rounds_of(FIRST, "whole") == list(FIRST.rounds[:3])
    assert acceptance([FIRST], "whole").length.value == pytest.approx(1 + 4 / 3)
    ends_with_the_targets_own = answer("a", [(3, 2, 3)])
    assert rounds_of(ends_with_the_targets_own, "whole") == list(ends_with_the_targets_own.rounds)


# Tokens after the first / seconds after the first: 8 / 2 and 3 / 4 with the draft, 8 / 4 and 3 / 5 without.
PAIRS = [
    answer("a", tokens=9, seconds=(0.5, 4.5), mode=BASELINE),
    answer("a", [(3, 3, 4), (3, 3, 4)], seconds=(0.5, 2.5)),
    answer("b", tokens=4, seconds=(1.0, 6.0), mode=BASELINE),
    answer("b", [(3, 2, 3)], seconds=(1.5, 5.5)),
]


def test_speed_by_hand() -> None:
    found = speed(PAIRS)
    assert found.tps_per_user.value == pytest.approx(11 / 6)
    assert found.baseline_tps_per_user.value == pytest.approx(11 / 9)
    assert found.speedup.value == pytest.approx(9 / 6)
    assert found.tps_per_user_e2e == pytest.approx(13 / 8)
    assert (found.ttft_s, found.baseline_ttft_s) == (1.0, 0.75)
    assert found.round_ms == pytest.approx(1000 * (2 + 4) / 3)
    assert found.baseline_token_ms == pytest.approx(1000 * (4 + 5) / 11)


def test_speed_pairs_answers_whatever_their_order() -> None:
    assert speed(PAIRS[::-1]) != speed(PAIRS[:2]) and speed([PAIRS[i] for i in (1, 0, 3, 2)]) == speed(PAIRS)


def test_answers_of_one_token_have_no_speed() -> None:
    found = speed([answer("a", tokens=1, mode=mode, seconds=(1.0, 1.0)) for mode in (BASELINE, SPECULATIVE)])
    assert found.tps_per_user.json is None and found.speedup.json is None
    assert math.isnan(found.round_ms) and math.isnan(found.baseline_token_ms)
    assert found.tps_per_user_e2e == 1.0


# --- intervals


def spread_out(count: int) -> tuple[list[float], list[float]]:
    generator = np.random.default_rng(3)
    return generator.integers(0, 40, count).astype(float).tolist(), generator.integers(10, 20, count).tolist()


def test_intervals_are_those_of_theory() -> None:
    """A ratio of means has, to first order, the variance of (y - r x) / mean(x), over n."""
    above, below = spread_out(400)
    found = ratio(above, below)
    value = sum(above) / sum(below)
    deviation = np.std(np.array(above) - value * np.array(below)) / np.mean(below) / len(above) ** 0.5
    assert found.value == pytest.approx(value)
    # 2000 resamples leave about 3% of noise in either end.
    assert found.high - value == pytest.approx(1.96 * deviation, rel=0.15)
    assert value - found.low == pytest.approx(1.96 * deviation, rel=0.15)


def test_intervals_repeat_themselves_and_narrow_with_prompts() -> None:
    above, below = spread_out(400)
    assert ratio(above, below) == ratio(above, below)
    few = ratio(above[:25], below[:25])
    assert few.high - few.low > 2.5 * (ratio(above, below).high - ratio(above, below).low)


def test_intervals_of_one_prompt_or_of_equal_ones_are_points() -> None:
    assert ratio([3], [2]) == (1.5, 1.5, 1.5)
    assert ratio([3, 3, 3], [2, 2, 2]) == (1.5, 1.5, 1.5)
    one = acceptance([FIRST])
    assert one.length.low == one.length.value == one.length.high


def test_resamples_that_count_nothing_say_nothing() -> None:
    """With one counted prompt of two, a quarter of the resamples hold none of its rounds."""
    assert ratio([3, 0], [2, 0]) == (1.5, 1.5, 1.5)


def test_an_interval_of_the_acceptance_length_moves_with_it() -> None:
    counted = acceptance([FIRST, SECOND])
    # FIRST has 6 accepted in 4 rounds, SECOND 1 in 2: resamples of two prompts are either twice, or both.
    assert (counted.length.low, counted.length.high) == pytest.approx((1 + 1 / 2, 1 + 6 / 4))
    assert (counted.by_position[0].low, counted.by_position[0].high) == pytest.approx((1 / 2, 3 / 4))


def test_both_sides_of_a_speedup_are_resampled_together() -> None:
    """Every prompt is twice as fast, whatever its own speed: the speed-up is certain, the speeds are not."""
    seconds = np.random.default_rng(1).uniform(1, 9, 12)
    pairs = [
        answer(f"{i}", tokens=5, mode=mode, seconds=(1.0, 1.0 + factor * t))
        for i, t in enumerate(seconds)
        for mode, factor in ((BASELINE, 2), (SPECULATIVE, 1))
    ]
    found = speed(pairs)
    assert found.speedup == pytest.approx((2.0, 2.0, 2.0))
    assert found.tps_per_user.high > 1.2 * found.tps_per_user.low


# --- result rows


def at(temperature: float, source: str, prompt_id: str, lossless: Lossless | None = None) -> list[Trace]:
    """Both answers of a prompt: 6 tokens after the first, in 3 seconds and in 2."""
    common: dict[str, Any] = {"temperature": temperature, "source": source}
    return [
        answer(prompt_id, tokens=7, mode=BASELINE, seconds=(1.0, 4.0), **common),
        answer(prompt_id, [(3, 2, 3), (3, 3, 3)], seconds=(1.0, 3.0), lossless=lossless, input_tokens=20, **common),
    ]


MIXED = [
    *at(0.7, "prose", "b"),
    *at(0.0, "code", "a", Lossless(True)),
    *at(0.0, "prose", "b", Lossless(False, 3, 2e-5)),
    *at(0.0, "prose", "c", Lossless(False, 0, 0.25)),
]


def test_rows_hold_the_schema_and_are_json() -> None:
    found = results(MIXED, EVALUATION)
    expected = [(0.0, None, 3), (0.0, "code", 1), (0.0, "prose", 2), (0.7, None, 1), (0.7, "prose", 1)]
    assert [(row["temperature"], row["category"], row["n_prompts"]) for row in found] == expected
    for row in found:
        assert set(KEYS) <= row.keys()
        assert json.loads(json.dumps(row, allow_nan=False)) == row


def test_a_row_by_hand() -> None:
    row = results(MIXED, EVALUATION)[0]
    expected = {
        "benchmark": "bench", "engine": "engine 1", "dtype": "float32", "batch": 1, "seed": 5, "source": "decoded",
        "input_tokens_mean": 20, "output_tokens_mean": 7, "emitted_tokens": 21, "rounds": 6, "drafted": 18,
        "accepted": 15, "acceptance_rate": 15 / 18, "acceptance_length": 3.5, "acceptance_length_ci95": [3.5, 3.5],
        "acceptance_by_position": [1, 1, 0.5], "acceptance_by_position_ci95": [[1, 1], [1, 1], [0.5, 0.5]],
        "conditional_acceptance_by_position": [1, 1, 0.5], "ttft_s": 1, "tps_per_user": 3, "tps_per_user_ci95": [3, 3],
        "tps_per_user_e2e": 7 / 3, "baseline_tps_per_user": 2, "speedup": 1.5, "speedup_ci95": [1.5, 1.5],
        "losslessness": {"answers": 3, "diverged": 1, "ties": 1, "largest_gap": 0.25}, "repeated_tokens": 0,
        "round_ms": 1000, "drafted_per_round": 3, "baseline_token_ms": 500,
    }  # fmt: skip
    assert {key: row[key] for key in expected} == expected
    assert row["without_repeats"]["acceptance_length"] == 3.5


def test_greedy_rows_were_drafted_greedily() -> None:
    cold, *_, warm = results(MIXED, EVALUATION)
    assert cold["drafting"] == {"method": "chain", "length": 3, "total": None, "top_k": 1, "sampling": "greedy"}
    assert warm["drafting"]["sampling"] == "sampled"


BESIDE = {**EVALUATION, "settings": {**EVALUATION["settings"], "tensor_parallel": 1, "beside": ["tree 9/2/3"]}}


def both(temperature: float, prompt_id: str, lossless: Lossless | None = None) -> list[Trace]:
    """A plain answer in 3 seconds after the first token, the chain's in 2, and a tree's of two rounds in 1.5."""
    grown = answer(prompt_id, [(9, 2, 3), (7, 1, 3)], seconds=(1.0, 2.5), temperature=temperature, lossless=lossless,
                   source="prose", drafting="tree 9/2/3", repeated=(4, 5, 6))  # fmt: skip
    return [*at(temperature, "prose", prompt_id, lossless and Lossless(True)), grown]


def test_every_drafting_has_its_rows_against_the_same_baseline() -> None:
    found = results([*both(1.0, "b"), *both(0.0, "a", Lossless(False, 3, 0.5))], BESIDE)
    cold, warm = (
        [(temperature, method, category) for method in ("chain", "tree") for category in (None, "prose")]
        for temperature in (0.0, 1.0)
    )
    assert [(row["temperature"], row["drafting"]["method"], row["category"]) for row in found] == [*cold, *warm]
    chained, grown = found[0], found[2]
    assert chained["drafting"] == {"method": "chain", "length": 3, "total": None, "top_k": 1, "sampling": "greedy"}
    assert grown["drafting"] == {"method": "tree", "length": 2, "total": 9, "top_k": 3, "sampling": "greedy"}
    assert [row["drafting"]["sampling"] for row in found[4::2]] == ["sampled", "greedy"]
    assert [row["n_prompts"] for row in found] == [1] * 8
    assert (chained["speedup"], grown["speedup"]) == (1.5, 2.0)
    assert (chained["round_ms"], grown["round_ms"]) == (1000, 750)
    assert chained["baseline_token_ms"] == grown["baseline_token_ms"] == 500
    assert (chained["drafted_per_round"], grown["drafted_per_round"]) == (3, 8)
    assert (chained["acceptance_rate"], grown["acceptance_rate"]) == (5 / 6, 3 / 16)
    assert (chained["acceptance_length"], grown["acceptance_length"]) == (3.5, 2.5)
    assert grown["acceptance_by_position"] == [1, 0.5] and grown["without_repeats"]["acceptance_by_position"] == [1, 1]
    assert (chained["losslessness"]["diverged"], grown["losslessness"]["diverged"]) == (0, 1)
    assert warnings(found) == [
        "all prompts at T=0, tree 9/2/3: 1 of 1 answers differ from plain decoding (largest top-2 gap 0.5)"
    ]


def test_losslessness_is_of_greedy_answers() -> None:
    assert losslessness(at(0.7, "prose", "b")) is None
    every_equal = losslessness(at(0.0, "code", "a", Lossless(True)))
    assert every_equal == {"answers": 1, "diverged": 0, "ties": 0, "largest_gap": 0.0}
    unknown = losslessness(at(0.0, "code", "a", Lossless(False, 1, None)))
    assert unknown is not None and unknown["diverged"] == 1


# --- warnings


def raced(accepted: int, factors: Sequence[float]) -> list[dict[str, Any]]:
    """Rows of prompts with this AL - 1, each so many times as fast as without the draft."""
    traces = [
        trace
        for i, factor in enumerate(factors)
        for trace in (
            answer(f"{i}", tokens=9, mode=BASELINE, seconds=(1.0, 1.0 + factor)),
            answer(f"{i}", [(3, accepted, accepted + 1)] * (8 // (accepted + 1)), seconds=(1.0, 2.0)),
        )
    ]
    return results(traces, EVALUATION)


def test_a_speedup_above_the_acceptance_length_is_an_error_in_the_measurement() -> None:
    said = warnings(raced(1, [2.5, 3.0]))
    assert [line.partition(":")[0] for line in said] == ["all prompts at T=0, chain 3", "code at T=0, chain 3"]
    assert all(
        "from 2.50 on, lies above the acceptance length 2.00: an error in the measurement" in line for line in said
    )


@pytest.mark.parametrize("factors", [[1.5, 1.9], [1.9, 3.0], [2.0, 2.0]])
def test_a_speedup_that_may_be_below_the_acceptance_length_is_none(factors: list[float]) -> None:
    assert warnings(raced(1, factors)) == []


def test_answers_that_differ_are_warned_of_once() -> None:
    (said,) = warnings(results(MIXED, EVALUATION))
    assert said == "all prompts at T=0, chain 3: 1 of 3 answers differ from plain decoding (largest top-2 gap 0.25)"
