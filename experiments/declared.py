"""Ablations that say beforehand what they ask, and stop when an interval has the answer or the budget is spent."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from analysis.anytime import anytime_interval, forecast, judge
from engine.records import read_records
from engine.run_log import finite
from engine.runs.run_directory import ENVIRONMENT
from engine.whole_files import replacing
from experiments.comparison import SEED, value_of
from experiments.plan import Plan, PlannedRun
from experiments.runs import read_run

VERDICT = "verdict.json"
Finding = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Declaration:
    """What an ablation asks, written down in its sweep file before the first run."""

    hypothesis: str
    """What is expected, in words."""
    smallest_effect: float
    """Smallest difference of the metric that would matter, in its unit (AP: percent)."""
    budget: int
    """Most seeds; each is a run of the baseline and one of every variant, on the same random numbers."""
    metric: str = "AP"
    """Metric of the last evaluation."""
    confidence: float = 0.95
    """Probability with which no verdict of the ablation is wrong, shared out among its variants."""

    def __post_init__(self) -> None:
        if self.smallest_effect <= 0 or self.budget < 2 or not 0 < self.confidence < 1:
            raise ValueError("smallest_effect must be positive, budget at least 2, and confidence between 0 and 1")


def decide(
    plan: Plan, declared: Declaration, run_all: Callable[[Sequence[PlannedRun]], bool], say: Callable[[str], None]
) -> list[Finding] | None:
    """Run seed after seed until every variant is settled or the budget is spent.

    Each variant is compared with the baseline at 1 − (1 − confidence) / variants, so that together they are wrong no
    more often than declared; one that is settled is run no more.

    Args:
        plan: of all seeds, of named variants, with a baseline.
        declared: what is asked.
        run_all: runs what is not done of some runs; False where one of them failed.
        say: is given a line after each seed.

    Returns:
        The findings by variant, ready for JSON; None where a run failed.
    """
    by_seed: dict[int, dict[str | None, PlannedRun]] = {}
    for run in plan.runs:
        given = next(text for text in run.overrides if text.startswith(f"{SEED}="))
        by_seed.setdefault(int(given.removeprefix(f"{SEED}=")), {})[run.variant] = run
    variants = [variant for variant in by_seed[min(by_seed)] if variant != plan.baseline]
    confidence = 1 - (1 - declared.confidence) / len(variants)
    findings: dict[str | None, Finding] = {v: {"differences": [], "verdict": "undecided"} for v in variants}
    for seed, runs in sorted(by_seed.items()):
        undecided = [variant for variant in variants if findings[variant]["verdict"] == "undecided"]
        if undecided and not run_all([runs[variant] for variant in (plan.baseline, *undecided)]):
            return None
        for variant in undecided:
            one, base = (_value(plan, runs[name], declared.metric) for name in (variant, plan.baseline))
            differences = [*findings[variant]["differences"], one - base]
            interval = anytime_interval(differences, confidence)
            verdict = judge(interval, declared.smallest_effect)
            more = forecast(differences, confidence, declared.smallest_effect) if verdict == "undecided" else 0
            findings[variant] = {
                "variant": variant, "verdict": verdict, **interval._asdict(), "confidence": confidence,
                "differences": differences, "more_seeds": more,
            }  # fmt: skip
            say(f"seed {seed}: {sentence(findings[variant], plan.baseline, declared.metric)}")
    return list(findings.values())


def sentence(finding: Finding, baseline: str | None, metric: str) -> str:
    """Put a finding into words."""
    interval = f"{finding['difference']:+.2f} [{finding['low']:+.2f}, {finding['high']:+.2f}]"
    text = f"{finding['variant']} against {baseline}: {finding['verdict']}; {metric} {interval}"
    text += f" after {len(finding['differences'])} seeds"
    if finding["verdict"] != "undecided":
        return text
    more = finding["more_seeds"]
    return f"{text}; about {more} more would decide" if more else f"{text}; how many more is not to be foreseen"


def write_verdict(plan: Plan, declared: Declaration, findings: Sequence[Finding], command: str) -> Path:
    """Write what was asked and found, with environment, hashes of the annotations, and the command that repeats it."""
    first = read_run(plan.directory(plan.runs[0]))
    files = [first.config["data"][split]["annotations"] for split in ("train", "val")]
    content = {
        **vars(declared), "findings": findings, "baseline": plan.baseline, "cfg": str(plan.cfg), "command": command,
        "overrides": {run.variant: run.overrides for run in reversed(plan.runs)},
        "data_sha256": {file: hashlib.sha256(Path(file).read_bytes()).hexdigest() for file in files},
        "environment": (read_records(first.directory / ENVIRONMENT) or [{}])[-1],
    }  # fmt: skip
    with replacing(plan.out / VERDICT) as temporary:
        temporary.write_text(json.dumps(finite(content), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return plan.out / VERDICT


def _value(plan: Plan, planned: PlannedRun, metric: str) -> float:
    run = read_run(plan.directory(planned), plan.outcome_file(planned))
    value = value_of(run, metric, "last")
    if value is None:
        raise ValueError(f"{run.directory}: its last evaluation has no {metric}, so that nothing can be compared")
    return value
