# SPDX-License-Identifier: Apache-2.0
# /// script
# requires-python = ">=3.11"
# dependencies = ["jax>=0.8.2", "jaxlib>=0.8.2", "numpy>=2.0", "pillow>=10.1",
#                 "tensorflow-datasets>=4.9.10", "importlib_resources"]
# ///
"""Vision Transformer (ViT) in pure JAX, in one file: the model, its training, its checkpoints.

It follows "An Image is Worth 16x16 Words" (arXiv 2010.11929, "the paper") and the code published
with it, google-research/vision_transformer ("the release"). Run it, read it, copy it:

    python vit.py digits       # learns to read digits, in half a minute on a CPU
    python vit.py cifar10      # fine-tunes the released ViT-B/16 on CIFAR-10
    python vit.py photo.jpg --pretrained=runs/cifar10/checkpoint.npz

Parts 1 to 4 are the lesson; parts 5 to 10 are what a real program also needs. The letters of
shapes: B images of H x W pixels, patches of P x P, N tokens (one for each patch, and the class
token) of width D, L blocks, A heads of E = D/A numbers, M for the width of the MLP, K classes.

A little JAX: a *pytree* is a nest of dicts, lists and tuples of arrays, like our parameters;
`jax.tree.map(f, a, b)` applies f leaf by leaf. A *random key* always gives the same numbers;
`split` and `fold_in` derive new keys from it. `jit`, `pmap` and `scan` *trace* a function: they
run it once on placeholders and compile what it computes.
"""

import argparse
import io
import json
import math
import os
import re
import shutil
import sys
import time
import traceback
import urllib.request
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, fields
from functools import cache, lru_cache, partial, reduce
from itertools import chain, islice
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow.dataset as ds  # it comes with tensorflow-datasets, and so does tqdm
from jax.experimental import multihost_utils
from jax.nn.initializers import lecun_normal, normal, ones, xavier_uniform, zeros
from PIL import Image, ImageDraw, ImageFont, ImageOps, PngImagePlugin
from pyarrow import ArrowInvalid
from tqdm import tqdm

# ----------------------------------------------------------------------------------------- 1. Model

# D, L and A of each size: the paper, table 1; Ti and S: arXiv 2106.10270. M is always 4 D.
SIZES = {
    "XS": (64, 2, 4),  # ours, to learn digits on a CPU
    "Ti": (192, 12, 3),
    "S": (384, 12, 6),
    "B": (768, 12, 12),
    "L": (1024, 24, 16),
    "H": (1280, 32, 16),
}
# Initializers for the kernels of L blocks at once.
xavier = xavier_uniform(in_axis=1, out_axis=2, batch_axis=0)  # [L, D, M], [L, M, D]
to_heads = xavier_uniform(in_axis=1, out_axis=(2, 3), batch_axis=0)  # [L, D, A, E]
from_heads = xavier_uniform(in_axis=(1, 2), out_axis=3, batch_axis=0)  # [L, A, E, D]

# Name in the released checkpoints: (axes, initializer, name in timm). Axes "PP3D" mean the shape
# [P, P, 3, D], with the letters from the top of the file. Initializer None: only ever loaded.
PARAMETERS = {
    "embedding/kernel": ("PP3D", lecun_normal(in_axis=(0, 1, 2)), "patch_embed.proj.weight"),
    "embedding/bias": ("D", zeros, "patch_embed.proj.bias"),
    "cls": ("11D", zeros, "cls_token"),
    "Transformer/posembed_input/pos_embedding": ("1ND", normal(0.02), "pos_embed"),
    "Transformer/encoder_norm/scale": ("D", ones, "norm.weight"),
    "Transformer/encoder_norm/bias": ("D", zeros, "norm.bias"),
    "pre_logits/kernel": ("DD", None, None),  # only in ImageNet-21k checkpoints of the paper
    "pre_logits/bias": ("D", None, None),
    "head/kernel": ("DK", zeros, "head.weight"),
    "head/bias": ("K", zeros, "head.bias"),
}
# The same for the blocks. In params, their arrays are stacked, in Transformer/encoderblock/. A
# checkpoint has them block by block, without L, in Transformer/encoderblock_0/ and so on.
BLOCK_PARAMETERS = {
    "LayerNorm_0/scale": ("LD", ones, "norm1.weight"),
    "LayerNorm_0/bias": ("LD", zeros, "norm1.bias"),
    "MultiHeadDotProductAttention_1/query/kernel": ("LDAE", to_heads, "attn.qkv.weight"),
    "MultiHeadDotProductAttention_1/query/bias": ("LAE", zeros, "attn.qkv.bias"),
    "MultiHeadDotProductAttention_1/key/kernel": ("LDAE", to_heads, "attn.qkv.weight"),
    "MultiHeadDotProductAttention_1/key/bias": ("LAE", zeros, "attn.qkv.bias"),
    "MultiHeadDotProductAttention_1/value/kernel": ("LDAE", to_heads, "attn.qkv.weight"),
    "MultiHeadDotProductAttention_1/value/bias": ("LAE", zeros, "attn.qkv.bias"),
    "MultiHeadDotProductAttention_1/out/kernel": ("LAED", from_heads, "attn.proj.weight"),
    "MultiHeadDotProductAttention_1/out/bias": ("LD", zeros, "attn.proj.bias"),
    "LayerNorm_2/scale": ("LD", ones, "norm2.weight"),
    "LayerNorm_2/bias": ("LD", zeros, "norm2.bias"),
    "MlpBlock_3/Dense_0/kernel": ("LDM", xavier, "mlp.fc1.weight"),
    "MlpBlock_3/Dense_0/bias": ("LM", normal(1e-6), "mlp.fc1.bias"),
    "MlpBlock_3/Dense_1/kernel": ("LMD", xavier, "mlp.fc2.weight"),
    "MlpBlock_3/Dense_1/bias": ("LD", normal(1e-6), "mlp.fc2.bias"),
}


def linear(x, kernel, bias):
    """x @ kernel + bias in the dtype of x: [..., D] -> [..., M], by a kernel [D, M] and a bias [M].

    A kernel [D, A, E] makes heads, [A, E, D] joins them, [P, P, 3, D] projects patches: its last
    axes, as many as the bias has, go to the result; the others are summed over with x's last ones.
    """
    kernel, bias = kernel.astype(x.dtype), bias.astype(x.dtype)
    return jnp.tensordot(x, kernel, kernel.ndim - bias.ndim) + bias


def layer_norm(x, scale, bias):
    """Each token to mean 0 and variance 1, then * scale + bias, in float32: [..., D] -> same."""
    y = x.astype(jnp.float32)
    y = y - y.mean(axis=-1, keepdims=True)
    y = y * jax.lax.rsqrt((y * y).mean(axis=-1, keepdims=True) + 1e-6)
    return (y * scale + bias).astype(x.dtype)


def dropout(x, dropout_key, rate):
    """With a key, zeroes entries of x with probability rate, divides the others by 1 - rate."""
    if dropout_key is None or rate == 0:
        return x
    kept = jax.random.bernoulli(dropout_key, 1 - rate, x.shape)
    return jnp.where(kept, x / (1 - rate), 0)


def patch_embedding(images, kernel, bias):
    """Cuts out P x P patches and projects each (paper, eq. 1): [B, H, W, 3] -> [B, N-1, D]."""
    b, h, w, c = images.shape
    patch = kernel.shape[0]  # of [P, P, 3, D]; H and W are multiples of P
    x = images.reshape(b, h // patch, patch, w // patch, patch, c)
    x = x.swapaxes(2, 3)  # [B, H/P, W/P, P, P, 3]
    x = linear(x, kernel, bias)  # [B, H/P, W/P, D], as by a convolution of stride P
    return x.reshape(b, -1, bias.size)  # [B, N-1, D]


def attention(x, query, key, value, out, fused=False):
    """Multi-head self-attention (paper, appendix A): [B, N, D] -> [B, N, D], and its weights.

    query, key, value: kernel [D, A, E] and bias [A, E]; out: kernel [A, E, D] and bias [D]. The
    weights, float32 [B, A, N, N], say how much each token (row) attends to each (column). fused:
    cuDNN does it all in one kernel and returns no weights (None stands for them); it needs bfloat16
    and an NVIDIA GPU, Ampere or later.
    """
    q = linear(x, **query)  # [B, N, D] -> [B, N, A, E]
    k = linear(x, **key)
    v = linear(x, **value)
    if fused:
        y = jax.nn.dot_product_attention(q, k, v, implementation="cudnn")
        weights = None
    else:
        q, k, v = (z.swapaxes(1, 2) for z in (q, k, v))  # [B, A, N, E]
        scores = jnp.matmul(q, k.swapaxes(2, 3), preferred_element_type=jnp.float32)
        weights = jax.nn.softmax(scores / q.shape[-1] ** 0.5, axis=-1)  # [B, A, N, N]
        y = (weights.astype(v.dtype) @ v).swapaxes(1, 2)  # [B, N, A, E]
    return linear(y, **out), weights  # [B, N, D]


def mlp(x, Dense_0, Dense_1, dropout_key=None, dropout_rate=0.0):
    """Two linear layers with a GELU between them: [B, N, D] -> [B, N, M] -> [B, N, D]."""
    x = jax.nn.gelu(linear(x, **Dense_0), approximate=True)  # by tanh, as in the release
    return linear(dropout(x, dropout_key, dropout_rate), **Dense_1)


def encoder_block(x, block, dropout_key=None, dropout_rate=0.0, fused=False):
    """One pre-norm block (paper, eqs. 2 and 3): [B, N, D] -> [B, N, D], and attention's weights."""
    keys = [None] * 3 if dropout_key is None else jax.random.split(dropout_key, 3)
    y = layer_norm(x, **block["LayerNorm_0"])
    y, weights = attention(y, **block["MultiHeadDotProductAttention_1"], fused=fused)
    x = x + dropout(y, keys[0], dropout_rate)
    y = layer_norm(x, **block["LayerNorm_2"])
    y = mlp(y, **block["MlpBlock_3"], dropout_key=keys[1], dropout_rate=dropout_rate)
    return x + dropout(y, keys[2], dropout_rate), weights


def embed(params, images):
    """Pixels [B, H, W, 3] in [-1, 1] -> tokens [B, N, D] with positions (paper, eq. 1)."""
    x = patch_embedding(images, **params["embedding"])  # [B, N-1, D]
    cls = params["cls"].astype(x.dtype).repeat(len(x), axis=0)  # [B, 1, D]
    x = jnp.concatenate([cls, x], axis=1)  # [B, N, D]
    positions = params["Transformer"]["posembed_input"]["pos_embedding"]  # [1, N, D]
    return x + positions.astype(x.dtype)


def head(params, x):
    """Tokens after the last block -> logits (paper, eq. 4): [B, N, D] -> [B, K], float32."""
    x = x[:, 0]  # the class token: [B, D]
    x = layer_norm(x, **params["Transformer"]["encoder_norm"])
    if "pre_logits" in params:
        x = jnp.tanh(linear(x, **params["pre_logits"]))
    return linear(x.astype(jnp.float32), **params["head"])


def forward(params, images, dropout_key=None, dropout_rate=0.0, remat=False, fused=False):
    """The Vision Transformer: pixels [B, H, W, 3] in [-1, 1] -> logits [B, K], float32.

    ViT-B/16 at 384 pixels cuts an image into 24 x 24 = 576 patches, and so has N = 577 tokens of
    D = 768 numbers, L = 12 blocks, and A = 12 heads of E = 64: all this is read off the shapes of
    params. Activations have the dtype of images, float32 or bfloat16. A dropout_key turns dropout
    on. Raises TypeError if the number of patches does not fit the position embeddings.
    """
    blocks = params["Transformer"]["encoderblock"]  # [L, ...]
    input_key, block_keys = None, None  # scan hands a None on to each block
    if dropout_key is not None:
        keys = jax.random.split(dropout_key, 1 + len(blocks["LayerNorm_0"]["scale"]))
        input_key, block_keys = keys[0], keys[1:]  # [L]
    x = dropout(embed(params, images), input_key, dropout_rate)

    def apply_block(x, block_and_key):
        block, block_key = block_and_key
        x, _ = encoder_block(x, block, block_key, dropout_rate, fused)
        return x, None

    # For the gradient, a block keeps its input and the products x @ kernel of its linear layers,
    # and the backward pass computes all else again: norms, attention, GELU. (q k^T and weights @ v
    # have images and heads as "batch dims".) With remat, a block keeps its input only.
    policies = jax.checkpoint_policies
    policy = policies.nothing_saveable if remat else policies.dots_with_no_batch_dims_saveable
    apply_block = jax.checkpoint(apply_block, policy=policy, prevent_cse=False)
    # scan applies it to slice after slice of the stacked blocks, and carries x along. XLA compiles
    # one block instead of L. (prevent_cse: in scan, XLA cannot merge a recomputation anyway.)
    x, _ = jax.lax.scan(apply_block, x, (blocks, block_keys))
    return head(params, x)


def nest(arrays):
    """{"a/b": x, "a/c": y} -> {"a": {"b": x, "c": y}}."""
    tree = {}
    for name, array in arrays.items():
        *folders, leaf = name.split("/")
        inside = tree
        for folder in folders:
            inside = inside.setdefault(folder, {})
        inside[leaf] = array
    return tree


@partial(jax.jit, static_argnums=(1, 2, 3))
def init_params(key, model, image_size, num_classes):
    """Random params of a model like "ViT-B_16", as in the release: a nested dict of float32."""
    size, patch = model.removeprefix("ViT-").split("_")
    d, depth, heads = SIZES[size]
    grid = image_size // int(patch)  # patches along a side, rounded down
    sizes = {"1": 1, "3": 3, "P": int(patch), "N": 1 + grid * grid, "D": d}
    sizes |= {"L": depth, "A": heads, "E": d // heads, "M": 4 * d, "K": num_classes}
    blocks = {f"Transformer/encoderblock/{name}": row for name, row in BLOCK_PARAMETERS.items()}
    arrays = {}
    for i, (name, (axes, initializer, _)) in enumerate((PARAMETERS | blocks).items()):
        if initializer:
            shape = [sizes[letter] for letter in axes]
            arrays[name] = initializer(jax.random.fold_in(key, i), shape)
    return nest(arrays)


def image_size_of(params):
    """The side in pixels of the images that the position embeddings of params are made for."""
    tokens = params["Transformer"]["posembed_input"]["pos_embedding"].shape[1]
    return round((tokens - 1) ** 0.5) * params["embedding"]["kernel"].shape[0]


# -------------------------------------------------------------------------------------- 2. Learning


def to_pixels(images, dtype=jnp.float32):
    """Scales uint8 pixels, [...], from 0..255 to -1..1, which the released models expect."""
    return ((images.astype(jnp.float32) - 127.5) / 127.5).astype(dtype)


def cross_entropy(logits, targets):
    """Mean of -sum(targets * log softmax(logits)): [B, K] logits, [B, K] probabilities -> []."""
    return -(targets * jax.nn.log_softmax(logits)).sum(axis=-1).mean()


def mixup(images, targets, lam):
    """lam * batch + (1 - lam) * reversed batch, of B > 1 (arXiv 1710.09412): [B, ...] -> same."""
    return tuple(lam * x + (1 - lam) * x[::-1] for x in (images, targets))


def learning_rate(step, base_lr, total_steps, warmup_steps, decay_type="cosine"):
    """The learning rate of update `step`, counted from 0, as in the release: int [...] -> float32.

    It rises linearly from 0 to base_lr, then falls as a cosine to 0 or linearly to 1e-5.
    """
    progress = jnp.maximum(0, step - warmup_steps) / (total_steps - warmup_steps)
    if decay_type == "cosine":
        rate = base_lr * (1 + jnp.cos(jnp.pi * progress)) / 2
    else:
        rate = 1e-5 + (base_lr - 1e-5) * (1 - progress)
    return rate * jnp.minimum(1, step / warmup_steps) if warmup_steps else rate


def clip_by_global_norm(grads, max_norm):
    """Scales all gradients by one factor so that their global L2 norm is at most max_norm."""
    norm = jnp.sqrt(sum(jnp.sum(g * g) for g in jax.tree.leaves(grads)))
    factor = jnp.minimum(1, max_norm / norm)
    return jax.tree.map(lambda g: factor * g, grads)


def sgd_init(params):
    """Zero momentum for each parameter, of the same shape; the release keeps it in bfloat16."""
    return jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.bfloat16), params)


def sgd_update(params, momentum, grads, rate, beta=0.9):
    """SGD with momentum, not Nesterov, without weight decay: returns new params and momentum.

    As in the release, momentum is stored in bfloat16, so beta * m is bfloat16, too (XLA may skip
    that rounding). Adding g makes it float32. This moves params, and is then rounded for storage.
    """
    momentum = jax.tree.map(lambda m, g: beta * m + g, momentum, grads)  # sums: float32
    params = jax.tree.map(lambda p, m: p - rate * m, params, momentum)
    return params, jax.tree.map(lambda m: m.astype(jnp.bfloat16), momentum)


# `pmap` runs a function on all devices of all hosts. A host passes the data of its own devices.
# in_axes says what a device gets of each argument: 0, its slice of the first axis; None, all of it.
# By out_axes=None we promise that all compute the same: Python sees one result. A static argument
# is a constant to the compiler, a donated one gives its memory to the result.
on_all_devices = partial(jax.pmap, axis_name="devices", in_axes=(None, 0, 0, None), out_axes=None)


@partial(on_all_devices, static_broadcasted_argnums=3, donate_argnums=0)
def train_step(state, images, labels, options):
    """One update, as each device runs it on its share of the batch: new state, loss, learning rate.

    state: a dict of params, momentum and step (int32 [], the number of updates before this one).
    images: uint8 [local devices, accum_steps, B, H, W, 3]; labels: int32 [local devices,
    accum_steps, B], for micro-batches of B. Inside, the axis of devices is gone. options: part 5.

    Random keys derive from seed and step and, for dropout, device and micro-batch. Only `pmean`
    communicates: it averages loss and gradients over all devices, so all compute the same state.
    """
    params, step = state["params"], state["step"]
    step_key = jax.random.fold_in(jax.random.key(options.seed), step)
    mixup_key, dropout_key = jax.random.split(step_key)
    dropout_key = jax.random.fold_in(dropout_key, jax.lax.axis_index("devices"))
    dropout_keys = jax.random.split(dropout_key, options.accum_steps)

    def loss_of(params, images, labels, dropout_key):
        images = to_pixels(images)
        targets = jax.nn.one_hot(labels, params["head"]["bias"].size)
        if options.mixup_alpha:  # the same draw for all micro-batches and devices
            lam = jax.random.beta(mixup_key, options.mixup_alpha, options.mixup_alpha)
            images, targets = mixup(images, targets, lam)
        images = images.astype(options.dtype)
        logits = forward(
            params, images, dropout_key, options.dropout, options.remat, options.fused_attention
        )
        return cross_entropy(logits, targets) / options.accum_steps

    def accumulate(total, micro_batch):
        loss_and_grads = jax.value_and_grad(loss_of)(params, *micro_batch)
        return jax.tree.map(jnp.add, total, loss_and_grads), None

    total = 0.0, jax.tree.map(jnp.zeros_like, params)  # loss and gradients
    (loss, grads), _ = jax.lax.scan(accumulate, total, (images, labels, dropout_keys))
    loss, grads = jax.lax.pmean((loss, grads), "devices")
    grads = clip_by_global_norm(grads, options.grad_norm_clip)
    rate = learning_rate(
        step, options.base_lr, options.total_steps, options.warmup_steps, options.decay_type
    )
    params, momentum = sgd_update(params, state["momentum"], grads, rate)
    return {"params": params, "momentum": momentum, "step": step + 1}, loss, rate


@partial(on_all_devices, static_broadcasted_argnums=3)
def eval_step(params, images, labels, options):
    """The number of right predictions for uint8 images [local devices, B, H, W, 3]: int32 []."""
    images = to_pixels(images, options.dtype)
    logits = forward(params, images, fused=options.fused_attention)
    return jax.lax.psum((logits.argmax(axis=-1) == labels).sum(), "devices")


# -------------------------------------------------------------------------------------- 3. Examples

# Data is a dict: "name"; "classes", a list of the K names; "train" and "test", sequences of items
# of any kind; "read", a function: item -> (Pillow image in RGB, label from 0 to K-1).

BILINEAR = Image.Resampling.BILINEAR
# The CPUs that this process may use, where the system can tell.
CPUS = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
POOL = ThreadPoolExecutor(CPUS)


class BadInput(ValueError):
    """A mistake that the user can fix. The command line prints it on one line and exits with 2."""


def require(condition, message):
    """Raises BadInput with the message, unless the condition holds."""
    if not condition:
        raise BadInput(message)


def say(line):
    """Prints a line immediately, on the first host only."""
    if jax.process_index() == 0:
        print(line, flush=True)


def to_array(image, size, box=None):
    """A Pillow image, or a box of it, squeezed into a square: uint8 [size, size, 3]."""
    # Bilinear; where an image shrinks, its pixels are averaged, unlike in the release.
    return np.asarray(image.resize((size, size), BILINEAR, box))


def inception_crop(rng, width, height):
    """A random box (left, upper, right, lower) in pixels, drawn as by TensorFlow in the release."""
    aspect = rng.uniform(3 / 4, 1.33)  # w / h
    # h is uniform from the smallest height with 5 % of the area to the largest for which the box
    # fits. Where rounding w leaves less than 5 %, h grows by one.
    area = 0.05 * width * height
    largest = min(height, int((width + 0.5) / aspect))  # so that round(h * aspect) <= width
    smallest = min(largest, max(1, round(math.sqrt(area / aspect))))
    h = rng.integers(smallest, largest, endpoint=True)
    if h * round(h * aspect) < area:
        h = min(largest, h + 1)
    w = round(h * aspect)
    left = rng.integers(max(1, width - w))  # never width - w, as in TensorFlow
    upper = rng.integers(max(1, height - h))
    return left, upper, left + w, upper + h


@lru_cache(2)  # this epoch and the next, because threads read ahead
def epoch_order(seed, epoch, count):
    """The order in which an epoch visits count examples: a permutation, int [count]."""
    return np.random.default_rng([seed, 0, epoch]).permutation(count)


def training_example(data, options, image_size, index):
    """The example at index = step * batch size + place in the batch, of the whole training.

    Returns (uint8 [image_size, image_size, 3], label). They depend on nothing but the arguments, so
    a resumed run sees the same. Raises BadInput for a label not from 0 to K-1.
    """
    count = len(data["train"])
    epoch, place = divmod(index, count)
    item = data["train"][epoch_order(options.seed, epoch, count)[place]]
    image, label = data["read"](item)
    require(0 <= label < len(data["classes"]), f"an image has the label {label}: no such class")
    if options.augment == "none":
        return to_array(image, image_size), label
    rng = np.random.default_rng([options.seed, 1, index])  # 0 is for the order of examples
    pixels = to_array(image, image_size, inception_crop(rng, *image.size))
    if rng.random() < 0.5:
        pixels = pixels[:, ::-1]
    return pixels, label


def batch_positions(batch_size, accum_steps=1):
    """Which examples of a batch this host reads: int [local devices, accum_steps, B].

    One host, 2 devices, a batch of 8 in 2 micro-batches: [[[0 1] [2 3]] [[4 5] [6 7]]]. Raises
    BadInput if the batch cannot be divided so.
    """
    shape = jax.process_count(), jax.local_device_count(), accum_steps
    why = f"--batch_size={batch_size} is no multiple of hosts x devices x accum_steps {shape}"
    require(batch_size % math.prod(shape) == 0, why)
    return np.arange(batch_size).reshape(*shape, -1)[jax.process_index()]


def batches(example, indices, ahead=3):
    """For each int array [...] of indices: uint8 [..., size, size, 3] and int32 labels [...].

    Up to `ahead` batches are read in advance, split among threads: Pillow releases Python's lock.
    """

    def start(batch):
        parts = np.array_split(batch.ravel(), CPUS)
        return batch.shape, POOL.map(lambda part: [example(i) for i in part.tolist()], parts)

    started = map(start, indices)  # lazy: start(batch) runs when islice takes it
    waiting = list(islice(started, ahead))
    while waiting:
        shape, parts = waiting.pop(0)
        images, labels = zip(*chain(*parts), strict=True)  # waits for the threads
        waiting.extend(islice(started, 1))
        images = np.stack(images)
        yield images.reshape(shape + images.shape[1:]), np.int32(labels).reshape(shape)


# -------------------------------------------------------------------------------------- 4. Training


def evaluate(params, data, options):
    """Top-1 accuracy on the test images, from 0 to 1. params: on all devices, see `replicate`."""
    count, size = len(data["test"]), image_size_of(params)

    def example(i):
        image, label = data["read"](data["test"][min(i, count - 1)])
        # The last batch is filled with the last image, under a label that no prediction equals.
        return to_array(image, size), (label if i < count else -1)

    # As many images at a time as in a micro-batch of training, or one on each device.
    devices = jax.device_count()
    batch_size = max(devices, options.batch_size // options.accum_steps // devices * devices)
    positions = batch_positions(batch_size)[:, 0]  # [local devices, B]
    starts = range(0, count, batch_size)
    examples = batches(example, (start + positions for start in starts))
    right = []  # predictions in each batch
    for images, labels in tqdm(examples, "evaluating", len(starts), delay=10, mininterval=10):
        right.append(eval_step(params, images, labels, options))
        jax.block_until_ready(right[:-1])  # those before this one: so at most two are queued
    accuracy = sum(map(int, right)) / count
    say(f"test accuracy {accuracy:.2%} of {count} images")
    return accuracy


def train(options, data):
    """Trains on data and returns params as NumPy arrays.

    The first host writes to options.logdir: first_batch.png (the first eight examples) and, after
    each evaluation, metrics.csv and checkpoint.npz. A kill costs the updates since then: call it
    again, and it goes on. On CPUs, with the same options, devices and versions, it ends with the
    same bits as a run that was never stopped. Raises BadInput for what does not fit or cannot be
    read, and for a loss that is not finite.
    """
    require(len(data["train"]), "there are no images for training, only for --eval_only")
    positions = batch_positions(options.batch_size, options.accum_steps)
    can_mix = positions.shape[-1] > 1 or not options.mixup_alpha
    require(can_mix, "--mixup_alpha needs two images at a time on each device: lower --accum_steps")
    state, run = start_or_resume(options, data)
    first, total = int(state["step"]), options.total_steps
    devices = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
    say(f"{options.logdir}: step {first} of {total}, on {devices}")
    example = partial(training_example, data, options, image_size_of(state["params"]))
    if jax.process_index() == 0:
        images = [example(i)[0] for i in range(8)]
        Image.fromarray(np.hstack(images)).save(f"{options.logdir}/first_batch.png")
    indices = (step * options.batch_size + positions for step in range(first, total))
    say("this run is complete; --eval_only tests it again" if first == total else "compiling ...")
    loss = 0.0
    for done, (images, labels) in enumerate(batches(example, indices), first + 1):
        previous_loss = loss
        state, loss, rate = train_step(state, images, labels, options)
        is_first = done == first + 1
        if is_first:  # it returned once it was compiled and queued: the clock starts here
            clock, clock_step = time.perf_counter(), first
        # train_step returns before the devices have finished. We wait for the update before this
        # one: this one is queued by then, and batches do not pile up on the devices.
        jax.block_until_ready(previous_loss)
        test = done == total or done % options.eval_every == 0
        log = test or done % options.log_every == 0
        if log or is_first:
            loss, rate = float(loss), float(rate)  # this waits for the update
            require(math.isfinite(loss), f"the loss of step {done} is {loss}; lower --base_lr")
            seconds = (time.perf_counter() - clock) / (done - clock_step)  # of one update
            speed = options.batch_size / seconds
            left = seconds * (total - done)
            pace = f"{speed:.1f} images/s  {tqdm.format_interval(left)} left, plus evaluations"
            say(f"step {done}/{total}  loss {loss:.4f}  lr {rate:.2e}  {pace}")
            if is_first and left > 3600 and jax.default_backend() == "cpu":
                say("no GPU or TPU was found; for a CPU: --model=ViT-Ti_16 --image_size=224")
            accuracy = evaluate(state["params"], data, options) if test else ""
            if log:  # not for is_first alone: a resumed run would have one row more
                run["rows"].append((done, loss, rate, speed, accuracy))
            if test:
                save_run(options, state, run)
            clock, clock_step = time.perf_counter(), done  # so it leaves evaluations out
    return jax.device_get(state["params"])


# --------------------------------------------------------------------------------------- 5. Options


def option(default, help, **more):
    """A field of Options: its default, its help text, and further arguments for argparse."""
    # SUPPRESS: a flag that is not given stays absent, so that presets can replace its default.
    more |= {"help": f"{help} ({default})", "default": argparse.SUPPRESS}
    return field(default=default, metadata=more)


@dataclass(frozen=True)  # and so hashable, as static arguments must be
class Options:
    """All flags. Defaults are the release's, where it has the option. Raises BadInput."""

    model: str = option("ViT-B_16", "ViT-SIZE_PATCH, for --pretrained=released or none")
    pretrained: str = option("released", "released, none, or a checkpoint's file or address")
    image_size: int = option(384, "in pixels, rounded down to whole patches; 0: the checkpoint's")
    dtype: str = option("float32", "of activations", choices=("float32", "bfloat16"))
    batch_size: int = option(512, "images per update, over all devices and hosts")
    accum_steps: int = option(8, "micro-batches per update")
    total_steps: int = option(10_000, "number of updates")
    warmup_steps: int = option(500, "updates during which the learning rate rises")
    base_lr: float = option(0.03, "learning rate after the warm-up")
    decay_type: str = option("cosine", "decay of the rate", choices=("cosine", "linear"))
    grad_norm_clip: float = option(1.0, "maximum global norm of the gradients")
    dropout: float = option(0.0, "dropout rate")
    mixup_alpha: float = option(0.0, "blend images by Beta(alpha, alpha); 0: off")
    augment: str = option("inception", "random crops and flips", choices=("inception", "none"))
    seed: int = option(0, "random seed")
    logdir: str = option("runs", "folder of the run; without this flag runs/DATA")
    data_dir: str = option("~/tensorflow_datasets", "folder of datasets and downloads")
    log_every: int = option(10, "updates between lines of progress")
    eval_every: int = option(100, "updates between evaluations and checkpoints")
    eval_only: bool = option(False, "test the run in --logdir, or else --pretrained")
    remat: bool = option(False, "recompute blocks to save memory")
    fused_attention: bool = option(False, "cuDNN's: for bfloat16, on NVIDIA GPUs from Ampere on")
    coordinator_address: str = option("", "HOST:PORT of the first host, or auto")
    num_processes: int = option(1, "number of hosts")
    process_id: int = option(0, "rank of this host, from 0")

    def __post_init__(self):
        from_1 = ["batch_size", "accum_steps", "total_steps", "log_every", "eval_every"]
        for name, value in vars(self).items():
            least = 1 if name in from_1 else 0
            allowed = isinstance(value, str) or least <= value < 2**31
            require(allowed, f"--{name}={value} is not from {least} to 2**31 - 1")
        model = re.fullmatch(rf"ViT-({'|'.join(SIZES)})_[1-9]\d*", self.model)
        require(model, f"--model={self.model} is not like ViT-B_16, with a size of {[*SIZES]}")
        require(self.dropout < 1, f"--dropout={self.dropout} must be below 1")
        require(self.grad_norm_clip > 0, f"--grad_norm_clip={self.grad_norm_clip} must be above 0")
        warms_up = self.warmup_steps < self.total_steps
        require(warms_up, f"--warmup_steps={self.warmup_steps} must be below --total_steps")
        require(self.process_id < self.num_processes, "--process_id must be below --num_processes")


# ----------------------------------------------------------------------------------- 6. Checkpoints

# file -> read_arrays -> {released name: array} -> to_params -> params -> adapt -> other params

HUB = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")  # or a mirror of it
# The released models in timm's copy: one pre-trained on ImageNet-21k, one fine-tuned on ImageNet.
# orig: the paper's; augreg: those of arXiv 2106.10270.
RELEASED = {
    "ViT-Ti_16": ("tiny_patch16_224.augreg_in21k", "tiny_patch16_384.augreg_in21k_ft_in1k"),
    "ViT-S_32": ("small_patch32_224.augreg_in21k", "small_patch32_384.augreg_in21k_ft_in1k"),
    "ViT-S_16": ("small_patch16_224.augreg_in21k", "small_patch16_384.augreg_in21k_ft_in1k"),
    "ViT-B_32": ("base_patch32_224.orig_in21k", "base_patch32_384.augreg_in21k_ft_in1k"),
    "ViT-B_16": ("base_patch16_224.orig_in21k", "base_patch16_384.orig_in21k_ft_in1k"),
    "ViT-B_8": ("base_patch8_224.augreg_in21k", None),
    "ViT-L_32": ("large_patch32_224.orig_in21k", "large_patch32_384.orig_in21k_ft_in1k"),
    "ViT-L_16": ("large_patch16_224.orig_in21k", "large_patch16_384.augreg_in21k_ft_in1k"),
    "ViT-H_14": ("huge_patch14_224.orig_in21k", None),
}


@contextmanager
def atomic_write(path):
    """Opens a file under another name, and renames it once it is safely on the disk."""
    draft = Path(f"{path}.{jax.process_index()}-{os.getpid()}.partial")
    draft.parent.mkdir(parents=True, exist_ok=True)
    try:
        with open(draft, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def fetch(url, data_dir):
    """The path of a file in data_dir/downloads, downloaded unless it is there. Raises BadInput."""
    name = re.sub(r"[^\w.-]", "--", url.partition("://")[2])
    path = Path(data_dir, "downloads", name).expanduser()
    if path.exists():
        return path
    try:
        with urllib.request.urlopen(url, timeout=60) as reply, atomic_write(path) as file:
            with tqdm.wrapattr(reply, "read", total=reply.length, desc=url) as stream:
                shutil.copyfileobj(stream, file)
            require(not reply.length, f"{reply.length} bytes are missing")  # still to come
    except Exception as error:  # networks fail in many ways
        raise BadInput(f"cannot fetch {url} ({error}); by hand, put it at {path}") from error
    return path


def pretrained_file(options, fine_tuned=False):
    """The path of what --pretrained names, after a download if need be. Raises BadInput."""
    path = os.path.expanduser(options.pretrained)
    if path == "released":
        names = {model: both[fine_tuned] for model, both in RELEASED.items() if both[fine_tuned]}
        why = f"--model={options.model} is not among those released for this: {[*names]}"
        require(options.model in names, why)
        path = f"{HUB}/timm/vit_{names[options.model]}/resolve/main/model.safetensors"
    return fetch(path, options.data_dir) if re.match("https?://", path) else path


def read_safetensors(path):
    """{name: float32 array} of a .safetensors file that holds F32, F16 or BF16.

    Eight bytes give the length of a JSON header, which says which bytes of the rest are which
    array. Damage raises many types of exceptions; a false length reads 1 MiB at most as a header.
    """
    dtypes = {"F32": np.float32, "F16": np.float16, "BF16": jnp.bfloat16}
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(str(file.read(min(length, 2**20)), "ascii"))
        data = np.fromfile(file, np.uint8)
    header.pop("__metadata__", None)
    offsets = sorted(entry["data_offsets"] for entry in header.values())
    begins, ends = zip(*offsets, strict=True)
    in_a_row = [*begins, len(data)] == [0, *ends]  # each begins where the one before ends
    require(in_a_row, "its arrays do not follow each other to its end")
    arrays = {}
    for name, entry in header.items():
        array = data[slice(*entry["data_offsets"])].view(dtypes[entry["dtype"]])
        arrays[name] = array.reshape(entry["shape"]).astype(np.float32)
    return arrays


def rows_of(depth):
    """For each array of a checkpoint with depth blocks: released name, axes, and name in timm."""
    for name, (axes, _, timm) in PARAMETERS.items():
        yield name, axes, timm
    for i in range(depth):
        for name, (axes, _, timm) in BLOCK_PARAMETERS.items():
            yield f"Transformer/encoderblock_{i}/{name}", axes[1:], f"blocks.{i}.{timm}"


def from_timm(arrays):
    """{name in timm: array} -> {released name: array}, each in the shape of the release.

    A file does not say how many heads there are, so its width D must be in SIZES; a model of this
    width with another number of heads is read wrongly. timm's GELU is the exact one, at most 4.7e-4
    from ours. DeiT and DINO were trained on pixels scaled in another way: fine-tune them first.
    """
    require("cls_token" in arrays, "it has no cls_token; for transformers' names, take timm's copy")
    width = arrays["cls_token"].shape[-1]
    heads = {d: a for d, _, a in SIZES.values()}.get(width)
    require(heads, f"its width {width} is not in SIZES, so its number of heads is unknown")
    sizes = {"D": width, "A": heads, "E": width // heads}
    depth = sum(name.endswith("norm1.bias") for name in arrays)
    released = dict(arrays)  # unknown arrays keep their names, so that `to_params` refuses them
    for name, axes, timm in rows_of(depth):
        if timm in arrays:  # not so for pre_logits, nor in some files for head
            released.pop(timm, None)  # None: when key and value come, qkv is already gone
            array = arrays[timm]
            if ".qkv." in timm:  # query, key and value in one: [3D, D] or [3D]
                part = ["query", "key", "value"].index(name.split("/")[-2])
                array = np.split(array, 3)[part]
            if name.endswith("kernel"):  # [out, in] -> [in, out]; [D, 3, P, P] -> [P, P, 3, D]
                array = np.moveaxis(array, (0, 1), (-1, -2))
            if "A" in axes:  # the heads get an axis of their own
                array = array.reshape([sizes[letter] for letter in axes])
            released[name] = array
    return released


def read_arrays(path):
    """{released name: array} of an .npz, or of timm's .safetensors. Raises BadInput."""
    try:
        if not zipfile.is_zipfile(path):
            return from_timm(read_safetensors(path))
        arrays = {}
        with zipfile.ZipFile(path) as archive:
            for name in archive.namelist():
                data = archive.read(name)  # this checks the CRC-32, before NumPy sees the bytes
                arrays[name.removesuffix(".npy")] = np.load(io.BytesIO(data))
        return arrays
    except Exception as error:  # damaged bytes raise a dozen types in zipfile, zlib, NumPy, json
        raise BadInput(f"cannot read {path} as .npz or timm's .safetensors ({error})") from error


def to_params(arrays, source):
    """{released name: array} -> params, a nest of float32 NumPy arrays. Raises BadInput."""
    arrays = {k: x for k, x in arrays.items() if not k.startswith(("train/", "class_names"))}
    absent = {"head", "pre_logits"} - {name.split("/")[0] for name in arrays}
    depth = max(1, sum(name.endswith("/LayerNorm_0/bias") for name in arrays))
    sizes, found = {"1": 1, "3": 3}, {}
    for name, axes, _ in rows_of(depth):
        if name.split("/")[0] in absent:
            continue
        require(name in arrays, f"{source} has no {name}")
        array = np.asarray(arrays.pop(name), np.float32)
        for letter, n in zip(axes, array.shape, strict=False):
            sizes.setdefault(letter, n)  # the first array with a letter decides its size
        shape = tuple(sizes.get(letter) for letter in axes)
        require(array.shape == shape, f"{source}: {name} has the shape {array.shape}, not {shape}")
        require(np.isfinite(array).all(), f"{source}: {name} is not finite")
        found[name] = array
    require(not arrays, f"{source} has {[*arrays][:3]}, so it is another kind of model")
    n = sizes["N"] - 1
    require(n and math.isqrt(n) ** 2 == n, f"{source} has {n} patches, which make no square")
    for name in BLOCK_PARAMETERS:
        blocks = [found.pop(f"Transformer/encoderblock_{i}/{name}") for i in range(depth)]
        found[f"Transformer/encoderblock/{name}"] = np.stack(blocks)  # [L, ...]
    return nest(found)


def load_checkpoint(path):
    """The params in an .npz or timm's .safetensors, as NumPy arrays. Raises BadInput."""
    return to_params(read_arrays(path), path)


def flatten(tree):
    """{"a": {"b": x, "c": y}} -> {"a/b": x, "a/c": y}: the inverse of `nest`."""
    leaves = jax.tree.leaves_with_path(tree)
    return {"/".join(key.key for key in path): leaf for path, leaf in leaves}


def save_checkpoint(path, params, **more):
    """Writes params under their released names, and more, to an .npz. Raises BadInput, OSError."""
    arrays = flatten(jax.device_get(params))
    for name, array in arrays.items():
        require(np.isfinite(array).all(), f"{name} is not finite, {path} stays as it was")
    for name in BLOCK_PARAMETERS:
        for i, block in enumerate(arrays.pop(f"Transformer/encoderblock/{name}")):
            arrays[f"Transformer/encoderblock_{i}/{name}"] = block
    with atomic_write(path) as file:
        np.savez(file, **arrays, **more)


def resize_position_embeddings(embeddings, grid):
    """Position embeddings for another image size: [1, 1 + g*g, D] -> [1, 1 + grid*grid, D].

    As in the release, it is bilinear with fixed corners (align_corners in PyTorch; paper, 3.2).
    """
    old = math.isqrt(embeddings.shape[1] - 1)
    patches = embeddings[0, 1:].reshape(old, old, -1)  # [g, g, D]
    # Where new rows and columns lie among the old. One at 2.3 is 0.7 of row 2 and 0.3 of row 3.
    new = np.linspace(0, old - 1, grid)
    bilinear = np.maximum(0, 1 - abs(new[:, None] - np.arange(old)))  # [grid, g]
    patches = np.einsum("ia,jb,abd->ijd", bilinear, bilinear, patches, optimize=True)
    patches = patches.reshape(1, grid * grid, -1).astype(np.float32)
    return np.concatenate([embeddings[:, :1], patches], axis=1)


def adapt(params, image_size, num_classes=None):
    """Params for images of image_size pixels (paper, section 3.2), or of their own size if it is 0.

    image_size is rounded down to whole patches. For fine-tuning to num_classes, pre_logits is
    dropped, and the head is all zeros. Raises BadInput if an image is smaller than a patch.
    """
    patch, _, _, d = params["embedding"]["kernel"].shape
    grid = (image_size or image_size_of(params)) // patch
    require(grid, f"--image_size={image_size} is smaller than a patch of {patch} pixels")
    params = jax.device_get(params)  # in new dicts: the caller's stay as they are
    embeddings = params["Transformer"]["posembed_input"]
    embeddings["pos_embedding"] = resize_position_embeddings(embeddings["pos_embedding"], grid)
    if num_classes:
        params.pop("pre_logits", None)
        kernel = np.zeros((d, num_classes), np.float32)
        params["head"] = {"kernel": kernel, "bias": np.zeros(num_classes, np.float32)}
    return params


# ------------------------------------------------------------------------------- 7. Runs and hosts

# A run is what its options and its data define; it is resumed from checkpoint.npz in --logdir.
# Several hosts run one process each. Each reads its share of the images; only the first writes the
# run, but to resume, all must see its --logdir. If one fails, JAX ends the others.

# Options that may differ between hosts, and those that may change when a run is resumed.
PER_HOST = {"coordinator_address", "process_id", "logdir", "data_dir"}
MAY_CHANGE = PER_HOST | {"num_processes", "accum_steps", "remat", "fused_attention"}
MAY_CHANGE |= {"log_every", "eval_every", "eval_only"}


def same_on_all_hosts(values):
    """Raises BadInput, on every host, naming the first of the values that differs between hosts."""
    for name, value in values.items():
        checksum = np.uint32(zlib.crc32(repr(value).encode()))
        same = (multihost_utils.process_allgather(checksum) == checksum).all()
        require(same, f"the hosts differ in {name}, here {str(value)[:200]}")


def join_hosts(options):
    """Connects this host with all others. Raises BadInput if their options are not the same."""
    address = options.coordinator_address
    known = re.fullmatch(r"auto|.+:\d+", address)
    require(known, f"--coordinator_address={address} must be HOST:PORT of the first host, or auto")
    print(f"waiting for all hosts at {address}, five minutes at most", flush=True)
    # JAX's preemption service would catch SIGTERM, by which `kill` ends a process.
    jax.config.update("jax_enable_preemption_service", False)
    me = () if address == "auto" else (address, options.num_processes, options.process_id)
    jax.distributed.initialize(*me)
    same_on_all_hosts({name: x for name, x in vars(options).items() if name not in PER_HOST})


def replicate(tree):
    """Copies arrays to all devices, for pmap. Raises BadInput if hosts have different ones."""
    checksums = [zlib.crc32(np.asarray(leaf).tobytes()) for leaf in jax.tree.leaves(tree)]
    same_on_all_hosts({"the weights to start from (is --logdir the same?)": checksums})
    # This pmap only copies. It gets arange, too, because one argument must have an axis of devices.
    copy = on_all_devices(lambda tree, _: tree, in_axes=(None, 0))
    return copy(tree, np.arange(jax.local_device_count()))


def claim(logdir):
    """Locks a folder until this process ends. Raises BadInput if another process has done so."""
    os.makedirs(logdir, exist_ok=True)
    try:
        import fcntl  # the system ends its locks with the process, even with a killed one

        file = os.open(f"{logdir}/lock", os.O_CREAT | os.O_RDWR)  # to close it would unlock it
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise BadInput(f"another process trains in {logdir}: choose another --logdir") from error
    except (ImportError, OSError):
        pass  # Windows and some network file systems have no such locks


def new_state(options, num_classes):
    """The state before the first update: {"params", "momentum", "step"}. Raises BadInput."""
    if options.pretrained == "none":
        # Steps are below 2**31, so train_step, which uses fold_in(key, step), has other keys.
        key = jax.random.fold_in(jax.random.key(options.seed), 2**31)
        params = init_params(key, options.model, options.image_size, num_classes)
    else:
        params = load_checkpoint(pretrained_file(options))
    params = adapt(params, options.image_size, num_classes)
    return {"params": params, "momentum": sgd_init(params), "step": np.int32(0)}


def saved_state(arrays, path):
    """The state in the arrays of a run's checkpoint. Raises BadInput for another optimizer."""
    params, momentum = to_params(arrays, path), {}
    for name, fresh in flatten(sgd_init(params)).items():
        saved = arrays.get(f"train/momentum/{name}")
        require(saved is not None, f"{path} was saved with another optimizer: it has no {name}")
        momentum[name] = saved.astype(fresh.dtype)
    return {"params": params, "momentum": nest(momentum), "step": np.int32(arrays["train/step"])}


def start_or_resume(options, data):
    """The state to go on from, on all devices, and the run: {"definition", "rows" of metrics.csv}.

    They come from checkpoint.npz in options.logdir if it is there. Raises BadInput if that is of
    another run. Other devices or accum_steps change dropout's draws and mixup's pairs.
    """
    if jax.process_index() == 0:
        claim(options.logdir)
    definition = {name: x for name, x in vars(options).items() if name not in MAY_CHANGE}
    definition |= {"data": data["name"], "classes": data["classes"]}
    definition |= {f"number of {x} images": len(data[x]) for x in ("train", "test")}
    path = f"{options.logdir}/checkpoint.npz"
    if not os.path.exists(path):
        run = {"definition": definition, "rows": []}
        return replicate(new_state(options, len(data["classes"]))), run
    arrays = read_arrays(path)
    run = json.loads(str(arrays.get("train/run", "{}")))
    for name, value in definition.items():
        was = run.get("definition", {}).get(name)
        changed = f"its {name} was {str(was)[:100]}, not {str(value)[:100]}"
        require(was == value, f"{path} is of another run, choose another --logdir: {changed}")
    return replicate(saved_state(arrays, path)), run


def save_run(options, state, run):
    """Writes, on the first host, metrics.csv, and checkpoint.npz with all that resuming needs."""
    if jax.process_index() == 0:
        columns = "step", "loss", "learning_rate", "images_per_second", "test_accuracy"
        with atomic_write(f"{options.logdir}/metrics.csv") as file:
            np.savetxt(file, [columns, *run["rows"]], fmt="%s", delimiter=",")
        momentum = jax.tree.map(np.float32, state["momentum"])  # .npz has no bfloat16
        train = {"momentum": momentum, "step": state["step"], "run": json.dumps(run)}
        more = flatten({"train": train}) | {"class_names": run["definition"]["classes"]}
        save_checkpoint(f"{options.logdir}/checkpoint.npz", state["params"], **more)


# ------------------------------------------------------------------------------------- 8. Datasets

CIFAR = {name: f"hf://datasets/uoft-cs/{name}" for name in ("cifar10", "cifar100")}
# As in the release, training uses only the first part of these.
USED = {CIFAR["cifar10"]: 0.98, CIFAR["cifar100"]: 0.98, "imagenet2012": 0.99}
# The formats that Pillow decodes itself; for others, such as EPS, it would start other programs.
FORMATS = "JPEG", "PNG", "WEBP", "AVIF", "BMP", "GIF", "TIFF", "PPM"
ENDINGS = {ending for ending, x in Image.registered_extensions().items() if x in FORMATS}
PngImagePlugin.MAX_TEXT_CHUNK = 64 << 20  # bytes of a colour profile; Pillow's limit is 1 MiB


@cache
def draw_digit(i):
    """Digit i modulo 10 in Pillow's own font, shifted and rotated: (RGB image, 32 x 32; label)."""
    rng, label = np.random.default_rng(i), i % 10
    font = ImageFont.load_default(int(rng.integers(22, 31)))
    image = Image.new("L", (32, 32))
    ImageDraw.Draw(image).text(rng.integers(13, 20, 2), str(label), 255, font, anchor="mm")
    return image.rotate(rng.uniform(-15, 15), BILINEAR).convert("RGB"), label


def decode(file, name):
    """A path or file object -> Pillow image: RGB, upright, on white. Raises BadInput with name."""
    try:
        with Image.open(file, formats=[x for x in FORMATS if x in Image.OPEN]) as image:
            image.load()
            # Modes F and I: floats, and integers of 16 or 32 bits, which Pillow cuts off at 255.
            require(image.mode[0] not in "FI", "save it with 8 bits per channel")
            with suppress(Exception):  # damaged EXIF raises once the image is turned
                ImageOps.exif_transpose(image, in_place=True)
            if image.has_transparency_data:
                white = Image.new("RGBA", image.size, "white")
                image = Image.alpha_composite(white, image.convert("RGBA"))
            return image.convert("RGB")
    except Exception as error:  # damaged bytes raise a dozen types in Pillow's decoders
        way_out = "put another picture in its place and run the same command again"
        raise BadInput(f"cannot read the image {name} ({error}); {way_out}") from error


def labelled_dataset(name, splits, load):
    """A set of the hub or TFDS as data (part 3), still without a name. Raises BadInput.

    load: a function from the name of a split to {"examples": a sequence of {"image": encoded image,
    "label": int}, "classes": list of names}. The test split is the first with a usual name whose
    labels are not hidden (-1). If there is none, "test" is empty, for `load_data` to fill it.
    """
    usual = [x for x in ("test", "validation", "val", "valid") if x in splits]
    tested = next((x for x in usual if load(x)["examples"][0]["label"] >= 0), None)
    require(tested or "train" in splits, f"{name} has no train or labelled test, but {[*splits]}")
    train = load("train")["examples"] if "train" in splits else []
    test = load(tested)["examples"] if tested else []
    classes = load(tested or "train")["classes"]
    n = len(train)

    def read(i):
        example = train[i] if i < n else test[i - n]
        return decode(io.BytesIO(example["image"]), f"{i} of {name}"), int(example["label"])

    return {"classes": classes, "train": range(n), "test": range(n, n + len(test)), "read": read}


def hub_dataset(name, options):
    """A set of the Hugging Face hub: hf://datasets/OWNER/NAME, or hf://datasets/OWNER/NAME/CONFIG.

    Its Parquet files are held in memory. Raises BadInput if it has no images with classes.
    """
    parts = re.fullmatch("hf://datasets/([^/]+/[^/]+)(?:/([^/]+))?", name)
    require(parts, f"{name} is not hf://datasets/OWNER/NAME or hf://datasets/OWNER/NAME/CONFIG")
    repo, config = parts.groups()
    path = fetch(f"{HUB}/api/datasets/{repo}/parquet", options.data_dir)
    listing = json.loads(path.read_bytes())  # {config: {split: [address, ...]}}
    splits = listing.get(config or next(iter(listing)))
    require(splits, f"{name} is not there, only the configs {[*listing]}")
    if cut := [split for split in splits if split.startswith("partial-")]:
        say(f"{name}: the hub has only the beginning of {cut}, which is not used")

    @cache
    def load(split):
        addresses = [x.replace("https://huggingface.co", HUB, 1) for x in splits[split]]
        table = ds.dataset([fetch(address, options.data_dir) for address in addresses])
        features = json.loads(table.schema.metadata[b"huggingface"])["info"]["features"]
        # {type: its first column}: reversed, because a later entry replaces an earlier one.
        column_of = {x["_type"]: key for key, x in reversed(features.items()) if "_type" in x}
        image, label = column_of.get("Image"), column_of.get("ClassLabel")
        require(image and label, f"{name} has no images with classes, but {column_of}")
        columns = {"image": ds.field(image, "bytes"), "label": ds.field(label)}
        examples = table.to_table(columns).to_pylist()
        return {"examples": examples, "classes": features[label]["names"]}

    return labelled_dataset(name, splits, load)


def image_folder(root):
    """Images in train/CLASS and test/CLASS (or validation, val), or in CLASS. Raises BadInput."""
    passed_over = {}  # {ending: number of files}

    def find(folder):  # [(class, path)]
        items = []
        for path in sorted(Path(folder).glob("[!.@]*/[!.]*")):  # nothing like .cache and @eaDir
            ending = (path.suffix.lower() or "none") if path.is_file() else "folder"
            if ending in ENDINGS:
                items.append((path.parent.name, str(path)))
            else:
                passed_over[ending] = 1 + passed_over.get(ending, 0)
        return items

    test = find(f"{root}/test") or find(f"{root}/validation") or find(f"{root}/val")
    train = find(f"{root}/train") or find(root)
    if passed_over:
        say(f"{root}: passed over {passed_over}")
    classes = sorted({name for name, _ in train})
    tested = sorted({name for name, _ in test})
    fits = len(classes) > 1 and {*tested} <= {*classes}
    found = f"classes {classes[:9]} for training and {tested[:9]} for testing"
    require(fits, f"{root} needs {{train,test}}/CLASS/*.jpg or CLASS/*.jpg, but has {found}")

    def read(item):
        name, path = item
        return decode(path, path), classes.index(name)

    return {"classes": classes, "train": train, "test": test, "read": read}


def tfds_dataset(name, options):
    """A TFDS dataset. Raises BadInput if it is not prepared, which alone needs TensorFlow."""
    import tensorflow_datasets as tfds  # only here: importing it takes longer than JAX

    try:
        builder = tfds.builder(name, data_dir=os.path.expanduser(options.data_dir))
    except (ValueError, AssertionError) as error:
        why = str(error).partition("\n")[0]  # the lines after it list all datasets
        raise BadInput(f"{name} is not a file, a folder or a dataset: {why}") from error
    ready = builder.is_prepared() and builder.info.file_format.value == "array_record"
    command = f"tfds build {name} --file_format=array_record --data_dir={options.data_dir}"
    require(ready, f"{name} must be prepared as ArrayRecord, once, with TensorFlow: {command}")
    features, splits = dict(builder.info.features), builder.info.splits
    classes = getattr(features.get("label"), "names", None)
    require(classes and "image" in features, f"{name} has no images with classes: {[*features]}")

    source = partial(builder.as_data_source, decoders={"image": tfds.decode.SkipDecoding()})
    return labelled_dataset(name, splits, lambda x: {"examples": source(x), "classes": classes})


def load_data(name, options):
    """DATA of the command line -> data as `train` wants it (part 3). Raises BadInput."""
    name = CIFAR.get(name, name)
    if name == "digits":
        train, test = range(8000), range(8000, 9000)
        data = {"classes": [*"0123456789"], "train": train, "test": test, "read": draw_digit}
    elif name.startswith("hf://"):
        data = hub_dataset(name, options)
    elif os.path.isdir(name):
        data, name = image_folder(name), os.path.abspath(name)
    else:
        data = tfds_dataset(name, options)
    used = USED.get(re.sub(r":[\d.*]+$", "", name), 1)  # ImageNet may have a version
    data["train"] = data["train"][: round(used * len(data["train"]))]
    if not data["test"]:  # every tenth is for testing
        data["test"] = data["train"][::10]
        data["train"] = [x for i, x in enumerate(data["train"]) if i % 10]
    train, test, classes = len(data["train"]), len(data["test"]), data["classes"]
    same_on_all_hosts({"data": name, "classes": classes, "numbers of images": (train, test)})
    say(f"{name}: {train} images for training and {test} for testing, of {len(classes)} classes")
    return data | {"name": name}


# --------------------------------------------------------------------------------------- 9. Photos


def load_classifier(path, image_size):
    """Params with a head for images of this size; class names, or else numbers. Raises BadInput."""
    arrays = read_arrays(path)
    require("head/bias" in arrays, f"{path} has no head: fine-tune it first")
    names = arrays.get("class_names", np.arange(arrays["head/bias"].size)).tolist()
    return adapt(to_params(arrays, path), image_size), names


@jax.jit
def forward_with_rollout(params, image):
    """[1, H, W, 3] -> probabilities [K], and how much the class token gets of each patch: [g, g].

    Attention rollout (arXiv 2005.00928) multiplies the weights, averaged over heads and mixed with
    the identity for the residual, block after block. A few patches often outshine all others by far
    (arXiv 2309.16588), so 1 is the 99th percentile, and anything above is clipped.
    """
    x = embed(params, image)
    x, weights = jax.lax.scan(encoder_block, x, params["Transformer"]["encoderblock"])
    mixed = (weights[:, 0].mean(axis=1) + jnp.eye(x.shape[1])) / 2  # [L, 1, A, N, N] -> [L, N, N]
    reached = reduce(jnp.matmul, mixed[::-1])[0, 1:]  # of each patch, by the class token: [N-1]
    grid = math.isqrt(reached.size)
    light = jnp.minimum(1, reached / jnp.percentile(reached, 99)).reshape(grid, grid)
    return jax.nn.softmax(head(params, x)[0]), light


def classify(options, photos):
    """Prints the five most likely classes of each photo, and writes PHOTO-attention.png here.

    It shows the photo and a copy, dark where the class token does not look. Raises BadInput.
    """
    path = pretrained_file(options, fine_tuned=True)
    params, names = load_classifier(path, options.image_size)
    if names == [*range(1000)]:  # we assume that they are ImageNet's
        from tensorflow_datasets.datasets.siscore.labels import IMAGENET_LABELS_LIST as names
    params = jax.device_put(params)
    for photo in photos:
        image = decode(photo, photo)
        pixels = to_pixels(to_array(image, image_size_of(params)), options.dtype)
        probabilities, light = jax.device_get(forward_with_rollout(params, pixels[None]))
        name = Path(photo).as_posix().replace("../", "up--").replace("/", "--").lstrip("-")
        picture = f"{name}-attention.png"
        say(f"{photo}, and where the model looked: {picture}")
        for label in probabilities.argsort()[::-1][:5]:
            say(f"{probabilities[label]:8.2%}  {names[label]}")
        light = Image.fromarray(0.1 + 0.9 * light).resize(image.size, BILINEAR)  # 10 % at least
        attended = np.uint8(np.asarray(image) * np.asarray(light)[..., None])
        Image.fromarray(np.hstack([image, attended])).save(picture)


# ------------------------------------------------------------------------------- 10. Command line

# What takes the place of the defaults of Options for some DATA.
DIGITS = {"model": "ViT-XS_8", "pretrained": "none", "image_size": 32, "augment": "none"}
DIGITS |= {"batch_size": 64, "accum_steps": 1, "base_lr": 0.1}
DIGITS |= {"total_steps": 800, "warmup_steps": 100, "log_every": 100}
PRESETS = {"digits": DIGITS, "imagenet2012": {"total_steps": 20_000}}


def parse_options(argv=None):
    """The command line: DATA, a list of photos or [], Options with PRESETS. Raises BadInput."""
    parser = argparse.ArgumentParser("vit.py", "vit.py [DATA] [--FLAG ...]", allow_abbrev=False)
    text = "digits (default), cifar10, hf://datasets/OWNER/NAME, a TFDS set, a folder, or photos"
    parser.add_argument("data", nargs="*", default=["digits"], help=text)
    for flag in fields(Options):
        kind = {"action": "store_true"} if flag.type is bool else {"type": flag.type}
        parser.add_argument(f"--{flag.name}", **kind, **flag.metadata)
    flags = vars(parser.parse_intermixed_args(argv))
    paths = flags.pop("data")
    photos = paths if all(map(os.path.isfile, paths)) else []
    require(photos or len(paths) == 1, f"of {' '.join(paths)}, not all are image files")
    run_name = re.sub(r"\W+", "-", paths[0]).strip("-") or "data"  # "./a/b/" -> "a-b"
    flags["logdir"] = os.path.expanduser(flags.get("logdir", f"runs/{run_name}"))
    preset = PRESETS.get(paths[0].split(":")[0], {})  # "imagenet2012:5.1.0", too
    if photos or "eval_only" in flags:
        flags.setdefault("image_size", 0)  # as the checkpoint has it
    return paths[0], photos, Options(**(preset | flags))


def evaluate_only(options, data):
    """Tests the run in options.logdir or else what --pretrained names. Raises BadInput."""
    path = f"{options.logdir}/checkpoint.npz"
    if not os.path.exists(path):
        require(options.pretrained != "none", f"there is no {path} to test, and --pretrained=none")
        path = pretrained_file(options, fine_tuned=True)
    say(f"testing {path}")
    params, names = load_classifier(path, options.image_size)
    numbers = [*range(len(data["classes"]))]  # released heads have no names
    require(names in [data["classes"], numbers], f"{path} has other classes than {data['name']}")
    evaluate(replicate(params), data, options)


def main(argv=None):
    """Runs the command line; returns 0, or 1 after a bug, 2 after bad input, 130 after Ctrl-C."""
    try:
        data, photos, options = parse_options(argv)
        if options.coordinator_address or options.num_processes > 1:
            join_hosts(options)
        if options.fused_attention:
            fits = options.dtype == "bfloat16" and jax.default_backend() == "gpu"
            require(fits, "--fused_attention needs --dtype=bfloat16, and an NVIDIA GPU")
        if photos:
            classify(options, photos)
        elif options.eval_only:
            evaluate_only(options, load_data(data, options))
        else:
            train(options, load_data(data, options))
        return 0
    except KeyboardInterrupt:
        print("vit.py: stopped; the same command resumes a run", file=sys.stderr)
        return 130
    except Exception as error:
        message = " ".join(str(error).split())[:600]
        if "RESOURCE_EXHAUSTED" in message:
            message = "out of memory: raise --accum_steps, or add --remat or --dtype=bfloat16"
        elif not isinstance(error, (BadInput, OSError, ImportError, ArrowInvalid)):
            traceback.print_exc()
            return 1
        print("vit.py:", message, file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # for names that the terminal cannot show
    if status := main():
        os._exit(status)  # at once: sys.exit would wait for updates, images and hosts
