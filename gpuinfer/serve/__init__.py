# SPDX-License-Identifier: Apache-2.0
"""``gpuinfer serve``: one model, its own Redis, worker and front, until Ctrl-C."""
