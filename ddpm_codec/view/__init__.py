"""What files hold, shown: a page for the browser, and the curve of quality against size."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .document import page

__all__ = ["page"]


def __getattr__(name: str) -> Any:
    """The page needs torch, the curve does not: import on first use."""
    if name != "page":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .document import page

    return page
