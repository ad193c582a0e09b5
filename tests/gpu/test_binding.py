# SPDX-License-Identifier: Apache-2.0
"""Which GPU a worker gets, as CUDA itself sees it, for each form of CUDA_VISIBLE_DEVICES."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pytest

from gpuinfer.gpu_binding import VISIBLE
from gpuinfer.gpus import Gpu, list_gpus

pytestmark = pytest.mark.gpu

#: A number that no worker with a GPU of its own has.
NINE = 9_999
FIRST, CPU = "the first GPU", "the CPU"


@dataclass(frozen=True)
class Form:
    """A worker's number and the variable as its unit or its administrator sets it; what must come of it."""

    number: int
    #: None: not set. {uuid} and {short} stand for the first GPU's UUID and its beginning.
    variable: str | None
    #: FIRST, CPU, or words of the error.
    wanted: str
    #: Workers that share a GPU.
    per_gpu: int = 1

    @property
    def title(self) -> str:
        return "not set" if self.variable is None else repr(self.variable)


FORMS = (
    Form(0, None, FIRST),
    Form(0, "0", FIRST),
    Form(NINE, "0", FIRST),
    Form(NINE, "{uuid}", FIRST),
    Form(NINE, "{short}", FIRST),
    Form(1, "0,{uuid}", FIRST),
    Form(1, None, FIRST, per_gpu=2),
    Form(1, "1", FIRST, per_gpu=2),
    Form(0, "-1", CPU),
    Form(0, "none", CPU),
    Form(0, "NoDevFiles", CPU),
    Form(0, "", CPU),
    Form(1, "0,-1", "'-1' names no device"),
    Form(NINE, "GPU-ffffffff", "this host has no GPU GPU-ffffffff"),
    Form(NINE, "99", "this host has no GPU 99"),
)


@pytest.fixture(scope="module")
def answers() -> dict[Form, dict[str, str]]:
    """Bind in all forms, side by side: importing torch takes most of the time."""
    gpu = list_gpus().gpus[0]
    with ThreadPoolExecutor(min(len(FORMS), os.cpu_count() or 1)) as pool:
        return dict(zip(FORMS, pool.map(lambda form: bind(form, gpu), FORMS), strict=True))


def bind(form: Form, gpu: Gpu) -> dict[str, str]:
    """Bind in a process of its own and return what that has printed."""
    environ = {key: value for key, value in os.environ.items() if key != VISIBLE}
    if form.variable is not None:
        environ[VISIBLE] = form.variable.format(uuid=gpu.uuid, short=gpu.uuid[:12])
    command = [sys.executable, "-m", "tests.gpu.bound", str(form.number), str(form.per_gpu)]
    done = subprocess.run(command, env=environ, check=False, capture_output=True, text=True, timeout=50)
    assert done.returncode == 0, done.stderr[-2000:]
    answer: dict[str, str] = json.loads(done.stdout.splitlines()[-1])
    return answer


def of(wanted: str) -> Iterator[Form]:
    yield from (form for form in FORMS if form.wanted == wanted)


def test_index_and_uuid_are_one_gpu(answers: dict[Form, dict[str, str]], gpu: Gpu) -> None:
    """By index, UUID, its beginning, or its place in a list, CUDA has NVML's first GPU as cuda:0."""
    for form in of(FIRST):
        assert answers[form] == {"device": "cuda:0", "uuid": gpu.uuid, "error": ""}, form.title


def test_a_variable_that_hides_all_is_the_cpu(answers: dict[Form, dict[str, str]]) -> None:
    """Where the variable hides every GPU the worker is on the CPU, and CUDA has none."""
    for form in of(CPU):
        assert answers[form] == {"device": "cpu", "uuid": "", "error": ""}, form.title


def test_what_is_not_there_is_refused(answers: dict[Form, dict[str, str]]) -> None:
    """A GPU that is not there is refused with words, and never replaced by the CPU."""
    for form in FORMS:
        if form.wanted not in (FIRST, CPU):
            assert form.wanted in answers[form]["error"], (form.title, answers[form])
