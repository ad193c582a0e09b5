# SPDX-License-Identifier: Apache-2.0
"""``gpuinfer serve``: runs one model with its own Redis, worker and API, until Ctrl-C."""
