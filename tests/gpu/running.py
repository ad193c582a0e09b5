# SPDX-License-Identifier: Apache-2.0
"""Unpack the kit into a temporary folder, run each part under its limit, print the table.

    kit ─► environment beside the machine's torch ─► about, tests, figures (a process each) ─► table, JSON

Needs the standard library alone: it runs under the GPU machine's own Python.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import site
import sys
import sysconfig
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from tests.gpu.kit import KIT, ROOT, KitError, check
from tests.gpu.limited import Ended, become_reaper, end_children, run
from tests.gpu.parts import BUDGET_S, PARTS, Part
from tests.gpu.report import Outcome, Report, lines, write

#: What the files are called in the output folder.
NAME = "gpu-check"
UNPACK_LIMIT_S = 90.0
EX_USAGE = 64
#: Not part of the suite, and large, or not there.
_NOT_COPIED = shutil.ignore_patterns("__pycache__", "kit", "kit.new", "host", "results")
#: Variables that would reach into the parts: a caller's settings, coverage, another Python, another GPU.
_FOREIGN = ("GPUINFER_", "CELERY_", "COVERAGE_", "PYTEST_", "PYTHON", "CUDA_VISIBLE", "NOTIFY_", "WATCHDOG_")
#: How much of a log is shown for a part that failed.
_TAIL_LINES = 40


class Place:
    """The temporary folder and what lies in it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        #: The suite and the settings of its tools, as in the checkout; gpuinfer itself comes from its wheel.
        self.suite = folder / "suite"
        self.scratch = folder / "t"
        self.stub = folder / "stub"
        self.caches = folder / "caches"
        self.redis = folder / "redis"
        self._environment = folder / "env"
        self.python = self._environment / "bin" / "python"
        for each in (self.scratch, self.stub, self.caches):
            each.mkdir()

    def lay_out(self, kit: Path, *, dry_run: bool) -> None:
        """Copy Redis and the suite, and let the new environment find it and the machine's own packages."""
        shutil.copytree(kit / "redis", self.redis)
        for file in (self.redis / "redis-server", *(self.redis / "lib").iterdir()):
            file.chmod(0o755)  # whatever carried the kit may have lost that
        shutil.copytree(ROOT / "tests", self.suite / "tests", ignore=_NOT_COPIED)
        shutil.copy2(ROOT / "pyproject.toml", self.suite)
        packages = next(self._environment.glob("lib/python*/site-packages"))
        # The machine's Python may be an environment itself, whose packages --system-site-packages
        # does not see. They come after ours.
        theirs = dict.fromkeys([*site.getsitepackages(), sysconfig.get_path("platlib")])
        found = [f"import site; site.addsitedir({path!r})" for path in theirs]
        stub = ["import tests.gpu.stub"] if dry_run else []
        text = "\n".join([str(self.suite), *found, *stub])
        (packages / "zz_gpu_check.pth").write_text(text + "\n", encoding="utf-8")

    def environment(self, records: Path, *, dry_run: bool) -> dict[str, str]:
        """Return what a part sees."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(_FOREIGN)}
        path = [str(self.python.parent), str(self.redis), kept.get("PATH", os.defpath)]
        return kept | {
            "PATH": os.pathsep.join(path),
            "TMPDIR": str(self.scratch),
            # What CUDA and torch compile is kept from part to part, and gone in the end.
            "XDG_CACHE_HOME": str(self.caches),
            "CUDA_CACHE_PATH": str(self.caches / "cuda"),
            "TORCHINDUCTOR_CACHE_DIR": str(self.caches / "inductor"),
            "GPU_CHECK_RECORDS": str(records),
            "GPU_CHECK_STUB": str(self.stub) if dry_run else "",
            "PYTHONUNBUFFERED": "1",
            "CI": "true",  # a service that is missing is a failure
        }

    def steps(self, kit: Path) -> list[list[str]]:
        """Return the commands that make the environment."""
        own = [sys.executable, "-m"]
        make = ["venv", "--without-pip", "--system-site-packages", str(self._environment)]
        pip = ["pip", "--disable-pip-version-check", "--python", str(self.python), "install"]
        options = ["--no-index", "--no-deps", "--no-compile", "--no-warn-script-location", "--quiet"]
        wheels = sorted(map(str, (kit / "wheels").glob("*.whl")))
        return [[*own, *make], [*own, *pip, *options, *wheels]]


class Check:
    """One run of the check."""

    def __init__(self, place: Place, kit: Path, log: BinaryIO, *, dry_run: bool, patience: float) -> None:
        self.report = Report(dry_run=dry_run)
        self._patience = patience
        self._place = place
        self._kit = kit
        self._log = log
        self._begun = time.monotonic()
        self._until = self._begun + BUDGET_S * patience

    def unpack(self) -> bool:
        """Make the environment; tell whether that went well."""
        outcome = Outcome(name="unpack", limit_s=UNPACK_LIMIT_S * self._patience)
        self.report.parts.append(outcome)
        began = time.monotonic()
        for command in self._place.steps(self._kit):
            left = outcome.limit_s - (time.monotonic() - began)
            ended = self._run(command, left, self._place.folder / "none")
            outcome.reason = outcome.reason or ended.reason
        if not outcome.reason:
            self._place.lay_out(self._kit, dry_run=self.report.dry_run)
        self._close(outcome, began)
        return outcome.ok

    def part(self, part: Part) -> None:
        """Run one part, unless no time is left for it."""
        left = self._until - time.monotonic()
        outcome = Outcome(name=part.name, limit_s=part.limit_s * self._patience)
        self.report.parts.append(outcome)
        if left < 1:
            outcome.reason = "not run: the time for the whole check was over"
            return
        began = time.monotonic()
        self._say(f"== {part.name}")
        records = self._place.folder / f"{part.name}.records"
        command = [str(self._place.python), "-m", *part.arguments]
        ended = self._run(command, min(outcome.limit_s, left), records)
        self._read(records, outcome)
        outcome.reason = ended.reason
        if not outcome.reason and not records.exists():
            outcome.reason = "it has checked nothing"
        self._close(outcome, began)

    def _run(self, command: Sequence[str], limit_s: float, records: Path) -> Ended:
        env = self._place.environment(records, dry_run=self.report.dry_run)
        cwd = self._place.suite if self._place.suite.exists() else self._place.folder
        return run(command, self._log, limit_s=limit_s, env=env, cwd=cwd)

    def _read(self, records: Path, outcome: Outcome) -> None:
        """Sort what a part has told; one that was killed has told what it had done by then."""
        text = records.read_text(encoding="utf-8") if records.exists() else ""
        for line in text.splitlines():
            try:
                record: dict[str, Any] = json.loads(line)
            except ValueError:  # it was killed inside the line
                continue
            self.report.about |= record.get("about", {})
            self.report.figures += record.get("figures", [])
            outcome.checks += record.get("checks", [])

    def _close(self, outcome: Outcome, began: float) -> None:
        outcome.seconds = time.monotonic() - began
        if not outcome.ok:
            self._show_logs()
        shutil.rmtree(self._place.scratch, ignore_errors=True)
        self._place.scratch.mkdir()
        word = "ok" if outcome.ok else f"FAILED {outcome.reason}"
        print(f"{outcome.name}: {word} ({outcome.seconds:.1f} s)", flush=True)

    def _show_logs(self) -> None:
        """Keep the ends of what the part's processes have logged."""
        for file in sorted(self._place.scratch.rglob("*.log")):
            last = file.read_text(encoding="utf-8", errors="replace").splitlines()[-_TAIL_LINES:]
            self._say(f"-- {file.relative_to(self._place.scratch)}", *last)

    def _say(self, *words: str) -> None:
        self._log.write(("\n".join(words) + "\n").encode())
        self._log.flush()

    def end(self) -> Report:
        """Return the report."""
        self.report.seconds = time.monotonic() - self._begun
        return self.report


def _end(number: int, _: object) -> NoReturn:
    """End as the signal would, by way of all ``finally``."""
    raise SystemExit(128 + number)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="tests/gpu/run", description="Run the check on this machine's GPU.")
    parser.add_argument(
        "--dry-run", action="store_true", help="without a GPU: stubs for CUDA and NVML, small sizes"
    )
    parser.add_argument(
        "--kit", type=Path, default=KIT, help="what tests/gpu/pack made (default: tests/gpu/kit)"
    )
    out = Path(os.environ.get("OUT") or ROOT / ".cache" / NAME)
    parser.add_argument(
        "--out", type=Path, default=out, help="folder for table, JSON and log (default: $OUT)"
    )
    parser.add_argument(
        "--patience", type=float, default=1.0, metavar="X", help="multiply all time limits by X"
    )
    names = [part.name for part in PARTS]
    parser.add_argument(
        "parts", nargs="*", metavar="PART", help=f"some of: {', '.join(names)} (default: all)"
    )
    options = parser.parse_args(arguments)
    if unknown := set(options.parts) - set(names):
        parser.error(f"no such part: {', '.join(sorted(unknown))}; there are {', '.join(names)}")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the check; return the exit status: 0 passed, 1 failed, 64 no kit that fits."""
    options = _options(arguments)
    kit = options.kit.resolve()
    try:
        facts = check(kit)
    except KitError as exc:
        print(f"tests/gpu/run: {exc}", file=sys.stderr)
        return EX_USAGE
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, _end)
    become_reaper()
    options.out.mkdir(parents=True, exist_ok=True)
    # Short: sockets lie in it, whose paths may have 107 bytes.
    folder = Path(tempfile.mkdtemp(prefix="gi-gpu-"))
    try:
        with (options.out / f"{NAME}.log").open("wb") as log:
            whole = Check(Place(folder), kit, log, dry_run=options.dry_run, patience=options.patience)
            whole.report.about["redis-server"] = facts.redis
            _run_all(whole, options.parts)
        report = whole.end()
        write(report, options.out, NAME)
        print("\n" + "\n".join(lines(report)))
        print(f"written to {options.out}: {NAME}.json, {NAME}.txt, {NAME}.log")
    finally:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        end_children()
        shutil.rmtree(folder, ignore_errors=True)
    return 0 if report.ok else 1


def _run_all(whole: Check, names: Sequence[str]) -> None:
    chosen = [part for part in PARTS if not names or part.name in names]
    if not whole.unpack():
        chosen = []
    for part in chosen:
        whole.part(part)


if __name__ == "__main__":
    raise SystemExit(main())
