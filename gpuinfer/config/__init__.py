# SPDX-License-Identifier: Apache-2.0
"""``gpuinfer config``: what is set, what of it does nothing, and what to restart for it."""
