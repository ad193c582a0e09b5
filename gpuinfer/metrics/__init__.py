# SPDX-License-Identifier: Apache-2.0
"""Numbers for monitoring systems: read from Redis, named, and shown as Prometheus reads them."""
