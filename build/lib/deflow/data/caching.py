"""The key of whatever is computed once and kept in a file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import numpy as np


def content_key(settings: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> str:
    """What tells one result from all others: a hash of everything that it was made with; nothing is copied.

    Args:
        settings: plain values.
        arrays: by name, in any order; mapped ones are read through once.
    """
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for name, array in sorted(arrays.items()):
        digest.update(f"{name} {array.dtype} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()
