# SPDX-License-Identifier: Apache-2.0
"""This host's own Redis: its memory, its durability, the rights of its users, and its start."""
