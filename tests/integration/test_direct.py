# SPDX-License-Identifier: Apache-2.0
"""Connections used without redis-py's client: they are given back whole, and survive what a pool's do."""

from __future__ import annotations

import os
import threading

import pytest
import redis

from gpuinfer import Client
from gpuinfer.client.listener import KEPT, Listener
from gpuinfer.queue import keys
from gpuinfer.queue.connection import connect
from gpuinfer.queue.direct import Direct
from gpuinfer.settings import BrokerSettings
from tests.services import RedisServer

pytestmark = pytest.mark.integration


@pytest.fixture
def client(redis_server: RedisServer) -> redis.Redis:
    return connect(BrokerSettings(url=redis_server.url), retries=0)


@pytest.fixture
def direct(client: redis.Redis) -> Direct:
    return Direct(client)


def test_a_forgotten_script_is_loaded_again(direct: Direct, client: redis.Redis) -> None:
    """Redis forgets scripts when it restarts."""
    epoch = direct.bind("epoch")
    assert epoch(keys=["epoch"], args=[0, "me"]) == 1
    client.script_flush()
    assert epoch(keys=["epoch"], args=[0, "me"]) == 2


def test_a_closed_connection_is_opened_again(direct: Direct, client: redis.Redis) -> None:
    """A connection that Redis has closed meanwhile is noticed before a command is sent, without a retry."""
    ours = direct.call("CLIENT", "ID")
    client.client_kill_filter(_id=ours)
    assert direct.call("CLIENT", "ID") != ours


def test_a_refusal_leaves_the_connection_whole(direct: Direct) -> None:
    """An error that Redis answers is raised, and the next answer is the next command's."""
    ours = direct.call("CLIENT", "ID")
    with pytest.raises(redis.ResponseError):
        direct.call("INCR", "a", "b")
    assert direct.call("CLIENT", "ID") == ours


def test_a_late_answer_is_nobodys(direct: Direct, client: redis.Redis) -> None:
    """After an answer that did not come in time, the connection is not used again."""
    direct.call("PING")
    (kept,) = direct._idle
    connection = kept.connection
    connection._sock.settimeout(0.05)
    connection._parser._socket_timeout = 0.05
    with pytest.raises(redis.TimeoutError):
        direct.call("BLPOP", "nothing", 1)
    client.set("key", "value")
    assert direct.call("GET", "key") == b"value"


def test_threads_do_not_share_a_connection(direct: Direct) -> None:
    """Each answer goes to the thread whose command it is of."""
    wrong: list[object] = []

    def ask(word: bytes) -> None:
        for _ in range(300):
            answer = direct.call("ECHO", word)
            if answer != word:
                wrong.append(answer)

    threads = [threading.Thread(target=ask, args=(b"%d" % number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_fork_does_not_share_a_connection(direct: Direct, client: redis.Redis) -> None:
    """A child talks over a connection of its own, and leaves its parent's alone."""
    ours = direct.call("CLIENT", "ID")
    if not (child := os.fork()):
        client.set("child", direct.call("CLIENT", "ID"))
        os._exit(0)
    os.waitpid(child, 0)
    assert int(client.get("child") or ours) != ours
    assert direct.call("CLIENT", "ID") == ours


def test_what_has_ended_stays_subscribed_until_the_next_wait(client: redis.Redis) -> None:
    """A few channels that have had their message cost nothing; all others are left at once."""
    listener = Listener(client.connection_pool)
    names = [keys.result(str(number)) for number in range(KEPT + 1)]
    for channels, ended, left in ((names[:1], True, 1), (names[:2], False, 0), (names, True, 0)):
        listener.subscribe(channels)
        assert listener.next(60) == ("", None)
        assert sorted(client.pubsub_channels()) == sorted(name.encode() for name in channels)
        client.publish(channels[0], b"{}")
        assert listener.next(60) == (channels[0], b"{}")
        listener.leave(ended=ended)
        client.ping()
        assert listener.alive
        assert len(client.pubsub_channels()) <= left
    listener.close()


def test_a_silent_redis_is_asked(client: redis.Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    """Silence is told from a connection that is lost: Redis is asked, and its answer counts."""
    monkeypatch.setattr("gpuinfer.client.listener.ASK_AFTER_S", 0.0)
    listener = Listener(client.connection_pool)
    listener.subscribe(["channel"])
    assert listener.next(60) == ("", None)
    for _ in range(10):
        assert listener.next(0.1) is None
    client.client_pause(600_000)
    monkeypatch.setattr("gpuinfer.client.listener.LOST_AFTER_S", 0.3)
    with pytest.raises(redis.ConnectionError, match="silent"):
        while True:
            listener.next(0.1)
    listener.close()


def test_a_wait_goes_on_after_its_listener_was_cut_off(
    client: redis.Redis, redis_server: RedisServer
) -> None:
    """A kept subscription that Redis has closed is replaced before it is used."""
    with Client(redis_server.url) as submitter:
        for number in range(2):
            task_id = submitter.submit([1])
            client.set(keys.result(task_id), b'{"status": "SUCCESS", "result": %d}' % number)
            assert submitter.result(task_id, timeout_s=0) == number
            client.client_kill_filter(_type="pubsub")
