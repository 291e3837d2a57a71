"""The benchmark runs, tells the truth about errors, and says on what it ran."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import ms_deform_attn as benchmark
from benchmarks import ms_deform_attn_cases, tune_ms_deform_attn
from ops.ms_deform_attn import available_backends


def test_benchmark_at_a_small_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ms_deform_attn_cases, "SHAPES", [(6, 7), (3, 4)])
    monkeypatch.setattr(ms_deform_attn_cases, "DECODER_QUERIES", 5)
    monkeypatch.setattr(benchmark, "RESULTS", tmp_path)
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
    assert "decoder, unfused, math:dist, torch.bfloat16: dist expected 2 arguments" in printed  # left out, no more


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
