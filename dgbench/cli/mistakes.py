"""Usage errors in the form of dgbench's other errors: Click's sentence as the message, and a hint with what to use.

For options of other training programs, the hint gives ours: `--set optim.lr=…` for `--lr`.
"""

from __future__ import annotations

import typer

from dgbench.errors import suggest

# other programs' options -> ours: the first one that the command has
_ELSEWHERE = {
    **dict.fromkeys(
        ("steps", "iters", "iterations", "iter", "max-steps", "max-iters", "num-steps", "total-steps"),
        ("--set train.steps=NUMBER",),
    ),
    **dict.fromkeys(
        ("epochs", "epoch", "max-epochs", "num-epochs"),
        ("--set train.steps=NUMBER (trainings are counted in steps, each of train.batch_size images)",),
    ),
    **dict.fromkeys(("lr", "learning-rate", "base-lr"), ("--set optim.lr=NUMBER",)),
    **dict.fromkeys(("batch-size", "batchsize", "batch", "bs", "b"), ("--batch COUNT", "--set train.batch_size=COUNT")),
    **dict.fromkeys(("workers", "num-workers"), ("--set train.workers=COUNT",)),
    **dict.fromkeys(("weight-decay", "wd"), ("--set optim.weight_decay=NUMBER",)),
    **dict.fromkeys(("warmup", "warmup-steps", "warmup-iters"), ("--set optim.warmup_steps=NUMBER",)),
    **dict.fromkeys(("precision", "amp", "fp16", "bf16", "mixed-precision"), ("--dtype NAME", "--set train.precision=bf16")),
    **dict.fromkeys(("clip", "clip-norm", "grad-clip"), ("--set train.clip_norm=NUMBER",)),
    **dict.fromkeys(("crop", "crop-size"), ("--set data.crop=[H,W]",)),
    **dict.fromkeys(("size", "image-size", "img-size", "imgsz", "resolution"), ("--size H W", "--set data.size=[H,W]")),
    **dict.fromkeys(("checkpoint-every", "save-every", "save-interval"), ("--set train.checkpoint_every=NUMBER",)),
    **dict.fromkeys(("fuser", "fusion-layer"), ("--set method.fuser=NAME",)),
    **dict.fromkeys(("encoder", "tower"), ("--backbone NAME, or --vfm NAME and --vlm NAME",)),
    **dict.fromkeys(("backend",), ("--set method.backend=NAME",)),
    **dict.fromkeys(("gpu", "gpus", "gpu-id", "gpu-ids", "cuda", "devices"), ("--device cuda:NUMBER",)),
    **dict.fromkeys(("cpu", "no-cuda"), ("--device cpu",)),
    **dict.fromkeys(
        ("output", "output-dir", "out-dir", "outdir", "work-dir", "save-dir", "logdir", "save-path", "exp-dir"),
        ("--out PATH", "--runs FOLDER"),
    ),
    **dict.fromkeys(
        ("dataset", "datasets", "train-dataset", "domain", "domains"),
        ("--source NAME and --targets NAME...", "--targets NAME..."),
    ),
    **dict.fromkeys(("test-dataset", "val-dataset", "target", "test", "val"), ("--targets NAME...",)),
    **dict.fromkeys(("data", "data-dir", "data-root", "data-path", "datadir", "dataroot"), ("--root FOLDER",)),
    **dict.fromkeys(("ckpt", "weights", "load-from", "model-path", "run"), ("--checkpoint RUN", "--resume RUN")),
    **dict.fromkeys(("resume-from", "continue"), ("--resume RUN",)),
    **dict.fromkeys(("silent", "no-progress"), ("--quiet",)),
}


_EXPECTED = {"int": "an integer", "float": "a number", "path": "a path"}
_BOUNDS = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}


def explained(error: typer.TyperException) -> tuple[str | None, str | None]:
    """Return message and hint of a usage error; without a message, the hint is a help text and the whole answer."""
    if type(error).__name__ == "NoArgsIsHelpError":
        return None, error.message
    option, context = getattr(error, "option_name", None), getattr(error, "ctx", None)
    if isinstance(error, typer.BadParameter) and (said := _value_error(error.__cause__)):
        error.message = said
    message = error.message if option else error.format_message()
    message = message[:1].lower() + (message[1:].removesuffix(".") if not message.endswith("..") else message[1:])
    if context is None:
        return message, None
    see = f"see `{context.command_path} --help`"
    if type(error).__name__ != "NoSuchOption" or option is None:
        return message, see
    return message, f"{_instead(option, context)}{see}"


def _instead(option: str, context: typer.Context) -> str:
    known = {name.lstrip("-"): name for param in context.command.get_params(context) for name in param.opts}
    word = option.lstrip("-").replace("_", "-").lower()
    ways = _ELSEWHERE.get(word, ())
    for way in ways:
        if way.split()[0].lstrip("-") in known:
            return f"use {way}; "
    if close := suggest(word, known):
        return f"did you mean {known[close]}? "
    if ways and ways[-1].startswith("--set"):
        return f"a training has it: dgbench train {ways[-1]}; "
    return ""


def _value_error(cause: BaseException | None) -> str | None:
    """Return what is wrong with a value in our words, not in those of the library that checked it."""
    if cause is None or not hasattr(cause, "errors"):
        return None
    details = cause.errors()[0]
    given, kind, context = details["input"], details["type"].partition("_")[0], details.get("ctx", {})
    for key, word in _BOUNDS.items():
        if key in context:
            return f"must be {word} {context[key]}, got {given}"
    if details["type"] == "string_unicode":
        return f"expected text in UTF-8, got `{given}`"
    if kind in _EXPECTED:
        return f"expected {_EXPECTED[kind]}, got `{given}`"
    text = str(details["msg"]).removeprefix("Value error, ")
    return text[:1].lower() + text[1:]
