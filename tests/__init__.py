# SPDX-License-Identifier: Apache-2.0
"""Tests: unit, contract, integration, host, faults, bench."""
