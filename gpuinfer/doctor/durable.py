# SPDX-License-Identifier: Apache-2.0
"""What an accepted task survives, by how Redis writes now and by its disk."""

from __future__ import annotations

from gpuinfer.broker import durability
from gpuinfer.doctor.broker import asked
from gpuinfer.doctor.disk import redis_folder
from gpuinfer.doctor.finding import Finding, Skipped, edit, ok, warning
from gpuinfer.doctor.host import Host
from gpuinfer.doctor.redis_place import place_of


def durable(host: Host) -> Finding:
    """Redis's disk keeps what was accepted: all of it, or all but two seconds."""
    with asked(host) as client:
        found = durability.running(client)
    if found is None:
        raise Skipped("this Redis user may not ask how Redis writes (CONFIG GET)")
    where = place_of(host.settings.broker)
    text = f"appendfsync {found['appendfsync']}: {found['means']}"
    if found["appendfsync"] == "off":
        return warning(text, where.config("appendonly", "yes"))
    if found["appendfsync"] == "no":
        return warning(text, where.config("appendfsync", "everysec"))
    if not where.ours:
        return ok(text)
    folder = host.path(redis_folder(host))
    if folder.is_dir() and (unsafe := durability.file_system(folder).unsafe):
        return warning(
            f"nothing is promised about a power cut: {unsafe} ({redis_folder(host)})",
            f"{edit('/etc/gpuinfer/redis.conf')}  # dir, on a disk; then: systemctl restart gpuinfer-redis",
        )
    return ok(text)
