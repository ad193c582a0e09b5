# SPDX-License-Identifier: Apache-2.0
"""Removes details of hosts from errors, unless the caller is an administrator. Pure.

Errors in a model or from Redis may contain paths and tracebacks of that host. The journal has them in full.
"""

from __future__ import annotations

import re
from typing import Any

from gpuinfer.errors import BrokerError, ConfigError, GpuinferError, QueueFull

#: The folder of an absolute path with at least two parts.
_PATH = re.compile(r"""(?<![\w/:.…])(?:/[^\s/'"`<>(),;:]+)+(?=/([^\s/'"`<>(),;:]+))/""")
#: The address of Redis.
_URL = re.compile(r"\b(?:redis|rediss|unix|gpuinfer(?:\+socket)?)://[^\s,;'\"]*")
#: Beginning of a traceback of Python or TorchScript (the last line is the error), and of C++ as torch writes
#: it.
_TRACE = re.compile(r"\s*Traceback\b[^\n]*\(most recent call last\):")
_CALLS = re.compile(r"\s*(?:Exception raised from|C\+\+ CapturedTraceback:)")
_AWAY = "the queue is unavailable; see this server's log"


def told(error: GpuinferError, path: str = "") -> dict[str, Any]:
    """Return ``error.to_dict()`` without details of hosts. ``path``: the request's path, which is kept."""
    return error.to_dict() | {"message": words(error, path)}


def words(error: GpuinferError, path: str = "") -> str:
    """Return an error's message without details of hosts."""
    if isinstance(error, ConfigError) or (
        isinstance(error, BrokerError) and not isinstance(error, QueueFull)
    ):
        return _AWAY
    return plain(error.message, path)


def plain(text: str, path: str = "") -> str:
    """Return a text without tracebacks, addresses of Redis and folders of files."""
    if calls := _CALLS.search(text):
        text = text[: calls.start()]
    found = _TRACE.search(text)
    if found:
        last = text[found.end() :].strip().rpartition("\n")[2].strip()
        text = f"{text[: found.start()]}: {last}".strip(": \n") if last else text[: found.start()]
    text = _URL.sub("…", text)
    if "/" not in text:
        return text
    kept = "\0"  # a placeholder that does not occur in error messages
    if path.count("/") > 1:
        text = text.replace(path, kept)
    return _PATH.sub("…/", text).replace(kept, path)
