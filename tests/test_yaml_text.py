"""What a user writes is what is meant: numbers, names and keys of YAML files and of --set."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from dgbench.data import custom
from dgbench.data.catalog import lookup
from dgbench.data.labels import NAMES
from dgbench.errors import DataError, DgbenchError, RecipeError
from dgbench.recipe import dump, load_recipe, resolve
from dgbench.yaml_text import decimal, dumped, parse, value

MINE = "splits: {val: {images: '*.jpg', labels: {.jpg: .png}}, train: {images: '*.jpg', labels: {.jpg: .png}}}\n"
SMOKE = "streets/smoke"


@pytest.fixture(autouse=True)
def _nothing_declared(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DGBENCH_DATA", str(tmp_path / "data"))


def declared(folder: Path, text: str, name: str = "mine") -> Path:
    path = folder / f"{name}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(MINE + text)
    return path


def problem(*overrides: str, recipe: str | Path = SMOKE) -> str:
    """The only problem of a recipe that must not load."""
    with pytest.raises(RecipeError) as caught:
        load_recipe(recipe, overrides, check_method=False)
    (line,) = caught.value.message.splitlines()[1:]
    line.encode()  # can be printed
    return line.strip()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("12", 12),
        ("-3", -3),
        ("+5", 5),
        ("0", 0),
        ("0x1F", 31),
        ("1.5", 1.5),
        ("1e-4", 1e-4),
        ("1E5", 1e5),
        (".5", 0.5),
        ("3.", 3.0),
        ("-.inf", float("-inf")),
        ("true", True),
        ("FALSE", False),
        ("null", None),
        ("~", None),
        ("", None),
        ("yes", "yes"),
        ("no", "no"),
        ("on", "on"),
        ("Off", "Off"),
        ("y", "y"),
        ("1_000", "1_000"),
        ("1:30", "1:30"),
        ("2024-05-01", "2024-05-01"),
        ("2026-99-99", "2026-99-99"),
        ("0b101", "0b101"),
        ("0b_", "0b_"),
        ("0x", "0x"),
        ("=", "="),
        ("'007'", "007"),
        ("[a, 1, 2e3]", ["a", 1, 2000.0]),
        ("{a: {b: 1}}", {"a": {"b": 1}}),
    ],
)
def test_plain_values_follow_the_core_schema(text: str, expected: object) -> None:
    read = value(text)
    assert read == expected
    assert type(read) is type(expected)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("010", "`010` could be octal or decimal: write 10, or '010' in quotes for a text"),
        ("-018", "`-018` could be octal or decimal: write -18,"),
        ("0o17", "`0o17` could be octal or decimal: write 15,"),
        ("{[a]: 1}", "a key is one value, not a list or `key: value` pairs"),
        ("{1: a, 0x1: b}", "the keys `1` and `0x1` are the same"),
        ("{7: a, '7': b}", "key `7` is given twice"),
        ("{1: a, true: b}", "the keys `1` and `true` are the same"),
        ("{1: a, 1.0: b}", "the keys `1` and `1.0` are the same"),
        ("9" * 5000, "has 5000 digits, at most 18 are read"),
        ('"\\ud800"', "holds half a character (a lone surrogate)"),
        ("\udcff", "is not a YAML value"),
        ("[" * 1000, "is nested too deeply"),
        ("&a [*a]", "it refers to itself"),
        ("&a [1], " * 1, "is not a YAML value"),
        ("!!binary aGk=", "the tag `!!binary` has no meaning here"),
        ("!!int x", "`x` is not an integer"),
        ("!!float 1_0", "`1_0` is not a number"),
    ],
)
def test_what_could_mean_two_things_is_refused_in_one_line(text: str, told: str) -> None:
    with pytest.raises(ValueError, match=".") as caught:
        value(text)
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)


def test_references_that_grow_without_bounds_are_refused(tmp_path: Path) -> None:
    lines = ["a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 12)]
    (tmp_path / "bomb.yaml").write_text("\n".join(lines))
    with pytest.raises(DataError, match="is too large when its references"):
        parse(tmp_path / "bomb.yaml", DataError, "docs")


@pytest.mark.parametrize("text", ["010", "0o10", "0b1000", "0x8", "1_000", "1:30", "190:20:30", "-1:30", "012.5"])
def test_the_decimal_form_is_the_one_that_the_text_looks_like(text: str) -> None:
    told = decimal(text)
    assert told is not None
    if text in ("010", "012.5"):  # decimal to a reader, octal to YAML 1.1
        assert float(told) == float(text)
    elif text == "0o10":
        assert int(told) == int(text, 8)
    else:
        assert yaml.safe_load(text) == int(told)  # an oracle of YAML 1.1


# ---- label maps


def test_a_label_map_with_leading_zeros_is_refused_and_not_octal(tmp_path: Path) -> None:
    rows = "".join(f"  {number:03d}: {name}\n" for number, name in enumerate(NAMES))
    path = declared(tmp_path, f"label_map:\n{rows}")
    assert yaml.safe_load(path.read_text())["label_map"][8] == "sky"  # what YAML 1.1 makes of `010: sky`
    with pytest.raises(DataError, match=r"mine\.yaml:3: `000` could be octal or decimal: write 0"):
        custom.read(path)
    path.write_text(path.read_text().replace("  0", "  ").replace(" 0", " ").replace(" :", " 0:"))
    assert lookup(str(path)).read_by().classes == {number: number for number in range(19)}


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("label_map: {1: road, 0x1: car}\n", "the keys `1` and `0x1` are the same"),
        ("label_map: {7: road, '7': car}\n", "key `7` is given twice"),
        ("label_map: {1_0: road}\n", "label_map: expected stored values 0..65535, got '1_0'"),
        ("label_map: {1:30: road}\n", "label_map: expected stored values 0..65535, got '1:30'"),
        ("label_map: {2024-05-01: road}\n", "label_map: expected stored values 0..65535, got '2024-05-01'"),
        ("label_map: {yes: road}\n", "label_map: expected stored values 0..65535, got 'yes'"),
        ("label_map: {'07': road}\n", "label_map: expected stored values 0..65535, got '07'"),
        ("label_map: {1: no}\n", "label_map: 1 leads to 'no': expected one of the 19 classes"),
        ("label_map: {1.5: road}\n", "label_map: expected a stored value or the name of a label, got 1.5"),
        ("label_map: {true: road}\n", "label_map: expected a stored value or the name of a label, got true"),
        ("label_map: [1, 2]\n", "label_map: expected the name of a label map, or one written out"),
        ("label_map: {1: road}\nignored: [010]\n", "`010` could be octal or decimal"),
        ("label_map: {1: road}\nignored: [0b1]\n", "ignored: expected stored values 0..65535, got '0b1'"),
        ("label_map: {1: road}\nignored: [1.0]\n", "ignored[0]: expected a stored value or the name of a label, got 1.0"),
    ],
)
def test_a_key_that_is_not_a_plain_number_is_refused(text: str, told: str, tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        custom.read(declared(tmp_path, text))
    assert told in caught.value.message


def test_a_map_in_a_recipe_of_json_keys_cannot_repeat_one() -> None:
    with pytest.raises(ValueError, match="7 is given twice"):
        custom.UserDomain.model_validate(
            {"splits": {"val": {"images": "*", "labels": {"a": "b"}}}, "label_map": {7: "road", "7": "car"}}
        )


def test_a_label_may_be_called_like_a_truth_value_or_a_number(tmp_path: Path) -> None:
    path = declared(tmp_path, "encoding: polygons\nlabel_map: {on: road, 2024-05-01: car}\nignored: [no]\n")
    assert lookup(str(path)).read_by().names == {"on": 0, "2024-05-01": 1, "no": 2}


# ---- names


@pytest.mark.parametrize("name", ["2024", "2024-05-01", "007", "1e4", "0x10", "yes", "null-island", "1_000"])
def test_a_domain_may_be_called_by_digits(name: str, tmp_path: Path) -> None:
    declared(tmp_path / "data/domains", "", name)
    source = load_recipe(SMOKE, flags=[f"data.source={name}"], check_method=False)
    assert source.data.source == name
    target = load_recipe(SMOKE, [f"data.targets=[{name}, streets-city]"], check_method=False)
    assert target.data.targets == (name, "streets-city")
    file = tmp_path / "mine.yaml"
    file.write_text(
        "method: {name: source-only}\ntrain: {steps: 3, batch_size: 2}\noptim: {lr: 1e-3}\n"
        f"data:\n  source: streets-game\n  targets: [{name}]\nname: {name}\n"
        f"expect: [{{target: {name}, miou: 0.5, tolerance: 0.1, from: 2024}}]\n"
    )
    recipe = load_recipe(file, check_method=False)
    assert (recipe.data.targets, recipe.name, recipe.expect[0].target) == ((name,), name, name)
    kept = dump(recipe, tmp_path / "kept/recipe.yaml")
    assert load_recipe(kept, check_method=False) == recipe
    assert yaml.safe_load(kept.read_text())["data"]["targets"] == [name]  # a reader of YAML 1.1 has the same text


def test_train_takes_the_names_that_eval_takes(tmp_path: Path) -> None:
    for name in ("2024", "2024-05-01"):
        declared(tmp_path / "data/domains", "", name)
    name, flags = resolve(SMOKE, source="2024", targets=["2024-05-01", "streets-city"], seed=3)
    recipe = load_recipe(name, flags=flags, check_method=False)
    assert (recipe.data.source, recipe.data.targets, recipe.train.seed) == ("2024", ("2024-05-01", "streets-city"), 3)


def test_names_that_are_no_names_stay_one_text() -> None:
    for name in ("a]", "a, b", "a: b", "'", "#x", "&a", "\udcff", ""):
        _, flags = resolve(SMOKE, targets=[name])
        with pytest.raises(RecipeError, match="data.targets"):
            load_recipe(SMOKE, flags=flags, check_method=False)


@pytest.mark.parametrize("content", [["010", "1e-4", "1_0", "yes", "2024-05-01", "0x1", "null", "1:30", "~", "0o7", "a: b", ""]])
def test_texts_are_written_so_that_every_reader_has_them_back(content: list[str], tmp_path: Path) -> None:
    (tmp_path / "kept.yaml").write_text(dumped({"texts": content, "number": 1e-5}))
    assert parse(tmp_path / "kept.yaml", DataError, "docs") == {"texts": content, "number": 1e-5}
    assert yaml.safe_load((tmp_path / "kept.yaml").read_text()) == {"texts": content, "number": 1e-5}


# ---- --set


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("train.steps=2026-99-99", "train.steps: expected an integer, got '2026-99-99'"),
        ("train.steps={[a]: 1}", "train.steps: a key is one value"),
        ("train.steps=0b_", "train.steps: expected an integer, got '0b_'"),
        ("train.steps=" + "1" * 5000, "train.steps: `1111111111111111111111111111111111111...` has 5000 digits"),
        ("train.steps=010", "train.steps: `010` could be octal or decimal: write 10"),
        ("train.steps=1_000", "train.steps: expected an integer, got the text '1_000': write 1000"),
        ("train.steps=1:30", "train.steps: expected an integer, got the text '1:30': write 90"),
        ("train.steps=0b101", "train.steps: expected an integer, got the text '0b101': write 5"),
        ("train.steps='7'", "train.steps: expected an integer, got the text '7': write 7"),
        ("train.steps=yes", "train.steps: expected an integer, got 'yes'"),
        ("train.steps=2024-05-01", "train.steps: expected an integer, got '2024-05-01'"),
        ("optim.lr=1_0.5", "optim.lr: expected a number, got the text '1_0.5': write 10.5"),
        ("data.flip=no", "data.flip: expected a number, got 'no'"),
        (
            "data.photometric=1",
            "data.photometric: expected mmsegmentation, robustnet, san-saw, famix or self-supervised, or true or false, got 1",
        ),
        ('name="\\ud800"', "name: '\\ud800' holds half a character (a lone surrogate)"),
        ("data.source=\udcff", "data.source: `\\udcff` is not a YAML value"),
        ("train.\udcff=1", "train: expected text, got 'steps"),
        ("data.crop=[1, 2, 3]", "data.crop: expected at most 2 values, got [1, 2, 3]"),
        ("expect=[3]", "expect[0]: expected `key: value` pairs, got 3"),
        ("data.source=[a]", "data.source: unknown domain `a`, choose from acdc"),
        ("data.source=[[a]]", "data.source: expected the name of a domain, or a list of them, got [['a']]"),
    ],
)
def test_a_value_that_cannot_be_is_told_in_one_line(override: str, told: str) -> None:
    found = problem(override)
    assert found.startswith(told) or "\udcff" in override


def test_numbers_with_an_exponent_are_numbers_and_yes_is_true_where_truth_is_meant(tmp_path: Path) -> None:
    recipe = load_recipe(SMOKE, ["optim.lr=1e-4", "data.photometric=yes"], check_method=False)
    assert (recipe.optim.lr, recipe.data.photometric) == (1e-4, True)


def test_words_of_the_library_never_reach_the_user() -> None:
    """Wrong values of every kind at every key, in recipes and declarations."""
    keys = [
        "name",
        "method",
        "data",
        "expect",
        "data.domains",
        "data.source",
        "data.targets",
        "data.size",
        "data.flip",
        "data.photometric",
        "train.steps",
        "train.precision",
        "eval.protocol",
        "data.domains.x",
        "data.domains.x.splits.val",
        "data.domains.x.label_map",
        "data.domains.x.ignored",
    ]
    values = ["1.5", "a", "[]", "[a, b, c]", "{a: 1}", "{1: a}", "null", "true", ".nan", "-1", "[[null]]", "[{}]"]
    theirs = (
        "input should",
        "valid",
        "pydantic",
        "expected an instance",
        "unable to",
        "decimal ",
        "dictionary",
        "tuple",
        "bool",
        "none",
    )
    for key in dict.fromkeys(keys):
        for text in values:
            try:
                load_recipe(SMOKE, [f"{key}={text}"], check_method=False)
            except DgbenchError as error:
                lines = error.message.lower().splitlines()
                assert all(": " in line for line in lines[1:])
                told = error.message.partition("\n")[2].lower()
                assert not [word for word in theirs if word in told.replace("validation", "")], (key, text, told)


# ---- where to look


@pytest.mark.parametrize(
    ("flags", "overrides", "hint"),
    [
        ((), ("train.stepz=3",), "check --set train.stepz"),
        ((), ("train.steps=x", "optim.lr=y"), "check --set train.steps, --set optim.lr"),
        ((), ("data={}",), "check --set data"),
        ((), ("data.crop=[512, 512]",), "check --set data.crop"),
        (("train.seed=-1",), (), "check --seed"),
        (("data.targets=[nosuch]",), ("train.steps=0",), "check --targets, --set train.steps"),
        (("method.vlm=dinov2_l",), (), "check --vlm"),
        ((), ("steps",), "check --set"),
        ((), ("method.patsh=8",), "check --set method.patsh"),
        ((), ("method.freeze_towers=perhaps",), "check --set method.freeze_towers"),
    ],
)
def test_a_hint_names_the_option_that_set_the_value_and_no_shipped_file(
    flags: tuple[str, ...], overrides: tuple[str, ...], hint: str
) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(SMOKE, overrides, flags=flags)
    assert caught.value.hint == hint


def test_a_hint_names_the_file_of_what_stands_in_it(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("extends: _streets.yaml\nmethod: {name: source-only}\ntrain: {stepz: 3}\n")
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    assert caught.value.hint == f"edit {path}"
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, ["optim.lr=x"])
    assert caught.value.hint == f"check --set optim.lr; edit {path}"


# ---- capitals, and time


def test_capitals_do_not_matter_where_a_name_is_looked_up(tmp_path: Path) -> None:
    from dgbench import protocol

    assert lookup("CityScapes").name == "cityscapes"
    assert lookup("BDD").name == "bdd100k"
    assert lookup("Streets-Fog@0.6").name == "streets-fog@0.6"
    declared(tmp_path / "data/domains", "", "mine")
    assert lookup("Mine").name == "mine"
    assert protocol.lookup("Paper-Full").name == "paper-full"
    assert resolve("MFuser", vlm="EVA02") == ("mfuser/eva02-gta", [])
    recipe = load_recipe("Streets/MFuser", ["method.vlm=Mini_VLM", "eval.protocol=CLOUDS", "data.source=Streets-Game"])
    assert recipe == load_recipe("streets/mfuser", ["eval.protocol=clouds"])


def test_capitals_do_not_matter_to_profile() -> None:
    from dgbench.cost.profile import subjects

    assert subjects(["MFuser"], vlm="Tiny", vfm="TINY") == subjects(["mfuser"], vlm="tiny", vfm="tiny")


WRONG = [
    ["train", "--set", "train.stepz=3"],
    ["train", "--set", "train.steps=x"],
    ["train", "--set", "method.fusr=x"],
    ["train", "--vlm", "evo2"],
    ["train", "--vfm", "dinov9"],
    ["train", "nosuch"],
    ["train", "nosuch.yaml"],
    ["train", "source-only", "--set", "method.backbone=dinov9"],
    ["train", "--source", "nosuch"],
    ["train", "--targets", "nosuch"],
    ["eval", "--targets", "nosuch"],
    ["eval", "--protocol", "nosuch"],
]


def test_a_wrong_name_or_value_is_told_without_importing_torch(tmp_path: Path) -> None:
    code = f"""
import sys
sys.modules["torch"] = None
from typer.testing import CliRunner
from dgbench import cli
for arguments in {WRONG}:
    done = CliRunner().invoke(cli.app, arguments, prog_name="dgbench")
    print(done.exit_code, done.stderr.startswith("error: "), arguments, done.stderr)
"""
    environment = {"PYTHONPATH": str(Path(__file__).parents[1]), "PATH": "", "HOME": str(tmp_path)}
    ran = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False, env=environment)
    told = [line for line in ran.stdout.splitlines() if line[:2] in ("0 ", "1 ", "2 ")]
    assert len(told) == len(WRONG), ran.stderr
    assert all(line.startswith("1 True ") for line in told), ran.stdout


def test_option_names_are_those_of_the_methods_options() -> None:
    import dataclasses

    import mfuser
    from mfuser.methods import option_names

    for method in mfuser.method_names():
        assert option_names(method) == [field.name for field in dataclasses.fields(mfuser.options(method))]
