"""Label maps against the official tables that cityscapesscripts ships."""

from __future__ import annotations

import numpy as np
import pytest
from cityscapesscripts.helpers.labels import labels as official

from dgbench.data.labels import CLASSES, IGNORE, LABEL_MAPS, NAMES, LabelMap, named, palette
from dgbench.errors import DataError


def test_classes_are_the_official_train_ids():
    expected = {label.trainId: label for label in official if 0 <= label.trainId < 255}
    assert len(CLASSES) == len(expected) == 19
    for train_id, own in enumerate(CLASSES):
        assert (own.name, own.label_id, own.color) == (
            expected[train_id].name,
            expected[train_id].id,
            expected[train_id].color,
        )


def test_cityscapes_map_equals_the_official_one_for_every_stored_value():
    table = LABEL_MAPS["cityscapes-ids"].table
    for label in official:
        if label.id >= 0:
            assert table[label.id] == label.trainId
            assert LABEL_MAPS["cityscapes-ids"].known[label.id]
    assert not LABEL_MAPS["cityscapes-ids"].known[34:255].any()


def test_the_three_mapillary_maps_differ_where_their_sources_differ():
    robustnet, openseg, wd2 = (LABEL_MAPS[f"mapillary-{n}"].table for n in ("robustnet", "openseg", "wd2-policy"))
    assert np.flatnonzero(robustnet != openseg).tolist() == [7, 8, 9, 10, 11, 14, 23, 41, 44, 46, 49]
    assert np.flatnonzero(robustnet != wd2).tolist() == [5, 7, 8, 9, 11, 12, 14, 23, 36, 43, 46, 58]


def test_ignored_pixels_have_no_colour():
    assert palette()[IGNORE].tolist() == [0, 0, 0]


# Mapillary Vistas v1.2 by the names of its configuration
VISTAS = """Bird; Ground Animal; Curb; Fence; Guard Rail; Barrier; Wall; Bike Lane; Crosswalk - Plain; Curb Cut; Parking;
Pedestrian Area; Rail Track; Road; Service Lane; Sidewalk; Bridge; Building; Tunnel; Person; Bicyclist; Motorcyclist;
Other Rider; Lane Marking - Crosswalk; Lane Marking - General; Mountain; Sand; Sky; Snow; Terrain; Vegetation; Water; Banner;
Bench; Bike Rack; Billboard; Catch Basin; CCTV Camera; Fire Hydrant; Junction Box; Mailbox; Manhole; Phone Booth; Pothole;
Street Light; Pole; Traffic Sign Frame; Utility Pole; Traffic Light; Traffic Sign (Back); Traffic Sign (Front); Trash Can;
Bicycle; Boat; Bus; Car; Caravan; Motorcycle; On Rails; Other Vehicle; Trailer; Truck; Wheeled Slow; Car Mount; Ego Vehicle;
Unlabeled""".replace("\n", " ").split("; ")

ROBUSTNET = {
    "road": "Road; Lane Marking - General; Manhole",
    "sidewalk": "Curb; Sidewalk",
    "building": "Building",
    "wall": "Wall",
    "fence": "Fence",
    "pole": "Pole; Utility Pole",
    "traffic light": "Traffic Light",
    "traffic sign": "Traffic Sign (Front)",
    "vegetation": "Vegetation",
    "terrain": "Terrain",
    "sky": "Sky",
    "person": "Person",
    "rider": "Bicyclist; Motorcyclist; Other Rider",
    "car": "Car",
    "truck": "Truck",
    "bus": "Bus",
    "train": "On Rails",
    "motorcycle": "Motorcycle",
    "bicycle": "Bicycle",
}
OPENSEG = ROBUSTNET | {
    "road": "Road; Lane Marking - General; Bike Lane; Crosswalk - Plain; Parking; Service Lane; Lane Marking - Crosswalk",
    "sidewalk": "Curb; Sidewalk; Curb Cut; Pedestrian Area",
    "pole": "Pole; Utility Pole; Street Light",
    "traffic sign": "Traffic Sign (Front); Traffic Sign (Back); Traffic Sign Frame",
}
# the unified label policy has no class for what runs on rails among the 19
WD2_POLICY = {k: v for k, v in ROBUSTNET.items() if k != "train"} | {
    "road": "Road; Lane Marking - General; Lane Marking - Crosswalk; Crosswalk - Plain; Bike Lane; Service Lane; Manhole; "
    "Pothole; Catch Basin; Rail Track; Pedestrian Area",
    "sidewalk": "Curb; Sidewalk; Curb Cut",
    "wall": "Wall; Barrier",
    "pole": "Pole; Utility Pole; Traffic Sign Frame",
}

SYNTHIA = """void; sky; building; road; sidewalk; fence; vegetation; pole; car; traffic sign; person; bicycle; motorcycle;
parking-slot; road-work; traffic light; terrain; rider; truck; bus; train; wall; lane-marking""".replace("\n", " ").split("; ")

IDD = """road; parking; drivable fallback; sidewalk; rail track; non-drivable fallback; person; animal; rider; motorcycle;
bicycle; autorickshaw; car; truck; bus; caravan; trailer; train; vehicle fallback; curb; wall; fence; guard rail; billboard;
traffic sign; traffic light; pole; polegroup; obs-str-bar-fallback; building; bridge; tunnel; vegetation; sky;
fallback background; unlabeled; ego vehicle; rectification border; out of roi; license plate""".replace("\n", " ").split("; ")

# WildDash 2's categories by its unified label policy; those of the same name as one of the 19 classes are left out here
WILDDASH2 = """unlabeled; egovehicle; overlay; outofroi; static; dynamic; ground; road; sidewalk; parking; railtrack; building;
wall; fence; guardrail; bridge; tunnel; pole; polegroup; traffic light; traffic sign; vegetation; terrain; sky; person; rider;
car; truck; bus; caravan; trailer; onrails; motorcycle; bicycle; pickup; van; billboard; streetlight; roadmarking; junctionbox;
mailbox; manhole; phonebooth; pothole; bikerack; trafficsignframe; utilitypole; motorcyclist; bicyclist; otherrider; bird;
groundanimal; curb; trafficsignany; trafficsignback; trashcan; otherbarrier; othervehicle; autorickshaw; bench; mountain;
tramtrack; wheeledslow; boat; bikelane; bikelanesidewalk; banner; dashcammount; water; sand; pedestrianarea; firehydrant;
cctvcamera; snow; catchbasin; crosswalkplain; crosswalkzebra; manholesidewalk; curbterrain; servicelane;
curbcut""".replace("\n", " ").split("; ")
WILDDASH2_POLICY = {
    "road": "roadmarking; manhole; pothole; tramtrack; bikelane; pedestrianarea; catchbasin; crosswalkplain; crosswalkzebra; "
    "servicelane",
    "sidewalk": "curb; bikelanesidewalk; manholesidewalk; curbcut",
    "wall": "otherbarrier",
    "pole": "trafficsignframe; utilitypole",
    "terrain": "curbterrain",
    "rider": "motorcyclist; bicyclist; otherrider",
    "car": "van",
    "truck": "pickup",
    "motorcycle": "autorickshaw",
}


def of_names(names: list[str], classes: dict[str, str]) -> dict[int, int]:
    """Stored value -> train id, from class -> names of labels."""
    return {names.index(label): NAMES.index(c) for c, labels in classes.items() for label in labels.split("; ")}


def same_names(names: list[str]) -> dict[int, int]:
    return {value: NAMES.index(name) for value, name in enumerate(names) if name in NAMES}


@pytest.mark.parametrize(
    ("name", "labels", "expected"),
    [
        ("mapillary-robustnet", VISTAS, of_names(VISTAS, ROBUSTNET)),
        ("mapillary-openseg", VISTAS, of_names(VISTAS, OPENSEG)),
        ("mapillary-wd2-policy", VISTAS, of_names(VISTAS, WD2_POLICY)),
        ("synthia-ids", SYNTHIA, same_names(SYNTHIA)),
        ("idd-autonue", IDD, same_names(IDD) | of_names(IDD, {"terrain": "non-drivable fallback"})),
        ("idd-no-terrain", IDD, same_names(IDD)),
        ("wilddash2-policy", WILDDASH2, same_names(WILDDASH2) | of_names(WILDDASH2, WILDDASH2_POLICY)),
        ("wilddash2-on-rails", WILDDASH2, same_names(WILDDASH2) | of_names(WILDDASH2, WILDDASH2_POLICY | {"train": "onrails"})),
    ],
)
def test_a_map_equals_its_source_by_names(name: str, labels: list[str], expected: dict[int, int]):
    found = LABEL_MAPS[name]
    assert found.classes == expected
    # what is a label there and no class here is ignored, and nothing else may occur
    assert np.flatnonzero(found.known).tolist() == [*range(len(labels)), 255]


def test_the_tables_have_as_many_labels_as_their_data_sets():
    assert [len(names) for names in (VISTAS, SYNTHIA, IDD, WILDDASH2)] == [66, 23, 40, 81]


def test_gta5_has_cityscapes_ids_and_the_licence_plate():
    gta5, cityscapes = LABEL_MAPS["gta5-ids"], LABEL_MAPS["cityscapes-ids"]
    assert np.array_equal(gta5.table, cityscapes.table)
    assert np.flatnonzero(gta5.known != cityscapes.known).tolist() == [34]


def test_urbansyn_ignores_whatever_is_no_train_id():
    assert LABEL_MAPS["urbansyn-ids"].table.tolist() == [*range(19), *[255] * 237]
    assert LABEL_MAPS["urbansyn-ids"].known.all()


def test_idds_merged_ids_leave_out_what_they_mix():
    # 26 ids: 1, 3 and 12 hold several classes; terrain and train are among them
    level3 = LABEL_MAPS["idd-level3"]
    names = {level3.table[i]: i for i in range(26) if level3.table[i] != 255}
    assert sorted(names) == [c for c in range(19) if NAMES[c] not in ("terrain", "train")]
    assert [level3.table[i] for i in (1, 3, 8, 12, 13, 16, 17, 21, 23)] == [255] * 9


@pytest.mark.parametrize("name", LABEL_MAPS)
def test_a_map_is_inverted_by_its_smallest_values(name: str):
    found = LABEL_MAPS[name]
    for train_id in {*found.classes.values(), 255}:
        assert found.table[found.stored(train_id)] == train_id


def test_a_class_that_a_map_lacks_cannot_be_stored():
    with pytest.raises(DataError, match="`idd-level3` has no value for class 9, terrain"):
        LABEL_MAPS["idd-level3"].stored(9)


def test_values_beyond_a_byte_have_a_longer_table():
    wide = LabelMap("wide", {300: 4}, frozenset({0, 255}))
    assert wide.table.shape == (65536,)
    assert wide.strangers([0, 255, 300, 301, 65535]) == [301, 65535]
    assert LABEL_MAPS["train-ids"].strangers([18, 19, 255, 300]) == [19, 300]


def test_an_unknown_map_is_suggested():
    with pytest.raises(DataError, match="unknown label map `mapillary-openseq`") as error:
        named("mapillary-openseq")
    assert "`mapillary-openseg`" in str(error.value.hint)
