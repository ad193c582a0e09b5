# SPDX-License-Identifier: Apache-2.0
"""Tells people of trouble: once when it begins, once when it ends."""
