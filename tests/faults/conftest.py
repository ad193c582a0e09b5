# SPDX-License-Identifier: Apache-2.0
"""Fixtures of the fault tests: the same as the integration tests'."""

from __future__ import annotations

from tests.integration.conftest import client, workers

__all__ = ["client", "workers"]
