"""Data sets of the Hugging Face Hub: the rows of a repository's commit as (id, image, label) in a folder.

A repository holds Parquet files with a column for the image and one for the label; or separate files, named by two globs
and paired by the part that `*` matches (`rgb/rgb_*.png` and `ss/ss_*.png`). A branch is resolved to a commit once,
which is downloaded and recorded. The rows are stored with their bytes, undecoded, as `datasets` does:
`<folder>/hub/<split>/`, and `source.json` beside the splits says where they are from and how their labels are read.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dgbench import atomic
from dgbench.data.hub_sets import BESIDE, HUB, SOURCE, opened
from dgbench.download.hub_files import Listed
from dgbench.errors import DataError, unknown

if TYPE_CHECKING:
    import datasets


_CARD = 10_000
_PARQUET = ("*.[pP][aA][rR][qQ][uU][eE][tT]", "*.[pP][qQ]")


@dataclass(frozen=True, slots=True)
class HubSet:
    """Origin of a folder's rows and how they are read: the content of `source.json`."""

    name: str
    repository: str
    revision: str  # the commit
    columns: dict[str, str]  # "image" and "label" -> a column, or a glob of loose files
    splits: dict[str, int]  # split -> rows
    encoding: str  # key of dgbench.data.decode.ENCODINGS
    label_map: str  # key of dgbench.data.labels.LABEL_MAPS
    licence: str | None


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
    """Return where a folder's rows are from; None if it did not come from the Hub."""
    try:
        return HubSet(**json.loads((folder / SOURCE).read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError) as error:
        raise DataError(f"{folder / SOURCE} cannot be read: {error}", f"remove {folder} and download the set again") from None


def rows(folder: Path, split: str) -> datasets.Dataset:
    """Return the rows of a split: `id` (string), `image` and `label`, each {"bytes", "path"}, undecoded; every path is None.

    Raises: DataError if the folder is no set from the Hub, has no such split, or is damaged.
    """
    hub = read(folder)
    if hub is None:
        raise DataError(f"{folder} is no set from the Hub: it has no {SOURCE}", "dgbench download --hub OWNER/NAME makes one")
    if split not in hub.splits:
        raise DataError(f"`{hub.name}` has no split `{split}`", f"its splits are {', '.join(f'`{s}`' for s in hub.splits)}")
    try:
        return opened(folder / HUB / split)
    except DataError as error:
        raise DataError(error.message, f"remove {folder} and run: {_command(hub)}") from None


def wish_of(
    repo: str, columns: Sequence[str], revision: str | None, name: str | None, *, encoding: str, label_map: str, split: str
) -> tuple[str, HubWish]:
    """Return the name of the new domain and the user's request, checked as far as possible without a network.

    Raises: DataError for invalid columns, encoding or label map.
    """
    from dgbench.data.decode import ENCODINGS
    from dgbench.data.labels import named

    pairs = columns_of(columns)
    named(label_map)
    if encoding not in ENCODINGS:
        raise DataError(*unknown("encoding", encoding, ENCODINGS))
    if encoding in BESIDE:
        raise DataError(
            f"`{encoding}` labels cannot be fetched as rows: their table lies in a file beside them",
            "fetch the files by other means and declare the domain (docs/data.md)",
        )
    chosen = name or re.sub(r"[^a-z0-9_-]+", "-", repo.rpartition("/")[2].lower()).strip("-")
    return chosen, HubWish(repo, revision or "main", tuple(patterns_of(pairs)), pairs, encoding, label_map, split)


def columns_of(pairs: Sequence[str]) -> dict[str, str]:
    """Return `image=COLUMN label=COLUMN` as a dictionary.

    Raises: DataError unless both are given, once each, both columns or both globs with as many stars.
    """
    columns = dict(pair.partition("=")[::2] for pair in pairs)
    form = "--columns image=COLUMN label=COLUMN, or globs of loose files: --columns 'image=rgb/*.png' 'label=ss/*.png'"
    if strange := sorted(set(columns) - {"image", "label"}):
        raise DataError(*unknown("column role", strange[0], ["image", "label"]))
    if set(columns) != {"image", "label"} or not all(columns.values()) or len(pairs) != 2:
        raise DataError("a set from the Hub needs to know which column is the image and which is the label", form)
    if columns["image"] == columns["label"]:
        raise DataError(f"image and label are both `{columns['image']}`: one of them is the other's", form)
    if columns["image"].count("*") != columns["label"].count("*") or "**" in "".join(columns.values()):
        raise DataError(
            f"`{columns['image']}` and `{columns['label']}` cannot be paired: they need the same number of `*`",
            "use single stars, as many in both: 'image=images/*/*.jpg' 'label=labels/*/*.png'",
        )
    return columns


def patterns_of(columns: Mapping[str, str]) -> list[str]:
    """Return the patterns of files to download from a repository with these columns."""
    globs = [column for column in columns.values() if _is_glob(column)]
    return [*(globs or _PARQUET), "README.md", "LICENSE*"]


def convert(name: str, wanted: Listed, wish: HubWish, fetched: Path, into: Path) -> HubSet:
    """Make rows of the downloaded files, and record their origin.

    Args:
        fetched: the repository's files.    into: the domain's folder.

    Raises: DataError if a column is not there or is no image, or if images and labels do not pair.
    """
    import datasets

    assert wish.columns is not None
    undecoded = datasets.Image(decode=False)
    features = datasets.Features({"id": datasets.Value("string"), "image": undecoded, "label": undecoded})
    loose = any(map(_is_glob, wish.columns.values()))
    if loose:
        splits = {wish.split: _paired(wanted, wish.columns)}
    else:
        splits = _parquet_splits(wanted, fetched)
        for file in (fetched / name for files in splits.values() for name in files):
            check_columns(wanted, wish.columns, file)
        # empty splits of a card are skipped
        splits = {split: files for split, files in splits.items() if any(_row_count(fetched / name) for name in files)}
        if not splits:
            raise DataError(f"{wanted.repo} has no rows", "see the repository's page on the Hub: its set may lie elsewhere")
    counts: dict[str, int] = {}
    shown = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        for split, files in splits.items():
            told = {"split": split, "files": files, "columns": wish.columns, "folder": str(fetched), "repo": wanted.repo}
            made = datasets.Dataset.from_generator(
                _loose_rows if loose else _parquet_rows, features=features, gen_kwargs=told, cache_dir=str(fetched / ".rows")
            )
            made.save_to_disk(into / HUB / split)
            counts[split] = len(made)
    except datasets.exceptions.DatasetGenerationError as error:
        raise (error.__cause__ if isinstance(error.__cause__, OSError | DataError) else error) from None
    finally:
        if shown:
            datasets.enable_progress_bars()
    hub = HubSet(name, wanted.repo, wanted.revision, dict(wish.columns), counts, wish.encoding, wish.label_map, wanted.licence)
    atomic.write(into / SOURCE, json.dumps(asdict(hub), indent=1))
    return hub


def _parquet_rows(
    split: str, files: Sequence[str], columns: Mapping[str, str], folder: str, repo: str
) -> Iterator[dict[str, Any]]:
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    def batches(name: str) -> Iterator[list[dict[str, Any]]]:
        try:
            # a few rows at a time: an image is megabytes
            for batch in ParquetFile(Path(folder, name)).iter_batches(16, columns=list(columns.values())):
                yield batch.to_pylist()
        except (ArrowException, OSError) as error:
            raise _damaged(repo, name, error) from None

    number = 0
    for name in files:
        for row in chain.from_iterable(batches(name)):
            made: dict[str, Any] = {"id": f"{split}/{number:06d}"}
            for part, column in columns.items():
                value = row[column]
                content = value["bytes"] if isinstance(value, Mapping) else value
                if not isinstance(content, bytes) or not content:
                    what = "is null" if value is None else "holds a path or an address alone"
                    raise DataError(
                        f"{repo}: row {number} of `{split}` ({name}) has no bytes in column `{column}`",
                        f"it {what}, and those are never opened: the set must hold all its images",
                    )
                # without its path: `datasets` would open a file of that name on this machine
                made[part] = {"bytes": content, "path": None}
            yield made
            number += 1


def _loose_rows(split: str, files: Sequence[str], columns: Mapping[str, str], folder: str, repo: str) -> Iterator[dict[str, Any]]:
    for image in files:
        made: dict[str, Any] = {"id": image}
        for part, name in (("image", image), ("label", _label_of(image, columns))):
            content = Path(folder, name).read_bytes()
            if not content:
                raise DataError(f"{repo}: {name} is empty", "leave it out by a narrower glob")
            made[part] = {"bytes": content, "path": None}
        yield made


def check_columns(wanted: Listed, columns: Mapping[str, str], file: Path) -> None:
    """Check that a Parquet file has the image columns: bytes, or a struct with `bytes`, as `datasets` stores them.

    Raises: DataError naming the columns that there are.
    """
    from pyarrow import ArrowException, types
    from pyarrow.parquet import read_schema

    try:
        schema = read_schema(file)
    except (ArrowException, OSError) as error:
        raise _damaged(wanted.repo, file.name, error) from None

    def holds_images(kind: Any) -> bool:
        if types.is_struct(kind):
            return any(part.name == "bytes" and not types.is_struct(part.type) and holds_images(part.type) for part in kind)
        return bool(types.is_binary(kind) or types.is_large_binary(kind) or types.is_binary_view(kind))

    images = [field.name for field in schema if holds_images(field.type)]
    for part, column in columns.items():
        if column not in schema.names:
            message, hint = unknown("column", column, schema.names)
            raise DataError(f"{wanted.repo}: {message}", f"{hint} (columns with images: {', '.join(images) or 'none'})")
        if column not in images:
            raise DataError(
                f"{wanted.repo}: column `{column}` holds {str(schema.field(column).type)[:100]}, not images",
                f"choose the {part} from: {', '.join(images) or 'none'}",
            )


def _row_count(file: Path) -> int:
    from pyarrow.parquet import read_metadata

    return int(read_metadata(file).num_rows)


def _damaged(repo: str, name: str, error: Exception) -> DataError:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
    return DataError(f"{repo}/{name} is no Parquet file, or damaged: {reason}", "see the repository's page on the Hub")


def first_parquet(wanted: Listed, repo: str) -> str:
    """Return the smallest Parquet file, to inspect before the rest is downloaded.

    Raises: DataError if there is none.
    """
    files = {name: size for name, size in wanted.files.items() if _is_parquet(name)}
    if not files:
        raise DataError(
            f"{repo} has no Parquet files",
            "if it holds loose files, name them: --columns 'image=images/*.jpg' 'label=labels/*.png'",
        )
    return min(files, key=lambda name: files[name])


def _parquet_splits(wanted: Listed, folder: Path) -> dict[str, list[str]]:
    """Return the files of each split, as `datasets` reads the repository's card and file names."""
    import datasets

    _check_card(wanted, folder / "README.md")
    try:
        builder = datasets.load_dataset_builder(str(_with_usual_names(wanted, folder)))
    except (ValueError, datasets.exceptions.DataFilesNotFoundError) as error:
        raise DataError(
            f"{wanted.repo} cannot be read as one set: {(str(error).splitlines() or ['?'])[0][:300]}",
            "a repository of several configurations is not read by name yet: make one of your own of the part you want",
        ) from None
    found: dict[str, list[str]] = {}
    for split, files in (builder.config.data_files or {}).items():
        found[str(split)] = [_within(wanted, file, folder) for file in files]
    # one of datasets' names for the split; several of them stay separate
    others = [split for split in found if split in ("validation", "valid")]
    renamed = others[0] if len(others) == 1 and "val" not in found else None
    return {"val" if split == renamed else split: files for split, files in found.items()}


def _with_usual_names(wanted: Listed, folder: Path) -> Path:
    """Return a folder whose files are called `.parquet`, the only suffix that `datasets` knows: this one, or one of links."""
    odd = [name for name in wanted.files if _is_parquet(name) and not name.endswith(".parquet")]
    if not odd:
        return folder
    named = folder / "named"
    shutil.rmtree(named, ignore_errors=True)
    for name in wanted.files:
        link = named / (f"{name}.parquet" if name in odd else name)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(folder.absolute() / name)
    return named


def _is_parquet(name: str) -> bool:
    return name.lower().endswith((".parquet", ".pq"))


def _within(wanted: Listed, file: str, folder: Path) -> str:
    try:
        name = Path(file).resolve().relative_to(folder.resolve()).as_posix()
    except ValueError:
        name = ""
    if name not in wanted.files:
        raise DataError(f"{wanted.repo}: {file} is not one of its files", "only files of the repository are read")
    return name


def _check_card(wanted: Listed, card: Path) -> None:
    """Check that a repository's card only names files of the repository, before `datasets` opens them.

    Raises: DataError naming the path or address.
    """
    from huggingface_hub import metadata_load

    try:
        told = metadata_load(card) if card.is_file() else None
    except Exception as error:  # any error of the YAML reader on untrusted text
        raise DataError(
            f"{wanted.repo}: its card cannot be read: {(str(error).splitlines() or ['?'])[0]}", "its owner has to fix README.md"
        ) from None
    configs = (told or {}).get("configs")
    seen = 0
    left: list[Any] = [
        config.get(key)
        for config in (configs if isinstance(configs, list) else [configs])
        if isinstance(config, Mapping)
        for key in ("data_files", "data_dir")
    ]
    while left:
        part, seen = left.pop(), seen + 1
        if seen > _CARD:  # a few lines of YAML can expand to millions
            raise DataError(f"{wanted.repo}: its card names more than {_CARD:,} files", "its owner has to fix README.md")
        if isinstance(part, Mapping):
            left += part.values()
        elif isinstance(part, list | tuple):
            left += part
        elif isinstance(part, str) and (part.startswith(("/", "~", "\\")) or ":" in part or ".." in part.split("/")):
            raise DataError(
                f"{wanted.repo}: its card names `{part[:200]}`, which is not a file of the repository",
                "addresses and paths from elsewhere are never opened",
            )


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


def _command(hub: HubSet) -> str:
    columns = " ".join(f"'{part}={column}'" for part, column in hub.columns.items())
    return f"dgbench download --hub {hub.repository} --revision {hub.revision} --columns {columns} --as {hub.name}"
