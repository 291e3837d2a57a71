"""Groups of runs, their numbers, tables and curves."""

from __future__ import annotations

import csv
import io
import math
from pathlib import Path

import matplotlib.pyplot as plt
import pytest
from PIL import Image

from analysis import style
from analysis.bootstrap import Interval
from experiments.comparison import (
    collect,
    differing_keys,
    find_baseline,
    group,
    seed_notes,
    summarise,
    text_of,
    value_of,
)
from experiments.curves import _draw_group, draw_learning_curves, learning_curve
from experiments.plan import make_plan, write_manifest
from experiments.sweep_file import Sweep
from experiments.tables import Comparison, Row, as_csv, as_latex, as_markdown


def config(alpha: float, seed: int, **more) -> dict:
    return {"criterion": {"loss": {"name": "x_y", "alpha": alpha}}, "seed": seed, "output_dir": f"r{seed}", **more}


@pytest.fixture
def runs(write_run, tmp_path) -> Path:
    """Two values of alpha with two seeds each; a third value whose only run is not finished."""
    for alpha, seed, aps in ((0.0, 0, [10, 20]), (0.0, 1, [14, 24]), (0.5, 0, [20, 30]), (0.5, 1, [25, 28])):
        write_run(tmp_path / "runs" / f"a{alpha}s{seed}", config(alpha, seed), aps)
    write_run(tmp_path / "runs" / "other", config(0.75, 0), [50.0], finished=False)
    return tmp_path / "runs"


def test_runs_are_grouped_by_what_differs_apart_from_the_seed(runs):
    members, baseline = collect([runs])
    assert baseline is None
    assert differing_keys(members) == ["criterion.loss.alpha"]
    groups = group(members)
    assert [g.settings for g in groups] == [{"criterion.loss.alpha": a} for a in (0.0, 0.5, 0.75)]
    assert [g.status() for g in groups] == ["2", "2", "0, 1 unfinished"]
    assert [g.label() for g in groups] == ["alpha=0", "alpha=0.5", "alpha=0.75"]
    found = summarise(groups[0].finished, "AP", "last")
    assert (found.values, found.mean) == ((20, 24), 22)
    assert found.deviation == pytest.approx(math.sqrt(8))
    assert summarise(groups[2].finished, "AP", "last").values == ()
    assert math.isnan(summarise(groups[0].finished[:1], "AP", "last").deviation)


def test_keys_that_only_some_runs_have(write_run, tmp_path):
    write_run(tmp_path / "r" / "a", config(0.0, 0, extra={"tau": 1.5}), [1.0])
    write_run(tmp_path / "r" / "b", config(0.0, 0), [1.0])
    groups = group(collect([tmp_path / "r"])[0])
    assert [g.label() for g in groups] == ["tau=1.5", "tau=–"]


def test_the_last_or_the_best_evaluation(write_run, tmp_path):
    write_run(tmp_path / "r", {}, [10.0, 30.0, 20.0])
    run = collect([tmp_path / "r"])[0][0].run
    assert (value_of(run, "AP", "last"), value_of(run, "AP", "best")) == (20.0, 30.0)
    assert (value_of(run, "AP50", "best"), value_of(run, "APs", "last")) == (50.0, None)


@pytest.mark.parametrize("text", ["alpha=0.5", "loss.alpha=.5", "criterion.loss.alpha=5e-1", "alpha=0.50"])
def test_the_baseline_is_named_by_its_value(runs, text):
    assert find_baseline(group(collect([runs])[0]), text) == 1


@pytest.mark.parametrize(("text", "words"), [("alpha=0.9", "nothing fits"), ("focal", "nothing fits")])
def test_a_baseline_that_is_not_there_lists_the_rows(runs, text, words):
    with pytest.raises(ValueError, match=f"{words}; the rows are: alpha=0; alpha=0.5; alpha=0.75"):
        find_baseline(group(collect([runs])[0]), text)


def test_paths_without_runs(tmp_path):
    with pytest.raises(ValueError, match="there is no such directory"):
        collect([tmp_path / "absent"])
    with pytest.raises(ValueError, match="neither a sweep nor a run"):
        collect([tmp_path])


def test_a_sweep_brings_variants_missing_and_failed_runs(write_run, tmp_path):
    def decode(cfg, overrides):
        values = dict(text.split("=", 1) for text in overrides)
        alpha = float(values.get("alpha", 0))
        return {**config(alpha, int(values["seed"]), tau=1.0 if alpha else 0.0), "schedule": {"steps": 60}}

    sweep = Sweep(
        cfg=Path("run.yaml"), baseline="plain", variants={"plain": {}, "other": {"alpha": "1"}},
        grid={"seed": ["0", "1"]},
    )  # fmt: skip
    plan = make_plan(sweep, tmp_path / "out", decode)
    write_manifest(plan)
    write_run(plan.directory(plan.runs[0]), decode(None, plan.runs[0].overrides), [10.0])
    plan.outcome_file(plan.runs[1]).write_text('{"exit_code": 2, "message": "no luck"}')
    members, baseline = collect([tmp_path / "out"], decode)
    assert baseline == "plain"
    # Alpha and tau are what the variants are; their names say it.
    groups = group(members)
    assert [(g.variant, g.settings, g.status()) for g in groups] == [
        ("plain", {}, "1, 1 missing"),
        ("other", {}, "0, 1 failed, 1 missing"),
    ]
    assert find_baseline(groups, "plain") == 0
    assert next(run.message for run in groups[1].runs if run.state == "failed") == "no luck"


@pytest.fixture
def comparison(runs) -> Comparison:
    groups = group(collect([runs])[0])
    intervals = [Interval(0, 0, 0), Interval(7.0, 3.25, 11.5), Interval(math.nan, math.nan, math.nan)]
    rows = [
        Row(g, {m: summarise(g.finished, m, "last") for m in ("AP", "AP50")}, {"AP": interval} if i else {}, i == 0)
        for i, (g, interval) in enumerate(zip(groups, intervals, strict=True))
    ]
    return Comparison(rows, ["AP", "AP50"], ["AP"], ["a note"])


def test_table_in_markdown_is_aligned(comparison):
    lines = as_markdown(comparison).splitlines()
    assert len({len(line) for line in lines[:5]}) == 1
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[:5]]
    assert rows[0] == ["alpha", "runs", "AP", "ΔAP", "AP50"]
    assert [rule.lstrip("-") for rule in rows[1]] == ["", "", ":", ":", ":"]
    assert rows[2] == ["0", "2", "22.00 ± 2.83", "baseline", "42.00 ± 2.83"]
    assert rows[3] == ["0.5", "2", "**29.00 ± 1.41**", "+7.00 [+3.25, +11.50]", "**49.00 ± 1.41**"]
    assert rows[4] == ["0.75", "0, 1 unfinished", "–", "–", "–"]
    assert lines[-1] == "a note"


def test_table_in_latex(comparison):
    text = as_latex(comparison)
    assert r"\begin{tabular}{llrrr}" in text
    assert r"alpha & runs & AP & $\Delta$AP & AP50 \\" in text
    assert r"0.5 & 2 & \textbf{29.00 $\pm$ 1.41} & +7.00 [+3.25, +11.50] & \textbf{49.00 $\pm$ 1.41} \\" in text
    assert text.count(r"\\") == 4


def test_latex_escapes_what_people_put_into_names(runs):
    groups = group(collect([runs])[0])
    odd = groups[0]._replace(variant=r"a_b & 50% $x$ \par <x|y>", settings={})
    rows = [Row(odd, {"AP": summarise(odd.finished, "AP", "last")}, {"AP": Interval(-1.5, -2.0, -1.0)}, False)]
    text = as_latex(Comparison(rows, ["AP"], ["AP"], []))
    name = r"a\_b \& 50\% \$x\$ \textbackslash{}par \textless{}x\textbar{}y\textgreater{}"
    assert name + r" & 2 & 22.00 $\pm$ 2.83 & $-$1.50 [$-$2.00, $-$1.00] \\" in text


def test_table_as_csv(comparison):
    rows = list(csv.DictReader(io.StringIO(as_csv(comparison))))
    assert rows[1]["criterion.loss.alpha"] == "0.5"
    assert (float(rows[1]["AP"]), float(rows[1]["AP_std"])) == (29.0, 1.4142)
    assert [rows[1][f"AP_{name}"] for name in ("difference", "low", "high")] == ["7.0000", "3.2500", "11.5000"]
    assert (rows[2]["runs"], rows[2]["AP"], rows[2]["failed"]) == ("0", "", "0")


def test_learning_curves(runs, tmp_path, monkeypatch):
    monkeypatch.setattr(style, "DPI", 55)
    groups = group(collect([runs])[0])
    curve = learning_curve(groups[0].runs, "AP")
    assert (curve.epochs, curve.means) == ([1.0, 2.0], [12.0, 22.0])
    assert curve.deviations == pytest.approx([math.sqrt(8)] * 2)
    assert learning_curve(groups[2].runs, "AP").deviations == [0.0]
    assert learning_curve(groups[0].runs, "APs").epochs == []
    assert curve.runs == 2
    draw_learning_curves(tmp_path / "curves.png", groups, ["AP", "AP50"])
    with Image.open(tmp_path / "curves.png") as image:
        assert image.width > image.height > 100


def test_a_curve_says_how_many_runs_it_rests_on(write_run, tmp_path):
    write_run(tmp_path / "r" / "a", config(0.0, 0), [1.0, 2.0], finished=False)
    for name, seed in (("b", 1), ("c", 2)):
        write_run(tmp_path / "r" / name, config(0.0, seed), [])
    figure, axis = plt.subplots()
    _draw_group(axis, group(collect([tmp_path / "r"])[0])[0], "AP", 0)
    assert [line.get_label() for line in axis.lines] == ["all runs (1 of 3)"]
    plt.close(figure)


def test_a_table_of_rows_with_other_seeds_says_so(runs, write_run):
    members = collect([runs])[0]
    assert seed_notes(group(members)) == []
    write_run(runs / "more", config(0.5, 2), [30.0])
    assert seed_notes(group(collect([runs])[0])) == [
        "rows rest on different seeds (alpha=0: 0, 1; alpha=0.5: 0, 1, 2), so that part of a difference may be theirs"
    ]
    write_run(runs / "again", config(0.0, 1), [30.0])
    write_run(runs / "third", config(0.0, 2), [30.0])
    assert seed_notes(group(collect([runs])[0])) == [
        "alpha=0: 2 runs have seed 1 and count as if their seeds were different"
    ]


def test_values_as_people_write_them():
    assert [text_of(v) for v in (None, True, 0.5, 1e-4, 2, "x", [1, 2.0], {"a": None})] == [
        "null", "true", "0.5", "0.0001", "2", "x", "[1, 2]", "{a: null}"
    ]  # fmt: skip
