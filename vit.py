# SPDX-License-Identifier: Apache-2.0
# /// script
# requires-python = ">=3.10"
# dependencies = ["jax>=0.6.0", "jaxlib>=0.6.0", "numpy>=1.26", "pillow>=10.1",
#                 "tensorflow-datasets>=4.9.10", "importlib_resources"]
# ///
"""Vision Transformer (ViT) in pure JAX, in one file: the model, fine-tuning, photos.

"An Image is Worth 16x16 Words" (Dosovitskiy et al., arXiv 2010.11929, "the paper" below) and the
recipe of its code, google-research/vision_transformer ("the release"). Run it, read it, copy it:

    python vit.py digits                  # learns to read digits in half a minute; no download
    python vit.py cifar10                 # fine-tunes the released ViT-B/16
    python vit.py photo.jpg --pretrained=runs/cifar10/checkpoint.npz

Parts 1 to 5 are the lesson: options, model, learning, examples, training. The rest feeds it: 6
weights, 7 runs that lose nothing, 8 several devices and hosts, 9 photos, 10 datasets, 11 command
line. Nearly all of it raises BadInput, with one line to print, where the user has made a mistake.

Shapes: B images of H x W pixels, patches of P x P, N tokens (the class token included), width D,
L blocks, A attention heads, K classes. Two ideas of JAX to begin with: a *pytree* is a nested dict
of arrays, as our parameters are, and `jax.tree.map(f, a, b)` applies f leaf by leaf; a *key* is
random state as a value: the same key gives the same numbers, `split` and `fold_in` make new keys.
"""
import signal

if __name__ == "__main__":  # from here on Ctrl-C ends the command without a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import collections
import contextlib
import dataclasses
import functools
import glob
import hashlib
import inspect
import io
import itertools
import json
import logging
import math
import os
import re
import socket
import sys
import tarfile
import tempfile
import threading
import time
import urllib.request
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

# -------------------------------------------------------------------------------------- 1. Options


@dataclasses.dataclass(frozen=True)
class Options:
    """All flags, with the release's names and recipe. --help prints the comments."""
    # The model
    model: str = "ViT-B_16"  # ViT-SIZE_PATCH, sizes XS Ti S B L H, if --pretrained is no file
    pretrained: str = "released"  # checkpoint to start from: a file, an address, or none
    image_size: int = 384  # side of what the model sees, pixels (photos: as its checkpoint says)
    dtype: str = "float32"  # of activations, or bfloat16; parameters are float32
    # Learning
    batch_size: int = 512  # images in an update, over all devices and accumulation steps
    accum_steps: int = 8  # parts in which a device works through its share of a batch
    total_steps: int = 10_000  # number of updates
    warmup_steps: int = 500  # updates during which the learning rate rises
    base_lr: float = 0.03  # learning rate after them
    decay_type: str = "cosine"  # how it falls from there, or linear
    grad_norm_clip: float = 1.0  # largest global norm of the gradients
    dropout: float = 0.0  # dropout rate
    mixup_alpha: float = 0.0  # blend images in pairs by Beta(alpha, alpha); 0: never
    augment: str = "inception"  # random crops and mirroring, or none
    seed: int = 0  # of initial values, order, crops, dropout, mixup
    # The run
    logdir: str = "runs"  # folder of checkpoint.npz, metrics.csv (command line: runs/DATA)
    data_dir: str = "~/tensorflow_datasets"  # TFDS datasets; what is fetched, in downloads/
    log_every: int = 10  # steps between lines of progress
    eval_every: int = 100  # steps between evaluations
    checkpoint_every: int = 1000  # steps between checkpoints
    eval_only: bool = False  # evaluate --pretrained, train nothing
    remat: bool = False  # keep less in memory for the gradient, compute more
    # Several hosts, one command on each
    coordinator_address: str = ""  # HOST:PORT of the first of several hosts, or auto
    num_processes: int = 1  # number of hosts
    process_id: int = 0  # number of this one, from 0

    def __post_init__(self):
        check_options(self)


# ---------------------------------------------------------------------------------------- 2. Model

SIZES = {  # width D, depth L, heads A: the paper, table 1; Ti and S: arXiv 2106.10270
    "XS": (64, 2, 4),  # ours, small enough to learn digits on a CPU
    "Ti": (192, 12, 3),
    "S": (384, 12, 6),
    "B": (768, 12, 12),
    "L": (1024, 24, 16),
    "H": (1280, 32, 16),
}


def parse_model(model):
    """"ViT-B_16" -> (patch size P, width D, depth L, heads A, MLP width): ints, or ValueError."""
    size, _, patch = model.removeprefix("ViT-").partition("_")
    if f"ViT-{size}_{patch}" != model or size not in SIZES or patch not in map(str, range(1, 513)):
        raise ValueError(f"{model!r} is no model; they are called like ViT-B_16: the size, one of "
                         f"{', '.join(SIZES)}, and the patch size in pixels")
    width, depth, heads = SIZES[size]
    return int(patch), width, depth, heads, 4 * width


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
    return linear(x, kernel.reshape(p * p * c, -1), bias)  # [B, N-1, D]


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
    x = layer_norm(x, **encoder["encoder_norm"])[:, 0]  # the class token: [B, N, D] -> [B, D]
    if "pre_logits" in params:  # in the ImageNet-21k checkpoints of the paper
        x = jnp.tanh(linear(x, **params["pre_logits"]))
    logits = linear(x.astype(jnp.float32), **params["head"])  # [B, D] -> [B, K]
    return (logits, weights) if return_attention else logits


# ------------------------------------------------------------------------------------- 3. Learning


def to_pixels(images, dtype=jnp.float32):
    """uint8 [...] -> [-1, 1], which the released models want."""
    return ((images.astype(jnp.float32) - 127.5) / 127.5).astype(dtype)


def cross_entropy(logits, targets):
    """Mean of -sum(targets * log softmax(logits)): [B, K] logits, [B, K] probabilities -> []."""
    return -(targets * jax.nn.log_softmax(logits)).sum(axis=-1).mean()


def mixup(images, targets, share):
    """Blends neighbours 0 and 1, 2 and 3, ... as share : 1 - share: images [B, ...] and targets
    [B, K] alike, B even (arXiv 1710.09412). The release pairs a batch with itself reversed. In
    random order any pairs will do, and these stay together however a batch is shared out."""
    def swap(x):
        return x.reshape(-1, 2, *x.shape[1:])[:, ::-1].reshape(x.shape)

    return tuple(share * x + (1 - share) * swap(x) for x in (images, targets))


def learning_rate(step, base_lr, total_steps, warmup_steps, decay_type="cosine"):
    """The rate of update `step`, the first being 0: a linear warm-up from 0 to base_lr, then cosine
    to 0 or linear to 1e-5, as the release. Int (or int array) -> float32."""
    progress = jnp.clip((step - warmup_steps) / max(1, total_steps - warmup_steps), 0, 1)
    if decay_type == "cosine":
        rate = base_lr * (1 + jnp.cos(jnp.pi * progress)) / 2
    else:
        rate = 1e-5 + (base_lr - 1e-5) * (1 - progress)
    return rate * jnp.minimum(1, step / warmup_steps) if warmup_steps else rate


def clip_by_global_norm(grads, max_norm):
    """Scales all gradients alike so that their common L2 norm is at most max_norm: grads, norm."""
    norm = jnp.sqrt(sum(jnp.vdot(g, g) for g in jax.tree.leaves(grads)))
    return jax.tree.map(lambda g: g * jnp.minimum(1, max_norm / norm), grads), norm


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

    state: dict of params, momentum and step (int32 []), the same on all devices. images: uint8
    [accum_steps, B, H, W, 3]; labels: int32 [accum_steps, B]; the caller puts an axis of devices
    in front of both.

    `pmap` compiles a function once and runs it on all devices at the same time. Its in_axes say
    what each is given: 0, its own slice of the first axis; None, all of it. A static argument is
    known when it is compiled. A donated one gives its memory to the results: there is never a
    second copy of the state. Numbers cross between devices at one point only, `pmean`: it replaces
    loss and gradients by their mean over the devices. So all arrive at the same new state, and with
    out_axes=None pmap returns it once, as it came in.
    """
    params, num_classes = state["params"], state["params"]["head"]["bias"].size
    key = jax.random.fold_in(jax.random.key(options.seed), state["step"])
    mixup_key, dropout_key = jax.random.split(key)

    def loss_of(params, images, labels, number):
        images, targets = to_pixels(images), jax.nn.one_hot(labels, num_classes)
        if options.mixup_alpha:
            share = jax.random.beta(mixup_key, options.mixup_alpha, options.mixup_alpha)
            images, targets = mixup(images, targets, share)
        key = jax.random.fold_in(dropout_key, number) if options.dropout else None
        logits = forward(params, images.astype(options.dtype), key, options.dropout, options.remat)
        return cross_entropy(logits, targets) / options.accum_steps

    def accumulate(total, micro_batch):
        new = jax.value_and_grad(loss_of)(params, *micro_batch)
        return jax.tree.map(jnp.add, total, new), None

    zeros = 0.0, jax.tree.map(jnp.zeros_like, params)
    first = jax.lax.axis_index("devices") * options.accum_steps
    micro_batches = images, labels, first + jnp.arange(options.accum_steps)
    (loss, grads), _ = jax.lax.scan(accumulate, zeros, micro_batches)
    if jax.device_count() > 1:  # on one it would only copy it all (5 % of a step)
        loss, grads = jax.lax.pmean((loss, grads), "devices")
    grads, _ = clip_by_global_norm(grads, options.grad_norm_clip)
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

ORDER, CROPS = 0, 1  # streams of random numbers: seed, stream and place give the same ones again
load_font = functools.cache(ImageFont.load_default)


@functools.cache
def draw_digit(i):
    """Digit i modulo 10 in Pillow's built-in font, light on dark: (RGB image, 32 x 32; label)."""
    label = i % 10
    rng = np.random.default_rng(i)
    paper, ink = int(rng.integers(0, 60)), int(rng.integers(160, 256))
    image = Image.new("L", (32, 32), paper)
    font = load_font(int(rng.integers(22, 31)))
    ImageDraw.Draw(image).text(tuple(rng.integers(13, 20, 2)), str(label), ink, font, anchor="mm")
    image = image.rotate(rng.uniform(-15, 15), Image.Resampling.BILINEAR, fillcolor=paper)
    pixels = (np.asarray(image) + rng.normal(0, 8, (32, 32))).clip(0, 255).astype(np.uint8)
    return Image.fromarray(pixels).convert("RGB"), label


def to_array(image, size, box=None):
    """Pillow image, or a box of it, in pixels -> uint8 [size, size, 3], bilinear. (Pillow averages
    where it shrinks; where it enlarges it equals tf.image.resize.)"""
    return np.asarray(image.resize((size, size), Image.Resampling.BILINEAR, box))


@functools.lru_cache(2)
def epoch_order(seed, epoch, n):
    """In which order an epoch goes through n examples: a permutation, int [n]."""
    return np.random.default_rng([seed, ORDER, epoch]).permutation(n)


def training_example(split, options, index):
    """Example number index since step 0: (uint8 [image_size, image_size, 3], label).

    A pure function of its arguments, index being step * batch size + place in the batch, so that a
    resumed run, or one on other devices, sees what any other would have seen.
    """
    epoch, place = divmod(int(index), len(split))
    image, label = split[int(epoch_order(options.seed, epoch, len(split))[place])]
    if options.augment == "none":
        return to_array(image, options.image_size), label
    rng = np.random.default_rng([options.seed, CROPS, index])
    if rng.random() < 0.5:
        image = ImageOps.mirror(image)  # before it is enlarged, when there is less to turn
    return to_array(image, options.image_size, inception_crop(rng, *image.size)), label


def test_example(split, size, index):
    """Test image number index; past the end a black one of label -1, which no guess can hit."""
    image, label = split[int(index)] if index < len(split) else (Image.new("RGB", (1, 1)), -1)
    return to_array(image, size), label


def batches(example, indices, ahead=3):
    """For each int array [...] of indices yields uint8 [..., size, size, 3] and int32 labels [...].

    example(index) -> (image, label) runs in a pool of threads (Pillow lets them run in parallel),
    `ahead` batches before they are wanted. What it raises is raised here.
    """
    pool = ThreadPoolExecutor(os.cpu_count())
    waiting = collections.deque()

    def finish(shape, examples):
        images, labels = zip(*examples, strict=True)
        images = np.stack(images).reshape(*shape, *images[0].shape)
        return images, np.array(labels, np.int32).reshape(shape)

    try:
        for batch in indices:
            waiting.append((batch.shape, pool.map(example, batch.ravel())))
            if len(waiting) > ahead:
                yield finish(*waiting.popleft())
        while waiting:
            yield finish(*waiting.popleft())
    finally:
        pool.shutdown(cancel_futures=True)


# ------------------------------------------------------------------------------------- 5. Training


def evaluate(params, split, batch_size, dtype="float32", signals=()):
    """The share of the images of a split that get their label, each counted once: a float.

    params: on all devices, see `replicate`; they say the image size. KeyboardInterrupt where
    signals, see `noted_signals`, have come meanwhile (several hosts finish first).
    """
    n = len(split)
    batch_size = math.ceil(min(batch_size, n) / jax.device_count()) * jax.device_count()
    indices = (first + shares(batch_size)[:, 0] for first in range(0, n, batch_size))
    example = functools.partial(test_example, split, image_size_of(params))
    correct = previous = 0
    for i, (images, labels) in enumerate(batches(example, indices)):
        newest = eval_step(params, images, labels, dtype)
        correct += int(previous)  # to read is to wait; meanwhile the devices have the newest batch
        previous = newest
        if signals and jax.process_count() == 1:
            raise KeyboardInterrupt(*signals)
        if i % 50 == 49:
            print(f"evaluating: {i * batch_size} of {n} images", flush=True)
    accuracy = (correct + int(previous)) / n
    print(f"test accuracy {accuracy:.2%} of {n} images", flush=True)
    return accuracy


def train(options, data):
    """Trains on data, a dict of "classes" (K names) and two splits, "train" and "test": anything
    that has len(split) and split[i] -> (Pillow image in RGB, label, an int).

    Writes first_batch.png, metrics.csv and checkpoint.npz to options.logdir and returns params, a
    nested dict of NumPy arrays. The same call goes on from checkpoint.npz, with the same results as
    if nothing had happened. BadInput where something does not fit; KeyboardInterrupt after Ctrl-C
    or SIGTERM, when the steps so far are saved.
    """
    places = shares(options.batch_size, options.accum_steps)
    require(places.shape[-1] % 2 == 0 or not options.mixup_alpha, "--mixup_alpha takes an even "
            f"number of images on a device at a time, not {places.shape[-1]}")
    with locked(options.logdir):
        state, run = begin_or_resume(options, data)
        with noted_signals() as signals:
            return training_loop(options, data, places, state, run, signals)


def training_loop(options, data, places, state, run, signals):
    """What `train` does from state on. places: see `shares`; run: see `begin_or_resume`; signals:
    see `noted_signals`."""
    step = saved = timed = int(state["step"])
    clock, previous_loss = time.perf_counter(), None

    def due(every):
        return step % every == 0 or step == options.total_steps

    def test():
        accuracy = evaluate(state["params"], data["test"],
                            options.batch_size // options.accum_steps, options.dtype, signals)
        record(options, run, step, accuracy=accuracy)

    indices = (i * options.batch_size + places for i in range(step, options.total_steps))
    example = functools.partial(training_example, data["train"], options)
    try:
        if step and due(options.eval_every) and step not in run["tested"]:
            test()  # a signal had cut it off
            save_run(options, state, run)
        for images, labels in batches(example, indices):
            if step == 0 and jax.process_index() == 0:
                row = np.hstack(images.reshape(-1, *images.shape[-3:])[:8])
                Image.fromarray(row).save(f"{options.logdir}/first_batch.png")
            # This line learns; those before feed it, those after report and save.
            state, loss, rate = train_step(state, images, labels, options)
            # Waiting for the step before, not for this one, keeps the devices busy.
            jax.block_until_ready(previous_loss)
            compiled, previous_loss, step = previous_loss is None, loss, step + 1
            logs, tests = due(options.log_every), due(options.eval_every)
            if logs:
                loss = float(loss)  # waits
                speed = (step - timed) * options.batch_size / (time.perf_counter() - clock)
                record(options, run, step, loss, float(rate), speed)
            if tests:
                test()
            if due(options.checkpoint_every):  # last, so that it has the rows of this step
                save_run(options, state, run)
                saved = step
            if compiled or logs or tests or saved == step:  # time steps, and nothing else
                clock, timed = time.perf_counter(), step
            stop = bool(signals)
            if jax.process_count() > 1:  # all must end after the same step, so they ask each other
                stop = logs and any(gather(stop))  # where they wait for a result anyhow
            if stop:
                raise KeyboardInterrupt(*signals)
    except BaseException:
        if step > saved:
            with contextlib.suppress(RuntimeError):  # JAX's, where the state is lost as well
                save_run(options, state, run)
        raise
    accuracy = run["rows"][-1][-1]
    print(f"done: {options.logdir}/checkpoint.npz, test accuracy {accuracy:.2%}", flush=True)
    return jax.device_get(state["params"])


# -------------------------------------------------------------------------------------- 6. Weights

RELEASED_URL = "https://storage.googleapis.com/vit_models/{}.npz"
IMAGENET_NAMES = "https://storage.googleapis.com/bit_models/ilsvrc2012_wordnet_lemmas.txt"
FINE_TUNED = {  # on ImageNet-21k, then ImageNet, at 384 pixels
    model: f"imagenet21k+imagenet2012/{model}"
    for model in ("ViT-B_16", "ViT-B_32", "ViT-L_16", "ViT-L_32")}
PRETRAINED = {model: f"imagenet21k/{model}" for model in (*FINE_TUNED, "ViT-H_14")} | {
    # of other sizes only AugReg's: arXiv 2106.10270
    "ViT-Ti_16": "augreg/Ti_16-i21k-300ep-lr_0.001-aug_none-wd_0.03-do_0.0-sd_0.0",
    "ViT-S_32": "augreg/S_32-i21k-300ep-lr_0.001-aug_none-wd_0.1-do_0.0-sd_0.0",
    "ViT-S_16": "augreg/S_16-i21k-300ep-lr_0.001-aug_light1-wd_0.03-do_0.0-sd_0.0",
    "ViT-B_8": "augreg/B_8-i21k-300ep-lr_0.001-aug_medium1-wd_0.1-do_0.0-sd_0.0",
}


def init_params(key, model, image_size, num_classes, features=0):
    """Random parameters to train from scratch: a nested dict of float32 arrays, as `forward` wants.

    model: a name for `parse_model`, or the five numbers that it gives; image_size in pixels;
    features: the width of a pre_logits layer, 0 for none. Names and distributions are the
    release's. ValueError for an unknown name.
    """
    patch, d, depth, heads, hidden = parse_model(model) if isinstance(model, str) else model
    per_head = [heads, d // heads]
    tokens = 1 + (image_size // patch) ** 2
    keys = iter(jax.random.split(key, 14))
    init = jax.nn.initializers

    def dense(inputs, outputs, bias_init=init.zeros):  # [L, *inputs, *outputs], [L, *outputs]
        in_axes, out_axes = tuple(range(1, 1 + len(inputs))), tuple(range(-len(outputs), 0))
        xavier = init.xavier_uniform(in_axes, out_axes, batch_axis=0)
        return {"kernel": xavier(next(keys), (depth, *inputs, *outputs)),
                "bias": bias_init(next(keys), (depth, *outputs))}

    def norm(*shape):
        return {"scale": jnp.ones(shape), "bias": jnp.zeros(shape)}

    def zeros(inputs, outputs):
        return {"kernel": jnp.zeros((inputs, outputs)), "bias": jnp.zeros(outputs)}

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
        "head": zeros(features or d, num_classes),
    }
    return params | {"pre_logits": zeros(d, features)} if features else params


def leaf_name(path):
    """The name of a leaf of params: keys joined by slashes."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def block_name(name, i):
    """Where checkpoints keep block i of a leaf in which blocks are stacked."""
    return name.replace("/encoderblock/", f"/encoderblock_{i}/")


def to_released(params):
    """Nested arrays -> {released name: array}: the stacked blocks become encoderblock_0, ..."""
    arrays = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name = leaf_name(path)
        if "/encoderblock/" in name:
            arrays |= {block_name(name, i): block for i, block in enumerate(leaf)}
        else:
            arrays[name] = leaf
    return arrays


def describe(arrays):
    """{released name: array} -> (P, D, L, A, MLP width), image size in pixels, K, width of
    pre_logits (0: none), all read off the shapes."""
    block = "Transformer/encoderblock_0/"
    patch, _, _, width = arrays["embedding/kernel"].shape
    _, heads, _ = arrays[block + "MultiHeadDotProductAttention_1/query/kernel"].shape
    _, hidden = arrays[block + "MlpBlock_3/Dense_0/kernel"].shape
    _, tokens, _ = arrays["Transformer/posembed_input/pos_embedding"].shape
    depth = len({name.split("/")[1] for name in arrays if "/encoderblock_" in name})
    features = arrays["pre_logits/bias"].size if "pre_logits/bias" in arrays else 0
    model = patch, width, depth, heads, hidden
    return model, math.isqrt(tokens - 1) * patch, arrays["head/bias"].size, features


def read_params(arrays, source):
    """{name: array} of a checkpoint -> params, nested float32 NumPy arrays, as `forward` wants.

    Knows the names of the released files and those of newer Flax code, which renumbers layers and
    puts everything under opt/target/ or params/. BadInput, naming source, where an entry is
    missing, unknown, misshapen or not finite.
    """
    prefix = next((p for p in ("opt/target/", "params/") if p + "cls" in arrays), "")
    released = {}
    for name, array in arrays.items():
        if name.startswith(prefix) and not name.startswith(("train/", "class_names")):
            name = name.removeprefix(prefix).replace("Attention_0/", "Attention_1/")
            name = name.replace("MlpBlock_0/", "MlpBlock_3/").replace("Norm_1/", "Norm_2/")
            released[name] = array
    with explained(f"find a ViT in {source}"):
        sizes = describe(released)
        like = jax.eval_shape(  # what such a model consists of; nothing is computed
            lambda: init_params(jax.random.key(0), *sizes))

    def take(name, shape):
        require(name in released, f"{source}: {name} is missing, should be {shape}")
        array = released.pop(name)
        require(array.shape == shape, f"{source}: {name} is {array.shape}, should be {shape}")
        require(array.dtype.kind == "f" and abs(array).max() <= np.finfo(np.float32).max,
                f"{source}: {name} holds NaN, infinity or no floats at all")
        return array.astype(np.float32)

    def build(path, leaf):
        name = leaf_name(path)
        if "/encoderblock/" not in name:
            return take(name, leaf.shape)
        depth, *shape = leaf.shape
        return np.stack([take(block_name(name, i), tuple(shape)) for i in range(depth)])

    params = jax.tree_util.tree_map_with_path(build, like)
    require(not released, f"{source}: no such model has {', '.join(sorted(released)[:3])}")
    return params


def read_npz(path):
    """{name: array} of an .npz file, each checked against its CRC-32; nothing is unpickled."""
    with explained(f"read {path}"), np.load(path) as file:
        require(len(set(file.files)) == len(file.files), f"{path} has two arrays of one name")
        return dict(file)


def read_checkpoint(path):
    """A checkpoint file as it is: (params, list of its K class names or None). BadInput."""
    arrays = read_npz(path)
    params = read_params(arrays, path)
    if "class_names" not in arrays:
        return params, None
    names, num_classes = arrays["class_names"], len(params["head"]["bias"])
    require(names.shape == (num_classes,),
            f"{path} names other than the {num_classes} classes that its head has")
    with explained(f"read the class names of {path}"):
        return params, names.astype(str).tolist()


def load_checkpoint(path):
    """The params of a checkpoint file, as they are, see `read_params`. BadInput."""
    return read_checkpoint(path)[0]


def load_pretrained(options, fine_tuned=False):
    """What --pretrained names, see `read_checkpoint`. BadInput. fine_tuned: "released" means the
    checkpoint that was fine-tuned on ImageNet."""
    source = options.pretrained
    if source == "released":
        known = FINE_TUNED if fine_tuned else PRETRAINED
        require(options.model in known, f"no such checkpoint of {options.model} was released, but "
                f"of {', '.join(known)}; use --pretrained=FILE, or none to train from scratch")
        source = RELEASED_URL.format(known[options.model])
    if source.startswith(("http://", "https://")):
        return fetch(source, options, read_checkpoint)
    require(Path(source).expanduser().is_file(), f"--pretrained={source} is no file")
    return read_checkpoint(Path(source).expanduser())


def save_checkpoint(path, params, class_names=(), **more):
    """Writes params as .npz with the released names, whole or not at all. class_names: K strings;
    more: further arrays by name. BadInput where params hold NaN or infinity or the disk refuses."""
    arrays = to_released(jax.device_get(params)) | more
    require(all(np.isfinite(array).all() for array in arrays.values() if array.dtype.kind == "f"),
            f"weights are nan or infinite, so {path} is left as it was; try a lower --base_lr")
    if len(class_names):
        arrays["class_names"] = np.array(class_names, str)
    with explained(f"write {path}", "; what was there stays"):
        with open(f"{path}.partial", "wb") as file:
            np.savez(file, **arrays)
            file.flush()
            os.fsync(file.fileno())  # on the disk before it gets its name
        os.replace(f"{path}.partial", path)


def resize_position_embeddings(embeddings, grid):
    """Position embeddings for another image size: [1, 1 + g*g, D] -> [1, 1 + grid*grid, D].

    Bilinear between the g x g patches with aligned corners (paper, section 3.2; as the release's
    scipy.ndimage.zoom of order 1). The class token's row stays as it is.
    """
    patches = np.asarray(embeddings[0, 1:])  # [g*g, D]
    old = math.isqrt(len(patches))
    at = np.linspace(0, old - 1, grid)  # where the new rows (and columns) lie among the old ones
    bilinear = np.maximum(0, 1 - abs(at[:, None] - np.arange(old)))  # [grid, g], rows sum to 1
    patches = np.tensordot(bilinear, patches.reshape(old, old, -1), 1)  # [grid, g, D]
    patches = np.einsum("jb,ibd->ijd", bilinear, patches).reshape(1, grid * grid, -1)
    return np.concatenate([embeddings[:, :1], patches], axis=1).astype(np.float32)


def image_size_of(params):
    """The side of the images, in pixels, for which the position embeddings of params are."""
    tokens = params["Transformer"]["posembed_input"]["pos_embedding"].shape[1]
    return math.isqrt(tokens - 1) * params["embedding"]["kernel"].shape[0]


def adapt(params, image_size, num_classes=None):
    """params for images of image_size pixels (paper, section 3.2); with num_classes, to be fine-
    tuned: pre_logits dropped, the head all zeros. BadInput where patches do not fill an image."""
    encoder = params["Transformer"]
    patch = params["embedding"]["kernel"].shape[0]
    nearest = max(1, round(image_size / patch)) * patch
    require(image_size == nearest,
            f"--image_size={image_size} is not a multiple of the patch size {patch}; {nearest} is")
    embeddings = resize_position_embeddings(
        encoder["posembed_input"]["pos_embedding"], image_size // patch)
    params = params | {"Transformer": encoder | {"posembed_input": {"pos_embedding": embeddings}}}
    if num_classes:
        params.pop("pre_logits", None)
        params["head"] = {
            "kernel": np.zeros((params["cls"].shape[2], num_classes), np.float32),
            "bias": np.zeros(num_classes, np.float32)}
    return params


# --------------------------------------------------------------------- 7. Runs that lose nothing

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
    except BadInput:
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {str(error)[-300:]}"
        raise BadInput(f"cannot {action} ({reason}){way_out}") from error


@contextlib.contextmanager
def locked(folder):
    """Holds a lock on a folder, made if need be, which ends with the process at the latest.
    BadInput where another process has it. (Each host has its own.)"""
    with contextlib.ExitStack() as stack:
        with explained(f"write to {folder}"):
            os.makedirs(folder, exist_ok=True)
            file = stack.enter_context(open(f"{folder}/.lock-{jax.process_index()}", "w"))
        try:
            import fcntl
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BadInput(f"another run is at work in {folder}; wait, or choose another folder"
                           ) from None
        except (ImportError, OSError):
            pass  # neither Windows nor every network disk has such locks
        yield


@contextlib.contextmanager
def noted_signals():
    """A list to which the first Ctrl-C or SIGTERM is added; a second one ends the process at once.
    Handlers are put back afterwards; threads other than the main one cannot have any."""
    noted = []
    before = {}

    def note(number, _):
        noted.append(number)
        signal.signal(number, signal.SIG_DFL)

    if threading.current_thread() is threading.main_thread():
        before = {n: signal.signal(n, note) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield noted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def begin_or_resume(options, data):
    """Gives state, on all devices, and run, a dict of what else is saved: "fixed", the options and
    data that must not change when a run goes on; "rows" of metrics.csv; "tested", the steps that
    were evaluated. Both are new, or from checkpoint.npz. BadInput."""
    path = f"{options.logdir}/checkpoint.npz"
    classes = [*data["classes"]]
    fixed = {name: getattr(options, name) for name in FIXED}
    fixed |= {"classes": classes, "training images": len(data["train"])}
    if os.path.exists(path):
        arrays = read_npz(path)
        with explained(f"go on from {path}", "; choose another --logdir"):
            run, step = json.loads(str(arrays["train/run"])), int(arrays["train/step"])
            require(0 <= step <= options.total_steps, f"{path} is of step {step}, which is none")
            for name, value in fixed.items():
                theirs = run["fixed"][name]
                require(theirs == value, f"{path} is of a run with {name}={str(theirs)[:60]}, now "
                        f"it is {str(value)[:60]}; choose another --logdir")
            params = read_params(arrays, path)
            zeros, tree = jax.tree.flatten(sgd_init(params))
            momentum = jax.tree.unflatten(tree, [
                arrays[f"train/{i}"].astype(zero.dtype).reshape(zero.shape)
                for i, zero in enumerate(zeros)])
    else:
        if options.pretrained == "none":
            init = jax.jit(init_params, static_argnums=(1, 2, 3),  # it runs once: compiling is what
                           compiler_options={"xla_backend_optimization_level": 0})  # takes time
            key = jax.random.key(options.seed)
            params = init(key, options.model, options.image_size, len(classes))
        else:
            params, _ = load_pretrained(options)
        params = adapt(params, options.image_size, len(classes))
        momentum, step = sgd_init(params), 0
        run = {"fixed": fixed, "rows": [], "tested": []}
    check_hosts_agree(vars(options) | fixed | {"step of checkpoint.npz": step})
    print(f"{len(data['train'])} training images, {jax.device_count()} x "
          f"{jax.devices()[0].device_kind}, step {step} of {options.total_steps}", flush=True)
    state = {"params": params, "momentum": momentum, "step": np.int32(step)}
    return replicate(state), run


def save_run(options, state, run):
    """Writes checkpoint.npz, for `begin_or_resume`. (Momentum as float32, which NumPy knows.)"""
    if jax.process_index() == 0:
        state = jax.device_get(state)
        more = {f"train/{i}": np.float32(leaf)
                for i, leaf in enumerate(jax.tree.leaves(state["momentum"]))}
        more |= {"train/step": state["step"], "train/run": np.array(json.dumps(run))}
        path = f"{options.logdir}/checkpoint.npz"
        save_checkpoint(path, state["params"], run["fixed"]["classes"], **more)


def record(options, run, step, loss="", rate="", speed="", accuracy=""):
    """Adds a row to metrics.csv, and says how training goes (speed in images per second). The file
    is written, never read: checkpoint.npz has the rows, too. BadInput where loss is not finite."""
    run["rows"].append((step, loss, rate, speed, accuracy))
    table = [("step", "loss", "learning_rate", "images_per_second", "test_accuracy"), *run["rows"]]
    path = Path(options.logdir, "metrics.csv")
    if jax.process_index() == 0:
        with explained(f"write {path}"):
            path.write_text("".join(",".join(map(str, row)) + "\n" for row in table))
    if accuracy != "":
        run["tested"].append(step)
    else:
        require(math.isfinite(loss), f"the loss is {loss} in step {step}; try a lower --base_lr")
        minutes = (options.total_steps - step) * options.batch_size / speed / 60
        print(f"step {step}/{options.total_steps}  loss {loss:.4f}  lr {rate:.2e}  "
              f"{speed:.1f} images/s  {minutes:.1f} minutes left", flush=True)


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
    nearest = math.ceil(batch_size / math.prod(shape)) * math.prod(shape)
    require(batch_size == nearest, f"--batch_size={batch_size} is no multiple of "
            f"{jax.device_count()} devices x --accum_steps={accum_steps}; {nearest} is")
    return np.arange(batch_size).reshape(*shape, -1)[jax.process_index()]


COUNTER = itertools.count()  # of calls of gather, the same on all hosts


def gather(value):
    """What all hosts call this function with: a list, in their order. Waits for all of them.
    (Through the key-value store that JAX keeps on the first host, so no device is troubled.)"""
    if jax.process_count() == 1:
        return [value]
    name = f"gather/{next(COUNTER)}"
    with explained("agree with the other hosts"):
        store = jax._src.distributed.global_state.client
        store.key_value_set(f"{name}/{jax.process_index():06}", json.dumps(value))
        store.wait_at_barrier(name, timeout_in_ms=600_000)
        return [json.loads(text) for _, text in sorted(store.key_value_dir_get(f"{name}/"))]


def check_hosts_agree(values):
    """BadInput where a dict of values is not the same on all hosts, but for their own folders."""
    everyone = gather(values)
    for name in {*values} - {"process_id", "logdir", "data_dir"}:
        found = [str(theirs[name])[:60] for theirs in everyone]
        require(len({*found}) == 1, f"the hosts differ in {name}: {', '.join(found)}")


def join_hosts(options, patience=300):
    """Makes one JAX of all hosts of --coordinator_address. Where not all come within patience
    seconds, or one calls `fail_together` later on, the process ends. BadInput."""
    address = options.coordinator_address
    host, _, port = address.rpartition(":")
    require(address == "auto" or host and port.isdecimal() and 0 < int(port) < 2**16,
            f"--coordinator_address={address!r} must be HOST:PORT of the first host, or auto")
    print(f"waiting for all hosts to come to {address}, {patience} s at most", flush=True)
    hosts = () if address == "auto" else (address, options.num_processes, options.process_id)
    late = threading.Timer(patience, os._exit, [2])  # JAX would end in a stack of C++
    late.daemon = True
    late.start()
    with explained(f"join the hosts at {address}"):
        jax.distributed.initialize(*hosts, initialization_timeout=2 * patience)
    late.cancel()
    threading.Thread(target=watch_hosts).start()
    if jax.process_index() > 0:
        sys.stdout = None  # print does nothing then: the first host speaks for all


def watch_hosts():
    """Ends this host when one has failed; looks every second."""
    store = jax._src.distributed.global_state.client
    while threading.main_thread().is_alive():
        time.sleep(1)
        for name, _ in store.key_value_dir_get("failed/"):
            print(f"vit.py: all hosts end: {name}", file=sys.stderr, flush=True)
            time.sleep(1 if jax.process_index() else 5)  # the first host, and with it the store,
            os._exit(2)  # goes last


def fail_together():
    """Ends all hosts with status 2. (A usual exit of one would wait for the rest, for minutes.)"""
    store = jax._src.distributed.global_state.client
    store.key_value_set(f"failed/{jax.process_index()}", "")
    threading.Event().wait()  # for watch_hosts, here as on the others


# --------------------------------------------------------------------------------------- 9. Photos


def attention_rollout(weights):
    """How much of each patch reaches the class token: [L, B, A, N, N] -> [B, grid, grid], max 1.

    The mean over the heads, mixed with the identity for the residual connections, multiplied block
    after block (arXiv 2005.00928; the paper, figure 6).
    """
    weights = (weights.mean(axis=2) + np.eye(weights.shape[-1])) / 2  # [L, B, N, N], rows sum to 1
    reached = functools.reduce(lambda below, block: block @ below, weights)[:, 0, 1:]  # [B, N-1]
    grid = math.isqrt(reached.shape[1])
    return (reached / reached.max(axis=1, keepdims=True)).reshape(-1, grid, grid)


def read_imagenet_names(path):
    """A text file with a line for each of ImageNet's 1,000 classes -> list of strings."""
    names = path.read_text().splitlines()
    require(len(names) == 1000, f"{path} has {len(names)} lines, not 1000")
    return names


def classify(options, photos):
    """Prints the five likeliest classes of each photo and writes PHOTO-attention.png: the photo,
    and the photo lit by where the class token looks. BadInput."""
    params, names = load_pretrained(options, fine_tuned=True)
    if options.pretrained == "released":
        names = fetch(IMAGENET_NAMES, options, read_imagenet_names)
    params = adapt(params, options.image_size or image_size_of(params))
    run = jax.jit(functools.partial(forward, return_attention=True))
    for photo in photos:
        image = decode(photo, photo)
        pixels = to_pixels(to_array(image, image_size_of(params)), options.dtype)
        logits, weights = run(params, pixels[None])
        light = Image.fromarray(attention_rollout(np.asarray(weights))[0].astype(np.float32))
        light = np.asarray(light.resize(image.size, Image.Resampling.BILINEAR))[..., None]
        lit = (np.asarray(image) * (0.1 + 0.9 * light)).astype(np.uint8)
        Image.fromarray(np.hstack([image, lit])).save(f"{photo}-attention.png")
        print(f"{photo} (see {photo}-attention.png)")
        probabilities = np.asarray(jax.nn.softmax(logits[0]))
        for label in probabilities.argsort()[::-1][:5]:
            print(f"{probabilities[label]:8.2%}  {names[label] if names else label}")


# ------------------------------------------------------------------------------------ 10. Datasets

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")  # these start no other program
CIFAR = {  # the authors' archives: address, SHA-256, list of class names, bytes of a record
    "cifar10": ("https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
                "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
                "batches.meta.txt", 1 + 3072),
    "cifar100": ("https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz",
                 "58a81ae192c23a4be8b1804d68e518ed807d710a4eb253b1f2a199162a40d8ec",
                 "fine_label_names.txt", 2 + 3072),
}


@dataclasses.dataclass
class Split:
    """Examples as PyTorch and TFDS hand them out: len(split), and split[i] -> (image, label), where
    read(entries[i]) makes the image (Pillow's, RGB) and the label (an int) when they are wanted."""
    entries: collections.abc.Sequence
    read: collections.abc.Callable

    def __len__(self):
        return len(self.entries)

    def __getitem__(self, i):
        return self.read(self.entries[i])


def inception_crop(rng, width, height):
    """A random box (left, upper, right, lower) in pixels, drawn as by the release (TensorFlow's
    sample_distorted_bounding_box): aspect ratio uniform in [3/4, 4/3], then the height uniform from
    that of 5 % of the image's area to the largest that fits, then the place, in whole pixels."""
    aspect = rng.uniform(3 / 4, 4 / 3)  # width : height
    largest = min(height, width / aspect)
    smallest = min(largest, math.sqrt(0.05 * width * height / aspect))
    h = max(1, round(rng.uniform(smallest, largest)))
    w = min(width, max(1, round(h * aspect)))
    left, upper = rng.integers(width - w + 1), rng.integers(height - h + 1)
    return left, upper, left + w, upper + h


def decode(file, name):
    """A path or file object -> Pillow image in RGB, upright, from any size and mode, without alpha.
    BadInput, with the name, where it is unreadable, of fractions, or above 179 million pixels."""
    with explained(f"read the image {name}"), Image.open(file, formats=FORMATS) as image:
        require(image.mode != "F", f"the image {name} holds fractions; save it with 8 or 16 bits")
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I"):  # grey of 16 bits, which convert("RGB") would clip
            image = Image.fromarray((np.asarray(image) // 256).astype(np.uint8))
        return image.convert("RGBA" if "transparency" in image.info else "RGB").convert("RGB")


def fetch(url, options, read):
    """read(path) of the file at url, which is downloaded unless it is there. BadInput.
    Its name begins with a digest of the address; it gets it only when read accepts the file."""
    name = f"{hashlib.sha256(url.encode()).hexdigest()[:8]}-{url.rsplit('/', 1)[-1]}"
    path = Path(options.data_dir).expanduser() / "downloads" / name
    partial = path.with_name(f"{name}.{jax.process_index()}.partial")
    if path.exists():
        return read(path)

    def show(block, size, total):
        if block * size % (64 << 20) == 0:
            print(f"fetching {url}: {block * size >> 20} of {total >> 20} MiB", flush=True)

    with locked(path.parent):
        with explained(f"fetch {url}", f"; try again, or put the file at {path} by hand"):
            urllib.request.urlretrieve(url, partial, show)
        with open(partial, "rb") as file:
            start = file.read(30)
        try:
            content = read(partial)
        except BadInput as error:
            raise BadInput(f"{url} sent something else, beginning with {start}: {error}") from None
        os.replace(partial, path)
    return content


def cifar(name, options):
    """CIFAR-10 or CIFAR-100 as a dataset: the first 98 % of the training images, as the release.
    A record is the label byte (CIFAR-100: coarse label, fine label), then 32 x 32 pixels, the red
    plane first. The archive is read in place, not extracted. BadInput where it is damaged."""
    url, sha256, names_file, length = CIFAR[name]

    def read_archive(path):
        archive = path.read_bytes()
        require(hashlib.sha256(archive).hexdigest() == sha256,
                f"{path} is damaged: its SHA-256 is not {sha256}; delete it to fetch it again")
        with tarfile.open(fileobj=io.BytesIO(archive)) as files:
            return {Path(member.name).name: files.extractfile(member).read()
                    for member in files if member.isfile()}

    def read_record(record):
        pixels = record[-3072:].reshape(3, 32, 32).transpose(1, 2, 0)
        return Image.fromarray(np.ascontiguousarray(pixels)), int(record[-3073])

    def split(share, *files):
        records = np.frombuffer(b"".join(files), np.uint8).reshape(-1, length)
        return Split(records[: round(share * len(records))], read_record)

    files = fetch(url, options, read_archive)
    binaries = [files[name] for name in sorted(files) if name.endswith(".bin")]
    if name == "cifar100":
        binaries.reverse()  # test.bin, train.bin; but data_batch_1.bin, ..., test_batch.bin
    *train, test = binaries
    return {"classes": files[names_file].decode().split(),
            "train": split(0.98, *train), "test": split(1, test)}


def image_folder(root):
    """A folder of {train,test}/CLASS/*.jpg (png, webp, ...; val for test) as a dataset; CLASS/*.jpg
    without train and test is split 9 : 1, the same way every time. Names that begin with a dot are
    left out, links followed. BadInput."""
    endings = tuple(ending for ending, kind in Image.registered_extensions().items()
                    if kind in FORMATS)

    def find(folder):  # [(class name, path)]
        return [(Path(name).parts[0], Path(folder, name))
                for name in sorted(glob.glob("*/**", root_dir=folder, recursive=True))
                if name.lower().endswith(endings)]

    def read(entry):
        return decode(entry[1], entry[1]), classes.index(entry[0])

    if os.path.isdir(f"{root}/train"):
        train, test = find(f"{root}/train"), find(f"{root}/test") or find(f"{root}/val")
    else:
        files = find(root)
        order, n = np.random.default_rng(0).permutation(len(files)), math.ceil(len(files) / 10)
        train, test = [files[i] for i in order[n:]], [files[i] for i in order[:n]]
    classes = sorted({name for name, _ in train})
    unknown = {name for name, _ in test} - {*classes}
    require(train and test, f"{root} must hold images for training and for testing: "
            "{train,test}/CLASS/*.jpg or CLASS/*.jpg (or png, webp, ...)")
    require(not unknown, f"{root} has no training images of the test classes {[*unknown][:3]}")
    require(len(classes) > 1, f"{root} has images of one class only, {classes[0]!r}")
    return {"classes": classes, "train": Split(train, read), "test": Split(test, read)}


def tfds_dataset(name, data_dir):
    """A TFDS image-classification dataset, read as ArrayRecord, for which TensorFlow is not needed.
    BadInput where TFDS does not know it, or it is not prepared and cannot be."""
    require(re.fullmatch(r"[a-z]\w*([/:].*)?", name), f"{name!r} is no file, no folder, and no "
            "dataset: their names are of small letters, digits and _, like cifar10")
    with explained(f"find {name}: it is no file, no folder, and no dataset of TFDS"):
        logging.getLogger("absl").setLevel(logging.ERROR)  # for one line, not two
        import tensorflow_datasets as tfds  # only here: to import it takes longer than JAX
        builder = tfds.builder(name, data_dir=data_dir, file_format="array_record")
    call = f't.builder("{name}", data_dir="{data_dir}", file_format="array_record")'
    with explained(f"prepare {name}", "; where TensorFlow is installed, run: python -c 'import "
                   f"tensorflow_datasets as t; {call}.download_and_prepare()'"):
        if not builder.is_prepared():
            import tensorflow  # noqa: F401 -- before anything is downloaded
            builder.download_and_prepare()
    with explained(f"find images, labels and training examples in {name}"):
        image, label = builder.info.supervised_keys or ("image", "label")
        classes = builder.info.features[label].names
        parts = [part for part in ("train", "test", "validation") if part in builder.info.splits]
        if name == "imagenet2012":  # as the release
            parts = ["train[:99%]", "validation"]
        elif len(parts) == 1:
            parts = ["train[:90%]", "train[90%:]"]
        train, test = (builder.as_data_source(part, decoders={image: tfds.decode.SkipDecoding()})
                       for part in parts[:2])

    def read(example):
        require(example[label] >= 0, f"{name} has images without a label")
        return decode(io.BytesIO(example[image]), f"of {name}"), int(example[label])

    return {"classes": classes, "train": Split(train, read), "test": Split(test, read)}


def load_data(name, options):
    """DATA of the command line -> dataset: a dict of "classes" and two splits, see `train`."""
    if name == "digits":
        return {"classes": [*"0123456789"], "train": Split(range(8000), draw_digit),
                "test": Split(range(8000, 9000), draw_digit)}
    if name in CIFAR:
        return cifar(name, options)
    return image_folder(name) if os.path.isdir(name) else tfds_dataset(name, options.data_dir)


# -------------------------------------------------------------------------------- 11. Command line

PRESETS = {  # what a dataset has instead of the defaults
    "digits": {"model": "ViT-XS_8", "pretrained": "none", "image_size": 32, "augment": "none",
               "batch_size": 64, "accum_steps": 1, "total_steps": 1200, "base_lr": 0.1,
               "warmup_steps": 100, "eval_every": 600, "log_every": 100},
    "imagenet2012": {"total_steps": 20_000},
}
CHOICES = {"dtype": ("float32", "bfloat16"), "decay_type": ("cosine", "linear"),
           "augment": ("inception", "none")}
MAY_BE_ZERO = ("image_size", "warmup_steps", "base_lr", "dropout", "mixup_alpha", "seed",
               "process_id")
BELOW = {"image_size": 4097, "batch_size": 2**16 + 1, "dropout": 1}  # others: below 2**31


def check_options(options):
    """BadInput where an option is out of its range."""
    for name, value in vars(options).items():
        fits = value in CHOICES.get(name, [value])
        if type(value) in (int, float):
            fits = 0 <= value < BELOW.get(name, 2**31) and (value or name in MAY_BE_ZERO)
        require(fits, f"--{name}={value} is out of range")
    with explained("use --model"):
        parse_model(options.model)
    require(options.warmup_steps < options.total_steps, f"--warmup_steps={options.warmup_steps} "
            f"must be below --total_steps={options.total_steps}")


def parse_options(argv):
    """The command line: (DATA or photos; Options: flags over PRESETS over defaults). BadInput."""
    parser = argparse.ArgumentParser(prog="vit.py", description=__doc__.split("\n")[0],
                                     allow_abbrev=False, argument_default=argparse.SUPPRESS)
    parser.error = functools.partial(require, False)  # one line, and no usage
    parser.add_argument("data", metavar="DATA", nargs="*", default=["digits"], help=(
        "digits (the default), cifar10, cifar100, imagenet2012 or another TFDS dataset, a folder "
        "{train,test}/CLASS/*.jpg, or image files to classify"))
    comments = dict(re.findall(r"(\w+): .*  # (.*)", inspect.getsource(Options)))
    for field in dataclasses.fields(Options):
        kind = {"action": "store_true"} if field.type is bool else {
            "type": field.type, "choices": CHOICES.get(field.name)}
        text = f"{comments[field.name]} ({field.default})"
        parser.add_argument(f"--{field.name}", help=text, **kind)
    flags = vars(parser.parse_intermixed_args(argv))
    paths = ["imagenet2012" if path == "imagenet" else path for path in flags.pop("data")]
    preset = PRESETS.get(paths[0], {})
    if flags.get("eval_only") or all(map(os.path.isfile, paths)):
        preset = {"image_size": 0}  # what the checkpoint has
    logdir = f"runs/{paths[0].strip('./').replace('/', '-')}"
    options = Options(**({"logdir": logdir} | preset | flags))
    require("model" not in flags or options.pretrained in ("released", "none"),
            f"--model={options.model} is for --pretrained=released or none: a file says its own")
    return paths, options


def run_command(paths, options):
    """Trains, evaluates or classifies, as the command line says. BadInput."""
    if all(map(os.path.isfile, paths)):
        return classify(options, paths)
    require(len(paths) == 1, f"of {' '.join(paths)}, not all are image files")
    data = load_data(paths[0], options)
    if not options.eval_only:
        return train(options, data)
    require(options.pretrained != "none" and (options.pretrained != "released" or len(
        data["classes"]) == 1000), f"--eval_only of {paths[0]} takes --pretrained=FILE")
    params, names = load_pretrained(options, fine_tuned=True)
    require(len(params["head"]["bias"]) == len(data["classes"]) and names in (
        None, [*data["classes"]]), f"{options.pretrained} knows other classes than {paths[0]}")
    params = adapt(params, options.image_size or image_size_of(params))
    return evaluate(replicate(params), data["test"],
                    math.ceil(options.batch_size / options.accum_steps), options.dtype)


def less_memory(options):
    """Flags that spare memory: the next --accum_steps that divides, and --remat."""
    share = options.batch_size // jax.device_count()
    divisors = (n for n in range(options.accum_steps + 1, share + 1) if share % n == 0)
    return [*(f"--accum_steps={n}" for n in itertools.islice(divisors, 1)), "--remat"]


def main(argv=None):
    """The command line: exit status 0, 2 after bad input, 128 + signal number after a signal."""
    if os.path.expanduser("~") == "~":  # a user without a home, as in some containers
        os.environ["HOME"] = tempfile.gettempdir()
    if not jax.config.jax_compilation_cache_dir:  # the same command need not compile again
        jax.config.update("jax_compilation_cache_dir", os.path.expanduser("~/.cache/vit.py"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    warnings.filterwarnings("ignore", "Error .* persistent compilation cache")  # then it compiles
    socket.setdefaulttimeout(60)  # for downloads
    try:
        paths, options = parse_options(argv)
        if options.coordinator_address or options.num_processes > 1:
            join_hosts(options)
        run_command(paths, options)
        return 0
    except KeyboardInterrupt as stop:
        print("stopped; run the same command to go on", flush=True)
        return 128 + (stop.args or [signal.SIGTERM])[0]
    except BrokenPipeError:  # whoever read what we print has gone: `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except Exception as error:
        line = " ".join(str(error).split())
        if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in line:
            line = f"out of memory: try {' or '.join(less_memory(options))} ({line[:300]})"
        elif not isinstance(error, (BadInput, OSError, OverflowError)) and "Gloo" not in line:
            sys.excepthook(*sys.exc_info())  # a bug of ours: its traceback
        print(f"vit.py: {line}", file=sys.stderr, flush=True)
        if jax._src.distributed.global_state.client:
            fail_together()
        return 2


if __name__ == "__main__":
    sys.exit(main())
