"""What a step's speed is made of."""

from __future__ import annotations

from dataclasses import replace

import pytest
from eagle3.models.costs import fc_parameters, step_flop, step_parameters, teacher_flop, training_flop
from eagle3.models.draft import DraftConfig
from eagle3.train.speed import figures

HEAD = DraftConfig(
    hidden_size=5120,
    intermediate_size=16384,
    num_heads=40,
    num_kv_heads=8,
    head_dim=128,
    vocab_size=202_048,
    draft_vocab_size=32_000,
    target_layers=(1, 23, 44),
    rms_norm_eps=1e-5,
    rope_theta=5e5,
    max_positions=8192,
)


def test_a_step_of_answers_alone_costs_what_a_plan_says() -> None:
    """22.1 GFLOP a token of Maverick's head and seven steps, and 2.1 for the teacher, but nothing for features' gradient."""
    flop = step_flop(HEAD, 100, [100] * 7)
    assert flop == 100 * (training_flop(HEAD, 7) + teacher_flop(HEAD) - 2 * fc_parameters(HEAD))
    assert flop / 100 == pytest.approx(22.1e9 + 2.07e9 - 0.16e9, rel=5e-3)


def test_a_prompt_costs_its_projections_alone() -> None:
    pairs = 2 * HEAD.hidden_size * 2 * HEAD.num_kv_heads * HEAD.head_dim
    answers = step_flop(HEAD, 40, [40, 30])
    assert step_flop(HEAD, 100, [40, 30]) - answers == 60 * (4 * fc_parameters(HEAD) + 6 * pairs)
    assert answers - step_flop(HEAD, 40, [40, 29]) == 6 * step_parameters(HEAD)


def test_figures() -> None:
    small = replace(HEAD, hidden_size=64, intermediate_size=64)
    rows = [50, 40]
    found = figures(small, 100, rows, seconds=2.0, waited=0.5, peak=step_flop(small, 100, rows))
    assert (found["tokens_per_s"], found["waited"], found["mfu"]) == (50, 0.25, 0.5)
    assert "mfu" not in figures(small, 100, rows, 2.0, 0.5, None)
