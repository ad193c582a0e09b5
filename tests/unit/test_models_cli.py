# SPDX-License-Identifier: Apache-2.0
"""``gpuinfer model`` does what its help says, for people and, with --json, for programs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image

from gpuinfer.errors import (
    DigestMismatch,
    GpuinferError,
    InputError,
    ModelLoadError,
    ShapeMismatch,
    UnknownModel,
    UsageError,
)
from gpuinfer.models.cli import model
from gpuinfer.models.shipped import load_test_images
from gpuinfer.settings import Loaded, Settings
from tests import models_for_tests as build

pytestmark = pytest.mark.unit


UPPER = """class Upper:
    example = "hello"

    def predict(self, batch: list[str]) -> list[str]:
        return [text.upper() for text in batch]
"""


class Cli:
    """The command with its settings; an error of ours is raised as the root command would meet it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        settings = Settings(models={"folders": (folder,)}, worker={"device": "cpu"})  # type: ignore[arg-type]
        self._loaded = Loaded(settings, {})

    def __call__(self, *arguments: object, stdin: str | None = None) -> str:
        result = self.result(*arguments, stdin=stdin)
        if isinstance(result.exception, GpuinferError):
            raise result.exception
        assert result.exit_code == 0, result.output
        return result.stdout

    def result(self, *arguments: object, stdin: str | None = None) -> Result:
        return CliRunner().invoke(model, [str(a) for a in arguments], obj=self._loaded, input=stdin)

    def json(self, *arguments: object, stdin: str | None = None) -> Any:
        return json.loads(self(*arguments, "--json", stdin=stdin))


@pytest.fixture
def cli(tmp_path: Path) -> Cli:
    return Cli(tmp_path / "installed")


def test_the_life_of_a_model(cli: Cli, tmp_path: Path) -> None:
    """Add, list, show, verify, run, remove."""
    source = build.add_scalar(tmp_path / "adder")
    said = cli("add", source, "--name", "sum")
    assert "added sum to" in said
    assert said.splitlines()[-1].startswith(
        "next: name sum in worker.models (/etc/gpuinfer/gpuinfer.toml), then "
    )
    assert {entry["name"] for entry in cli.json("list")} == {"sum", "digits", "digits-photo"}
    listing = cli("list")
    assert "x float32[4], k float32[]" in listing
    assert "shipped" in listing
    assert cli.json("show", "sum")["inputs"][0]["shape"] == [4]
    assert " batch " in cli("show", "sum")
    assert "sum: OK" in cli("verify", "sum")
    report = cli.json("run", "sum", "--input", "-", stdin='{"x": [1, 2, 3, 4], "k": 1}')
    assert report["results"] == [{"outputs": {"sum": [2, 3, 4, 5]}}]
    assert "removed" in cli("remove", "sum")
    with pytest.raises(UnknownModel):
        cli("show", "sum")


def test_add_needs_force_to_replace(cli: Cli, tmp_path: Path) -> None:
    """What is there stays, unless one says so."""
    source = build.perceptron(tmp_path / "mlp")
    cli("add", source, "--untried")
    with pytest.raises(UsageError, match="--force"):
        cli("add", source)
    cli("add", source, "--force", "--untried")


def test_verify_checks_all_and_then_fails(cli: Cli, tmp_path: Path) -> None:
    """One bad model does not hide the state of the others, and the command fails."""
    cli("add", build.perceptron(tmp_path / "mlp"), "--untried")
    (cli.folder / "mlp" / "model.pt").write_bytes(b"changed")
    result = cli.result("verify")
    assert isinstance(result.exception, DigestMismatch)
    assert "digits: OK" in result.output
    assert "mlp: FAILED" in result.output
    states = json.loads(cli.result("verify", "--json").stdout)
    assert {state["name"]: state["ok"] for state in states}["mlp"] is False


def test_show_is_for_people_and_fits_a_page(cli: Cli) -> None:
    """What is set, each input and output on a line of its own; nothing wider than 100 columns."""
    said = cli("show", "digits")
    assert max(map(len, said.splitlines())) <= 100
    assert "image: tensor float32 [1, 8, 8]" in said
    assert "null" not in said
    assert '"imports": []' in cli("show", "digits", "--json")


def test_list_shows_broken_models(cli: Cli) -> None:
    """A broken manifest is a line of the listing."""
    broken = cli.folder / "bad"
    broken.mkdir(parents=True)
    (broken / "model.toml").write_text("nonsense")
    assert "broken" in cli("list")
    (entry,) = [entry for entry in cli.json("list") if entry["name"] == "bad"]
    assert "TOML" in entry["error"]


def test_run_an_image(cli: Cli, tmp_path: Path) -> None:
    """A PNG of a held-out digit is read as the manifest says, and recognised."""
    images, labels = load_test_images()
    files = []
    for place in range(3):
        file = tmp_path / f"{place}.png"
        Image.fromarray((images[place, 0] * 255 / 16).round().astype(np.uint8)).save(file)
        files += ["--input", file]
    report = cli.json("run", "digits", *files, "--top-k", 2)
    assert [result["class"] for result in report["results"]] == labels[:3].tolist()
    assert len(report["results"][0]["top_k"]) == 2
    assert report["device"] == "cpu"
    assert report["timing_ms"]["inference"] > 0
    printed = cli("run", "digits", *files[:2])
    assert f"{labels[0]}" in printed
    assert "digits on cpu, batch of 1" in printed


def test_run_npy_items_and_batches(cli: Cli, tmp_path: Path) -> None:
    """A .npy file holds one item, or a batch of more than the model takes at once."""
    images, labels = load_test_images()
    file = tmp_path / "a.npy"
    np.save(file, images[0])
    assert cli.json("run", "digits", "--input", file)["results"][0]["class"] == labels[0]
    np.save(file, images)
    classes = [result["class"] for result in cli.json("run", "digits", "--input", file)["results"]]
    assert np.mean(np.array(classes) == labels) >= 0.98


def test_run_json_as_the_api_takes_it(cli: Cli, tmp_path: Path) -> None:
    """The value alone, or the body of a request around it; raw outputs as lists or bytes."""
    cli("add", build.unbatched(tmp_path / "free"), "--untried")
    file = tmp_path / "a.json"
    file.write_text('{"inputs": {"x": [[1], [2]], "k": 3}}')
    assert cli.json("run", "free", "--input", file)["results"][0]["outputs"]["product"] == [[3], [6]]
    encoded = cli.json("run", "free", "--input", file, "--encoding", "b64")["results"][0]["outputs"]["sum"]
    assert encoded == {"b64": "AABAQA==", "dtype": "float32", "shape": []}
    assert '"sum": 3.0' in cli("run", "free", "--input", file)


@pytest.mark.parametrize(
    ("name", "content", "error", "said"),
    [
        ("a.json", b"[1, 2]", ShapeMismatch, "has shape [2]"),
        ("a.json", b"[1, ", InputError, "cannot be read"),
        ("a.json", b"\xff", InputError, "cannot be read"),
        ("a.npy", b"no array", InputError, "cannot be read"),
        ("a.png", b"no image", InputError, "cannot be read as an image"),
    ],
)
def test_bad_files_are_named(
    cli: Cli, tmp_path: Path, name: str, content: bytes, error: type[InputError], said: str
) -> None:
    """The error names the file and what is wrong with it."""
    file = tmp_path / name
    file.write_bytes(content)
    with pytest.raises(error) as caught:
        cli("run", "digits", "--input", file)
    assert caught.value.field == str(file)
    assert said in caught.value.message


def test_npy_never_unpickles(cli: Cli, tmp_path: Path) -> None:
    """An array of objects would run code when read."""
    file = tmp_path / "a.npy"
    np.save(file, np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(InputError, match="cannot be read"):
        cli("run", "digits", "--input", file)


def test_images_only_where_the_manifest_says_how(cli: Cli, tmp_path: Path) -> None:
    """A model of plain numbers refuses an image, and a model of several inputs a .npy."""
    cli("add", build.add_scalar(tmp_path / "adder"), "--untried")
    file = tmp_path / "a.png"
    Image.new("L", (8, 8)).save(file)
    with pytest.raises(UsageError, match="does not take images"):
        cli("run", "adder", "--input", file)
    np.save(tmp_path / "a.npy", np.zeros(4))
    with pytest.raises(UsageError, match="several inputs"):
        cli("run", "adder", "--input", tmp_path / "a.npy")


def test_a_file_is_added_and_has_run(cli: Cli, tmp_path: Path) -> None:
    """One command from a file to an installed model; a listing tells what it takes; `run` needs no input."""
    file = tmp_path / "upper.py"
    file.write_text(UPPER)
    said = cli("add", file)
    assert "its example ran on cpu" in said
    assert f"added upper to {cli.folder / 'upper'}" in said
    digest = said.splitlines()[-2]
    assert "input text" in cli("list")
    record = json.loads((cli.folder / "upper" / "installed.json").read_text())
    assert (record["digest"], record["example_ok"]) == (digest, True)
    assert record["signature"]["inputs"][0]["kind"] == "text"
    assert not list(tmp_path.glob("model.toml"))
    assert cli("run", "upper").startswith('"HELLO"')
    assert cli.json("run", file)["results"] == [{"output": "HELLO"}]
    with pytest.raises(DigestMismatch, match=r"it was run to write model.toml, and not added"):
        cli("add", file, "--force", "--expect", "sha256:" + "0" * 64)
    assert digest in cli("add", file, "--force", "--expect", digest, "--untried")


def test_run_takes_what_warm_up_has_found(cli: Cli, tmp_path: Path) -> None:
    """Without an example: zeros, or ones where it refuses zeros; where it refuses all, that is said."""
    assert len(cli.json("run", build.perceptron(tmp_path / "mlp"))["results"]) == 1
    tables = '[[inputs]]\nname = "x"\nshape = [2]\n'
    code = "class Mean:\n    def predict(self, batch):\n        return [3 // int(x.sum()) for x in batch]\n"
    ones = build.python_model(tmp_path / "ones", code, tables)
    assert cli.json("run", ones)["results"] == [{"output": 1}]
    assert cli.json("check", ones)["example"] == [1.0, 1.0]
    none = build.python_model(tmp_path / "none", code.replace("3 //", "3 // 0 +"), tables)
    with pytest.raises(UsageError, match="none has no example that it accepts; use --input FILE"):
        cli("run", none)


def test_what_fails_is_not_added(cli: Cli, tmp_path: Path) -> None:
    """The model that is there stays, unless one says that it is not to be tried."""
    file = tmp_path / "upper.py"
    file.write_text(UPPER)
    cli("add", file)
    file.write_text(UPPER.replace("text.upper()", "text.uper()"))
    with pytest.raises(ModelLoadError, match=r"has no attribute 'uper' \(upper.py, line 5\)"):
        cli("add", file, "--force")
    assert cli("run", "upper").startswith('"HELLO"')
    assert "added" in cli("add", file, "--force", "--untried")
    with pytest.raises(ModelLoadError):
        cli("check", "upper")


def test_init_then_check(cli: Cli, tmp_path: Path) -> None:
    """`init` writes a manifest that can be edited; `check` tells what the model is, installed or not."""
    folder = build.perceptron(tmp_path / "mlp")
    (folder / "model.toml").unlink()
    assert f"wrote {folder / 'model.toml'}" in cli("init", folder)
    assert "shape = [64]" in (folder / "model.toml").read_text()
    with pytest.raises(UsageError, match="--force"):
        cli("init", folder / "model.pt")
    assert "mlp on cpu: loaded in" in cli("check", folder)
    assert len(cli.json("check", "digits")["result"]["top_k"]) == 3
    assert "items/s" in cli("bench", folder, "--seconds", "0.01")


@pytest.mark.parametrize(
    "command", ["init", "add", "list", "show", "verify", "remove", "run", "check", "bench"]
)
def test_every_command_has_help_and_an_example(cli: Cli, command: str) -> None:
    """--help explains, with an example."""
    assert "Example" in cli(command, "--help")


def test_listing_does_not_import_torch(tmp_path: Path) -> None:
    """torch takes seconds to import; only running a model needs it."""
    code = (
        "import sys\nfrom gpuinfer.models import cli, images, outputs, repository, shipped\n"
        "assert repository.Repository([]).names()\nsys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
