# SPDX-License-Identifier: Apache-2.0
"""kombu's acknowledgements: claimed messages are settled, released or buried."""

from __future__ import annotations

from typing import Any

from kombu.transport import redis as stock
from kombu.transport.virtual import base as virtual

from gpuinfer.queue.claims import Final

#: Prefix of the delivery tags of claimed messages; the sequence id follows.
TAG = "gpuinfer-"


def seq_of(tag: object) -> int | None:
    """Return the sequence id in a delivery tag of ours; None for one of kombu's."""
    return int(tag.removeprefix(TAG)) if isinstance(tag, str) and tag.startswith(TAG) else None


class QoS(stock.QoS):  # type: ignore[misc]  # kombu is not annotated
    """Acknowledges claimed messages by settling them; there is no visibility timeout."""

    def can_consume(self) -> bool:
        """Tell whether to read from the connection. The answer to an outstanding claim is always read."""
        return self.channel._wait.order is not None or bool(super().can_consume())

    def append(self, message: Any, delivery_tag: Any) -> None:
        if seq_of(delivery_tag) is None:
            super().append(message, delivery_tag)
        else:
            virtual.QoS.append(self, message, delivery_tag)

    def ack(self, delivery_tag: Any) -> None:
        seq = seq_of(delivery_tag)
        if seq is None:
            super().ack(delivery_tag)
            return
        self.channel.store.settle([Final(seq, "", b"")])
        virtual.QoS.ack(self, delivery_tag)

    def reject(self, delivery_tag: Any, requeue: bool = False) -> None:
        seq = seq_of(delivery_tag)
        if seq is None:
            super().reject(delivery_tag, requeue=requeue)
            return
        if requeue:
            self.channel.store.release([seq])
        else:
            self.channel.bury(delivery_tag, seq)
        virtual.QoS.ack(self, delivery_tag)

    def restore_unacked(self, client: Any = None) -> None:
        """Put back what was delivered through kombu but not acknowledged, when the channel closes."""
        self._flush()
        seqs = [seq for tag in self._delivered if (seq := seq_of(tag)) is not None]
        if seqs:
            self.channel.store.release(seqs)
        for tag in [tag for tag in self._delivered if seq_of(tag) is not None]:
            del self._delivered[tag]
        super().restore_unacked(client)

    def restore_visible(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing: there is no visibility timeout."""
