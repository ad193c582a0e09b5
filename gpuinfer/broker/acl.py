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
_RESULT_CHANNELS = f"&{keys.RESULT_PREFIX}*"
_KEYED = f"~{keys.IDEMPOTENCY_PREFIX}*"
_INFLIGHT = f"~{keys.INFLIGHT_PREFIX}*"
_HEARTBEATS = f"~{keys.HEARTBEAT_PREFIX}*"
_LIVES = f"~{keys.LIFE_PREFIX}*"
_DEAD, _WAITING, _CLAIMED = f"~{keys.DEAD}", f"~{keys.WAITING}", f"~{keys.CLAIMED}"
_PROBE = "~gpuinfer:probe"
_OURS = "~gpuinfer:*"
#: kombu's own: bindings of the control queues, their replies, and what it has delivered of them.
_KOMBU = ("~_kombu.*", "~*.celery.pidbox*", "~unacked*", "~celeryev*")
_CONNECTION = ("+auth", "+hello", "+ping", "+select", "+quit", "+reset", "+client|setname", "+client|id")
_SCRIPTS = ("+eval", "+evalsha", "+script|load", "+script|exists")
_LISTENING = ("+subscribe", "+unsubscribe", "+psubscribe", "+punsubscribe")
#: All that is done to a key by itself, of whatever kind; nothing that walks over keys or has none.
_ANYTHING = (
    *("+@hash", "+@list", "+@set", "+@sortedset", "+@string", "-@dangerous"),
    *("+del", "+unlink", "+exists", "+expire", "+pexpire", "+ttl", "+watch", "+unwatch"),
)


#: Nobody can log in as the default user, but Redis reads the append-only file back with its rights: what
#: stands between MULTI and EXEC there, as all that a script wrote does, they must allow. Else it is dropped,
#: silently.
DEFAULT = "user default off resetpass ~* &* +@all"


def _selector(*parts: str) -> str:
    return f"({' '.join(parts)})"


#: User -> rules, the root part first.
RULES: Mapping[str, Sequence[str]] = {
    "admin": ("~*", "&*", "+@all"),
    # Appends to queues and reads states; takes nothing out, and sees no payload.
    "api": (
        *(*_CONNECTION, *_SCRIPTS, *_LISTENING, "+publish", "+time", "+info", _RESULT_CHANNELS),
        *(*_LISTS, _BELLS, _RESULTS, _KEYED),
        _selector("+lpush", "+llen", *_LISTS),
        _selector("+lpush", "+ltrim", _BELLS),
        _selector("+get", "+mget", "+set", "+exists", "+getrange", _RESULTS),
        _selector("+get", "+set", _KEYED),
        _selector("+get", "+mget", "+exists", _HEARTBEATS),
        _selector("+hlen", _INFLIGHT, _DEAD),
    ),
    # Claims and settles; writes states, its in-flight hash and the dead letters, which it cannot drop.
    "worker": (
        *(*_CONNECTION, *_SCRIPTS, "+publish", "+multi", "+exec", "+discard", "+time", "+info"),
        # Ends a wait of its own; Redis does not ask whose it is.
        "+client|unblock",
        *(_RESULT_CHANNELS, "&/*.celeryev*", "&*.reply.celery.pidbox*"),
        # kombu binds its control queues by script, too.
        *(*_LISTS, _OURS, _RESULTS, *_KOMBU),
        _selector("+exists", "+rpop", "+rpush", "+llen", *_LISTS),
        _selector("+lpush", "+ltrim", "+brpop", "+llen", _BELLS),
        _selector("+hset", "+hget", "+hdel", "+hkeys", _INFLIGHT),
        _selector("+exists", "+hset", "+hdel", "+hgetall", _WAITING),
        _selector("+hincrby", _CLAIMED),
        _selector("+hset", _DEAD),
        _selector("+get", "+set", _LIVES),
        _selector("+set", "+del", _HEARTBEATS),
        _selector("+expire", _PROBE),
        _selector("+get", "+mget", "+set", "+setex", "+del", "+exists", "+getrange", _RESULTS),
        _selector(*_ANYTHING, *_KOMBU),
        # Hears the control channel; to speak there is the admin's.
        _selector(*_LISTENING, "&*"),
    ),
    # Counts, and keeps notes of its own; puts back what a dead worker left, for which it may read that.
    "watcher": (
        *(*_CONNECTION, *_SCRIPTS, "+publish", "+scan", "+time", "+info", _RESULT_CHANNELS),
        *(*_LISTS, _OURS, _RESULTS),
        _selector("+llen", "+exists", "+rpush", *_LISTS),
        _selector("+lpush", "+ltrim", _BELLS),
        _selector("+hlen", "+hget", "+hkeys", "+hset", "+hdel", _INFLIGHT),
        _selector("+get", "+set", _LIVES),
        _selector("+hlen", "+hset", _DEAD),
        _selector("+hget", "+hmget", "+hgetall", _WAITING, _CLAIMED),
        _selector("+hincrby", _CLAIMED),
        _selector("+get", "+mget", "+exists", _HEARTBEATS),
        _selector("+set", "+getrange", _RESULTS),
        _selector(*_ANYTHING, "~gpuinfer:watcher:*"),
    ),
}


def render(passwords: Mapping[str, str]) -> str:
    """Return the text of an ACL file. Only the hashes of ``passwords`` are written."""
    lines = [DEFAULT]
    for user in USERS:
        digest = hashlib.sha256(passwords[user].encode()).hexdigest()
        lines.append(f"user {user} on #{digest} resetchannels -@all {' '.join(RULES[user])}")
    return "\n".join(lines) + "\n"
