# SPDX-License-Identifier: Apache-2.0
"""Write random weights, always the same, into this folder."""

from __future__ import annotations

from pathlib import Path

import torch
from model import Encoder

torch.manual_seed(2)
torch.save(Encoder().state_dict(), Path(__file__).with_name("weights.pt"))
