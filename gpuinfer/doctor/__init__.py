# SPDX-License-Identifier: Apache-2.0
"""``gpuinfer doctor``: checks a host and prints a fix for each problem.

cli ── registry (which checks there are) ── check (runs them at once, each with a limit)
                   │
              one file a topic: functions of a Host that return Findings
"""
