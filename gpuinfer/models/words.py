# SPDX-License-Identifier: Apache-2.0
"""Logs what a model prints, line by line, with the model's name. Other output is not changed."""

from __future__ import annotations

import io
import sys
import threading
from typing import TextIO

from gpuinfer.models.context import current, logger_of

#: Maximum characters of an unfinished line; a longer one is logged in parts.
MAX_LINE = 8192


class _Pending(threading.local):
    """What a thread has printed since its last line break, and whether it is logging right now."""

    def __init__(self) -> None:
        self.text = ""
        self.model = ""
        self.logging = False


class Words(io.TextIOBase):
    """Replaces standard output or error: logs a model's lines, and passes on everything else."""

    def __init__(self, stream: TextIO) -> None:
        #: The stream that it replaces, to which the log is written.
        self.behind = self._stream = stream
        self._pending = _Pending()

    def write(self, text: str) -> int:
        """Write text; a model's line is logged once it is complete."""
        work, pending = current(), self._pending
        # An error that logging prints, about a line that it could not log, must not be logged again.
        if work is None or pending.logging:
            return self._stream.write(text)
        if pending.model != work.model:
            pending.text, pending.model = "", work.model
        *lines, pending.text = (pending.text + text).split("\n")
        if len(pending.text) > MAX_LINE:
            lines.append(pending.text)
            pending.text = ""
        self._log(work.model, lines)
        return len(text)

    def flush(self) -> None:
        """Flush the replaced stream. A model's unfinished line is kept."""
        self._stream.flush()

    def end_line(self) -> None:
        """Log a model's unfinished line, as its call has ended."""
        pending = self._pending
        text, pending.text = pending.text, ""
        if text:
            self._log(pending.model, [text])

    def _log(self, model: str, lines: list[str]) -> None:
        pending = self._pending
        pending.logging = True
        try:
            for line in lines:
                if shown := line.rstrip().rpartition("\r")[2]:  # the last state of a progress bar
                    logger_of(model).info("%s", shown)
        finally:
            pending.logging = False

    # -- what else programs use of standard output ----------------------------------------

    def writable(self) -> bool:
        return True

    def isatty(self) -> bool:
        return self._stream.isatty()

    def fileno(self) -> int:
        return self._stream.fileno()

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return self._stream.encoding

    @property
    def errors(self) -> str | None:  # type: ignore[override]
        return self._stream.errors

    @property
    def buffer(self) -> object:
        """The binary stream: what a model writes there is logged without the model's name."""
        return self._stream.buffer


def adopt() -> None:
    """Log what models print from now on; a second call does nothing."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is not None and not isinstance(stream, Words):
            setattr(sys, name, Words(stream))


def end_lines() -> None:
    """Log the unfinished lines of this thread."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, Words):
            stream.end_line()
