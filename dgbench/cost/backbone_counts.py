"""Stored counts of the backbone tables: those that ship, under the hash of all source files that decide them.

`python benchmarks/backbones.py --counts` writes the shipped file, in about two minutes; a test reports when this is necessary.
"""

from __future__ import annotations

import functools
import gzip
import hashlib
import json
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

import mfuser
from dgbench import atomic
from dgbench.cost.backbone_nets import Net, NetCount, count_net
from dgbench.cost.backbone_tables import TABLES
from dgbench.cost.conventions import Cost

SHIPPED = Path(__file__).with_name("backbones.json.gz")
SWEEP = (512, 768, 1024, 1536, 2048)  # sides of square images
# one trunk of each kind, of the tables' smallest class
SWEPT = ("resnet50_deep", "deit_s_mln", "swin_t", "convnext_t", "nat_t", "vim_s", "vmamba_t")

_MODELS = ("pyramid", "nat", "replknet", "vim", "vmamba", "scan")
_RULES = ("backbone_nets", "detector", "conventions", "count", "operators", "shapes")
_PACKAGES = ("timm", "torchvision")


def table_net(name: str, trunk: str) -> Net:
    """Return the network of a table's row."""
    table = TABLES[name]
    dim = next((row.dim for row in table.rows if row.trunk == trunk), 512)
    return Net(name, trunk, table.size, dim)


def all_nets() -> list[Net]:
    """Return every network that is stored: the tables' rows, what they are calibrated with, and trunks over image sizes."""
    nets = [table_net(name, row.trunk) for name, table in TABLES.items() for row in table.rows]
    nets += [table_net(name, table.calibration[0]) for name, table in TABLES.items()]
    nets += [Net("", trunk, (side, side)) for trunk in SWEPT for side in SWEEP]
    return list(dict.fromkeys(nets))


@functools.cache
def source_hash() -> str:
    """Return the hash of the files that decide these counts."""
    models, rules = Path(mfuser.__file__).parent, Path(__file__).parent
    files = [models / "towers" / f"{name}.py" for name in _MODELS]
    files += [models / "decoder" / f"{name}.py" for name in ("upernet", "deeplab", "neck")]
    files += [rules / f"{name}.py" for name in _RULES]
    digest = hashlib.sha256()
    for path in files:
        content = path.read_bytes()
        digest.update(f"{path.name} {len(content)}\n".encode() + content)
    return digest.hexdigest()


def known(net: Net) -> NetCount | None:
    """Return the shipped count of a network; None if it is not there or of other sources."""
    content = _shipped(SHIPPED)
    row = content.get("rows", {}).get(net.key)
    return _read(row) if row is not None and content["sources"] == source_hash() else None


def made_with() -> str:
    """Return the packages that the shipped counts were made with, as `timm 1.0.20`, if they are other ones than those here."""
    made = _shipped(SHIPPED).get("made with", {})
    return ", ".join(f"{name} {version}" for name, version in made.items()) if made and made != _versions() else ""


def ship(nets: Iterable[Net], path: Path = SHIPPED) -> Path:
    """Count networks, and write the file that ships: the same bytes for the same counts."""
    rows = {net.key: _written(count_net(net)) for net in nets}
    content = {"sources": source_hash(), "made with": _versions(), "rows": rows}
    return atomic.write(path, gzip.compress(json.dumps(content, indent=0).encode(), mtime=0))


@functools.cache
def _shipped(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(gzip.decompress(path.read_bytes())) if path.exists() else {}
    return found


def _versions() -> dict[str, str]:
    return {package: metadata.version(package) for package in _PACKAGES}


def _written(count: NetCount) -> dict[str, Any]:
    return {
        "parameters": count.parameters,
        "auxiliary": count.auxiliary,
        "cost": count.cost.parts,
        "trunk": count.trunk.parts,
        "norms": count.norms,
    }


def _read(row: dict[str, Any]) -> NetCount:
    return NetCount(row["parameters"], row["auxiliary"], Cost(*row["cost"]), Cost(*row["trunk"]), row["norms"])
