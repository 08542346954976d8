"""Deterministic weights, images and label maps as a pure function of a name and a shape.

numpy only.  Bit-reproducible: the random stream is numpy's counter-based
Philox keyed by crc32(name); everything else is float32 multiply/add or a
float64 formula rounded once to float32.

``named_tensor(name, shape)`` is meant for *official* parameter/buffer names
(the keys of ``layout_<variant>.json``).  ``is_named(name)`` tells whether the
goldens overwrote that key (False: the tensor keeps the value that the model
computes itself, i.e. rotary tables and integer counters).
"""

import zlib

import numpy as np

SQRT12 = float(np.sqrt(12.0))


def _u01(name, n):
    """n float32 numbers in [0, 1)."""
    g = np.random.Generator(np.random.Philox(key=zlib.crc32(name.encode("utf-8"))))
    return g.random(int(n), dtype=np.float32)


def uniform01(name, shape):
    """float32 uniform numbers in [0, 1) (stands in for a random draw)."""
    return _u01(name, int(np.prod(shape, dtype=np.int64))).reshape(shape)


def _centred(name, shape, std):
    """zero-mean uniform with the given standard deviation."""
    u = _u01(name, int(np.prod(shape, dtype=np.int64)))
    out = (u - np.float32(0.5)) * np.float32(std * SQRT12)
    return out.reshape(shape)


def _between(name, shape, lo, hi):
    u = _u01(name, int(np.prod(shape, dtype=np.int64)))
    return (np.float32(lo) + u * np.float32(hi - lo)).astype(np.float32).reshape(shape)


def is_named(name):
    leaf = name.rsplit(".", 1)[-1]
    return leaf not in ("freqs_cos", "freqs_sin", "num_batches_tracked", "position_ids", "relative_position_index")


# leaf/suffix rules, first match wins; (predicate on the dotted name, maker)
_EMBED_SUFFIX = ("token_embedding.weight", "position_embedding.weight", "positional_embedding", "pos_embed")
_EMBED_TABLES = ("level_embed.weight", "level_encoding.weight", "query_embed.weight", "text_pos_embed.weight")
_TOKENS = ("cls_token", "class_embedding", "mask_token", "probe", "contexts", "random_text")


def named_tensor(name, shape):
    """float32 array for an official parameter name."""
    shape = tuple(int(s) for s in shape)
    leaf = name.rsplit(".", 1)[-1]

    # --- state-space adapter -------------------------------------------------
    if leaf == "A_log":  # (d, N)
        base = np.log(np.arange(1, shape[1] + 1, dtype=np.float64))
        return (base[None, :] + _centred(name, shape, 0.1).astype(np.float64)).astype(np.float32)
    if leaf == "D":
        return _between(name, shape, 0.5, 1.5)
    if leaf == "scale":  # scalar
        return _between(name, shape, 0.05, 0.2)
    if name.endswith("dt_proj.bias"):  # softplus(bias) log-uniform in [1e-3, 1e-1]
        u = _u01(name, int(np.prod(shape))).astype(np.float64)
        dt = np.exp(u * (np.log(1e-1) - np.log(1e-3)) + np.log(1e-3))
        return (dt + np.log(-np.expm1(-dt))).astype(np.float32).reshape(shape)
    if name.endswith("x_proj.weight"):
        return _centred(name, shape, 3.0 / np.sqrt(shape[1]))

    # --- scales --------------------------------------------------------------
    if name == "gamma":  # residual scale of the text
        return _between(name, shape, 0.1, 0.5)
    if leaf == "gamma":  # layer scale
        return _between(name, shape, 0.1, 1.0)
    if leaf == "running_var":
        return _between(name, shape, 0.5, 1.5)
    if leaf == "running_mean":
        return _centred(name, shape, 0.2)
    if leaf == "logit_scale":
        return np.full(shape, 3.0, np.float32)
    if leaf == "logit_bias":
        return np.full(shape, -10.0, np.float32)

    # --- embeddings ----------------------------------------------------------
    if name.endswith(_EMBED_TABLES) or leaf in _TOKENS:
        return _centred(name, shape, 0.5)
    if name.endswith(_EMBED_SUFFIX):
        return _centred(name, shape, 0.3)

    # --- biases and norm weights ---------------------------------------------
    if name.endswith("sampling_offsets.bias"):  # in pixels of the sampled level
        return _centred(name, shape, 2.0)
    if name.endswith("output_convs.0.gn.bias"):  # few positive values after the ReLU
        return _between(name, shape, -1.2, -0.6)
    if len(shape) <= 1 and leaf == "weight":  # every 1-D "weight" is a norm's
        return (np.float32(1.0) + _centred(name, shape, 0.1)).astype(np.float32)
    if len(shape) <= 1:  # bias, in_proj_bias, q_bias, v_bias
        return _centred(name, shape, 0.05)

    # --- matrices and kernels ------------------------------------------------
    std = 1.0 / np.sqrt(np.prod(shape[1:], dtype=np.float64))
    if any(k in name for k in ("q_proj", "k_proj", "qkv.weight", "in_proj_weight")):
        std *= 3.0 if name.startswith("text_encoder.") else 1.5  # sharper attention
    if name.startswith("decode_head.transformer_decoder."):  # keeps the 19 queries distinct
        if name.endswith("out_proj.weight"):
            std *= 0.15
        if name.endswith("ffns.0.layers.1.weight"):
            std *= 0.3
    if name.endswith("pixel_decoder.mask_feature.weight"):
        std *= 2.0
    if name == "decode_head.text_proj.2.weight":
        std *= 3.0
    if name.endswith("cls_embed.weight"):
        std *= 3.0
    return _centred(name, shape, float(std))


def named_input(name, shape, kind="image"):
    """Deterministic input.

    kind="image": (B, C, H, W); 32-pixel blocks (std 0.8) plus pixel noise (std 0.5).
                  Values stand for an already CLIP-normalised image.
    kind="noise": any shape, zero-mean uniform with std 1.
    """
    shape = tuple(int(s) for s in shape)
    if kind == "noise":
        return _centred(name, shape, 1.0)
    b, c, h, w = shape
    hb, wb = -(-h // 32), -(-w // 32)
    blocks = _centred(name + "/blocks", (b, c, hb, wb), 0.8)
    blocks = np.repeat(np.repeat(blocks, 32, axis=2), 32, axis=3)[:, :, :h, :w]
    return (blocks + _centred(name + "/pixels", shape, 0.5)).astype(np.float32)


LABEL_CHOICES = (0, 1, 2, 4, 5, 8, 10, 11, 13, 13, 18, 255)


def named_labels(name, shape, cell=64):
    """(B, H, W) uint8 label map made of cell x cell blocks, with 255 = ignore,
    and one thin strip (rows 100..103) of class 7."""
    b, h, w = (int(s) for s in shape)
    hb, wb = -(-h // cell), -(-w // cell)
    u = _u01(name, b * hb * wb).reshape(b, hb, wb)
    idx = np.minimum((u * np.float32(len(LABEL_CHOICES))).astype(np.int64), len(LABEL_CHOICES) - 1)
    lab = np.asarray(LABEL_CHOICES, np.uint8)[idx]
    lab = np.repeat(np.repeat(lab, cell, axis=1), cell, axis=2)[:, :h, :w].copy()
    lab[:, 100:104, :] = 7
    return lab


def sample_index(name, numel, count=4096):
    """Flat positions at which a big tensor is stored (sorted, unique)."""
    numel = int(numel)
    if numel <= count:
        return np.arange(numel, dtype=np.int64)
    g = np.random.Generator(np.random.Philox(key=zlib.crc32(("sample/" + name).encode("utf-8"))))
    u = g.random(count, dtype=np.float64)
    # one position per stratum: unique by construction
    edges = np.arange(count + 1, dtype=np.float64) * numel / count
    lo = np.ceil(edges[:-1]).astype(np.int64)
    hi = np.ceil(edges[1:]).astype(np.int64)
    return np.minimum(lo + np.floor(u * (hi - lo)).astype(np.int64), hi - 1)
