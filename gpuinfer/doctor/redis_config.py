# SPDX-License-Identifier: Apache-2.0
"""Our own Redis and its files: does it run as they say now, and with the users they name.

What the files mean is asked of Redis itself: one that is started for a moment (``broker.trial``).
"""

from __future__ import annotations

from gpuinfer.broker import acl, passwords, trial
from gpuinfer.broker.cli import MORE_USERS, more_users
from gpuinfer.broker.durability import planned
from gpuinfer.broker.tuning import host_memory_bytes, render
from gpuinfer.doctor.broker import asked
from gpuinfer.doctor.disk import redis_folder
from gpuinfer.doctor.finding import Finding, Findings, Skipped, edit, ok, warning
from gpuinfer.doctor.host import Host
from gpuinfer.doctor.redis_place import OUR_CONF, place_of
from gpuinfer.doctor.redis_tuning import running, texts
from gpuinfer.errors import ConfigError

CONF, TUNING = OUR_CONF, "/run/gpuinfer/redis/tuning.conf"
RESTART = "systemctl restart gpuinfer-redis"
#: What a trial has of its own, and what it is asked not to have.
_NOT_COMPARED = frozenset((*trial.APART, "dir", "unixsocket", "bind", "requirepass", "masterauth"))
_SHOWN = 5


def as_configured(host: Host) -> Findings:
    """The running instance does what its files and the settings say, as they are now."""
    _need_ours(host)
    found = running(host, "*")
    # tuning.conf as the next start would write it: the settings may have changed since the last.
    text = host.read(CONF).replace(f"include {TUNING}", _tuned(host))
    try:
        with trial.redis_server(trial.BINARY, text) as client:
            wanted = texts(client.config_get("*"))
    except trial.NotUp as exc:
        return warning(f"Redis does not start with {CONF} as it is now: {exc.message}", edit(CONF))
    compared = [key for key in wanted if key in found and key not in _NOT_COMPARED and "-file" not in key]
    off = [key for key in compared if found[key] != wanted[key]]
    if off:
        words = [f"{key} is {found[key]}, {CONF} says {wanted[key]}" for key in off[:_SHOWN]]
        words += [f"and {len(off) - _SHOWN} more"] if len(off) > _SHOWN else []
        return warning("; ".join(words), RESTART)
    return ok(f"runs as {CONF} says, in {len(compared)} settings")


def users(host: Host) -> Finding:
    """The running instance knows the users that its files name, with their rights and passwords."""
    _need_ours(host)
    try:
        rules = acl.rules(passwords.read(), host.settings.queue.foreign_queues, passwords.older())
        theirs = more_users()
    except ConfigError as exc:
        raise Skipped(f"the users cannot be read: {exc}") from None
    rules |= {words[1]: words[2:] for words in (line.split() for line in theirs.lines)}
    try:
        with trial.redis_server(trial.BINARY) as client:
            for user, parts in rules.items():
                client.execute_command("ACL", "SETUSER", user, "reset", *parts)  # type: ignore[no-untyped-call]
            wanted = acl.listed(client)
    except trial.NotUp as exc:
        raise Skipped(f"a Redis to compare with does not start: {exc.message}") from None
    with asked(host) as client:
        found = acl.listed(client)
    off = sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
    if theirs.faults:
        return warning(f"{MORE_USERS}: {theirs.faults[0]}", f"{edit(MORE_USERS)} && {RESTART}")
    if off:
        return warning(f"Redis runs with other users than its files name: {', '.join(off)} differ", RESTART)
    return ok(f"{len(found)} users as the files name them")


def _need_ours(host: Host) -> None:
    if not place_of(host.settings.broker).ours:
        raise Skipped("broker.url names a Redis that is not this package's own")


def _tuned(host: Host) -> str:
    choice = planned(host.settings.redis, host.path(redis_folder(host)), host.path(CONF))
    return render(host.settings.redis, host_memory_bytes(), choice)
