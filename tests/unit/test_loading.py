# SPDX-License-Identifier: Apache-2.0
"""What a worker says of models that it cannot load."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from gpuinfer.errors import ModelLoadError
from gpuinfer.models import words
from gpuinfer.settings import Settings
from gpuinfer.worker import loading
from tests.models_for_tests import python_model

pytestmark = pytest.mark.unit

_CODE = """
    class Mine:
        example = 0

        def load(self, ctx):
            {load}

        def predict(self, batch):
            {predict}
"""


@pytest.mark.parametrize(
    ("load", "predict", "line"),
    [("open('/nowhere')", "return batch", 6), ("pass", "return [1 / item for item in batch]", 9)],
)
def test_a_models_own_failure_is_logged_with_its_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, load: str, predict: str, line: int
) -> None:
    """Once, in load and in warm-up: the reason names one line, and the journal has how it came there."""
    python_model(tmp_path / "mine", _CODE.format(load=load, predict=predict))
    lines: list[dict[str, Any]] = []
    monkeypatch.setattr(
        loading.log, "error", lambda action, **fields: lines.append({"action": action, **fields})
    )
    monkeypatch.setattr(words, "adopt", lambda: None)
    settings = Settings.model_validate({"models": {"folders": [tmp_path]}, "worker": {"models": ["mine"]}})
    with pytest.raises(ModelLoadError, match=f"line {line}"):
        loading.load_models(settings, "cpu")
    (told,) = lines
    assert (told["action"], told["model"]) == ("model_failed", "mine")
    assert told["exc_info"][2] is not None
