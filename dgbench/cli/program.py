"""The program and its commands, as classes of Typer: lists of values, help, and one clear message for every error.

Click has no option that takes several values and stops at the next flag; `Command` adds it to the list-valued ones:
`--targets A B`.
"""

from __future__ import annotations

import errno
import logging
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup, TyperOption

from dgbench.cli.mistakes import explained
from dgbench.cli.options import ENDINGS
from dgbench.cli.refusals import full_disk, refusal
from dgbench.errors import DgbenchError, StoppedError, Terminated

if TYPE_CHECKING:
    from typer._click.core import Context
    from typer._click.core import Parameter as AnyParameter
    from typer._click.formatting import HelpFormatter


def _without_types_of_flags(params: list[AnyParameter]) -> list[AnyParameter]:
    """Remove the types of flags, which take no value, from a list of options."""
    for param in params:
        if isinstance(param, TyperOption) and param.is_flag:
            param.metavar = ""
    return params


def _help_names(ctx: Context) -> list[str]:
    # in this order: Click takes them from a set
    return list(ctx.help_option_names)


@cache
def _json_flag() -> AnyParameter:
    """Return `--json` as Typer makes it from a function, its only way to make options."""
    app = typer.Typer(add_completion=False)

    @app.command()
    def probe(as_json: Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")] = False) -> None:
        """Hold the option."""

    return next(param for param in typer.main.get_command(app).params if "--json" in param.opts)


class Command(TyperCommand):
    """A command whose list-valued options take one or more values each, and may repeat.

    Where there is `--format`, `--json` is short for `--format json`.
    """

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        for place, param in enumerate(self.params):
            if "--format" in param.opts:
                self.params.insert(place + 1, _json_flag())
                break

    def get_params(self, ctx: Context) -> list[AnyParameter]:
        """Name no type behind flags."""
        return _without_types_of_flags(super().get_params(ctx))

    def get_help_option_names(self, ctx: Context) -> list[str]:
        """Return `-h` and `--help`."""
        return _help_names(ctx)

    def format_help(self, ctx: Context, formatter: HelpFormatter) -> None:
        """Draw panels on a terminal only."""
        self.rich_markup_mode = self.rich_markup_mode if sys.stdout.isatty() else None
        super().format_help(ctx, formatter)

    def parse_args(self, ctx: Context, args: list[str]) -> list[str]:
        """Give every value of such an option its own flag, the form that Click understands."""
        if not ctx.resilient_parsing:
            _refuse_empty(args, ctx)
        lists = {name: p for p in self.params if isinstance(p, TyperOption) and p.multiple for name in p.opts}
        rest = super().parse_args(ctx, list(_one_flag_each(args, lists, ctx)))
        if ctx.params.pop("as_json", False):
            if ctx.params["form"] not in ("text", "json"):
                raise typer.BadParameter("another format is given, too", ctx=ctx, param_hint="'--json'")
            ctx.params["form"] = "json"
        elif not ctx.resilient_parsing and (table := ctx.params.get("table")) is not None:
            _take_format_of(table, ctx)
        if ctx.resilient_parsing:
            # completion looks `nargs` words back for the option that it completes: here, up to any other flag
            for option in lists.values():
                option.nargs = len(args) + 1
        return rest


def _take_format_of(table: Path, ctx: Context) -> None:
    """Let the ending of a result's file name its format, unless `--format` does, and refuse a wrong one before the work."""
    source = ctx.get_parameter_source("form")
    if source is not None and source.name == "DEFAULT":
        if table.suffix.lower() not in ENDINGS:
            raise typer.BadParameter(
                f"{table} must end in {', '.join(ENDINGS)}, or name its format with --format", ctx=ctx, param_hint="'--out'"
            )
        ctx.params["form"] = ENDINGS[table.suffix.lower()]
    if table.is_dir():
        raise typer.BadParameter(f"{table} is a folder", ctx=ctx, param_hint="'--out'")
    if table.is_file():
        from dgbench.runs import belongs_to_run

        if belongs_to_run(table):
            raise typer.BadParameter(f"{table} is a file of a run, which the result would replace", ctx=ctx, param_hint="'--out'")


def _refuse_empty(args: Sequence[str], ctx: Context) -> None:
    """Refuse an empty value, which a shell makes of an unset variable; as a path it would mean the current folder."""
    for before, given in zip(("", *args), args, strict=False):
        flag, equals, value = given.partition("=")
        if not given or (given.startswith("--") and equals and not value):
            name = flag or (before if before.startswith("-") and before != "--" else "an argument")
            raise typer.BadParameter("is empty; is a variable of the shell not set?", ctx=ctx, param_hint=f"'{name}'")


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
    """The whole program: every error that a user can fix or cause ends in one clear message and an exit code."""

    def format_help(self, ctx: Context, formatter: HelpFormatter) -> None:
        """Draw panels on a terminal only."""
        self.rich_markup_mode = self.rich_markup_mode if sys.stdout.isatty() else None
        super().format_help(ctx, formatter)

    def get_params(self, ctx: Context) -> list[AnyParameter]:
        """Name no type behind flags."""
        return _without_types_of_flags(super().get_params(ctx))

    def get_help_option_names(self, ctx: Context) -> list[str]:
        """Return `-h` and `--help`."""
        return _help_names(ctx)

    def main(self, *args: Any, **settings: Any) -> Any:
        """Run as a program; usage errors are printed like all others, and exit with 2."""
        whole = settings.pop("standalone_mode", True)
        settings["standalone_mode"] = False
        if not whole:
            return super().main(*args, **settings)
        from dgbench.render import streams

        try:
            code = self._code(*args, **settings)
        finally:
            streams.settle()
        sys.exit(code)

    def _code(self, *args: Any, **settings: Any) -> int:
        """Run, print what went wrong, and return the exit code."""
        try:
            os.getcwd()
        except OSError:  # libraries in C would end the process
            from dgbench import render

            render.failure("the current folder is gone, or cannot be entered", "change into another folder")
            return 1
        try:
            code = super().main(*args, **settings)
            if not code:  # otherwise the error was printed, which may be that nothing can be written
                sys.stdout.flush()
        except typer.Abort:  # Ctrl-C at a question
            _note("interrupted")
            return 130
        except typer.TyperException as error:
            message, hint = explained(error)
            if message is None:
                _note(hint or "")
            else:
                from dgbench import render

                render.failure(message, hint)
            return error.exit_code
        except OSError as error:  # while help or the version was written
            if error.errno == errno.EPIPE:
                return 1
            if os.environ.get("DGBENCH_DEBUG") == "1" or (told := _explain(error)) is None:
                raise
            return told
        return code if isinstance(code, int) else 0

    def list_commands(self, ctx: Context) -> list[str]:
        """List the groups first, in the order in which a user needs them."""
        return sorted(super().list_commands(ctx), key=lambda name: not isinstance(self.commands[name], TyperGroup))

    def invoke(self, ctx: Context) -> Any:
        """Run a command; exit 1 for a user's mistake, 130 for Ctrl-C, 143 and 129 for SIGTERM and SIGHUP.

        DGBENCH_DEBUG=1 lets the traceback through.
        """
        from dgbench.ends import terminable

        _warn_on_stderr()
        with terminable() as received:
            try:
                result = super().invoke(ctx)
                # here, where a closed pipe can still be handled, and not when the interpreter ends
                sys.stdout.flush()
            except (Exception, KeyboardInterrupt, Terminated) as error:
                if os.environ.get("DGBENCH_DEBUG") == "1":
                    raise
                from dgbench import launch

                if not isinstance(error, typer.Exit) and (code := launch.silent(error)) is not None:
                    raise typer.Exit(128 + received[0] if received else code) from None
                if received:
                    # any other error while stopping, such as a worker that the same signal ended
                    _tell_end(error)
                    raise typer.Exit(128 + received[0]) from None
                if (code := _explain(error)) is None:
                    raise
                raise typer.Exit(code) from None
        return result


def _note(text: str) -> None:
    from dgbench import render

    render.note(text)


def _tell_end(error: BaseException) -> None:
    try:
        _note(error.message if isinstance(error, StoppedError) else "terminated")
        sys.stderr.flush()
    except OSError:  # the terminal is gone, as after SIGHUP: the unwritten text must not be an error at exit either
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115


def _explain(error: BaseException) -> int | None:
    """Print what went wrong and return the exit code; None if it is a bug of dgbench."""
    if type(error).__module__.startswith("typer"):  # usage errors and exits are shown by Typer
        return None
    from dgbench import render

    if isinstance(error, StoppedError):
        render.note(error.message)
        return error.code
    if isinstance(error, KeyboardInterrupt):
        render.note("interrupted")
        return 130
    ours = isinstance(error, DgbenchError)
    message, hint = getattr(error, "message", None), getattr(error, "hint", None)
    # mfuser's errors have message and hint, too
    told = isinstance(message, str) and (ours or (isinstance(hint, str) and type(error).__module__.startswith("mfuser")))
    if (refused := full_disk(error) if told else refusal(error)) is not None:
        message, hint = refused
    elif not told:
        return None
    render.failure(str(message), hint)
    return 1


class _Warnings(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        from dgbench import launch, render

        if not launch.first():
            return
        render.warning(record.getMessage())


def _warn_on_stderr() -> None:
    for name in ("dgbench", "mfuser"):
        logger = logging.getLogger(name)
        if not any(isinstance(handler, _Warnings) for handler in logger.handlers):
            logger.addHandler(_Warnings(logging.WARNING))
            logger.propagate = False
