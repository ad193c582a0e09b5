# SPDX-License-Identifier: Apache-2.0
"""What packaging/ writes and decides without building: the manual pages, torch's wheels, versions in step."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import tomllib
import zipfile
from pathlib import Path
from types import ModuleType

import click
import pytest

from gpuinfer import __version__, errors
from gpuinfer.cli import COMMANDS, EXIT_BROKEN_PIPE, EXIT_INTERRUPTED, cli
from gpuinfer.models.manifest import Manifest
from gpuinfer.models.specs import AudioSpec, ImageSpec, InputSpec, OutputSpec

pytestmark = pytest.mark.unit

ROOT = Path(__file__).parents[2]
PACKAGING = ROOT / "packaging"
UNITS = {".service", ".socket", ".target"}
#: A line of a maintainer script that only tells, or is a comment.
SAYS = re.compile(r"\s*(#|echo |say )")


def script(name: str) -> ModuleType:
    """Import a script of packaging/, which is no package."""
    spec = importlib.util.spec_from_file_location(name, PACKAGING / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


manpages = script("manpages")
torch_wheel = script("torch_wheel")


def wheel(folder: Path, cuda: str, *requires: str) -> Path:
    """Write a wheel of torch with just what is looked at."""
    target = folder / "torch-2.13.0-cp311-cp311-manylinux_2_28_x86_64.whl"
    with zipfile.ZipFile(target, "w") as archive:
        archive.writestr("torch/version.py", f"debug = False\ncuda: Optional[str] = {cuda}\nhip = None\n")
        lines = "".join(f"Requires-Dist: {line}\n" for line in requires)
        archive.writestr("torch-2.13.0.dist-info/METADATA", f"Name: torch\n{lines}")
    return target


# -- manual pages -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The pages as a reader sees them, in lines of 100 columns, without a complaint of roff's."""
    if shutil.which("scdoc") is None and not os.environ.get("CI"):
        pytest.skip("scdoc is not installed")
    read = {}
    for name, source in manpages.sources(ROOT).items():
        file = tmp_path_factory.mktemp("man") / name
        file.write_text(manpages.roff(source))
        done = subprocess.run(
            ["groff", "-man", "-t", "-Tutf8", "-Kutf8", "-P-cbou", "-rLL=100n", "-ww", str(file)],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.stderr == "", name
        read[name] = done.stdout
    return read


def words(text: str) -> str:
    """Return a text as its words: no line breaks, and one form of what roff draws in its own way."""
    text = text.translate({ord("\b"): " ", 0x2010: "-", 0x2212: "-", 0x2018: "'", 0x2019: "'"})
    return " ".join(text.split())


def test_the_page_of_the_command_has_every_word_of_its_help(pages: dict[str, str]) -> None:
    """gpuinfer(1) is made from the same table as --help; what the help says is read there as it stands."""
    page = words(pages["gpuinfer.1"])
    top = click.Context(cli, info_name="gpuinfer")

    def check(command: click.Command, ctx: click.Context) -> None:
        assert f"{ctx.command_path} [OPTIONS]" in page
        for block in re.split(r"\n\s*\n", f"{command.help or ''}\n\n{command.epilog or ''}"):
            assert words(block) in page, ctx.command_path
        for parameter in command.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record and "--help" not in record[0]:
                assert words(f"{record[0]} {record[1]}") in page, ctx.command_path
        if isinstance(command, click.Group):
            for name in command.list_commands(ctx):
                below = command.get_command(ctx, name)
                assert below
                check(below, click.Context(below, info_name=name, parent=ctx))

    for name in COMMANDS:
        command = cli.get_command(top, name)
        assert command
        check(command, click.Context(command, info_name=name, parent=top))


def test_examples_keep_their_lines(pages: dict[str, str]) -> None:
    """Each can be copied from the page."""
    lines = [line.strip() for line in pages["gpuinfer.1"].splitlines()]
    assert "gpuinfer submit --wait '[[[0, 5, 13, 9, 1, 0, 0, 0], ...]]'" in lines
    assert "cat three.json | gpuinfer submit -" in lines


def test_no_name_is_hyphenated(pages: dict[str, str]) -> None:
    """A path, a unit or a setting can be copied from the page as a terminal of 100 columns shows it."""
    for name, page in pages.items():
        assert re.findall(r"\w+[\u2010\u00ad]$", page, re.M) == [], name


def test_examples_are_no_part_of_the_last_option(pages: dict[str, str]) -> None:
    """Their heading stands where paragraphs of the command do."""
    headings = re.findall(r"(?m)^( *)Examples?:$", pages["gpuinfer.1"])
    assert set(headings) == {" " * 7}


def test_settings_in_a_row_share_their_words() -> None:
    """Such as a bound of tasks, of their bytes and of their age."""
    made = "".join(manpages.settings_text(["[a]", "# Some `words`.", "#b = 1", "#c = 2", "", "#d = 3"]))
    assert made == "# [a]\n*b = 1*++\n*c = 2*\n\tSome *words*.\n*d = 3*\n\t\n"


def test_the_page_of_the_settings_names_every_setting_of_the_file(pages: dict[str, str]) -> None:
    """gpuinfer.toml(5) holds each setting with its default, and none without words."""
    uncommented = re.sub(r"(?m)^#(?=\w+ = )", "", (ROOT / "etc" / "gpuinfer.toml").read_text())
    for section, settings in tomllib.loads(uncommented).items():
        part = pages["gpuinfer.toml.5"].split(f"\n[{section}]\n", 1)[1]
        for name in settings:
            assert re.search(rf"(?m)^ +{name} = .*\n +\S", part), (section, name)


def test_the_page_of_a_model_names_every_key(pages: dict[str, str]) -> None:
    """gpuinfer-model(5) has what model.toml takes, and nothing else."""
    known = {
        field.alias or key
        for table in (Manifest, InputSpec, OutputSpec, ImageSpec, AudioSpec)
        for key, field in table.model_fields.items()
    }
    source = (ROOT / "packaging" / "man" / "gpuinfer-model.5.scd").read_text()
    keys = {
        key
        for line in re.findall(r"(?m)^(\*[a-z_]+\*(?:, \*[a-z_]+\*)*)$", source)
        for key in re.findall(r"\w+", line)
    }
    assert keys == known - {"inputs", "outputs", "image", "audio"}
    assert {"inputs", "outputs", "image", "audio"} <= set(re.findall(r"\[+(?:inputs\.)?(\w+)\]+", source))


def test_every_exit_code_is_documented() -> None:
    """gpuinfer(1) has the code of each error, and of the endings that are none."""
    ending = (ROOT / "packaging" / "man" / "gpuinfer.1.end").read_text().split("# ENVIRONMENT")[0]
    told = {int(code) for code in re.findall(r"\*(\d+)\*", ending)}
    codes = {
        error.exit_code
        for error in vars(errors).values()
        if isinstance(error, type) and issubclass(error, errors.GpuinferError)
    }
    assert codes <= told
    assert {os.EX_USAGE, os.EX_NOINPUT, EXIT_INTERRUPTED, EXIT_BROKEN_PIPE} <= told


def test_every_unit_is_documented(pages: dict[str, str]) -> None:
    """gpuinfer(7) names all of them."""
    for unit in (ROOT / "systemd").iterdir():
        if unit.suffix in UNITS:
            assert unit.name.replace("@", "@N") in pages["gpuinfer.7"], unit.name


def test_a_line_that_cannot_be_read_stops_the_build() -> None:
    """A settings file that has outgrown the script is an error, not a page with a hole."""
    with pytest.raises(ValueError, match="line 2 is no comment"):
        list(manpages.settings_text(["[api]", '  "b"]']))
    with pytest.raises(ValueError, match="Error at 1:4"):
        manpages.roff("no title\n")


def test_the_date_is_that_of_the_sources(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two builds of one commit write the same bytes."""
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "86400")
    assert '"1970-01-02"' in manpages.roff(manpages.header("x", 1, "y") + "# NAME\n")


# -- device nodes -------------------------------------------------------------------------


def make_nodes(folder: Path, driver: Path, *, fails: str = "never") -> tuple[int, list[str]]:
    """Run the script with an nvidia-modprobe that notes its calls, and may fail; return exit code, calls."""
    fake = folder / "nvidia-modprobe"
    fake.write_text(f'#!/bin/sh\necho "$@" >>{folder}/calls\n[ "$1" != {fails} ]\n')
    fake.chmod(0o755)
    done = subprocess.run(
        [str(ROOT / "systemd" / "make-device-nodes"), str(driver)],
        env={"PATH": f"{folder}:/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stderr == ""
    return done.returncode, (folder / "calls").read_text().splitlines()


def test_each_gpu_has_its_node_and_each_mig_instance(tmp_path: Path) -> None:
    """By the minors that the driver names; -u is a call of its own; a call that fails is not the last."""
    driver = tmp_path / "nvidia"
    for name, minor in (("0000:17:00.0", 3), ("0000:65:00.0", 12)):
        (driver / "gpus" / name).mkdir(parents=True)
        (driver / "gpus" / name / "information").write_text(
            f"Model: \t\t L4\nDevice Minor: \t {minor}\nX: 1\n"
        )
    for name in ("mig/config", "gpu0/mig/gi1/access"):
        (driver / "capabilities" / name).parent.mkdir(parents=True, exist_ok=True)
        (driver / "capabilities" / name).write_text("DeviceFileMinor: 1\nDeviceFileMode: 256\n")
    (driver / "capabilities" / "other").write_text("nothing\n")
    calls = ["-c 255", "-c 255 -c 3 -c 12", "-u -c 0"]
    calls += [f"-f {driver}/capabilities/{name}" for name in ("gpu0/mig/gi1/access", "mig/config")]
    assert make_nodes(tmp_path, driver) == (0, calls)
    (tmp_path / "calls").unlink()
    assert make_nodes(tmp_path, driver, fails="-u") == (1, calls)


def test_without_a_driver_nothing_but_its_module_is_asked_for(tmp_path: Path) -> None:
    """nvidia-modprobe may be there where no GPU is."""
    assert make_nodes(tmp_path, tmp_path / "none") == (0, ["-c 255", "-u -c 0"])


# -- torch's wheels -----------------------------------------------------------------------


@pytest.mark.parametrize(("cuda", "kind"), [("None", "cpu"), ("'13.0'", "cuda")])
def test_the_build_is_told_from_the_wheel_itself(tmp_path: Path, cuda: str, kind: str) -> None:
    """A file's name is no proof: an index of one's own may call either build torch-2.13.0."""
    assert torch_wheel.flavour(wheel(tmp_path, cuda)) == kind


def test_a_gpu_build_wants_its_libraries_beside_it(tmp_path: Path) -> None:
    """What is missing is named when the package is built, not when a worker starts."""
    file = wheel(
        tmp_path,
        "'13.0'",
        'nvidia-cublas==13.1; platform_system == "Linux"',
        'triton==3.5 ; platform_system == "Linux"',
        'nvidia-extra; extra == "more"',
        "sympy>=1.13",
    )
    (tmp_path / "nvidia_cublas-13.1-py3-none-manylinux_2_27_x86_64.whl").touch()
    assert torch_wheel.missing(file) == ["triton"]


# -- what the package does to a host ---------------------------------------------------------


def maintainer_script(name: str) -> str:
    return (PACKAGING / "debian" / f"gpuinfer.{name}").read_text()


@pytest.mark.parametrize("name", ["prerm", "postrm"])
def test_the_scripts_know_our_units_by_name(name: str) -> None:
    """All of systemd/ and nothing else: a pattern like gpuinfer-* would take an administrator's unit, too."""
    listed = re.search(r'(?m)^units="([^"]+)"', maintainer_script(name))
    assert listed
    files = [path.name for path in (ROOT / "systemd").glob("*.*") if path.suffix in UNITS]
    assert sorted(listed[1].split()) == sorted(file.replace("@.", "@*.") for file in files)


@pytest.mark.parametrize("name", ["preinst", "postinst", "prerm", "postrm"])
def test_the_scripts_touch_no_unit_of_others(name: str) -> None:
    """Every systemctl that changes something names units of ours; users are left to sysusers.d."""
    verbs = "start|stop|restart|try-restart|reload|kill|reset-failed|enable|disable|mask|unmask"
    script = "\n".join(line for line in maintainer_script(name).splitlines() if not SAYS.match(line))
    for found in re.finditer(rf"(?:systemctl|deb-systemd-invoke) (?:--?\S+ )*(?:{verbs}) (.*)", script):
        for word in re.findall(r"[^\s;|&'\")]+", re.split(r"\|\||&&|2>", found[1])[0]):
            # A variable of the scripts holds a unit that systemctl has listed by a pattern of ours.
            assert word.startswith(("gpuinfer.", "gpuinfer-", "--", "$unit")), found[0]
            assert not re.fullmatch(r"gpuinfer-?\*.*", word), found[0]
    assert not re.search(r"userdel|groupdel|useradd|adduser|sysctl|journald\.service", script)


def test_postinst_knows_the_words_of_a_host_without_its_own_redis() -> None:
    """The words that it looks for in what `gpuinfer redis local` says are the ones that it says."""
    words = re.findall(r"gpuinfer redis local 2>&1 \| grep -q '([^']+)'", maintainer_script("postinst"))
    assert len(words) == 1
    assert words[0] in (ROOT / "gpuinfer" / "broker" / "cli.py").read_text()


def test_the_licence_is_there_and_the_one_that_is_named() -> None:
    """Apache-2.0: the text itself, in pyproject.toml, and in both packages."""
    text = (ROOT / "LICENSE").read_text()
    assert "Apache License\n                           Version 2.0, January 2004" in text
    assert "END OF TERMS AND CONDITIONS" in text
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert (project["license"], project["license-files"]) == ("Apache-2.0", ["LICENSE"])
    for folder in ("debian", "debian-torch"):
        assert "License: Apache-2.0" in (PACKAGING / folder / "copyright").read_text()


# -- in step ------------------------------------------------------------------------------


def test_the_package_has_the_version_of_the_product() -> None:
    """The Debian changelog and the code name one version."""
    first = (PACKAGING / "debian" / "changelog").read_text().splitlines()[0]
    assert first.startswith(f"gpuinfer ({__version__}) ")


def test_the_packages_bound_each_other() -> None:
    """The torch that is installed beside is the one that this version was tested with, and the other way."""
    pin = re.search(r'torch_pin="torch==([\d.]+)"', (PACKAGING / "build-deb").read_text())
    assert pin
    major, minor, _ = pin[1].split(".")
    ours, torch = ((PACKAGING / folder / "control").read_text() for folder in ("debian", "debian-torch"))
    assert f" gpuinfer-torch-cpu (>= {pin[1]}) | gpuinfer-torch (>= {pin[1]}),\n" in ours
    above = f"(>= {major}.{int(minor) + 1}~)"
    assert f"Breaks: gpuinfer-torch-cpu {above}, gpuinfer-torch-cuda {above}\n" in ours
    assert torch.count(f"Breaks: gpuinfer (<< {__version__}~)\n") == 2


def test_one_torch_everywhere() -> None:
    """The lock, the environment, the package and its changelog speak of the same torch."""
    pins = {
        name: re.findall(r'"torch==([\d.]+)"', (PACKAGING / name).read_text())
        for name in ("lock", "setup-env", "build-deb")
    }
    packaged = re.match(r"gpuinfer-torch \(([\d.]+)-", (PACKAGING / "debian-torch" / "changelog").read_text())
    assert packaged
    assert set(map(tuple, pins.values())) == {(packaged[1],)}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["build-deb", "--torch", "rocm"], "--torch is cpu, cuda or none, not rocm"),
        (["build-deb", "--only", "torch", "--torch", "none"], "leaves nothing to build"),
        (["build-deb", "--wheels", "/nowhere"], "there is no such folder"),
        (["build-deb", "--out"], "--out needs a value"),
        (["build-repo", "one.deb"], "name the packages and a folder"),
        (["build-repo", "--sign"], "unknown option: --sign"),
    ],
)
def test_a_wrong_call_is_refused_before_any_work(tmp_path: Path, arguments: list[str], said: str) -> None:
    """Both programs say what is wrong, and have not written anything."""
    done = subprocess.run(
        [str(PACKAGING / arguments[0]), *arguments[1:]],
        cwd=tmp_path,
        env={"PATH": "/usr/bin:/bin", "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert said in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_the_packages_name_their_maintainers() -> None:
    """As the repository's authors are named: the same in both packages and their changelogs."""
    named = set()
    for package in ("debian", "debian-torch"):
        control = (PACKAGING / package / "control").read_text()
        named.add(re.findall(r"(?m)^Maintainer: (.+ <\S+@\S+>)$", control)[0])
        named |= set(
            re.findall(r"(?m)^ -- (.+ <\S+@\S+>)  ", (PACKAGING / package / "changelog").read_text())
        )
    (one,) = named
    assert "packages.example.org" not in one


def test_the_keys_are_the_fronts_alone() -> None:
    """No other unit's process can even look at them, whatever its user could."""
    for file in sorted((ROOT / "systemd").glob("*.service")):
        text = file.read_text()
        hidden = "InaccessiblePaths=-/etc/gpuinfer/keys.d\n" in text
        # The roll is root's own work, outside of any sandbox.
        assert hidden == (file.name not in ("gpuinfer-api.service", "gpuinfer-roll.service")), file.name
    assert (
        "d /etc/gpuinfer/keys.d 0750 root gpuinfer-api -\n"
        in (ROOT / "systemd" / "gpuinfer.tmpfiles").read_text()
    )
    assert " /etc/gpuinfer/keys.d " in (PACKAGING / "debian" / "gpuinfer.postrm").read_text()
