# SPDX-License-Identifier: Apache-2.0
"""The front beside LitServe and mosec: same model, same run, load by wrk. ``python -m tests.bench.http``."""
