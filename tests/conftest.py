"""In continuous integration a test that could run and does not is a failure (``KIMI_CI=1``)."""

import os
from collections.abc import Generator

import pytest

# Their programs come with `make system` and the dev extra.
REQUIRED = ("tests/distributed/", "tests/docker/")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """The report of a test, failed where it was skipped for a program that is not there."""
    report = yield
    required = os.environ.get("KIMI_CI") == "1" and item.nodeid.startswith(REQUIRED)
    if required and report.skipped and not hasattr(report, "wasxfail"):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
        report.outcome, report.longrepr = "failed", f"KIMI_CI=1, and {reason}"
    return report
