"""Prompts: synonyms of each class, inserted into templates, and their embeddings by a text tower.

The embedding of a word is the normalised mean of the normalised embeddings of its prompts (CLIP's prompt ensembling).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mfuser.towers.text import prompt_ids, prompt_tower

# from CLOUDS' classes_with_prompt_eng.txt, in the order of the train ids
SYNONYMS: tuple[tuple[str, ...], ...] = (
    ("road", "railroad"),
    ("sidewalk", "pavement"),
    ("building", "buildings", "edifice", "edifices", "house", "ceiling"),
    ("wall", "walls", "brick wall", "stone wall", "tile wall", "wood wall"),
    ("fence", "fences"),
    ("pole", "poles"),
    ("traffic light", "traffic lights"),
    ("traffic sign", "stop sign"),
    ("vegetation", "tree", "trees", "palm tree", "bushes"),
    ("terrain", "river", "sand", "sea", "snow", "water", "mountain", "grass", "dirt", "rock"),
    ("sky", "clouds"),
    ("person",),
    ("rider",),
    ("car", "cars"),
    ("truck", "trucks"),
    ("bus", "buses"),
    ("train", "trains", "locomotive", "locomotives", "freight train"),
    ("motorcycle", "motorcycles"),
    ("bicycle", "bicycles", "bike"),
)
# ViLD's templates (Gu et al., ICLR 2022), as in FC-CLIP and CLOUDS
TEMPLATES = (
    "a photo of a {}.",
    "This is a photo of a {}",
    "There is a {} in the scene",
    "There is the {} in the scene",
    "a photo of a {} in the scene",
    "a photo of a small {}.",
    "a photo of a medium {}.",
    "a photo of a large {}.",
    "This is a photo of a small {}.",
    "This is a photo of a medium {}.",
    "This is a photo of a large {}.",
    "There is a small {} in the scene.",
    "There is a medium {} in the scene.",
    "There is a large {} in the scene.",
)


class PromptEncoder(nn.Module):
    """Normalised embeddings (W, D) of W words in all templates, by a causal text tower.

    Of a frozen tower they are computed once and kept until other weights are loaded.

    Attributes: dim, the width D of the embeddings.
    """

    token_ids: Tensor
    kept: Tensor | None

    def __init__(self, name: str, words: Sequence[str], templates: Sequence[str] = TEMPLATES, *, dim: int = 64) -> None:
        """Build with random weights.

        Args:
            name: a row of TOWERS with a text tower.    words: W of them.    templates: with a `{}` for the word.
            dim: D of a tower that is trained from scratch; published ones have their own.
        """
        super().__init__()
        ids = prompt_ids(name, [template.format(word) for word in words for template in templates])
        self.tower = prompt_tower(name, length=ids.shape[1], dim=dim)
        self.templates = len(templates)
        self.dim: int = self.tower.text_projection.shape[-1]
        self.register_buffer("token_ids", ids, persistent=False)
        self.register_buffer("kept", None, persistent=False)
        self.tower.register_load_state_dict_post_hook(self._forget)

    def forward(self) -> Tensor:
        """Return the embeddings."""
        parameter = next(self.tower.parameters())
        if any(p.requires_grad for p in self.tower.parameters()):
            return self._read()
        if parameter.is_meta:  # computed once, it is no part of an image's cost
            return parameter.new_empty(len(self.token_ids) // self.templates, self.dim)
        if self.kept is None:
            # not an inference tensor, which a later training could not use
            with torch.inference_mode(False), torch.no_grad(), torch.autocast(parameter.device.type, enabled=False):
                self.kept = self._read()
        return self.kept

    def _read(self) -> Tensor:
        tower, length = self.tower, self.token_ids.shape[1]
        tokens = tower.token_embedding(self.token_ids) + tower.positional_embedding[:length]
        tokens = tower.transformer(tokens, attn_mask=tower.attn_mask[:length, :length])
        # the end token has the largest id; a causal tower does not see the padding after it
        ends = self.token_ids.argmax(-1)
        pooled = tower.ln_final(tokens[torch.arange(len(tokens), device=tokens.device), ends])
        each = F.normalize(pooled @ tower.text_projection, dim=-1)
        return F.normalize(each.unflatten(0, (-1, self.templates)).mean(1), dim=-1)

    def _forget(self, *_: object) -> None:
        self.kept = None
