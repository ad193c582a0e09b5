# SPDX-License-Identifier: Apache-2.0
"""The Open Inference Protocol, spoken by Triton's own client, as it comes from PyPI."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import tritonclient.http as triton
import tritonclient.http.aio as triton_aio
from tritonclient.utils import InferenceServerException

from gpuinfer.models.repository import SHIPPED
from gpuinfer.models.shipped import load_test_images
from gpuinfer.queue import keys
from tests.apis import Api
from tests.models_for_tests import add_scalar, picky, python_model, unbatched, variable
from tests.services import RedisServer
from tests.workers import Workers

pytestmark = pytest.mark.integration

TALKER = """
class Model:
    def load(self, ctx):
        pass

    def predict(self, batch: list[str]):
        return [
            {
                "said": text.upper(),
                "length": len(text),
                "half": len(text) / 2,
                "words": text.split(),
                "all": {"n": [1]},
            }
            for text in batch
        ]
"""
#: What names the version of a shipped model.
VERSION = json.loads((SHIPPED / "digits" / "installed.json").read_text())["digest"][:19]
DATATYPES = {np.dtype("float32"): "FP32", np.dtype("uint8"): "UINT8", np.dtype("float64"): "FP64"}


def tensor(name: str, array: Any, datatype: str = "", *, binary: bool = True) -> triton.InferInput:
    array = np.asarray(array)
    found = triton.InferInput(name, array.shape, datatype or DATATYPES[array.dtype])
    return found.set_data_from_numpy(array, binary_data=binary)


def numbers(values: Any) -> Any:
    return np.array(values, np.float32)


def refused(status: str, words: str, *arguments: Any, call: Any, **more: Any) -> None:
    with pytest.raises(InferenceServerException) as caught:
        call(*arguments, **more)
    assert words in caught.value.message()
    assert caught.value.status() == status


def test_tritonclient(workers: Workers, api: Api, redis_server: RedisServer) -> None:
    """Health, metadata, repository, and infer: tensors, files and text, in bytes and in JSON, in batches."""
    folder = workers.folder / "models"
    for make in (add_scalar, picky, unbatched, variable):
        make(folder / make.__name__.replace("_", "-"))
    python_model(folder / "talker", TALKER)
    address = api.address.removeprefix("http://")
    with triton.InferenceServerClient(address) as client:
        assert client.is_server_live()
        assert not client.is_server_ready()
        workers.start(worker_models="digits,digits-photo,add-scalar,picky,unbatched,variable,talker")
        assert client.is_server_ready()
        _metadata(client)
        _repository(client)
        _tensors(client)
        _classes(client)
        _batches(client)
        _files_and_text(client)
        _errors(client)
        assert redis_server.client().hlen(keys.SIGNATURES) == 7
    asyncio.run(_asynchronous(address))


def _metadata(client: triton.InferenceServerClient) -> None:
    assert client.get_server_metadata()["name"] == "gpuinfer"
    assert client.get_model_metadata("digits", VERSION) == {
        "name": "digits",
        "versions": [VERSION],
        "platform": "gpuinfer",
        "inputs": [{"name": "image", "datatype": "FP32", "shape": [-1, 1, 8, 8]}],
        "outputs": [{"name": "digit", "datatype": "FP32", "shape": [-1, 10]}],
    }
    learned = client.get_model_metadata("unbatched")
    assert learned["inputs"][1] == {"name": "k", "datatype": "FP32", "shape": []}
    assert learned["outputs"] == [
        {"name": "product", "datatype": "FP32", "shape": [2, -1]},
        {"name": "sum", "datatype": "FP32", "shape": []},
    ]
    talker = client.get_model_metadata("talker")
    assert talker["inputs"] == [{"name": "input", "datatype": "BYTES", "shape": [-1]}]
    assert client.is_model_ready("digits", VERSION)
    assert not client.is_model_ready("digits", "2")
    assert not client.is_model_ready("nosuch")
    refused(
        "404",
        f"version '2' of model digits; they have {VERSION}",
        "digits",
        "2",
        call=client.get_model_metadata,
    )
    refused("404", "knows no model 'nosuch'", "nosuch", call=client.get_model_metadata)


def _repository(client: triton.InferenceServerClient) -> None:
    index = client.get_model_repository_index()
    assert {"name": "digits", "version": VERSION, "state": "READY", "reason": ""} in index
    client.load_model("digits")
    refused("501", "remove it from worker.models", "digits", call=client.unload_model)
    refused("404", "knows no model", "nosuch", call=client.load_model)


def _tensors(client: triton.InferenceServerClient) -> None:
    """Bytes and JSON give the same numbers; ids and datatypes are kept."""
    pixels, labels = load_test_images()
    for binary in (True, False):
        inputs = [tensor("image", pixels[:1].astype(np.float32), binary=binary)]
        outputs = [triton.InferRequestedOutput("digit", binary_data=binary)]
        answer = client.infer("digits", inputs, request_id="mine", outputs=outputs, model_version=VERSION)
        assert {
            "model_name": "digits",
            "model_version": VERSION,
            "id": "mine",
        }.items() <= answer.get_response().items()
        scores = answer.as_numpy("digit")
        assert (scores.shape, scores.dtype, scores.argmax()) == ((1, 10), np.float32, labels[0])
    packed = client.infer(
        "digits", inputs, request_compression_algorithm="gzip", response_compression_algorithm="deflate"
    )
    assert np.array_equal(packed.as_numpy("digit"), scores)
    answer = client.infer(
        "unbatched",
        [tensor("x", np.ones((2, 3), np.float32)), tensor("k", np.float32(2))],
        priority=1,
        timeout=60_000_000,
    )
    assert answer.as_numpy("product").tolist() == [[2.0] * 3] * 2
    assert answer.as_numpy("sum").tolist() == 6.0
    only = client.infer(
        "unbatched",
        [tensor("k", np.float32(2)), tensor("x", np.ones((2, 1), np.uint8))],
        outputs=[triton.InferRequestedOutput("sum")],
    )
    assert [one["name"] for one in only.get_response()["outputs"]] == ["sum"]
    bits = tensor("x", np.array([[1, 2]], ml_dtypes.bfloat16), "BF16")
    assert client.infer("variable", [bits]).as_numpy("twice").tolist() == [[2, 4]]


def _classes(client: triton.InferenceServerClient) -> None:
    """The classification extension: value, number and label of the best."""
    pixels, labels = load_test_images()
    wanted = [triton.InferRequestedOutput("digit", class_count=2)]
    answer = client.infer("digits", [tensor("image", pixels[:3].astype(np.float32))], outputs=wanted)
    best = answer.as_numpy("digit")
    assert best.shape == (3, 2)
    assert [row[0].decode().split(":")[1:] for row in best] == [[str(one), str(one)] for one in labels[:3]]
    wanted = [triton.InferRequestedOutput("sum", class_count=1)]
    adds = [tensor("x", numbers([[1, 9, 2, 3]])), tensor("k", numbers([0]))]
    assert client.infer("add-scalar", adds, outputs=wanted).as_numpy("sum").tolist() == [[b"9.000000:1"]]


def _batches(client: triton.InferenceServerClient) -> None:
    """Several items are one job, over 64 KiB beside the queue; one that fails fails the request."""
    pixels, labels = load_test_images()
    many = np.concatenate([pixels] * 2)[:300].astype(np.float32)
    assert many.nbytes > 64 * 1024
    scores = client.infer("digits", [tensor("image", many)]).as_numpy("digit")
    assert scores.shape == (300, 10)
    assert (scores.argmax(axis=1) == np.concatenate([labels] * 2)[:300]).mean() > 0.9
    for binary in (True, False):  # 400 KB: bytes behind the result's JSON, from the worker to the socket
        large = numbers(np.arange(100_000).reshape(1, -1) / 3)
        outputs = [triton.InferRequestedOutput("twice", binary_data=binary)]
        answer = client.infer("variable", [tensor("x", large)], outputs=outputs)
        assert np.array_equal(answer.as_numpy("twice"), 2 * large)
    sums = client.infer(
        "add-scalar", [tensor("x", np.ones((2, 4), np.float32)), tensor("k", numbers([1, 2]))]
    )
    assert sums.as_numpy("sum").tolist() == [[2.0] * 4, [3.0] * 4]
    refused("500", "item 1 of the batch: ", "picky", [tensor("x", numbers([[1], [-1]]))], call=client.infer)


def _files_and_text(client: triton.InferenceServerClient) -> None:
    """BYTES are a file's content or a text; what a Python model answers are outputs by its keys."""
    photo = np.array([(SHIPPED / "digits-photo" / "photo-7.jpg").read_bytes()], np.object_)
    assert client.infer("digits-photo", [tensor("photo", photo, "BYTES")]).as_numpy("digit").argmax() == 7
    texts = np.array([["two words"], ["a word"]], np.object_)
    answer = client.infer("talker", [tensor("input", texts, "BYTES")])
    assert answer.as_numpy("said").tolist() == [b"TWO WORDS", b"A WORD"]
    assert answer.as_numpy("length").tolist() == [9, 6]
    assert answer.as_numpy("length").dtype == np.int64
    assert answer.as_numpy("half").tolist() == [4.5, 3.0]
    assert answer.as_numpy("words").tolist() == [[b"two", b"words"], [b"a", b"word"]]
    assert [json.loads(one) for one in answer.as_numpy("all")] == [{"n": [1]}] * 2


def _errors(client: triton.InferenceServerClient) -> None:
    """Each with the protocol's body, its status, and what would be right."""
    image = np.zeros((1, 1, 8, 8), np.float32)
    infer = client.infer
    refused("404", "knows no model 'nosuch'", "nosuch", [tensor("image", image)], call=infer)
    refused("404", "has version '7'", "digits", [tensor("image", image)], "7", call=infer)
    refused("400", "the model's inputs are image", "digits", [tensor("picture", image)], call=infer)
    refused("400", "the model wants [-1, 1, 8, 8]", "digits", [tensor("image", image[0])], call=infer)
    refused("400", "the model wants BYTES", "talker", [tensor("input", image)], call=infer)
    text = np.array([b"x"], np.object_)
    refused(
        "400",
        "is BYTES, the model wants FP32",
        "add-scalar",
        [tensor("x", text, "BYTES"), tensor("k", numbers([1]))],
        call=infer,
    )
    wanted = [triton.InferRequestedOutput("cat")]
    refused(
        "400", "the model's outputs are digit", "digits", [tensor("image", image)], outputs=wanted, call=infer
    )
    refused("400", "sequences", "digits", [tensor("image", image)], sequence_id=5, call=infer)
    nan = np.full((1, 1, 8, 8), np.nan, np.float32)
    refused("400", "finite numbers only", "digits", [tensor("image", nan)], call=infer)
    refused("404", "there is no /v2/models/digits/stats", "digits", call=client.get_inference_statistics)


async def _asynchronous(address: str) -> None:
    pixels, labels = load_test_images()
    async with triton_aio.InferenceServerClient(address) as client:
        assert await client.is_server_ready()
        assert (await client.get_model_metadata("digits"))["versions"] == [VERSION]
        answers = await asyncio.gather(
            *(client.infer("digits", [tensor("image", one[None].astype(np.float32))]) for one in pixels[:20])
        )
        assert [answer.as_numpy("digit").argmax() for answer in answers] == labels[:20].tolist()
        with pytest.raises(InferenceServerException, match="knows no model"):
            await client.infer("nosuch", [tensor("image", pixels[:1].astype(np.float32))])
