"""Names of our towers' tensors in the files on the Hub: rules from our name in a part to the published one.

Parts are the image `trunk`, the `head` that follows it, and the `text` tower. A rule is a pattern and its replacement, applied
in order; `mfuser.keys` says what `^T`, `^1` and `{q,k,v}` in a replacement mean. Our image towers are timm's, and our
text towers open_clip's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

Rules = Sequence[tuple[str, str]]

OPENAI: Rules = [
    (r"^cls_token$", "class_embedding^1"),
    (r"^pos_embed$", "positional_embedding^1"),
    (r"^patch_embed\.proj\.", "conv1."),
    (r"^norm_pre\.", "ln_pre."),
    (r"^norm\.", "ln_post."),
    (r"^blocks\.", "transformer.resblocks."),
    (r"\.norm([12])\.", r".ln_\1."),
    (r"\.attn\.qkv\.(weight|bias)$", r".attn.in_proj_\1"),
    (r"\.attn\.proj\.", ".attn.out_proj."),
    (r"\.mlp\.fc1\.", ".mlp.c_fc."),
    (r"\.mlp\.fc2\.", ".mlp.c_proj."),
]

# a file of timm's own model
TIMM_FILE: Mapping[str, Rules] = {"trunk": []}
# files of open_clip's models: EVA02-CLIP's, those with a convolutional network of timm's or of CLIP's own, OpenAI's, SigLIP's
EVA_CLIP_FILE: Mapping[str, Rules] = {
    "trunk": [(r"^", "visual.trunk.")],
    "head": [(r"^head\.", "visual.trunk.head.")],
    "text": [(r"^", "text.")],
}
CLIP_CNN_FILE: Mapping[str, Rules] = {"trunk": [(r"^", "visual.trunk.")], "text": []}
CLIP_RESNET_FILE: Mapping[str, Rules] = {
    "trunk": [(r"^", "visual.")],
    "head": [(r"^pool\.", "visual.attnpool.")],
    "text": [],
}
OPENAI_FILE: Mapping[str, Rules] = {
    "trunk": [*OPENAI, (r"^", "visual.")],
    "head": [(r"^head\.weight$", "visual.proj^T")],
    "text": [],
}
SIGLIP_FILE: Mapping[str, Rules] = {
    "trunk": [(r"^", "visual.trunk.")],
    "head": [
        (r"^probe$", "latent"),
        (r"^attention\.in_proj_(weight|bias)$", r"{q,kv}.\1"),
        (r"^attention\.out_proj\.", "proj."),
        (r"^mlp\.0\.", "mlp.fc1."),
        (r"^mlp\.2\.", "mlp.fc2."),
        (r"^", "visual.trunk.attn_pool."),
    ],
    "text": [(r"^", "text.")],
}
