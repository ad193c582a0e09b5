# SPDX-License-Identifier: Apache-2.0
"""``gpuinfer demo``: a private appliance in a temporary folder, a burst of requests, and the figures."""
