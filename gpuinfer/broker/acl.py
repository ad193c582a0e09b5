# SPDX-License-Identifier: Apache-2.0
"""The rights of Redis's users: one user for each program, with no more rights than it uses.

A user's rights are a root part and selectors, in parentheses; a command is allowed when one of them
allows the command together with all its keys (Redis 7.0 ACL). A script needs its declared keys in
the part that allows EVALSHA; each command that it calls is then checked by itself. So only admin can
delete, overwrite or rename a queue, change Redis's configuration, or list all keys. Only admin may
publish to Celery's pidbox, because a message there can shut workers down.

Source: https://redis.io/docs/latest/operate/oss_and_stack/management/security/acl/
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from gpuinfer.queue import keys
from gpuinfer.queue.fleet import HOSTS
from gpuinfer.settings import QUEUES

if TYPE_CHECKING:
    import redis

#: The users of programs, and those of people who are not root; the password file has the user's name.
PROGRAMS = ("admin", "api", "worker", "watcher")
PEOPLE = ("operator", "viewer")
USERS = (*PROGRAMS, *PEOPLE)

_LISTS = tuple(f"~{queue}*" for queue in QUEUES)
_RESULTS = f"~{keys.RESULT_PREFIX}*"
#: Channels on which the end of a task is published: by its id, and for the client process that waits.
_ENDS = (f"&{keys.RESULT_PREFIX}*", f"&{keys.REPLY_PREFIX}*")
_BESIDE = f"~{keys.BESIDE_PREFIX}*"
_KEYED, _ROOM = f"~{keys.KEYED}*", f"~{keys.ROOM}"
_INFLIGHT = f"~{keys.INFLIGHT_PREFIX}*"
_HEARTBEATS = f"~{keys.HEARTBEAT_PREFIX}*"
_EPOCHS = f"~{keys.EPOCH_PREFIX}*"
_WAKE = f"~{keys.WAKE_PREFIX}*"
_IDLE, _ANY_IDLE = f"~{keys.IDLE_PREFIX}*", f"~{keys.IDLE}"
_GROUPS = f"~{keys.GROUPS_PREFIX}*"
_INDEX, _INDEXED = f"~{keys.INDEX_PREFIX}*", f"~{keys.INDEXED}"
_WORKERS, _LEFT, _CATALOGUE = f"~{keys.WORKERS}", f"~{keys.LEFT}", f"~{keys.CATALOGUE}"
_SIGNATURES = f"~{keys.SIGNATURES}"
_DEFAULT_MODEL, _FORMAT = f"~{keys.DEFAULT_MODEL}", f"~{keys.FORMAT_KEY}"
_BODY, _BODIES, _BODY_BYTES = f"~{keys.BODY_PREFIX}*", f"~{keys.BODIES}", f"~{keys.BODY_BYTES}"
_DEAD, _CLAIMED, _ENDED = f"~{keys.DEAD}", f"~{keys.CLAIMED}", f"~{keys.ENDED}"
_HISTORY = (f"~{keys.HISTORY}", f"~{keys.FAILURES}")
_ORIGINS = f"~{keys.ORIGINS}"
_RATES, _WEIGHTS = f"~{keys.RATES}", f"~{keys.WEIGHTS}"
_ORDER, _TURNS = f"~{keys.ORDER_PREFIX}*", f"~{keys.TURNS}"
_AGEING, _AGED = f"~{keys.AGEING_PREFIX}*", f"~{keys.AGED_PREFIX}*"
_FAILED, _FAILED_AGES, _FAILED_BYTES = f"~{keys.FAILED}", f"~{keys.FAILED_AGES}", f"~{keys.FAILED_BYTES}"
_DEAD_AGES, _DEAD_BYTES = f"~{keys.DEAD_AGES}", f"~{keys.DEAD_BYTES}"
_LATER, _LATER_SETS, _DUE = f"~{keys.LATER}", f"~{keys.LATER_PREFIX}*", f"~{keys.DUE}"
_DRAINED = f"~{keys.DRAINED}"
_PAUSED, _HOSTS = f"~{keys.PAUSED}", f"~{HOSTS}"
_USAGE, _COUNTS, _KEY_USED = f"~{keys.USAGE_PREFIX}*", f"~{keys.COUNTS}", f"~{keys.KEY_USED}"
_FLUSHED = f"~{keys.FLUSHED_PREFIX}*"
_SERIES, _CHUNKS = f"~{keys.SERIES}", f"~{keys.SERIES_PREFIX}*"
_PROBE = "~gpuinfer:probe"
_OURS = "~gpuinfer:*"
#: kombu's own keys: bindings of the control queues, their replies, and their unacknowledged messages.
_KOMBU = ("~_kombu.*", "~*.celery.pidbox*", "~unacked*", "~celeryev*")
#: Redis's default number of databases. gpuinfer uses the first one.
_DATABASES = 16
_CONNECTION = ("+auth", "+hello", "+ping", "+select", "+quit", "+reset", "+client|setname", "+client|id")
_SCRIPTS = ("+eval", "+evalsha", "+script|load", "+script|exists")
_LISTENING = ("+subscribe", "+unsubscribe", "+psubscribe", "+punsubscribe")
_TELLING = ("+publish", "+pubsub|numsub", *_ENDS)
#: All commands on one key of any type; none that scans keys or takes no key.
_ANYTHING = (
    *("+@hash", "+@list", "+@set", "+@sortedset", "+@string", "-@dangerous"),
    *("+del", "+unlink", "+exists", "+expire", "+pexpire", "+ttl", "+watch", "+unwatch"),
)


#: Nobody can log in as the default user, but Redis loads the append-only file with its rights. They must
#: allow what is between MULTI and EXEC there, such as all writes of a script; otherwise Redis drops it
#: silently.
DEFAULT = "user default off resetpass ~* &* +@all"


def _selector(*parts: str) -> str:
    return f"({' '.join(parts)})"


#: To add a list to the index, and to wake the idle workers that serve it.
_ANNOUNCING = (
    _selector("+zadd", _INDEX),
    _selector("+sadd", _INDEXED),
    _selector("+zrevrangebyscore", "+zadd", _ORDER),
    _selector("+get", _DEFAULT_MODEL),
    _selector("+zrange", _GROUPS),
    _selector("+exists", _ANY_IDLE),
    _selector("+zrevrange", "+zadd", _IDLE),
    _selector("+lpush", "+ltrim", _WAKE),
)
#: To count what waits and what is in flight, and to see which workers serve it.
_COUNTING = (
    _selector("+llen", *_LISTS),
    _selector("+zrange", _INDEX, _CATALOGUE, _WORKERS),
    _selector("+smembers", _INDEXED),
    _selector("+get", "+mget", _DEFAULT_MODEL, _FORMAT, _PAUSED, _DUE, _DRAINED),
    _selector("+zrange", _LATER),
    # How many tasks wait for their ETA, and how many of them are due. It cannot read them: the sets hold
    # payloads.
    _selector("+zcard", "+zcount", _LATER_SETS),
    _selector("+type", *_LISTS, _INDEX, _LATER_SETS),
    _selector("+hgetall", _CLAIMED),
    _selector("+hlen", _INFLIGHT, _DEAD),
    _selector("+get", _HEARTBEATS),
    # The ages of the dead letters, not the letters.
    _selector("+zrange", _DEAD_AGES),
)
#: To delete a task's large body when the task ends, and to subtract it from the bytes in use.
_DROPPING = (
    _selector("+exists", "+hmget", "+hdel", _BODIES),
    _selector("+hincrby", "+hdel", _BODY_BYTES),
    _selector("+unlink", _BODY),
)
#: To record that a task has ended, without the right to read the history.
_NOTING = (_selector("+lpush", "+ltrim", *_HISTORY),)
#: To free the idempotency key of a task that did not run.
_FREEING = (_selector("+hget", "+hdel", _KEYED),)
#: To store a dead letter or a failed task's message, and to delete the oldest beyond the bounds.
_BURYING = (
    _selector("+hset", "+hexists", "+hdel", "+hstrlen", "+hlen", _DEAD, _FAILED),
    _selector("+zadd", "+zscore", "+zrem", "+zrange", _DEAD_AGES, _FAILED_AGES),
    _selector("+get", "+set", _DEAD_BYTES, _FAILED_BYTES),
    _selector("+strlen", "+unlink", _BODY),
)
#: To send a dead letter or a failed task again, or to delete it.
_REVIVING = (
    _selector("+hget", "+hexists", "+hdel", "+hstrlen", _DEAD, _FAILED),
    _selector("+zrem", _DEAD_AGES, _FAILED_AGES),
    _selector("+get", "+set", _DEAD_BYTES, _FAILED_BYTES),
)
#: To begin an epoch, and to write the first format number.
_BEGINNING = (_selector("+get", "+set", _FORMAT), _selector("+hget", "+hset", _EPOCHS))

#: To move tasks whose ETA has passed into their lists.
_MOVING = (
    _selector("+lpush", *_LISTS),
    _selector("+zrange", "+zadd", "+zrem", "+zremrangebyrank", _LATER, _LATER_SETS),
    _selector("+get", "+set", "+del", _DUE),
)

#: To add to usage accounts and counters, without the right to read them.
_ACCOUNTING = (
    _selector("+hincrby", "+hlen", "+hexists", _USAGE, _COUNTS),
    _selector("+expire", _USAGE),
    _selector("+get", "+set", _FLUSHED),
    _selector("+hset", _KEY_USED),
)
#: To read usage accounts, counters and the history of the main series.
_AUDITING = (
    _selector("+hgetall", _USAGE, _COUNTS, _KEY_USED, _ENDED, _BODY_BYTES, _SERIES, _HOSTS),
    _selector("+getrange", _CHUNKS),
    _selector("+get", _DEAD_BYTES),
    _selector("+memory|usage", *_LISTS),
)
#: To write the history, and the watcher's counters.
_RECORDING = (
    *_ACCOUNTING,
    _selector("+hlen", "+hexists", "+hset", "+hdel", _SERIES),
    _selector("+exists", "+setrange", "+expire", _CHUNKS),
)


def _chaining(queues: Sequence[str]) -> str:
    """Return the right to send the next task of a chain to these queues of other applications, or to ours."""
    foreign = [f"~{queue}{end}" for queue in queues for end in ("", f"{keys.SEP}*")]
    return _selector("+lpush", *_LISTS, *foreign)


#: User -> rules, the root part first.
RULES: Mapping[str, Sequence[str]] = {
    "admin": ("~*", "&*", "+@all"),
    # Appends to queues, and reads and deletes states. It takes nothing out of queues, and can read no payload
    # except that of a dead letter, which it may send again.
    "api": (
        *(*_CONNECTION, *_SCRIPTS, *_LISTENING, *_TELLING, "+time", "+info"),
        *(*_LISTS, _RESULTS, _BODY),
        _selector("+lpush", "+exists", *_LISTS),
        # Writes bodies, and cannot read them.
        _selector("+set", "+exists", "+persist", "+strlen", "+ttl", _BODY),
        _selector("+hsetnx", _BODIES),
        _selector("+zscore", _CATALOGUE),
        _selector("+hget", _SIGNATURES),
        _selector("+zadd", _LATER, _LATER_SETS),
        _selector("+set", "+del", _DUE),
        _selector("+get", "+mget", "+set", "+getrange", _RESULTS),
        _selector("+hget", "+hset", "+hlen", "+unlink", "+rename", _KEYED),
        _selector("+hincrby", "+hget", "+hset", _ROOM),
        _selector("+memory|usage", *_LISTS, _LATER_SETS),
        _selector("+hgetall", _BODY_BYTES, _HOSTS),
        _selector("+hget", _BODY_BYTES),
        # Keeps the callers' rates and weights.
        _selector("+hget", "+hset", _RATES),
        _selector("+hkeys", "+hset", "+hdel", _WEIGHTS),
        _selector("+hget", _CLAIMED),
        _selector("+hincrby", _ENDED),
        *_DROPPING,
        *_NOTING,
        _selector("+llen", "+lindex", "+lrange", *_HISTORY),
        _selector("+zadd", "+zscore", "+zremrangebyrank", _ORIGINS),
        _selector("+ttl", "+unlink", _RESULTS),
        *_ACCOUNTING,
        *_AUDITING,
        *_REVIVING,
        *_ANNOUNCING,
        *_COUNTING,
    ),
    # Claims and settles; writes states, its in-flight hash and the dead letters, which it cannot read. Moves
    # tasks of other models from the lists of the default model to their own.
    "worker": (
        *(*_CONNECTION, *_SCRIPTS, *_TELLING, "+multi", "+exec", "+discard", "+time", "+info"),
        # Ends its own blocking wait; Redis does not check whose connection it is.
        "+client|unblock",
        *("&/*.celeryev*", "&*.reply.celery.pidbox*"),
        # kombu binds its control queues by script, too.
        *(*_LISTS, _OURS, _RESULTS, *_KOMBU),
        _selector("+rpop", "+rpush", "+lpush", "+lrem", "+lindex", "+lrange", *_LISTS),
        _selector("+exists", *_LISTS, _INDEX),
        _selector("+zunion", "+zrem", _INDEX),
        _selector("+srem", _INDEXED),
        _selector("+zadd", "+zrem", "+zcount", "+zremrangebyscore", "+del", _IDLE, _ANY_IDLE),
        _selector("+zadd", "+zrem", "+zrangebyscore", "+zcount", "+zscore", _GROUPS),
        _selector("+brpop", _WAKE),
        _selector("+exists", "+hset", "+hget", "+hmget", "+hdel", "+hkeys", "+hexists", _INFLIGHT),
        _selector("+hset", "+hmget", "+hdel", _TURNS),
        _selector("+hmget", _WEIGHTS),
        _selector("+zrange", "+zrem", "+zadd", "+del", _ORDER),
        _selector("+hget", "+hgetall", "+hset", "+hincrby", "+hdel", "+del", _AGEING),
        _selector("+mget", _AGED, _DEFAULT_MODEL, _PAUSED, _DUE, _DRAINED),
        _selector("+set", _AGED, _DEFAULT_MODEL),
        # So that root can drain a worker on its own host.
        _selector("+set", "+del", _DRAINED),
        _selector("+hincrby", "+hget", "+hmget", _CLAIMED),
        _selector("+hincrby", _ENDED),
        *_BURYING,
        _selector("+zadd", "+zscore", "+zcard", "+zrangebyscore", "+zremrangebyscore", _CATALOGUE),
        _selector("+hget", "+hset", "+hkeys", "+hdel", _SIGNATURES),
        _selector("+zadd", "+zrem", "+zrangebyscore", "+zscore", _WORKERS),
        _selector("+zadd", _LEFT),
        _selector("+set", _HEARTBEATS),
        _selector("+del", _HEARTBEATS, _WAKE),
        _selector("+expire", _PROBE),
        _selector("+get", "+mget", "+set", "+setex", "+del", "+exists", "+getrange", "+expire", _RESULTS),
        # Ends what is revoked through Celery; of one that nothing is known of, it asks who made its id.
        _selector("+zscore", _ORIGINS),
        _selector("+get", _BODY),
        *_DROPPING,
        *_NOTING,
        *_FREEING,
        *_ACCOUNTING,
        # A large result is written under a temporary key, and renamed when its task has ended.
        _selector("+set", "+strlen", "+rename", _BESIDE, _RESULTS),
        *_BEGINNING,
        *_ANNOUNCING,
        *_COUNTING,
        *_MOVING,
        _selector(*_ANYTHING, *_KOMBU),
        # Subscribes to the control channel; only admin may publish there. A pattern would let it receive the
        # end of every task.
        _selector(*_LISTENING, *(f"&/{database}.celery.pidbox" for database in range(_DATABASES))),
    ),
    # Counts, keeps its own notes, and records which models its host could serve. Puts back the tasks of dead
    # workers, and may read them for that.
    "watcher": (
        *(*_CONNECTION, *_SCRIPTS, *_TELLING, "+time", "+info"),
        *(*_LISTS, _OURS, _RESULTS),
        _selector("+rpush", *_LISTS),
        _selector("+hget", "+hexists", "+hmget", "+hkeys", "+hset", "+hdel", _INFLIGHT),
        # Deletes the counters of callers that have no waiting task.
        _selector("+hscan", "+hdel", _CLAIMED, _TURNS, _ROOM, _RATES),
        _selector("+exists", *_LISTS),
        _selector("+zscore", _LATER),
        # Deletes the epochs of workers that are gone for good.
        _selector("+hdel", _EPOCHS),
        _selector("+zscore", _WORKERS),
        _selector("+zrange", "+zrem", _LEFT),
        *_BURYING,
        _selector("+hincrby", _CLAIMED, _ENDED, _COUNTS),
        _selector("+hget", _CLAIMED),
        _selector("+zadd", "+zscore", "+zcard", "+zremrangebyscore", _CATALOGUE),
        _selector("+hget", "+hset", "+hkeys", "+hdel", _SIGNATURES),
        _selector("+set", "+mget", "+getrange", "+expire", _RESULTS),
        *_DROPPING,
        *_NOTING,
        *_FREEING,
        *_AUDITING,
        *_RECORDING,
        *_BEGINNING,
        *_ANNOUNCING,
        *_COUNTING,
        *_MOVING,
        _selector(*_ANYTHING, "~gpuinfer:watcher:*"),
    ),
    # Reads all of gpuinfer's keys, and acts on queues and tasks. No right to Redis's configuration and users,
    # other programs' keys, or Celery's control channel.
    "operator": (
        *(*_CONNECTION, *_SCRIPTS, *_LISTENING, *_TELLING, *_ANYTHING, "+time", "+info"),
        *("+rename", "+persist", "+type", "+memory|usage", *_LISTS, _RESULTS, _OURS),
    ),
    # Counts, and reads states of workers and the watchers' decisions; no payload and no result.
    "viewer": (
        *(*_CONNECTION, *_SCRIPTS, "+time", "+info", *_LISTS),
        *_COUNTING,
        *_AUDITING,
        _selector("+zscore", _CATALOGUE),
        _selector("+hget", _EPOCHS),
        _selector("+get", "+lrange", "+hgetall", "+exists", "+zrange", "~gpuinfer:watcher:*"),
    ),
}


#: Users that end tasks, and send the next task of a chain.
_ENDING = ("worker", "watcher", "operator")


def digest(password: str) -> str:
    """Return the SHA-256 of a password, in hex, as Redis keeps it."""
    return hashlib.sha256(password.encode()).hexdigest()


def rules(
    passwords: Mapping[str, str],
    chain_queues: Sequence[str] = ("celery",),
    older: Mapping[str, Sequence[str]] | None = None,
) -> dict[str, list[str]]:
    """Return each user's rules as ``ACL SETUSER`` takes them after ``reset``; of passwords, their hashes.

    ``chain_queues``: queues of other applications that chains may use. ``older``: user -> hashes of passwords
    that are still valid while its password is being changed.
    """
    found = {"default": DEFAULT.split()[2:]}
    for user in USERS:
        now = [digest(passwords[user])] if passwords[user] else []
        hashes = dict.fromkeys((*now, *(older or {}).get(user, ())))
        state = "on" if hashes else "off"
        found[user] = [state, *(f"#{one}" for one in hashes), "resetchannels", "-@all", *RULES[user]]
        if user in _ENDING:
            found[user].append(_chaining(chain_queues))
    return found


def render(
    passwords: Mapping[str, str],
    chain_queues: Sequence[str] = ("celery",),
    older: Mapping[str, Sequence[str]] | None = None,
) -> str:
    """Return the text of an ACL file. Only the hashes of ``passwords`` are written."""
    return "".join(
        f"user {user} {' '.join(parts)}\n" for user, parts in rules(passwords, chain_queues, older).items()
    )


def apply(
    client: redis.Redis,
    passwords: Mapping[str, str],
    chain_queues: Sequence[str] = ("celery",),
    older: Mapping[str, Sequence[str]] | None = None,
    more: Mapping[str, Sequence[str]] | None = None,
) -> list[str]:
    """Give the users of a running Redis these rules; return those that had others. Raises redis-py's errors.

    ``more``: the administrator's own users -> their rules. Each user is changed by one command, so that no
    connection is closed or refused meanwhile. Other users are not changed.
    """
    before = listed(client)
    wanted = {**(more or {}), **rules(passwords, chain_queues, older)}
    give(client, wanted)
    after = listed(client)
    return [user for user in wanted if after[user] != before.get(user)]


def give(client: redis.Redis, users: Mapping[str, Sequence[str]]) -> None:
    """Give users these rules, and no other. Raises redis-py's errors."""
    for user, parts in users.items():
        client.execute_command("ACL", "SETUSER", user, "reset", *parts)  # type: ignore[no-untyped-call]


def listed(client: redis.Redis) -> dict[str, list[list[str]]]:
    """Return user -> rules by selector, sorted: Redis's order differs with where they come from.

    ``sanitize-payload`` is left out: ``reset`` adds it, and it changes nothing here.
    """
    lines = [line.decode() if isinstance(line, bytes) else str(line) for line in client.acl_list()]
    return {
        line.split()[1]: [sorted(set(part.split()) - {"sanitize-payload"}) for part in re.split("[()]", line)]
        for line in lines
    }
