# SPDX-License-Identifier: Apache-2.0
"""The watcher's policy beside what others do with the same load, in simulated time."""
