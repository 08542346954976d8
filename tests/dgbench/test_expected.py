"""Whether a training came out as its recipe is expected to, and when nothing can be said."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path

import pytest
from records import record

from dgbench import render
from dgbench.errors import RecipeError
from dgbench.recipe import Recipe, dump, load_recipe, recipe_hash
from dgbench.render.leaderboard import leaderboard_tables
from dgbench.report.expected import Expected, held_against, origins_of, references, weights_of
from dgbench.report.leaderboard import leaderboard
from dgbench.results import Record

RECIPE = "streets/mfuser-scratch"
SHIPPED = next(reference for reference in references() if reference.recipe == RECIPE)


def scored(recipe: Recipe, miou: dict[str, float], **fields: object) -> list[Record]:
    hashes = {target or recipe.data.source: value for target, value in SHIPPED.hashes.items()}
    return [
        record(target, value, protocol_hash=hashes[target], recipe_hash=recipe_hash(recipe), **fields)
        for target, value in miou.items()
    ]


def held(recipe: Recipe, records: list[Record], shipped: Recipe | None = None) -> Expected:
    found = held_against(recipe, shipped or load_recipe(RECIPE), records)
    assert found is not None
    return found


def test_each_domain_is_within_or_outside_its_range(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        f"{{target: streets-{name}, miou: {miou}, tolerance: 0.03, from: x}}"
        for name, miou in (("game", 0.371), ("city", 0.256), ("adverse", 0.143))
    ]
    shipped = load_recipe(RECIPE, [f"expect=[{', '.join(rows)}]"])
    recipe = load_recipe(RECIPE, ["train.seed=3", "train.workers=2"])
    found = held(recipe, scored(recipe, {"streets-game": 0.372, "streets-city": 0.286, "streets-adverse": 0.1131}), shipped)
    assert [(v.target, v.within) for v in found.verdicts] == [
        ("streets-game", True),
        ("streets-city", True),  # at the end of the range
        ("streets-adverse", True),
    ]
    found = held(recipe, scored(recipe, {"streets-city": 0.287, "streets-adverse": 0.112}), shipped)
    assert [v.within for v in found.verdicts] == [False, False]
    render.show(found)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "This run against what recipe streets/mfuser-scratch is expected to give: mIoU in %"
    assert lines[2].split() == ["streets-city", "28.7", "22.6", "to", "28.6", "outside"]
    assert lines[4] == "Range: expected score ± tolerance; the width is a margin: no other seeds were measured."


def test_a_width_that_was_measured_says_over_how_many_seeds(capsys: pytest.CaptureFixture[str]) -> None:
    row = "{target: streets-city, miou: 0.4, tolerance: 0.02, seeds: 5, from: x}"
    recipe = load_recipe(RECIPE, [f"expect=[{row}]"])
    render.show(held(recipe, scored(recipe, {"streets-city": 0.4}), recipe))
    assert "the width is of 5 training runs with other seeds" in capsys.readouterr().out


@pytest.mark.parametrize("seeds", ["1", "0", "true"])
def test_one_seed_measures_no_width(seeds: str) -> None:
    with pytest.raises(RecipeError, match=r"expect\[0\]\.seeds"):
        load_recipe(RECIPE, [f"expect=[{{target: streets-city, miou: 0.4, tolerance: 0.02, seeds: {seeds}, from: x}}]"])


def test_another_setting_has_no_expected_range(capsys: pytest.CaptureFixture[str]) -> None:
    recipe = load_recipe(RECIPE, ["train.steps=40"])
    found = held(recipe, scored(recipe, {"streets-city": 0.25}))
    assert not found.verdicts
    render.show(found)
    said = "No expected range of recipe streets/mfuser-scratch for this run: not as in the recipe: train.steps=40\n"
    assert capsys.readouterr().out == said


@pytest.mark.parametrize("changed", [{"n_images": 3}, {"n_extra": 1}, {"rendered": True}, {"protocol_hash": "other"}])
def test_scores_of_other_images_are_not_held_against_it(changed: dict[str, object]) -> None:
    recipe = load_recipe(RECIPE)
    records = [dataclasses.replace(r, **changed) for r in scored(recipe, {"streets-city": 0.25})]
    assert held(recipe, records).reason == "no domain was scored in full as its expected score was"


def test_a_recipe_that_expects_nothing_says_nothing() -> None:
    smoke = load_recipe("streets/smoke")
    assert held_against(smoke, smoke, []) is None


def test_other_tower_weights_have_no_expected_range() -> None:
    row = "{target: streets-city, miou: 0.4, tolerance: 0.02, weights: {vfm: 0123456789abcdef}, from: x}"
    recipe = load_recipe(RECIPE, [f"expect=[{row.replace('0123456789abcdef', chr(34) + '0123456789abcdef' + chr(34))}]"])
    city = scored(recipe, {"streets-city": 0.4})

    def with_weights(sha: str) -> Expected:
        return held(recipe, [record(kind="train", extra={"weights.vfm": sha, "loss": 1.0}), *city], recipe)

    assert with_weights("0123456789abcdef" + 48 * "0").verdicts
    assert "vfm weights 0123456789abcdef, this run had ffffffffffffffff" in with_weights(64 * "f").reason
    assert "does not say which it had" in held(recipe, city, recipe).reason


def test_a_reference_of_other_tower_weights_does_not_stand_beside_the_run() -> None:
    def kinds(weights: dict[str, str], extra: dict[str, str]) -> list[str]:
        reference = dataclasses.replace(SHIPPED, hashes={}, protocol_digest="", weights=weights)
        records = [record("streets-city", 0.4, recipe=RECIPE), record(kind="train", extra=extra, recipe=RECIPE)]
        return [row.kind for group in leaderboard(records, [reference], beside=True).groups for row in group.rows]

    assert kinds({}, {}) == ["run", "reference"]
    assert kinds({"vfm": "0123abcd"}, {"weights.vfm": "0123abcd" + 56 * "0"}) == ["run", "reference"]
    assert kinds({"vfm": "0123abcd"}, {"weights.vfm": 64 * "f"}) == ["run"]
    assert kinds({"vfm": "0123abcd"}, {}) == ["run"]


def test_weights_and_seeds_are_in_no_recipe_hash_and_come_back(tmp_path: Path) -> None:
    row = "{target: streets-city, miou: 0.4, tolerance: 0.02, seeds: 5, weights: {vfm: abcdef01}, from: x}"
    recipe = load_recipe(RECIPE, [f"expect=[{row}]"])
    assert recipe_hash(recipe) == recipe_hash(load_recipe(RECIPE))
    assert load_recipe(dump(recipe, tmp_path / "recipe.yaml")) == recipe
    plain = "{target: streets-city, miou: 0.4, tolerance: 0.02, from: x}"
    assert "seeds" not in dump(load_recipe(RECIPE, [f"expect=[{plain}]"]), tmp_path / "plain.yaml").read_text()


def test_a_training_records_the_weights_that_its_towers_began_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the Hub's cache keeps files: a link in a snapshot's folder."""
    import huggingface_hub.constants

    from dgbench.engine.trained import _tower_weights
    from mfuser.towers.table import TOWERS

    row = TOWERS["dinov2_l"].weights
    assert row is not None
    repo = tmp_path / f"models--{row.repo.replace('/', '--')}"
    (repo / "snapshots" / "abc").mkdir(parents=True)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("abc")
    (repo / "snapshots" / "abc" / row.file).write_bytes(b"weights")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    recipe = load_recipe(RECIPE)
    options = recipe.method.model_copy(update={"vfm": "dinov2_l"})
    found = _tower_weights(recipe.model_copy(update={"method": options}))
    sha = hashlib.sha256(b"weights").hexdigest()
    assert found == {"weights.vfm": sha, "origin.vfm": f"dinov2_l, {row.repo}/{row.file}"}
    assert weights_of([record(kind="train", extra=found)]) == {"vfm": sha}
    (told,) = origins_of(record(kind="train", extra=found))
    assert told == f"dinov2_l, timm/vit_large_patch14_dinov2.lvd142m/model.safetensors, sha256 {sha[:12]}"


def test_a_row_names_the_weights_that_it_started_from() -> None:
    extra = {"weights.vfm": 64 * "a", "origin.vfm": "dinov2_s, timm/vit_small/model.safetensors"}
    records = [record("streets-city", 0.4), record(kind="train", extra=extra)]
    (group,) = leaderboard(records).groups
    assert group.rows[0].weights == ("dinov2_s, timm/vit_small/model.safetensors, sha256 aaaaaaaaaaaa",)
    (table,) = leaderboard_tables(leaderboard(records, published=False))
    assert "Weights: dinov2_s, timm/vit_small/model.safetensors, sha256 aaaaaaaaaaaa." in table.legend


def test_seeds_of_other_tower_weights_are_no_seeds_of_one_row(tmp_path: Path) -> None:
    recipe = load_recipe(RECIPE)

    def seeds(*shas: str) -> list[int]:
        records = []
        for seed, sha in enumerate(shas):
            run = tmp_path / f"{shas[-1][0]}-{seed}"
            run.mkdir()
            seeded = recipe.model_copy(update={"train": recipe.train.model_copy(update={"seed": seed})})
            dump(seeded, run / "recipe.yaml")
            own = {
                "path": run / "record-x.json",
                "recipe_hash": recipe_hash(seeded),
                "checkpoint": f"{run.name}/step",
                "seed": seed,
            }
            records += [record("streets-city", 0.4, **own), record(kind="train", extra={"weights.vfm": sha}, **own)]
        (group,) = leaderboard(records, published=False).groups
        return [row.seeds for row in group.rows]

    assert seeds(64 * "a", 64 * "a") == [2]
    assert seeds(64 * "a", 64 * "b") == [1, 1]
