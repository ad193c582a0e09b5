# SPDX-License-Identifier: Apache-2.0
"""Python and the libraries: those this version was tested with."""

from __future__ import annotations

import platform
import re
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import gpuinfer
from gpuinfer.doctor.finding import Finding, Skipped, error, ok, warning
from gpuinfer.doctor.host import Host

OLDEST_PYTHON = (3, 11)
#: Where the lock lies on an installed host; in a checkout it is packaging/requirements.lock.
INSTALLED_LOCK = "/usr/share/gpuinfer/requirements.lock"
#: Other versions of these change what is kept in Redis, or how; of the rest, hardly.
_STRICT = frozenset({"celery", "kombu", "redis", "billiard"})
_PIN = re.compile(r"(?m)^([A-Za-z0-9._-]+)(?:\[[^\]]*\])?==([^\s;\\]+)")


def python(_: Host) -> Finding:
    """Python is new enough, and one of 64 bits."""
    text = f"Python {platform.python_version()} ({sys.executable}), gpuinfer {gpuinfer.__version__}"
    if sys.version_info[:2] < OLDEST_PYTHON:
        return error(f"{text}: 3.11 or newer is needed", "apt install --reinstall gpuinfer python3.11")
    return ok(text)


def libraries(host: Host) -> Finding:
    """Each library has the version of the lock."""
    pins = dict(_PIN.findall(_lock(host).read_text(encoding="utf-8")))
    # One that is missing is for another Python: without one that is needed, this line would not run.
    off = {name: have for name, pin in pins.items() if (have := installed(name)) and have != pin}
    if not off:
        return ok(f"{len(pins)} libraries have the versions of the lock")
    words = ", ".join(f"{name} {have} (lock: {pins[name]})" for name, have in off.items())
    if _STRICT & off.keys():
        return warning(f"not as tested: {words}", _fix(host))
    return ok(f"{len(pins)} libraries; others than the lock's, harmlessly: {words}")


def _lock(host: Host) -> Path:
    checkout = Path(gpuinfer.__file__).parents[1] / "packaging" / "requirements.lock"
    found = next((path for path in (host.path(INSTALLED_LOCK), checkout) if path.is_file()), None)
    if found is None:
        raise Skipped("there is no lock file to compare with")
    return found


def _fix(host: Host) -> str:
    if host.path(INSTALLED_LOCK).is_file():
        return "apt install --reinstall gpuinfer"
    return f"{sys.executable} -m pip install --no-deps -r packaging/requirements.lock"


def installed(name: str) -> str:
    """Return a library's version, without a build's suffix; empty when it is missing."""
    try:
        return version(name).partition("+")[0]
    except PackageNotFoundError:
        return ""
