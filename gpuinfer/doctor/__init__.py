# SPDX-License-Identifier: Apache-2.0
"""``gpuinfer doctor``: looks a host over, and names for what is wrong the command that mends it.

    cli ── registry (which checks there are) ── runner (all at once, each with a limit) ── report
                       │
                  one file a topic: functions of a Host that return Findings

What may hang for ever, a driver above all, is asked in a child process (``child``, ``probe``).
"""
