"""Towers' files that a user has already (`--from`): each is known by its tensors, not by its name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dgbench.errors import DataError

if TYPE_CHECKING:
    from mfuser.towers.files import HubFile
    from mfuser.towers.hub import Fetched


@dataclass(frozen=True, slots=True)
class GivenWeights:
    """A file of the user's, and the file of a tower that it stands for."""

    tower: str
    file: HubFile
    path: Path

    def take(self) -> Fetched:
        """Copy it to where the tower is loaded from.

        Raises: mfuser's DownloadError for a file that is not what the Hub states.
        """
        from mfuser.towers import given

        return given.take(self.tower, self.file, self.path)


def matched(towers: Sequence[str], paths: Sequence[Path], *, alone: bool) -> list[GivenWeights]:
    """Those of the given files, and of the files in given folders, that are missing files of the towers.

    Args:
        alone: nothing but towers is asked for, so that a given file can be of nothing else.

    Raises: DataError for a file of weights or a tokenizer that is given itself and fits none of the towers, and, where towers
        are asked for alone, for any other file.
    """
    candidates = [file for path in paths for file in ([path] if path.is_file() else sorted(path.iterdir()))]
    if not towers or not candidates:
        return []
    from mfuser.towers import given
    from mfuser.towers.weights import files

    if alone and (others := [path for path in paths if path.is_file() and not given.may_be_of_a_tower(path)]):
        endings = ", ".join((*given.SAFE, *given.TORCH))
        raise DataError(
            f"{others[0]} is no file of a tower by its name", f"weights end in {endings}; a tokenizer is called tokenizer.json"
        )
    found: list[GivenWeights] = []
    reasons: dict[Path, list[str]] = {}
    for tower in towers:
        for file in (file for file in files(tower) if file.where is None):
            for path in (path for path in candidates if given.kind_fits(file, path)):
                reason = given.difference(tower, file, path)
                if reason is None:
                    found.append(GivenWeights(tower, file, path))
                    break
                reasons.setdefault(path, []).append(f"not `{tower}`: {reason}")
    used = {row.path for row in found}
    for path in paths:
        if path in reasons and path not in used:
            raise DataError(
                f"{path} is {'; '.join(reasons[path])}",
                "give the file that the tower is published as (dgbench models names its Hub repository), or leave --from out",
            )
    return found
