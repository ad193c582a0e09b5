# SPDX-License-Identifier: Apache-2.0
"""The worker: one process per GPU, Celery's solo pool, inference in its own thread."""
