"""A comparison as JUnit XML: a suite for each model, a case for each target and cost."""

from __future__ import annotations

import platform
from collections.abc import Iterable
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from dgbench.render.outside import visible
from dgbench.report.compare import Comparison, Score

if TYPE_CHECKING:
    from junitparser import TestCase, TestSuite
    from junitparser.junitparser import FinalResult


def junit(found: Comparison, now: datetime | None = None) -> bytes:
    """Return the XML. A regression is a failure; what could not be compared is an error; a new target is skipped."""
    from junitparser import Error, JUnitXml, TestSuite

    document = JUnitXml()
    now = now or datetime.now(UTC)
    models = list(dict.fromkeys([score.model for score in found.scores] + [cost.model for cost in found.costs]))
    for number, name in enumerate(models):
        suite = TestSuite(visible(name))
        suite.add_property("verdict", found.verdict)
        for case in _cases(found, name):
            suite.add_testcase(case)
        _finish(suite, number, now)
        document.add_testsuite(suite)
    if found.problems or not models:
        suite = TestSuite("comparison")
        suite.add_property("verdict", found.verdict)
        for problem in found.problems or ("nothing to compare",):
            suite.add_testcase(_case("comparison", "files can be read", Error(visible(problem), "unreadable")))
        _finish(suite, len(models), now)
        document.add_testsuite(suite)
    return bytes(document.tostring())


def _cases(found: Comparison, model: str) -> Iterable[TestCase]:
    from junitparser import Error, Failure, Skipped

    for score in (score for score in found.scores if score.model == model):
        result: FinalResult | None = None
        if score.verdict == "worse":
            result = Failure(_in_words(score), "regression")
        elif score.verdict in ("missing", "not comparable"):
            result = Error(visible(score.note) or score.verdict, score.verdict)
        elif score.verdict == "new":
            result = Skipped("new: the baseline has no score of it")
        yield _case(model, f"mIoU on {score.target}", result)
    for cost in (cost for cost in found.costs if cost.model == model):
        decides = cost.verdict == "worse" and found.max_slowdown is not None and cost.change is not None
        text = f"{cost.change:+.1%}" if decides and cost.change is not None else ""
        yield _case(model, cost.name, Failure(text, "regression") if decides else None)


def _case(model: str, name: str, result: FinalResult | None) -> TestCase:
    from junitparser import TestCase

    case = TestCase(visible(name), f"dgbench.{visible(model)}", 0.0)
    if result is not None:
        case.result = [result]
    return case


def _in_words(score: Score) -> str:
    change = score.difference
    assert change is not None
    return (
        f"{100 * (score.base or 0):.1f} before, {100 * (score.head or 0):.1f} now: {100 * change.value:+.1f} points, "
        f"95 % interval {100 * change.low:+.1f} to {100 * change.high:+.1f}"
    )


def _finish(suite: TestSuite, number: int, now: datetime) -> None:
    """Fill in what the schema demands of a suite beside its cases, in its order."""
    from junitparser import SystemErr, SystemOut

    suite.update_statistics()
    suite.timestamp = now.strftime("%Y-%m-%dT%H:%M:%S")
    suite.hostname = platform.node() or "localhost"
    suite._elem.set("id", str(number))
    suite._elem.set("package", "dgbench")
    suite.append(SystemOut(""))
    suite.append(SystemErr(""))
