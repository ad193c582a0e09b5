# SPDX-License-Identifier: Apache-2.0
"""The root file system of the containers: a minimal Debian 12, made once and kept between runs.

Everything the packages depend on is in it, so that no container needs a network. It is named by what
decides it; another list of packages makes another one.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
from pathlib import Path

#: On top of Debian's "minbase" and what is "required".
PACKAGES = (
    *("systemd", "systemd-sysv", "dbus", "polkitd", "udev", "procps", "iproute2", "curl", "openssl"),
    *("python3.11", "redis-tools", "redis-server", "bash-completion", "man-db", "util-linux-extra", "sudo"),
)
#: Raise it when the way the root is made changes.
FORMAT = 1
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gpuinfer"


class HostError(AssertionError):
    """Raised when a command on the test's host fails; carries its output."""


def run(*command: object, timeout: float = 900) -> str:
    """Run a command and return its output. Raises HostError with what it said."""
    done = subprocess.run(
        [str(part) for part in command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        text=True,
        errors="replace",
        timeout=timeout,
        check=False,
    )
    if done.returncode:
        raise HostError(f"{' '.join(map(str, command))} ended with {done.returncode}:\n{done.stdout[-4000:]}")
    return done.stdout


def missing() -> str:
    """Return what this machine lacks to boot a container; empty when nothing."""
    if os.geteuid() != 0:
        return "root"
    absent = [name for name in ("mmdebstrap", "systemd-nspawn", "nsenter") if shutil.which(name) is None]
    return ", ".join(absent)


def root() -> Path:
    """Return the root file system's folder, making it when it is not there (half a minute)."""
    name = hashlib.sha256(f"{FORMAT} {' '.join(PACKAGES)}".encode()).hexdigest()[:16]
    CACHE.mkdir(parents=True, exist_ok=True)
    target = CACHE / f"host-root-{name}"
    with (CACHE / "host-root.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists():
            _make(target)
    return target


def _make(target: Path) -> None:
    for old in CACHE.glob("host-root-*"):
        if old.is_dir():
            shutil.rmtree(old)
    new = target.with_suffix(".new")
    run(
        *("mmdebstrap", "--variant=minbase", "--mode=root", f"--include={','.join(PACKAGES)}"),
        *("--aptopt=Acquire::Languages none", "--dpkgopt=path-exclude=/usr/share/locale/*"),
        *("bookworm", new, *_sources()),
    )
    (new / "etc/hostname").write_text("gpuhost\n")
    (new / "etc/machine-id").write_text("")
    # A container has no clock and no devices of its own to look after.
    for unit in ("systemd-timesyncd.service", "systemd-udevd.service", "e2scrub_reap.service"):
        (new / "etc/systemd/system" / unit).symlink_to("/dev/null")
    new.rename(target)


def _sources() -> list[Path]:
    """Return this machine's own apt sources for bookworm: its mirror is the one that can be reached."""
    found = [Path("/etc/apt/sources.list"), *sorted(Path("/etc/apt/sources.list.d").glob("*"))]
    ours = [file for file in found if file.is_file() and "bookworm" in file.read_text()]
    # Other vendors' repositories name bookworm too; Debian's own name a component "main" beside the suite.
    return [file for file in ours if "debian" in file.name or file.name == "sources.list"]
