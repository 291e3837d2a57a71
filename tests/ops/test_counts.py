"""The counts of benchmarks.count_ms_deform_attn, on accesses that can be counted by hand."""

from __future__ import annotations

import sys
import types

import numpy as np
import pytest
import torch
from ptx_launch import newest_architecture
from ptx_machine import Access, Region
from test_ptx_instructions import scaled_sums, triton

from benchmarks import count_ms_deform_attn as counts
from benchmarks import ms_deform_attn_cases

LANES = np.arange(32)


class SumsByTriton(torch.autograd.Function):
    """No attention, but two launches: in the forward, and in the backward."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, *inputs: torch.Tensor) -> torch.Tensor:
        ctx.inputs, rows = inputs, inputs[0].numel() // 32
        sums, total = torch.zeros(rows), torch.zeros(32)
        scaled_sums[(rows // 16, 1)](inputs[0], 1.5, sums, total, rows, ROWS=16, COLUMNS=32)
        return sums

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: torch.Tensor) -> tuple[torch.Tensor, ...]:
        SumsByTriton.forward(ctx, *ctx.inputs)
        return ctx.inputs


@pytest.mark.parametrize(
    ("space", "size", "addresses", "expected"),
    [
        ("shared", 4, 4 * LANES, 1),
        ("shared", 4, 0 * LANES, 1),  # the same word for all
        ("shared", 4, 8 * LANES, 2),
        ("shared", 4, 128 * LANES, 32),  # all in one bank
        ("shared", 8, 8 * LANES, 2),
        ("shared", 8, 32 * LANES, 8),
        ("shared", 16, 16 * LANES, 4),
        ("shared", 16, 16 * (LANES // 8), 4),  # one place a quarter
        ("shared", 16, 32 * LANES, 8),
        ("global", 4, 4 * LANES, 1),
        ("global", 4, 4 * LANES + 64, 2),
        ("global", 16, 16 * LANES, 4),
        ("global", 16, 4096 * (LANES // 4) + 16 * (LANES % 4), 8),  # rows of 64 bytes
        ("global", 4, 128 * LANES, 32),
    ],
)
def test_wavefronts(space: str, size: int, addresses: np.ndarray, expected: int) -> None:
    assert counts.wavefronts(space, LANES, addresses.astype(np.uint64), size) == expected
    both = np.concatenate([LANES, LANES + 32]), np.concatenate([addresses, addresses]).astype(np.uint64)
    assert counts.wavefronts(space, *both, size) == 2 * expected


def test_the_least_recently_used_sector_leaves_the_cache() -> None:
    counter = counts.Counter(32, [Region(1000, 4096, False)])
    for sector in (0, 1, 0, 2, 0, 1):  # with room for two, only the fetches of 0 after the first are hits
        counter(Access(0, "global", False, np.array([3]), np.array([1000 + 32 * sector], np.uint64), 4))
    assert counter.bytes_from_l2(64) == 4 * 32
    assert counter.bytes_from_l2(96) == 3 * 32
    counter(Access(0, "global", True, np.array([3]), np.array([1000], np.uint64), 16))
    assert counter.reduced == 16


@pytest.mark.skipif(newest_architecture() is None, reason="NVRTC is not installed")
def test_counts_of_a_small_encoder(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Some of the blocks: nothing is below the floor, and the assembler's part is plausible; a peer's stand beside."""
    monkeypatch.setattr(ms_deform_attn_cases, "SHAPES", [(16, 16), (8, 8)])
    rows = counts.measure("encoder, grid", torch.float32, 90, 3)
    assert [row["kernel"] for row in rows] == ["forward", "backward"]
    for row in rows:
        assert row["spilled"] == 0
        assert row["blocks"] == {"forward": 4, "backward": 5}[row["kernel"]]
        assert 1 < row["times the floor"] < 10
        assert 0.3 < row["instructions"] / row["ptx"] < 1.5
        assert "times the floor" in counts.show(row)
    peer = types.ModuleType("peer")
    inputs = ms_deform_attn_cases.make_inputs("encoder, grid")
    left_out = ("case", "kernel", "dtype")
    found = [(row["kernel"], inputs, {k: v for k, v in row.items() if k not in left_out}) for row in rows]
    vars(peer)["kernels"] = lambda architecture, blocks: found
    monkeypatch.setitem(sys.modules, "peer", peer)
    monkeypatch.setattr(counts, "measure", lambda *arguments: rows)
    counts.main(["--dtype", "float32", "--peer", "peer:kernels"])
    ours, theirs = capsys.readouterr().out.split("encoder, grid, peer:kernels, forward", 1)
    assert ours.splitlines()[1] in theirs


@pytest.mark.skipif(triton is None, reason="Triton is not installed")
def test_counts_of_kernels_of_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two of many blocks, each of 16 rows: a pass for each row read or added to, and one for the block's 16 sums."""
    monkeypatch.setattr(ms_deform_attn_cases, "SHAPES", [(16, 16)])
    rows = counts.measure_triton(
        "sums", lambda x: SumsByTriton.apply(x.value, x.locations, x.weights), torch.float32, 90, 2
    )
    assert [row["kernel"] for row in rows] == ["sums, forward", "sums, backward"]
    for row in rows:
        assert row["registers"] > 0
        assert row["spilled"] == 0
        assert row["wavefronts, global"] == 16 * 16 * 8
        assert row["wavefronts, reductions and stores"] == 16 * 16 * 8 + 16 * 8
        assert row["l2 bytes"] == 2 * 16 * 16 * 8 * 128 + 16 * 16 * 8 * 4
        assert 0.3 < row["instructions"] / row["ptx"] < 2
