"""What the command line says: results on standard output, everything else on standard error."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..batch import Batch, Result
from ..errors import CutWarning, DamageWarning, DdpmcError, DdpmcWarning
from .streams import show, tell

if TYPE_CHECKING:
    from ..codec.encoder import Callback

DAMAGED = 3  # exit status of a damaged file, decoded as far as it is sound
Line = Callable[[Result], str]


@dataclass(frozen=True)
class Report:
    """What is printed, and how much of it."""

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
        with self._bar(Path(label).name, 1) as update:
            yield update
            if update:
                update(1, 1)

    @contextmanager
    def _bar(self, label: str, total: int) -> Iterator[Callback | None]:
        if not label or self.quiet or self.as_json or not sys.stderr.isatty():
            yield None
            return
        with click.progressbar(
            length=total, label=label, show_pos=total > 1, file=sys.stderr
        ) as bar:

            def update(done: int, total: int) -> None:
                bar.length = total
                bar.update(done - bar.pos)

            yield update

    def batch(
        self, batch: Batch, line: Line | None = None, label: str = "",
        out: Callable[[str], None] | None = None,
    ) -> int:  # fmt: skip
        """Do a batch, with a progress bar if there is a label. Returns the worst exit status.

        line: makes the line for a result without error; ``out`` prints it in place of :meth:`say`.
        """
        if self.as_json and any(dest == "-" for _, dest in batch.pairs):
            raise click.UsageError("--json needs standard output for itself")
        worst, total = 0, len(batch)
        with ExitStack() as bar:
            update = bar.enter_context(self._bar(label, total))
            results = bar.enter_context(closing(batch.results(update)))
            for result in results:
                if total == 1:
                    next(results, None)  # fills the bar
                    bar.close()
                elif update:
                    tell("\r\x1b[K", newline=False)  # lines come above the bar
                worst = max(worst, self.one(result, line, out or self.say))
        return worst

    def one(self, result: Result, line: Line | None, say: Callable[[str], None]) -> int:
        """Turn a result into lines and an exit status."""
        shown: dict[str, Any] = {"input": result.source}
        shown |= ({"output": result.dest} if result.dest else {}) | result.about
        status = DAMAGED if result.damaged else 0
        if result.skipped:
            shown["skipped"] = True
            self.say(f"{result.dest}: skipped, it was made from the same file before")
        elif line and not result.error and not self.as_json:
            say(line(result))
        for warning in result.warnings:
            self.warn(result.source, warning)
        if result.error:
            status, shown["error"], about = failure(result.error, result.source)
            self.complain(about, shown["error"])
        elif result.damaged and not any(isinstance(w, DamageWarning) for w in result.warnings):
            self.complain(result.source, f"damaged: {result.about['damage']}")
        if self.as_json:
            show(json_line(shown | {"status": status}))
        return status

    def warn(self, source: str, warning: DdpmcWarning) -> None:
        """Print a warning; with -q only one of damage."""
        if isinstance(warning, DamageWarning) or not self.quiet:
            kind = "note" if isinstance(warning, CutWarning) else "warning"
            self.complain(source, f"{kind}: {warning}")


def label_of(sources: Sequence[str], command: str) -> str:
    """The label of a progress bar: the name of a single file, or the command."""
    return (len(sources) == 1 and Path(sources[0]).name) or command


def json_line(about: dict[str, Any]) -> str:
    return json.dumps(plain(about), allow_nan=False)


def plain(value: Any) -> Any:
    """A value for JSON, which has no infinity: a number that is not finite becomes null."""
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
