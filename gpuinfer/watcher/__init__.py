# SPDX-License-Identifier: Apache-2.0
"""The watcher: keeps as many workers running as the queues need, and can say why."""
