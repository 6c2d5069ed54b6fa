"""FP8 with scales: what comes back is as near as E4M3 allows, and a token takes the bytes that are promised."""

from __future__ import annotations

import pytest
import torch
from eagle3.data.quantise import E4M3, LARGEST, decode, dequantise, encode, quantise


def states() -> torch.Tensor:
    """Vectors of very different sizes, ``[T, F, H]``, one of them with an outlier as hidden states have them."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(50, 3, 64, generator=generator) * 10.0 ** torch.randint(-6, 5, (50, 3, 1), generator=generator)
    drawn[7, 1, 9] *= 1000
    return drawn


def test_what_comes_back_is_within_the_bound() -> None:
    x = states()
    values, scale = quantise(x)
    assert (values.dtype, values.shape, scale.dtype, scale.shape) == (E4M3, x.shape, torch.float32, (50, 3))
    largest = x.abs().amax(-1, keepdim=True)
    bound = torch.maximum(x.abs() * 2**-4, largest / LARGEST * 2**-10)
    assert ((values.float() * scale[..., None] - x).abs() <= bound * (1 + 1e-5)).all()
    back = dequantise(values, scale)
    assert back.dtype == torch.bfloat16
    assert ((back.float() - x).abs() <= bound * (1 + 1e-5) + x.abs() * 1.07 * 2**-9 + 1e-30).all()


def test_each_vector_has_its_own_scale() -> None:
    x = states()
    whole, _ = quantise(x)
    for token, layer in ((0, 0), (7, 1), (49, 2)):
        alone, scale = quantise(x[token, layer])
        assert alone.float().equal(whole[token, layer].float())
        torch.testing.assert_close(scale * LARGEST, x[token, layer].abs().max())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_ends_of_the_range(dtype: torch.dtype) -> None:
    for size in (0.0, 1e-30, 1e38):
        x = torch.tensor([size, -size, size / 2, 0.0], dtype=dtype)
        back = dequantise(*quantise(x))
        assert back.isfinite().all()
        torch.testing.assert_close(back.float(), x.float(), rtol=0.01, atol=0)


def test_quantising_again_changes_nothing() -> None:
    once = dequantise(*quantise(states()))
    values, scale = quantise(once)
    torch.testing.assert_close(dequantise(values, scale), once, rtol=2**-4, atol=0)
    assert quantise(states())[0].float().equal(quantise(states())[0].float())


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_other_dtypes_are_stored_as_they_are(dtype: str) -> None:
    tensors = encode("features", states(), dtype)
    assert list(tensors) == ["features"]
    assert decode("features", tensors) is tensors["features"]
    assert tensors["features"].equal(states().to(getattr(torch, dtype)))


@pytest.mark.parametrize(
    ("features", "last_hidden", "expected"),
    [
        ("bfloat16", "bfloat16", 40_960),
        ("float8_e4m3fn", "bfloat16", 25_612),
        ("float8_e4m3fn", "float8_e4m3fn", 20_496),
    ],
)
def test_bytes_a_token_of_maverick(features: str, last_hidden: str, expected: int) -> None:
    stored = (
        encode("features", torch.zeros(1, 3, 5120), features),
        encode("last_hidden", torch.zeros(1, 5120), last_hidden),
    )
    assert sum(tensor.nbytes for tensors in stored for tensor in tensors.values()) == expected
