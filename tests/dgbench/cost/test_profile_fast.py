"""Profiles of mode fast."""

from __future__ import annotations

import pytest

from dgbench.cost.profile import profile, subjects
from dgbench.errors import DgbenchError
from dgbench.progress import Silent
from dgbench.render.profile import profile_tables


def measured(**settings):
    chosen = subjects(["linear"], vfm="tiny", size=(64, 64))
    return profile(chosen, Silent(), device="cpu", **settings)


def test_fast_models_are_timed_and_the_table_says_so():
    found = measured(mode="fast", compiles=False, batches=(1, 2))
    assert (found.mode, found.dtype, found.compiled) == ("fast", "bf16", False)
    (row,) = found.rows
    assert [timing.batch for timing in row.timings] == [1, 2]
    assert row.step is None
    (times,) = [table for table in profile_tables(found) if "bf16, mode fast, on" in table.title]
    assert any("No training step: mode fast is for inference" in line for line in times.legend)


def test_exact_models_are_timed_as_before():
    found = measured(batches=(1,))
    assert (found.mode, found.dtype, found.compiled) == ("exact", "fp32", False)
    assert not any("mode fast" in table.title for table in profile_tables(found))


@pytest.mark.parametrize("settings", [{"compiled": True}, {"dtype": "fp32"}])
def test_what_does_not_go_with_fast_is_refused(settings):
    with pytest.raises(DgbenchError, match="mode `fast` has its own types") as error:
        measured(mode="fast", **settings)
    assert "without --compile and --dtype" in error.value.hint
