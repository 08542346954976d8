"""Every shipped recipe loads; every usual mistake gets its key path, and all of them come at once."""

from __future__ import annotations

from pathlib import Path

import pytest

from dgbench.errors import RecipeError
from dgbench.recipe import Recipe, dump, find, key_paths, load_recipe, recipe_hash, recipe_names, resolve
from dgbench.resources import recipes_dir

PLAIN = """
method: {name: source-only}
data: {source: streets-game, targets: [streets-city], size: [256, 512], crop: [256, 256]}
train: {steps: 3, batch_size: 2}
optim: {lr: 1.0e-3}
"""


def written(folder: Path, text: str, name: str = "mine.yaml") -> Path:
    path = folder / name
    path.write_text(text)
    return path


def problems(path: Path, *overrides: str, check_method: bool = False) -> list[str]:
    """Return the problem lines of a recipe that must not load."""
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, overrides, check_method=check_method)
    return [line.strip() for line in caught.value.message.splitlines()[1:]]


def test_recipes_are_shipped() -> None:
    names = recipe_names()
    assert len(names) == len([p for p in recipes_dir().rglob("*.yaml") if not p.name.startswith("_")])
    assert {"streets/mfuser", "streets/source-only", "mfuser/eva02-gta"} <= set(names)


@pytest.mark.parametrize("name", recipe_names())
def test_a_shipped_recipe_loads_and_says_its_command(name: str, tmp_path: Path) -> None:
    recipe = load_recipe(name)
    assert recipe.name == name
    text = (recipes_dir() / f"{name}.yaml").read_text()
    assert text.startswith("# ")
    assert "#   dgbench " in text
    resolved = dump(recipe, tmp_path / "recipe.yaml")
    assert load_recipe(resolved) == recipe
    assert recipe_hash(load_recipe(resolved)) == recipe_hash(recipe)


BUILT: dict[str, int] = {}  # parameters by method and options: recipes that differ in their data alone have the same


@pytest.mark.parametrize("name", recipe_names())
def test_a_shipped_recipes_model_builds_without_weights(name: str) -> None:
    import mfuser
    from mfuser.towers.meta import unfilled

    recipe = load_recipe(name)
    options = {**recipe.method.options, "image_size": recipe.data.crop}
    if options.get("vlm") == "siglip":  # its tokenizer is on the Hub
        options["token_ids"] = [[1] * 5] * 19
    said = f"{recipe.method.name} {sorted(options.items())}"
    if said not in BUILT:
        with unfilled():
            model = mfuser.build(recipe.method.name, **options, weights="meta")
        BUILT[said] = sum(p.numel() for p in model.parameters())
    assert BUILT[said] > 0


def test_all_problems_come_at_once_with_their_key_paths(tmp_path: Path) -> None:
    path = written(tmp_path, PLAIN + "evl: {}\n")
    found = problems(
        path,
        "train.stepz=3",
        "train.steps=abc",
        "data.source=gta6",
        "data.crop=[5]",
        "data.flip=2",
        "optim.lr=true",
        "train.precision=fp8",
        "optim.weight_decay=-1",
        "eval.protocol=paper-ful",
        "data.targets=streets-city",
        "steps",
    )
    assert sorted(found) == sorted(
        [
            "steps: expected key.path=value, as in train.steps=200",
            "data.source: unknown domain `gta6`, did you mean `gta`?",
            "data.targets: expected a list, got 'streets-city': write [streets-city]",
            "data.crop: expected more than 1 values",
            "data.flip: must be at most 1, got 2",
            "train.steps: expected an integer, got 'abc'",
            "train.precision: expected 'no' or 'bf16', got 'fp8'",
            "train.stepz: unknown key, did you mean `steps`?",
            "optim.lr: expected a number, got true",
            "optim.weight_decay: must be at least 0, got -1",
            "eval.protocol: unknown protocol `paper-ful`, did you mean `paper-full`?",
            "evl: unknown key, did you mean `eval`?",
        ]
    )


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("data.targets=[streets-game]", "data: `streets-game` is both source and target; targets must be unseen"),
        ("data.targets=[streets-fog, streets-fog]", "data: `streets-fog` is given twice in targets"),
        ("data.targets=[gta5]", "data: `gta5` has no split `val`, only train"),
        ("data.source=dark-zurich", "data: `dark-zurich` has no split `train`, only val"),
        ("data.scale=[2, 0.5]", "data: scale must rise, got [2.0, 0.5]"),
        ("data.crop=[512, 512]", "data: crop [512, 512] does not fit into size [256, 512]"),
        ("data.targets=[nosuch]", "data.targets[0]: unknown domain `nosuch`"),
        ("data.targets=[]", "data.targets: expected at least one value, got []"),
        ("data.targets=[streets-fog@2]", "data.targets[0]: severity `2` of `streets-fog` is not a number in 0..1, for"),
        ("data=3", "data: expected `key: value` pairs, got 3"),
        ("train.steps.x=1", "train.steps.x: `train.steps` is a value and has no keys"),
        ("train.steps=[", "train.steps: `[` is not a YAML value"),
        ("train.steps=0", "train.steps: must be at least 1, got 0"),
        ("train.steps=1.5", "train.steps: expected an integer, got 1.5"),
        ("optim.lr=.nan", "optim.lr: expected a number, got nan"),
        ("expect=[{target: streets-city, miou: 40}]", "expect[0].miou: must be at most 1, got 40"),
    ],
)
def test_a_problem_reads(override: str, problem: str, tmp_path: Path) -> None:
    found = problems(written(tmp_path, PLAIN), override)
    assert found[0].startswith(problem)


def test_missing_keys_are_named(tmp_path: Path) -> None:
    found = problems(written(tmp_path, "method: {}\ndata: {source: streets-game}\n"))
    assert found == ["method.name: missing", "data.targets: missing", "train: missing", "optim: missing"]


def test_method_options_are_checked_in_the_same_list(tmp_path: Path) -> None:
    path = written(tmp_path, PLAIN.replace("source-only}", "mfuser, vlm: tiny, vfm: tiny, fusr: x, image_size: [1, 1]}"))
    found = problems(path, "train.steps=abc", check_method=True)
    assert "method.fusr: unknown key, did you mean `fuser`?" in found
    assert "method.image_size: set `data.crop` instead" in found
    assert "train.steps: expected an integer, got 'abc'" in found


def test_an_unknown_method_is_suggested(tmp_path: Path) -> None:
    found = problems(written(tmp_path, PLAIN), "method.name=source-olny", check_method=True)
    assert found == ["method.name: unknown method `source-olny`, did you mean `source-only`?"]


def test_options_that_were_not_given_are_written_out(tmp_path: Path) -> None:
    import dataclasses

    import mfuser

    recipe = load_recipe(written(tmp_path, PLAIN))
    expected = {f.name for f in dataclasses.fields(mfuser.options("source-only"))} - {"image_size", "classes"}
    assert set(recipe.method.options) == expected


def test_overrides_are_yaml_values(tmp_path: Path) -> None:
    overrides = [
        "optim.lr=1e-4",
        "train.precision=no",
        "data.size=null",
        "data.targets=[bdd, streets-fog@0.60]",
        "data.photometric=false",
        "eval.protocol=paper-half",
    ]
    recipe = load_recipe(written(tmp_path, PLAIN), overrides, check_method=False)
    assert recipe.optim.lr == 1e-4
    assert recipe.train.precision == "no"
    assert recipe.data.size is None
    assert recipe.data.targets == ("bdd100k", "streets-fog@0.6")
    assert recipe.data.photometric is False
    assert recipe.eval.protocol == "paper-half"


def test_a_child_states_only_what_differs(tmp_path: Path) -> None:
    written(tmp_path, PLAIN, "_parent.yaml")
    child = written(tmp_path, "extends: _parent.yaml\ntrain: {steps: 7}\n")
    recipe = load_recipe(child, check_method=False)
    assert (recipe.train.steps, recipe.train.batch_size, recipe.name) == (7, 2, "mine")


def test_another_methods_options_are_not_inherited(tmp_path: Path) -> None:
    written(tmp_path, PLAIN.replace("source-only}", "mfuser, vlm: tiny}"), "_parent.yaml")
    child = written(tmp_path, "extends: _parent.yaml\nmethod: {name: source-only}\n")
    assert load_recipe(child, check_method=False).method.options == {}


def test_inheritance_is_one_level(tmp_path: Path) -> None:
    written(tmp_path, PLAIN, "_a.yaml")
    written(tmp_path, "extends: _a.yaml\n", "_b.yaml")
    with pytest.raises(RecipeError, match=r"_b\.yaml extends _a\.yaml; only one level is allowed"):
        load_recipe(written(tmp_path, "extends: _b.yaml\n"))


def test_a_missing_parent_is_named(tmp_path: Path) -> None:
    written(tmp_path, PLAIN, "_parent.yaml")
    with pytest.raises(RecipeError, match=r"extends: no file _parnt\.yaml") as caught:
        load_recipe(written(tmp_path, "extends: _parnt.yaml\n"))
    assert caught.value.hint == "did you mean `_parent.yaml`?"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("method: {name: x\ndata: 3\n", r"mine\.yaml:2: not valid YAML"),
        ("train: {steps: 1}\noptim: {}\ntrain: {}\n", r"mine\.yaml:3: not valid YAML: key `train` is given twice"),
        ("- a\n- b\n", r"expected `key: value` lines, got a list"),
        ("", r"expected `key: value` lines"),
        ("a: !!python/object:os.system x\n", r"mine\.yaml:1: the tag `!!python/object:os\.system` has no meaning"),
    ],
)
def test_a_file_that_is_no_recipe_is_refused_with_its_line(text: str, problem: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=problem):
        load_recipe(written(tmp_path, text))


def test_unknown_recipes_and_files(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="unknown recipe `streets/mfusr`") as caught:
        load_recipe("streets/mfusr")
    assert caught.value.hint == "did you mean `streets/mfuser`?"
    with pytest.raises(RecipeError, match="no recipe file"):
        load_recipe(tmp_path / "nothing.yaml")
    with pytest.raises(RecipeError, match="unknown method or recipe"):
        load_recipe("_train-20k")


def test_the_hash_is_of_the_experiment(tmp_path: Path) -> None:
    path = written(tmp_path, PLAIN)

    def hashed(*overrides: str, file: Path = path) -> str:
        return recipe_hash(load_recipe(file, overrides, check_method=False))

    assert len(hashed()) == 12
    assert hashed() == hashed("expect=[{target: streets-city, miou: 0.4, tolerance: 0.1, from: x}]")
    assert hashed() == hashed(file=written(tmp_path, PLAIN, "renamed.yaml"))
    assert hashed() != hashed("train.seed=1")
    assert hashed() != hashed("method.width=1")


def test_a_resolved_recipe_comes_back_equal(tmp_path: Path) -> None:
    overrides = ["optim.lr=1e-5", "expect=[{target: streets-city, miou: 0.4, tolerance: 0.1, from: x}]"]
    recipe = load_recipe(written(tmp_path, PLAIN), overrides, check_method=False)
    assert load_recipe(dump(recipe, tmp_path / "recipe.yaml"), check_method=False) == recipe


@pytest.mark.parametrize(
    ("flags", "name"),
    [
        ({"method": "mfuser"}, "streets/mfuser"),
        ({"method": "mfuser", "vlm": "tiny"}, "streets/mfuser-scratch"),
        ({"method": "mfuser", "vlm": "eva02"}, "mfuser/eva02-gta"),
        ({"method": "mfuser", "vlm": "eva02_l_336"}, "mfuser/eva02-gta"),
        ({"method": "mfuser", "vlm": "clip", "source": "cityscapes"}, "mfuser/clip-city"),
        ({"method": "mfuser", "vlm": "siglip", "source": "gta"}, "mfuser/siglip-gta"),
        ({"method": "source-only"}, "streets/source-only"),
        ({"method": "rein", "vfm": "dinov2_l", "source": "cityscapes"}, "rein/dinov2-city"),  # not its special kind at 1024
        ({"method": "rein", "vfm": "dinov2_l", "source": ["gta5", "synthia"]}, "rein/dinov2-gta-synthia"),
    ],
)
def test_a_recipe_is_found_by_method_and_flags(flags: dict[str, str], name: str) -> None:
    assert find(**flags) == name


def test_finding_nothing_or_too_much_says_what_there_is() -> None:
    with pytest.raises(RecipeError, match="unknown method `mfusr`") as caught:
        find("mfusr")
    assert caught.value.hint == "did you mean `mfuser`?"
    with pytest.raises(RecipeError, match="no recipe for `mfuser` --vlm blip") as caught:
        find("mfuser", "blip")
    assert "mfuser/eva02-gta (eva02, gta5)" in (caught.value.hint or "")
    with pytest.raises(RecipeError, match="several recipes fit `mfuser`: mfuser/base-gta, mfuser/clip-gta, mfuser/eva02-gta"):
        find("mfuser", source="gta5")


def test_a_recipe_on_streets_with_a_published_tower_is_meant_by_its_name_or_its_source_alone() -> None:
    assert resolve("rein", vfm="dinov2_s")[0] == "rein/dinov2-s-gta"
    assert resolve("linear", vfm="dinov2_s") == ("linear/dinov2-gta", ["method.vfm=dinov2_s"])
    assert resolve("rein", vfm="dinov2_s", source="streets-game") == ("streets/rein-dinov2_s", [])
    assert resolve("rein")[0] == "streets/rein"
    assert resolve("streets/rein-dinov2_s") == ("streets/rein-dinov2_s", [])


def test_flags_pick_a_recipe_or_override_it() -> None:
    assert resolve("mfuser", vlm="eva02") == ("mfuser/eva02-gta", [])
    assert resolve("mfuser", source="streets-night") == ("streets/mfuser", ["data.source=streets-night"])
    assert resolve("streets/mfuser", vlm="clip", source="gta5") == (
        "streets/mfuser",
        ["method.vlm=clip", "data.source=gta5"],
    )
    # two recipes are equally near: the one with the method's default tower
    assert resolve("vltseg", vfm="dinov2_s") == ("vltseg/eva02-gta", ["method.vfm=dinov2_s"])


def test_key_paths_are_keys_that_can_be_set() -> None:
    assert "train.steps" in key_paths()
    sections = Recipe.model_fields.keys()
    assert {path.partition(".")[0] for path in key_paths()} <= set(sections)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ([], "tiny + tiny"),
        (["method.variant=sane"], "tiny + tiny, sane"),
        (["method.fuser=mvfuser_bidir"], "tiny + tiny, mvfuser_bidir"),
        (["method.fuser=mvfuser_bidir", "method.variant=sane"], "tiny + tiny, mvfuser_bidir, sane"),
    ],
)
def test_a_record_names_what_is_not_as_usual(settings: list[str], expected: str) -> None:
    recipe = load_recipe("streets/mfuser-scratch", settings)
    assert recipe.method.variant == expected
    assert (recipe_hash(recipe) == recipe_hash(load_recipe("streets/mfuser-scratch"))) == (not settings)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("mask2former/dinov2-gta", "dinov2_l"),
        ("mask2former/dinov2-gta-frozen", "dinov2_l, adapter none"),
        ("rein/eva02-gta", "eva02_l_mim"),
    ],
)
def test_a_record_names_an_adapter_that_is_not_the_methods_usual_one(name: str, expected: str) -> None:
    assert load_recipe(name).method.variant == expected


@pytest.mark.parametrize("setting", ["method.variant=paper", "method.vfm=timm:resnet18", "method.vlm=timm:vit_tiny_patch16_224"])
def test_a_variant_or_tower_that_there_is_not_is_a_problem_of_the_recipe(setting: str) -> None:
    with pytest.raises(RecipeError, match="method"):
        load_recipe("streets/mfuser", [setting])
