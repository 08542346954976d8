"""How a training scales, by arithmetic for 1, 8 and 64 GPUs: prints the tables of docs/cluster.md.

What two GPUs really do is measured by two_gpus.py.
"""

from __future__ import annotations

TRAINED = 118.65e6  # MFuser's trainable parameters with EVA02-CLIP-L and DINOv2-L
STEP = 0.329  # seconds of a step of 2 images on one H200 (benchmarks/methods.md)
WINDOWS = 64.0  # windows a second of one H200, 8 at once (the same)
IMAGES = 15.4  # images a second of one core, GTA5's PNG with rare-class sampling (benchmarks/loader.md)
FILE = 2.3e6  # bytes of an image of GTA5
BACKWARD = 2 / 3  # of a step, behind which the exchange can hide
# bytes a second of each GPU in an all-reduce: assumptions, to be replaced by what a cluster has
LINKS = {"one machine, NVLink": 200e9, "400 Gb/s for each GPU": 50e9, "100 Gb/s for 8 GPUs": 12.5e9 / 8}
# windows of 512x512 with a stride of 341: images of Cityscapes, BDD100K and Mapillary at the test sizes of `unified`
TEST = 500 * 18 + 1000 * 8 + 2000 * 18


def arithmetic() -> str:
    """Return the tables of docs/cluster.md."""
    size = 4 * TRAINED
    lines = ["| GPUs | sent by each GPU a step | link | all-reduce | efficiency, nothing hidden | hidden by the backward pass |"]
    lines += ["| --- | --- | --- | --- | --- | --- |"]
    for gpus in (1, 8, 64):
        sent = 2 * (gpus - 1) / gpus * size
        for name, speed in LINKS.items():
            if gpus == 1 or (name.startswith("one machine") != (gpus == 8)):
                continue
            seconds = sent / speed
            hidden = STEP / (STEP + max(0.0, seconds - BACKWARD * STEP))
            row = (f"{sent / 1e6:.0f} MB", name, f"{1e3 * seconds:.1f} ms", f"{100 * STEP / (STEP + seconds):.0f} %")
            lines.append(f"| {gpus} | {' | '.join(row)} | {100 * hidden:.0f} % |")
        if gpus == 1:
            lines.append("| 1 | 0 MB | – | – | 100 % | 100 % |")
    lines += ["", "| GPUs | images a second | cores that load | read from disk | scoring three targets | 20,000 steps |"]
    lines += ["| --- | --- | --- | --- | --- | --- |"]
    for gpus in (1, 8, 64):
        rate = 2 * gpus / STEP
        score, training = TEST / WINDOWS / gpus, 20_000 * STEP
        row = (f"{rate:.0f}", f"{rate / IMAGES:.1f}", f"{rate * FILE / 1e6:.0f} MB/s", f"{score / 60:.1f} min")
        lines.append(f"| {gpus} | {' | '.join(row)} | {training / 3600:.1f} h |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(arithmetic())
