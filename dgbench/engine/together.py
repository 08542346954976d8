"""Scoring over several processes: who prepares images, and which images are scored in one round."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from dgbench.engine.partial import Partial
from dgbench.engine.team import Team
from dgbench.engine.watch import Watch


class Together:
    """The processes that score the same images, a batch of each in every round, and the watch over their rounds."""

    def __init__(self, team: Team, watch: Watch) -> None:
        self.team, self._watch = team, watch
        self._round = self._parts = 0

    def prepare(self, prepare: Callable[[], None]) -> None:
        """Let the first process of each machine make images ready, one after the other; the rest find them."""
        for turn in (self.team.main, not self.team.main):
            if turn:
                prepare()
            self._watch.pause()
            self.team.meet()

    def name(self, part: Partial) -> None:
        """Give all processes the first one's id of the future record. Raises: PeerLost."""
        self._parts += 1
        part.id = self.team.from_main(f"part/{self._parts}", part.id)

    def share(self, part: Partial) -> None:
        """Give all processes what the first has of an interrupted evaluation. Raises: PeerLost."""
        if self.team.world > 1:
            part.counts[:] = self.team.total(part.counts if self.team.main else np.zeros_like(part.counts))
            part.done[:] = (
                self.team.total(part.done.astype(np.int64) if self.team.main else np.zeros(len(part.done), np.int64)) > 0
            )

    def forget(self, part: Partial, images: Sequence[int]) -> None:
        """Forget the matrices of images that are about to be scored, which are summed over the processes."""
        if self.team.world > 1:
            part.counts[images], part.done[images] = 0, False

    def rounds(self, batches: Sequence[Sequence[int]]) -> Iterator[list[int]]:
        """Yield the images of each round, in which every process scores one of the batches, or in the last none."""
        for first in range(0, len(batches), self.team.world):
            self._round += 1
            self._watch.at(self._round, "computing")
            yield [index for batch in batches[first : first + self.team.world] for index in batch]
