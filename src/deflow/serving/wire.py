"""The bytes that OpenPI's clients send and read: msgpack, in which an array is a map of its bytes, dtype and shape.

What comes in is data: numbers, text, lists and maps. Nothing of it is code, and no dtype but numbers is read.
"""

from __future__ import annotations

import math
import re
from typing import Any

import msgpack
import numpy as np

from deflow.errors import UserError

NUMBERS = re.compile(r"[<>|=]?(b1|[iu][1248]|f[248])")  # dtypes, as NumPy spells them
MOST_DIMENSIONS = 32
OF_MSGPACK = (ValueError, TypeError, OverflowError, msgpack.UnpackException)  # what it raises for garbage


def pack(value: Any) -> bytes:
    """A message that holds `value`: plain values, and arrays of numbers among them."""
    return msgpack.packb(value, default=_as_map)


def unpack(message: bytes) -> Any:
    """What a message holds; its arrays are views of its bytes, not to be written to.

    Raises:
        UserError: if it is no msgpack, or holds an array that is not one of numbers.
    """
    try:
        return msgpack.unpackb(message, object_hook=_of_map)
    except OF_MSGPACK as error:
        raise UserError(f"the message is not msgpack: {str(error) or type(error).__name__}") from error


def _as_map(array: Any) -> dict[bytes, Any]:
    if not isinstance(array, np.ndarray) or not NUMBERS.fullmatch(array.dtype.str):
        raise TypeError(f"cannot send {type(array).__name__}")
    return {b"__ndarray__": True, b"data": array.tobytes(), b"dtype": array.dtype.str, b"shape": array.shape}


def _of_map(value: dict[Any, Any]) -> Any:
    if b"__ndarray__" in value:
        return _array(value.get(b"data"), value.get(b"dtype"), value.get(b"shape"))
    if b"__npgeneric__" in value:
        return _number(value.get(b"data"))
    return value


def _array(data: Any, dtype: Any, shape: Any) -> np.ndarray:
    if not isinstance(dtype, str) or not NUMBERS.fullmatch(dtype):
        raise UserError(f"an array must hold numbers, got dtype {dtype!r}")
    if not isinstance(shape, list) or len(shape) > MOST_DIMENSIONS or not all(_is_size(size) for size in shape):
        raise UserError(f"an array's shape must be a list of at most {MOST_DIMENSIONS} sizes, got {shape!r}")
    size = math.prod(shape) * np.dtype(dtype).itemsize
    if not isinstance(data, bytes) or len(data) != size:
        found = f"{len(data)} bytes" if isinstance(data, bytes) else type(data).__name__
        raise UserError(f"an array of dtype {dtype} and shape {tuple(shape)} must have {size} bytes, got {found}")
    return np.ndarray(shape, dtype, buffer=data)


def _is_size(size: Any) -> bool:
    return type(size) is int and size >= 0


def _number(data: Any) -> bool | int | float:
    """A NumPy scalar is its number, whatever its dtype."""
    if not isinstance(data, bool | int | float):
        raise UserError(f"a scalar must be a number, got {type(data).__name__}")
    return data
