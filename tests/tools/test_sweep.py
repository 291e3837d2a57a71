"""The sweep command: what it shows, what it refuses, and the sweep files that come with the project."""

from __future__ import annotations

import fnmatch
from pathlib import Path

import pytest
import yaml

import config
from experiments.comparison import collect, find_baseline, group
from experiments.plan import make_plan, read_manifest, write_manifest
from experiments.sweep_file import read_sweep
from tools import sweep

ROOT = Path(__file__).resolve().parents[2]
SWEEPS = sorted((ROOT / "configs" / "sweeps").glob("*.yaml"))

RUN = """
data:
  train: {images: a, annotations: b}
  val: {images: c, annotations: d}
criterion: {classification: {name: ia_bce}}
"""


@pytest.fixture
def cfg(tmp_path, monkeypatch) -> str:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text(RUN)
    return "run.yaml"


GRID = ("criterion.classification.alpha=0,0.5", "seed=0..1")


def test_dry_run_lists_every_run_and_writes_nothing(cfg, capsys, tmp_path):
    assert sweep.main(["--cfg", cfg, *GRID, "--out", "runs/alpha", "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5
    assert lines[0].split() == ["alpha-0_seed-0", "missing", "criterion.classification.alpha=0", "seed=0"]
    assert lines[-1] == "4 runs, 0 done"
    assert not (tmp_path / "runs").exists()


def test_list_prints_one_complete_command_a_line(cfg, capsys):
    arguments = ["--cfg", cfg, *GRID, "optimizer.lr=1e-3", "--out", "runs/a", "--list", "--nproc-per-node", "2"]
    assert sweep.main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4
    assert lines[3] == (
        f"torchrun --standalone --nproc-per-node 2 {ROOT / 'main.py'} --cfg run.yaml optimizer.lr=1e-3 "
        "criterion.classification.alpha=0.5 seed=1 output_dir=runs/a/alpha-0.5_seed-1 --resume auto"
    )


def test_slurm_writes_a_script_and_the_manifest(cfg, capsys, tmp_path):
    assert sweep.main(["--cfg", cfg, *GRID, "--out", "runs/a", "--slurm", "--nproc-per-node", "8"]) == 0
    assert "sbatch runs/a/sweep.sbatch" in capsys.readouterr().out
    text = (tmp_path / "runs" / "a" / "sweep.sbatch").read_text()
    assert "--array=0-3" in text
    assert f"cd {tmp_path}" in text
    # From now on the directory says what the sweep is.
    assert sweep.main(["--out", "runs/a", "--dry-run"]) == 0
    assert "4 runs, 0 done" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ["--cfg", "run.yaml", "criterion.classification.alfa=0,1"],
            "run alfa-0: *unknown key 'alfa', did you mean 'alpha'",
        ),
        (["--cfg", "run.yaml", "criterion.classification.alpha=0,7"], "run alpha-7: * alpha must be in [[]0, 1[]]"),
        (["--cfg", "run.yaml"], "the grid is empty"),
        (["--cfg", "run.yaml", "seed=3..1"], "holds nothing"),
        (["--cfg", "nowhere.yaml", "seed=0..1"], "nowhere.yaml: cannot be read"),
        (["--sweep", "nowhere.yaml"], "nowhere.yaml: cannot be read"),
        ([], "--cfg or --sweep is needed"),
        (["--cfg", "run.yaml", "seed=0..1", "--jobs", "0"], "--jobs and --nproc-per-node must be at least 1"),
        (["--cfg", "run.yaml", "output_dir=a,b"], "output_dir is set by the sweep"),
    ],
)
def test_mistakes_are_one_line_before_anything_starts(cfg, capsys, tmp_path, arguments, words):
    assert sweep.main([*arguments, "--out", "runs/a"]) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ")
    assert message.count("\n") == 1
    assert fnmatch.fnmatch(message, f"*{words}*"), message
    assert not (tmp_path / "runs").exists()


def test_a_directory_with_another_runs_configuration_is_refused(cfg, capsys, tmp_path):
    directory = tmp_path / "runs" / "a" / "seed-0"
    directory.mkdir(parents=True)
    values = config.to_dict(config.load(cfg, ["optimizer.lr=0.5", "data.num_workers=9"]))
    (directory / "config.yaml").write_text(yaml.safe_dump(values))
    assert sweep.main(["--cfg", cfg, "seed=0,1", "--out", "runs/a", "--dry-run"]) == 2
    message = capsys.readouterr().err
    assert "runs/a/seed-0 holds a run with optimizer.lr=0.5, the sweep wants " in message


def test_a_sweep_grows_and_remembers(cfg, capsys):
    first = ["--cfg", cfg, "criterion.classification.alpha=0,0.5", "seed=0", "--out", "runs/a"]
    assert sweep.main([*first, "--slurm", "--baseline", "alpha=0"]) == 0
    grown = ["--cfg", str(Path(cfg).resolve()), "criterion.classification.alpha=0,0.5", "seed=0..2", "--out", "runs/a"]
    assert sweep.main([*grown, "--slurm"]) == 0
    capsys.readouterr()
    assert sweep.main(["--out", "runs/a", "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[:3]] == ["alpha-0", "alpha-0.5", "alpha-0_seed-1"]
    assert lines[-1] == "6 runs, 0 done"
    assert sweep.main(["seed=5", "--out", "runs/a", "--dry-run"]) == 2
    assert "give its --cfg or --sweep as well" in capsys.readouterr().err


def test_the_baseline_is_checked_and_may_be_chosen_later(cfg, capsys, tmp_path):
    arguments = ["--cfg", cfg, *GRID, "--out", "runs/a"]
    assert sweep.main([*arguments, "--baseline", "alpa=0"]) == 2
    assert "baseline 'alpa=0': nothing fits; the rows are: alpha=0; alpha=0.5" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()
    assert sweep.main([*arguments, "--slurm"]) == 0
    for given, kept in (("alpha=0.5", "alpha=0.5"), ("", None)):
        assert sweep.main(["--out", "runs/a", "--slurm", "--baseline", given]) == 0
        assert read_manifest(Path("runs/a")).baseline == kept
    assert sweep.main(["--out", "runs/a", "--slurm", "--baseline", "alpha=7"]) == 2


def test_one_run_alone(cfg, capsys, tmp_path, monkeypatch):
    program = tmp_path / "main.py"
    program.write_text("import sys; from pathlib import Path; Path('said').write_text(' '.join(sys.argv)); sys.exit(3)")
    monkeypatch.setattr(sweep, "MAIN", program)
    assert sweep.main(["--cfg", cfg, *GRID, "--out", "runs/a", "--slurm"]) == 0
    assert sweep.main(["--out", "runs/a", "--run", "alpha-0.5_seed-1"]) == 1
    assert "alpha=0.5 seed=1 output_dir=runs/a/alpha-0.5_seed-1 --resume auto" in (tmp_path / "said").read_text()
    assert sweep.main(["--out", "runs/a", "--run", "alpha-7"]) == 2
    assert "--run alpha-7: runs/a has no such run" in capsys.readouterr().err
    assert sweep.main(["--cfg", cfg, *GRID, "--out", "runs/b", "--run", "alpha-7"]) == 2
    assert not Path("runs/b").exists()
    assert sweep.main(["--cfg", cfg, *GRID, "--out", "runs/b", "--run", "alpha-0.5_seed-1"]) == 1
    planned = read_manifest(Path("runs/b")).runs
    assert planned == read_manifest(Path("runs/a")).runs
    more = [GRID[0], "seed=1..2"]
    assert sweep.main(["--cfg", cfg, *more, "--out", "runs/b", "--run", "alpha-0.5_seed-2"]) == 1
    assert {run.name for run in read_manifest(Path("runs/b")).runs} - {run.name for run in planned} == {
        "alpha-0_seed-2",
        "alpha-0.5_seed-2",
    }


@pytest.mark.parametrize("path", SWEEPS, ids=[path.stem for path in SWEEPS])
def test_every_sweep_file_is_valid_in_all_its_combinations(path, tmp_path):
    plan = make_plan(read_sweep(path), tmp_path / "out", lambda c, o: config.to_dict(config.load(c, o)))
    assert len(plan.runs) >= 3
    write_manifest(plan)
    groups = group(collect([plan.out], lambda c, o: config.to_dict(config.load(c, o)))[0])
    assert plan.baseline is not None
    assert find_baseline(groups, plan.baseline) == 0
    seeds = len({run.overrides[-1] for run in plan.runs})
    assert len(groups) * seeds == len(plan.runs)
    one_seed = path.stem.endswith("_coco") or any(part in path.stem for part in ("_rates_", "_k_tau_"))
    assert one_seed == (seeds == 1)


@pytest.mark.parametrize("path", SWEEPS, ids=[path.stem for path in SWEEPS])
def test_every_sweep_file_says_what_it_is(path):
    header = "\n".join(line for line in path.read_text().splitlines() if line.startswith("#"))
    for word in ("source:", "run time:", f"command:  python -m tools.sweep --sweep configs/sweeps/{path.name} --out"):
        assert word in header


@pytest.mark.parametrize(
    "path", [path for path in SWEEPS if path.stem.startswith("table8")], ids=lambda path: path.stem
)
def test_a_sweep_over_tau_has_ranks_to_weigh(path, tmp_path):
    """A layer in which targets have one candidate each has weight 1, whatever tau is."""
    plan = make_plan(read_sweep(path), tmp_path / "out", lambda c, o: config.to_dict(config.load(c, o)))
    resolved = [config.to_dict(config.load(plan.cfg, run.overrides)) for run in plan.runs]
    assert len({values["criterion"]["prime_sample_tau"] for values in resolved}) > 2
    for values in resolved:
        candidates, layers = values["criterion"]["matcher"]["candidates"], values["model"]["decoder_layers"]
        assert max([candidates] if isinstance(candidates, int) else candidates[-layers:]) > 1


def test_each_ablation_of_the_paper_has_a_coco_form_and_a_small_one():
    stems = {path.stem for path in SWEEPS if "arXiv" in path.read_text()}
    assert len(stems) > 8
    for name in {stem.rsplit("_", 1)[0] for stem in stems}:
        assert {f"{name}_coco", f"{name}_shapes"} <= stems
