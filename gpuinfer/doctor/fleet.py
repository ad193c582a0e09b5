# SPDX-License-Identifier: Apache-2.0
"""The fleet's default model: is it set, and known."""

from __future__ import annotations

from gpuinfer.doctor.broker import asked
from gpuinfer.doctor.finding import Finding, error, ok, warning
from gpuinfer.doctor.host import Host
from gpuinfer.queue import catalogue


def default_model(host: Host) -> Finding:
    """The fleet has a default model, for requests that name none, and it is one that the fleet knows."""
    with asked(host) as client:
        fleet = catalogue.read(client)
    name, known = fleet.default_model, fleet.known
    if not known:
        return ok("the fleet knows no model yet; the first worker sets the default model")
    choose = f"gpuinfer model default {known[0]}"
    if not name:
        return warning("no default model is set: requests must name their model", choose)
    if name not in known:
        return error(
            f"the default model {name} is not in the catalogue ({', '.join(known)}): requests that name no "
            "model are refused",
            choose,
        )
    return ok(f"the default model is {name}, of {len(known)} that the fleet knows")
