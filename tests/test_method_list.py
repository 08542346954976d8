"""`dgbench methods` reads the methods' files without importing them, and says what they say when they are imported."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from dgbench import cli
from dgbench.resources import recipes_dir
from mfuser import methods

PLAIN = """
from dataclasses import dataclass

BACKBONES = ({"backbone": "own"},)


@dataclass
class Options:
    width: int
    name: str = str(1)
"""

every_method = pytest.mark.parametrize("name", methods.names())


def shown(*arguments: str) -> Any:
    done = CliRunner().invoke(cli.app, ["methods", *arguments, "--json"], prog_name="dgbench")
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


@every_method
def test_what_is_read_is_what_the_imported_method_has(name: str) -> None:
    module = methods.module(name)
    optional = {"ABSENT": {}, "LATER": ()}
    for constant, value in methods.constants(name).items():
        assert value == getattr(module, constant, optional.get(constant)), constant
    assert methods.releases(name) == tuple(getattr(module, "RELEASES", ()))


@every_method
def test_options_that_are_read_are_the_fields_of_the_imported_options(name: str) -> None:
    fields = dataclasses.fields(methods.options(name))
    described = methods.described_options(name)
    assert [row.name for row in described] == [field.name for field in fields]
    assert [row.type for row in described] == [field.type for field in fields]
    for row, field in zip(described, fields, strict=True):
        assert row.required == (field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING)
        if field.default is not dataclasses.MISSING:
            assert row.default == field.default, row.name


def test_a_comment_behind_or_above_an_option_is_its_description() -> None:
    comments = {row.name: row.comment for row in methods.described_options("mfuser")}
    assert comments["heads"] == "attention heads of both"
    assert comments["token_ids"] == "(K, 5), a NumPy array or a tensor of integers, too; None: by the tower's tokenizer"
    assert comments["ffn_dim"] == ""


def test_the_list_has_title_paper_towers_licence_and_recipes() -> None:
    listed = {row["name"]: row for row in shown()}
    assert list(listed) == methods.names()
    mfuser = listed["mfuser"]
    assert (mfuser["title"], mfuser["paper"].partition(":")[0], mfuser["fidelity"]) == ("MFuser", "Mamba as a Bridge", "exact")
    assert mfuser["towers"] == ["dinov2_l", "eva02"]
    assert mfuser["licences"] == ["Apache-2.0", "MIT"]
    files = [path for path in recipes_dir().rglob("*.yaml") if not path.name.startswith("_")]
    assert sorted(name for row in listed.values() for name in row["recipes"]) == sorted(
        path.relative_to(recipes_dir()).with_suffix("").as_posix() for path in files
    )
    (floor,) = (path for path in files if path.stem == "source-only")
    assert yaml.safe_load(floor.read_text())["method"]["name"] == "source-only"
    assert listed["source-only"]["recipes"] == ["streets/full", "streets/source-only"]


def test_one_method_has_its_options_backbones_and_releases() -> None:
    found = shown("MFuser")
    assert found["method"]["name"] == "mfuser"
    options = {row["name"]: row for row in found["options"]}
    assert options["vlm"]["default"] == "eva02"
    assert "image_size" not in options  # a recipe's `data.crop`
    assert found["backbones"][0] == {"vfm": "dinov2_l", "vlm": "eva02"}
    assert [row["recipe"] for row in found["releases"]] == ["mfuser/eva02-gta", "mfuser/clip-gta", "mfuser/siglip-gta"]


def test_an_unknown_method_is_refused_with_the_nearest_name() -> None:
    done = CliRunner().invoke(cli.app, ["methods", "source_only"], prog_name="dgbench")
    assert done.exit_code == 1
    assert done.stderr == "error: unknown method `source_only`\n\nhint: did you mean `source-only`?\n"


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    methods.__path__.append(str(tmp_path))
    try:
        yield tmp_path
    finally:
        methods.__path__.remove(str(tmp_path))


def test_a_method_without_paper_towers_or_recipe_is_listed(folder: Path) -> None:
    (folder / "plain_net.py").write_text(PLAIN)
    (row,) = (row for row in shown() if row["name"] == "plain-net")
    assert (row["title"], row["paper"], row["towers"], row["licences"]) == ("plain-net", "", ["own"], [])
    options = shown("plain-net")["options"]
    assert [(option["default"], option["required"]) for option in options] == [(None, True), ("str(1)", False)]
