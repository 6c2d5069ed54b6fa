"""The tensors of a decoder as it computes with them, and where each tensor of a checkpoint goes.

Queries, keys and values are one matrix, and so are gate and up: one product instead of three or two. Matrices of layers
are ``[in, out]``, as a checkpoint has its experts', so that a product is one call. Where they are in memory is another
thing: on a CPU by rows of that, since its products of a few tokens then take up to half the time; elsewhere by rows of the
transposed, as kernels for few tokens read them.

Shapes: H hidden, V vocabulary, E experts, I width of an MLP, Q widths of all queries, keys and values.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .config import DecoderConfig, LayerConfig
from .families import Family


class Dense(NamedTuple):
    """``down(silu(gate(x)) * up(x))``: ``gate_up`` ``[H, 2I]``, gate first, and ``down`` ``[I, H]``."""

    gate_up: Tensor
    down: Tensor


class Experts(NamedTuple):
    """``router`` ``[H, E]``, ``gate_up`` ``[E, H, 2I]``, ``down`` ``[E, I, H]``, and what all tokens share."""

    router: Tensor
    gate_up: Tensor
    down: Tensor
    shared: Dense


class LayerWeights(NamedTuple):
    """``qkv`` ``[H, Q]``, with pairs (2i, 2i + 1) rotating together; ``out`` ``[N * W, H]``; two norms ``[H]``."""

    input_norm: Tensor
    qkv: Tensor
    out: Tensor
    mlp_norm: Tensor
    mlp: Dense | Experts


class DecoderWeights(NamedTuple):
    """``embedding`` and ``lm_head`` ``[V, H]``, which may be one tensor, and ``norm`` ``[H]``."""

    embedding: Tensor
    layers: tuple[LayerWeights, ...]
    norm: Tensor
    lm_head: Tensor


class Place(NamedTuple):
    """Where a stored tensor of ``shape`` goes: into ``view``, of as many elements in the same order."""

    view: Tensor
    shape: tuple[int, ...]


def allocate(config: DecoderConfig, device: torch.device, dtype: torch.dtype) -> DecoderWeights:
    """Weights without values; on the device "meta", their sizes alone."""

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    def matrix(*shape: int) -> Tensor:
        *count, into, out = shape
        return empty(*shape) if device.type == "cpu" else empty(*count, out, into).mT

    hidden, width = config.hidden_size, config.query_width

    def dense(inner: int) -> Dense:
        return Dense(matrix(hidden, 2 * inner), matrix(inner, hidden))

    def mlp(layer: LayerConfig) -> Dense | Experts:
        if not (count := layer.experts):
            return dense(layer.width)
        gate_up, down = matrix(count, hidden, 2 * layer.width), matrix(count, layer.width, hidden)
        return Experts(matrix(hidden, count), gate_up, down, dense(layer.width))

    def decoder_layer(layer: LayerConfig) -> LayerWeights:
        qkv, out = matrix(hidden, width + config.stored_width), matrix(width, hidden)
        return LayerWeights(empty(hidden), qkv, out, empty(hidden), mlp(layer))

    embedding = empty(config.vocab_size, hidden)
    layers = tuple(decoder_layer(layer) for layer in config.layers)
    lm_head = embedding if config.tied else empty(config.vocab_size, hidden)
    return DecoderWeights(embedding, layers, empty(hidden), lm_head)


def places(weights: DecoderWeights, config: DecoderConfig, family: Family) -> dict[str, Place]:
    """Where everything goes, by the names of a text-only checkpoint."""
    found = {"model.embed_tokens.weight": weights.embedding, "model.norm.weight": weights.norm}
    if weights.lm_head is not weights.embedding:
        found["lm_head.weight"] = weights.lm_head
    named = {name: Place(tensor, tuple(tensor.shape)) for name, tensor in found.items()}
    for index, layer in enumerate(weights.layers):
        prefix = f"model.layers.{index}"
        named |= {f"{prefix}.{name}": place for name, place in _layer_places(layer, config, family)}
    return named


def _layer_places(layer: LayerWeights, config: DecoderConfig, family: Family) -> Iterator[tuple[str, Place]]:
    yield "input_layernorm.weight", _as_it_is(layer.input_norm)
    yield "post_attention_layernorm.weight", _as_it_is(layer.mlp_norm)
    yield "self_attn.o_proj.weight", _as_it_is(layer.out.t())
    stored = config.stored_width // 2
    query, key, value = layer.qkv.t().split([config.query_width, stored, stored])
    yield "self_attn.q_proj.weight", _rotating(query, config, family)
    yield "self_attn.k_proj.weight", _rotating(key, config, family)
    yield "self_attn.v_proj.weight", _as_it_is(value)
    mlp = layer.mlp
    if isinstance(mlp, Dense):
        yield from _dense_places(mlp, family.mlp)
        return
    yield f"{family.mlp}.router.weight", _as_it_is(mlp.router.t())
    yield f"{family.mlp}.experts.gate_up_proj", _as_it_is(mlp.gate_up)
    yield f"{family.mlp}.experts.down_proj", _as_it_is(mlp.down)
    yield from _dense_places(mlp.shared, f"{family.mlp}.shared_expert")


def _dense_places(mlp: Dense, name: str) -> Iterator[tuple[str, Place]]:
    gate, up = mlp.gate_up.t().chunk(2)
    for part, tensor in (("gate", gate), ("up", up), ("down", mlp.down.t())):
        yield f"{name}.{part}_proj.weight", _as_it_is(tensor)


def _as_it_is(tensor: Tensor) -> Place:
    return Place(tensor, tuple(tensor.shape))


def _rotating(tensor: Tensor, config: DecoderConfig, family: Family) -> Place:
    """Row i of a head's first half belongs beside row i of its second."""
    if not family.halves:
        return _as_it_is(tensor)
    return Place(tensor.unflatten(0, (-1, config.head_dim // 2, 2)).transpose(1, 2), tuple(tensor.shape))


def total_bytes(weights: DecoderWeights) -> int:
    """The memory that they take."""
    tensors = {id(tensor): tensor for tensor in _tensors(weights)}
    return sum(math.prod(tensor.shape) * tensor.element_size() for tensor in tensors.values())


def _tensors(weights: DecoderWeights) -> Iterator[Tensor]:
    yield from (weights.embedding, weights.norm, weights.lm_head)
    for layer in weights.layers:
        yield from (layer.input_norm, layer.qkv, layer.out, layer.mlp_norm)
        dense = layer.mlp
        if isinstance(dense, Experts):
            yield from (dense.router, dense.gate_up, dense.down)
            dense = dense.shared
        yield from dense
