"""What the hardware does to numbers and NumPy does not."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray


def to_integer(value: NDArray[Any], dtype: str, rounding: str) -> NDArray[Any]:
    """As the hardware has it: what does not fit becomes the nearest that does, NaN 0 or, in 64 bits, the lowest."""
    limits = np.iinfo(dtype)
    whole = {"rzi": np.trunc, "rni": np.rint}[rounding](np.asarray(value, np.float64))
    clipped = np.clip(whole, float(limits.min), float(limits.max))
    result = np.where(np.isfinite(clipped), clipped, 0).astype(dtype)
    result = np.where(whole >= float(limits.max), limits.max, result)
    return np.where(np.isnan(whole), limits.min if limits.bits == 64 else 0, result).astype(dtype)


def from_bf16(bits: NDArray[Any]) -> NDArray[Any]:
    """The float32 numbers whose upper halves these are."""
    return (np.asarray(bits, np.uint32) << np.uint32(16)).view(np.float32)


def to_bf16(value: NDArray[Any]) -> NDArray[Any]:
    """The upper halves of float32 numbers, rounded to the nearest, of two as near to the even one; NaN stays NaN."""
    bits = np.asarray(value, np.float32).view(np.uint32)
    rounded = bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1)) >> np.uint32(16)
    return np.where(np.isnan(value), np.uint32(0x7FFF), rounded).astype(np.uint16)


def high_product(a: NDArray[Any], b: NDArray[Any]) -> NDArray[Any]:
    """The upper 64 bits of a product of two unsigned 64-bit numbers."""
    low, half = np.uint64(0xFFFFFFFF), np.uint64(32)
    middle = (a >> half) * (b & low) + ((a & low) * (b & low) >> half)
    other = (a & low) * (b >> half) + (middle & low)
    return (a >> half) * (b >> half) + (middle >> half) + (other >> half)


def trunc_divide(a: NDArray[Any], b: NDArray[Any]) -> NDArray[Any]:
    """Integers divided towards zero."""
    quotient = a // b
    return quotient + ((quotient < 0) & (quotient * b != a)).astype(quotient.dtype)
