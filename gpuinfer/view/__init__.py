# SPDX-License-Identifier: Apache-2.0
"""What the fleet does, on one screen: ``gpuinfer status``.

gather (Redis, the doctor's quick checks, systemd) ──► Facts ──► build (pure) ──► Status ──► screen, JSON
"""
