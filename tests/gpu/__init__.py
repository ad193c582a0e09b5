# SPDX-License-Identifier: Apache-2.0
"""The check on a real GPU: ``pack`` collects what a bare machine lacks, ``run`` runs the suite there.

    pack (here, with the package registries) ─► kit ─► run (there, without a network) ─► table, JSON, log

What runs before the kit is unpacked (``running``, ``kit``, ``limited``, ``parts``, ``report``) needs the
standard library alone.
"""
