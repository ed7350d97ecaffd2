# SPDX-License-Identifier: Apache-2.0
"""Vision Transformer (ViT) in pure JAX, in one file: the model, its weights, fine-tuning, photos.

"An Image is Worth 16x16 Words" (Dosovitskiy et al., arXiv 2010.11929, "the paper" below) and the
recipe of its code, google-research/vision_transformer ("the release"). Run it, read it, copy it:

    python vit.py digits                  # learns to read digits in under a minute; no download
    python vit.py cifar10                 # fine-tunes the released ViT-B/16
    python vit.py photo.jpg --pretrained=runs/cifar10/checkpoint.npz

It reads from top to bottom:

    1. Model          what an image becomes: patches, tokens, encoder blocks, logits
    2. Weights        released checkpoints in and out; another image size
    3. Images         digits, CIFAR, TFDS, folders; crops; batches that stay ahead of the device
    4. Learning       loss, mixup, learning rate, SGD with momentum; one step on all devices
    5. Files          downloads, damaged files, resuming (skip it at first reading)
    6. Training       the loop and the evaluation
    7. Photos         the likeliest classes, and where the class token looks
    8. Command line   all options in one table

Shapes: B images of H x W pixels, patches of P x P, N tokens (the class token included), width D,
L blocks, A attention heads, K classes. Two ideas of JAX to begin with: a *pytree* is a nested dict
of arrays, as our parameters are, and `jax.tree.map(f, a, b)` applies f leaf by leaf; a *key* is
random state as a value: the same key gives the same numbers, `split` and `fold_in` make new keys.
"""
import argparse
import collections
import contextlib
import difflib
import functools
import hashlib
import http.client
import importlib.util
import io
import json
import math
import os
import signal
import sys
import tarfile
import time
import urllib.request
import uuid
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

# ---------------------------------------------------------------------------------------- 1. Model


def parse_model(model):
    """"ViT-B_16" -> (patch size P, width D, depth L, heads A, MLP width), five ints.

    Sizes: the paper, table 1 (Ti and S: arXiv 2106.10270). ValueError for any other name.
    """
    sizes = {
        "XS": (64, 3, 4),  # ours, small enough to learn `digits` on a CPU
        "Ti": (192, 12, 3),
        "S": (384, 12, 6),
        "B": (768, 12, 12),
        "L": (1024, 24, 16),
        "H": (1280, 32, 16),
    }
    size, _, patch = model.removeprefix("ViT-").partition("_")
    known = model == f"ViT-{size}_{patch}" and size in sizes
    if not known or not patch.isdecimal() or int(patch) == 0:
        raise ValueError(f"unknown model {model!r}; models are called ViT-SIZE_PATCH, like "
                         f"ViT-B_16, with SIZE one of {', '.join(sizes)} and PATCH a number")
    width, depth, heads = sizes[size]
    return int(patch), width, depth, heads, 4 * width


def linear(x, kernel, bias):
    """x @ kernel + bias: [..., I] -> [..., O], in the dtype of x.

    Kernels of checkpoints may be [I, A, O/A] or so; as matrices [I, O] they need one large product,
    which is what every device does best.
    """
    inputs = x.shape[-1]
    y = x.reshape(-1, inputs) @ kernel.reshape(inputs, -1).astype(x.dtype)
    return y.reshape(*x.shape[:-1], -1) + bias.reshape(-1).astype(x.dtype)


def layer_norm(x, scale, bias):
    """Each token to mean 0, variance 1, then * scale + bias, in float32: [..., D] -> [..., D]."""
    y = x.astype(jnp.float32)
    y = y - y.mean(axis=-1, keepdims=True)
    y = y * jax.lax.rsqrt((y * y).mean(axis=-1, keepdims=True) + 1e-6)
    return (y * scale + bias).astype(x.dtype)


def dropout(x, key, rate):
    """Zeroes entries with probability rate, scales the rest by 1 / (1 - rate); no key: x itself."""
    if key is None or rate == 0:
        return x
    return jnp.where(jax.random.bernoulli(key, 1 - rate, x.shape), x / (1 - rate), 0)


def patch_embedding(images, kernel, bias):
    """Cuts images into P x P patches and projects each (paper, eq. 1): [B, H, W, 3] -> [B, N-1, D].

    kernel [P, P, 3, D], bias [D]. The same as a convolution with kernel and stride P. TypeError
    (for NumPy's arrays ValueError) where H or W is no multiple of P.
    """
    b, h, w, c = images.shape
    p = kernel.shape[0]
    x = images.reshape(b, h // p, p, w // p, p, c)  # rows and columns of patches
    x = x.transpose(0, 1, 3, 2, 4, 5)  # [B, H/P, W/P, P, P, 3]
    x = x.reshape(b, (h // p) * (w // p), p * p * c)  # [B, N-1, P*P*3]
    return linear(x, kernel, bias)  # [B, N-1, D]


def attention(x, query, key, value, out):
    """Multi-head self-attention (paper, appendix A): [B, N, D] -> [B, N, D], and its weights.

    query, key, value: dicts of kernel [D, A, D/A] and bias [A, D/A]; out: [A, D/A, D] and [D]. The
    weights [B, A, N, N], how much each token (row) takes from each (column), are always float32.
    """
    b, n, d = x.shape
    heads, size = query["bias"].shape
    q, k, v = (linear(x, **p).reshape(b, n, heads, size).swapaxes(1, 2)
               for p in (query, key, value))  # [B, N, D] -> [B, A, N, D/A]
    scores = jnp.matmul(q / size**0.5, k.swapaxes(2, 3), preferred_element_type=jnp.float32)
    weights = jax.nn.softmax(scores, axis=-1)  # [B, A, N, N]
    y = weights.astype(x.dtype) @ v  # [B, A, N, D/A]
    y = y.swapaxes(1, 2).reshape(b, n, d)  # the heads side by side again: [B, N, D]
    return linear(y, **out), weights


def mlp(x, Dense_0, Dense_1, key=None, dropout_rate=0.0):
    """Two linear layers, a GELU (tanh form) between: [B, N, D] -> [B, N, 4D] -> [B, N, D]."""
    x = jax.nn.gelu(linear(x, **Dense_0), approximate=True)
    return linear(dropout(x, key, dropout_rate), **Dense_1)


def encoder_block(x, block, key=None, dropout_rate=0.0):
    """One pre-norm Transformer block (paper, eq. 2, 3): [B, N, D] -> [B, N, D], attention weights.

    block: the parameters of one block, under the names of the released checkpoints.
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

    P, D, L, A and an optional pre_logits layer follow from params (see `init_params`). Activations
    have the dtype of images, float32 or bfloat16. A key turns dropout on. TypeError where the
    number of patches does not fit the position embeddings. With return_attention -> (logits,
    attention weights [L, B, A, N, N]).

    For the gradient, JAX keeps what the forward pass computed. Here it keeps the products with
    weight matrices only; norms, softmax and GELU are cheaper to compute again than to write to
    memory and read back. With remat it keeps the input of each block and computes the rest again.
    """
    encoder = params["Transformer"]
    blocks = encoder["encoderblock"]  # the arrays of the L blocks are stacked: [L, ...]
    x = patch_embedding(images, **params["embedding"])  # [B, N-1, D]
    cls = jnp.broadcast_to(params["cls"].astype(x.dtype), (x.shape[0], 1, x.shape[2]))
    x = jnp.concatenate([cls, x], axis=1)  # [B, N, D]
    x = x + encoder["posembed_input"]["pos_embedding"].astype(x.dtype)
    keys = None
    if key is not None:
        keys = jax.random.split(key, 1 + blocks["LayerNorm_0"]["scale"].shape[0])
        x, keys = dropout(x, keys[0], dropout_rate), keys[1:]  # a key for each block

    def step(x, block_and_key):
        x, weights = encoder_block(x, *block_and_key, dropout_rate)
        return x, weights if return_attention else None

    keep = None if remat else jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    # scan calls step on slice after slice of the stacked blocks, carrying x along. A Python loop
    # would do the same, but XLA would have to compile every block by itself.
    x, weights = jax.lax.scan(jax.checkpoint(step, policy=keep, prevent_cse=False), x,
                              (blocks, keys))
    x = layer_norm(x, **encoder["encoder_norm"])[:, 0]  # the class token: [B, N, D] -> [B, D]
    if "pre_logits" in params:  # in the ImageNet-21k checkpoints of the paper
        x = jnp.tanh(linear(x, **params["pre_logits"]))
    logits = linear(x.astype(jnp.float32), **params["head"])  # [B, D] -> [B, K]
    return (logits, weights) if return_attention else logits


def init_params(key, model, image_size, num_classes):
    """Random parameters to train from scratch: a nested dict of float32 arrays, as `forward` wants.

    model: a name for `parse_model`, or the five numbers that it returns; image_size in pixels.
    Names and distributions are those of the release. ValueError where the name is unknown or the
    patch size does not divide the image size.
    """
    patch, d, depth, heads, hidden = parse_model(model) if isinstance(model, str) else model
    if image_size < patch or image_size % patch:
        raise ValueError(f"image size {image_size} is not a multiple of the patch size {patch}")
    init, keys = jax.nn.initializers, iter(jax.random.split(key, 14))

    def layers(inputs, outputs, bias_init=init.zeros):  # [L, *inputs, *outputs], [L, *outputs]
        in_axes, out_axes = tuple(range(1, 1 + len(inputs))), tuple(range(-len(outputs), 0))
        xavier = init.xavier_uniform(in_axes, out_axes, batch_axis=0)
        return {"kernel": xavier(next(keys), (depth, *inputs, *outputs)),
                "bias": bias_init(next(keys), (depth, *outputs))}

    def norm(*shape):
        return {"scale": jnp.ones(shape), "bias": jnp.zeros(shape)}

    split, small, tokens = (heads, d // heads), init.normal(1e-6), 1 + (image_size // patch) ** 2
    return {
        "embedding": {
            "kernel": init.lecun_normal((0, 1, 2))(next(keys), (patch, patch, 3, d)),
            "bias": jnp.zeros(d),
        },
        "cls": jnp.zeros((1, 1, d)),
        "Transformer": {
            "posembed_input": {"pos_embedding": init.normal(0.02)(next(keys), (1, tokens, d))},
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


# -------------------------------------------------------------------------------------- 2. Weights

RELEASED = {model: f"imagenet21k/{model}" for model in (
    "ViT-B_16", "ViT-B_32", "ViT-L_16", "ViT-L_32", "ViT-H_14")} | {  # below: AugReg's, 2106.10270
    "ViT-Ti_16": "augreg/Ti_16-i21k-300ep-lr_0.001-aug_none-wd_0.03-do_0.0-sd_0.0",
    "ViT-S_32": "augreg/S_32-i21k-300ep-lr_0.001-aug_none-wd_0.1-do_0.0-sd_0.0",
    "ViT-S_16": "augreg/S_16-i21k-300ep-lr_0.001-aug_light1-wd_0.03-do_0.0-sd_0.0",
    "ViT-B_8": "augreg/B_8-i21k-300ep-lr_0.001-aug_medium1-wd_0.1-do_0.0-sd_0.0",
}
RELEASED_URL = "https://storage.googleapis.com/vit_models/{}.npz"
OPTIONAL = ("pre_logits",)  # layers that a checkpoint may have or not


class BadInput(ValueError):
    """A mistake that the user can fix: the command line prints it as one line and exits with 2."""


def flatten(tree, prefix=""):
    """{"a": {"b": x}} -> {"a/b": x}."""
    if not isinstance(tree, dict):
        return {prefix[:-1]: tree}
    return {k: v for name in tree for k, v in flatten(tree[name], f"{prefix}{name}/").items()}


def unflatten(flat):
    """{"a/b": x} -> {"a": {"b": x}}."""
    tree = {}
    for name, value in flat.items():
        *parents, leaf = name.split("/")
        functools.reduce(lambda node, part: node.setdefault(part, {}), parents, tree)[leaf] = value
    return tree


def unstack(params):
    """Nested parameters -> {released name: array}: the stacked blocks become encoderblock_0, ..."""
    flat = {}
    for name, value in flatten(params).items():
        if "/encoderblock/" in name:
            flat |= {name.replace("block/", f"block_{i}/"): value[i] for i in range(len(value))}
        else:
            flat[name] = value
    return flat


def describe(flat):
    """{released name: array} -> ((P, D, L, A, MLP width), image size in pixels, K), off the shapes.

    KeyError or ValueError where it is no ViT.
    """
    block = "Transformer/encoderblock_0/"
    patch, _, _, width = flat["embedding/kernel"].shape
    _, heads, _ = flat[block + "MultiHeadDotProductAttention_1/query/kernel"].shape
    _, hidden = flat[block + "MlpBlock_3/Dense_0/kernel"].shape
    _, tokens, _ = flat["Transformer/posembed_input/pos_embedding"].shape
    depth = len({name.split("/")[1] for name in flat if "/encoderblock_" in name})
    _, num_classes = flat["head/kernel"].shape
    return (patch, width, depth, heads, hidden), math.isqrt(tokens - 1) * patch, num_classes


def load_checkpoint(path):
    """Reads a checkpoint as it is: a nested dict of float32 NumPy arrays, ready for `forward`.

    Knows the names of the released files and those of newer Flax code, which renumbers layers and
    puts everything under opt/target/ or params/. BadInput where the file is damaged, is no ViT,
    or has entries that are missing, unknown, misshapen or not finite.
    """
    flat = read_npz(path)
    for prefix in ("opt/target/", "params/"):
        if prefix + "cls" in flat:
            flat = {k.removeprefix(prefix): v for k, v in flat.items() if k.startswith(prefix)}
    for new, released in (("MultiHeadDotProductAttention_0", "MultiHeadDotProductAttention_1"),
                          ("LayerNorm_1", "LayerNorm_2"), ("MlpBlock_0", "MlpBlock_3")):
        flat = {k.replace(f"/{new}/", f"/{released}/"): v for k, v in flat.items()}
    flat = {k: v for k, v in flat.items() if k != "class_names" and not k.startswith("train/")}
    try:
        model, image_size, num_classes = describe(flat)
        shapes = jax.eval_shape(  # what such a model consists of; nothing is computed
            lambda key: unstack(init_params(key, model, image_size, num_classes)),
            jax.random.key(0))
    except (KeyError, ValueError) as error:
        raise BadInput(f"{path} is no ViT checkpoint ({type(error).__name__}: {error})") from None
    expected = {name: array.shape for name, array in shapes.items()}
    expected |= {"pre_logits/kernel": (model[1], model[1]), "pre_logits/bias": (model[1],)}
    absent = set(OPTIONAL) - {name.split("/")[0] for name in flat}
    expected = {name: shape for name, shape in expected.items() if name.split("/")[0] not in absent}
    wrong = []
    for name in sorted(expected | flat):
        found, wanted = getattr(flat.get(name), "shape", "missing"), expected.get(name, "absent")
        if found != wanted:
            wrong.append(f"{name} is {found}, should be {wanted}")
        elif flat[name].dtype.kind != "f" or not np.isfinite(flat[name]).all():
            wrong.append(f"{name} holds NaN, infinity or no floats at all")
    if wrong:
        more = f"; and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise BadInput(f"{path} does not hold a whole ViT: {'; '.join(wrong[:3])}{more}")
    params = {}
    for name in expected:
        if "/encoderblock_0/" in name:
            blocks = [flat[name.replace("block_0/", f"block_{i}/")] for i in range(model[2])]
            params[name.replace("block_0/", "block/")] = np.stack(blocks).astype(np.float32)
        elif "/encoderblock_" not in name:
            params[name] = flat[name].astype(np.float32)
    return unflatten(params)


def resize_position_embeddings(embeddings, grid):
    """Position embeddings for another image size: [1, 1 + g*g, D] -> [1, 1 + grid*grid, D].

    Bilinear between the g x g patches with aligned corners (paper, section 3.2; as the release's
    scipy.ndimage.zoom of order 1). The class token's row stays as it is.
    """
    patches = np.asarray(embeddings[0, 1:])  # [g*g, D]
    old = math.isqrt(len(patches))
    at = np.linspace(0, old - 1, grid)  # where the new rows (and columns) lie among the old ones
    weights = np.maximum(0, 1 - abs(at[:, None] - np.arange(old)))  # [grid, g], each row sums to 1
    patches = np.tensordot(weights, patches.reshape(old, old, -1), 1)  # [grid, g, D]
    patches = np.einsum("jb,ibd->ijd", weights, patches).reshape(1, grid * grid, -1)
    return np.concatenate([embeddings[:, :1], patches], axis=1).astype(np.float32)


def check_image_size(image_size, patch):
    """BadInput, with the nearest size that does, where patches do not fill an image (pixels)."""
    if image_size < patch or image_size % patch:
        raise BadInput(f"--image_size={image_size} is not a multiple of the patch size {patch}; "
                       f"{max(1, round(image_size / patch)) * patch} is")


def at_image_size(params, image_size):
    """params for images of image_size pixels: same arrays, position embeddings resized.

    BadInput where the patch size does not divide the image size.
    """
    patch, encoder = params["embedding"]["kernel"].shape[0], params["Transformer"]
    check_image_size(image_size, patch)
    embeddings = resize_position_embeddings(
        encoder["posembed_input"]["pos_embedding"], image_size // patch)
    return params | {"Transformer": encoder | {"posembed_input": {"pos_embedding": embeddings}}}


def load_pretrained(path, image_size, num_classes):
    """Reads a checkpoint for fine-tuning, as `load_checkpoint`, and adapts it (paper, section 3.2).

    Position embeddings are resized to image_size pixels, pre_logits is dropped, and the head is
    replaced by zeros for num_classes. Raises BadInput as `load_checkpoint` and `at_image_size` do.
    """
    params = at_image_size(load_checkpoint(path), image_size)
    params.pop("pre_logits", None)
    kernel, bias = np.zeros((params["cls"].shape[2], num_classes)), np.zeros(num_classes)
    return params | {"head": {"kernel": np.float32(kernel), "bias": np.float32(bias)}}


def save_checkpoint(path, params, class_names=(), **train):
    """Writes params as .npz with the released names, whole or not at all.

    class_names: K strings, kept as the entry class_names; train: more arrays, kept under train/.
    BadInput where params hold NaN or infinity or the disk refuses; what was there then stays.
    """
    entries = {name: np.asarray(array) for name, array in unstack(params).items()}
    if not all(np.isfinite(array).all() for array in entries.values()):
        raise BadInput(f"parameters have become nan or infinite, so {path} is left as it was")
    entries |= {f"train/{name}": array for name, array in train.items()}
    if len(class_names):
        entries["class_names"] = np.array(class_names, str)
    try:
        with replacing(path) as file:
            np.savez(file, **entries)
    except OSError as error:
        raise BadInput(f"cannot write {path} ({error.strerror}); what was there stays") from None


# --------------------------------------------------------------------------------------- 3. Images
#
# A dataset is a dict: "classes", the K class names, and two splits, "train" and "test". A split is
# (n, read), and read(i), 0 <= i < n, gives a Pillow image in RGB and its label, an int.

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")  # these start no other program
SPLITS = {"imagenet2012": ("train[:99%]", "validation")}  # of TFDS, where the release has its own
CIFAR = {  # the authors' archives: address, SHA-256, label bytes in a record, list of class names
    "cifar10": ("https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
                "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
                1, "batches.meta.txt"),
    "cifar100": ("https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz",
                 "58a81ae192c23a4be8b1804d68e518ed807d710a4eb253b1f2a199162a40d8ec",
                 2, "fine_label_names.txt"),
}


def decode(file, name):
    """A path or file object -> Pillow image in RGB, upright, from any size and mode.

    Alpha is left out. BadInput, with the name, where the image is unreadable, truncated or larger
    than Pillow deems safe (179 million pixels).
    """
    try:
        with Image.open(file, formats=FORMATS) as image:
            image = ImageOps.exif_transpose(image)
            if image.mode.startswith("I"):  # grey of 16 bits, which convert("RGB") would clip
                image = Image.fromarray((np.asarray(image) // 256).astype(np.uint8))
            return image.convert("RGBA" if "transparency" in image.info else "RGB").convert("RGB")
    except Exception as error:  # a damaged file can make Pillow raise nearly anything
        raise BadInput(f"cannot read the image {name} ({error})") from None


load_font = functools.cache(ImageFont.load_default)


@functools.cache
def draw_digit(seed, i):
    """Digit i modulo 10 in Pillow's built-in font, light on dark: (RGB image, 32 x 32; label)."""
    rng, label = np.random.default_rng([seed, i]), i % 10
    paper, ink = int(rng.integers(0, 60)), int(rng.integers(160, 256))
    image = Image.new("L", (32, 32), paper)
    font = load_font(int(rng.integers(22, 31)))
    ImageDraw.Draw(image).text(tuple(rng.integers(13, 20, 2)), str(label), ink, font, anchor="mm")
    image = image.rotate(rng.uniform(-15, 15), Image.Resampling.BILINEAR, fillcolor=paper)
    pixels = (np.asarray(image) + rng.normal(0, 8, (32, 32))).clip(0, 255).astype(np.uint8)
    return Image.fromarray(pixels).convert("RGB"), label


def cifar(name, data_dir):
    """CIFAR-10 or CIFAR-100 as a dataset: the first 98 % of the training images, as the release.

    A record is the label byte (CIFAR-100: coarse label, fine label), then 32 x 32 pixels, the red
    plane first. The archive is read in place, nothing is extracted. BadInput where it is damaged.
    """
    url, sha256, label_bytes, names_file = CIFAR[name]
    path, files, dataset = fetch(url, data_dir / "downloads", sha256), {}, {}
    try:
        with tarfile.open(path) as archive:
            for member in archive:
                if member.isfile():
                    files[Path(member.name).name] = archive.extractfile(member).read()
        dataset["classes"] = files[names_file].decode().split()
        for split, share in (("train", 0.98), ("test", 1)):
            parts = [files[file] for file in sorted(files) if file.endswith(".bin")
                     and file.startswith("test") == (split == "test")]
            records = np.frombuffer(b"".join(parts), np.uint8).reshape(-1, label_bytes + 3072)
            records = records[: round(len(records) * share)]
            labels = records[:, label_bytes - 1]
            pixels = records[:, label_bytes:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
            dataset[split] = len(records), lambda i, pixels=pixels, labels=labels: (
                Image.fromarray(np.ascontiguousarray(pixels[i])), int(labels[i]))
    except Exception as error:  # damage shows in many ways: tar, gzip, a missing file, odd lengths
        raise BadInput(f"{path} is damaged ({error}); delete it to fetch it again") from None
    return dataset


def image_folder(path):
    """A folder of {train,test}/CLASS/*.jpg (png, webp, ...; val for test) as a dataset.

    CLASS/*.jpg without train and test is split 9 : 1, the same way every time. BadInput where there
    are no images, less than two classes, or classes in test that training lacks.
    """
    suffixes = tuple(suffix for suffix, kind in Image.registered_extensions().items()
                     if kind in FORMATS)

    def find(root):  # [(file, class name)]
        return [(file, folder.name) for folder in sorted(root.iterdir()) if folder.is_dir()
                for file in sorted(folder.rglob("*")) if file.name.lower().endswith(suffixes)]

    tests = [path / name for name in ("test", "val", "validation") if (path / name).is_dir()]
    if (path / "train").is_dir():
        found = {"train": find(path / "train"), "test": find(tests[0]) if tests else []}
    else:
        files = find(path)
        order, n = np.random.default_rng(0).permutation(len(files)), math.ceil(len(files) / 10)
        found = {"train": [files[i] for i in order[n:]], "test": [files[i] for i in order[:n]]}
    classes = sorted({name for _, name in found["train"]})
    for split, files in found.items():
        if not files:
            raise BadInput(f"{path} holds no {split} images; wanted: {{train,test}}/CLASS/*.jpg or "
                           "CLASS/*.jpg (or png, webp, ...)")
    unknown = sorted({name for _, name in found["test"]} - set(classes))
    if unknown:
        raise BadInput(f"{path} has no training images of the test class {unknown[0]!r}")
    if len(classes) < 2:
        raise BadInput(f"{path} has images of one class only, {classes[0]!r}")
    return {"classes": classes} | {
        split: (len(files), lambda i, files=files: (
            decode(files[i][0], files[i][0]), classes.index(files[i][1])))
        for split, files in found.items()}


def tfds_dataset(name, data_dir):
    """A TFDS image-classification dataset, read as ArrayRecord, for which TensorFlow is not needed.

    BadInput where TFDS does not know the name, or the dataset is not prepared and cannot be.
    """
    import tensorflow_datasets as tfds  # only here: to import it takes longer than JAX

    construct = functools.partial(tfds.builder, name, data_dir=data_dir)
    try:
        builder = construct()
    except Exception as error:  # unknown names, configurations and versions raise differently
        known = {"digits", *CIFAR, *tfds.list_builders(with_community_datasets=False)}
        near = difflib.get_close_matches(name, sorted(known))
        hint = f"did you mean {' or '.join(near)}?" if near and name not in near else error
        raise BadInput(f"{name} is no file, folder or TFDS dataset; {str(hint)[:200]}") from None
    if not builder.info.splits or builder.info.file_format.value != "array_record":
        if not importlib.util.find_spec("tensorflow"):
            raise BadInput(
                f"{name} is not prepared as ArrayRecord in {data_dir}, for which TFDS needs "
                "TensorFlow, once: pip install tensorflow; python -c 'import tensorflow_datasets "
                f"as t; t.builder(\"{name}\", data_dir=\"{data_dir}\", file_format=\"array_record\""
                ").download_and_prepare()'")
        builder = construct(file_format="array_record")
        try:
            builder.download_and_prepare()
        except Exception as error:  # no network, files to be put there by hand, ...
            raise BadInput(f"TFDS could not prepare {name}: {error}") from None
    features, keys = dict(builder.info.features.items()), builder.info.supervised_keys
    image, label = keys if keys and len(keys) == 2 else ("image", "label")
    if not isinstance(features.get(label), tfds.features.ClassLabel):
        raise BadInput(f"{name} is no image-classification dataset: it has no class labels")
    there = [part for part in ("train", "test", "validation") if part in builder.info.splits]
    if "train" not in there:
        raise BadInput(f"{name} has no training images, only {', '.join(builder.info.splits)}")
    parts = there[:2] if len(there) > 1 else ("train[:90%]", "train[90%:]")
    dataset = {"classes": features[label].names}
    for split, part in zip(("train", "test"), SPLITS.get(name, parts), strict=True):
        source = builder.as_data_source(part, decoders={image: tfds.decode.SkipDecoding()})

        def read(i, source=source, part=part):
            example = source[i]
            return decode(io.BytesIO(example[image]), f"{part}[{i}] of {name}"), example[label]

        dataset[split] = len(source), read
    return dataset


def load_data(name, data_dir):
    """DATA of the command line -> dataset."""
    if name == "digits":
        return {"classes": [*"0123456789"], "train": (8000, functools.partial(draw_digit, 0)),
                "test": (1000, functools.partial(draw_digit, 1))}
    if name in CIFAR:
        return cifar(name, data_dir)
    return image_folder(Path(name)) if Path(name).is_dir() else tfds_dataset(name, data_dir)


def inception_crop(rng, width, height):
    """A random box (left, upper, right, lower) in pixels, drawn as by the release (TensorFlow's
    sample_distorted_bounding_box): aspect ratio uniform in [3/4, 4/3], then the height uniform from
    that of 5 % of the image's area to the largest that fits, then the place, in whole pixels.
    """
    aspect = rng.uniform(3 / 4, 4 / 3)  # width : height
    largest = min(height, width / aspect)
    smallest = min(largest, math.sqrt(0.05 * width * height / aspect))
    h = max(1, round(rng.uniform(smallest, largest)))
    w = min(width, max(1, round(h * aspect)))
    left, upper = rng.integers(width - w + 1), rng.integers(height - h + 1)
    return left, upper, left + w, upper + h


def to_array(image, size, rng=None):
    """Pillow image -> uint8 [size, size, 3], bilinear; with an rng mirrored half of the time, and a
    random crop. Pillow averages where it shrinks; where it enlarges it equals tf.image.resize.
    """
    if rng and rng.random() < 0.5:
        image = ImageOps.mirror(image)  # before it is enlarged, when there is less to turn
    box = inception_crop(rng, *image.size) if rng else None
    return np.asarray(image.resize((size, size), Image.Resampling.BILINEAR, box))


@functools.lru_cache(2)
def epoch_order(seed, epoch, n):
    """In which order an epoch goes through n examples: a permutation, int [n]."""
    return np.random.default_rng([seed, 0, epoch]).permutation(n)


def training_example(split, size, augment, seed, index):
    """Example number index since step 0: (uint8 [size, size, 3], label).

    A pure function of its arguments, index being step * batch size + place in the batch, so that a
    resumed run, or one on other devices, sees what any other would have seen.
    """
    n, read = split
    epoch, place = divmod(index, n)
    image, label = read(int(epoch_order(seed, epoch, n)[place]))
    rng = np.random.default_rng([seed, 1, index])
    return to_array(image, size, rng if augment == "inception" else None), label


def test_example(split, size, index):
    """Test image number index; past the end a black one of label -1, which no guess can hit."""
    n, read = split
    image, label = read(index) if index < n else (Image.new("RGB", (size, size)), -1)
    return to_array(image, size), label


def batches(example, indices, size, ahead=3):
    """For each int array [...] of indices yields uint8 [..., size, size, 3] and int32 labels [...].

    example(index) -> (image, label) runs in a pool of threads (Pillow lets them run in parallel),
    `ahead` batches before they are wanted. What it raises is raised here.
    """
    threads = min(32, os.cpu_count() or 1)

    def fill(images, labels, indices):
        for i, index in enumerate(indices.tolist()):
            images[i], labels[i] = example(index)

    def submit(indices):
        images = np.empty((*indices.shape, size, size, 3), np.uint8)
        labels = np.empty(indices.shape, np.int32)
        flat = images.reshape(-1, size, size, 3), labels.reshape(-1), indices.reshape(-1)
        return images, labels, [pool.submit(fill, *(array[i::threads] for array in flat))
                                for i in range(threads)]

    def finish(images, labels, parts):
        for part in parts:
            part.result()
        return images, labels

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


# ------------------------------------------------------------------------------------- 4. Learning


def to_pixels(images, dtype=jnp.float32):
    """uint8 [...] -> [-1, 1], which the released models want."""
    return ((images.astype(jnp.float32) - 127.5) / 127.5).astype(dtype)


def cross_entropy(logits, targets):
    """Mean of -sum(targets * log softmax(logits)): [B, K] logits, [B, K] probabilities -> []."""
    return -(targets * jax.nn.log_softmax(logits)).sum(axis=-1).mean()


def mixup(images, targets, weight):
    """Blends a batch with itself reversed as weight [] : (1 - weight), images [B, ...] and targets
    [B, K] alike (arXiv 1710.09412; the release draws one weight for a batch)."""
    return tuple(weight * x + (1 - weight) * x[::-1] for x in (images, targets))


def learning_rate(step, base_lr, total_steps, warmup_steps, decay_type="cosine"):
    """The rate of update `step`, the first being 0: a linear warm-up from 0 to base_lr, then cosine
    to 0 or linear to 1e-5, as the release. Int (or int array) -> float32."""
    progress = jnp.clip((step - warmup_steps) / (total_steps - warmup_steps), 0, 1)
    if decay_type == "cosine":
        rate = base_lr * (1 + jnp.cos(jnp.pi * progress)) / 2
    else:
        rate = 1e-5 + (base_lr - 1e-5) * (1 - progress)
    return rate * jnp.minimum(1, step / warmup_steps) if warmup_steps else rate


def clip_by_global_norm(grads, max_norm):
    """Scales all gradients alike so that their common L2 norm is at most max_norm: grads, norm."""
    norm = jnp.sqrt(sum(jnp.vdot(g, g) for g in jax.tree.leaves(grads)))
    return jax.tree.map(lambda g: g * jnp.minimum(1, max_norm / norm), grads), norm


def sgd_init(params, dtype=jnp.bfloat16):
    """Zero momentum for each parameter, of the same shape; the release keeps it in bfloat16."""
    return jax.tree.map(lambda p: jnp.zeros(p.shape, dtype), params)


def sgd_update(params, momentum, grads, learning_rate, decay=0.9):
    """SGD with momentum, not Nesterov, without weight decay: new params and momentum.

    decay * momentum is rounded to momentum's dtype; the sum and the update are float32.
    """
    total = jax.tree.map(lambda m, g: decay * m + g, momentum, grads)
    params = jax.tree.map(lambda p, m: p - learning_rate * m, params, total)
    return params, jax.tree.map(lambda old, m: m.astype(old.dtype), momentum, total)


def train_step(state, images, labels, mix=1.0, stop=0.0, *, base_lr=0.03, total_steps=10_000,
               warmup_steps=500, decay_type="cosine", grad_norm_clip=1.0, dropout=0.0,
               mixup_alpha=0.0, seed=0, dtype="float32", remat=False):
    """One update as each device runs it on its share of the batch, in pmap over "devices".

    state: dict of params, momentum and step (int32 []), the same on all devices. images: uint8
    [accum_steps, B, H, W, 3], labels: int32 [accum_steps, B]; mix: the weight for `mixup`; stop: 1
    where the host has caught a signal. Gives the new state and (mean loss, norm of the mean
    gradient, learning rate, mean stop).

    `train` wraps it in pmap, which compiles a function once and runs it on all devices at the same
    time. Its in_axes say what each is given: 0, its own slice of the first axis; None, all of it.
    Numbers cross between devices at one point only, `pmean`: it replaces the gradients (and loss
    and stop) by their mean over the devices. So all arrive at the same new state, and with
    out_axes=None pmap returns it once, as it came in.
    """
    params, key = state["params"], jax.random.fold_in(jax.random.key(seed), state["step"])
    accum_steps, num_classes = len(images), params["head"]["bias"].size
    first = jax.lax.axis_index("devices") * accum_steps

    def loss(params, images, labels, i):
        images, targets = to_pixels(images), jax.nn.one_hot(labels, num_classes)
        if mixup_alpha:
            images, targets = mixup(images, targets, mix)
        dropout_key = jax.random.fold_in(key, first + i) if dropout else None
        logits = forward(params, images.astype(dtype), dropout_key, dropout, remat)
        return cross_entropy(logits, targets) / accum_steps

    def accumulate(total, micro_batch):
        return jax.tree.map(jnp.add, total, jax.value_and_grad(loss)(params, *micro_batch)), None

    zeros = 0.0, jax.tree.map(jnp.zeros_like, params)
    total, _ = jax.lax.scan(accumulate, zeros, (images, labels, jnp.arange(accum_steps)))
    if jax.lax.psum(1, "devices") > 1:  # on one it would only copy it all (5 % of a step)
        total, stop = jax.lax.pmean((total, stop), "devices")
    value, grads = total
    grads, norm = clip_by_global_norm(grads, grad_norm_clip)
    rate = learning_rate(state["step"], base_lr, total_steps, warmup_steps, decay_type)
    params, momentum = sgd_update(params, state["momentum"], grads, rate)
    state = {"params": params, "momentum": momentum, "step": state["step"] + 1}
    return state, (value, norm, rate, stop)


@functools.partial(jax.pmap, axis_name="devices", in_axes=(None, 0, 0, None), out_axes=None,
                   static_broadcasted_argnums=3)
def eval_step(params, images, labels, dtype):
    """How many of the uint8 images [B, H, W, 3] get their label [B], on all devices together: int32
    []. (pmapped: images and labels have an axis of devices in front.)"""
    guesses = forward(params, to_pixels(images, dtype)).argmax(axis=-1)
    return jax.lax.psum((guesses == labels).sum(), "devices")


# ---------------------------------------------------------------------------------------- 5. Files
#
# What makes a run safe to kill, to resume and to feed with damaged files. To follow how a Vision
# Transformer learns, go on with part 6.


@contextlib.contextmanager
def replacing(path):
    """A binary file that takes the place of path at the end, at once, or leaves it as it was."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex}.partial")
    try:
        with open(partial, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())  # on the disk before it gets its name
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def read_npz(path):
    """{name: array} of an .npz file, each checked against its CRC-32; nothing is unpickled."""
    try:
        with zipfile.ZipFile(path) as archive:
            flat = {name.removesuffix(".npy"): np.load(io.BytesIO(archive.read(name)))
                    for name in archive.namelist()}
    except FileNotFoundError:
        raise BadInput(f"there is no file {path}") from None
    except Exception as error:  # damage shows in many ways: zip, zlib, struct, NumPy's header
        raise BadInput(f"{path} is damaged, or no .npz of plain arrays ({error})") from None
    empty = [name for name, array in flat.items() if not getattr(array, "size", 0)]
    if empty or not flat:
        raise BadInput(f"{path} holds nothing{' in ' + empty[0] if empty else ''}")
    return flat


def fetch(url, folder, sha256=None):
    """The path of a file in folder, downloaded from url if it is not there yet.

    It is named only when complete and, if sha256 is given, of that SHA-256. Raises BadInput.
    """
    path = Path(folder) / url.rsplit("/", 1)[-1]
    if path.exists():
        return path
    digest, done, shown = hashlib.sha256(), 0, 0
    try:
        with replacing(path) as file, urllib.request.urlopen(url, timeout=60) as response:
            size = int(response.headers.get("Content-Length", 0))
            while block := response.read(1 << 20):
                file.write(block)
                digest.update(block)
                done += len(block)
                if done - shown > size / 20:
                    say(f"fetching {url}: {done >> 20} of {size >> 20} MiB", update=True)
                    shown = done
            file.flush()
            if done < size or (path.suffix == ".npz" and not zipfile.is_zipfile(file.name)):
                raise OSError(f"cut short after {done} of {size} bytes")
            if sha256 not in (None, digest.hexdigest()):
                raise OSError(f"SHA-256 is {digest.hexdigest()}, should be {sha256}")
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise BadInput(f"cannot fetch {url} ({error}); try again, or put the file at {path} by hand"
                       ) from None
    say(f"fetched {path}")
    return path


def save_state(path, state, config, class_names):
    """Writes a checkpoint that also holds what `load_state` needs to go on: momentum, step, config.

    NumPy's format knows no bfloat16: such arrays are kept as their bytes, in uint16.
    """
    momentum = {f"momentum/{name}": array.view(np.uint16) if array.dtype == jnp.bfloat16 else array
                for name, array in flatten(state["momentum"]).items()}
    save_checkpoint(path, state["params"], class_names, step=state["step"],
                    config=json.dumps(config), **momentum)


def load_state(path, config, class_names):
    """The state that `save_state` wrote; BadInput where it is of a run that differs in the rest."""
    flat = read_npz(path)
    if "train/config" not in flat:
        raise BadInput(f"{path} holds no training state; choose another --logdir")
    theirs = json.loads(str(flat["train/config"]))
    for name, ours in config.items():
        if ours != theirs.get(name):
            raise BadInput(f"{path} is of a run with {name}={theirs.get(name)}, now it is {ours}; "
                           "choose another --logdir")
    if flat["class_names"].tolist() != list(class_names):
        raise BadInput(f"{path} is of a run with other classes; choose another --logdir")
    prefix = "train/momentum/"
    momentum = {name.removeprefix(prefix): array.view(jnp.bfloat16) if array.dtype == np.uint16
                else array for name, array in flat.items() if name.startswith(prefix)}
    return {"params": load_checkpoint(path), "momentum": unflatten(momentum),
            "step": flat["train/step"]}


def say(text, update=False):
    """Prints a line, on the first host only; on a terminal the next one overwrites an update."""
    if jax.process_index() == 0:
        terminal = sys.stdout.isatty()
        print("\r\x1b[K" * terminal + text, end="" if update and terminal else "\n", flush=True)


def metrics_writer(logdir, start):
    """A function that adds a row, a dict, to metrics.csv, and to TensorBoard's events if
    tensorboardX is installed. Rows of the file after step start, of a killed run, are dropped."""
    if jax.process_index():
        return lambda row: None
    path, columns = logdir / "metrics.csv", (
        "step", "loss", "learning_rate", "images_per_second", "test_accuracy")
    lines = path.read_text().splitlines()[1:] if path.exists() else []
    lines = [line for line in lines if line.count(",") == 4 and int(line.split(",")[0]) <= start]
    logdir.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join([",".join(columns), *lines, ""]))
    board = None
    if importlib.util.find_spec("tensorboardX"):
        import tensorboardX
        board = tensorboardX.SummaryWriter(str(logdir))

    def write(row):
        with open(path, "a") as file:
            print(*(row.get(column, "") for column in columns), sep=",", file=file)
        for column in row if board else ():
            board.add_scalar(column, row[column], row["step"])

    return write


# ------------------------------------------------------------------------------------- 6. Training

PEAK_FLOPS = {  # dense bfloat16 operations a second, by what JAX's name of the device contains
    "H100": 989e12, "H200": 989e12, "A100": 312e12, "TPU v4": 275e12, "TPU v5 lite": 197e12,
    "TPU v6 lite": 918e12,
}


def forward_flops(params):
    """Floating-point operations in the matrix products of `forward`, for one image."""
    (patch, width, depth, _, _), image_size, _ = describe(unstack(params))
    tokens = 1 + (image_size // patch) ** 2
    kernels = sum(array.size for name, array in flatten(params["Transformer"]).items()
                  if name.endswith("kernel"))
    patches = (tokens - 1) * params["embedding"]["kernel"].size
    return 2 * (tokens * kernels + 2 * depth * width * tokens**2 + patches)


def replicate(tree):
    """Copies arrays to all devices, where train_step and eval_step, under pmap with the same axis
    name, find them; same shapes. (The unused argument only says how many devices there are.)"""
    copy = jax.pmap(lambda tree, _: tree, "devices", in_axes=(None, 0), out_axes=None)
    return copy(tree, np.arange(jax.local_device_count()))


def shares(batch_size, accum_steps=1, mirrored=False):
    """Which places of a batch are this host's: int [local devices, accum_steps, B].

    mirrored: each B places hold i and batch_size - 1 - i at mirrored positions, so that reversing
    them, as `mixup` does, is the same as reversing the batch: 8 images on 2 devices are 0 1 6 7 and
    2 3 4 5. BadInput where it does not divide.
    """
    shape = jax.process_count(), jax.local_device_count(), accum_steps
    parts, unit = math.prod(shape), math.prod(shape) * (2 if mirrored else 1)
    if batch_size % unit:
        raise BadInput(
            f"--batch_size={batch_size} is no multiple of {parts // accum_steps} devices x "
            f"--accum_steps={accum_steps}{' x 2, for mixup' if mirrored else ''}; "
            f"{-(-batch_size // unit) * unit} is")
    places = np.arange(batch_size).reshape(parts, -1)
    if mirrored:
        front, back = places.reshape(2, parts, -1)
        places = np.concatenate([front, back[::-1]], axis=1)
    return places.reshape(*shape, -1)[jax.process_index()]


def evaluate(params, split, size, batch_size, dtype="float32", caught=()):
    """The share of the images of a split that get their label, each counted once: a float.

    params: replicated. None where a signal was caught meanwhile (several hosts finish it).
    """
    n, shown, correct = split[0], time.time(), []
    batch_size = -(-batch_size // jax.device_count()) * jax.device_count()
    indices = (first + shares(batch_size)[:, 0] for first in range(0, n, batch_size))
    example = functools.partial(test_example, split, size)
    for i, (images, labels) in enumerate(batches(example, indices, size)):
        correct.append(eval_step(params, images, labels, dtype))
        jax.block_until_ready(correct[-2:-1])  # so that no more than one batch waits on the device
        if caught and jax.process_count() == 1:
            return None
        if time.time() - shown > 5:
            say(f"evaluating: {i * batch_size} of {n} images", update=True)
            shown = time.time()
    accuracy = sum(map(int, correct)) / n
    say(f"test accuracy {accuracy:.2%} of {n} images")
    return accuracy


def initial_params(options, num_classes):
    """The parameters to start from: random, or out of the checkpoint that --pretrained names."""
    source, name, size = options["pretrained"], options["model"], options["image_size"]
    if source == "none":
        check_image_size(size, parse_model(name)[0])
        init = jax.jit(init_params, static_argnums=(1, 2, 3))
        params = jax.device_get(init(jax.random.key(options["seed"]), name, size, num_classes))
    else:
        params = load_pretrained(checkpoint_path(options), size, num_classes)
        model = describe(unstack(params))[0]
        if "model" in options["given"] and model != parse_model(name):
            raise BadInput(f"{source} is of another architecture, (patch, width, depth, heads, MLP "
                           f"width) = {model}, than --model={name}")
    return params


def initial_state(options, class_names, path, config):
    """The state to go on from: that in the checkpoint at path, a new one where there is none."""
    if path.exists():
        state = load_state(path, config, class_names)
    else:
        params = initial_params(options, len(class_names))
        state = {"params": params, "momentum": sgd_init(params), "step": np.int32(0)}
    if jax.process_count() > 1:
        low, high = jax.pmap(
            lambda x: (jax.lax.pmin(x, "i"), jax.lax.pmax(x, "i")), "i", out_axes=None)(
            np.full(jax.local_device_count(), state["step"]))
        if low != high:
            raise BadInput(f"not all hosts see the checkpoint {path}: they must share the disk")
    return state


def train(options, data):
    """Trains on data, a dataset, as options say (a dict, see FLAGS): exit status 0, 128 + signal.

    Writes checkpoint.npz, metrics.csv and first_batch.png to options["logdir"].
    """
    total_steps, batch_size = options["total_steps"], options["batch_size"]
    size, logdir = options["image_size"], Path(options["logdir"]).expanduser()
    path, config = logdir / "checkpoint.npz", {name: options[name] for name in IDENTITY}
    hyper = {name: options[name] for name in train_step.__kwdefaults__}
    places = shares(batch_size, options["accum_steps"], mirrored=options["mixup_alpha"] > 0)
    state = initial_state(options, data["classes"], path, config)
    step = start = int(state["step"])
    flops, devices = 3 * forward_flops(state["params"]), jax.devices()
    peak = sum(v for k, v in PEAK_FLOPS.items() if k in devices[0].device_kind) * len(devices)
    # Donated arguments give their memory to the results: no second copy of the state is needed.
    update = jax.pmap(functools.partial(train_step, **hyper), "devices",
                      in_axes=(None, 0, 0, None, 0), out_axes=None, donate_argnums=0)
    state, caught = replicate(state), []

    def save():
        if jax.process_index() == 0:
            save_state(path, jax.device_get(state), config, data["classes"])

    def test():
        return evaluate(state["params"], data["test"], size, batch_size // options["accum_steps"],
                        options["dtype"], caught)

    def catch(number, _):  # Ctrl-C or SIGTERM: finish the step; a second one kills
        caught.append(number)
        signal.signal(number, signal.SIG_DFL)

    if start == total_steps:
        say(f"{path}: all {total_steps} steps are done; evaluating")
        test()
        return 0
    say(f"{data['train'][0]} training images, {len(devices)} x {devices[0].device_kind}"
        + (f", going on after step {start} of {path}" if start else ""))
    record = metrics_writer(logdir, start)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, catch)
    example = functools.partial(
        training_example, data["train"], size, options["augment"], options["seed"])
    indices = (i * batch_size + places for i in range(start, total_steps))
    pending, stop, clock, clock_step = collections.deque(), False, time.time(), start
    stream = batches(example, indices, size)
    while step < total_steps:
        try:
            images, labels = next(stream)
        except BadInput:  # an unreadable image: keep what was learned so far
            save()
            raise
        step += 1
        if step == 1 and jax.process_index() == 0:
            save_picture(logdir / "first_batch.png", images)
        alpha, rng = options["mixup_alpha"], np.random.default_rng([options["seed"], 2, step])
        mix = rng.beta(alpha, alpha) if alpha else 1
        # This line learns; those before feed it, those after report and save.
        state, results = update(state, images, labels, np.float32(mix),
                                np.full(len(images), bool(caught), np.float32))
        pending.append(results)
        logs, saves, tests = (step % options[name] == 0 or step == total_steps for name in (
            "log_every", "checkpoint_every", "eval_every"))
        # To read a result is to wait for it. Reading that of the step before keeps the device busy.
        while len(pending) > (not (logs or saves or tests or step == start + 1)):
            loss, norm, rate, stop = map(float, pending.popleft())
            if not math.isfinite(loss + norm):
                raise BadInput(
                    f"the loss is {loss} and the gradient norm {norm} in step {step - len(pending)}"
                    "; try a lower --base_lr. The last good checkpoint: "
                    f"{path if path.exists() else 'none yet'}")
        if logs:
            speed = (step - clock_step) * batch_size / (time.time() - clock)
            record({"step": step, "loss": loss, "learning_rate": rate, "images_per_second": speed})
            left = round((total_steps - step) * batch_size / speed)
            say(f"step {step}/{total_steps}  loss {loss:.4f}  lr {rate:.2e}  {speed:.1f} images/s  "
                + (f"{flops * speed / peak:.0%} of peak  " if peak else "")
                + f"{left // 3600}:{left // 60 % 60:02}:{left % 60:02} left", update=True)
        if saves:
            save()
        accuracy = test() if tests else None
        if accuracy is not None:
            record({"step": step, "test_accuracy": accuracy})
        # Several hosts must stop after the same step: all see the mean of what each has caught.
        if stop or (caught and jax.process_count() == 1):
            if not saves:
                save()
            say(f"stopped after step {step}; the same command goes on from {path}")
            return 128 + (caught or [signal.SIGTERM])[0]
        if saves or tests or step == start + 1:  # what is timed is training, not compiling
            clock, clock_step = time.time(), step
    return 0


def save_picture(path, images):
    """The first 64 of uint8 images [..., S, S, 3] as one picture, 8 in a row."""
    side = images.shape[-2]
    images = images.reshape(-1, side, side, 3)[:64]
    columns = min(8, len(images))
    images = images[: len(images) // columns * columns].reshape(-1, columns, side, side, 3)
    Image.fromarray(np.vstack([np.hstack(row) for row in images])).save(path)


# --------------------------------------------------------------------------------------- 7. Photos


def attention_rollout(weights):
    """How much of each patch reaches the class token: [L, B, A, N, N] -> [B, grid, grid], max 1.

    The mean over the heads, mixed with the identity for the residual connections, multiplied block
    after block (arXiv 2005.00928; the paper, figure 6).
    """
    weights = (weights.mean(axis=2) + np.eye(weights.shape[-1])) / 2  # [L, B, N, N], rows sum to 1
    reached = functools.reduce(lambda below, block: block @ below, weights)[:, 0]  # [B, N]
    grid = math.isqrt(reached.shape[1] - 1)
    reached = reached[:, 1 : 1 + grid * grid]  # of the patches
    return (reached / reached.max(axis=1, keepdims=True)).reshape(-1, grid, grid)


def classify(options):
    """Prints the five likeliest classes of each photo and writes NAME-attention.png here."""
    params, size, names = load_trained(options)
    num_classes = len(params["head"]["bias"])
    if names is None and num_classes == 1000:
        import tensorflow_datasets as tfds
        names = tfds.builder("imagenet2012").info.features["label"].names
    run = jax.jit(functools.partial(forward, return_attention=True))
    for photo in map(Path, options["paths"]):
        image = decode(photo, photo)
        logits, weights = run(params, to_pixels(to_array(image, size)[None], options["dtype"]))
        probabilities = np.asarray(jax.nn.softmax(logits[0]))
        light = Image.fromarray(attention_rollout(np.asarray(weights))[0].astype(np.float32))
        light = np.asarray(light.resize(image.size, Image.Resampling.BILINEAR))[..., None]
        lit = (np.asarray(image) * (0.1 + 0.9 * light)).astype(np.uint8)
        Image.fromarray(np.hstack([image, lit])).save(f"{photo.stem}-attention.png")
        print(f"{photo} (see {photo.stem}-attention.png)")
        for label in probabilities.argsort()[::-1][:5]:
            print(f"{probabilities[label]:8.2%}  {label if names is None else names[label]}")
    return 0


# --------------------------------------------------------------------------------- 8. Command line

FLAGS = {  # group: {flag: (default, meaning)}; a tuple lists the choices, the default first
    "model": {
        "model": ("ViT-B_16", "ViT-SIZE_PATCH: sizes XS, Ti, S, B, L, H, any patch size"),
        "pretrained": ("released", "start from a file, an address, the `released` ImageNet-21k "
                                   "checkpoint of the model, or from scratch: `none`"),
        "image_size": (384, "side of the squares that the model sees, pixels"),
        "dtype": (("float32", "bfloat16"), "of activations; parameters are float32"),
    },
    "training": {
        "batch_size": (512, "images in an update, over all devices and accumulation steps"),
        "accum_steps": (8, "parts in which a device works through its share of a batch"),
        "total_steps": (10_000, "number of updates"),
        "warmup_steps": (500, "updates during which the learning rate rises"),
        "base_lr": (0.03, "learning rate after them"),
        "decay_type": (("cosine", "linear"), "how it falls from there"),
        "grad_norm_clip": (1.0, "largest global norm of the gradients"),
        "dropout": (0.0, "dropout rate"),
        "mixup_alpha": (0.0, "blend images in pairs by Beta(alpha, alpha); 0: never"),
        "augment": (("inception", "none"), "random crops and mirroring of training images"),
        "seed": (0, "of initial values, order, crops, dropout, mixup"),
    },
    "run": {
        "logdir": ("runs/DATA", "folder of checkpoint.npz, metrics.csv, first_batch.png"),
        "data_dir": ("~/tensorflow_datasets", "TFDS datasets; what is fetched, in downloads/"),
        "eval_every": (100, "steps between evaluations"),
        "log_every": (10, "steps between lines of progress"),
        "checkpoint_every": (1000, "steps between checkpoints"),
        "eval_only": (False, "evaluate --pretrained=FILE, train nothing"),
        "remat": (False, "keep less in memory for the gradient, compute more"),
    },
    "several hosts, one command on each": {
        "coordinator_address": ("", "HOST:PORT of the first; `auto` on clusters that JAX knows"),
        "num_processes": (1, "number of hosts"),
        "process_id": (0, "number of this one, from 0"),
    },
}
DEFAULTS = {name: default[0] if isinstance(default, tuple) else default
            for flags in FLAGS.values() for name, (default, _) in flags.items()}
PRESETS = {  # what a dataset has instead of the defaults
    "digits": {"model": "ViT-XS_8", "pretrained": "none", "image_size": 32, "augment": "none",
               "batch_size": 64, "accum_steps": 1, "total_steps": 1200, "base_lr": 0.1,
               "warmup_steps": 100, "eval_every": 600, "log_every": 100},
    "imagenet2012": {"total_steps": 20_000},
}
IDENTITY = ("data", *FLAGS["model"], *FLAGS["training"])  # what must not change to go on


def checkpoint_path(options):
    """--pretrained as a path, fetched first where it is an address."""
    source, model = options["pretrained"], options["model"]
    if source == "released":
        if model not in RELEASED:
            raise BadInput(f"no checkpoint of {model} was released (only {', '.join(RELEASED)}); "
                           "use --pretrained=FILE, or --pretrained=none to train from scratch")
        source = RELEASED_URL.format(RELEASED[model])
    if source == "none":
        raise BadInput("evaluating and classifying need --pretrained=FILE")
    if source.startswith(("http://", "https://")):
        return fetch(source, options["data_dir"] / "downloads" / source.split("/")[-2])
    return Path(source).expanduser()


def load_trained(options):
    """--pretrained as it is, to evaluate or classify: (params, image size, class names or None).

    The image size is that of the checkpoint where --image_size is not given.
    """
    path = checkpoint_path(options)
    params = load_checkpoint(path)
    with np.load(path) as file:
        names = file.get("class_names")
    if names is not None and names.shape != params["head"]["bias"].shape:
        raise BadInput(f"{path} names {names.size} classes, its head has "
                       f"{len(params['head']['bias'])}; mend or remove its entry class_names")
    size = describe(unstack(params))[1]
    size = options["image_size"] if "image_size" in options["given"] else size
    return at_image_size(params, size), size, names


def parse_options(argv):
    """The command line as a dict: DATA, then the flags over PRESETS over DEFAULTS. BadInput."""
    parser = argparse.ArgumentParser(
        prog="vit.py", description=__doc__.split("\n")[0], allow_abbrev=False,
        argument_default=argparse.SUPPRESS)

    def refuse(message):
        raise BadInput(message)

    parser.error = refuse
    parser.add_argument("data", metavar="DATA", nargs="*", default=["digits"], help=(
        "digits (the default), cifar10, cifar100, imagenet2012 or another TFDS dataset, a folder "
        "{train,test}/CLASS/*.jpg, or image files to classify"))
    for title, flags in FLAGS.items():
        group = parser.add_argument_group(title)
        for name, (default, meaning) in flags.items():
            usual = [DEFAULTS[name], *(f"{data}: {preset[name]}" for data, preset in PRESETS.items()
                                       if name in preset)]
            kind = ({"action": "store_true"} if default is False else
                    {"choices": default} if isinstance(default, tuple) else
                    {"type": type(default), "metavar": type(default).__name__.upper()})
            text = f"{meaning} ({', '.join(map(str, usual))})"
            group.add_argument(f"--{name}", help=text, **kind)
    flags, unknown = parser.parse_known_intermixed_args(argv)
    if unknown:
        near = difflib.get_close_matches(unknown[0].split("=")[0], [f"--{n}" for n in DEFAULTS], 1)
        refuse(f"unknown argument {unknown[0]}" + (f"; did you mean {near[0]}?" if near else ""))
    flags = vars(flags)
    data = flags["data"][0].rstrip("/")
    options = DEFAULTS | {"logdir": f"runs/{data.strip('./').replace('/', '-')}"}
    options |= PRESETS.get(data, {}) | flags | {"data": data, "paths": flags["data"]}
    options |= {"given": tuple(flags), "data_dir": Path(options["data_dir"]).expanduser()}
    for name, value in options.items():
        least = name.endswith(("size", "_every", "total_steps", "accum_steps", "processes"))
        if isinstance(value, int | float) and not value >= least:
            refuse(f"--{name}={value} is too small, it must be at least {least:d}")
    if not options["grad_norm_clip"]:
        refuse("--grad_norm_clip=0 would learn nothing; use inf for no clipping")
    for name, limit in (("dropout", 1), ("warmup_steps", options["total_steps"]),
                        ("process_id", options["num_processes"])):
        if options[name] >= limit:
            refuse(f"--{name}={options[name]} is too large, it must be below {limit}")
    try:
        parse_model(options["model"])
    except ValueError as error:
        refuse(error)
    return options


def run(options):
    """Does what the options say: exit status."""
    if not jax.config.jax_compilation_cache_dir:  # the same command need not compile again
        jax.config.update("jax_compilation_cache_dir", str(Path("~/.cache/vit.py").expanduser()))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    address, *hosts = (
        options[name] for name in ("coordinator_address", "num_processes", "process_id"))
    if hosts[0] > 1 and not address:
        raise BadInput(f"--num_processes={hosts[0]} needs the --coordinator_address of the first")
    try:
        if address:
            jax.distributed.initialize(*(() if address == "auto" else (address, *hosts)))
    except (ValueError, RuntimeError) as error:
        raise BadInput(f"--coordinator_address={address}: {error}") from None
    photos = [path for path in options["paths"] if Path(path).is_file()]
    if len(photos) == len(options["paths"]):
        return classify(options)
    if len(options["paths"]) > 1:
        raise BadInput(f"of {' '.join(options['paths'])}, not all are image files")
    data = load_data(options["data"], options["data_dir"])
    if not options["eval_only"]:
        return train(options, data)
    params, size, names = load_trained(options)
    if len(params["head"]["bias"]) != len(data["classes"]):
        raise BadInput(f"{options['pretrained']} knows {len(params['head']['bias'])} classes, "
                       f"{options['data']} has {len(data['classes'])}")
    if names is not None and names.tolist() != list(data["classes"]):
        raise BadInput(f"{options['pretrained']} knows other classes ({', '.join(names[:3])}, ...) "
                       f"than {options['data']} has")
    evaluate(replicate(params), data["test"], size,
             max(1, options["batch_size"] // options["accum_steps"]), options["dtype"])
    return 0


def main(argv=None):
    """The command line: exit status 0, 2 after bad input, 128 + signal number after a signal."""
    try:
        return run(parse_options(argv))
    except (BadInput, OSError) as error:
        line = " ".join(str(error).split())
        print("\n" * sys.stdout.isatty() + f"vit.py: {line}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


if __name__ == "__main__":
    sys.exit(main())
