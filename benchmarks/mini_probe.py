"""Linear probes of frozen towers on rendered streets, and the zero-shot map of mini_vlm.

    python benchmarks/mini_probe.py --towers mini_vfm mini_vlm random dinov2_s
    python benchmarks/mini_probe.py --towers mini_vfm --weights OUT --photos CITYSCAPES

A probe is BatchNorm and a 1x1 convolution on a tower's normed last tokens (of DINOv2-S also its ninth block's), trained on
`streets-game` alone, at 128x256, and scored on whole images by two windows. `--checkpoint` probes the towers of a trained run.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

import mfuser
from dgbench.data.labels import LABEL_MAPS
from dgbench.streets.render import render
from mfuser.segmentor import CITYSCAPES
from mfuser.towers.embedding import LinearEmbedding
from mfuser.towers.loading import fill, load_tower
from mfuser.towers.table import TOWERS
from mfuser.towers.text import TextEncoder, tokenize
from mfuser.towers.vit import VisionEncoder
from mfuser.towers.weights import require

SIZE, SIDE = (128, 256), 128
DOMAINS = ("streets-game", "streets-city", "streets-adverse", "streets-world")
TEACHER, NINTH = "timm:vit_small_patch14_dinov2.lvd142m", 8
CLASSES, IGNORED = 19, 255
Features = Callable[[Tensor], Tensor]  # windows (B, 3, 128, 128) -> (B, C, h, w)
Pairs = tuple[Tensor, Tensor]  # images (N, 3, H, W) uint8, labels (N, H, W) train ids


def scenes(domain: str, split: str, count: int) -> Pairs:
    """Render the first images of a split with their labels."""
    with ProcessPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        pairs = list(pool.map(render, [domain] * count, [split] * count, range(count), [SIZE] * count, chunksize=8))
    images = torch.from_numpy(np.stack([image for image, _ in pairs])).permute(0, 3, 1, 2)
    return images, torch.from_numpy(np.stack([label for _, label in pairs])).long()


def photographs(root: Path) -> Pairs:
    """Read photographs and labels in the layout of Cityscapes, reduced to 128x256."""
    table = LABEL_MAPS["cityscapes-ids"].table
    images, labels = [], []
    for path in sorted(root.glob("leftImg8bit/*/*/*_leftImg8bit.png")):
        other = root / "gtFine" / path.relative_to(root / "leftImg8bit").parent
        ids = Image.open(other / path.name.replace("leftImg8bit", "gtFine_labelIds"), formats=["PNG"])
        photo = Image.open(path, formats=["PNG"]).convert("RGB")
        images.append(np.asarray(photo.resize(SIZE[::-1], Image.Resampling.BOX)))
        labels.append(table[np.asarray(ids.resize(SIZE[::-1], Image.Resampling.NEAREST))])
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2), torch.from_numpy(np.stack(labels)).long()


def features_of(name: str, weights: Path | None, device: str) -> Features:
    """Return the last normed tokens of a tower as a map: `random`, `dinov2_s`, a run's checkpoint, or a row of TOWERS."""
    if name == "dinov2_s":
        tower = VisionEncoder(TEACHER, (224, 224))
        load_tower(TEACHER, require([TEACHER])[TEACHER], {"trunk": tower.trunk})
    elif Path(name).is_dir():
        model = mfuser.load(name)
        tower = next(module for module in model.modules() if isinstance(module, VisionEncoder))
    elif name == "random":
        tower = VisionEncoder("mini_vfm", (SIDE, SIDE))
        fill(tower)
    else:
        tower = VisionEncoder(name, (SIDE, SIDE))
        load_tower(name, weights / f"{name}.safetensors" if weights else require([name])[name], {"trunk": tower.trunk})
    tower.eval().requires_grad_(False).to(device)
    last = NINTH if name == "dinov2_s" else tower.depth - 1

    def features(windows: Tensor) -> Tensor:
        if name == "dinov2_s":
            windows = F.interpolate(windows, (224, 224), mode="bicubic", antialias=True).clamp(0, 1)
        tokens, rope = tower.embed(windows), tower.rope()
        for i in range(last + 1):
            tokens = tower.block(i, tokens, rope)
        return tower.as_map(tower.finish(tokens))

    return features


def probed(features: Features, train: Pairs, steps: int, device: str, seed: int) -> nn.Module:
    """Train BatchNorm and a 1x1 convolution on random windows."""
    images, labels = (part.to(device) for part in train)
    draw = torch.Generator(device).manual_seed(seed)
    torch.manual_seed(seed)
    channels = features(torch.zeros(1, 3, SIDE, SIDE, device=device)).shape[1]
    head = nn.Sequential(nn.BatchNorm2d(channels), nn.Conv2d(channels, CLASSES, 1)).to(device)
    optimizer = torch.optim.AdamW(head.parameters(), 1e-2, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=steps)
    for _ in range(steps):
        chosen = torch.randint(len(images), (16,), generator=draw, device=device)
        left = int(torch.randint(SIZE[1] - SIDE + 1, (1,), generator=draw, device=device))
        window = images[chosen][..., left : left + SIDE].float() / 255
        with torch.no_grad():
            seen = features(window)
        logits = F.interpolate(head(seen), (SIDE, SIDE), mode="bilinear")
        loss = F.cross_entropy(logits, labels[chosen][..., left : left + SIDE], ignore_index=IGNORED)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return head.eval()


@torch.no_grad()
def confusion(logits_of: Callable[[Tensor], Tensor], pairs: Pairs, device: str) -> Tensor:
    """Return the confusion matrix (label, prediction) of whole images, each as two windows side by side."""
    total = torch.zeros(CLASSES, CLASSES, dtype=torch.long)
    for image, label in zip(pairs[0].split(20), pairs[1].split(20), strict=True):
        windows = torch.cat([image[..., :SIDE], image[..., SIDE:]]).to(device).float() / 255
        left, right = F.interpolate(logits_of(windows).float(), (SIDE, SIDE), mode="bilinear").argmax(1).cpu().chunk(2)
        predicted, known = torch.cat([left, right], -1), label != IGNORED
        total += torch.bincount(CLASSES * label[known] + predicted[known], minlength=CLASSES**2).view(CLASSES, CLASSES)
    return total


def miou(matrix: Tensor) -> float:
    """Return mIoU in percent over the classes that occur in the labels."""
    hits = matrix.diag().double()
    union = matrix.sum(0) + matrix.sum(1) - matrix.diag()
    return 100 * float((hits / union)[matrix.sum(1) > 0].mean())


def zero_shot(weights: Path | None, device: str) -> Callable[[Tensor], Tensor]:
    """Return mini_vlm's cosines of patches with class names, windows -> (B, 19, h, w); no labels are used."""
    tower = VisionEncoder("mini_vlm", (SIDE, SIDE))
    text = TextEncoder("mini_vlm", torch.tensor(tokenize("mini_vlm", CITYSCAPES)))
    head = LinearEmbedding(tower, text.dim, bias=True)
    path = weights / "mini_vlm.safetensors" if weights else require(["mini_vlm"])["mini_vlm"]
    load_tower("mini_vlm", path, {"trunk": tower.trunk, "head": head, "text": text.tower})
    for part in (tower, head, text):
        part.eval().requires_grad_(False).to(device)
    classes = F.normalize(text.sentences(text.token_ids), dim=-1)

    def cosines(windows: Tensor) -> Tensor:
        tokens = tower.embed(windows)
        for i in range(tower.depth):
            tokens = tower.block(i, tokens)
        visual = F.normalize(head(tower, tokens)[1], dim=-1)
        return (visual @ classes.T).transpose(1, 2).unflatten(2, tower.grid)

    return cosines


def _applied(features: Features, head: nn.Module, windows: Tensor) -> Tensor:
    out: Tensor = head(features(windows))
    return out


def _cell(scores: list[float]) -> str:
    return f"{np.mean(scores):.1f}" + (f" ±{np.std(scores, ddof=1):.1f}" if len(scores) > 1 else "")


def main() -> None:
    """Print a table and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--towers", nargs="+", default=["mini_vfm", "mini_vlm", "random"])
    parser.add_argument("--weights", type=Path, help="folder of mini_*.safetensors in place of those in dgbench")
    parser.add_argument("--photos", type=Path, help="a folder in the layout of Cityscapes")
    parser.add_argument("--patch", type=int, help="of the miniature towers in --weights, if not their own")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--images", type=int, default=100)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    for name in ("mini_vfm", "mini_vlm"):
        TOWERS[name] = dataclasses.replace(TOWERS[name], patch=args.patch or TOWERS[name].patch)
    train = scenes(DOMAINS[0], "train", 8 * args.images)
    tests = {domain: scenes(domain, "val", args.images) for domain in DOMAINS}
    if args.photos:
        tests["photographs"] = photographs(args.photos)
    found: dict[str, dict[str, list[float]]] = {}
    for name in args.towers:
        features = features_of(name, args.weights, args.device)
        heads = [probed(features, train, args.steps, args.device, seed) for seed in args.seeds]
        found[name] = {
            domain: [miou(confusion(partial(_applied, features, head), pairs, args.device)) for head in heads]
            for domain, pairs in tests.items()
        }
        cells = [_cell(scores) for scores in found[name].values()]
        print(f"| {name} |", " | ".join(cells), "|", flush=True)
    shown: dict[str, dict[str, list[float]]] = {}
    if "mini_vlm" in args.towers:
        cosines = zero_shot(args.weights, args.device)
        for domain, pairs in tests.items():
            matrix = confusion(cosines, pairs, args.device)
            recall = 100 * matrix.diag() / matrix.sum(1).clamp(min=1)
            share = 100 * matrix.sum(0) / matrix.sum()
            shown[domain] = {"recall": recall.tolist(), "predicted": share.tolist(), "miou": [miou(matrix)]}
            print(f"zero-shot {domain}: mIoU {miou(matrix):.1f}, pixels {100 * matrix.diag().sum() / matrix.sum():.1f}")
            print("  " + ", ".join(f"{c} {r:.0f}/{s:.0f}" for c, r, s in zip(CITYSCAPES, recall, share, strict=True)), flush=True)
    if args.out:
        args.out.write_text(json.dumps({"probe": found, "zero-shot": shown}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
