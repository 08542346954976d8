"""Domains that a user declares are rows like any other, wherever they are declared, and are part of every hash."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from layouts import SIZE, blocks, polygons, write_image
from PIL import Image
from typer.testing import CliRunner

from dgbench import cli, protocol
from dgbench.data import custom
from dgbench.data.catalog import lookup, names, rows
from dgbench.data.dataset import SegDataset
from dgbench.errors import DataError, RecipeError
from dgbench.recipe import dump, load_recipe, recipe_hash

MINE = {
    "title": "My city",
    "folder": "photos-of-mine",
    "splits": {
        split: {"images": f"{split}/photos/*.jpg", "labels": {"photos/": "masks/", ".jpg": ".png"}} for split in ("train", "val")
    },
    "label_map": {1: "road", 2: 13},
    "ignored": [0, 9],
}
RECIPE = {
    "method": {"name": "source-only"},
    "data": {"source": "streets-game", "targets": ["mine"], "size": [256, 512], "crop": [256, 256]},
    "train": {"steps": 3, "batch_size": 2},
    "optim": {"lr": 1.0e-3},
}


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data root with the files of MINE, of which nothing is declared yet."""
    for split in ("train", "val"):
        write_image(tmp_path / f"photos-of-mine/{split}/photos/a.jpg", 0)
        write_image(tmp_path / f"photos-of-mine/{split}/photos/b.jpg", 1)
        (tmp_path / f"photos-of-mine/{split}/masks").mkdir()
        for name in "ab":
            label = np.tile(np.array([0, 1, 2, 9], np.uint8), (SIZE[0], SIZE[1] // 4))
            Image.fromarray(label).save(tmp_path / f"photos-of-mine/{split}/masks/{name}.png")
    monkeypatch.setenv("DGBENCH_DATA", str(tmp_path))
    monkeypatch.setenv("DGBENCH_CACHE", str(tmp_path / "cache"))
    return tmp_path


def written(path: Path, content: dict[str, object]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


def changed(**values: object) -> dict[str, object]:
    return MINE | values


def digest(**values: object) -> str:
    return custom.UserDomain.model_validate(changed(**values)).digest()


def listed(path: Path) -> list[str]:
    with pytest.raises(DataError) as caught:
        custom.read(path)
    return [line.strip() for line in caught.value.message.splitlines()[1:]]


def test_a_file_in_the_data_root_makes_a_domain(root: Path):
    written(root / "domains/mine.yaml", MINE)
    assert names()[-1] == "mine"
    data = SegDataset(lookup("mine"), "val")
    assert (len(data), data.available, data[0].name) == (2, 2, "val/photos/a.jpg")
    assert data[0].label[0, :4].tolist() == [255, 0, 13, 255]
    assert (data.domain.title, data.domain.role, data.policy) == ("My city", "both", "mine")


@pytest.mark.parametrize("where", ["my.yaml", "declarations/mine.yaml", "declarations"])
def test_what_the_environment_names_is_looked_into(root: Path, where: str, monkeypatch: pytest.MonkeyPatch):
    written(root / (where if where.endswith("yaml") else f"{where}/mine.yaml"), MINE | {"name": "mine"})
    monkeypatch.setenv("DGBENCH_DOMAINS", str(root / where))
    assert lookup("mine").title == "My city"


def test_a_path_is_as_good_as_a_name_and_is_forgotten_afterwards(root: Path):
    path = written(root / "somewhere/mine.yaml", MINE)
    assert (lookup(str(path)).name, lookup(str(path)).title) == ("mine", "My city")
    with pytest.raises(DataError, match="unknown domain `mine`"):
        lookup("mine")


def test_the_command_line_takes_it_by_path_and_from_the_root_that_is_given(root: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("DGBENCH_DATA")
    written(root / "domains/mine.yaml", MINE)
    for name in ("mine", str(root / "domains/mine.yaml")):
        done = CliRunner().invoke(cli.app, ["data", "verify", name, "--root", str(root), "--json", "--quiet"])
        assert done.exit_code == 0, done.output
        assert [report["n_pairs"] for report in json.loads(done.stdout)] == [2, 2]
    rows = json.loads(CliRunner().invoke(cli.app, ["data", "list", "--root", str(root), "--json"]).stdout)
    assert rows[-1]["name"] == "mine"
    assert rows[-1]["here"]["val"]["n_pairs"] == 2


def test_polygons_are_read_by_the_names_that_a_declaration_gives(root: Path):
    values = blocks([0, 1, 2], 0).astype(np.uint16)
    write_image(root / "shapes/a.jpg", 0)
    (root / "shapes/a.json").write_text(json.dumps(polygons(values, {0: "ground", 1: "hut", 2: "donkey"})))
    written(
        root / "domains/shapes.yaml",
        {
            "splits": {"val": {"images": "*.jpg", "labels": {".jpg": ".json"}}},
            "encoding": "polygons",
            "label_map": {"ground": "road", "hut": "building"},
            "ignored": ["donkey"],
        },
    )
    assert np.array_equal(SegDataset(lookup("shapes"), "val")[0].label, np.array([0, 2, 255], np.uint8)[values])


def test_a_map_of_dgbenchs_is_taken_by_its_name(root: Path):
    written(root / "domains/mine.yaml", {k: v for k, v in MINE.items() if k != "ignored"} | {"label_map": "synthia-ids"})
    assert SegDataset(lookup("mine"), "val")[0].label[0, :4].tolist() == [255, 10, 2, 7]


def test_the_revision_is_the_hash_of_what_fixes_pixels_and_labels():
    same = digest()
    assert {digest(title="Other"), digest(folder="/elsewhere"), digest(licence="CC0"), digest(ignored=[9, 0])} == {same}
    other = [
        digest(label_map={1: "road", 2: "truck"}),
        digest(ignored=[0]),
        digest(encoding="rgb16"),
        digest(splits={"val": MINE["splits"]["val"]}),
        digest(splits=MINE["splits"] | {"val": {"images": "*.jpg", "labels": {".jpg": ".png"}}}),
    ]
    assert len({same, *other}) == 6
    assert custom.build("mine", custom.UserDomain.model_validate(MINE)).revision() == f"user-{same}"


def test_the_protocol_hash_changes_with_the_declaration(root: Path):
    hashes = []
    for values in ({}, {"ignored": [0, 9, 10]}):
        written(root / "domains/mine.yaml", changed(**values))
        data = SegDataset(lookup("mine"), "val")
        rules = protocol.lookup("unified")
        row = protocol.domain_row(data.domain, "val", protocol.label_map(rules, data.domain), None, data.revision)
        hashes.append(protocol.protocol_hash(rules, row))
    assert hashes[0] != hashes[1]


# ---- in recipes


def recipe(path: Path, **data: object) -> Path:
    return written(path, RECIPE | {"data": RECIPE["data"] | data})


def test_a_recipe_declares_a_domain_of_its_own(root: Path):
    found = load_recipe(recipe(root / "r.yaml", domains={"mine": MINE}), check_method=False)
    assert found.data.targets == ("mine",)
    (row,) = found.data.rows(found.data.targets)
    assert SegDataset(row, "val").found.pairs[0] == ("val/photos/a.jpg", "val/masks/a.png")


def test_a_recipe_names_files_that_lie_beside_it(root: Path):
    written(root / "recipes/declared/mine.yaml", MINE)
    path = recipe(root / "recipes/r.yaml", domains=["declared/mine.yaml"])
    assert load_recipe(path, check_method=False).data.domains["mine"].title == "My city"


def test_a_target_may_be_the_path_of_a_declaration(root: Path):
    declared = written(root / "somewhere/mine.yaml", MINE)
    found = load_recipe(recipe(root / "r.yaml"), [f"data.targets=[{declared}]"], check_method=False)
    assert found.data.targets == ("mine",)


def test_a_resolved_recipe_holds_the_declarations_that_it_needs(root: Path):
    declared = written(root / "domains/mine.yaml", MINE)
    written(root / "domains/other.yaml", MINE | {"title": "not used"})
    found = load_recipe(recipe(root / "r.yaml"), check_method=False)
    assert set(found.data.domains) == {"mine"}
    kept = dump(found, root / "run/recipe.yaml")
    declared.unlink()
    again = load_recipe(kept, check_method=False)
    assert again == found
    assert recipe_hash(again) == recipe_hash(found)
    (row,) = again.data.rows(["mine"])
    assert SegDataset(row, "val")[0].label[0, :4].tolist() == [255, 0, 13, 255]


def test_reading_a_recipe_leaves_nothing_behind(root: Path):
    load_recipe(recipe(root / "r.yaml", domains={"mine": MINE}), check_method=False)
    with pytest.raises(DataError, match="unknown domain `mine`"):
        lookup("mine")
    other = load_recipe(recipe(root / "r.yaml", domains={"mine": changed(ignored=[0])}), check_method=False)
    assert other.data.domains["mine"].ignored == (0,)


def test_a_file_may_not_differ_from_what_the_recipe_or_the_data_root_declares(root: Path):
    found = load_recipe(recipe(root / "r.yaml", domains={"mine": MINE}), check_method=False)
    path = written(root / "elsewhere/mine.yaml", changed(ignored=[0]))
    with pytest.raises(DataError, match="`mine` is declared twice, differently: by the recipe and by .*elsewhere/mine.yaml"):
        found.data.rows([str(path)])
    other = written(root / "more/mine.yaml", MINE)
    with pytest.raises(DataError, match="`mine` is declared twice, differently"):
        rows([str(path), str(other)])
    written(root / "domains/mine.yaml", MINE)
    with pytest.raises(DataError, match="declared twice, differently: by .*domains/mine.yaml and by .*elsewhere/mine.yaml"):
        lookup(str(path))


def test_declarations_are_looked_for_in_the_root_that_is_given(root: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("DGBENCH_DATA")
    written(root / "domains/mine.yaml", MINE)
    path = recipe(root / "r.yaml")
    assert load_recipe(path, check_method=False, root=root).data.targets == ("mine",)
    with pytest.raises(RecipeError, match="unknown domain `mine`"):
        load_recipe(path, check_method=False)


def test_the_recipe_hash_changes_with_what_the_declaration_means(root: Path):
    def hashed(**values: object) -> str:
        return recipe_hash(load_recipe(recipe(root / "r.yaml", domains={"mine": changed(**values)}), check_method=False))

    assert hashed() == hashed(title="Other", folder="elsewhere")
    assert hashed() != hashed(label_map={1: "road", 2: "truck"})


def test_a_recipe_without_declarations_keeps_its_hash(root: Path):
    plain = load_recipe("streets/mfuser", check_method=False)
    written(root / "domains/mine.yaml", MINE)
    assert recipe_hash(load_recipe("streets/mfuser", check_method=False)) == recipe_hash(plain)
    assert "domains" not in dump(plain, root / "kept.yaml").read_text()


def test_one_name_cannot_mean_two_things(root: Path):
    written(root / "domains/mine.yaml", MINE)
    with pytest.raises(RecipeError, match="data.domains: `mine` is declared twice, differently: by .*mine.yaml and by"):
        load_recipe(recipe(root / "r.yaml", domains={"mine": changed(ignored=[0])}), check_method=False)
    assert load_recipe(recipe(root / "r.yaml", domains={"mine": changed(title="Other")}), check_method=False)
    written(root / "domains/b.yaml", changed(ignored=[0]) | {"name": "mine"})
    with pytest.raises(DataError, match="`mine` is declared twice, differently"):
        lookup("mine")


def test_problems_of_a_declaration_in_a_recipe_have_their_key_path(root: Path):
    path = recipe(root / "r.yaml", domains={"mine": MINE | {"encodin": "ids", "label_map": {1: "rode"}, "ignored": []}})
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, check_method=False)
    assert [line.strip() for line in caught.value.message.splitlines()[1:3]] == [
        "data.domains.mine.label_map: 1 leads to 'rode': expected one of the 19 classes or 0..18, did you mean `road`?",
        "data.domains.mine.encodin: unknown key, did you mean `encoding`?",
    ]


def test_a_source_may_be_trained_on_in_another_split(root: Path):
    path = recipe(root / "r.yaml", domains={"mine": MINE}, source="mine", targets=["streets-city"], source_split="val")
    found = load_recipe(path, check_method=False)
    assert found.data.source_split == "val"
    with pytest.raises(RecipeError, match="`mine` has no split `all`, only train, val"):
        load_recipe(path, ["data.source_split=all"], check_method=False)


# ---- what is wrong with a declaration


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"splits": {}}, "splits: expected at least one value, got {}"),
        ({"splits": {"val": {"images": "*.jpg"}}}, "splits.val.labels: missing"),
        (
            {"splits": {"val": {"images": "../*.jpg", "labels": {"a": "b"}}}},
            "splits.val.images: expected a glob below the domain's folder, without `..` and `**`, got '../*.jpg'",
        ),
        (
            {"splits": {"val": {"images": "img/*.jpg", "labels": {"img/": "/abs/"}}}},
            "splits.val.labels: expected replacements that stay below the domain's folder, got 'img/*.jpg' -> '/abs/*.jpg'",
        ),
        (
            {"splits": {"val": {"images": "img/*.jpg", "labels": {"img/": "../masks/"}}}},
            "splits.val.labels: expected replacements that stay below the domain's folder, got 'img/*.jpg' -> '../masks/*.jpg'",
        ),
        (
            {"splits": {"val": {"images": "img/*.jpg", "labels": {"img": ""}}}},
            "splits.val.labels: expected replacements that stay below the domain's folder, got 'img/*.jpg' -> '/*.jpg'",
        ),
        (
            {"splits": {"val": {"images": "xx/*.jpg", "labels": {"x": "."}}}},
            "splits.val.labels: expected replacements that stay below the domain's folder, got 'xx/*.jpg' -> '../*.jpg'",
        ),
        (
            {"splits": {"../../x": {"images": "*.jpg", "labels": {"a": "b"}}}},
            "splits: expected names without `/` and a leading `.`, got '../../x'",
        ),
        ({"folder": "../../x"}, "folder: expected a folder below the data root, without `..`, or an absolute one, got '../../x'"),
        ({"folder": "~nobody-of-this-name/x"}, "folder: expected a folder, and this system knows no home folder for '~nobody"),
        (
            {"splits": {"val": {"images": "*.jpg", "labels": {"a": "b"}, "count": 0}}},
            "splits.val.count: must be at least 1, got 0",
        ),
        ({"encoding": "grey"}, "encoding: expected 'ids', 'rgb16', 'colors', 'polygons' or 'panoptic', got 'grey'"),
        (
            {"label_map": "cityscapes-id", "ignored": []},
            "label_map: unknown label map `cityscapes-id`, did you mean `cityscapes-ids`?",
        ),
        ({"label_map": {1: 19}}, "label_map: 1 leads to 19: expected one of the 19 classes or 0..18, choose from road"),
        ({"label_map": {70000: 1}}, "label_map: expected stored values 0..65535, got 70000"),
        ({"label_map": {255: 1}}, "label_map: 255 always counts as ignored: leave it out"),
        ({"label_map": {"hut": 1}, "ignored": []}, "label_map: expected stored values 0..65535, got 'hut'"),
        ({"label_map": {1: 1}, "encoding": "colors", "ignored": []}, "label_map: colours are read by Cityscapes' palette"),
        ({"label_map": {1: 1}, "encoding": "polygons", "ignored": []}, "label_map: expected names of labels"),
        ({"ignored": [1]}, "ignored: 1 is in the label map, too"),
        ({"label_map": "train-ids"}, "ignored: the label map `train-ids` says itself what it ignores"),
        ({"foldr": "x"}, "foldr: unknown key, did you mean `folder`?"),
        ({"name": "gta"}, "name: `gta` is a built-in domain: choose another name"),
        ({"name": "My City"}, "name: `My City` is not a valid name of a domain"),
    ],
)
def test_a_problem_reads(values: dict[str, object], problem: str, tmp_path: Path):
    lines = listed(written(tmp_path / "mine.yaml", changed(**values)))
    assert [line for line in lines if line.startswith(problem)], lines


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("cityscapes.yaml", yaml.safe_dump(MINE), "`cityscapes` is a built-in domain"),
        ("My City.yaml", yaml.safe_dump(MINE), "`My City` is not a valid name of a domain"),
        ("mine.yaml", "splits: [", "mine.yaml:1: not valid YAML"),
        ("mine.yaml", "- a\n", "mine.yaml: expected `key: value` lines, got a list"),
        ("mine.yaml", "title: a\ntitle: b\n", "mine.yaml:2: not valid YAML: key `title` is given twice"),
    ],
)
def test_a_file_that_declares_nothing_is_refused(name: str, text: str, message: str, tmp_path: Path):
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=message):
        custom.read(tmp_path / name)


def test_a_declaration_that_is_not_there_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(DataError, match="no file .*mine.yaml"):
        lookup(str(tmp_path / "mine.yaml"))
    monkeypatch.setenv("DGBENCH_DOMAINS", str(tmp_path / "nowhere"))
    with pytest.raises(DataError, match="DGBENCH_DOMAINS names .*nowhere, which does not exist"):
        lookup("mine")


def test_a_folder_that_is_not_there_is_named(root: Path):
    written(root / "domains/mine.yaml", changed(folder="gone"))
    with pytest.raises(DataError, match=r"`mine` is not on this disk: no folder .*gone") as error:
        SegDataset(lookup("mine"), "val")
    assert "its declaration says `folder`" in str(error.value.hint)


def test_a_file_that_is_wrong_stops_only_what_needs_it(root: Path, caplog: pytest.LogCaptureFixture):
    written(root / "domains/mine.yaml", MINE)
    (root / "domains/broken.yaml").write_text("splits: [")
    written(root / "domains/wrong.yaml", changed(encodin="ids"))
    custom._warn.cache_clear()
    assert names()[-1] == "mine"
    assert len(SegDataset(lookup("mine"), "val")) == 2
    warned = [record.getMessage() for record in caplog.records if record.getMessage().startswith("left out: ")]
    assert len(warned) == 2  # once each
    assert "broken.yaml:1: not valid YAML" in warned[0]
    for name, told in (("broken", "broken.yaml:1: not valid YAML"), ("wrong", "encodin: unknown key, did you mean `encoding`?")):
        with pytest.raises(DataError, match=".") as caught:
            lookup(name)
        assert told in caught.value.message
    with pytest.raises(DataError, match="unknown domain `nosuch`"):
        lookup("nosuch")


def test_a_file_whose_name_leads_its_label_out_of_the_folder_is_refused(root: Path):
    splits = {"val": {"images": "*/photos/*.jpg", "labels": {"q": "", "photos/": "masks/", ".jpg": ".png"}}}
    written(root / "domains/mine.yaml", changed(splits=splits))
    assert len(SegDataset(lookup("mine"), "val")) == 4
    write_image(root / "photos-of-mine/q../photos/a.jpg", 0)
    with pytest.raises(DataError, match=r"the label of q../photos/a.jpg would be ../masks/a.png, which is not below"):
        SegDataset(lookup("mine"), "val")


def test_a_name_that_is_declared_twice_stops_those_alone_who_ask_for_it(root: Path, caplog: pytest.LogCaptureFixture):
    custom._warn.cache_clear()
    written(root / "domains/mine.yaml", MINE)
    written(root / "domains/two.yaml", {**MINE, "name": "town"})
    written(root / "domains/three.yaml", {**MINE, "name": "town", "ignored": [9]})
    (root / "domains/four.yaml").symlink_to("/dev/zero")
    (root / "domains/five.yaml").write_text("# comment\n" * 200_000)
    assert lookup("mine").name == "mine"
    assert "mine" in names()
    assert "town" not in names()
    assert sum("`town` is declared twice" in told for told in caplog.messages) == 1
    assert sum("at most 1,048,576 are read" in told for told in caplog.messages) == 1
    with pytest.raises(DataError, match="`town` is declared twice, differently"):
        lookup("town")
