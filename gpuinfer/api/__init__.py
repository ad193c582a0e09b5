# SPDX-License-Identifier: Apache-2.0
"""The HTTP front: takes requests in, hands task ids and results out. It knows no torch and no Celery."""
