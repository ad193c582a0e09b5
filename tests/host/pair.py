# SPDX-License-Identifier: Apache-2.0
"""Two hosts on one virtual network: the second works for the first one's Redis, over TLS."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.host.container import Container
from tests.host.root import run

ZONE = "gz"
FIRST, SECOND = "10.213.0.1", "10.213.0.2"
CERTIFICATES = f"""
mkdir -p /root/tls && cd /root/tls
openssl req -x509 -newkey rsa:2048 -nodes -days 30 -subj /CN=ca -keyout ca.key -out ca.crt
openssl req -newkey rsa:2048 -nodes -subj /CN=redis -keyout redis.key -out redis.csr
printf 'subjectAltName=IP:{FIRST}' >san
openssl x509 -req -in redis.csr -CA ca.crt -CAkey ca.key -days 30 -extfile san -out redis.crt
install -d /etc/gpuinfer/tls && install -m 0644 ca.crt redis.crt /etc/gpuinfer/tls/
install -o gpuinfer-redis -m 0400 redis.key /etc/gpuinfer/tls/redis.key
"""
OPEN = """
cat >>/etc/gpuinfer/redis.conf <<END
tls-port 6380
tls-cert-file /etc/gpuinfer/tls/redis.crt
tls-key-file /etc/gpuinfer/tls/redis.key
tls-ca-cert-file /etc/gpuinfer/tls/ca.crt
tls-auth-clients no
END
systemctl restart gpuinfer-redis
"""


@contextmanager
def paired(installed: str) -> Iterator[tuple[Container, Container]]:
    """Two hosts on one network; the second uses the first one's Redis. Their watchers are off."""
    with (
        _network(),
        Container(installed, "gpu-a", zone=ZONE) as first,
        Container(installed, "gpu-b", zone=ZONE) as second,
    ):
        first.join(f"{FIRST}/24")
        second.join(f"{SECOND}/24")
        for host in (first, second):
            host.ok("systemctl stop gpuinfer-watcher")
        first.ok(f"set -e\n{CERTIFICATES}\n{OPEN}")
        for path in ("/etc/gpuinfer/tls/ca.crt", *credentials()):
            second.put(path, first.ok(f"cat {path}"), mode=0o644 if "tls" in path else 0o600)
        second.ok(
            "rm /etc/gpuinfer/credentials/admin; cat >>/etc/gpuinfer/gpuinfer.toml <<END\n[broker]\n"
            f'url = "rediss://{FIRST}:6380/0"\ntls_ca = "/etc/gpuinfer/tls/ca.crt"\nEND\n'
            "sed -i '0,/^\\[broker\\]$/d' /etc/gpuinfer/gpuinfer.toml && gpuinfer config check"
            " && systemctl restart gpuinfer.target && systemctl stop gpuinfer-watcher"
        )
        yield first, second


@contextmanager
def _network() -> Iterator[None]:
    """Remove the hosts' bridge when they are gone: systemd-nspawn leaves it where it was killed."""
    try:
        yield
    finally:
        bridge = Path(f"/sys/class/net/vz-{ZONE}")
        deadline = time.monotonic() + 60
        while list(bridge.glob("brif/*")) and time.monotonic() < deadline:  # the kernel takes its time
            time.sleep(0.1)
        if bridge.exists():
            run("ip", "link", "delete", bridge.name)


def credentials() -> list[str]:
    """Return the password files that a second host needs, the same as on the first."""
    return [f"/etc/gpuinfer/credentials/{user}" for user in ("api", "worker", "watcher")]
