"""What is printed and attached to bugs."""

import pytest

from kimi_pretrain.doctor.examine import Examination
from kimi_pretrain.doctor.findings import BAD, NOTE, OK, Finding
from kimi_pretrain.doctor.report import bug_report, json_text, text

SECRET = "hunter2hunter2"


def examination(*findings: Finding) -> Examination:
    look = {
        "same": {
            "version of torch": "2.13.0",
            "driver": "570.86",
            "kernel of swiglu": "native",
            "kernel of rms_norm": "reference: asked for",
            "kernel of take_rows": "native",
            "variable NCCL_NET": SECRET,
        },
        "facts": {"device": "cuda:0", "dtype": "torch.bfloat16", "disk": None},
        "findings": [],
    }
    return Examination(
        hosts=["node-1"], looks={"node-1": look}, probes=[], clocks=[0.0], slow=[],
        findings=list(findings),
    )  # fmt: skip


def test_what_is_bad_stands_last_and_kernels_by_reason() -> None:
    """Catches a finding that scrolls away, and a line for each of a hundred ops."""
    lines = text(
        examination(
            Finding(BAD, "GPU 3", "7 of 8 NVLinks are up", "nvidia-smi nvlink -s"),
            Finding(OK, "port", "29500 is free"),
            Finding(NOTE, "ulimit -n", "1024 open files"),
        )
    ).splitlines()
    assert lines[2:] == [
        "driver: 570.86",
        "kernels, native: swiglu, take_rows",
        "kernels, reference: asked for: rms_norm",
        "  ok   port: 29500 is free",
        " note  ulimit -n: 1024 open files",
        " BAD   GPU 3: 7 of 8 NVLinks are up; try nvidia-smi nvlink -s",
        "not fit for a run: 1 to mend",
    ]


def test_no_way_out_tells_a_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches the value of a token in a variable that NCCL reads, which differs between hosts and
    is therefore told in words too, and one on the command line."""
    monkeypatch.setenv("REGISTRY_TOKEN", SECRET)
    found = examination(Finding(BAD, "variable NCCL_NET differs", f"a has {SECRET}"))
    for told in (text(found), json_text(found), bug_report(found, [f"run_dir=/{SECRET}"])):
        assert SECRET not in told
        assert "***" in told
