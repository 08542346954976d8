"""What was written of predictions: overlays of photographs, pictures of domains, archives for test servers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from dgbench.render.table import ABSENT, Cell, Table

if TYPE_CHECKING:
    from dgbench.engine.pictures import Picture
    from dgbench.engine.predict import Prediction
    from dgbench.engine.submission import Submission


def prediction_tables(predictions: Sequence[Prediction]) -> list[Table]:
    """Photographs and their overlays."""
    rows = []
    for prediction in predictions:
        rows.append((Cell(str(prediction.photo)), Cell(str(prediction.overlay)), Cell(_largest(prediction.shares))))
    return [Table("", ("photo", "overlay", "largest classes"), tuple(rows), left=True)]


def picture_tables(pictures: Sequence[Picture]) -> list[Table]:
    """Files of any kind, with the models that they show."""
    rows = tuple(
        (
            Cell(picture.image),
            Cell(", ".join(picture.models)),
            Cell(picture.content),
            Cell(str(picture.path)),
            Cell(_largest(picture.shares) or ABSENT),
        )
        for picture in pictures
    )
    return [Table("", ("image", "model", "content", "file", "largest classes"), rows, keys=3, left=True)]


def submission_tables(done: Submission) -> list[Table]:
    """What is in an archive, and what is left out."""
    title = f"{done.path}: predictions of {done.model} for the server of {done.server}"
    count = f"{done.n_images} of {done.n_expected} test images"
    legend = [f"{count}, as {done.encoding} of the images' size; protocol {done.protocol}."]
    if done.n_images != done.n_expected:
        legend.append("partial: the server takes the whole split only.")
    return [Table(title, (), (), legend=tuple(legend))]


def _largest(shares: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {100 * value:.0f} %" for name, value in list(shares.items())[:4])
