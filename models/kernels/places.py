"""Supervised rows in tiles, so that a program of the attention's kernels has rows of one document.

    places = place(rows, layout, lengths)                      # once a batch

A tile holds up to ``TILE`` rows of a document, in its order, whatever their order in the flat list. A block is up to
``TILE`` keys of a document.

Shape suffixes: N tokens, B documents, n rows of the flat list, P places in tiles.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..rollout import Layout

TILE = 128


class Places(NamedTuple):
    """Where supervised rows and keys stand. Tiles and blocks of a document follow each other; the last may be empty."""

    ends: Tensor  # [n] int32: one past the last key that a row of the flat list sees, in its document
    slots: Tensor  # [P] int32: places in tiles to places in the flat list, -1 where there is none
    tile_start: Tensor  # [tiles] int32: first token of the tile's document
    tile_end: Tensor  # [tiles] int32: the largest of its rows' ends, 0 in an empty tile
    blocks: (
        Tensor  # [blocks, 5] int32: first key, first and one past the last token of its document, first and one past
    )
    # the last tile that sees it


def place(rows_n: Tensor, layout: Layout, lengths_B: Tensor) -> Places:
    """Tiles for the rows ``[n]`` of documents of ``lengths [B]``, and blocks for keys; nothing waits for the device."""
    n, tokens, samples, device = len(rows_n), len(layout.document), len(lengths_B), rows_n.device
    order = rows_n.argsort()
    sample, row = layout.document[rows_n[order]], layout.position[rows_n[order]]
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
    starts = torch.cat((layout.starts, layout.starts.new_zeros(1)))  # empty tiles are nobody's
    return Places(
        (layout.position[rows_n] + 1).int(),
        slots,
        starts[owner].int(),
        tile_end.int(),
        _blocks(layout, lengths_B, owner * (tokens + 1) + tile_end, last_tile, tokens).int(),
    )


def _blocks(layout: Layout, lengths_B: Tensor, tiles: Tensor, last_tile: Tensor, tokens: int) -> Tensor:
    """``Places.blocks``; ``tiles`` rises with document and end of a tile."""
    blocks_B = (lengths_B + TILE - 1) // TILE
    last_block = blocks_B.cumsum(0)
    number = torch.arange(tokens // TILE + len(lengths_B), device=lengths_B.device)  # no fewer than there are
    owner = torch.searchsorted(last_block, number, right=True).clamp_max(len(lengths_B) - 1)
    offset = (number - (last_block - blocks_B)[owner]) * TILE
    start = layout.starts[owner]
    end = start + lengths_B[owner]
    first = torch.searchsorted(tiles, owner * (tokens + 1) + offset, right=True)
    return torch.stack((start + offset, start, end, first, last_tile[owner]), 1)
