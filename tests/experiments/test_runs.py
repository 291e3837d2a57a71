"""Reading run directories."""

from __future__ import annotations

import json

import yaml

from engine.records import read_metrics
from experiments.runs import find_runs, read_run


def test_a_finished_run(write_run, tmp_path):
    run = read_run(write_run(tmp_path / "run", {"seed": 1}, [10.0, 20.0]))
    assert (run.state, run.message, run.config["seed"]) == ("done", "", 1)
    assert [record["AP"] for record in run.evals] == [10.0, 20.0]


def test_states_of_runs_that_are_not_finished(write_run, tmp_path):
    outcome = tmp_path / "outcome.json"
    missing = tmp_path / "missing"
    assert read_run(missing, outcome).state == "missing"
    started = write_run(tmp_path / "run", {"seed": 1}, [10.0], finished=False)
    assert read_run(started, outcome).state == "unfinished"
    outcome.write_text('{"exit_code": 143}')
    assert read_run(started, outcome).state == "unfinished"
    outcome.write_text('{"exit_code": 1, "message": "SignalException", "stopped": true}')
    assert read_run(started, outcome)[1:3] == ("unfinished", "")
    outcome.write_text('{"exit_code": 3, "message": "loss is NaN"}')
    assert read_run(started, outcome)[1:3] == ("failed", "loss is NaN")
    assert read_run(missing, outcome).state == "failed"
    outcome.write_text('{"exit_code": 9}')
    assert read_run(missing, outcome).message == "exit code 9"
    # What a run has achieved counts for more than how its process ended.
    assert read_run(write_run(tmp_path / "done", {}, [1.0]), outcome).state == "done"


def test_a_last_step_that_is_not_evaluated_yet_is_not_the_end(write_run, tmp_path):
    run = write_run(tmp_path / "run", {}, [10.0, 20.0])
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(lines[:-1]))
    assert read_run(run).state == "unfinished"


def test_a_run_is_as_long_as_its_schedule_says(write_run, tmp_path):
    run = write_run(tmp_path / "run", {}, [10.0, 20.0])
    for schedule, state in (
        ({"steps": 60, "epochs": 12}, "done"),
        ({"steps": 61, "epochs": 1}, "unfinished"),
        ({"steps": None, "epochs": 2}, "done"),
        ({"steps": None, "epochs": 3}, "unfinished"),
    ):
        (run / "config.yaml").write_text(yaml.safe_dump({"schedule": schedule}))
        assert read_run(run).state == state


def test_repeated_and_half_written_lines(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [
        json.dumps({"kind": "eval", "step": 20, "AP": 1.0}),
        json.dumps({"kind": "eval", "step": 10, "AP": 2.0}),
        json.dumps({"kind": "eval", "step": 20, "AP": 3.0}),
        '{"kind": "eval", "st',
    ]
    path.write_text("\n".join(lines))
    _, evals = read_metrics(path)
    assert [(r["step"], r["AP"]) for r in evals] == [(10, 2.0), (20, 3.0)]


def test_runs_are_found_in_a_directory_or_are_it(write_run, tmp_path):
    first = write_run(tmp_path / "b", {}, [1.0])
    second = write_run(tmp_path / "a", {}, [1.0])
    (tmp_path / "notes").mkdir()
    assert find_runs(tmp_path) == [second, first]
    assert find_runs(first) == [first]


def test_a_run_whose_directory_is_held_is_running(write_run, tmp_path, hold):
    started = write_run(tmp_path / "run", {"seed": 1}, [10.0], finished=False)
    outcome = tmp_path / "outcome.json"
    outcome.write_text('{"exit_code": 3}')
    (started / ".lock").touch()
    assert read_run(started, outcome).state == "failed"
    with hold(started / ".lock"):
        assert read_run(started, outcome).state == "running"
    assert read_run(started, outcome).state == "failed"
