# SPDX-License-Identifier: Apache-2.0
"""GPUs: what is listed, and which device a worker gets, with a small NVML in place of hardware."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from gpuinfer.errors import DeviceError
from gpuinfer.gpu_binding import check_visible, spell, visible_device
from gpuinfer.gpus import Gpu, Inventory, MigInstance, list_gpus
from gpuinfer.gpus_cli import gpus as gpus_command
from gpuinfer.settings import Loaded, Settings, WorkerSettings
from tests.fake_nvml import GIB, FakeNvml

pytestmark = pytest.mark.unit

ROOT = Path(__file__).parents[2]


def host(nvml: FakeNvml, *explicit: str, nodes: tuple[str, ...] = (), hardware: bool = False) -> Inventory:
    return list_gpus(explicit, nvml=nvml, nodes=lambda: nodes, hardware=lambda: hardware)


def bind(number: int, found: Inventory, device: Any = "auto", **environ: str) -> Any:
    return visible_device(number, WorkerSettings(device=device), environ, inventory=found)


def test_gpus_are_listed_with_what_nvml_knows() -> None:
    """Index, UUID, name, PCI id and memory of each; NVML is closed afterwards."""
    nvml = FakeNvml(count=2)
    found = host(nvml)
    assert found.gpus[1] == Gpu(1, "GPU-00000001-0000", "NVIDIA L4", "00000000:01:00.0", 24 * GIB, GIB)
    assert (found.source, found.reason, found.driver, nvml.closed) == ("nvml", "", "580.1", 1)


def test_this_host_can_be_asked() -> None:
    """The real NVML, present or not, never raises."""
    found = list_gpus()
    assert found.gpus or found.reason


def test_memory_shared_with_the_cpu_is_no_failure() -> None:
    """A GPU that cannot report memory of its own is a GPU all the same."""
    found = host(FakeNvml(count=1, shared_memory=True))
    assert found.gpus[0].memory_bytes == 0


def test_worker_n_gets_gpu_n_by_uuid() -> None:
    """By UUID, since CUDA may count GPUs in another order."""
    binding = bind(2, host(FakeNvml(count=4)), "cuda")
    assert (binding.device, binding.cuda_visible_devices) == ("cuda:0", "GPU-00000002-0000")


def test_a_number_out_of_range_is_refused() -> None:
    """The message says what there is."""
    with pytest.raises(DeviceError, match=r"this host has no GPU 7; it has GPUs 0-3"):
        bind(7, host(FakeNvml(count=4)))


def test_a_lost_gpu_does_not_move_the_others() -> None:
    """GPU 1 fell off the bus: worker 1 fails with the driver's words, worker 2 keeps GPU 2."""
    found = host(FakeNvml(count=3, lost=frozenset({1})))
    assert bind(2, found).gpu.index == 2
    with pytest.raises(DeviceError, match="GPU 1 does not answer: GPU is lost"):
        bind(1, found)
    with pytest.raises(DeviceError, match="it has GPUs 0, 2"):
        bind(5, host(FakeNvml(count=3, lost=frozenset({1}))))


def test_cpu_hides_every_gpu() -> None:
    """device = "cpu" is the CPU even where GPUs are, and whatever the variable says."""
    binding = bind(0, host(FakeNvml(count=4)), "cpu", CUDA_VISIBLE_DEVICES="3")
    assert (binding.device, binding.cuda_visible_devices) == ("cpu", "")


@pytest.mark.parametrize(
    ("nvml", "nodes", "hardware"),
    [
        (FakeNvml(init=12), (), False),  # no NVIDIA software at all
        (FakeNvml(init=12), (), True),  # a card on another driver
        (FakeNvml(init=9), (), False),  # the library came with a package, no card
        (FakeNvml(count=0), (), False),
    ],
)
def test_auto_takes_the_cpu_where_there_is_no_gpu(
    nvml: FakeNvml, nodes: tuple[str, ...], hardware: bool
) -> None:
    """No driver and no GPU: that is what "auto" is for; "cuda" refuses it with NVML's words."""
    found = host(nvml, nodes=nodes, hardware=hardware)
    assert bind(0, found).device == "cpu"
    with pytest.raises(DeviceError, match="NVML"):
        bind(0, found, "cuda")


@pytest.mark.parametrize(
    ("nvml", "nodes", "hardware", "words"),
    [
        (FakeNvml(init=18), (), False, "version mismatch"),
        (FakeNvml(init=9), (), True, "Driver Not Loaded"),
        (FakeNvml(init=12), ("/dev/nvidia0",), False, "Library Not Found"),
        (FakeNvml(count=0), ("/dev/nvidia0",), False, "yet there is /dev/nvidia0"),
        (FakeNvml(count=1, lost=frozenset({0})), (), False, "GPU is lost"),
    ],
)
def test_a_gpu_that_fails_is_never_the_cpu(
    nvml: FakeNvml, nodes: tuple[str, ...], hardware: bool, words: str
) -> None:
    """A driver that is there and fails is an error, also under "auto"."""
    for device in ("auto", "cuda"):
        with pytest.raises(DeviceError, match=words):
            bind(0, host(nvml, nodes=nodes, hardware=hardware), device)


def test_the_settings_stand_in_for_nvml() -> None:
    """Where NVML is absent, worker N takes the Nth of worker.gpus, by UUID or index."""
    found = host(FakeNvml(init=12), "GPU-aa", "3")
    assert found.source == "settings"
    assert bind(0, found).cuda_visible_devices == "GPU-aa"
    assert bind(1, found).cuda_visible_devices == "3"
    with pytest.raises(DeviceError, match=r"worker 2 has no GPU: worker.gpus names 2"):
        bind(2, found)


def test_the_settings_choose_among_nvmls() -> None:
    """A list in the settings restricts and orders, and NVML fills in what it knows."""
    found = host(FakeNvml(count=4), "3", "GPU-00000001")
    assert [gpu.uuid for gpu in found.gpus] == ["GPU-00000003-0000", "GPU-00000001-0000"]
    assert found.worker_numbers == (0, 1)


def test_what_the_unit_has_set_is_kept() -> None:
    """CUDA_VISIBLE_DEVICES of the unit wins; the worker's number does not matter then."""
    binding = bind(9, host(FakeNvml(count=4)), CUDA_VISIBLE_DEVICES="2")
    assert (binding.device, binding.cuda_visible_devices, binding.gpu.index) == ("cuda:0", "2", 2)
    with pytest.raises(DeviceError, match="no usable GPU"):
        bind(0, host(FakeNvml(init=12)), CUDA_VISIBLE_DEVICES="2")


def test_the_units_own_number_says_nothing_new() -> None:
    """CUDA_VISIBLE_DEVICES=%i of the unit is as good as not set: bound by UUID, by list, or refused."""
    four = host(FakeNvml(count=4))
    assert bind(2, four, CUDA_VISIBLE_DEVICES="2").cuda_visible_devices == "GPU-00000002-0000"
    listed = host(FakeNvml(count=4), "3", "GPU-00000001")
    assert bind(0, listed, CUDA_VISIBLE_DEVICES="0").gpu.index == 3
    with pytest.raises(DeviceError, match=r"this host has no GPU 7; it has GPUs 0-3"):
        bind(7, four, CUDA_VISIBLE_DEVICES="7")


def test_the_units_own_number_leaves_the_cpu_to_a_host_without_gpus() -> None:
    """The same unit serves a host without any GPU; one that fails is still refused."""
    assert bind(0, host(FakeNvml(init=12)), CUDA_VISIBLE_DEVICES="0").device == "cpu"
    with pytest.raises(DeviceError, match="version mismatch"):
        bind(0, host(FakeNvml(init=18)), CUDA_VISIBLE_DEVICES="0")


def test_a_variable_that_hides_all_gpus() -> None:
    """-1 is how one asks for the CPU by variable; with device = "cuda" it is a contradiction."""
    found = host(FakeNvml(count=4))
    assert bind(0, found, CUDA_VISIBLE_DEVICES="-1").device == "cpu"
    with pytest.raises(DeviceError, match="hides every GPU"):
        bind(0, found, "cuda", CUDA_VISIBLE_DEVICES="-1")


def test_an_empty_variable_hides_all_gpus() -> None:
    """As CUDA has it; not set at all is another thing."""
    found = host(FakeNvml(count=4))
    assert bind(1, found, CUDA_VISIBLE_DEVICES="").cuda_visible_devices == ""
    assert bind(1, found, CUDA_VISIBLE_DEVICES=" ").device == "cpu"
    assert bind(1, found).device == "cuda:0"
    with pytest.raises(DeviceError, match="CUDA_VISIBLE_DEVICES= hides every GPU"):
        bind(1, found, "cuda", CUDA_VISIBLE_DEVICES="")


def test_of_a_list_worker_n_takes_the_nth() -> None:
    """Not all of them the first; a worker beyond the list has no GPU."""
    found = host(FakeNvml(count=4))
    listed = "3, GPU-00000001,0"
    taken = [bind(number, found, CUDA_VISIBLE_DEVICES=listed) for number in range(3)]
    assert [binding.gpu.index for binding in taken] == [3, 1, 0]
    assert [binding.cuda_visible_devices for binding in taken] == ["3", "GPU-00000001", "0"]
    with pytest.raises(DeviceError, match=r"worker 3 has no GPU: CUDA_VISIBLE_DEVICES=.* names 3, for"):
        bind(3, found, CUDA_VISIBLE_DEVICES=listed)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("7", "CUDA_VISIBLE_DEVICES=7: this host has no GPU 7; it has GPUs 0-3"),
        ("zero", "CUDA_VISIBLE_DEVICES=zero: 'zero' names no device"),
        ("0,-1", "CUDA_VISIBLE_DEVICES=0,-1: '-1' names no device"),
        ("0,", "CUDA_VISIBLE_DEVICES=0,: '' names no device"),
        ("gpu-00000001", "'gpu-00000001' names no device"),
        ("GPU-0000000", "GPU-0000000 names 4 GPUs: GPU-00000000-0000, "),
        ("MIG-0-1", "this host has no MIG instance MIG-0-1; it has GPU-"),
    ],
)
def test_what_names_no_device_is_refused_by_name(value: str, words: str) -> None:
    """CUDA would hide all from there on, and say nothing. Of a variable, and of the settings."""
    found = host(FakeNvml(count=4))
    with pytest.raises(DeviceError) as refused:
        bind(1 if "," in value else 9, found, CUDA_VISIBLE_DEVICES=value)
    assert words in str(refused.value)
    with pytest.raises(DeviceError) as refused:
        check_visible({"CUDA_VISIBLE_DEVICES": value}, inventory=found)
    assert words in str(refused.value)
    # In the settings an empty entry is none at all.
    last = value.split(",")[-1] or "x"
    with pytest.raises(DeviceError, match=r"worker\.gpus: "):
        bind(1, host(FakeNvml(count=4), "0", last))


@pytest.mark.parametrize("command", [["worker", "0"], ["model", "run", "digits", "--input", "two.json"]])
def test_it_is_refused_before_torch_is_imported(tmp_path: Path, command: list[str]) -> None:
    """Whoever loads a model: exit 69, with the name, after a moment."""
    (tmp_path / "two.json").write_text(json.dumps([[[0] * 8] * 8]))
    script = """
        import sys
        from gpuinfer import gpus
        from gpuinfer.cli import main
        from tests.fake_nvml import FakeNvml
        gpus._pynvml = lambda: FakeNvml(count=2)
        try:
            main(sys.argv[1:])
        finally:
            print("torch" in sys.modules)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), *command],
        cwd=tmp_path,
        env={
            **os.environ,
            "CUDA_VISIBLE_DEVICES": "zero",
            "PYTHONPATH": str(ROOT),
            "GPUINFER_LOG_FORMAT": "console",
            "GPUINFER_WORKER_RUN_DIR": str(tmp_path),
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout.strip()) == (69, "False"), done.stderr
    assert "CUDA_VISIBLE_DEVICES=zero: 'zero' names no device" in done.stderr


def test_a_gpu_that_the_settings_leave_out_is_there_all_the_same() -> None:
    """worker.gpus says which GPUs workers take by number; the variable may name another of the host's."""
    found = host(FakeNvml(count=4), "1")
    assert bind(0, found, CUDA_VISIBLE_DEVICES="3").gpu.index == 3
    with pytest.raises(DeviceError, match="this host has no GPU 4; it has GPUs 0-3"):
        bind(0, found, CUDA_VISIBLE_DEVICES="4")


def test_a_host_without_gpus_has_nothing_to_hide() -> None:
    """What is set for all hosts of a fleet does no harm where nothing can be meant."""
    check_visible({"CUDA_VISIBLE_DEVICES": "zero"}, inventory=host(FakeNvml(init=12)))
    check_visible({}, inventory=host(FakeNvml(count=1)))


def test_mig_instances_are_listed() -> None:
    """Each with its UUID, its profile and its memory; empty slots are left out."""
    found = host(FakeNvml(count=2, mig={1: ["1g.6gb", None, "2g.12gb"]}))
    assert not found.gpus[0].mig
    assert found.gpus[1].instances == (
        MigInstance("MIG-1-0", "1g.6gb", 24 * GIB, GIB),
        MigInstance("MIG-1-2", "2g.12gb", 24 * GIB, GIB),
    )


def test_a_worker_is_bound_to_a_mig_instance_by_its_unit() -> None:
    """CUDA_VISIBLE_DEVICES=MIG-... is kept, also one that NVML does not show to this user."""
    found = host(FakeNvml(count=1, mig={0: ["1g.6gb", "1g.6gb"]}))
    binding = bind(5, found, CUDA_VISIBLE_DEVICES="MIG-0-1")
    assert binding.cuda_visible_devices == "MIG-0-1"
    assert (binding.gpu.name, binding.gpu.index) == ("NVIDIA L4 MIG 1g.6gb", 0)
    assert bind(5, found, CUDA_VISIBLE_DEVICES="MIG-unseen").gpu is None


def test_a_worker_is_bound_to_a_mig_instance_by_the_list() -> None:
    """worker.gpus may name instances: worker N takes the Nth."""
    found = host(FakeNvml(count=1, mig={0: ["1g.6gb", "2g.12gb"]}), "MIG-0-1", "MIG-0-0")
    assert bind(0, found, CUDA_VISIBLE_DEVICES="0").cuda_visible_devices == "MIG-0-1"
    assert bind(1, found, CUDA_VISIBLE_DEVICES="1").gpu.name == "NVIDIA L4 MIG 1g.6gb"


def test_a_split_gpu_is_not_taken_in_part_without_a_word() -> None:
    """One instance is the whole GPU; of several one must be named; none at all is an error too."""
    assert bind(0, host(FakeNvml(count=1, mig={0: [None, "7g.24gb"]}))).cuda_visible_devices == "MIG-0-1"
    with pytest.raises(DeviceError, match=r"split into 2 MIG instances; name one, .*worker@0.env"):
        bind(0, host(FakeNvml(count=1, mig={0: ["1g.6gb", "1g.6gb"]})))
    with pytest.raises(DeviceError, match="MIG on and no instance"):
        bind(0, host(FakeNvml(count=1, mig={0: [None]})))


def test_a_worker_is_bound_by_uuid() -> None:
    """By its whole UUID or its beginning, as CUDA takes it; one that is not here is refused, by name."""
    found = host(FakeNvml(count=2))
    assert bind(9, found, CUDA_VISIBLE_DEVICES="GPU-00000001").gpu.index == 1
    with pytest.raises(DeviceError, match="this host has no GPU GPU-ffff; it has GPU-00000000-0000, GPU-0"):
        bind(9, found, CUDA_VISIBLE_DEVICES="GPU-ffff")


@pytest.mark.parametrize(
    ("numbers", "text"), [((), "none"), ((0,), "GPU 0"), ((0, 1, 2), "GPUs 0-2"), ((0, 2), "GPUs 0, 2")]
)
def test_numbers_are_spelled(numbers: tuple[int, ...], text: str) -> None:
    """As in an error message."""
    assert spell(numbers) == text


# -- several workers on one GPU -----------------------------------------------------------


def bind_shared(number: int, found: Inventory, **environ: str) -> Any:
    return visible_device(number, WorkerSettings(per_gpu=found.per_gpu), environ, inventory=found)


def test_workers_share_gpus_in_order() -> None:
    """Instance N is on GPU N // per_gpu, which NVML's numbers or a list in the settings order."""
    found = list_gpus((), per_gpu=2, nvml=FakeNvml(count=3, lost=frozenset({1})), nodes=list)
    assert found.worker_numbers == (0, 1, 4, 5)
    assert [bind_shared(number, found).gpu.index for number in (0, 1, 4, 5)] == [0, 0, 2, 2]
    # What the unit sets by itself is the worker's number, and no GPU's.
    assert bind_shared(1, found, CUDA_VISIBLE_DEVICES="1").gpu.index == 0
    assert bind_shared(2, found, CUDA_VISIBLE_DEVICES="0,2").gpu.index == 2
    listed = list_gpus(("2", "0"), per_gpu=3, nvml=FakeNvml(count=3), nodes=list)
    assert [bind_shared(number, listed).gpu.index for number in range(6)] == [2, 2, 2, 0, 0, 0]


@pytest.mark.parametrize(
    ("number", "explicit", "environ", "words"),
    [
        (3, (), {}, "GPU 1 does not answer"),
        (6, (), {}, r"no GPU 3 for worker 6 \(worker.per_gpu = 2\); it has GPUs 0, 2"),
        (
            4,
            ("0", "2"),
            {},
            "worker.gpus names 2, for workers from 0 on, each for worker.per_gpu = 2 of them",
        ),
        (
            5,
            (),
            {"CUDA_VISIBLE_DEVICES": "0,2"},
            "CUDA_VISIBLE_DEVICES=0,2 names 2, .* each for worker.per_gpu",
        ),
    ],
)
def test_a_shared_gpu_that_is_not_there(
    number: int, explicit: tuple[str, ...], environ: dict[str, str], words: str
) -> None:
    """The message gives the GPU's number and the worker's."""
    found = list_gpus(explicit, per_gpu=2, nvml=FakeNvml(count=3, lost=frozenset({1})), nodes=list)
    with pytest.raises(DeviceError, match=words):
        bind_shared(number, found, **environ)


def test_gpus_tells_who_shares(monkeypatch: pytest.MonkeyPatch) -> None:
    """``gpuinfer gpus`` has a line for each GPU, with the numbers of its workers."""
    monkeypatch.setattr("gpuinfer.gpus._pynvml", lambda: FakeNvml(count=2))
    loaded = Loaded(Settings(worker=WorkerSettings(per_gpu=2)), {})
    said = CliRunner().invoke(gpus_command, [], obj=loaded).output.splitlines()
    assert [line.partition("  ")[0] for line in said] == ["workers 0-1: GPU 0", "workers 2-3: GPU 1"]
    told = json.loads(CliRunner().invoke(gpus_command, ["--json"], obj=loaded).output)
    assert (told["per_gpu"], [one["workers"] for one in told["gpus"]]) == (2, [[0, 1], [2, 3]])
