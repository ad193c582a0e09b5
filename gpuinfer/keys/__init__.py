# SPDX-License-Identifier: Apache-2.0
"""Keys: who may use this host's front from a network, and how much."""
