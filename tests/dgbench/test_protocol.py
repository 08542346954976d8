"""Protocols give the sizes that the papers' configs give, and their hash tells any two apart."""

from __future__ import annotations

import dataclasses

import pytest

from dgbench.errors import RecipeError
from dgbench.protocol import PROTOCOLS, Protocol, lookup, protocol_hash

ROW = {"name": "cityscapes", "split": "val", "revision": "official"}


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
        ("unified", "cityscapes", (1024, 2048), (1024, 2048)),
        ("unified", "acdc-night", (1080, 1920), (1080, 1920)),
        ("unified", "streets-fog@0.6", (256, 512), (256, 512)),
    ],
)
def test_test_sizes(protocol: str, domain: str, file_size: tuple[int, int], test_size: tuple[int, int]) -> None:
    assert lookup(protocol).test_size(domain, file_size) == test_size


@pytest.mark.parametrize(("window", "stride"), [(512, 341), (1024, 683), (256, 171)])
def test_stride_is_two_thirds_of_the_window(window: int, stride: int) -> None:
    assert lookup("unified").stride_of((window, window)) == (stride, stride)


def test_every_field_enters_the_hash() -> None:
    base = lookup("unified")
    changed = {"name": "other", "version": 2, "label_space": "cityscapes-16", "fit": {}, "interpolation": "nearest",
               "antialias": True, "halved": ("x",), "label_grid": "halved", "window": "whole", "stride": 0.5,
               "merge": "max", "upsampling": "late", "tta": "flip", "mapillary_map": "openseg",
               "absent_classes": "zero", "ignored_pixels": "count", "checkpoint": "best"}  # fmt: skip
    assert set(changed) == {field.name for field in dataclasses.fields(Protocol)}
    hashes = {protocol_hash(dataclasses.replace(base, **{name: value}), ROW) for name, value in changed.items()}
    assert len(hashes | {protocol_hash(base, ROW)}) == len(changed) + 1


def test_the_domain_enters_the_hash_and_its_order_does_not() -> None:
    base = lookup("unified")
    assert protocol_hash(base, ROW) != protocol_hash(base, ROW | {"revision": "v2"})
    assert protocol_hash(base, ROW) == protocol_hash(base, dict(reversed(ROW.items())))
    assert len(protocol_hash(base, ROW)) == 12


def test_presets_differ_and_an_unknown_one_is_suggested() -> None:
    assert len({protocol_hash(protocol, ROW) for protocol in PROTOCOLS.values()}) == 3
    with pytest.raises(RecipeError, match="unknown protocol `paper-ful`") as caught:
        lookup("paper-ful")
    assert caught.value.hint == "did you mean `paper-full`?"
