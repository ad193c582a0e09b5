# SPDX-License-Identifier: Apache-2.0
"""The watcher's policy in simulated time, with failures, and what is done by hand."""
