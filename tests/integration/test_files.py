# SPDX-License-Identifier: Apache-2.0
"""Files from a caller's folder to the model, by every way in: client, command line, raw body, form."""

from __future__ import annotations

import base64
import gzip
import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gpuinfer import Client
from gpuinfer.errors import InputError, ShapeMismatch
from gpuinfer.models.repository import SHIPPED
from gpuinfer.models.shipped import load_test_images
from gpuinfer.queue import keys
from tests.apis import Api
from tests.services import RedisServer
from tests.workers import Workers

pytestmark = pytest.mark.integration


def picture(number: int, size: int = 8, kind: str = "PNG") -> bytes:
    """Return a digit of the test set as an image file: bright strokes on a dark ground."""
    pixels = np.round(load_test_images()[0][number, 0] * 255 / 16).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).resize((size, size), Image.Resampling.NEAREST).save(buffer, kind)
    return buffer.getvalue()


def test_a_file_by_every_way_in(
    workers: Workers, api: Api, client: Client, redis_server: RedisServer, tmp_path: Path
) -> None:
    """A small one in the message, a large one beside the queue; a hostile one takes no neighbour along.

    What the model cannot take is refused by the front and by the client, before it is queued.
    """
    labels = load_test_images()[1].tolist()
    small, large = tmp_path / "two.png", tmp_path / "large.bmp"
    small.write_bytes(picture(0))
    large.write_bytes(picture(1, 400, "BMP"))
    assert large.stat().st_size > 2 * 64 * 1024
    workers.start(worker_models="digits,digits-photo")

    ids = [client.submit(small), client.submit(large), client.submit(small.read_bytes())]
    upload = api.http.post(
        "/predict?priority=3", content=large.read_bytes(), headers={"content-type": "image/bmp"}
    )
    form = api.http.post(
        "/predict", files={"file": ("two.png", small.read_bytes())}, data={"model": "digits"}
    )
    named = api.http.post("/predict", files={"image": ("large.bmp", large.read_bytes())})
    for response in (upload, form, named):
        assert response.status_code == 202, response.text
        ids.append(response.json()["task_id"])
    found = [result["class"] for result in client.results(ids, timeout_s=60)]
    assert found == [labels[0], labels[1], labels[0], labels[1], labels[0], labels[1]]

    two = np.ascontiguousarray(load_test_images()[0][0], "<f4")
    saved = io.BytesIO()
    np.save(saved, two)
    as_json = json.dumps(two.tolist()).encode()
    binary = {"content-type": "application/octet-stream"}
    place = "/models/digits/predict?wait=60"
    for answered in (
        api.http.put(place, content=small.read_bytes(), headers={"content-type": "image/png"}),  # curl -T
        api.http.post(place, content=saved.getvalue(), headers=binary),
        api.http.post(place, json={"b64": base64.b64encode(saved.getvalue()).decode()}),
        api.http.post(place, content=gzip.compress(as_json), headers={"content-encoding": "gzip"}),
        api.http.post(
            place, content=gzip.compress(saved.getvalue()), headers=binary | {"content-encoding": "gzip"}
        ),
    ):
        assert answered.status_code == 200, answered.text
        assert answered.json()["result"]["class"] == labels[0]
    packed_bomb = gzip.compress(bytes(64 * 1024 * 1024))
    for refused, status in (
        (api.http.post(place, content=packed_bomb, headers={"content-encoding": "gzip"}), 413),
        (api.http.post(place, content=b"[]", headers={"content-encoding": "br"}), 415),
        (api.http.post("/models/nosuch/predict", content=saved.getvalue(), headers=binary), 404),
        (api.http.post("/models/digits/predict", content=b"\x93NUMPY and no more", headers=binary), 422),
    ):
        assert refused.status_code == status, refused.text

    waiting = redis_server.client().hget(keys.SIGNATURES, "digits")
    assert waiting is not None, "the worker has said what its model takes"
    for refused, code in (
        (api.http.post("/predict", json=[1, 2, 3]), "shape_mismatch"),
        (api.http.post("/predict", json=[[["x"] * 8] * 8]), "dtype_mismatch"),
        (api.http.post("/predict", files={"image": ("a.png", b"x"), "voice": ("a.wav", b"y")}), "bad_input"),
    ):
        assert refused.status_code == 422, refused.text
        assert refused.json()["error"]["code"] == code
    with pytest.raises(ShapeMismatch):
        client.submit(np.zeros((8, 8)))

    command = [sys.executable, "-m", "gpuinfer", "submit", "--wait", "--json"]
    done = subprocess.run(
        [*command, str(small), str(large)],
        env=workers.environment(),
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert [one["result"]["class"] for one in json.loads(done.stdout)] == labels[:2]

    photo = SHIPPED / "digits-photo" / "photo-7.jpg"
    form = api.http.post(
        "/predict", files={"photo": ("seven.jpg", photo.read_bytes())}, data={"model": "digits-photo"}
    )
    assert form.status_code == 202, form.text
    for task_id in (client.submit(photo, model="digits-photo"), form.json()["task_id"]):
        assert client.result(task_id, timeout_s=60)["label"] == "7"
    refused = api.http.post("/predict", json={"inputs": [1, 2], "model": "digits-photo"})
    assert (refused.status_code, refused.json()["error"]["code"]) == (422, "bad_input")

    bomb = io.BytesIO()
    Image.new("1", (12000, 12000)).save(bomb, "PNG")
    job = client.submit_batch([small, bomb.getvalue(), small.read_bytes()[:-30], large])
    first, *bad, last = client.result(job, timeout_s=60)
    assert (first["class"], last["class"]) == (labels[0], labels[1])
    assert [one["error"]["code"] for one in bad] == [InputError.code] * 2
    assert "12000 x 12000 pixels" in bad[0]["error"]["message"]
