# SPDX-License-Identifier: Apache-2.0
"""Metrics for monitoring systems: read from Redis and exposed in Prometheus's format."""
