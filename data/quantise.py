"""How states are stored: as they are in bfloat16 or float32, or in FP8 with a scale per token and layer.

    tensors = encode("features", features, "float8_e4m3fn")    # {"features": e4m3 [T, F, H], "features_scale": [T, F]}
    decode("features", tensors)                                # bfloat16 [T, F, H]

E4M3 has 3 bits of mantissa, its largest value is 448 and its smallest normal one 2**-6. A vector x of H values with the
largest magnitude a is divided by its scale a / 448 and rounded to the nearest; what comes back differs from x by at most
``max(|x| * 2**-4, a / 448 * 2**-10)``, before bfloat16 rounds it by 2**-9 of itself.

Shapes: T tokens, F captured layers, H hidden.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

E4M3 = torch.float8_e4m3fn
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float8_e4m3fn": E4M3}
LARGEST = torch.finfo(E4M3).max
SMALLEST_SCALE = torch.finfo(torch.float32).tiny
SCALE = "{name}_scale"
#: Every code's value: looking it up is several times as fast as a CPU's cast.
VALUES = torch.arange(256, dtype=torch.uint8).view(E4M3).float()
#: Values decoded at once: in float32, they stay in a core's cache, or are enough work for a GPU.
CHUNK, CHUNK_CUDA = 1 << 16, 1 << 24


def encode(name: str, states: Tensor, dtype: str) -> dict[str, Tensor]:
    """``states`` ``[..., H]`` as tensors to store, on their device: under ``name``, and where ``dtype`` needs it a scale."""
    if DTYPES[dtype] is not E4M3:
        return {name: states.to(DTYPES[dtype])}
    values, scale = quantise(states)
    return {name: values, SCALE.format(name=name): scale}


def decode(name: str, tensors: Mapping[str, Tensor]) -> Tensor:
    """What :func:`encode` stored under ``name``: the tensor itself, or a bfloat16 copy of one in FP8."""
    scale = tensors.get(SCALE.format(name=name))
    return tensors[name] if scale is None else dequantise(tensors[name], scale)


def quantise(states: Tensor) -> tuple[Tensor, Tensor]:
    """E4M3 values ``[..., H]`` and float32 scales ``[...]``, one per vector of H."""
    exact = states.float()
    scale = (exact.abs().amax(-1) / LARGEST).clamp_min(SMALLEST_SCALE)
    # A quotient may round above the largest value, which not every device's cast saturates.
    return (exact / scale[..., None]).clamp_(-LARGEST, LARGEST).to(E4M3), scale


def dequantise(values: Tensor, scale: Tensor) -> Tensor:
    """``values [..., H] * scale [...]``, taken in float32, as bfloat16 ``[..., H]``."""
    out = torch.empty_like(values, dtype=torch.bfloat16)
    rows, scales, into = values.reshape(-1, values.shape[-1]), scale.reshape(-1, 1), out.view(-1, values.shape[-1])
    count = max(1, (CHUNK_CUDA if values.is_cuda else CHUNK) // values.shape[-1])
    for chunk, by, place in zip(rows.split(count), scales.split(count), into.split(count), strict=True):
        place.copy_(_widened(chunk).mul_(by))
    return out


def codes(tensor: Tensor) -> Tensor:
    """A tensor in FP8 as bytes, which are copied faster; any other as it is."""
    return tensor.view(torch.uint8) if tensor.dtype is E4M3 else tensor


def _widened(values: Tensor) -> Tensor:
    """E4M3 as float32."""
    if values.is_cuda:
        return values.float()
    return VALUES.index_select(0, codes(values).flatten().int()).view(values.shape)


def dtype_name(tensor: Tensor) -> str:
    """What a manifest calls the dtype of ``tensor``."""
    return str(tensor.dtype).removeprefix("torch.")
