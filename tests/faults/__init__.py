# SPDX-License-Identifier: Apache-2.0
"""Kills, full memory, garbage."""
