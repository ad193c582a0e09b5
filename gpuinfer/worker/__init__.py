# SPDX-License-Identifier: Apache-2.0
"""The worker: one process per GPU, Celery's solo pool, inference on a thread of its own."""
