"""Runs on the Hugging Face Hub: what would be uploaded, the upload, and the way back.

Uploaded are a finished run's recipe, records, matrices, log and weights, and a model card with the library's own evaluation
results. Pictures stay here unless asked for: many show images of sets that may not be redistributed. The state of the optimizer
stays, too. What is pulled is read and held against its own digests before it becomes a run.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dgbench import results, temporaries
from dgbench.errors import DgbenchError, ResultError
from dgbench.results import Record
from mfuser.towers import named
from mfuser.towers.named import NamedTower

# of a run: all that scoring, comparing and predicting read
PARTS = ("recipe.yaml", "record-*.json", "confusion-*.npz", "log.jsonl", "speed.jsonl", "curves.png")
CHECKPOINT = ("model.safetensors", "model.json", "manifest.json", "training.json", "source.json")
PICTURES = ("*.png", "*.jpg")
CARD = "README.md"
_REPO = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True, slots=True)
class Upload:
    """One file of a run as it would be, or was, uploaded."""

    file: str
    bytes: int


@dataclass(frozen=True, slots=True)
class Push:
    """An upload: where to, who may see it, and which files."""

    run: Path
    repo: str
    private: bool
    files: tuple[Upload, ...]
    left_out: tuple[str, ...]  # pictures
    url: str = ""  # of the commit, once it is made

    @property
    def bytes(self) -> int:
        """Size of all files."""
        return sum(file.bytes for file in self.files)


def plan(run: Path, repo: str, *, public: bool = False, images: bool = False) -> Push:
    """Return what would be uploaded of a finished run, without a connection.

    Args:
        images: pictures, too. They may show images of sets that may not be redistributed.

    Raises: ResultError if the run has no checkpoint or no record, DgbenchError for a name that no repository has.
    """
    _check_name(repo)
    checkpoint = _checkpoint(run)
    if not list(run.glob("record-*.json")):
        raise ResultError(f"{run} has no records", f"score it first: dgbench eval {run}")
    chosen = [path for pattern in PARTS for path in sorted(run.glob(pattern))]
    chosen += [checkpoint / name for name in CHECKPOINT if (checkpoint / name).is_file()]
    pictures = [path for pattern in PICTURES for path in sorted(run.rglob(pattern)) if path not in chosen]
    chosen += pictures if images else []
    # a link could lead anywhere
    chosen = [path for path in chosen if path.is_file() and not path.is_symlink()]
    files = tuple(Upload(path.relative_to(run).as_posix(), path.stat().st_size) for path in chosen)
    left = () if images else tuple(path.relative_to(run).as_posix() for path in pictures)
    return Push(run, repo, not public, files, left)


def push(planned: Push) -> Push:
    """Upload a planned run in one commit, and return it with the commit's address.

    Raises: DgbenchError if the Hub refuses, cannot be reached, or holds a public repository of this name while the run is to be
        private.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    from mfuser.towers.hub import check_token, offline, transport_error

    if switch := offline():
        raise DgbenchError(f"{switch} forbids connections", "unset it")
    check_token()
    api = HfApi()
    records = results.scan(planned.run)[0]
    operations = [CommitOperationAdd(file.file, str(planned.run / file.file)) for file in planned.files]
    operations.append(CommitOperationAdd(CARD, card(planned, records).encode()))
    try:
        api.create_repo(planned.repo, private=planned.private, exist_ok=True)
        if planned.private and not api.model_info(planned.repo).private:
            raise DgbenchError(f"{planned.repo} is public", "name another repository, or add --public")
        done = api.create_commit(planned.repo, operations, commit_message=f"Run {planned.run.name}")
    except (OSError, ValueError, RuntimeError, transport_error()) as error:
        raise _refused(planned.repo, error) from None
    return Push(planned.run, planned.repo, planned.private, planned.files, planned.left_out, str(done.commit_url))


def card(planned: Push, records: Sequence[Record]) -> str:
    """Return the model card: what was trained on what, its scores with their protocols, and how to use it."""
    from huggingface_hub import EvalResult, ModelCardData

    scores = [record for record in records if record.kind == "eval" and record.miou is not None]
    newest = records[-1]
    entries = [
        EvalResult(
            task_type="image-segmentation",
            dataset_type=record.target,
            dataset_name=record.target,
            dataset_split=record.split,
            metric_type="mean_iou",
            metric_name=f"mIoU, protocol {record.protocol} {record.protocol_digest}".strip(),
            metric_value=round(100 * (record.miou or 0), 2),
            metric_args={"images": record.n_images, "of": record.n_available, "protocol_hash": record.protocol_hash},
        )
        for record in scores
    ]
    data = ModelCardData(
        library_name="dgbench",
        pipeline_tag="image-segmentation",
        tags=["domain generalization", "semantic segmentation", newest.method],
        model_name=planned.repo.partition("/")[2],
        eval_results=entries or None,
    )
    rows = [
        f"| {record.target} | {record.split} | {record.protocol} | {100 * (record.miou or 0):.1f} | {_images(record)} |"
        for record in scores
    ]
    body = [
        f"# {newest.method}, {newest.variant}" if newest.variant else f"# {newest.method}",
        f"Recipe `{newest.recipe}`, trained on {newest.source}; {newest.steps} steps, seed {newest.seed}, "
        f"dgbench {newest.environment.get('dgbench', '?')}.",
        "\n".join(["| scored on | split | protocol | mIoU % | images |", "| --- | --- | --- | --- | --- |", *rows]),
        "Scores of different protocols, or of a part of a set's images, do not compare. Towers keep their own licences: "
        "`dgbench models` names them.",
    ]
    if towers := _left_out(planned.run):
        files = "; ".join(f"`{one.tower}`: {one.file}, SHA-256 {one.sha256}" for one in towers)
        get = " ".join(one.tower for one in towers if "/" in one.file)
        body.append(f"The weights of frozen towers are not part of it, they are read from their own files. {files}.")
        body += [f"```\ndgbench download {get}\n```"] if get else []
    body.append(f"```\ndgbench pull {planned.repo}\n```")
    return f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(body) + "\n"


def _images(record: Record) -> str:
    return str(record.n_images) if record.complete else f"{record.n_images} of {record.n_available}"


def pull(repo: str, out: Path, *, revision: str | None = None) -> Path:
    """Fetch a pushed run, hold its files against their digests, and return its folder.

    Args:
        out: the run folder to make.    revision: a branch, tag or commit; None: the newest.

    Raises: DgbenchError if the Hub refuses or a file is not what its digest says; nothing is left behind then.
    """
    from huggingface_hub import snapshot_download

    from mfuser.towers.hub import check_token, offline, transport_error

    _check_name(repo)
    if switch := offline():
        raise DgbenchError(f"{switch} forbids connections", "unset it")
    if out.exists():
        raise ResultError(f"{out} exists", "name another folder with --out")
    check_token()
    out.parent.mkdir(parents=True, exist_ok=True)
    made = temporaries.beside(out)
    shutil.rmtree(made, ignore_errors=True)
    allowed = [*PARTS, *(f"checkpoint/step-*/{name}" for name in CHECKPOINT), *PICTURES]
    try:
        snapshot_download(repo, revision=revision, local_dir=made, allow_patterns=allowed)
        shutil.rmtree(made / ".cache", ignore_errors=True)
        _check(made, repo)
        os.replace(made, out)
    except (OSError, ValueError, RuntimeError, transport_error()) as error:
        raise _refused(repo, error) from None
    finally:
        shutil.rmtree(made, ignore_errors=True)
    return out


def towers_needed(run: Path) -> list[str]:
    """Return the towers that a run's checkpoint leaves out and whose files are not on this machine.

    Raises: ResultError if there is no checkpoint, DgbenchError if it is damaged.
    """
    return [tower.tower for tower in named.missing(_left_out(run))]


def _left_out(run: Path) -> list[NamedTower]:
    try:
        return named.in_file(_checkpoint(run) / "model.safetensors")
    except ValueError as error:
        raise DgbenchError(str(error), "restore the file, or train again") from None


def _check(run: Path, repo: str) -> None:
    """Read all that a run says of itself.

    Raises: DgbenchError naming what is missing, damaged, or leads out of the folder.
    """
    try:
        _read_all(run)
    except (DgbenchError, ValueError) as error:
        said = error.message if isinstance(error, DgbenchError) else str(error)
        hint = "pull it again; if it happens twice, the repository holds damaged files, or is no run of `dgbench push`"
        raise DgbenchError(f"{repo}: {said.replace(f'{run}/', '').replace(str(run), 'it')}", hint) from None


def _read_all(run: Path) -> None:
    from dgbench.recipe import load_recipe
    from mfuser import manifest

    if links := [path for path in run.rglob("*") if path.is_symlink()]:
        raise DgbenchError(f"{links[0].name} is a link")
    if not (run / "recipe.yaml").is_file():
        raise DgbenchError("it has no recipe.yaml")
    load_recipe(run / "recipe.yaml", check_method=False)
    records, problems = results.scan(run)
    if problems:
        raise DgbenchError(problems[0])
    for record in records:
        if record.confusion:
            results.read_matrices(record)
    checkpoint = _checkpoint(run)
    if not all(manifest.check(checkpoint, name) for name in ("model.safetensors", "model.json")):
        raise DgbenchError("the checkpoint has no manifest.json: its weights cannot be checked")


def _checkpoint(run: Path) -> Path:
    found = [path for path in run.glob("checkpoint/step-*") if path.name.removeprefix("step-").isdecimal()]
    if not found:
        raise ResultError(f"{run} has no checkpoint", "name the run of a finished training")
    return max(found, key=lambda path: int(path.name.removeprefix("step-")))


def _check_name(repo: str) -> None:
    if not _REPO.fullmatch(repo):
        raise DgbenchError(f"`{repo}` is no name of a repository", "write OWNER/NAME, as in me/mfuser-eva02")


def _refused(repo: str, error: Exception) -> DgbenchError:
    """Return the Hub's refusal as a user can act on it; what the file system refuses is raised as it is."""
    from huggingface_hub.errors import HfHubHTTPError

    from mfuser.towers.hub import without_secrets

    if isinstance(error, OSError) and error.errno is not None:
        raise error
    reason = without_secrets((str(error).strip().splitlines() or [type(error).__name__])[0])
    status = error.response.status_code if isinstance(error, HfHubHTTPError) and error.response is not None else None
    if status in (401, 403):
        return DgbenchError(f"the Hub does not let you use {repo} ({status})", "log in with a token that may: hf auth login")
    if status == 404:
        return DgbenchError(f"the Hub has no repository {repo}, or you may not see it", "check the name; log in: hf auth login")
    return DgbenchError(f"{repo}: {reason}", "check the network, HF_ENDPOINT and the login: hf auth whoami")
