# SPDX-License-Identifier: Apache-2.0
"""What of an error is told to whom: administrators all of it, others nothing of the hosts. Pure.

What goes wrong inside a model or at Redis is told in that host's words, with paths of its files and traces of
its programs. They are in the journal.
"""

from __future__ import annotations

import re
from typing import Any

from gpuinfer.errors import BrokerError, ConfigError, GpuinferError, QueueFull

#: An absolute path of two parts or more, without what stands before its last one.
_PATH = re.compile(r"""(?<![\w/:.…])(?:/[^\s/'"`<>(),;:]+)+(?=/([^\s/'"`<>(),;:]+))/""")
#: Where Redis is.
_URL = re.compile(r"\b(?:redis|rediss|unix|gpuinfer(?:\+socket)?)://[^\s,;'\"]*")
#: Where a trace begins of Python or TorchScript, whose last line is the error, and of C++ as torch writes it.
_TRACE = re.compile(r"\s*Traceback\b[^\n]*\(most recent call last\):")
_CALLS = re.compile(r"\s*(?:Exception raised from|C\+\+ CapturedTraceback:)")
_AWAY = "the queue cannot be used now; the log of this server says why"


def told(error: GpuinferError, path: str = "") -> dict[str, Any]:
    """Return ``error.to_dict()`` without what is of the hosts. ``path``: the request's own, which is none."""
    return error.to_dict() | {"message": words(error, path)}


def words(error: GpuinferError, path: str = "") -> str:
    """Return an error's message without what is of the hosts."""
    if isinstance(error, ConfigError) or (
        isinstance(error, BrokerError) and not isinstance(error, QueueFull)
    ):
        return _AWAY
    return plain(error.message, path)


def plain(text: str, path: str = "") -> str:
    """Return a text without traces, addresses of Redis and the folders of files."""
    if calls := _CALLS.search(text):
        text = text[: calls.start()]
    found = _TRACE.search(text)
    if found:
        last = text[found.end() :].strip().rpartition("\n")[2].strip()
        text = f"{text[: found.start()]}: {last}".strip(": \n") if last else text[: found.start()]
    text = _URL.sub("…", text)
    if "/" not in text:
        return text
    kept = "\0"  # JSON's texts may hold it; an error's words do not
    if path.count("/") > 1:
        text = text.replace(path, kept)
    return _PATH.sub("…/", text).replace(kept, path)
