"""Modes of scoring: what a fast score agrees on with an exact one, what its record says, and that the two never mix."""

from __future__ import annotations

import os
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode
from typer.testing import CliRunner

import mfuser
from dgbench import results
from dgbench.cli import app
from dgbench.engine import checkpoints, modes
from dgbench.engine.evaluate import evaluate
from dgbench.engine.predict import predict, segment
from dgbench.engine.scoring import predicted
from dgbench.engine.tested import load
from dgbench.engine.train import train
from dgbench.errors import DgbenchError, RecipeError
from dgbench.progress import Silent
from dgbench.recipe import dump, load_recipe, recipe_hash
from dgbench.render.leaderboard import leaderboard_tables
from dgbench.report.leaderboard import leaderboard
from mfuser import fast, manifest


class Notes(Silent):
    """What is said; a bar that ends the evaluation when so many images are scored."""

    def __init__(self, after=10**9):
        self.after, self.images, self.said = after, 0, []

    def advance(self, n=1, **_):
        self.images += n
        if n and self.images >= self.after:
            raise KeyboardInterrupt

    def note(self, text):
        self.said.append(text)


@pytest.fixture(autouse=True, scope="module")
def cache(tmp_path_factory):
    path = tmp_path_factory.mktemp("cache")
    os.environ["DGBENCH_CACHE"] = str(path)
    yield path
    del os.environ["DGBENCH_CACHE"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory, cache):
    """A run whose model sees many classes, of five images a domain."""
    path = tmp_path_factory.mktemp("runs") / "a-run"
    small = ["data.size=[64, 128]", "data.crop=[64, 64]", "data.train_images=4", "data.val_images=5", "train.steps=1"]
    train(load_recipe("streets/source-only", [*small, "train.batch_size=2"]), path, progress=Silent(), device="cpu")
    model = checkpoints.load_model(path)
    torch.nn.init.normal_(model.head.weight, generator=torch.Generator().manual_seed(0))
    step = path / "checkpoint" / "step-000001"
    mfuser.save(model, step)
    manifest.seal(step, [file.name for file in step.iterdir() if file.name != manifest.NAME])
    for record in path.glob("record-*-train-*.json"):  # of other weights than these
        record.unlink()
    return path


@pytest.fixture
def run(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    return tmp_path / "run"


def scored(run, mode=None, targets=("streets-city",), compiles=False, **settings):
    compiles = compiles if mode == "fast" else None
    return evaluate(run, list(targets), device="cpu", mode=mode, compiles=compiles, **{"progress": Silent(), **settings})


def test_a_fast_score_is_near_the_exact_one_and_says_how_it_was_made(run):
    notes = Notes()
    (exact,), (quick,) = scored(run), scored(run, "fast", progress=notes)
    assert abs(exact.miou - quick.miou) < 0.005
    same = np.minimum(*(results.read_confusion(record).sum(0) for record in (exact, quick))).sum()
    assert same / results.read_confusion(exact).sum() > 0.98
    assert quick.environment | {"mode": "fast", "compile": "no", "dtype": "bf16"} == quick.environment
    assert quick.variant == f"{exact.variant}, fast bf16 not compiled"
    assert quick.recipe_hash == exact.recipe_hash
    assert not {"mode", "compile", "dtype"} & exact.environment.keys()
    assert any("fast mode on a CPU: bf16" in said for said in notes.said)


def test_an_exact_score_is_the_same_bits_with_and_without_the_modes_name(run):
    first, second = scored(run)[0], scored(run, "exact")[0]
    assert np.array_equal(results.read_confusion(first), results.read_confusion(second))
    assert first.environment == second.environment


def test_rows_of_two_modes_stand_beside_each_other(run):
    scored(run), scored(run, "fast")
    board = leaderboard(results.query(run), published=False)
    rows = [row for group in board.groups for row in group.rows if row.kind == "run"]
    assert sorted(row.variant.endswith("fast bf16 not compiled") for row in rows) == [False, True]
    assert [row.seeds for row in rows] == [1, 1]
    by_mode = {row.variant.endswith("not compiled"): row for row in rows}
    points = 100 * (by_mode[True].scores["streets-city"].miou - by_mode[False].scores["streets-city"].miou)
    said = f"mode fast: {points:+.2f} points of mIoU from exact mode, at most {points:+.2f} (1 score of the same checkpoints)"
    assert (by_mode[True].note, by_mode[False].note) == (said, "")
    assert any(said in line for table in leaderboard_tables(board) for line in table.legend)


def test_a_fast_row_alone_says_that_nothing_is_known_of_the_difference(run):
    scored(run, "fast")
    (row,) = leaderboard(results.query(run), published=False).groups[0].rows
    assert row.note == "mode fast, and no exact score of the same checkpoint to compare it with"


def test_an_interrupted_evaluation_goes_on_in_its_own_mode_alone(run):
    with pytest.raises(KeyboardInterrupt):
        scored(run, "fast", progress=Notes(after=3))
    other, again = Notes(), Notes()
    shutil.copytree(run, run.parent / "other")
    scored(run.parent / "other", "exact", progress=other)
    assert not any("before the interruption" in said for said in other.said)
    (record,) = scored(run, "fast", progress=again)
    assert any("images were scored before the interruption" in said for said in again.said)
    assert "compile" not in record.seconds
    assert record.n_images == 5


def test_scores_are_reused_in_their_own_mode_alone(run):
    (exact,) = scored(run)
    assert scored(run, reuse=True)[0].id == exact.id
    (quick,) = scored(run, "fast", reuse=True)
    assert quick.id != exact.id
    assert scored(run, "fast", reuse=True)[0].id == quick.id


def test_a_recipe_can_ask_for_fast_scores(run):
    recipe = load_recipe(str(run / "recipe.yaml"), ["eval.mode=fast"])
    usual = load_recipe(str(run / "recipe.yaml"), ["eval.mode=exact"])
    assert recipe_hash(usual) == recipe_hash(load_recipe(str(run / "recipe.yaml"))) != recipe_hash(recipe)
    assert "mode" not in dump(usual, run.parent / "usual.yaml").read_text()
    dump(recipe, run / "recipe.yaml")
    assert scored(run, "exact")[0].variant.endswith("tiny")
    (one,) = load([run], device="cpu", compiles=False)
    assert isinstance(one.model, fast.Prepared)
    with pytest.raises(RecipeError, match="eval.mode"):
        load_recipe(str(run / "recipe.yaml"), ["eval.mode=quick"])


def test_an_unknown_mode_and_one_that_never_compiles_are_refused(run):
    with pytest.raises(DgbenchError, match="unknown mode `fastt`"):
        scored(run, "fastt")
    with pytest.raises(DgbenchError, match="`exact` is never compiled"):
        modes.mode("exact", compiles=False)


def test_a_method_without_fast_inference_is_named():
    model = mfuser.build("linear", vfm="tiny", image_size=(64, 64))
    model.no_fast = "it waits for the host"
    with pytest.raises(DgbenchError, match="`linear` has no fast inference") as error:
        modes.ready(model, modes.mode("fast"))
    assert "leave out --mode fast" in error.value.hint


def test_the_command_scores_and_compiles_and_says_how_long_it_took(run, cache, monkeypatch):
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    torch._dynamo.reset()
    words = ["eval", str(run), "--targets", "streets-city", "--device", "cpu", "--mode", "fast"]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    assert "compiled in" in done.output
    assert str(cache / "compiled") in done.output.replace("\n", "")
    (record,) = [record for record in results.query(run) if record.kind == "eval"]
    assert record.environment["compile"] == "yes"
    assert record.seconds["compile"] > 0
    assert record.seconds["model"] + record.seconds["compile"] <= record.seconds["total"]
    assert record.variant.endswith("fast bf16")
    assert list((cache / "compiled").iterdir())


def test_photographs_are_drawn_in_their_order_in_either_mode(run, tmp_path):
    photos = []
    for number in range(6):
        photos.append(tmp_path / f"photo-{number}.png")
        Image.fromarray(np.full((64, 96 + number, 3), 40 * number, np.uint8)).save(photos[-1])
    exact = predict(photos, run, tmp_path / "exact", device="cpu")
    quick = predict(photos, run, tmp_path / "fast", device="cpu", mode_name="fast", compiles=False)
    assert [one.photo for one in exact] == [one.photo for one in quick] == photos
    assert all(Image.open(one.overlay).size[0] == 96 + number for number, one in enumerate(quick))
    differences = [
        sum(abs(one.shares.get(name, 0) - other.shares.get(name, 0)) for name in {*one.shares, *other.shares})
        for one, other in zip(exact, quick, strict=True)
    ]
    assert max(differences) < 0.05


def rounding() -> tuple[bool, str]:
    """Whether convolutions and how precisely products of fp32 are rounded on a GPU."""
    return torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()


@pytest.fixture
def allowed():
    """What torch and some containers allow: TF32 in convolutions and in products."""
    before = rounding()
    torch.backends.cudnn.allow_tf32 = True
    torch.set_float32_matmul_precision("high")
    yield (True, "high")
    torch.backends.cudnn.allow_tf32 = before[0]
    torch.set_float32_matmul_precision(before[1])


@pytest.mark.parametrize("mode", modes.MODES)
def test_an_exact_score_is_computed_in_fp32_whatever_is_allowed(trained, allowed, mode):
    (tested,) = load([trained], device="cpu", mode_name=mode, compiles=False if mode == modes.FAST else None)
    seen = []
    model = tested.model
    inner = model if mode == modes.EXACT else model._model
    inner.register_forward_pre_hook(lambda *_: seen.append(rounding()))
    if mode == modes.FAST:
        scores = model._scores
        model._scores = lambda images: (seen.append(rounding()), scores(images))[1]
    views = [torch.zeros(1, 64, 128, 3, dtype=torch.uint8)]
    predicted(model, views, (64, 128), tested.rules, torch.device("cpu"))
    assert seen
    assert set(seen) == {(False, "highest") if mode == modes.EXACT else allowed}
    assert rounding() == allowed


def test_what_is_allowed_is_so_again_behind_an_error(trained, allowed):
    (tested,) = load([trained], device="cpu")
    tested.model.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        predicted(tested.model, [torch.zeros(1, 64, 128, 3, dtype=torch.uint8)], (64, 128), tested.rules, torch.device("cpu"))
    assert rounding() == allowed


def test_so_is_a_prediction(trained, allowed):
    (tested,) = load([trained], device="cpu")
    seen = []
    tested.model.register_forward_pre_hook(lambda *_: seen.append(rounding()))
    segment(tested.model, np.zeros((64, 128, 3), np.uint8), torch.device("cpu"))
    assert set(seen) == {(False, "highest")}
    assert rounding() == allowed


class Rounding(TorchDispatchMode):
    """What is allowed whenever a product is computed."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
            self.seen.append(rounding())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["mfuser", "soma"])
def test_so_are_class_texts_and_adapters_which_are_computed_once(name, allowed):
    towers = {"vfm": "tiny"} if name == "soma" else {"vfm": "tiny", "vlm": "tiny"}
    model = mfuser.build(name, **towers, image_size=(64, 64), weights="random").eval()
    with Rounding() as products:
        modes.ready(model, modes.mode("exact"))
    assert set(products.seen) == {(False, "highest")}
    assert rounding() == allowed


@pytest.fixture
def newer_names():
    """TF32 allowed by the names that torch 2.9 brought, after which it refuses to read the older ones."""
    torchs = torch.backends
    kinds = torchs.cuda.matmul, torchs.cudnn.conv, torchs.cudnn.rnn, torchs.mkldnn.matmul, torchs.mkldnn.conv
    before = [kind.fp32_precision for kind in kinds]
    for kind in kinds:
        kind.fp32_precision = "tf32"
    yield lambda: {kind.fp32_precision for kind in kinds}
    for kind, value in zip(kinds, before, strict=True):
        kind.fp32_precision = value


def test_an_exact_score_is_so_where_a_program_has_used_torchs_newer_names(trained, newer_names):
    (tested,) = load([trained], device="cpu")
    seen = []
    tested.model.register_forward_pre_hook(lambda *_: seen.append(newer_names()))
    predicted(tested.model, [torch.zeros(1, 64, 128, 3, dtype=torch.uint8)], (64, 128), tested.rules, torch.device("cpu"))
    assert seen == [{"ieee"}] * len(seen) != []
    assert newer_names() == {"tf32"}


def test_torchs_settings_are_as_before_by_either_name():
    torchs = torch.backends
    kinds = torchs.cuda.matmul, torchs.cudnn.conv, torchs.cudnn.rnn, torchs.mkldnn.matmul, torchs.mkldnn.conv
    before = [kind.fp32_precision for kind in kinds], rounding()
    with modes.without_tf32(torch.nn.Linear(1, 1)):
        assert rounding() == (False, "highest")
    assert ([kind.fp32_precision for kind in kinds], rounding()) == before


@pytest.mark.gpu
def test_exact_convolutions_and_products_on_a_gpu_are_fp32s(allowed):
    torch.manual_seed(0)
    images, model = torch.rand(2, 64, 32, 32), torch.nn.Conv2d(64, 64, 3)
    linear = torch.nn.Linear(64, 64)
    with torch.no_grad():
        expected = linear.double()(model.double()(images.double()).mT.contiguous().flatten(2)[..., :64])
        model.float().cuda()
        linear.float().cuda()
        with modes.without_tf32(model):
            found = linear(model(images.cuda()).mT.contiguous().flatten(2)[..., :64])
    assert (found.cpu().double() - expected).abs().max() < 1e-5 * expected.abs().max()
