# SPDX-License-Identifier: Apache-2.0
"""Models: what a model folder says, where it lies, how its inputs become arrays and its outputs JSON.

Nothing here imports torch before a model is loaded, so that a front without torch's two seconds of
start-up can list models and check inputs.
"""
