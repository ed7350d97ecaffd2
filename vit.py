# SPDX-License-Identifier: Apache-2.0
"""Vision Transformer (ViT) in pure JAX, in one file: model, released weights, fine-tuning, pictures.

Implements "An Image is Worth 16x16 Words" (Dosovitskiy et al., arXiv 2010.11929) and the recipe of
its code release, google-research/vision_transformer. Run it, read it, copy pieces out of it:

    python vit.py digits                                # learns to read digits, nothing to download
    python vit.py cifar10                               # fine-tunes the released ViT-B/16
    python vit.py photo.jpg --pretrained=runs/cifar10/checkpoint.npz

The file reads from top to bottom; every part needs only those above it:

    1. Model      what an image becomes: patches, tokens, encoder blocks, logits
    2. Weights    released checkpoints in and out; position embeddings at another resolution
    3. Images     digits, CIFAR, TFDS, folders; crops; batches that stay ahead of the device
    4. Learning   loss, mixup, learning rate, SGD with momentum, one step on all devices
    5. Safety     downloads, atomic checkpoints, resuming (skip it at first reading)
    6. Training   the loop, evaluation
    7. Photos     classification, and where the class token looks
    8. Command line

In shapes: B images, H x W pixels, P patch size, N tokens (class token included), D width, L blocks,
A attention heads, K classes. Two JAX ideas to start with. A *pytree* is a nested dict (or list) of
arrays; the parameters are one, and `jax.tree.map(f, a, b)` applies f leaf by leaf. A *key* is an
explicit random state: the same key always gives the same numbers, and `split` or `fold_in` make new
ones from it.
"""
import argparse
import collections
import contextlib
import csv
import difflib
import functools
import hashlib
import http.client
import importlib.util
import io
import json
import math
import os
import re
import signal
import sys
import tarfile
import time
import urllib.error
import urllib.request
import uuid
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

# ==================================================================================================
# 1. Model (needs jax and jax.numpy only)
# ==================================================================================================

def parse_model(model):
    """"ViT-B_16" -> (patch size P, width D, depth L, heads A, MLP width), five ints.

    The sizes are those of the paper (table 1; Ti and S: arXiv 2106.10270), the patch size is free.
    Raises ValueError for any other name.
    """
    sizes = {
        "XS": (96, 4, 3),  # ours, small enough to learn `digits` on a CPU
        "Ti": (192, 12, 3),
        "S": (384, 12, 6),
        "B": (768, 12, 12),
        "L": (1024, 24, 16),
        "H": (1280, 32, 16),
    }
    size, _, patch = model.removeprefix("ViT-").partition("_")
    if model != f"ViT-{size}_{patch}" or size not in sizes or not patch.isdecimal():
        raise ValueError(f"unknown model {model!r}; models are called ViT-SIZE_PATCH, for example "
                         f"ViT-B_16, with SIZE one of {', '.join(sizes)} and PATCH in pixels")
    width, depth, heads = sizes[size]
    return int(patch), width, depth, heads, 4 * width


def linear(x, kernel, bias):
    """x @ kernel + bias: [..., I] -> [..., O], in the dtype of x.

    Kernels keep the shapes that they have in the checkpoints, [I, A, O/A] for example; here they
    are matrices [I, O]. One large matrix product is what every device does best.
    """
    inputs = x.shape[-1]
    y = x.reshape(-1, inputs) @ kernel.reshape(inputs, -1).astype(x.dtype)
    return y.reshape(*x.shape[:-1], -1) + bias.reshape(-1).astype(x.dtype)


def layer_norm(x, scale, bias):
    """Each token to mean 0 and variance 1, then scale and bias: [..., D] -> [..., D].

    Computed in float32 whatever the dtype of x, which is also the dtype of the result.
    """
    x32 = x.astype(jnp.float32)
    x32 = x32 - x32.mean(axis=-1, keepdims=True)
    x32 = x32 * jax.lax.rsqrt((x32**2).mean(axis=-1, keepdims=True) + 1e-6)
    return (x32 * scale + bias).astype(x.dtype)


def dropout(x, key, rate):
    """Zeroes entries of x with probability rate, scales the others by 1 / (1 - rate).

    Any shape; without a key (evaluation) or with rate 0 it is the identity.
    """
    if key is None or rate == 0:
        return x
    return jnp.where(jax.random.bernoulli(key, 1 - rate, x.shape), x / (1 - rate), 0)


def patch_embedding(images, kernel, bias):
    """Cuts images into P x P patches and projects each: [B, H, W, 3] -> [B, H/P * W/P, D].

    kernel [P, P, 3, D], bias [D]. Equals a convolution with kernel and stride P (paper, eq. 1).
    H and W must be multiples of P, else the reshape raises a TypeError.
    """
    b, h, w, c = images.shape
    p = kernel.shape[0]
    x = images.reshape(b, h // p, p, w // p, p, c)  # rows and columns of patches
    x = x.transpose(0, 1, 3, 2, 4, 5)  # [B, H/P, W/P, P, P, 3]
    x = x.reshape(b, (h // p) * (w // p), p * p * c)  # [B, N-1, P*P*3]
    return linear(x, kernel, bias)  # [B, N-1, D]


def attention(x, query, key, value, out):
    """Multi-head self-attention (paper, appendix A): x [B, N, D] -> [B, N, D], and its weights.

    query, key, value: dicts of kernel [D, A, D/A] and bias [A, D/A]; out: [A, D/A, D] and [D].
    The weights [B, A, N, N] say how much each token (row) takes from each token (column); they and
    the scores are float32 even where x is bfloat16.
    """
    b, n, d = x.shape
    heads, size = query["bias"].shape

    def split_heads(x):
        return x.reshape(b, n, heads, size).swapaxes(1, 2)  # [B, N, D] -> [B, A, N, D/A]

    q, k, v = (split_heads(linear(x, **p)) for p in (query, key, value))
    k = k.swapaxes(2, 3)  # [B, A, D/A, N]
    scores = jnp.matmul(q / size**0.5, k, preferred_element_type=jnp.float32)  # [B, A, N, N]
    weights = jax.nn.softmax(scores, axis=-1)
    y = weights.astype(x.dtype) @ v  # [B, A, N, D/A]
    return linear(y.swapaxes(1, 2).reshape(b, n, d), **out), weights


def mlp(x, Dense_0, Dense_1, key=None, dropout_rate=0.0):
    """Two linear layers with a GELU (tanh form) between: [B, N, D] -> [B, N, 4D] -> [B, N, D]."""
    x = dropout(jax.nn.gelu(linear(x, **Dense_0), approximate=True), key, dropout_rate)
    return linear(x, **Dense_1)


def encoder_block(x, block, key=None, dropout_rate=0.0):
    """One pre-norm Transformer block (paper, eq. 2 and 3): x [B, N, D] -> ([B, N, D], weights).

    block: the parameters of this block under the checkpoints' names; weights as in `attention`.
    """
    keys = [None] * 3 if key is None else jax.random.split(key, 3)
    y = layer_norm(x, **block["LayerNorm_0"])
    y, weights = attention(y, **block["MultiHeadDotProductAttention_1"])
    x = x + dropout(y, keys[0], dropout_rate)
    y = layer_norm(x, **block["LayerNorm_2"])
    y = mlp(y, **block["MlpBlock_3"], key=keys[1], dropout_rate=dropout_rate)
    return x + dropout(y, keys[2], dropout_rate), weights


def forward(params, images, key=None, dropout_rate=0.0, remat=False, return_attention=False):
    """The Vision Transformer: pixels [B, H, W, 3] in [-1, 1] -> logits [B, K], float32.

    Everything about the model (P, D, L, A, pre_logits or none) is read off the shapes of params, as
    made by `init_params` or `load_checkpoint`. Activations have the dtype of images (float32 or
    bfloat16). H and W must fit the position embeddings, else adding them raises a TypeError.
    A key turns dropout on. With return_attention, also the attention weights [L, B, A, N, N].

    For the gradient, JAX keeps what the forward pass computed. Here only the outputs of products
    with weight matrices stay; norms, softmax and GELU are computed again, which is faster than
    writing them to memory and reading them back. remat=True keeps nothing inside a block.
    """
    encoder = params["Transformer"]
    x = patch_embedding(images, **params["embedding"])  # [B, N-1, D]
    cls = jnp.broadcast_to(params["cls"], (x.shape[0], 1, x.shape[2])).astype(x.dtype)
    x = jnp.concatenate([cls, x], axis=1)  # [B, N, D]
    x = x + encoder["posembed_input"]["pos_embedding"].astype(x.dtype)

    keys = None
    if key is not None:
        depth = encoder["encoderblock"]["LayerNorm_0"]["scale"].shape[0]
        key, *keys = jax.random.split(key, depth + 1)
        x, keys = dropout(x, key, dropout_rate), jnp.stack(keys)

    def step(x, block_and_key):
        x, weights = encoder_block(x, *block_and_key, dropout_rate)
        return x, weights if return_attention else None

    policy = None if remat else jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    step = jax.checkpoint(step, policy=policy, prevent_cse=False)
    # The arrays of all L blocks are stacked, [L, ...]; scan runs the same step on slice after slice.
    # A loop in Python would do too, but XLA would compile every block anew.
    x, weights = jax.lax.scan(step, x, (encoder["encoderblock"], keys))

    x = layer_norm(x, **encoder["encoder_norm"])[:, 0]  # the class token: [B, D]
    if "pre_logits" in params:  # only the released ImageNet-21k checkpoints have it
        x = jnp.tanh(linear(x, **params["pre_logits"]))
    logits = linear(x.astype(jnp.float32), **params["head"])  # [B, K]
    return (logits, weights) if return_attention else logits


def init_params(key, model, image_size, num_classes):
    """Random parameters for training from scratch: a nested dict of float32 arrays.

    model: a name for `parse_model`, or the five numbers that it returns. image_size in pixels.
    Names and distributions are those of the released code; the arrays of the L blocks are stacked,
    [L, ...], under Transformer/encoderblock. Raises ValueError where the name is unknown or the
    image size is no multiple of the patch size.
    """
    patch, d, depth, heads, hidden = parse_model(model) if isinstance(model, str) else model
    if patch < 1 or image_size < patch or image_size % patch:
        raise ValueError(f"image size {image_size} is not a multiple of the patch size {patch}")
    init, keys = jax.nn.initializers, iter(jax.random.split(key, 14))

    def layers(inputs, outputs, bias_init=init.zeros):
        """L linear layers: kernels [L, *inputs, *outputs], biases [L, *outputs]."""
        in_axis, out_axis = tuple(range(1, 1 + len(inputs))), tuple(range(-len(outputs), 0))
        xavier = init.xavier_uniform(in_axis, out_axis, batch_axis=0)
        return {
            "kernel": xavier(next(keys), (depth, *inputs, *outputs)),
            "bias": bias_init(next(keys), (depth, *outputs)),
        }

    def norm(*shape):
        return {"scale": jnp.ones(shape), "bias": jnp.zeros(shape)}

    split = (heads, d // heads)
    small = init.normal(1e-6)
    lecun = init.lecun_normal(in_axis=(0, 1, 2))
    grid = image_size // patch
    return {
        "embedding": {"kernel": lecun(next(keys), (patch, patch, 3, d)), "bias": jnp.zeros(d)},
        "cls": jnp.zeros((1, 1, d)),
        "Transformer": {
            "posembed_input": {
                "pos_embedding": init.normal(0.02)(next(keys), (1, 1 + grid * grid, d)),
            },
            "encoderblock": {
                "LayerNorm_0": norm(depth, d),
                "MultiHeadDotProductAttention_1": {
                    "query": layers((d,), split),
                    "key": layers((d,), split),
                    "value": layers((d,), split),
                    "out": layers(split, (d,)),
                },
                "LayerNorm_2": norm(depth, d),
                "MlpBlock_3": {
                    "Dense_0": layers((d,), (hidden,), small),
                    "Dense_1": layers((hidden,), (d,), small),
                },
            },
            "encoder_norm": norm(d),
        },
        "head": {"kernel": jnp.zeros((d, num_classes)), "bias": jnp.zeros(num_classes)},
    }


# ==================================================================================================
# 2. Weights
# ==================================================================================================

RELEASED = "https://storage.googleapis.com/vit_models/"
AUGREG = {  # the recommended checkpoint of each model that only the AugReg paper released
    "ViT-Ti_16": "Ti_16-i21k-300ep-lr_0.001-aug_none-wd_0.03-do_0.0-sd_0.0",
    "ViT-S_16": "S_16-i21k-300ep-lr_0.001-aug_light1-wd_0.03-do_0.0-sd_0.0",
    "ViT-S_32": "S_32-i21k-300ep-lr_0.001-aug_none-wd_0.1-do_0.0-sd_0.0",
    "ViT-B_8": "B_8-i21k-300ep-lr_0.001-aug_medium1-wd_0.1-do_0.0-sd_0.0",
}


class BadInput(ValueError):
    """What the user can put right. The command line prints it as one line and exits with 2."""


def flatten(tree, prefix=""):
    """{"a": {"b": x}} -> {"a/b": x}."""
    if not isinstance(tree, dict):
        return {prefix: tree}
    return {k: v for name, sub in tree.items()
            for k, v in flatten(sub, f"{prefix}/{name}" if prefix else name).items()}


def unflatten(flat):
    """{"a/b": x} -> {"a": {"b": x}}."""
    tree = {}
    for name, value in flat.items():
        *parents, leaf = name.split("/")
        functools.reduce(lambda node, part: node.setdefault(part, {}), parents, tree)[leaf] = value
    return tree


def unstack(params):
    """Nested parameters -> {released name: array}, the L stacked blocks taken apart."""
    flat = {}
    for name, value in flatten(params).items():
        if "/encoderblock/" in name:
            for i in range(value.shape[0]):
                flat[name.replace("/encoderblock/", f"/encoderblock_{i}/")] = value[i]
        else:
            flat[name] = value
    return flat


def released_names(flat):
    """{name: array} as a file has it -> the same under the names of the released checkpoints."""
    for prefix in ("opt/target/", "params/"):
        if f"{prefix}cls" in flat:
            flat = {k.removeprefix(prefix): v for k, v in flat.items() if k.startswith(prefix)}
    for new, released in (("MultiHeadDotProductAttention_0", "MultiHeadDotProductAttention_1"),
                          ("LayerNorm_1", "LayerNorm_2"), ("MlpBlock_0", "MlpBlock_3")):
        flat = {k.replace(f"/{new}/", f"/{released}/"): v for k, v in flat.items()}
    return {k: v for k, v in flat.items() if k != "class_names" and not k.startswith("train/")}


def expected_shapes(flat):
    """{released name: array} -> {released name: shape} of the whole model that these belong to.

    Raises KeyError or ValueError where its hyper-parameters cannot be read off.
    """
    block = "Transformer/encoderblock_0/"
    patch, _, _, width = flat["embedding/kernel"].shape
    _, heads, _ = flat[block + "MultiHeadDotProductAttention_1/query/kernel"].shape
    _, hidden = flat[block + "MlpBlock_3/Dense_0/kernel"].shape
    _, tokens, _ = flat["Transformer/posembed_input/pos_embedding"].shape
    _, num_classes = flat["head/kernel"].shape
    depth = len({name.split("/")[1] for name in flat if "/encoderblock_" in name})
    model, image_size = (patch, width, depth, heads, hidden), math.isqrt(tokens - 1) * patch
    leaves = jax.eval_shape(  # only shapes: nothing is computed
        lambda key: unstack(init_params(key, model, image_size, num_classes)), jax.random.key(0))
    shapes = {name: leaf.shape for name, leaf in leaves.items()}
    if "pre_logits/kernel" in flat:
        shapes |= {"pre_logits/kernel": (width, width), "pre_logits/bias": (width,)}
    return shapes


def load_checkpoint(path):
    """Reads a checkpoint as it is: nested dict of float32 NumPy arrays, ready for `forward`.

    Takes the released .npz files and those of newer Flax code, which counts layers anew and puts
    everything under opt/target/ or params/. Raises BadInput where the file is damaged, is no ViT,
    or has entries that are missing, unknown, misshapen or not finite.
    """
    flat = released_names(read_npz(path))
    try:
        expected = expected_shapes(flat)
    except (KeyError, ValueError) as error:
        raise BadInput(f"{path} is not a ViT checkpoint (looking for {error})") from None
    wrong = []
    for name in sorted(expected | flat):
        found = flat[name].shape if name in flat else "nothing"
        if found != expected.get(name):
            wrong.append(f"{name} should be {expected.get(name, 'absent')}, is {found}")
        elif flat[name].dtype.kind != "f" or not np.isfinite(flat[name]).all():
            wrong.append(f"{name} should be finite floats, is {flat[name].dtype} with others")
    if wrong:
        more = f"; and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise BadInput(f"{path} does not hold a whole ViT: {'; '.join(wrong[:3])}{more}")
    groups = {}  # the arrays of blocks 0, 1, ... under one name
    for name in expected:
        group = groups.setdefault(re.sub(r"encoderblock_\d+", "encoderblock", name), [])
        group.append(flat[name].astype(np.float32, copy=False))
    return unflatten({name: np.stack(group) if "encoderblock" in name else group[0]
                      for name, group in groups.items()})


def resize_position_embeddings(embeddings, grid):
    """Position embeddings [1, 1 + g*g, D] -> [1, 1 + grid*grid, D], for another image size.

    Bilinear between the g x g patches, corner patches kept where they are (paper, section 3.2; the
    release does it with scipy.ndimage.zoom, order 1). The class token's row stays as it is.
    """
    cls, patches = embeddings[:, :1], embeddings[0, 1:]
    old = math.isqrt(len(patches))
    at = np.linspace(0, old - 1, grid)  # the new rows (and columns), in units of the old ones
    weights = np.maximum(0, 1 - abs(at[:, None] - np.arange(old)))  # [grid, g], rows sum to 1
    patches = np.einsum("ia,jb,abd->ijd", weights, weights, patches.reshape(old, old, -1),
                        optimize=True)
    return np.concatenate([cls, patches.reshape(1, grid * grid, -1)], axis=1).astype(np.float32)


def at_image_size(params, image_size):
    """The same parameters for image_size pixels: position embeddings resized where necessary."""
    patch, embedded = model_of(params)[0], params["Transformer"]["posembed_input"]
    if image_size < patch or image_size % patch:
        raise BadInput(f"--image_size={image_size} is not a multiple of the patch size {patch}; "
                       f"{max(1, round(image_size / patch)) * patch} is")
    embedded = resize_position_embeddings(embedded["pos_embedding"], image_size // patch)
    encoder = params["Transformer"] | {"posembed_input": {"pos_embedding": embedded}}
    return params | {"Transformer": encoder}


def load_pretrained(path, image_size, num_classes):
    """Reads a checkpoint for fine-tuning (paper, section 3.2): nested dict of float32 arrays.

    Position embeddings are resized to image_size pixels, pre_logits is dropped, and the head is
    replaced by zeros for num_classes. Raises BadInput as `load_checkpoint` and `at_image_size` do.
    """
    params = at_image_size(load_checkpoint(path), image_size)
    params.pop("pre_logits", None)
    width = params["cls"].shape[2]
    zeros = functools.partial(np.zeros, dtype=np.float32)
    return params | {"head": {"kernel": zeros((width, num_classes)), "bias": zeros(num_classes)}}


def save_checkpoint(path, params, class_names=(), **train):
    """Writes params in the released format (.npz, released names), whole or not at all.

    class_names: K strings, kept as an entry of that name. train: further arrays, under train/.
    Raises BadInput where the disk refuses; a file that was there before then stays.
    """
    entries = {name: np.asarray(value) for name, value in unstack(params).items()}
    if len(class_names):
        entries["class_names"] = np.array(class_names, dtype=str)
    entries |= {f"train/{name}": value for name, value in train.items()}
    with replacing(path) as file:
        np.savez(file, **entries)


def model_of(params):
    """The numbers that `parse_model` gives, read off parameters: (P, D, L, A, MLP width)."""
    block = params["Transformer"]["encoderblock"]
    depth, width, heads, _ = block["MultiHeadDotProductAttention_1"]["query"]["kernel"].shape
    hidden = block["MlpBlock_3"]["Dense_0"]["kernel"].shape[2]
    return params["embedding"]["kernel"].shape[0], width, depth, heads, hidden


def image_size_of(params):
    """The image size in pixels that the position embeddings of params are for."""
    tokens = params["Transformer"]["posembed_input"]["pos_embedding"].shape[1]
    return math.isqrt(tokens - 1) * params["embedding"]["kernel"].shape[0]


def released_url(model):
    """The address of the released ImageNet-21k checkpoint of a model, "ViT-B_16" for example."""
    if model in ("ViT-B_16", "ViT-B_32", "ViT-L_16", "ViT-L_32", "ViT-H_14"):
        return f"{RELEASED}imagenet21k/{model}.npz"
    if model in AUGREG:
        return f"{RELEASED}augreg/{AUGREG[model]}.npz"
    raise BadInput(f"no checkpoint of {model} was released; name a file with --pretrained=FILE, or "
                   "train from scratch with --pretrained=none")


# ==================================================================================================
# 3. Images
# ==================================================================================================
#
# A dataset is a dict of "classes", the K class names, and two splits, "train" and "test". A split
# is (n, read), where read(i), 0 <= i < n, gives a Pillow image in RGB and its label, an int.

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")  # none of them runs a program


def decode(file, name):
    """A path, or a file object, of an encoded image -> Pillow image in RGB, upright.

    Any size and mode: grey (16 bit too), palette, alpha (left out), CMYK. Raises BadInput with the
    name where the image is unreadable, truncated, or so large that it may be an attack (Pillow's
    limit, 179 million pixels).
    """
    try:
        with Image.open(file, formats=FORMATS) as image:
            image = ImageOps.exif_transpose(image)
            if image.mode.startswith("I"):  # 16 bits a pixel; convert("RGB") would clip
                image = Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8))
            return image.convert("RGBA" if "transparency" in image.info else "RGB").convert("RGB")
    except Exception as error:  # a damaged file makes Pillow raise nearly anything
        raise BadInput(f"cannot read the image {name}: {error}") from None


def draw_digit(index, seed):
    """A digit in Pillow's built-in font: (32 x 32 RGB image, label = index modulo 10)."""
    rng, label = np.random.default_rng([seed, index]), index % 10
    ink, paper = int(rng.integers(160, 256)), int(rng.integers(0, 60))
    image = Image.new("L", (32, 32), paper)
    middle = tuple(16 + rng.integers(-3, 4, size=2))
    ImageDraw.Draw(image).text(middle, str(label), ink, digit_font(rng.integers(22, 31)), "mm")
    image = image.rotate(rng.uniform(-15, 15), Image.Resampling.BILINEAR, fillcolor=paper)
    noisy = np.asarray(image) + rng.normal(0, 8, (32, 32))
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).convert("RGB"), label


digit_font = functools.cache(ImageFont.load_default)


def digits():
    """8,000 digits to learn from and 1,000 to test, drawn when asked for; every time the same."""
    return {
        "train": (8000, functools.partial(draw_digit, seed=0)),
        "test": (1000, functools.partial(draw_digit, seed=1)),
        "classes": [str(label) for label in range(10)],
    }


CIFAR = {  # address and SHA-256 of the authors' binary archives; label bytes a record; class names
    "cifar10": ("https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
                "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
                1, "batches.meta.txt"),
    "cifar100": ("https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz",
                 "58a81ae192c23a4be8b1804d68e518ed807d710a4eb253b1f2a199162a40d8ec",
                 2, "fine_label_names.txt"),
}


def cifar(name, data_dir):
    """CIFAR-10 or CIFAR-100: the first 98 % of the training images (as the release), all test ones.

    The archive is read in place, nothing is extracted. A record is 1 label byte (CIFAR-100: coarse,
    then fine label) and 3 * 32 * 32 pixel bytes, the red plane first.
    """
    url, sha256, label_bytes, names_file = CIFAR[name]
    path = fetch(url, Path(data_dir, "downloads"), sha256)
    members = {}
    try:
        with tarfile.open(path) as archive:
            for member in archive:
                if member.isfile() and member.name.endswith((".bin", ".txt")):
                    members[Path(member.name).name] = archive.extractfile(member).read()
        classes = members[names_file].decode().split()
        splits = {}
        for split, fraction in (("train", 0.98), ("test", 1.0)):
            files = sorted(file for file in members if file.endswith(".bin")
                           and ("test" in file) == (split == "test"))
            records = np.frombuffer(b"".join(members[file] for file in files), np.uint8)
            records = records.reshape(-1, label_bytes + 3 * 32 * 32)
            records = records[: round(len(records) * fraction)]
            images = records[:, label_bytes:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
            labels = records[:, label_bytes - 1].tolist()
            splits[split] = (len(images), lambda i, images=images, labels=labels:
                             (Image.fromarray(np.ascontiguousarray(images[i])), labels[i]))
    except (tarfile.TarError, EOFError, OSError, zlib.error, KeyError, ValueError) as error:
        raise BadInput(f"{path} is damaged ({error}); delete it to fetch it again") from None
    return splits | {"classes": classes}


def image_folder(path):
    """A folder of {train,test}/CLASS/*.jpg (png, webp, ...; val will do for test) as a dataset.

    A folder of CLASS/*.jpg is split 9 : 1, every time the same way. Raises BadInput where there is
    no image, less than two classes, or a class in test that training lacks.
    """
    Image.init()
    suffixes = {s for s, image_format in Image.registered_extensions().items()
                if image_format in FORMATS}

    def images(root):
        """[(path, class name)] of all images in the class folders of root, sorted."""
        return [(file, folder.name) for folder in sorted(Path(root).iterdir()) if folder.is_dir()
                for file in sorted(folder.rglob("*")) if file.suffix.lower() in suffixes]

    tests = [name for name in ("test", "val", "validation") if Path(path, name).is_dir()]
    if Path(path, "train").is_dir() and tests:
        train, test = images(Path(path, "train")), images(Path(path, tests[0]))
    else:
        files = images(path)
        order = np.random.default_rng(0).permutation(len(files))
        cut = math.ceil(len(files) * 0.9)
        train, test = ([files[i] for i in part] for part in (order[:cut], order[cut:]))
    if not train or not test:
        raise BadInput(f"{path} holds no images for {'training' if not train else 'testing'}; "
                       "wanted: {train,test}/CLASS/*.jpg (or png, webp, ...), or CLASS/*.jpg")
    classes = sorted({name for _, name in train})
    unknown = sorted({name for _, name in test} - set(classes))
    if unknown or len(classes) < 2:
        problem = f"test images of class {unknown[0]!r} but none" if unknown else "one class only"
        raise BadInput(f"{path} has {problem} to train on ({', '.join(classes[:5])})")

    def split(files):
        return len(files), lambda i: (decode(files[i][0], files[i][0]), classes.index(files[i][1]))

    return {"train": split(train), "test": split(test), "classes": classes}


def tfds_dataset(name, data_dir, splits):
    """Any TFDS image-classification dataset, read as ArrayRecord, without TensorFlow.

    splits: for example ("train[:99%]", "validation"), or None to choose by what there is. Raises
    BadInput where TFDS does not know the name, or the dataset is not prepared and cannot be.
    """
    import tensorflow_datasets as tfds  # here, since it takes as long to import as all the rest

    try:
        builder = tfds.builder(name, data_dir=data_dir)
    except (ValueError, tfds.core.registered.DatasetNotFoundError):
        known = [*PRESETS, *tfds.list_builders(with_community_datasets=False)]
        near = difflib.get_close_matches(name.split("/")[0], known, n=3)
        raise BadInput(f"{name!r} is no file, folder or TFDS dataset"
                       + (f"; did you mean {' or '.join(near)}?" if near else "")) from None
    ready = builder.info.splits and "array_record" in builder.info.file_format.value
    if not ready:
        make = (f"tfds.builder({name!r}, data_dir={str(data_dir)!r}, file_format='array_record')"
                ".download_and_prepare()")
        if importlib.util.find_spec("tensorflow") is None:
            raise BadInput(f"{name} must be prepared once, for which TFDS needs TensorFlow: pip "
                           "install tensorflow-cpu, then python -c \"import tensorflow_datasets as "
                           f"tfds; {make}\"")
        builder = tfds.builder(name, data_dir=data_dir, file_format="array_record")
        builder.download_and_prepare()
    if builder.info.supervised_keys is None or len(builder.info.supervised_keys) != 2:
        raise BadInput(f"{name} is no image-classification dataset (TFDS lists no image and label)")
    image_key, label_key = builder.info.supervised_keys
    if not isinstance(builder.info.features[label_key], tfds.features.ClassLabel):
        raise BadInput(f"{name} is no image-classification dataset: its {label_key!r} is no class")
    there = builder.info.splits
    tests = [split for split in ("test", "validation") if split in there]
    splits = splits or (("train", tests[0]) if tests else ("train[:90%]", "train[90%:]"))
    dataset = {"classes": builder.info.features[label_key].names}
    for split, wanted in zip(("train", "test"), splits, strict=True):
        source = builder.as_data_source(
            split=wanted, decoders={image_key: tfds.decode.SkipDecoding()})

        def read(i, source=source, wanted=wanted):
            example = source[i]
            image = decode(io.BytesIO(example[image_key]), f"{i} of {name}, split {wanted}")
            return image, int(example[label_key])

        dataset[split] = (len(source), read)
    return dataset


def load_data(name, data_dir):
    """The dataset of a name or path from the command line."""
    if name == "digits":
        return digits()
    if name in CIFAR:
        return cifar(name, data_dir)
    if Path(name).is_dir():
        return image_folder(name)
    return tfds_dataset(name, data_dir, PRESETS.get(name, {}).get("splits"))


def inception_crop(rng, width, height):
    """A random box (left, upper, right, lower) in pixels, as tf.image.sample_distorted_bounding_box.

    Aspect ratio (width : height) uniform in [3/4, 4/3], then the height uniform between those where
    the box has 5 % of the image's area and where it fills the image; the place is uniform.
    """
    aspect = rng.uniform(3 / 4, 4 / 3)
    largest = min(height, width / aspect)
    smallest = min(largest, math.sqrt(0.05 * width * height / aspect))
    h = max(1, round(rng.uniform(smallest, largest)))
    w = min(width, max(1, round(h * aspect)))
    left, upper = rng.integers(width - w + 1), rng.integers(height - h + 1)
    return left, upper, left + w, upper + h


def training_image(image, size, rng, augment="inception"):
    """Random crop, resized, mirrored half of the time: Pillow RGB -> uint8 [size, size, 3]."""
    if augment == "none":
        return test_image(image, size)
    box = inception_crop(rng, *image.size)
    pixels = np.asarray(image.resize((size, size), Image.Resampling.BILINEAR, box))
    return pixels[:, ::-1] if rng.random() < 0.5 else pixels


def test_image(image, size):
    """The whole image resized to the square, bilinear: Pillow RGB -> uint8 [size, size, 3]."""
    return np.asarray(image.resize((size, size), Image.Resampling.BILINEAR))


@functools.lru_cache(maxsize=2)
def epoch_order(seed, epoch, n):
    """The order in which an epoch goes through n examples: a permutation, int [n]."""
    return np.random.default_rng([seed, 0, epoch]).permutation(n)


def training_example(split, size, augment, seed, index):
    """The index-th example since the first step: (uint8 [size, size, 3], label).

    A pure function of its arguments (index = step * batch size + position in the batch): a resumed
    run, or one on other devices, sees what any other would.
    """
    n, read = split
    epoch, place = divmod(index, n)
    image, label = read(int(epoch_order(seed, epoch, n)[place]))
    return training_image(image, size, np.random.default_rng([seed, 1, index]), augment), label


def test_example(split, size, index):
    """Test image number index; past the end a black one with label -1, which no guess can hit."""
    n, read = split
    if index >= n:
        return np.zeros((size, size, 3), np.uint8), -1
    image, label = read(index)
    return test_image(image, size), label


def batches(example, indices, size, ahead=3):
    """For each array of indices [...] yields images, uint8 [..., size, size, 3], and labels [...].

    example(index) -> (image, label). A pool of threads works `ahead` batches before the device
    (Pillow lets threads run in parallel); what a thread raises is raised here.
    """
    threads = min(32, os.cpu_count() or 1)

    def fill(images, labels, indices):
        for i, index in enumerate(indices):
            images[i], labels[i] = example(int(index))

    def submit(indices):
        images = np.empty((indices.size, size, size, 3), np.uint8)
        labels = np.empty(indices.size, np.int32)
        parts = zip(*(np.array_split(x, threads) for x in (images, labels, indices.ravel())))
        return images, labels, indices.shape, [pool.submit(fill, *part) for part in parts]

    def finish(images, labels, shape, futures):
        for future in futures:
            future.result()
        return images.reshape(*shape, size, size, 3), labels.reshape(shape)

    pool, waiting = ThreadPoolExecutor(threads), collections.deque()
    try:
        for batch in indices:
            waiting.append(submit(batch))
            if len(waiting) > ahead:
                yield finish(*waiting.popleft())
        while waiting:
            yield finish(*waiting.popleft())
    finally:
        pool.shutdown(cancel_futures=True)


# ==================================================================================================
# 4. Learning
# ==================================================================================================


def to_pixels(images, dtype=jnp.float32):
    """uint8 [...] -> [-1, 1] in dtype, as the released models want it."""
    return ((images.astype(jnp.float32) - 127.5) / 127.5).astype(dtype)


def cross_entropy(logits, targets):
    """Mean over the batch of -sum(targets * log softmax(logits)): [B, K], [B, K] -> []."""
    return -(targets * jax.nn.log_softmax(logits)).sum(axis=-1).mean()


def mixup(images, targets, weight):
    """Blends each image and its target with those of the batch reversed (arXiv 1710.09412).

    images [B, ...], targets [B, K], weight of the first [] in [0, 1] -> the same shapes.
    """
    return tuple(weight * x + (1 - weight) * x[::-1] for x in (images, targets))


def learning_rate(step, base_lr, total_steps, warmup_steps, decay_type="cosine"):
    """Linear warm-up from 0, then cosine to 0 or linear to 1e-5 (released recipe): int -> float32.

    The first update uses step 0. step may be an array.
    """
    progress = jnp.clip((step - warmup_steps) / (total_steps - warmup_steps), 0, 1)
    if decay_type == "cosine":
        rate = base_lr * (1 + jnp.cos(jnp.pi * progress)) / 2
    else:
        rate = 1e-5 + (base_lr - 1e-5) * (1 - progress)
    return rate * jnp.minimum(1, step / warmup_steps) if warmup_steps else rate


def clip_by_global_norm(grads, max_norm):
    """Scales all gradients so that their common L2 norm is at most max_norm -> (grads, norm)."""
    norm = jnp.sqrt(sum(jnp.vdot(g, g) for g in jax.tree.leaves(grads)))
    scale = jnp.minimum(1, max_norm / norm)
    return jax.tree.map(lambda g: g * scale, grads), norm


def sgd_init(params, dtype=jnp.bfloat16):
    """Momentum zero for every parameter, same shapes. The release keeps it in bfloat16."""
    return jax.tree.map(lambda p: jnp.zeros(p.shape, dtype), params)


def sgd_update(params, momentum, grads, learning_rate, decay=0.9):
    """One step of SGD with momentum, not Nesterov, no weight decay -> (params, momentum).

    The old momentum decays in its own dtype; the sum and the update are float32.
    """
    new = jax.tree.map(lambda m, g: decay * m + g, momentum, grads)
    params = jax.tree.map(lambda p, m: p - learning_rate * m, params, new)
    return params, jax.tree.map(lambda m, n: n.astype(m.dtype), momentum, new)


def train_step(state, images, labels, stop, *, seed, base_lr, total_steps, warmup_steps, decay_type,
               grad_norm_clip, dropout, mixup_alpha, dtype, remat):
    """One update, as each device runs it on its share of the batch, inside of `jax.pmap`.

    state: params, momentum (alike on all devices) and step, int32. images: uint8 [accum_steps, B,
    H, W, 3], labels: int32 [accum_steps, B], stop: float32, above 0 where a host wants to stop.
    Returns the new state and (mean loss, gradient norm, stop over all hosts).

    pmap compiles the function once and runs it on all devices, each with its own slice of the
    arguments' first axis; `lax.pmean` over its axis, "devices", is the one moment at which numbers
    cross from device to device: it averages the gradients (and what else is to be the same).
    """
    params, step = state["params"], state["step"]
    key = jax.random.fold_in(jax.random.key(seed), step)
    device, accum_steps = jax.lax.axis_index("devices"), images.shape[0]
    num_classes = params["head"]["bias"].shape[0]

    def loss(params, images, labels, key):
        images, targets = to_pixels(images), jax.nn.one_hot(labels, num_classes)
        if mixup_alpha:  # one weight a batch, the same on all devices: its key knows only the step
            weight = jax.random.beta(jax.random.fold_in(key[0], 0), mixup_alpha, mixup_alpha)
            images, targets = mixup(images, targets, weight)
        logits = forward(params, images.astype(dtype), key[1] if dropout else None, dropout, remat)
        return cross_entropy(logits, targets)

    def accumulate(total, micro_batch):
        images, labels, i = micro_batch
        keys = key, jax.random.fold_in(key, 1 + device * accum_steps + i)
        return jax.tree.map(jnp.add, total, jax.value_and_grad(loss)(params, images, labels, keys)
                            ), None

    total = 0.0, jax.tree.map(jnp.zeros_like, params)
    total, _ = jax.lax.scan(accumulate, total, (images, labels, jnp.arange(accum_steps)))
    value, grads = jax.tree.map(lambda x: x / accum_steps, total)
    value, grads, stop = jax.lax.pmean((value, grads, stop), "devices")
    grads, norm = clip_by_global_norm(grads, grad_norm_clip)
    rate = learning_rate(step, base_lr, total_steps, warmup_steps, decay_type)
    params, momentum = sgd_update(params, state["momentum"], grads, rate)
    return {"params": params, "momentum": momentum, "step": step + 1}, (value, norm, stop)


def eval_step(params, images, labels, correct, *, dtype):
    """correct [] plus how many of uint8 images [B, H, W, 3] get their label [B], on all devices."""
    guesses = forward(params, to_pixels(images, dtype)).argmax(axis=-1)
    return correct + jax.lax.psum((guesses == labels).sum(), "devices")


# ==================================================================================================
# 5. Safety: files that are whole or not there (skip it at first reading)
# ==================================================================================================


@contextlib.contextmanager
def replacing(path):
    """A file to write to that takes the place of path in one instant, when complete and on disk."""
    path = Path(path)
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(partial, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        raise BadInput(f"cannot write {path}: {error.strerror or error}") from None
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


def read_npz(path):
    """{name: array} of an .npz file, each array against its checksum; nothing is unpickled."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = [name for name in archive.namelist() if name.endswith(".npy")]
            flat = {name[:-4]: np.load(io.BytesIO(archive.read(name)), allow_pickle=False)
                    for name in names}
    except FileNotFoundError:
        raise BadInput(f"no such file: {path}") from None
    except Exception as error:  # damage shows in many ways: zipfile, zlib, struct, NumPy's header
        raise BadInput(f"{path} is no .npz file of arrays, or damaged ({error})") from None
    if not flat or not all(array.size for array in flat.values()):
        raise BadInput(f"{path} holds no arrays, or empty ones")
    return flat


def fetch(url, folder, sha256=None):
    """Downloads url into folder unless it is there already -> path.

    The file gets its name when it is complete and, with sha256, verified. Raises BadInput.
    """
    path = Path(folder).expanduser() / url.rsplit("/", 1)[-1]
    if path.exists():
        return path
    by_hand = f"to go on without network, put the file at {path}"
    digest, done, shown = hashlib.sha256(), 0, 0
    try:
        with urllib.request.urlopen(url, timeout=60) as response, replacing(path) as file:
            total = int(response.headers.get("Content-Length", 0))
            while block := response.read(1 << 20):
                file.write(block)
                digest.update(block)
                done += len(block)
                if done - shown > total / 20:
                    shown = done
                    say(f"fetching {url}: {done >> 20} of {total >> 20} MiB", update=True)
            if total and done != total:
                raise BadInput(f"{url} broke off after {done} of {total} bytes; try again, or {by_hand}")
            if sha256 not in (None, digest.hexdigest()):
                raise BadInput(f"{url} has the wrong SHA-256 {digest.hexdigest()}, not {sha256}")
    except (urllib.error.URLError, http.client.HTTPException, TimeoutError, ConnectionError) as error:
        raise BadInput(f"cannot fetch {url} ({error}); {by_hand}") from None
    say(f"fetched {path}")
    return path


def save_state(path, state, config, class_names):
    """Writes a training state (on one device, or NumPy) with all that `load_state` wants."""
    momentum = {f"momentum/{name}": np.asarray(value)
                for name, value in flatten(state["momentum"]).items()}
    # NumPy's file format does not know bfloat16: two bytes are two bytes
    momentum = {name: value.view(np.uint16) if value.dtype == jnp.bfloat16 else value
                for name, value in momentum.items()}
    save_checkpoint(path, state["params"], class_names, step=state["step"],
                    config=json.dumps(config), **momentum)


def load_state(path, config):
    """The training state in a file of `save_state`. Raises BadInput where its run was another."""
    flat = read_npz(path)
    if "train/config" not in flat:
        raise BadInput(f"{path} is not of a training run; choose another --logdir")
    theirs = json.loads(str(flat["train/config"]))
    for name in config:
        if config[name] != theirs.get(name):
            raise BadInput(f"{path} belongs to a run with --{name}={theirs.get(name)}, not "
                           f"{config[name]}; choose another --logdir, or the same options")
    params = load_checkpoint(path)
    momentum = {name: flat[f"train/momentum/{name}"] for name in flatten(sgd_init(params))}
    momentum = {name: value.view(jnp.bfloat16) if value.dtype == np.uint16 else value
                for name, value in momentum.items()}
    return {"params": params, "momentum": unflatten(momentum), "step": flat["train/step"]}


def say(text, update=False):
    """Prints a line, on the first host only. On a terminal the next line overwrites an update."""
    if jax.process_index() == 0:
        terminal = sys.stdout.isatty()
        print(("\r\x1b[K" if terminal else "") + text, end="" if update and terminal else "\n",
              flush=True)


@contextlib.contextmanager
def catching_signals():
    """Within, Ctrl-C and SIGTERM only append to the list that this gives; a second one kills."""
    caught = []

    def handler(number, _):
        caught.append(number)
        signal.signal(number, signal.SIG_DFL)

    before = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield caught
    finally:
        for number, action in before.items():
            signal.signal(number, action)


# ==================================================================================================
# 6. Training
# ==================================================================================================

PEAK_FLOPS = {  # dense bfloat16 products a second, by a part of JAX's name for the device
    "H100": 989e12, "H200": 989e12, "A100": 312e12, "V100": 125e12, "L4": 121e12,
    "TPU v4": 275e12, "TPU v5 lite": 197e12, "TPU v5p": 459e12, "TPU v6 lite": 918e12,
}


def forward_flops(params):
    """Floating-point operations of the matrix products of `forward` for one image: int."""
    tokens = params["Transformer"]["posembed_input"]["pos_embedding"].shape[1]
    _, width, depth, _, _ = model_of(params)
    kernels = sum(array.size for name, array in flatten(params["Transformer"]).items()
                  if name.endswith("kernel"))
    patches = (tokens - 1) * params["embedding"]["kernel"].size
    return 2 * (tokens * kernels + 2 * depth * width * tokens**2 + patches)


def replicate(tree):
    """Copies the arrays to each device of this host: shapes [...] -> [local devices, ...]."""
    copy = jax.pmap(lambda _, tree: tree, in_axes=(0, None))
    return copy(np.arange(jax.local_device_count()), tree)


def unreplicate(tree):
    """What `replicate` was given, as NumPy arrays, from this host's first device."""
    return jax.tree.map(lambda x: np.asarray(x.addressable_data(0))[0], tree)


def positions(batch_size, accum_steps, mirrored=False):
    """Which place of a batch goes where: int [local devices, accum_steps, B], for this host.

    mirrored: places i and batch_size - 1 - i mirror each other in one of these B, so that
    reversing the B images, as `mixup` does, is the same as reversing the batch.
    """
    shape = jax.process_count(), jax.local_device_count(), accum_steps
    parts = math.prod(shape)
    unit = parts * (2 if mirrored else 1)
    if batch_size % unit:
        raise BadInput(
            f"--batch_size={batch_size} does not divide by {parts // accum_steps} devices x "
            f"--accum_steps={accum_steps}{' x 2, for mixup' if mirrored else ''}; "
            f"{-(-batch_size // unit) * unit} does")
    places = np.arange(batch_size).reshape(parts, -1)
    if mirrored:
        front, back = places.reshape(2, parts, -1)
        places = np.concatenate([front, back[::-1]], axis=1)
    return places.reshape(*shape, -1)[jax.process_index()]


def evaluate(step, params, split, size, batch_size, caught=()):
    """The share of a split that is classified correctly, each image counted once: float.

    step: the pmapped `eval_step`; params: replicated. None if a signal was caught meanwhile.
    """
    n, shown = split[0], time.time()
    places = positions(batch_size, 1)[:, 0]
    indices = (first + places for first in range(0, n, batch_size))
    correct = replicate(np.int32(0))
    example = functools.partial(test_example, split, size)
    for i, (images, labels) in enumerate(batches(example, indices, size)):
        before, correct = correct, step(params, images, labels, correct)
        before.block_until_ready()  # at most one batch waits on the device
        if caught and jax.process_count() == 1:
            return None
        if time.time() - shown > 5:
            shown = time.time()
            say(f"evaluating: {i * batch_size} of {n} images", update=True)
    return int(unreplicate(correct)) / n


def train(options, data):
    """Fine-tunes or trains as options (a dict, see FLAGS) say -> exit status, 0 or 128 + signal.

    Everything lands in options["logdir"]: checkpoint.npz, metrics.csv, first_batch.png.
    """
    logdir, total, size = Path(options["logdir"]), options["total_steps"], options["image_size"]
    batch_size, accum_steps = options["batch_size"], options["accum_steps"]
    places = positions(batch_size, accum_steps, mirrored=options["mixup_alpha"] > 0)
    path, config = logdir / "checkpoint.npz", {name: options[name] for name in IDENTITY}
    if path.exists():
        state = load_state(path, config)
    else:
        params = initial_params(options, len(data["classes"]))
        state = {"params": params, "momentum": sgd_init(params), "step": np.int32(0)}
    start, flops = int(state["step"]), 3 * forward_flops(state["params"])
    peak = sum(peak for name, peak in PEAK_FLOPS.items() if name in jax.devices()[0].device_kind)
    hyper = {name: options[name] for name in (
        "seed", "base_lr", "total_steps", "warmup_steps", "decay_type", "grad_norm_clip", "dropout",
        "mixup_alpha", "dtype", "remat")}
    # donate: the old state's memory is used for the new one, instead of keeping both
    step_fn = jax.pmap(functools.partial(train_step, **hyper), "devices", donate_argnums=0)
    eval_fn = jax.pmap(functools.partial(eval_step, dtype=options["dtype"]), "devices")
    state = replicate(state)
    save = functools.partial(save_state, path, config=config, class_names=data["classes"])
    write_metrics = metrics_writer(logdir, start)

    def test(caught=()):
        accuracy = evaluate(eval_fn, state["params"], data["test"], size, batch_size // accum_steps,
                            caught)
        if accuracy is not None:
            say(f"test accuracy {accuracy:.2%} of {data['test'][0]} images, after {step} steps")
        return accuracy

    step, pending, accuracy = start, collections.deque(), None
    if start == total:
        say(f"{path} is finished, all {total} steps; evaluating only")
        test()
        return 0
    say(f"{len(jax.devices())} x {jax.devices()[0].device_kind}, {data['train'][0]} training images"
        + f", going on from step {start} of {path}" * (start > 0))
    example = functools.partial(
        training_example, data["train"], size, options["augment"], options["seed"])
    indices = (step * batch_size + places for step in range(start, total))
    clock, clock_step = time.time(), start
    with catching_signals() as caught:
        for step, (images, labels) in enumerate(batches(example, indices, size), start + 1):
            if step == 1:
                save_grid(logdir / "first_batch.png", images)
            stop = np.full(len(images), bool(caught), np.float32)
            state, results = step_fn(state, images, labels, stop)
            pending.append(results)
            logs, saves, evals = (
                step % options[every] == 0 or step == total
                for every in ("log_every", "checkpoint_every", "eval_every"))
            # Reading a result waits for it; reading that of the step before keeps the device busy.
            while len(pending) > (0 if logs or saves or evals or step == start + 1 else 1):
                loss, norm, stop = map(float, unreplicate(pending.popleft()))
                if not math.isfinite(loss + norm):
                    raise BadInput(f"loss {loss}, gradient norm {norm} at step {step - len(pending)}"
                                   "; try a lower --base_lr. The last good checkpoint, if any, is "
                                   f"{path}")
            if logs:
                seconds = (time.time() - clock) / (step - clock_step)
                speed = batch_size / seconds
                left = time.strftime("%H:%M:%S", time.gmtime(seconds * (total - step)))
                rate = float(learning_rate(step - 1, options["base_lr"], total,
                                           options["warmup_steps"], options["decay_type"]))
                used = f"  {flops * speed / peak / len(jax.devices()):.0%} of peak" if peak else ""
                say(f"step {step}/{total}  loss {loss:.4f}  lr {rate:.2e}  {speed:.1f} images/s"
                    f"{used}  {left} left", update=True)
            if saves:
                save(unreplicate(state))
            if evals:
                accuracy = test(caught)
            if logs or evals:
                write_metrics(step=step, loss=loss, learning_rate=rate, images_per_second=speed,
                              test_accuracy=accuracy if evals else None)
            if stop or (caught and jax.process_count() == 1):
                if not saves:
                    save(unreplicate(state))
                say(f"stopped after step {step}; the same command goes on from {path}")
                return 128 + (caught[0] if caught else signal.SIGTERM)
            if saves or evals or step == start + 1:
                clock, clock_step = time.time(), step
    return 0


def initial_params(options, num_classes):
    """The parameters to start from: released, from a file or address, or random."""
    model, pretrained, size = options["model"], options["pretrained"], options["image_size"]
    if pretrained == "none":
        try:
            key = jax.random.key(options["seed"])
            return jax.device_get(init_params(key, model, size, num_classes))
        except ValueError as error:
            raise BadInput(error) from None
    params = load_pretrained(find_checkpoint(options), size, num_classes)
    return params


def metrics_writer(logdir, start):
    """A function that appends a row to metrics.csv (and TensorBoard events, where installed)."""
    columns = ("step", "loss", "learning_rate", "images_per_second", "test_accuracy")
    path, rows = logdir / "metrics.csv", []
    if jax.process_index():
        return lambda **_: None
    if start and path.exists():
        with open(path, newline="") as file:
            rows = [row for row in csv.DictReader(file) if int(row["step"]) <= start]
    logdir.mkdir(parents=True, exist_ok=True)
    file = open(path, "w", newline="")
    writer = csv.DictWriter(file, columns)
    writer.writeheader()
    writer.writerows(rows)
    board = None
    if importlib.util.find_spec("tensorboardX"):
        import tensorboardX
        board = tensorboardX.SummaryWriter(str(logdir))

    def write(**row):
        writer.writerow(row)
        file.flush()
        for name, value in row.items():
            if board and value is not None and name != "step":
                board.add_scalar(name, value, row["step"])

    return write


def save_grid(path, images):
    """The first 64 of uint8 images [..., S, S, 3] as one picture, 8 in a row."""
    if jax.process_index() == 0:
        images = images.reshape(-1, *images.shape[-3:])[:64]
        size = images.shape[1]
        grid = Image.new("RGB", (min(8, len(images)) * size, -(-len(images) // 8) * size))
        for i, pixels in enumerate(images):
            grid.paste(Image.fromarray(pixels), (i % 8 * size, i // 8 * size))
        path.parent.mkdir(parents=True, exist_ok=True)
        grid.save(path)


# ==================================================================================================
# 7. Photos
# ==================================================================================================


def attention_rollout(weights):
    """How much each patch contributes to the class token: [L, B, A, N, N] -> [B, grid, grid].

    Mean over the heads, plus the identity for the residual connection, multiplied through the
    blocks (arXiv 2005.00928; paper, figure 6). The largest entry of each image becomes 1.
    """
    weights = weights.mean(axis=2)  # [L, B, N, N]
    weights = (weights + np.eye(weights.shape[-1])) / 2  # rows sum to 1
    rollout = functools.reduce(lambda below, above: above @ below, weights)  # [B, N, N]
    patches = rollout[:, 0, 1:]
    grid = math.isqrt(patches.shape[1])
    patches = patches / patches.max(axis=1, keepdims=True)
    return patches.reshape(-1, grid, grid)


def classify(options, paths):
    """Prints the five likeliest classes of each photo and writes NAME-attention.png of each."""
    file = find_checkpoint(options)
    params, names = load_checkpoint(file), read_npz(file).get("class_names")
    num_classes = len(params["head"]["bias"])
    if names is None and num_classes == 1000:
        import tensorflow_datasets as tfds
        names = tfds.builder("imagenet2012").info.features["label"].names
    size = options["image_size"] or image_size_of(params)
    run = jax.jit(functools.partial(forward, at_image_size(params, size), return_attention=True))
    for path in paths:
        photo = decode(path, path)
        logits, weights = run(to_pixels(test_image(photo, size)[None], options["dtype"]))
        probabilities = np.asarray(jax.nn.softmax(logits[0]))
        print(path)
        for label in probabilities.argsort()[: -6 : -1]:
            print(f"  {probabilities[label]:7.2%}  {names[label] if names is not None else label}")
        light = Image.fromarray(attention_rollout(np.asarray(weights))[0].astype(np.float32))
        light = np.asarray(light.resize(photo.size, Image.Resampling.BILINEAR))[..., None]
        lit = np.asarray(photo) * (0.15 + 0.85 * light)
        picture = np.concatenate([np.asarray(photo), lit.astype(np.uint8)], axis=1)
        Image.fromarray(picture).save(f"{Path(path).stem}-attention.png")
        print(f"  {Path(path).stem}-attention.png: where the class token looks")


# ==================================================================================================
# 8. Command line
# ==================================================================================================

FLAGS = {  # group: {flag: (default, meaning)}; a tuple lists the choices, its first is the default
    "model": {
        "model": ("ViT-B_16", "ViT-SIZE_PATCH, SIZE one of XS, Ti, S, B, L, H, any patch size"),
        "pretrained": ("released", "checkpoint to start from: a file, an address, `released` (that "
                                   "of ImageNet-21k), or `none` to train from scratch"),
        "dtype": (("float32", "bfloat16"), "dtype of the activations; parameters are float32"),
        "remat": (False, "keep less for the gradient and compute it again: less memory, slower"),
    },
    "data": {
        "image_size": (384, "side of the square that images are resized to, pixels"),
        "data_dir": ("~/tensorflow_datasets", "TFDS datasets; downloads in its folder downloads"),
        "augment": (("inception", "none"), "random crops and mirroring of training images, or not"),
        "mixup_alpha": (0.0, "blend pairs of images, weights from Beta(alpha, alpha); 0: never"),
    },
    "training": {
        "batch_size": (512, "images for one update, over all devices and accumulation steps"),
        "accum_steps": (8, "parts of a device's share of the batch, one after the other in memory"),
        "total_steps": (10_000, "updates"),
        "warmup_steps": (500, "updates during which the learning rate rises from 0"),
        "base_lr": (0.03, "the learning rate after warm-up"),
        "decay_type": (("cosine", "linear"), "how it falls after that"),
        "grad_norm_clip": (1.0, "largest L2 norm of all gradients together"),
        "dropout": (0.0, "dropout rate"),
        "seed": (0, "of the initial head, order, crops, dropout and mixup"),
    },
    "run": {
        "logdir": ("runs/DATA", "folder for checkpoint.npz, metrics.csv, first_batch.png"),
        "eval_every": (100, "steps between evaluations on the test images"),
        "log_every": (10, "steps between lines of progress"),
        "checkpoint_every": (1000, "steps between checkpoints"),
        "eval_only": (False, "evaluate --pretrained=FILE and stop"),
    },
    "several hosts (one command on each)": {
        "coordinator_address": ("", "HOST:PORT of the first host; `auto` on clusters JAX knows"),
        "num_processes": (1, "number of hosts"),
        "process_id": (0, "number of this host, from 0"),
    },
}
DEFAULTS = {name: default[0] if isinstance(default, tuple) else default
            for flags in FLAGS.values() for name, (default, _) in flags.items()}
PRESETS = {  # what replaces the defaults for a dataset; flags go before both
    "digits": {"model": "ViT-XS_8", "pretrained": "none", "image_size": 32, "augment": "none",
               "batch_size": 64, "accum_steps": 1, "total_steps": 800, "warmup_steps": 100,
               "base_lr": 0.1, "eval_every": 400, "log_every": 100},
    "cifar10": {"total_steps": 10_000},
    "cifar100": {"total_steps": 10_000},
    "imagenet2012": {"total_steps": 20_000, "splits": ("train[:99%]", "validation")},
}
# A run goes on only with the same of these:
IDENTITY = ("data", "model", "pretrained", "dtype", "image_size", "augment", "mixup_alpha", "batch_size",
            "accum_steps", "total_steps", "warmup_steps", "base_lr", "decay_type", "grad_norm_clip",
            "dropout", "seed")


def find_checkpoint(options):
    """--pretrained as a path; an address is fetched first, into the cache."""
    pretrained = options["pretrained"]
    if pretrained == "released":
        pretrained = released_url(options["model"])
    if pretrained.startswith(("http://", "https://")):
        return fetch(pretrained, Path(options["data_dir"], "downloads"))
    return Path(pretrained)


def parse_flags(argv):
    """The command line -> options: one dict of DATA, defaults, presets and flags."""
    parser = argparse.ArgumentParser(
        prog="vit.py", description=__doc__.split("\n\n")[0], allow_abbrev=False,
        argument_default=argparse.SUPPRESS)

    def refuse(message):
        raise BadInput(message)

    parser.error = refuse
    parser.add_argument("data", metavar="DATA", nargs="*", default=["digits"], help=(
        "digits (drawn, the default), cifar10, cifar100, imagenet2012 or any TFDS name, a folder "
        "of images, or image files to classify"))
    for title, flags in FLAGS.items():
        group = parser.add_argument_group(title)
        for name, (default, meaning) in flags.items():
            if isinstance(default, bool):
                kind = {"action": "store_true"}
            elif isinstance(default, tuple):
                kind = {"choices": default}
            else:
                kind = {"type": type(default), "metavar": type(default).__name__.upper()}
            presets = "".join(f"; {data}: {preset[name]}" for data, preset in PRESETS.items()
                              if preset.get(name, DEFAULTS[name]) != DEFAULTS[name])
            group.add_argument(f"--{name}", **kind,
                               help=f"{meaning} [{DEFAULTS[name]}{presets}]".replace("%", "%%"))
    flags, unknown = parser.parse_known_args(argv)
    if unknown:
        near = difflib.get_close_matches(unknown[0].split("=")[0], [f"--{n}" for n in DEFAULTS], 1)
        refuse(f"unknown flag {unknown[0]}" + (f"; did you mean {near[0]}?" if near else ""))
    flags = vars(flags)
    data = flags["data"][0].rstrip("/")
    options = DEFAULTS | PRESETS.get(data, {}) | {"logdir": f"runs/{data.strip('/.').replace('/', '-')}"}
    options |= flags | {"given": tuple(flags), "paths": flags["data"], "data": data}
    for name, value in options.items():
        at_least_one = name.endswith(("_every", "_size", "_steps")) and name != "warmup_steps"
        if isinstance(value, int | float) and not value >= at_least_one:
            refuse(f"--{name}={value} should be at least {int(at_least_one)}")
    if options["dropout"] >= 1:
        refuse(f"--dropout={options['dropout']} should be below 1")
    if options["warmup_steps"] >= options["total_steps"]:
        refuse(f"--warmup_steps={options['warmup_steps']} should be below "
               f"--total_steps={options['total_steps']}")
    return options


def run(options):
    """Does what the options say -> exit status."""
    # Compiled programs are kept on disk: the same command starts at once the next time.
    if not jax.config.jax_compilation_cache_dir:
        jax.config.update("jax_compilation_cache_dir", str(Path("~/.cache/vit.py").expanduser()))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    if options["coordinator_address"] == "auto":
        jax.distributed.initialize()
    elif options["coordinator_address"]:
        jax.distributed.initialize(*(
            options[name] for name in ("coordinator_address", "num_processes", "process_id")))
    if all(Path(path).is_file() for path in options["paths"]):
        return classify(options, options["paths"])
    if len(options["paths"]) > 1:
        missing = next(path for path in options["paths"] if not Path(path).is_file())
        raise BadInput(f"{missing} is not an image file; several DATA must all be image files")
    data = load_data(options["data"], Path(options["data_dir"]).expanduser())
    if not options["eval_only"]:
        return train(options, data)
    params = load_checkpoint(find_checkpoint(options))
    if len(params["head"]["bias"]) != len(data["classes"]):
        raise BadInput(f"{options['pretrained']} knows {len(params['head']['bias'])} classes, "
                       f"{options['data']} has {len(data['classes'])}")
    size = options["image_size"] if "image_size" in options["given"] else image_size_of(params)
    step = jax.pmap(functools.partial(eval_step, dtype=options["dtype"]), "devices")
    params = replicate(at_image_size(params, size))
    batch_size = options["batch_size"] // options["accum_steps"]
    accuracy = evaluate(step, params, data["test"], size, batch_size)
    say(f"test accuracy {accuracy:.2%} of {data['test'][0]} images")
    return 0


def main(argv=None):
    """The command line: returns 0, 2 after bad input, 128 + signal number when interrupted."""
    try:
        return run(parse_flags(argv))
    except (BadInput, OSError) as error:
        print("vit.py:", " ".join(str(error).split()), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
