"""Reading run directories."""

from __future__ import annotations

import json

import pytest

from experiments.progress import Length, seconds_left
from experiments.runs import find_runs, read_metrics, read_run


def test_a_finished_run(write_run, tmp_path):
    run = read_run(write_run(tmp_path / "run", {"seed": 1}, [10.0, 20.0]))
    assert (run.state, run.message, run.config) == ("done", "", {"seed": 1})
    assert [record["AP"] for record in run.evals] == [10.0, 20.0]
    assert run.seconds == 20 * 0.5 + 2 * 3


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


def test_the_time_left_is_that_of_the_steps_left(write_run, tmp_path):
    """20 steps, 16 s, in the one that is done; 0.8 s a step."""
    done = read_run(write_run(tmp_path / "done", {}, [1.0, 2.0]))
    assert done.seconds == 20 * 0.5 + 2 * 3
    nothing = read_run(tmp_path / "missing")
    assert seconds_left([nothing], [(nothing, Length("step", 20))], 1) is None
    assert seconds_left([done], [(nothing, None)], 1) is None
    assert seconds_left([done, nothing], [(nothing, Length("step", 40))], 1) == pytest.approx(32)
    assert seconds_left([done, nothing], [(nothing, Length("epoch", 1))], 1) == pytest.approx(8)
    # One that goes on after an interruption has half of its steps behind it.
    half = read_run(write_run(tmp_path / "half", {}, [1.0], finished=False))
    waiting = [(half, Length("step", 20)), (nothing, Length("step", 20))]
    assert seconds_left([done, half, nothing], waiting, 1) == pytest.approx(24)
    assert seconds_left([done, half, nothing], waiting, 2) == pytest.approx(12)
