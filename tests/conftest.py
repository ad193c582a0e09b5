# SPDX-License-Identifier: Apache-2.0
"""Fixtures that all tests share: private Redis servers, and settings that point at one."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from gpuinfer.queue import scripts
from gpuinfer.settings import Settings
from tests.services import RedisServer, redis_binary

RedisFactory = Callable[..., RedisServer]

#: Name of a marker -> seconds spent in its tests, printed at the end.
_spent: dict[str, float] = {}
_MARKERS = ("unit", "integration", "faults", "host")
_NOTED_CHARS = 3000


def need(there: bool, what: str) -> None:
    """Skip the test where a service is missing; in CI a missing service is a failure."""
    if there:
        return
    if os.environ.get("CI"):
        pytest.fail(f"{what} is missing, and in CI nothing may be", pytrace=False)
    pytest.skip(f"{what} is missing")


@pytest.fixture
def redis_factory() -> Iterator[RedisFactory]:
    """Start Redis servers with options of their own; all are gone when the test ends."""
    need(redis_binary() is not None, "redis-server")
    with ExitStack() as servers:

        def start(**options: str | int) -> RedisServer:
            server = RedisServer(**options)
            servers.callback(server.close)
            return server

        yield start


#: Seconds for which an idle worker counts under ``standing_clocks`` since it was seen, or woken.
COUNTS_S = 3600.0


@pytest.fixture
def standing_clocks() -> Iterator[None]:
    """Let an idle worker count for an hour, not for seconds: the machine may stand still in between."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("IDLE_VOID", "WOKEN_VOID"):
            patch.setitem(scripts._CONSTANTS, name, COUNTS_S)
        scripts.source.cache_clear()
        yield
    scripts.source.cache_clear()


@pytest.fixture
def redis_server(redis_factory: RedisFactory) -> RedisServer:
    """An empty Redis for this test alone (some 15 ms)."""
    return redis_factory()


@pytest.fixture
def settings_for() -> Callable[..., Settings]:
    """Build settings that point at a server: ``settings_for(redis, queue={"poll_ms": 5})``."""

    def build(server: RedisServer, **sections: dict[str, object]) -> Settings:
        broker = {"url": server.url, **sections.pop("broker", {})}
        return Settings.model_validate({"broker": broker, **sections})

    return build


@pytest.fixture(autouse=True)
def _no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the developer's own GPUINFER_* variables out of the tests."""
    for name in [name for name in os.environ if name.startswith("GPUINFER_")]:
        monkeypatch.delenv(name)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Iterator[None]:  # the hook's own way: yields once, and returns what it was given
    """Add up the time of each marker."""
    for name in _MARKERS:
        if item.get_closest_marker(name):
            _spent[name] = _spent.get(name, 0.0) + call.duration
    return (yield)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say where the time went; note what failed where tests/run asks for it, which prints it last of all."""
    if _spent:
        parts = [f"{name} {seconds:.1f} s" for name, seconds in _spent.items()]
        terminalreporter.write_line("time per marker: " + ", ".join(parts))
    note = os.environ.get("FAILURES_NOTE")
    if note:
        with Path(note).open("a") as notes:
            for report in (
                *terminalreporter.stats.get("failed", ()),
                *terminalreporter.stats.get("error", ()),
            ):
                notes.write(f"FAILED {report.nodeid}\n{report.longreprtext[-_NOTED_CHARS:]}\n")
