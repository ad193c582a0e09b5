# SPDX-License-Identifier: Apache-2.0
"""Keys for the HTTP API: roles, limits and files."""
