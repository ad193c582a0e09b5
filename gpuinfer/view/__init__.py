# SPDX-License-Identifier: Apache-2.0
"""The state of the fleet on one screen: ``gpuinfer status``.

gather (Redis, the doctor's quick checks, systemd) ──► Facts ──► build (pure) ──► Status ──► screen, JSON
"""
