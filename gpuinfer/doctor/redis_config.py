# SPDX-License-Identifier: Apache-2.0
"""Our own Redis and its files: does it run as they say now, line by line, and with the users they name."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Mapping, Sequence

import redis

from gpuinfer.broker import acl, passwords
from gpuinfer.broker.cli import MORE_USERS, more_users
from gpuinfer.broker.durability import planned
from gpuinfer.broker.tuning import host_memory_bytes, render
from gpuinfer.doctor.broker import asked
from gpuinfer.doctor.disk import redis_folder
from gpuinfer.doctor.finding import Finding, Findings, Skipped, edit, ok, warning
from gpuinfer.doctor.host import Host
from gpuinfer.doctor.redis_place import OUR_CONF, place_of
from gpuinfer.doctor.redis_tuning import running, text_of
from gpuinfer.errors import ConfigError

CONF, TUNING = OUR_CONF, "/run/gpuinfer/redis/tuning.conf"
RESTART = "systemctl restart gpuinfer-redis"
_UNITS = {"": 1, "b": 1, "k": 1000, "kb": 1024, "m": 1000**2, "mb": 1024**2, "g": 1000**3, "gb": 1024**3}
#: Their lines add up: of each kind of client the last one counts.
_LIMITS = "client-output-buffer-limit"
#: What Redis gives back in words of its own, and what must not be shown.
_NOT_COMPARED = frozenset({"include", "notify-keyspace-events", "requirepass", "masterauth"})
_SHOWN = 5


def as_configured(host: Host) -> Findings:
    """The running instance does what its files and the settings say, as they are now."""
    _need_ours(host)
    wanted, found = stated(host, CONF), running(host, "*")
    off = [key for key, value in wanted.items() if key in found and not same(key, found[key], value)]
    if off:
        words = [f"{key} is {found[key]}, {CONF} says {wanted[key]}" for key in off[:_SHOWN]]
        words += [f"and {len(off) - _SHOWN} more"] if len(off) > _SHOWN else []
        return warning("; ".join(words), RESTART)
    return ok(f"runs as {CONF} says, in {len(wanted.keys() & found.keys())} settings")


def users(host: Host) -> Finding:
    """The running instance knows the users that its files name, with their rights and passwords."""
    _need_ours(host)
    try:
        ours = acl.render(passwords.read(), host.settings.queue.foreign_queues, passwords.older())
        theirs = more_users()
        wanted = _users([*ours.splitlines(), *theirs.lines])
    except ConfigError as exc:
        raise Skipped(f"the users cannot be read: {exc}") from None
    with asked(host) as client:
        found = _users(text_of(line) for line in client.acl_list())
        categories = _categories(client, {*found.values(), *wanted.values()})
    off = sorted(wanted.keys() ^ found.keys())
    # An administrator's own users may be written in ways that Redis gives back otherwise.
    both = [name for name in acl.USERS if name in found]
    off += [name for name in both if _rights(found[name], categories) != _rights(wanted[name], categories)]
    if theirs.faults:
        return warning(f"{MORE_USERS}: {theirs.faults[0]}", f"{edit(MORE_USERS)} && {RESTART}")
    if off:
        return warning(f"Redis runs with other users than its files name: {', '.join(off)} differ", RESTART)
    return ok(f"{len(found)} users as the files name them")


def _users(lines: Iterable[str]) -> dict[str, str]:
    """Return user -> rules of an ACL's lines."""
    split = (line.split(None, 2) for line in lines)
    return {words[1]: words[2] for words in split if words[:1] == ["user"]}


def _categories(client: redis.Redis, rules: Iterable[str]) -> Mapping[str, frozenset[str]]:
    """Return the commands of each category that rules name. "all" stands for itself."""
    names = {name for text in rules for name in re.findall(r"[+-]@(\w+)", text)} - {"all"}
    found = {name: frozenset(text_of(command) for command in client.acl_cat(name)) for name in names}
    return {**found, "all": frozenset({"all"})}


def _rights(rules: str, categories: Mapping[str, frozenset[str]]) -> frozenset[object]:
    """Return what a user's rules come to: Redis gives them back in other words, with the same meaning."""
    parts = [rules.partition("(")[0], *re.findall(r"\(([^)]*)\)", rules)]
    return frozenset((number == 0, _part(part.split(), categories)) for number, part in enumerate(parts))


def _part(rules: Sequence[str], categories: Mapping[str, frozenset[str]]) -> frozenset[str]:
    """Return the commands that a root part or a selector allows, with its keys, channels and passwords."""
    commands: frozenset[str] = frozenset()
    for rule in (rule for rule in rules if rule[0] in "+-"):
        names = categories[rule[2:]] if rule[1] == "@" else frozenset({rule[1:]})
        if rule == "-@all":
            commands = frozenset()
        else:
            commands = commands | names if rule[0] == "+" else commands - names
    implied = {"sanitize-payload", "resetchannels", "resetpass"}
    return commands | frozenset(rule for rule in rules if rule[0] not in "+-") - implied


def _need_ours(host: Host) -> None:
    if not place_of(host.settings.broker).ours:
        raise Skipped("broker.url names a Redis that is not this package's own")


def stated(host: Host, file: str) -> dict[str, str]:
    """Return what a redis.conf and what it includes state: the last one wins, as in Redis."""
    return parse(host, host.read(file))


def parse(host: Host, text: str) -> dict[str, str]:
    """Return what the text of a redis.conf states, words separated by one blank."""
    found: dict[str, str] = {}
    for line in text.splitlines():
        word, rest = (*line.split(None, 1), "", "")[:2]
        word = word.lower()
        if word == "include":
            for path in sorted(_included(host, rest.strip().strip("\"'"))):
                found |= _merged(found, parse(host, _tuned(host) if path == TUNING else host.read(path)))
        elif word and word[0] != "#" and word not in _NOT_COMPARED and not word.endswith("-pass"):
            found |= _merged(found, {word: _value(rest)})
    return found


def _value(rest: str) -> str:
    try:
        return " ".join(shlex.split(rest))
    except ValueError:
        return rest.strip()


def _merged(before: Mapping[str, str], new: Mapping[str, str]) -> dict[str, str]:
    """Return what is new, added to what lines that add up said before: limits, and points to save."""
    return {
        key: f"{before[key]} {value}" if key in (_LIMITS, "save") and value and before.get(key) else value
        for key, value in new.items()
    }


def same(key: str, found: str, wanted: str) -> bool:
    """Tell whether an answer of CONFIG GET means what redis.conf says: sizes are told in bytes."""
    if key == _LIMITS:
        have, want = _limits(found), _limits(wanted)
        return all(have.get(kind) == limit for kind, limit in want.items())
    return [_plain(word) for word in found.split()] == [_plain(word) for word in wanted.split()]


def _limits(text: str) -> Mapping[str, Sequence[str]]:
    words = [_plain(word) for word in text.split()]
    return {
        words[start].replace("slave", "replica"): words[start + 1 : start + 4]
        for start in range(0, len(words), 4)
    }


def _plain(word: str) -> str:
    try:
        return str(to_bytes(word))
    except ValueError:
        return word.lower()


def _tuned(host: Host) -> str:
    """Return tuning.conf as the next start would write it: the settings may have changed since the last."""
    choice = planned(host.settings.redis, host.path(redis_folder(host)), host.path(CONF))
    return render(host.settings.redis, host_memory_bytes(), choice)


def _included(host: Host, pattern: str) -> list[str]:
    return ["/" + str(path.relative_to(host.root)) for path in host.root.glob(pattern.lstrip("/"))]


def to_bytes(text: str) -> int:
    """Return a size of redis.conf in bytes: 2gb, 512mb, 1000000."""
    match = re.fullmatch(r"(\d+)([a-z]*)", text.lower())
    if match is None or match[2] not in _UNITS:
        raise ValueError(f"{text!r} is no size, such as 512mb")
    return int(match[1]) * _UNITS[match[2]]
