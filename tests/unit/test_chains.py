# SPDX-License-Identifier: Apache-2.0
"""What a stranger's message says of what is to follow it never hurts the worker that ends it."""

from __future__ import annotations

from typing import Any

import orjson
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gpuinfer.errors import TaskFailed
from gpuinfer.queue.chains import Chains
from gpuinfer.queue.claims import Follow
from gpuinfer.queue.message import Envelope
from gpuinfer.settings import QueueSettings

pytestmark = pytest.mark.unit

CHAINS = Chains(QueueSettings(chain_queues=("shop",)), "gpu0@here")
ODD = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(),
        st.floats(),
        st.text(),
        st.sampled_from(["celery", "realtime", "\ud800", "realtime.\ud800", "realtime\x06\x16x", "a/b"]),
    ),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(), inner, max_size=3)),
    max_leaves=5,
)
NAMES = st.sampled_from(["shop.store", "gpuinfer.predict", "celery.group", "celery.chain", "celery.chord"])
FIELDS = (
    *("task_id", "queue", "routing_key", "exchange", "priority", "link", "link_error", "chain", "group_id"),
    *("eta", "countdown", "expires", "time_limit", "headers", "stamped_headers", "retries"),
)
OPTIONS = st.dictionaries(st.sampled_from(FIELDS), ODD, max_size=3)


def signatures(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    tasks = st.one_of(ODD, st.lists(inner, max_size=3))
    return st.fixed_dictionaries(
        {"task": st.one_of(NAMES, ODD)},
        optional={
            "args": ODD,
            "kwargs": st.one_of(ODD, st.fixed_dictionaries({"tasks": tasks}, optional={"body": inner})),
            "options": st.one_of(ODD, OPTIONS),
            "subtask_type": st.one_of(st.sampled_from(["group", "chain", "chord"]), ODD),
            "immutable": ODD,
        },
    )


SIGNATURES = st.one_of(ODD, st.recursive(signatures(ODD), signatures, max_leaves=4))
EMBEDS = st.dictionaries(
    st.sampled_from(["chain", "chord", "callbacks", "errbacks"]),
    st.lists(SIGNATURES, max_size=2) | SIGNATURES,
)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(embed=EMBEDS, failed=st.booleans())
def test_nothing_odd_hurts(embed: dict[str, Any], failed: bool) -> None:
    """Whatever stands there: what cannot be sent ends, and Redis can take what there is."""
    envelope = Envelope({}, {"root_id": "root"}, {}, "gpuinfer.predict", "parent", 0, 0)
    envelope.keep(embed)
    end = TaskFailed("broken") if failed else {"class": 1}
    for follow in CHAINS.after(envelope, end, "realtime@caller"):
        usable(follow)


def usable(follow: Follow) -> None:
    """See that every argument can be written, and goes where it may."""
    for part in follow.flat():
        if isinstance(part, str):
            part.encode()
        assert isinstance(part, str | bytes | int)
    if follow.list_key:
        message = orjson.loads(follow.message)
        assert message["headers"]["id"] == follow.id
        assert message["headers"]["parent_id"] == "parent"
        queue = follow.list_key.partition("\x06\x16")[0]
        assert follow.ours or queue in ("celery", "shop")
