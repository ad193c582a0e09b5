# SPDX-License-Identifier: Apache-2.0
"""Reports troubles to people: once when one begins, once when it ends."""
