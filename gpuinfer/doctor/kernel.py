# SPDX-License-Identifier: Apache-2.0
"""What Redis needs of the kernel: overcommit, the listen backlog, no transparent huge pages."""

from __future__ import annotations

import re

from gpuinfer.doctor.broker import local_redis_pid
from gpuinfer.doctor.finding import Finding, Skipped, edit, ok, warning
from gpuinfer.doctor.host import Host

#: Where sysctl.d(5) looks; of files of one name the first counts, and of files the last one that sets a key.
SYSCTL_FOLDERS = (
    "/etc/sysctl.d",
    "/run/sysctl.d",
    "/usr/local/lib/sysctl.d",
    "/usr/lib/sysctl.d",
    "/lib/sysctl.d",
)
#: The kernel's own since 5.4; below it a burst is cut off.
SOMAXCONN = 4096
_THP = "/sys/kernel/mm/transparent_hugepage/enabled"


def overcommit(host: Host) -> Finding:
    """vm.overcommit_memory = 1: a fork of Redis, which copies nothing at first, is never refused."""
    found = int(host.read("/proc/sys/vm/overcommit_memory"))
    if found == 1:
        return ok("vm.overcommit_memory = 1")
    return warning(
        f"vm.overcommit_memory = {found}: Redis may fail to fork, and then refuses writes; 1 is right",
        _apply(host, "vm.overcommit_memory", 1),
    )


def somaxconn(host: Host) -> Finding:
    """net.core.somaxconn does not cut the backlog of Redis and of the API's socket."""
    found = int(host.read("/proc/sys/net/core/somaxconn"))
    if found >= SOMAXCONN:
        return ok(f"net.core.somaxconn = {found}")
    return warning(
        f"net.core.somaxconn = {found}: bursts of connections are refused; {SOMAXCONN} is right",
        _apply(host, "net.core.somaxconn", SOMAXCONN),
    )


def _apply(host: Host, key: str, value: int) -> str:
    """Return what sets a value for good: where a file sets it, in the one that wins."""
    last = stating(host, key)
    if last is None:
        return f"echo {key} = {value} >/etc/sysctl.d/60-gpuinfer.conf && sysctl --system"
    file, stated = last
    apply = "sysctl --system"
    return apply if stated == str(value) else f"{edit(file)} && {apply}  # {key} = {value}"


def stating(host: Host, key: str) -> tuple[str, str] | None:
    """Return the file that has the last word on a key at boot, and what it says; None where none names it."""
    files = {
        path.name: path for folder in reversed(SYSCTL_FOLDERS) for path in host.path(folder).glob("*.conf")
    }
    # Read last by procps' sysctl; systemd reads it by Debian's link 99-sysctl.conf.
    paths = [*(files[name] for name in sorted(files)), host.path("/etc/sysctl.conf")]
    line = re.compile(
        rf"(?m)^[ \t]*-?{re.escape(key).replace(chr(92) + '.', '[./]')}[ \t]*=[ \t]*(.*?)[ \t]*$"
    )
    found = None
    for path in (path for path in paths if path.is_file()):
        for match in line.finditer(path.read_text(encoding="utf-8", errors="replace")):
            found = (f"/{path.relative_to(host.root)}", match[1])
    return found


def huge_pages(host: Host) -> Finding:
    """Redis does not run on transparent huge pages: a fork would copy 2 MiB for each byte written."""
    mode = re.search(r"\[(\w+)\]", host.read(_THP))
    if mode is None or mode[1] != "always":
        return ok(f"transparent huge pages: {mode[1] if mode else 'none'}")
    pid = local_redis_pid(host)
    if pid is None:
        raise Skipped("transparent huge pages are on, and Redis is not here to be asked")
    if re.search(r"(?m)^THP_enabled:\s*0$", host.read(f"/proc/{pid}/status")):
        return ok("transparent huge pages are on, but not for Redis")
    return warning(
        "Redis runs on transparent huge pages: pauses and memory peaks when it forks",
        f"echo madvise > {_THP} && systemctl restart gpuinfer-redis",
    )
