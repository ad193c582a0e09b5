# SPDX-License-Identifier: Apache-2.0
"""Removes padding from outputs: finds the dimensions that grow with the batch's longest item."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

from gpuinfer.errors import DeviceOutOfMemory, InferenceError
from gpuinfer.models.manifest import Manifest
from gpuinfer.models.specs import FREE
from gpuinfer.models.tensors import Array, Item

#: (output, its dimension) -> (input, its dimension) of the same length.
Cuts = Mapping[tuple[int, int], tuple[int, int]]
_Forward = Callable[[Sequence[Item]], Sequence[tuple[Array, ...]]]


def learn(manifest: Manifest, item: Item, forward: _Forward) -> tuple[Cuts, list[str]]:
    """Run ``item`` alone and together with longer ones, and compare the shapes of its outputs.

    Returns the dimensions to cut, and the names of outputs that keep their padding: their length does not
    match any input's, or the model does not accept a longer item.
    """
    cuts: dict[tuple[int, int], tuple[int, int]] = {}
    kept: set[int] = set()
    try:
        (alone,) = forward([item])
        for places, longer in longer_items(manifest, item):
            padded = forward([item, longer])[0]
            for output, (one, other) in enumerate(zip(alone, padded, strict=True)):
                for axis, (length, grown) in enumerate(zip(one.shape, other.shape, strict=True)):
                    if length == grown:
                        continue
                    source, its_axis = places[0]
                    wanted = item[source].shape[its_axis]
                    if (length, grown) == (wanted, 2 * wanted):
                        cuts[output, axis] = places[0]
                    else:
                        kept.add(output)
    except (InferenceError, DeviceOutOfMemory):
        return {}, [spec.name for spec in manifest.outputs]
    return cuts, [manifest.outputs[output].name for output in sorted(kept)]


def longer_items(manifest: Manifest, item: Item) -> Iterator[tuple[list[tuple[int, int]], Item]]:
    """Yield, for each free dimension, its positions, and the item with twice that length.

    The first free dimension of all inputs is taken to be the same, as in tokens and their mask; so is the
    second one.
    """
    free = [[axis for axis, length in enumerate(s.shape) if length == FREE] for s in manifest.inputs]
    for number in range(max(map(len, free), default=0)):
        places = [(source, axes[number]) for source, axes in enumerate(free) if number < len(axes)]
        longer = list(item)
        for source, axis in places:
            longer[source] = np.concatenate([item[source]] * 2, axis=axis)
        yield places, tuple(longer)


def cut_back(cuts: Cuts, item: Item, output: tuple[Array, ...]) -> tuple[Array, ...]:
    """Return one item's outputs from a padded batch without the padding."""
    found = list(output)
    for (number, axis), (source, its_axis) in cuts.items():
        keep = slice(item[source].shape[its_axis])
        found[number] = found[number][(*(slice(None),) * axis, keep)]
    return tuple(found)
