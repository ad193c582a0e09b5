# SPDX-License-Identifier: Apache-2.0
"""A real Redis, real workers, the real API."""
