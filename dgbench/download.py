"""What `dgbench download` fetches by name: the towers' weights. Domains are named, too, but are not fetched yet."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from dgbench.data import domains
from dgbench.errors import DataError, DgbenchError, unknown
from dgbench.progress import Progress, Silent

if TYPE_CHECKING:
    from mfuser.hub import Fetched


def download(names: Sequence[str], progress: Progress | None = None) -> list[Fetched]:
    """Fetch what the names stand for; all names are looked at before anything is fetched.

    Raises: DgbenchError for a name that is unknown or a domain's; mfuser's DownloadError, see there.
    """
    from mfuser import hub
    from mfuser.pretrained import WEIGHTS, files

    folders = {alias: row for row in domains.DOMAINS.values() for alias in (row.name, *row.aliases)}
    for name in names:
        if name in WEIGHTS:
            continue
        if name.startswith("timm:"):
            from mfuser.encoders import tower

            try:
                tower(name), files(name)
            except ValueError as error:
                raise DgbenchError(str(error), "docs/mfuser.md says which models of timm's are towers") from None
            continue
        if name.partition("@")[0] not in folders:
            raise DgbenchError(*unknown("tower or domain", name, [*WEIGHTS, *folders]))
        raise _refusal(domains.lookup(name))
    return hub.download(names, (progress or Silent()).note)


def _refusal(row: domains.Domain) -> DataError:
    if row.procedural:
        return DataError(f"`{row.name}` is rendered here: there is nothing to download", f"dgbench data show {row.base}")
    needs = {"open": "open to all", "account": "for those with an account there", "request": "given on request"}[row.access]
    return DataError(
        f"`{row.name}` cannot be downloaded by name yet: {row.title} is {needs}, see {row.homepage}",
        f"put its official folders into {domains.data_root()}/{row.folders[0]}, or point DGBENCH_DATA at the folder that holds "
        f"`{row.folders[0]}`; dgbench data list says what is found",
    )
