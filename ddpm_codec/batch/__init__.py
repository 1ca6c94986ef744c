"""Encode and decode many pictures, several at a time, on this machine or on a cluster.

>>> from ddpm_codec import batch
>>> for result in batch.encode_all("photos/", "files/", jobs=4):  # doctest: +SKIP
...     print(result.dest, result.error or result.about["bytes"])
"""

from .jobs import Result
from .run import Batch, decode_all, encode_all

__all__ = ["Batch", "Result", "decode_all", "encode_all"]
