# SPDX-License-Identifier: Apache-2.0
"""The Open Inference Protocol, version 2, over HTTP: what Triton, KServe and their clients speak.

``routes`` knows the paths, ``requests`` reads a request's tensors, ``inputs`` makes a task's inputs of them,
``outputs`` makes tensors of its result, ``infer`` does all of it in turn, ``errors`` says what went wrong.
"""
