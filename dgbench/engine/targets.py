"""What an evaluation scores: the images of domains, as they are or corrupted, and which records of them there are already."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dgbench import protocol, results
from dgbench.data import corruptions
from dgbench.data.corruptions import Corrupted, Corruption
from dgbench.data.dataset import SegDataset
from dgbench.data.domain import Domain
from dgbench.engine import checkpoints
from dgbench.engine.modes import Mode
from dgbench.errors import ResultError
from dgbench.recipe import Recipe, recipe_hash


@dataclass(frozen=True, slots=True)
class Target:
    """The images of one score."""

    dataset: SegDataset
    corruption: Corruption | None
    kind: Literal["eval", "severity"]  # of its record
    repeats: bool  # scenes of a target before it: which classes are rare in them is said once

    @property
    def name(self) -> str:
        """The domain's; of corrupted images `cityscapes+fog@3`."""
        domain = self.dataset.domain
        return domain.name if self.corruption is None else Corrupted(domain, self.corruption).name

    def protocol_hash(self, rules: protocol.Protocol, size: protocol.Size | None) -> str:
        """Return what its score is measured under; `size` is that of `size_of`."""
        data = self.dataset
        row = protocol.domain_row(data.domain, data.split, data.policy, data.size or size, data.revision)
        if self.corruption is not None:
            row |= {"name": self.name, "corruptions": corruptions.VERSION}
        return protocol.protocol_hash(rules, row)

    def about(self, checkpoint: str, rules: protocol.Protocol) -> dict[str, str]:
        """Return what is noted with the scored part of it: see `dgbench.engine.partial`."""
        named = {"target": self.name, "split": self.dataset.split, "kind": self.kind}
        return {"checkpoint": checkpoint, "protocol": rules.digest, **named}


def chosen_targets(
    recipe: Recipe,
    rules: protocol.Protocol,
    wanted: Sequence[tuple[Domain, Corruption | None]],
    root: Path | None,
    limit: int | None,
) -> list[Target]:
    """Return the images that are scored; a domain's are looked for once, in however many ways they are corrupted."""
    usual, sets = recipe.data.val_images, {}
    for row in {row.name: row for row, _ in wanted}.values():
        sets[row.name] = SegDataset(
            row,
            "val",
            root=root,
            # files are read as they are: what brings them to a size is the protocol's to choose
            size=recipe.data.size if row.procedural else None,
            limit=usual if limit is None else limit if usual is None else min(limit, usual),
            label_map=protocol.label_map(rules, row),
        )

    def kind(dataset: SegDataset, corruption: Corruption | None) -> Literal["eval", "severity"]:
        # what tables rank must not be replaced by what they do not
        fewer = limit is not None and len(dataset) == limit != min(usual or dataset.available, dataset.available)
        return "severity" if corruption is not None or fewer else "eval"

    found: list[Target] = []
    for row, corruption in wanted:
        dataset = sets[row.name]
        repeats = any(target.dataset.domain.base == row.base for target in found)
        found.append(Target(dataset, corruption, kind(dataset, corruption), repeats))
    return found


def stored_records(
    recipe: Recipe, rules: protocol.Protocol, targets: Sequence[Target], run: Path, how: Mode
) -> dict[str, results.Record]:
    """Return the newest record of each target of the newest checkpoint, by name, if one of this mode has matrices."""
    try:
        sha = checkpoints.sha256(checkpoints.folder_of(run))
    except OSError:  # a training replaces it
        return {}
    found: dict[str, results.Record] = {}
    for record in results.query(run):
        for target in targets:
            data = target.dataset
            same = (
                record.target == target.name
                and record.kind in ("eval", "severity")
                and (record.checkpoint, record.recipe_hash) == (sha, recipe_hash(recipe))
                and record.protocol_hash == target.protocol_hash(rules, size_of(recipe, data))
                and (record.n_images, record.n_available, record.n_extra) == (len(data), data.available, data.extra)
                and record.rendered == data.exported
                and how.made(record.environment)
            )
            with suppress(ResultError):
                if same and results.read_matrices(record).ids is not None:
                    found[target.name] = record
    return found


def size_of(recipe: Recipe, dataset: SegDataset) -> protocol.Size | None:
    """Return the (H, W) at which the recipe shows images of files; None where the protocol chooses, and of rendered ones."""
    return None if dataset.domain.procedural else recipe.data.size
