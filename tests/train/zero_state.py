"""Every stage of ZeRO in float32 and bfloat16: what is gathered and restored is the optimiser's whole state.

DS_ACCELERATOR=cpu torchrun --nproc-per-node 2 tests/train/zero_state.py
"""

from __future__ import annotations

import os
from typing import Any

import deepspeed
import torch
from eagle3.train.launch import unstepped
from eagle3.train.state import gathered, restore
from torch import Tensor, nn

SHAPES = {"small.weight": (3, 5), "wide.weight": (33, 17), "norm.weight": (17,), "fc.weight": (17, 7)}
KINDS = dict.fromkeys(SHAPES, "adamw")
STEPS, STAGES = 3, (0, 1, 2, 3)


class Outer(nn.Module):
    """Matrices whose sizes no number of ranks divides; ``draft`` as the trainer names what it trains."""

    def __init__(self, state: dict[str, Tensor]) -> None:
        super().__init__()
        self.draft = nn.ModuleDict()
        for name in SHAPES:
            holder = nn.Module()
            holder.weight = nn.Parameter(state[f"{name}/weight"].clone())
            self.draft[name.removesuffix(".weight")] = holder

    def forward(self, x: Tensor) -> Tensor:
        small, wide, norm, fc = (self.draft[name.removesuffix(".weight")].weight for name in SHAPES)
        return ((x @ fc.T * norm) @ wide.T).square().mean() + (x[:, :5] @ small.T).square().mean()


class Wrapper:
    """As accelerate's around what DeepSpeed returns."""

    def __init__(self, optimizer: Any) -> None:
        self.optimizer = optimizer


def engine_of(stage: int, bfloat16: bool, state: dict[str, Tensor]) -> tuple[Any, Wrapper]:
    """A new engine, whose two groups of parameters have rates of their own."""
    module = Outer(state)
    first, rest = [module.draft["fc"].weight], [p for n, p in module.named_parameters() if ".fc." not in n]
    groups = [{"params": rest, "kind": "adamw"}, {"params": first, "kind": "adamw", "lr": 3e-3}]
    optimizer = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": 0.5,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": bfloat16},
    }
    with unstepped(optimizer):
        engine, wrapped, _, _ = deepspeed.initialize(model=module, optimizer=optimizer, config=config)
    assert engine.zero_optimization_stage() == stage
    return engine, Wrapper(wrapped)


def advance(engine: Any, first: int) -> None:
    """Steps with numbers of their own, other ones on every rank."""
    for step in range(first, first + STEPS):
        generator = torch.Generator().manual_seed(10 * step + int(os.environ["RANK"]))
        x = torch.randn(4, 7, generator=generator).to(next(engine.parameters()).dtype)
        engine.backward(engine(x).float())
        engine.step()


def state_of(engine: Any, optimizer: Wrapper) -> dict[str, Tensor]:
    """A copy of the whole state."""
    return {name: tensor.clone() for name, tensor in gathered(engine, optimizer, KINDS)}


def assert_close(ours: dict[str, Tensor], theirs: dict[str, Tensor], tolerance: float) -> None:
    """Both are finite, and the same but for rounding."""
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.isfinite().all() and tensor.norm() > 0, name
        assert (tensor - theirs[name]).norm() <= tolerance * theirs[name].norm(), name


def main() -> None:
    """Train, gather, restore under the same stage and under the next one, and compare what both come to."""
    torch.manual_seed(0)
    start = {f"{name}/weight": torch.randn(shape) for name, shape in SHAPES.items()}
    count = 0
    for bfloat16, tolerance in ((False, 1e-5), (True, 0.05)):
        reference: dict[str, Tensor] = {}
        for stage in STAGES:
            engine, optimizer = engine_of(stage, bfloat16, start)
            advance(engine, 0)
            half = state_of(engine, optimizer)
            advance(engine, STEPS)
            whole = state_of(engine, optimizer)
            assert any(not half[name].equal(whole[name]) for name in whole)
            reference = reference or whole
            assert_close(whole, reference, tolerance)
            for other in (stage, STAGES[(stage + 1) % len(STAGES)]):
                resumed, again = engine_of(other, bfloat16, half)
                restore(resumed, again, KINDS, half, STEPS)
                held = state_of(resumed, again)
                assert all(held[name].equal(half[name]) for name in half), (stage, other, bfloat16)
                advance(resumed, STEPS)
                assert_close(state_of(resumed, again), whole, 0.0 if other == stage else tolerance)
            count += 1
    if os.environ["RANK"] == "0":
        print(f"{count} engines", flush=True)


if __name__ == "__main__":
    deepspeed.init_distributed(dist_backend="gloo")
    main()
