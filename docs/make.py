"""Writes docs/command-line.md: what each command prints for --help.

    python docs/make.py

tests/test_docs.py compares the page with the commands.
"""

from __future__ import annotations

from pathlib import Path

import click

from ddpm_codec.cli.main import cli

PAGE = Path(__file__).resolve().parent / "command-line.md"
WIDTH = 98  # of the text, which is what click makes of a terminal of 100 columns
HEAD = """\
# The command line

What each command prints for `--help`. `make docs` writes this page; [usage.md](usage.md) explains
what the options mean, [robustness.md](robustness.md) lists the exit statuses.
"""


def page() -> str:
    """The whole page."""
    top = click.Context(cli, info_name="ddpmc", terminal_width=WIDTH, **cli.context_settings)
    parts = [HEAD, section("ddpmc", cli.get_help(top))]
    for name in cli.list_commands(top):
        command = cli.get_command(top, name)
        assert command is not None
        context = click.Context(command, info_name=name, parent=top)
        parts.append(section(f"ddpmc {name}", command.get_help(context)))
    return "\n".join(parts)


def section(name: str, text: str) -> str:
    return f"## {name}\n\n```text\n{text}\n```\n"


if __name__ == "__main__":
    PAGE.write_text(page())
