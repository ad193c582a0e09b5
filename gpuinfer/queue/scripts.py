# SPDX-License-Identifier: Apache-2.0
"""The queue's Lua scripts, as redis-py script objects.

A script may name libraries (``-- needs: lists states``), which are put before it; the names of ``keys`` are
replaced by their values. An indented ``needs`` line within the script puts its libraries at that place: each
function definition takes time in every call that passes it, so libraries that few calls need are put there.

Redis Functions, whose closures persist between calls, were tried for submit, claim, begin and settle: they
took 123 us a task, alternating with scripts, which took 118; at best 90 against 93. Twenty closures cost 1 to
2 us a call. Other costs dominate for a single task: an empty script takes 3.9 us alone and 2.7 in a packet of
many, with warm caches; a submission 19 and 13, and 42 after a pause of a millisecond. A command adds 0.3 us,
a write or a PUBLISH 0.5 to 1. So fewer calls per task help (a single task begins with its claim), but shorter
scripts hardly do.

In batches of 256 a task costs 4.1 us to submit, 3.8 to claim, 0.7 to begin and 4.3 to settle. Also tried:
one MSETNX for the states of a bulk (submit 4.4: building its table costs what the calls save), and an entry
in flight without ``seq:list`` (claim and settle up to 0.9 us less together). Most of the rest is spent on
moving the payload: into Lua, into the list, back into Lua, into the in-flight hash, and out.
"""

from __future__ import annotations

import re
from functools import cache
from importlib import resources
from typing import Any, Literal, get_args

from gpuinfer.queue import keys
from gpuinfer.queue.results import PENDING_META

Name = Literal[
    "claim",
    "begin",
    "settle",
    "release",
    "route",
    "restore",
    "postpone",
    "purge",
    "pause",
    "due",
    "bury",
    "trim",
    "drop",
    "submit",
    "put",
    "index",
    "revive",
    "cancel",
    "epoch",
    "register",
    "leave",
    "depth",
    "tell",
    "keep",
    "know",
    "forget",
    "tidy",
    "history",
    "erase",
    "describe",
    "origin",
    "drain",
    "known",
    "account",
    "record",
]

#: Names in the scripts -> their values. AGED_EVERY: at most one of this many claims begins with an aged list.
_CONSTANTS: dict[str, str | float] = {
    "AGED_EVERY": 5,
    "AGED_PREFIX": keys.AGED_PREFIX,
    "AGEING_PREFIX": keys.AGEING_PREFIX,
    "BESIDE_PREFIX": keys.BESIDE_PREFIX,
    "BODIES": keys.BODIES,
    "BODY_BYTES": keys.BODY_BYTES,
    "BODY_PREFIX": keys.BODY_PREFIX,
    "CATALOGUE": keys.CATALOGUE,
    "CLAIMED": keys.CLAIMED,
    "COUNTS": keys.COUNTS,
    "DEAD": keys.DEAD,
    "DEAD_AGES": keys.DEAD_AGES,
    "DEAD_BYTES": keys.DEAD_BYTES,
    "DEFAULT_MODEL": keys.DEFAULT_MODEL,
    "DRAINED": keys.DRAINED,
    "DUE": keys.DUE,
    "ENDED": keys.ENDED,
    "EPOCH_PREFIX": keys.EPOCH_PREFIX,
    "FAILED": keys.FAILED,
    "FAILED_AGES": keys.FAILED_AGES,
    "FAILED_BYTES": keys.FAILED_BYTES,
    "FAILURES": keys.FAILURES,
    "FAILURES_MOST": keys.FAILURES_MOST,
    "FLUSHED_PREFIX": keys.FLUSHED_PREFIX,
    "FLUSHED_VOID": keys.FLUSHED_VOID_S,
    "FORMAT": str(keys.FORMAT),
    "FORMAT_KEY": keys.FORMAT_KEY,
    "GRANT_BYTES": keys.GRANT_BYTES,
    "GROUPS_PREFIX": keys.GROUPS_PREFIX,
    "GROUP_VOID": keys.GROUP_VOID_S,
    "HISTORY": keys.HISTORY,
    "HISTORY_MOST": keys.HISTORY_MOST,
    "HISTORY_SLACK": keys.HISTORY_SLACK,
    "HEARTBEAT_PREFIX": keys.HEARTBEAT_PREFIX,
    "IDLE": keys.IDLE,
    "IDLE_PREFIX": keys.IDLE_PREFIX,
    "IDLE_VOID": keys.IDLE_VOID_S,
    "INDEXED": keys.INDEXED,
    "INDEX_PREFIX": keys.INDEX_PREFIX,
    "INFLIGHT_PREFIX": keys.INFLIGHT_PREFIX,
    "KEYED": keys.KEYED,
    "KEYED_BEFORE": keys.KEYED_BEFORE,
    "KEYED_BYTES": keys.KEYED_BYTES,
    "KEY_USED": keys.KEY_USED,
    "LATER": keys.LATER,
    "LEFT": keys.LEFT,
    "LATER_PREFIX": keys.LATER_PREFIX,
    "LATER_RETRY": keys.LATER_RETRY_S,
    "MOST_COUNTS": keys.MOST_COUNTS,
    "MODEL_VOID": keys.MODEL_VOID_S,
    "ONE_MODEL": keys.ONE_MODEL,
    "ORDER_PREFIX": keys.ORDER_PREFIX,
    "ORIGINS": keys.ORIGINS,
    "ORIGINS_MOST": keys.ORIGINS_MOST,
    "PAUSED": keys.PAUSED,
    "PENDING_META": PENDING_META.decode(),
    "PENDING_HEAD": '{"status": "PENDING", "result": ',
    "RATES": keys.RATES,
    "REPLY_PREFIX": keys.REPLY_PREFIX,
    "RESULT_PREFIX": keys.RESULT_PREFIX,
    "ROOM": keys.ROOM,
    "SERIES": keys.SERIES,
    "SIGNATURES": keys.SIGNATURES,
    "SIGNATURE_VOID": keys.SIGNATURE_VOID_S,
    "TURNS": keys.TURNS,
    "USAGE_KEPT": keys.USAGE_KEPT_S,
    "USAGE_PREFIX": keys.USAGE_PREFIX,
    "WEIGHTS": keys.WEIGHTS,
    "WAKE_PREFIX": keys.WAKE_PREFIX,
    "WOKEN_VOID": keys.WOKEN_VOID_S,
    "WORKERS": keys.WORKERS,
    "WORKER_VOID": keys.WORKER_VOID_S,
}
#: A function of a library, or a one-line definition of variables.
_LOCAL = re.compile(
    r"^local function (\w+)\((?:[^\n]* end\n|.*?^end\n)|^local (?!function)(\w+(?:, \w+)*)(?: =[^\n]*)?\n",
    re.MULTILINE | re.DOTALL,
)
_COMMENT = re.compile(r"^ *--[^\n]*\n", re.MULTILINE)
#: A string, in which nothing is replaced, or the name of a constant.
_WORD = re.compile(rf"'[^'\n]*'|\b({'|'.join(_CONSTANTS)})\b")
_NEEDS = re.compile(r"^-- needs: (.+)\n", re.MULTILINE)
_NEEDS_HERE = re.compile(r"^ +-- needs: (.+)\n", re.MULTILINE)


def text(name: str) -> str:
    """Return the unchanged text of a file in the folder ``lua``."""
    return resources.files(__package__).joinpath("lua", f"{name}.lua").read_text(encoding="utf-8")


@cache
def source(name: Name) -> str:
    """Return a script's complete text, as Redis gets it."""
    return _WORD.sub(lambda word: _lua(_CONSTANTS[word[1]]) if word[1] else word[0], code(name))


def read_all() -> None:
    """Read every script now: an upgrade may replace the files while this process runs."""
    for name in get_args(Name):
        source(name)


def code(name: Name) -> str:
    """Return a script's text with its libraries, but with constants still as names."""
    head, _, body = text(name).partition("\n")
    body = _NEEDS_HERE.sub(lambda here: _libraries(here[1], body), body)
    needs = _NEEDS.search(body)
    libraries = _libraries(needs[1], body) if needs else ""
    return f"{head}\n" + _COMMENT.sub("", libraries + body)


def _libraries(names: str, body: str) -> str:
    """Return the text of libraries without the functions and variables that a script never uses."""
    libraries = "".join(map(text, names.split()))
    found = {part[1] or part[2]: part[0] for part in _LOCAL.finditer(libraries)}
    unused, whole = set(found), _COMMENT.sub("", body)
    while used := {one for one in unused if re.search(rf"\b(?:{one.replace(', ', '|')})\b", whole)}:
        unused -= used
        whole += _COMMENT.sub("", "".join(found[one] for one in used))
    for one in unused:
        libraries = libraries.replace(found[one], "")
    return libraries


def _lua(value: str | float) -> str:
    return str(value) if isinstance(value, (int, float)) else f"'{value}'"


def bind(client: Any, name: Name) -> Any:
    """Return a callable script: EVALSHA, loaded again if Redis does not know it."""
    return client.register_script(source(name))
