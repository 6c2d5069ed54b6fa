"""Which keys the tokens of one forward see, said once for every kind of layer.

A position p sees q <= p, and in a layer of chunks only those with q // chunk == p // chunk. Documents that are packed
back to back see nothing of each other. A node of a tree sees all tokens before the tree, its ancestors, and itself.

No forward makes a mask of all its tokens by all its tokens: what starts at position 0 is cut into blocks that see
themselves causally, and what continues a cache is short.

Shapes: T new tokens, S keys.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .cache import Cache


class Blocks(NamedTuple):
    """Runs ``(start, end)`` of the new tokens; each sees itself, causally, and nothing else."""

    bounds: tuple[tuple[int, int], ...]


class Window(NamedTuple):
    """Keys ``start`` to ``end`` of the cache; ``mask`` ``[T, S]`` is added to the scores, None: all are seen."""

    start: int
    end: int
    mask: Tensor | None


Sight = Blocks | Window


class Step(NamedTuple):
    """One forward over T tokens.

    ``positions``: ``[T]``. ``places``: where they go in the cache, ``[T]``; None without a cache. ``sights``: by the
    layer's chunk. ``last``: no position is higher.
    """

    positions: Tensor
    places: Tensor | None
    sights: dict[int, Sight]
    last: int


def packed(lengths: Sequence[int], chunks: frozenset[int], device: torch.device) -> Step:
    """Documents of ``lengths`` tokens back to back, each from position 0, without a cache."""
    positions_T = torch.cat([torch.arange(length, device=device) for length in lengths])
    return Step(positions_T, None, {chunk: Blocks(tuple(_cut(lengths, chunk))) for chunk in chunks}, max(lengths) - 1)


def following(cache: Cache, new: int, chunks: frozenset[int], dtype: torch.dtype) -> Step:
    """``new`` tokens, one after the other, behind those in ``cache``, which takes them in."""
    base = cache.length
    places_T = cache.claim(new, tree=False)
    if base == 0:
        return Step(places_T, places_T, {chunk: Blocks(tuple(_cut([new], chunk))) for chunk in chunks}, new - 1)
    sights: dict[int, Sight] = {}
    for chunk in chunks:
        start = _start(base, chunk)
        mask = None
        if new > 1:
            # What is kept of the upper triangle are the keys behind a token.
            mask = torch.full((new, base + new - start), -torch.inf, dtype=dtype, device=places_T.device)
            mask.triu_(base - start + 1)
            if chunk and _start(base + new - 1, chunk) > start:
                keys_S = torch.arange(start, base + new, device=places_T.device)
                mask.masked_fill_(keys_S < _floor(places_T, chunk), -torch.inf)
        sights[chunk] = Window(start, base + new, mask)
    return Step(places_T, places_T, sights, base + new - 1)


def branching(cache: Cache, ancestors_TT: Tensor, chunks: frozenset[int], dtype: torch.dtype) -> Step:
    """A tree behind the tokens in ``cache``: row i of the mask is true for the ancestors of node i, and for itself."""
    base, new = cache.length, len(ancestors_TT)
    places_T = cache.claim(new, tree=True)
    ancestors_TT = ancestors_TT.to(places_T.device)
    positions_T = ancestors_TT.sum(1) + (base - 1)
    sights: dict[int, Sight] = {}
    for chunk in chunks:
        start = _start(base, chunk)
        before_TS = torch.ones(new, base - start, dtype=torch.bool, device=places_T.device)
        among_TT = ancestors_TT
        if chunk:
            floor_T1 = _floor(positions_T, chunk)
            before_TS = torch.arange(start, base, device=places_T.device) >= floor_T1
            among_TT = ancestors_TT & (positions_T >= floor_T1)
        sights[chunk] = Window(start, base + new, _added(torch.cat((before_TS, among_TT), 1), dtype))
    return Step(positions_T, places_T, sights, base + new - 1)


def _cut(lengths: Sequence[int], chunk: int) -> Iterator[tuple[int, int]]:
    """The documents, and each at its chunks' ends."""
    begin = 0
    for length in lengths:
        for start in range(0, length, chunk or length):
            yield begin + start, begin + min(length, start + (chunk or length))
        begin += length


def _start(position: int, chunk: int) -> int:
    """The first position that ``position`` sees."""
    return position - position % chunk if chunk else 0


def _floor(positions_T: Tensor, chunk: int) -> Tensor:
    return (positions_T - positions_T % chunk)[:, None]


def _added(seen_TS: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(seen_TS.shape, dtype=dtype, device=seen_TS.device).masked_fill_(~seen_TS, -torch.inf)
