# SPDX-License-Identifier: Apache-2.0
"""What other clients rely on."""
