# SPDX-License-Identifier: Apache-2.0
"""Commands of an asyncio client on one connection. Those of one event loop turn share a packet.

redis-py takes a pooled connection, a lock and a timer per command, which costs several times the command
itself. This uses one redis-py connection (with its handshake); answers come in the order of the commands.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence
from typing import Any

import hiredis
import redis.asyncio
from redis.exceptions import (
    AuthenticationError,
    ConnectionError,
    InvalidResponse,
    NoScriptError,
    RedisError,
    TimeoutError,
)

from gpuinfer.errors import GpuinferError
from gpuinfer.queue.scripts import Name, bind

Argument = bytes | str | int
_READ_BYTES = 1 << 16
#: Seconds before commands are sent again after their connection was lost.
_AGAIN_S = 0.01
_NOTHING = object()


class _Command:
    """One unanswered command."""

    __slots__ = ("answer", "packed", "repeated")

    def __init__(self, packed: bytes, answer: asyncio.Future[Any]) -> None:
        self.packed = packed
        self.answer = answer
        #: True once it was sent a second time. Whether Redis ran it the first time is not known.
        self.repeated = False


class Pipe:
    """One connection with the settings of the client's pool. For one event loop."""

    def __init__(self, client: redis.asyncio.Redis, timeout_s: float) -> None:
        self._client = client
        self._timeout_s = timeout_s
        self._connection: Any = None
        self._reader: Any = None
        self._unsent: list[_Command] = []
        self._sent: deque[_Command] = deque()
        #: The task that writes and reads while commands are unanswered.
        self._task: asyncio.Task[None] | None = None
        self._due = False

    @property
    def busy(self) -> bool:
        """Whether any command is unanswered."""
        return bool(self._unsent or self._sent)

    def call(self, *command: Argument) -> asyncio.Future[Any]:
        """Send a command with the others of this turn; return a future of Redis's answer.

        The future may raise redis-py's errors and UnusableRedis. If the connection is lost, the command is
        sent once more.
        """
        loop = asyncio.get_running_loop()
        whole: tuple[Any, ...] = command
        entry = _Command(hiredis.pack_command(whole), loop.create_future())
        self._unsent.append(entry)
        if not self._due:
            self._due = True
            loop.call_soon(self._flush)
        return entry.answer

    def script(self, name: Name) -> Script:
        """Return one of the queue's scripts, to call through this pipe."""
        return Script(self, bind(self._client, name))

    async def aclose(self) -> None:
        """Close the connection; unanswered commands fail."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        self._fail(ConnectionError("the client was closed"))
        if self._connection is not None:
            await self._connection.disconnect()
            await self._client.connection_pool.release(self._connection)
            self._connection = None

    def _flush(self) -> None:
        self._due = False
        if self._connection is not None and self._connection.is_connected and self._reader is not None:
            self._write()
        if self._task is None or self._task.done():
            self._task = asyncio.get_running_loop().create_task(self._run(), name="commands")

    def _write(self) -> None:
        if self._unsent:
            commands, self._unsent = self._unsent, []
            self._sent.extend(commands)
            self._connection._writer.write(b"".join([command.packed for command in commands]))

    async def _run(self) -> None:
        try:
            while self._unsent or self._sent:
                try:
                    await self._connect()
                    self._write()
                    await self._read()
                except (RedisError, OSError, GpuinferError) as exc:
                    await self._lost(exc)
        except BaseException as exc:
            self._fail(exc if isinstance(exc, Exception) else ConnectionError("the client was closed"))
            raise

    async def _connect(self) -> None:
        if self._connection is None:
            pool: Any = self._client.connection_pool  # not annotated
            self._connection = await pool.get_connection()
            self._reader = None
        elif not self._connection.is_connected:
            await self._connection.connect()
        if self._reader is None:
            self._reader = hiredis.Reader(
                protocolError=InvalidResponse,
                replyError=self._connection._parser.parse_error,
                notEnoughData=_NOTHING,
            )

    async def _read(self) -> None:
        try:
            async with asyncio.timeout(self._timeout_s):
                data = await self._connection._reader.read(_READ_BYTES)
        except OSError as exc:
            if isinstance(exc, asyncio.TimeoutError):
                raise TimeoutError("Timeout reading from socket") from None
            raise
        if not data:
            raise ConnectionError("Connection closed by server.")
        self._reader.feed(data)
        while self._sent and (answer := self._reader.gets()) is not _NOTHING:
            if isinstance(answer, hiredis.PushNotification):
                continue
            future = self._sent.popleft().answer
            if future.done():  # the caller was cancelled
                continue
            if isinstance(answer, Exception):
                future.set_exception(answer)
            else:
                future.set_result(answer)

    async def _lost(self, exc: Exception) -> None:
        """Drop the connection; resend commands that were sent once, fail the others."""
        self._reader = None
        if self._connection is not None:
            await self._connection.disconnect(nowait=True)
        commands = [*self._sent, *self._unsent]
        self._sent.clear()
        hopeless = isinstance(exc, GpuinferError | AuthenticationError)
        self._unsent = [one for one in commands if not (hopeless or one.repeated or one.answer.done())]
        for command in commands:
            if (hopeless or command.repeated) and not command.answer.done():
                command.answer.set_exception(exc)
            command.repeated = True
        if self._unsent:
            await asyncio.sleep(_AGAIN_S)

    def _fail(self, exc: Exception) -> None:
        for command in (*self._sent, *self._unsent):
            if not command.answer.done():
                command.answer.set_exception(exc)
        self._sent.clear()
        self._unsent = []


class Script:
    """One of the queue's Lua scripts."""

    def __init__(self, pipe: Pipe, script: Any) -> None:
        self._pipe = pipe
        self._script = script

    async def __call__(self, keys: Sequence[str], args: Sequence[Argument]) -> Any:
        """Run it; load it again if Redis has lost it. Raises redis-py's errors."""
        command = ("EVALSHA", self._script.sha, len(keys), *keys, *args)
        try:
            return await self._pipe.call(*command)
        except NoScriptError:
            await self._pipe.call("SCRIPT", "LOAD", self._script.script)
            return await self._pipe.call(*command)
