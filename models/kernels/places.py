"""Supervised rows in tiles, so that a program of the attention's kernels has rows of one document.

    places = place(sample, row, keys=S, samples=B)

A tile holds up to ``TILE`` rows of a document, in its order, whatever their order in the flat list.

Shape suffixes: B samples, S keys of a sample, n rows of the flat list, P places in tiles.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

TILE = 128


class Places(NamedTuple):
    """Where supervised rows stand. Tiles of a document follow each other; those behind the last one are empty."""

    ends: Tensor  # [n] int32: one past the last key that a row of the flat list sees, in its document
    slots: Tensor  # [P] int32: places in tiles to places in the flat list, -1 where there is none
    tile_start: Tensor  # [tiles] int32: first key of the tile's document
    tile_end: Tensor  # [tiles] int32: the largest of its rows' ends, 0 in an empty tile
    first_tile: Tensor  # [B, key blocks] int32: the first tile that sees a block of TILE keys
    last_tile: Tensor  # [B] int32: one past the document's last tile
    keys: int


def place(sample_n: Tensor, row_n: Tensor, keys: int, samples: int) -> Places:
    """Tiles for the rows ``row [n]`` of documents ``sample [n]``, of ``keys`` keys each; nothing waits for the device."""
    n, device = len(row_n), row_n.device
    order = (sample_n * keys + row_n).argsort()
    sample, row = sample_n[order], row_n[order]
    counts = torch.zeros(samples, dtype=torch.int64, device=device).index_add_(0, sample, torch.ones_like(sample))
    tiles_B = (counts + TILE - 1) // TILE
    last_tile = tiles_B.cumsum(0)
    before = counts.cumsum(0) - counts
    where = (last_tile - tiles_B)[sample] * TILE + torch.arange(n, device=device) - before[sample]
    total = n // TILE + samples  # no fewer than there are
    slots = torch.full((total * TILE,), -1, dtype=torch.int32, device=device)
    slots[where] = order.int()
    tile = where // TILE
    owner = torch.full((total,), samples, dtype=torch.int64, device=device)
    owner[tile] = sample
    tile_end = torch.zeros(total, dtype=torch.int64, device=device).scatter_reduce_(0, tile, row + 1, "amax")
    blocks = torch.arange(0, keys, TILE, device=device)
    documents = torch.arange(samples, device=device)
    far = keys + 1  # orders tiles by document, then by end
    first_tile = torch.searchsorted(owner * far + tile_end, documents[:, None] * far + blocks, right=True)
    return Places(
        (row_n + 1).int(),
        slots,
        (owner * keys).int(),
        tile_end.int(),
        first_tile.int(),
        last_tile.int(),
        keys,
    )
