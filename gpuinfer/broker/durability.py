# SPDX-License-Identifier: Apache-2.0
"""What an acknowledged task survives: the choice of ``appendfsync``, and what it guarantees.

``redis.appendfsync = "auto"`` is ``always`` where the disk is fast enough: an idle round trip makes four
fsyncs in series. The time of an append with fdatasync in Redis's folder decides. It is measured once, and
kept there with the identity of the file system. Memory, overlay and network file systems guarantee nothing.
"""

from __future__ import annotations

import math
import os
import re
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import orjson
import redis
from redis.exceptions import ResponseError

from gpuinfer.settings import RedisSettings

Mode = Literal["always", "everysec"]

#: One measurement: the number of writes, the bytes of each, and the most milliseconds at p99 for ``always``.
TIMES, BYTES, FAST_MS = 256, 4096, 0.1
#: The measurement ends after this many seconds, as Redis's start waits for it.
LIMIT_S = 10.0
#: File name of the measurement, in Redis's folder.
RECORD = "fsync.json"
REDIS_CONF, REDIS_DATA = Path("/etc/gpuinfer/redis.conf"), Path("/var/lib/gpuinfer/redis")
MOUNTS = Path("/proc/self/mountinfo")
#: File systems that lose everything in a power cut, or whose behaviour cannot be known here.
_IN_MEMORY = frozenset({"tmpfs", "ramfs", "overlay", "aufs", "squashfs"})
_ON_NETWORK = frozenset(
    {"nfs", "nfs4", "cifs", "smb3", "smbfs", "9p", "virtiofs", "ceph", "glusterfs", "lustre"}
    | {"gpfs", "beegfs", "afs", "ocfs2", "gfs2", "fuse", "fuseblk"}
)
MEANING: dict[Mode, str] = {
    "always": "a kill of Redis or a power cut loses nothing that was accepted",
    "everysec": "a kill of Redis or a power cut may cost up to two seconds of accepted work",
}


@dataclass(frozen=True, slots=True)
class FileSystem:
    """The file system of a folder."""

    kind: str
    #: Its identity: kind, source, and the file system's own id.
    device: str

    @property
    def unsafe(self) -> str:
        """Return why nothing is guaranteed on it; empty where something is."""
        if self.kind in _IN_MEMORY:
            return f"{self.kind} does not outlive a power cut"
        if self.kind in _ON_NETWORK or self.kind.startswith("fuse."):
            return f"{self.kind}: what its server keeps in a power cut is not known here"
        return ""


@dataclass(frozen=True, slots=True)
class Choice:
    """An ``appendfsync``, and why it was chosen."""

    mode: Mode
    why: str
    #: Why nothing is guaranteed in a power cut; empty where ``MEANING`` holds.
    unsafe: str = ""
    #: False: the next start measures first, and may choose another mode.
    decided: bool = True

    @property
    def means(self) -> str:
        """Return what it guarantees, in a sentence."""
        if self.unsafe:
            return f"nothing is promised about a power cut: {self.unsafe}"
        return MEANING[self.mode]

    def __str__(self) -> str:
        return f"appendfsync {self.mode} ({self.why}): {self.means}"


def file_system(folder: Path, mounts: Path = MOUNTS) -> FileSystem:
    """Return the file system of a folder that exists. Raises OSError."""
    path, found = folder.resolve(), ("", "unknown", "")
    for line in mounts.read_text(encoding="utf-8", errors="replace").splitlines():
        left, _, right = line.partition(" - ")
        point = re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), left.split()[4])
        if path.is_relative_to(point) and len(point) >= len(found[0]):
            kind, source = right.split()[:2]
            found = (point, kind, source)
    _, kind, source = found
    return FileSystem(kind, f"{kind} {source} {os.statvfs(folder).f_fsid:x}")


def measure(folder: Path, clock: Callable[[], float] = time.perf_counter) -> float:
    """Return the p99 of the time of an append with fdatasync in a folder, in ms. Raises OSError."""
    path = folder / ".fsync"
    path.unlink(missing_ok=True)  # left by a measurement that was killed
    number = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC, 0o600)
    try:
        took: list[float] = []
        block = bytes(BYTES)
        while len(took) < TIMES and sum(took) < LIMIT_S:
            began = clock()
            os.write(number, block)
            os.fdatasync(number)
            took.append(clock() - began)
    finally:
        os.close(number)
        path.unlink()
    return sorted(took)[math.ceil(0.99 * len(took)) - 1] * 1000


def folder_of(conf: Path = REDIS_CONF) -> Path:
    """Return the data folder of this host's own Redis, by its configuration."""
    return Path(stated(conf, "dir") or REDIS_DATA)


def stated(conf: Path, key: str) -> str:
    """Return the last value of a key in redis.conf itself; empty where there is none."""
    with suppress(OSError):
        text = conf.read_text(encoding="utf-8", errors="replace")
        found = re.findall(rf"(?mi)^[ \t]*{key}[ \t]+[\"']?([^\s\"']+)", text)
        return found[-1] if found else ""
    return ""


def _overruled(conf: Path) -> str:
    """Return why nothing is guaranteed where redis.conf turns off the file or fsync; else empty."""
    if stated(conf, "appendonly").lower() == "no":
        return f"{conf} has appendonly no, so a restart of Redis loses the queue"
    if stated(conf, "appendfsync").lower() == "no":
        return f"{conf} has appendfsync no, so the kernel decides when to write"
    return ""


def planned(settings: RedisSettings, folder: Path, conf: Path = REDIS_CONF) -> Choice:
    """Return the choice of the next start, as far as it is known without a measurement."""
    return _choose(settings, folder, conf, None)[0]


def decide(
    settings: RedisSettings,
    folder: Path,
    conf: Path = REDIS_CONF,
    *,
    again: bool = False,
    measure: Callable[[Path], float] = measure,
) -> tuple[Choice, str]:
    """Return the choice for this start, and a description of the former one where that differs.

    Measures where ``auto`` needs it, or with ``again``, and records the result in the folder.
    """
    before = recorded(folder)
    choice, record = _choose(settings, folder, conf, measure, again=again)
    if record != before:
        with suppress(OSError):  # it is measured again at the next start
            _keep(folder, record)
    changed = before.get("means") if before.get("means") != choice.means else None
    return choice, f"appendfsync {before.get('mode')}: {changed}" if changed else ""


def _choose(
    settings: RedisSettings,
    folder: Path,
    conf: Path,
    measure: Callable[[Path], float] | None,
    *,
    again: bool = False,
) -> tuple[Choice, dict[str, Any]]:
    record = recorded(folder)
    by_file = stated(conf, "appendfsync").lower()
    asked = by_file if by_file in MEANING else settings.appendfsync
    source = str(conf) if by_file in MEANING else "redis.appendfsync"
    try:
        where = file_system(folder)
    except OSError as exc:
        mode: Mode = "always" if asked == "always" else "everysec"
        why = f"auto: {folder} cannot be read: {exc.strerror}" if asked == "auto" else source
        return Choice(
            mode, why, "its disk is unknown", decided=measure is not None or asked != "auto"
        ), record
    known = record.get("device") == where.device and isinstance(record.get("p99_ms"), float)
    failed = ""
    if measure is not None and (again or (asked == "auto" and not known and not where.unsafe)):
        try:
            taken = {"p99_ms": round(measure(folder), 4), "measured_at": datetime.now(UTC).isoformat()}
            record, known = {**record, "device": where.device, **taken}, True
        except OSError as exc:
            failed = f"an fsync in {folder} failed: {exc.strerror}"
    overruled = _overruled(conf)
    if overruled:
        choice = Choice("everysec", f"{conf} overrides it", overruled)
    elif asked == "always" or asked == "everysec":
        choice = Choice(asked, source, where.unsafe)
    elif where.unsafe:
        choice = Choice("everysec", f"auto: {folder} is on {where.kind}", where.unsafe)
    elif not known or failed:
        choice = Choice("everysec", f"auto: {failed or 'not measured yet'}", decided=measure is not None)
    else:
        p99 = record["p99_ms"]
        mode = "always" if p99 <= FAST_MS else "everysec"
        choice = Choice(mode, f"auto: an fsync takes {p99:.2g} ms at p99, {FAST_MS:g} at most for always")
    return choice, {**record, "mode": choice.mode, "means": choice.means}


def running(client: redis.Redis) -> dict[str, str] | None:
    """Return the ``appendfsync`` of a running Redis, and what it guarantees (``means``).

    None where this user may not ask. The file system is checked only where Redis runs on this host.
    """
    try:
        found = configuration(client, "appendonly", "appendfsync", "dir")
    except ResponseError:  # NOPERM, or a hosted Redis without CONFIG
        return None
    mode = found.get("appendfsync", "")
    if found.get("appendonly") != "yes":
        return {
            "appendfsync": "off",
            "means": "without an append-only file a restart of Redis loses the queue",
        }
    if mode not in MEANING:
        return {
            "appendfsync": mode,
            "means": "a power cut loses everything that the kernel has not written yet",
        }
    unsafe = _unsafe_here(client, Path(found.get("dir", "")))
    return {
        "appendfsync": mode,
        "means": f"nothing is promised about a power cut: {unsafe}" if unsafe else MEANING[mode],
    }


def configuration(client: redis.Redis, *patterns: str) -> dict[str, str]:
    """Return the settings that a Redis runs with, as text. Raises redis-py's errors."""
    answer: Any = client.config_get(*patterns)
    return {_text(key): _text(value) for key, value in answer.items()}


def _unsafe_here(client: redis.Redis, folder: Path) -> str:
    """Return why the folder of a Redis on this host (on a Unix socket) guarantees nothing; else empty."""
    if "path" in client.connection_pool.connection_kwargs:
        with suppress(OSError):
            return file_system(folder).unsafe
    return ""


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def recorded(folder: Path) -> dict[str, Any]:
    """Return the record in a folder: device, p99_ms, measured_at, mode, means; empty where there is none."""
    try:
        found = orjson.loads((folder / RECORD).read_bytes())
    except (OSError, orjson.JSONDecodeError):
        return {}
    return found if isinstance(found, dict) else {}


def _keep(folder: Path, record: dict[str, Any]) -> None:
    """Replace the record atomically; the folder's owner owns it, also where root has measured."""
    new = folder / f"{RECORD}.new"
    new.unlink(missing_ok=True)
    number = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(number, "wb") as file:
        file.write(orjson.dumps(record, option=orjson.OPT_INDENT_2) + b"\n")
        owner = folder.stat()
        if os.geteuid() == 0:
            os.fchown(number, owner.st_uid, owner.st_gid)
    new.replace(folder / RECORD)
