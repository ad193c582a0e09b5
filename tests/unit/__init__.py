# SPDX-License-Identifier: Apache-2.0
"""Pure logic, no service."""
