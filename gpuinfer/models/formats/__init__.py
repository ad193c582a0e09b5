# SPDX-License-Identifier: Apache-2.0
"""The formats of artefacts: one module per format, imported only by the loader.

Each has ``read(folder, file, device)``, which returns a LoadedModel; ``file`` is the open and checked
artefact. The loader translates its errors.
"""
