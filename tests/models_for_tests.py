# SPDX-License-Identifier: Apache-2.0
"""Small models for tests: each function writes one whole model folder and returns its path.

The folder's name is the model's name, so ``perceptron(tmp_path / "models" / "mlp")`` makes ``mlp``.
"""

from __future__ import annotations

import json
import struct
import textwrap
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn

from gpuinfer.models import record


def write_model(folder: Path, model: nn.Module, tables: str) -> Path:
    """Script ``model`` into ``folder`` beside a manifest made of name, artefact and ``tables``."""
    folder.mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.save(torch.jit.script(model.eval()), folder / "model.pt")
    write_manifest(folder, "model.pt", tables)
    return folder


def write_manifest(folder: Path, artefact: str, tables: str) -> None:
    """Write ``model.toml``, and the record that ``gpuinfer model add`` would write of the folder as it is."""
    head = f'name = "{folder.name}"\nartefact = "{artefact}"\n'
    (folder / "model.toml").write_text(head + tables, encoding="utf-8")
    record.write(folder, record.of(folder))


def perceptron(folder: Path, max_batch_size: int = 256) -> Path:
    """64 floats to 10 classes through 256 hidden units; random weights, always the same."""
    weights = torch.random.get_rng_state()
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 10))
    torch.random.set_rng_state(weights)
    tables = f"""
max_batch_size = {max_batch_size}
soft_time_limit_s = 60
hard_time_limit_s = 120
[[inputs]]
name = "x"
shape = [64]
[[outputs]]
name = "class"
kind = "classification"
labels = ["a", "b", "c", "d", "e", "f", "g", "h", "i", "j"]
activation = "softmax"
"""
    return write_model(folder, model, tables)


class _AddScalar(nn.Module):
    def forward(self, x: Tensor, k: Tensor) -> Tensor:
        return x + k.unsqueeze(1)


def add_scalar(folder: Path) -> Path:
    """Two inputs, x of 4 floats and a scalar k; one raw output, their sum."""
    tables = """
[[inputs]]
name = "x"
shape = [4]
[[inputs]]
name = "k"
shape = []
[[outputs]]
name = "sum"
dtype = "float32"
shape = [4]
"""
    return write_model(folder, _AddScalar(), tables)


class _Signer(nn.Module):
    def __init__(self, path: str) -> None:
        super().__init__()
        self.path = path

    def forward(self, x: Tensor) -> Tensor:
        # A file of this name, made by whoever runs the model.
        return x + torch.from_file(self.path, shared=True, size=1)


def signer(folder: Path, path: str) -> Path:
    """One float; whoever runs it makes a file at ``path``, and so owns it."""
    tables = """
[[inputs]]
name = "x"
shape = []
[[outputs]]
name = "y"
dtype = "float32"
shape = []
"""
    return write_model(folder, _Signer(path), tables)


class _Sleeper(nn.Module):
    def __init__(self, nanoseconds: int) -> None:
        super().__init__()
        self.nanoseconds = nanoseconds

    def forward(self, x: Tensor) -> Tensor:
        if bool((x > 0).any()):
            begin = torch.ops.prim.TimePoint()
            while torch.ops.prim.TimePoint() - begin < self.nanoseconds:
                x = x + 0.0
        return x * 2


def sleeper(
    folder: Path,
    seconds: float,
    *,
    max_batch_size: int = 8,
    soft_time_limit_s: float = 30.0,
    hard_time_limit_s: float = 60.0,
) -> Path:
    """One float to its double; a batch with any positive value takes ``seconds``, in native code.

    It holds no GIL meanwhile and cannot be interrupted. Zeros, as in a warm-up, take no time.
    """
    tables = f"""
max_batch_size = {max_batch_size}
soft_time_limit_s = {soft_time_limit_s}
hard_time_limit_s = {hard_time_limit_s}
[[inputs]]
name = "x"
shape = [1]
[[outputs]]
name = "twice"
"""
    return write_model(folder, _Sleeper(int(seconds * 1e9)), tables)


class Latch:
    """A file that a ``latched`` model reads, closed at first: while it is closed, batches do not end."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.write_bytes(bytes(4))

    def open(self) -> None:
        """Let the batch that runs end, and all that come."""
        self._set(1.0)

    def close(self) -> None:
        """Hold back the batches that begin from now on."""
        self._set(0.0)

    def _set(self, value: float) -> None:
        with self.path.open("r+b") as file:  # in place: a model has it mapped
            file.write(struct.pack("f", value))


class _Latched(nn.Module):
    def __init__(self, path: str) -> None:
        super().__init__()
        self.path = path

    def forward(self, x: Tensor) -> Tensor:
        if bool((x > 0).any()):
            opened = False
            while not opened:
                # The time is part of the size, which is always 1, or TorchScript would read the file once.
                size = 1 + int(torch.ops.prim.TimePoint() < 0)
                opened = bool((torch.from_file(self.path, shared=False, size=size) > 0).any())
        return x * 2


def latched(folder: Path, *, max_batch_size: int = 8) -> Latch:
    """One float to its double; a batch with any positive value ends once the latch is open.

    It runs in native code, as a kernel does, and holds no GIL (``Gate`` is Python, and notes its batches).
    Zeros, as in a warm-up, take no time.
    """
    tables = f"""
max_batch_size = {max_batch_size}
soft_time_limit_s = 600
hard_time_limit_s = 900
[[inputs]]
name = "x"
shape = [1]
[[outputs]]
name = "twice"
"""
    path = folder.parent.with_name(f"{folder.name}.latch")
    write_model(folder, _Latched(str(path)), tables)
    return Latch(path)


class _Unbatched(nn.Module):
    def forward(self, x: Tensor, k: float) -> tuple[Tensor, Tensor]:
        return x * k, x.sum()


def unbatched(folder: Path) -> Path:
    """No batch dimension: a 2 x n matrix and a plain float; two raw outputs, the product and x's sum."""
    tables = """
batchable = false
[[inputs]]
name = "x"
shape = [2, -1]
[[inputs]]
name = "k"
shape = []
[[outputs]]
name = "product"
shape = [2, -1]
[[outputs]]
name = "sum"
shape = []
"""
    return write_model(folder, _Unbatched(), tables)


class _Variable(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x.sum(dim=1), x * 2


def variable(folder: Path, how: str = "group") -> Path:
    """A vector of any length; two raw outputs, its sum and its double. ``how`` is group or pad."""
    tables = f"""
variable = "{how}"
[[inputs]]
name = "x"
shape = [-1]
[[outputs]]
name = "sum"
shape = []
[[outputs]]
name = "twice"
shape = [-1]
"""
    return write_model(folder, _Variable(), tables)


class _Picky(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if bool((x < 0).any()):
            raise ValueError("negative numbers make me fail")
        return x.sqrt()


def picky(folder: Path) -> Path:
    """One float to its root; a batch with any negative value fails as a whole, with a message."""
    tables = """
[[inputs]]
name = "x"
shape = [1]
[[outputs]]
name = "root"
"""
    return write_model(folder, _Picky(), tables)


class _Leaker(nn.Module):
    def __init__(self, numbers: int) -> None:
        super().__init__()
        self.numbers = numbers
        self.kept = [torch.zeros(1)]

    def forward(self, x: Tensor) -> Tensor:
        if bool((x > 0).any()):
            self.kept.append(torch.ones(self.numbers))
        return x * 2


def leaker(folder: Path, mib: int) -> Path:
    """One float to its double; each batch with a positive value keeps ``mib`` MiB for ever."""
    tables = """
max_batch_size = 1
[[inputs]]
name = "x"
shape = [1]
[[outputs]]
name = "twice"
"""
    return write_model(folder, _Leaker(mib * 2**18), tables)


def python_model(folder: Path, code: str, tables: str = "") -> Path:
    """Write ``code`` as the model's file, beside a manifest made of ``tables``."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.py").write_text(textwrap.dedent(code), encoding="utf-8")
    write_manifest(folder, "model.py", tables)
    return folder


class Gate:
    """A model of one float that notes its batches, and holds them back while the gate is shut.

    Each batch takes 50 ms. What waits behind a held one can be looked at, however slow the machine is, and
    the order of serving is the order of its notes. Zeros, as in a warm-up, pass and are not noted.
    """

    CODE = """
    import json
    import time
    from pathlib import Path

    class Gate:
        example = [0.0]

        def predict(self, batch: list[list[float]]) -> list[list[float]]:
            if not any(x[0] for x in batch):
                return batch
            here = Path(__file__).parent.parent
            with (here / "{name}.batches").open("a") as notes:
                notes.write(json.dumps([x[0] for x in batch]) + "\\n")
            time.sleep(0.05)
            at = here / "{name}.at"
            if at.exists() and [float(at.read_text())] in batch:
                at.replace(here / "{name}.shut")
            while (here / "{name}.shut").exists():
                (here / "{name}.held").touch()
                time.sleep(0.01)
            return batch
    """

    def __init__(self, folder: Path, *, max_batch_size: int, shut: bool = False) -> None:
        self._shut, self._held = folder.with_suffix(".shut"), folder.with_suffix(".held")
        self._batches = folder.with_suffix(".batches")
        code = self.CODE.format(name=folder.name)
        python_model(folder, code, f"max_batch_size = {max_batch_size}\n")
        self._batches.touch()
        if shut:
            self.shut()

    @property
    def held(self) -> bool:
        """A batch waits at the gate."""
        return self._held.exists()

    @property
    def batches(self) -> list[list[float]]:
        """The inputs of each batch that has begun, in order."""
        return [json.loads(line) for line in self._batches.read_text().splitlines()]

    def first(self, value: float) -> int:
        """Return the number of the first batch with this input."""
        return next(n for n, inputs in enumerate(self.batches) if value in inputs)

    def last(self, value: float) -> int:
        """Return the number of the last batch with this input."""
        return max(n for n, inputs in enumerate(self.batches) if value in inputs)

    def shut(self) -> None:
        """Hold every batch that has not ended."""
        self._held.unlink(missing_ok=True)
        self._shut.touch()

    def shut_at(self, value: float) -> None:
        """Hold the first batch with this input, and every later one."""
        self._shut.with_suffix(".at").write_text(str(value))

    def open(self) -> None:
        self._shut.unlink()
