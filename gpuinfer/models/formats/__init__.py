# SPDX-License-Identifier: Apache-2.0
"""How each format of artefact becomes a LoadedModel: one module a format, imported by the loader alone.

Each has ``read(folder, file, device)``: ``file`` is the artefact, open and checked. What it raises is
translated by the loader.
"""
