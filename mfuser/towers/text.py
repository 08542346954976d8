"""Text towers from open_clip with learnable context: class names to embeddings.

The context rows go after the first token, as in the release: behind the start token where there is one, behind the
first word piece of SigLIP, which has none. `context_first` has them before SigLIP's words.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mfuser.towers.files import HubFile
from mfuser.towers.meta import unfilled
from mfuser.towers.table import TOWERS, TextTower, with_text
from mfuser.towers.weights import WeightsNotFound, how_to_get

CONTEXT_LENGTH = 5  # tokens per class name, start and end included


_TINY: dict[str, Any] = {"width": 64, "heads": 2, "layers": 2}


class TextEncoder(nn.Module):
    """An open_clip text tower over (K, 5) token ids with `contexts` inserted.

    Attributes: width of its tokens; dim of its embeddings; contexts, the number of learned rows it expects.
    """

    token_ids: Tensor

    def __init__(
        self,
        name: str,
        token_ids: Tensor,
        *,
        dim: int | None = None,
        context_first: bool = False,
        skip_padding: bool = False,
    ) -> None:
        """Build with random weights.

        Args:
            name: a row of TOWERS with a text tower.    token_ids: (K, 5) integers, from `tokenize`, `listed_ids` or a checkpoint.
            dim: width of the embeddings of a tower that is trained from scratch; the others have their own.
            context_first: a tower without a start token gets the context before its first word piece, not after it.
            skip_padding: a tower without a start token is read at its last token that is no padding, not at its last.
        """
        super().__init__()
        from open_clip import get_model_config
        from open_clip.model import CLIPTextCfg, _build_text_tower

        row = _text_tower(name)
        config: Any = get_model_config(row.open_clip) if row.open_clip else {"embed_dim": row.dim or dim or 64, "text_cfg": _TINY}
        settings = dict(config["text_cfg"])
        settings.pop("hf_tokenizer_name", None)
        # the position table has the rows that are used, as in the release's checkpoints
        settings["context_length"] = token_ids.shape[1] + row.contexts
        if not row.causal:
            settings["act_kwargs"] = {"approximate": "tanh"}
        with unfilled() if row.open_clip else nullcontext():
            self.tower: Any = _build_text_tower(
                config["embed_dim"], CLIPTextCfg(**settings), quick_gelu=config.get("quick_gelu", False)
            )
        words = int(settings["vocab_size"]) if "vocab_size" in settings else CLIPTextCfg().vocab_size
        if token_ids.numel() and int(token_ids.max()) >= words:
            raise ValueError(f"token_ids hold {int(token_ids.max())}, and `{name}` knows the words 0..{words - 1}")
        self.name, self.causal, self.contexts = name, row.causal, row.contexts
        self.start = 0 if context_first and not row.causal else 1  # tokens before the context
        self.pad = row.pad if skip_padding and not row.causal else None
        self.width: int = settings["width"]
        self.dim: int = config["embed_dim"]
        self.register_buffer("token_ids", token_ids.long(), persistent=False)

    def forward(self, contexts: Tensor) -> Tensor:
        """Class embeddings (K, dim), not normalised; contexts (1, n, width)."""
        tokens = self.tower.token_embedding(self.token_ids)  # (K, 5, width)
        rows = contexts.expand(len(tokens), -1, -1)
        tokens = self._transformed(torch.cat([tokens[:, : self.start], rows, tokens[:, self.start :]], 1))
        if self.causal:
            # CLIP's end token has the largest id; its row moved back by the context
            return self._read(tokens, self.token_ids.argmax(-1) + contexts.shape[1])
        if self.pad is not None:
            # SigLIP's end token and its padding share an id: the last word is read there
            place = torch.arange(self.token_ids.shape[1], device=tokens.device)
            return self._read(tokens, ((self.token_ids != self.pad) * place).amax(-1) + contexts.shape[1])
        return self._projected(tokens[:, -1])

    def sentences(self, token_ids: Tensor) -> Tensor:
        """Embeddings (K, dim) of whole sentences, not normalised, without context.

        Args:
            token_ids: (K, L) from `tokenize`, with at most as many tokens as a class's name and its context have together.

        Raises: ValueError for a longer line, or a tower without an end token of its own (SigLIP's).
        """
        rows = len(self.tower.positional_embedding)
        if not self.causal or token_ids.shape[1] > rows:
            allowed = f"sentences of at most {rows} tokens" if self.causal else "none: its end token is no other than its padding"
            raise ValueError(f"`{self.name}` reads {allowed}; got {token_ids.shape[1]} tokens")
        return self._read(self._transformed(self.tower.token_embedding(token_ids)), token_ids.argmax(-1))

    def _transformed(self, tokens: Tensor) -> Tensor:
        """Embedded tokens (K, L, width) through the tower."""
        tower, length = self.tower, tokens.shape[1]
        tokens = tokens + tower.positional_embedding[:length]
        mask = tower.attn_mask[:length, :length] if self.causal else None
        out: Tensor = tower.ln_final(tower.transformer(tokens, attn_mask=mask))
        return out

    def _read(self, tokens: Tensor, place: Tensor) -> Tensor:
        return self._projected(tokens[torch.arange(len(tokens), device=tokens.device), place])

    def _projected(self, pooled: Tensor) -> Tensor:
        projection = self.tower.text_projection
        out: Tensor = projection(pooled) if isinstance(projection, nn.Module) else pooled @ projection
        return out


def prompt_tower(name: str, *, length: int = 0, dim: int = 64) -> Any:
    """Return an open_clip text tower with all its positions, for prompts.

    Args:
        length, dim: positions, and width of the embeddings, of a tower trained from scratch; published ones have their own.
    """
    from open_clip import get_model_config
    from open_clip.model import CLIPTextCfg, _build_text_tower

    row = _text_tower(name)
    config: Any = get_model_config(row.open_clip) if row.open_clip else {"embed_dim": row.dim or dim, "text_cfg": _TINY}
    settings = dict(config["text_cfg"]) | ({} if row.open_clip else {"context_length": length})
    with unfilled() if row.open_clip else nullcontext():
        return _build_text_tower(config["embed_dim"], CLIPTextCfg(**settings), quick_gelu=config.get("quick_gelu", False))


def prompt_ids(name: str, prompts: Sequence[str]) -> Tensor:
    """Return token ids (N, L) of prompts by a tower's tokenizer, which must come with open_clip; L is that of the longest."""
    from open_clip import get_tokenizer

    tokenizer = _text_tower(name).tokenizer
    assert isinstance(tokenizer, str)
    ids: Tensor = get_tokenizer(tokenizer)(list(prompts))
    return ids[:, : int((ids != 0).sum(1).max())].contiguous()


def _text_tower(name: str) -> TextTower:
    row = TOWERS[name].text if name in TOWERS else None
    if row is None:
        raise ValueError(f"unknown text tower `{name}`; choose from {', '.join(sorted(with_text()))}")
    return row


def listed_ids(token_ids: Any, classes: int) -> list[list[int]]:
    """Token ids given as lists, a NumPy array or a tensor, as lists, which a model's description can hold.

    Raises: TypeError for what are no integers, ValueError for another shape than (classes, 5) and for negative ids.
    """
    given = token_ids.detach().cpu().numpy() if isinstance(token_ids, Tensor) else token_ids
    expected = f"expected ({classes}, {CONTEXT_LENGTH}) integers: a line for each class"
    try:
        ids = np.asarray(given)
    except ValueError:  # lines of different lengths
        raise ValueError(f"token_ids are lines of different lengths, {expected}") from None
    if ids.shape != (classes, CONTEXT_LENGTH):
        raise ValueError(f"token_ids are {ids.shape}, {expected}")
    if not np.issubdtype(ids.dtype, np.integer):
        raise TypeError(f"token_ids are {ids.dtype}, {expected}")
    if ids.min() < 0:
        raise ValueError(f"token_ids hold {ids.min()}, and ids begin at 0")
    return [[int(i) for i in line] for line in ids]


def tokenize(name: str, classes: Sequence[str], length: int = CONTEXT_LENGTH) -> list[list[int]]:
    """Token ids (K, length) of the class names, or of sentences, by the tower's own tokenizer; longer ones are cut.

    CLIP's vocabulary comes with open_clip; SigLIP's is a file of the Hub, read from the local cache.

    Raises: WeightsNotFound if that file is not on this machine, or not whole.
    """
    row = _text_tower(name)
    if isinstance(row.tokenizer, HubFile):
        return _from_file(name, row.tokenizer, row.pad, classes, length)
    from open_clip import get_tokenizer

    ids = np.asarray(get_tokenizer(row.tokenizer, context_length=length)(list(classes)))
    return [[int(i) for i in line] for line in ids]


def _from_file(name: str, file: HubFile, pad: int, classes: Sequence[str], length: int) -> list[list[int]]:
    # what open_clip does through `transformers`, with the library that does the work there
    from open_clip.tokenizer import get_clean_fn
    from tokenizers import Tokenizer

    path = file.where
    if path is None:
        raise WeightsNotFound(
            f"the tokenizer of `{name}` is not on this machine: {file}",
            f"{how_to_get([name])}, or give the ids: token_ids=[[...], ...], ({len(classes)}, {CONTEXT_LENGTH})",
        )
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing narrower
        raise WeightsNotFound(f"{path} is damaged: {error}", f"delete it and run: dgbench download {name}") from None
    tokenizer.enable_truncation(length)
    tokenizer.enable_padding(length=length, pad_id=pad)
    clean = get_clean_fn("canonicalize")
    return [list(line.ids) for line in tokenizer.encode_batch([clean(text) for text in classes])]
