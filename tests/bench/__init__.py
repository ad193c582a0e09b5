# SPDX-License-Identifier: Apache-2.0
"""gpuinfer beside stock Celery, in one run: ``python -m tests.bench``. Not timed tests."""
