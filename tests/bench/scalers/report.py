# SPDX-License-Identifier: Apache-2.0
"""What came of a comparison: a table, JSON, and on each trace whether ours is twice as good, or why not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from statistics import median_low
from typing import Any

from gpuinfer.watcher.simulator.report import table as simulated
from gpuinfer.watcher.simulator.report import to_dict
from gpuinfer.watcher.simulator.run import Outcome, Scenario

#: What ours must reach: this share of the best peer's p99 waiting time, at no more GPU-seconds.
GOAL = 0.5


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """How ours compares with the best of the others: the one with the lowest p99 waiting time."""

    met: bool
    best: str
    p99_ratio: float | None
    gpu_ratio: float
    why: str


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """All players on one trace."""

    scenario: Scenario
    ours: Outcome
    peers: Sequence[Outcome]
    bound: Outcome

    @property
    def outcomes(self) -> list[Outcome]:
        """Return all, ours first and the bound last."""
        return [self.ours, *self.peers, self.bound]

    def verdict(self) -> Verdict:
        """Compare ours with the best of the others."""
        best = min(self.peers, key=lambda peer: (peer.p99_s, peer.gpu_s))
        met = self.ours.p99_s <= GOAL * best.p99_s and self.ours.gpu_s <= best.gpu_s
        return Verdict(
            met=met,
            best=best.policy,
            p99_ratio=round(self.ours.p99_s / best.p99_s, 3) if best.p99_s else None,
            gpu_ratio=round(self.ours.gpu_s / best.gpu_s, 3) if best.gpu_s else 0.0,
            why="" if met else self._why_not(best),
        )

    def _why_not(self, best: Outcome) -> str:
        """Say what stands in the way: physics, or what the other one spends."""
        spent = (
            f"{best.policy} has {best.p99_s:.2f} s for {best.gpu_s:.0f} GPU-s, ours {self.ours.p99_s:.2f} s "
        )
        spent += f"for {self.ours.gpu_s:.0f}"
        reasons = [spent]
        batch_s = self.scenario.model.batch_s(self.scenario.model.max_batch)
        if best.p99_s <= batch_s:
            reasons.append(
                f"that is less than a full batch takes ({batch_s:.2f} s): there is no wait to halve"
            )
        elif self.bound.p99_s > GOAL * best.p99_s:
            reasons.append(
                f"half of it nobody could reach who does not know the future: all {self.scenario.gpus} GPUs, "
                f"started when the first task waits and never stopped, have {self.bound.p99_s:.2f} s"
            )
        if self.scenario.floor == 0 and best.policy in ("tutorial", "hpa"):
            reasons.append(f"{best.policy} keeps a worker for which a floor of 0 does not ask")
        if self.ours.gpu_s > best.gpu_s:
            reasons.append(f"ours spent {self.ours.gpu_s / best.gpu_s - 1:.0%} more GPU-seconds")
        elif len(reasons) == 1 and self.ours.p99_s < best.p99_s:
            startup_s = self.scenario.model.startup_s
            reasons.append(
                f"less of both, but not half: what is started when it is needed takes {startup_s:g} s"
            )
        elif len(reasons) == 1:
            reasons.append("it paid with more GPU-seconds, which ours did not spend")
        return "; ".join(reasons)

    def to_dict(self) -> dict[str, Any]:
        """Return it for JSON, without the time line."""
        return {**to_dict(self.scenario, self.outcomes), "verdict": asdict(self.verdict())}


def comparison(scenario: Scenario, outcomes: Sequence[Outcome]) -> Comparison:
    """Name the outcomes of ``players.compare``."""
    return Comparison(scenario=scenario, ours=outcomes[0], peers=outcomes[1:-1], bound=outcomes[-1])


def medians(runs: Sequence[Comparison]) -> Comparison:
    """Return the comparison of what one trace came to with several seeds: the median of each figure."""
    players = zip(*(one.outcomes for one in runs), strict=True)
    middle = [_median(outcomes) for outcomes in players]
    return comparison(runs[0].scenario, middle)


def _median(outcomes: Sequence[Outcome]) -> Outcome:
    names = [field.name for field in fields(Outcome) if field.name not in ("policy", "probes")]
    values = {name: median_low([getattr(outcome, name) for outcome in outcomes]) for name in names}
    return replace(outcomes[0], **values)


def table(comparisons: Sequence[Comparison]) -> str:
    """Return all as text: for each trace a block of lines, then what was reached."""
    blocks = [_block(one) for one in comparisons]
    return "\n\n".join([*blocks, summary(comparisons)])


def _block(one: Comparison) -> str:
    verdict = one.verdict()
    tail = f"  => {_ratios(verdict)}" if verdict.met else f"  => not reached: {verdict.why}"
    return f"{simulated(one.scenario, one.outcomes)}\n{tail}"


def _ratios(verdict: Verdict) -> str:
    waits = "no wait" if verdict.p99_ratio is None else f"{verdict.p99_ratio:.0%} of the p99 waiting time"
    return f"{waits} of the best other ({verdict.best}), {verdict.gpu_ratio:.0%} of its GPU-seconds"


def summary(comparisons: Sequence[Comparison]) -> str:
    """Return in how many traces the goal was reached."""
    met = sum(one.verdict().met for one in comparisons)
    goal = "p99 waiting time at most half of the best other's, at no more GPU-seconds"
    return f"{goal}: reached on {met} of {len(comparisons)} traces"


def markdown(comparisons: Sequence[Comparison]) -> str:
    """Return one line a trace: p99 waiting time and GPU-seconds of each policy, and where the goal is met.

    Below them, why it is not elsewhere.
    """
    names = [outcome.policy for outcome in comparisons[0].outcomes]
    lines = [
        f"| p99 s / GPU-s | {' | '.join(names)} | |",
        f"|---|{'---:|' * len(names)}---|",
    ]
    for one in comparisons:
        cells = [f"{outcome.p99_s:.2f} / {outcome.gpu_s:,.0f}" for outcome in one.outcomes]
        lines.append(f"| {one.scenario.name} | {' | '.join(cells)} | {'yes' if one.verdict().met else ''} |")
    reasons = [f"- {one.scenario.name}: {one.verdict().why}" for one in comparisons if not one.verdict().met]
    return "\n".join([*lines, "", summary(comparisons), *([""] if reasons else []), *reasons])
