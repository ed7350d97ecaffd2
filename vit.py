# SPDX-License-Identifier: Apache-2.0
# /// script
# requires-python = ">=3.10"
# dependencies = ["jax>=0.6.0", "jaxlib>=0.6.0", "numpy>=1.26", "pillow>=10.1",
#                 "tensorflow-datasets>=4.9.10", "importlib_resources"]
# ///
"""Vision Transformer (ViT) in pure JAX, in one file: the model, fine-tuning, photos.

"An Image is Worth 16x16 Words" (arXiv 2010.11929, "the paper" below) and the recipe of its code,
google-research/vision_transformer ("the release"). Run it, read it, copy it:

    python vit.py digits       # learns to read digits in a quarter of a minute
    python vit.py cifar10      # fine-tunes the released ViT-B/16
    python vit.py photo.jpg --pretrained=runs/cifar10/checkpoint.npz

Parts 1 to 5 are the lesson; the rest feeds it. What a user can mend is raised as BadInput.
Shapes: B images of H x W pixels, patches of P x P, N tokens (the class token included), width D,
L blocks, A attention heads, K classes. Two ideas of JAX to begin with: a *pytree* is a nested dict
of arrays, as our parameters are, and `jax.tree.map(f, a, b)` applies f leaf by leaf; a *key* is
random state as a value: the same key gives the same numbers, `split` and `fold_in` make new keys.
"""
import os
import signal
import sys

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C: no traceback from here on
    sys.stdout.reconfigure(line_buffering=True)  # in a pipe, too
    os.environ.setdefault("HOME", os.curdir)  # some containers have none
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", os.path.expanduser("~/.cache/vit.py"))

import argparse
import contextlib
import dataclasses
import functools
import glob
import hashlib
import inspect
import io
import json
import logging
import math
import re
import tarfile
import threading
import time
import urllib.request
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax._src.distributed import global_state as distributed
from jax.experimental.multihost_utils import assert_equal, process_allgather
from PIL import Image, ImageDraw, ImageFont, ImageOps

# -------------------------------------------------------------------------------------- 1. Options

CHOICES = {"dtype": ("float32", "bfloat16"), "decay_type": ("cosine", "linear"),
           "augment": ("inception", "none")}
MAY_BE_ZERO = ("warmup_steps", "base_lr", "dropout", "mixup_alpha", "seed", "process_id")
BELOW = {"image_size": 4097, "batch_size": 2**16 + 1, "dropout": 1}  # others: below 2**31

@dataclasses.dataclass(frozen=True)
class Options:
    """All flags, with the release's names and recipe; --help prints the comments. BadInput."""
    model: str = "ViT-B_16"  # ViT-SIZE_PATCH, sizes XS Ti S B L H
    pretrained: str = "released"  # or none, or a checkpoint's file or address
    image_size: int = 384  # side of what the model sees, in pixels
    dtype: str = "float32"  # of activations, or bfloat16; parameters are float32
    batch_size: int = 512  # images in an update, on all devices together
    accum_steps: int = 8  # parts in which a device does its share
    total_steps: int = 10_000  # number of updates
    warmup_steps: int = 500  # updates while the learning rate rises
    base_lr: float = 0.03  # learning rate after them
    decay_type: str = "cosine"  # how it falls from there, or linear
    grad_norm_clip: float = 1.0  # largest global norm of the gradients
    dropout: float = 0.0  # dropout rate
    mixup_alpha: float = 0.0  # blend images by Beta(alpha, alpha); 0: never
    augment: str = "inception"  # random crops and mirroring, or none
    seed: int = 0  # of all that is random
    # The run
    logdir: str = "runs"  # folder of what a run writes (command line: runs/DATA)
    data_dir: str = "~/tensorflow_datasets"  # of TFDS; what is fetched, in downloads/
    log_every: int = 10  # steps between lines of progress
    eval_every: int = 100  # steps between evaluations
    checkpoint_every: int = 1000  # steps between checkpoints
    eval_only: bool = False  # test --pretrained, by default logdir's
    remat: bool = False  # less memory, more computing
    # Several hosts, one command on each
    coordinator_address: str = ""  # HOST:PORT of the first, or auto
    num_processes: int = 1  # number of hosts
    process_id: int = 0  # number of this one, from 0

    def __post_init__(self):
        for name, value in vars(self).items():
            fits = value in CHOICES.get(name, [value])
            if type(value) in (int, float):
                fits = 0 <= value < BELOW.get(name, 2**31) and (value or name in MAY_BE_ZERO)
            require(fits, f"--{name}={value} is out of range {CHOICES.get(name, '')}")
        require(self.warmup_steps < self.total_steps,
                f"--warmup_steps={self.warmup_steps} must be below --total_steps")

# ---------------------------------------------------------------------------------------- 2. Model

SIZES = {  # D, L, A, width of the MLP: the paper, table 1; Ti, S: arXiv 2106.10270
    "XS": (64, 2, 4, 256),  # ours, for digits on a CPU
    "Ti": (192, 12, 3, 768),
    "S": (384, 12, 6, 1536),
    "B": (768, 12, 12, 3072),
    "L": (1024, 24, 16, 4096),
    "H": (1280, 32, 16, 5120),
}

def linear(x, kernel, bias):
    """x @ kernel + bias: [..., I] -> [..., O], in the dtype of x. Kernels may be split into heads,
    [D, A, D/A] or [A, D/A, D]; as one matrix [I, O] they need one large product, the quickest."""
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
    kernel [P, P, 3, D], bias [D]: the same as a convolution with kernel and stride P. TypeError or
    ValueError where H or W is no multiple of P."""
    b, h, w, c = images.shape
    p = kernel.shape[0]
    x = images.reshape(b, h // p, p, w // p, p, c)  # rows and columns of patches
    x = x.transpose(0, 1, 3, 2, 4, 5)  # [B, H/P, W/P, P, P, 3]
    x = x.reshape(b, (h // p) * (w // p), p * p * c)  # [B, N-1, P*P*3]
    return linear(x, kernel, bias)  # [B, N-1, D]

def attention(x, query, key, value, out):
    """Multi-head self-attention (paper, appendix A): [B, N, D] -> [B, N, D], and its weights
    [B, A, N, N], float32: how much each token (row) takes from each (column). query, key, value:
    dicts of kernel [D, A, D/A] and bias [A, D/A]; out: kernel [A, D/A, D] and bias [D]."""
    b, n, d = x.shape
    heads, size = query["bias"].shape
    q, k, v = (linear(x, **p).reshape(b, n, heads, size).swapaxes(1, 2)
               for p in (query, key, value))  # [B, N, D] -> [B, A, N, D/A]
    scores = jnp.matmul(q / size**0.5, k.swapaxes(2, 3), preferred_element_type=jnp.float32)
    weights = jax.nn.softmax(scores, axis=-1)  # [B, A, N, N]
    y = weights.astype(x.dtype) @ v  # [B, A, N, D/A]
    y = y.swapaxes(1, 2).reshape(b, n, d)  # the heads side by side again: [B, N, D]
    return linear(y, **out), weights

def mlp(x, Dense_0, Dense_1, dropout_key=None, dropout_rate=0.0):
    """Two linear layers, a GELU (tanh form) between: [B, N, D] -> [B, N, 4D] -> [B, N, D]."""
    x = jax.nn.gelu(linear(x, **Dense_0), approximate=True)
    return linear(dropout(x, dropout_key, dropout_rate), **Dense_1)

def encoder_block(x, block, dropout_key=None, dropout_rate=0.0):
    """One pre-norm Transformer block (paper, eq. 2, 3): [B, N, D] -> [B, N, D], attention weights.
    block: the parameters of one block, under the names of the released checkpoints."""
    keys = [None] * 3 if dropout_key is None else jax.random.split(dropout_key, 3)
    y = layer_norm(x, **block["LayerNorm_0"])
    y, weights = attention(y, **block["MultiHeadDotProductAttention_1"])
    x = x + dropout(y, keys[0], dropout_rate)
    y = layer_norm(x, **block["LayerNorm_2"])
    y = mlp(y, **block["MlpBlock_3"], dropout_key=keys[1], dropout_rate=dropout_rate)
    return x + dropout(y, keys[2], dropout_rate), weights

def forward(params, images, dropout_key=None, dropout_rate=0.0, remat=False,
            return_attention=False):
    """The Vision Transformer: pixels [B, H, W, 3] in [-1, 1] -> logits [B, K], float32; with
    return_attention also the attention weights, [L, B, A, N, N].
    All sizes follow from params, see `init_params`. Activations have the dtype of images, float32
    or bfloat16. A key turns dropout on. TypeError where the patches do not fit the embeddings.
    For the gradient, JAX keeps what the forward pass computed. Here it keeps the products with
    weight matrices only; norms, softmax and GELU are cheaper to compute again than to write to
    memory and read back. With remat it keeps only what goes from block to block."""
    encoder = params["Transformer"]
    blocks = encoder["encoderblock"]  # the arrays of the L blocks are stacked: [L, ...]
    x = patch_embedding(images, **params["embedding"])  # [B, N-1, D]
    cls = jnp.repeat(params["cls"].astype(x.dtype), len(images), axis=0)  # [B, 1, D]
    x = jnp.concatenate([cls, x], axis=1)  # [B, N, D]
    x = x + encoder["posembed_input"]["pos_embedding"].astype(x.dtype)
    block_keys = None  # then each block gets None
    if dropout_key is not None:
        keys = jax.random.split(dropout_key, 1 + blocks["LayerNorm_0"]["scale"].shape[0])
        x = dropout(x, keys[0], dropout_rate)
        block_keys = keys[1:]
    def apply_block(x, block_and_key):
        x, weights = encoder_block(x, *block_and_key, dropout_rate)
        return x, (weights if return_attention else None)

    keep = None if remat else jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    apply_block = jax.checkpoint(apply_block, policy=keep, prevent_cse=False)
    # scan applies it to slice after slice of the stacked blocks, carrying x along. A Python loop
    # would do the same, but XLA would have to compile every block by itself.
    x, weights = jax.lax.scan(apply_block, x, (blocks, block_keys))
    x = layer_norm(x, **encoder["encoder_norm"])[:, 0]  # the class token: [B, D]
    if "pre_logits" in params:  # in the ImageNet-21k checkpoints of the paper
        x = jnp.tanh(linear(x, **params["pre_logits"]))
    logits = linear(x.astype(jnp.float32), **params["head"])  # [B, D] -> [B, K]
    return (logits, weights) if return_attention else logits

def init_params(key, model, image_size, num_classes, features=0):
    """Random parameters to train from scratch, distributed as the release's: a nested dict of
    float32 arrays under its names. model: like "ViT-B_16", or (P, D, L, A, width of the MLP);
    image_size in pixels; features: the width of a pre_logits layer, for the shapes only."""
    if isinstance(model, str):
        _, name = model.split("-")
        size, patch = name.split("_")
        model = int(patch), *SIZES[size]
    patch, d, depth, heads, hidden = model
    per_head = [heads, d // heads]
    tokens = 1 + (image_size // patch) ** 2
    keys = iter(jax.random.split(key, 14))
    init = jax.nn.initializers
    def norm(*shape):
        return {"scale": jnp.ones(shape), "bias": jnp.zeros(shape)}

    def dense(inputs, outputs, bias_init=init.zeros):  # kernel [L, *inputs, *outputs]
        in_axes, out_axes = range(1, 1 + len(inputs)), range(-len(outputs), 0)
        xavier = init.xavier_uniform(in_axes, out_axes, batch_axis=0)
        return {"kernel": xavier(next(keys), (depth, *inputs, *outputs)),
                "bias": bias_init(next(keys), (depth, *outputs))}

    params = {
        "embedding": {"kernel": init.lecun_normal((0, 1, 2))(next(keys), (patch, patch, 3, d)),
                      "bias": jnp.zeros(d)},
        "cls": jnp.zeros((1, 1, d)),
        "Transformer": {
            "posembed_input": {"pos_embedding": init.normal(0.02)(next(keys), (1, tokens, d))},
            "encoderblock": {
                "LayerNorm_0": norm(depth, d),
                "MultiHeadDotProductAttention_1": {
                    "query": dense([d], per_head), "key": dense([d], per_head),
                    "value": dense([d], per_head), "out": dense(per_head, [d])},
                "LayerNorm_2": norm(depth, d),
                "MlpBlock_3": {"Dense_0": dense([d], [hidden], init.normal(1e-6)),
                               "Dense_1": dense([hidden], [d], init.normal(1e-6))}},
            "encoder_norm": norm(d)},
        "head": {"kernel": jnp.zeros((features or d, num_classes)), "bias": jnp.zeros(num_classes)},
    }
    if features:
        params["pre_logits"] = {"kernel": jnp.zeros((d, features)), "bias": jnp.zeros(features)}
    return params

# ------------------------------------------------------------------------------------- 3. Learning

def to_pixels(images, dtype=jnp.float32):
    """uint8 [...] -> [-1, 1], which the released models want."""
    return ((images.astype(jnp.float32) - 127.5) / 127.5).astype(dtype)

def cross_entropy(logits, targets):
    """Mean of -sum(targets * log softmax(logits)): [B, K] logits, [B, K] probabilities -> []."""
    return -(targets * jax.nn.log_softmax(logits)).sum(axis=-1).mean()

def mixup(images, targets, share):
    """Blends a batch with itself reversed as share : 1 - share, images [B, ...] and targets [B, K]
    alike (arXiv 1710.09412). Here the batch is what a device has at a time, so two or more."""
    return tuple(share * x + (1 - share) * x[::-1] for x in (images, targets))

def learning_rate(step, base_lr, total_steps, warmup_steps, decay_type="cosine"):
    """The rate of update `step`, the first being 0: a linear warm-up from 0 to base_lr, then cosine
    to 0 or linear to 1e-5, as the release. Int (or int array) -> float32."""
    progress = jnp.maximum(0, step - warmup_steps) / (total_steps - warmup_steps)
    if decay_type == "cosine":
        rate = base_lr * (1 + jnp.cos(jnp.pi * progress)) / 2
    else:
        rate = 1e-5 + (base_lr - 1e-5) * (1 - progress)
    return rate * jnp.minimum(1, step / warmup_steps) if warmup_steps else rate

def clip_by_global_norm(grads, max_norm):
    """Scales all gradients alike so that their common L2 norm is at most max_norm."""
    norm = jnp.sqrt(sum(jnp.vdot(g, g) for g in jax.tree.leaves(grads)))
    return jax.tree.map(lambda g: g * jnp.minimum(1, max_norm / norm), grads)

def sgd_init(params):
    """Zero momentum for each parameter, of the same shape; the release keeps it in bfloat16."""
    return jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.bfloat16), params)

def sgd_update(params, momentum, grads, learning_rate, decay=0.9):
    """SGD with momentum, not Nesterov, without weight decay: new params and momentum.
    decay * momentum is rounded to momentum's dtype; the sum and the update are float32."""
    total = jax.tree.map(lambda m, g: decay * m + g, momentum, grads)
    params = jax.tree.map(lambda p, m: p - learning_rate * m, params, total)
    return params, jax.tree.map(lambda old, m: m.astype(old.dtype), momentum, total)

@functools.partial(jax.pmap, axis_name="devices", in_axes=(None, 0, 0, None), out_axes=None,
                   static_broadcasted_argnums=3, donate_argnums=0)
def train_step(state, images, labels, options):
    """One update, as each device runs it on its share of the batch: new state, loss, learning rate.
    state: dict of params, momentum and step (int32 []). images: uint8 [accum_steps, B, H, W, 3],
    labels: int32 [accum_steps, B]; the caller puts an axis of devices in front of both.

    `pmap` compiles a function once and runs it on all devices at the same time. Its in_axes say
    what each is given: 0, its own slice of the first axis; None, all of it. A static argument is
    known when it is compiled. A donated one gives its memory to the results: there is never a
    second copy of the state. Numbers cross between devices at one point only: `pmean` replaces
    loss and gradients by their mean. All get the same new state; out_axes=None returns it once."""
    params = state["params"]
    key = jax.random.fold_in(jax.random.key(options.seed), state["step"])
    mixup_key, dropout_key = jax.random.split(key)
    dropout_key = jax.random.fold_in(dropout_key, jax.lax.axis_index("devices"))
    dropout_keys = jax.random.split(dropout_key, options.accum_steps)
    def loss_of(params, images, labels, dropout_key):
        images, targets = to_pixels(images), jax.nn.one_hot(labels, params["head"]["bias"].size)
        if options.mixup_alpha:
            share = jax.random.beta(mixup_key, options.mixup_alpha, options.mixup_alpha)
            images, targets = mixup(images, targets, share)
        images = images.astype(options.dtype)
        logits = forward(params, images, dropout_key, options.dropout, options.remat)
        return cross_entropy(logits, targets) / options.accum_steps

    def accumulate(total, micro_batch):
        new = jax.value_and_grad(loss_of)(params, *micro_batch)
        return jax.tree.map(jnp.add, total, new), None

    zeros = 0.0, jax.tree.map(jnp.zeros_like, params)
    (loss, grads), _ = jax.lax.scan(accumulate, zeros, (images, labels, dropout_keys))
    if jax.device_count() > 1:  # on one it would only copy it all (5 % of a step)
        loss, grads = jax.lax.pmean((loss, grads), "devices")
    grads = clip_by_global_norm(grads, options.grad_norm_clip)
    rate = learning_rate(state["step"], options.base_lr, options.total_steps, options.warmup_steps,
                         options.decay_type)
    params, momentum = sgd_update(params, state["momentum"], grads, rate)
    return {"params": params, "momentum": momentum, "step": state["step"] + 1}, loss, rate

@functools.partial(jax.pmap, axis_name="devices", in_axes=(None, 0, 0, None), out_axes=None,
                   static_broadcasted_argnums=3)
def eval_step(params, images, labels, dtype):
    """How many uint8 images [devices, B, H, W, 3] get their label [devices, B] on all: int32 []."""
    guesses = forward(params, to_pixels(images, dtype)).argmax(axis=-1)
    return jax.lax.psum((guesses == labels).sum(), "devices")

# ------------------------------------------------------------------------------------- 4. Examples

ORDER, CROPS = 0, 1  # streams of random numbers, beside the seed
BILINEAR = Image.Resampling.BILINEAR
load_font = functools.cache(ImageFont.load_default)

@functools.cache
def draw_digit(i):
    """Digit i modulo 10 in Pillow's own font, moved and turned: (RGB image, 32 x 32; label)."""
    rng = np.random.default_rng(i)
    image, font = Image.new("L", (32, 32)), load_font(int(rng.integers(22, 31)))
    ImageDraw.Draw(image).text(tuple(rng.integers(13, 20, 2)), str(i % 10), 255, font, anchor="mm")
    return image.rotate(rng.uniform(-15, 15), BILINEAR).convert("RGB"), i % 10

def to_array(image, size, box=None):
    """Pillow image, or a box of it -> uint8 [size, size, 3], bilinear; shrinking it averages."""
    return np.asarray(image.resize((size, size), BILINEAR, box))

def inception_crop(rng, width, height):
    """A random box (left, upper, right, lower) in pixels, as TensorFlow draws it for the release:
    first the aspect ratio, then the height, from that of 5 % of the area to all that fits."""
    aspect = rng.uniform(3 / 4, 4 / 3)
    largest = min(height, width / aspect)
    smallest = min(largest, math.sqrt(0.05 * width * height / aspect))
    h = max(1, round(rng.uniform(smallest, largest)))
    w = min(width, max(1, round(h * aspect)))
    left, upper = rng.integers(width - w + 1), rng.integers(height - h + 1)
    return left, upper, left + w, upper + h

@functools.lru_cache(2)
def epoch_order(seed, epoch, n):
    """In which order an epoch goes through n examples: a permutation, int [n]."""
    return np.random.default_rng([seed, ORDER, epoch]).permutation(n)

def training_example(data, options, index):
    """Example number index since step 0: (uint8 [image_size, image_size, 3], label). A function of
    its arguments alone, index being step * batch size + place in the batch, so that a resumed run,
    or one on other devices, sees what any other would have seen. data: see `train`."""
    n = len(data["train"])
    epoch, place = divmod(index, n)
    image, label = data["read"](data["train"][epoch_order(options.seed, epoch, n)[place]])
    if options.augment == "none":
        return to_array(image, options.image_size), label
    rng = np.random.default_rng([options.seed, CROPS, index])
    if rng.random() < 0.5:
        image = ImageOps.mirror(image)  # before it is enlarged, when there is less to turn
    return to_array(image, options.image_size, inception_crop(rng, *image.size)), label

def batches(example, indices, ahead=3):
    """For each int array [...] of indices yields uint8 [..., size, size, 3] and int32 labels [...].
    example(index) -> (image, label) runs in parallel threads, `ahead` batches before."""
    pool = ThreadPoolExecutor(os.cpu_count())
    waiting = []
    def finish(shape, examples):
        images, labels = map(np.stack, zip(*examples, strict=True))
        return images.reshape(*shape, *images[0].shape), labels.reshape(shape).astype(np.int32)

    try:
        for batch in indices:
            waiting.append((batch.shape, pool.map(example, batch.ravel().tolist())))
            if len(waiting) > ahead:
                yield finish(*waiting.pop(0))
        for batch in waiting:
            yield finish(*batch)
    finally:
        pool.shutdown(cancel_futures=True)

# ------------------------------------------------------------------------------------- 5. Training

def evaluate(params, data, options, signals=()):
    """The share of the test images that get their label, each counted once. params: on all devices,
    see `replicate`. KeyboardInterrupt after signals (several hosts finish first)."""
    n, size = len(data["test"]), image_size_of(params)
    def example(i):
        if i >= n:  # fills the last batch; no guess can be -1
            return np.zeros((size, size, 3), np.uint8), -1
        image, label = data["read"](data["test"][i])
        return to_array(image, size), label

    share = options.batch_size // options.accum_steps // jax.device_count()  # of a device
    batch_size = max(1, share) * jax.device_count()
    indices = (first + shares(batch_size)[:, 0] for first in range(0, n, batch_size))
    correct = 0
    for i, (images, labels) in enumerate(batches(example, indices), 1):
        correct += int(eval_step(params, images, labels, options.dtype))
        if signals and jax.process_count() == 1:
            raise KeyboardInterrupt(*signals)
        if i % 50 == 0:
            print(f"evaluating: {i * batch_size} of {n} images")
    print(f"test accuracy {correct / n:.2%} of {n} images")
    return correct / n

def train(options, data):
    """Trains on data: a dict of "classes" (K names), "train" and "test" (sequences), and "read", a
    function that makes of an item (Pillow image in RGB, label, an int). Writes first_batch.png,
    metrics.csv and checkpoint.npz to options.logdir and returns params as NumPy arrays. The same
    call goes on from checkpoint.npz, with the same results as if nothing had happened. BadInput;
    KeyboardInterrupt after Ctrl-C or SIGTERM, when the steps so far are saved."""
    places = shares(options.batch_size, options.accum_steps)
    with lock(options.logdir):
        state, run = begin_or_resume(options, data)
        with noted_signals() as signals:
            return training_loop(options, data, places, state, run, signals)

def training_loop(options, data, places, state, run, signals):
    """Does the steps that are left. state, run: see `begin_or_resume`; places: see `shares`."""
    first = timed = int(state["step"])
    loss, rate, clock = 0.0, 0.0, time.perf_counter()
    tested = [row[0] for row in run["rows"] if row[-1] != ""]
    example = functools.partial(training_example, data, options)
    feed = batches(example, (options.batch_size * step + places
                             for step in range(first, options.total_steps)))
    try:
        for step in range(first, options.total_steps + 1):  # updates done so far
            # First what is due by now (so a run that goes on makes up for a lost evaluation).
            last = step == options.total_steps
            logs, tests, saves = (step > 0 and (last or step % every == 0) for every in (
                options.log_every, options.eval_every, options.checkpoint_every))
            if logs and step > first:
                loss = float(loss)  # waits for the update
                speed = (step - timed) * options.batch_size / (time.perf_counter() - clock)
                record(options, run, step, loss, float(rate), speed)
            if tests and step not in tested:
                record(options, run, step, accuracy=evaluate(
                    state["params"], data, options, signals))
            if saves:  # last: it has the rows of this step
                save_run(options, state, run)
            if logs or tests or saves or step == first + 1:  # only updates are timed
                jax.block_until_ready(loss)
                clock, timed = time.perf_counter(), step
            # Several hosts must end after the same update, so now and then they ask each other.
            may_stop = logs or jax.process_count() == 1
            if may_stop and process_allgather(bool(signals)).any():
                raise KeyboardInterrupt(*signals)
            if last:
                break
            # Then the next update.
            previous, (images, labels) = loss, next(feed)
            state, loss, rate = train_step(state, images, labels, options)
            # To wait for the loss of the update before, not of this one, keeps the devices busy.
            require(math.isfinite(previous), "the loss is nan or infinite; try a lower --base_lr")
    except BaseException:
        if step > first:
            with contextlib.suppress(RuntimeError):  # JAX's: the state is lost as well
                save_run(options, state, run)
        raise
    return jax.device_get(state["params"])

# -------------------------------------------------------------------------------------- 6. Weights

IMAGENET_NAMES = "https://storage.googleapis.com/bit_models/ilsvrc2012_wordnet_lemmas.txt"
leaf_name = functools.partial(jax.tree_util.keystr, simple=True, separator="/")  # of its path

def to_released(params):
    """Params -> {released name: array}: the stacked blocks become encoderblock_0, ..."""
    arrays = {}
    for path, leaf in jax.tree.leaves_with_path(params):
        name = leaf_name(path)
        if "/encoderblock/" in name:
            arrays |= {name.replace("block/", f"block_{i}/"): x for i, x in enumerate(leaf)}
        else:
            arrays[name] = leaf
    return arrays

def read_params(arrays, source):
    """{name: array} of a checkpoint -> params, nested float32 NumPy arrays. Knows the released
    names and those of newer Flax code, which renumbers layers and puts all under opt/target/ or
    params/. BadInput where an entry is missing, unknown, misshapen or not finite."""
    found = {}
    for name, array in arrays.items():
        name = re.sub("^(opt/target|params)/", "", name).replace("Attention_0/", "Attention_1/")
        name = name.replace("MlpBlock_0/", "MlpBlock_3/").replace("Norm_1/", "Norm_2/")
        if not name.startswith(("opt/", "train/", "class_names")):
            found[name] = array
    block = "Transformer/encoderblock_0/"
    with explained(f"find a ViT in {source}"):  # the shapes tell which one it is
        patch, _, _, d = found["embedding/kernel"].shape
        _, heads, _ = found[block + "MultiHeadDotProductAttention_1/query/kernel"].shape
        _, hidden = found[block + "MlpBlock_3/Dense_0/kernel"].shape
        tokens = found["Transformer/posembed_input/pos_embedding"].shape[1]
        depth = sum(name.endswith("/LayerNorm_0/bias") for name in found)
        features = np.size(found.get("pre_logits/bias", []))
        like = jax.eval_shape(lambda: init_params(  # computes nothing
            jax.random.key(0), (patch, d, depth, heads, hidden), math.isqrt(tokens - 1) * patch,
            found["head/bias"].size, features))
    ours, theirs = ({(name, x.dtype.kind, x.shape) for name, x in named.items()}
                    for named in (jax.eval_shape(to_released, like), found))
    require(ours == theirs, f"{source} has {sorted(theirs - ours)[:3]} where such a ViT has "
            f"{sorted(ours - theirs)[:3]}")
    def build(path, leaf):
        name = leaf_name(path)
        array = found.get(name)
        if array is None:  # it is one of the blocks, stacked
            array = np.stack([found[name.replace("block/", f"block_{i}/")] for i in range(depth)])
        require(abs(array).max() <= np.finfo(leaf.dtype).max,
                f"{source}: {name} holds NaN or infinity")
        return array.astype(leaf.dtype)

    return jax.tree.map_with_path(build, like)

def read_npz(path):
    """{name: array} of an .npz file, each checked against its CRC-32; nothing is unpickled."""
    with explained(f"read the checkpoint '{path}'"), np.load(path) as file:
        require(len(set(file.files)) == len(file.files), f"{path} has two arrays of one name")
        return dict(file)

def load_checkpoint(path):
    """The params of a checkpoint file, as they are, see `read_params`. BadInput."""
    return read_params(read_npz(path), path)

def load_pretrained(options, fine_tuned=False):
    """What --pretrained names: params, and the names of its K classes, or a range. With fine_tuned,
    "released" means the checkpoint that was fine-tuned on ImageNet. BadInput."""
    path = options.pretrained
    if path == "released":
        kind = "imagenet21k+imagenet2012" if fine_tuned else "imagenet21k"
        path = f"https://storage.googleapis.com/vit_models/{kind}/{options.model}.npz"
    if path.startswith(("http://", "https://")):
        path = fetch(path, options, load_checkpoint)
    arrays = read_npz(os.path.expanduser(path))
    params = read_params(arrays, path)
    names = arrays.get("class_names", range(params["head"]["bias"].size))
    require(np.shape(names) == params["head"]["bias"].shape, f"{path}: class_names do not fit")
    return params, names

def save_checkpoint(path, params, **more):
    """Writes params, and more arrays, to an .npz of released names, or nothing. BadInput."""
    params = jax.device_get(params)
    require(all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params)),
            f"weights are nan or infinite, {path} stays as it was; try a lower --base_lr")
    with explained(f"write {path}", "; what was there stays"):
        with open(f"{path}.partial", "wb") as file:
            np.savez(file, **to_released(params), **more)
            file.flush()
            os.fsync(file.fileno())  # on the disk before it gets its name
        os.replace(f"{path}.partial", path)

def resize_position_embeddings(embeddings, grid):
    """Position embeddings for another image size (paper, section 3.2), bilinear, corners aligned
    as the release's: [1, 1 + g*g, D] -> [1, 1 + grid*grid, D]. That of the class token stays."""
    old = math.isqrt(embeddings.shape[1] - 1)
    patches = embeddings[0, 1:].reshape(old, old, -1)  # [g, g, D]
    at = np.linspace(0, old - 1, grid)  # new rows and columns among the old
    bilinear = np.maximum(0, 1 - abs(at[:, None] - np.arange(old)))  # [grid, g]
    patches = np.einsum("ia,jb,abd->ijd", bilinear, bilinear, patches, optimize=True)
    patches = patches.reshape(1, grid * grid, -1).astype(np.float32)
    return np.concatenate([embeddings[:, :1], patches], axis=1)

def image_size_of(params):
    """The side of the images, in pixels, for which the position embeddings of params are."""
    tokens = params["Transformer"]["posembed_input"]["pos_embedding"].shape[1]
    return math.isqrt(tokens - 1) * params["embedding"]["kernel"].shape[0]

def adapt(params, image_size, num_classes=None):
    """params for images of image_size pixels (paper, section 3.2); with num_classes, to be fine-
    tuned: pre_logits dropped, the head all zeros. BadInput where patches do not fill an image."""
    encoder = dict(params["Transformer"])
    patch, _, _, d = params["embedding"]["kernel"].shape
    image_size = image_size or image_size_of(params)
    require(image_size % patch == 0, f"--image_size={image_size} is no multiple of {patch}")
    encoder["posembed_input"] = {"pos_embedding": resize_position_embeddings(
        encoder["posembed_input"]["pos_embedding"], image_size // patch)}
    params = params | {"Transformer": encoder}
    if num_classes:
        params.pop("pre_logits", None)
        params["head"] = {"kernel": np.zeros((d, num_classes), np.float32),
                          "bias": np.zeros(num_classes, np.float32)}
    return params

# -------------------------------------------------------------------------- 7. Runs that can go on

FIXED = ("model", "pretrained", "image_size", "dtype", "batch_size", "total_steps", "warmup_steps",
         "base_lr", "decay_type", "grad_norm_clip", "dropout", "mixup_alpha", "augment", "seed")

class BadInput(ValueError):
    """A mistake that the user can mend: the command line prints one line and exits with 2."""

def require(condition, message):
    """BadInput with the message, unless the condition holds."""
    if not condition:
        raise BadInput(message)

@contextlib.contextmanager
def explained(action, way_out=""):
    """Whatever a library raises within becomes BadInput("cannot ACTION (...)WAY_OUT")."""
    try:
        yield
    except Exception as error:
        kind, text = type(error).__name__, str(error)[-300:]
        raise BadInput(f"cannot {action} ({kind}: {text}){way_out}") from error

def lock(folder):
    """Locks a folder until what is returned is closed, or the process ends. BadInput if taken."""
    with explained(f"write to {folder}"):
        os.makedirs(folder, exist_ok=True)
        file = open(f"{folder}/.lock-{jax.process_index()}", "w")  # noqa: SIM115
    try:
        import fcntl
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        require(False, f"another run is at work in {folder}; wait, or take another folder")
    except (ImportError, OSError):
        pass  # neither Windows nor every network disk has such locks
    return file

@contextlib.contextmanager
def noted_signals():
    """A list to which the first Ctrl-C or SIGTERM is added; the same again ends it at once.
    Handlers are put back afterwards; threads other than the main one cannot have any."""
    noted = []
    def note(number, _):
        noted.append(number)
        signal.signal(number, signal.SIG_DFL)

    with contextlib.ExitStack() as at_the_end:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                at_the_end.callback(signal.signal, number, signal.signal(number, note))
        yield noted

def begin_or_resume(options, data):
    """Gives state, on all devices, and run, a dict of what else is saved: "fixed", the options and
    data that must not change when a run goes on, and "rows" of metrics.csv. BadInput."""
    path, classes = f"{options.logdir}/checkpoint.npz", [*data["classes"]]
    fixed = {name: getattr(options, name) for name in FIXED} | {
        "classes": classes, "training images": len(data["train"])}
    if os.path.exists(path):
        arrays = read_npz(path)
        with explained(f"go on from {path}", "; take another --logdir"):
            run, step = json.loads(str(arrays["train/run"])), int(arrays["train/step"])
            for name, value in run["fixed"].items():
                require(value == fixed[name], f"its {name} was {value}, now it is {fixed[name]}")
            params = read_params(arrays, path)
            zeros, tree = jax.tree.flatten(sgd_init(params))
            momentum = tree.unflatten(arrays[f"train/{i}"].astype(zero.dtype).reshape(zero.shape)
                                      for i, zero in enumerate(zeros))
    else:
        if options.pretrained == "none":
            init = jax.jit(init_params, static_argnums=(1, 2, 3))  # in one piece
            with explained(f"make a {options.model}", "; models are called like ViT-B_16"):
                params = init(jax.random.key(options.seed), options.model, options.image_size,
                              len(classes))
        else:
            params, _ = load_pretrained(options)
        params = adapt(params, options.image_size, len(classes))
        momentum, step, run = sgd_init(params), 0, {"fixed": fixed, "rows": []}
        first = [training_example(data, options, i)[0] for i in range(8)]
        Image.fromarray(np.hstack(first)).save(f"{options.logdir}/first_batch.png")
    same = vars(options) | fixed | {"step of checkpoint.npz": step}
    for name in sorted(same.keys() - {"process_id", "logdir", "data_dir"}):
        with explained(f"start: the hosts differ in {name}"):
            assert_equal(np.uint32(zlib.crc32(str(same[name]).encode())))
    print(f"{options.logdir}: step {step} of {options.total_steps}, {len(data['train'])} training "
          f"images, {jax.device_count()} x {jax.devices()[0].device_kind}")
    return replicate({"params": params, "momentum": momentum, "step": np.int32(step)}), run

def save_run(options, state, run):
    """Writes checkpoint.npz, for `begin_or_resume`. (Momentum as float32, which NumPy knows.)"""
    if jax.process_index() == 0:
        leaves = jax.tree.leaves(jax.device_get(state["momentum"]))
        save_checkpoint(f"{options.logdir}/checkpoint.npz", state["params"], **{
            "class_names": run["fixed"]["classes"], "train/run": json.dumps(run),
            "train/step": state["step"],
            **{f"train/{i}": np.float32(leaf) for i, leaf in enumerate(leaves)}})

def record(options, run, step, loss="", rate="", speed="", accuracy=""):
    """Adds a row to metrics.csv, which is never read: checkpoint.npz has the rows. BadInput."""
    run["rows"].append((step, loss, rate, speed, accuracy))
    table = [("step", "loss", "learning_rate", "images_per_second", "test_accuracy"), *run["rows"]]
    path = Path(options.logdir, "metrics.csv")
    if jax.process_index() == 0:
        with explained(f"write {path}"):
            path.write_text("".join(",".join(map(str, row)) + "\n" for row in table))
    if speed:
        minutes = (options.total_steps - step) * options.batch_size / speed / 60
        print(f"step {step}/{options.total_steps}  loss {loss:.4f}  lr {rate:.2e}  "
              f"{speed:.1f} images/s  {minutes:.1f} minutes left")

# -------------------------------------------------------------------- 8. Several devices and hosts

def replicate(tree):
    """Copies arrays to all devices of all hosts, where pmap's in_axes=None finds them in place."""
    mesh = jax.sharding.Mesh(jax.devices(), "devices")
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    return jax.tree.map(
        lambda x: jax.make_array_from_process_local_data(everywhere, np.asarray(x)), tree)

def shares(batch_size, accum_steps=1):
    """Which places of a batch are this host's: int [local devices, accum_steps, B]. BadInput.
    Of 8 images, on one host with 2 devices, in 2 parts: [[[0 1] [2 3]] [[4 5] [6 7]]]."""
    shape = jax.process_count(), jax.local_device_count(), accum_steps
    require(batch_size % math.prod(shape) == 0, f"--batch_size={batch_size} is no multiple of "
            f"{jax.device_count()} devices x --accum_steps={accum_steps}")
    return np.arange(batch_size).reshape(*shape, -1)[jax.process_index()]

def join_hosts(options, patience=300):
    """Makes one JAX of all hosts. Where not all come within patience seconds, or `main` tells of an
    error on one of them, all processes end. (A usual exit would wait for the others.) BadInput."""
    address = options.coordinator_address
    require(re.fullmatch(r"auto|.+:[1-6]?\d{1,4}", address),
            f"--coordinator_address={address!r} must be HOST:PORT of the first host, or auto")
    print(f"waiting for all hosts to come to {address}, {patience} s at most")
    hosts = () if address == "auto" else (address, options.num_processes, options.process_id)
    late = threading.Timer(patience, os._exit, [2])  # JAX itself would end in a stack of C++
    late.daemon = True
    late.start()
    with explained(f"join the hosts at {address}"):
        jax.distributed.initialize(*hosts, initialization_timeout=2 * patience)
    late.cancel()

    def watch():
        while threading.main_thread().is_alive():
            time.sleep(1)
            if distributed.client.key_value_dir_get("failed/"):
                time.sleep(1 if jax.process_index() else 5)  # the first goes last
                os._exit(2)

    threading.Thread(target=watch).start()
    if jax.process_index() > 0:
        sys.stdout = None  # print does nothing then: the first host speaks for all

# --------------------------------------------------------------------------------------- 9. Photos

def attention_rollout(weights):
    """How much of each patch reaches the class token: [L, B, A, N, N] -> [B, grid, grid], max 1.
    Mean over heads, mixed with the identity for residuals, block by block (arXiv 2005.00928)."""
    weights = (weights.mean(axis=2) + np.eye(weights.shape[-1])) / 2  # [L, B, N, N]
    reached = functools.reduce(lambda below, block: block @ below, weights)[:, 0, 1:]  # [B, N-1]
    grid = math.isqrt(reached.shape[1])
    return (reached / reached.max(axis=1, keepdims=True)).reshape(-1, grid, grid)

def classify(options, photos):
    """Prints the five likeliest classes of each photo and writes PHOTO-attention.png: the photo,
    and the photo lit by where the class token looks. BadInput."""
    params, names = load_pretrained(options, fine_tuned=True)
    if options.pretrained == "released":
        file = fetch(IMAGENET_NAMES, options, lambda path: path.read_text().splitlines()[999])
        names = file.read_text().splitlines()
    params = jax.device_put(adapt(params, options.image_size))
    model = jax.jit(functools.partial(forward, return_attention=True))
    for photo in photos:
        image = decode(photo, photo)
        pixels = to_pixels(to_array(image, image_size_of(params)), options.dtype)
        logits, weights = model(params, pixels[None])
        light = 26 + 229 * attention_rollout(np.asarray(weights))[0]  # nowhere quite dark
        mask = Image.fromarray(light.astype(np.uint8)).resize(image.size, BILINEAR)
        lit = Image.composite(image, Image.new("RGB", image.size), mask)
        Image.fromarray(np.hstack([image, lit])).save(f"{photo}-attention.png")
        print(f"{photo} (see {photo}-attention.png)")
        probabilities = np.asarray(jax.nn.softmax(logits[0]))
        for label in probabilities.argsort()[::-1][:5]:
            print(f"{probabilities[label]:8.2%}  {names[label]}")

# ------------------------------------------------------------------------------------ 10. Datasets

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")  # they start no program
ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
CIFAR = {  # the authors' archives: address, SHA-256, labels in a record, files
    "cifar10": ("https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
                "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd", 1,
                "batches.meta.txt data_batch_1.bin data_batch_2.bin data_batch_3.bin "
                "data_batch_4.bin data_batch_5.bin test_batch.bin"),
    "cifar100": ("https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz",
                 "58a81ae192c23a4be8b1804d68e518ed807d710a4eb253b1f2a199162a40d8ec", 2,
                 "fine_label_names.txt train.bin test.bin"),
}

def decode(file, name):
    """A path or file object -> Pillow image in RGB, upright, without alpha. BadInput, with name."""
    with explained(f"read the image {name}"), Image.open(file, formats=FORMATS) as image:
        require(image.mode != "F", "it holds fractions; save it with 8 or 16 bits")
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I"):  # grey of 16 bits, which convert("RGB") would clip
            image = Image.fromarray((np.asarray(image) // 256).clip(0, 255).astype(np.uint8))
        return image.convert("RGBA" if "transparency" in image.info else "RGB").convert("RGB")

def fetch(url, options, check):
    """The path of the file at url, downloaded unless it is there. A digest of the address is part
    of its name, which it gets only when check(path) raises nothing. BadInput."""
    digest = hashlib.sha256(url.encode()).hexdigest()[:8]
    path = Path(options.data_dir, "downloads", f"{digest}-{Path(url).name}").expanduser()
    partial = Path(f"{path}.{jax.process_index()}.partial")
    if path.exists():
        return path
    def show(block, size, total):
        if block * size % (64 << 20) == 0:
            print(f"fetching {url}: {block * size >> 20} of {total >> 20} MiB")

    with lock(path.parent):
        with explained(f"fetch {url}", f"; try again, or put the file at {path} by hand"):
            urllib.request.urlretrieve(url, partial, show)
        start = partial.read_bytes()[:30]
        with explained(f"use what {url} sent, beginning with {start}"):
            check(partial)
        partial.replace(path)
    return path

def cifar(name, options):
    """CIFAR-10 or CIFAR-100 as data for `train`, with 98 % of the training images, as the release.
    A record: label (CIFAR-100: coarse, fine), 32 x 32 bytes of red, of green, of blue. BadInput."""
    url, sha256, labels, files = CIFAR[name]
    def check(path):
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        require(digest == sha256, f"{path} is damaged: its SHA-256 is not {sha256}; delete it")

    def read(record):
        pixels = record[labels:].reshape(3, 32, 32).transpose(1, 2, 0)
        return Image.fromarray(np.ascontiguousarray(pixels)), int(record[labels - 1])

    path = fetch(url, options, check)
    check(path)  # each time: it may lie there damaged
    with tarfile.open(path) as archive:
        content = {Path(member.name).name: archive.extractfile(member).read()
                   for member in archive if member.isfile()}
    classes, *train, test = (content[file] for file in files.split())
    train, test = (np.frombuffer(records, np.uint8).reshape(-1, labels + 3072)
                   for records in (b"".join(train), test))
    return {"classes": classes.decode().split(), "read": read,
            "train": train[: round(0.98 * len(train))], "test": test}

def image_folder(root):
    """A folder {train,test}/CLASS/*.jpg (png, webp, ...; val for test) as data for `train`; of
    CLASS/*.jpg every tenth is for testing. Hidden files are left out, links followed. BadInput."""
    def find(folder):  # [(class name, path)]
        return [(Path(name).parts[0], f"{folder}/{name}")
                for name in sorted(glob.glob("*/**", root_dir=folder, recursive=True))
                if name.lower().endswith(ENDINGS)]

    def read(entry):
        name, path = entry
        return decode(path, path), classes.index(name)

    train, test = find(f"{root}/train"), find(f"{root}/test") or find(f"{root}/val")
    if not os.path.isdir(f"{root}/train"):
        train = find(root)
        test = train[::10]
        del train[::10]
    classes, tested = (sorted({name for name, _ in items}) for items in (train, test))
    require(len(classes) > 1 and tested and {*tested} <= {*classes},
            f"{root} must hold {{train,test}}/CLASS/*.jpg or CLASS/*.jpg (png, webp, ...) of two "
            f"or more classes, but has {classes[:9]} for training, {tested[:9]} for testing")
    return {"classes": classes, "train": train, "test": test, "read": read}

def tfds_dataset(name, data_dir):
    """A TFDS dataset as data for `train`, read as ArrayRecord, without TensorFlow. BadInput."""
    require(re.fullmatch(r"[a-z]\w*([/:].*)?", name), f"{name} is no file, no folder, no dataset")
    with explained(f"find {name}, no file, no folder, no dataset of TFDS (there is imagenet2012)"):
        logging.getLogger("absl").setLevel(logging.ERROR)  # for one line, not two
        import tensorflow_datasets as tfds  # only here: to import it takes longer than JAX
        builder = tfds.builder(name, data_dir=data_dir, file_format="array_record")
    call = f't.builder("{name}", data_dir="{data_dir}", file_format="array_record")'
    with explained(f"use {name}", "; to prepare it, where TensorFlow is: python -c 'import "
                   f"tensorflow_datasets as t; {call}.download_and_prepare()'"):
        classes = builder.info.features["label"].names
        parts = [part for part in ("train", "test", "validation") if part in builder.info.splits]
        if name == "imagenet2012":  # as the release
            parts = ["train[:99%]", "validation"]
        elif len(parts) == 1:
            parts = ["train[:90%]", "train[90%:]"]
        train, test = (builder.as_data_source(part, decoders={"image": tfds.decode.SkipDecoding()})
                       for part in parts[:2])

    def read(example):
        require(example["label"] >= 0, f"{name} has images without a label")
        return decode(io.BytesIO(example["image"]), f"of {name}"), int(example["label"])

    return {"classes": classes, "train": train, "test": test, "read": read}

def load_data(name, options):
    """DATA of the command line -> data as `train` wants it. BadInput."""
    if name == "digits":
        return {"classes": [*"0123456789"], "read": draw_digit,
                "train": range(8000), "test": range(8000, 9000)}
    if name in CIFAR:
        return cifar(name, options)
    if os.path.isdir(name):
        return image_folder(name)
    return tfds_dataset(name, options.data_dir)

# -------------------------------------------------------------------------------- 11. Command line

PRESETS = {  # what a dataset has instead of the defaults
    "digits": {"model": "ViT-XS_8", "pretrained": "none", "image_size": 32, "augment": "none",
               "batch_size": 64, "accum_steps": 1, "total_steps": 800, "base_lr": 0.1,
               "warmup_steps": 100, "eval_every": 400, "log_every": 100},
    "imagenet2012": {"total_steps": 20_000},
}

def parse_options(argv):
    """The command line: (DATA or photos; Options: flags over PRESETS over defaults). BadInput."""
    parser = argparse.ArgumentParser(
        "vit.py", allow_abbrev=False, argument_default=argparse.SUPPRESS)
    parser.error = functools.partial(require, False)  # one line, and no usage
    parser.add_argument("data", metavar="DATA", nargs="*", default=["digits"], help=(
        "digits, cifar10, a TFDS dataset, a folder {train,test}/CLASS/*.jpg, or photos (digits)"))
    comments = dict(re.findall(r"(\w+): .*  # (.*)", inspect.getsource(Options)))
    for field in dataclasses.fields(Options):
        kind = {"action": "store_true"} if field.type is bool else {"type": field.type}
        text = f"{comments[field.name]} ({field.default})"
        parser.add_argument(f"--{field.name}", help=text, **kind)
    flags = vars(parser.parse_intermixed_args(argv))
    paths = flags.pop("data")
    preset = PRESETS.get(paths[0], {})
    default = f"runs/{paths[0].strip('./').replace('/', '-')}"
    flags["logdir"] = os.path.expanduser(flags.get("logdir", default))
    photos = all(map(os.path.isfile, paths))
    require(photos or len(paths) == 1, f"of {' '.join(paths)}, not all are image files")
    if photos:
        preset = {"image_size": None}  # as the checkpoint has it
    elif flags.get("eval_only"):
        preset = {"image_size": None, "pretrained": f"{flags['logdir']}/checkpoint.npz"}
    options = Options(**(preset | flags))
    require("model" not in flags or options.pretrained in ("released", "none"),
            f"--model={options.model} does not go with a --pretrained file")
    return paths, options

def main(argv=None):
    """The command line: exit status 0, 2 after bad input, 128 + signal number after a signal."""
    warnings.filterwarnings("ignore", "Error .* persistent compilation cache")
    try:
        paths, options = parse_options(argv)
        if options.coordinator_address or options.num_processes > 1:
            join_hosts(options)
        if os.path.isfile(paths[0]):
            classify(options, paths)
        elif options.eval_only:
            data = load_data(paths[0], options)
            params, names = load_pretrained(options, fine_tuned=True)
            require([*names] in ([*data["classes"]], [*range(len(data["classes"]))]),
                    f"{options.pretrained} knows other classes than {paths[0]}")
            evaluate(replicate(adapt(params, options.image_size)), data, options)
        else:
            train(options, load_data(paths[0], options))
        return 0
    except KeyboardInterrupt as stop:
        print("stopped; run the same command to go on", file=sys.stderr)
        return 128 + (stop.args or [signal.SIGTERM])[0]
    except BrokenPipeError:  # of `| head`
        sys.stdout = None
        status = 128 + signal.SIGPIPE
    except Exception as error:
        status, line = 2, " ".join(str(error).split())[:600]
        if "RESOURCE_EXHAUSTED" in line:
            line = f"out of memory; try a larger --accum_steps, or --remat ({line})"
        if not isinstance(error, BadInput | OSError | MemoryError | jax.errors.JaxRuntimeError):
            sys.excepthook(*sys.exc_info())  # a bug of ours
        print(f"vit.py: {line}", file=sys.stderr)
    if distributed.client:
        distributed.client.key_value_set(f"failed/{jax.process_index()}", "")
        threading.Event().wait()  # for `watch`, which ends all hosts
    return status

if __name__ == "__main__":
    sys.exit(main())
