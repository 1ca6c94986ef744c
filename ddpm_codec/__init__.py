"""ddpmc: progressive image compression whose prior is a denoising diffusion model.

>>> import ddpm_codec
>>> data = ddpm_codec.encode(image, bpp=0.5)  # doctest: +SKIP
>>> ddpm_codec.decode(data, stop_at="t=500").save("rough.png")  # doctest: +SKIP

Importing the package is cheap: torch is imported at the first use of what needs it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .errors import (
    ConversionWarning,
    CutWarning,
    DamageWarning,
    DataError,
    DdpmcError,
    DdpmcWarning,
    FormatError,
    ImageError,
    LimitError,
    ModelError,
)

if TYPE_CHECKING:
    from .codec.decoder import Level, decode, decode_levels
    from .codec.encoder import encode
    from .codec.stops import info, truncate

__version__ = "0.2.0"

_LAZY = {
    "Level": "codec.decoder",
    "decode": "codec.decoder",
    "decode_levels": "codec.decoder",
    "encode": "codec.encoder",
    "info": "codec.stops",
    "truncate": "codec.stops",
}

__all__ = [
    "ConversionWarning",
    "CutWarning",
    "DamageWarning",
    "DataError",
    "DdpmcError",
    "DdpmcWarning",
    "FormatError",
    "ImageError",
    "Level",
    "LimitError",
    "ModelError",
    "__version__",
    "decode",
    "decode_levels",
    "encode",
    "info",
    "truncate",
]


def __getattr__(name: str) -> Any:
    """Import what is named on first use (PEP 562)."""
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_LAZY[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
