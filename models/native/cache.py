"""Keys and values of one sequence, in memory that is taken once: rolling back is moving a number.

    cache.length                  # tokens so far
    cache.rollback(length)        # forget those from there on
    cache.keep(path)              # of a tree that was verified: the nodes of the accepted path, root first

Every layer keeps every position, those that a chunked layer no longer sees too: a rejected draft that crossed a chunk
boundary may need them again.

Shapes: S positions, M key/value heads, W head width, T new tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .config import DecoderConfig


class Cache:
    """Room for ``capacity`` tokens. A token stands at the index of its position.

    The nodes of a tree stand behind the others in their own order, until :meth:`keep` puts those of a path into place.

    Args:
        config: the decoder's.
        capacity: most tokens, those of a tree that is being verified included.
        like: a tensor of the decoder's numerics and device.
    """

    def __init__(self, config: DecoderConfig, capacity: int, like: Tensor) -> None:
        self.capacity, self.length = capacity, 0
        #: Per layer ``[S, 2 * M * W]``: of a token first its keys, then its values.
        self.stored = like.new_zeros(len(config.layers), capacity, config.stored_width)
        heads = self.stored.unflatten(-1, (2, config.num_kv_heads, config.head_dim)).permute(2, 0, 3, 1, 4)
        #: Per layer ``[1, M, S, W]``, views of ``stored``.
        self.keys = [layer[None] for layer in heads[0]]
        self.values = [layer[None] for layer in heads[1]]
        self.layers = list(self.stored)
        self._places = torch.arange(capacity, device=like.device)
        self._nodes = 0

    def claim(self, new: int, *, tree: bool) -> Tensor:
        """The places ``[T]`` of ``new`` tokens; they count at once, but a tree's only when they are kept.

        Raises:
            ValueError: there is no room for them, or a tree is still to be settled.
        """
        if self._nodes:
            raise ValueError("a tree was verified and none of its paths was kept")
        if self.length + new > self.capacity:
            raise ValueError(f"{self.length} + {new} tokens do not fit a cache of {self.capacity}")
        places_T = self._places.narrow(0, self.length, new)
        if tree:
            self._nodes = new
        else:
            self.length += new
        return places_T

    def rollback(self, length: int) -> None:
        """Forget the tokens from ``length`` on, and any tree that was not kept.

        Raises:
            ValueError: there are not as many.
        """
        if not 0 <= length <= self.length:
            raise ValueError(f"cannot roll a cache of {self.length} tokens back to {length}")
        self.length, self._nodes = length, 0

    def keep(self, path_T: Tensor) -> None:
        """Of the tree that was verified last keep a path: its nodes' indices ``[T]``, root first, on any device.

        Raises:
            ValueError: there was no such tree.
        """
        count = len(path_T)
        if count > self._nodes:
            raise ValueError(f"a path of {count} nodes in a tree of {self._nodes}")
        from_T = path_T.to(self.stored.device, non_blocking=True) + self.length
        # Gathered before it is written: the places of a path's end may be among those it goes to.
        self.stored[:, self.length : self.length + count] = self.stored.index_select(1, from_T)
        self.length, self._nodes = self.length + count, 0


def cache_bytes(config: DecoderConfig, capacity: int, itemsize: int) -> int:
    """The memory that a cache takes."""
    return len(config.layers) * capacity * config.stored_width * itemsize
