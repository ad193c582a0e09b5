# SPDX-License-Identifier: Apache-2.0
"""The HTTP API: accepts requests, returns task ids and results. It imports neither torch nor Celery."""
