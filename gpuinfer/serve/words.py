# SPDX-License-Identifier: Apache-2.0
"""What ``gpuinfer serve`` prints: the model's output, its errors with file and line, and request counts."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from rich.console import Console

#: Minimum seconds between two lines with counts.
EVERY_S = 1.0
_LOUD = ("warning", "error", "critical")
#: Not printed, as ``gpuinfer serve`` itself has printed the warning.
_TOLD = ("runs_as_root",)
#: Not printed if they only repeat the model's last failure.
_REPEATED = ("start_failed", "task_failed")
#: Printed without the action's name, as the reason says enough.
_UNNAMED = ("start_failed",)
_ERROR, _QUIET = "red", "dim"


class Words:
    """Prints log entries of the worker and the API. ``place`` replaces paths by the user's own."""

    def __init__(self, console: Console, place: Callable[[str], str]) -> None:
        self._console = console
        self._place = place
        self._done = self._failed = self._batches = 0
        self._ms = 0.0
        self._last = 0.0
        #: The reason of the model's last failure.
        self._failure = ""

    def __call__(self, name: str, entry: dict[str, Any] | str) -> None:
        """Print an entry, or a line of text; only count an entry about a batch."""
        if isinstance(entry, str):
            self.say(entry, _QUIET if name == "api" else "")
        elif entry.get("action") == "batch_done":
            self._count(entry)
        elif str(entry.get("logger", "")).startswith("model."):
            self._model(entry)
        elif entry.get("level") in _LOUD and entry.get("action") not in _TOLD:
            self._error(entry)
        elif name == "api" and int(entry.get("status", 0)) >= 400:
            said = (str(entry[key]) for key in ("method", "path", "status", "code") if key in entry)
            self.say(" ".join(said), _QUIET)

    def say(self, text: str, style: str = "") -> None:
        """Print a line without interpreting markup."""
        self._console.print(self._place(text), style=style, soft_wrap=True, markup=False, highlight=False)

    def flush(self) -> None:
        """Print how many requests were answered since the last such line, if any."""
        if not self._batches or time.monotonic() - self._last < EVERY_S:
            return
        self._last = time.monotonic()
        batches = "1 batch" if self._batches == 1 else f"{self._batches:,} batches"
        failed = f", {self._failed:,} failed" if self._failed else ""
        each = self._ms / self._batches
        self.say(f"{self._done:,} done in {batches}, {each:.1f} ms each{failed}", _QUIET)
        self._done = self._failed = self._batches = 0
        self._ms = 0.0

    def _count(self, entry: dict[str, Any]) -> None:
        if not str(entry.get("part", "1 ")).startswith("1 "):
            return
        self._batches += 1
        self._done += int(entry.get("batch_size", 0))
        self._failed += int(entry.get("failed", 0))
        self._ms += float(entry.get("duration_ms", 0))

    def _model(self, entry: dict[str, Any]) -> None:
        self.say(str(entry.get("message", entry.get("action", ""))), _style(entry))
        if "exception" in entry:
            self.say(str(entry["exception"]), _ERROR)

    def _error(self, entry: dict[str, Any]) -> None:
        if "exception" in entry:
            self.say(str(entry["exception"]), _ERROR)
        said = next((str(entry[key]) for key in ("reason", "message") if entry.get(key)), "")
        hint = f"; {entry['hint']}" if entry.get("hint") else ""
        action = entry.get("action", "error")
        if action in _REPEATED and self._failure and not hint and said.endswith(self._failure):
            return
        if action == "model_failed":
            self._failure = said
        named = "" if action in _UNNAMED else f"{action}: "
        self.say(f"{named}{said}{hint}", _style(entry))


def _style(entry: dict[str, Any]) -> str:
    return {"error": _ERROR, "critical": _ERROR, "warning": "yellow"}.get(str(entry.get("level")), "")
