# SPDX-License-Identifier: Apache-2.0
"""The Lua scripts, one file each in ``lua/``, bound to a Redis client."""

from __future__ import annotations

from functools import cache
from importlib import resources
from typing import Any, Literal

Name = Literal[
    "claim",
    "begin",
    "settle",
    "release",
    "restore",
    "bury",
    "submit",
    "revive",
    "cancel",
    "life",
    "heartbeat",
    "tell",
    "keep",
]


@cache
def source(name: Name) -> str:
    """Return a script's text."""
    return resources.files(__package__).joinpath("lua", f"{name}.lua").read_text(encoding="utf-8")


def bind(client: Any, name: Name) -> Any:
    """Return a callable script: EVALSHA, loaded again when Redis has forgotten it."""
    return client.register_script(source(name))
