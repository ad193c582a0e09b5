# SPDX-License-Identifier: Apache-2.0
"""The claim that an idle worker sends along with its wait.

BRPOP on the worker's wake-up list and the claim go to Redis in one packet: Redis runs the claim as soon as
the worker is woken, or the wait times out, which saves a round trip. No other claim is sent until its answer
is read.
"""

from __future__ import annotations

from typing import Any

from hiredis import pack_command
from kombu.transport import redis as stock
from redis.exceptions import ResponseError

from gpuinfer.queue.claims import Order
from gpuinfer.queue.store import Store

#: Seconds after the end of a wait at which its answer is given up: the connection may be dead.
OVERDUE_S = 0.5


class WaitingClaim:
    """A wait, with its claim, on the channel's connection; only one at a time."""

    def __init__(self) -> None:
        #: The outstanding claim: sent, but its answer is not read yet.
        self.order: Order | None = None
        self._sent_at = 0.0
        self._timeout_s = 0.0
        #: The socket of the wait, and its client id in Redis.
        self._known: tuple[Any, int | None] = (None, None)

    def send(self, connection: Any, names: list[str], timeout_s: float, order: Order | None) -> None:
        """Send a blocking wait on lists, followed by the claim."""
        commands: list[tuple[Any, ...]] = [("BRPOP", *names, timeout_s)]
        if order is not None:
            commands.append(order.command)
            self._learn_id(connection)
        self.order, self._sent_at, self._timeout_s = order, stock.monotonic(), timeout_s
        connection.send_packed_command([b"".join(map(pack_command, commands))])

    def _learn_id(self, connection: Any) -> None:
        """Ask Redis once for the id of this connection, by which its wait can be ended."""
        if self._known[0] is not connection._sock:
            connection.send_command("CLIENT", "ID")
            found = answer(connection)
            self._known = connection._sock, found if isinstance(found, int) else None

    def outstanding(self, store: Store) -> bool:
        """Tell whether there is an outstanding claim whose tasks will belong to this worker."""
        return self.order is not None and store.current(self.order)

    def overdue(self, connection: Any) -> bool:
        """Tell whether the answer is overdue, so the connection may be dead."""
        if not self._timeout_s or not connection:
            return False
        waited = stock.monotonic() - self._sent_at
        return waited > self._timeout_s + OVERDUE_S and not stock._socket_readable(connection._sock)

    def end(self, store: Store) -> bool:
        """End the wait, so that the claim runs now. False: Redis does not permit this, now or later."""
        sock, client_id = self._known
        if client_id is not None and store.end_wait(client_id):
            return True
        self._known = sock, None
        return False


def answer(connection: Any) -> Any:
    """Return the next answer on a connection, which may be an error."""
    try:
        return connection.read_response()
    except ResponseError as exc:
        return exc
