"""Maverick's numbers."""

from __future__ import annotations

import pytest
import torch
from eagle3.models import costs
from eagle3.models.draft import DraftConfig, Eagle3Draft

MAVERICK = DraftConfig(5120, 16384, 40, 8, 128, 202_048, 32_000, (1, 23, 44), 1e-5, 500_000.0, 8192)
SMALL = DraftConfig(80, 640, 5, 1, 16, 3000, 1000, (1, 3, 4), 1e-5, 10_000.0, 1024)


def test_mavericks_head() -> None:
    assert costs.fc_parameters(MAVERICK) == pytest.approx(78.6e6, rel=1e-3)
    assert costs.step_parameters(MAVERICK) == pytest.approx(515e6, rel=1e-3)
    assert costs.training_flop(MAVERICK, 7) == pytest.approx(22.1e9, rel=1e-3)
    assert costs.teacher_flop(MAVERICK) == pytest.approx(2.07e9, rel=1e-3)
    norms = 4 * 5120
    assert costs.parameters(MAVERICK) == costs.step_parameters(MAVERICK) + costs.fc_parameters(MAVERICK) + norms


def test_parameters_are_those_of_the_head() -> None:
    head = Eagle3Draft(SMALL, torch.arange(1000))
    assert costs.parameters(SMALL) == sum(parameter.numel() for parameter in head.parameters())
