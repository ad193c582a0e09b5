# SPDX-License-Identifier: Apache-2.0
"""A Python model in a real worker: who dies of it, who is told what, and what the log says."""

from __future__ import annotations

import json
from typing import Any

import pytest

from gpuinfer import Client
from gpuinfer.errors import DeadLettered, InferenceError, TimeLimitExceeded
from gpuinfer.worker.ceiling import EX_HARD_LIMIT
from tests.models_for_tests import python_model
from tests.services import Process
from tests.workers import Workers, wait_until

pytestmark = pytest.mark.faults

_CODE = """
    import logging
    import os
    import signal
    import time


    class Mine:
        example = 0

        def load(self, ctx):
            print("loaded on", ctx.device)

        def prepare(self, item: int):
            if item == 66:
                os.kill(os.getpid(), signal.SIGKILL)
            if item == 77:
                time.sleep(600)
            return item

        def predict(self, batch):
            if 13 in batch:
                logging.getLogger("unlucky").warning("about to fail")
                raise ValueError("thirteen")
            time.sleep(0.02)
            return [item + 1 for item in batch]

        def finish(self, out):
            return {"next": out}
"""


def run_until_all_end(workers: Workers, client: Client, tasks: list[str]) -> list[Process]:
    """Start a worker, and another one whenever it has died, until all tasks have ended."""
    ended: list[Process] = []

    def over() -> bool:
        return all(client.status(task).final for task in tasks)

    while not over():
        ended.append(workers.start(worker_models="mine", traced=False))
        worker = ended[-1]
        wait_until(lambda: not worker.running or over(), 60)  # noqa: B023  called here
    return [one for one in ended if not one.running]


def test_who_kills_its_worker_in_prepare_is_charged(workers: Workers, client: Client) -> None:
    """Beside a batch on the device and in one of its own: it alone is set aside, and all others succeed."""
    python_model(workers.folder / "models" / "mine", _CODE, "max_batch_size = 4\n")
    good = client.submit_many(list(range(1, 13)), model="mine")
    bomb = client.submit(66, model="mine")
    good += client.submit_many(list(range(20, 32)), model="mine")
    ended = run_until_all_end(workers, client, [*good, bomb])
    assert len(ended) == 2
    with pytest.raises(DeadLettered):
        client.result(bomb, timeout_s=60)
    wanted = [*range(1, 13), *range(20, 32)]
    answers = client.results(good, timeout_s=60)
    assert [answer["output"]["next"] - 1 for answer in answers] == wanted


def test_a_step_past_its_hard_limit_ends_its_task_alone(workers: Workers, client: Client) -> None:
    """Prepare that hangs in native code ends the process, once: the worker knows whose step it was."""
    limits = "max_batch_size = 4\nsoft_time_limit_s = 3.5\nhard_time_limit_s = 4.0\n"
    python_model(workers.folder / "models" / "mine", _CODE, limits)
    good = client.submit_many([1, 2, 3], model="mine")
    slow = client.submit(77, model="mine")
    good += client.submit_many([4, 5, 6], model="mine")
    ended = run_until_all_end(workers, client, [*good, slow])
    assert [one.returncode for one in ended] == [EX_HARD_LIMIT]
    with pytest.raises(TimeLimitExceeded):
        client.result(slow, timeout_s=60)
    assert len(client.results(good, timeout_s=60)) == 6


def test_its_words_are_in_the_log(workers: Workers, client: Client) -> None:
    """What it prints and logs has its name; an exception is told once, with its traceback and its task."""
    python_model(workers.folder / "models" / "mine", _CODE)
    worker = workers.start(worker_models="mine")
    tasks = client.submit_many([1, 13, 2], model="mine")
    answers = client.results(tasks, timeout_s=60, return_errors=True)
    assert isinstance(answers[1], InferenceError)
    assert "ValueError: thirteen (model.py, line 24)" in str(answers[1])
    assert [answers[0]["output"], answers[2]["output"]] == [{"next": 2}, {"next": 3}]
    worker.wait_for_line('"batch_done"')
    said: list[dict[str, Any]] = [json.loads(line) for line in worker.lines()]
    printed = [line for line in said if line.get("message") == "loaded on cpu"]
    assert [(line["model"], line["action"]) for line in printed] == [("mine", "model.mine")]
    alone = [line for line in said if line.get("message") == "about to fail" and "task_id" in line]
    assert [(line["model"], line["task_id"]) for line in alone] == [("mine", tasks[1])]
    (failed,) = [line for line in said if "thirteen" in line.get("exception", "")]
    assert (failed["action"], failed["model"], failed["task_id"]) == ("model_failed", "mine", tasks[1])
