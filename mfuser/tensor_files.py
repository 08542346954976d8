"""Files of tensors whose permissions are those of any other file that the user makes."""

from __future__ import annotations

import stat
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file


def write(tensors: Mapping[str, torch.Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write tensors as safetensors to `path`, readable to whom the user's umask and the folder let read.

    safetensors since 0.8 makes files that nobody but their owner can read, whatever the umask is: a checkpoint on a shared disk
    could not be scored by others.

    Raises: OSError if the file cannot be made; SafetensorError.
    """
    path.unlink(missing_ok=True)
    path.touch()
    mode = stat.S_IMODE(path.stat().st_mode)
    save_file(dict(tensors), path, metadata)
    path.chmod(mode)
