"""The benchmark runs, tells the truth about errors, and says on what it ran."""

from __future__ import annotations

import argparse
import json
import sys
import types
from pathlib import Path

import pytest
import torch

from benchmarks import frame, ms_deform_attn_cases, ms_deform_attn_peers, step, tune_ms_deform_attn
from benchmarks import ms_deform_attn as benchmark
from ops.ms_deform_attn import available_backends, ms_deform_attn


def test_benchmark_at_a_small_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ms_deform_attn_cases, "SHAPES", [(6, 7), (3, 4)])
    monkeypatch.setattr(ms_deform_attn_cases, "DECODER_QUERIES", 5)
    monkeypatch.setattr(frame, "RESULTS", tmp_path)
    monkeypatch.setattr(
        sys,
        "argv",
        ["benchmark", "--device", "cpu", "--rounds", "2", "--dtype", "float32", "bfloat16", "--peer", "math:dist"],
    )
    benchmark.main()
    (path,) = tmp_path.glob("ms_deform_attn-*.json")
    result = json.loads(path.read_text())
    assert result["device"]
    assert result["clock"] == "wall"
    assert result["torch"]
    implementations = {name for name in ("reference", "cpu") if available_backends()[name] is None}
    assert len(result["rows"]) == 3 * 2 * 2 * len(implementations)
    assert {row["implementation"] for row in result["rows"]} == implementations
    for row in result["rows"]:
        assert row["forward_ms"] > 0
        assert row["both_ms"] > 0
        assert 0 < row["output_error"] < (1e-5 if row["dtype"] == "float32" else 1e-2)
        assert 0 < row["gradient_error"] < (1e-5 if row["dtype"] == "float32" else 1e-2)
        if row["implementation"] == "reference":
            assert row["forward_ratio"] == row["both_ratio"] == 1
        assert row["floor_share"] is None
    printed = capsys.readouterr().out
    assert path.name in printed
    assert "left out: decoder, unfused, math:dist, torch.bfloat16: dist expected 2 arguments" in printed  # and no more
    assert len(result["left_out"]) == 3 * 2


@pytest.mark.parametrize("module", [benchmark, step])
@pytest.mark.parametrize("peer", ["nowhere:run", "math:nothing", "math"])
def test_a_peer_that_does_not_exist_is_said_at_once(
    module: types.ModuleType, peer: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmark", "--device", "cpu", "--peer", peer])
    assert module.main() == 2
    assert capsys.readouterr().err.startswith(f"error: {peer}: the module ")


def picky_peer(*tensors: torch.Tensor) -> torch.Tensor:
    """One that wants one dtype, as most do."""
    value, shapes, starts, locations, weights = tensors
    assert starts.tolist() == [0, 42]
    assert weights.dtype == value.dtype
    return ms_deform_attn(value, [(h, w) for h, w in shapes.tolist()], locations, weights, backend="reference")


def test_a_reference_that_fails_ends_nothing_and_peers_get_one_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    def ours(form: str, backend: str) -> benchmark.Run:
        def fail(x: ms_deform_attn_cases.Inputs) -> torch.Tensor:
            raise torch.OutOfMemoryError("no room\nat all")

        return fail if backend == "reference" else benchmark.ours(form, backend)

    monkeypatch.setattr(ms_deform_attn_peers, "ours", ours)
    monkeypatch.setattr(ms_deform_attn_cases, "SHAPES", [(6, 7), (3, 4)])
    arguments = argparse.Namespace(
        device="cpu", busy=False, rounds=1, peer=["test_ms_deform_attn_benchmark:picky_peer"]
    )
    failures: list[str] = []
    rows = benchmark.measure("encoder, grid", "unfused", torch.bfloat16, arguments, failures)
    assert failures == ["encoder, grid, unfused, reference, torch.bfloat16: no room"]
    assert rows[-1].implementation == "test_ms_deform_attn_benchmark:picky_peer"
    assert all(row.forward_ratio is None and row.output_error < 1e-2 for row in rows)
    assert "      -" in benchmark.show(rows[0])


@pytest.mark.parametrize("case", tune_ms_deform_attn.CASES)
def test_tuning_has_the_default_and_others_to_try(case: str) -> None:
    limit = 227 * 1024
    groups = tune_ms_deform_attn.all_variants(case, torch.bfloat16, limit)
    for what, variants in groups.items():
        plans = [variant.plan for variant in variants]
        assert variants[0].name == "default"
        assert len(set(plans)) == len(plans) >= 12
        assert all(plan.shared_bytes <= limit for plan in plans)
        assert all(plan.source == ("forward.cu" if what == "forward" else "backward.cu") for plan in plans)
