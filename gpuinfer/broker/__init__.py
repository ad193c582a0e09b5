# SPDX-License-Identifier: Apache-2.0
"""Our own Redis instance: how much memory it takes, who may do what in it, and its start."""
