# SPDX-License-Identifier: Apache-2.0
"""JPEG files of 224 x 224 to a class by HTTP, 8 connections: gpuinfer beside LitServe, mosec and BentoML.

    python -m tests.bench.http.photos [--peers FOLDER] [--seconds 5] [--only NAME]

The same small network on each. gpuinfer and mosec take the file as the body, LitServe and BentoML in a form,
as their documentation does it. Prints a line for each: images a second, p50 and p99.
"""

from __future__ import annotations

import io
import tempfile
from pathlib import Path

import click
import numpy as np
from PIL import Image

from tests.bench.http.load import load
from tests.bench.http.servers import Ours, Peer, Served, make_environment
from tests.bench.photos import TABLES, network
from tests.models_for_tests import write_model

PEERS = ("litserve", "mosec", "bentoml")
CONNECTIONS = 8
_BOUNDARY = b"a5f1b2c3"


def photo() -> bytes:
    """Return a JPEG file of 224 x 224, of about 18 KB."""
    random = np.random.default_rng(1)
    coarse = Image.fromarray(random.integers(0, 256, (14, 14, 3), np.uint8))
    soft = np.asarray(coarse.resize((224, 224), Image.Resampling.BICUBIC), np.float32)
    noisy = (soft + random.normal(0, 9, soft.shape)).clip(0, 255).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noisy).save(buffer, "JPEG", quality=87)
    return buffer.getvalue()


def form(file: bytes) -> bytes:
    """Return a form with a file named photo."""
    head = b'content-disposition: form-data; name="photo"; filename="cat.jpg"\r\ncontent-type: image/jpeg\r\n'
    return b"--%b\r\n%b\r\n%b\r\n--%b--\r\n" % (_BOUNDARY, head, file, _BOUNDARY)


@click.command()
@click.option("--peers", type=click.Path(path_type=Path), help="Keep the peers' environments here.")
@click.option("--seconds", default=5, show_default=True)
@click.option("--only", type=click.Choice(["gpuinfer", *PEERS]), multiple=True)
def main(peers: Path | None, seconds: int, only: tuple[str, ...]) -> None:
    """Measure one after the other."""
    file = photo()
    click.echo(f"one file of {len(file)} bytes")
    with tempfile.TemporaryDirectory(prefix="gi-http-") as text:
        folder = Path(text)
        write_model(folder / "models" / "photos", network(), TABLES)
        for name in only or ("gpuinfer", *PEERS):
            body, content_type = file, "image/jpeg"
            if name in ("litserve", "bentoml"):
                body, content_type = form(file), f"multipart/form-data; boundary={_BOUNDARY.decode()}"
            if name == "gpuinfer":
                server: Served = Ours(folder, model="photos")
            else:
                python = make_environment(name, peers or folder / "peers")
                server = Peer(name, python, folder, model="photos", first=(body, content_type))
            with server:
                url = server.url(wait=True) or ""
                load(url, body, CONNECTIONS, 2, folder, content_type)
                found = load(url, body, CONNECTIONS, seconds, folder, content_type)
            times = f"{found.p50_us / 1000:.1f} ms | {found.p99_us / 1000:.1f} ms"
            click.echo(f"| {name} | {found.rate:,.0f}/s | {times} |")


if __name__ == "__main__":
    main()
