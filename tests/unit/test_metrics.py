# SPDX-License-Identifier: Apache-2.0
"""The names of metrics: as Prometheus has them, once each, and as the manual says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from gpuinfer.metrics.gather import is_redis_host
from gpuinfer.metrics.table import METRICS, markdown
from gpuinfer.settings import BrokerSettings

pytestmark = pytest.mark.unit

MANUAL = Path(__file__).parents[2] / "packaging" / "doc" / "metrics.md"


def test_the_manual_has_the_table() -> None:
    """One source: python -m gpuinfer.metrics.table."""
    assert markdown() in MANUAL.read_text(encoding="utf-8")


def test_names_are_as_prometheus_has_them() -> None:
    """A counter ends with _total and nothing else does; labels are words; a meaning is a sentence."""
    names = [one.name for one in METRICS]
    assert len(set(names)) == len(names)
    for one in METRICS:
        assert re.fullmatch(r"gpuinfer_[a-z_]+[a-z]", one.name)
        assert one.name.endswith("_total") == (one.kind == "counter"), one.name
        assert one.help.endswith("."), one.name
        assert all(re.fullmatch(r"[a-z]+", label) for label in one.labels)


def test_redis_s_host_is_told_by_its_address() -> None:
    """A Unix socket, loopback, or this host's own name."""
    for url, local in (
        ("unix:///run/gpuinfer/redis/redis.sock?db=0", True),
        ("redis://127.0.0.1:6379/0", True),
        ("redis://[::1]:6379/0", True),
        ("rediss://redis.example.org:6379/0", False),
    ):
        assert is_redis_host(BrokerSettings(url=url)) is local, url
