"""Declared ablations: they stop when they know, say what they know, and what it would take to know more."""

from __future__ import annotations

import fnmatch
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from experiments.declared import Declaration, decide, sentence
from experiments.plan import Plan, PlannedRun
from experiments.sweep_file import read_sweep
from tools import ablate

DECLARED = Declaration(hypothesis="b is better than a", smallest_effect=1.0, budget=8)
NOISE = (0.3, -0.2, 0.1, -0.3, 0.2, 0.0, -0.1, 0.3)


def plan_of(out: Path, variants: Sequence[str]) -> Plan:
    runs = [PlannedRun(f"{v}_seed-{s}", v, (f"x={v}", f"seed={s}")) for s in range(8) for v in variants]
    return Plan(Path("run.yaml"), out, "a", tuple(runs))


def decided(
    tmp_path: Path, write_run: Any, effects: dict[str, list[float]]
) -> tuple[list[dict[str, Any]] | None, list[str]]:
    """Findings where variant v is better than a by effects[v][seed], and the names of the runs."""
    ran: list[str] = []

    def run_all(runs: Sequence[PlannedRun]) -> bool:
        for run in runs:
            seed = int(run.name[-1])
            ap = 30.0 + 5 * NOISE[seed] + (0 if run.variant == "a" else effects[str(run.variant)][seed])
            write_run(tmp_path / run.name, {"seed": seed}, [ap])
            ran.append(run.name)
        return "failing" not in effects or len(ran) < 6

    return decide(plan_of(tmp_path, ["a", *effects]), DECLARED, run_all, lambda text: None), ran


def test_what_is_settled_is_run_no_more_and_what_is_not_goes_on(tmp_path, write_run):
    effects = {"b": [4 + n for n in NOISE], "c": [n / 4 for n in NOISE], "d": [10 * n for n in NOISE]}
    findings, ran = decided(tmp_path, write_run, effects)
    assert findings is not None
    assert [f["verdict"] for f in findings] == ["helps", "too small to matter", "undecided"]
    counts = [len(f["differences"]) for f in findings]
    assert counts[0] < 8
    assert counts == [sum(name.startswith(v) for name in ran) for v in "bcd"]
    assert findings[0]["confidence"] == pytest.approx(1 - 0.05 / 3)
    assert findings[0]["differences"] == pytest.approx(effects["b"][: counts[0]])
    assert findings[2]["more_seeds"] > 0
    assert "about" in sentence(findings[2], "a", "AP")
    assert sentence(findings[0], "a", "AP").startswith("b against a: helps; AP +3.97 [")


def test_a_failed_run_decides_nothing(tmp_path, write_run):
    assert decided(tmp_path, write_run, {"failing": [0.0] * 8})[0] is None


SWEEP = """
cfg: run.yaml
baseline: focal
variants: {focal: {criterion.classification: focal}, align: {criterion.classification: ia_bce}}
declared: {hypothesis: IA-BCE is better, smallest_effect: 1, budget: 6}
"""
PROGRAM = """
import json, sys, yaml
from pathlib import Path
values = dict(text.split("=", 1) for text in sys.argv[1:] if "=" in text)
seed, out = int(values["seed"]), Path(values["output_dir"])
out.mkdir(parents=True)
data = {split: {"annotations": f"{split}.json"} for split in ("train", "val")}
(out / "config.yaml").write_text(yaml.safe_dump({"seed": seed, "data": data, "schedule": {"steps": 5}}))
ap = 20 + seed + (5 + seed / 50 if values["criterion.classification"] == "ia_bce" else 0)
lines = [{"kind": "train", "step": 5, "epoch": 1}, {"kind": "eval", "step": 5, "epoch": 1, "AP": ap}]
(out / "metrics.jsonl").write_text("".join(json.dumps(line) + "\\n" for line in lines))
(out / "environment.jsonl").write_text(json.dumps({"commit": "abc", "devices": ["CPU"]}) + "\\n")
"""
RUN = "data: {train: {images: a, annotations: train.json}, val: {images: c, annotations: val.json}}\n"


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name, text in {
        "run.yaml": RUN,
        "sweep.yaml": SWEEP,
        "main.py": PROGRAM,
        "train.json": "1",
        "val.json": "2",
    }.items():
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(ablate, "MAIN", tmp_path / "main.py")
    return tmp_path


def test_the_verdict_says_all_that_is_needed_to_repeat_it(folder, capsys):
    assert ablate.main(["--sweep", "sweep.yaml", "optimizer.lr=1e-3", "--out", "runs/a"]) == 0
    said = capsys.readouterr().out
    assert "IA-BCE is better\nalign against focal: helps; AP +5.0" in said
    verdict = json.loads((folder / "runs/a/verdict.json").read_text())
    (finding,) = verdict["findings"]
    assert finding["verdict"] == "helps"
    assert finding["differences"] == pytest.approx([5 + seed / 50 for seed in range(len(finding["differences"]))])
    assert 3 <= len(finding["differences"]) < 6
    assert len(list((folder / "runs/a").glob("*_seed-*"))) == 2 * len(finding["differences"])
    assert verdict["data_sha256"]["val.json"] == hashlib.sha256(b"2").hexdigest()
    assert verdict["environment"] == {"commit": "abc", "devices": ["CPU"]}
    assert verdict["command"] == "python -m tools.ablate --sweep sweep.yaml optimizer.lr=1e-3 --out runs/a"
    assert "criterion.classification=ia_bce" in verdict["overrides"]["align"]
    assert (verdict["hypothesis"], verdict["smallest_effect"], verdict["budget"]) == ("IA-BCE is better", 1, 6)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("budget: 6", "budget: 1", "sweep.yaml: declared: smallest_effect must be positive, budget at least 2"),
        (
            "budget: 6",
            "buget: 6",
            "sweep.yaml: declared.buget: unknown key 'buget', did you mean 'budget'",
        ),
        (
            "smallest_effect: 1",
            "smallest_effect: much",
            "sweep.yaml: declared.smallest_effect: expected a number, found 'much'",
        ),
        ("baseline: focal", "", "an ablation needs 'declared', 'baseline' and two 'variants'"),
        ("declared: {", "grid: {seed: 0..1}\n#", "an ablation needs 'declared'"),
    ],
)
def test_mistakes_are_one_line(folder, capsys, old, new, words):
    (folder / "sweep.yaml").write_text(SWEEP.replace(old, new))
    assert ablate.main(["--sweep", "sweep.yaml", "--out", "runs/a"]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert fnmatch.fnmatch(message, f"error: *{words}*")


def test_a_sweep_without_a_declaration_has_none(folder):
    (folder / "sweep.yaml").write_text(SWEEP.partition("declared")[0])
    assert read_sweep(Path("sweep.yaml")).declared is None
