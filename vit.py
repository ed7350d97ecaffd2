# SPDX-License-Identifier: Apache-2.0
# /// script
# requires-python = ">=3.11"
# dependencies = ["jax>=0.8.2", "jaxlib>=0.8.2", "numpy>=2.0", "pillow>=10.1",
#                 "tensorflow-datasets>=4.9.10", "importlib_resources"]
# ///
"""Vision Transformer (ViT) in pure JAX, in one file: the model, its training, its checkpoints.

It follows "An Image is Worth 16x16 Words" (arXiv 2010.11929, "the paper" below) and the code that
was published with it, google-research/vision_transformer ("the release"). Run it, read it, copy it:

    python vit.py digits       # learns to read digits, in half a minute on a CPU
    python vit.py cifar10      # fine-tunes the released ViT-B/16 on CIFAR-10
    python vit.py photo.jpg --pretrained=runs/cifar10/checkpoint.npz

Parts 1 to 5 are the lesson: model, learning, messages, examples, training. Parts 6 to 12 are what
a real program also needs: options, files, checkpoints, runs and hosts, datasets, photos, the
command line.

Shapes are written with these letters: B images of H x W pixels, patches of P x P pixels, N tokens
(one for each patch, and the class token) of width D, L blocks, A attention heads of E = D/A
numbers, M for the width of the MLP, K classes.

A little JAX: a *pytree* is a nested dict of arrays, like our parameters; `jax.tree.map(f, a, b)`
applies f leaf by leaf. A *random key* is random state as a value: the same key always gives the
same numbers, and `split` and `fold_in` derive new keys from it. `jit`, `pmap` and `scan` *trace* a
function: they run it once on placeholders to record what it computes, and compile that.
"""

import argparse
import contextlib
import dataclasses
import functools
import glob
import hashlib
import http.client
import io
import json
import logging
import math
import os
import platform
import re
import sys
import tarfile
import time
import traceback
import urllib.request
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from PIL import Image, ImageDraw, ImageFont, ImageOps

# ----------------------------------------------------------------------------------------- 1. Model

SIZES = {  # D, L, A: the paper, table 1; Ti and S: arXiv 2106.10270. In all of them M = 4 D.
    "XS": (64, 2, 4),  # ours, to learn digits on a CPU
    "Ti": (192, 12, 3),
    "S": (384, 12, 6),
    "B": (768, 12, 12),
    "L": (1024, 24, 16),
    "H": (1280, 32, 16),
}
init = jax.nn.initializers
# For kernels of shape [L, D, A, E], [L, A, E, D] and [L, inputs, outputs]:
heads_init = init.xavier_uniform(in_axis=1, out_axis=(2, 3), batch_axis=0)
out_init = init.xavier_uniform(in_axis=(1, 2), out_axis=3, batch_axis=0)
mlp_init = init.xavier_uniform(in_axis=1, out_axis=2, batch_axis=0)
# Each parameter has its name in the released checkpoints, a shape, with a letter for each axis (1
# and 3 stand for themselves), and an initial distribution (None if it is only ever loaded). In a
# checkpoint each block has arrays of its own, in encoderblock_0 and so on; here they are stacked,
# [L, ...]. `init_params` makes what this table says, and `to_params` checks that a file has it.
PARAMETERS = {
    "embedding/kernel": ("PP3D", init.lecun_normal((0, 1, 2))),
    "embedding/bias": ("D", init.zeros),
    "cls": ("11D", init.zeros),
    "Transformer/posembed_input/pos_embedding": ("1ND", init.normal(0.02)),
    "Transformer/encoderblock/LayerNorm_0/scale": ("LD", init.ones),
    "Transformer/encoderblock/LayerNorm_0/bias": ("LD", init.zeros),
    "Transformer/encoderblock/MultiHeadDotProductAttention_1/query/kernel": ("LDAE", heads_init),
    "Transformer/encoderblock/MultiHeadDotProductAttention_1/query/bias": ("LAE", init.zeros),
    "Transformer/encoderblock/MultiHeadDotProductAttention_1/key/kernel": ("LDAE", heads_init),
    "Transformer/encoderblock/MultiHeadDotProductAttention_1/key/bias": ("LAE", init.zeros),
    "Transformer/encoderblock/MultiHeadDotProductAttention_1/value/kernel": ("LDAE", heads_init),
    "Transformer/encoderblock/MultiHeadDotProductAttention_1/value/bias": ("LAE", init.zeros),
    "Transformer/encoderblock/MultiHeadDotProductAttention_1/out/kernel": ("LAED", out_init),
    "Transformer/encoderblock/MultiHeadDotProductAttention_1/out/bias": ("LD", init.zeros),
    "Transformer/encoderblock/LayerNorm_2/scale": ("LD", init.ones),
    "Transformer/encoderblock/LayerNorm_2/bias": ("LD", init.zeros),
    "Transformer/encoderblock/MlpBlock_3/Dense_0/kernel": ("LDM", mlp_init),
    "Transformer/encoderblock/MlpBlock_3/Dense_0/bias": ("LM", init.normal(1e-6)),
    "Transformer/encoderblock/MlpBlock_3/Dense_1/kernel": ("LMD", mlp_init),
    "Transformer/encoderblock/MlpBlock_3/Dense_1/bias": ("LD", init.normal(1e-6)),
    "Transformer/encoder_norm/scale": ("D", init.ones),
    "Transformer/encoder_norm/bias": ("D", init.zeros),
    "pre_logits/kernel": ("DD", None),  # only in ImageNet-21k checkpoints of the paper
    "pre_logits/bias": ("D", None),
    "head/kernel": ("DK", init.zeros),
    "head/bias": ("K", init.zeros),
}


def linear(x, kernel, bias):
    """x @ kernel + bias: [..., I] -> [..., O], in the dtype of x.

    The kernel may have more axes, such as [D, A, E] or [A, E, D] for heads; it is used as [I, O].
    """
    inputs = x.shape[-1]
    return x @ kernel.reshape(inputs, -1).astype(x.dtype) + bias.reshape(-1).astype(x.dtype)


def layer_norm(x, scale, bias):
    """Each token to mean 0 and variance 1, then * scale + bias, in float32: [..., D] -> same."""
    y = x.astype(jnp.float32)
    y = y - y.mean(axis=-1, keepdims=True)
    y = y * jax.lax.rsqrt((y * y).mean(axis=-1, keepdims=True) + 1e-6)
    return (y * scale + bias).astype(x.dtype)


def dropout(x, dropout_key, rate):
    """Zeroes entries of x with probability rate and scales the others by 1 / (1 - rate).

    Without a key, dropout is off.
    """
    if dropout_key is None or rate == 0:
        return x
    return jnp.where(jax.random.bernoulli(dropout_key, 1 - rate, x.shape), x / (1 - rate), 0)


def patch_embedding(images, kernel, bias):
    """Cuts images into patches and projects each (paper, eq. 1): [B, H, W, 3] -> [B, N-1, D].

    kernel: [P, P, 3, D], bias: [D]. The result is that of a convolution with kernel size and stride
    P. H and W must be multiples of P.
    """
    b, h, w, c = images.shape
    patch = kernel.shape[0]
    x = images.reshape(b, h // patch, patch, w // patch, patch, c)  # rows and columns of patches
    x = x.transpose(0, 1, 3, 2, 4, 5)  # [B, H/P, W/P, P, P, 3]
    x = x.reshape(b, (h // patch) * (w // patch), patch * patch * c)  # [B, N-1, P*P*3]
    return linear(x, kernel, bias)  # [B, N-1, D]


def fused_attention(q, k, v):
    """softmax(q k^T / sqrt(E)) v in a single GPU kernel: [B, N, A, E] each -> [B, N, A, E].

    The N x N weights never leave the chip; on a GPU, moving them is what limits the plain form. The
    kernel needs a multiple of 8 tokens, so we pad, mask the padding, and slice it off again.
    """
    b, n, _, _ = q.shape
    q, k, v = (jnp.pad(x, ((0, 0), (0, -n % 8), (0, 0), (0, 0))) for x in (q, k, v))
    lengths = jnp.full(b, n, jnp.int32)  # keys and values from the n-th on are masked
    y = jax.nn.dot_product_attention(q, k, v, key_value_seq_lengths=lengths, implementation="cudnn")
    return y[:, :n]


def attention(x, query, key, value, out, return_weights=False):
    """Multi-head self-attention (paper, appendix A): [B, N, D] -> [B, N, D], and its weights.

    query, key, value: dicts of kernel [D, A, E] and bias [A, E]; out: of kernel [A, E, D] and bias
    [D]. The weights, float32 [B, A, N, N], say how much each token (row) attends to each (column);
    unless they are asked for, None is returned instead.
    """
    b, n, _ = x.shape
    heads, head_dim = query["bias"].shape
    q = linear(x, **query).reshape(b, n, heads, head_dim)  # [B, N, A*E] -> [B, N, A, E]
    k = linear(x, **key).reshape(b, n, heads, head_dim)
    v = linear(x, **value).reshape(b, n, heads, head_dim)
    # The fused kernel needs bfloat16 and an NVIDIA GPU of compute capability 8 (Ampere) or more.
    device = jax.devices()[0]
    has_kernel = "NVIDIA" in device.device_kind and float(device.compute_capability) >= 8
    if has_kernel and x.dtype == jnp.bfloat16 and not return_weights:
        y, weights = fused_attention(q, k, v), None
    else:
        q, k, v = q.swapaxes(1, 2), k.swapaxes(1, 2), v.swapaxes(1, 2)  # [B, A, N, E]
        scores = jnp.matmul(q / head_dim**0.5, k.swapaxes(2, 3), preferred_element_type=jnp.float32)
        weights = jax.nn.softmax(scores, axis=-1)  # [B, A, N, N]
        y = (weights.astype(x.dtype) @ v).swapaxes(1, 2)  # [B, A, N, E] -> [B, N, A, E]
    y = linear(y.reshape(b, n, heads * head_dim), **out)  # the heads, concatenated
    return y, (weights if return_weights else None)


def mlp(x, Dense_0, Dense_1, dropout_key=None, dropout_rate=0.0):
    """Two linear layers with a GELU between them: [B, N, D] -> [B, N, M] -> [B, N, D].

    The arguments are named as in PARAMETERS. GELU is computed by its tanh approximation, with which
    the released weights were trained.
    """
    x = jax.nn.gelu(linear(x, **Dense_0), approximate=True)
    return linear(dropout(x, dropout_key, dropout_rate), **Dense_1)


def encoder_block(x, block, dropout_key=None, dropout_rate=0.0, return_weights=False):
    """One pre-norm Transformer block (paper, eqs. 2 and 3): [B, N, D] -> [B, N, D].

    block: the parameters of one block (see PARAMETERS). Also returns the attention weights.
    """
    keys = [None] * 3 if dropout_key is None else jax.random.split(dropout_key, 3)
    y = layer_norm(x, **block["LayerNorm_0"])
    y, weights = attention(
        y, **block["MultiHeadDotProductAttention_1"], return_weights=return_weights
    )
    x = x + dropout(y, keys[0], dropout_rate)
    y = layer_norm(x, **block["LayerNorm_2"])
    y = mlp(y, **block["MlpBlock_3"], dropout_key=keys[1], dropout_rate=dropout_rate)
    return x + dropout(y, keys[2], dropout_rate), weights


def forward(
    params, images, dropout_key=None, dropout_rate=0.0, remat=False, return_attention=False
):
    """The Vision Transformer: pixels [B, H, W, 3] in [-1, 1] -> logits [B, K], float32.

    All sizes follow from the shapes of params, see PARAMETERS. ViT-B/16 at 384 pixels cuts an image
    into 24 x 24 = 576 patches, and so has N = 577 tokens of D = 768 numbers, L = 12 blocks, and
    A = 12 heads of E = 64. Activations have the dtype of images, float32 or bfloat16. A dropout_key
    turns dropout on. With return_attention, the weights of all blocks, [L, B, A, N, N], are also
    returned. Raises TypeError if the number of patches does not fit the position embeddings.

    For the gradient, JAX by default keeps all results that the backward pass uses. Here each block
    keeps only its input and the products x @ kernel of its linear layers. The backward pass
    computes the rest again: norms, biases, GELU and dropout masks, because that is cheaper than
    moving them to memory and back; softmax and the products of attention, because the weights are N
    x N (the fused kernel is run again as a whole). With remat a block keeps only its input, and all
    of it is computed again.
    """
    encoder = params["Transformer"]
    blocks = encoder["encoderblock"]  # the arrays of all L blocks are stacked: [L, ...]
    x = patch_embedding(images, **params["embedding"])  # [B, N-1, D]
    cls = jnp.repeat(params["cls"].astype(x.dtype), len(images), axis=0)  # [B, 1, D]
    x = jnp.concatenate([cls, x], axis=1)  # [B, N, D]
    x = x + encoder["posembed_input"]["pos_embedding"].astype(x.dtype)
    input_key, block_keys = None, None  # None is a pytree without leaves: scan passes it through
    if dropout_key is not None:
        keys = jax.random.split(dropout_key, 1 + len(blocks["LayerNorm_0"]["scale"]))
        input_key, block_keys = keys[0], keys[1:]  # [L]
    x = dropout(x, input_key, dropout_rate)

    def apply_block(x, block_and_key):
        block, block_key = block_and_key
        return encoder_block(x, block, block_key, dropout_rate, return_attention)

    # The policy saves x @ kernel, but not the products of attention. JAX tells them apart by batch
    # dimensions, axes that both operands share: x and a kernel have none; q and k have two, images
    # and heads. (prevent_cse=True would stop XLA from merging the second computation with the
    # first; inside scan it cannot do that, so we switch it off.)
    policy = None if remat else jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    apply_block = jax.checkpoint(apply_block, policy=policy, prevent_cse=False)
    # scan applies it to slice after slice of the stacked blocks, carrying x along. A Python loop
    # would do the same, but XLA would have to compile every block by itself.
    x, weights = jax.lax.scan(apply_block, x, (blocks, block_keys))
    x = layer_norm(x[:, 0], **encoder["encoder_norm"])  # the class token (paper, eq. 4): [B, D]
    if "pre_logits" in params:  # in the checkpoints of the paper that know ImageNet-21k's classes
        x = jnp.tanh(linear(x, **params["pre_logits"]))
    logits = linear(x.astype(jnp.float32), **params["head"])  # [B, D] -> [B, K]
    return (logits, weights) if return_attention else logits


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


def init_params(key, model, image_size, num_classes):
    """Random parameters to train from scratch: PARAMETERS as a nested dict of float32 arrays.

    key: a random key; model: a name like "ViT-B_16"; image_size in pixels, rounded down to whole
    patches. The distributions are those of the release.
    """
    size, patch = model.removeprefix("ViT-").split("_")
    d, depth, heads = SIZES[size]
    grid = image_size // int(patch)
    sizes = {"1": 1, "3": 3, "P": int(patch), "N": 1 + grid * grid, "D": d, "L": depth}
    sizes |= {"A": heads, "E": d // heads, "M": 4 * d, "K": num_classes}
    arrays = {}
    for i, (name, (letters, initializer)) in enumerate(PARAMETERS.items()):
        if initializer:
            shape = [sizes[letter] for letter in letters]
            arrays[name] = initializer(jax.random.fold_in(key, i), shape)
    return nest(arrays)


def image_size_of(params):
    """The side in pixels of the images that the position embeddings of params are made for."""
    tokens = params["Transformer"]["posembed_input"]["pos_embedding"].shape[1]
    return round((tokens - 1) ** 0.5) * params["embedding"]["kernel"].shape[0]


def num_classes_of(params):
    """The number of classes, 0 without a head."""
    return params["head"]["bias"].size if "head" in params else 0


# -------------------------------------------------------------------------------------- 2. Learning


def to_pixels(images, dtype=jnp.float32):
    """Scales uint8 pixels, [...], from 0..255 to -1..1, which the released models expect."""
    return ((images.astype(jnp.float32) - 127.5) / 127.5).astype(dtype)


def cross_entropy(logits, targets):
    """Mean of -sum(targets * log softmax(logits)): [B, K] logits, [B, K] probabilities -> []."""
    return -(targets * jax.nn.log_softmax(logits)).sum(axis=-1).mean()


def mixup(images, targets, lam):
    """lam * batch + (1 - lam) * reversed batch (arXiv 1710.09412).

    images [B, ...] and targets [B, K] are blended alike. B is the micro-batch of one device,
    which must be more than 1, or an image would only be blended with itself. In training, one
    lam is drawn per update.
    """
    return tuple(lam * x + (1 - lam) * x[::-1] for x in (images, targets))


def learning_rate(step, base_lr, total_steps, warmup_steps, decay_type="cosine"):
    """The rate of update `step`, the first being 0, as in the release: int [...] -> float32.

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

    As in the release, momentum is stored in bfloat16 and rounded twice: beta * momentum is
    computed in bfloat16 (0.9 rounds to 0.8984), and the new sum is rounded when it is stored. The
    sum itself and the update are float32. (When it compiles this, XLA may keep the first product in
    float32; the second rounding is certain.)
    """
    decayed = jax.tree.map(lambda m: beta * m, momentum)
    new = jax.tree.map(jnp.add, decayed, grads)  # bfloat16 + float32 is float32
    params = jax.tree.map(lambda p, m: p - rate * m, params, new)
    return params, jax.tree.map(lambda old, m: m.astype(old.dtype), momentum, new)


# `pmap` compiles a function once and runs it on all devices at the same time. in_axes says what a
# device is given of each argument of the two functions below: 0, its own slice along the first
# axis; None, all of it. With out_axes=None, each device keeps its own copy of the result, which
# must be the same on all, and Python sees one array. (With `jit` and sharded arrays the compiler
# inserts the communication between devices; here we write it. `shard_map`, on which pmap is built,
# is the newer way to do so.)
ON_ALL_DEVICES = {"axis_name": "devices", "in_axes": (None, 0, 0, None), "out_axes": None}


@functools.partial(jax.pmap, **ON_ALL_DEVICES, static_broadcasted_argnums=3, donate_argnums=0)
def train_step(state, images, labels, options):
    """One update, as each device runs it on its share of the batch: new state, loss, learning rate.

    state: a dict of params, momentum and step (int32 [], the number of updates before this one).
    images: uint8 [local devices, accum_steps, B, H, W, 3], labels: int32 [local devices,
    accum_steps, B]; inside, the axis of devices is gone. options: an `Options` (part 6). Random
    keys derive from seed and step: `mixup_key, dropout_key = split(fold_in(key(seed), step))`.

    In an update devices communicate at one point only: `pmean` replaces loss and gradients by their
    mean over all devices. From there on all devices compute the same new state. options are static:
    constants of the compiled function. state is donated: the new state takes its memory.
    """
    params = state["params"]
    step_key = jax.random.fold_in(jax.random.key(options.seed), state["step"])
    mixup_key, dropout_key = jax.random.split(step_key)
    dropout_key = jax.random.fold_in(dropout_key, jax.lax.axis_index("devices"))
    dropout_keys = jax.random.split(dropout_key, options.accum_steps)
    alpha = options.mixup_alpha
    lam = jax.random.beta(mixup_key, alpha, alpha) if alpha else None

    def loss_of(params, images, labels, dropout_key):
        images = to_pixels(images)
        targets = jax.nn.one_hot(labels, num_classes_of(params))
        if lam is not None:
            images, targets = mixup(images, targets, lam)
        images = images.astype(options.dtype)
        logits = forward(params, images, dropout_key, options.dropout, options.remat)
        return cross_entropy(logits, targets) / options.accum_steps

    def accumulate(total, part):
        loss_and_grads = jax.value_and_grad(loss_of)(params, *part)
        return jax.tree.map(jnp.add, total, loss_and_grads), None

    zeros = (0.0, jax.tree.map(jnp.zeros_like, params))  # loss and gradients
    (loss, grads), _ = jax.lax.scan(accumulate, zeros, (images, labels, dropout_keys))
    if jax.device_count() > 1:  # on one device it would only copy them (5 % of a step)
        loss, grads = jax.lax.pmean((loss, grads), "devices")
    grads = clip_by_global_norm(grads, options.grad_norm_clip)
    schedule = options.base_lr, options.total_steps, options.warmup_steps, options.decay_type
    rate = learning_rate(state["step"], *schedule)
    params, momentum = sgd_update(params, state["momentum"], grads, rate)
    return {"params": params, "momentum": momentum, "step": state["step"] + 1}, loss, rate


@functools.partial(jax.pmap, **ON_ALL_DEVICES, static_broadcasted_argnums=3)
def eval_step(params, images, labels, dtype):
    """The number of correctly classified images, over all devices: int32 [].

    images: uint8 [local devices, B, H, W, 3], labels: int32 [local devices, B]; inside, the axis of
    devices is gone.
    """
    predictions = forward(params, to_pixels(images, dtype)).argmax(axis=-1)
    return jax.lax.psum((predictions == labels).sum(), "devices")


# -------------------------------------------------------------------------------------- 3. Messages


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


def duration(seconds):
    """Seconds as people write them: 45 s, 12 min, 3 h 12 min."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"


# -------------------------------------------------------------------------------------- 4. Examples

# Data is a dict of "classes", the names of the K classes; "train" and "test", sequences of items of
# any kind; "read", a function from an item to (Pillow image in RGB, label from 0 to K - 1); and, if
# it has one, its "name".

ORDER, CROPS = 0, 1  # two streams of random numbers from one seed
BILINEAR = Image.Resampling.BILINEAR
POOL = ThreadPoolExecutor(os.cpu_count())  # reads images: Pillow does its work in parallel threads


def to_array(image, size, box=None):
    """A Pillow image, or a box of it, squeezed into a square: uint8 [size, size, 3].

    Interpolation is bilinear. Where an image shrinks, all its pixels are averaged; the release then
    uses only the nearest four.
    """
    return np.asarray(image.resize((size, size), BILINEAR, box))


def inception_crop(rng, width, height):
    """A random box (left, upper, right, lower) in pixels, as TensorFlow draws it for the release.

    The aspect ratio w / h is uniform from 3/4 to 4/3. Then the height is uniform, from that of a
    box with 5 % of the area to that of the largest box that fits.
    """
    aspect = rng.uniform(3 / 4, 4 / 3)
    largest = min(height, width / aspect)
    smallest = min(largest, math.sqrt(0.05 * width * height / aspect))
    h = max(1, round(rng.uniform(smallest, largest)))
    w = min(width, max(1, round(h * aspect)))
    left, upper = rng.integers(width - w + 1), rng.integers(height - h + 1)
    return left, upper, left + w, upper + h


@functools.lru_cache(2)  # two epochs, because threads read ahead
def epoch_order(seed, epoch, count):
    """The order in which an epoch visits count examples: a permutation, int [count]."""
    return np.random.default_rng([seed, ORDER, epoch]).permutation(count)


def training_example(data, options, image_size, index):
    """Training example number index = step * batch size + place in the batch.

    Returns (uint8 [image_size, image_size, 3], label), which depend on nothing but the arguments: a
    resumed run, even on other devices, sees the same examples as one that was never stopped. Raises
    BadInput for a label not from 0 to K - 1.
    """
    epoch, place = divmod(index, len(data["train"]))
    item = data["train"][epoch_order(options.seed, epoch, len(data["train"]))[place]]
    image, label = data["read"](item)
    require(0 <= label < len(data["classes"]), f"the label {label} is not that of a class")
    if options.augment == "none":
        return to_array(image, image_size), label
    rng = np.random.default_rng([options.seed, CROPS, index])
    if rng.random() < 0.5:
        image = ImageOps.mirror(image)
    return to_array(image, image_size, inception_crop(rng, *image.size)), label


def batch_positions(batch_size, accum_steps=1):
    """Which examples of a batch this host reads: int [local devices, accum_steps, B].

    On one host with 2 devices, a batch of 8 in 2 micro-batches: [[[0 1] [2 3]] [[4 5] [6 7]]].
    Raises BadInput if the batch cannot be divided.
    """
    hosts, devices = jax.process_count(), jax.local_device_count()
    require(
        batch_size % (hosts * devices * accum_steps) == 0,
        f"--batch_size={batch_size} is not a multiple of {hosts * devices} devices "
        f"x --accum_steps={accum_steps}",
    )
    positions = np.arange(batch_size).reshape(hosts, devices, accum_steps, -1)
    return positions[jax.process_index()]


def batches(example, indices, ahead=3):
    """For each int array [...] of indices: uint8 [..., size, size, 3] and int32 labels [...].

    example(index) -> (image, label) runs in parallel threads, up to `ahead` batches in advance; its
    exceptions surface here.
    """

    def collect(shape, examples):
        images, labels = zip(*examples, strict=True)  # waits for those that are not ready
        return np.stack(images).reshape(*shape, *images[0].shape), np.int32(labels).reshape(shape)

    waiting = []
    for batch in indices:
        examples = POOL.map(example, batch.ravel().tolist())  # begins at once
        waiting.append((batch.shape, examples))
        if len(waiting) > ahead:
            yield collect(*waiting.pop(0))
    while waiting:
        yield collect(*waiting.pop(0))


# -------------------------------------------------------------------------------------- 5. Training


COLUMNS = ("step", "loss", "learning_rate", "images_per_second", "test_accuracy")  # of metrics.csv


def evaluate(params, data, options):
    """Top-1 accuracy on the test images, from 0 to 1; each image counts once.

    Reports progress every ten seconds.
    """
    count, size, devices = len(data["test"]), image_size_of(params), jax.device_count()

    def example(i):
        if i >= count:  # fills the last batch; label -1 never equals a prediction
            return np.zeros((size, size, 3), np.uint8), -1
        image, label = data["read"](data["test"][i])
        return to_array(image, size), label

    # As many images as in a micro-batch of training, which fits into the memory of a device.
    per_device = max(1, options.batch_size // options.accum_steps // devices)
    batch_size = devices * per_device
    positions = batch_positions(batch_size)[:, 0]  # [local devices, B]: accum_steps is 1
    starts = range(0, count, batch_size)
    correct, start_time, reported = 0, time.perf_counter(), 0
    images_and_labels = batches(example, (start + positions for start in starts))
    for start, (images, labels) in zip(starts, images_and_labels, strict=True):
        correct += int(eval_step(params, images, labels, options.dtype))
        done, seconds = min(count, start + batch_size), time.perf_counter() - start_time
        if seconds - reported > 10:
            reported, left = seconds, duration(seconds / done * (count - done))
            say(f"evaluated {done} of {count} images, {left} left")
    say(f"test accuracy {correct / count:.2%} of {count} images")
    return correct / count


def stopwatch(done):
    """A function of the number of updates done: the mean seconds of each since it was last called.

    The first time, that is since this call, after `done` updates.
    """
    last_done, last_time = done, time.perf_counter()

    def lap(done):
        nonlocal last_done, last_time
        now = time.perf_counter()
        seconds = (now - last_time) / (done - last_done)
        last_done, last_time = done, now
        return seconds

    return lap


def report(options, done, loss, rate, seconds, compiled):
    """Prints a line of progress.

    seconds: the mean time of an update; compiled: whether it includes compilation.
    """
    left = seconds * (options.total_steps - done)
    if compiled:
        pace = f"compiled and computed in {duration(seconds)}"
    else:
        images_per_second = options.batch_size / seconds
        pace = f"{images_per_second:.1f} images/s  {duration(left)} left, plus evaluations"
        if left > 3600 and jax.default_backend() == "cpu":
            pace += " (no GPU or TPU found; for a CPU: --model=ViT-Ti_16 --image_size=224)"
    say(f"step {done}/{options.total_steps}  loss {loss:.4f}  lr {rate:.2e}  {pace}")


def write_rows(options, rows, mode="a"):
    """Appends rows to metrics.csv, on the first host only; mode "w" starts the file anew."""
    if jax.process_index() == 0:
        with open(f"{options.logdir}/metrics.csv", mode) as file:
            for row in rows:
                print(*row, sep=",", file=file)


def train(options, data):
    """Trains on data and returns params as NumPy arrays.

    The first host writes first_batch.png (the first eight examples), metrics.csv and, after each
    evaluation, checkpoint.npz to options.logdir.

    Stop it however you like: Ctrl-C, kill, a power cut. Starting and resuming are the same call: it
    continues from checkpoint.npz if that exists, so that only updates since the last evaluation are
    done again. With the same options, devices and versions it ends with the same bits as a run that
    was never stopped (checked on CPUs). Raises BadInput for options that do not fit each other, the
    data or the checkpoint, for data that cannot be read, and for a loss that is not finite.
    """
    require(len(data["train"]), "there are no images for training, only for --eval_only")
    positions = batch_positions(options.batch_size, options.accum_steps)
    can_mix = positions.shape[-1] > 1 or not options.mixup_alpha
    require(can_mix, "--mixup_alpha needs two images at a time on each device: lower --accum_steps")
    # The state of train_step, and the rows of metrics.csv so far: from checkpoint.npz, or new.
    state, rows = start_or_resume(options, data)  # in part 9
    first, size = int(state["step"]), image_size_of(state["params"])
    devices = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
    say(f"{options.logdir}: step {first} of {options.total_steps}, on {devices}")
    os.makedirs(options.logdir, exist_ok=True)
    write_rows(options, [COLUMNS, *rows], "w")
    steps = range(first, options.total_steps)
    if not steps:
        say("this run is complete; for its accuracy see metrics.csv, or add --eval_only")
        return jax.device_get(state["params"])
    indices = (step * options.batch_size + positions for step in steps)
    example = functools.partial(training_example, data, options, size)
    if jax.process_index() == 0:
        images = np.hstack([image for image, _ in map(example, range(8))])
        Image.fromarray(images).save(f"{options.logdir}/first_batch.png")

    def is_due(done, every):
        return done % every == 0 or done == options.total_steps

    def record(*row):
        rows.append(row)
        write_rows(options, [row])

    say(f"compiling an update of {options.batch_size} images of {size} x {size} pixels ...")
    loss = 0.0  # before the first update there is nothing to wait for
    lap = stopwatch(first)
    for step, (images, labels) in zip(steps, batches(example, indices), strict=True):
        done = step + 1  # the number of updates, with this one
        previous_loss = loss
        state, loss, rate = train_step(state, images, labels, options)
        # It returns before it has computed anything. Waiting for the previous update, not for this
        # one, keeps the devices busy with at most two, one running and one queued.
        jax.block_until_ready(previous_loss)
        log = is_due(done, options.log_every)
        if log or step <= first + 1:  # the first call compiles, the second shows the speed
            value, rate = float(loss), float(rate)  # this waits for the update
            require(math.isfinite(value), f"the loss of step {done} is {value}; lower --base_lr")
            seconds = lap(done)
            report(options, done, value, rate, seconds, compiled=step == first)
        if log:
            record(done, value, rate, options.batch_size / seconds, "")
        if is_due(done, options.eval_every):
            record(done, "", "", "", evaluate(state["params"], data, options))
            save_run(options, data, state, rows)
            lap = stopwatch(done)  # without the time of the evaluation
    return jax.device_get(state["params"])


# --------------------------------------------------------------------------------------- 6. Options


def option(default, help, minimum=0, choices=None):
    """A field of Options, with its line in --help and the values that are allowed.

    These are the choices, if there are any, and otherwise numbers from minimum to 2**31 - 1.
    """
    metadata = {"help": help, "minimum": minimum, "choices": choices}
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(frozen=True)
class Options:
    """All flags of the command line. Names and defaults are the release's, where it has them.

    Raises BadInput if a value is not allowed.
    """

    model: str = option(
        "ViT-B_16",
        "ViT-SIZE_PATCH, of size XS, Ti, S, B, L or H, if --pretrained is released or none",
    )
    pretrained: str = option("released", "released, none, or a checkpoint's file or address")
    image_size: int = option(
        384, "side in pixels, rounded down to whole patches; 0 for the checkpoint's"
    )
    dtype: str = option("float32", "dtype of activations", choices=("float32", "bfloat16"))
    batch_size: int = option(512, "images per update, over all devices and hosts", minimum=1)
    accum_steps: int = option(8, "micro-batches per update", minimum=1)
    total_steps: int = option(10_000, "number of updates", minimum=1)
    warmup_steps: int = option(500, "updates during which the learning rate rises")
    base_lr: float = option(0.03, "learning rate after the warm-up")
    decay_type: str = option("cosine", "decay of the rate", choices=("cosine", "linear"))
    grad_norm_clip: float = option(1.0, "maximum global norm of the gradients", minimum=1e-9)
    dropout: float = option(0.0, "dropout rate")
    mixup_alpha: float = option(0.0, "blend images by Beta(alpha, alpha); 0: off")
    augment: str = option("inception", "random crops and flips", choices=("inception", "none"))
    seed: int = option(0, "random seed")
    logdir: str = option("runs", "folder of the run; on the command line runs/DATA")
    data_dir: str = option("~/tensorflow_datasets", "folder of datasets and downloads")
    log_every: int = option(10, "updates between lines of progress", minimum=1)
    eval_every: int = option(
        100, "updates between evaluations, each followed by a checkpoint", minimum=1
    )
    eval_only: bool = option(False, "only evaluate the run, or --pretrained")
    remat: bool = option(False, "recompute blocks to save memory")
    coordinator_address: str = option("", "HOST:PORT of the first host, or auto")
    num_processes: int = option(1, "number of hosts", minimum=1)
    process_id: int = option(0, "rank of this host, from 0")

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value, choices = getattr(self, field.name), field.metadata["choices"]
            minimum = field.metadata["minimum"]
            if choices:
                allowed, which = value in choices, " or ".join(choices)
            else:
                allowed = field.type is str or minimum <= value < 2**31
                which = f"from {minimum} to 2**31 - 1"
            require(allowed, f"--{field.name}={value} must be {which}")
        named = re.fullmatch(rf"ViT-({'|'.join(SIZES)})_[1-9]\d*", self.model)
        require(named, f"--model={self.model}: models are named like ViT-B_16, see --help")
        require(self.dropout < 1, f"--dropout={self.dropout} must be below 1")
        require(
            self.warmup_steps < self.total_steps,
            f"--warmup_steps={self.warmup_steps} must be below --total_steps={self.total_steps}",
        )
        require(
            self.process_id < self.num_processes,
            f"--process_id={self.process_id} must be below --num_processes={self.num_processes}",
        )


# ----------------------------------------------------------------------------------------- 7. Files


@contextlib.contextmanager
def atomic_write(path):
    """A file opened for writing that appears under its name only once it is safely on the disk.

    Until then it has another name, which no other process uses. An exception removes it; a kill
    leaves it there, to no harm.
    """
    partial = Path(f"{path}.{platform.node()}.{os.getpid()}.partial")
    partial.parent.mkdir(parents=True, exist_ok=True)
    try:
        with open(partial, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def download(url, file):
    """Writes what an address has to an open file. Raises OSError, HTTPException or BadInput."""
    with urllib.request.urlopen(url, timeout=60) as reply:
        size = int(reply.headers["Content-Length"] or 0)
        while chunk := reply.read(16 << 20):
            file.write(chunk)
            say(f"fetching {url}: {file.tell() >> 20} of {size >> 20} MiB")
    file.flush()
    require(file.tell() >= size, f"it was cut off after {file.tell()} bytes")


def fetch(urls, options, read):
    """Downloads a file from the first of several addresses that works; returns read(its path).

    The file is kept for the next time, under a name derived from the first address. It gets that
    name only after read has succeeded; otherwise nothing is kept. Raises BadInput if every address
    fails or is silent for 60 seconds.
    """
    digest = hashlib.sha256(urls[0].encode()).hexdigest()[:8]
    path = Path(options.data_dir, "downloads", f"{digest}-{Path(urls[0]).name}").expanduser()
    if path.exists():
        return read(path)
    failures = []
    for url in urls:
        try:
            with atomic_write(path) as file:
                download(url, file)
                return read(file.name)  # after that, atomic_write gives the file its name
        except (OSError, http.client.HTTPException, BadInput) as error:
            failures.append(f"{url} ({error})")
            say(f"cannot use {failures[-1]}")
    raise BadInput(f"cannot use {' or '.join(failures)}; you can put a file at {path} yourself")


# ----------------------------------------------------------------------------------- 8. Checkpoints

# A checkpoint is read in three steps. `read_arrays` gets its arrays, under the release's names;
# `to_params` checks and stacks them into the nested dict that `forward` takes; both together are
# `read_checkpoint`. Then `adapt` fits it to an image size and a number of classes.
# `load_pretrained` does the first two for --pretrained, and `load_checkpoint` for your own
# programs.

BUCKET = "https://storage.googleapis.com/vit_models/"
HUB = "https://huggingface.co/timm/"
# The released models, by their names in timm: "orig" are the paper's, "augreg" the later ones of
# arXiv 2106.10270.
PRE_TRAINED = {  # on ImageNet-21k
    "ViT-Ti_16": "vit_tiny_patch16_224.augreg_in21k",
    "ViT-S_32": "vit_small_patch32_224.augreg_in21k",
    "ViT-S_16": "vit_small_patch16_224.augreg_in21k",
    "ViT-B_32": "vit_base_patch32_224.orig_in21k",
    "ViT-B_16": "vit_base_patch16_224.orig_in21k",
    "ViT-B_8": "vit_base_patch8_224.augreg_in21k",
    "ViT-L_32": "vit_large_patch32_224.orig_in21k",
    "ViT-L_16": "vit_large_patch16_224.orig_in21k",
    "ViT-H_14": "vit_huge_patch14_224.orig_in21k",
}
FINE_TUNED = {  # then on ImageNet, at 384 pixels
    "ViT-Ti_16": "vit_tiny_patch16_384.augreg_in21k_ft_in1k",
    "ViT-S_32": "vit_small_patch32_384.augreg_in21k_ft_in1k",
    "ViT-S_16": "vit_small_patch16_384.augreg_in21k_ft_in1k",
    "ViT-B_32": "vit_base_patch32_384.augreg_in21k_ft_in1k",
    "ViT-B_16": "vit_base_patch16_384.orig_in21k_ft_in1k",
    "ViT-L_32": "vit_large_patch32_384.orig_in21k_ft_in1k",
    "ViT-L_16": "vit_large_patch16_384.augreg_in21k_ft_in1k",
}
NEWER_FLAX = {  # part of a name in checkpoints of newer Flax code: what the release has instead
    "opt/target/": "",
    "params/": "",
    "MultiHeadDotProductAttention_0/": "MultiHeadDotProductAttention_1/",
    "LayerNorm_1/": "LayerNorm_2/",
    "MlpBlock_0/": "MlpBlock_3/",
}
BLOCK = "Transformer/encoderblock/"
ATTENTION = f"{BLOCK}MultiHeadDotProductAttention_1/"
TIMM = {  # {name in timm: name in PARAMETERS}, after `split_qkv` and without blocks.0. and so on
    "cls_token": "cls",
    "pos_embed": "Transformer/posembed_input/pos_embedding",
    "patch_embed.proj.weight": "embedding/kernel",
    "patch_embed.proj.bias": "embedding/bias",
    "norm1.weight": f"{BLOCK}LayerNorm_0/scale",
    "norm1.bias": f"{BLOCK}LayerNorm_0/bias",
    "attn.query.weight": f"{ATTENTION}query/kernel",
    "attn.query.bias": f"{ATTENTION}query/bias",
    "attn.key.weight": f"{ATTENTION}key/kernel",
    "attn.key.bias": f"{ATTENTION}key/bias",
    "attn.value.weight": f"{ATTENTION}value/kernel",
    "attn.value.bias": f"{ATTENTION}value/bias",
    "attn.proj.weight": f"{ATTENTION}out/kernel",
    "attn.proj.bias": f"{ATTENTION}out/bias",
    "norm2.weight": f"{BLOCK}LayerNorm_2/scale",
    "norm2.bias": f"{BLOCK}LayerNorm_2/bias",
    "mlp.fc1.weight": f"{BLOCK}MlpBlock_3/Dense_0/kernel",
    "mlp.fc1.bias": f"{BLOCK}MlpBlock_3/Dense_0/bias",
    "mlp.fc2.weight": f"{BLOCK}MlpBlock_3/Dense_1/kernel",
    "mlp.fc2.bias": f"{BLOCK}MlpBlock_3/Dense_1/bias",
    "norm.weight": "Transformer/encoder_norm/scale",
    "norm.bias": "Transformer/encoder_norm/bias",
    "head.weight": "head/kernel",
    "head.bias": "head/bias",
}


def block_name(name, i):
    """The name in a checkpoint of block i of a stacked array. Other names stay as they are."""
    return name.replace(BLOCK, f"Transformer/encoderblock_{i}/")


def read_safetensors(path):
    """{name: float32 array} of a .safetensors file that holds F32, F16 or BF16.

    Eight bytes give the length of the header; the header, JSON, says which bytes are which array.
    It is accepted only if the arrays follow each other without a gap to the end of the file. Damage
    raises one of many types of exceptions.
    """
    dtypes = {"F32": np.float32, "F16": np.float16, "BF16": jnp.bfloat16}
    data = np.fromfile(path, np.uint8)
    start = 8 + int.from_bytes(data[:8].tobytes(), "little")
    header = json.loads(data[8:start].tobytes())
    header.pop("__metadata__", None)
    arrays, offset = {}, start
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        begin, end = entry["data_offsets"]
        require(start + begin == offset, f"{name} does not begin where the array before it ends")
        offset = start + end
        array = data[start + begin : offset].view(dtypes[entry["dtype"]])
        arrays[name] = array.reshape(entry["shape"]).astype(np.float32)
    require(offset == len(data), f"it has {len(data)} bytes instead of {offset}")
    return arrays


def split_qkv(arrays):
    """timm's query, key and value, one matrix [3D, D] and one bias [3D], as three of each."""
    split = {}
    for name, array in arrays.items():
        if ".qkv." in name:
            for part, third in zip(("query", "key", "value"), np.split(array, 3), strict=True):
                split[name.replace("qkv", part)] = third
        else:
            split[name] = array
    return split


def from_timm(arrays):
    """{name in timm: array} -> {released name: array}, each in the shape of the release.

    The file does not say how many heads there are. We take the number that the model of this width
    has in SIZES, or D/64 if there is none. Raises BadInput for a name that is not in TIMM, because
    then it is another kind of model.

    DeiT, DINO and other models of timm were trained with pixels scaled to ImageNet's mean and
    deviation, not as in `to_pixels`: fine-tune them before you use them. Their GELU is the exact
    one, which differs from that in `mlp` by at most 4.7e-4.
    """
    width = arrays["cls_token"].shape[-1]
    heads = {d: a for d, _, a in SIZES.values()}.get(width, width // 64)
    sizes = {"D": width, "A": heads, "E": width // heads}
    released = {}
    for name, array in split_qkv(arrays).items():
        # "blocks.7.norm1.bias" -> "7", "norm1.bias"; "cls_token" -> None, "cls_token"
        block, layer = re.fullmatch(r"(?:blocks\.(\d+)\.)?(.*)", name).groups()
        require(layer in TIMM, f"it has {name}, so it is another kind of model")
        letters, _ = PARAMETERS[TIMM[layer]]
        if array.ndim == 4:
            array = array.transpose(2, 3, 1, 0)  # [D, 3, P, P] -> [P, P, 3, D]
        elif array.ndim == 2:
            array = array.T  # [outputs, inputs] -> [inputs, outputs]
        if "A" in letters:  # the heads get an axis of their own
            array = array.reshape([sizes[letter] for letter in letters.removeprefix("L")])
        released[block_name(TIMM[layer], block)] = array
    return released


def read_arrays(path):
    """{released name: array} of an .npz, or of a .safetensors as timm writes it.

    The first bytes tell which it is, whatever the file is called. Nothing is unpickled, and the
    arrays of an .npz are checked against their CRC-32. Raises BadInput, or OSError if there is no
    file.
    """
    with open(path, "rb") as file:
        start = file.read(20)
    try:
        if not start.startswith(b"PK"):
            return from_timm(read_safetensors(path))
        with np.load(path) as file:
            arrays = dict(file)
        is_npz = all(isinstance(array, np.ndarray) for array in arrays.values())
        require(is_npz, "it is a zip of other files, such as PyTorch's")
        return arrays
    except Exception as error:  # damaged bytes raise a dozen types in zipfile, zlib, NumPy, json
        what = f"{path}, beginning with {start}, cannot be read as .npz or timm's .safetensors"
        raise BadInput(f"{what} ({str(error)[:200]})") from error


def normalize_names(arrays):
    """Arrays without the spellings of newer Flax code, and without what is not a parameter."""
    renamed = {}
    for name, array in arrays.items():
        for newer, released in NEWER_FLAX.items():
            name = name.replace(newer, released)
        if not name.startswith(("opt/", "train/", "class_names")):
            renamed[name] = array
    return renamed


def check_array(array, axes, sizes, what):
    """Raises BadInput unless an array has the right shape and only finite numbers.

    axes: its letters in PARAMETERS. sizes: {letter: size}; a letter that is not yet in it gets its
    size from this array, and all later ones have to agree.
    """
    for letter, size in zip(axes, array.shape, strict=False):  # another number of axes fails below
        sizes.setdefault(letter, size)
    shape = tuple(sizes.get(letter) for letter in axes)
    require(array.shape == shape, f"{what} has the shape {array.shape}, not {shape}")
    finite = array.size and array.dtype.kind == "f" and np.isfinite(array).all()
    require(finite, f"{what} does not hold finite numbers only")


def to_params(arrays, source):
    """{released name: array} -> params, a nested dict of float32 NumPy arrays.

    A head may be missing, as in some of timm's files, but not half of it. Raises BadInput, naming
    source, for an array that is missing, unknown, of another shape, or not finite.
    """
    arrays = normalize_names(arrays)
    tops = {name.split("/")[0] for name in arrays}
    depth = sum(name.endswith("/LayerNorm_0/bias") for name in arrays)
    require(depth, f"{source} is not a Vision Transformer: it has no blocks")
    sizes, params = {"1": 1, "3": 3}, {}
    # For each parameter: collect its arrays, one for each block, check them, and stack them.
    for name, (letters, _) in PARAMETERS.items():
        top = name.split("/")[0]
        if top in ("pre_logits", "head") and top not in tops:
            continue
        stacked = letters[0] == "L"
        names = [block_name(name, i) for i in range(depth)] if stacked else [name]
        for each in names:
            require(each in arrays, f"{source} has no {each}")
            check_array(arrays[each], letters.removeprefix("L"), sizes, f"{source}: {each}")
        blocks = [np.asarray(arrays.pop(each), np.float32) for each in names]
        params[name] = np.stack(blocks) if stacked else blocks[0]
    require(not arrays, f"{source} has {[*arrays][:3]}, so it is another kind of model")
    patches = sizes["N"] - 1
    square = patches and math.isqrt(patches) ** 2 == patches
    require(square, f"{source} is not for square images: it has embeddings of {patches} patches")
    return nest(params)


def read_checkpoint(path):
    """A checkpoint's params, and its class names, or None if it has none."""
    arrays = read_arrays(path)
    return to_params(arrays, path), arrays.get("class_names")


def load_checkpoint(path):
    """For your own programs: the params of an .npz or of timm's .safetensors, as NumPy arrays.

    Raises BadInput if they are not those of a Vision Transformer, or OSError if there is no file.
    """
    return read_checkpoint(path)[0]


def load_pretrained(options, fine_tuned=False):
    """The checkpoint that --pretrained names: params, and its class names, or None if it has none.

    fine_tuned: whether "released" is the model that was fine-tuned on ImageNet, as for photos and
    --eval_only. Raises BadInput.
    """
    path, model = options.pretrained, options.model
    urls = [path] if path.startswith(("http://", "https://")) else []
    if path == "released":
        table, folder = PRE_TRAINED, "imagenet21k"
        if fine_tuned:
            table, folder = FINE_TUNED, "imagenet21k+imagenet2012"
        require(model in table, f"--model={model} must be one of {', '.join(table)}")
        urls = [f"{HUB}{table[model]}/resolve/main/model.safetensors"]
        if ".orig_" in table[model]:  # the authors' own file comes first
            urls = [f"{BUCKET}{folder}/{model}.npz", *urls]
    if urls:
        params, names = fetch(urls, options, read_checkpoint)
    else:
        params, names = read_checkpoint(os.path.expanduser(path))
    count = num_classes_of(params)
    fits = names is None or len(names) == count
    require(fits, f"{path} has class_names, but not one for each of its {count} classes")
    return params, names


def leaf_name(path):
    """The place of a leaf in a pytree, as jax.tree_util gives it, as a name like "head/bias"."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def to_released(params):
    """Params -> {released name: array}; the stacked blocks become encoderblock_0 and so on."""
    arrays = {}
    for path, leaf in jax.tree.leaves_with_path(params):
        name = leaf_name(path)
        if "/encoderblock/" in name:
            arrays |= {block_name(name, i): array for i, array in enumerate(leaf)}
        else:
            arrays[name] = leaf
    return arrays


def save_checkpoint(path, params, **more):
    """Writes params, and more arrays, to an .npz under the released names, whole or not at all.

    Raises BadInput if a parameter is not finite, and OSError if writing fails.
    """
    params = jax.device_get(params)
    finite = all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params))
    require(finite, f"parameters are nan or infinite, {path} stays as it was; lower --base_lr?")
    with atomic_write(path) as file:
        np.savez(file, **to_released(params), **more)


def resize_position_embeddings(embeddings, grid):
    """Position embeddings for another image size: [1, 1 + g*g, D] -> [1, 1 + grid*grid, D].

    Interpolation is bilinear, with the corners fixed (align_corners in PyTorch), as in the release
    (paper, section 3.2). The embedding of the class token stays as it is.
    """
    old = math.isqrt(embeddings.shape[1] - 1)
    patches = embeddings[0, 1:].reshape(old, old, -1)  # [g, g, D]
    new = np.linspace(0, old - 1, grid)  # coordinates of new rows and columns among the old
    bilinear = np.maximum(0, 1 - abs(new[:, None] - np.arange(old)))  # [grid, g]
    patches = np.einsum("ia,jb,abd->ijd", bilinear, bilinear, patches, optimize=True)
    patches = patches.reshape(1, grid * grid, -1).astype(np.float32)
    return np.concatenate([embeddings[:, :1], patches], axis=1)


def adapt(params, image_size, num_classes=None):
    """Params for images of image_size pixels (paper, section 3.2).

    image_size is rounded down to whole patches, for example 384 to 378 pixels for ViT-H_14; 0 means
    the size that params are for. With num_classes they are prepared for fine-tuning: pre_logits is
    dropped, and the head is all zeros. Raises BadInput if an image is smaller than a patch.
    """
    encoder = dict(params["Transformer"])
    patch, _, _, d = params["embedding"]["kernel"].shape
    grid = (image_size or image_size_of(params)) // patch
    require(grid, f"--image_size={image_size} is smaller than a patch of {patch} pixels")
    embeddings = encoder["posembed_input"]["pos_embedding"]
    encoder["posembed_input"] = {"pos_embedding": resize_position_embeddings(embeddings, grid)}
    params = params | {"Transformer": encoder}  # a new dict: that of the caller stays as it is
    if num_classes:
        params.pop("pre_logits", None)
        kernel, bias = np.zeros((d, num_classes), np.float32), np.zeros(num_classes, np.float32)
        params["head"] = {"kernel": kernel, "bias": bias}
    return params


# ----------------------------------------------------------------------- 9. Runs, devices and hosts

# A run is what its options and its data define. Its folder, --logdir, has checkpoint.npz, by which
# it can be resumed. Several hosts run one process each, by the same command except for
# --process_id. Each reads the whole checkpoint, and its own share of the images. The first host
# alone writes the run's files; so a run is resumed from a folder that all hosts can read. If one
# host fails, JAX aborts the processes of the others: at once if it was the first, otherwise within
# 100 seconds. Then start all of them again.

# These options may differ between hosts, and may change when a run is resumed. (logdir may be
# another path on each host, but to the same folder.)
PER_HOST = ("coordinator_address", "process_id", "logdir", "data_dir")
# These must be the same on all hosts, but may change when a run is resumed.
MAY_CHANGE = ("num_processes", "accum_steps", "remat", "log_every", "eval_every", "eval_only")
MOMENTUM = "train/momentum/"  # how the names of momentum begin in checkpoint.npz


def identity_of(options, data):
    """What defines a run, by name. It can be resumed only if none of this has changed.

    The number of devices and accum_steps are not part of it. But if they change, the result is no
    longer the same to the last bit: sums are rounded differently, and dropout and mixup, where they
    are used, differ.
    """
    free = PER_HOST + MAY_CHANGE
    identity = {name: value for name, value in vars(options).items() if name not in free}
    identity |= {"data": data.get("name"), "classes": np.asarray(data["classes"]).tolist()}
    counts = {f"number of {split} images": len(data[split]) for split in ("train", "test")}
    return identity | counts


def initial_params(options, num_classes):
    """What a run starts from: what --pretrained names, or random params. Raises BadInput."""
    if options.pretrained == "none":
        compiled = jax.jit(init_params, static_argnums=(1, 2, 3))  # faster than array by array
        # Training folds in the step, which is below 2**31, and so never gets this key.
        key = jax.random.fold_in(jax.random.key(options.seed), 2**31)
        params = jax.device_get(compiled(key, options.model, options.image_size, num_classes))
    else:
        params, _ = load_pretrained(options)
    return adapt(params, options.image_size, num_classes)


def same_on_all_hosts(values):
    """Raises BadInput, on every host, naming the first of the values that differs between hosts."""
    names = [name for name in values if name not in PER_HOST]
    digests = np.uint32([zlib.crc32(repr(values[name]).encode()) for name in names])
    everywhere = multihost_utils.process_allgather(digests)  # [hosts, names]
    for name, column in zip(names, everywhere.T, strict=True):
        same = len({*column.tolist()}) == 1
        message = f"the hosts differ in {name}, here {values[name]}"
        require(same, f"{message}; all need the same options, data and folder of the run")


def replicate(tree):
    """Copies arrays, the same on all hosts, to all devices, so that pmap finds them there."""
    mesh = jax.sharding.Mesh(jax.devices(), "devices")
    whole = jax.sharding.PartitionSpec()  # no axis is split: each device gets all of it
    return jax.device_put(tree, jax.sharding.NamedSharding(mesh, whole))


def resume(path, identity):
    """The state and the rows of metrics.csv in the checkpoint of a run, in NumPy arrays.

    Raises BadInput unless it is that of the run with this identity.
    """
    arrays = read_arrays(path)
    require("train/run" in arrays, f"{path} is not the checkpoint of a run: choose --logdir")
    run = json.loads(str(arrays["train/run"]))
    for name, value in identity.items():
        was = run["identity"].get(name)
        change = f"its {name} was {str(was)[:200]}, not {str(value)[:200]}"
        require(was == value, f"{path} belongs to another run, choose another --logdir: {change}")
    params = to_params(arrays, path)

    def restore(place, leaf):
        name = MOMENTUM + leaf_name(place)
        require(name in arrays, f"{path} has no {name}: it was saved with another optimizer")
        return arrays[name].astype(leaf.dtype)

    # The file has the values of momentum. eval_shape gives its structure, and its dtypes, which are
    # those of sgd_init, without computing anything.
    momentum = jax.tree.map_with_path(restore, jax.eval_shape(sgd_init, params))
    state = {"params": params, "momentum": momentum, "step": np.int32(arrays["train/step"])}
    return state, run["rows"]


def start_or_resume(options, data):
    """The state to continue from, on all devices, and the rows of metrics.csv so far.

    They come from checkpoint.npz in options.logdir if there is one; if not, there are no rows, and
    params are what options.pretrained names. Raises BadInput.
    """
    path, identity = f"{options.logdir}/checkpoint.npz", identity_of(options, data)
    if os.path.exists(path):
        state, rows = resume(path, identity)
    else:
        params = initial_params(options, len(data["classes"]))
        state, rows = {"params": params, "momentum": sgd_init(params), "step": np.int32(0)}, []
    same_on_all_hosts(vars(options) | identity | {"step of checkpoint.npz": int(state["step"])})
    return replicate(state), rows


def save_run(options, data, state, rows):
    """Writes checkpoint.npz, on the first host: params, and everything else for `resume`."""
    if jax.process_index() == 0:
        run = {"identity": identity_of(options, data), "rows": rows}
        more = {"train/run": json.dumps(run), "train/step": state["step"]}
        for place, leaf in jax.tree.leaves_with_path(jax.device_get(state["momentum"])):
            more[MOMENTUM + leaf_name(place)] = leaf.astype(np.float32)  # .npz has no bfloat16
        more["class_names"] = [*data["classes"]]
        save_checkpoint(f"{options.logdir}/checkpoint.npz", state["params"], **more)


def join_hosts(options):
    """Connects this host with all others, waiting up to five minutes for them.

    Raises BadInput if options do not say where the others are.
    """
    address = options.coordinator_address
    fits = re.fullmatch(r"auto|.+:\d+", address)
    require(fits, f"--coordinator_address={address!r} must be HOST:PORT of the first host, or auto")
    # Not `say`: JAX does not know yet which host is the first.
    print(f"waiting for all hosts at {address}, five minutes at most", flush=True)
    # JAX's preemption service would catch SIGTERM, by which `kill` ends a process.
    jax.config.update("jax_enable_preemption_service", False)
    known = () if address == "auto" else (address, options.num_processes, options.process_id)
    try:
        jax.distributed.initialize(
            *known, initialization_timeout=300, heartbeat_timeout_seconds=100
        )
    except ValueError as error:
        raise BadInput(f"--coordinator_address={address}: {error}") from error
    # The hosts have 30 seconds for the first collective; loading data may take longer, so we run
    # one now.
    multihost_utils.sync_global_devices("all hosts are here")


# ------------------------------------------------------------------------------------- 10. Datasets

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")  # which Pillow decodes itself
KRIZ = "https://www.cs.toronto.edu/~kriz/"
CIFAR = {  # SHA-256 of the authors' archives
    "cifar10": "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
    "cifar100": "58a81ae192c23a4be8b1804d68e518ed807d710a4eb253b1f2a199162a40d8ec",
}
digit_font = functools.cache(ImageFont.load_default)


@functools.cache
def draw_digit(i):
    """Digit i modulo 10 in Pillow's own font, shifted and rotated: (RGB image, 32 x 32; label)."""
    rng, label = np.random.default_rng(i), i % 10
    font = digit_font(int(rng.integers(22, 31)))
    center = tuple(rng.integers(13, 20, 2))
    image = Image.new("L", (32, 32))
    ImageDraw.Draw(image).text(center, str(label), 255, font, anchor="mm")
    return image.rotate(rng.uniform(-15, 15), BILINEAR).convert("RGB"), label


def decode(file, name):
    """A path or file object -> Pillow image in RGB, upright. Raises BadInput, with the name."""
    try:
        with Image.open(file, formats=FORMATS) as image:
            # Modes F and I: floats, and integers of 16 or 32 bits, which Pillow cuts off at 255.
            require(image.mode[0] not in "FI", "save it with 8 bits per channel")
            image = ImageOps.exif_transpose(image)
            if "transparency" in image.info:
                image = image.convert("RGBA")  # Pillow warns if transparency is dropped directly
            return image.convert("RGB")
    except Exception as error:  # damaged bytes raise a dozen types in Pillow's decoders
        raise BadInput(f"cannot read the image {name} ({error})") from error


def cifar(name, options):
    """CIFAR-10 or CIFAR-100, with 98 % of the training images, as in the release.

    A record is a label byte (in CIFAR-100 a coarse and a fine one), then 32 x 32 bytes of red, of
    green and of blue. Raises BadInput.
    """

    def read_archive(path):
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        require(digest == CIFAR[name], f"{path} has another SHA-256 than the authors': delete it")
        with tarfile.open(path) as archive:
            return {Path(x.name).name: archive.extractfile(x).read() for x in archive if x.isfile()}

    files = fetch([f"{KRIZ}{name.replace('cifar', 'cifar-')}-binary.tar.gz"], options, read_archive)
    if name == "cifar10":
        label_bytes, names = 1, "batches.meta.txt"
        train_files, test_files = [f"data_batch_{i}.bin" for i in range(1, 6)], ["test_batch.bin"]
    else:
        label_bytes, names = 2, "fine_label_names.txt"
        train_files, test_files = ["train.bin"], ["test.bin"]

    def records(file_names):  # uint8 [n, label_bytes + 3072]
        data = b"".join(files[x] for x in file_names)
        return np.frombuffer(data, np.uint8).reshape(-1, label_bytes + 3072)

    def read(record):
        pixels = record[label_bytes:].reshape(3, 32, 32).transpose(1, 2, 0)
        return Image.fromarray(np.ascontiguousarray(pixels)), int(record[label_bytes - 1])

    train, test = records(train_files), records(test_files)
    train = train[: round(0.98 * len(train))]
    return {"classes": files[names].decode().split(), "train": train, "test": test, "read": read}


def image_folder(root):
    """Images in folders {train,test}/CLASS; for test there may be val or validation instead.

    Below CLASS there may be more folders. If there is no folder train, images are in folders CLASS
    itself, and every tenth is for testing. Links are followed, hidden files ignored. Raises
    BadInput.
    """
    kinds = Image.registered_extensions()  # {".jpg": "JPEG", ...}

    def find(folder, pattern="*/**"):  # [(class, path)]
        names = sorted(glob.glob(pattern, root_dir=f"{root}/{folder}", recursive=True))
        images = [name for name in names if kinds.get(Path(name).suffix.lower()) in FORMATS]
        return [(Path(name).parts[0], f"{root}/{folder}/{name}") for name in images]

    if os.path.isdir(f"{root}/train"):
        train, test = find("train"), find("test") or find("val") or find("validation")
    else:
        images = find(".", "*/*")
        train, test = [x for i, x in enumerate(images) if i % 10], images[::10]
    classes, tested = (sorted({name for name, _ in items}) for items in (train, test))
    require(
        len(classes) > 1 and tested,
        f"{root} needs two or more classes, in {{train,test}}/CLASS/*.jpg (png, webp, ...) or in "
        f"CLASS/*.jpg, but has {classes[:9]} for training and {tested[:9]} for testing",
    )
    unknown = sorted({*tested} - {*classes})
    require(not unknown, f"{root} has images of {unknown[:9]} for testing, but none for training")

    def read(item):
        name, path = item
        return decode(path, path), classes.index(name)

    return {"classes": classes, "train": train, "test": test, "read": read}


def tfds_dataset(name, options):
    """A TFDS dataset, read as ArrayRecord. Reading it does not need TensorFlow; preparing it does.

    Raises BadInput. If it is not prepared in options.data_dir, the message is the command for that.
    """
    import tensorflow_datasets as tfds  # only here: importing it takes longer than JAX

    logging.getLogger("absl").setLevel(logging.ERROR)  # it warns of folders that TFDS itself made
    data_dir = os.path.expanduser(options.data_dir)
    try:
        builder = tfds.builder(name, data_dir=data_dir)
    except (ValueError, AssertionError) as error:
        why = str(error).partition("\n")[0]
        raise BadInput(f"{name} is not a file, a folder or a dataset: {why}") from error
    where = {"data_dir": data_dir, "file_format": "array_record"}
    command = f"t.builder('{name}', **{where}).download_and_prepare()"
    run = f'python -c "import tensorflow_datasets as t; {command}"'
    require(builder.is_prepared(), f"{name} must be prepared, once, with TensorFlow: {run}")
    features, splits = dict(builder.info.features), builder.info.splits
    classes = getattr(features.get("label"), "names", None)
    require(classes and "image" in features, f"{name} is not for image classification")

    def source(split):
        try:
            return builder.as_data_source(split, decoders={"image": tfds.decode.SkipDecoding()})
        except NotImplementedError as error:  # it was prepared in another format
            raise BadInput(f"{name}: {error}") from error

    def read(example):
        return decode(io.BytesIO(example["image"]), f"in {name}"), int(example["label"])

    # Test on the test split; if that hides its labels as -1, on validation; or on a tenth of train.
    has_labels = [x for x in ("test", "validation") if x in splits and source(x)[0]["label"] >= 0]
    train, test = ("train", has_labels[0]) if has_labels else ("train[:90%]", "train[90%:]")
    if builder.name == "imagenet2012":  # as in the release
        train = "train[:99%]"
    train = source(train) if "train" in splits else []
    return {"classes": classes, "train": train, "test": source(test), "read": read}


def load_data(name, options):
    """DATA of the command line -> data as `train` wants it, with a "name". Raises BadInput."""
    if name == "digits":
        train, test = range(8000), range(8000, 9000)
        data = {"classes": [*"0123456789"], "train": train, "test": test, "read": draw_digit}
    elif name in CIFAR:
        data = cifar(name, options)
    elif os.path.isdir(name):
        data, name = image_folder(name), os.path.abspath(name)
    else:
        data = tfds_dataset(name, options)
    train, test, classes = (len(data[part]) for part in ("train", "test", "classes"))
    say(f"{name}: {train} images for training and {test} for testing, of {classes} classes")
    return data | {"name": name}


# --------------------------------------------------------------------------------------- 11. Photos


def attention_rollout(weights):
    """How much of each patch reaches the class token: [L, B, A, N, N] -> [B, grid, grid], 0 to 1.

    The mean over heads, mixed with the identity for the residual, block after block (arXiv
    2005.00928). A few patches often outshine all others by far (arXiv 2309.16588), so 1 is the 99th
    percentile of an image, and anything above is clipped.
    """
    weights = weights.mean(axis=2)  # [L, B, N, N]
    weights = (weights + np.eye(weights.shape[-1])) / 2
    reached = functools.reduce(np.matmul, weights[::-1])  # last block x ... x first: [B, N, N]
    reached = reached[:, 0, 1:]  # what the class token has of each patch: [B, N-1]
    grid = math.isqrt(reached.shape[1])
    brightest = np.percentile(reached, 99, axis=1, keepdims=True)
    return np.minimum(1, reached / brightest).reshape(-1, grid, grid)


def classify(options, photos):
    """Prints the five most likely classes of each photo, and writes PHOTO-attention.png.

    The picture, in the current folder, has the photo on the left, and on the right the photo again,
    dark where the class token does not attend. Raises BadInput.
    """
    params, names = load_pretrained(options, fine_tuned=True)
    count = num_classes_of(params)
    require(count, f"{options.pretrained} has no head: fine-tune it first")
    if names is None and count == 1000:  # then we assume that they are ImageNet's
        from tensorflow_datasets.datasets.siscore import labels  # where TFDS has readable names

        names = labels.IMAGENET_LABELS_LIST
    params = jax.device_put(adapt(params, options.image_size))
    model = jax.jit(functools.partial(forward, return_attention=True))
    for photo in photos:
        image = decode(photo, photo)
        pixels = to_pixels(to_array(image, image_size_of(params)), options.dtype)
        logits, weights = model(params, pixels[None])
        say(photo)
        probabilities = np.asarray(jax.nn.softmax(logits[0]))
        for label in probabilities.argsort()[::-1][:5]:
            say(f"{probabilities[label]:8.2%}  {names[label] if names is not None else label}")
        brightness = 0.1 + 0.9 * attention_rollout(np.asarray(weights))[0]
        mask = Image.fromarray((255 * brightness).astype(np.uint8)).resize(image.size, BILINEAR)
        attended = Image.composite(image, Image.new("RGB", image.size), mask)
        picture = f"{Path(photo).name}-attention.png"
        Image.fromarray(np.hstack([image, attended])).save(picture)
        say(f"where it looked: {picture}")


# --------------------------------------------------------------------------------- 12. Command line

PRESETS = {  # defaults of some datasets
    "digits": {
        "model": "ViT-XS_8",
        "pretrained": "none",
        "image_size": 32,
        "augment": "none",
        "batch_size": 64,
        "accum_steps": 1,
        "total_steps": 800,
        "warmup_steps": 100,
        "base_lr": 0.1,
        "log_every": 100,
        "eval_every": 400,
    },
    "imagenet2012": {"total_steps": 20_000},
}


def flag_parser():
    """A parser for DATA and all flags of Options. Its result has only the flags that are given."""

    def refuse(message):
        raise BadInput(message)

    parser = argparse.ArgumentParser(
        "vit.py", allow_abbrev=False, argument_default=argparse.SUPPRESS
    )
    parser.error = refuse  # instead of printing the usage, too
    text = "digits, cifar10, cifar100, a TFDS dataset, a folder of CLASS/*.jpg, or photos (digits)"
    parser.add_argument("data", metavar="DATA", nargs="*", default=["digits"], help=text)
    for field in dataclasses.fields(Options):
        kind = {"action": "store_true"} if field.type is bool else {"type": field.type}
        choices = field.metadata["choices"] or ""
        text = f"{field.metadata['help']} {choices} ({field.default})"
        parser.add_argument(f"--{field.name}", help=text, **kind)
    return parser


def parse_options(argv):
    """The command line: DATA, a list of photos (empty unless they are given), and Options.

    Precedence: flags on the command line, then defaults for photos, --eval_only or the dataset,
    then those of Options. Raises BadInput.
    """
    flags = vars(flag_parser().parse_intermixed_args(argv))
    paths = flags.pop("data")
    photos = paths if all(map(os.path.isfile, paths)) else []
    require(photos or len(paths) == 1, f"of {' '.join(paths)}, not all are image files")
    run_name = re.sub(r"\W+", "-", paths[0]).strip("-") or "data"  # "./a/b/" -> "a-b"
    flags["logdir"] = os.path.expanduser(flags.get("logdir", f"runs/{run_name}"))
    if photos:
        defaults = {"image_size": 0}
    elif "eval_only" in flags:
        defaults = {"image_size": 0, "pretrained": f"{flags['logdir']}/checkpoint.npz"}
    else:
        defaults = PRESETS.get(paths[0].split(":")[0], {})  # "imagenet2012:5.1.0", too
    return paths[0], photos, Options(**(defaults | flags))


def evaluate_only(options, data):
    """Evaluates what --pretrained names.

    Raises BadInput if its class names, or without names their number, are not those of data.
    """
    params, names = load_pretrained(options, fine_tuned=True)
    classes = [*data["classes"]]
    same = len(classes) == num_classes_of(params) if names is None else [*names] == classes
    require(same, f"{options.pretrained} has other classes than {data['name']}, or no head")
    same_on_all_hosts(vars(options) | identity_of(options, data))
    evaluate(replicate(adapt(params, options.image_size)), data, options)


def main(argv=None):
    """Runs the command line, and returns its exit status.

    - 0: All went well.
    - 1: There is a bug, and other hosts: its traceback is printed. (Alone, it is raised.)
    - 2: The user, a missing package, the disk, the memory or another host is at fault.
    - 130: Ctrl-C was pressed.

    Unless it is 0, the last line on stderr says what happened.
    """
    try:
        data, photos, options = parse_options(argv)
        if options.coordinator_address or options.num_processes > 1:
            join_hosts(options)
        if photos:
            classify(options, photos)
        elif options.eval_only:
            evaluate_only(options, load_data(data, options))
        else:
            train(options, load_data(data, options))
        return 0
    except KeyboardInterrupt:
        status, line = 130, "stopped; a training run resumes from its last evaluation"
    except (BadInput, OSError, ImportError, MemoryError) as error:
        status, line = 2, str(error)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" in str(error):
            line = "out of memory; try a larger --accum_steps, --remat, or --dtype=bfloat16"
        elif jax.distributed.is_initialized():
            line = "another host may have ended, or cannot be reached"
        else:
            raise
        status, line = 2, f"{line} ({error})"
    except Exception:
        if not jax.distributed.is_initialized():
            raise
        # To raise would not end the process: it would wait for the other hosts, and they for it.
        traceback.print_exc()
        status, line = 1, "this is a bug"
    print("vit.py:", " ".join(line.split())[:600], file=sys.stderr, flush=True)
    return status


if __name__ == "__main__":
    if status := main():
        os._exit(status)  # at once: sys.exit would wait for updates, images and hosts
