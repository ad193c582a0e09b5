# SPDX-License-Identifier: Apache-2.0
"""Turn a log line, a dictionary, into journal entries: a sentence to read, and fields to query.

``task_failed`` with ``task_id``, ``model`` and ``reason`` becomes::

    MESSAGE=task failed: inputs: must be 8 x 8 (task_id=6b1f…, model=digits)
    PRIORITY=4  SYSLOG_IDENTIFIER=gpuinfer-worker  ACTION=task_failed  TASK_ID=6b1f…  MODEL=digits  REASON=…

A list of ``task_ids`` becomes one field TASK_ID for each id, so that ``journalctl TASK_ID=…``
finds a batch by each task in it; ``_REPEATED`` names such lists. Other fields are named by their key in
capitals, except those in ``_NAMES``. A value is cut at ``MAX_VALUE``; the text of a caller or of a model's
exception is complete in the result.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

from structlog.typing import EventDict

from gpuinfer.journal.sender import field

#: syslog's numbers; ``journalctl -p`` takes their names.
_PRIORITIES = {"critical": 2, "error": 3, "warning": 4, "info": 6, "debug": 7}
#: The most tasks in one entry; more become several entries. (journald drops entries of more than 1024
#: fields.)
MAX_IDS = 100
#: Keys whose field has another name. (PRIORITY is the level.)
_NAMES = {"priority": "TASK_PRIORITY", "exception": "TRACEBACK"}
_REPEATED = {"task_ids": "TASK_ID", "queues": "QUEUE", "models": "MODEL", "traceparents": "TRACEPARENT"}
#: Keys that the sentence begins with, or does not show.
_NOT_IN_BRACKETS = frozenset(
    {"timestamp", "level", "logger", "action", "reason", "message", "hint", "exception", "stack"}
    | {"task_ids", "part", "traceparent", "traceparents"}
)
#: Keys that journald records itself, or that are in PRIORITY.
_NO_FIELDS = frozenset({"timestamp", "level", "message", "task_ids"})
#: The most characters of a value in the sentence; its field has more.
_SHOWN = 200
#: The most characters of a field, and of a traceback, of which the end is kept.
MAX_VALUE, MAX_TRACEBACK = 2048, 16 * 1024
_TRACEBACKS = frozenset({"exception", "stack"})


def parts(line: EventDict) -> list[EventDict]:
    """Split a line that names many tasks into several, each with a ``part`` such as ``2 of 3``."""
    ids: Sequence[str] = line.get("task_ids") or ()
    if len(ids) <= MAX_IDS:
        return [line]
    groups = [ids[start : start + MAX_IDS] for start in range(0, len(ids), MAX_IDS)]
    return [
        {**line, "task_ids": group, "part": f"{number} of {len(groups)}"}
        for number, group in enumerate(groups, 1)
    ]


class Entries:
    """Makes the entries of one program's lines.

    ``hidden``: keys that every line has, which sentences leave out. ``plain`` turns a value that is neither
    text nor number into text.
    """

    def __init__(self, program: str, hidden: frozenset[str], plain: Callable[[Any], str]) -> None:
        self._program = field("SYSLOG_IDENTIFIER", program)
        self._unsaid = _NOT_IN_BRACKETS | hidden
        self._plain = plain

    def of(self, line: EventDict) -> list[bytes]:
        """Return a line's entries: one, or several when it names too many tasks for one."""
        return [
            field("MESSAGE", self._message(part))
            + self._fields(part)
            + _repeated("TASK_ID", part.get("task_ids") or ())
            for part in parts(line)
        ]

    def dropped(self, count: int) -> bytes:
        """Return the entry that reports dropped lines."""
        (entry,) = self.of(
            {
                "action": "log_lines_dropped",
                "level": "warning",
                "logger": __name__,
                "count": count,
                "reason": "the journal had no room",
            }
        )
        return entry

    def _fields(self, line: EventDict) -> bytes:
        parts = [b"PRIORITY=%d\n" % _PRIORITIES.get(line.get("level", ""), 6), self._program]
        for key, value in line.items():
            if key in _NO_FIELDS or value is None:
                continue
            if key in _REPEATED:
                parts.append(_repeated(_REPEATED[key], value))
            else:
                parts.append(field(_name(key), shortened(key, self._text(value))))
        if "\n" in (text := str(line.get("message", ""))):  # MESSAGE has its first line
            parts.append(field("TEXT", shortened("message", text)))
        return b"".join(parts)

    def _message(self, line: EventDict) -> str:
        """Return the sentence: what happened, why, what to do, and the other fields in brackets."""
        if "message" in line:  # a library's own words
            said = str(line["message"]).strip().partition("\n")[0]
        else:
            said = str(line.get("action", "")).replace("_", " ")
        if "reason" in line:
            said += f": {line['reason']}"
        if "exception" in line:
            said += f": {_last_line(str(line['exception']))}"
        if "hint" in line:
            said = f"{said.rstrip('.')}; {line['hint']}"
        rest = [
            f"{key}={(','.join(value) if key in _REPEATED else self._text(value))[:_SHOWN]}"
            for key, value in line.items()
            if key not in self._unsaid and value is not None
        ]
        said = shortened("message", said)
        part = f" [{line['part']}]" if "part" in line else ""
        return " ".join((f"{said} ({', '.join(rest)})" if rest else said).split()) + part

    def _text(self, value: Any) -> str:
        if isinstance(value, str):
            return value
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return str(value)
        return self._plain(value)


def shortened(key: str, text: str) -> str:
    """Cut a value that is too long, and say by how much; a traceback is cut at the beginning."""
    most = MAX_TRACEBACK if key in _TRACEBACKS else MAX_VALUE
    if len(text) <= most:
        return text
    said = f"[{len(text) - most} characters more]"
    return f"{said} {text[-most:]}" if key in _TRACEBACKS else f"{text[:most]} {said}"


def _repeated(name: str, values: Sequence[str]) -> bytes:
    """Return a field for each value. Callers choose ids: of any length, with line breaks in them."""
    if not values:
        return b""
    joined = f"\n{name}=".join(values)
    if joined.count("\n") == len(values) - 1 and max(map(len, values)) <= MAX_VALUE:
        return f"{name}={joined}\n".encode("utf-8", "backslashreplace")
    return b"".join(field(name, shortened(name, value)) for value in values)


def _last_line(traceback: str) -> str:
    return traceback.rstrip().rpartition("\n")[2][:_SHOWN]


@cache
def _name(key: str) -> str:
    """Return a field's name: capitals, digits and _, a letter first, at most 64 characters."""
    name = re.sub(r"[^A-Z0-9_]", "_", key.upper()).lstrip("_0123456789")
    return _NAMES.get(key, name[:64] or "FIELD")
