# SPDX-License-Identifier: Apache-2.0
"""Write random weights, always the same, into this folder."""

from __future__ import annotations

from pathlib import Path

import torch
from model import network

torch.manual_seed(1)
torch.save(network().state_dict(), Path(__file__).with_name("weights.pt"))
