# SPDX-License-Identifier: Apache-2.0
"""The end of the demo: the table of figures, and next steps."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from gpuinfer.demo.figures import Figures, TierFigures


def show_table(console: Console, figures: Figures) -> None:
    """Print the figures and the differences."""
    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("tier")
    for name in ("requests", "accuracy", "equal to direct", "images/s", "p50", "p99"):
        table.add_column(name, justify="left" if name.startswith("equal") else "right", no_wrap=True)
    for tier in figures.tiers:
        table.add_row(*_row(tier))
    table.add_row("direct", f"{figures.test_images:,}", _percent(figures.direct_accuracy), "-", "-", "-", "-")
    console.print()
    console.print(table)
    console.print()
    for line in _notes(figures):
        console.print(line, soft_wrap=True)
    for line in figures.differences:
        console.print(f"  differs: {line}", soft_wrap=True, markup=False)


def _row(tier: TierFigures) -> tuple[str, ...]:
    per_request = tier.images // max(1, tier.requests - tier.failed)
    requests = f"{tier.requests:,}" + (f" x {per_request}" if per_request > 1 else "")
    return (
        tier.tier,
        requests,
        _percent(tier.accuracy),
        _equality(tier),
        f"{tier.images_per_s:,.0f}",
        _milliseconds(tier.p50_ms),
        _milliseconds(tier.p99_ms),
    )


def _equality(tier: TierFigures) -> str:
    if tier.equal:
        return "[green]yes, image by image[/]"
    if not tier.requests:
        return "[red]NO: no requests[/]"
    return f"[red]NO: {tier.failed:,} failed, {tier.differing:,} differ[/]"


def _percent(share: float) -> str:
    return f"{share:.2%}".replace("%", " %")


def _milliseconds(value: float) -> str:
    return f"{value:,.1f} ms" if value < 100 else f"{value:,.0f} ms"


def _notes(figures: Figures) -> list[str]:
    return [
        f"direct: the model called image by image, without queue or HTTP: "
        f"{figures.direct_correct} of {figures.test_images} right; "
        f"confidences differ by at most {figures.confidence_difference:.0e}",
        "latency: from before the POST until the result is there; a batch request is one job",
        f"the workers ran {figures.batches:,} batches on {', '.join(figures.devices)}, "
        f"of {figures.mean_batch_size:.1f} images on average",
    ]


def show_next_steps(console: Console) -> None:
    """Print what to try next, if nothing was left running."""
    show_commands(
        console,
        "Next steps",
        [
            (f"{_command()} demo --keep", "keep it running; then in another terminal:"),
            (
                "curl -s -d @digit.json http://127.0.0.1:PORT/predict",
                "send a request; --keep prints the port and writes the file",
            ),
            ("curl -s 'http://127.0.0.1:PORT/result/TASK_ID?wait=5'", "wait for the answer"),
            (f"{_command()} model list", "list the models; `model add FOLDER` adds your own"),
            (f"{_command()} gpus", "show the GPUs that workers would use"),
        ],
    )


def show_kept(console: Console, url: str, folder: Path, digit: Path) -> None:
    """Print how to use the running stack."""
    show_commands(
        console,
        "The demo is running. In another terminal:",
        [
            (f"curl -s -d @{digit} {url}/predict", "send a test image"),
            (f"curl -s '{url}/result/TASK_ID?wait=5'", "get the result"),
            (f"{url}/docs", "API documentation, in a browser"),
            (f"export GPUINFER_CONFIG={folder / 'gpuinfer.toml'}", "lets gpuinfer's commands use it"),
            (f"{_command()} queue status", "tasks waiting and running"),
            (f"tail -f {folder}/worker-0.log", "log of a worker"),
        ],
    )
    console.print("\nPress Ctrl-C to stop it and delete everything.", style="bold")


def _command() -> str:
    """Return how to call this installation's command from the current folder, on PATH or not."""
    own = Path(sys.executable).with_name("gpuinfer")
    found = shutil.which("gpuinfer")
    if found == str(own) or _is_ours(found):
        return "gpuinfer"
    if not own.exists():
        return f"{_from_here(Path(sys.executable))} -m gpuinfer"
    return _from_here(own)


def _is_ours(script: str | None) -> bool:
    """Whether a script runs under this interpreter, which may be in another folder (as in the package)."""
    if script is None:
        return False
    with Path(script).open("rb") as file:
        return file.readline().split()[:1] == [f"#!{sys.executable}".encode()]


def _from_here(path: Path) -> str:
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def show_commands(console: Console, title: str, lines: list[tuple[str, str]]) -> None:
    """Print commands with a description each, aligned if the terminal is wide enough."""
    console.print(f"\n{title}", style="bold")
    width = max(len(command) for command, _ in lines)
    if width + max(len(what) for _, what in lines) + 6 > console.width:
        width = 0
    for command, what in lines:
        console.print(f"  {command:<{width}}  [dim]# {what}[/]", soft_wrap=True)
