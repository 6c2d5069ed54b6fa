"""What the traces say, by the definitions that every report of this project uses.

* A round is one draft-and-verify iteration; rounds that drafted nothing do not count. ``accepted`` is counted before the
  answer is trimmed at its end token.
* Acceptance length AL = 1 + sum(accepted) / rounds. Acceptance rate = sum(accepted) / sum(drafted).
* Acceptance at position i (from 1) = rounds with accepted >= i / rounds; conditional: / rounds with accepted >= i - 1.
  Of a tree ``drafted`` is the nodes verified, root excluded, and its positions are its levels.
* TPS/user (output) = tokens after the first / time after the first; end to end: all tokens / whole time. Batch 1.
* Speed-up = TPS/user with the draft / without it, over the same prompts; every drafting is set against the same baseline.
* The cost of a round, ``round_ms`` = milliseconds after the first token / rounds; ``drafted_per_round``; and, of the
  baseline, ``baseline_token_ms`` = milliseconds after the first token / tokens after the first. A drafting is faster than
  plain decoding where round_ms / AL, its milliseconds a token, is less than baseline_token_ms.
* Figures "without repeats" leave out the rounds that emitted only tokens which end an 8-gram seen before in the answer.

Every figure is a ratio of sums over prompts. Its 95% interval comes from resampling the prompts (bootstrap, percentiles);
a speed-up resamples both of its sides together, since they are measured on the same prompts.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import numpy as np

from ..configs.drafting import PLAIN, Drafting, chosen, named
from .traces import BASELINE, SPECULATIVE, Round, Trace

RESAMPLES = 2000
Choice = Literal["all", "without repeats", "whole"]


class Estimate(NamedTuple):
    """A figure and its 95% interval; NaN where there is nothing to count."""

    value: float
    low: float
    high: float

    @property
    def json(self) -> float | None:
        """The figure as report.json holds it, which knows no NaN."""
        return _json(self.value)

    @property
    def ci95(self) -> list[float | None]:
        """The interval as report.json holds it."""
        return [_json(self.low), _json(self.high)]


@dataclass(frozen=True)
class Acceptance:
    """Sums over rounds, and the figures made of them; positions count from 1, so ``by_position[0]`` is position 1."""

    rounds: int
    drafted: int
    accepted: int
    rate: float
    length: Estimate
    by_position: list[Estimate]
    conditional: list[float]


@dataclass(frozen=True)
class Speed:
    """Seconds to the first token (mean) and tokens per second and user, with the draft and without it.

    ``round_ms``: milliseconds that a round takes, drafting and verification (mean); ``baseline_token_ms``: that a token
    takes without the draft. NaN where there was none.
    """

    ttft_s: float
    baseline_ttft_s: float
    tps_per_user: Estimate
    tps_per_user_e2e: float
    baseline_tps_per_user: Estimate
    speedup: Estimate
    round_ms: float
    baseline_token_ms: float


def ratio(numerators: Sequence[float], denominators: Sequence[float]) -> Estimate:
    """Sum of ``numerators`` / sum of ``denominators`` (one of each per prompt), with its bootstrap interval."""
    above, below = np.asarray(numerators, float), np.asarray(denominators, float)
    picks = _resamples(len(above))
    return _estimate(_divide(above.sum(), below.sum()), _divide(above[picks].sum(1), below[picks].sum(1)))


def rounds_of(trace: Trace, chosen: Choice = "all") -> list[Round]:
    """The rounds of an answer that count.

    ``without repeats``: those that emitted a token which is not repeated. ``whole``: those that do not cross the end of
    the answer, which is what an acceptance length simulated along recorded answers is compared with.
    """
    inside = trace.inside_repeats()
    return [
        entry
        for entry, repeats in zip(trace.rounds, inside, strict=True)
        if entry.drafted
        and not (chosen == "without repeats" and repeats)
        and not (chosen == "whole" and entry.emitted <= entry.accepted)
    ]


def acceptance(traces: Sequence[Trace], chosen: Choice = "all", levels: int | None = None) -> Acceptance:
    """Acceptance over the speculative answers among ``traces``, by position up to ``levels``: a tree's, which has more nodes.

    Default: as far as anything was drafted, which is a chain's length.
    """
    per_prompt = [rounds_of(trace, chosen) for trace in traces if trace.mode == SPECULATIVE]
    counts = [len(rounds) for rounds in per_prompt]
    accepted = [sum(entry.accepted for entry in rounds) for rounds in per_prompt]
    drafted = sum(entry.drafted for rounds in per_prompt for entry in rounds)
    depth = max((entry.drafted for rounds in per_prompt for entry in rounds), default=0)
    depth = depth if levels is None else min(depth, levels)
    reached = [[sum(entry.accepted >= i for entry in rounds) for rounds in per_prompt] for i in range(depth + 1)]
    extra = ratio(accepted, counts)
    return Acceptance(
        rounds=sum(counts),
        drafted=drafted,
        accepted=sum(accepted),
        rate=float(_divide(np.float64(sum(accepted)), np.float64(drafted))),
        length=Estimate(1 + extra.value, 1 + extra.low, 1 + extra.high),
        by_position=[ratio(hits, counts) for hits in reached[1:]],
        conditional=[
            float(_divide(np.float64(sum(hits)), np.float64(sum(before))))
            for before, hits in itertools.pairwise(reached)
        ],
    )


def speed(traces: Sequence[Trace]) -> Speed:
    """Speed over the prompts of ``traces``: the baseline and the answers of one drafting, at one temperature."""
    pairs = _pairs(traces)
    fast, plain = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    fast_tokens, fast_time = _after_first(fast)
    plain_tokens, plain_time = _after_first(plain)
    rounds = sum(len(trace.rounds) for trace in fast)
    picks = _resamples(len(pairs))
    resampled = [
        _divide(tokens[picks].sum(1), seconds[picks].sum(1))
        for tokens, seconds in ((fast_tokens, fast_time), (plain_tokens, plain_time))
    ]
    rates = [_divide(fast_tokens.sum(), fast_time.sum()), _divide(plain_tokens.sum(), plain_time.sum())]
    return Speed(
        ttft_s=float(np.mean([trace.ttft_s for trace in fast])),
        baseline_ttft_s=float(np.mean([trace.ttft_s for trace in plain])),
        tps_per_user=_estimate(rates[0], resampled[0]),
        tps_per_user_e2e=sum(len(trace.ids) for trace in fast) / sum(trace.total_s for trace in fast),
        baseline_tps_per_user=_estimate(rates[1], resampled[1]),
        speedup=_estimate(_divide(rates[0], rates[1]), _divide(resampled[0], resampled[1])),
        round_ms=float(_divide(1000 * fast_time.sum(), np.float64(rounds))),
        baseline_token_ms=float(_divide(1000 * plain_time.sum(), plain_tokens.sum())),
    )


def losslessness(traces: Sequence[Trace]) -> dict[str, Any] | None:
    """How many greedy answers were compared with plain decoding, how many differ but for ties, and the largest gap."""
    compared = [trace.lossless for trace in traces if trace.lossless is not None]
    if not compared:
        return None
    gaps = [entry.gap for entry in compared if entry.gap is not None]
    return {
        "answers": len(compared),
        "diverged": sum(entry.diverged for entry in compared),
        "ties": sum(not entry.equal and not entry.diverged for entry in compared),
        "largest_gap": max(gaps, default=0.0),
    }


def results(traces: Sequence[Trace], evaluation: dict[str, Any]) -> list[dict[str, Any]]:
    """The ``results`` of report.json: per temperature and drafting all prompts (category None), then each source.

    At every temperature the main drafting comes first. Its ``headline`` is "chosen" if it was chosen by measurement, else
    "fixed"; that of the others is None. Where no chain pays, it is plain decoding, set against itself.

    Args:
        traces: all of a run's.
        evaluation: its eval.json.
    """
    found = []
    calibration = evaluation.get("calibration")
    how = "chosen" if calibration and calibration["measured"] else "fixed"
    for temperature in sorted({trace.temperature for trace in traces}):
        warm = [trace for trace in traces if trace.temperature == temperature]
        for number, drafting in enumerate(draftings(evaluation, temperature)):
            its = [trace for trace in warm if trace.drafting in (None, drafting.name)]
            if drafting == PLAIN:
                its += [replace(trace, mode=SPECULATIVE) for trace in its]
            for source in [None, *sorted({trace.source for trace in warm})]:
                of_source = [trace for trace in its if source in (None, trace.source)]
                headline = None if number else how
                found.append(_result(of_source, evaluation, temperature, drafting, source) | {"headline": headline})
    return found


def draftings(evaluation: dict[str, Any], temperature: float) -> tuple[Drafting, ...]:
    """Those of an eval.json at a temperature, the main one first; that is :data:`PLAIN` where no chain pays."""
    settings, calibration = evaluation["settings"], evaluation.get("calibration")  # which older ones have not
    if calibration is None:
        return named(settings["chain"], settings["beside"])
    entry = next(entry for entry in calibration["temperatures"] if entry["temperature"] == temperature)
    return chosen(entry["chain"], settings["beside"])


def _result(
    traces: list[Trace], evaluation: dict[str, Any], temperature: float, drafting: Drafting, source: str | None
) -> dict[str, Any]:
    settings, levels, rates = evaluation["settings"], drafting.length, speed(traces)
    every, fresh = acceptance(traces, "all", levels), acceptance(traces, "without repeats", levels)
    sampled = temperature > 0 and drafting.method == "chain"  # a tree is grown and not drawn
    fast = [trace for trace in traces if trace.mode == SPECULATIVE]
    return {
        "benchmark": evaluation["benchmark"],
        "category": source,
        "n_prompts": len(fast),
        "engine": evaluation["engine"],
        "dtype": settings["dtype"],
        "batch": evaluation["batch"],
        "temperature": temperature,
        "seed": evaluation["seed"],
        "input_tokens_mean": float(np.mean([trace.input_tokens for trace in fast])),
        "output_tokens_mean": float(np.mean([len(trace.ids) for trace in fast])),
        "source": "decoded",
        "drafting": {**drafting._asdict(), "sampling": settings["sampling"] if sampled else "greedy"},
        "emitted_tokens": sum(len(trace.ids) for trace in fast),
        **_acceptance_fields(every),
        "without_repeats": _acceptance_fields(fresh),
        "repeated_tokens": sum(sum(trace.repeated) for trace in fast) / sum(len(trace.ids) for trace in fast),
        "ttft_s": rates.ttft_s,
        "baseline_ttft_s": rates.baseline_ttft_s,
        "tps_per_user": rates.tps_per_user.json,
        "tps_per_user_ci95": rates.tps_per_user.ci95,
        "tps_per_user_e2e": rates.tps_per_user_e2e,
        "baseline_tps_per_user": rates.baseline_tps_per_user.json,
        "baseline_tps_per_user_ci95": rates.baseline_tps_per_user.ci95,
        "speedup": rates.speedup.json,
        "speedup_ci95": rates.speedup.ci95,
        "round_ms": _json(rates.round_ms),
        "drafted_per_round": every.drafted / every.rounds if every.rounds else None,
        "baseline_token_ms": _json(rates.baseline_token_ms),
        "losslessness": losslessness(traces),
    }


def _acceptance_fields(counted: Acceptance) -> dict[str, Any]:
    return {
        "rounds": counted.rounds,
        "drafted": counted.drafted,
        "accepted": counted.accepted,
        "acceptance_rate": _json(counted.rate),
        "acceptance_length": counted.length.json,
        "acceptance_length_ci95": counted.length.ci95,
        "acceptance_by_position": [position.json for position in counted.by_position],
        "acceptance_by_position_ci95": [position.ci95 for position in counted.by_position],
        "conditional_acceptance_by_position": [_json(rate) for rate in counted.conditional],
    }


def _pairs(traces: Sequence[Trace]) -> list[tuple[Trace, Trace]]:
    """(speculative, baseline) per prompt."""
    plain = {(t.prompt_id, t.temperature): t for t in traces if t.mode == BASELINE}
    return [(t, plain[t.prompt_id, t.temperature]) for t in traces if t.mode == SPECULATIVE]


def _after_first(traces: Sequence[Trace]) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and seconds after the first token, per answer."""
    tokens = np.array([len(trace.ids) - 1 for trace in traces], float)
    return tokens, np.array([trace.total_s - trace.ttft_s for trace in traces], float)


def _resamples(count: int) -> np.ndarray:
    """``[RESAMPLES, count]`` indices of prompts drawn with replacement; the same ones in every call."""
    return np.random.default_rng(0).integers(0, max(count, 1), (RESAMPLES, count))


def _json(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def _divide(above: np.ndarray | np.float64, below: np.ndarray | np.float64) -> Any:
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.true_divide(above, below)


def _estimate(value: float, resampled: np.ndarray) -> Estimate:
    """Resamples in which nothing was counted (NaN) say nothing about the figure."""
    counted = resampled[np.isfinite(resampled)]
    if not len(counted):
        return Estimate(float(value), float("nan"), float("nan"))
    low, high = np.percentile(counted, (2.5, 97.5))
    return Estimate(float(value), float(low), float(high))
