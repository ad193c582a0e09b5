# SPDX-License-Identifier: Apache-2.0
"""What gpuinfer-redis.service is given at each start: its memory, its users; and whether it starts here."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

import pytest

from gpuinfer.broker import acl, durability, last_good, passwords, trial, tuning
from gpuinfer.broker import cli as broker_cli
from gpuinfer.cli import main
from gpuinfer.errors import NotPermitted
from gpuinfer.settings import QUEUES, RedisSettings, load
from tests.services import redis_binary

pytestmark = pytest.mark.unit

GIB = 1024 * tuning.MIB
PASSWORDS = {user: f"secret of {user}" for user in acl.USERS}


@pytest.fixture
def credentials(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The users' password files, as systemd hands them over."""
    folder = tmp_path / "credentials"
    folder.mkdir()
    for user, password in PASSWORDS.items():
        (folder / user).write_text(password + "\n", encoding="utf-8")
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(folder))
    monkeypatch.setattr(broker_cli, "MORE_USERS", tmp_path / "redis-users.acl")
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where ``prepare`` writes."""
    path = tmp_path / "run"
    path.mkdir()
    return path


def call(*arguments: str | Path) -> int:
    """Run ``gpuinfer ...`` in this process; return its exit code."""
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    return int(ended.value.code or 0)


def prepare(folder: Path) -> int:
    return call("redis", "prepare", "--folder", folder, "--data", folder.parent)


# -- memory -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("host_gib", "settings", "wanted_mib"),
    [
        (8, {}, 2048),
        (256, {}, 16384),
        (0.5, {}, 256),
        (8, {"maxmemory_share": 0.1}, 819),
        (512, {"maxmemory_ceiling_mb": 65536}, 65536),
        (8, {"maxmemory_mb": 300}, 300),
        (0.5, {"maxmemory_mb": 20000}, 20000),
        (8, {"maxmemory_floor_mb": 4096, "maxmemory_ceiling_mb": 1024}, 4096),
    ],
    ids=[
        "share",
        "ceiling",
        "floor",
        "whole MiB",
        "own ceiling",
        "explicit",
        "beyond the ceiling",
        "floor wins",
    ],
)
def test_maxmemory(host_gib: float, settings: dict[str, float], wanted_mib: int) -> None:
    """A share of the host's memory within floor and ceiling, in whole MiB; a value that is set is taken."""
    found = tuning.maxmemory_bytes(RedisSettings.model_validate(settings), int(host_gib * GIB))
    assert found == wanted_mib * tuning.MIB


def test_tuning_conf() -> None:
    """It says where its figure comes from, and has what Redis is to do with it."""
    choice = durability.Choice("everysec", "auto: /x is on tmpfs", "tmpfs does not outlive a power cut")
    assert tuning.render(RedisSettings(), 8 * GIB, choice).splitlines() == [
        "# Written by `gpuinfer redis prepare` at each start from [redis] in gpuinfer.toml; do not edit.",
        "# 0.25 of the host's 8192 MiB, 256 to 16384 MiB",
        "maxmemory 2048mb",
        "# auto: /x is on tmpfs: nothing is promised about a power cut: tmpfs does not outlive a power cut",
        "appendfsync everysec",
    ]
    choice = durability.Choice("always", "redis.appendfsync")
    text = tuning.render(RedisSettings(maxmemory_mb=300), 8 * GIB, choice)
    assert text.splitlines()[1:3] == ["# redis.maxmemory_mb", "maxmemory 300mb"]
    assert text.splitlines()[4:] == ["appendfsync always"]


def test_show(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """``redis show`` tells what the next start takes, on this host."""
    monkeypatch.setenv("GPUINFER_REDIS_MAXMEMORY_MB", "321")
    assert call("redis", "show") == 0
    assert "maxmemory 321mb\n" in capsys.readouterr().out
    assert tuning.host_memory_bytes() > 64 * tuning.MIB


# -- users --------------------------------------------------------------------------------


def test_acl_text() -> None:
    """One line a user; passwords as their hashes alone; nobody logs in as the default user."""
    text = acl.render(PASSWORDS)
    lines = text.splitlines()
    assert text.endswith("\n")
    assert [line.split()[:3] for line in lines] == [
        ["user", "default", "off"],
        *(["user", user, "on"] for user in acl.USERS),
    ]
    for user, password in PASSWORDS.items():
        assert password not in text
        assert f"user {user} on #{hashlib.sha256(password.encode()).hexdigest()} resetchannels -@all" in text
    assert "nopass" not in text
    assert ">" not in text


def test_default_user_reads_the_file_back() -> None:
    """Redis loads its append-only file with the default user's rights: it must have all, and no password."""
    assert acl.render(PASSWORDS).splitlines()[0] == "user default off resetpass ~* &* +@all"


@pytest.mark.parametrize("user", ["api", "worker", "watcher", "viewer"])
def test_no_program_has_everything(user: str) -> None:
    """Least rights: no program may do all to all keys, or speak on all channels."""
    rules = [part for rule in acl.RULES[user] for part in rule.strip("()").split()]
    assert not {"~*", "allkeys", "+@all", "allcommands", "+@admin", "+@dangerous", "+config", "+acl"} & set(
        rules
    )
    speaking = [rule for rule in acl.RULES[user] if "+publish" in rule or rule.startswith("&")]
    assert "&*" not in speaking
    assert [rule for rule in acl.RULES[user] if rule.count("(") != rule.count(")")] == []
    for queue in QUEUES:
        assert not any(
            word in rule.split() for rule in acl.RULES[user] for word in ("+del",) if f"~{queue}" in rule
        )


# -- prepare ------------------------------------------------------------------------------


def test_prepare(credentials: Path, folder: Path) -> None:
    """The files are there, secrets for their owner alone, and so after a second start; nothing else is."""
    for _ in range(2):
        assert prepare(folder) == 0
    assert sorted(path.name for path in folder.iterdir()) == ["durability", "tuning.conf", "users.acl"]
    modes = {path.name: path.stat().st_mode & 0o777 for path in folder.iterdir()}
    # How Redis writes is no secret: the front shows it.
    assert modes == {"durability": 0o640, "tuning.conf": 0o600, "users.acl": 0o600}
    assert (folder / "users.acl").read_text(encoding="utf-8") == acl.render(PASSWORDS)
    assert "\nmaxmemory " in (folder / "tuning.conf").read_text(encoding="utf-8")


def test_prepare_follows_no_link(credentials: Path, folder: Path, tmp_path: Path) -> None:
    """What lies in the way is replaced: a link's target stays, and a wide mode is not inherited."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.write_text("mine", encoding="utf-8")
    (folder / "users.acl.new").symlink_to(elsewhere)
    (folder / "tuning.conf.new").touch(mode=0o666)
    (folder / "tuning.conf.new").chmod(0o666)
    assert prepare(folder) == 0
    assert elsewhere.read_text(encoding="utf-8") == "mine"
    modes = {path.name: path.stat().st_mode & 0o777 for path in folder.iterdir()}
    # How Redis writes is no secret: the front shows it.
    assert modes == {"durability": 0o640, "tuning.conf": 0o600, "users.acl": 0o600}
    assert not (folder / "users.acl").is_symlink()


def test_missing_password(credentials: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A password that is not there is named, with what makes one; nothing is written."""
    (credentials / "worker").unlink()
    assert prepare(folder) == 78
    told = capsys.readouterr().err
    assert str(credentials / "worker") in told
    assert "dpkg-reconfigure gpuinfer" in told
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("content", [b"", b" \n"])
def test_empty_password(
    credentials: Path, folder: Path, capsys: pytest.CaptureFixture[str], content: bytes
) -> None:
    """An empty password is none."""
    (credentials / "watcher").write_bytes(content)
    assert prepare(folder) == 78
    assert f"{credentials / 'watcher'}: is empty" in capsys.readouterr().err
    assert list(folder.iterdir()) == []


def test_password_that_is_no_text(
    credentials: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Bytes that are no text are an error with the file's name, not a traceback, and are not shown."""
    (credentials / "api").write_bytes(b"\xff\xfehush")
    assert prepare(folder) == 78
    told = capsys.readouterr().err
    assert str(credentials / "api") in told
    assert "hush" not in told


def test_folder_that_cannot_be_written(
    credentials: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The file that cannot be written is named, with the reason."""
    assert prepare(tmp_path / "absent") == 78
    assert (
        f"{tmp_path / 'absent' / 'tuning.conf'}: cannot be written: No such file" in capsys.readouterr().err
    )
    plain = tmp_path / "plain"
    plain.touch()
    assert prepare(plain) == 78
    assert "Not a directory" in capsys.readouterr().err


def test_more_users(credentials: Path, folder: Path, tmp_path: Path) -> None:
    """The administrator's own users come after ours, his comments not: Redis would not start with them."""
    (tmp_path / "redis-users.acl").write_text(
        "# who reads results\n\nuser reader on #00 ~celery-task-meta-* +get\n", encoding="utf-8"
    )
    assert prepare(folder) == 0
    text = (folder / "users.acl").read_text(encoding="utf-8")
    assert text == acl.render(PASSWORDS) + "user reader on #00 ~celery-task-meta-* +get\n"


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("user api on nopass", "line 3 must be `user NAME RULES...`, with another name than default, admin"),
        ("user viewer on nopass", "line 3 must be"),
        ("reader on", "line 3 must be"),
        ("user", "line 3 must be"),
        ("user mine on ~x +get", "line 3 names the user mine a second time"),
        ("user reader on +nosuch", "line 3 (user reader): "),
        ("user reader on +client|nosuch", "line 3 (user reader): "),
        ("user reader on (+get ~x", "line 3 (user reader): "),
    ],
)
def test_more_users_that_redis_would_refuse(
    credentials: Path,
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    line: str,
    words: str,
) -> None:
    """The line is named and left out; ours work, and so do his others."""
    monkeypatch.setattr(trial, "BINARY", redis_binary() or "")
    mine = f"user mine on #{'0' * 64} ~x +get"
    (tmp_path / "redis-users.acl").write_text(f"# mine\n{mine}\n{line}\n", encoding="utf-8")
    assert prepare(folder) == 0
    assert f"redis-users.acl: {words}" in capsys.readouterr().err
    text = (folder / "users.acl").read_text(encoding="utf-8")
    assert text == acl.render(PASSWORDS) + mine + "\n"


#: A Redis that takes connections, and answers none.
HANGS = """
import socket, sys, time
listener = socket.socket(socket.AF_UNIX)
listener.bind(sys.argv[sys.argv.index("--unixsocket") + 1])
listener.listen()
time.sleep(600)
"""


@pytest.mark.parametrize("script", [HANGS, "sys.exit(3)"])
def test_a_redis_that_cannot_try_more_users_keeps_nothing_from_starting(
    credentials: Path,
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    script: str,
) -> None:
    """One that hangs, or ends: the lines are named and left out, and Redis starts with our users."""
    binary = tmp_path / "redis-server"
    binary.write_text(f"#!{sys.executable}\nimport sys\n{script}\n", encoding="utf-8")
    binary.chmod(0o755)
    monkeypatch.setattr(trial, "BINARY", binary)
    monkeypatch.setattr(trial, "LIMIT_S", 2.0)
    (tmp_path / "redis-users.acl").write_text("user a on ~x +get\nuser b on ~x +get\n", encoding="utf-8")
    assert prepare(folder) == 0
    told = capsys.readouterr().err
    for line in ("line 1 (user a)", "line 2 (user b)"):
        assert f"redis-users.acl: {line}: it could not be checked: the Redis started to check it" in told
    assert (folder / "users.acl").read_text(encoding="utf-8") == acl.render(PASSWORDS)


def test_more_users_by_tabs(
    credentials: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Redis reads a file of users by spaces alone, and would not start with this one as it is written."""
    monkeypatch.setattr(trial, "BINARY", redis_binary() or "")
    (tmp_path / "redis-users.acl").write_text("user\treader  on\t~x\xa0+get\x0c\n", encoding="utf-8")
    assert prepare(folder) == 0
    text = (folder / "users.acl").read_text(encoding="utf-8")
    assert text.endswith("\nuser reader on ~x +get\n")


# -- local --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "code"),
    [
        ("unix:///run/gpuinfer/redis/redis.sock?db=0", 0),
        ("unix://app:pw@/run/gpuinfer/redis/redis.sock", 0),
        ("redis+socket:///run/gpuinfer/redis/redis.sock", 0),
        ("unix:///run/redis/redis.sock", 1),
        ("unix:///run/gpuinfer/redis-other/redis.sock", 1),
        ("redis://127.0.0.1:6379/0", 1),
        ("rediss://app:p%40ss@queue.example:6380/0", 1),
        ("http://nonsense", 255),
    ],
)
def test_local(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], url: str, code: int
) -> None:
    """systemd's condition: 0 start Redis here, 1 it is elsewhere, 255 wrong settings; no password is told."""
    monkeypatch.setenv("GPUINFER_BROKER_URL", url)
    assert call("redis", "local") == code
    told = capfd.readouterr()
    assert "p%40ss" not in told.out + told.err
    assert ("does not run its own Redis" in told.err) == (code == 1)
    assert ("gpuinfer: error: " in told.err) == (code == 255)


@pytest.mark.parametrize(
    "typo",
    [
        "[worker]\nqueues = ['batch', 'hurry']\n",
        "[wacher]\nmode = 'act'\n",
        "[api]\nprot = 1\n",
        "[models]\nfolders = 1.5\n",
    ],
)
def test_a_typo_elsewhere_does_not_keep_redis_from_starting(
    credentials: Path,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    typo: str,
) -> None:
    """Redis reads its own sections alone; what is wrong in another is told as a warning, once."""
    ours = "[broker]\nconnect_timeout_s = 1\n\n[redis]\nmaxmemory_mb = 300\n"
    file = tmp_path / "gpuinfer.toml"
    monkeypatch.setenv("GPUINFER_CONFIG", str(file))
    for text in (f"{ours}\n{typo}", f"{typo}\n{ours}"):
        file.write_text(text)
        assert call("redis", "local") == 0
        assert prepare(folder) == 0
        assert capfd.readouterr().err.count(f"gpuinfer: warning: {file}: ") == 1
        assert "maxmemory 300mb" in (folder / "tuning.conf").read_text(encoding="utf-8")
    for broken in ("[redis]\nmaxmemory = 1\n", "[broker]\nurl = \n", f"{ours}[redis]\n"):
        file.write_text(broken)
        assert prepare(folder) == 78
        assert call("redis", "local") == 255


@pytest.fixture
def settings_of_redis(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The settings file, and a folder where Redis keeps those of its last good start."""
    (tmp_path / "state").mkdir()
    monkeypatch.setattr(last_good, "FILE", tmp_path / "state" / "settings.json")
    monkeypatch.setenv("GPUINFER_CONFIG", str(tmp_path / "gpuinfer.toml"))
    return tmp_path / "gpuinfer.toml"


@pytest.mark.parametrize(
    "broken",
    ["[broker\n", "[models]\nfolders = [\n", "[redis]\nmaxmemory = 1\n", '[broker]\nurl = "x"\n', "\xff"],
)
def test_what_cannot_be_read_falls_back_to_the_last_good_start(
    settings_of_redis: Path, credentials: Path, folder: Path, capfd: pytest.CaptureFixture[str], broken: str
) -> None:
    """A slip takes no queue down: Redis starts as it did last, and says why."""
    settings_of_redis.write_text('broker.password = "hush"\n[redis]\nmaxmemory_mb = 300\n')
    assert call("redis", "local") == 0
    assert last_good.FILE.stat().st_mode & 0o777 == 0o600
    assert "hush" not in last_good.FILE.read_text()
    settings_of_redis.write_bytes(broken.encode("latin-1"))
    capfd.readouterr()
    assert call("redis", "local") == 0
    assert prepare(folder) == 0
    told = capfd.readouterr().err
    assert f"gpuinfer: warning: {settings_of_redis}: " in told
    assert "Redis starts with its last good settings" in told
    assert "maxmemory 300mb" in (folder / "tuning.conf").read_text(encoding="utf-8")
    settings_of_redis.write_text("[redis]\nmaxmemory_mb = 400\n")
    assert (call("redis", "local"), prepare(folder)) == (0, 0)
    assert "maxmemory 400mb" in (folder / "tuning.conf").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "text",
    [
        'broker.url = "rediss://queue.example:6380/0"\n',
        '["broker"]\nurl = "rediss://queue.example:6380/0"\n',
        'broker = { url = "rediss://queue.example:6380/0" }\n',
        '[ broker ]\n"url" = "rediss://queue.example:6380/0"\n',
    ],
)
def test_another_hosts_redis_however_it_is_written(settings_of_redis: Path, text: str) -> None:
    """One reading of the file: no second Redis starts, not even when a slip comes later."""
    settings_of_redis.write_text(text)
    assert load(None).settings.broker.url.startswith("rediss://queue")
    assert call("redis", "local") == 1
    settings_of_redis.write_text(text + "[api\n")
    assert call("redis", "local") == 1


@pytest.mark.parametrize(
    "url", ["rediss://gpu:hush@queue.example:6380/0", "rediss://queue.example:6380/0?password=hush"]
)
def test_no_password_is_kept(settings_of_redis: Path, url: str) -> None:
    """Where Redis is remains known while the file is wrong; how one logs in there is written nowhere else."""
    settings_of_redis.write_text(f'broker.url = "{url}"\n')
    assert call("redis", "local") == 1
    assert "hush" not in last_good.FILE.read_text()
    settings_of_redis.write_text("[api\n")
    assert call("redis", "local") == 1


def test_local_by_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A host whose settings name no other broker runs its own Redis."""
    (tmp_path / "gpuinfer.toml").touch()
    monkeypatch.setenv("GPUINFER_CONFIG", str(tmp_path / "gpuinfer.toml"))
    assert call("redis", "local") == 0


@pytest.mark.parametrize("left", [None, "", "none\n"])
def test_people_may_be_without_a_password(credentials: Path, folder: Path, left: str | None) -> None:
    """Nobody logs in as a user without one; the programs' queue is not down for it."""
    (credentials / "viewer").unlink()
    if left is not None:
        (credentials / "viewer").write_text(left)
    assert prepare(folder) == 0
    lines = (folder / "users.acl").read_text(encoding="utf-8").splitlines()
    assert [line.split()[1:4] for line in lines][-1] == ["viewer", "off", "resetchannels"]
    assert not any(line.startswith("user viewer on") for line in lines)


def test_older_passwords_count_until_they_are_dropped(
    credentials: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A restart of Redis while a password is changed knows both; what is no hash is no password."""
    monkeypatch.setattr(passwords, "OLDER", tmp_path / "older.json")
    passwords.keep_older("api", [acl.digest("old")])
    passwords.keep_older("worker", ["nonsense"])
    assert prepare(folder) == 0
    api = (folder / "users.acl").read_text(encoding="utf-8").splitlines()[2]
    assert f"#{acl.digest(PASSWORDS['api'])} #{acl.digest('old')} " in api
    passwords.keep_older("worker", [])
    passwords.keep_older("api", [])
    assert not passwords.OLDER.exists()


def test_who_may_not_read_the_passwords_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are there, so `dpkg-reconfigure` would make none."""

    def read_text(*_: object, **__: object) -> str:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_text", read_text)
    with pytest.raises(NotPermitted, match="only root may read it: call it with sudo"):
        passwords.read()
