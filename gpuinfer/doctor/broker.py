# SPDX-License-Identifier: Apache-2.0
"""Redis: can it be reached, does it keep what it has, does it run as its files say.

What our own Redis's files mean is asked of a Redis that is started for a moment (``broker.trial``).
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import redis
from redis.exceptions import RedisError

from gpuinfer.broker import acl, durability, passwords, trial
from gpuinfer.broker.cli import MORE_USERS, more_users
from gpuinfer.broker.tuning import host_memory_bytes, render
from gpuinfer.doctor.host import EDIT, Finding, Findings, Host, Skipped, error, ok, warning
from gpuinfer.doctor.redis_place import OUR_CONF, Place, diagnose, place_of
from gpuinfer.errors import ConfigError, FormatMismatch, NotPermitted, UnusableRedis
from gpuinfer.queue import keys
from gpuinfer.queue.connection import connect

#: Does nothing, and is refused whenever a producer's script would be: OOM, MISCONF, READONLY. It names
#: no key, so that any login that may submit may run it.
_WOULD_WRITE = "#!lua\nreturn 1"
_MIB = 1024 * 1024
_FULL_SHARE = 0.85
CONF, TUNING = OUR_CONF, "/run/gpuinfer/redis/tuning.conf"
RESTART = "systemctl restart gpuinfer-redis"
#: Changes a running Redis, so that it loses nothing whether or not it has an append-only file.
APPLY, APPLY_USERS = "gpuinfer redis apply-settings", "gpuinfer redis apply-users"
#: What the first one changes.
_APPLIED = {"maxmemory", "appendfsync"}
#: What a trial has of its own, and what it is not asked about.
_NOT_COMPARED = {*trial.APART, "dir", "unixsocket", "bind", "requirepass", "masterauth"} - {"appendonly"}
#: Where a start looks for the queue.
_HOLD_THE_QUEUE = {"appenddirname", "appendfilename"}


def reach(host: Host) -> Finding:
    """Redis answers this host's login, and takes new work."""
    broker = host.settings.broker
    place = place_of(broker)
    try:
        with connect(broker, retries=0) as client:
            client.ping()
            client.llen(keys.list_key("default", 0))
            client.register_script(_WOULD_WRITE)()
    except UnusableRedis as exc:
        fix = "gpuinfer redis migrate" if isinstance(exc, FormatMismatch) else f"{EDIT}  # broker.url"
        return error(exc.message, fix)
    except (RedisError, OSError) as exc:
        return diagnose(exc, place)
    as_user = f" as user {broker.username}" if broker.username else ""
    return ok(f"Redis at {place.shown} answers{as_user}, and takes new work")


@contextmanager
def asked(host: Host) -> Iterator[redis.Redis]:
    """Lend a connection. Its failures, which ``reach`` reports, are Skipped here."""
    try:
        if host.client is not None:
            yield host.client
            return
        with connect(host.settings.broker, retries=0) as client:
            yield client
    except (RedisError, OSError, UnusableRedis) as exc:
        denied = "NOPERM" in str(exc) or "no permissions" in str(exc)
        why = "this login may not ask" if denied else "Redis cannot be asked; see redis.reach"
        raise Skipped(why) from None


def info(host: Host, *sections: str) -> Mapping[str, Any]:
    """Return sections of INFO. Raises Skipped."""
    with asked(host) as client:
        found: Mapping[str, Any] = client.info(*sections)
        return found


def limits(host: Host) -> Findings:
    """Redis has a memory limit, evicts only results, and keeps the queue over a restart."""
    found, place = info(host, "memory", "persistence"), place_of(host.settings.broker)
    limit, policy = int(found["maxmemory"]), found["maxmemory_policy"]
    fix, bad = place.config("maxmemory-policy", "volatile-ttl"), []
    if policy.startswith("allkeys"):
        bad.append(error(f"maxmemory-policy {policy} evicts whole queues when memory is short", fix))
    elif policy != "volatile-ttl":
        bad.append(warning(f"maxmemory-policy is {policy}; volatile-ttl evicts the oldest results", fix))
    if not limit:
        text = "Redis has no maxmemory: a backlog may take all of the host's memory"
        bad.append(warning(text, place.config("maxmemory", "2gb")))
    if not int(found["aof_enabled"]):
        text = "appendonly is off: a restart of Redis loses the queue"
        bad.append(warning(text, place.config("appendonly", "yes")))
    return bad or ok(f"maxmemory {limit // _MIB} MiB, {policy}, an append-only file")


def usage(host: Host) -> Findings:
    """Redis's memory is not nearly full, and has not been so full that results were evicted."""
    found, place = info(host, "memory", "stats"), place_of(host.settings.broker)
    used, limit, evicted = (int(found[key]) for key in ("used_memory", "maxmemory", "evicted_keys"))
    text = f"{used // _MIB} of {limit // _MIB} MiB used" if limit else f"{used // _MIB} MiB used, no limit"
    bad = []
    if limit and used >= _FULL_SHARE * limit:
        look = f"gpuinfer queue status; {place.cli} MEMORY STATS"
        bad.append(warning(f"{text}: new work will soon be refused", look))
    if evicted:
        fix = f"{EDIT} && {APPLY}  # more redis.maxmemory_mb, or less queue.result_ttl_s"
        if not place.ours:
            fix = f"{place.cli} CONFIG SET maxmemory {2 * limit // _MIB}mb  # or less queue.result_ttl_s"
        bad.append(warning(f"{evicted} results were evicted for lack of memory since Redis started", fix))
    return bad or ok(text)


def file(host: Host) -> Finding:
    """Redis's last writes to its disk succeeded."""
    found, place = info(host, "persistence"), place_of(host.settings.broker)
    words = {"aof_last_write_status": "write", "aof_last_bgrewrite_status": "rewrite of its file"}
    bad = [f"last {word} failed" for key, word in words.items() if found.get(key, "ok") != "ok"]
    if not bad:
        return ok("Redis's last writes to its disk succeeded")
    ours = f"df -h {redis_folder(host)}; journalctl -u gpuinfer-redis -n 20"
    look = ours if place.ours else f"{place.cli} INFO persistence"
    return error(f"Redis's {' and its '.join(bad)}: what is accepted now may be lost", look)


def redis_folder(host: Host) -> str:
    """Return where our own Redis keeps its file, by its configuration."""
    return str(durability.folder_of(host.path(OUR_CONF)))


def durable(host: Host) -> Finding:
    """Redis's disk keeps what was accepted: all of it, or all but two seconds."""
    with asked(host) as client:
        found = durability.running(client)
    if found is None:
        raise Skipped("this Redis user may not ask how Redis writes (CONFIG GET)")
    place, mode = place_of(host.settings.broker), found["appendfsync"]
    better = {"off": ("appendonly", "yes"), "no": ("appendfsync", "everysec")}.get(mode)
    fix, text = place.config(*better) if better else "", f"appendfsync {mode}: {found['means']}"
    if not fix and found["means"].startswith("nothing is promised"):
        fix = f"{place.cli} CONFIG GET dir  # to move it to a disk: the runbook, Backup and restore"
    return warning(text, fix) if fix else ok(text)


def as_configured(host: Host) -> Finding:
    """Our own Redis runs as its files and the settings say now."""
    place = _need_ours(host)
    with asked(host) as client:
        found = durability.configuration(client, "*")
    # tuning.conf as the next start would write it: the settings may have changed since the last.
    choice = durability.planned(host.settings.redis, host.path(redis_folder(host)), host.path(CONF))
    text = host.read(CONF)
    text = text.replace(f"include {TUNING}", render(host.settings.redis, host_memory_bytes(), choice))
    try:
        with trial.redis_server(trial.BINARY, text) as client:
            wanted = durability.configuration(client, "*")
    except trial.NotUp as exc:
        return warning(f"Redis does not start with {CONF} as it is now: {exc.message}", f"editor {CONF}")
    wanted["appendonly"] = durability.stated(host.path(CONF), "appendonly").lower() or "no"
    if not choice.decided:
        del wanted["appendfsync"]
    compared = [key for key in wanted if key in found and key not in _NOT_COMPARED and "-file" not in key]
    off = [key for key in compared if found[key] != wanted[key]]
    if not off:
        return ok(f"runs as {CONF} says, in {len(compared)} settings")
    words = [f"{key} is {found[key]}, {CONF} says {wanted[key]}" for key in off[:5]]
    text = f"{len(off)} settings differ: {'; '.join(words)}"
    if _APPLIED.issuperset(off):
        return warning(text, APPLY)
    if found.get("appendonly") == wanted["appendonly"] == "yes" and not _HOLD_THE_QUEUE & {*off}:
        return warning(text, RESTART)
    return warning(f"{text}; a restart now would lose the queue", place.config("appendonly", "yes"))


def users(host: Host) -> Findings:
    """Our own Redis knows the users that its files name, with their rights and passwords."""
    place = _need_ours(host)
    try:
        rules = acl.rules(passwords.read(), host.settings.queue.foreign_queues, passwords.older())
        theirs = more_users()
    except (ConfigError, NotPermitted) as exc:
        raise Skipped(f"the users cannot be read: {exc}") from None
    rules |= {words[1]: words[2:] for words in (line.split() for line in theirs.lines)}
    try:
        with trial.redis_server(trial.BINARY) as client:
            acl.give(client, rules)
            wanted = acl.listed(client)
    except trial.NotUp as exc:
        raise Skipped(f"a Redis to compare with does not start: {exc.message}") from None
    with asked(host) as client:
        found = acl.listed(client)
    off = sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
    bad = [warning(f"{MORE_USERS}: {fault}", f"editor {MORE_USERS}") for fault in theirs.faults[:1]]
    if named := [name for name in off if name in rules]:
        text = f"Redis has other rights or passwords than its files for {', '.join(named)}"
        bad.append(warning(text, APPLY_USERS))
    if strangers := [name for name in off if name not in rules]:
        names = ", ".join(strangers)
        text = f"Redis has users that {MORE_USERS} does not name, and would lose them at a restart: {names}"
        drop = f"{place.cli} ACL DELUSER {' '.join(map(shlex.quote, strangers))}"
        bad.append(warning(text, f"editor {MORE_USERS}  # add whom to keep; to drop them: {drop}"))
    return bad or ok(f"{len(found)} users as the files name them")


def _need_ours(host: Host) -> Place:
    if not (place := place_of(host.settings.broker)).ours:
        raise Skipped("broker.url names a Redis that is not the package's own")
    return place
