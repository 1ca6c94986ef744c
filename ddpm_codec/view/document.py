"""The page: one HTML file that needs no network and no other file."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from .. import __version__
from ..codec.decoder import Recon
from ..codec.encoder import ModelLike
from ..codec.source import File
from .entry import Entry, Rival, entry
from .figure import svg

TEMPLATE = Path(__file__).with_name("page.html")


def page(
    files: File | Sequence[File],
    *,
    original: Rival | Sequence[Rival] | None = None,
    against: Rival | Sequence[Rival] | None = None,
    stop_at: str | int | None = None,
    recon: Recon = "mean",
    seed: int = 0,
    model: ModelLike = None,
    device: str = "cpu",
) -> str:
    """HTML that shows files at every level.

    files: one, or a list. original, against: pictures to compare with; :func:`shares` says how
    lists of them go with the files. The others are arguments of :func:`ddpm_codec.decode`. Warns
    and raises as :func:`ddpm_codec.view.entry.entry`; ValueError for lists that do not go together.
    """
    sources: list[File] = _list(files)
    others = shares(len(sources), _list(original), _list(against))
    return render([
        entry(
            file, true, rivals,
            stop_at=stop_at, recon=recon, seed=seed, model=model, device=device,
        )
        for file, (true, rivals) in zip(sources, others, strict=True)
    ])  # fmt: skip


def shares(
    n: int, originals: Sequence[Rival], against: Sequence[Rival]
) -> list[tuple[Rival | None, Sequence[Rival]]]:
    """The original of each of ``n`` files, and what it is compared with.

    One is for all files, several are for one each, in their order; but a single file is compared
    with all that are given. Raises ValueError if the numbers do not go together.
    """
    for given, what in ((originals, "originals"), (against, "pictures to compare with")):
        if len(given) not in (0, 1, n) and (n > 1 or given is originals):
            text = "give one for all, or one for each" if n > 1 else "give one"
            raise ValueError(f"{len(given)} {what} and {n} file{'s' * (n > 1)}: {text}")
    out: list[tuple[Rival | None, Sequence[Rival]]] = []
    for i in range(n):
        true = originals[i] if len(originals) > 1 else next(iter(originals), None)
        out.append((true, against[i : i + 1] if len(against) > 1 and n > 1 else against))
    return out


def render(entries: Sequence[Entry]) -> str:
    """The page of some files. Raises ValueError if there are none."""
    if not entries:
        raise ValueError("no file to show")
    template = TEMPLATE.read_text(encoding="utf-8")
    title = ", ".join(e.name for e in entries)
    # In a script element only "<" could end it, or begin a comment.
    data = json.dumps([_shown(e) for e in entries], allow_nan=False).replace("<", "\\u003c")
    parts = {"title": escape(title), "policy": _policy(template), "data": data,
             "version": __version__}  # fmt: skip
    return re.sub(r"\{\{(\w+)\}\}", lambda m: parts[m[1]], template)


def _shown(e: Entry) -> dict[str, Any]:
    """An entry as the page's script wants it."""
    curves = e.curves()
    return vars(e) | {
        "levels": [_finite(vars(v)) for v in e.levels],
        "others": [_finite(vars(o)) for o in e.others],
        "curve": svg(curves, 380, 270) if curves[0].points else None,
    }


def _finite(about: dict[str, Any]) -> dict[str, Any]:
    """JSON knows no infinity: it becomes null, and ``exact`` tells an infinite PSNR."""
    finite = {k: None if v == math.inf else v for k, v in about.items()}
    return finite | {"exact": about["psnr"] == math.inf}


def _policy(template: str) -> str:
    """Nothing may be loaded, and no script or style run but the template's own."""

    def digest(tag: str) -> str:
        (text,) = re.findall(rf"<{tag}>(.*?)</{tag}>", template, re.S)
        return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"

    return (
        f"default-src 'none'; img-src data:; script-src {digest('script')}; "
        f"style-src {digest('style')}; base-uri 'none'; form-action 'none'"
    )


def _list(given: Any) -> list[Any]:
    if given is None:
        return []
    return list(given) if isinstance(given, list | tuple) else [given]
