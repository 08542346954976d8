"""Files of towers: on the Hugging Face Hub, or in this package. Importing this needs no other library."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class HubFile:
    """One file on the Hugging Face Hub."""

    repo: str
    file: str
    gigabytes: float  # approximately; downloads are compared with the size that the Hub states
    licence: str = "see its page"

    @property
    def size(self) -> str:
        """The approximate size, as `1.7 GB`."""
        return f"{self.gigabytes:g} GB" if self.gigabytes >= 0.1 else f"{1000 * self.gigabytes:.2g} MB"

    @property
    def where(self) -> Path | None:
        """The file in the local Hub cache, or None."""
        try:
            commit = (self._folder / "refs" / "main").read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError):
            return None
        path = self._folder / "snapshots" / commit / self.file
        return path if path.exists() else None

    def blob(self, sha256: str) -> Path | None:
        """Return the repository's file with this hash in the local Hub cache, of whatever revision; None if there is none."""
        path = self._folder / "blobs" / sha256
        return path if re.fullmatch(r"[0-9a-f]{64}", sha256) and path.is_file() else None

    @property
    def _folder(self) -> Path:
        # as huggingface_hub documents its cache; its own function imports an HTTP client, which takes longer than all the rest
        from huggingface_hub.constants import HF_HUB_CACHE

        return Path(HF_HUB_CACHE, f"models--{self.repo.replace('/', '--')}")

    def sha256(self) -> str | None:
        """Return the SHA-256 of the file in the local Hub cache, which is read completely; None if it is not there."""
        if (path := self.where) is None:
            return None
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def __str__(self) -> str:
        return f"{self.repo}/{self.file} ({self.size})"


@dataclass(frozen=True)
class PackagedFile:
    """One file that comes with this package, in `mfuser/towers/mini`."""

    file: str
    digest: str  # its SHA-256
    licence: str
    repo: None = None  # none on the Hub

    @property
    def gigabytes(self) -> float | None:
        """Its size; None if it is not there."""
        return None if self.where is None else self.where.stat().st_size / 1e9

    @property
    def where(self) -> Path | None:
        """The file, or None if it is not there."""
        path = Path(__file__).parent / "mini" / self.file
        return path if path.exists() else None

    def sha256(self) -> str | None:
        """Return the SHA-256 of the file, which is read completely; None if it is not there."""
        return None if self.where is None else hashlib.sha256(self.where.read_bytes()).hexdigest()

    def pretraining(self) -> str | None:
        """Return the domain that it was trained on and the beginning of that domain's hash; None if it is not there."""
        from safetensors import safe_open

        if self.where is None:
            return None
        with safe_open(self.where, framework="numpy") as opened:
            described: dict[str, str] = opened.metadata() or {}
        return described.get("pretraining")

    def __str__(self) -> str:
        return f"{self.file}, which comes with dgbench"
