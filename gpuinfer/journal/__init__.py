# SPDX-License-Identifier: Apache-2.0
"""The journal: how a log line becomes an entry, how entries are sent, and how they are read."""
