# SPDX-License-Identifier: Apache-2.0
"""The queue: what is submitted, how it waits in Redis, how a worker claims and settles it."""
