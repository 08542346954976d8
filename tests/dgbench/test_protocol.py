"""Protocols give the sizes that the papers' configs give, say what they rule, and their hash tells any two apart."""

from __future__ import annotations

import dataclasses

import pytest

from dgbench.data.catalog import lookup as domain
from dgbench.errors import RecipeError
from dgbench.protocol import CLASS_SETS, PROTOCOLS, Protocol, label_map, lookup, presets, protocol_hash
from mfuser.inference import windows

ROW = {"name": "cityscapes", "split": "val", "revision": "official"}
# another value of every field that enters the hash
CHANGED = {
    "name": "other",
    "version": 3,
    "mapillary_map": "openseg",
    "halved": ("cityscapes",),
    "square": {"bdd100k": 1536},
    "fit": {},
    "short_edge": 1024,
    "resize": "pillow-bilinear",
    "label_grid": "resized",
    "window": "whole",
    "stride": 0.5,
    "upsampling": "masks",
    "scales": (1.0, 0.5),
    "flip": True,
    "classes": 16,
    "absent_classes": "zero",
    "checkpoint": "best",
}


@pytest.mark.parametrize(
    ("protocol", "domain", "file_size", "test_size"),
    [
        # Rein's 512 configs: (W, H) 1024x512, 1280x720, halved Mapillary within 1024x512, 960x540
        ("paper-half", "cityscapes", (1024, 2048), (512, 1024)),
        ("paper-half", "bdd100k", (720, 1280), (720, 1280)),
        ("paper-half", "acdc-fog", (1080, 1920), (540, 960)),
        ("paper-half", "mapillary", (2448, 3264), (512, 683)),
        # tqdm's and MFuser's configs: 2048x1024, 1280x720, Mapillary within 2048x1024
        ("paper-full", "cityscapes", (1024, 2048), (1024, 2048)),
        ("paper-full", "mapillary", (2448, 3264), (1024, 1365)),
        ("paper-full", "mapillary", (3264, 2448), (1365, 1024)),
        # SoMA's 512 configs: Cityscapes 2048x1024, the halved Mapillary within 2048x1024, ACDC 960x540
        ("soma", "cityscapes", (1024, 2048), (1024, 2048)),
        ("soma", "bdd100k", (720, 1280), (720, 1280)),
        ("soma", "mapillary", (2448, 3264), (1024, 1365)),
        ("soma", "mapillary", (1000, 1200), (1024, 1229)),
        ("soma", "acdc-rain", (1080, 1920), (540, 960)),
        # VLTSeg's brings BDD to 1820x1024 after training on real images, and within 1024x512 after synthetic ones
        ("vltseg-real", "bdd100k", (720, 1280), (1024, 1820)),
        ("vltseg-synthetic", "bdd100k", (720, 1280), (512, 910)),
        # CLOUDS': short edge 1024, so BDD grows and Cityscapes stays
        ("clouds", "bdd100k", (720, 1280), (1024, 1820)),
        ("clouds", "cityscapes", (1024, 2048), (1024, 2048)),
        # RobustNet's: Mapillary as a square of 1536, everything else as it is
        ("robustnet", "mapillary", (2448, 3264), (1536, 1536)),
        ("robustnet", "bdd100k", (720, 1280), (720, 1280)),
        # TLDR's: whatever the size; SAN-SAW's and SHADE's with MiT: within 1024x512
        ("tldr", "mapillary", (2448, 3264), (2448, 3264)),
        ("shade-mit", "cityscapes", (1024, 2048), (512, 1024)),
        ("shade-mit", "bdd100k", (720, 1280), (512, 910)),
        ("san-saw", "cityscapes", (1024, 2048), (512, 1024)),
        ("unified", "cityscapes", (1024, 2048), (1024, 2048)),
        ("unified", "acdc-night", (1080, 1920), (1080, 1920)),
        ("unified", "streets-fog@0.6", (256, 512), (256, 512)),
    ],
)
def test_test_sizes(protocol: str, domain: str, file_size: tuple[int, int], test_size: tuple[int, int]) -> None:
    assert lookup(protocol).test_size(domain, file_size) == test_size


@pytest.mark.parametrize(
    ("protocol", "window", "stride"),
    [
        ("unified", 512, 341),
        ("unified", 1024, 683),
        ("unified", 256, 171),
        ("paper-half", 512, 341),
        ("soma", 512, 341),
        ("vltseg-synthetic", 512, 426),
        ("vltseg-real", 1024, 768),
    ],
)
def test_strides_are_those_of_the_configs(protocol: str, window: int, stride: int) -> None:
    assert lookup(protocol).stride_of((window, window)) == (stride, stride)


def test_every_field_enters_the_hash_and_only_whom_it_follows_does_not() -> None:
    base = lookup("unified")
    assert set(CHANGED) | {"follows"} == {field.name for field in dataclasses.fields(Protocol)}
    others = [dataclasses.replace(base, **{name: value}) for name, value in CHANGED.items()]
    assert len({protocol_hash(other, ROW) for other in others} | {protocol_hash(base, ROW)}) == len(CHANGED) + 1
    assert len({other.digest for other in others} | {base.digest}) == len(CHANGED) + 1
    assert dataclasses.replace(base, follows="nobody").digest == base.digest


def test_the_domain_enters_the_hash_and_its_order_does_not() -> None:
    base = lookup("unified")
    assert protocol_hash(base, ROW) != protocol_hash(base, ROW | {"revision": "v2"})
    assert protocol_hash(base, ROW) == protocol_hash(base, dict(reversed(ROW.items())))
    assert len(protocol_hash(base, ROW)) == 12
    assert len(base.digest) == 8


def test_presets_differ_and_an_unknown_one_is_suggested() -> None:
    assert len({protocol_hash(protocol, ROW) for protocol in PROTOCOLS.values()}) == len(PROTOCOLS)
    with pytest.raises(RecipeError, match="unknown protocol `paper-ful`") as caught:
        lookup("paper-ful")
    assert caught.value.hint == "did you mean `paper-full`?"


@pytest.mark.parametrize("field", [name for name in CHANGED if name != "name"])
def test_what_a_field_says_is_shown(field: str, monkeypatch: pytest.MonkeyPatch) -> None:
    base = lookup("unified")
    monkeypatch.setitem(PROTOCOLS, "changed", dataclasses.replace(base, **{field: CHANGED[field]}))
    [shown] = presets("changed")
    [usual] = presets("unified")
    assert shown.rules != usual.rules
    assert shown.rules.keys() == usual.rules.keys()


# what records of earlier versions hold
DIGESTS = {
    "unified": "c3409c4a",
    "paper-full": "1ad7dd0e",
    "paper-half": "4c97c25f",
    "soma": "31886c34",
    "vltseg-synthetic": "3c25689a",
    "vltseg-real": "079ebd75",
    "vltseg-tta": "d7063788",
    "clouds": "062016ad",
    "robustnet": "3eaf65f2",
    "tldr": "66dbf1a5",
    "shade-mit": "67b4abc6",
    "san-saw": "56d7320d",
    "unified-16": "ad8dc45e",
    "unified-13": "2c87df7b",
}


def test_the_hash_of_a_preset_stays_what_records_hold() -> None:
    assert {name: lookup(name).digest for name in DIGESTS} == DIGESTS


def test_windows_side_by_side_are_the_unified_protocol_with_less_work() -> None:
    tiled, unified = lookup("unified-tiled"), lookup("unified")
    assert dataclasses.replace(tiled, name=unified.name, follows=unified.follows, stride=unified.stride) == unified
    assert tiled.digest != unified.digest
    size, window = (1024, 2048), (512, 512)
    places = {rules.name: windows(size, window, rules.stride_of(window)) for rules in (tiled, unified)}
    assert places["unified-tiled"] == ([0, 512], [0, 512, 1024, 1536])
    counts = {name: len(rows) * len(columns) for name, (rows, columns) in places.items()}
    assert counts["unified"] / counts["unified-tiled"] == 2.25
    [shown] = presets("unified-tiled")
    assert shown.rules["stride"] == "1 of it"
    assert "2.25 times less work" in shown.follows


def test_presets_are_listed_with_whom_they_follow() -> None:
    listed = presets()
    assert [preset.name for preset in listed] == list(PROTOCOLS)
    assert all(preset.follows and preset.digest == lookup(preset.name).digest for preset in listed)


def test_mapillarys_labels_are_read_by_the_protocols_map_and_others_by_their_own() -> None:
    assert label_map(lookup("paper-half"), domain("mapillary")) == "mapillary-openseg"
    assert label_map(lookup("unified"), domain("mapillary")) == "mapillary-robustnet"
    assert label_map(lookup("paper-half"), domain("cityscapes")) == "cityscapes-ids"


def test_the_smaller_sets_of_classes_are_those_of_synthias_papers() -> None:
    from dgbench.data.labels import NAMES

    without_16 = {NAMES[c] for c in set(CLASS_SETS[19]) - set(CLASS_SETS[16])}
    without_13 = {NAMES[c] for c in set(CLASS_SETS[16]) - set(CLASS_SETS[13])}
    assert without_16 == {"terrain", "truck", "train"}
    assert without_13 == {"wall", "fence", "pole"}
    assert [len(classes) for classes in CLASS_SETS.values()] == list(CLASS_SETS)
