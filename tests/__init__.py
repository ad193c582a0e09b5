# SPDX-License-Identifier: Apache-2.0
"""The tests: unit, integration, faults, contract; shared services in ``tests.services``."""
