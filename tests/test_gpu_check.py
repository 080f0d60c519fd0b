"""What of `make gpu-check` needs no GPU: its cases, comparisons, report and exit codes."""

from dataclasses import fields
from itertools import cycle
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from benchmarks import gpu_check
from benchmarks.gpu_cases import EXACT, cases, compare
from benchmarks.gpu_check import Result, exit_code, written
from kimi_pretrain.ops.kernels import REFERENCE, Kernels
from kimi_pretrain.ops.native import library
from kimi_pretrain.ops.registry import select
from tests.distributed.ranks import run_ranks

SMALL = (40, 260, 130)
DTYPES = [torch.bfloat16, torch.float32]


def test_without_a_gpu_it_says_so_in_one_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a check that passes, or leaves a report, where nothing was looked at."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    report = tmp_path / "report.md"
    assert gpu_check.main(["--report", str(report)]) == 2
    told = capsys.readouterr().out
    assert told.startswith("gpu-check: torch ")
    assert told.endswith("sees no CUDA GPU here, so nothing was checked\n")
    assert told.count("\n") == 1
    assert not report.exists()


def test_every_op_has_a_case() -> None:
    """Catches a kernel that the check leaves out."""
    ops = [case.op for case in cases(torch.bfloat16, *SMALL)]
    assert sorted(ops) == sorted(field.name for field in fields(Kernels))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_plain_torch_agrees_with_itself(dtype: torch.dtype) -> None:
    """Catches tolerances that bf16 itself breaks, and cases that run on no one."""
    for case in cases(dtype, *SMALL):
        found = compare(case, getattr(REFERENCE, case.op), "cpu")
        assert found.passed, f"{case.op}: {found}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_native_kernels_agree(dtype: torch.dtype) -> None:
    """Catches a comparison that a right kernel fails, on the kernels that run here."""
    if library.missing() is not None:
        pytest.skip(f"no native kernels: {library.missing()}")
    for case in cases(dtype, *SMALL):
        found = compare(case, select(case.op, "auto", "cpu", dtype), "cpu")
        assert found.passed, f"{case.op}: {found}"
        if case.tolerance == EXACT:
            assert str(found) == "same bytes"


def test_a_wrong_kernel_is_found() -> None:
    """Catches a comparison that anything passes: one result, then one gradient, 3 % off."""

    def swiglu(x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = REFERENCE.swiglu(x)
        return y + 0.03 * y.detach()  # the gradient is right

    def gradient_off(x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = REFERENCE.swiglu(x)
        return 1.03 * y - 0.03 * y.detach()  # the result is right

    (case,) = [c for c in cases(torch.float32, *SMALL) if c.op == "swiglu"]
    for wrong in (swiglu, gradient_off):
        assert not compare(case, wrong, "cpu").passed
    (case,) = [c for c in cases(torch.float32, *SMALL) if c.op == "quantise_tiles"]

    def last_bit(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        q, scale = REFERENCE.quantise_tiles(x)
        q.view(torch.uint8)[0, 0] ^= 1
        return q, scale

    assert not compare(case, last_bit, "cpu").passed


def test_parity_and_bandwidth_name_who_ran() -> None:
    """Catches a plain-torch fallback that is reported as a kernel that held."""
    for result in gpu_check.parity("cpu", *SMALL):
        fell_back = result.detail.startswith("reference: ")
        assert (result.passed is None) == fell_back, result
    if library.missing() is not None:
        pytest.skip(f"no native kernels: {library.missing()}")
    ticks = cycle([1.0, 2.0])
    found = gpu_check.bandwidth("cpu", *SMALL, lambda work: (work(), next(ticks))[1])
    moving = [case for case in cases(torch.bfloat16, *SMALL) if case.moved is not None]
    differentiable = [f"{case.op}, its gradient" for case in moving if case.moved_back is not None]
    assert {r.what for r in found} == {*(case.op for case in moving), *differentiable}
    assert set(differentiable) == {
        f"{op}, its gradient" for op in ("swiglu", "rms_norm", "weighted_rows")
    }
    assert all(r.passed is False for r in found)  # a copy of 1 s, then a kernel of 2 s


def test_offload_is_right_and_a_defect_is_seen() -> None:
    """Catches a stress that anything passes, a copy that nobody looks at afterwards, and a report
    that calls copies held which waited for the compute."""
    cpu = torch.device("cpu")
    found = {r.what: r for r in gpu_check.offload(cpu, 20, 1000, lambda: lambda: True)}
    assert [r.passed for r in found.values()] == [True, True, True], found
    assert found["late copies"].detail.startswith("0 of 80 tensors wrong, 0.00 GB")
    waited = gpu_check.offload(cpu, 1, 1000, lambda: lambda: False)[-1]
    assert waited.passed is False
    assert waited.detail.endswith("back; not beside compute")


def test_the_report_counts_and_the_exit_code_follows() -> None:
    """Catches a failure that ends with 0, and a report that hides what was not looked at."""
    good = Result("parity", "swiglu", True, "native: same bytes")
    unseen = Result("parity", "attention", None, "reference: not installed")
    bad = Result("streams", "swiglu", False, "it did not wait")
    assert exit_code([good, unseen]) == 0
    assert exit_code([good, bad]) == 1
    assert exit_code([unseen]) == 1
    text = written("a card", [good, unseen, bad])
    assert "3 checks, 1 failed, 1 not looked at" in text
    assert "| streams | swiglu | FAILED | it did not wait |" in text


def _over_gloo(rank: int, size: int, folder: str, spoil: bool) -> list[Result]:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=size)
    if spoil:
        real = dist.all_to_all_single
        dist.all_to_all_single = lambda out, *rest: (real(out, *rest), out.mul_(2))
    results = gpu_check.collectives(torch.device("cpu"))
    dist.destroy_process_group()
    return results


@pytest.mark.parametrize("spoil", [False, True])
def test_collectives_know_what_should_arrive(tmp_path: Path, spoil: bool) -> None:
    """Catches a smoke test of NCCL that any data passes."""
    for results in run_ranks(2, _over_gloo, str(tmp_path), spoil):
        held = {result.what: result.passed for result in results}
        assert held == {
            "all-reduce": True,
            "maximum": True,
            "uneven all-to-all, bf16": not spoil,
        }
        assert results[0].detail == "2 ranks over gloo"
