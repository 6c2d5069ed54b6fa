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

from .config import DecoderConfig, LayerConfig, Share
from .families import Family


class Dense(NamedTuple):
    """``down(silu(gate(x)) * up(x))``: ``gate_up`` ``[H, 2I]``, gate first, and ``down`` ``[I, H]``."""

    gate_up: Tensor
    down: Tensor


class Experts(NamedTuple):
    """``router`` ``[H, E]``, ``gate_up`` ``[E, H, 2I]``, ``down`` ``[E, I, H]``, and what all tokens share.

    ``every``: on a CPU, the same memory as one MLP: what is shared first, then the experts in turn.
    """

    router: Tensor
    gate_up: Tensor
    down: Tensor
    shared: Dense
    every: Dense | None


class LayerWeights(NamedTuple):
    """``qkv`` ``[H, Q]``, with pairs (2i, 2i + 1) rotating together; ``out`` ``[N * W, H]``; two norms ``[H]``."""

    input_norm: Tensor
    qkv: Tensor
    out: Tensor
    mlp_norm: Tensor
    mlp: Dense | Experts


class DecoderWeights(NamedTuple):
    """``embedding`` ``[V, H]``, ``lm_head`` ``[V, H]`` and ``norm`` ``[H]``.

    The LM head may be the embedding; where it is not, and this is a share, it has the rows of that share, or all of them.
    """

    embedding: Tensor
    layers: tuple[LayerWeights, ...]
    norm: Tensor
    lm_head: Tensor


class Part(NamedTuple):
    """What of a stored tensor goes into ``view``: its ``cut``, a slice of each dimension, in the same order."""

    view: Tensor
    cut: tuple[slice, ...]


class Place(NamedTuple):
    """Where a stored tensor of ``shape`` goes, as far as it is wanted; of those of three dimensions all of the first is."""

    shape: tuple[int, ...]
    parts: tuple[Part, ...]


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
        inner, router = layer.width, matrix(hidden, count)
        if device.type == "cpu":
            gate_ups, downs = empty(hidden, 1 + count, 2 * inner), empty(1 + count, inner, hidden)
            shared, every = Dense(gate_ups[:, 0], downs[0]), Dense(gate_ups.flatten(1), downs.flatten(0, 1))
            return Experts(router, gate_ups[:, 1:].transpose(0, 1), downs[1:], shared, every)
        return Experts(router, matrix(count, hidden, 2 * inner), matrix(count, inner, hidden), dense(inner), None)

    def decoder_layer(layer: LayerConfig) -> LayerWeights:
        qkv, out = matrix(hidden, width + config.stored_width), matrix(width, hidden)
        return LayerWeights(empty(hidden), qkv, out, empty(hidden), mlp(layer))

    embedding = empty(config.vocab_size, hidden)
    layers = tuple(decoder_layer(layer) for layer in config.layers)
    rows = config.vocab_size if config.whole_head else config.vocab_size // config.share.size
    lm_head = embedding if config.tied else empty(rows, hidden)
    return DecoderWeights(embedding, layers, empty(hidden), lm_head)


def places(weights: DecoderWeights, config: DecoderConfig, family: Family) -> dict[str, Place]:
    """Where everything goes, by the names of a text-only checkpoint."""
    named = {"model.embed_tokens.weight": _whole(weights.embedding), "model.norm.weight": _whole(weights.norm)}
    if weights.lm_head is not weights.embedding:
        lm_head = weights.lm_head
        named["lm_head.weight"] = _whole(lm_head) if config.whole_head else _dealt(lm_head, 0, config.share)
    for index, layer in enumerate(weights.layers):
        prefix = f"model.layers.{index}"
        named |= {f"{prefix}.{name}": place for name, place in _layer_places(layer, config, family)}
    return named


def _layer_places(layer: LayerWeights, config: DecoderConfig, family: Family) -> Iterator[tuple[str, Place]]:
    share = config.share
    yield "input_layernorm.weight", _whole(layer.input_norm)
    yield "post_attention_layernorm.weight", _whole(layer.mlp_norm)
    yield "self_attn.o_proj.weight", _dealt(layer.out.t(), 1, share)
    stored = config.stored_width // 2
    query, key, value = layer.qkv.t().split([config.query_width, stored, stored])
    yield "self_attn.q_proj.weight", _rotating(query, config, family)
    yield "self_attn.k_proj.weight", _rotating(key, config, family)
    yield "self_attn.v_proj.weight", _dealt(value, 0, share)
    mlp = layer.mlp
    if isinstance(mlp, Dense):
        yield from _dense_places(mlp, family.mlp, share)
        return
    yield f"{family.mlp}.router.weight", _whole(mlp.router.t())
    yield f"{family.mlp}.experts.gate_up_proj", _dealt_halves(mlp.gate_up, share)
    yield f"{family.mlp}.experts.down_proj", _dealt(mlp.down, 1, share)
    yield from _dense_places(mlp.shared, f"{family.mlp}.shared_expert", share)


def _dense_places(mlp: Dense, name: str, share: Share) -> Iterator[tuple[str, Place]]:
    gate, up = mlp.gate_up.t().chunk(2)
    yield f"{name}.gate_proj.weight", _dealt(gate, 0, share)
    yield f"{name}.up_proj.weight", _dealt(up, 0, share)
    yield f"{name}.down_proj.weight", _dealt(mlp.down.t(), 1, share)


def _whole(tensor: Tensor) -> Place:
    return Place(tuple(tensor.shape), (Part(tensor, (slice(None),) * tensor.ndim),))


def _dealt(tensor: Tensor, dim: int, share: Share) -> Place:
    """Of what is stored ``tensor`` is one share along ``dim``."""
    shape, cut = list(tensor.shape), [slice(None)] * tensor.ndim
    shape[dim] *= share.size
    cut[dim] = share.of(shape[dim])
    return Place(tuple(shape), (Part(tensor, tuple(cut)),))


def _dealt_halves(tensor: Tensor, share: Share) -> Place:
    """The last dimension holds gate and up, of each of which ``tensor`` has one share."""
    if share.size == 1:
        return _whole(tensor)  # in one piece
    *others, inner = tensor.shape
    half = inner // 2 * share.size
    own, before = share.of(half), (slice(None),) * len(others)
    gate, up = tensor.chunk(2, -1)
    cuts = (*before, own), (*before, slice(half + own.start, half + own.stop))
    return Place((*others, 2 * half), (Part(gate, cuts[0]), Part(up, cuts[1])))


def _rotating(tensor: Tensor, config: DecoderConfig, family: Family) -> Place:
    """Row i of a head's first half belongs beside row i of its second."""
    place = _dealt(tensor, 0, config.share)
    if not family.halves:
        return place
    view = tensor.unflatten(0, (-1, config.head_dim // 2, 2)).transpose(1, 2)
    return Place(place.shape, (Part(view, place.parts[0].cut),))


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
