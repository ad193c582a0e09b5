# SPDX-License-Identifier: Apache-2.0
"""Settings: what is accepted, what is refused and in which words, and that secrets stay secret."""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from gpuinfer.client.driver import settings_for
from gpuinfer.errors import ConfigError
from gpuinfer.settings import Settings, load, load_settings, shown
from gpuinfer.sources import SETTLED_S, settled

pytestmark = pytest.mark.unit

SHIPPED = Path(__file__).parents[2] / "etc" / "gpuinfer.toml"
SECRET = "hunter2-very-secret"


def refused(toml: str | bytes | None, tmp_path: Path, environ: Mapping[str, str] | None = None) -> str:
    """Load what must be refused, and return the message."""
    file = None
    if toml is not None:
        file = tmp_path / "gpuinfer.toml"
        file.write_bytes(toml if isinstance(toml, bytes) else toml.encode())
    with pytest.raises(ConfigError) as caught:
        load(file, environ or {})
    return str(caught.value)


def accepted(toml: str, tmp_path: Path, environ: Mapping[str, str] | None = None) -> Settings:
    file = tmp_path / "gpuinfer.toml"
    file.write_text(toml)
    return load_settings(file, environ or {})


def uncommented() -> dict[str, dict[str, Any]]:
    text = SHIPPED.read_text(encoding="utf-8")
    return tomllib.loads(re.sub(r"(?m)^#(?=\w+ = )", "", text))


def test_the_shipped_file_changes_nothing() -> None:
    """/etc/gpuinfer/gpuinfer.toml as shipped parses, and every line of it is a comment."""
    loaded = load(SHIPPED, {})
    assert loaded.settings == Settings()
    assert not loaded.origins


def test_the_shipped_file_shows_the_defaults(tmp_path: Path) -> None:
    """Each commented line is the default: without its # nothing changes."""
    file = tmp_path / "gpuinfer.toml"
    file.write_text(re.sub(r"(?m)^#(?=\w+ = )", "", SHIPPED.read_text(encoding="utf-8")))
    assert load_settings(file, {}) == Settings()


def test_the_shipped_file_names_every_key() -> None:
    """No setting is left for the reader of the source to find."""
    defaults = Settings()
    keys = {name: set(type(getattr(defaults, name)).model_fields) for name in Settings.model_fields}
    assert {name: set(values) for name, values in uncommented().items()} == keys


def test_variables_win_over_credentials_and_those_over_the_file(tmp_path: Path) -> None:
    """The order of the sources, and each value's origin."""
    (tmp_path / "broker_password").write_text("from-credential\n")
    file = tmp_path / "gpuinfer.toml"
    file.write_text('[broker]\npassword = "from-file"\n[api]\nport = 1\n')
    environ = {"CREDENTIALS_DIRECTORY": str(tmp_path), "GPUINFER_API_PORT": "2"}
    loaded = load(file, environ)
    password = loaded.settings.broker.password
    assert password is not None
    assert password.get_secret_value() == "from-credential"
    assert loaded.settings.api.port == 2
    assert loaded.origins == {"broker.password": "credential", "api.port": "GPUINFER_API_PORT"}
    again = load(file, {**environ, "GPUINFER_BROKER_PASSWORD": "from-variable"})
    assert again.origins["broker.password"] == "GPUINFER_BROKER_PASSWORD"


def test_the_named_file_must_exist(tmp_path: Path) -> None:
    """A file that was asked for is never silently skipped."""
    missing = tmp_path / "no.toml"
    with pytest.raises(ConfigError, match=r"no\.toml: cannot be read: No such file"):
        load(None, {"GPUINFER_CONFIG": str(missing)})


def test_a_folder_is_no_settings_file(tmp_path: Path) -> None:
    """The operating system's words, without its error number."""
    with pytest.raises(ConfigError, match=r"cannot be read: Is a directory$"):
        load(tmp_path, {})


@pytest.mark.parametrize("value", ["", None])
def test_an_empty_variable_is_not_set(value: str | None) -> None:
    """`Environment=GPUINFER_API_PORT=` in a unit takes a setting back."""
    environ = {"GPUINFER_API_PORT": value or "", "GPUINFER_WORKER_QUEUES": "", "GPUINFER_BROKER_PASSWORD": ""}
    loaded = load(None, environ)
    assert loaded.settings == Settings()
    assert not loaded.origins


def test_lists_in_variables_are_comma_separated() -> None:
    """Queues come back in their fixed order, each once."""
    settings = load_settings(None, {"GPUINFER_WORKER_QUEUES": "batch, realtime,batch"})
    assert settings.worker.queues == ("realtime", "batch")


def test_gpu_indices_may_be_numbers(tmp_path: Path) -> None:
    """`gpus = [0, 1]` is what everyone writes first."""
    assert accepted("[worker]\ngpus = [0, 1]", tmp_path).worker.gpus == ("0", "1")
    assert accepted("[worker]\ngpus = 3", tmp_path).worker.gpus == ("3",)


@pytest.mark.parametrize(
    ("toml", "words"),
    [
        ("[broker]\nurl = 5", "broker.url = '5': must be text in quotes"),
        ('[broker]\nurl = ["redis://a"]', "broker.url = 'redis://a': must be text in quotes"),
        ('[broker]\nurl = "http://a"', "must begin with redis://, rediss:// or unix://"),
        ('[broker]\nurl = "unix://"', "must name a socket"),
        ('[broker]\nurl = "redis://a:port/0"', "must name a port from 1 to 65535"),
        ('[broker]\nurl = "redis://a:99999/0"', "must name a port from 1 to 65535"),
        ("[broker.url]\na = 1", "broker.url = "),
        ("[api]\nport = true", "must not be true or false"),
        ("[api]\nport = 80.5", "api.port = '80.5': must be a whole number"),
        ("[api]\nport = 65536", "must be less than or equal to 65535"),
        ('[api]\nanonymous = ["10.0.0.1/8"]', "has bits beyond its length, its network is 10.0.0.0/8"),
        ('[api]\nanonymous = ["lan"]', "must be networks such as 10.0.0.0/8 or fd00::/8, not 'lan'"),
        ('[api]\nhosts = ["gpu1:8080"]', "must be host names without a port, such as gpu1.example.org"),
        ('[api]\ncors_origins = ["app.example"]', "must be origins such as https://app.example"),
        ('[api]\ncors_origins = ["https://app.example/x"]', "must be origins such as https://app.example"),
        ('[api]\ntls_key = "/etc/key.pem"', "api.tls_key = '/etc/key.pem': must be given with api.tls_cert"),
        ("[queue]\nretry_backoff_s = nan", "queue.retry_backoff_s = 'nan'"),
        ('[models]\ndefault = "digits"', "unknown key models.default; known: errors, folders"),
        ("[worker]\nmodels = []", "must name at least one model"),
        ('[worker]\nqueues = ["slow"]', "worker.queues = 'slow': must be 'realtime', 'default' or 'batch'"),
        ("[worker]\nqueues = []", "must name at least one of realtime, default, batch"),
        ("[worker]\nqueues = 1.5", "must be a list of texts"),
        ('[log]\nlevel = "loud"', "log.level = 'loud': must be 'debug', 'info', 'warning' or 'error'"),
        ('[broker]\nurll = "a"', "unknown key broker.urll; did you mean 'url'?"),
        ("[brokr]\n", "unknown section [brokr]; did you mean 'broker'?"),
        ("port = 80", "key 'port' must stand under [api]"),
        ("broker = 1", "broker must be a section, written [broker]"),
        ('[[broker]]\nurl = "a"', "broker must be a section, written [broker]"),
        ("[broker", "is not valid TOML"),
        (b"\xff\xfe", "must be UTF-8 text; byte 0 is not"),
    ],
)
def test_a_wrong_file_is_refused_by_name(toml: str | bytes, words: str, tmp_path: Path) -> None:
    """Each message names the file, the key, the value and what would be right."""
    message = refused(toml, tmp_path)
    assert message.startswith(str(tmp_path / "gpuinfer.toml"))
    assert words in message


def test_networks_and_names_have_one_form(tmp_path: Path) -> None:
    """An IPv4-mapped network is the IPv4 one, an origin has no usual port, a host's name is in lower case."""
    api = accepted(
        '[api]\nanonymous = ["::ffff:10.0.0.0/104", "192.0.2.7"]\nhosts = ["GPU1.Example.org.", "[::2]"]\n'
        'cors_origins = ["https://app.example:443/", "http://[::1]:3000"]\ntls_cert = ""',
        tmp_path,
        {"GPUINFER_API_CORS_ORIGINS": "*"},
    ).api
    assert api.anonymous == ("10.0.0.0/8", "192.0.2.7/32")
    assert api.hosts == ("gpu1.example.org", "::2")
    assert api.cors_origins == ("*",)
    assert (api.tls_cert, api.tls_key) == (None, None)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("GPUINFER_API_PORT", "http", "api.port = 'http': must be a whole number"),
        ("GPUINFER_API_PROT", "1", "unknown variable; did you mean GPUINFER_API_PORT?"),
        ("GPUINFER_api_port", "1", "unknown variable; did you mean GPUINFER_API_PORT?"),
        ("GPUINFER_XYZZY", "1", "unknown variable; `gpuinfer config show` lists all settings"),
        (
            "GPUINFER_BROKER",
            '{"url": "x"}',
            "is a whole section; set its keys one by one: GPUINFER_BROKER_URL",
        ),
        ("GPUINFER_BROKER_URL", "\udcff", "broker.url"),
    ],
)
def test_a_wrong_variable_is_refused_by_name(name: str, value: str, words: str, tmp_path: Path) -> None:
    """The variable's name is where the error is."""
    message = refused(None, tmp_path, {name: value})
    assert message.startswith(name)
    assert words in message


@pytest.mark.parametrize("toml", ["password = ['{}']", "password = {{ a = '{}' }}", "url = 'http://u:{}@h'"])
def test_errors_never_show_a_secret(toml: str, tmp_path: Path) -> None:
    """Neither the password's value nor one inside a URL gets into a message."""
    message = refused("[broker]\n" + toml.format(SECRET), tmp_path)
    assert "broker." in message
    assert SECRET not in message


def test_pydantic_never_shows_a_secret() -> None:
    """Even a ValidationError that nobody translated keeps the value to itself."""
    for broker in ({"password": [SECRET]}, {"url": f"http://:{SECRET}@h"}, {"passwort": SECRET}):
        with pytest.raises(ValidationError) as caught:
            Settings(broker=broker)  # type: ignore[arg-type]  # wrong on purpose
        assert SECRET not in str(caught.value)


def test_settings_never_print_a_secret() -> None:
    """repr, as a traceback or a debugger shows it, hides the password."""
    settings = load_settings(None, {"GPUINFER_BROKER_PASSWORD": SECRET})
    assert SECRET not in repr(settings)
    settings = load_settings(None, {"GPUINFER_BROKER_URL": f"redis://me:{SECRET}@h/0"})
    assert "redis://me:***@h/0" in repr(settings)
    assert SECRET not in repr(settings) + str(settings)


@pytest.mark.parametrize(
    ("url", "safe"),
    [
        ("redis://:pw@h:1/0", "redis://:***@h:1/0"),
        ("redis://me:p@w@h/0", "redis://me:***@h/0"),
        ("rediss://me:p/w@h/0", "rediss://me:***@h/0"),
        ("redis://h/0", "redis://h/0"),
        ("redis://me@h/0", "redis://me@h/0"),
        ("redis://h/0?password=pw", "redis://h/0?password=***"),
        ("redis://h/0?password=pw&tail&db=3", "redis://h/0?password=***"),
        ("redis://:pw#tail", "redis://:***"),
        ("redis://:pw/tail", "redis://:***"),
        ("redis://[::1]:6379/0", "redis://[::1]:6379/0"),
        ("redis://h:6379", "redis://h:6379"),
        ("redis://h:6379?db=3", "redis://h:6379?db=3"),
    ],
)
def test_a_password_in_a_url_is_hidden(url: str, safe: str) -> None:
    """Passwords with @ or / of their own, and as a parameter, are hidden too."""
    assert shown("broker.url", url) == safe


def test_a_credential_that_is_no_text_is_refused(tmp_path: Path) -> None:
    """The file of the credential is named; its bytes are not shown."""
    (tmp_path / "broker_password").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="broker_password: must be UTF-8"):
        load(None, {"CREDENTIALS_DIRECTORY": str(tmp_path)})


@pytest.mark.parametrize(
    ("files", "user", "name"),
    [
        (("admin", "api", "watcher"), "watcher", "admin"),
        (("admin", "api", "worker"), "worker", "worker"),  # model code may read what is in its memory
        (("api", "watcher"), "watcher", "watcher"),
        (("api", "watcher"), "api", "api"),
        ((), "api", None),
    ],
)
def test_root_logs_in_nowhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: tuple[str, ...], user: str, name: str | None
) -> None:
    """As the administrator; as the program's own user on a host that has not the administrator's password."""
    monkeypatch.setattr("gpuinfer.settings.PASSWORDS", tmp_path)
    monkeypatch.setattr("gpuinfer.settings.DEFAULT_FILE", tmp_path / "none.toml")
    for file in files:
        (tmp_path / file).write_text(f"of {file}\n")
    loaded = load(environ={}, user=user)
    assert loaded.settings.broker.username == name
    password = loaded.settings.broker.password
    assert (password.get_secret_value() if password else None) == (f"of {name}" if name else None)


def test_kubernetes_variables_are_nobody_s_settings() -> None:
    """A service called gpuinfer, or gpuinfer-api, puts these into every container beside it."""
    found = load_settings(
        None,
        {
            "GPUINFER_SERVICE_HOST": "10.0.0.1",
            "GPUINFER_SERVICE_PORT": "80",
            "GPUINFER_SERVICE_PORT_HTTP": "80",
            "GPUINFER_PORT": "tcp://10.0.0.1:80",
            "GPUINFER_PORT_80_TCP": "tcp://10.0.0.1:80",
            "GPUINFER_PORT_80_TCP_ADDR": "10.0.0.1",
            "GPUINFER_API_SERVICE_HOST": "10.0.0.1",
            "GPUINFER_API_PORT": "tcp://10.0.0.1:80",
            "GPUINFER_REDIS_PORT": "tcp://10.0.0.1:6379",
        },
    )
    assert found.api.port == Settings().api.port


def test_a_client_reads_what_it_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An application's own [api], or a variable of another section, does not stop its client."""
    file = tmp_path / "app.toml"
    file.write_text('[broker]\nurl = "redis://h/3"\n[api]\nkey = "abc"\n[application]\nname = "shop"\n')
    monkeypatch.setenv("GPUINFER_CONFIG", str(file))
    monkeypatch.setenv("GPUINFER_API_KEY", "abc")
    monkeypatch.setenv("GPUINFER_TRACING", "on")
    assert settings_for(None).broker.url == "redis://h/3"
    assert settings_for("redis://other").broker.url == "redis://other"
    monkeypatch.setenv("GPUINFER_BROKER_URLL", "redis://typo")
    with pytest.raises(ConfigError, match="did you mean GPUINFER_BROKER_URL"):
        settings_for(None)


def test_the_default_file_by_its_name_keeps_roots_login(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`--config /etc/gpuinfer/gpuinfer.toml`, or a link to it, is the host's own file."""
    file = tmp_path / "gpuinfer.toml"
    file.write_text("[api]\nmax_wait_s = 5\n")
    (tmp_path / "link.toml").symlink_to(file)
    passwords = tmp_path / "credentials"
    passwords.mkdir()
    (passwords / "admin").write_text("secret\n")
    monkeypatch.setattr("gpuinfer.settings.PASSWORDS", passwords)
    monkeypatch.setattr("gpuinfer.settings.DEFAULT_FILE", file)
    for loaded in (load(None, {}), load(file, {}), load(None, {"GPUINFER_CONFIG": f"{tmp_path}/link.toml"})):
        assert loaded.settings.broker.username == "admin"
        assert set(loaded.changed) == {"api.max_wait_s"}, "who logs in has changed nothing"
    other = tmp_path / "other.toml"
    other.write_text("")
    assert load(other, {}).settings.broker.username is None


@pytest.mark.parametrize(
    ("words", "name"),
    [(["gpuinfer", "celery", "worker", "-P", "solo"], "worker"), (["celery", "inspect", "ping"], "admin")],
)
def test_celerys_own_worker_is_no_administrator(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], name: str
) -> None:
    """It runs model code; the other commands of Celery's are root's own."""
    from gpuinfer import celery

    monkeypatch.setattr("gpuinfer.settings.PASSWORDS", tmp_path)
    monkeypatch.setattr("gpuinfer.settings.DEFAULT_FILE", tmp_path / "none.toml")
    for user in ("admin", "worker"):
        (tmp_path / user).write_text("secret\n")
    monkeypatch.setattr("sys.argv", words)
    assert celery._read().broker.username == name


@pytest.mark.parametrize(("files", "name"), [(("operator", "viewer"), "operator"), (("viewer",), "viewer")])
def test_who_is_not_root_finds_a_login(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: tuple[str, ...], name: str
) -> None:
    """The one of the group: what may be read, the more first; a worker's own login is not taken for it."""
    monkeypatch.setattr("gpuinfer.settings.PASSWORDS", tmp_path / "nobody's")
    monkeypatch.setattr("gpuinfer.settings.PEOPLES", tmp_path)
    monkeypatch.setattr("gpuinfer.settings.DEFAULT_FILE", tmp_path / "none.toml")
    for user in files:
        (tmp_path / user).write_text("secret\n")
    loaded = load(None, {}, user="worker")
    assert loaded.settings.broker.username == name
    assert not loaded.changed


class Writer:
    """Somebody who goes on with the settings file while its reader sleeps."""

    def __init__(self, file: Path, *parts: str | None) -> None:
        self.file, self.parts = file, list(parts)
        self.slept: list[float] = []
        self.now = 1e9
        self.go_on()

    def go_on(self) -> None:
        """Write the file, in place, as its next part; None: move it away."""
        part = self.parts.pop(0)
        if part is None:
            self.file.unlink()
        else:
            self.file.write_text(part)
        for path in (self.file, self.file.parent):
            if path.exists():
                os.utime(path, (self.now, self.now))

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds
        if self.parts:
            self.go_on()

    def read(self) -> Settings:
        """Return what a service starts with: a file, where there is one."""

        def read() -> Settings:
            return load(self.file, {}).settings if self.file.exists() else Settings()

        return settled(self.file, read, now=lambda: self.now, sleep=self.sleep)


WHOLE = '[api]\nport = 1\n[broker]\nurl = "unix:///run/another.sock?db=0"\n'


@pytest.mark.parametrize(
    "parts",
    [
        ("", WHOLE[:15], WHOLE),  # the beginning is valid TOML
        (WHOLE[:30], WHOLE),  # this is not
        (WHOLE.replace("port = 1", "port = 7"), None, WHOLE),  # moved away, then written, as some editors do
    ],
)
def test_a_service_waits_for_a_file_that_is_being_written(
    parts: tuple[str | None, ...], tmp_path: Path
) -> None:
    """What it starts with is the whole file, whatever of it is there at first."""
    found = Writer(tmp_path / "gpuinfer.toml", *parts).read()
    assert found == accepted(WHOLE, tmp_path)


def test_an_old_file_is_read_at_once(tmp_path: Path) -> None:
    """Right or wrong, it is read once; one from the future, by a wrong clock, too."""
    for age in (SETTLED_S, 1e6, -1e6):
        writer = Writer(tmp_path / "gpuinfer.toml", WHOLE)
        writer.now += age
        assert writer.read().api.port == 1
        assert writer.slept == []
    writer = Writer(tmp_path / "gpuinfer.toml", "[api")
    writer.now += 60
    with pytest.raises(ConfigError, match="is not valid TOML"):
        writer.read()
    assert writer.slept == []


def test_a_file_that_is_written_for_ever_does_not_stop_a_service(tmp_path: Path) -> None:
    """After some seconds it is taken as it is."""
    writer = Writer(tmp_path / "gpuinfer.toml", *[WHOLE] * 100)
    assert writer.read().api.port == 1
    assert 5 <= sum(writer.slept) <= 15


def test_a_file_that_changes_while_it_is_read_is_read_again(tmp_path: Path) -> None:
    """Also where its new content looks old, as after cp -p."""
    file = tmp_path / "gpuinfer.toml"
    seen: list[str] = []
    file.write_text("")

    def read() -> str:
        text = file.read_text()
        if not seen:
            file.write_text(WHOLE)
            os.utime(file, (1, 1))
        seen.append(text)
        return text

    assert settled(file, read, sleep=lambda _: None) == WHOLE
    assert len(seen) == 2
