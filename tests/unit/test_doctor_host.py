# SPDX-License-Identifier: Apache-2.0
"""The doctor and the host: files under another root."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from gpuinfer.doctor import access, broker, system, workers
from gpuinfer.doctor.host import Finding, Findings, Host, Skipped, ok
from gpuinfer.doctor.redis_place import OUR_SOCKET
from gpuinfer.models.examples import sample
from gpuinfer.models.repository import SHIPPED, Repository
from gpuinfer.models.tensors import decode_batch
from gpuinfer.settings import Loaded, Settings, load

pytestmark = pytest.mark.unit

GIB = 1024**3


def host(root: Path, files: dict[str, str] | None = None, **sections: object) -> Host:
    for name, text in (files or {}).items():
        path = root / name.lstrip("/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return Host(Loaded(Settings.model_validate(sections), {}), root=root)


def flat(found: Findings) -> list[Finding]:
    return [found] if isinstance(found, Finding) else list(found)


def one(found: Findings) -> Finding:
    assert len(flat(found)) == 1, found
    return flat(found)[0]


# -- settings and passwords -----------------------------------------------------------------


class Lazy(Loaded):
    """As the command line's: read at the first look."""

    def __init__(self, file: Path, environ: dict[str, str]) -> None:
        object.__setattr__(self, "_from", (file, environ))

    def __getattr__(self, name: str) -> object:
        return getattr(load(*object.__getattribute__(self, "_from")), name)


def test_a_wrong_settings_file_is_named(tmp_path: Path) -> None:
    """The remedy opens that file, or takes back that variable."""
    file = tmp_path / "gpuinfer.toml"
    file.write_text("[api]\nprot = 1\n")
    found = workers.file(Host(Lazy(file, {})))
    assert found.remedy == f"editor {file} && gpuinfer config check"
    file.write_text("[api]\nport = 'x'\n")
    assert workers.file(Host(Lazy(file, {}))).remedy.startswith(f"editor {file}")
    file.write_text("")
    assert workers.file(Host(Lazy(file, {"GPUINFER_API_PROT": "1"}))).remedy.startswith(
        "unset GPUINFER_API_PROT"
    )
    assert workers.file(Host(Lazy(file, {}))).status == "ok"


def test_only_what_somebody_has_set_is_changed() -> None:
    """As ``gpuinfer config check`` counts: the login that the package made is no change."""
    login = {name: f"/etc/gpuinfer/credentials/{name}" for name in ("broker.username", "broker.password")}
    fresh = workers.file(Host(Loaded(Settings(), login)))
    assert fresh == ok("settings are valid, 0 of them changed")
    changed = workers.file(Host(Loaded(Settings(), {**login, "api.port": "/etc/gpuinfer/gpuinfer.toml"})))
    assert changed == ok("settings are valid, 1 of them changed")


@pytest.mark.skipif(os.geteuid() != 0, reason="the files must be root's")
def test_passwords_are_roots_alone(tmp_path: Path) -> None:
    """Missing, readable by others, empty: each is named, and never its content."""
    names = {f"{access.CREDENTIALS}/{user}": "f" * 64 for user in access.USERS}
    here = host(tmp_path, names)
    folder = tmp_path / access.CREDENTIALS.lstrip("/")
    folder.chmod(0o700)
    for path in folder.iterdir():
        path.chmod(0o600)
    assert one(access.credentials(here)).status == "ok"
    (folder / "api").chmod(0o644)
    (folder / "worker").write_text("")
    (folder / "watcher").unlink()
    found = flat(access.credentials(here))
    assert [finding.message.rpartition("/")[2] for finding in found] == [
        "api has mode 0644: others may read or change secrets",
        "worker holds no password",
        "watcher is missing",
    ]
    assert found[0].remedy == "chmod 0600 /etc/gpuinfer/credentials/api"
    again = "rm /etc/gpuinfer/credentials/worker && dpkg-reconfigure gpuinfer"
    assert found[1].remedy.startswith(again), "not a restart of Redis"


@pytest.mark.skipif(os.geteuid() != 0, reason="the files must be root's")
def test_a_second_host_needs_no_administrators_password(tmp_path: Path) -> None:
    """It stays with the host that has the Redis; on that one it is missed."""
    names = {f"{access.CREDENTIALS}/{user}": "f" * 64 for user in access.USERS if user != "admin"}
    second = host(tmp_path, names, broker={"url": "rediss://first:6380/0"})
    folder = tmp_path / access.CREDENTIALS.lstrip("/")
    folder.chmod(0o700)
    for path in folder.iterdir():
        path.chmod(0o600)
    assert one(access.credentials(second)).message == "4 passwords, readable only by root"
    assert one(access.credentials(host(tmp_path))).message.endswith("/admin is missing")


def test_without_the_package_there_are_no_passwords(tmp_path: Path) -> None:
    """In a plain checkout that is no error."""
    with pytest.raises(Skipped, match="the package is not installed"):
        access.credentials(host(tmp_path))


# -- kernel, disk, clock --------------------------------------------------------------------


def test_overcommit(tmp_path: Path) -> None:
    """The remedy lasts: its file is read after those that set the same."""
    file = "/etc/sysctl.d/99-zz-gpuinfer.conf"
    found = system.overcommit(host(tmp_path, {"/proc/sys/vm/overcommit_memory": "0\n"}))
    assert found.remedy == f"echo vm.overcommit_memory = 1 >>{file} && sysctl -p {file}"
    assert system.overcommit(host(tmp_path, {"/proc/sys/vm/overcommit_memory": "1\n"})).status == "ok"


def test_a_kernel_that_does_not_tell(tmp_path: Path) -> None:
    """A file that is not there is skipped, by name."""
    with pytest.raises(Skipped, match="/proc/sys/vm/overcommit_memory cannot be read"):
        system.overcommit(host(tmp_path))


@pytest.mark.parametrize(
    ("free", "inodes", "status"),
    [(10 * GIB, 10**6, "ok"), (GIB, None, "warning"), (GIB // 4, None, "error"), (10 * GIB, 10, "warning")],
)
def test_room_on_disk(free: int, inodes: int | None, status: str) -> None:
    """A file system without inodes of its own has enough of them."""
    assert system.judge("/var/lib/gpuinfer", free, inodes).status == status


def test_the_room_where_redis_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its folder, also by redis.conf, may be a file system of its own: then each has a finding."""
    with pytest.raises(Skipped, match="not installed"):
        system.data(host(tmp_path))
    here = host(tmp_path, {"/var/lib/gpuinfer/redis/file": "", "/etc/gpuinfer/redis.conf": "port 0\n"})
    asked: list[str] = []

    def full(path: Path) -> os.statvfs_result:
        asked.append(f"/{path.relative_to(tmp_path)}")
        return os.statvfs_result((4096, 4096, 10**9, 100, 100, 10**9, 10**6, 10**6, 0, 255))

    monkeypatch.setattr(os, "statvfs", full)
    assert len(flat(system.data(here))) == 1, "on one file system with the models"
    # The device of /proc is another one, whatever machine this is.
    (tmp_path / "mnt").symlink_to("/proc")
    host(tmp_path, {"/etc/gpuinfer/redis.conf": '# dir /x\ndir "/var/lib/gpuinfer/redis"\nDIR /mnt\n'})
    found = flat(system.data(here))
    assert [finding.status for finding in found] == ["error", "error"]
    assert found[1].remedy == "du -xh --max-depth=2 /mnt | sort -h | tail"
    assert asked == ["/var/lib/gpuinfer", "/var/lib/gpuinfer", "/mnt"]


def test_a_journal_that_is_lost_at_reboot(tmp_path: Path) -> None:
    """journald writes it to /run where, for whatever reason, it does not write it to disk; or nowhere."""
    (tmp_path / "run/systemd/system").mkdir(parents=True)
    here = host(
        tmp_path, {"/run/log/journal/0123/system.journal": "", "/var/log/journal/0123/system.journal": ""}
    )
    found = system.journal(here)
    assert (found.status, "lost at each reboot" in found.message) == ("warning", True)
    assert "Storage=persistent" in found.remedy
    (tmp_path / "run/log/journal/0123/system.journal").unlink()
    assert system.journal(here).status == "ok"
    (tmp_path / "var/log/journal/0123/system.journal").unlink()
    assert system.journal(here).status == "warning"


# -- Redis's files --------------------------------------------------------------------------


class _Redis:
    """A client that answers INFO."""

    def __init__(self, **found: object) -> None:
        self._found = found

    def info(self, *_: str) -> dict[str, object]:
        return self._found


def redis_host(root: Path, url: str, **found: object) -> Host:
    here = host(root, broker={"url": url})
    here.client = _Redis(**found)  # type: ignore[assignment]  # it has what is asked
    return here


def test_what_fixes_redis_outlives_a_restart(tmp_path: Path) -> None:
    """Our own is changed at once and in its file: a restart may lose the queue. Another's at once."""
    ill = {"maxmemory": 0, "maxmemory_policy": "allkeys-lru", "aof_enabled": 0}
    options = ["maxmemory-policy volatile-ttl", "maxmemory 2gb", "appendonly yes"]
    ours = flat(broker.limits(redis_host(tmp_path, f"unix://{OUR_SOCKET}", **ill)))
    for found, option in zip(ours, options, strict=True):
        assert f"CONFIG SET {option} && editor {broker.CONF}  # {option}, for the next start" in found.remedy
        assert "restart gpuinfer-redis" not in found.remedy
    theirs = flat(broker.limits(redis_host(tmp_path, "redis://there/0", **ill)))
    assert [found.remedy for found in theirs] == [
        f"redis-cli -h there -p 6379 CONFIG SET {option}" for option in options
    ]


# -- models, the request ----------------------------------------------------------


def test_a_models_digest(tmp_path: Path) -> None:
    """The shipped one is sound; one that was changed, and one that is not there, are errors."""
    assert one(workers.digests(host(tmp_path))).message == "digits has the digest it was added with"
    artefact = Repository([tmp_path / "models"]).add(SHIPPED / "digits", "changed").artefact
    artefact.write_bytes(artefact.read_bytes() + b"x")
    by_hand = tmp_path / "models" / "mine"
    shutil.copytree(SHIPPED / "digits", by_hand, ignore=shutil.ignore_patterns("installed.json"))
    (by_hand / "model.toml").write_text((by_hand / "model.toml").read_text().replace('"digits"', '"mine"'))
    names = {"folders": [tmp_path / "models"]}
    wanted = {"models": ["changed", "gone", "mine"]}
    changed, gone, mine = flat(workers.digests(host(tmp_path, models=names, worker=wanted)))
    assert (changed.status, gone.status, mine.status) == ("error", "error", "error")
    assert mine.remedy == f"gpuinfer model add {by_hand}"
    assert "model.pt has changed; it was not loaded" in changed.message
    assert gone.remedy.startswith("gpuinfer model add FOLDER --name gone")


@pytest.mark.parametrize(
    ("what", "mode", "remedy"),
    [
        ("open", 0o777, "chown -R root:root {}/open && chmod -R go-w {}/open"),
        ("open/model.toml", 0o666, "chown -R root:root {}/open && chmod -R go-w {}/open"),
        ("open/model.pt", 0o620, "chown -R root:root {}/open && chmod -R go-w {}/open"),
        (".", 0o777, "chown root:root {} && chmod go-w {}"),
        ("..", 0o1777, ""),
    ],
)
def test_a_model_others_may_change(tmp_path: Path, what: str, mode: int, remedy: str) -> None:
    """It is a program that workers run: its folder, its files, the folders in which it could be exchanged."""
    folder = tmp_path / "here" / "models"
    Repository([folder]).add(SHIPPED / "digits", "open")
    (folder / what).chmod(mode)
    here = host(tmp_path, models={"folders": [folder]}, worker={"models": ["open"]})
    found = one(workers.digests(here))
    assert found.status == ("warning" if remedy else "ok")
    assert found.remedy == remedy.format(folder, folder)


def test_the_models_of_each_worker_are_looked_at(tmp_path: Path) -> None:
    """Those that only its own file names, too; one that more workers name is looked at once."""
    here = host(
        tmp_path,
        {
            "/etc/gpuinfer/worker@0.env": "GPUINFER_WORKER_MODELS=digits,nowhere\n",
            "/etc/gpuinfer/worker@1.env": "GPUINFER_WORKER_MODELS=nowhere\n",
            "/etc/gpuinfer/worker@2.env": "GPUINFER_WORKER_NOSUCH=1\n",
        },
        models={"folders": ["/var/lib/gpuinfer/models"]},
    )
    sound, missing = flat(workers.digests(here))
    assert sound.status == "ok"
    assert (missing.status, "nowhere" in missing.message) == ("error", True)


def test_the_sample_fits_the_model() -> None:
    """Zeros of the shape and kind the manifest names."""
    folder = Repository([SHIPPED]).get("digits")
    (item,) = decode_batch(folder.manifest, [sample(folder)])
    assert isinstance(item, tuple)
    assert item[0].shape == folder.manifest.inputs[0].shape
    assert not item[0].any()
