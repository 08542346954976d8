"""Mining of styles by text (FAMix's first step): statistics that bring a patch's CLIP embedding near that of a prompt."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mfuser.labels import train_ids
from mfuser.patch_styles import StyleBank, dominant, patches, restyled, statistics
from mfuser.segmentor import Batch
from mfuser.towers.clip_resnet import AttentionPooling, CLIPResNetEncoder, pooled
from mfuser.towers.loading import fill, load_tower
from mfuser.towers.table import tower
from mfuser.towers.text import CONTEXT, prompt_ids, prompt_tower
from mfuser.towers.weights import require

# the authors' phrases
STYLES = tuple(
    f"{phrase} style"
    for phrase in (
        *("Ethereal Mist", "Cyberpunk Cityscape", "Rustic Charm", "Galactic Fantasy", "Pastel Dreams", "Dystopian Noir"),
        *("Whimsical Wonderland", "Urban Grit", "Enchanted Forest", "Retro Futurism", "Monochrome Elegance", "Vibrant Graffiti"),
        *("Haunting Shadows", "Steampunk Adventures", "Watercolor Serenity", "Industrial Chic", "Cosmic Voyage"),
        *("Pop Art Popularity", "Abstract Symphony", "Magical Realism"),
    )
)
UNLABELLED = "photo"  # in place of a class
IMAGES = 16  # at a time


class Miner(nn.Module):
    """CLIP as it is published: an image tower of stride 32 with its attention, and the text tower."""

    def __init__(self, name: str, trunk: nn.Module, *, published: bool) -> None:
        """Build, with the weights of a trunk.

        Args:
            name: a ResNet of CLIP's among TOWERS.    published: load attention and text tower, which are drawn otherwise.

        Raises: WeightsNotFound for weights that are not on this machine.
        """
        super().__init__()
        self.name = name
        self.encoder = CLIPResNetEncoder(name)
        self.encoder.trunk.load_state_dict(trunk.state_dict(), assign=True)
        self.attention, self.text = AttentionPooling(name), prompt_tower(name, length=CONTEXT)
        if published and tower(name).weights is not None:
            load_tower(name, require([name])[name], {"head": self.attention, "text": self.text})
        fill(self)
        self.eval().requires_grad_(False)

    @torch.no_grad()
    def read(self, phrase: str, templates: Sequence[str]) -> Tensor:
        """Return the normalised mean (D,) of the embeddings of a phrase in templates."""
        text, device = self.text, next(self.text.parameters()).device
        ids = prompt_ids(self.name, [template.format(phrase) for template in templates]).to(device)
        length = ids.shape[1]
        tokens = text.token_embedding(ids) + text.positional_embedding[:length]
        tokens = text.transformer(tokens, attn_mask=text.attn_mask[:length, :length])
        # the end token has the largest id
        pooled_ = text.ln_final(tokens)[torch.arange(len(ids), device=device), ids.argmax(-1)]
        return F.normalize((pooled_ @ text.text_projection).mean(0), dim=0)

    def embedded(self, low: Tensor) -> Tensor:
        """Return embeddings (B, D) of finest maps (B, C, 56, 56)."""
        out: Tensor = self.attention(self.encoder.high(low)[-1])
        return out

    def mined(self, crops: Sequence[Tensor], texts: Tensor, steps: int) -> tuple[Tensor, Tensor]:
        """Return means and deviations (n, C) with which patches look like texts.

        Args:
            crops: n patches (1, C, h, w) of finest maps.    texts: (n, D), normalised.    steps: of SGD, from the patches' own.
        """
        own = [statistics(crop) for crop in crops]
        mean = nn.Parameter(torch.cat([mean for mean, _ in own]))
        deviation = nn.Parameter(torch.cat([deviation for _, deviation in own]))
        optimizer = torch.optim.SGD([mean, deviation], lr=1.0, momentum=0.9, weight_decay=1e-4)
        with torch.enable_grad():
            for _ in range(steps):
                low = [pooled(restyled(crop, mean[i : i + 1], deviation[i : i + 1])) for i, crop in enumerate(crops)]
                loss = (1 - F.cosine_similarity(self.embedded(torch.cat(low)), texts)).mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        return mean.detach().flatten(1), deviation.detach().flatten(1)


def mine(
    miner: Miner,
    batches: Iterable[Batch],
    bank: StyleBank,
    classes: Sequence[str],
    *,
    steps: int = 100,
    styles: Sequence[str] = STYLES,
    templates: Sequence[str] = ("{}",),
) -> None:
    """Add styles to a bank: of every 16 images one for each class that dominates a patch, the first such patch.

    Images that are left over, fewer than 16, are used only if there are no others.
    """
    known: dict[str, Tensor] = {}
    for images, labels in _by(batches, IMAGES):
        with torch.no_grad():
            crops = patches(miner.encoder.low(images))
        most = dominant(train_ids(labels, len(classes)), len(classes)).flatten().tolist()
        # the first patch of each class
        first = {number: place for place, number in reversed(list(enumerate(most)))}
        numbers = sorted(first)
        phrases = []
        for number in numbers:
            style = styles[int(torch.randint(len(styles), ()))]
            phrases.append(f"{style} {classes[number] if number < len(classes) else UNLABELLED}")
        for phrase in phrases:
            if phrase not in known:
                known[phrase] = miner.read(phrase, templates)
        chosen = [crops[first[number] // len(images)][first[number] % len(images), None] for number in numbers]
        means, deviations = miner.mined(chosen, torch.stack([known[phrase] for phrase in phrases]), steps)
        bank.add(means, deviations, torch.tensor(numbers))


def _by(batches: Iterable[Batch], count: int) -> Iterable[tuple[Tensor, Tensor]]:
    """Yield images and labels of so many images at a time; fewer only if there are not so many."""
    images: list[Tensor] = []
    labels: list[Tensor] = []
    done = False
    for batch in batches:
        images += list(batch.images)
        labels += list(batch.labels)
        while len(images) >= count:
            yield torch.stack(images[:count]), torch.stack(labels[:count])
            images, labels, done = images[count:], labels[count:], True
    if images and not done:
        yield torch.stack(images), torch.stack(labels)
