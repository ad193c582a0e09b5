# SPDX-License-Identifier: Apache-2.0
"""Logging: one set-up per process; every line, ours and the libraries', goes through one renderer.

The way of a line::

    get_logger(__name__).info("batch_done", size=8) ─┐
    celery, kombu, uvicorn, warnings ────────────────┴─► root logger ► one handler ► _renderer ► stream

Every line carries ``timestamp`` (UTC), ``level``, ``logger`` and ``action``: for our lines a stable
snake_case name, for foreign lines the logger's name, with their text in ``message``. Another
target, such as journald's native fields, is one more branch in ``_handler``: it receives the same
dictionary. What users sent (inputs, results) is never logged; a value that is not plain is
logged as its type.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import PurePath
from typing import Any, TextIO

import orjson
import structlog
from structlog.stdlib import BoundLogger, ProcessorFormatter
from structlog.typing import EventDict, Processor, WrappedLogger

from gpuinfer.settings import LogSettings

#: What each line begins with, in this order.
_FIRST = ("timestamp", "level", "logger", "action")
_ROOM = "gpuinfer"
#: These log what a task was given or has returned, at the levels named here and below.
_QUIETED = {
    "celery.app.trace": logging.WARNING,
    "celery.worker.strategy": logging.WARNING,
    # The worker says the same, with fields: worker_ready, redis_away, redis_back.
    "celery.apps.worker": logging.WARNING,
    "celery.worker.consumer.connection": logging.WARNING,
}
_MARK = "_gpuinfer"


def get_logger(name: str) -> BoundLogger:
    """Return a logger; call it as ``log.info("snake_case_action", key=value)``."""
    logger: BoundLogger = structlog.stdlib.get_logger(name)
    return logger


@contextmanager
def bound(**fields: object) -> Iterator[None]:
    """Put fields on every line logged inside, by us or by a library (this thread or asyncio task)."""
    with structlog.contextvars.bound_contextvars(**fields):
        yield


def configure(settings: LogSettings, *, stream: TextIO | None = None) -> None:
    """Set up logging for this process. Calling it again replaces the earlier set-up.

    ``stream`` is standard error unless given.
    """
    level = logging.getLevelNamesMapping()[settings.level.upper()]
    structlog.configure(
        processors=[structlog.stdlib.filter_by_level, *_common(), ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=BoundLogger,
        cache_logger_on_first_use=True,
    )
    root = logging.getLogger()
    for old in [handler for handler in root.handlers if getattr(handler, _MARK, False)]:
        root.removeHandler(old)
    root.addHandler(_handler(settings, stream or sys.stderr))
    # At debug, libraries log messages whole, payloads included: that level is for our own lines.
    root.setLevel(max(level, logging.INFO))
    logging.getLogger(_ROOM).setLevel(level)
    for name, at_least in _QUIETED.items():
        logging.getLogger(name).setLevel(max(level, at_least))
    _adopt_libraries()
    logging.captureWarnings(True)


def setup_celery_logging(settings: LogSettings) -> None:
    """Keep Celery from setting up logging of its own, in worker and beat alike.

    A receiver of ``celery.signals.setup_logging`` is what stops it from taking the root logger.
    """
    from celery.signals import setup_logging

    def _ours(**_: object) -> None:
        configure(settings)

    setup_logging.connect(_ours, weak=False, dispatch_uid="gpuinfer.log")


def _adopt_libraries() -> None:
    """Let lines of libraries that bring handlers of their own rise to the root, so that each comes once."""
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
        _timestamp,
    ]


def _handler(settings: LogSettings, stream: TextIO) -> logging.Handler:
    handler = logging.StreamHandler(stream)
    setattr(handler, _MARK, True)
    terminal = stream.isatty()
    as_json = settings.format == "json" or (settings.format == "auto" and not terminal)
    handler.setFormatter(
        ProcessorFormatter(
            foreign_pre_chain=_common(),
            processors=[
                _name_action,
                ProcessorFormatter.remove_processors_meta,
                *_renderer(as_json, terminal),
            ],
        )
    )
    return handler


def _renderer(as_json: bool, colours: bool) -> list[Processor]:
    if as_json:
        return [structlog.processors.format_exc_info, _order, _to_json]
    # The plain traceback: rich's would show local variables, and so payloads.
    console = structlog.dev.ConsoleRenderer(
        colors=colours, event_key="action", exception_formatter=structlog.dev.plain_traceback
    )
    return [_foreign_text_first, console]


def _timestamp(_: WrappedLogger, __: str, line: EventDict) -> EventDict:
    now = datetime.now(UTC).isoformat(timespec="milliseconds")
    line["timestamp"] = now.removesuffix("+00:00") + "Z"
    return line


def _name_action(_: WrappedLogger, __: str, line: EventDict) -> EventDict:
    event = line.pop("event", "")
    if line.get("_from_structlog"):
        line["action"] = event
    else:
        line["action"] = line.get("logger", "root")
        line["message"] = event
    return line


def _foreign_text_first(_: WrappedLogger, __: str, line: EventDict) -> EventDict:
    """On a terminal a foreign line's text is what one wants to read; its logger's name is beside it."""
    if "message" in line:
        line["action"] = line.pop("message")
    return line


def _order(_: WrappedLogger, __: str, line: EventDict) -> EventDict:
    first = {key: line.pop(key) for key in _FIRST if key in line}
    return {**first, **line}


def _to_json(_: WrappedLogger, __: str, line: MutableMapping[str, Any]) -> str:
    try:
        return orjson.dumps(line, default=_plain, option=orjson.OPT_NON_STR_KEYS).decode()
    except TypeError:
        # Half a surrogate, as in a file name that is not UTF-8, or a number beyond 64 bits.
        return json.dumps(line, default=_plain, skipkeys=True)


def _plain(value: object) -> str:
    """Tell what a value is where it cannot be shown; tensors and bytes are payload, so only their type."""
    if isinstance(value, PurePath | BaseException | frozenset | set):
        return str(value)
    return f"<{type(value).__name__}>"
