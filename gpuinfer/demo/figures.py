# SPDX-License-Identifier: Apache-2.0
"""Figures from the answers: accuracy, throughput, latency and differences. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from gpuinfer.demo.load import TIERS, Answer, Tier

#: Maximum number of differences shown.
SHOWN = 10
Results = Sequence[dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class TierFigures:
    """The figures of one tier. Latencies are in milliseconds, of answered requests only."""

    tier: Tier
    requests: int
    failed: int
    images: int
    correct: int
    #: Images whose class differs from that of the direct call.
    differing: int
    seconds: float
    p50_ms: float
    p99_ms: float

    @property
    def accuracy(self) -> float:
        return self.correct / self.images if self.images else 0.0

    @property
    def images_per_s(self) -> float:
        return self.images / self.seconds if self.seconds else 0.0

    @property
    def equal(self) -> bool:
        """Whether every request was answered, with the class of the direct call."""
        return self.requests > 0 and self.failed == 0 and self.differing == 0


@dataclass(frozen=True, kw_only=True)
class Figures:
    """What the demo measured."""

    test_images: int
    #: Test images that the direct call classifies correctly.
    direct_correct: int
    tiers: tuple[TierFigures, ...]
    #: The largest difference between a confidence and that of the direct call.
    confidence_difference: float
    batches: int
    mean_batch_size: float
    devices: tuple[str, ...]
    workers: int
    differences: tuple[str, ...]

    @property
    def direct_accuracy(self) -> float:
        return self.direct_correct / self.test_images

    @property
    def ok(self) -> bool:
        return all(tier.equal for tier in self.tiers)

    def as_dict(self) -> dict[str, Any]:
        """Return the figures for JSON, including derived values."""
        body = asdict(self)
        body["direct_accuracy"] = round(self.direct_accuracy, 6)
        body["ok"] = self.ok
        for entry, tier in zip(body["tiers"], self.tiers, strict=True):
            entry["accuracy"] = round(tier.accuracy, 6)
            entry["images_per_s"] = round(tier.images_per_s, 1)
            entry["equals_direct"] = tier.equal
        body["tiers"] = {entry.pop("tier"): entry for entry in body["tiers"]}
        return body


def percentile(values: Iterable[float], share: float) -> float:
    """Return the nearest-rank percentile: the smallest value that at least ``share`` of them do not exceed.

    0.0 if there are no values.
    """
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)] if ordered else 0.0


def figures(
    answers: Sequence[Answer],
    labels: Sequence[int],
    direct: Results,
    batches: Sequence[dict[str, Any]],
    workers: int,
) -> Figures:
    """Compute the figures from the answers, the true labels, and the results of the direct call.

    ``batches`` are the workers' ``batch_done`` log lines.
    """
    sizes = [int(entry["batch_size"]) for entry in batches]
    return Figures(
        test_images=len(labels),
        direct_correct=sum(r["class"] == label for r, label in zip(direct, labels, strict=True)),
        tiers=tuple(_tier(tier, answers, labels, direct) for tier in TIERS),
        confidence_difference=max(
            (abs(result["confidence"] - direct[image]["confidence"]) for image, result in _pairs(answers)),
            default=0.0,
        ),
        batches=len(sizes),
        mean_batch_size=round(sum(sizes) / len(sizes), 2) if sizes else 0.0,
        devices=tuple(sorted({str(result.get("device")) for _, result in _pairs(answers)})),
        workers=workers,
        differences=tuple(_differences(answers, labels, direct)),
    )


def _pairs(answers: Iterable[Answer]) -> Iterable[tuple[int, dict[str, Any]]]:
    for answer in answers:
        if not answer.error:
            yield from zip(answer.images, answer.results, strict=True)


def _tier(tier: Tier, answers: Sequence[Answer], labels: Sequence[int], direct: Results) -> TierFigures:
    mine = [answer for answer in answers if answer.tier == tier]
    good = [answer for answer in mine if not answer.error]
    pairs = list(_pairs(good))
    begun = min((answer.begun for answer in mine), default=0.0)
    ended = max((answer.ended for answer in mine), default=0.0)
    return TierFigures(
        tier=tier,
        requests=len(mine),
        failed=len(mine) - len(good),
        images=len(pairs),
        correct=sum(result["class"] == labels[image] for image, result in pairs),
        differing=sum(result["class"] != direct[image]["class"] for image, result in pairs),
        seconds=round(ended - begun, 3),
        p50_ms=round(percentile((answer.seconds for answer in good), 0.50) * 1e3, 2),
        p99_ms=round(percentile((answer.seconds for answer in good), 0.99) * 1e3, 2),
    )


def _differences(answers: Sequence[Answer], labels: Sequence[int], direct: Results) -> list[str]:
    """Return a line for each distinct error and difference, at most ``SHOWN``."""
    found = dict.fromkeys(f"{answer.tier}: {answer.error}" for answer in answers if answer.error)
    for answer in answers:
        for image, result in _pairs([answer]):
            if result["class"] != direct[image]["class"]:
                found[
                    f"image {image} (a {labels[image]}): {result['class']} through {answer.tier}, "
                    f"{direct[image]['class']} directly"
                ] = None
    return list(found)[:SHOWN]
