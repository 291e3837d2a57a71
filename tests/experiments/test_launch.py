"""Launching: progress, failures, interruption and going on, with a stand-in for the training program."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from experiments import launch
from experiments.launch import Launch, Launcher, command, describe, duration, last_words, shell_line
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
    (out / "waiting").touch(); time.sleep(60)
if mode == "meets":
    other = out.parent / out.name.translate(str.maketrans("01", "10")) / "starts"
    while not other.exists(): time.sleep(0.02)
lines = [{"kind": "train", "step": 1, "epoch": 1, "loss": 1.0, "eta_seconds": 0.0},
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
    assert launcher.run() == 0
    assert any("[2/2] mode-works_seed-1: started" in line for line in said)
    assert any("done in 0:00:0" in line and "AP 12.50; 1 of 2 done, ETA 0:00:0" in line for line in said)
    plan, launcher, said = sweep("works", seeds=2)
    assert launcher.run() == 0
    assert said == ["2 of 2 runs are done already"]
    assert starts(plan) == [1, 1]


def test_a_failure_does_not_stop_the_others_and_is_tried_again(sweep):
    plan, launcher, said = sweep("fails", "fails_once", "works")
    assert launcher.run() == 1
    assert [run.name for run in launcher.failed] == ["mode-fails_seed-0", "mode-fails_once_seed-0"]
    assert any("FAILED" in line and "no luck today" in line for line in said)
    lines = describe(plan)
    assert "failed" in lines[0]
    assert lines[0].endswith("no luck today")
    assert "RuntimeError: not yet" in lines[1]
    assert "done" in lines[2]
    plan, launcher, said = sweep("fails", "fails_once", "works")
    assert launcher.run() == 1
    assert starts(plan) == [2, 2, 1]
    assert [run.name for run in launcher.failed] == ["mode-fails_seed-0"]


def test_it_stops_in_good_order_and_goes_on(sweep):
    plan, launcher, said = sweep("waits_once", "works")
    waiting = plan.directory(plan.runs[0]) / "waiting"

    def stop():
        for _ in range(3000):
            if waiting.exists():
                os.kill(os.getpid(), signal.SIGTERM)
                return
            time.sleep(0.02)

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=stop)
    thread.start()
    assert launcher.run() == 143
    thread.join()
    assert signal.getsignal(signal.SIGTERM) is before
    assert said[-1] == "stopped by SIGTERM; the same command goes on"
    assert starts(plan) == [1, 0]
    assert "failed" not in describe(plan)[0]
    plan, launcher, _ = sweep("waits_once", "works")
    assert launcher.run() == 0
    assert starts(plan) == [2, 1]


def test_runs_side_by_side_with_progress_now_and_then(sweep, monkeypatch):
    monkeypatch.setattr(launch, "REPORT_SECONDS", 0.0)
    monkeypatch.setattr(launch, "POLL_SECONDS", 0.01)  # so often that no run can start and end in between
    # Each of the two ends only after the other has started.
    plan, launcher, said = sweep("meets", seeds=2, jobs=2)
    assert launcher.run() == 0
    assert any(line.startswith("running mode-meets_seed-") and line.count(" of 2 done") == 1 for line in said)
    assert starts(plan) == [1, 1]


def test_two_processes_do_not_work_on_the_same_sweep(sweep):
    plan, launcher, _ = sweep("works")
    code = (
        f"import fcntl, sys; f = open({str(plan.out / '.sweep' / 'lock')!r}, 'w'); fcntl.lockf(f, fcntl.LOCK_EX);"
        "print('locked', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout.readline() == "locked\n"
        with pytest.raises(ValueError, match="another process is working on this sweep"):
            launcher.run()
        other.communicate()
    assert launcher.run() == 0


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


def run_element(text: str, tmp_path: Path, index: int, torchrun: str, stop_at: Path | None = None) -> int:
    """Run one element of a job array with stand-ins for the programs of a cluster."""
    programs = tmp_path / "bin"
    programs.mkdir(exist_ok=True)
    for name, body in (("torchrun", torchrun), ("scontrol", f'echo "$@" >> {tmp_path}/scontrol')):
        (programs / name).write_text(f"#!/bin/bash\n{body}\n")
        (programs / name).chmod(0o755)
    (tmp_path / "sweep.sbatch").write_text(text)
    environment = {**os.environ, "PATH": f"{programs}:{os.environ['PATH']}", "SLURM_ARRAY_TASK_ID": str(index)}
    environment["SLURM_ARRAY_JOB_ID"] = "77"
    process = subprocess.Popen(["bash", str(tmp_path / "sweep.sbatch")], env=environment)
    while stop_at is not None and not stop_at.exists():
        time.sleep(0.02)
    if stop_at is not None:
        process.terminate()
    return process.wait(timeout=30)


def test_an_element_of_a_job_array_is_one_torchrun(sweep, tmp_path):
    plan, _, _ = sweep("it's", "b c", seeds=2)
    text = script(plan, plan.runs, Launch(Path("main.py"), processes=8, jobs=2), tmp_path, "1:00:00")
    assert "#SBATCH --array=0-3%2" in text
    assert "#SBATCH --gpus-per-node=8" in text
    code = run_element(text, tmp_path, 1, f'printf "%s\\n" "$@" > {tmp_path}/arguments; exit 3')
    assert code == 3
    run = plan.runs[1]
    arguments = (tmp_path / "arguments").read_text().splitlines()
    assert arguments[:4] == ["--standalone", "--nproc-per-node", "8", "main.py"]
    assert arguments[4:] == ["--cfg", "run.yaml", *run.overrides, f"output_dir={plan.directory(run)}",
                             "--resume", "auto"]  # fmt: skip
    assert json.loads(plan.outcome_file(run).read_text()) == {"exit_code": 3}
    assert not (tmp_path / "scontrol").exists()


def test_an_element_that_is_told_to_stop_saves_and_is_queued_again(sweep, tmp_path):
    plan, _, _ = sweep("works")
    text = script(plan, plan.runs, Launch(Path("main.py")), tmp_path, "1:00:00")
    body = f"trap 'touch {tmp_path}/saved; exit 143' TERM\ntouch {tmp_path}/started\nwhile true; do sleep 0.05; done"
    assert run_element(text, tmp_path, 0, body, stop_at=tmp_path / "started") == 143
    assert (tmp_path / "saved").exists()
    assert (tmp_path / "scontrol").read_text() == "requeue 77_0\n"
