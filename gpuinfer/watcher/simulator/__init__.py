# SPDX-License-Identifier: Apache-2.0
"""The very same policy in simulated time, beside what others do with the same load."""
