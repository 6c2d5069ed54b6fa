"""Conversations set aside on disk while more come by: of those in hand no more is held than where each is.

with Spill(run_dir / "conversations") as spill:
    place = spill.put(found)
    spill.line(place)      # bytes: its line of prompts.jsonl
    spill.where(place)     # "file, line 3"
"""

from __future__ import annotations

import json
import os
import tempfile
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import IO, Self

from .conversations import Found
from .files import encode_line, unwritable


class Spill:
    """A file without a name, which is gone with the process however that ends.

    It lies where ``folder`` is, or will be: that is the disk that has room for conversations. What was put stays until
    the end; as conversations come by in no order, that is a few times as many as are in hand.

    Raises:
        UserError: the disk is full, or nothing may be written there.
    """

    def __init__(self, folder: Path) -> None:
        self._folder, self._file = folder, _nameless(folder)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        with suppress(OSError):  # of a rest to write, for which the disk was too full: nobody will read it
            self._file.close()

    def put(self, found: Found) -> int:
        """Set a conversation aside; returns its place."""
        line, where = encode_line(found.conversation._asdict()), json.dumps(found.where).encode()
        try:
            place = self._file.seek(0, os.SEEK_END)
            self._file.write(line + where + b"\n")
        except OSError as error:
            raise unwritable(self._folder, error) from error
        return place

    def line(self, place: int) -> bytes:
        """What was put there, as a line of ``prompts.jsonl``."""
        self._file.seek(place)
        return self._file.readline()

    def where(self, place: int) -> str:
        """Where it was found."""
        self.line(place)
        return str(json.loads(self._file.readline()))


def _nameless(folder: Path) -> IO[bytes]:
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    try:
        return tempfile.TemporaryFile(dir=there)
    except OSError as error:
        raise unwritable(folder, error) from error
