# SPDX-License-Identifier: Apache-2.0
"""Names of lists: their coordinates can be read back, and are kombu's for the default model."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from kombu.transport.redis import Channel

from gpuinfer.names import MODEL_NAME
from gpuinfer.queue import keys
from gpuinfer.queue.keys import Place, list_key, place_of, queue_name
from gpuinfer.settings import QUEUES

pytestmark = pytest.mark.unit

PLACES = st.builds(
    Place,
    tier=st.sampled_from(QUEUES),
    model=st.just("") | st.from_regex(MODEL_NAME, fullmatch=True),
    caller=st.just("") | st.from_regex(r"[A-Za-z0-9._-]{1,20}", fullmatch=True),
    priority=st.sampled_from(keys.PRIORITIES),
)


@given(PLACES)
def test_coordinates_come_back(place: Place) -> None:
    """Whatever dots and dashes a model or a caller has."""
    key = list_key(queue_name(place.tier, place.model, place.caller), place.priority)
    assert place_of(key) == place
    assert keys.ours(key)
    assert keys.tier_of(key.partition(keys.SEP)[0]) == place.tier


@given(PLACES, PLACES)
def test_no_two_lists_share_a_name(one: Place, other: Place) -> None:
    """A list is its coordinates and nothing else."""
    names = {list_key(queue_name(p.tier, p.model, p.caller), p.priority) for p in (one, other)}
    assert len(names) == len({one, other})


def test_the_default_models_lists_are_kombus() -> None:
    """A plain Celery producer fills them."""
    kombu = Channel.__new__(Channel)
    kombu.priority_steps, kombu.sep = list(keys.PRIORITIES), keys.SEP
    assert keys.lists(["realtime"]) == [kombu._q_for_pri("realtime", n) for n in reversed(range(10))]


#: Names that look like a list of ours and are none.
STRANGE = (
    *("realtimes", "realtime.", "realtime.A", "realtime.a b", "realtime.-a", "realtime1", "realtime@"),
    *("realtime@a@b", "realtime.x\x06\x16zz", "realtime\x06\x1610", "realtime\x06", "realtime\x06\x16"),
    *("realtime\x16", "realtime.a\n", "x.realtime", ""),
)


@pytest.mark.parametrize("key", STRANGE)
def test_a_strange_name_is_not_ours(key: str) -> None:
    """Nor is there anything that reading it could raise."""
    assert not keys.ours(key)
    assert keys.tier_of(key) is None
    place_of(key)


def test_groups_are_what_workers_serve() -> None:
    """Workers that serve the same are of one group, in whatever order its models were named."""
    assert keys.group_of(QUEUES, ["a", "b"]) == keys.group_of(QUEUES, ["b", "a"])
    groups = {
        keys.group_of(tiers, models) for tiers in (["realtime"], QUEUES) for models in (["a"], ["a", "b"])
    }
    assert len(groups) == 4
