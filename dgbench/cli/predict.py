"""Run: segment photographs, images of domains, and the test splits that servers score."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dgbench.cli import completion
from dgbench.cli.options import (
    DeviceOpt,
    Format,
    FormatOpt,
    ModeOpt,
    NoCompileOpt,
    ProtocolOpt,
    QuietOpt,
    RootOpt,
    RunsOpt,
    SplitOpt,
    listed,
)
from dgbench.cli.program import Command
from dgbench.errors import ResultError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dgbench.needs import Wanted

panel = typer.Typer()

_LOOKED_AT = ("overlay", "color")
_PICTURES = (".png", ".jpg")


class Kind(StrEnum):
    """What is written of a prediction: `dgbench.engine.pictures` draws it."""

    OVERLAY = "overlay"
    COLOR = "color"
    TRAIN_IDS = "train-ids"
    LABEL_IDS = "label-ids"


class Archive(StrEnum):
    """The servers of `dgbench.engine.submission`; a command's values are known before anything of the engine is imported."""

    CITYSCAPES = "cityscapes"
    ACDC = "acdc"
    FOG = "acdc-fog"
    NIGHT = "acdc-night"
    RAIN = "acdc-rain"
    SNOW = "acdc-snow"


@panel.command(cls=Command, rich_help_panel="Run", epilog="Example: dgbench predict photo.jpg --out overlay.png")
def predict(
    ctx: typer.Context,
    photos: Annotated[list[Path] | None, typer.Argument(metavar="PHOTO...", help="Image files of any size, or folders.")] = None,
    checkpoint: Annotated[
        list[str] | None,
        typer.Option(metavar="RUN...", help="Run folders or saved models; default: `latest`.", autocompletion=completion.runs),
    ] = None,
    domain: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME...",
            help="Images of domains instead of photographs.",
            autocompletion=completion.domains,
            callback=listed,
        ),
    ] = None,
    split: SplitOpt = None,
    limit: Annotated[
        int | None, typer.Option(min=1, metavar="COUNT", help="The first images of each domain; default: all, of a --grid 1.")
    ] = None,
    ids: Annotated[
        list[str] | None, typer.Option(metavar="ID...", help="These images: file names, paths, numbers, DOMAIN:ID.")
    ] = None,
    kinds: Annotated[
        list[Kind] | None,
        typer.Option(
            "--as", metavar="KIND...", help="overlay, color, train-ids, label-ids; default: overlay, of a --grid color."
        ),
    ] = None,
    opacity: Annotated[
        float | None, typer.Option(min=0, max=1, metavar="0..1", help="Of the overlay's colours; default: 0.6.")
    ] = None,
    contours: Annotated[bool, typer.Option("--contours", help="Draw the borders between classes.")] = False,
    side_by_side: Annotated[
        bool, typer.Option("--side-by-side", help="One picture: image, truth where known, each checkpoint.")
    ] = False,
    grid: Annotated[
        Path | None, typer.Option(metavar="PICTURE", help="A figure: domains' images by image, truth, checkpoints.")
    ] = None,
    titles: Annotated[
        list[str] | None, typer.Option(metavar="TEXT...", help="What the checkpoints are called; default: method or folder.")
    ] = None,
    submission: Annotated[
        Archive | None,
        typer.Option(metavar="NAME", help="The archive that a server scores: cityscapes, acdc, acdc-fog, -night, -rain, -snow."),
    ] = None,
    images: Annotated[Path | None, typer.Option(metavar="FOLDER", help="Of a --submission: where the test images lie.")] = None,
    partial: Annotated[bool, typer.Option("--partial", help="Of a --submission: not the whole test split is all right.")] = False,
    protocol: ProtocolOpt = None,
    mode: ModeOpt = None,
    no_compile: NoCompileOpt = False,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", "-o", metavar="PATH", help="File or folder; default: PHOTO-overlay.png here, `predictions`, NAME.zip."
        ),
    ] = None,
    device: DeviceOpt = None,
    root: RootOpt = None,
    runs: RunsOpt = Path("runs"),
    form: FormatOpt = Format.TEXT,
    quiet: QuietOpt = False,
) -> None:
    """Segment photographs or images of domains: overlays, ids, figures, archives for test servers."""
    from dgbench import render

    # a photograph may follow the list of checkpoints; files that stand for runs are records
    behind = [given for given in checkpoint or () if Path(given).is_file() and Path(given).suffix != ".json"]
    photos = [*(photos or ()), *map(Path, behind)]
    models = [given for given in checkpoint or () if given not in behind] or ["latest"]
    what = _mode(submission, grid, domain)
    given = {
        "PHOTO": photos,
        "--domain": domain,
        "--split": split,
        "--limit": limit,
        "--ids": ids,
        "--as": kinds,
        "--opacity": opacity is not None,
        "--contours": contours,
        "--side-by-side": side_by_side,
        "--titles": titles,
        "--images": images,
        "--partial": partial,
        "--protocol": protocol,
        "--out": out,
    }
    shape = tuple(dict.fromkeys(kind.value for kind in kinds or ((Kind.COLOR if grid else Kind.OVERLAY),)))
    _refuse_misplaced(ctx, what, [flag for flag, value in given.items() if value], shape)
    if what == "PHOTO" and not photos:
        ctx.fail("Missing argument 'PHOTO...'.")
    if what == "--grid" and not domain:
        raise _wrong(ctx, "--grid", "needs the domains whose images it shows: --domain NAME...")
    if grid is not None and grid.suffix.lower() not in _PICTURES:
        raise _wrong(ctx, "--grid", f"{grid} must end in {', '.join(_PICTURES)}")
    if what == "--submission" and len(models) > 1:
        raise _wrong(ctx, "--checkpoint", f"takes one run with --submission, {len(models)} were given")
    if what == "--submission" and out is not None and out.suffix.lower() != ".zip":
        raise _wrong(ctx, "--out", f"{out} must end in .zip")
    if titles and len(set(titles)) != len(models):
        raise _wrong(ctx, "--titles", f"takes a different title for each of {len(models)} checkpoints, got {', '.join(titles)}")
    progress = render.progress(quiet=quiet)
    run_as: dict[str, Any] = {"mode_name": mode and mode.value, "compiles": False if no_compile else None}
    wanted = _on_disk(domain or (), split, root)
    folders = _runs(models, runs, wanted, root)
    if submission is not None:
        from dgbench.engine.submission import images_of, submit

        files = images_of(submission.value, root, images, partial=partial)
        from dgbench.engine.tested import load

        (model,) = load(folders, device=device, protocol_name=protocol, root=root, titles=titles or (), **run_as)
        path = out or Path(f"{submission.value}.zip")
        render.show(submit(submission.value, files, model, path, progress=progress), form)
        return
    alpha = 0.6 if opacity is None else opacity
    if what == "PHOTO" and shape == ("overlay",) and len(folders) == 1 and not (side_by_side or titles):
        from dgbench.engine.predict import predict as segment

        found = segment(
            photos, folders[0], out or Path(), device=device, opacity=alpha, contours=contours, **run_as, progress=progress
        )
        render.show(found, form)
        return
    from dgbench.engine import modes, pictures
    from dgbench.engine.scenes import scenes
    from dgbench.engine.tested import load

    subjects = pictures.of_photos(photos) if what == "PHOTO" else []
    compiling = modes.Compiling(modes.mode(modes.FAST if mode is None else mode.value, compiles=run_as["compiles"]))
    loaded = load(folders, device=device, protocol_name=protocol, root=root, titles=titles or (), **run_as)
    style = pictures.Style(shape, alpha, contours)
    if what != "PHOTO":
        count = limit or (1 if what == "--grid" else None)
        rows = [row for _, row, _ in wanted]
        chosen = scenes(rows, loaded, split=split, ids=ids or (), limit=count, at_least_one=what == "--grid", root=root)
        if grid is not None:
            render.show([pictures.draw_figure(chosen, loaded, grid, style, progress=progress)], form)
            return
        subjects = pictures.of_scenes(chosen)
    draw = pictures.draw_side_by_side if side_by_side else pictures.draw_each
    place = out or Path("" if what == "PHOTO" else "predictions")
    drawn = draw(subjects, loaded, place, style, progress=progress)
    compiling.tell(progress)
    render.show(drawn, form)


# what goes with what is segmented
_GOES_WITH = {
    "PHOTO": ("PHOTO", "--as", "--opacity", "--contours", "--side-by-side", "--titles", "--out"),
    "--domain": (
        *("--domain", "--split", "--limit", "--ids", "--as", "--opacity", "--contours"),
        *("--side-by-side", "--titles", "--protocol", "--out"),
    ),
    "--grid": ("--domain", "--split", "--limit", "--ids", "--as", "--opacity", "--contours", "--titles", "--protocol"),
    "--submission": ("--images", "--partial", "--protocol", "--titles", "--out"),
}


def _mode(submission: Archive | None, grid: Path | None, domain: list[str] | None) -> str:
    return "--submission" if submission else "--grid" if grid else "--domain" if domain else "PHOTO"


def _refuse_misplaced(ctx: typer.Context, mode: str, flags: Sequence[str], shape: tuple[str, ...]) -> None:
    """Raise a usage error for options that say nothing together."""
    for flag in flags:
        if flag not in _GOES_WITH[mode]:
            others = " or ".join(other for other, its in _GOES_WITH.items() if flag in its)
            rule = f"{mode} takes no photographs" if flag == "PHOTO" else f"goes with {others}, not with {mode}"
            raise _wrong(ctx, flag, rule)
    if "--limit" in flags and "--ids" in flags:
        raise _wrong(ctx, "--limit", "says how many are taken where no --ids say which: give one of the two")
    for flag in ("--opacity", "--contours"):
        if flag in flags and "overlay" not in shape:
            raise _wrong(ctx, flag, f"is of overlays, --as says {', '.join(shape)}")
    if (mode == "--grid" or "--side-by-side" in flags) and (len(shape) > 1 or shape[0] not in _LOOKED_AT):
        raise _wrong(ctx, "--as", f"takes one of {' and '.join(_LOOKED_AT)} in one picture, got {', '.join(shape)}")


def _wrong(ctx: typer.Context, flag: str, problem: str) -> typer.BadParameter:
    return typer.BadParameter(problem, ctx=ctx, param_hint=f"'{flag}'")


def _on_disk(names: Sequence[str], split: str | None, root: Path | None) -> list[Wanted]:
    from dgbench.data.catalog import rows

    found: list[Wanted] = []
    for row in rows(names, root):
        used = split or ("val" if "val" in row.splits else next(iter(row.splits)))
        row.require_split(used)
        found.append(("target", row, used))
    return found


def _runs(models: Sequence[str], runs: Path, wanted: list[Wanted], root: Path | None) -> list[Path]:
    """Return the folders of the checkpoints, once it is known that the domains' files are here."""
    from dgbench.needs import check_scoring
    from dgbench.runs import scored_run

    try:
        folders = [Path(text) if (Path(text) / "model.json").is_file() else scored_run(text, runs) for text in models]
    except ResultError as error:
        check_scoring(wanted, root, error)
        raise
    check_scoring(wanted, root)
    return folders
