# SPDX-License-Identifier: Apache-2.0
"""The doctor and the GPUs, over a small NVML in place of hardware."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from gpuinfer import installed_torch
from gpuinfer.cli import _WhenNeeded
from gpuinfer.doctor import gpu, workers
from gpuinfer.doctor.host import Finding, Findings, Host, Skipped
from gpuinfer.doctor.nvml import JSON, Report, read
from gpuinfer.gpus import Inventory
from gpuinfer.settings import Loaded, Settings
from tests.fake_nvml import GIB, FakeNvml

pytestmark = pytest.mark.unit


def host(nvml: FakeNvml | Report, root: Path = Path("/nowhere"), **worker: object) -> Host:
    """Return a host with these GPUs; the report has passed through its JSON, as it does in life."""
    found = nvml if isinstance(nvml, Report) else JSON.validate_json(JSON.dump_json(read(nvml)))
    settings = Settings.model_validate({"worker": worker})
    return Host(Loaded(settings, {}), root=root, nvml=lambda: found)


def flat(found: Findings) -> list[Finding]:
    return [found] if isinstance(found, Finding) else list(found)


def one(found: Findings) -> Finding:
    assert len(flat(found)) == 1, found
    return flat(found)[0]


def test_sound_gpus() -> None:
    """Driver, CUDA, names, memory; nothing to fix."""
    sound = host(FakeNvml(count=2))
    listed = flat(gpu.driver(sound))
    assert listed[0].message == "driver 580.1, serves CUDA up to 12.8, 2 GPUs"
    assert listed[2].message == "GPU 1: NVIDIA L4, 24 GiB, 00000000:01:00.0, GPU-00000001-0000"
    for check in (gpu.driver, gpu.health, gpu.memory):
        assert {finding.status for finding in flat(check(sound))} == {"ok"}


@pytest.mark.parametrize("check", [gpu.driver, gpu.health, gpu.memory, gpu.xid, gpu.probe])
def test_a_host_without_gpus_is_skipped(check: Any, tmp_path: Path) -> None:
    """Said with NVML's reason, and no error."""
    with pytest.raises(Skipped, match=r"NVML Shared Library Not Found|no NVIDIA GPU"):
        check(host(FakeNvml(init=12), tmp_path))


@pytest.mark.parametrize(
    ("reason", "remedy"),
    [
        ("NVML: Driver/library version mismatch", "cat /proc/driver/nvidia/version"),
        ("NVML: Driver Not Loaded", "modprobe nvidia"),
        ("NVML: NVML Shared Library Not Found", "apt install libnvidia-ml1"),
        ("NVML lists no GPU, yet there is /dev/nvidia0", "nvidia-smi"),
    ],
)
def test_a_driver_that_fails_has_its_remedy(reason: str, remedy: str) -> None:
    """A GPU is there, and its driver does not work."""
    found = one(gpu.driver(host(Report(Inventory(reason=reason, failed=True)))))
    assert found.status == "error"
    assert found.remedy.startswith(remedy)


def test_a_driver_that_hangs(tmp_path: Path) -> None:
    """One error; the other checks refer to it."""

    reason = "the driver does not answer: NVML gave no answer in 20 s"
    hung = host(Report(Inventory(reason=reason, failed=True)))
    found = one(gpu.driver(hung))
    assert (found.message, found.remedy.split()[0]) == (reason, "journalctl")
    with pytest.raises(Skipped, match=r"see gpu\.driver"):
        gpu.health(hung)
    (tmp_path / "run/systemd/system").mkdir(parents=True)
    hung.root, hung.run = tmp_path, kernel_log("NVRM: Xid (PCI:0000:65:00): 79, GPU has fallen off the bus.")
    assert one(gpu.xid(hung)).status == "error", "the kernel's log tells more than a driver that hangs"


def test_a_lost_gpu_is_an_error_beside_the_others() -> None:
    """With the driver's words."""
    _, lost, sound = flat(gpu.driver(host(FakeNvml(count=2, lost=frozenset({0})))))
    assert (lost.status, sound.status) == ("error", "ok")
    assert lost.message == "GPU 0 does not answer: GPU is lost"


def test_a_gpu_that_is_lost_after_it_was_listed() -> None:
    """The others' health is told all the same."""

    class LostLater(FakeNvml):
        def nvmlDeviceGetComputeRunningProcesses(self, handle: int) -> list[Any]:
            self.lost = frozenset({1})
            return super().nvmlDeviceGetComputeRunningProcesses(handle)

    found = flat(gpu.health(host(LostLater(count=2, persistent=False))))
    assert [finding.message.partition(":")[0] for finding in found] == ["GPU 0"]


def test_a_gpu_of_the_settings_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An index, a UUID or a MIG instance that NVML does not list, though no worker is enabled for it."""
    names = ("0", "GPU-00000000", "MIG-0-0", "7", "GPU-ff")
    (tmp_path / "all.toml").write_text(f"[worker]\ngpus = {[*names]}\n")
    monkeypatch.setenv("GPUINFER_CONFIG", str(tmp_path / "all.toml"))
    found = flat(workers.bindings(host(FakeNvml(count=1, mig={0: ["1g.6gb"]}), tmp_path, gpus=names)))
    assert [finding.message.partition(";")[0] for finding in found if finding.status == "error"] == [
        "worker 3: worker.gpus: this host has no GPU 7",
        "worker 4: worker.gpus: this host has no GPU GPU-ff",
    ]


def test_mig() -> None:
    """Instances are named; MIG without one is a GPU nobody can use."""
    _, split, empty = flat(gpu.driver(host(FakeNvml(count=2, mig={0: ["1g.6gb", "2g.12gb"], 1: [None]}))))
    assert split.message.endswith(", GPU-00000000-0000, 1g.6gb MIG-0-0, 2g.12gb MIG-0-1")
    assert empty.status == "error"
    assert "nvidia-smi mig -i 1 -cgi PROFILE -C" in empty.remedy


def test_persistence_mode_off() -> None:
    """A warning: it costs time, no more."""
    found = one(gpu.health(host(FakeNvml(count=1, persistent=False))))
    assert found.status == "warning"
    assert "nvidia-persistenced" in found.remedy


def test_ill_health() -> None:
    """Memory errors, rows to be replaced, a closed compute mode: each with its fix."""
    nvml = FakeNvml(count=1, ecc=3, remapped={0: (1, 1)}, compute_mode=2)
    found = flat(gpu.health(host(nvml)))
    assert [finding.status for finding in found] == ["error", "warning", "error", "error"]
    assert "exchange the GPU" in found[0].message
    assert "; nvidia-smi -i GPU-00000000-0000 --gpu-reset; systemctl start " in found[1].remedy
    assert "3 uncorrected" in found[2].message
    assert found[3].remedy == "nvidia-smi -i 0 -c DEFAULT"


def test_the_ill_health_of_a_shared_gpu() -> None:
    """A reset needs all stopped that use it, and names the GPU so that no other is meant."""
    found = flat(gpu.health(host(FakeNvml(count=2, remapped={1: (1, 0)}), per_gpu=2)))
    assert found[0].remedy == (
        "systemctl stop nvidia-persistenced gpuinfer-watcher gpuinfer-worker@2 gpuinfer-worker@3; "
        "nvidia-smi -i GPU-00000001-0000 --gpu-reset; "
        "systemctl start nvidia-persistenced gpuinfer-watcher gpuinfer-worker@2 gpuinfer-worker@3"
    )


def test_a_reset_starts_only_what_ran(tmp_path: Path) -> None:
    """A worker that was stopped by hand, or never ran, stays so; a daemon may not be installed."""
    states = {
        "gpuinfer-watcher": "active",
        "gpuinfer-worker@2": "inactive",
        "gpuinfer-worker@3": "activating",
    }

    def systemctl(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
        shown = [f"ActiveState={states.get(name, 'inactive')}" for name in command[4:]]
        return subprocess.CompletedProcess([], 0, "\n\n".join(shown), "")

    here = host(FakeNvml(count=2, remapped={1: (1, 0)}), tmp_path, per_gpu=2)
    (tmp_path / "run/systemd/system").mkdir(parents=True)
    here.run = systemctl
    start = "; systemctl start gpuinfer-watcher gpuinfer-worker@3"
    assert flat(gpu.health(here))[0].remedy.endswith(f" --gpu-reset{start}")
    states.clear()
    assert flat(gpu.health(here))[0].remedy.endswith(" --gpu-reset")


def test_a_full_gpu(tmp_path: Path) -> None:
    """A warning that names who holds the memory; a worker of ours may."""
    here = host(FakeNvml(count=1, used_bytes=24 * GIB - 1), tmp_path)
    found = one(gpu.memory(here))
    assert found.status == "warning"
    assert found.message.endswith("used by processes 4711")
    (tmp_path / "proc/4711").mkdir(parents=True)
    (tmp_path / "proc/4711/cmdline").write_text("/usr/bin/python3\0-m\0gpuinfer\0worker\x000\0")
    assert one(gpu.memory(here)).status == "ok"


def kernel_log(text: str, stderr: str = "") -> Any:
    def journalctl(_: Sequence[str]) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess([], 0, text, stderr)

    return journalctl


def test_xids(tmp_path: Path) -> None:
    """Those that mean a broken GPU are errors, a program's fault is a warning; each is counted."""
    (tmp_path / "run/systemd/system").mkdir(parents=True)
    seen = host(FakeNvml(count=1), tmp_path)
    seen.run = kernel_log(
        "NVRM: Xid (PCI:0000:65:00): 79, pid=1, GPU has fallen off the bus.\n"
        "NVRM: Xid (PCI:0000:65:00): 31, pid=2, MMU Fault\nNVRM: Xid (PCI:0000:65:00): 31, pid=3, MMU Fault\n"
    )
    bus, mmu = flat(gpu.xid(seen))
    assert (bus.status, mmu.status) == ("error", "warning")
    assert "Xid 31 from 0000:65:00, 2 times" in mmu.message
    seen.run = kernel_log("")
    assert one(gpu.xid(seen)).status == "ok"
    seen.run = kernel_log("", "Hint: You are currently not seeing messages from other users and the system.")
    with pytest.raises(Skipped, match="may not read the kernel's log"):
        gpu.xid(seen)


def test_no_remedy_reboots() -> None:
    """It is pasted as it stands: a reboot is for a person to decide, and stands in a comment."""
    for file in (Path(gpu.__file__).parent).glob("*.py"):
        for line in file.read_text().splitlines():
            assert not re.search(r"""(["'];? ?|; |&& )reboot""", line), f"{file.name}: {line}"


# -- CUDA -----------------------------------------------------------------------------------


def answer(**changes: Any) -> dict[str, Any]:
    sound = {
        "torch": "2.13.0",
        "cuda": "12.8",
        "devices": ["cuda:0 (NVIDIA L4)"],
        "failed": {},
        "why": "",
        "ms": 7,
    }
    return {**sound, **changes}


def test_cuda_computes() -> None:
    """Each device did."""
    assert one(gpu.judge(answer(), 1)).message == "1 device computes (torch 2.13.0, 7 ms)"


def test_cuda_does_not_compute() -> None:
    """A CPU build, no device, a failed device, a full one."""
    build = one(gpu.judge(answer(cuda=None), 1))
    assert build.remedy == "apt install gpuinfer-torch-cuda"
    none = one(gpu.judge(answer(devices=[], why="CUDA driver version is insufficient"), 2))
    assert none.message == "NVML lists 2 GPUs, CUDA none: CUDA driver version is insufficient"
    bad = one(gpu.judge(answer(failed={"cuda:1": "CUDA error: uncorrectable ECC error"}), 2))
    assert (bad.status, bad.message) == (
        "error",
        "cuda:1 does not compute: CUDA error: uncorrectable ECC error",
    )
    assert one(gpu.judge(answer(failed={"cuda:1": "CUDA out of memory"}), 2)).status == "warning"
    fewer = one(gpu.judge(answer(), 4))
    assert (fewer.status, fewer.message) == ("error", "NVML lists 4 GPUs, CUDA 1 of them")
    assert one(gpu.judge(answer(), 4, split=True)).status == "ok", "of MIG's instances CUDA shows one"


# -- who gets which -------------------------------------------------------------------------


def with_file(root: Path, number: int, text: str) -> None:
    (root / "etc/gpuinfer").mkdir(parents=True, exist_ok=True)
    (root / f"etc/gpuinfer/worker@{number}.env").write_text(text)


def test_what_each_worker_would_run_on(tmp_path: Path) -> None:
    """By the administrator's file of that worker: an instance, another GPU, the CPU."""
    with_file(tmp_path, 0, "# half a GPU\nCUDA_VISIBLE_DEVICES=MIG-0-1\n")
    with_file(tmp_path, 1, 'GPUINFER_WORKER_QUEUES="realtime,default"\n')
    with_file(tmp_path, 2, "GPUINFER_WORKER_DEVICE=cpu\n")
    found = flat(workers.bindings(host(FakeNvml(count=2, mig={0: ["1g.6gb", "2g.12gb"]}), tmp_path)))
    assert [finding.message for finding in found] == [
        "worker 0 runs on cuda:0 (NVIDIA L4 MIG 2g.12gb)",
        "worker 1 runs on cuda:0 (NVIDIA L4)",
        "worker 2 runs on cpu (no GPU)",
    ]


def test_workers_of_a_shared_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is told with its GPU; a file that counts otherwise than the host is an error."""
    (tmp_path / "all.toml").write_text("[worker]\nper_gpu = 2\n")
    monkeypatch.setenv("GPUINFER_CONFIG", str(tmp_path / "all.toml"))
    with_file(tmp_path, 3, "")
    shared = host(FakeNvml(count=2), tmp_path, per_gpu=2)
    assert one(workers.bindings(shared)).message == "worker 3 runs on cuda:0 (NVIDIA L4)"
    with_file(tmp_path, 3, "GPUINFER_WORKER_PER_GPU=4\n")
    found = one(workers.bindings(shared))
    assert "worker.per_gpu is 4 here and 2 for the host" in found.message
    assert found.remedy.startswith("editor /etc/gpuinfer/worker@3.env")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "this host has no GPU 7; it has GPU 0"),
        ("CUDA_VISIBLE_DEVICES=GPU-ff", "this host has no GPU GPU-ff"),
        ("GPUINFER_WORKER_QUEUE=batch", "did you mean GPUINFER_WORKER_QUEUES"),
        ("what is this", "line 1 is no NAME=value"),
    ],
)
def test_a_workers_file_that_cannot_work(tmp_path: Path, text: str, words: str) -> None:
    """Found before its unit fails; the remedy opens the file."""
    with_file(tmp_path, 7, text)
    found = one(workers.bindings(host(FakeNvml(count=1), tmp_path)))
    assert found.status == "error"
    assert words in found.message
    assert found.remedy.startswith("editor /etc/gpuinfer/worker@7.env")


def test_a_wrong_settings_file_is_no_workers_fault(tmp_path: Path) -> None:
    """A slip in gpuinfer.toml is one finding, and its remedy never to disable a worker."""
    with_file(tmp_path, 0, "")
    settings = tmp_path / "gpuinfer.toml"
    settings.write_text('[worker]\ndevise = "cpu"\n')
    with pytest.raises(Skipped, match=r"see config\.file"):
        workers.bindings(Host(_WhenNeeded(settings), root=tmp_path))  # type: ignore[arg-type]  # as the command


def test_torch_is_known_without_importing_it() -> None:
    """Its version and its CUDA, from its own file."""
    import torch

    assert installed_torch.torch_build() == (torch.__version__, torch.version.cuda or "")


@pytest.mark.parametrize(
    ("driver", "cuda_version", "said"), [(True, "", True), (False, "", False), (True, "13.0", False)]
)
def test_the_command_that_swaps_torch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, driver: bool, cuda_version: str, said: bool
) -> None:
    """Where NVIDIA's driver is loaded and torch is the one for CPUs; nowhere else."""
    monkeypatch.setattr(installed_torch, "DRIVER", tmp_path / "version")
    monkeypatch.setattr(installed_torch, "torch_build", lambda: ("2.13.0+cpu", cuda_version))
    if driver:
        (tmp_path / "version").touch()
    assert ("apt install gpuinfer-torch-cuda" in installed_torch.wrong_torch()) == said


def test_a_cpu_build_on_a_host_with_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """An error there, and fine on a host without one."""
    monkeypatch.setattr(gpu, "torch_build", lambda: ("2.13.0+cpu", ""))
    assert gpu.torch(host(FakeNvml(count=1))).remedy == "apt install gpuinfer-torch-cuda"
    assert gpu.torch(host(FakeNvml(init=12))).message == "torch 2.13.0+cpu, built for the CPU"
    monkeypatch.setattr(gpu, "torch_build", lambda: None)
    assert gpu.torch(host(FakeNvml(init=12))).remedy == "apt install gpuinfer-torch-cpu"
