# SPDX-License-Identifier: Apache-2.0
"""The appliance at work, used as an administrator uses it: systemctl, curl, journalctl, gpuinfer."""

from __future__ import annotations

import json
import re

import pytest

from tests.host.admin import (
    API,
    TWO,
    actions,
    ended,
    journal,
    logged,
    predict,
    properties,
    result,
    start_worker,
)
from tests.host.container import Container

pytestmark = [pytest.mark.host, pytest.mark.timeout(900)]


@pytest.fixture(scope="module", autouse=True)
def workers(host: Container) -> None:
    """Workers 0 and 1, started by hand; the watcher is kept out of it."""
    host.ok("systemctl stop gpuinfer-watcher")
    start_worker(host, 0)
    start_worker(host, 1)


def test_start_means_that_it_serves(host: Container) -> None:
    """`systemctl start` comes back when the model is loaded and warm: a request is answered at once."""
    lines = actions(journal(host, "-u", "gpuinfer-worker@0"))
    assert lines.index("model_loaded") < lines.index("worker_ready")
    done = result(host, predict(host))
    assert (done["status"], done["result"]["label"]) == ("completed", "2")


def test_status_tells_model_device_count_and_queue(host: Container) -> None:
    """`systemctl status` says in one line what the worker serves, on what, how much, and what waits."""
    result(host, predict(host))
    shown = host.until("systemctl status --no-pager 'gpuinfer-worker@*' | grep 'Status: .* [1-9][0-9]* done'")
    assert re.search(r'"digits on cpu: [\d,]+ done, [\d,]+/s, [\d,]+ waiting"', shown), shown


def test_submit_from_the_command_line(host: Container) -> None:
    """Root's `gpuinfer submit` needs no password and no address."""
    said = json.loads(host.ok(f"gpuinfer submit --wait --json '{TWO}'"))
    answer = said[0] if isinstance(said, list) else said
    assert "2" in json.dumps(answer)


def test_the_journal_tells_one_tasks_story(host: Container) -> None:
    """journalctl TASK_ID=... shows the worker's batch; `gpuinfer logs` adds the result record."""
    task_id = predict(host)
    result(host, task_id)
    (batch,) = logged(host, f"TASK_ID={task_id}")
    assert batch["ACTION"] == "batch_done"
    assert re.fullmatch(r"gpuinfer-worker@[01]\.service", batch["_SYSTEMD_UNIT"])
    assert {"BATCH_SIZE", "DURATION_MS", "GPU", "WORKER", "MODEL", "QUEUE"} <= set(batch)
    assert batch["PRIORITY"] == "6"
    told = [json.loads(line) for line in host.ok(f"gpuinfer logs --task {task_id} --json").splitlines()]
    assert actions(told) == ["submitted", "began", "completed", "batch_done"]
    assert [int(entry["__REALTIME_TIMESTAMP"]) for entry in told] == sorted(
        int(entry["__REALTIME_TIMESTAMP"]) for entry in told
    )


def test_a_line_comes_once(host: Container) -> None:
    """Neither Celery nor uvicorn says again what we say."""
    task_id = predict(host)
    result(host, task_id)
    logged(host, f"TASK_ID={task_id}")
    entries = [entry for entry in journal(host, "-n", "200") if task_id in json.dumps(entry)]
    assert actions(entries) == ["batch_done"]


def test_warnings_show_just_trouble(host: Container) -> None:
    """`journalctl -u 'gpuinfer-*' -p warning` shows what must be mended, and no task."""
    good = predict(host)
    result(host, good)
    # A caller's mistake is the caller's: it is logged, and is no trouble of the host's.
    assert "422" in host.ok(f"curl -s -w '%{{http_code}}' -d '[[[0]]]' {API}/predict")
    bad = host.ok("gpuinfer celery call gpuinfer.predict --queue realtime -a '[[[[0]]]]'").split()[-1]
    assert result(host, bad)["status"] == "failed"
    assert logged(host, f"TASK_ID={bad}", "ACTION=task_failed")
    host.put("/etc/gpuinfer/worker@4.env", "GPUINFER_WORKER_MODELS=nowhere\n")
    assert host.sh("systemctl start gpuinfer-worker@4").code
    trouble = journal(host, "-u", "'gpuinfer-*'", "-p", "warning")
    assert "start_failed" in actions(trouble)
    assert not {good, bad} & {str(entry.get("TASK_ID")) for entry in trouble}
    host.ok("rm /etc/gpuinfer/worker@4.env; systemctl reset-failed gpuinfer-worker@4")


def test_redis_own_lines_have_levels(host: Container) -> None:
    """Each once: a start and a stop are no warnings, and why it does not start is an error."""
    host.ok("systemctl restart gpuinfer-redis")
    lines = journal(host, "-b", "-u", "gpuinfer-redis", "SYSLOG_IDENTIFIER=gpuinfer-redis")
    said = {str(line["MESSAGE"]): line["PRIORITY"] for line in lines}
    (ready,) = [text for text in said if "ready to accept connections" in text]
    assert said[ready] == "5"
    assert any("is now ready to exit" in text for text in said), "the last line of a stop"
    assert set(said.values()) <= {"5", "6"}, said
    host.ok("cp /etc/gpuinfer/redis.conf /root/; echo maxmemory nonsense >>/etc/gpuinfer/redis.conf")
    assert host.sh("systemctl restart gpuinfer-redis").code
    told = journal(host, "-b", "_SYSTEMD_UNIT=gpuinfer-redis.service", "-p", "err")
    assert any("maxmemory nonsense" in str(line["MESSAGE"]) for line in told)
    host.ok("cp /root/redis.conf /etc/gpuinfer/redis.conf; systemctl restart gpuinfer-redis")


def test_a_typo_elsewhere_does_not_take_redis_down(host: Container) -> None:
    """A wrong line under [watcher] is a warning of Redis's start, and no more."""
    host.ok(
        "cp /etc/gpuinfer/gpuinfer.toml /root/;"
        " sed -i 's/^\\[watcher\\]$/&\\nmood = 1/' /etc/gpuinfer/gpuinfer.toml"
    )
    host.ok("systemctl restart gpuinfer-redis && systemctl is-active gpuinfer-redis")
    told = journal(host, "-b", "_SYSTEMD_UNIT=gpuinfer-redis.service", "-p", "warning")
    assert any("unknown key watcher.mood" in str(line["MESSAGE"]) for line in told)
    host.ok("cp /root/gpuinfer.toml /etc/gpuinfer/ && gpuinfer config check")


def test_no_payload_and_no_password_is_logged(host: Container) -> None:
    """What users send and the passwords are nowhere in the journal."""
    result(host, predict(host, TWO.replace("15,13", "15,13.3125")))
    names = ",".join(f'"13.3125-{number}": 0' for number in range(500))
    refused = f"curl -s -w '%{{http_code}}' -d '{{\"inputs\": {{\"image\": {{{names}}}}}}}' {API}/predict"
    assert host.ok(refused).endswith("422")
    assert "13.3125" not in host.ok("journalctl --sync; journalctl --no-pager -o json --all | cat")
    host.ok(
        "for file in /etc/gpuinfer/credentials/*; do"
        " ! journalctl -o json --all | grep -qf $file || exit 1; done"
    )


def test_the_journal_is_kept(host: Container) -> None:
    """The journal lies on the disk; how large it grows is the host's own setting."""
    assert host.ok("ls /var/log/journal/*/system.journal")
    assert "gpuinfer" not in host.ok("systemd-analyze cat-config systemd/journald.conf")


def test_celery_and_its_tools_work(host: Container) -> None:
    """An administrator's `gpuinfer celery inspect` hears from every worker."""
    said = host.ok("gpuinfer celery inspect ping")
    assert "gpu0@gpuhost" in said
    assert "gpu1@gpuhost" in said


def test_a_gpu_of_its_own_queues(host: Container) -> None:
    """/etc/gpuinfer/worker@N.env gives one GPU its own queues."""
    host.put("/etc/gpuinfer/worker@1.env", "GPUINFER_WORKER_QUEUES=realtime\n")
    host.ok("systemctl restart gpuinfer-worker@1; systemctl stop gpuinfer-worker@0")
    ids = {
        queue: predict(host, f'{{"inputs": {TWO}, "queue": "{queue}"}}') for queue in ("realtime", "batch")
    }
    assert result(host, ids["realtime"])["status"] == "completed"
    assert result(host, ids["batch"], wait=1)["status"] == "queued"
    host.ok("rm /etc/gpuinfer/worker@1.env; systemctl restart gpuinfer-worker@1")
    assert result(host, ids["batch"])["status"] == "completed"
    start_worker(host, 0)


def test_the_wrong_settings_end_in_a_clear_failed_state(host: Container) -> None:
    """A setting that cannot be right is named in `systemctl status`, and is not tried again and again."""
    host.put("/etc/gpuinfer/worker@3.env", "GPUINFER_WORKER_DEVICE=cuda\n")
    assert host.sh("systemctl start gpuinfer-worker@3").code
    state = properties(host, "gpuinfer-worker@3", "ActiveState", "NRestarts", "ExecMainStatus")
    assert state == {"ActiveState": "failed", "NRestarts": "0", "ExecMainStatus": "69"}
    assert "this host has no usable GPU" in host.sh("systemctl status --no-pager gpuinfer-worker@3").output
    host.ok("rm /etc/gpuinfer/worker@3.env; systemctl reset-failed gpuinfer-worker@3")


def test_the_api_restarts_without_refusing_anybody(host: Container) -> None:
    """Requests that come while the API restarts are answered, every one."""
    said = host.ok(
        "for i in $(seq 1 200); do curl -s -o /dev/null -w '%{http_code}\\n' http://127.0.0.1:8080/health/live;"
        " [ $i != 50 ] || systemctl restart --no-block gpuinfer-api; sleep 0.02; done | sort | uniq -c",
        timeout=200,
    )
    assert said.split() == ["200", "200"], said


#: A network beside the host's own, a certificate, and a socket that is open to that network.
OPENED = """
set -e
ip netns add outside
ip link add out0 type veth peer name in0 netns outside
ip addr add 192.0.2.1/24 dev out0; ip link set out0 up
ip -n outside addr add 192.0.2.2/24 dev in0; ip -n outside link set in0 up
install -d -m 750 -g gpuinfer-api /etc/gpuinfer/tls
cp -p /etc/gpuinfer/gpuinfer.toml /root/closed.toml
sed -i -e 's|^#tls_cert = .*|tls_cert = "/etc/gpuinfer/tls/cert.pem"|' \
    -e 's|^#tls_key = .*|tls_key = "/etc/gpuinfer/tls/key.pem"|' /etc/gpuinfer/gpuinfer.toml
systemctl daemon-reload
systemctl stop gpuinfer-api.service
systemctl restart gpuinfer-api.socket
systemctl start gpuinfer-api.service
"""
CERTIFICATE = """
set -e
install -d -m 750 -g gpuinfer-api /etc/gpuinfer/tls
cd /etc/gpuinfer/tls
openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 30 -subj /CN=gpuhost \
    -addext subjectAltName=IP:192.0.2.1 -keyout /root/key.pem -out /root/cert.pem 2>/dev/null
install -m 640 -g gpuinfer-api /root/cert.pem /root/key.pem /etc/gpuinfer/tls
"""
OPEN_SOCKET = "/etc/systemd/system/gpuinfer-api.socket.d/open.conf"
CLOSED = f"""
rm -r {OPEN_SOCKET} /etc/gpuinfer/tls; mv /root/closed.toml /etc/gpuinfer/gpuinfer.toml; ip netns del outside
systemctl daemon-reload; systemctl stop gpuinfer-api.service
systemctl restart gpuinfer-api.socket; systemctl start gpuinfer-api.service
"""
OUTSIDE = "nsenter --net=/run/netns/outside curl -s --cacert /etc/gpuinfer/tls/cert.pem"
OPEN = "https://192.0.2.1:8443"


def test_a_key_over_the_network(host: Container) -> None:
    """Made, used with TLS from another network, revoked, refused; workers cannot even look at it."""
    host.put(OPEN_SOCKET, "[Socket]\nListenStream=192.0.2.1:8443\n")
    host.ok(CERTIFICATE)
    host.ok(OPENED)
    said = host.ok(f"{OUTSIDE} -w '%{{http_code}}' {OPEN}/queues")
    assert "gpuinfer key add NAME" in said
    assert said.endswith("401")
    assert "tls_required" in host.ok("curl -s http://127.0.0.1:8080/queues")
    token = host.ok("gpuinfer key add shop 2>/dev/null").strip()
    with_key = f"{OUTSIDE} -H 'Authorization: Bearer {token}'"
    host.until(f"{with_key} -f {OPEN}/queues")
    answer = json.loads(host.ok(f"{with_key} -d '{TWO}' '{OPEN}/predict?wait=60'"))
    assert (answer["status"], answer["result"]["class"]) == ("completed", 2)
    assert host.ok("curl -s -o /dev/null -w '%{http_code}' -k https://127.0.0.1:8080/queues") == "401"
    host.ok("curl -sf --unix-socket /run/gpuinfer/api.sock http://api/queues")
    _only_the_front_reads_keys(host)
    said = host.ok("gpuinfer doctor access work.api")
    assert f"listens at https://127.0.0.1:8080, https://{OPEN.removeprefix('https://')}, /run/" in said
    assert "without a key: the Unix socket; with a key: 1 key" in said
    host.ok(CERTIFICATE)
    host.until(f"{with_key} -f {OPEN}/queues", what="the new certificate")
    assert len(logged(host, "-b", "ACTION=certificate_renewed")) == 1
    host.ok("gpuinfer key revoke shop")
    host.until(f"{with_key} {OPEN}/queues | grep -q '\"unauthorized\"'", timeout=60)
    assert host.ok("ls -A /etc/gpuinfer/keys.d") == ""
    host.ok(CLOSED)
    host.ok("curl -sf http://127.0.0.1:8080/queues")


def _only_the_front_reads_keys(host: Container) -> None:
    assert host.ok("stat -c '%a %U %G' /etc/gpuinfer/keys.d/shop.toml").split() == [
        *("640", "root", "gpuinfer-api")
    ]
    for user, code in (("api", 0), ("worker", 1), ("watcher", 1), ("redis", 1)):
        run = f"setpriv --reuid gpuinfer-{user} --regid gpuinfer-{user} --init-groups"
        assert host.sh(f"{run} cat /etc/gpuinfer/keys.d/shop.toml").code == code, user
    for unit in ("gpuinfer-worker@0", "gpuinfer-redis"):
        pid = properties(host, unit, "MainPID")["MainPID"]
        assert host.ok(f"nsenter -t {pid} -m ls -A /etc/gpuinfer/keys.d") == "", unit


def test_the_target_stops_redis_last(host: Container) -> None:
    """`systemctl stop gpuinfer.target`: API, watcher and workers, which drain; Redis after all of them."""
    host.ok("systemctl stop gpuinfer.target")
    units = ("gpuinfer-api", "gpuinfer-worker@0", "gpuinfer-worker@1", "gpuinfer-redis")
    # Not "is-active", which a unit that still drains is not either.
    host.until(" && ".join(f"[ $(systemctl show -P ActiveState {unit}) = inactive ]" for unit in units))
    order = [unit.removesuffix(".service") for unit in ended(host)][-12:]
    place = {unit: len(order) - order[::-1].index(unit) for unit in units}
    assert max(place, key=place.__getitem__) == "gpuinfer-redis", order
    assert properties(host, "gpuinfer-worker@0", "Result")["Result"] == "success"
    host.ok("systemctl start gpuinfer.target")


#: Sends the given number of requests from eight threads, and fetches their results.
LOAD = """
import http.client, json, sys, threading
left, done = iter(range(int(sys.argv[2]) // 8)), []
def send():
    link = http.client.HTTPConnection("127.0.0.1", 8080)
    def ask(*request):
        link.request(*request)
        return json.loads(link.getresponse().read())
    for _ in left:
        ids = [ask("POST", "/predict", sys.argv[1])["task_id"] for _ in range(8)]
        for task_id in ids:
            while (said := ask("GET", "/result/" + task_id + "?wait=60")["status"]) in ("queued", "running"):
                pass
            assert said == "completed", said
            done.append(task_id)
threads = [threading.Thread(target=send) for _ in range(8)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
print(len(done))
"""
#: Prints the bytes that the journal's files hold: up to the last object of each, as their headers have it.
HELD = """
import glob, struct
files = [open(name, "rb").read(144) for name in glob.glob("/var/log/journal/*/system*.journal")]
print(sum(struct.unpack("<Q", head[136:144])[0] for head in files))
"""


def test_a_million_requests_take_60_mb_of_journal(host: Container) -> None:
    """At a high rate, by what some thousand took; no warning is among it.

    The first ones are named one by one, until the rate is known to be high; after them a second has some
    lines, whatever the number of its requests. So how long it takes hardly matters.
    """
    host.put("/root/load.py", LOAD)
    host.put("/root/held.py", HELD)
    held = "journalctl --sync; python3.11 /root/held.py"
    start_worker(host)
    result(host, predict(host))
    cursor = journal(host, "-n", "1")[-1]["__CURSOR"]
    before = int(host.ok(held))
    count = int(host.ok(f"python3.11 /root/load.py '{TWO}' 16000", timeout=600))
    taken = int(host.ok(held)) - before
    print(f"{count} requests took {taken} bytes of journal")
    assert count == 16_000
    assert taken / count * 1_000_000 <= 60_000_000, f"{taken} bytes for {count} requests"
    assert actions(journal(host, f"--after-cursor='{cursor}'", "-u", "'gpuinfer-*'", "-p", "warning")) == []
