"""Who holds memory when: every storage that operations make, from when it is made until nobody has it any more.

    ledger = Ledger({"SwiGLU.forward": "mlp"}, "rest")
    ledger.adopt("weights", parameters)             # what was there before
    with ledger:
        loss = forward()
        ledger.keep()                               # what is there now is for what its maker says; the rest was transient
        loss.backward()
    ledger.peaks()                                  # {"weights": ..., "mlp": ..., "rest": ..., "transient": ..., "all": ...}

Bytes are those that were asked for, on any device; what a library works with inside an operation is not seen.
"""

from __future__ import annotations

import sys
import weakref
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from torch import Tensor, UntypedStorage
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

TRANSIENT, ALL = "transient", "all"


class Ledger(TorchDispatchMode):
    """Counts storages that are made while it is entered, and those adopted.

    Args:
        makers: qualified names of functions, and what the tensors are for that they make; the innermost one counts.
        otherwise: what all others are for.
    """

    def __init__(self, makers: Mapping[str, str], otherwise: str) -> None:
        super().__init__()
        self._makers, self._otherwise = makers, otherwise
        self._held: list[_Held] = []
        self._purposes: list[str] = []
        self._alive: dict[int, int] = {}  # places in both, by the storage's address
        self._events: list[tuple[int, int]] = []  # a place, and the bytes that came or went

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """The operation's result, counted."""
        made = operation(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor) and (storage := tensor.untyped_storage())._cdata not in self._alive:
                self._count(storage, self._maker(), TRANSIENT)
        return made

    def adopt(self, purpose: str, tensors: Iterable[Tensor]) -> None:
        """Say what ``tensors`` are for, whoever made them."""
        for storage in (tensor.untyped_storage() for tensor in tensors):
            if (place := self._alive.get(storage._cdata)) is None:
                self._count(storage, purpose, purpose)
            else:
                self._purposes[place] = purpose

    def keep(self) -> dict[str, int]:
        """From here on, what is there is for what its maker says, unless it was adopted; returns the bytes of each."""
        found = Counter[str]()
        for place in self._alive.values():
            if self._purposes[place] == TRANSIENT:
                self._purposes[place] = self._held[place].maker
            found[self._purposes[place]] += self._held[place].size
        return dict(found)

    def peaks(self) -> dict[str, int]:
        """The most bytes of every purpose at any moment, and of ``all`` together."""
        now, most = Counter[str](), Counter[str]()
        for place, change in self._events:
            for name in (self._purposes[place], ALL):
                now[name] += change
                most[name] = max(most[name], now[name])
        return dict(most)

    def _count(self, storage: UntypedStorage, maker: str, purpose: str) -> None:
        key, place, size = storage._cdata, len(self._held), storage.nbytes()
        self._alive[key] = place
        self._held.append(_Held(size, maker))
        self._purposes.append(purpose)
        self._events.append((place, size))
        weakref.finalize(storage, self._gone, key)

    def _gone(self, key: int) -> None:
        place = self._alive.pop(key)
        self._events.append((place, -self._held[place].size))

    def _maker(self) -> str:
        frame = sys._getframe(2)
        while frame.f_back is not None:
            if (purpose := self._makers.get(frame.f_code.co_qualname)) is not None:
                return purpose
            frame = frame.f_back
        return self._otherwise


class _Held(NamedTuple):
    size: int
    maker: str
