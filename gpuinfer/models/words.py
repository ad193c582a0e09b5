# SPDX-License-Identifier: Apache-2.0
"""What a model prints goes to the log, line by line, with the model's name; what we print stays as it is."""

from __future__ import annotations

import io
import sys
import threading
from typing import TextIO

from gpuinfer.models.context import current, logger_of

#: Characters of a line without an end that are kept until they are logged all the same.
MAX_LINE = 8192


class _Pending(threading.local):
    """What a thread has printed since its last line break, and whether it is logging just now."""

    def __init__(self) -> None:
        self.text = ""
        self.model = ""
        self.logging = False


class Words(io.TextIOBase):
    """Stands in for standard output or error: logs a model's lines, and passes on everything else."""

    def __init__(self, stream: TextIO) -> None:
        #: What it stands for: where log lines themselves go.
        self.behind = self._stream = stream
        self._pending = _Pending()

    def write(self, text: str) -> int:
        """Take text; a line is logged once it has ended."""
        work, pending = current(), self._pending
        # What logging itself writes, about a line that it could not log, must not be logged again.
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
        """Flush the stream behind it. A model's unfinished line waits for its end."""
        self._stream.flush()

    def end_line(self) -> None:
        """Log what a model has printed without a line break: its call has ended."""
        pending = self._pending
        text, pending.text = pending.text, ""
        if text:
            self._log(pending.model, [text])

    def _log(self, model: str, lines: list[str]) -> None:
        pending = self._pending
        pending.logging = True
        try:
            for line in lines:
                if shown := line.rstrip().rpartition("\r")[2]:  # of a progress bar, its last state
                    logger_of(model).info("%s", shown)
        finally:
            pending.logging = False

    # -- what else programs ask of standard output ----------------------------------------

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
        """The bytes' way past us: what a model writes there is in the log without its name."""
        return self._stream.buffer


def adopt() -> None:
    """Let what models print go to the log from now on; a second call does nothing."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is not None and not isinstance(stream, Words):
            setattr(sys, name, Words(stream))


def end_lines() -> None:
    """Log the unfinished lines of this thread."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, Words):
            stream.end_line()
