"""How much memory a picture may take, refused before it is taken."""

from __future__ import annotations

import math
import os

from ..errors import LimitError

MEMORY_VARIABLE = "DDPMC_MAX_MEMORY"
MAX_MEMORY = 4.0e9  # bytes
FIXED_MEMORY = 0.6e9  # what torch, the network and one tile take
BYTES_PER_PIXEL = 100  # what all else takes, of a large picture


def memory_limit() -> float:
    """Bytes that a picture may take: ``DDPMC_MAX_MEMORY`` if set, else 4 GB. Raises LimitError."""
    text = os.environ.get(MEMORY_VARIABLE, "")
    try:
        limit = float(text) if text else MAX_MEMORY
    except ValueError:
        limit = math.nan
    if not limit >= 0:
        raise LimitError(f"{MEMORY_VARIABLE}={text}: not a number of bytes")
    return limit


def check_size(size: tuple[int, int]) -> None:
    """Raises LimitError for a picture that would take more memory than :func:`memory_limit`."""
    needed = FIXED_MEMORY + BYTES_PER_PIXEL * size[0] * size[1]
    if needed > (limit := memory_limit()):
        raise LimitError(
            f"{size[0]}x{size[1]} pixels take about {needed / 1e9:.1f} GB, more than the limit of "
            f"{limit / 1e9:.1f} GB ({MEMORY_VARIABLE})"
        )
