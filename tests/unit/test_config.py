# SPDX-License-Identifier: Apache-2.0
"""``gpuinfer config``: workers' own files, what does nothing, and which units to restart."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from click.testing import CliRunner

from gpuinfer.cli import cli
from gpuinfer.config import restarts
from gpuinfer.config.useless import Given, warnings
from gpuinfer.errors import ConfigError
from gpuinfer.settings import load

pytestmark = pytest.mark.unit


def ask(file: Path, *words: str) -> str:
    done = CliRunner().invoke(cli, ["--config", str(file), "config", *words], standalone_mode=False)
    if done.exception:
        raise done.exception
    return done.output


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A settings file with a setting, on a host whose units are unknown."""
    monkeypatch.setattr(restarts, "started", dict)
    path = tmp_path / "gpuinfer.toml"
    path.write_text("[queue]\nmax_waiting = 7\n")
    return path


def test_the_certificate_is_checked(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the front would answer 503 for is no "ok"; who may not read the files is not refused for that."""
    file.write_text(f'[api]\ntls_cert = "{tmp_path}/none.pem"\n')
    done = CliRunner().invoke(cli, ["--config", str(file), "config", "check"])
    assert isinstance(done.exception, ConfigError)
    assert f"api.tls_cert: {tmp_path}/none.pem: cannot be read" in str(done.exception)
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert ask(file, "check") == "ok: 1 setting changed\n"


def test_workers_own_files_are_checked_and_shown(file: Path, tmp_path: Path) -> None:
    """Both commands read worker@N.env as the unit does, beside the settings file."""
    own = tmp_path / "worker@3.env"
    own.write_text("GPUINFER_WORKER_QUEUES=batch\nCUDA_VISIBLE_DEVICES=1\n")
    said = ask(file, "check")
    assert said == f"ok: 1 setting changed\nok: worker 3: 1 setting of its own ({own})\n"
    assert f"worker 3 ({own})\nworker.queues " in ask(file, "show")
    assert json.loads(ask(file, "show", "--json"))["workers"] == {
        "3": {
            "worker.queues": {
                "value": ["batch"],
                "origin": f"{own}: GPUINFER_WORKER_QUEUES",
                "variable": "GPUINFER_WORKER_QUEUES",
            }
        }
    }
    assert json.loads(ask(file, "check", "--json")) == {
        "ok": True,
        "changed": 1,
        "workers": {"3": 1},
        "warnings": [],
        "restart": [],
    }


def test_a_wrong_file_of_a_worker_is_named(file: Path, tmp_path: Path) -> None:
    """What its unit would end with (78), before it is started."""
    own = tmp_path / "worker@0.env"
    own.write_text("GPUINFER_WORKER_QUEUE=batch\n")
    with pytest.raises(
        ConfigError, match=r"worker@0\.env: GPUINFER_WORKER_QUEUE: unknown variable; did you mean"
    ):
        ask(file, "check")
    own.write_text("what is this\n")
    assert f"warning: {own}: line 1 is no NAME=value: systemd ignores it\n" in ask(file, "check")


@pytest.mark.parametrize(
    ("toml", "words"),
    [
        (
            "[api]\nport = 9",
            "api.port = 9 ({file}) does nothing for gpuinfer-api.service, as systemd listens",
        ),
        (
            '[worker]\nmodels = ["digits", "nowhere"]',
            "names 'nowhere', which is not installed: gpuinfer model add",
        ),
        ('[broker]\nusername = "me"', "applies to commands only: each unit logs in as its own user"),
        ('[broker]\ntls_ca = "/ca"', "does nothing: broker.url does not begin with rediss://"),
        (
            '[broker]\nurl = "redis://h"\n[redis]\nmaxmemory_mb = 9',
            "redis.maxmemory_mb = 9 ({file}) does nothing: ",
        ),
        ("[redis]\nmaxmemory_mb = 9\nmaxmemory_share = 0.1", "does nothing beside redis.maxmemory_mb = 9"),
        ('[redis]\nappendfsync = "always"', "does nothing: appendfsync in /etc/gpuinfer/redis.conf wins"),
        ("[watcher]\nthreshold_depth = 1", 'does nothing unless watcher.mode is "threshold"'),
        (
            '[worker]\ndevice = "cpu"\ngpus = [1]',
            'worker.gpus = 1 ({file}) does nothing: worker.device is "cpu"',
        ),
    ],
)
def test_what_does_nothing_is_told(toml: str, words: str, tmp_path: Path) -> None:
    """Accepted, and without effect: each is named with its origin, and nothing else is."""
    (tmp_path / "lib/systemd/system").mkdir(parents=True)
    (tmp_path / "lib/systemd/system/gpuinfer-api.socket").touch()
    (tmp_path / "etc/gpuinfer").mkdir(parents=True)
    (tmp_path / "etc/gpuinfer/redis.conf").write_text("appendfsync always\n#maxmemory 1gb\n")
    file = tmp_path / "gpuinfer.toml"
    file.write_text(toml)
    (told,) = warnings(Given(load(file, {}), root=tmp_path))
    assert words.format(file=file) in told


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        (
            "GPUINFER_WORKER_MODELS",
            '["a"]',
            "contains brackets or quotes, which become part of the names",
        ),
        ("GPUINFER_WORKER_MODELS", "nowhere", "worker.models (GPUINFER_WORKER_MODELS) names 'nowhere'"),
        ("GPUINFER_API_PORT", "9", "does nothing in worker@4.env: no worker reads [api]"),
    ],
)
def test_what_does_nothing_in_a_workers_file_is_told(
    name: str, value: str, words: str, tmp_path: Path
) -> None:
    """What is special about one worker."""
    (told,) = warnings(Given(load(None, {name: value}), worker=4, root=tmp_path))
    assert words in told


def test_nothing_is_told_where_nothing_is_changed(tmp_path: Path) -> None:
    """An untouched file, and settings that work."""
    assert warnings(Given(load(None, {}), root=tmp_path)) == []
    file = tmp_path / "gpuinfer.toml"
    file.write_text("[api]\nport = 9\nmax_wait_s = 5\n[worker]\nmodels = ['digits']\n")
    assert warnings(Given(load(file, {}), root=tmp_path)) == [], "by hand it listens there"


def test_which_units_run_with_older_settings() -> None:
    """Those that read what was changed and were started before; a worker's own file is its alone."""
    running = {
        "gpuinfer-redis": 100.0,
        "gpuinfer-api": 100.0,
        "gpuinfer-watcher": 300.0,
        "gpuinfer-worker@0": 100.0,
        "gpuinfer-worker@1": 300.0,
    }
    since = restarts.changed_since({"api": {"port": 1}, "queue": {"max_dead": 2}}, {"queue": {"max_dead": 2}})
    assert since == {"api"}
    assert restarts.needed(running, 200, since, {}) == ["gpuinfer-api"]
    assert restarts.needed(running, 200, {"queue"}, {}) == ["gpuinfer-api", "gpuinfer-worker@0"]
    assert restarts.needed(running, 50, {"queue"}, {1: 400.0, 0: 50.0}) == ["gpuinfer-worker@1"]
    assert restarts.changed_since({"api": {}}, None) == set()
    assert restarts.changed_since({}, {"log": {"level": "debug"}}) == {"log"}


def test_what_systemd_says_is_read() -> None:
    """Running units alone, by when their process was started."""
    said = (
        "Id=gpuinfer-api.service\nActiveState=active\nExecMainStartTimestampMonotonic=2000000\n\n"
        "Id=gpuinfer-worker@0.service\nActiveState=failed\nExecMainStartTimestampMonotonic=1\n"
    )
    assert dict(restarts._running(said, 1000.0)) == {"gpuinfer-api": 1002.0}
