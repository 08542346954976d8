"""The report of runs as one file of HTML: what is on it, where its links lead, and that nothing in it is obeyed."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from records import record
from test_compare import K, counts, run
from typer.testing import CliRunner, Result

from dgbench import ci, cli, html_report, metrics, results
from dgbench.engine import swept
from dgbench.progress import Silent
from dgbench.recipe import dump, load_recipe
from dgbench.report.compare import compare
from dgbench.report.page import gather
from dgbench.report.sides import read

HOSTILE = "<img src=x onerror=alert(1)>\"'&{{ 7919*7907 }}\x1b[31m\u202e$\\frac{"


class Parsed(HTMLParser):
    """What a browser would find in a document."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    def values(self, *names: str) -> list[str]:
        return [value for _, given in self.tags for name in names if (value := given.get(name))]


def page(*runs: Path, comparison: bool = False) -> str:
    """Return the report of runs without pictures."""
    found = compare(read(runs[0]), read(runs[-1])) if comparison else None
    records = html_report.records_of([str(folder) for folder in runs], Path("runs"))
    built = html_report.build(records, progress=Silent(), gallery=False, comparison=found)
    file = html_report.write(built, runs[0].parent / "report.html").file
    return file.read_text(encoding="utf-8")


def logged(folder: Path) -> Path:
    """Add the log of a training of two terms of the loss."""
    folder.mkdir(exist_ok=True)
    lines = [{"step": step, "loss": 3.0 / step, "lr": 1e-3, "a": 1.0, HOSTILE: 2.0} for step in (1, 2, 3)]
    (folder / "log.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The report of two runs with logs."""
    root = tmp_path_factory.mktemp("two")
    first = logged(run(root / "first"))
    other = logged(run(root / "second", {"streets-city": 0.6, "streets-night": 0.6}, method="source-only", recipe_hash="b" * 12))
    return page(first, other)


def called(*arguments: object) -> Result:
    return CliRunner().invoke(cli.app, ["report", *map(str, arguments), "--quiet"], prog_name="dgbench")


def test_nothing_leads_out_of_the_file(two: str) -> None:
    found = Parsed(two)
    assert all(value.startswith(("#", "data:image/")) for value in found.values("src", "href", "xlink:href", "action", "data"))
    assert not {tag for tag, _ in found.tags} & {"script", "link", "iframe", "object", "embed", "form", "base"}
    assert not re.search(r"@import|url\((?!#)", two)
    (policy,) = (given["content"] for tag, given in found.tags if given.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None
    assert policy.startswith("default-src 'none'; style-src 'unsafe-inline'; img-src data:;")


def test_every_link_leads_to_one_element(two: str) -> None:
    found = Parsed(two)
    ids = found.values("id")
    assert len(ids) == len(set(ids))
    referred = [value.removeprefix("#") for value in found.values("href")] + re.findall(r"url\(#([^)]+)\)", two)
    assert referred
    assert set(referred) <= set(ids)


def test_rows_lead_to_runs_and_runs_to_rows(two: str) -> None:
    links = set(Parsed(two).values("href"))
    assert {"#run-0", "#run-1", "#row-0-0", "#row-0-1"} <= links


def test_every_part_is_there(two: str) -> None:
    found = Parsed(two)
    assert {"leaderboard", "cost", "runs", "protocol", "environment"} <= set(found.values("id"))
    # two plots of the training, and two confusion matrices of each run
    names = [given.get("aria-label") or "" for tag, given in found.tags if tag == "svg"]
    assert sum(name.startswith(("losses of", "learning rate of")) for name in names) == 4
    assert sum(name.startswith("Confusion matrix") for name in names) == 4
    assert "2.14" in found.texts  # of the environment


def test_bars_are_the_scores_of_the_classes(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    values = tuple(i / 20 for i in range(K - 1))
    results.write(record(miou=0.4, iou=(*values, None)), folder)
    widths = re.findall(r'class="bar" style="width: ([\d.]+)%"', page(folder))
    assert [float(width) for width in widths] == pytest.approx([*(100 * value for value in values), 0])


def test_the_matrix_is_of_shares_of_each_labelled_class(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    matrices = np.zeros((2, K, K), np.int64)
    matrices[:, 0, 0], matrices[:, 0, 1], matrices[:, 1, 1] = 30, 10, 5
    results.write(record(miou=metrics.miou(matrices.sum(0)), n_images=2, n_available=2), folder, matrices, ["a", "b"])
    told = [text for text in Parsed(page(folder)).texts if " taken for " in text]
    assert told == ["road taken for road: 75.0 %", "road taken for sidewalk: 25.0 %", "sidewalk taken for sidewalk: 100.0 %"]


def test_examples_are_the_worst_the_median_and_the_best_image(tmp_path: Path) -> None:
    matrices = np.zeros((5, K, K), np.int64)
    right = [60, 90, 10, 40, 99]  # of a hundred pixels of road; those that are wrong are taken for sidewalk
    matrices[:, 0, 0], matrices[:, 0, 1] = right, [100 - n for n in right]
    made = record(miou=metrics.miou(matrices.sum(0)), n_images=5, n_available=5)
    results.write(made, tmp_path / "run", matrices, list("abcde"))
    ((target,),) = (found.targets for found in gather(results.query(tmp_path)).runs)
    assert [(one.place, one.id) for one in target.examples] == [("worst", "c"), ("median", "a"), ("best", "e")]
    assert target.examples[0].miou == pytest.approx(0.1 / 2)  # sidewalk is there, and is 0


def test_hostile_names_stay_text(tmp_path: Path) -> None:
    fields = {"method": HOSTILE, "variant": HOSTILE, "recipe": HOSTILE, "source": HOSTILE, "environment": {HOSTILE: HOSTILE}}
    folder = logged(tmp_path / "<b>run")
    for number, target in enumerate((HOSTILE, "streets-city")):
        matrices = counts(6, number)
        made = record(
            target, metrics.miou(matrices.sum(0)), id=f"{number}", n_images=6, n_available=6, protocol=HOSTILE, **fields
        )
        results.write(made, folder, matrices, [f"{HOSTILE}{i}" for i in range(6)])
    text = page(folder, comparison=True)
    found = Parsed(text)
    assert not [given for _, given in found.tags if any(name.startswith("on") for name in given)]
    assert {tag for tag, _ in found.tags} & {"img", "b"} <= {"b"}  # the best value's
    assert "<b>run" in "".join(found.texts)
    assert "onerror=alert(1)>" in "".join(found.texts)
    assert "{{ 7919*7907 }}" in "".join(found.texts)
    assert "62615533" not in text  # the product: no date, count or score of a page has so many digits
    assert "\x1b" not in text
    assert "\u202e" not in text


def test_a_run_without_weights_says_so_and_has_no_pictures(tmp_path: Path) -> None:
    run(tmp_path / "baseline")
    done = called(tmp_path / "baseline", "--out", tmp_path / "r.html", "--json")
    assert done.exit_code == 0, done.stderr
    told = json.loads(done.stdout)
    assert (told["pictures"], told["notes"]) == (0, ["no pictures: the folder has no weights"])
    found = Parsed((tmp_path / "r.html").read_text())
    assert "no pictures: the folder has no weights" in found.texts
    assert not [tag for tag, _ in found.tags if tag == "img"]


def test_damaged_matrices_cost_the_matrix_alone(tmp_path: Path) -> None:
    folder = run(tmp_path / "run")
    next(folder.glob("confusion-*city*")).write_bytes(b"PK")
    text = page(folder)
    assert text.count("Confusion matrix:") == 1
    assert text.count("IoU by class, %") == 2
    assert "cannot be read" in text


def test_a_recipe_that_cannot_be_read_costs_the_operations_alone(tmp_path: Path) -> None:
    folder = run(tmp_path / "run")
    (folder / "recipe.yaml").write_text("method: {name: of-another-version}")
    text = page(folder)
    assert "no mIoU against operations: " in text
    assert text.count("Confusion matrix:") == 2


def test_a_run_of_severities_alone_has_its_sections(tmp_path: Path) -> None:
    run(tmp_path / "run", {f"streets-{name}@{place}": 0.7 for name in ("fog", "night") for place in ("0.5", "1")})
    (found,) = gather(results.query(tmp_path)).runs
    assert len(found.targets) == 4


def test_the_same_runs_make_the_same_file(tmp_path: Path) -> None:
    folder = logged(run(tmp_path / "run"))
    assert page(folder) == page(folder)


def test_several_severities_are_a_curve_and_no_sections(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    severities = {f"streets-fog@{place}": 0.8 - 0.3 * float(place) for place in ("0", "0.5", "1")}
    run(folder, {"streets-city": 0.7})
    for target, share in severities.items():
        matrices = counts(40, 7, share)
        made = record(target, metrics.miou(matrices.sum(0)), n_images=40, n_available=40, checkpoint=f"{folder}")
        results.write(made, folder, matrices, [str(i) for i in range(40)])
    dump(load_recipe("streets/mfuser"), folder / "recipe.yaml")
    (found,) = swept.of_run(folder, results.query(folder))
    (curve,) = found.curves
    assert [point.severity for point in curve.points] == [0, 0.5, 1]
    assert [point.miou for point in curve.points] == [
        record_.miou for target in severities for record_ in results.query(folder) if record_.target == target
    ]
    assert [target.record.target for one in gather(results.query(folder)).runs for target in one.targets] == ["streets-city"]


def test_a_comparison_stands_in_front(tmp_path: Path) -> None:
    base = run(tmp_path / "base" / "run")
    head = run(tmp_path / "head" / "run", {"streets-city": 0.7, "streets-night": 0.5})
    (written,) = ci.write_page(compare(read(base), read(head)), head.parent, tmp_path / "out", progress=Silent())
    text = written.read_text()
    assert written.name == "report.html"
    assert text.index('id="comparison"') < text.index('id="leaderboard"')
    assert "Regression: " in text


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("nowhere",), 1, "no run `nowhere`"),
        (("latest",), 1, "no run with recipe.yaml in runs"),
        (("--out", "report.pdf"), 2, "report.pdf must end in .html, .htm"),
        (("--with-images", "--no-gallery"), 2, "says nothing with --no-gallery"),
    ],
)
def test_what_cannot_be_reported_is_said(arguments: tuple[str, ...], code: int, message: str) -> None:
    Path("runs").mkdir()
    done = called(*arguments)
    assert (done.exit_code, message in done.stderr) == (code, True), done.stderr


# ---- in a browser

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def browsed(file: Path, width: int, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [
            str(CHROMIUM),
            *("--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--dump-dom"),
            *(f"--user-data-dir={file.parent / 'profile'}", f"--window-size={width},900", *options, file.as_uri()),
        ],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_a_browser_has_nothing_to_complain_of(two: str, tmp_path: Path) -> None:
    (tmp_path / "page.html").write_text(two)
    # what the page's own policy refuses, a request to anywhere, is told on the console, too
    assert "CONSOLE" not in browsed(tmp_path / "page.html", 1400).stderr


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
@pytest.mark.parametrize("width", [400, 1400])
def test_the_page_is_not_wider_than_its_window(two: str, width: int, tmp_path: Path) -> None:
    measure = "<script>document.body.id = `is-${document.documentElement.scrollWidth}-of-${innerWidth}`</script>"
    without_policy = re.sub(r"<meta http-equiv[^>]*>", "", two)
    (tmp_path / "page.html").write_text(without_policy.replace("</body>", f"{measure}</body>"))
    told = re.search(r"is-(\d+)-of-(\d+)", browsed(tmp_path / "page.html", width).stdout)
    assert told is not None
    assert int(told[1]) <= int(told[2])
