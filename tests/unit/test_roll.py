# SPDX-License-Identifier: Apache-2.0
"""How an upgrade is rolled out: systemd/roll and the maintainer scripts, with systemctl and dpkg replaced."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.unit.test_packaging import ROOT, maintainer_script

pytestmark = pytest.mark.unit

#: Stands for systemctl: what is asked for, and the states of units.
SYSTEMCTL = """#!/bin/sh
echo "$@" >>"$CALLS"
case "$*" in
    *list-units*--state=active*) printf '%s\\n' $ACTIVE ;;
    *list-units*--state=failed*) printf '%s\\n' $FAILED ;;
    *is-failed*) exit "${HEALTHY:-1}" ;;
    *is-active*gpuinfer.target*) exit "${STOPPED:-0}" ;;
    *show*gpuinfer-workers.target*) printf '%s\\n' ${TARGET:-} ;;
    *restart*"$BAD"*) exit 1 ;;
esac
"""
WORKER_0, WORKER_1, WORKER_2 = (f"gpuinfer-worker@{number}.service" for number in range(3))


class Rolling:
    """``systemd/roll`` with everything it touches in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "bin").mkdir()
        (folder / "asked").mkdir()
        self._put("bin/systemctl", SYSTEMCTL)
        self._put("bin/gpuinfer", "#!/bin/sh\n")
        self._put("bin/redis-cli", '#!/bin/sh\nprintf "%s\\r\\n" "# Persistence" "$PERSISTENCE"\n')
        script = (ROOT / "systemd" / "roll").read_text()
        for path, instead in (
            ("/run/gpuinfer-upgrade.doing", "doing"),
            ("/run/gpuinfer-upgrade", "asked"),
            ("/usr/sbin/policy-rc.d", "policy"),
            ("/usr/bin/gpuinfer", "bin/gpuinfer"),
        ):
            script = re.sub(rf"(?m)(?<![\w.]){re.escape(path)}(?![\w.])", str(folder / instead), script)
        self._put("roll", script)

    def _put(self, name: str, text: str) -> None:
        (self.folder / name).write_text(text)
        (self.folder / name).chmod(0o755)

    def forbid(self, *units: str) -> None:
        self._put("policy", f"#!/bin/sh\ncase $1 in {'|'.join(units)}) exit 101 ;; esac\n")

    def run(
        self,
        *wanted: str,
        active: str = "",
        failed: str = "",
        bad: str = "none",
        stopped: bool = False,
        target: str = "",
        persistence: str = "aof_enabled:1",
    ) -> tuple[list[str], str]:
        """Return what systemctl was told to change, and what the journal has."""
        (self.folder / "asked").mkdir(exist_ok=True)
        (self.folder / "asked" / "wanted").write_text("".join(f"{line}\n" for line in wanted))
        calls = self.folder / "calls"
        calls.write_text("")
        done = subprocess.run(
            [self.folder / "roll"],
            env={
                "PATH": f"{self.folder / 'bin'}:/usr/bin:/bin",
                "CALLS": str(calls),
                "ACTIVE": active,
                "FAILED": failed,
                "BAD": bad,
                "STOPPED": "3" if stopped else "0",
                "TARGET": target,
                "PERSISTENCE": persistence,
                "HEALTHY": "0" if stopped else "1",
            },
            check=True,
            capture_output=True,
            text=True,
            timeout=60,
        )
        changed = [line for line in calls.read_text().splitlines() if re.match(r"(try-re)?(re)?start ", line)]
        assert not (self.folder / "asked").exists()
        assert not (self.folder / "doing").exists()
        return changed, done.stdout


@pytest.fixture
def rolling(tmp_path: Path) -> Rolling:
    return Rolling(tmp_path)


def test_what_had_failed_is_started_by_the_next_good_version(rolling: Rolling) -> None:
    """After those that ran, one after the other; then watcher and front."""
    changed, _ = rolling.run("new version", active=f"{WORKER_0} {WORKER_1}", failed=WORKER_2)
    assert changed == [
        f"try-restart {WORKER_0}",
        f"try-restart {WORKER_1}",
        f"start {WORKER_2}",
        *(f"try-restart gpuinfer-{name}.service" for name in ("watcher", "api", "flower")),
    ]


def test_a_bad_version_stops_at_the_first(rolling: Rolling) -> None:
    """The workers after it run on, what had failed stays so, and the journal has a warning."""
    changed, told = rolling.run("new version", active=f"{WORKER_0} {WORKER_1}", failed=WORKER_2, bad=WORKER_0)
    assert [line for line in changed if "worker" in line] == [f"try-restart {WORKER_0}"]
    assert f"<4>{WORKER_0} did not come back" in told


def test_policy_rc_d_is_obeyed(rolling: Rolling) -> None:
    """Each restart and start is asked for; what is forbidden is said."""
    rolling.forbid(WORKER_0, WORKER_2, "gpuinfer-api.service")
    changed, told = rolling.run("new version", active=f"{WORKER_0} {WORKER_1}", failed=WORKER_2)
    assert changed == [
        f"try-restart {WORKER_1}",
        "try-restart gpuinfer-watcher.service",
        "try-restart gpuinfer-flower.service",
    ]
    assert f"<4>policy-rc.d denies the start of {WORKER_2}" in told


def test_what_an_administrator_has_stopped_stays_so(rolling: Rolling) -> None:
    """Of a target that is not up nothing is started: neither what had failed nor Redis for new passwords."""
    (rolling.folder / "asked" / "passwords").touch()
    changed, _ = rolling.run("new version", failed=WORKER_2, stopped=True)
    assert changed == ["try-restart gpuinfer-redis.service"]


#: What systemd tells of the workers' target: stopped since the boot; up; never up since the boot.
TARGET_STOPPED = "InactiveEnterTimestampMonotonic=7 ActiveState=inactive"
TARGET_UP = "ActiveState=active InactiveEnterTimestampMonotonic=7"
TARGET_NEVER = "ActiveState=inactive InactiveEnterTimestampMonotonic=0"


@pytest.mark.parametrize(("target", "starts"), [(TARGET_STOPPED, 0), (TARGET_UP, 1), (TARGET_NEVER, 1)])
def test_an_upgrade_starts_no_worker_while_their_target_is_stopped(
    rolling: Rolling, target: str, starts: int
) -> None:
    """A worker that had failed is started by the next good version, unless all are to stay stopped."""
    changed, _ = rolling.run("new version", failed=WORKER_2, target=target)
    assert changed.count(f"start {WORKER_2}") == starts


#: Stands for systemctl in the package's scripts.
SAYING = """#!/bin/sh
echo "systemctl $*" >>"$CALLS"
case "$*" in
    *show*gpuinfer-workers.target*) printf '%s\\n' ${TARGET:-} ;;
    *show*Wants*) echo "${WANTS:-}" ;;
esac
"""


@pytest.mark.parametrize(
    ("persistence", "restarts"), [("aof_enabled:1", 1), ("aof_enabled:0", 0), ("NOAUTH", 1)]
)
def test_no_upgrade_restarts_a_redis_that_would_lose_its_queue(
    rolling: Rolling, persistence: str, restarts: int
) -> None:
    """One that runs without its append-only file is left as it is, with a warning."""
    (rolling.folder / "asked" / "redis-server").touch()
    changed, told = rolling.run("new redis-server", persistence=persistence)
    assert changed.count("try-restart gpuinfer-redis.service") == restarts
    assert ("<4>Redis runs with appendonly off" in told) is (restarts == 0)


class Dpkg:
    """Runs the maintainer scripts as dpkg does, with everything they touch in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.run_folder = folder, folder / "run"
        #: What systemctl prints, as variables of its stand-in.
        self.says: dict[str, str] = {}
        for name in ("bin", "run/systemd/system", "etc/gpuinfer"):
            (folder / name).mkdir(parents=True)
        for name in ("gpuinfer", "deb-systemd-invoke", "chgrp"):
            self._put(f"bin/{name}", '#!/bin/sh\necho "${0##*/} $*" >>"$CALLS"\n')
        self._put("bin/systemctl", SAYING)
        for name in ("preinst", "postinst"):
            text = maintainer_script(name)
            for path in ("/run/", "/etc/gpuinfer", "/usr/sbin/policy-rc.d"):
                text = re.sub(rf"(?<![\w.]){re.escape(path)}", f"{folder}{path}", text)
            self._put(name, text)

    def _put(self, name: str, text: str) -> None:
        (self.folder / name).write_text(text)
        (self.folder / name).chmod(0o755)

    def __call__(self, script: str, *words: str) -> list[str]:
        """Return what the script called."""
        calls = self.folder / "calls"
        calls.write_text("")
        environ = {"PATH": f"{self.folder / 'bin'}:/usr/bin:/bin", "CALLS": str(calls), **self.says}
        subprocess.run([self.folder / script, *words], env=environ, check=True, timeout=60)
        return calls.read_text().splitlines()


@pytest.mark.parametrize(
    ("target", "started"),
    [
        (TARGET_STOPPED, "gpuinfer-redis.service gpuinfer-watcher.service"),
        (TARGET_UP, "gpuinfer.target"),
        (TARGET_NEVER, "gpuinfer.target"),
    ],
)
def test_a_reconfiguration_keeps_all_workers_stopped(tmp_path: Path, target: str, started: str) -> None:
    """dpkg-reconfigure starts what is enabled, but no worker while their target is stopped by hand."""
    dpkg = Dpkg(tmp_path)
    wants = "gpuinfer-redis.service gpuinfer-workers.target gpuinfer-watcher.service"
    dpkg.says = {"WANTS": wants, "TARGET": target, "DEBCONF_RECONFIGURE": "1"}
    assert f"deb-systemd-invoke start {started}" in dpkg("postinst", "configure", "0.1")


def test_an_upgrade_is_rolled_out_while_an_earlier_one_is(tmp_path: Path) -> None:
    """What preinst notes is there for postinst, whatever gpuinfer-roll.service takes away in between."""
    dpkg, asked = Dpkg(tmp_path), tmp_path / "run" / "gpuinfer-upgrade"
    (tmp_path / "etc/gpuinfer/redis.conf").write_text("port 0\n")
    dpkg("postinst", "triggered", "/usr/lib/gpuinfer-torch")
    assert (asked / "wanted").read_text() == "new torch\n"
    dpkg("preinst", "upgrade", "0.1")
    shutil.rmtree(asked)
    assert "systemctl start --no-block gpuinfer-roll.service" in dpkg("postinst", "configure", "0.1")
    assert (asked / "wanted").read_text() == "new version\n"
    first = (asked / "redis").read_text()
    assert "redis.conf" in first
    (tmp_path / "etc/gpuinfer/redis.conf").write_text("port 1\n")
    dpkg("preinst", "upgrade", "0.2")
    dpkg("postinst", "configure", "0.2")
    assert (asked / "redis").read_text() == first, "what ran before both upgrades"
    assert (asked / "wanted").read_text() == "new version\nnew version\n"


def test_an_upgrade_that_came_to_nothing_leaves_no_note(tmp_path: Path) -> None:
    """The next installation starts what is enabled, and restarts nothing."""
    dpkg = Dpkg(tmp_path)
    dpkg("preinst", "upgrade", "0.1")
    dpkg("postinst", "abort-upgrade", "0.2")
    assert not (tmp_path / "run/gpuinfer-upgrade.before").exists()
    dpkg("preinst", "upgrade", "0.1")
    dpkg("preinst", "install")
    assert "deb-systemd-invoke start gpuinfer.target" in dpkg("postinst", "configure", "")


def test_new_torch_concerns_the_workers_alone(rolling: Rolling) -> None:
    changed, _ = rolling.run("new torch", active=WORKER_0)
    assert changed == [f"try-restart {WORKER_0}"]
