# SPDX-License-Identifier: Apache-2.0
"""gpuinfer: a queue-backed inference appliance for GPU hosts."""

__version__ = "0.1.0"
