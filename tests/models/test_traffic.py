"""Bytes by arithmetic, against a count by hand of the flagship's."""

from __future__ import annotations

import pytest
from eagle3.models.traffic import MAVERICK, gain, maverick_head, round_cost


def test_the_flagship_reads_what_its_configuration_says() -> None:
    """Attention 3.02, dense MLPs 6.04, shared experts 3.02, routed ones 3.02 for each that is touched, LM head 2.07 GB."""
    found = [round(MAVERICK.bytes(tokens) / 1e9, 1) for tokens in (1, 2, 4, 6, 8)]
    assert found == [17.2, 20.2, 26.1, 31.9, 37.7]


def test_its_head_reads_its_layer_and_lm_head_a_step_and_fc_a_round() -> None:
    head = maverick_head()
    qkv, out, mlp, lm_head = 2 * 5120 * 56 * 128, 40 * 128 * 5120, 3 * 5120 * 16384, 32000 * 5120
    assert head.step == 2 * (qkv + out + mlp + lm_head) and head.round == 2 * 3 * 5120**2
    cost = (MAVERICK.bytes(4) + 3 * head.step + head.round) / MAVERICK.bytes(1)
    assert round_cost(3, MAVERICK, head) == pytest.approx(cost)


@pytest.mark.parametrize(
    ("by_position", "chain"),
    [([0.1, 0.0], 0), ([], 0), ([0.8, 0.05, 0.04], 1), ([0.8, 0.7, 0.6, 0.0], 3)],
)
def test_the_best_chain_is_that_of_most_tokens_a_byte(by_position: list[float], chain: int) -> None:
    head = maverick_head()
    best = gain(by_position, MAVERICK, head)
    assert best.chain == chain
    expected = (1 + sum(by_position[:chain])) / round_cost(chain, MAVERICK, head) if chain else 1.0
    assert best.speedup == pytest.approx(expected) and best.speedup >= 1
