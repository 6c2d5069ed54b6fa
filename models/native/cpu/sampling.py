"""Draws on a CPU in one call each, where a vocabulary is short and a dozen small operations take longer than the sums.

    id_1, q_D = draw(logits_D, temperature=0.7, uniform_1=uniform[:1])

Their plain reference is eval/sampling.py, which also says where they are used.

Shapes: K drafted tokens, D draft vocabulary, V vocabulary.
"""

from __future__ import annotations

import functools
from ctypes import byref, c_int64

import torch
from torch import Tensor

from .compiler import Compiled, Unavailable, load_compiled


@functools.cache
def _built() -> Compiled | None:
    try:
        return load_compiled()
    except Unavailable:
        return None


def suits(logits: Tensor) -> bool:
    """Whether ``logits`` can be drawn from here: float32 on a CPU, one behind the other, and there is a compiler."""
    return (
        logits.device.type == "cpu"
        and logits.dtype == torch.float32
        and logits.is_contiguous()
        and _built() is not None
    )


def draw(logits_D: Tensor, temperature: float, uniform_1: Tensor) -> tuple[Tensor, Tensor]:
    """A token ``[1]`` at ``temperature`` > 0 for a float64 number in [0, 1), and the probabilities ``[D]`` it was drawn from."""
    built, q_D, id_1 = _built(), torch.empty_like(logits_D), torch.empty(1, dtype=torch.long)
    assert built is not None
    built.functions.eagle3_draw(
        logits_D.data_ptr(), len(q_D), temperature, uniform_1.data_ptr(), q_D.data_ptr(), id_1.data_ptr()
    )
    return id_1, q_D


def accept(
    logits: Tensor,
    tokens_K: Tensor,
    temperature: float,
    uniform: Tensor,
    kept: float,
    drawn: tuple[Tensor, Tensor, Tensor] | None,
) -> tuple[int, int]:
    """How many of a chain's tokens are accepted, and the token that follows them.

    Args:
        logits: the target's, ``[K + 1, V]``.
        tokens_K: target ids.
        temperature: above 0.
        uniform: ``[K + 1]`` float64 numbers in [0, 1).
        kept: the weight that a rejected token keeps, of its probability.
        drawn: draft ids ``[K]``, the probabilities ``[K or more, D]`` that they were drawn from, and the draft vocabulary's
            target ids ``[D]``; None: they were chosen greedily.
    """
    built, added = _built(), c_int64()
    assert built is not None
    ids = probabilities = vocabulary = None
    reach = 0
    if drawn is not None:
        ids, probabilities, vocabulary = (tensor.data_ptr() for tensor in drawn)
        reach = drawn[1].shape[1]
    accepted = built.functions.eagle3_accept(
        logits.data_ptr(), len(tokens_K), logits.shape[1], temperature, tokens_K.data_ptr(), ids, probabilities, reach,
        vocabulary, uniform.data_ptr(), kept, byref(added),
    )  # fmt: skip
    return accepted, added.value
