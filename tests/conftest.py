"""In continuous integration a test that could run and does not is a failure (``KIMI_CI=1``)."""

import os
from collections.abc import Generator

import pytest


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """The report of a test, failed where it was skipped: what it needs comes with `make system`
    and the dev extra."""
    report = yield
    required = os.environ.get("KIMI_CI") == "1"
    if required and report.skipped and not hasattr(report, "wasxfail"):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
        report.outcome, report.longrepr = "failed", f"KIMI_CI=1, and {reason}"
    return report
