"""What an output folder holds and what it was made from, so that nothing is made twice.

A line of JSON for each file that was made, in a file of the output folder:

    {"output": "sub/a.ddpm", "sha256": ..., "source": ..., "options": {...}, "damaged": false}

``sha256`` is the output's, ``source`` the SHA-256 of what it was made from. A line is added just
before its file appears, which happens in one step. So wherever a run is killed, each file has its
line; a line without its file does no harm. Lines are never changed. If there are several for one
output, the one whose ``sha256`` is the file's counts. Anything else in the file is ignored, such as
a line that a full disk cut off.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections import defaultdict
from pathlib import Path
from typing import Any

NAME = ".ddpmc.jsonl"


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


class Record:
    """Of one folder, for one run and its options."""

    def __init__(self, folder: Path, options: dict[str, Any]) -> None:
        """options: those that the outputs depend on. Raises OSError."""
        self.folder, self.options = folder, options
        self.path = folder / NAME
        self._lines: dict[str, list[dict[str, Any]]] = defaultdict(list)
        text = self.path.read_bytes() if self.path.exists() else b""
        self._broken = text != b"" and not text.endswith(b"\n")
        for line in text.splitlines():
            try:
                entry = json.loads(line)
            except ValueError:
                continue
            if isinstance(entry, dict) and isinstance(entry.get("output"), str):
                self._lines[entry["output"]].append(entry)

    def line(self, dest: str, data: bytes, source: str, damaged: bool) -> dict[str, Any]:
        return {
            "output": self._name(dest), "sha256": sha256(data), "source": source,
            "options": self.options, "damaged": damaged,
        }  # fmt: skip

    def made(self, dest: str) -> bool:
        """Whether the file is one that a former run made, and nobody has changed since."""
        return bool(self._about(dest))

    def done(self, dest: str, source: str) -> bool:
        """Whether the file is what this run would make of ``source``, and without damage."""
        want = {"source": source, "options": self.options, "damaged": False}
        return any(want.items() <= line.items() for line in self._about(dest))

    def add(self, dest: str, data: bytes, source: str, damaged: bool) -> None:
        """Just before the file appears. Raises OSError."""
        line = self.line(dest, data, source, damaged)
        if line in self._lines[line["output"]]:
            return
        text = "\n" * self._broken + json.dumps(line, sort_keys=True) + "\n"
        with open(self.path, "ab", buffering=0) as f:  # one call, also beside other runs
            if f.write(raw := text.encode()) != len(raw):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
        self._broken = False
        self._lines[line["output"]].append(line)

    def _about(self, dest: str) -> list[dict[str, Any]]:
        """The lines about the file that is there now."""
        lines = self._lines.get(self._name(dest), [])
        if not lines or not os.path.isfile(dest):
            return []
        here = sha256(Path(dest).read_bytes())
        return [line for line in lines if line.get("sha256") == here]

    def _name(self, dest: str) -> str:
        return Path(dest).relative_to(self.folder).as_posix()
