"""Sets from the Hugging Face Hub: a commit of a repository in a folder, and its rows as (id, image, label).

A repository holds Parquet files, of which two columns are the image and the label; or loose files, of which two globs name
them and are paired by what their stars stand for (`rgb/rgb_*.png` and `ss/ss_*.png`). A branch is resolved to a commit once,
and the commit is what is fetched and recorded. `dgbench-hub.json` in the folder says how its rows are read.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dgbench import atomic
from dgbench.data.transfer import FullDiskError, full_disk
from dgbench.errors import DataError, unknown

if TYPE_CHECKING:
    import datasets

HUB_FILE = "dgbench-hub.json"


@dataclass(frozen=True, slots=True)
class HubSet:
    """How the rows of a folder that came from the Hub are read; the content of `dgbench-hub.json`."""

    name: str
    repo: str
    revision: str  # the commit
    columns: dict[str, str]  # "image" and "label" -> a column, or a glob of loose files
    splits: dict[str, list[str]]  # split -> Parquet files, or images; relative paths
    encoding: str  # key of dgbench.data.decode.ENCODINGS
    label_map: str  # key of dgbench.data.labels.LABEL_MAPS
    licence: str | None

    @property
    def parquet(self) -> bool:
        """Whether the columns are of Parquet files, not globs."""
        return not any(map(_is_glob, self.columns.values()))


@dataclass(frozen=True, slots=True)
class Listed:
    """A commit of a repository and those of its files that are wanted."""

    repo: str
    revision: str
    licence: str | None
    files: dict[str, int]  # path -> bytes
    sha256: dict[str, str]  # of the large ones


@dataclass(frozen=True, slots=True)
class HubWish:
    """A repository of the Hub as a domain. Without `columns` its files are the domain's official layout."""

    repo: str
    revision: str
    patterns: tuple[str, ...]
    columns: dict[str, str] | None = None
    encoding: str = "ids"
    label_map: str = "train-ids"
    split: str = "val"


def read(folder: Path) -> HubSet | None:
    """How a folder's rows are read; None if it did not come from the Hub."""
    try:
        return HubSet(**json.loads((folder / HUB_FILE).read_text()))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError) as error:
        raise DataError(f"{folder / HUB_FILE} cannot be read: {error}", f"remove {folder} and download the set again") from None


def found(root: Path) -> dict[str, Path]:
    """The Hub sets below a data root: name -> folder."""
    return {path.parent.name: path.parent for path in sorted(root.glob(f"*/{HUB_FILE}"))}


def rows(folder: Path, split: str) -> datasets.Dataset:
    """The rows of a split: `id` (string), `image` and `label`, each {"bytes", "path"}, undecoded.

    Raises: DataError if the folder is no Hub set, has no such split, or a file of it is gone.
    """
    import datasets

    hub = read(folder)
    if hub is None:
        raise DataError(f"{folder} is no set from the Hub: it has no {HUB_FILE}", "dgbench download --hub OWNER/NAME makes one")
    if split not in hub.splits:
        raise DataError(f"`{hub.name}` has no split `{split}`", f"its splits are {', '.join(f'`{s}`' for s in hub.splits)}")
    missing = [path for path in hub.splits[split] if not (folder / path).is_file()]
    if missing:
        raise DataError(f"{folder / missing[0]} is gone, and {len(missing) - 1} more files of `{hub.name}`",
                        f"remove {folder} and download the set again: {_command(hub)}")  # fmt: skip
    undecoded = datasets.Image(decode=False)
    if hub.parquet:
        files = [str(folder / path) for path in hub.splits[split]]
        table = datasets.Dataset.from_parquet(files).select_columns(list(hub.columns.values()))
        table = table.rename_columns({column: part for part, column in hub.columns.items() if column != part})
        table = table.cast_column("image", undecoded).cast_column("label", undecoded)
        return table.add_column("id", [f"{split}/{n:06d}" for n in range(len(table))]).select_columns(["id", "image", "label"])
    labels = {image: _label_of(image, hub.columns) for image in hub.splits[split]}
    features = datasets.Features({"id": datasets.Value("string"), "image": undecoded, "label": undecoded})
    return datasets.Dataset.from_dict(
        {"id": list(labels), "image": [str(folder / image) for image in labels],
         "label": [str(folder / label) for label in labels.values()]}, features=features,
    )  # fmt: skip


def wish_of(
    repo: str, columns: Sequence[str], revision: str | None, name: str | None, *, encoding: str, label_map: str, split: str
) -> tuple[str, HubWish]:
    """The name of the domain to be and what a user wants of the Hub, checked as far as that goes without a network.

    Raises: DataError for columns or a label map that cannot be.
    """
    from dgbench.data.labels import LABEL_MAPS

    pairs = columns_of(columns)
    if label_map not in LABEL_MAPS:
        raise DataError(*unknown("label map", label_map, LABEL_MAPS))
    chosen = name or re.sub(r"[^a-z0-9_-]+", "-", repo.rpartition("/")[2].lower()).strip("-")
    return chosen, HubWish(repo, revision or "main", tuple(patterns_of(pairs)), pairs, encoding, label_map, split)


def columns_of(pairs: Sequence[str]) -> dict[str, str]:
    """`image=COLUMN label=COLUMN` as a dictionary.

    Raises: DataError unless both are given, once each, both columns or both globs with as many stars.
    """
    columns = dict(pair.partition("=")[::2] for pair in pairs)
    form = "--columns image=COLUMN label=COLUMN, or globs of loose files: --columns 'image=rgb/*.png' 'label=ss/*.png'"
    if strange := sorted(set(columns) - {"image", "label"}):
        raise DataError(*unknown("column role", strange[0], ["image", "label"]))
    if set(columns) != {"image", "label"} or not all(columns.values()) or len(pairs) != 2:
        raise DataError("a set from the Hub needs to know which column is the image and which is the label", form)
    if columns["image"].count("*") != columns["label"].count("*") or "**" in "".join(columns.values()):
        raise DataError(
            f"`{columns['image']}` and `{columns['label']}` cannot be paired: star by star they stand for the same text",
            "use single stars, as many in both: 'image=images/*/*.jpg' 'label=labels/*/*.png'",
        )
    return columns


def listing(repo: str, revision: str, patterns: Sequence[str]) -> Listed:
    """Ask the Hub for the commit behind a revision and for the files of it that match.

    Raises: DataError saying what the Hub answered and what to do.
    """
    from fnmatch import fnmatch

    from huggingface_hub import HfApi

    with _explained(repo, revision):
        info = HfApi().dataset_info(repo, revision=revision, files_metadata=True)
    chosen = [f for f in info.siblings or () if any(fnmatch(f.rfilename, pattern) for pattern in patterns)]
    licence = getattr(info.card_data, "license", None) if info.card_data else None
    return Listed(
        repo, str(info.sha), licence if isinstance(licence, str) else None, {f.rfilename: f.size or 0 for f in chosen},
        {f.rfilename: f.lfs.sha256 for f in chosen if f.lfs is not None},
    )  # fmt: skip


def fetch(wanted: Listed, folder: Path, again: str) -> None:
    """Bring a commit's files into a folder, going on with what an earlier try left, and check each size and stated sha256.

    Raises: DataError saying what the Hub answered, or which file is damaged (it is removed); FullDiskError.
    """
    from huggingface_hub import snapshot_download

    _check_room(wanted, folder, again)
    names = [_literal(name) for name in wanted.files]
    with _explained(wanted.repo, wanted.revision), full_disk(folder, None, again):
        snapshot_download(wanted.repo, repo_type="dataset", revision=wanted.revision, local_dir=folder, allow_patterns=names)
    for name, size in wanted.files.items():
        path = folder / name
        have = path.stat().st_size if path.is_file() else None
        problem = None
        if have != size:
            problem = f"has {have or 0:,} bytes, the Hub states {size:,}"
        elif name in wanted.sha256 and (digest := _sha256(path)) != wanted.sha256[name]:
            problem = f"is damaged: its sha256 is {digest}, the Hub states {wanted.sha256[name]}"
        if problem:
            path.unlink(missing_ok=True)
            raise DataError(f"{wanted.repo}/{name} {problem}", f"it is removed; {again}")
    # huggingface_hub's own notes on how far it was
    shutil.rmtree(folder / ".cache", ignore_errors=True)


def patterns_of(columns: Mapping[str, str]) -> list[str]:
    """What to fetch of a repository whose columns are these."""
    globs = [column for column in columns.values() if _is_glob(column)]
    return [*(globs or ["*.parquet"]), "README.md", "LICENSE*"]


def describe(
    name: str, wanted: Listed, columns: Mapping[str, str], folder: Path, *, encoding: str, label_map: str, split: str
) -> HubSet:
    """Look into the files that were fetched and write down how their rows are read.

    Args:
        split: what to call all of a repository of loose files.

    Raises: DataError if a column is not there or is no image, or if images and labels do not pair.
    """
    if any(map(_is_glob, columns.values())):
        splits = {split: _paired(wanted, columns)}
    else:
        splits = _parquet_splits(wanted, folder)
        check_columns(wanted, columns, folder / next(iter(splits.values()))[0])
    hub = HubSet(name, wanted.repo, wanted.revision, dict(columns), splits, encoding, label_map, wanted.licence)
    atomic.write(folder / HUB_FILE, json.dumps(asdict(hub), indent=1))
    return hub


def check_columns(wanted: Listed, columns: Mapping[str, str], file: Path) -> None:
    """See that a Parquet file has the columns and that they hold images (struct of bytes and path, as `datasets` stores them).

    Raises: DataError naming the columns that there are.
    """
    from pyarrow import ArrowInvalid, types
    from pyarrow.parquet import read_schema

    try:
        schema = read_schema(file)
    except ArrowInvalid as error:
        raise DataError(
            f"{wanted.repo}/{file.name} is no Parquet file: {error}", "see the repository's page on the Hub"
        ) from None
    images = [
        field.name for field in schema
        if types.is_struct(field.type) and {"bytes", "path"} <= {field.type.field(i).name for i in range(field.type.num_fields)}
    ]  # fmt: skip
    for part, column in columns.items():
        if column not in schema.names:
            message, hint = unknown("column", column, schema.names)
            raise DataError(f"{wanted.repo}: {message}", f"{hint} (columns with images: {', '.join(images) or 'none'})")
        if column not in images:
            raise DataError(f"{wanted.repo}: column `{column}` holds {schema.field(column).type}, not images",
                            f"choose the {part} from: {', '.join(images) or 'none'}")  # fmt: skip


def first_parquet(wanted: Listed, repo: str) -> str:
    """The smallest Parquet file, to look at before the rest is fetched.

    Raises: DataError if there is none.
    """
    files = {name: size for name, size in wanted.files.items() if name.endswith(".parquet")}
    if not files:
        raise DataError(
            f"{repo} has no Parquet files",
            "if it holds loose files, name them: --columns 'image=images/*.jpg' 'label=labels/*.png'",
        )
    return min(files, key=lambda name: files[name])


def _parquet_splits(wanted: Listed, folder: Path) -> dict[str, list[str]]:
    """Which files make up which split, as `datasets` reads the repository's card and file names."""
    import datasets

    try:
        builder = datasets.load_dataset_builder(str(folder))
    except ValueError as error:
        raise DataError(f"{wanted.repo} cannot be read as one set: {str(error).splitlines()[0]}",
                        "a repository of several configurations is not read by name yet: make one of your own of the part you "
                        "want") from None  # fmt: skip
    found: dict[str, list[str]] = {}
    for split, files in (builder.config.data_files or {}).items():
        found[str(split)] = [Path(file).relative_to(folder.resolve()).as_posix() for file in files]
    return {"val" if split in ("validation", "valid") else split: files for split, files in found.items()}


def _paired(wanted: Listed, columns: Mapping[str, str]) -> list[str]:
    image = _star_pattern(columns["image"])
    images = sorted(name for name in wanted.files if image.fullmatch(name))
    if not images:
        raise DataError(f"{wanted.repo}: no file matches `{columns['image']}`", _some(wanted))
    paired = [name for name in images if _label_of(name, columns) in wanted.files]
    if not paired:
        first = _label_of(images[0], columns)
        raise DataError(f"{wanted.repo}: no image has a label: of {images[0]} it would be {first}", _some(wanted))
    return paired


def _label_of(image: str, columns: Mapping[str, str]) -> str:
    match = _star_pattern(columns["image"]).fullmatch(image)
    assert match is not None
    texts = iter(match.groups())
    return re.sub(r"\*", lambda _: next(texts), columns["label"])


def _star_pattern(glob: str) -> re.Pattern[str]:
    return re.compile(re.escape(glob).replace(r"\*", "([^/]*)"))


def _some(wanted: Listed) -> str:
    return "it has, for example: " + ", ".join(sorted(wanted.files)[:6]) if wanted.files else "nothing of it matches"


def _is_glob(column: str) -> bool:
    return "*" in column


def _literal(name: str) -> str:
    # a file's own name as a pattern
    return re.sub(r"([*?[])", r"[\1]", name)


def _command(hub: HubSet) -> str:
    columns = " ".join(f"'{part}={column}'" for part, column in hub.columns.items())
    return f"dgbench download --hub {hub.repo} --revision {hub.revision} --columns {columns} --as {hub.name}"


def _check_room(wanted: Listed, folder: Path, again: str) -> None:
    missing = sum(size for name, size in wanted.files.items() if not (folder / name).is_file())
    free = shutil.disk_usage(folder).free
    if missing > free:
        raise FullDiskError(f"no room for {wanted.repo}: {missing:,} bytes are missing, {folder.parent} has {free:,} free",
                            f"make room there, or point --root or DGBENCH_DATA at a larger disk; then {again}")  # fmt: skip


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def _explained(repo: str, revision: str) -> Iterator[None]:
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    from mfuser.hub import transport_error

    page, again = f"{constants.ENDPOINT}/datasets/{repo}", "run the same command again"
    try:
        yield
    except (OSError, RuntimeError, HFValidationError, transport_error()) as problem:
        error: BaseException = problem
        while isinstance(error, LocalEntryNotFoundError) and error.__cause__ is not None:
            error = error.__cause__
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        if isinstance(error, HFValidationError):
            raise DataError(f"`{repo}` is no name of a repository: {reason}", "--hub OWNER/NAME, as on the Hub's page") from None
        if isinstance(error, GatedRepoError):
            raise DataError(f"{repo} is gated: its owner asks you to accept the licence first",
                            f"accept it at {page}, log in with: hf auth login, and {again}") from None  # fmt: skip
        if isinstance(error, RevisionNotFoundError):
            raise DataError(f"{repo} has no revision `{revision}`", f"{page}/commits/main lists them; --revision takes a branch, "
                            "a tag or a commit") from None  # fmt: skip
        if isinstance(error, RepositoryNotFoundError):
            raise DataError(f"the Hub knows no dataset {repo}, or it is private",
                            f"check the name at {page}; for a private one log in with: hf auth login") from None  # fmt: skip
        if isinstance(error, HfHubHTTPError):
            raise DataError(f"{constants.ENDPOINT} does not give out {repo}: it answers {error.response.status_code}",
                            f"see https://status.huggingface.co, and {again}") from None  # fmt: skip
        if isinstance(error, OSError) and error.errno is not None and not isinstance(error, ConnectionError):
            raise  # the file system's refusal names its file itself
        raise DataError(f"no connection to {constants.ENDPOINT} for {repo}: {reason}",
                        f"check the network and HTTPS_PROXY, then {again}: it goes on where it stopped") from None  # fmt: skip


def fetch_one(wanted: Listed, name: str, folder: Path, again: str) -> Path:
    """Bring one file of a commit into a folder."""
    fetch(Listed(wanted.repo, wanted.revision, None, {name: wanted.files[name]}, wanted.sha256), folder, again)
    return folder / name
