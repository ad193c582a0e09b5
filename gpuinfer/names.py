# SPDX-License-Identifier: Apache-2.0
"""The names of queues and models. It imports nothing else, so that shell completion is quick."""

from __future__ import annotations

import re
from typing import Literal

QueueName = Literal["realtime", "default", "batch"]
#: The queues, the most urgent first.
QUEUES: tuple[QueueName, ...] = ("realtime", "default", "batch")
#: What a model may be called.
MODEL_NAME = re.compile(r"[a-z0-9][a-z0-9_.-]{0,63}")
