# SPDX-License-Identifier: Apache-2.0
"""The packages on a booted Debian."""
