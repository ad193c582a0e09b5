# SPDX-License-Identifier: Apache-2.0
"""The batcher of a worker, on a real Redis and with a real model, in this process."""
