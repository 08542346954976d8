"""`streets-pretrain`: nothing that sets a domain apart is shared with any other, and no benchmark takes it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields

import numpy as np
import pytest

from dgbench import streets
from dgbench.data.catalog import lookup, rows
from dgbench.errors import DataError, RecipeError
from dgbench.recipe import load_recipe
from dgbench.streets.compose import VERSION, compose
from dgbench.streets.dice import generator
from dgbench.streets.fleet import FLEETS
from dgbench.streets.patterns import PATTERNS
from dgbench.streets.places import STYLES
from dgbench.streets.style import Style

NAME = "streets-pretrain"
OWN = STYLES[NAME][1]
OTHERS = {name: styles for name, (_, styles, _) in STYLES.items() if name != NAME}


def colours(value: object) -> Iterator[tuple[float, ...]]:
    if isinstance(value, tuple) and len(value) == 3 and all(isinstance(part, float) for part in value):
        yield value
    elif isinstance(value, tuple):
        for part in value:
            yield from colours(part)


def all_of(styles: tuple[Style, ...], field: str) -> set[tuple[float, ...]]:
    return {colour for style in styles for colour in colours(getattr(style, field))}


def words(styles: tuple[Style, ...], field: str) -> set[str]:
    found = (getattr(style, field) for style in styles)
    return {word for given in found for word in ([given] if isinstance(given, str) else given)}


@pytest.mark.parametrize("field", ["height", "focal", "haze"])
@pytest.mark.parametrize("other", OTHERS)
def test_ranges_of_cameras_and_haze_touch_no_other_domains(field, other):
    for own in OWN:
        for style in OTHERS[other]:
            (low, high), (other_low, other_high) = getattr(own, field), getattr(style, field)
            assert high < other_low or low > other_high


@pytest.mark.parametrize("other", OTHERS)
def test_no_colour_of_a_palette_is_another_domains(other):
    shared = 0
    for field in (field.name for field in fields(Style)):
        own, theirs = np.array(list(all_of(OWN, field))), np.array(list(all_of(OTHERS[other], field)))
        if len(theirs):
            assert len(own), field
            assert np.abs(own[:, None] - theirs[None]).max(axis=2).min() >= 0.004, field
            shared += 1
    assert shared == 13  # markings, walls, leaves, cars, clothes and so on


@pytest.mark.parametrize(
    "field",
    [
        "facades",
        "facades_tall",
        "wall_textures",
        "plain_side",
        "base",
        "free_walls",
        "fences",
        "paving_textures",
        "trees",
        "shrub",
        "signs",
        "board",
        "fleet",
    ],
)
def test_no_texture_plant_sign_or_vehicle_is_another_domains(field):
    assert not words(OWN, field) & {word for styles in OTHERS.values() for word in words(styles, field)}


def test_textures_of_the_pretraining_streets_are_not_those_of_others_under_another_name():
    own = {
        name for field in ("facades", "facades_tall", "wall_textures", "fences", "paving_textures") for name in words(OWN, field)
    }
    tiles = {name: np.stack(make()) for name, make in PATTERNS.items()}
    for name in own:
        nearest = min(np.abs(tiles[name] - tile).mean() for other, tile in tiles.items() if other not in own)
        assert nearest > 0.01, name


def test_vehicles_have_other_shapes():
    usual, own = FLEETS["usual"], FLEETS["pretraining"]
    for kind in ("cars", "trucks", "buses"):
        known = {measures[1:] for measures in getattr(usual, kind)()}
        assert not known & {measures[1:] for measures in getattr(own, kind)()}, kind
    heights = [{float(section.corners[..., 1].max()) for section in fleet.tram_sections()} for fleet in (usual, own)]
    corners = [{section.corners.tobytes() for section in fleet.tram_sections()} for fleet in (usual, own)]
    assert heights[0]
    assert not corners[0] & corners[1]


def test_no_scene_has_a_seed_of_another_domain():
    places = {place for place, _, _ in STYLES.values()}
    states = {
        generator(VERSION, place, split, index, "scene").state["state"]["state"]
        for place in places
        for split, count in (("train", 500), ("val", 100))
        for index in range(count)
    }
    assert len(places) == 5
    assert len(states) == 5 * 600
    assert compose(NAME, "val", 0).key == (VERSION, "pretrain", "val", 0)


def test_there_is_no_night_and_no_weather():
    for index in range(12):
        look = compose(NAME, "train", index).look
        assert (look.night, look.rain, look.fog, look.snow, look.wet) == (0, 0, 0, 0, 0)
    assert streets.weather(NAME, "train", 0) == ""


def test_looks_are_more_varied_than_in_any_other_domain():
    for field in ("exposure", "contrast", "saturation", "sun_height"):
        low, high = getattr(OWN[0], field)
        for style in (style for styles in OTHERS.values() for style in styles):
            other_low, other_high = getattr(style, field)
            assert high - low > other_high - other_low, field


def test_turning_hues_keeps_greys_and_brightness():
    from dgbench.streets.sensor import _turned

    rng = np.random.default_rng(0)
    grey = rng.random((4, 6), np.float32)
    for channel in _turned([grey, grey, grey], 20.0):
        assert np.allclose(channel, grey, atol=1e-5)
    given = list(rng.random((3, 4, 6), np.float32))
    turned = _turned(given, -15.0)
    assert np.allclose(sum(turned), sum(given), atol=1e-5)
    assert np.allclose(_turned(_turned(turned, 10.0), 5.0), given, atol=1e-5)


def test_it_is_listed_for_pretraining_and_refused_as_source_and_target():
    assert lookup(NAME).role == "pretrain"
    with pytest.raises(DataError, match="`streets-pretrain` is for pretraining only"):
        rows([NAME])
    for setting in (f"data.source={NAME}", f"data.targets=[{NAME}]"):
        with pytest.raises(RecipeError, match="for pretraining only"):
            load_recipe("streets/smoke", [setting])
