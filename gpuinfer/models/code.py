# SPDX-License-Identifier: Apache-2.0
"""Imports a Python model's file and finds its model class."""

from __future__ import annotations

import re
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from gpuinfer.errors import ModelLoadError
from gpuinfer.models.blame import FAILURES, blame
from gpuinfer.models.manifest import Manifest
from gpuinfer.models.repository import ModelFolder


def run_file(folder: ModelFolder, file: BinaryIO) -> types.ModuleType:
    """Run the verified file as a module with a unique name."""
    name = "gpuinfer_model_" + re.sub(r"\W", "_", folder.manifest.name)
    module = types.ModuleType(name)
    module.__file__ = str(folder.artefact)
    sys.modules[name] = module  # annotations are looked up there
    try:
        exec(compile(file.read(), str(folder.artefact), "exec"), module.__dict__)  # noqa: S102
    except FAILURES as exc:
        del sys.modules[name]
        raise blame(exc, folder.path, f"{folder.artefact.name} cannot be imported", ModelLoadError) from exc
    return module


@contextmanager
def importing(folder: Path) -> Iterator[None]:
    """Let a model import modules from its folder, without writing bytecode there.

    Afterwards these modules are private to the model: another model's ``utils`` is a different module.
    Modules that it imports later, while it runs, are found after all installed packages.
    """
    before = set(sys.modules)
    sys.path.insert(0, str(folder))
    sys.dont_write_bytecode = True  # permanently, because later imports would change its digest, too
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        if str(folder) not in sys.path:
            sys.path.append(str(folder))
        for name in set(sys.modules) - before:
            place = getattr(sys.modules[name], "__file__", None) or ""
            if Path(place).is_relative_to(folder) and not name.startswith("gpuinfer_model_"):
                del sys.modules[name]


def class_of(module: types.ModuleType, manifest: Manifest) -> type:
    """Return the model's class: the one named in the manifest, or the only one with a method predict."""
    found = {
        name: one
        for name, one in vars(module).items()
        if isinstance(one, type) and one.__module__ == module.__name__
    }
    able = {name: one for name, one in found.items() if callable(getattr(one, "predict", None))}
    wanted = manifest.class_name
    if wanted is not None:
        if wanted not in able:
            lacking = "has no method predict" if wanted in found else "is not in the file"
            known = ", ".join(able) or "no class has one"
            raise ModelLoadError(f"class = {wanted!r} {lacking}; classes with a method predict: {known}")
        return able[wanted]
    if len(able) != 1:
        said = f"{', '.join(able)}: name one of them as class in model.toml" if able else "there is none"
        raise ModelLoadError(f"{manifest.artefact} must have one class with a method predict; {said}")
    (cls,) = able.values()
    return cls
