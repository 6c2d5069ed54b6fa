"""The arithmetic of a decoder with products of few rows compiled: each by whichever way was measured faster at load.

Shape suffixes: T tokens, I inputs, O outputs, H hidden.
"""

from __future__ import annotations

import functools
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..cache import Cache
from ..config import DecoderConfig
from ..operations import Matrix, Operations
from ..sights import Blocks, Sight
from ..weights import Dense, Experts
from .compiler import Compiled, Unavailable, load_compiled

#: Numbers of a matrix, up to which it is packed: a larger one is worth several threads.
SMALL = 1 << 20
#: For which numbers of rows both ways are timed; with more it is torch's.
ROWS = (1, 2, 4, 6, 8, 16, 32, 64)
#: Matrices of a shape that are timed in turn, so that none is in the nearest cache; and how often.
MEMBERS, REPEATS = 8, 5


class Fast(NamedTuple):
    """A packed matrix, MLP or layer of experts: the function ``run(x, y)``, its shape, and the most rows it is used for."""

    run: Callable[[Tensor, Tensor], None]
    outputs: int
    shape: tuple[int, ...]
    most: int
    packed: tuple[Tensor, ...]


class CompiledOperations(Operations):
    """Plain torch, but for products of few rows, norms and attention to a cache included.

    Args:
        config: the decoder's.
        built: the compiled functions.
    """

    def __init__(self, config: DecoderConfig, built: Compiled) -> None:
        super().__init__(config, torch.device("cpu"))
        self.built = built
        self._functions = built.functions
        queries = config.query_width
        self._attends = not config.head_dim % self._functions.eagle3_lanes() and config.hidden_size * queries <= SMALL
        self._fast: dict[int, Fast] = {}
        self._held: list[Matrix] = []  # whose numbers are the keys above

    @property
    def described(self) -> str:
        """See :class:`Operations`."""
        return f"compiled products, {self.built.isa}"

    def prepare(self, matrices: Iterable[Matrix]) -> None:
        """See :class:`Operations`: pack what is small, and time each shape beside plain torch, both in one thread."""
        kinds: dict[tuple[int, ...], list[tuple[Matrix, Fast]]] = defaultdict(list)
        for matrix in filter(_small, matrices):
            fast = self._packed(matrix)
            kinds[fast.shape].append((matrix, fast))
        for members in kinds.values():
            with one_thread():
                most = self._most_rows(members[:MEMBERS])
            for matrix, fast in members:
                if most:
                    self._fast[id(matrix)] = fast._replace(most=most)
                    self._held.append(matrix)

    def norm(self, x_TH: Tensor, weight_H: Tensor) -> Tensor:
        """See :class:`Operations`."""
        rows, hidden = x_TH.shape
        if rows > ROWS[-1] or not x_TH.is_contiguous():
            return super().norm(x_TH, weight_H)
        y_TH = torch.empty_like(x_TH)
        eps = self.config.rms_norm_eps
        self._functions.eagle3_norm(x_TH.data_ptr(), rows, hidden, weight_H.data_ptr(), eps, y_TH.data_ptr())
        return y_TH

    def look(self, qkv: Tensor, sight: Sight, index: int, cache: Cache | None) -> Tensor:
        """See :class:`Operations`."""
        if isinstance(sight, Blocks) or cache is None or not self._attends or len(qkv) > ROWS[-1]:
            return super().look(qkv, sight, index, cache)
        heads, stored, width = self._heads
        y = qkv.new_empty(len(qkv), heads * width)
        mask = None if sight.mask is None else sight.mask.data_ptr()
        layer = cache.layers[index].data_ptr()
        self._functions.eagle3_attend(
            qkv.data_ptr(),
            len(qkv),
            qkv.stride(0),
            heads,
            stored,
            width,
            layer,
            sight.start,
            sight.end,
            mask,
            y.data_ptr(),
        )
        return y

    def linear(self, x_TI: Tensor, weight_IO: Tensor) -> Tensor:
        """See :class:`Operations`."""
        fast = self._fast.get(id(weight_IO))
        if fast is None or x_TI.shape[0] > fast.most:
            return super().linear(x_TI, weight_IO)
        y_TO = x_TI.new_empty(x_TI.shape[0], fast.outputs)
        fast.run(x_TI, y_TO)
        return y_TO

    def add_linear(self, y_TO: Tensor, x_TI: Tensor, weight_IO: Tensor) -> Tensor:
        """See :class:`Operations`."""
        fast = self._fast.get(id(weight_IO))
        if fast is None or x_TI.shape[0] > fast.most or not y_TO.is_contiguous():
            return super().add_linear(y_TO, x_TI, weight_IO)
        self._product(x_TI, y_TO, fast.packed[0], add=True)
        return y_TO

    def mlp(self, x_TH: Tensor, weights: Dense) -> Tensor:
        """See :class:`Operations`."""
        fast = self._fast.get(id(weights))
        if fast is None or x_TH.shape[0] > fast.most:
            return super().mlp(x_TH, weights)
        y_TH = x_TH.new_empty(x_TH.shape)
        fast.run(x_TH, y_TH)
        return y_TH

    def experts(self, x_TH: Tensor, weights: Experts) -> Tensor:
        """See :class:`Operations`."""
        fast = self._fast.get(id(weights))
        if fast is None or x_TH.shape[0] > fast.most:
            return super().experts(x_TH, weights)
        y_TH = x_TH.new_empty(x_TH.shape)
        fast.run(x_TH, y_TH)
        return y_TH

    def _packed(self, matrix: Matrix) -> Fast:
        if isinstance(matrix, Dense):
            return self._packed_mlp(matrix)
        if isinstance(matrix, Experts):
            return self._packed_experts(matrix)
        packed = self._pack(matrix)
        return Fast(
            lambda x, y: self._product(x, y, packed, add=False), matrix.shape[1], tuple(matrix.shape), 0, (packed,)
        )

    def _packed_mlp(self, weights: Dense) -> Fast:
        (hidden, both), inner = weights.gate_up.shape, weights.down.shape[0]
        packed = self._pack(weights.gate_up), self._pack(weights.down)
        run = _calling(self._functions.eagle3_mlp, (hidden, inner), packed)
        return Fast(run, hidden, (hidden, both, inner), 0, packed)

    def _packed_experts(self, weights: Experts) -> Fast:
        (hidden, count), inner, top_k = weights.router.shape, weights.down.shape[1], self.config.top_k
        packed = (
            self._pack(weights.router),
            self._pack(weights.shared.gate_up),
            self._pack(weights.shared.down),
            torch.cat([self._pack(gate_up) for gate_up in weights.gate_up]),
            torch.cat([self._pack(down) for down in weights.down]),
        )
        run = _calling(self._functions.eagle3_experts, (hidden, inner, count, top_k), packed)
        return Fast(run, hidden, (hidden, count, inner, top_k), 0, packed)

    def _pack(self, weight_IO: Tensor) -> Tensor:
        inputs, outputs = weight_IO.shape
        packed = weight_IO.new_empty(self._functions.eagle3_packed_size(inputs, outputs))
        self._functions.eagle3_pack(weight_IO.data_ptr(), *weight_IO.stride(), inputs, outputs, packed.data_ptr())
        return packed

    def _product(self, x: Tensor, y: Tensor, packed: Tensor, add: bool) -> None:
        x = x.contiguous()
        rows, inputs = x.shape
        self._functions.eagle3_product(
            x.data_ptr(), rows, inputs, y.shape[1], packed.data_ptr(), y.data_ptr(), int(add)
        )

    def _most_rows(self, members: Sequence[tuple[Matrix, Fast]]) -> int:
        """Rows up to which the compiled way is the faster one for matrices of this shape."""
        most = 0
        for rows in ROWS:
            x, y = torch.randn(rows, members[0][1].shape[0]), torch.empty(rows, members[0][1].outputs)

            def by_torch(x: Tensor = x) -> None:
                for matrix, _ in members:
                    if isinstance(matrix, Dense):
                        Operations.mlp(self, x, matrix)
                    elif isinstance(matrix, Experts):
                        Operations.experts(self, x, matrix)
                    else:
                        Operations.linear(self, x, matrix)

            def compiled(x: Tensor = x, y: Tensor = y) -> None:
                for _, fast in members:
                    fast.run(x, y)

            if _seconds(compiled) > _seconds(by_torch):
                break
            most = rows
        return most


def _calling(function: Any, sizes: tuple[int, ...], packed: tuple[Tensor, ...]) -> Callable[[Tensor, Tensor], None]:
    """``function`` of rows x, their sizes, the packed weights and the results y; the caller keeps the weights alive."""
    pointers = [tensor.data_ptr() for tensor in packed]

    def run(x: Tensor, y: Tensor) -> None:
        x = x.contiguous()
        function(x.data_ptr(), x.shape[0], *sizes, *pointers, y.data_ptr())

    return run


def _small(matrix: Matrix) -> bool:
    if isinstance(matrix, Experts):
        return _small(matrix.shared)
    return (matrix.gate_up if isinstance(matrix, Dense) else matrix).numel() <= SMALL


@contextmanager
def one_thread() -> Iterator[None]:
    """Torch computes in one thread meanwhile, as it does for models whose matrices are small."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _seconds(work: Callable[[], None]) -> float:
    found = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        work()
        found.append(time.perf_counter() - started)
    return min(found)


@functools.cache
def _say(reason: str) -> None:
    """Once a process: without compiled products everything is right, and slower."""
    print(f"products of few rows are left to torch, which is slower: {reason}", file=sys.stderr, flush=True)


def make_operations(config: DecoderConfig, device: torch.device, dtype: torch.dtype) -> Operations:
    """Compiled where that can be had and may pay: float32 on a CPU, and a compiler; else plain torch."""
    if device.type == "cpu" and dtype == torch.float32:
        try:
            return CompiledOperations(config, load_compiled())
        except Unavailable as reason:
            _say(str(reason))
    return Operations(config, device)
