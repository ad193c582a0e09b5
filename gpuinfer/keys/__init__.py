# SPDX-License-Identifier: Apache-2.0
"""Keys for the HTTP front: roles, limits and files."""
