# SPDX-License-Identifier: Apache-2.0
"""Logging: one set-up per process; every line, ours and the libraries', goes through one renderer.

The path of a line::

    get_logger(__name__).info("batch_done", size=8) ─┐                                  ┌► journald
    celery, kombu, uvicorn, warnings, ───────────────┴─► root logger ► one handler ─────┤
    exceptions that nobody caught                                                       └► stream

Every line has ``timestamp`` (UTC), ``level``, ``logger`` and ``action``: for our lines a stable
snake_case name; for lines of libraries the logger's name, with their text in ``message``. A line about
one task has its ``task_id``, a line about several their ``task_ids``; a line about more than a hundred is
split into several, numbered by ``part``. Inputs and results are never logged. A value that is not plain is
logged as its type, and a long text is cut.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import threading
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import PurePath
from types import TracebackType
from typing import Any, Literal, TextIO

import orjson
import structlog
from structlog.stdlib import BoundLogger, ProcessorFormatter
from structlog.typing import EventDict, Processor, WrappedLogger

from gpuinfer.journal.entry import Entries, parts, shortened
from gpuinfer.journal.sender import Sender, is_journal
from gpuinfer.settings import LogSettings

#: The first fields of each line, in this order.
_FIRST = ("timestamp", "level", "logger", "action")
_ROOM = "gpuinfer"
#: The most characters of a task's id in a line.
MAX_ID = 200
#: Below these levels, these loggers log inputs and results of tasks.
_QUIETED = {
    "celery.app.trace": logging.WARNING,
    "celery.worker.strategy": logging.WARNING,
    # The worker logs the same, with fields: worker_ready, redis_away, redis_back.
    "celery.apps.worker": logging.WARNING,
    "celery.worker.consumer.connection": logging.WARNING,
}
#: Celery would log the whole message with its payload; the line task_dead_lettered says what was done with
#: it.
_OF_MESSAGES = logging.getLogger("celery.worker.consumer.consumer")
_WITH_MESSAGE = (
    *("Received and deleted unknown message", "Received unregistered task"),
    *("Received invalid task message", "Can't decode message body"),
)
_MARK = "_gpuinfer"
#: Fields of every line of this process, including those of other threads and of libraries.
_always: dict[str, object] = {}

Target = Literal["console", "json", "journal"]


def get_logger(name: str) -> BoundLogger:
    """Return a logger; call it as ``log.info("snake_case_action", key=value)``."""
    logger: BoundLogger = structlog.stdlib.get_logger(name)
    return logger


@contextmanager
def bound(**fields: object) -> Iterator[None]:
    """Add fields to every line logged inside, by us or by a library (in this thread or asyncio task)."""
    with structlog.contextvars.bound_contextvars(**fields):
        yield


def configure(
    settings: LogSettings, *, program: str = "gpuinfer", stream: TextIO | None = None, **always: str | int
) -> None:
    """Set up logging for this process. Calling it again replaces the earlier set-up.

    ``program`` is the journal's SYSLOG_IDENTIFIER, ``always`` are fields of every line, and
    ``stream`` is standard error unless given.
    """
    level = logging.getLevelNamesMapping()[settings.level.upper()]
    structlog.configure(
        processors=[structlog.stdlib.filter_by_level, *_common(), ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=BoundLogger,
        cache_logger_on_first_use=True,
    )
    _always.clear()
    _always.update(always)
    root = logging.getLogger()
    for old in [handler for handler in root.handlers if getattr(handler, _MARK, False)]:
        root.removeHandler(old)
        old.close()
    # Not to the wrapper of stderr that logs what a model prints (gpuinfer.models.words).
    lines_to: TextIO = stream or getattr(sys.stderr, "behind", None) or sys.stderr
    root.addHandler(_handler(target(settings, lines_to), program, lines_to))
    # At debug, libraries log whole messages with payloads: that level is only for our own lines.
    root.setLevel(max(level, logging.INFO))
    logging.getLogger(_ROOM).setLevel(level)
    for name, at_least in _QUIETED.items():
        logging.getLogger(name).setLevel(max(level, at_least))
    _OF_MESSAGES.addFilter(_without_message)
    _adopt_libraries()
    logging.captureWarnings(True)
    _adopt_exceptions()


def flush() -> None:
    """Wait until the journal has read what was logged, for a second at most. For who calls ``os._exit``."""
    for handler in logging.getLogger().handlers:
        if getattr(handler, _MARK, False):
            handler.flush()


def target(settings: LogSettings, stream: TextIO | None = None) -> Target:
    """Return where lines go: as set, or by the kind of ``stream`` (default: standard error)."""
    if settings.format != "auto":
        return settings.format
    stream = stream or sys.stderr
    if is_journal(stream, os.environ):
        return "journal"
    return "console" if stream.isatty() else "json"


def setup_celery_logging(settings: LogSettings, *, program: str = "gpuinfer", **always: str | int) -> None:
    """Keep Celery from setting up its own logging.

    It leaves the root logger alone when ``celery.signals.setup_logging`` has a receiver.
    """
    from celery.signals import setup_logging

    def _ours(**_: object) -> None:
        configure(settings, program=program, stream=None, **always)

    setup_logging.connect(_ours, weak=False, dispatch_uid="gpuinfer.log")


def _adopt_exceptions() -> None:
    """Log an uncaught exception of any thread as one line; asyncio logs its own."""

    def uncaught(kind: type[BaseException], exc: BaseException, trace: TracebackType | None) -> None:
        if issubclass(kind, KeyboardInterrupt):
            sys.__excepthook__(kind, exc, trace)
            return
        get_logger(__name__).critical("uncaught_exception", exc_info=(kind, exc, trace))

    def in_thread(args: threading.ExceptHookArgs) -> None:
        if args.exc_value is None or issubclass(args.exc_type, SystemExit):
            return
        name = args.thread.name if args.thread else None
        info = (args.exc_type, args.exc_value, args.exc_traceback)
        get_logger(__name__).critical("uncaught_exception", thread=name, exc_info=info)

    sys.excepthook = uncaught
    threading.excepthook = in_thread


def _without_message(record: logging.LogRecord) -> bool:
    """Cut the message, with its payload, off a line of Celery."""
    said = next((words for words in _WITH_MESSAGE if str(record.msg).startswith(words)), None)
    if said is not None:
        record.msg, record.args = said, ()
    return True


def _adopt_libraries() -> None:
    """Remove the handlers of libraries, so that each of their lines reaches the root logger, once."""
    for name in list(logging.root.manager.loggerDict):
        if name.partition(".")[0] in ("celery", "kombu", "uvicorn", "py"):
            logger = logging.getLogger(name)
            logger.handlers.clear()
            logger.propagate = True


def _common() -> list[Processor]:
    return [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_logger_name,
        structlog.stdlib.add_log_level,
        structlog.stdlib.PositionalArgumentsFormatter(),
        structlog.processors.StackInfoRenderer(),
        _add_always,
        _cut_ids,
        _timestamp,
    ]


class _JournalHandler(logging.Handler):
    """Sends lines to journald; where there is none, to another handler."""

    def __init__(self, entries: Entries, otherwise: logging.Handler) -> None:
        super().__init__()
        self._entries = entries
        self._sender = Sender(entries.dropped)
        self._otherwise = otherwise
        self._encoded: list[bytes] = []
        self.setFormatter(_formatter(structlog.processors.format_exc_info, self._encode))

    def _encode(self, _: WrappedLogger, __: str, line: EventDict) -> str:
        """Keep the line's entries: a formatter can return only text."""
        self._encoded = self._entries.of(line)
        return ""

    def emit(self, record: logging.LogRecord) -> None:  # the handler's lock is held
        try:
            self.format(record)
            sent = [self._sender.send(entry) for entry in self._encoded]
        except Exception:
            self.handleError(record)
            return
        if not all(sent):
            self._otherwise.emit(record)

    def flush(self) -> None:  # by logging.shutdown(), when the process ends
        self._sender.flush()

    def close(self) -> None:
        self._sender.close()
        super().close()


def _handler(to: Target, program: str, stream: TextIO) -> logging.Handler:
    handler: logging.Handler = logging.StreamHandler(stream)
    if to == "console":
        handler.setFormatter(_formatter(*_for_reading(stream.isatty())))
    else:
        json_lines = _in_parts(_to_json)
        handler.setFormatter(_formatter(structlog.processors.format_exc_info, _cut, _order, json_lines))
    if to == "journal":
        hidden = frozenset(_always) & {"worker"}
        handler = _JournalHandler(Entries(program, hidden, _as_text), otherwise=handler)
    setattr(handler, _MARK, True)
    return handler


def _formatter(*last: Processor) -> ProcessorFormatter:
    return ProcessorFormatter(
        foreign_pre_chain=_common(),
        processors=[_name_action, ProcessorFormatter.remove_processors_meta, *last],
    )


def _for_reading(colours: bool) -> list[Processor]:
    # A plain traceback: that of rich would show local variables, and so payloads.
    console = structlog.dev.ConsoleRenderer(
        colors=colours, event_key="action", exception_formatter=structlog.dev.plain_traceback
    )
    return [_foreign_text_first, _cut, _in_parts(console)]


def _in_parts(render: Processor) -> Processor:
    """Render a line that names many tasks as several lines."""

    def lines(logger: WrappedLogger, name: str, line: EventDict) -> str:
        return "\n".join(str(render(logger, name, part)) for part in parts(line))

    return lines


def _add_always(_: WrappedLogger, __: str, line: EventDict) -> EventDict:
    for key, value in _always.items():
        line.setdefault(key, value)
    return line


def _cut_ids(_: WrappedLogger, __: str, line: EventDict) -> EventDict:
    """Cut long ids, which plain Celery producers may choose."""
    task_id, task_ids = line.get("task_id"), line.get("task_ids")
    if isinstance(task_id, str) and len(task_id) > MAX_ID:
        line["task_id"] = task_id[:MAX_ID]
    if isinstance(task_ids, list | tuple) and any(len(str(one)) > MAX_ID for one in task_ids):
        line["task_ids"] = [str(one)[:MAX_ID] for one in task_ids]
    return line


def _timestamp(_: WrappedLogger, __: str, line: EventDict) -> EventDict:
    now = datetime.now(UTC).isoformat(timespec="milliseconds")
    line["timestamp"] = now.removesuffix("+00:00") + "Z"
    return line


def _name_action(_: WrappedLogger, __: str, line: EventDict) -> EventDict:
    event, record = line.pop("event", ""), line.get("_record")
    if line.get("_from_structlog"):
        line["action"] = event
    elif record is not None and str(record.name).startswith(f"{_ROOM}.") and hasattr(record, "action"):
        # A line of the client, which does not use structlog: ``extra={"action": ..., "fields": {...}}``.
        line["action"] = record.action
        line.update(getattr(record, "fields", {}))
    else:
        line["action"] = line.get("logger", "root")
        line["message"] = event
    return line


def _foreign_text_first(_: WrappedLogger, __: str, line: EventDict) -> EventDict:
    """On a terminal, show the text of a library's line first; its logger's name is beside it."""
    if "message" in line:
        line["action"] = line.pop("message")
    return line


def _cut(_: WrappedLogger, __: str, line: EventDict) -> EventDict:
    return {key: shortened(key, value) if isinstance(value, str) else value for key, value in line.items()}


def _order(_: WrappedLogger, __: str, line: EventDict) -> EventDict:
    first = {key: line.pop(key) for key in _FIRST if key in line}
    return {**first, **line}


def _to_json(_: WrappedLogger, __: str, line: MutableMapping[str, Any]) -> str:
    return _dump(line)


def _dump(value: object) -> str:
    try:
        return orjson.dumps(value, default=_plain, option=orjson.OPT_NON_STR_KEYS).decode()
    except TypeError:
        # A lone surrogate, as in a file name that is not UTF-8, or a number beyond 64 bits.
        return json.dumps(value, default=_plain, skipkeys=True)


def _as_text(value: object) -> str:
    """Return the text of a journal field that is neither text nor number: JSON, or that of ``_plain``."""
    return _dump(value) if isinstance(value, bool | list | tuple | dict) else _plain(value)


def _plain(value: object) -> str:
    """Return a value's text, or only its type: tensors and bytes are payload."""
    if isinstance(value, PurePath | BaseException | frozenset | set):
        return str(value)
    return f"<{type(value).__name__}>"
