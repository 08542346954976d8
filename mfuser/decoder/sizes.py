"""Sizes of the decoder that methods share: `full` is the published one, `small` and `tiny` go with the towers of those names."""

from __future__ import annotations

SIZES: dict[str, dict[str, int]] = {
    "full": {
        "decoder_dim": 256,
        "heads": 8,
        "pixel_layers": 6,
        "mask_layers": 9,
        "ffn_dim": 2048,
        "points": 4,
        "groups": 32,
        "mask_points": 12544,
    },
    "small": {
        "decoder_dim": 128,
        "heads": 8,
        "pixel_layers": 3,
        "mask_layers": 6,
        "ffn_dim": 512,
        "points": 4,
        "groups": 32,
        "mask_points": 4096,
    },
    "tiny": {
        "decoder_dim": 64,
        "heads": 4,
        "pixel_layers": 1,
        "mask_layers": 3,
        "ffn_dim": 128,
        "points": 2,
        "groups": 8,
        "mask_points": 1024,
    },
}
