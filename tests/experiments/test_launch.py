"""Launching: progress, failures, interruption and going on, with a stand-in for the training program."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from experiments import launch
from experiments.launch import Launch, Launcher, claimed, command, describe, duration, last_words, shell_line
from experiments.plan import make_plan, write_manifest
from experiments.slurm import script
from experiments.sweep_file import Sweep

PROGRAM = """
import json, signal, sys, time
from pathlib import Path
values = dict(a.split("=", 1) for a in sys.argv[1:] if "=" in a)
out = Path(values["output_dir"]); out.mkdir(parents=True, exist_ok=True)
with (out / "starts").open("a") as file: file.write("x")
signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
mode = values["mode"]
again = (out / "starts").read_text() != "x"
if mode == "fails": print("error: no luck today", file=sys.stderr); sys.exit(2)
if mode == "fails_once" and not again: raise RuntimeError("not yet")
if mode == "waits_once" and not again:
    (out / "waiting").touch()
    until = time.monotonic() + 60
    while time.monotonic() < until and not (out / "go_on").exists(): time.sleep(0.02)
if mode == "meets":
    other = out.parent / out.name.translate(str.maketrans("01", "10")) / "starts"
    while not other.exists(): time.sleep(0.02)
(out / "config.yaml").write_text("schedule: {steps: 1}")
lines = [{"kind": "train", "step": 1, "epoch": 1, "loss": 1.0},
         {"kind": "eval", "step": 1, "epoch": 1, "AP": 12.5}]
(out / "metrics.jsonl").write_text("".join(json.dumps(l) + chr(10) for l in lines))
"""


@pytest.fixture
def sweep(tmp_path):
    """Makes the plan of some modes, with two seeds each unless said otherwise."""
    (tmp_path / "main.py").write_text(PROGRAM)

    def make(*modes: str, seeds: int = 1, jobs: int = 1):
        grid = {"mode": list(modes), "seed": [str(i) for i in range(seeds)]}
        plan = make_plan(
            Sweep(cfg=Path("run.yaml"), grid=grid), tmp_path / "out", lambda cfg, overrides: {"o": list(overrides)}
        )
        write_manifest(plan)
        said: list[str] = []
        return plan, Launcher(plan, Launch(tmp_path / "main.py", jobs=jobs), said.append), said

    return make


def starts(plan) -> list[int]:
    files = [plan.directory(run) / "starts" for run in plan.runs]
    return [len(file.read_text()) if file.exists() else 0 for file in files]


def test_all_runs_are_run_once_however_often_it_is_called(sweep):
    plan, launcher, said = sweep("works", seeds=2)
    assert launcher.run(plan.runs) == 0
    assert any("[2/2] mode-works_seed-1: started" in line for line in said)
    assert any("done in 0:00:0" in line and "AP 12.50; 1 of 2 done" in line for line in said)
    plan, launcher, said = sweep("works", seeds=2)
    assert launcher.run(plan.runs) == 0
    assert said == ["2 of 2 runs are done already"]
    assert starts(plan) == [1, 1]


def test_a_failure_does_not_stop_the_others_and_is_tried_again(sweep):
    plan, launcher, said = sweep("fails", "fails_once", "works")
    assert launcher.run(plan.runs) == 1
    assert [run.name for run in launcher.failed] == ["mode-fails_seed-0", "mode-fails_once_seed-0"]
    assert any("FAILED" in line and "no luck today" in line for line in said)
    lines = describe(plan)
    assert "failed" in lines[0]
    assert lines[0].endswith("no luck today")
    assert "RuntimeError: not yet" in lines[1]
    assert "done" in lines[2]
    plan, launcher, said = sweep("fails", "fails_once", "works")
    assert launcher.run(plan.runs) == 1
    assert starts(plan) == [2, 2, 1]
    assert [run.name for run in launcher.failed] == ["mode-fails_seed-0"]


def when(file: Path, do) -> threading.Thread:
    """Do something as soon as a file is there."""

    def wait():
        for _ in range(3000):
            if file.exists():
                do()
                return
            time.sleep(0.02)

    thread = threading.Thread(target=wait)
    thread.start()
    return thread


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_it_stops_in_good_order_and_goes_on(sweep, number):
    plan, launcher, said = sweep("waits_once", "works")
    before = signal.signal(number, signal.SIG_DFL)  # it may be ignored, if the tests themselves run under nohup
    try:
        thread = when(plan.directory(plan.runs[0]) / "waiting", lambda: os.kill(os.getpid(), number))
        assert launcher.run(plan.runs) == 128 + number
        thread.join()
        assert signal.getsignal(number) is signal.SIG_DFL
    finally:
        signal.signal(number, before)
    assert said[-1] == f"stopped by {number.name}; the same command goes on"
    assert starts(plan) == [1, 0]
    # The program knows SIGTERM only, and ended by itself.
    assert json.loads(plan.outcome_file(plan.runs[0]).read_text())["exit_code"] == 143
    assert "failed" not in describe(plan)[0]
    plan, launcher, _ = sweep("waits_once", "works")
    assert launcher.run(plan.runs) == 0
    assert starts(plan) == [2, 1]


def test_with_nohup_it_outlives_the_terminal(sweep):
    plan, launcher, _ = sweep("works", "waits_once")
    waiting = plan.directory(plan.runs[1])
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:

        def both():
            os.kill(os.getpid(), signal.SIGHUP)
            (waiting / "go_on").touch()

        thread = when(waiting / "waiting", both)
        assert launcher.run(plan.runs) == 0
        thread.join()
    finally:
        signal.signal(signal.SIGHUP, before)


WORKER = """
import os, signal, sys, time
from pathlib import Path
out = Path(next(a for a in sys.argv if a.startswith("output_dir=")).split("=", 1)[1])
out.mkdir(parents=True, exist_ok=True)
def save(*_):
    (out / ("saved" + os.environ["RANK"])).write_text(os.environ["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"])
    sys.exit(143)
signal.signal(signal.SIGTERM, save)
if "mode=fails" in sys.argv: sys.exit(3)
(out / ("config.yaml" if os.environ["RANK"] == "0" else "ready")).write_text("seed: 0")
time.sleep(60)
"""


def test_a_run_of_several_processes_that_is_told_to_stop_has_not_failed(sweep, tmp_path):
    """With the real torchrun, whose exit code is 1 in both cases."""
    plan, _, said = sweep("fails", "waits")
    (tmp_path / "main.py").write_text(WORKER)
    launcher = Launcher(plan, Launch(tmp_path / "main.py", processes=2, jobs=2), said.append)
    first, second = (plan.directory(run) for run in plan.runs)

    def stop():
        while not ((second / "ready").exists() and plan.outcome_file(plan.runs[0]).exists()):
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = when(second / "config.yaml", stop)
    assert launcher.run(plan.runs) == 143
    thread.join()
    outcomes = [json.loads(plan.outcome_file(run).read_text()) for run in plan.runs]
    assert [(outcome["exit_code"], outcome["stopped"]) for outcome in outcomes] == [(1, False), (1, True)]
    assert [line.split()[1] for line in describe(plan)] == ["failed", "unfinished"]
    assert not (first / "saved0").exists()
    assert (second / "saved0").read_text() == (second / "saved1").read_text() == str(launch.SECONDS_TO_STOP)


def test_a_run_that_another_process_is_running_is_left_out(sweep, hold):
    plan, launcher, said = sweep("works", seeds=2)
    directory = plan.directory(plan.runs[0])
    directory.mkdir(parents=True)
    with hold(directory / ".lock"):
        assert describe(plan)[0].split()[1] == "running"
        assert launcher.run(plan.runs) == 1
    assert launcher.failed == []
    assert "mode-works_seed-0: left out, another process is running it" in said[0]
    assert starts(plan) == [0, 1]
    plan, launcher, _ = sweep("works", seeds=2)
    assert launcher.run(plan.runs) == 0
    assert starts(plan) == [1, 1]


def test_it_goes_on_where_nobody_listens(sweep):
    plan, _, _ = sweep("works")

    def gone(text):
        raise OSError("the terminal is gone")

    assert Launcher(plan, Launch(plan.out.parent / "main.py"), gone).run(plan.runs) == 0


def test_runs_side_by_side(sweep):
    # Each of the two ends only after the other has started.
    plan, launcher, _ = sweep("meets", seeds=2, jobs=2)
    assert launcher.run(plan.runs) == 0
    assert starts(plan) == [1, 1]


def test_runs_side_by_side_have_gpus_and_cores_of_their_own(sweep, tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    plan, _, _ = sweep("meets", seeds=2)
    show = PROGRAM + 'import os; (out / "seen").write_text(os.environ["CUDA_VISIBLE_DEVICES"])\n'
    (tmp_path / "main.py").write_text(show)
    assert Launcher(plan, Launch(tmp_path / "main.py", jobs=2)).run(plan.runs) == 0
    assert sorted((plan.directory(run) / "seen").read_text() for run in plan.runs) == ["4", "5"]


def test_two_processes_do_not_work_on_the_same_sweep(sweep, hold):
    plan, _, _ = sweep("works")
    with hold(plan.out / ".sweep" / "lock"), pytest.raises(ValueError, match="another process is working on this"):
        claimed(plan).__enter__()
    with claimed(plan):
        pass


def test_command_lines(sweep):
    plan, _, _ = sweep("works")
    single = shell_line(plan, plan.runs[0], Launch(Path("main.py")))
    assert single == (
        f"python main.py --cfg run.yaml mode=works seed=0 output_dir={plan.out}/mode-works_seed-0 --resume auto"
    )
    several = shell_line(plan, plan.runs[0], Launch(Path("main.py"), processes=4))
    assert several.startswith("torchrun --standalone --nproc-per-node 4 main.py --cfg run.yaml")
    assert command(plan, plan.runs[0], Launch(Path("main.py")))[0] == sys.executable


def test_the_last_words_of_a_log(tmp_path):
    log = tmp_path / "log"
    log.write_text("epoch 1\nerror: out of disk\nsome clean-up\n")
    assert last_words(log) == "out of disk"
    log.write_text("Traceback\n  File x\nValueError: bad\n")
    assert last_words(log) == "ValueError: bad"
    log.write_text("killed\n\n")
    assert last_words(log) == "killed"
    assert last_words(tmp_path / "absent") == ""
    assert duration(3723.9) == "1:02:03"


ELEMENT = """
import sys
from pathlib import Path
from tools import sweep
sweep.MAIN = Path("main.py").resolve()
sweep.decode = lambda cfg, overrides: {"o": list(overrides)}
assert sys.argv[1:3] == ["-m", "tools.sweep"]
sys.exit(sweep.main(sys.argv[3:]))
"""


def run_element(text: str, tmp_path: Path, index: int, stop_at: Sequence[Path] = ()) -> int:
    """Run one element of a job array with stand-ins for the programs of a cluster, and for the training program."""
    programs = tmp_path / "bin"
    programs.mkdir(exist_ok=True)
    (tmp_path / "element.py").write_text(ELEMENT)
    element = f'exec {sys.executable} {tmp_path}/element.py "$@"'
    for name, body in (("python", element), ("scontrol", f'echo "$@" >> {tmp_path}/scontrol')):
        (programs / name).write_text(f"#!/bin/bash\n{body}\n")
        (programs / name).chmod(0o755)
    (tmp_path / "sweep.sbatch").write_text(text)
    root = str(Path(launch.__file__).parents[1])
    environment = {**os.environ, "PATH": f"{programs}:{os.environ['PATH']}", "PYTHONPATH": root,
                   "SLURM_ARRAY_TASK_ID": str(index), "SLURM_ARRAY_JOB_ID": "77"}  # fmt: skip
    process = subprocess.Popen(["bash", str(tmp_path / "sweep.sbatch")], env=environment)
    while process.poll() is None and not all(file.exists() for file in stop_at):
        time.sleep(0.02)
    if stop_at:
        process.terminate()
    return process.wait(timeout=60)


def test_an_element_that_is_told_to_stop_saves_and_is_queued_again(sweep, tmp_path):
    plan, _, _ = sweep("works", "it's")
    (tmp_path / "main.py").write_text(WORKER)
    text = script(plan, plan.runs, Launch(Path("main.py"), processes=2), tmp_path, "1:00:00")
    directory = plan.directory(plan.runs[1])
    assert run_element(text, tmp_path, 1, stop_at=[directory / "ready", directory / "config.yaml"]) == 143
    # It had as long as the scheduler grants it.
    assert (directory / "saved0").read_text() == (directory / "saved1").read_text() == "100"
    assert (tmp_path / "scontrol").read_text() == "requeue 77_1\n"
    assert [line.split()[1] for line in describe(plan)] == ["missing", "unfinished"]


def test_a_job_array_may_be_submitted_from_anywhere(sweep, tmp_path):
    plan, _, _ = sweep("works", "b c", seeds=2)
    odd = plan._replace(out=Path("my runs/50% off"))
    lines = script(odd, odd.runs, Launch(Path("main.py"), processes=8, jobs=2), tmp_path, "1:00:00").splitlines()
    assert "#SBATCH --job-name='50% off'" in lines
    assert f"#SBATCH --output='{tmp_path}/my runs/50%% off/.sweep/slurm-%a.log'" in lines
    assert "#SBATCH --array=0-3%2" in lines
    assert "#SBATCH --gpus-per-node=8" in lines
    assert any(line.startswith("exec python -m tools.sweep --out 'my runs/50% off' ") for line in lines)
