"""The command line. Every command parses, calls the library, writes; torch comes in only with them.

Exit status: 0 done, also for a file that is merely cut; 1 the file system; 2 usage; 3 a damaged
file, decoded as far as it is sound; 4 to 9 the errors of errors.py; 130 interrupted. A batch goes
on after a failure and ends with the highest.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import suppress

import click

from .. import __version__
from ..errors import DdpmcError
from . import decode, encode, paper, streams, train, view
from .report import failure

INTERRUPTED = 130


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="ddpmc")
def cli() -> None:
    """Progressive image compression with a diffusion model.

    A file can be cut anywhere and decoded at any timestep.
    """


for command in (
    encode.encode, decode.decode, decode.truncate, decode.info, view.view, train.train,
    train.calibrate, paper.sample, paper.interpolate, paper.likelihood,
):  # fmt: skip
    cli.add_command(command)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line (``sys.argv`` by default) and return its exit status."""
    streams.prepare()
    try:
        status = int(cli.main(arguments, prog_name="ddpmc", standalone_mode=False) or 0)
    except click.Abort:  # Ctrl-C
        status = INTERRUPTED
    except click.ClickException as e:
        with suppress(OSError):
            e.show()
        status = e.exit_code
    except SystemExit as e:  # click's own word for a reader of standard output that wants no more,
        status = e.code if isinstance(e.code, int) else 1  # and for the shell's completion
    except (DdpmcError, OSError, MemoryError) as e:
        status, text, about = failure(e, "")
        streams.tell(": ".join(part for part in ("ddpmc", about, text) if part))
    return streams.finish(status)


if __name__ == "__main__":
    sys.exit(main())
