# SPDX-License-Identifier: Apache-2.0
"""``gpuinfer doctor``: checks a host and prints a fix for each problem.

    cli ── registry (which checks there are) ── runner (all at once, each with a limit) ── report
                       │
                  one file a topic: functions of a Host that return Findings

The driver, which may hang for ever, is asked in a child process (``child``); CUDA and models in the workers'
sandbox (``gpuinfer.models.sandbox``).
"""
