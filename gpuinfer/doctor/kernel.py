# SPDX-License-Identifier: Apache-2.0
"""What Redis needs of the kernel: overcommit, the listen backlog, no transparent huge pages."""

from __future__ import annotations

import re

from gpuinfer.doctor.broker import local_redis_pid
from gpuinfer.doctor.finding import Finding, Skipped, ok, warning
from gpuinfer.doctor.host import Host

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
        _apply("vm.overcommit_memory", 1),
    )


def somaxconn(host: Host) -> Finding:
    """net.core.somaxconn does not cut the backlog of Redis and of the API's socket."""
    found = int(host.read("/proc/sys/net/core/somaxconn"))
    if found >= SOMAXCONN:
        return ok(f"net.core.somaxconn = {found}")
    return warning(
        f"net.core.somaxconn = {found}: bursts of connections are refused; {SOMAXCONN} is right",
        _apply("net.core.somaxconn", SOMAXCONN),
    )


def _apply(key: str, value: int) -> str:
    """Return what sets a value now and at each boot. Of files that set it the one that is read last wins."""
    file = "/etc/sysctl.d/99-zz-gpuinfer.conf"
    return f"echo {key} = {value} >>{file} && sysctl -p {file}"


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
