"""The command line: each command parses, calls one function and shows its typed result.

Heavy imports live in the commands' bodies, so that `--help` and completion need nothing beyond Typer. Click has no
option that takes several values and stops at the next flag; `Command` adds it to the list-valued ones: `--targets A B`.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup, TyperOption

from dgbench.errors import DgbenchError, StoppedError

if TYPE_CHECKING:
    from typer._click.core import Context
    from typer._click.formatting import HelpFormatter


class Command(TyperCommand):
    """A command whose list-valued options take one or more values each, and may repeat."""

    def format_help(self, ctx: Context, formatter: HelpFormatter) -> None:
        """Draw panels on a terminal only."""
        self.rich_markup_mode = self.rich_markup_mode if sys.stdout.isatty() else None
        super().format_help(ctx, formatter)

    def parse_args(self, ctx: Context, args: list[str]) -> list[str]:
        """Give every value of such an option its own flag, the form that Click understands."""
        lists = {name: p for p in self.params if isinstance(p, TyperOption) and p.multiple for name in p.opts}
        rest = super().parse_args(ctx, list(_one_flag_each(args, lists, ctx)))
        if ctx.resilient_parsing:
            # completion goes back `nargs` words to see whose value it completes: here, as far as there is no other flag
            for option in lists.values():
                option.nargs = len(args) + 1
        return rest


def _one_flag_each(args: Sequence[str], lists: Mapping[str, TyperOption], ctx: Context) -> Iterator[str]:
    """Turn `--targets A B --json` into `--targets A --targets B --json`; `--` ends the options as usual."""
    position = 0
    while position < len(args):
        flag, equals, first = args[position].partition("=")
        position += 1
        if args[position - 1] == "--":
            yield from args[position - 1 :]
            return
        if flag not in lists:
            yield args[position - 1]
            continue
        values = [first] if equals else []
        while position < len(args) and not args[position].startswith("-"):
            values.append(args[position])
            position += 1
        if not values and not ctx.resilient_parsing:
            raise typer.BadParameter("needs at least one value", ctx=ctx, param_hint=f"'{flag}'")
        for value in values:
            yield from (flag, value)


class Program(TyperGroup):
    """The whole program: whatever a user can mend or cause ends in one clear message and an exit code."""

    def format_help(self, ctx: Context, formatter: HelpFormatter) -> None:
        """Draw panels on a terminal only."""
        self.rich_markup_mode = self.rich_markup_mode if sys.stdout.isatty() else None
        super().format_help(ctx, formatter)

    def main(self, *args: Any, **settings: Any) -> Any:
        """Run as a program; usage errors are framed on a terminal only."""
        self.rich_markup_mode = self.rich_markup_mode if sys.stderr.isatty() else None
        return super().main(*args, **settings)

    def list_commands(self, ctx: Context) -> list[str]:
        """Put the groups first, as a user meets them."""
        return sorted(super().list_commands(ctx), key=lambda name: not isinstance(self.commands[name], TyperGroup))

    def invoke(self, ctx: Context) -> Any:
        """Run a command; exit 1 for a user's mistake, 130 for Ctrl-C. DGBENCH_DEBUG=1 lets the traceback through."""
        _warn_on_stderr()
        try:
            result = super().invoke(ctx)
            # here, where a closed pipe can still be handled, and not when the interpreter ends
            sys.stdout.flush()
        except (Exception, KeyboardInterrupt) as error:
            if os.environ.get("DGBENCH_DEBUG") == "1" or (code := _explain(error)) is None:
                raise
            raise typer.Exit(code) from None
        return result


def _explain(error: BaseException) -> int | None:
    """Print what went wrong and return the exit code; None if it is not the user's to know, but ours to mend."""
    if type(error).__module__.startswith("typer"):  # usage errors and exits are Typer's own to show
        return None
    from dgbench import render

    if isinstance(error, StoppedError):
        render.note(error.message)
        return 130
    if isinstance(error, KeyboardInterrupt):
        render.note("interrupted")
        return 130
    if (disk := _disk_error(error)) is not None:
        render.failure(*disk)
        return 1
    if isinstance(error, DgbenchError):
        render.failure(error.message, error.hint)
        return 1
    message, hint = getattr(error, "message", None), getattr(error, "hint", None)
    if isinstance(message, str) and isinstance(hint, str) and type(error).__module__.startswith("mfuser"):
        render.failure(message, hint)
        return 1
    if type(error).__name__ == "OutOfMemoryError":
        render.failure(str(error).splitlines()[0], "use smaller batches: --set train.batch_size=2 eval.batch_size=1")
        return 1
    return None


def _disk_error(error: BaseException) -> tuple[str, str | None] | None:
    """Return message and hint if `error` is the file system's refusal, or was caused by a full disk."""
    refusal = error if isinstance(error, OSError) else _full_disk(error)
    if refusal is None or refusal.errno == errno.EPIPE:
        return None
    path = refusal.filename or "a file"
    if refusal.errno in _FULL:
        return f"no space left on the disk while writing {path}", "free some space there, or choose another --out"
    if refusal.errno in (errno.EACCES, errno.EPERM):
        return f"no permission: {path}", "choose a place that is yours, or change its permissions"
    if refusal.errno == errno.EROFS:
        return f"the file system is read-only: {path}", "choose a place that can be written"
    return (f"{(refusal.strerror or 'cannot be used').lower()}: {path}", None) if refusal.filename else None


_FULL = (errno.ENOSPC, errno.EDQUOT)


def _full_disk(error: BaseException | None) -> OSError | None:
    # other libraries wrap the system's error in one of their own
    while error is not None:
        if isinstance(error, OSError) and error.errno in _FULL:
            return error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return None


class _Warnings(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        from dgbench import render

        render.warning(record.getMessage())


def _warn_on_stderr() -> None:
    for name in ("dgbench", "mfuser"):
        logger = logging.getLogger(name)
        if not any(isinstance(handler, _Warnings) for handler in logger.handlers):
            logger.addHandler(_Warnings(logging.WARNING))
            logger.propagate = False


# ---- completion: light imports only


def _domain_names(ctx: typer.Context, incomplete: str) -> list[str]:
    from dgbench.data.domains import DOMAINS, names

    given = ctx.params.get("targets") or ()
    known: Sequence[str] = tuple(DOMAINS)
    with contextlib.suppress(DgbenchError, OSError):  # a declaration that is wrong is the command's to tell
        known = names()
    return [name for name in known if name.startswith(incomplete) and name not in given]


def _protocol_names(incomplete: str) -> list[str]:
    from dgbench.protocol import PROTOCOLS

    return [name for name in PROTOCOLS if name.startswith(incomplete)]


def _keys(incomplete: str) -> list[str]:
    from dgbench.recipe import key_paths

    return [f"{path}=" for path in key_paths() if path.startswith(incomplete)]


def _recipes(incomplete: str) -> list[str]:
    from dgbench.resources import recipes_dir

    root = recipes_dir()
    names = [path.relative_to(root).with_suffix("").as_posix() for path in sorted(root.rglob("[!_]*.yaml"))]
    methods = Path(__file__).parents[1] / "mfuser" / "methods"
    names += [path.stem.replace("_", "-") for path in sorted(methods.glob("[!_]*.py"))]
    return [name for name in names if name.startswith(incomplete)]


def _runs(incomplete: str) -> list[str]:
    found = [path.parent.as_posix() for path in sorted(Path("runs").glob("*/recipe.yaml"))]
    return [name for name in ("latest", *found) if name.startswith(incomplete)]


# ---- options that mean the same everywhere


def _root(ctx: typer.Context, folder: Path | None) -> Path | None:
    """Let --root stand for DGBENCH_DATA while the command runs: the declarations in it are found by name, too."""
    if folder is not None and not ctx.resilient_parsing:
        before = os.environ.get("DGBENCH_DATA")
        os.environ["DGBENCH_DATA"] = str(folder)
        ctx.call_on_close(lambda: os.environ.pop("DGBENCH_DATA") if before is None else os.environ.update(DGBENCH_DATA=before))
    return folder


JsonOpt = Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")]
QuietOpt = Annotated[bool, typer.Option("--quiet", "-q", help="No progress on stderr.")]
DeviceOpt = Annotated[str | None, typer.Option(metavar="NAME", help="cpu, cuda, cuda:1; default: a GPU if there is one.")]
RootOpt = Annotated[
    Path | None, typer.Option(metavar="FOLDER", help="Data root; default: DGBENCH_DATA, else ./data.", callback=_root)
]
RunsOpt = Annotated[Path, typer.Option("--runs", metavar="FOLDER", help="Where runs are kept.")]
TargetsOpt = Annotated[
    list[str] | None,
    typer.Option("--targets", metavar="NAME...", help="Domains to score on, one or more.", autocompletion=_domain_names),
]
ProtocolOpt = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="See `dgbench protocols`; default: the recipe's.", autocompletion=_protocol_names),
]
SplitOpt = Annotated[str | None, typer.Option(metavar="NAME", help="Default: val, else the first that the domain has.")]
LabelMapOpt = Annotated[str | None, typer.Option(metavar="NAME", help="Read labels by this map, not the domain's own.")]
DomainArg = Annotated[str, typer.Argument(metavar="DOMAIN", help="See `dgbench data list`.", autocompletion=_domain_names)]

app = typer.Typer(
    cls=Program,
    name="dgbench",
    help="Train on one domain, score on domains never seen.",
    epilog="First: dgbench train streets/mfuser",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
data = typer.Typer(cls=Program, help="List domains, look at them, verify their files, count their classes.", no_args_is_help=True)
app.add_typer(data, name="data", rich_help_panel="Get")
kernels = typer.Typer(cls=Program, help="List the operators' backends, build the CUDA kernels, time them.", no_args_is_help=True)
app.add_typer(kernels, name="kernels", rich_help_panel="Get")


def _version(wanted: bool) -> None:
    if wanted:
        from dgbench import __version__

        typer.echo(f"dgbench {__version__}")
        raise typer.Exit


@app.callback()
def _dgbench(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")] = False,
) -> None:
    """Train on one domain, score on domains never seen."""


@app.command(cls=Command, rich_help_panel="Get", epilog="Example: dgbench download cityscapes gta5 bdd acdc --dry-run")
def download(
    ctx: typer.Context,
    names: Annotated[
        list[str] | None,
        typer.Argument(metavar="NAME...", help="Domains and towers, see `data list` and `models`.", autocompletion=_domain_names),
    ] = None,
    from_paths: Annotated[
        list[Path] | None,
        typer.Option("--from", metavar="PATH...", help="What you have: archives, folders of them, an unpacked tree."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show what is needed and what is here.")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Accept the terms of the data sets, which are shown.")] = False,
    mirror: Annotated[
        str | None, typer.Option(metavar="URL", help="Take archives from URL/<domain>/<archive> instead of the sites.")
    ] = None,
    jobs: Annotated[int, typer.Option(min=1, max=32, metavar="COUNT", help="Archives at a time.")] = 4,
    hub: Annotated[str | None, typer.Option(metavar="OWNER/NAME", help="A dataset of the Hub as a domain of your own.")] = None,
    columns: Annotated[
        list[str] | None,
        typer.Option(metavar="PART=COLUMN...", help="With --hub: image=COLUMN label=COLUMN, or globs of loose files."),
    ] = None,
    revision: Annotated[
        str | None, typer.Option(metavar="COMMIT", help="Of a Hub repository; default: main as it is now.")
    ] = None,
    name_as: Annotated[str | None, typer.Option("--as", metavar="NAME", help="With --hub: the domain's name.")] = None,
    encoding: Annotated[str, typer.Option(metavar="NAME", help="With --hub: how label files store their values.")] = "ids",
    label_map: Annotated[str, typer.Option(metavar="NAME", help="With --hub: what the labels' values mean.")] = "train-ids",
    split: Annotated[str, typer.Option(metavar="NAME", help="With --hub: what to call a set of loose files.")] = "val",
    root: RootOpt = None,
    as_json: JsonOpt = False,
    quiet: QuietOpt = False,
) -> None:
    """Fetch domains and towers: show what is needed, then transfer, check and unpack it; again to go on after a stop."""
    from dgbench import download as downloads
    from dgbench import render
    from dgbench.data.hub_rows import wish_of

    if hub is None and (columns or name_as):
        raise typer.BadParameter("describes a repository: give it with --hub", ctx=ctx, param_hint="'--columns', '--as'")
    if not names and hub is None:
        raise typer.BadParameter("name a domain or a tower, or give --hub OWNER/NAME", ctx=ctx, param_hint="'NAME...'")
    wish = wish_of(hub, columns or (), revision, name_as, encoding=encoding, label_map=label_map, split=split) if hub else None
    given = {"--from": from_paths, "--mirror": mirror, "--root": root, "--hub": hub, "--columns": columns,
             "--revision": revision, "--as": name_as}  # fmt: skip
    with render.transfers(quiet=quiet) as bars:
        options = downloads.Options(
            root, tuple(from_paths or ()), mirror, revision, jobs, accept=yes, bars=bars,
            ask=_accepts if sys.stdin.isatty() else None, command=_retyped("download", names or (), given),
            show=render.tell if not quiet else lambda _plan: None,
        )  # fmt: skip
        if dry_run:
            render.show(downloads.plan(names or (), options, wish), as_json=as_json)
            return
        outcome = downloads.download(names or (), options, wish)
    if outcome.rows:
        render.show(list(outcome.rows), as_json=as_json)
    for problem in outcome.problems:
        render.failure(problem.message, problem.hint)
    if outcome.problems:
        raise typer.Exit(1)


def _accepts(terms: str) -> bool:
    from dgbench import render

    render.note(f"The owners ask of those who use these sets:\n{terms}")
    return typer.confirm("Do you accept?", err=True)


def _retyped(command: str, names: Sequence[str], options: Mapping[str, object]) -> str:
    """The command for its user to type again."""
    import shlex

    words = ["dgbench", command, *names]
    for flag, value in options.items():
        if value:
            words += [flag, *map(str, value if isinstance(value, list) else [value])]
    return shlex.join(words)


@app.command(cls=Command, rich_help_panel="Get", epilog="Example: dgbench models --json")
def models(as_json: JsonOpt = False) -> None:
    """List the towers: role, weights, licence, and whether they are on this disk."""
    from dgbench import render
    from mfuser.hub import models as towers

    render.show(towers(), as_json=as_json)


@app.command(cls=Command, rich_help_panel="Share", epilog="Example: dgbench convert mfuser_eva02.pth runs/authors-eva02")
def convert(
    checkpoint: Annotated[Path, typer.Argument(metavar="AUTHORS.pth", help="A checkpoint of the authors' release.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The run folder to make.")],
    recipe: Annotated[
        str | None, typer.Option(metavar="RECIPE", help="What it was trained by; default: mfuser/<tower>-gta.")
    ] = None,
    token_ids: Annotated[
        Path | None, typer.Option(metavar="FILE", help="JSON with the 19x5 token ids, where there is no tokenizer.")
    ] = None,
    as_json: JsonOpt = False,
) -> None:
    """Make a run of a checkpoint that the authors of MFuser published; no code of it is run."""
    from dgbench import render
    from dgbench.engine import convert as conversion

    ids = conversion.read_token_ids(token_ids) if token_ids else None
    render.show(conversion.convert(checkpoint, out, recipe=recipe, token_ids=ids), as_json=as_json)


@data.command("list", cls=Command, epilog="Example: dgbench data list")
def data_list(root: RootOpt = None, as_json: JsonOpt = False) -> None:
    """List the domains and where each lies on this disk."""
    from dgbench import render
    from dgbench.data.listing import states

    render.show(states(root), as_json=as_json)


@data.command("show", cls=Command, epilog="Example: dgbench data show streets-night --n 6 --out sheet.png")
def data_show(
    domain: DomainArg,
    n: Annotated[int, typer.Option(min=1, metavar="COUNT", help="How many images.")] = 6,
    split: SplitOpt = None,
    label_map: LabelMapOpt = None,
    out: Annotated[Path, typer.Option(metavar="FILE", help="The picture to write.")] = Path("sheet.png"),
    root: RootOpt = None,
    as_json: JsonOpt = False,
    quiet: QuietOpt = False,
) -> None:
    """Write a contact sheet: images, label overlays, legend."""
    from dgbench import render
    from dgbench.data.listing import sheet

    drawn = sheet(domain, split, out, images=n, root=root, label_map=label_map, progress=render.progress(quiet=quiet))
    render.show(drawn, as_json=as_json)


@data.command("stats", cls=Command, epilog="Example: dgbench data stats streets-game --n 200")
def data_stats(
    domain: DomainArg,
    n: Annotated[int | None, typer.Option(min=1, metavar="COUNT", help="Only the first images; default: all.")] = None,
    split: SplitOpt = None,
    label_map: LabelMapOpt = None,
    root: RootOpt = None,
    as_json: JsonOpt = False,
    quiet: QuietOpt = False,
) -> None:
    """Count how much of a domain each class makes up."""
    from dgbench import render
    from dgbench.data.listing import class_shares

    shares = class_shares(domain, split, images=n, root=root, label_map=label_map, progress=render.progress(quiet=quiet))
    render.show(shares, as_json=as_json)


@data.command("verify", cls=Command, epilog="Example: dgbench data verify cityscapes bdd100k")
def data_verify(
    names: Annotated[
        list[str], typer.Argument(metavar="DOMAIN...", help="See `dgbench data list`.", autocompletion=_domain_names)
    ],
    splits: Annotated[
        list[str] | None, typer.Option("--split", metavar="NAME...", help="Default: of train and val what is on this disk.")
    ] = None,
    label_map: LabelMapOpt = None,
    partial: Annotated[bool, typer.Option("--partial", help="Fewer images than the complete split are all right.")] = False,
    root: RootOpt = None,
    as_json: JsonOpt = False,
    quiet: QuietOpt = False,
) -> None:
    """Read every file: pairs, sizes, label values against the map, classes; exit 1 if something is wrong."""
    from dgbench import render
    from dgbench.data.verify import splits_to_verify, verify

    progress = render.progress(quiet=quiet)
    wanted = [(name, split) for name in names for split in (splits or splits_to_verify(name, root))]
    reports = [verify(name, split, root, label_map=label_map, progress=progress) for name, split in wanted]
    render.show(reports, as_json=as_json)
    if not all(report.ok and (partial or not report.n_missing) for report in reports):
        raise typer.Exit(1)


@data.command("export", cls=Command, epilog="Example: dgbench data export streets-city --as cityscapes --out data --n 20")
def data_export(
    streets: Annotated[str, typer.Argument(metavar="STREETS", help="A rendered domain.", autocompletion=_domain_names)],
    as_: Annotated[str, typer.Option("--as", metavar="DOMAIN", help="Whose files to write.", autocompletion=_domain_names)],
    out: Annotated[Path, typer.Option(metavar="ROOT", help="Data root; the domain's folder in it must not exist.")],
    n: Annotated[int | None, typer.Option(min=1, metavar="COUNT", help="At most so many images a split; default: all.")] = None,
    splits: Annotated[
        list[str] | None, typer.Option("--split", metavar="NAME...", help="Default: of train and val what DOMAIN has.")
    ] = None,
    size: Annotated[tuple[int, int] | None, typer.Option(metavar="H W", min=1, help="Default: 256 512.")] = None,
    layout: Annotated[str | None, typer.Option(metavar="NAME", help="One of DOMAIN's layouts; default: as published.")] = None,
    label_map: Annotated[str | None, typer.Option(metavar="NAME", help="Of DOMAIN's label maps, not its own.")] = None,
    as_json: JsonOpt = False,
    quiet: QuietOpt = False,
) -> None:
    """Write rendered scenes as the files of a published set: its folders, names and label encoding."""
    from dgbench import render
    from dgbench.data.export import export

    done = export(streets, as_, out, n=n, splits=splits or (), size=size, layout=layout, label_map=label_map,
                  progress=render.progress(quiet=quiet))  # fmt: skip
    render.show(done, as_json=as_json)


@kernels.command("list", cls=Command, epilog="Example: dgbench kernels list")
def kernels_list(as_json: JsonOpt = False) -> None:
    """List each operator's backends: whether they run here, which one runs by default, where the kernels' library lies."""
    from dgbench import render
    from dgbench.kernels import listing

    render.show(listing(), as_json=as_json)


@kernels.command("build", cls=Command, epilog="Example: dgbench kernels build --arch sm_80 sm_90")
def kernels_build(
    ctx: typer.Context,
    architectures: Annotated[
        list[str] | None,
        typer.Option("--arch", metavar="SM...", help="GPUs to build for: sm_80, sm_90, sm_100; default: those of this machine."),
    ] = None,
    as_json: JsonOpt = False,
    quiet: QuietOpt = False,
) -> None:
    """Compile the CUDA kernels ahead of time; needs nvcc, but no GPU when --arch names one."""
    from dgbench import render
    from dgbench.kernels import build

    try:
        built = build(architectures or (), render.progress(quiet=quiet))
    except ValueError as error:
        raise typer.BadParameter(str(error), ctx=ctx, param_hint="'--arch'") from None
    render.show(built, as_json=as_json)


@kernels.command("bench", cls=Command, epilog="Example: dgbench kernels bench --op selective_scan --shape 2 2594 512 16")
def kernels_bench(
    ctx: typer.Context,
    ops: Annotated[list[str] | None, typer.Option("--op", metavar="NAME...", help="Operators; default: all.")] = None,
    backends: Annotated[
        list[str] | None,
        typer.Option("--backend", metavar="NAME...", help="Backends, the first to compare with; default: those that run here."),
    ] = None,
    shape: Annotated[
        tuple[int, int, int, int] | None, typer.Option(metavar="B L D N", min=1, help="Of the selective scan, timed alone then.")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(metavar="NAME", help="fp32, bf16, fp16 or fp64; default: bf16 on a GPU, fp32 on a CPU.")
    ] = None,
    device: DeviceOpt = None,
    as_json: JsonOpt = False,
    quiet: QuietOpt = False,
) -> None:
    """Time the operators' backends on this machine, forward and forward + backward, beside what bounds them."""
    from dgbench import render
    from dgbench.kernels import bench

    if shape is not None and set(ops or ()) - {"selective_scan"}:
        raise typer.BadParameter("is the selective scan's: give it without --op", ctx=ctx, param_hint="'--shape'")
    timed = bench(ops or (), backends or (), render.progress(quiet=quiet), shape=shape, dtype=dtype, device=device)
    render.show(timed, as_json=as_json)


@app.command(cls=Command, rich_help_panel="Run", epilog="Example: dgbench train mfuser --vlm tiny --set train.steps=200")
def train(
    ctx: typer.Context,
    name: Annotated[
        str, typer.Argument(metavar="METHOD|RECIPE", help="A method, a recipe or a YAML file.", autocompletion=_recipes)
    ] = "mfuser",
    vlm: Annotated[
        str | None, typer.Option(metavar="NAME", help="Vision-language tower: tiny, eva02, clip, siglip, siglip2.")
    ] = None,
    vfm: Annotated[
        str | None, typer.Option(metavar="NAME", help="Vision foundation tower: tiny, dinov2_l, dinov3_l, timm:<model>.")
    ] = None,
    source: Annotated[str | None, typer.Option(metavar="NAME", help="Domain to train on.", autocompletion=_domain_names)] = None,
    targets: TargetsOpt = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE...", help="Change recipe keys: train.steps=200.", autocompletion=_keys),
    ] = None,
    seed: Annotated[int | None, typer.Option(metavar="NUMBER", help="Same as --set train.seed=NUMBER.")] = None,
    out: Annotated[Path | None, typer.Option(metavar="FOLDER", help="Run folder; default: a new one in --runs.")] = None,
    resume: Annotated[
        str | None, typer.Option(metavar="RUN", help="Go on with a stopped run, or `latest`.", autocompletion=_runs)
    ] = None,
    no_eval: Annotated[bool, typer.Option("--no-eval", help="Do not score the checkpoint afterwards.")] = False,
    device: DeviceOpt = None,
    root: RootOpt = None,
    runs: RunsOpt = Path("runs"),
    as_json: JsonOpt = False,
    quiet: QuietOpt = False,
) -> None:
    """Train on one domain, score on others, show the leaderboard."""
    from dgbench import render, results
    from dgbench.recipe import load_recipe, resolve

    if resume is not None:
        if any((vlm, vfm, source, targets, settings, out)) or seed is not None or name != "mfuser":
            problem = "goes on with the recorded recipe: only --device, --root and output options may be given with it"
            raise typer.BadParameter(problem, ctx=ctx, param_hint="'--resume'")
        run = results.find_run(resume, runs)
        recipe = load_recipe(run / "recipe.yaml")
    else:
        recipe_name, overrides = resolve(name, vlm=vlm, vfm=vfm, source=source)
        overrides += [f"data.targets=[{', '.join(targets)}]"] if targets else []
        overrides += [f"train.seed={seed}"] if seed is not None else []
        recipe = load_recipe(recipe_name, [*overrides, *(settings or ())])
        run = results.claim_run(out) if out is not None else results.new_run(runs, recipe.name)
    progress = render.progress(quiet=quiet)
    try:
        from dgbench.engine.evaluate import evaluate
        from dgbench.engine.train import train as fit

        trained = fit(recipe, run, progress=progress, resume=resume is not None, device=device, root=root)
    except KeyboardInterrupt:
        if not (run / "recipe.yaml").is_file():
            raise
        raise StoppedError(f"interrupted; go on with: dgbench train --resume {run}") from None
    finally:
        # a run that failed before its first file is no run
        with contextlib.suppress(OSError):
            run.rmdir()
    if no_eval:
        render.note(f"trained: {run}")
        render.show([trained], as_json=True) if as_json else None
        return
    try:
        records = evaluate(run, None, progress=progress, device=device, include_source=True, root=root)
    except KeyboardInterrupt:
        raise StoppedError(f"interrupted; training is complete, score it with: dgbench eval {run}") from None
    if as_json:
        render.show([trained, *records], as_json=True)
        return
    from dgbench.report.leaderboard import leaderboard, of_run, references

    known = {record.id: record for record in (*results.query(runs), *records)}
    render.show(of_run(leaderboard(known.values(), references(), published=False), run))
    render.note(f"run: {run}")


@app.command("eval", cls=Command, rich_help_panel="Run", epilog="Example: dgbench eval --targets streets-city streets-fog@0.6")
def eval_(
    ctx: typer.Context,
    run: Annotated[
        str | None, typer.Argument(metavar="RUN", help="Run folder, record or `latest`.", autocompletion=_runs)
    ] = None,
    targets: TargetsOpt = None,
    checkpoint: Annotated[
        str | None, typer.Option(metavar="RUN", help="The same as the argument RUN.", autocompletion=_runs)
    ] = None,
    protocol: ProtocolOpt = None,
    device: DeviceOpt = None,
    root: RootOpt = None,
    runs: RunsOpt = Path("runs"),
    as_json: JsonOpt = False,
    quiet: QuietOpt = False,
) -> None:
    """Score a run's checkpoint; without --targets, on its recipe's targets and source."""
    from dgbench import protocol as protocols
    from dgbench import render
    from dgbench.data.domains import lookup

    if run is not None and checkpoint is not None:
        raise typer.BadParameter("names the run a second time", ctx=ctx, param_hint="'--checkpoint'")
    names = [lookup(name).name for name in targets] if targets else None
    rules = protocols.lookup(protocol).name if protocol else None
    folder = _run_with_checkpoint(run or checkpoint or "latest", runs)
    from dgbench.engine.evaluate import evaluate

    progress = render.progress(quiet=quiet)
    records = evaluate(
        folder, names, progress=progress, device=device, include_source=names is None, root=root, protocol_name=rules
    )
    render.show(records, as_json=as_json)


@app.command(cls=Command, rich_help_panel="Run", epilog="Example: dgbench predict photo.jpg --out overlay.png")
def predict(
    photos: Annotated[list[Path], typer.Argument(metavar="PHOTO...", help="Image files of any size.")],
    checkpoint: Annotated[
        str, typer.Option(metavar="RUN", help="Run folder, saved model or `latest`.", autocompletion=_runs)
    ] = "latest",
    out: Annotated[
        Path, typer.Option(metavar="PATH", help="Picture to write, or a folder; default: PHOTO-overlay.png here.")
    ] = Path(),
    device: DeviceOpt = None,
    runs: RunsOpt = Path("runs"),
    as_json: JsonOpt = False,
) -> None:
    """Segment photographs and draw the classes over them."""
    from dgbench import render

    saved = Path(checkpoint)
    folder = saved if (saved / "model.json").is_file() else _run_with_checkpoint(checkpoint, runs)
    from dgbench.engine.predict import predict as segment

    render.show(segment(photos, folder, out, device=device), as_json=as_json)


def _run_with_checkpoint(text: str, runs: Path) -> Path:
    from dgbench.results import find_run

    # a run that stopped early is passed over by `latest`, but is refused by its own name with what to do about it
    return find_run(text, runs, needs="checkpoint" if text == "latest" else "recipe.yaml")


@app.command(cls=Command, rich_help_panel="Compare", epilog="Example: dgbench leaderboard --targets streets-fog")
def leaderboard(
    targets: TargetsOpt = None,
    source: Annotated[
        str | None, typer.Option(metavar="NAME", help="Only models trained on this.", autocompletion=_domain_names)
    ] = None,
    every: Annotated[bool, typer.Option("--all", help="Also runs that a newer one of the same recipe replaces.")] = False,
    no_published: Annotated[bool, typer.Option("--no-published", help="Leave the published tables out.")] = False,
    runs: RunsOpt = Path("runs"),
    as_json: JsonOpt = False,
) -> None:
    """Show own results by rank, reference results, and published numbers apart."""
    from dgbench import render, results
    from dgbench.data.domains import lookup
    from dgbench.report.leaderboard import leaderboard as arrange
    from dgbench.report.leaderboard import references

    columns = [lookup(name).name for name in targets] if targets else None
    only = lookup(source).name if source else None
    board = arrange(results.query(runs), references(), targets=columns, source=only, every=every, published=not no_published)
    render.show(board, as_json=as_json)


@app.command(cls=Command, rich_help_panel="Compare", epilog="Example: dgbench protocols paper-half")
def protocols(
    name: Annotated[
        str | None, typer.Argument(metavar="NAME", help="One of them; default: all.", autocompletion=_protocol_names)
    ] = None,
    as_json: JsonOpt = False,
) -> None:
    """Show what the protocols say, field by field: sizes, windows, label maps, classes."""
    from dgbench import render
    from dgbench.protocol import presets

    render.show(presets(name), as_json=as_json)


@app.command(cls=Command, rich_help_panel="Help", epilog="Example: dgbench doctor --json")
def doctor(root: RootOpt = None, as_json: JsonOpt = False) -> None:
    """Check what this machine offers: GPU, kernels, disk, data, recipes."""
    from dgbench import render
    from dgbench.doctor import doctor as examine

    checks = examine(root)
    render.show(checks, as_json=as_json)
    if any(check.state == "fail" for check in checks):
        raise typer.Exit(1)


def main() -> None:
    """Run the command line."""
    app(prog_name="dgbench")
