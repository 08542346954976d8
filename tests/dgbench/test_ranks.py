"""Ranks that only significant differences make, against a bootstrap and Holm's rule of other hands."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from records import record
from scipy import stats

from dgbench import metrics, render, results
from dgbench.recipe import dump, load_recipe, recipe_hash
from dgbench.report.leaderboard import leaderboard
from dgbench.report.rows import Row
from dgbench.results import Record

CLASSES = 19
TARGETS = ("streets-city", "streets-world")


def counts(quality: float, images: int, seed: int, target: str) -> NDArray[np.int64]:
    """Counts of a made-up model: images are hard or easy for all models alike, as `target` says."""
    hard = np.random.default_rng(TARGETS.index(target)).normal(0, 0.1, (images, 1))
    right = np.clip(quality + hard, 0.05, 0.95) * np.ones((images, CLASSES))
    hits = np.random.default_rng([seed, TARGETS.index(target)]).binomial(200, right)
    found = np.zeros((images, CLASSES, CLASSES), np.int64)
    diagonal = np.arange(CLASSES)
    found[:, diagonal, diagonal] = hits
    found[:, diagonal, (diagonal + 1) % CLASSES] = 200 - hits
    return found


def scored(
    folder: Path, method: str, quality: float, *, images: int = 40, seed: int = 0, names: Sequence[str] = (), **fields: object
) -> list[Record]:
    """Records of one model with their matrices, in a folder of its own."""
    written = []
    for target in TARGETS:
        matrices = counts(quality, images, seed, target)
        one = record(
            target,
            metrics.miou(matrices.sum(0)),
            method=method,
            checkpoint=f"{method}{seed}",
            n_images=images,
            n_available=images,
            **fields,
        )
        one = dataclasses.replace(one, interval=metrics.interval(matrices))
        written.append(results.write(one, folder / f"{method}{seed}", matrices, names or [f"{i:03d}" for i in range(images)]))
    return written


def rows(records: Sequence[Record], **how: object) -> list[Row]:
    [group] = leaderboard(records, published=False, **how).groups  # type: ignore[arg-type]
    return list(group.rows)


def ranks(found: Sequence[Row]) -> list[tuple[str, int | None]]:
    return [(row.method, row.rank) for row in found]


def test_rows_that_differ_by_chance_alone_share_a_rank(tmp_path: Path) -> None:
    records = [r for seed, name in enumerate("abc") for r in scored(tmp_path, name, 0.5, seed=seed)]
    found = rows(records)
    assert {row.rank for row in found} == {1}
    assert [row.untested for row in found] == ["", "", ""]
    means = [row.mean.miou for row in found if row.mean]
    assert means == sorted(means, reverse=True)
    assert len(set(means)) == 3


def test_a_rank_is_one_more_than_the_rows_that_are_better(tmp_path: Path) -> None:
    qualities = {"best": 0.7, "middle": 0.6, "alike": 0.6, "worst": 0.5}
    records = [r for seed, (name, q) in enumerate(qualities.items()) for r in scored(tmp_path, name, q, seed=seed)]
    assert sorted(ranks(rows(records)), key=lambda item: (item[1], item[0])) == [
        ("best", 1),
        ("alike", 2),
        ("middle", 2),
        ("worst", 4),
    ]


def test_the_same_ranks_as_by_a_paired_bootstrap_and_scipys_correction(tmp_path: Path) -> None:
    """p-values of 4,000 resamples of the images, normal in the tail; step-down correction written out."""
    qualities = {"a": 0.60, "b": 0.595, "c": 0.585, "d": 0.57}
    records = [r for seed, (name, q) in enumerate(qualities.items()) for r in scored(tmp_path, name, q, seed=seed)]
    rng, spread, score = np.random.default_rng(0), {}, {}
    weights = {target: rng.multinomial(40, np.full(40, 1 / 40), size=4000) for target in TARGETS}
    for seed, (name, q) in enumerate(qualities.items()):
        each = [counts(q, 40, seed, target) for target in TARGETS]
        score[name] = np.mean([metrics.miou(one.sum(0)) for one in each])
        spread[name] = np.mean(
            [
                np.nanmean(metrics.iou(np.einsum("bn,nij->bij", weights[t], one)), axis=1)
                for t, one in zip(TARGETS, each, strict=True)
            ],
            axis=0,
        )
    pairs = [(one, other) for one in qualities for other in qualities if score[one] > score[other]]
    p = {
        (one, other): 2 * stats.norm.sf((score[one] - score[other]) / (spread[one] - spread[other]).std()) for one, other in pairs
    }
    better = dict.fromkeys(qualities, 0)
    for place, pair in enumerate(sorted(pairs, key=p.__getitem__)):
        if p[pair] > 0.05 / (len(pairs) - place):
            break
        better[pair[1]] += 1
    assert dict(ranks(rows(records))) == {name: 1 + count for name, count in better.items()}
    assert len(set(better.values())) > 2


def test_many_pairs_ask_more_of_each(tmp_path: Path) -> None:
    """What two rows alone are told apart by (p = 0.02) is not enough among ten: 45 pairs."""
    two = [*scored(tmp_path, "a", 0.60, seed=1), *scored(tmp_path, "b", 0.597, seed=2)]
    assert ranks(rows(two)) == [("a", 1), ("b", 2)]
    others = [r for i in range(8) for r in scored(tmp_path, f"x{i}", 0.6, seed=1)]
    assert dict(ranks(rows([*two, *others])))["b"] == 1


def test_a_row_without_matrices_is_held_by_its_mean_and_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tested = [*scored(tmp_path, "a", 0.5, seed=1), *scored(tmp_path, "b", 0.5, seed=2)]
    bare = [record(target, 0.9, method="bare", checkpoint="bare", n_images=40, n_available=40) for target in TARGETS]
    found = rows([*tested, *bare])
    assert ranks(found)[0] == ("bare", 1)
    assert [row.rank for row in found[1:]] == [2, 2]
    assert [row.untested for row in found] == ["no per-image matrices", "", ""]
    render.show(leaderboard([*tested, *bare], published=False))
    text = capsys.readouterr().out
    assert "No test of ties of bare (tiny + tiny), ranked by the mean alone: no per-image matrices." in text
    assert "#: 1 + the rows that are significantly better" in text


def test_matrices_of_other_images_or_another_score_are_not_compared(tmp_path: Path) -> None:
    same = [r for seed, name in enumerate("ab") for r in scored(tmp_path, name, 0.5, seed=seed)]
    other = scored(tmp_path, "other", 0.5, seed=3, names=[f"other {i}" for i in range(40)])
    wrong = [dataclasses.replace(r, miou=0.9) for r in scored(tmp_path, "wrong", 0.5, seed=4)]
    damaged = scored(tmp_path, "damaged", 0.5, seed=5)
    for one in damaged:
        assert one.path is not None
        (one.path.parent / str(one.confusion)).write_bytes(b"PK")
    reasons = {row.method: row.untested for row in rows([*same, *other, *wrong, *damaged])}
    assert (reasons["a"], reasons["b"]) == ("", "")
    assert reasons["other"] == "matrices of other images than the other rows have"
    assert "do not give its score" in reasons["wrong"]
    assert "cannot be read" in reasons["damaged"]


def test_the_order_of_images_in_a_file_does_not_matter(tmp_path: Path) -> None:
    a = scored(tmp_path, "a", 0.60, seed=1)
    turned = []
    for one in scored(tmp_path / "b", "b", 0.594, seed=2):
        found = results.read_matrices(one)
        assert found.ids is not None
        turned.append(results.write(dataclasses.replace(one, id="turned"), tmp_path / "c", found.counts[::-1], found.ids[::-1]))
    assert ranks(rows([*a, *turned])) == [("a", 1), ("b", 2)]


def test_a_table_of_very_many_rows_is_not_compared_pair_by_pair() -> None:
    records = [r for i in range(60) for r in (record(t, 0.3 + i / 1000, method=f"m{i}", checkpoint=f"{i}") for t in TARGETS)]
    found = rows(records)
    assert [row.rank for row in found] == list(range(1, 61))
    assert {row.untested for row in found} == {"more than 50 rows"}


# ---- seeds


def trained(folder: Path, seed: int, quality: float, *settings: str, steps: int = 560) -> list[Record]:
    recipe = load_recipe("streets/mfuser", [f"train.seed={seed}", f"train.steps={steps}", *settings], check_method=False)
    found = scored(
        folder / f"{steps}", "mfuser", quality, seed=seed, recipe_hash=recipe_hash(recipe), commit="a" * 40, dirty=seed == 1
    )
    assert found[0].run is not None
    dump(recipe, found[0].run / "recipe.yaml")
    return [dataclasses.replace(r, seed=seed, checkpoint=f"{steps} {seed}") for r in found]


def test_runs_that_differ_in_the_seed_alone_are_one_row_of_mean_and_deviation(tmp_path: Path) -> None:
    each = [trained(tmp_path, seed, 0.5 + seed / 100) for seed in range(3)]
    [row] = rows([r for one in each for r in one])
    scores = np.array([[r.miou for r in one] for one in each])
    assert (row.seeds, len(row.runs), row.rank) == (3, 3, 1)
    assert set(row.commits) == {"a" * 12, "a" * 12 + "+"}
    for place, target in enumerate(TARGETS):
        score = row.scores[target]
        assert score is not None
        assert score.miou == pytest.approx(scores[:, place].mean())
        assert score.deviation == pytest.approx(scores[:, place].std(ddof=1))
        assert score.n_images == 40
    assert row.mean is not None
    assert row.mean.miou == pytest.approx(scores.mean())
    assert row.mean.deviation == pytest.approx(scores.mean(axis=1).std(ddof=1))


def test_other_settings_and_partly_scored_seeds_stay_rows_of_their_own(tmp_path: Path) -> None:
    seeds = [r for seed in range(2) for r in trained(tmp_path, seed, 0.5)]
    other = trained(tmp_path, 0, 0.5, steps=40)
    missing = trained(tmp_path, 7, 0.5)[:1]
    found = rows([*seeds, *other, *missing])
    assert sorted((row.seeds, row.rank is None) for row in found) == [(1, False), (1, True), (2, False)]
    assert [row.seeds for row in rows([*seeds, *other, *missing], every=True)] == [1, 1, 1, 1]


def test_a_row_of_seeds_is_compared_with_a_single_run(tmp_path: Path) -> None:
    seeds = [r for seed in range(3) for r in trained(tmp_path, seed, 0.6)]
    found = rows([*seeds, *trained(tmp_path, 0, 0.4, steps=40)])
    assert [(row.seeds, row.rank, row.untested) for row in found] == [(3, 1, ""), (1, 2, "")]


def test_the_table_says_how_many_seeds_and_what_their_width_means(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    seeds = [r for seed in range(3) for r in trained(tmp_path, seed, 0.5 + seed / 100)]
    render.show(leaderboard(seeds, published=False))
    text = capsys.readouterr().out
    assert text.splitlines()[1].split()[:3] == ["#", "method", "seeds"]
    assert "±, of several seeds: standard deviation over them; each value is their mean." in text
    assert "half the 95 % interval" not in text
    render.show(leaderboard(seeds, published=False), "json")
    [row] = json.loads(capsys.readouterr().out)["groups"][0]["rows"]
    assert row["seeds"] == 3
    assert row["mean"]["deviation"] > 0
