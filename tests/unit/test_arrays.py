# SPDX-License-Identifier: Apache-2.0
"""Arrays on their way: whatever a caller's array is, the worker's is its equal."""

from __future__ import annotations

from typing import Any

import numpy as np
import orjson
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from gpuinfer.errors import InputError, PayloadTooLarge
from gpuinfer.models.files import bytes_of, is_file, name_of
from gpuinfer.models.manifest import Manifest
from gpuinfer.models.tensors import decode as to_tensors
from gpuinfer.queue import arrays
from gpuinfer.queue.bodies import check_values
from gpuinfer.queue.message import BATCH_PREDICT, PREDICT, Undecodable, decode
from gpuinfer.queue.submission import Submission

pytestmark = pytest.mark.unit

IMAGE = np.arange(2 * 3 * 4, dtype=np.float32).reshape(2, 3, 4)
#: What callers have in their hands, and the array that it stands for.
ARRAYS: list[tuple[Any, Any]] = [
    (IMAGE.transpose(2, 0, 1), IMAGE.transpose(2, 0, 1)),
    (IMAGE[:, ::-1], IMAGE[:, ::-1]),
    (IMAGE[..., 0], IMAGE[..., 0]),
    (np.asfortranarray(IMAGE), IMAGE),
    (IMAGE.astype(">f4"), IMAGE),
    (np.array(3.0), np.array(3.0)),
    (np.float32(3), np.array(3, np.float32)),
    (np.array([1.5], np.longdouble), np.array([1.5])),
    (np.array([True, False]), np.array([True, False])),
    (np.broadcast_to(np.float32(7), (2, 2)), np.full((2, 2), 7, np.float32)),
    (torch.arange(6.0).reshape(2, 3).T, np.arange(6, dtype=np.float32).reshape(2, 3).T),
    (torch.ones(2, requires_grad=True), np.ones(2, np.float32)),
    (torch.tensor([1.5, 2.0], dtype=torch.bfloat16), np.array([1.5, 2.0], np.float32)),
    ([IMAGE[0], IMAGE[1]], IMAGE),
    ((torch.zeros(2), torch.ones(2)), np.array([[0, 0], [1, 1]], np.float32)),
]


def manifest(shape: list[int], dtype: str = "float64") -> Manifest:
    named = {"name": "x", "shape": shape, "dtype": dtype, "allow_nan": True}
    return Manifest.model_validate(
        {"name": "m", "artefact": "m.pt", "inputs": [named], "outputs": [{"name": "y"}]}
    )


def both_ways(inputs: Any, task: str = PREDICT) -> list[Any]:
    """Return what a worker reads, from the message and from beside it."""
    made = Submission(task=task, inputs=inputs, queue="realtime")
    inside = made.pack(10**9)
    assert inside.beside is None
    beside = made.pack(0)
    assert beside.beside is not None
    head = decode(beside.payload)
    assert head.beside == len(beside.beside)
    (found,) = decode(inside.payload).body()[0]
    return [found, head.unpack(beside.beside, many=task == BATCH_PREDICT)]


def item(value: Any, like: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Return an input as the worker turns it into a tensor of the dtype it was sent as."""
    return to_tensors(manifest(list(like.shape), like.dtype.name), value)[0]


@pytest.mark.parametrize(
    ("sent", "meant"), ARRAYS, ids=[f"{type(one).__name__}{i}" for i, (one, _) in enumerate(ARRAYS)]
)
def test_any_array(sent: Any, meant: np.ndarray[Any, Any]) -> None:
    """Strides, byte order and library are nobody's business; no array travels as a list of numbers."""
    inside, beside = both_ways(sent)
    assert inside.keys() == {"b64", "dtype", "shape"}
    assert isinstance(beside, np.ndarray)
    for found in (inside, beside):
        np.testing.assert_array_equal(item(found, meant), meant)


@given(hnp.arrays(st.sampled_from(sorted(arrays.DTYPES)), hnp.array_shapes(min_dims=0, min_side=0)))
@settings(deadline=None)
def test_bytes_come_back_bit_by_bit(array: np.ndarray[Any, Any]) -> None:
    """Every dtype that is sent as bytes, NaN and all."""
    _, beside = both_ways(array)
    assert (beside.dtype, beside.shape, beside.tobytes()) == (array.dtype, array.shape, array.tobytes())


def test_inputs_by_name_and_among_json() -> None:
    """Arrays stand where the caller put them, beside numbers, text and NaN."""
    sent = {"image": IMAGE, "sizes": [1, 2], "text": "ä", "scale": float("nan")}
    inside, beside = both_ways(sent)
    assert np.array_equal(beside.pop("image"), IMAGE)
    assert inside.pop("image")["shape"] == [2, 3, 4]
    for found in (inside, beside):
        assert np.isnan(found.pop("scale"))
        assert found == {"sizes": [1, 2], "text": "ä"}


@pytest.mark.parametrize(
    "batch", [IMAGE, list(IMAGE), tuple(IMAGE), torch.from_numpy(IMAGE), [IMAGE[0], IMAGE[1].tolist()]]
)
def test_a_batch_of_arrays(batch: Any) -> None:
    """An array of inputs, or a list or tuple of arrays, is a list of inputs for the worker."""
    for found in both_ways(batch, BATCH_PREDICT):
        assert isinstance(found, list)
        assert [item(one, IMAGE[0]).tolist() for one in found] == IMAGE.tolist()


def test_a_batch_of_numbers() -> None:
    """The items of an array of one dimension are arrays of none."""
    for found in both_ways(np.arange(3), BATCH_PREDICT):
        assert [item(one, np.array(0)).shape for one in found] == [(), (), ()]


@pytest.mark.parametrize("batch", [np.array(3.0), {"x": IMAGE}, "text", 5])
def test_no_batch(batch: Any) -> None:
    """What holds no list of inputs is none."""
    with pytest.raises(InputError, match="list or an array of inputs"):
        Submission(task=BATCH_PREDICT, inputs=batch, queue="batch").pack()


def test_other_arrays_are_json_or_refused() -> None:
    """Text and ragged lists of arrays are JSON; complex numbers are nothing that can be sent."""
    assert both_ways(np.array(["a"])) == [["a"], ["a"]]
    assert both_ways([np.zeros(1), np.zeros(2)]) == [[[0.0], [0.0, 0.0]]] * 2
    for sent in (np.array([1j]), torch.zeros(2).to_sparse(), object()):
        with pytest.raises(InputError) as caught:
            Submission(task=PREDICT, inputs=sent, queue="realtime").pack()
        assert caught.value.field == "inputs"


def test_what_is_large_lies_beside() -> None:
    """Over 64 KiB, an array or not: the message says how much, and no more than the options."""
    for sent in (np.zeros(20_000, np.float32), [1.5] * 20_000, "x" * 70_000):
        packed = Submission(task=PREDICT, inputs=sent, queue="realtime", options={"top_k": 3}).pack()
        assert packed.beside is not None
        assert len(packed.payload) < 1000
        args, kwargs, _ = decode(packed.payload).body()
        assert (args, kwargs) == ([], {"top_k": 3})
    assert (
        Submission(task=PREDICT, inputs=np.zeros(10_000, np.float32), queue="realtime").pack().beside is None
    )


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\x00\x00\x00\x00",
        b"\x02\x00\x00\x00[]",
        b"\xff\xff\xff\xff{}",
        arrays.pack(b"0", [])[:-20],
        arrays.pack(b"0", [arrays.Placed((), arrays.Raw("float32", (9,), b"1234"))]),
        arrays.pack(b"0", [arrays.Placed((), arrays.Raw("object", (0,), b""))]),
        arrays.pack(b"0", [arrays.Placed(("x", 1), arrays.Raw("int8", (1,), b"1"))]),
        arrays.pack(b"0", [arrays.Placed((), arrays.Raw("int8", (-1,), b"1"))]),
    ],
)
def test_what_is_no_body_is_undecodable(body: bytes) -> None:
    """A worker that reads garbage says so, and goes on."""
    message = decode(Submission(task=PREDICT, inputs=[], queue="realtime").pack(0).payload)
    with pytest.raises(Undecodable, match="not one of gpuinfer") as caught:
        message.unpack(body, many=False)
    assert caught.value.task_id == message.id


def test_millions_of_values_are_no_json() -> None:
    """A long text is; this many empty objects would be a gigabyte once they are read."""
    check_values(b'"%b"' % (b"x" * 20_000_000))
    with pytest.raises(PayloadTooLarge, match="send an array"):
        check_values(b"[%b]" % (b"{}," * 2_000_000))


# -- files ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value",
    [
        b"\0\xff cat",
        bytearray(b"cat"),
        memoryview(b"a cat and a dog")[2:5],
        b"",
        {"b64": b"cat", "name": "cat.jpg"},
        {"image": {"b64": b"cat", "name": "cat.jpg"}, "x": IMAGE, "mask": b"\1\2", "text": "what?"},
    ],
)
def test_bytes_arrive_as_they_were(value: Any) -> None:
    """In base64 in the message, as bytes beside it, also in a job; their names stay with them."""
    for sent in (both_ways(value), [one[0] for one in both_ways([value], BATCH_PREDICT)]):
        for found in sent:
            names = value if isinstance(value, dict) and "b64" not in value else {"": value}
            for name, one in names.items():
                got = found[name] if name else found
                if isinstance(one, str | np.ndarray):
                    continue
                assert is_file(got)
                assert bytes(bytes_of(got, "x")) == bytes(one["b64"] if isinstance(one, dict) else one)
                assert name_of(got) == (one["name"] if isinstance(one, dict) else "")


def test_bytes_are_no_list_of_inputs() -> None:
    """A job of one file's bytes would be a job of numbers."""
    with pytest.raises(InputError, match="must be a list or an array of inputs, got bytes"):
        Submission(task=BATCH_PREDICT, inputs=b"cat", queue="batch").pack()


def test_a_length_that_is_not_there() -> None:
    """A body whose head says more bytes than it holds is refused."""
    body = arrays.pack(b"0", [arrays.Placed((), arrays.Raw(arrays.BYTES, (), b"cat"))])
    longer = body.replace(b"[3]", b"[9" + b"9" * 8 + b"]")
    with pytest.raises((ValueError, TypeError)):
        arrays.unpack(longer, orjson.loads, many=False)
