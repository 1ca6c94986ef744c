"""A limit on the memory that a picture may take, checked before the memory is allocated."""

from __future__ import annotations

import math
import os

from ..errors import LimitError

MEMORY_VARIABLE = "DDPMC_MAX_MEMORY"
MAX_MEMORY = 4.0e9  # bytes
FIXED_MEMORY = 0.6e9  # bytes: torch, the network and one tile
BYTES_PER_PIXEL = 100  # everything else, measured on large pictures


def memory_limit() -> float:
    """Bytes that a picture may take: ``DDPMC_MAX_MEMORY``, by default 4 GB.

    Raises LimitError if the variable is not a number of bytes.
    """
    text = os.environ.get(MEMORY_VARIABLE, "")
    try:
        limit = float(text) if text else MAX_MEMORY
    except ValueError:
        limit = math.nan
    if not limit >= 0:
        raise LimitError(f"{MEMORY_VARIABLE}={text}: not a number of bytes")
    return limit


def check_size(size: tuple[int, int]) -> None:
    """Raise LimitError for a picture that would take more memory than :func:`memory_limit`.

    size: width and height, pixels.
    """
    width, height = size
    needed = FIXED_MEMORY + BYTES_PER_PIXEL * width * height
    if needed > (limit := memory_limit()):
        raise LimitError(
            f"{width}x{height} pixels take about {needed / 1e9:.1f} GB, more than the limit of "
            f"{limit / 1e9:.1f} GB ({MEMORY_VARIABLE})"
        )
