"""What holds for every test: one that does not run has failed.

The machine may lack a GPU; nothing else may be missing. A test gets rights from a namespace of its own, or
shows what is right without them.
"""

from __future__ import annotations

from collections.abc import Generator

import pytest

MAY_LACK = "needs a GPU"

Report = pytest.TestReport | pytest.CollectReport


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    _refuse_to_skip(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    report = yield
    _refuse_to_skip(report)
    return report


def _refuse_to_skip(report: Report) -> None:
    if report.outcome != "skipped" or hasattr(report, "wasxfail") or not isinstance(report.longrepr, tuple):
        return
    path, line, reason = report.longrepr
    if not reason.removeprefix("Skipped: ").startswith(MAY_LACK):
        report.outcome = "failed"
        report.longrepr = f"{path}:{line}: only a test that {MAY_LACK} may be skipped, not for: {reason}"
