# SPDX-License-Identifier: Apache-2.0
"""The baseline: stock Celery on Redis, set up the way tutorials for model serving do.

Solo pool, late acknowledgement, prefetch 1, track_started, JSON, one ``predict`` a message, and the
model loaded once, when the worker starts. ``BENCH_REDIS`` is the server's socket, ``BENCH_MODEL`` the
TorchScript file, ``BENCH_TUNING`` a Tuning as JSON for the second baseline.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

from celery import Celery, signals

LABELS = "abcdefghij"
TOP_K = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class Tuning:
    """What somebody who knows Celery sets instead: less to write for each task, more taken at once."""

    pool: str
    prefetch: int
    #: Acknowledge when the task has ended. Early: whoever is killed loses what it held.
    late: bool

    @property
    def variables(self) -> dict[str, str]:
        """The environment that tells the worker."""
        return {"BENCH_TUNING": json.dumps(asdict(self))}

    def apply(self, app: Celery) -> None:
        """Set what the settings say, and leave out all that nobody reads."""
        app.conf.update(
            task_acks_late=self.late,
            worker_prefetch_multiplier=self.prefetch,
            task_track_started=False,
            worker_send_task_events=False,
            worker_disable_rate_limits=True,
            worker_enable_remote_control=True,  # that it is there is told by a ping
            worker_cancel_long_running_tasks_on_connection_loss=False,
            result_extended=False,
            task_store_errors_even_if_ignored=False,
        )

    def __str__(self) -> str:
        return f"{self.pool}, prefetch {self.prefetch}, {'late' if self.late else 'early'} ack"


def create_app(socket: str, tuning: Tuning | None = None) -> Celery:
    """Return a stock Celery application on the Redis behind a Unix socket."""
    url = f"redis+socket://{socket}?virtual_host=0"
    app = Celery("baseline", broker=url, backend=url, set_as_current=False)
    app.conf.update(
        task_acks_late=True,
        worker_prefetch_multiplier=1,
        worker_concurrency=1,
        task_track_started=True,
        task_serializer="json",
        result_serializer="json",
        accept_content=["json"],
        result_expires=3600,
        broker_connection_retry_on_startup=True,
    )
    if tuning is not None:
        tuning.apply(app)
    app.task(predict, name="predict")
    return app


@cache
def _model() -> Any:
    import torch

    torch.set_num_threads(1)
    model = torch.jit.load(os.environ["BENCH_MODEL"])  # type: ignore[no-untyped-call]  # torch left it out
    model.eval()
    with torch.inference_mode():
        for _ in range(3):
            model(torch.zeros(1, 64))
    return model


def predict(inputs: list[float]) -> dict[str, Any]:
    """Run one input of 64 floats. The result says what gpuinfer's says."""
    import torch

    with torch.inference_mode():
        scores = _model()(torch.tensor([inputs]))[0].softmax(0)
        confidence, best = scores.topk(TOP_K)
    ranked = [
        {"class": number, "label": LABELS[number], "confidence": round(value, 6)}
        for number, value in zip(best.tolist(), confidence.tolist(), strict=True)
    ]
    return {**ranked[0], "top_k": ranked, "model": "perceptron", "device": "cpu"}


@signals.worker_init.connect  # type: ignore[untyped-decorator]  # celery is not annotated
def _load(**_: object) -> None:
    _model()


def _tuning() -> Tuning | None:
    text = os.environ.get("BENCH_TUNING")
    return Tuning(**json.loads(text)) if text else None


app = create_app(os.environ.get("BENCH_REDIS", ""), _tuning())
