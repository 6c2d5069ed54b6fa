"""Maverick's numbers, and memory counted against what rollout and objective really hold."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from eagle3.models import costs
from eagle3.models.costs import Micro
from eagle3.models.draft import DraftConfig, Eagle3Draft
from eagle3.models.rollout import RolloutBatch, rollout
from eagle3.train.objective import objective, weighted
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

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


def test_zero_shards_optimiser_then_gradients_then_weights() -> None:
    held = [costs.state_bytes(1000, stage, 4) for stage in (None, 0, 1, 2, 3)]
    assert held == [16_000, 20_000, 8_000, 6_500, 5_000]


class Live(TorchDispatchMode):
    """Adds up the bytes of all tensors that operations made and somebody still holds."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = operation(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor.untyped_storage())
        self.peak = max(self.peak, self.now)
        return made

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self._sizes:
            self._sizes[key] = storage.nbytes()
            self.now += storage.nbytes()
            weakref.finalize(storage, self._gone, key)

    def _gone(self, key: int) -> None:
        self.now -= self._sizes.pop(key)


@pytest.mark.parametrize(("dtype", "width"), [(torch.bfloat16, 2), (torch.float32, 4)])
@pytest.mark.parametrize(("samples", "prompt", "answer", "steps"), [(2, 20, 300, 7), (4, 100, 150, 3), (2, 1, 500, 2)])
def test_memory_is_what_a_training_step_holds(
    dtype: torch.dtype, width: int, samples: int, prompt: int, answer: int, steps: int
) -> None:
    length = prompt + answer
    head = Eagle3Draft(SMALL, torch.arange(1000)).to(dtype)
    batch = RolloutBatch(
        input_ids=torch.randint(3000, (samples * length,)),
        loss_mask=(torch.arange(length) >= prompt).repeat(samples),
        features=torch.randn(samples * length, 3, 80).to(dtype),
        last_hidden=torch.randn(samples * length, 80).to(dtype),
        lengths=torch.full((samples,), length),
    )
    embedding, lm_head = torch.randn(3000, 80), torch.randn(3000, 80)
    for parameter in head.parameters():
        parameter.grad = torch.zeros_like(parameter)
    with Live() as live:
        outputs = rollout(head, embedding, batch, steps)
        loss = weighted(objective(head, outputs, batch, lm_head, "lk"), 0.8)
        kept = live.now
        loss.backward()
    micro = Micro(samples * length, samples * answer, length)
    estimate = costs.activation_bytes(SMALL, micro, steps, width)
    assert sum(estimate) - estimate.transient == pytest.approx(kept, rel=0.07)
    assert 0.9 < sum(estimate) / live.peak < 1.4  # what lives for one operation only differs between devices
