# SPDX-License-Identifier: Apache-2.0
"""The broker's URL: what it may hold, what each library is given of it, and what no message shows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import redis
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from pydantic import SecretStr

from gpuinfer.cli import cli
from gpuinfer.errors import ConfigError
from gpuinfer.queue.app import celery_config
from gpuinfer.queue.connection import connect, connect_async, redis_url, user_of
from gpuinfer.redis_url import masked, parse
from gpuinfer.settings import BrokerSettings, Settings

pytestmark = pytest.mark.unit

SECRET = "correct-horse"
PLACES = ("redis://h:7000/3", "redis://h:7000/?db=3", "unix:///run/r.sock?db=3")


def broker(url: str, **settings: Any) -> BrokerSettings:
    return BrokerSettings(url=url, **settings)


def kwargs_of(settings: BrokerSettings) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return what redis-py's connections are made with, those of both kinds."""
    sync, later = connect(settings), connect_async(settings)
    assert isinstance(sync, redis.Redis)
    return sync.connection_pool.connection_kwargs, later.connection_pool.connection_kwargs


@pytest.mark.parametrize("place", PLACES)
def test_options_reach_every_library(place: str) -> None:
    """What a URL asks for is done by our clients and by Celery's."""
    sep = "&" if "?" in place else "?"
    url = f"{place}{sep}health_check_interval=30&socket_timeout=7.5&protocol=2&client_name=x&password=p%26w"
    wanted = {
        "db": 3,
        "health_check_interval": 30,
        "socket_timeout": 7.5,
        "protocol": 2,
        "client_name": "x",
        "password": "p&w",
    }
    for found in kwargs_of(broker(url)):
        assert {name: found[name] for name in wanted} == wanted
    config = celery_config(Settings(broker=broker(url)))
    tail = "/run/r.sock?virtual_host=3" if "unix" in place else "h:7000/3"
    assert config["broker_url"].partition("://")[2] == f":p%26w@{tail}"
    assert config["result_backend"].partition("://")[2] == f":p%26w@{tail}"
    options = config["broker_transport_options"]
    assert (options["health_check_interval"], options["socket_timeout"], options["client_name"]) == (
        30,
        7.5,
        "x",
    )
    assert config["redis_backend_health_check_interval"] == 30
    assert (config["redis_client_name"], config["redis_socket_timeout"]) == ("x", 7.5)


def test_the_settings_login_comes_before_the_url_s() -> None:
    """A credential overrides what an old URL still holds."""
    settings = broker("redis://old:past@h/0", username="api", password=SecretStr("now"))
    for found in kwargs_of(settings):
        assert (found["username"], found["password"]) == ("api", "now")
    assert celery_config(Settings(broker=settings))["broker_url"] == "gpuinfer://api:now@h:6379/0"
    assert redis_url(settings) == "redis://h:6379/0"
    assert [user_of(one) for one in (settings, broker("redis://old:p@h"), broker("redis://h"))] == [
        "api",
        "old",
        "default",
    ]


@pytest.mark.parametrize(
    ("tail", "words"),
    [
        ("?socket_connect_timeout=3", "option socket_connect_timeout: set broker.connect_timeout_s"),
        ("?ssl_cert_reqs=none", "option ssl_cert_reqs: the server's certificate is always checked"),
        (
            "?healthcheck=3",
            "the option 'healthcheck' that is not known; known: db, username",
        ),
        ("?health_check_interval=often", "option health_check_interval must be a whole number of seconds"),
        ("?socket_timeout=-1", "option socket_timeout must be a number of seconds above 0"),
        ("?protocol=4", "option protocol must be 2 or 3"),
        ("?client_name=a%20b", "option client_name must be 1 to 100 printable characters"),
        ("?db=first", "must name a database by its number"),
        ("/first", "must name a database by its number"),
    ],
)
def test_other_options_are_refused_by_name(tail: str, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """`gpuinfer config check` says which, before a worker loads its model and fails on it."""
    monkeypatch.setenv("GPUINFER_BROKER_URL", f"redis://h{tail}")
    done = CliRunner().invoke(cli, ["config", "check"], standalone_mode=False)
    assert isinstance(done.exception, ConfigError)
    assert done.exception.exit_code == 78
    assert "GPUINFER_BROKER_URL: broker.url = " in str(done.exception)
    assert words in str(done.exception)


@pytest.mark.parametrize(
    "url",
    [
        *(f"redis://:corr{char}ect-horse@h:6379/0" for char in "#/?["),
        *(f"redis://me:corr{char}ect-horse@h" for char in "#/?["),
        *("redis://:corr#ect-horse", "redis://:corr/ect-horse", "redis://:corr ect-horse"),
        *("redis://h?password=corr&ect-horse=1", "redis://h?password=corr#ect-horse"),
        *("redis://:corr℀ect-horse@h", "redis://h:correct-horse"),
    ],
)
def test_no_part_of_a_password_is_shown(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that should have been encoded is refused, with the way to do it, and neither half of it is told."""
    monkeypatch.setenv("GPUINFER_BROKER_URL", url)
    done = CliRunner().invoke(cli, ["config", "check"], standalone_mode=False)
    assert isinstance(done.exception, ConfigError)
    for part in ("corr", "ect-horse"):
        assert part not in str(done.exception), str(done.exception)


@given(st.text(st.characters(exclude_categories=("Cs", "Cc")), min_size=6, max_size=20))
def test_whatever_a_password_is_it_is_read_or_refused_unseen(password: str) -> None:
    """Written as it is into the URL: no message and no repr has it, and what is taken is taken whole."""
    url = f"redis://:{password}@h:6379/0"
    assert f":{password}" not in masked(url)
    try:
        settings = BrokerSettings(url=url)
    except ValueError as exc:
        assert f":{password}" not in str(exc)
    else:
        assert f":{password}" not in repr(settings)
        assert parse(url).host == "h"


def test_an_encoded_password_arrives(tmp_path: Path) -> None:
    """What the message tells one to write is understood."""
    found = parse(f"unix://me:{'%23%2F%3F%40%25'}@{tmp_path}/r.sock")
    assert (found.user, found.password, found.path) == ("me", "#/?@%", f"{tmp_path}/r.sock")
    assert SECRET not in repr(parse(f"redis://me:{SECRET}@h"))
