# SPDX-License-Identifier: Apache-2.0
"""The Open Inference Protocol, version 2, over HTTP, as used by Triton, KServe and their clients.

``routes`` handles the paths, ``requests`` parses tensors, ``inputs`` converts them to a task's inputs,
``outputs`` converts its result to tensors, ``infer`` combines them, ``errors`` maps errors.
"""
