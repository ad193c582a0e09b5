# SPDX-License-Identifier: Apache-2.0
"""The parts of the check, in their order: each is a process of its own, with a limit of its own."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Part:
    """One part. ``arguments`` are those of ``python -m``."""

    name: str
    arguments: tuple[str, ...]
    #: Some three times what it should take: a part that hangs costs no more than this.
    limit_s: float


def _tests(name: str, limit_s: float) -> Part:
    """Return the part that runs one file of tests."""
    options = ("-m", "gpu", "-p", "no:cacheprovider", "-q", "--tb=short")
    file = f"tests/gpu/test_{name}.py"
    return Part(name=name, arguments=("pytest", *options, file), limit_s=limit_s)


def _figures(model: str, limit_s: float) -> Part:
    return Part(name=f"figures-{model}", arguments=("tests.gpu.figures", model), limit_s=limit_s)


#: The figures come last: they take longest, and mean little where the rest fails.
PARTS = (
    Part(name="about", arguments=("tests.gpu.about",), limit_s=90),
    _tests("binding", 60),
    _tests("tools", 60),
    _tests("worker", 75),
    _tests("dtypes", 60),
    _tests("copies", 60),
    _tests("python_models", 60),
    _tests("memory", 75),
    _tests("lost", 90),
    _figures("perceptron", 60),
    _figures("convnet", 100),
    _figures("encoder", 100),
)
#: All of it, unpacking included. Parts that have no time left are not run, which fails the check.
BUDGET_S = 400.0
