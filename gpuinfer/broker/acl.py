# SPDX-License-Identifier: Apache-2.0
"""Who may do what in our Redis: one user for each program, with no more rights than it uses.

A user's rights are a root part and selectors, in parentheses; a command is allowed when one of them
allows the command together with all its keys (Redis 7.0 ACL). A script needs its declared keys in
the part that allows EVALSHA; what it then calls is checked command by command. So no user but
admin could delete, overwrite or rename a queue, change the settings, or read all keys' names
(the watcher may SCAN). To publish to Celery's pidbox is to be able to shut workers down: admin alone.

Source: https://redis.io/docs/latest/operate/oss_and_stack/management/security/acl/
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

from gpuinfer.queue import keys
from gpuinfer.settings import QUEUES

#: The users, each with a password file of its name.
USERS = ("admin", "api", "worker", "watcher")

_LISTS = tuple(f"~{queue}*" for queue in QUEUES)
_BELLS = f"~{keys.BELL_PREFIX}*"
_RESULTS = f"~{keys.RESULT_PREFIX}*"
_OURS = "~gpuinfer:*"
#: kombu's own: bindings of the control queues, their replies, and what it has delivered of them.
_KOMBU = ("~_kombu.*", "~*.celery.pidbox*", "~unacked*", "~celeryev*")
_CONNECTION = ("+auth", "+hello", "+ping", "+select", "+quit", "+reset", "+client|setname", "+client|id")
_SCRIPTS = ("+eval", "+evalsha", "+script|load", "+script|exists")
_STATES = ("+get", "+mget", "+set", "+setex", "+del", "+exists", "+getrange", "+expire")
_WATCHING = ("+subscribe", "+unsubscribe", "+psubscribe", "+punsubscribe", "+ssubscribe")


def _selector(*parts: str) -> str:
    return f"({' '.join(parts)})"


#: User -> rules, the root part first.
RULES: Mapping[str, Sequence[str]] = {
    "admin": ("~*", "&*", "+@all"),
    # Appends to queues and reads states; takes nothing out.
    "api": (
        *_CONNECTION,
        *_SCRIPTS,
        *_WATCHING,
        "+publish",
        "+info",
        f"&{keys.RESULT_PREFIX}*",
        *(*_LISTS, _BELLS, _RESULTS, f"~{keys.IDEMPOTENCY_PREFIX}*"),
        _selector("+lpush", "+llen", *_LISTS),
        _selector("+lpush", "+ltrim", _BELLS),
        _selector(*_STATES, _RESULTS, f"~{keys.IDEMPOTENCY_PREFIX}*"),
        _selector("+hlen", "+get", "+mget", "+exists", _OURS),
    ),
    # Claims and settles; writes states, its in-flight hash and the dead letters.
    "worker": (
        *_CONNECTION,
        *_SCRIPTS,
        "+publish",
        "+multi",
        "+exec",
        "+discard",
        "+time",
        "+info",
        *(f"&{keys.RESULT_PREFIX}*", "&/*.celeryev*", "&*.reply.celery.pidbox*"),
        # kombu binds its control queues by script, too.
        *(*_LISTS, _OURS, _RESULTS, *_KOMBU),
        # Lists and our keys are asked for at once.
        _selector("+exists", *_LISTS, _OURS),
        _selector("+rpop", "+rpush", "+lpush", "+llen", "+brpop", *_LISTS),
        _selector("+lpush", "+ltrim", "+brpop", "+rpop", "+llen", _BELLS),
        _selector(
            *("+hset", "+hget", "+hdel", "+hkeys", "+hgetall", "+hlen", "+hexists", "+hincrby"),
            *("+incr", "+set", "+get", "+del", "+exists", "+expire"),
            _OURS,
        ),
        _selector(*_STATES, _RESULTS),
        _selector("+@read", "+@write", "-@dangerous", *_KOMBU),
        # Hears the control channel; to speak there is the admin's.
        _selector(*_WATCHING, "&*"),
    ),
    # Counts, and keeps notes of its own; puts back what a dead worker left.
    "watcher": (
        *_CONNECTION,
        *_SCRIPTS,
        "+scan",
        "+time",
        "+info",
        "+publish",
        f"&{keys.RESULT_PREFIX}*",
        *(*_LISTS, _OURS, _RESULTS),
        _selector("+llen", "+lindex", "+lrange", "+exists", "+rpush", *_LISTS),
        _selector("+hlen", "+hget", "+hmget", "+hkeys", "+hgetall", "+get", "+mget", "+exists", _OURS),
        _selector("+hset", "+hdel", "~" + keys.INFLIGHT_PREFIX + "*", "~" + keys.DEAD),
        _selector("+lpush", "+ltrim", _BELLS),
        _selector(*_STATES, _RESULTS),
        _selector(
            *("+set", "+get", "+del", "+hset", "+hdel", "+lpush", "+ltrim", "+lrange", "+expire", "+exists"),
            "~gpuinfer:watcher:*",
        ),
    ),
}


def render(passwords: Mapping[str, str]) -> str:
    """Return the text of an ACL file. Only the hashes of ``passwords`` are written."""
    lines = ["user default off resetchannels -@all"]
    for user in USERS:
        digest = hashlib.sha256(passwords[user].encode()).hexdigest()
        lines.append(f"user {user} on #{digest} resetchannels -@all {' '.join(RULES[user])}")
    return "\n".join(lines) + "\n"
