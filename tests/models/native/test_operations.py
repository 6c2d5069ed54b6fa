"""Each way of computing the same is the same; a token costs its own expert only; and nothing waits for a device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from eagle3.configs.settings import TargetSettings
from eagle3.models.native import operations
from eagle3.models.native.cache import Cache
from eagle3.models.native.config import DecoderConfig, LayerConfig, Temperature
from eagle3.models.native.decoder import Decoder
from eagle3.models.native.experts import alone, gathered, grouped, looped, routed
from eagle3.models.native.loading import load_native
from eagle3.models.native.operations import Operations
from eagle3.models.native.sights import branching, following, packed
from eagle3.models.native.weights import Dense, Experts, allocate
from torch import Tensor

from .conftest import CAPTURED, DEVICE, LLAMA4, assert_close, built, random_ids

EXPERTS, HIDDEN, WIDTH = 5, 16, 24
WAYS: dict[str, Callable[[Tensor, Tensor, Experts], Tensor]] = {
    "gathered": gathered,
    "looped": looped,
    "grouped": grouped,
    "chosen": routed,
}


def random_experts(dtype: torch.dtype) -> Experts:
    torch.manual_seed(0)
    shapes = (HIDDEN, EXPERTS), (EXPERTS, HIDDEN, 2 * WIDTH), (EXPERTS, WIDTH, HIDDEN)
    shared = Dense(torch.empty(0), torch.empty(0))
    return Experts(*(torch.randn(shape).to(DEVICE, dtype) for shape in shapes), shared, None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 2, 7, 40])
@pytest.mark.parametrize("way", WAYS)
def test_ways_through_the_experts(way: str, rows: int, dtype: torch.dtype) -> None:
    """One row after the other is the plain one; some experts have no rows."""
    weights = random_experts(dtype)
    x_RH = torch.randn(rows, HIDDEN).to(DEVICE, dtype)
    expert_R = torch.randint(0, EXPERTS - 1, (rows,)).to(DEVICE)
    plain = torch.cat([alone(x_RH[row : row + 1], expert_R[row : row + 1], weights) for row in range(rows)])
    assert_close(WAYS[way](x_RH, expert_R, weights).float(), plain.float(), 1e-5 if dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize("way", WAYS)
def test_no_other_expert_is_computed(way: str) -> None:
    weights = random_experts(torch.float32)
    weights.gate_up[3], weights.down[3] = torch.nan, torch.nan
    expert_R = torch.tensor([0, 4, 4, 1, 2, 0], device=DEVICE)
    assert WAYS[way](torch.randn(6, HIDDEN).to(DEVICE), expert_R, weights).isfinite().all()


@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("rows", [2, 7])
def test_few_tokens_through_small_experts_at_once(rows: int, top_k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU, in two products with what is shared; the same as one after the other."""
    torch.manual_seed(0)
    cpu, layer = torch.device("cpu"), LayerConfig(rotates=True, chunk=0, experts=EXPERTS, width=WIDTH)
    config = DecoderConfig(8, HIDDEN, 2, 1, 8, 1e-5, 1e4, (layer,), top_k=top_k)
    mlp = allocate(config, cpu, torch.float32).layers[0].mlp
    assert isinstance(mlp, Experts) and mlp.every is not None
    for tensor in (mlp.router, *mlp.every):
        tensor.normal_()
    x_TH, calls = torch.randn(rows, HIDDEN), list[int]()
    real = operations.everywhere
    monkeypatch.setattr(operations, "everywhere", lambda *given: calls.append(len(given[0])) or real(*given))
    at_once = Operations(config, cpu).experts(x_TH, mlp)
    monkeypatch.setattr(operations, "SMALL", 0)
    assert_close(at_once, Operations(config, cpu).experts(x_TH, mlp), 1e-5)
    assert calls == [rows]


def test_norm_is_the_same_on_every_device() -> None:
    """Small values too, of which the epsilon is a part."""
    config = DecoderConfig(8, HIDDEN, 2, 1, 8, 1e-5, 1e4, ())
    x_TH, weight_H = torch.randn(6, HIDDEN), torch.rand(HIDDEN)
    x_TH[3:] *= 1e-3
    x_TH[5] = 0
    expected = torch.nn.functional.rms_norm(x_TH, (HIDDEN,), weight_H, 1e-5)
    for device in {torch.device("cpu"), DEVICE}:
        ours = Operations(config, device).norm(x_TH.to(device), weight_H.to(device))
        torch.testing.assert_close(ours.cpu(), expected, rtol=1e-5, atol=1e-7)


def test_a_forward_asks_its_device_for_nothing() -> None:
    """The device "meta" has shapes and no values: who asks it for one gets an error."""
    device, dtype = torch.device("meta"), torch.bfloat16
    layers = tuple(LayerConfig(rotates=i % 4 != 3, chunk=8 if i % 4 != 3 else 0, experts=4, width=48) for i in range(4))
    config = DecoderConfig(96, 32, 4, 2, 8, 1e-5, 1e4, layers, None, Temperature(16, 0.1), qk_norm=True)
    weights = allocate(config, device, dtype)
    decoder = Decoder(config, weights, Operations(config, device), CAPTURED)
    cache = Cache(config, 80, weights.embedding)

    def ids(count: int) -> Tensor:
        return torch.empty(count, dtype=torch.long, device=device)

    for count in (50, 1, 6):
        states, captured = decoder.forward(ids(count), following(cache, count, config.chunks, dtype), cache)
        assert states.shape == (count, 32) and len(captured) == len(CAPTURED)
    tree = torch.ones(5, 5, dtype=torch.bool, device=device)
    decoder.forward(ids(5), branching(cache, tree, config.chunks, dtype), cache)
    cache.keep(ids(3))
    decoder.forward(ids(70), packed([30, 40], config.chunks, device))
    assert cache.length == 60


@pytest.mark.parametrize("changes", [{"moe_layers": []}, {"num_local_experts": 1}])
def test_bfloat16(changes: dict[str, object], saved: Callable[..., object]) -> None:
    """As near to float32 as rounding lets it; with one expert, since routing would turn a rounding into another way."""
    folder = saved(built(LLAMA4 | {"use_qk_norm": True} | changes))
    settings = TargetSettings(path=str(folder), layers=CAPTURED)
    exact, ours = load_native(settings, 64), load_native(replace(settings, dtype="bfloat16"), 64)
    assert ours.info == replace(exact.info, dtype="bfloat16")
    ids = random_ids(50)
    expected, output = exact.prefill(ids, [50]), ours.prefill(ids, [50])
    assert output.last_hidden.dtype == output.features.dtype == torch.bfloat16
    assert_close(output.features.float(), expected.features, 3e-2)
    cache = ours.new_cache(64)
    ours.forward(ids[:44], cache)
    assert_close(ours.forward(ids[44:], cache).last_hidden.float(), expected.last_hidden[44:], 5e-2)
