"""Where data and caches lie: in the folders that variables name, or the user's own, never where a command happens to start."""

from __future__ import annotations

import os
import pwd
from pathlib import Path

import pytest
from typer.testing import CliRunner

from dgbench import cli
from dgbench.data.catalog import lookup
from dgbench.data.dataset import SegDataset
from dgbench.data.places import cache_root, data_root
from dgbench.doctor import doctor
from dgbench.errors import DataError


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/me")
    for name in ("DGBENCH_CACHE", "DGBENCH_DATA", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def homeless(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(pwd, "getpwuid", lambda uid: {}[uid])
    with pytest.raises(RuntimeError):
        Path.home()


def test_empty_variables_are_as_good_as_none(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("DGBENCH_CACHE", "DGBENCH_DATA", "XDG_CACHE_HOME"):
        monkeypatch.setenv(name, "")
    assert cache_root() == Path("/home/me/.cache/dgbench")
    assert data_root() == Path("data")


@pytest.mark.parametrize("value", ["cache", "./cache", "~/cache"])
def test_a_relative_xdg_cache_home_is_ignored_as_its_specification_says(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", value)
    assert cache_root() == Path("/home/me/.cache/dgbench")
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert cache_root() == Path("/somewhere/dgbench")


@pytest.mark.parametrize(("value", "meant"), [("sets", "{here}/sets"), ("../sets", "{above}/sets"), ("~/sets", "/home/me/sets")])
@pytest.mark.parametrize(("variable", "place"), [("DGBENCH_CACHE", cache_root), ("DGBENCH_DATA", data_root)])
def test_our_variables_are_refused_when_relative(
    variable: str, place: object, value: str, meant: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(DataError, match=f"{variable} is `{value}`, which is no absolute path") as error:
        place()  # type: ignore[operator]
    assert error.value.hint == f"set it to {meant.format(here=tmp_path, above=tmp_path.parent)}, or unset it"


def test_a_root_that_is_given_may_be_relative() -> None:
    listed = CliRunner().invoke(cli.app, ["data", "list", "--root", "sets", "--json"])
    assert listed.exit_code == 0, listed.output
    assert "DGBENCH_DATA" not in os.environ


@pytest.mark.parametrize("home", ["none", "relative"])
def test_without_a_home_folder_a_rendered_domain_says_which_variable_helps(
    home: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    if home == "none":
        request.getfixturevalue("homeless")
    else:
        monkeypatch.setenv("HOME", "me")
    with pytest.raises(DataError, match="there is no home folder to keep a cache in") as error:
        SegDataset(lookup("streets-city"), "val", size=(32, 64), limit=1)[0]
    assert error.value.hint == "set HOME, or DGBENCH_CACHE to a folder that is yours"
    assert not list(tmp_path.iterdir())
    monkeypatch.setenv("DGBENCH_CACHE", str(tmp_path / "cache"))
    assert SegDataset(lookup("streets-city"), "val", size=(32, 64), limit=1)[0].image.shape == (32, 64, 3)


@pytest.mark.usefixtures("homeless")
def test_the_doctor_reports_what_has_no_place_and_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DGBENCH_DATA", "sets")
    found = {check.name: check for check in doctor()}
    assert (found["cache folder"].state, found["data root"].state) == ("fail", "fail")
    assert "DGBENCH_DATA is `sets`" in found["data root"].detail
    assert "home folder" in found["cache folder"].detail
    assert "hub" in found
