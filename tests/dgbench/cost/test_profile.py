"""What `dgbench profile` is made of: which models, their parts, parameters and costs, and times on a CPU."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
from pathlib import Path

import pytest
import torch
from counting import _no_weights  # noqa: F401 - a fixture

import mfuser
from dgbench import render
from dgbench.cost.conventions import Cost
from dgbench.cost.counted import Subject, made_now
from dgbench.cost.fusion import profile_fusion
from dgbench.cost.profile import Profile, Row, profile, subjects
from dgbench.environment import code_commit
from dgbench.errors import DgbenchError, RecipeError
from dgbench.progress import Silent
from mfuser import methods
from mfuser.towers import table, weights

ROOT = Path(__file__).parents[3]
FULL = {"eva": "eva02", "clip": "clip", "siglip": "siglip"}  # the specification's variants and our towers
TINY = {"vlm": "tiny", "size": (64, 64)}


def counts(chosen: list[Subject], **options: object) -> Profile:
    return profile(chosen, Silent(), timed=False, **options)  # type: ignore[arg-type]


def peak_gb() -> float:
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 1e6


@functools.cache
def full(variant: str) -> Row:
    """A model of the paper, counted once."""
    return counts(subjects(["mfuser"], vlm=FULL[variant])).rows[0]


# CLIP's differs by its projections around the fusers alone, and takes seconds
each_variant = pytest.mark.parametrize(
    "variant", ["eva", *(pytest.param(name, marks=pytest.mark.full) for name in ("siglip", "clip"))]
)


@pytest.fixture(scope="module")
def tiny() -> Row:
    return counts(subjects(["mfuser"], **TINY)).rows[0]  # type: ignore[arg-type]


# ---- whole models, by hand


def linear(tokens: int, *widths: int) -> int:
    return sum(tokens * a * b for a, b in itertools.pairwise(widths))


def attended(queries: int, keys: int, dim: int) -> int:
    """nn.MultiheadAttention: projections of queries, keys, values and outputs, and two products."""
    return 2 * queries * dim**2 + 2 * keys * dim**2 + 2 * queries * keys * dim


def scanned(tokens: int, dim: int) -> Cost:
    """MVFuser with N = 16: section 5 of the specification."""
    half, rank = dim // 2, dim // 16
    products = linear(tokens, dim, dim) + 6 * tokens * half + linear(tokens, half, rank + 32) + linear(tokens, rank, half, dim)
    return Cost(products, 0, 9 * tokens * half * 16 + tokens * half, tokens * half)


@dataclasses.dataclass
class Spec:
    """Sections 1 to 10 of the specification, as numbers."""

    patch: int
    grid: int
    vlm_class: int  # tokens before the patches
    text: tuple[int, int, int]  # layers, width, length
    dim: int  # D
    hidden: int = 4096
    matrices: int = 2  # of the vision-language tower's MLP

    def parts(self) -> dict[str, Cost]:
        g, d, C = self.grid, self.dim, 1024
        patches = g * g
        first, second = 1 + patches, self.vlm_class + patches
        layers, width, length = self.text
        sizes = [(g // 2) ** 2, g**2, (2 * g) ** 2]
        tokens, finest = sum(sizes), (4 * g) ** 2
        blocks = {
            "vfm": attended(first, first, C) + linear(first, C, 4096, C),
            "vlm": attended(second, second, C) + self.matrices * linear(second, C, self.hidden),
        }
        found = {name: Cost(24 * block + patches * 3 * self.patch**2 * C) for name, block in blocks.items()}
        found["adapters"] = scanned(first + second, C) * 24
        line = layers * (attended(length, length, width) + linear(length, width, 4 * width, width))
        found["text"] = Cost(19 * line + 19 * width * d)
        memory = 1 + patches
        enhanced = linear(memory, d, 256) + linear(19, d, 256) + attended(19, 19, 256) + linear(19, 256, 1024, 256, d)
        found["context_decoder"] = Cost(enhanced) + scanned(memory + 2 * 19, 256)
        # every place of a transposed 2 x 2 convolution is multiplied with four kernels
        found["fpn1"] = Cost(patches * 4 * 2048**2 + 4 * patches * 4 * 2048**2)
        found["fpn2"] = Cost(patches * 4 * 2048**2)
        samples = 8 * 3 * 4
        layer = linear(tokens, 256, 256) * 2 + linear(tokens, 256, 3 * samples) + attended(tokens, 19, 256)
        layer += linear(tokens, 256, 2048, 256)
        maps = linear(tokens + finest, 2048, 256) + finest * 9 * 256**2 + linear(finest, 256, 256)
        found["pixel_decoder"] = Cost(maps + linear(19, d, 256) + 6 * layer, 6 * 5 * tokens * samples * 32 + 4 * 256 * finest)
        decoded = linear(19, d, 256, 256) + 10 * (3 * linear(19, 256, 256) + 19 * 256 * finest) + linear(19, 256, 20)
        for i in range(9):
            decoded += attended(19, sizes[i % 3], 256) + attended(19, 19, 256) + linear(19, 256, 2048, 256)
        found["mask_decoder"] = Cost(decoded, sum(4 * 19 * sizes[i % 3] for i in range(9)))
        found["(itself)"] = Cost(19 * 19 * finest, 4 * 19 * 512**2)
        return found


def by_hand(variant: str) -> dict[str, Cost]:
    if variant == "eva":
        spec = Spec(14, 36, 1, (12, 768, 13), 768, hidden=2730, matrices=3)
        return spec.parts() | {"embedding": Cost(linear(1297, 1024, 768))}
    if variant == "clip":
        around = Cost(24 * linear(1025, 1024, 1024))
        head = Cost(linear(1025, 1024, 1024, 768))
        more = {"adapter_proj1": around, "adapter_proj2": around, "embedding": head}
        return Spec(16, 32, 1, (12, 768, 10), 768).parts() | more
    # its head is asked by a probe for the whole image and by every token for itself
    head = Cost(attended(1, 1024, 1024) + attended(1024, 1024, 1024) + linear(1025, 1024, 4096, 1024))
    return Spec(16, 32, 0, (24, 1024, 10), 1024).parts() | {"embedding": head}


@each_variant
def test_the_whole_of_mfuser_by_hand(variant: str) -> None:
    row, expected = full(variant), by_hand(variant)
    found = {part.name: part.cost for part in row.components}
    assert found.keys() == expected.keys()
    for name, cost in expected.items():
        assert found[name] == cost, name
    assert row.cost == sum(expected.values(), Cost())
    assert row.total == (row.cost.products + row.cost.sampling) / 1e9


@each_variant
def test_parameters_are_the_releases_but_for_those_that_do_nothing(variant: str) -> None:
    layout = json.loads((ROOT / f"tests/goldens/layout_{variant}.json").read_text())
    trained = {name: counts["trainable"] for name, counts in layout["components"].items()}
    frozen = {name: counts["frozen"] for name, counts in layout["components"].items()}
    # section 13 of the specification: what no gradient reaches is not built here
    trained.pop("random_text", None)
    if variant == "siglip":
        trained.pop("adapter_proj")
    row = full(variant)
    assert row.trainable == sum(trained.values())
    assert row.parameters - row.trainable == sum(frozen.values()) - 1024  # DINOv2's mask token
    parts = {part.name: part for part in row.components}
    assert parts["adapters"].trainable == trained["adapter"]
    assert parts["fpn1"].trainable + parts["fpn2"].trainable == trained["fpn"]
    assert parts["context_decoder"].trainable == trained["context_decoder"]
    assert parts["pixel_decoder"].trainable == trained["pixel_decoder"]
    assert parts["mask_decoder"].trainable == trained["transformer_decoder"] + trained["decode_head_other"]
    assert parts["(itself)"].trainable == trained["contexts"] + trained["gamma"]
    for name in ("vfm", "vlm", "text"):
        assert parts[name].trainable == 0
    # the table of section 12, in millions
    used = {"eva": 118.65, "clip": 170.06, "siglip": 118.96}
    assert row.trainable / 1e6 == pytest.approx(used[variant], abs=0.02)


def test_parts_and_operators_add_up(tiny: Row) -> None:
    for row in (full("eva"), tiny):
        assert sum((part.cost for part in row.components), Cost()) == row.cost
        assert sum(row.by_operator.values(), Cost()) == row.cost
        assert sum(part.total for part in row.components) == pytest.approx(row.total)
        assert sum(part.parameters for part in row.components) == row.parameters
        assert sum(part.trainable for part in row.components) == row.trainable


def test_counting_takes_a_fraction_of_the_memory_of_the_weights() -> None:
    reset = Path("/proc/self/clear_refs")
    if not reset.exists():
        pytest.skip("only Linux says how much memory a process held at most")
    reset.write_text("5")  # forget the peak until here
    before = peak_gb()
    found = made_now(subjects(["source-only"], settings=["method.backbone=dinov2_l"])[0])
    assert 4e-9 * sum(part.parameters for part in found.held) > 1.2
    assert peak_gb() - before < 0.4


def test_the_environments_backend_changes_no_count(tiny: Row, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MFUSER_BACKEND", "reference")
    again = counts(subjects(["mfuser"], **TINY)).rows[0]  # type: ignore[arg-type]
    assert again == tiny
    assert again.by_module == tiny.by_module


@pytest.mark.full
def test_neither_weights_nor_tokenizers_are_needed() -> None:
    # a machine that has none: SigLIP's would have to be loaded
    assert table.TOWERS["siglip"].files[1].where is None
    with pytest.raises(weights.WeightsNotFound):
        mfuser.build("mfuser", vlm="siglip", weights="meta")
    (siglip,) = subjects(["mfuser"], vlm="siglip")
    assert sum(part.parameters for part in made_now(siglip).held) > 1e9


# ---- which models


def variants(*names: str, **flags: object) -> list[str]:
    return [subject.method.variant for subject in subjects(names, **flags)]  # type: ignore[arg-type]


def test_a_method_stands_for_all_its_backbones_and_nothing_for_all_methods() -> None:
    each = {name: variants(name) for name in methods.names()}
    for name, rows in each.items():
        assert len(set(rows)) == len(rows) == len(methods.module(name).BACKBONES)
    assert variants() == [row for rows in each.values() for row in rows]
    assert {subject.size for subject in subjects()} == {(512, 512)}


def test_flags_choose_towers() -> None:
    assert variants("mfuser", vlm="clip") == ["dinov2_l + clip"]
    assert variants("mfuser", vlm="tiny") == ["tiny + tiny"]
    assert variants("mfuser", vlm="eva02", vfm="dinov3_l") == ["dinov3_l + eva02"]
    assert variants("mfuser", vfm="small") == ["small + small"]
    # another foundation tower stands where the usual one did; small towers would not fit it
    assert variants("mfuser", vfm="dinov3_l") == [f"dinov3_l + {vlm}" for vlm in ("eva02", "clip", "siglip", "siglip2")]
    assert variants("mfuser", settings=["method.vlm=tiny", "method.vfm=tiny"]) == ["tiny + tiny"]
    # without names, of the methods that have such towers
    assert variants(vlm="eva02") == ["dinov2_l + eva02", "eva02"]
    assert variants(vlm="siglip") == ["dinov2_l + siglip"]
    with pytest.raises(RecipeError, match="vlm `nosuch` is unknown"):
        variants(vlm="nosuch")


def test_a_recipe_has_its_own_size_and_name_unless_told_otherwise() -> None:
    (own,) = subjects(["streets/mfuser-scratch"])
    assert (own.recipe, own.size, own.method.variant) == ("streets/mfuser-scratch", (128, 128), "tiny + tiny")
    (other,) = subjects(["streets/mfuser-scratch"], size=(64, 96), settings=["method.fuser=selfattn_concat"])
    assert (other.size, other.method.variant) == ((64, 96), "tiny + tiny, selfattn_concat")
    assert variants("mfuser/eva02-gta", vlm="clip") == ["dinov2_l + clip"]
    assert variants("streets/source-only", "mfuser/clip-gta") == ["tiny", "dinov2_l + clip"]


def test_settings_change_what_is_counted(tiny: Row) -> None:
    # as tests of single fusers say: a self-attention costs 4 C^2 a token and two products of tokens with tokens
    row = counts(subjects(["mfuser"], **TINY, settings=["method.fuser=selfattn_concat"])).rows[0]  # type: ignore[arg-type]
    tokens, C = 2 * (1 + 8 * 8), 64
    parts = {part.name: part for part in row.components}
    assert parts["adapters"].cost == Cost(3 * (4 * tokens * C**2 + 2 * tokens**2 * C))
    assert parts["adapters"].parameters == 3 * (4 * C**2 + 4 * C)
    others = [part for part in row.components if part.name != "adapters"]
    assert others == [part for part in tiny.components if part.name != "adapters"]


@pytest.mark.parametrize(
    ("names", "flags", "told"),
    [
        (["nope"], {}, "unknown method or recipe `nope`"),
        (["streets/nope"], {}, "unknown recipe `streets/nope`"),
        (["mfuser"], {"vlm": "nope"}, "vlm `nope` is unknown"),
        (["mfuser"], {"vfm": "nope"}, "nope"),
        (["source-only"], {"vlm": "eva02"}, "method.vlm: unknown key"),
        (["mfuser"], {"settings": ["method.fuser=nope"]}, "fuser `nope` is unknown"),
        (["mfuser"], {"settings": ["method.nope=1"]}, "method.nope: unknown key"),
        (["mfuser"], {"settings": ["train.steps=3"]}, "train: a method alone has no such section"),
    ],
)
def test_what_is_unknown_is_named(names: list[str], flags: dict[str, object], told: str) -> None:
    with pytest.raises(RecipeError, match=told):
        subjects(names, **flags)  # type: ignore[arg-type]


def test_towers_that_do_not_fit_are_told() -> None:
    with pytest.raises(RecipeError, match="`mfuser` cannot be built: `small` has 8 blocks and `tiny` 3"):
        counts(subjects(["mfuser"], vlm="tiny", vfm="small", size=(64, 64)))
    with pytest.raises(RecipeError, match="not a multiple of the patch of `tiny`, 8"):
        counts(subjects(["mfuser"], vlm="tiny", size=(60, 64)))


def test_unknown_conventions_and_dtypes_are_told() -> None:
    with pytest.raises(DgbenchError, match="unknown convention `macs`") as error:
        counts([], convention="macs")
    assert "mac" in (error.value.hint or "")
    for measure in (lambda: counts([], dtype="fp8"), lambda: profile_fusion(Silent(), timed=False, dtype="fp8")):
        with pytest.raises(DgbenchError, match="unknown dtype `fp8`"):
            measure()
    with pytest.raises(DgbenchError, match="unknown convention `macs`"):
        profile_fusion(Silent(), timed=False, convention="macs")
    with pytest.raises(DgbenchError, match="unknown device `abacus`"):
        profile([], Silent(), device="abacus")


# ---- conventions and windows


def test_conventions_change_totals_and_no_cost(tiny: Row) -> None:
    found = counts(subjects(["mfuser"], **TINY), convention="flop")  # type: ignore[arg-type]
    assert (found.convention, found.unit) == ("flop", "GFLOP")
    assert found.rows[0].cost == tiny.cost
    flop = 2 * (tiny.cost.products + tiny.cost.sampling) + tiny.cost.scan
    assert found.rows[0].total == pytest.approx(flop / 1e9, rel=1e-12)


def test_an_image_costs_its_windows() -> None:
    # crop 512, stride 341: three windows down and six across 1024 x 2048
    one = counts(subjects(["source-only"], settings=["method.backbone=tiny"])).rows[0]
    whole = counts(subjects(["source-only"], settings=["method.backbone=tiny"]), slide=(1024, 2048)).rows[0]
    down, across = (-(-(side - 512) // 341) + 1 for side in (1024, 2048))
    assert (down, across) == (3, 6)
    assert (one.windows, whole.windows) == (1, 18)
    assert whole.cost == one.cost * 18
    assert whole.total == pytest.approx(18 * one.total)
    assert whole.parameters == one.parameters
    assert [part.cost for part in whole.components] == [part.cost * 18 for part in one.components]
    for each, single in ((whole.by_operator, one.by_operator), (whole.by_module, one.by_module)):
        assert each == {name: cost * 18 for name, cost in single.items()}


# ---- times


@pytest.fixture(scope="module")
def timed() -> Profile:
    return profile(subjects(["mfuser"], **TINY), Silent(), device="cpu", batches=(1, 2))  # type: ignore[arg-type]


def test_times_on_a_cpu(timed: Profile, tiny: Row) -> None:
    (row,) = timed.rows
    assert [timing.batch for timing in row.timings] == [1, 2]
    for timing in row.timings:
        assert 0 < timing.ms.low <= timing.ms.median <= timing.ms.high
        assert timing.ms.calls >= 3
        assert timing.images_per_second == pytest.approx(timing.batch / (timing.ms.median / 1e3))
        assert (timing.gib, timing.joules) == (None, None)
    assert (row.best, row.step, row.problem) == (None, None, "")
    assert row.cost == tiny.cost
    assert row.components == tiny.components
    assert row.backends == {"selective_scan": "torch", "ms_deform_attn": "torch"}


def test_it_is_written_down_what_was_timed_on(timed: Profile) -> None:
    assert timed.hardware is not None
    assert timed.hardware.name == "cpu"
    assert (timed.dtype, timed.compiled, timed.unmeasured) == ("fp32", False, "")
    assert torch.__version__.startswith(timed.environment["torch"])
    assert timed.environment["device"] == "cpu"
    assert timed.environment["threads"] == str(torch.get_num_threads())
    # as tests/dgbench/test_environment.py compares with the repository: somebody may commit while the tests run
    assert (timed.commit, timed.dirty) == code_commit()
    assert timed.created.endswith("Z")


def test_whole_images_are_timed_by_windows() -> None:
    chosen = subjects(["source-only"], settings=["method.backbone=tiny"], size=(32, 32))
    one, four = (profile(chosen, Silent(), device="cpu", slide=slide).rows[0] for slide in (None, (64, 96)))
    stride = 32 * 341 // 512  # the protocol's share of the crop
    assert four.windows == (-(-(64 - 32) // stride) + 1) * (-(-(96 - 32) // stride) + 1)
    assert four.timings[0].ms.median > one.timings[0].ms.median


def test_counts_need_no_gpu_and_the_reason_for_no_times_is_told() -> None:
    found = counts(subjects(["mfuser"], **TINY))  # type: ignore[arg-type]
    assert found.unmeasured == "only counts were asked for"
    assert found.hardware is None
    assert found.rows[0].timings == ()
    if torch.cuda.is_available():
        return
    found = profile(subjects(["source-only"], settings=["method.backbone=tiny"], size=(32, 32)), Silent())
    assert "no usable CUDA GPU" in found.unmeasured
    assert "--device cpu" in found.unmeasured
    assert found.rows[0].total > 0
    assert found.rows[0].timings == ()
    with pytest.raises(DgbenchError, match="no CUDA device is usable here"):
        profile([], Silent(), device="cuda")


def test_what_could_not_be_timed_is_told_below_the_times(timed: Profile, capsys: pytest.CaptureFixture[str]) -> None:
    (row,) = timed.rows
    failed = dataclasses.replace(row, variant="too large", timings=(), problem="CUDA out of memory. Tried to allocate 9 GiB")
    render.show(dataclasses.replace(timed, rows=(row, failed)))
    table = capsys.readouterr().out.partition("Times of crops")[2]
    lines = {line.split("  ")[1].strip(): line.split() for line in table.splitlines() if line.startswith("mfuser  ")}
    assert lines["too large"][-4:] == ["–"] * 4
    assert f"{row.timings[-1].images_per_second:.1f}" in lines["tiny + tiny"]
    assert "mfuser (too large): CUDA out of memory. Tried to allocate 9 GiB" in table
