"""The training path for GPUs: Triton kernels and what holds them together, each beside a plain reference.

    fused = kernels.chosen(draft)          # the module ``fused`` of this package, or None: compute plainly
    fused.rollout(draft, embedding, batch, steps) if fused else ...

Nothing here is imported before it is needed: Triton is there only on Linux, and of use only with CUDA.

| module     | what it computes                                             | plain reference                 |
|------------|--------------------------------------------------------------|---------------------------------|
| `norms`    | RMSNorms: of hidden states, of gathered embeddings, in place of a concatenation | `draft.RMSNorm` |
| `pointwise`| rotation into heads; SwiGLU                                  | `draft.Eagle3Draft`             |
| `attention`| causal attention to step-0 keys and to a row's own later ones | `rollout.AttendPast` and merging |
| `losses`   | the teacher's sums over V; losses with their gradients over D | `train.objective`              |
| `fused`    | the rollout and the losses, made of these                    | `rollout`, `train.objective`    |
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from ..draft import Eagle3Draft

if TYPE_CHECKING:
    from types import ModuleType

_asked: ContextVar[bool | None] = ContextVar("asked", default=None)
DTYPES = ("float32", "bfloat16", "float16")


def chosen(draft: Eagle3Draft) -> ModuleType | None:
    """The kernels that ``draft`` is trained with, or None: the plain path.

    On a GPU that cannot use them, a warning says once why not.
    """
    if (asked := _asked.get()) is not None:
        return load() if asked else None
    if draft.norm.weight.device.type != "cuda":
        return None
    if reason := refusal(draft):
        _warn(reason)
        return None
    return load()


@contextmanager
def using(wanted: bool) -> Iterator[None]:
    """Inside, compute with the kernels, or without them, whatever the device: for tests and benchmarks."""
    token = _asked.set(wanted)
    try:
        yield
    finally:
        _asked.reset(token)


def refusal(draft: Eagle3Draft) -> str | None:
    """Why the kernels cannot train ``draft``, or None."""
    width, dtype = draft.config.head_dim, str(draft.fc.weight.dtype).removeprefix("torch.")
    if find_spec("triton") is None:
        return "Triton is not installed; install eagle3[gpu]"
    if not fits(width):
        return f"draft.head_dim = {width} is not a power of two from 16 on"
    if dtype not in DTYPES:
        return f"there is no kernel for {dtype}"
    if not draft.fc.weight.numel():
        return "ZeRO's stage 3 shards the head; stages 0 to 2 do not"
    return None


def fits(width: int) -> bool:
    """Whether there are kernels for heads of that width."""
    return width >= 16 and not width & (width - 1)


def load() -> Any:
    """The module ``fused``, wherever it is to run."""
    return import_module(".fused", __name__)


@cache
def _warn(reason: str) -> None:
    warnings.warn(f"training without Triton's kernels, many times slower: {reason}", stacklevel=3)
