"""`dgbench profile` as it is typed: its formats read by other programs, its pictures, and what it refuses."""

from __future__ import annotations

import csv
import io
import json
import math
import re
import sys
from pathlib import Path

import pandas as pd
import pytest
from PIL import Image
from typer.testing import CliRunner, Result

from dgbench import cli, render, results
from dgbench.cost.fusion import FusionProfile, profile_fusion
from dgbench.cost.tradeoff import Panel, Point, Tradeoff
from dgbench.progress import Silent
from dgbench.recipe import dump, load_recipe
from dgbench.runs import claim_run

sys.path.insert(0, str(Path(__file__).parent / "dgbench"))
from records import model

# a model that is counted in a moment, and one with a scan
FLOOR = ("source-only", "--set", "method.backbone=tiny", "--size", "64", "64")
TINY = ("mfuser", "--vlm", "tiny", "--size", "64", "64")
LAYERS = ("--fusion", "--vfm", "tiny", "--vlm", "tiny", "--size", "64", "64")
FUSERS = ["mvfuser", "mvfuser_bidir", "mvfuser_no_gate", "selfattn_concat", "selfattn_separate", "bi_deform_attn"]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DGBENCH_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*arguments: str) -> Result:
    result = CliRunner().invoke(cli.app, ["profile", *arguments, "--count-only", "--quiet"], prog_name="dgbench")
    assert result.exit_code == 0, result.output
    return result


def fails(*arguments: str, code: int) -> str:
    """Run what must fail; return its message as one line."""
    result = CliRunner().invoke(cli.app, ["profile", *arguments, "--quiet"], prog_name="dgbench")
    assert result.exit_code == code, result.output
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    return " ".join(re.sub(r"[│╭╮╰╯─]", " ", result.stderr).split())


def runs_of(folder: Path, fuser: str, *scores: tuple[int, float]) -> None:
    """Run folders as `dgbench train` leaves them: a resolved recipe and records."""
    for seed, miou in scores:
        run_folder = claim_run(folder / f"{fuser}-{seed}")
        recipe = load_recipe(
            "streets/mfuser-scratch", [f"method.fuser={fuser}", f"train.seed={seed}", "data.targets=[streets-city,streets-world]"]
        )
        dump(recipe, run_folder / "recipe.yaml")
        for each in model(0.5, miou, miou, seed=seed):
            results.write(each, run_folder)


@pytest.fixture(scope="module")
def layers() -> FusionProfile:
    """What `dgbench profile` with LAYERS shows, counted once for all that draw it."""
    return profile_fusion(Silent(), vfm="tiny", vlm="tiny", size=(64, 64), timed=False)


@pytest.fixture(scope="module")
def typed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Result, Path]:
    """`dgbench profile` with LAYERS as typed beside own runs, and where it drew its picture."""
    folder = tmp_path_factory.mktemp("typed")
    runs_of(folder / "runs", "mvfuser", (0, 0.40), (1, 0.44), (2, 0.45))
    runs_of(folder / "runs", "selfattn_concat", (0, 0.38))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        return run(*LAYERS, "--format", "markdown", "--plot", "deep/layers.svg"), folder / "deep" / "layers.svg"


@pytest.fixture(scope="module")
def papers(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The fusion layers at the paper's width in its convention, with an own run of another width."""
    folder = tmp_path_factory.mktemp("papers")
    runs_of(folder / "runs", "mvfuser", (0, 0.40))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        return run("--fusion", "--convention", "paper", "--format", "markdown").stdout


# ---- the formats


def test_json_has_every_number(here: Path) -> None:
    found = json.loads(run(*TINY, "--json").stdout)
    assert run(*FLOOR, "--json").stdout.startswith("{")
    (row,) = found["rows"]
    assert row["method"] == "mfuser"
    assert row["size"] == [64, 64]
    parts = {part["name"]: part for part in row["components"]}
    # four transposed kernels of 128 channels at each of 8 x 8 places, then of 16 x 16
    assert parts["fpn1"]["cost"] == {"products": (64 + 256) * 4 * 128**2, "sampling": 0, "scan": 0, "skip": 0}
    assert sum(part["total"] for part in parts.values()) == pytest.approx(row["total"])
    assert found["unmeasured"] == "only counts were asked for"
    assert found["hardware"] is None
    assert {"torch", "python", "platform"} <= found["environment"].keys()
    assert not list(here.iterdir())


def test_csv_is_read_by_others_with_full_numbers() -> None:
    text = run(*FLOOR, "--format", "csv").stdout
    (row,) = csv.DictReader(io.StringIO(text))
    frame = pd.read_csv(io.StringIO(text))
    found = json.loads(run(*FLOOR, "--json").stdout)["rows"][0]
    assert frame.shape == (1, len(row))
    for values in (row, frame.iloc[0]):
        assert int(values["parameters"]) == found["parameters"]
        assert int(values["cost_products"]) == found["cost"]["products"]
        assert float(values["total"]) == found["total"]
        assert values["size"] == "64x64"
        assert values["convention"] == "mac"


def test_csv_has_a_row_for_each_fuser(layers: FusionProfile, capsys: pytest.CaptureFixture[str]) -> None:
    render.show(layers, "csv")
    frame = pd.read_csv(io.StringIO(capsys.readouterr().out)).set_index("fuser")
    assert list(frame.index) == FUSERS
    # 4 C^2 a token and two products of 130 tokens with 130
    assert frame["cost_products"]["selfattn_concat"] == 4 * 130 * 64**2 + 2 * 130**2 * 64
    assert frame["parameters"]["selfattn_concat"] == 4 * 64**2 + 4 * 64


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def test_markdown_is_a_table_of_github(typed: tuple[Result, Path]) -> None:
    text = typed[0].stdout
    first = text.split("\n\n")[1].splitlines()
    header, rule, *rows = (cells(line) for line in first)
    assert header[:3] == ["fuser", "params M", "GMAC"]
    assert rule[0].startswith(":")
    assert all(re.fullmatch(r"-+:", cell) for cell in rule[1:])
    assert [row[0] for row in rows] == FUSERS
    assert {len(row) for row in rows} == {len(header)}
    (row,) = (row for row in rows if row[0] == "selfattn_separate")
    assert row[header.index("params M")] == f"{2 * (4 * 64**2 + 4 * 64) / 1e6:.2f}"
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert len(lines) == (2 + len(FUSERS)) + (2 + 6)  # and the sweep: six sizes


def test_latex_has_closed_environments_and_no_bare_signs(layers: FusionProfile, capsys: pytest.CaptureFixture[str]) -> None:
    render.show(layers, "latex")
    text = run(*FLOOR, "--by-module", "--format", "latex").stdout + capsys.readouterr().out
    begun, ended = re.findall(r"\\begin\{(\w+)\}", text), re.findall(r"\\end\{(\w+)\}", text)
    assert begun
    assert sorted(begun) == sorted(ended)
    opened: list[str] = []
    for step, name in re.findall(r"\\(begin|end)\{(\w+)\}", text):
        if step == "begin":
            opened.append(name)
        else:
            assert opened.pop() == name
    assert not re.findall(r"(?<!\\)[_%#$]", text.replace(r"$\pm$", ""))
    assert r"mvfuser\_bidir" in text
    assert r"100.0 \%" in text
    assert text.count("{") == text.count("}")
    for table in re.findall(r"\\begin\{tabular\}.*?\\end\{tabular\}", text, re.DOTALL):
        columns = re.search(r"\{tabular\}\{(\w+)\}", table)
        assert columns
        assert {line.count("&") + 1 for line in table.splitlines() if line.endswith(r"\\")} == {len(columns[1])}


def test_the_text_says_what_the_numbers_are() -> None:
    text = run(*FLOOR, "--slide", "100", "64").stdout
    assert "Cost of an image of 100x64 by windows" in text
    assert "GMAC" in text
    assert "only counts were asked for" in text
    line = next(line.split() for line in text.splitlines() if line.startswith("source-only"))
    # windows of 64 every 42 pixels, 64 * 341 / 512, over 100
    assert line[:4] == ["source-only", "tiny", "64x64", "2"]


def test_by_module_shows_the_parts() -> None:
    text = run(*TINY, "--by-module", "--format", "markdown").stdout
    assert "**mfuser (tiny + tiny) at 64x64, part by part**" in text
    rows = {row[0]: row for row in map(cells, text.partition("part by part")[2].splitlines()) if len(row) > 1}
    assert {"vfm", "vlm", "adapters", "text", "pixel_decoder", "mask_decoder", "(itself)", "total"} <= rows.keys()
    shares = {name: float(row[4].removesuffix(" %")) for name, row in rows.items() if row[4].endswith("%")}
    assert shares.pop("total") == 100
    assert sum(shares.values()) == pytest.approx(100, abs=0.05 * len(shares))
    assert "part by part" not in run(*FLOOR).stdout


def test_the_papers_table_at_its_printed_digits(papers: str) -> None:
    assert "1297 + 1297 tokens of width 1024" in papers
    rows = {row[0]: row[1:3] for row in map(cells, papers.splitlines()[: 4 + len(FUSERS)]) if len(row) > 2}
    assert rows["mvfuser"] == ["1.67", "17.21"]
    assert rows["selfattn_concat"] == ["4.20", "98.64"]
    assert rows["selfattn_separate"] == ["8.40", "71.08"]
    assert rows["bi_deform_attn"] == ["3.35", "34.65"]


def test_accuracies_of_own_runs_stand_beside_the_costs(typed: tuple[Result, Path]) -> None:
    text = typed[0].stdout
    header, _, *rows = (cells(line) for line in text.splitlines() if line.startswith("|"))
    column = {row[0]: row[header.index("own mIoU")] for row in rows[: len(FUSERS)]}
    # (40 + 44 + 45) / 3 and the root of (3^2 + 1^2 + 2^2) / 2
    assert column["mvfuser"] == "43.0 ±2.6 (3)"
    assert column["selfattn_concat"] == "38.0 (1)"
    assert column["bi_deform_attn"] == "–"
    assert "mean over streets-city, streets-world" in text


def test_published_accuracies_stand_beside_layers_of_the_papers_width_and_own_runs_of_another_do_not(
    papers: str, typed: tuple[Result, Path]
) -> None:
    header, _, *rows = (cells(line) for line in papers.splitlines() if line.startswith("|"))
    column = {row[0]: row[header.index("paper C") :] for row in rows[: len(FUSERS)]}
    assert header[header.index("paper C") :] == ["paper C", "paper B", "paper M", "paper avg."]
    assert column == {
        "mvfuser": ["70.19", "63.13", "71.28", "68.20"],
        "mvfuser_bidir": ["–"] * 4,
        "mvfuser_no_gate": ["–"] * 4,
        "selfattn_concat": ["70.24", "62.31", "71.11", "67.89"],
        "selfattn_separate": ["69.68", "61.91", "70.85", "67.48"],
        "bi_deform_attn": ["69.46", "61.17", "70.11", "66.91"],
    }
    assert "arXiv:2504.03193, Table 3" in papers
    assert "Own runs are left out where their towers are not 1024 wide: tiny + tiny." in papers
    assert "paper" not in typed[0].stdout


# ---- pictures

_MAGIC = {".png": b"\x89PNG\r\n\x1a\n", ".svg": b"<?xml", ".pdf": b"%PDF-", ".PNG": b"\x89PNG\r\n\x1a\n"}


@pytest.mark.parametrize("suffix", _MAGIC)
def test_a_plot_is_a_picture_of_its_kind(suffix: str, layers: FusionProfile, here: Path) -> None:
    path = render.draw_fusion(layers, here / f"layers{suffix}")
    content = path.read_bytes()
    assert content.startswith(_MAGIC[suffix])
    if suffix.lower() == ".png":
        with Image.open(path) as image:
            assert image.format == "PNG"
            assert image.width > 500
            assert len(image.convert("RGB").getcolors(1 << 20) or []) > 6  # a line of its own colour for each fuser
    if suffix == ".svg":
        assert labels(path) >= {*FUSERS, "tokens of both towers", "GMAC (convention mac)"}
    assert render.draw_fusion(layers, here / f"again{suffix}").read_bytes() == content, "the same numbers make the same file"


def test_plot_says_where_the_picture_is(typed: tuple[Result, Path]) -> None:
    result, picture = typed
    assert "plot: deep/layers.svg" in result.stderr
    assert labels(picture) >= set(FUSERS)


def labels(path: Path) -> set[str]:
    """The texts of a picture: matplotlib draws letters as paths and says beside them what they spell."""
    return set(re.findall(r"<!-- (.*?) -->", path.read_text()))


def test_a_point_that_was_published_looks_otherwise_than_one_that_was_measured(here: Path) -> None:
    points = (
        Point("ours (tiny)", "run", 0.5, 0.31, 0.01),
        Point("bare", "run", 0.7, 0.35, None),
        Point("unsure", "run", 1.0, 0.2, math.nan),
        Point("expected", "reference", 2.0, 0.4, None),
        Point("of a paper", "published", 1296.2, 0.682),
    )
    found = Tradeoff(
        (Panel("streets-game to streets-city\nprotocol unified", points, ("Rein (EVA02-L)", "Rein (DINOv2-L)")),), "GMAC", "mac"
    )
    texts = labels(render.draw_tradeoff(found, here / "all.svg"))
    meanings = {"measured here", "published, not comparable with ours", "expected of a recipe, not run here"}
    assert texts >= meanings | {point.label for point in points}
    assert texts >= {"GMAC a crop (convention mac)", "mIoU in %, mean over unseen domains", "protocol unified"}
    assert not any("Rein" in text for text in texts)  # what is not drawn is said by the command: titles are short
    own = Tradeoff((Panel("streets", points[:1], ()),), "GMAC", "mac")
    assert labels(render.draw_tradeoff(own, here / "own.svg")) & meanings == {"measured here"}
    # a marker of its own for each kind: a colour alone is lost in print
    outlines = re.findall(r'<path id="(?:m|C)\w+" d="([^"]+)"', (here / "all.svg").read_text())
    assert len(set(outlines)) >= 3


@pytest.mark.parametrize("name", ["plot.jpg", "plot", "plot.png.txt"])
def test_another_suffix_is_a_usage_error_before_anything_is_counted(name: str, here: Path) -> None:
    message = fails(*FLOOR, "--plot", name, code=2)
    assert f"'--plot': {name} must end in .png, .svg, .pdf" in message
    assert not list(here.iterdir())


@pytest.mark.full
def test_own_runs_references_and_published_rows_are_drawn(here: Path) -> None:
    folder = claim_run(Path("runs") / "one")
    recipe = load_recipe("streets/smoke")
    dump(recipe, folder / "recipe.yaml")
    targets = tuple(recipe.data.targets)
    for each in model(0.5, *[0.3] * len(targets), targets=targets, recipe=recipe.name, source=recipe.data.source):
        results.write(each, folder)
    run(*FLOOR, "--plot", "tradeoff.svg")
    meanings = {"measured here", "published, not comparable with ours", "expected of a recipe, not run here"}
    assert labels(here / "tradeoff.svg") >= meanings | {"mfuser (tiny + tiny)", "MFuser (EVA02-L)"}


# ---- what is refused


def test_one_number_is_a_square() -> None:
    row = json.loads(run("source-only", "--set", "method.backbone=tiny", "--size", "64", "--json").stdout)["rows"][0]
    assert row["size"] == [64, 64]
    assert "takes height and width, or one number for both" in fails("source-only", "--size", "64", "64", "64", code=2)


@pytest.mark.parametrize(
    ("given", "flag"),
    [
        (["mfuser"], "NAME"),
        (["--set", "method.state=4"], "--set"),
        (["--slide", "1024", "2048"], "--slide"),
        (["--compile"], "--compile"),
        (["--by-module"], "--by-module"),
    ],
)
def test_fusion_takes_no_models(given: list[str], flag: str, here: Path) -> None:
    message = fails("--fusion", *given, "--plot", "x.png", code=2)
    assert f"'--fusion': compares layers, not models: give it without {flag}" in message
    assert not list(here.iterdir())


def test_fusion_takes_one_batch() -> None:
    assert "'--batch': takes one number with --fusion" in fails("--fusion", "--batch", "1", "2", code=2)


@pytest.mark.parametrize(
    ("given", "code", "told"),
    [
        (["nope"], 1, "unknown method or recipe `nope`"),
        (["mfuser", "--vlm", "nope"], 1, "vlm `nope` is unknown"),
        (["mfuser", "--set", "method.fuser=nope"], 1, "fuser `nope` is unknown"),
        ([*FLOOR, "--dtype", "fp8"], 1, "unknown dtype `fp8`"),
        ([*FLOOR, "--device", "abacus"], 1, "unknown device `abacus`"),
        (["--fusion", "--vfm", "nope"], 1, "vfm `nope` is unknown"),
        (["--convention", "macs"], 2, "'--convention'"),
        (["--format", "pdf"], 2, "'--format'"),
        (["--size", "0", "64"], 2, "'--size'"),
        (["--size", "64", "64", "64"], 2, "'--size'"),
        (["--batch", "0"], 2, "'--batch'"),
        (["--nope"], 2, "--nope"),
    ],
)
def test_mistakes_are_told_without_a_traceback(given: list[str], code: int, told: str) -> None:
    assert told in fails(*given, code=code)


def test_times_on_a_cpu_are_shown() -> None:
    arguments = ["profile", *FLOOR, "--device", "cpu", "--batch", "1", "2", "--format", "markdown", "--quiet"]
    result = CliRunner().invoke(cli.app, arguments, prog_name="dgbench")
    assert result.exit_code == 0, result.output
    table = result.stdout.partition("**Times of crops, fp32, on cpu**")[2]
    header, _, *rows = (cells(line) for line in table.splitlines() if line.startswith("|"))
    assert header == ["method", "backbone", "batch", "ms", "images/s", "GiB"]
    assert [row[2] for row in rows] == ["1", "2"]
    for row in rows:
        ms, spread = re.fullmatch(r"([\d.]+) ±([\d.]+)", row[3]).groups()  # type: ignore[union-attr]
        assert float(row[4]) == pytest.approx(1e3 * int(row[2]) / float(ms), rel=0.05)
        assert float(spread) >= 0
        assert row[5] == "–"
