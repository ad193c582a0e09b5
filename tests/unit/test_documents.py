# SPDX-License-Identifier: Apache-2.0
"""The documents: links lead somewhere, and commands, options and settings exist."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from gpuinfer.cli import cli
from gpuinfer.models.manifest import Manifest
from gpuinfer.settings import Settings

pytestmark = pytest.mark.unit

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "packaging" / "doc").glob("*.md"))]
MANUAL = sorted((ROOT / "packaging" / "man").glob("*.scd"))
CHANGES = ROOT / "CHANGELOG.md"
SETTING = re.compile(r"[`_]([a-z]+)\.([a-z_]+)(?: = [^`]*)?[`_]")


def commands(text: str) -> Iterator[list[str]]:
    """Yield the words of each gpuinfer command in a page; a command goes on in the next line of its code."""
    for code in re.findall(r"`gpuinfer\b[^`]*`|\*gpuinfer [^*]*\*", text.replace("```", "")):
        yield code.strip("`*").split()[1:]
    for line in re.findall(r"(?m)^(?:[#$] | *→ )gpuinfer\b[^|#\n]*", text):
        yield line.split("gpuinfer", 1)[1].split()


def wrong(words: list[str]) -> str | None:
    """Return the first word that is no command, or no option of its command."""
    command: click.Command = cli
    ctx = click.Context(cli, info_name="gpuinfer")
    while words and words[0] != "--help" and isinstance(command, click.Group):
        below = command.get_command(ctx, words[0])
        if below is None:
            return words[0] if re.fullmatch(r"[a-z-]+", words[0]) else None
        command, ctx = below, click.Context(below, info_name=words[0], parent=ctx)
        words = words[1:]
    options = {"--help"} | {option for one in command.get_params(ctx) for option in one.opts}
    for word in words:
        if (found := re.match(r"\[?(--[a-z-]+)", word)) and found[1] not in options:
            return f"{ctx.command_path} {found[1]}"
    return None


def test_the_readme_is_short() -> None:
    """It is read in ten minutes; what is more has a page below packaging/doc."""
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 220


def test_every_page_has_a_link_in_the_readme() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert [page.name for page in PAGES[1:] if f"(packaging/doc/{page.name})" not in readme] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_a_file(page: Path) -> None:
    for link in re.findall(r"\]\(([^)]+)\)", page.read_text(encoding="utf-8")):
        assert link.startswith("https://") or (page.parent / link).exists(), link


@pytest.mark.parametrize("page", [*PAGES, *MANUAL, CHANGES], ids=lambda page: page.name)
def test_commands_and_settings_exist(page: Path) -> None:
    """A command that was renamed, an option that is gone, a setting with another name: told by the page."""
    text = page.read_text(encoding="utf-8")
    assert [found for words in commands(text) if (found := wrong(words))] == []
    sections = Settings.model_fields
    for section, key in SETTING.findall(text):
        if section in sections:
            known = sections[section].annotation.model_fields  # type: ignore[union-attr]  # each is a section
            assert key in known, f"{section}.{key}"


@pytest.mark.parametrize("page", [*PAGES, *MANUAL], ids=lambda page: page.name)
def test_examples_are_in_form(page: Path) -> None:
    """A model.toml is a manifest, and Python can be compiled."""
    for language, code in re.findall(r"(?ms)^```(\w*)\n(.*?)^```", page.read_text(encoding="utf-8")):
        if language == "python":
            compile(code, page.name, "exec")
        elif "artefact = " in code:
            Manifest.model_validate(tomllib.loads(code))


def test_a_wrong_command_would_be_found() -> None:
    """The check itself: by command, group and option, and not by arguments."""
    text = (
        "`gpuinfer modle add x`, `gpuinfer model ad x`, `gpuinfer submit --wiat 1`, `gpuinfer submit --wait`"
    )
    assert [found for words in commands(text) if (found := wrong(words))] == [
        "modle",
        "ad",
        "gpuinfer submit --wiat",
    ]
