"""What the command line says: results on standard output, everything else on standard error."""

from __future__ import annotations

import json
import math
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .. import files
from ..errors import CutWarning, DamageWarning, DdpmcError, DdpmcWarning
from .streams import show, tell

if TYPE_CHECKING:
    from ..codec.encoder import Callback

DAMAGED = 3  # exit status of a damaged file, decoded as far as it is sound
Work = Callable[[str, str], dict[str, Any]]  # source and destination to what --json shows


@dataclass(frozen=True)
class Report:
    """How much is said."""

    as_json: bool = False
    quiet: bool = False

    def say(self, text: str) -> None:
        if not self.quiet and not self.as_json:
            tell(text)

    def complain(self, source: str, text: str) -> None:
        tell(f"ddpmc: {'stdin' if source == '-' else source}: {text}")

    @contextmanager
    def progress(self, label: str) -> Iterator[Callback | None]:
        """A progress bar, if there is a terminal to show it on; full where the work succeeds."""
        if self.quiet or not sys.stderr.isatty():
            yield None
            return
        with click.progressbar(length=1, label=Path(label).name, file=sys.stderr) as bar:

            def update(done: int, total: int) -> None:
                bar.length = total
                bar.update(done - bar.pos)

            yield update
            update(1, 1)  # a target may have been reached before all the levels were there

    def batch(self, pairs: Sequence[tuple[str, str]], work: Work, force: bool = True) -> int:
        """Do ``work`` on each pair of source and destination. Returns the worst exit status."""
        if self.as_json and any(dest == "-" for _, dest in pairs):
            raise click.UsageError("--json needs standard output for itself")
        return max([self.one(source, dest, work, force) for source, dest in pairs])

    def one(self, source: str, dest: str, work: Work, force: bool) -> int:
        """Do ``work`` and turn whatever comes of it into lines and an exit status."""
        result: dict[str, Any] = {"input": source} | ({"output": dest} if dest else {})
        status, about = 0, source
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", DdpmcWarning)
            try:
                files.check_output(dest or "-", force)
                result |= work(source, dest)
            except (DdpmcError, OSError, MemoryError) as e:
                status, result["error"], about = failure(e, source)
                if about == files.STDOUT:  # nor would the other files' results get through
                    raise
        ours = [w for w in caught if issubclass(w.category, DdpmcWarning)]
        for w in ours:
            self.warn(source, w)
        if "error" in result:
            self.complain(about, result["error"])
        elif any(issubclass(w.category, DamageWarning) for w in ours):
            status = DAMAGED
        elif result.get("damage"):
            status = DAMAGED
            self.complain(source, f"damaged: {result['damage']}")
        if self.as_json:
            show(json_line(result | {"status": status}))
        return status

    def warn(self, source: str, w: warnings.WarningMessage) -> None:
        """-q silences what is no damage."""
        if issubclass(w.category, DamageWarning) or not self.quiet:
            kind = "note" if issubclass(w.category, CutWarning) else "warning"
            self.complain(source, f"{kind}: {w.message}")


def json_line(about: dict[str, Any]) -> str:
    return json.dumps(plain(about), allow_nan=False)


def plain(value: Any) -> Any:
    """As JSON knows it: a number that is not finite becomes null."""
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if value is None or isinstance(value, str | int):
        return value
    return number if math.isfinite(number := float(value)) else None


def failure(e: BaseException, source: str) -> tuple[int, str, str]:
    """Exit status, message, and the file that the message is about."""
    if isinstance(e, DdpmcError):
        return e.exit_status, str(e), source
    if isinstance(e, OSError):
        return 1, e.strerror or str(e), str(e.filename or source)
    return 6, "not enough memory", source


def headline(name: str, about: dict[str, Any]) -> str:
    """One line on a file, from :func:`ddpm_codec.info`."""
    size = f"{about['width']}x{about['height']} {about['mode']}"
    line = f"{name}: {size}, {about['bytes']:,} bytes, {about['bpp']:.3f} bpp"
    if about["lossless"]:
        return line + ", lossless"
    if about["levels"]:
        last = about["levels"][-1]
        line += f", t={last['t']}, {last['psnr']:.2f} dB"
    return line


def table(name: str, about: dict[str, Any]) -> str:
    """What ``ddpmc info`` shows."""
    lines = [
        headline(name, about) + ("" if about["complete"] else ", more levels could follow"),
        f"model {about['model']}, {about['path']}, {about['steps']} steps, "
        f"effort {about['effort']}, seed {about['seed']}",
        "     t         SNR      bytes      bpp   PSNR",
    ]
    for v in about["levels"]:
        lines.append(
            f"  {v['t']:4d}  {v['snr']:10.4g}  {v['bytes']:9,}  {v['bpp']:7.4f}  {v['psnr']:5.2f}"
        )
    return "\n".join(lines)
