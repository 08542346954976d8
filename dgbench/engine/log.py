"""The log of a training's losses, `log.jsonl`: which part a resumed run keeps, and its digest for the checkpoint."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dgbench import atomic
from dgbench.engine.checkpoints import Made
from dgbench.errors import CheckpointError

_logger = logging.getLogger(__name__)


class Log:
    """`log.jsonl`: a line of losses every few steps; a resumed run first removes the lines that it will repeat.

    Raises: CheckpointError if it does not have the digest that the checkpoint states.
    """

    def __init__(self, path: Path, start: int, before: Made | None) -> None:
        self.path, self.loss = path, before.loss if before else None
        content = path.read_bytes() if start and path.is_file() else b""
        if start and not path.is_file():
            _logger.warning("%s is not there: the losses of the steps before %d are lost", path, start)
        elif before is not None and before.log_bytes is not None:
            content = content[: before.log_bytes]
            if hashlib.sha256(content).hexdigest() != before.log_sha256:
                raise CheckpointError(
                    f"{path} is damaged: it is not the log that was written until step {start}",
                    "restore it, or remove it to continue without the losses so far",
                )
        else:
            lines = list(_lines_until(start, content))
            content = b"".join(lines)
            self.loss = json.loads(lines[-1]).get("loss") if lines else None
        self._digest, self._size = hashlib.sha256(content), len(content)
        atomic.write(path, content)

    def write(self, step: int, values: dict[str, Any]) -> None:
        line = (json.dumps({"step": step, **values}) + "\n").encode()
        with self.path.open("ab") as file:
            file.write(line)
        self.loss = values["loss"]
        self._digest.update(line)
        self._size += len(line)

    def sealed(self) -> tuple[int, str]:
        """Flush the log to the disk and return size and SHA-256 of what was written so far."""
        with self.path.open("rb") as file:
            os.fsync(file.fileno())
        return self._size, self._digest.hexdigest()


def _lines_until(step: int, content: bytes) -> Iterator[bytes]:
    """Yield the lines of a log of an older version, which has no digest."""
    for line in content.splitlines(keepends=True):
        try:
            if json.loads(line)["step"] <= step:
                yield line.removesuffix(b"\n") + b"\n"
        except (ValueError, KeyError, TypeError):  # the line that a kill cut short
            continue
