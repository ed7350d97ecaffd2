# SPDX-License-Identifier: Apache-2.0
"""What vit.py promises, checked: pytest test_vit.py (about two minutes on two CPU cores).

Expected numbers come from elsewhere: from the original implementation (google-research's
vision_transformer at c6de1e5, float32, highest matmul precision), from NumPy, SciPy or Pillow
written out, or from a second way to the same result.
"""

import ast
import contextlib
import dataclasses
import functools
import glob
import hashlib
import http.server
import io
import json
import os
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
import types
import zipfile
from pathlib import Path
from unittest import mock

CACHE = tempfile.TemporaryDirectory()  # of compiled programs, for this run of the tests alone
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"  # before JAX starts
os.environ["JAX_COMPILATION_CACHE_DIR"] = CACHE.name
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy
from jax.experimental import multihost_utils
from numpy.testing import assert_allclose
from PIL import Image

import vit

jax.config.update("jax_default_matmul_precision", "highest")

# ------------------------------------------------------------------------- What several tests use

VIT_B_16 = {  # the arrays of the released imagenet21k+imagenet2012/ViT-B_16.npz, and their shapes
    "cls": (1, 1, 768),
    "embedding/kernel": (16, 16, 3, 768),
    "embedding/bias": (768,),
    "Transformer/posembed_input/pos_embedding": (1, 577, 768),
    "Transformer/encoder_norm/scale": (768,),
    "Transformer/encoder_norm/bias": (768,),
    "head/kernel": (768, 1000),
    "head/bias": (1000,),
}
VIT_B_16_BLOCK = {  # and of each block, after Transformer/encoderblock_0/ to _11/
    "LayerNorm_0/scale": (768,),
    "LayerNorm_0/bias": (768,),
    "MultiHeadDotProductAttention_1/query/kernel": (768, 12, 64),
    "MultiHeadDotProductAttention_1/query/bias": (12, 64),
    "MultiHeadDotProductAttention_1/key/kernel": (768, 12, 64),
    "MultiHeadDotProductAttention_1/key/bias": (12, 64),
    "MultiHeadDotProductAttention_1/value/kernel": (768, 12, 64),
    "MultiHeadDotProductAttention_1/value/bias": (12, 64),
    "MultiHeadDotProductAttention_1/out/kernel": (12, 64, 768),
    "MultiHeadDotProductAttention_1/out/bias": (768,),
    "LayerNorm_2/scale": (768,),
    "LayerNorm_2/bias": (768,),
    "MlpBlock_3/Dense_0/kernel": (768, 3072),
    "MlpBlock_3/Dense_0/bias": (3072,),
    "MlpBlock_3/Dense_1/kernel": (3072, 768),
    "MlpBlock_3/Dense_1/bias": (768,),
}
IMAGES = np.random.RandomState(1).uniform(-1, 1, (4, 32, 32, 3)).astype(np.float32)
LABELS = np.array([1, 4, 2, 0])
XS = {"d": 64, "mlp": 256, "tokens": 5, "classes": 2}  # a ViT-XS_8 for 16 pixels
TINY = (  # flags of runs that last seconds
    *("--pretrained=none", "--model=ViT-XS_8", "--image_size=16", "--batch_size=16"),
    *("--accum_steps=1", "--warmup_steps=1", "--total_steps=2", "--augment=none", "--log_every=1"),
)


def released_shapes(patch=8, d=32, depth=2, heads=4, mlp=64, tokens=17, classes=5):
    """{released name: shape}; by default of the model whose numbers the original computed."""
    own = {16: patch, 768: d, 12: heads, 64: d // heads, 3072: mlp, 577: tokens, 1000: classes}
    shapes = dict(VIT_B_16)
    for i in range(depth):
        shapes |= {f"Transformer/encoderblock_{i}/{k}": v for k, v in VIT_B_16_BLOCK.items()}
    return {name: tuple(own.get(n, n) for n in shape) for name, shape in shapes.items()}


def seeded_weights(**sizes):
    """{released name: array}; by default the weights that the original's numbers belong to."""
    shapes, r, weights = released_shapes(**sizes), np.random.RandomState(0), {}
    for name in sorted(shapes):
        weights[name] = (0.1 * r.standard_normal(shapes[name])).astype(np.float32)
        weights[name] += np.float32(name.endswith("/scale"))
    return weights


def seeded_params(**sizes):
    return vit.to_params(seeded_weights(**sizes), "the seeded weights")


params = pytest.fixture(seeded_params, scope="module")
forward, clip = jax.jit(vit.forward), jax.jit(vit.clip_by_global_norm)
# Without this XLA may keep more bits of a bfloat16 than it has.
sgd_update = jax.jit(vit.sgd_update, compiler_options={"xla_allow_excess_precision": False})


@jax.jit
@jax.value_and_grad
def loss_and_gradient(params, images, labels):
    return vit.cross_entropy(vit.forward(params, images), jax.nn.one_hot(labels, 5))


def equal(a, b):
    """Whether two trees hold the same bits."""
    return jax.tree.structure(a) == jax.tree.structure(b) and all(
        np.asarray(x).dtype == np.asarray(y).dtype and np.array_equal(x, y)
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


def all_close(a, b, atol):
    jax.tree.map(lambda x, y: assert_allclose(x, y, atol=atol), a, b)


def picture_folder(root, train=8, test=5, classes=("cat", "dog")):
    """A folder of dark cats and light dogs, which a run of seconds learns to tell apart."""
    for split, count in (("train", train), ("test", test)):
        for label, name in enumerate(classes):
            Path(root, split, name).mkdir(parents=True)
            for i in range(count):
                pixels = np.random.RandomState(100 * label + i).randint(0, 80, (16 + i, 16, 3))
                image = Image.fromarray((pixels + 150 * label).astype(np.uint8))
                image.save(Path(root, split, name, f"{i}.png"))
    return Path(root)


def metrics(run):
    return [row.split(",") for row in Path(run, "metrics.csv").read_text().splitlines()]


def result(run):
    """All that a run leaves behind, but for the images per second."""
    arrays = vit.read_arrays(Path(run, "checkpoint.npz"))
    saved = json.loads(str(arrays.pop("train/run")))
    rows = [[row[:3] + row[4:] for row in rows] for rows in (saved["rows"], metrics(run))]
    return {name: array.tobytes() for name, array in arrays.items()}, rows, saved["identity"]


def python(*arguments, devices=1, **more):
    """Starts a process of its own."""
    environment = os.environ | {
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "JAX_PLATFORMS": "cpu",
        "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo",
    }
    pipes = {name: subprocess.PIPE for name in ("stdin", "stdout", "stderr")}
    command = [sys.executable, *map(str, arguments)]
    where = {"env": environment, "cwd": Path(vit.__file__).parent}
    return subprocess.Popen(command, text=True, **(pipes | where | more))


def finish(process, stdin=None):
    """Its exit status, output and errors."""
    try:
        out, error = process.communicate(stdin, timeout=600)
    finally:
        process.kill()
    return process.returncode, out, error


def line_of(error):
    """The one line of vit.py on stderr, where JAX may have lines of its own."""
    [line] = [line for line in error.splitlines() if line.startswith("vit.py: ")]
    assert "Traceback" not in error
    return line


# ----------------------------------------------------------------- The numbers are the original's


LOGITS = {  # of the first image, by its size in pixels
    16: [-0.08747111, 0.6735925, 0.42114395, 0.01757931, 0.7948882],
    32: [0.13968338, 0.41093412, 0.3068053, -0.11844803, 0.60040045],
    48: [-0.28529721, 0.5231322, 0.7233297, 0.27619973, 0.5140243],
}
UPDATES = {  # by the dtype of momentum: the losses before five updates, the logits after them
    "bfloat16": (
        [1.5707833, 1.5707833, 1.4806235, 1.2611428, 1.1061978],
        [0.6176054, 0.5241724, 0.29380584, -0.9033976, 0.2977193],
    ),
    "float32": (
        [1.5707833, 1.5707833, 1.4805456, 1.2608005, 1.1057192],
        [0.6180969, 0.5244506, 0.29388905, -0.9047332, 0.29700014],
    ),
}
GRADIENTS = """ 0.126349  0.027935  0.145475  0.005826  0.063795 -0.166069  0.351390 -0.377218  0.173236
     0.581771  0         0.088451 -0.003554  1.348437  0.001189 -0.030801 -0.211105 -1.400027
     0.063067 -0.019732 -0.077804 -0.088163 -0.019895  0.145312 -0.039812  0.585964  0
    -0.307931  0.459707  0.005924 -0.019317 -0.090996  0.243097 -0.590395 -0.642435 -0.179350
     0.056561 -1.730072 -0.368995  1.325776"""  # in random directions, by the sorted names
NORM = 3.2320464  # of all gradients together


def golden_images(size):
    r = np.random.RandomState(2)
    return IMAGES if size == 32 else r.uniform(-1, 1, (2, size, size, 3)).astype(np.float32)


def in_random_directions(grads):
    """{name: array} -> the product of each with a random array of its shape."""
    r = np.random.RandomState(3)
    return [np.vdot(grads[k], r.standard_normal(grads[k].shape)) for k in sorted(grads)]


@pytest.mark.parametrize("size", LOGITS)
def test_logits_at_any_resolution_equal_the_original(params, size):
    logits = forward(vit.adapt(params, size), golden_images(size))
    assert_allclose(logits[0], LOGITS[size], atol=5e-6)


def test_the_loss_and_every_gradient_equal_the_original(params):
    loss, grads = jax.device_get(loss_and_gradient(params, IMAGES, LABELS))
    expected = [*map(float, GRADIENTS.split())]
    assert_allclose(in_random_directions(vit.to_released(grads)), expected, atol=1e-5)
    assert abs(loss - 1.5707834) < 1e-5


def test_gradients_are_clipped_to_the_original_global_norm_and_left_alone_below_it(params):
    _, grads = jax.device_get(loss_and_gradient(params, IMAGES, LABELS))
    all_close(clip(grads, 1.0), jax.tree.map(lambda g: g / NORM, grads), 1e-6)
    all_close(clip(grads, 4.0), grads, 0)


@pytest.mark.parametrize("dtype", UPDATES)
def test_five_updates_with_accumulation_equal_the_original(params, dtype):
    losses, logits = UPDATES[dtype]
    momentum = jax.tree.map(lambda m: m.astype(dtype), jax.device_get(vit.sgd_init(params)))
    for step, expected in enumerate(losses):
        halves = [loss_and_gradient(params, IMAGES[h], LABELS[h]) for h in ([0, 1], [2, 3])]
        loss, grads = jax.tree.map(lambda *x: sum(x) / 2, *jax.device_get(halves))
        assert abs(loss - expected) < 1e-5
        rate = vit.learning_rate(step, 0.03, 5, 2)
        params, momentum = sgd_update(params, momentum, clip(grads, 1.0), rate)
    assert_allclose(forward(params, IMAGES)[0], logits, atol=1e-5)


@pytest.mark.skipif("UPSTREAM" not in os.environ, reason="UPSTREAM names no copy of the original")
def test_the_original_computes_these_numbers_again(tmp_path, monkeypatch):
    needed = "flax", "optax", "scipy.ndimage", "flax.training.checkpoints"
    flax, optax, _, _ = map(pytest.importorskip, needed)
    monkeypatch.syspath_prepend(os.environ["UPSTREAM"])
    idle = "tensorflow tensorflow.io clu pandas tqdm vit_jax.input_pipeline vit_jax.models".split()
    idle = {name: mock.MagicMock(**{"gfile.GFile": open}) for name in idle}  # but to read a file
    with mock.patch.dict(sys.modules, idle):
        from vit_jax import checkpoint, models_vit, train, utils
    sizes = {"num_layers": 2, "mlp_dim": 64, "num_heads": 4}
    sizes |= {"dropout_rate": 0, "attention_dropout_rate": 0}
    model = models_vit.VisionTransformer(5, mock.Mock(size=(8, 8)), sizes, hidden_size=32)
    np.savez(tmp_path / "x.npz", **seeded_weights())
    params = checkpoint.load(tmp_path / "x.npz")
    table = params["Transformer"]["posembed_input"]
    stored = table["pos_embedding"]
    for size in (16, 48, 32):
        table["pos_embedding"] = checkpoint.interpolate_posembed(stored, 1 + size**2 // 64, True)
        logits = model.apply({"params": params}, golden_images(size), train=False)
        assert_allclose(logits[0], LOGITS[size], atol=1e-5)
    batch = {"image": IMAGES[None], "label": np.eye(5, dtype=np.float32)[LABELS][None]}
    schedule, first = utils.create_learning_rate_schedule, None
    keep = optax.GradientTransformation(None, lambda grads, _: (grads, grads))
    step = train.make_update_fn(apply_fn=model.apply, accum_steps=2, tx=keep)
    for dtype, (losses, logits) in UPDATES.items():
        sgd = optax.sgd(schedule(5, 0.03, "cosine", 2), momentum=0.9, accumulator_dtype=dtype)
        tx, tuned = optax.chain(optax.clip_by_global_norm(1.0), sgd), params
        state = tx.init(params)
        for expected in losses:  # tx outside of jit, which keeps more bits than bfloat16 has
            inputs = jax.tree.map(lambda x: np.asarray(x)[None], tuned)  # for one device
            _, grads, loss, _ = step(inputs, np.zeros(1), batch, jax.random.key(0)[None])
            assert_allclose(loss, expected, atol=1e-5)
            grads = jax.tree.map(lambda x: np.asarray(x)[0], grads)
            first = first or flax.traverse_util.flatten_dict(grads, sep="/")
            updates, state = tx.update(grads, state)
            tuned = optax.apply_updates(tuned, updates)
        found = model.apply({"params": tuned}, IMAGES, train=False)[0]
        assert_allclose(found, logits, atol=1e-5)
    assert_allclose(in_random_directions(first), [*map(float, GRADIENTS.split())], atol=1e-5)
    assert_allclose(optax.tree.norm(first), NORM, atol=1e-5)
    assert_allclose(schedule(10_000, 0.03, "cosine", 500)(1500), 0.02918726, atol=1e-7)


@pytest.mark.parametrize("total, warmup", [(10_000, 500), (20, 0)])
def test_the_learning_rate_rises_in_a_line_and_falls_in_a_cosine_or_a_line(total, warmup):
    for step in {0, warmup // 2, warmup, (warmup + total) // 2, total - 1, total}:
        done = max(0, step - warmup) / (total - warmup)
        cosine, linear = 0.03 * (1 + np.cos(np.pi * done)) / 2, 0.03 + (1e-5 - 0.03) * done
        for kind, rate in (("cosine", cosine), ("linear", linear)):
            rate *= min(1, step / warmup) if warmup else 1
            assert abs(vit.learning_rate(step, 0.03, total, warmup, kind) - rate) < 1e-7
    assert abs(vit.learning_rate(1500, 0.03, 10_000, 500) - 0.02918726) < 1e-7  # the original's


def test_the_recipe_is_the_published_one():
    # google-research/vision_transformer, vit_jax/configs/common.py, and with_dataset's presets;
    # the paper, appendix B.1.1; the base rate is that of the README's table of fine-tuning.
    published = {
        "batch_size": 512,
        "base_lr": 0.03,
        "decay_type": "cosine",
        "warmup_steps": 500,
        "total_steps": 10_000,
        "grad_norm_clip": 1.0,
        "accum_steps": 8,
        "image_size": 384,
        "eval_every": 100,
        "log_every": 10,
        "dropout": 0.0,
        "mixup_alpha": 0.0,
        "augment": "inception",
        "dtype": "float32",
    }
    for data, total_steps in (("cifar10", 10_000), ("cifar100", 10_000), ("imagenet2012", 20_000)):
        _, options = vit.parse_options([data])
        recipe = {name: getattr(options, name) for name in published}
        assert recipe == published | {"total_steps": total_steps}


@pytest.mark.parametrize(
    "model, count",
    [
        ("ViT-Ti_16", 5_717_416),
        ("ViT-S_16", 22_050_664),
        ("ViT-B_16", 86_567_656),
        ("ViT-B_32", 88_224_232),
        ("ViT-L_16", 304_326_632),
        ("ViT-L_32", 306_535_400),
        ("ViT-H_14", 632_045_800),
    ],
)
def test_models_have_the_published_number_of_parameters(model, count):
    shapes = jax.eval_shape(lambda: vit.init_params(jax.random.key(0), model, 224, 1000))
    assert sum(p.size for p in jax.tree.leaves(shapes)) == count


def test_names_and_shapes_are_those_of_the_released_file():
    shapes = jax.eval_shape(lambda: vit.init_params(jax.random.key(0), "ViT-B_16", 384, 1000))
    blocks = {
        f"Transformer/encoderblock_{i}/{name}": shape
        for i in range(12)
        for name, shape in VIT_B_16_BLOCK.items()
    }
    released = jax.eval_shape(vit.to_released, shapes)
    assert {name: array.shape for name, array in released.items()} == VIT_B_16 | blocks


@pytest.fixture(scope="module")
def initial():
    """Initial parameters of ViT-Ti_16, of two seeds, under their names: [{name: array}]."""
    init = jax.jit(vit.init_params, static_argnums=(1, 2, 3))
    both = [init(jax.random.key(seed), "ViT-Ti_16", 224, 10) for seed in (0, 1)]
    name = functools.partial(jax.tree_util.keystr, simple=True, separator="/")
    leaves = [jax.tree.leaves_with_path(jax.device_get(params)) for params in both]
    return [{name(path): leaf for path, leaf in one} for one in leaves]


def test_initial_parameters_have_the_original_distributions(initial):
    d, heads_together = 192, (2 / (192 + 192)) ** 0.5
    expected = {  # in a name: standard deviation, least and most of the largest value over it
        "MultiHead.*kernel": (heads_together, 0.99, 1),  # uniform
        "MlpBlock.*kernel": ((2 / (d + 4 * d)) ** 0.5, 0.99, 1),
        "MlpBlock.*bias": (1e-6, 1.6, 4),  # normal
        "pos_embedding": (0.02, 1.6, 4),
        "^embedding/kernel": (1 / (3 * 16**2) ** 0.5, 1.2, 2 / 0.8796 / 3**0.5),  # normal, cut
    }
    for name, x in initial[0].items():
        [known] = [v for k, v in expected.items() if re.search(k, name)] or [None]
        if known:
            std, least, most = known
            assert abs(x.std() / std - 1) < 0.03, name
            assert least < abs(x).max() / std / 3**0.5 < most * (1 + 1e-5), name
        else:
            assert np.all(x == name.endswith("scale")), name


def test_every_initial_array_has_its_own_random_numbers_and_the_seed_changes_all(initial):
    starts = [x.ravel()[:192] for arrays in initial for x in arrays.values() if x.std() > 0]
    alike = np.corrcoef(starts) - np.eye(len(starts))
    assert len(starts) == 2 * 10 and abs(alike).max() < 0.5


# --------------------------------------------------------------------------------------- The model


def test_patches_are_embedded_as_by_a_convolution(params):
    kernel, bias = params["embedding"]["kernel"], params["embedding"]["bias"]
    images = IMAGES[:, :24]  # not square, so that rows are no columns
    layout = {"dimension_numbers": ("NHWC", "HWIO", "NHWC")}
    expected = jax.lax.conv_general_dilated(images, kernel, (8, 8), "VALID", **layout) + bias
    found = vit.patch_embedding(images, kernel, bias)
    assert_allclose(found, expected.reshape(4, 12, 32), atol=1e-5)


def test_layer_norm_computes_in_float32_whatever_it_is_given():
    x = (100 + np.random.RandomState(0).standard_normal((5, 64))).astype(jnp.bfloat16)
    exact = np.float64(x)
    expected = (exact - exact.mean(-1, keepdims=True)) / exact.std(-1, keepdims=True)
    found = jax.jit(vit.layer_norm)(x, np.ones(64, np.float32), np.zeros(64, np.float32))
    assert found.dtype == jnp.bfloat16
    assert_allclose(np.float64(found), expected, atol=0.02)


def test_dropout_zeroes_its_share_and_keeps_the_mean():
    x = vit.dropout(jnp.ones(100_000), jax.random.key(0), 0.3)
    assert abs((x == 0).mean() - 0.3) < 0.01 and abs(x.mean() - 1) < 0.01


def written_out_attention(q, k, v):
    """softmax(q k^T / sqrt(size)) v: [B, N, A, D/A] each -> the same."""
    scores = jnp.einsum("bqah,bkah->baqk", q, k) / q.shape[-1] ** 0.5
    powers = jnp.exp(scores - scores.max(axis=-1, keepdims=True))
    return jnp.einsum("baqk,bkah->bqah", powers / powers.sum(axis=-1, keepdims=True), v)


def test_fused_attention_and_its_gradients_equal_attention_written_out():
    *qkv, direction = np.random.RandomState(0).standard_normal((4, 2, 17, 4, 8)).astype(np.float32)

    def values_and_gradients(attend):
        values, backward = jax.vjp(attend, *qkv)
        return values, backward(direction)

    fused = functools.partial(vit.fused_attention, implementation="xla")
    found, expected = (
        jax.jit(functools.partial(values_and_gradients, attend))()
        for attend in (fused, written_out_attention)
    )
    all_close(found, expected, 1e-6)


def tokens_of(params):
    """What goes into the first block."""
    x = vit.patch_embedding(IMAGES, **params["embedding"])
    x = jnp.concatenate([jnp.broadcast_to(params["cls"], (4, 1, 32)), x], axis=1)
    return x + params["Transformer"]["posembed_input"]["pos_embedding"]


def test_attention_weights_are_those_of_the_tokens_and_change_no_logit(params):
    with_weights = jax.jit(functools.partial(vit.forward, return_attention=True))
    logits, weights = jax.device_get(with_weights(params, IMAGES))
    assert_allclose(logits, forward(params, IMAGES), atol=1e-6)
    assert weights.shape == (2, 4, 4, 17, 17)
    x = np.asarray(jax.jit(tokens_of)(params))
    block = jax.tree.map(lambda p: p[0], params["Transformer"]["encoderblock"])
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
    x = x * block["LayerNorm_0"]["scale"] + block["LayerNorm_0"]["bias"]
    query, key = (block["MultiHeadDotProductAttention_1"][name] for name in ("query", "key"))
    q, k = (np.einsum("bnd,dah->bnah", x, p["kernel"]) + p["bias"] for p in (query, key))
    scores = np.einsum("bqah,bkah->baqk", q, k) / np.sqrt(8)
    assert_allclose(weights[0], scipy.special.softmax(scores, axis=-1), atol=1e-5)


def test_dropout_reaches_the_embeddings_and_three_places_of_every_block(params):
    @jax.jit
    def written_out(params, key):
        keys, encoder = jax.random.split(key, 3), params["Transformer"]
        x = vit.dropout(tokens_of(params), keys[0], 0.5)
        for i in range(2):
            block = jax.tree.map(lambda p, i=i: p[i], encoder["encoderblock"])
            own = jax.random.split(keys[1 + i], 3)
            y = vit.layer_norm(x, **block["LayerNorm_0"])
            y, _ = vit.attention(y, **block["MultiHeadDotProductAttention_1"])
            x = x + vit.dropout(y, own[0], 0.5)
            y = vit.linear(
                vit.layer_norm(x, **block["LayerNorm_2"]), **block["MlpBlock_3"]["Dense_0"]
            )
            y = vit.linear(
                vit.dropout(jax.nn.gelu(y), own[1], 0.5), **block["MlpBlock_3"]["Dense_1"]
            )
            x = x + vit.dropout(y, own[2], 0.5)
        x = vit.layer_norm(x, **encoder["encoder_norm"])[:, 0]
        return vit.linear(x, **params["head"])

    key = jax.random.key(7)
    dropping = jax.jit(functools.partial(vit.forward, dropout_rate=0.5))
    assert_allclose(dropping(params, IMAGES, key), written_out(params, key), atol=1e-5)


def test_with_bfloat16_norms_softmax_and_logits_stay_in_float32(params):
    images = jnp.asarray(IMAGES, jnp.bfloat16)
    model = jax.jit(functools.partial(vit.forward, return_attention=True))
    logits, weights = jax.device_get(model(params, images))
    assert logits.dtype == weights.dtype == jnp.float32
    assert_allclose(logits, forward(params, IMAGES), atol=0.05)
    for x in (logits, weights):  # and were not rounded before
        assert np.mean(x == x.astype(jnp.bfloat16).astype(jnp.float32)) < 0.1
    assert np.abs(weights.sum(axis=-1) - 1).max() < 1e-5


def test_remat_gives_the_same_gradient_and_computes_more_to_keep_less(params):
    def loss(params, remat):
        return vit.cross_entropy(vit.forward(params, IMAGES, remat=remat), np.eye(5)[LABELS])

    plain, remat = (jax.grad(functools.partial(loss, remat=remat)) for remat in (False, True))
    all_close(jax.jit(plain)(params), jax.jit(remat)(params), 1e-5)
    products = [str(jax.make_jaxpr(f)(params)).count("dot_general") for f in (plain, remat)]
    assert products[1] >= products[0] + 4


def test_the_model_needs_nothing_but_jax_when_it_is_pasted_elsewhere():
    model = Path(vit.__file__).read_text().split("- 2. Model\n")[1].split("- 3. Learning\n")[0]
    pasted = {}
    exec(f"import jax, jax.numpy as jnp\n{model}", pasted)
    params = jax.eval_shape(lambda: pasted["init_params"](jax.random.key(0), "ViT-XS_8", 16, 3))
    pasted["forward"] = functools.partial(pasted["forward"], dropout_rate=0.1)
    logits = jax.eval_shape(pasted["forward"], params, jnp.ones((2, 16, 16, 3)), jax.random.key(0))
    assert logits.shape == (2, 3)


# -------------------------------------------------------------------------------------- One update


def one_update(params, step=6, images=None, labels=None, parts=1, each=1, **options):
    """train_step on eight devices, from momentum 0.5: (state, loss, rate), options, batch."""
    options = {"total_steps": 10, "warmup_steps": 2, "base_lr": 0.1} | options
    options, shape = vit.Options(accum_steps=parts, **options), (8, parts, each)
    r = np.random.RandomState(0)
    images = r.randint(0, 256, (*shape, 32, 32, 3), np.uint8) if images is None else images
    labels = r.randint(0, 5, shape).astype(np.int32) if labels is None else labels
    momentum = jax.tree.map(lambda p: np.full(p.shape, 0.5, jnp.bfloat16), params)
    state = {"params": params, "momentum": momentum, "step": np.int32(step)}
    return vit.train_step(state, images, labels, options), options, (images, labels)


@pytest.fixture(scope="module")
def linear_update(params):
    return one_update(params, parts=2, decay_type="linear", grad_norm_clip=0.1)


def test_an_update_on_eight_devices_is_the_rate_times_momentum_and_clipped_mean_gradient(
    params, linear_update
):
    (state, loss, rate), _, (images, labels) = jax.device_get(linear_update)
    pixels = images.reshape(-1, 32, 32, 3) / np.float32(127.5) - 1
    expected, grads = loss_and_gradient(params, pixels, labels.ravel())
    grads = jax.device_get(grads)
    assert abs(loss - expected) < 1e-5
    norm = np.sqrt(sum(np.vdot(g, g) for g in jax.tree.leaves(grads)))
    decayed = 0.44921875  # 0.9 in bfloat16, times 0.5
    expected = jax.tree.map(lambda p, g: p - rate * (decayed + 0.1 / norm * g), params, grads)
    assert norm > 0.2 and state["step"] == 7
    all_close(state["params"], expected, 1e-6)
    all_close(state["momentum"], jax.tree.map(lambda g: decayed + 0.1 / norm * g, grads), 2e-3)


def test_an_update_uses_the_learning_rate_of_its_own_step_and_decay(linear_update):
    (_, _, rate), _, _ = linear_update
    assert rate == pytest.approx(0.1 + (1e-5 - 0.1) * (6 - 2) / (10 - 2), rel=1e-5)


def test_after_an_update_all_devices_hold_the_same_state(linear_update):
    (state, _, _), _, _ = linear_update
    for leaf in jax.tree.leaves(state):
        assert len(leaf.addressable_shards) == 8
        assert all(np.array_equal(leaf, shard.data) for shard in leaf.addressable_shards)


def test_momentum_is_kept_in_bfloat16(params, linear_update):
    for momentum in (vit.sgd_init(params), linear_update[0][0]["momentum"]):
        assert {leaf.dtype for leaf in jax.tree.leaves(momentum)} == {np.dtype(jnp.bfloat16)}


def test_dropout_in_training_differs_from_step_to_step_part_to_part_and_device_to_device(params):
    images = np.broadcast_to(np.random.RandomState(0).randint(0, 256, (32, 32, 3), np.uint8),
                             (8, 2, 1, 32, 32, 3))  # fmt: skip

    def loss(step, *labels):  # of one image everywhere, with these labels of 8 devices x 2 parts
        labels = np.broadcast_to(np.int32(labels), (8, 2))[..., None]
        return float(one_update(params, step, images, labels, parts=2, dropout=0.5)[0][1])

    ones, fours = loss(6, 1), loss(6, 4)
    assert abs(loss(7, 1) - ones) > 1e-4
    # With the same entries dropped everywhere, half of each label would give the mean.
    assert abs(loss(6, (1, 4)) - (ones + fours) / 2) > 1e-4
    assert abs(loss(6, *[[1]] * 4, *[[4]] * 4) - (ones + fours) / 2) > 1e-4


def test_mixup_in_training_blends_images_and_targets_of_each_part_by_one_beta_draw(params):
    a = 0.7
    (_, loss, _), options, (images, labels) = one_update(params, parts=2, each=3, mixup_alpha=a)
    key = jax.random.split(jax.random.fold_in(jax.random.key(options.seed), 6))[0]
    share = np.asarray(jax.random.beta(key, a, a))
    images, targets = images.reshape(16, 3, 32, 32, 3), np.eye(5)[labels.reshape(16, 3)]
    images = images / np.float32(127.5) - 1
    images, targets = (share * x + (1 - share) * x[:, ::-1] for x in (images, targets))
    logits = np.asarray(forward(params, images.reshape(48, 32, 32, 3)))
    likelihoods = scipy.special.log_softmax(logits, axis=-1).reshape(16, 3, 5)
    assert abs(loss + (targets * likelihoods).sum(axis=-1).mean()) < 1e-5


def test_remat_and_bfloat16_reach_the_update(params):
    def program(**flags):
        options = vit.Options(accum_steps=1, **flags)
        state = {"params": params, "momentum": vit.sgd_init(params), "step": np.int32(0)}
        batch = np.zeros((8, 1, 2, 32, 32, 3), np.uint8), np.zeros((8, 1, 2), np.int32)
        return str(jax.make_jaxpr(lambda *x: vit.train_step(*x, options))(state, *batch))

    products, plain = re.compile(r"bf16\[[\d,]*\] = dot_general").findall, program()
    assert program(remat=True).count("dot_general") >= plain.count("dot_general") + 4
    assert len(products(program(dtype="bfloat16"))) > 20 and not products(plain)


# ---------------------------------------------------------------------------------------- Examples


def noise(size, seed=0):
    pixels = np.random.RandomState(seed).randint(0, 256, (size, size, 3))
    return Image.fromarray(pixels.astype(np.uint8))


def test_pixels_become_minus_one_to_one():
    assert vit.to_pixels(np.uint8([0, 255, 51])).tolist() == [-1, 1, pytest.approx(-0.6)]


def test_crops_have_the_distribution_of_the_original():
    # TensorFlow's sampler: the aspect ratio is uniform, then the height among those that fit.
    rng, width, height, at = np.random.default_rng(0), 500, 375, (0, 0.1, 0.25, 0.5, 0.75, 0.9, 1)
    boxes = np.array([vit.inception_crop(rng, width, height) for _ in range(20_000)])
    left, upper, right, lower = boxes.T
    assert left.min() == upper.min() == 0 and right.max() == width and lower.max() == height
    w, h, free = right - left, lower - upper, width - right + left
    aspect, share = np.random.default_rng(1).uniform((3 / 4, 0), (4 / 3, 1), (200_000, 2)).T
    low = np.sqrt(0.05 * width * height / aspect)
    tall = low + share * (np.minimum(height, width / aspect) - low)
    area = tall**2 * aspect / width / height
    assert_allclose(np.quantile(w / h, at), np.quantile(aspect, at), atol=0.015)
    assert_allclose(np.quantile(w * h / width / height, at), np.quantile(area, at), atol=0.015)
    assert abs((left / np.maximum(free, 1))[free > 50].mean() - 0.5) < 0.01


def test_enlarged_images_are_interpolated_between_pixels_as_in_the_original():
    at = np.clip((np.arange(384) + 0.5) * 32 / 384 - 0.5, 0, 31)
    weights = np.maximum(0, 1 - abs(at[:, None] - np.arange(32)))
    expected = np.einsum("ik,jl,klc->ijc", weights, weights, np.asarray(noise(32)), optimize=True)
    assert abs(vit.to_array(noise(32), 384) - expected).max() < 1.001  # within one grey level


def test_shrunk_images_are_averaged():
    shrunk = vit.to_array(noise(64), 8)
    assert shrunk.shape == (8, 8, 3) and 5 < shrunk.std() < 15  # four of its pixels: 37 and more


def training_data(count, image=None):
    """The numbers 0 to count - 1, or one image with them as labels."""

    def read(i):
        return image or Image.new("RGB", (4, 4), (i, i, i)), i

    return {"train": range(count), "classes": [*range(count)], "read": read}


def test_half_of_the_training_images_are_mirrored():
    ramp = Image.fromarray(np.uint8(np.arange(64) * 4)[None, :, None].repeat(64, 0).repeat(3, 2))
    data, options = training_data(1, ramp), vit.Options()
    mirrored = 0
    for i in range(200):
        image, _ = vit.training_example(data, options, 16, i)
        mirrored += int(image[0, 0, 0]) > int(image[0, -1, 0])
    assert 70 < mirrored < 130


def test_without_augmentation_an_image_is_the_whole_image():
    data, options = training_data(1, noise(16)), vit.Options(augment="none")
    assert np.array_equal(vit.training_example(data, options, 16, 5)[0], noise(16))


def test_each_epoch_shows_every_example_once_in_an_order_of_its_own():
    def labels(start, stop, seed=0):
        options = vit.Options(seed=seed)
        examples = [
            vit.training_example(training_data(10), options, 4, i) for i in range(start, stop)
        ]
        assert all(image[0, 0, 0] == label for image, label in examples)
        return [label for _, label in examples]

    assert sorted(labels(0, 10)) == sorted(labels(10, 20)) == [*range(10)]
    assert labels(0, 10) != labels(10, 20) and labels(0, 10) != labels(0, 10, seed=1)
    assert labels(7, 15) == labels(0, 20)[7:15]


def test_an_example_depends_on_seed_and_index_alone():
    data = training_data(1, noise(64))
    first, same, *others = (
        vit.training_example(data, vit.Options(seed=seed), 16, i)[0]
        for seed, i in ((0, 5), (0, 5), (0, 6), (1, 5))
    )
    assert equal(first, same) and not any(equal(first, other) for other in others)


@pytest.mark.parametrize("label", [-1, 10])
def test_a_label_that_is_no_class_is_refused(label):
    data = training_data(10) | {"read": lambda i: (noise(4), label)}
    with pytest.raises(vit.BadInput, match=f"{label} .*is no class"):
        vit.training_example(data, vit.Options(), 4, 0)


def test_devices_hosts_and_parts_share_out_every_place_of_a_batch_in_order(monkeypatch):
    monkeypatch.setattr(jax, "local_device_count", lambda: 2)
    assert vit.host_places(8, 2).tolist() == [[[0, 1], [2, 3]], [[4, 5], [6, 7]]]
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    shares = []
    for i in (0, 1):
        monkeypatch.setattr(jax, "process_index", lambda i=i: i)
        shares.append(vit.host_places(16, 2))
    assert np.ravel(shares).tolist() == [*range(16)] and shares[1].shape == (2, 2, 2)


def test_batches_come_in_order_and_whole():
    wanted = np.random.RandomState(0).permutation(48).reshape(6, 4, 2)
    batches = [*vit.batches(lambda i: (np.full((2, 2, 3), i, np.uint8), i), wanted)]
    assert equal([labels for _, labels in batches], [*np.int32(wanted)])
    assert equal([images[..., 0, 0, 0] for images, _ in batches], [*np.uint8(wanted)])


def test_an_example_that_cannot_be_read_is_told_after_the_batches_before_it():
    def example(i):
        vit.require(i != 5, f"example {i}")
        return np.zeros((2, 2, 3), np.uint8), i

    batches = vit.batches(example, np.arange(8).reshape(4, 2))
    assert [next(batches)[1].tolist() for _ in range(2)] == [[0, 1], [2, 3]]
    with pytest.raises(vit.BadInput, match="example 5"):
        next(batches)


# --------------------------------------------------------------------------------------- Training


def run_quietly(command):
    """The output of a command that ends well."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert vit.main(command) == 0
    return out.getvalue()


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    """A run of 30 updates on pictures, evaluated twice: its folder, command and output."""
    root = tmp_path_factory.mktemp("learned")
    picture_folder(root / "data")
    more = ["--total_steps=30", "--base_lr=0.1", "--eval_every=15"]
    command = [str(root / "data"), *TINY, *more, f"--logdir={root / 'run'}"]
    return root / "run", command, run_quietly(command)


def refused(command, capsys):
    """The line and status 2 of a command that is refused."""
    assert vit.main([*command]) == 2
    error = capsys.readouterr().err
    assert error.startswith("vit.py: ") and error.count("\n") == 1, error
    return error


def test_a_folder_of_pictures_is_learned(learned):
    _, _, out = learned
    assert out.count("test accuracy 100.00% of 10 images\n") == 2


def test_the_first_two_updates_the_due_and_the_last_have_a_line_of_progress(learned, capsys):
    run, command, _ = learned
    out = run_quietly([*command, "--log_every=20", f"--logdir={run}-seldom"])
    first, *lines = re.findall(r"^step (\d+)/30  loss [\d.]+  lr \S+  (.*)$", out, re.M)
    assert first[0] == "1" and "compil" in first[1]
    assert [step for step, _ in lines] == ["2", "20", "30"]
    assert all(re.fullmatch(r"[\d.]+ images/s  \d+ s left", left) for _, left in lines)
    assert [row[0] for row in metrics(f"{run}-seldom")] == ["step", "15", "20", "30", "30"]


@pytest.mark.parametrize(
    "seconds, words",
    [(0.4, "0 s"), (45, "45 s"), (89, "89 s"), (720, "12 min"), (3570, "1 h 0 min")]
    + [(3 * 3600 + 12 * 60, "3 h 12 min"), (26 * 3600, "26 h 0 min")],
)
def test_times_are_written_as_people_write_them(seconds, words):
    assert vit.duration(seconds) == words


def test_metrics_hold_each_update_and_evaluation(learned):
    run, _, _ = learned
    head, *rows = metrics(run)
    assert head == ["step", "loss", "learning_rate", "images_per_second", "test_accuracy"]
    updates, evaluations = ([row for row in rows if bool(row[4]) == tested] for tested in (0, 1))
    assert [int(row[0]) for row in updates] == [*range(1, 31)]
    assert evaluations == [["15", "", "", "", "1.0"], ["30", "", "", "", "1.0"]]
    assert float(updates[0][1]) == pytest.approx(np.log(2), abs=1e-5)  # the head is zeros
    assert float(updates[1][2]) == pytest.approx(0.1) and float(updates[29][1]) < 0.1


def test_the_first_images_are_drawn_as_the_model_sees_them(learned):
    run, command, _ = learned
    paths, options = vit.parse_options(command)
    data = vit.load_data(*paths, options)
    order = vit.epoch_order(0, 0, 16)
    expected = [data["read"](data["train"][i])[0].resize((16, 16), vit.BILINEAR) for i in order[:8]]
    assert np.array_equal(Image.open(run / "first_batch.png"), np.hstack(expected))


def test_evaluation_alone_reads_the_checkpoint_of_the_run(learned, monkeypatch):
    run, command, _ = learned
    monkeypatch.chdir(run.parent)
    shutil.copytree(run, "runs/data")
    assert run_quietly(["data", "--eval_only"]) == "test accuracy 100.00% of 10 images\n"


def test_a_finished_run_is_left_as_it_is(learned):
    run, command, _ = learned
    before = result(run)
    assert "step 30 of 30" in run_quietly(command) and result(run) == before


def test_the_same_command_with_another_option_or_other_data_is_refused(learned, capsys, tmp_path):
    run, command, _ = learned
    assert "base_lr was 0.1, not 0.5" in refused([*command, "--base_lr=0.5"], capsys)
    data = shutil.copytree(command[0], tmp_path / "data")
    assert "data was" in refused([str(data), *command[1:]], capsys)
    (Path(command[0]) / "train/cat/0.png").rename(tmp_path / "0.png")
    assert "training images was 16, not 15" in refused(command, capsys)
    (tmp_path / "0.png").rename(Path(command[0]) / "train/cat/0.png")


def test_folders_whose_runs_have_one_name_do_not_resume_each_other(tmp_path, capsys, monkeypatch):
    for name in ("a/b", "w/a/b", "w/a-b"):
        picture_folder(tmp_path / name)
    monkeypatch.chdir(tmp_path / "w")
    assert run_quietly(["a/b", *TINY]) and Path("runs/a-b/checkpoint.npz").exists()
    assert "step 2 of 2" in run_quietly(["./a/b/", *TINY])  # the same folder
    for other in ("a-b", "../a/b"):
        assert "its data was" in refused([other, *TINY], capsys)


def test_all_but_a_few_options_are_part_of_what_a_run_is(tmp_path):
    places = "logdir data_dir coordinator_address num_processes process_id".split()
    assert {*vit.MAY_CHANGE} == {
        *"accum_steps remat log_every eval_every eval_only".split(),
        *places,
    }
    data = training_data(5) | {"name": "numbers"}
    options, state = vit.Options(logdir=str(tmp_path)), {"params": seeded_params(), "step": 3}
    run = {"identity": vit.identity_of(options, data), "rows": [[1, 2]]}
    vit.save_run(options, run, state | {"momentum": vit.sgd_init(state["params"])})
    other = {"model": "ViT-S_16", "dtype": "bfloat16", "decay_type": "linear", "augment": "none"}
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        new = other.get(field.name, "elsewhere" if field.type is str else value + field.type(1))
        if field.name in ("dropout", "mixup_alpha"):
            new = 0.5
        changed = dataclasses.replace(options, **{field.name: new})
        if field.name in vit.MAY_CHANGE:
            changed = dataclasses.replace(changed, logdir=str(tmp_path))
            assert vit.start_or_resume(changed, data)[1] == run
        else:
            with pytest.raises(vit.BadInput, match=f"its {field.name} was {value}, not {new}"):
                vit.start_or_resume(changed, data)


def test_a_loss_that_is_not_finite_ends_the_run_before_anything_is_saved(
    learned, tmp_path, capsys, monkeypatch
):
    _, command, _ = learned
    rate = vit.learning_rate

    def infinite(step, *options):  # from the fourth update on
        return jnp.where(jnp.asarray(step) < 3, rate(step, *options), jnp.inf)

    monkeypatch.setattr(vit, "learning_rate", infinite)
    assert "loss of step 5 is nan" in refused([*command, f"--logdir={tmp_path}"], capsys)
    assert [row[0] for row in metrics(tmp_path)] == ["step", "1", "2", "3", "4"]
    assert not (tmp_path / "checkpoint.npz").exists()


def test_an_unreadable_image_ends_the_run_and_the_last_evaluation_stays(tmp_path, capsys):
    data = vit.image_folder(picture_folder(tmp_path / "data"))
    _, path = data["train"][vit.epoch_order(0, 0, 16)[-1]]  # of the second batch of eight
    Path(path).write_text("no image")
    command = [str(tmp_path / "data"), *TINY, "--batch_size=8", "--eval_every=1"]
    assert path in refused([*command, f"--logdir={tmp_path / 'run'}"], capsys)
    assert vit.read_arrays(tmp_path / "run/checkpoint.npz")["train/step"] == 1


def test_evaluation_counts_every_image_once_and_no_padding():
    params, size = seeded_params(depth=1, tokens=5, classes=40), 16
    params["head"] = {"kernel": np.zeros((32, 40), np.float32), "bias": -np.arange(40.0)}
    options = vit.Options(batch_size=3, accum_steps=1)  # always guesses 0, in batches of 8
    for count in (5, 37):
        data = {"test": range(count), "read": lambda i: (noise(size), min(i, 1))}
        assert vit.evaluate(vit.replicate(params), data, options) == 1 / count


def test_guesses_are_compared_with_the_labels_of_their_own_images():
    params = seeded_params(depth=1, tokens=5, classes=40)
    images = np.stack([noise(16, seed) for seed in range(37)])
    guesses = np.asarray(forward(params, images / np.float32(127.5) - 1)).argmax(1)
    labels = [(int(guess) + (i % 3 == 0)) % 40 for i, guess in enumerate(guesses)]
    data = {"test": range(37), "read": lambda i: (Image.fromarray(images[i]), labels[i])}
    options = vit.Options(batch_size=3, accum_steps=1)
    assert len({*labels}) > 3 and vit.evaluate(vit.replicate(params), data, options) == 24 / 37


def test_a_dataset_of_ones_own_gives_params_as_numpy_arrays(tmp_path):
    data = training_data(4, noise(16)) | {"test": range(2)}
    _, options = vit.parse_options(["own", *TINY, f"--logdir={tmp_path}"])
    params = vit.train(options, data)
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(params))
    assert equal(vit.load_checkpoint(tmp_path / "checkpoint.npz"), params)


# -------------------------------------------------------------------- One way to stop, and to start


def test_ctrl_c_is_one_line_and_the_same_command_goes_on(learned, tmp_path, capsys, monkeypatch):
    run, command, _ = learned
    command, sent = [*command, f"--logdir={tmp_path}"], []
    data = vit.image_folder(command[0])

    def read(item):
        if (tmp_path / "checkpoint.npz").exists() and not sent:
            sent.append(os.kill(os.getpid(), signal.SIGINT))
        return data["read"](item)

    monkeypatch.setattr(vit, "image_folder", lambda root: data | {"read": read})
    assert vit.main(command) == 130
    error = capsys.readouterr().err
    assert error.startswith("vit.py: stopped; ") and error.count("\n") == 1
    assert "step 15 of 30" in run_quietly(command) and result(tmp_path) == result(run)


@pytest.mark.parametrize("devices", [1, 2])
def test_a_run_killed_at_any_moments_ends_bit_for_bit_as_one_left_alone(tmp_path, devices):
    data, whole, killed = (tmp_path / name for name in ("data", "whole", "killed"))
    more = ["--dropout=0.1", "--total_steps=30", "--eval_every=3", "--logdir"]
    command = [vit.__file__, picture_folder(data), *TINY, "--augment=inception", *more]
    alone, path = python(*command, whole, devices=devices), killed / "checkpoint.npz"
    rng = np.random.default_rng()
    for while_starting in (True, False, False):
        seen = path.exists() and path.stat().st_mtime_ns
        process = python(*command, killed, devices=devices)
        while process.poll() is None and not while_starting:
            if path.exists() and path.stat().st_mtime_ns != seen:
                break  # it has gone beyond what was there
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 4 if while_starting else 0.3))
        process.kill()
        assert finish(process)[0] in (0, -signal.SIGKILL)
        assert while_starting or vit.load_checkpoint(path)  # whole at any time
    step = int(vit.read_arrays(path)["train/step"])
    status, out, error = finish(python(*command, killed, devices=devices))
    assert status == finish(alone)[0] == 0, error
    assert f"step {step} of 30, on {devices} x" in out and result(killed) == result(whole)


def test_a_full_disk_is_one_line_and_the_old_file_stays(learned, tmp_path, capsys, monkeypatch):
    run, command, _ = learned
    shutil.copytree(run, tmp_path / "run")
    before = (tmp_path / "run/checkpoint.npz").read_bytes()
    arrays = vit.read_arrays(tmp_path / "run/checkpoint.npz")
    monkeypatch.setattr(os, "fsync", mock.Mock(side_effect=OSError(28, "No space left")))
    with pytest.raises(OSError, match="No space left"):
        vit.save_checkpoint(tmp_path / "run/checkpoint.npz", vit.to_params(arrays, "x"))
    assert (tmp_path / "run/checkpoint.npz").read_bytes() == before
    assert not [*tmp_path.rglob("*.partial")]
    assert "No space left" in refused([*command, f"--logdir={tmp_path / 'new'}"], capsys)
    assert not [*tmp_path.rglob("*.partial"), *tmp_path.glob("new/*.npz")]


def test_params_that_are_not_finite_are_never_saved(params, tmp_path):
    vit.save_checkpoint(tmp_path / "x.npz", params)
    with pytest.raises(vit.BadInput, match="nan or infinite"):
        vit.save_checkpoint(tmp_path / "x.npz", jax.tree.map(lambda p: p + np.nan, params))
    assert equal(vit.load_checkpoint(tmp_path / "x.npz"), params)


# ------------------------------------------------------------------------------------------- Hosts


def free_address():
    with socket.create_server(("127.0.0.1", 0)) as free:
        return f"127.0.0.1:{free.getsockname()[1]}"


def two_hosts(*flags, own):
    """What became of two processes, two devices each, with flags of their own: [finish(...)]."""
    both = [vit.__file__, *flags, f"--coordinator_address={free_address()}", "--num_processes=2"]
    hosts = [python(*both, f"--process_id={i}", *own[i], devices=2) for i in (0, 1)]
    return [finish(host) for host in hosts]


@pytest.fixture(scope="module")
def hosts(tmp_path_factory):
    """One host and two, the first of which cannot read an image of the fourth update."""
    root = tmp_path_factory.mktemp("hosts")
    data = picture_folder(root / "data", train=32)
    _, bad = vit.image_folder(data)["train"][vit.epoch_order(0, 0, 64)[48]]
    Path(bad).write_text("no image")
    flags = ["--total_steps=9", "--mixup_alpha=0.2", "--dropout=0.1", "--eval_every=3"]
    own = [[f"--logdir={root / name}"] for name in ("first", "second")]
    one = finish(python(vit.__file__, data, *TINY, *flags, f"--logdir={root / 'one'}", devices=4))
    return root, bad, one, two_hosts(data, *TINY, *flags, own=own)


def test_two_hosts_compute_what_one_computes(hosts):
    root, _, (_, out, _), ((_, same, _), _) = hosts
    one, two = (vit.read_arrays(root / name / "checkpoint.npz") for name in ("one", "first"))
    assert one["train/step"] == two["train/step"] == 3
    all_close(vit.to_params(one, "one"), vit.to_params(two, "two"), 1e-6)
    accuracy = re.compile("test accuracy .* of 10 images").findall
    assert len(accuracy(out)) == 1 and accuracy(out) == accuracy(same)


def test_only_the_first_host_writes_files_and_progress(hosts):
    root, _, _, (_, (_, out, _)) = hosts
    assert (root / "first/metrics.csv").exists() and not [*root.glob("second/*")]
    [line] = [line for line in out.splitlines() if not line.startswith("[Gloo]")]
    assert line.startswith("waiting for all hosts")


def test_a_host_that_cannot_read_says_so_in_a_line_and_the_other_ends_too(hosts):
    _, bad, (alone, _, error), ((first, _, first_error), (second, _, second_error)) = hosts
    assert bad in line_of(error) and bad in line_of(first_error) and alone == first == 2
    assert second != 0 and "Traceback" not in second_error


def test_hosts_whose_checkpoints_differ_are_all_told_so(hosts, tmp_path):
    root, _, _, _ = hosts
    shutil.copytree(root / "first", tmp_path / "first")
    flags = ["--total_steps=9", "--mixup_alpha=0.2", "--dropout=0.1", "--eval_every=3"]
    own = [[f"--logdir={tmp_path / name}"] for name in ("first", "second")]
    for status, _, error in two_hosts(root / "data", *TINY, *flags, own=own):
        assert status == 2 and "the hosts differ in step of checkpoint.npz" in line_of(error)


@pytest.mark.parametrize("name", ["seed", "batch_size", "classes", "data", "eval_every"])
def test_what_differs_between_hosts_is_named(name, monkeypatch):
    data = training_data(5) | {"name": "numbers"}
    options = vit.Options()
    values = vars(options) | vit.identity_of(options, data) | {"logdir": "a", "process_id": 0}
    other = values | {name: "something else", "logdir": "b", "process_id": 1, "data_dir": "c"}
    digests = []
    gather = mock.Mock(side_effect=lambda x: digests.append(x) or np.stack([x, *digests[:1]]))
    monkeypatch.setattr(multihost_utils, "process_allgather", gather)
    vit.same_on_all_hosts(values)  # as the second host has it
    vit.same_on_all_hosts(values)
    with pytest.raises(vit.BadInput, match=f"the hosts differ in {name}, here something else"):
        vit.same_on_all_hosts(other)


# ------------------------------------------------------------------------------------ Checkpoints


def test_every_spelling_of_the_names_loads_alike(tmp_path):
    saved, sizes = seeded_weights(**XS), seeded_params(**XS)
    newer = {"Attention_1/": "Attention_0/", "LayerNorm_2/": "LayerNorm_1/", "Block_3/": "Block_0/"}
    for prefix in ("", "opt/target/", "params/"):
        for renaming in ({}, newer):
            arrays = {}
            for name, array in saved.items():
                for old, new in renaming.items():
                    name = name.replace(old, new)
                arrays[prefix + name] = array
            np.savez(tmp_path / "x.npz", **arrays)
            assert equal(vit.load_checkpoint(tmp_path / "x.npz"), sizes)


def test_a_checkpoint_is_saved_under_the_released_names_with_more_beside_it(tmp_path):
    vit.save_checkpoint(tmp_path / "x.npz", seeded_params(depth=12), class_names=[*"abc"])
    with np.load(tmp_path / "x.npz") as file:
        saved = dict(file)
    assert saved.pop("class_names").tolist() == [*"abc"] and equal(saved, seeded_weights(depth=12))


def test_pre_logits_are_used_until_the_model_is_fine_tuned(params, tmp_path):
    kernel = np.random.RandomState(0).standard_normal((32, 32)).astype(np.float32) / 5
    more = {"pre_logits/kernel": kernel, "pre_logits/bias": kernel[0]}
    whole = vit.to_params(seeded_weights() | more, "x")
    plain = params | {"head": {"kernel": np.eye(32), "bias": np.zeros(32)}}
    hidden = np.tanh(np.asarray(forward(plain, IMAGES)) @ kernel + kernel[0])
    expected = hidden @ params["head"]["kernel"] + params["head"]["bias"]
    assert_allclose(forward(whole, IMAGES), expected, atol=1e-5)
    assert "pre_logits" in vit.adapt(whole, 48) and "pre_logits" not in vit.adapt(whole, 48, 5)


@pytest.mark.parametrize("classes", [5, 7])  # as many as before, and others
def test_fine_tuning_starts_with_a_head_of_zeros(params, classes):
    head = vit.adapt(params, 48, classes)["head"]
    assert head["kernel"].shape == (32, classes) and head["bias"].shape == (classes,)
    assert not np.any(head["kernel"]) and not np.any(head["bias"])


@pytest.mark.parametrize("grid", [2, 3, 4, 7])
def test_position_embeddings_are_resized_as_scipy_zooms(grid):
    old = np.random.RandomState(0).standard_normal((1, 17, 6)).astype(np.float32)
    zoomed = scipy.ndimage.zoom(old[0, 1:].reshape(4, 4, 6), (grid / 4, grid / 4, 1), order=1)
    new = vit.resize_position_embeddings(old, grid)
    assert_allclose(new[0, 1:], zoomed.reshape(grid * grid, 6), atol=1e-6)
    assert np.array_equal(new[0, 0], old[0, 0])


def test_timm_reads_what_we_save_and_gives_the_same_logits(tmp_path):
    timm, torch = pytest.importorskip("timm"), pytest.importorskip("torch")
    params = seeded_params(patch=16, d=64, depth=3, heads=4, mlp=256, tokens=5, classes=7)
    vit.save_checkpoint(tmp_path / "x.npz", params, class_names=[*"abcdefg"])
    gelu = functools.partial(torch.nn.GELU, approximate="tanh")
    sizes = {"img_size": 32, "patch_size": 16, "embed_dim": 64, "depth": 3, "num_heads": 4}
    model = timm.models.VisionTransformer(**sizes, num_classes=7, act_layer=gelu).eval()
    model.load_pretrained(str(tmp_path / "x.npz"))
    theirs = model(torch.tensor(IMAGES.transpose(0, 3, 1, 2))).detach().numpy()
    assert_allclose(forward(params, IMAGES), theirs, atol=1e-5)


def timm_arrays(weights):
    """{released name: array} -> {timm's name: array}, written out."""
    arrays, block = {}, "Transformer/encoderblock_{}/"
    arrays["cls_token"] = weights["cls"]
    arrays["pos_embed"] = weights["Transformer/posembed_input/pos_embedding"]
    arrays["patch_embed.proj.weight"] = weights["embedding/kernel"].transpose(3, 2, 0, 1)
    arrays["patch_embed.proj.bias"] = weights["embedding/bias"]
    for i in range(sum(name.endswith("LayerNorm_0/bias") for name in weights)):
        start = block.format(i)
        own = {name.removeprefix(start): x for name, x in weights.items() if name.startswith(start)}
        d = own["LayerNorm_0/bias"].size
        attention = {k.split("1/")[1]: x for k, x in own.items() if k.startswith("MultiHead")}
        qkv = [attention[f"{name}/kernel"].reshape(d, d).T for name in ("query", "key", "value")]
        biases = [attention[f"{name}/bias"].ravel() for name in ("query", "key", "value")]
        for name, array in {
            "norm1.weight": own["LayerNorm_0/scale"],
            "norm1.bias": own["LayerNorm_0/bias"],
            "attn.qkv.weight": np.concatenate(qkv),
            "attn.qkv.bias": np.concatenate(biases),
            "attn.proj.weight": attention["out/kernel"].reshape(d, d).T,
            "attn.proj.bias": attention["out/bias"],
            "norm2.weight": own["LayerNorm_2/scale"],
            "norm2.bias": own["LayerNorm_2/bias"],
            "mlp.fc1.weight": own["MlpBlock_3/Dense_0/kernel"].T,
            "mlp.fc1.bias": own["MlpBlock_3/Dense_0/bias"],
            "mlp.fc2.weight": own["MlpBlock_3/Dense_1/kernel"].T,
            "mlp.fc2.bias": own["MlpBlock_3/Dense_1/bias"],
        }.items():
            arrays[f"blocks.{i}.{name}"] = array
    arrays["norm.weight"] = weights["Transformer/encoder_norm/scale"]
    arrays["norm.bias"] = weights["Transformer/encoder_norm/bias"]
    arrays["head.weight"], arrays["head.bias"] = weights["head/kernel"].T, weights["head/bias"]
    return arrays


def write_safetensors(path, arrays, dtype="F32", **more):
    """A .safetensors file, written out: the length of a header, the header, the bytes."""
    kinds = {"F32": np.float32, "F16": np.float16, "BF16": jnp.bfloat16}
    header, data = {"__metadata__": {"format": "pt"}} | more, b""
    for name, array in arrays.items():
        raw = np.asarray(array, kinds[dtype]).tobytes()
        place = [len(data), len(data) + len(raw)]
        header[name] = {"dtype": dtype, "shape": [*array.shape], "data_offsets": place}
        data += raw
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_a_safetensors_file_of_timm_gives_exactly_the_weights_in_it(tmp_path, dtype):
    weights = seeded_weights(**XS)
    write_safetensors(tmp_path / "model.safetensors", timm_arrays(weights), dtype)
    kind = {"F32": np.float32, "F16": np.float16, "BF16": jnp.bfloat16}[dtype]
    rounded = {name: array.astype(kind).astype(np.float32) for name, array in weights.items()}
    np.savez(tmp_path / "x.npz", **rounded)
    found = vit.load_checkpoint(tmp_path / "model.safetensors", "ViT-XS_8")
    assert equal(found, vit.load_checkpoint(tmp_path / "x.npz"))
    assert equal(vit.to_released(found), rounded)


def test_a_safetensors_file_may_lack_the_head(tmp_path):
    arrays, path = timm_arrays(seeded_weights(**XS)), tmp_path / "x.safetensors"
    del arrays["head.weight"], arrays["head.bias"]
    write_safetensors(path, arrays)
    found, expected = vit.load_checkpoint(path, "ViT-XS_8"), seeded_params(**XS)
    assert "head" not in found and equal(vit.adapt(found, 16, 3), vit.adapt(expected, 16, 3))


@pytest.mark.parametrize(
    "width, model, heads",
    [(64, "ViT-XS_8", 4), (64, "ViT-B_16", 1), (384, "ViT-B_16", 6), (1280, "ViT-B_16", 16)]
    + [(1280, "ViT-H_14", 16), (768, "ViT-B_16", 12), (1024, "ViT-L_16", 16)],
)
def test_the_number_of_heads_is_that_of_the_model_or_of_timm(width, model, heads):
    bias = np.arange(3 * width)
    arrays = {"cls_token": np.zeros((1, 1, width)), "blocks.7.attn.qkv.bias": bias}
    found = vit.from_timm(arrays, model)
    name = "Transformer/encoderblock_7/MultiHeadDotProductAttention_1/key/bias"
    assert np.array_equal(found[name], bias[width : 2 * width].reshape(heads, width // heads))


@pytest.mark.parametrize(
    "name",
    ["blocks.0.ls1.gamma", "reg_token", "blocks.0.attn.q_norm.weight", "fc_norm.weight"]
    + ["head_dist.weight", "norm_pre.bias", "patch_embed.backbone.weight"],
)
def test_weights_of_another_model_are_refused_by_the_name_of_what_is_too_much(tmp_path, name):
    arrays = timm_arrays(seeded_weights(**XS)) | {name: np.ones(64, np.float32)}
    write_safetensors(tmp_path / "x.safetensors", arrays)
    last = name.split(".", 2)[-1] if name.startswith("blocks") else name
    with pytest.raises(vit.BadInput, match=f"{re.escape(last)}.*another kind of model"):
        vit.load_checkpoint(tmp_path / "x.safetensors", "ViT-XS_8")


def test_five_updates_from_a_safetensors_file_equal_those_from_an_npz_to_the_bit(tmp_path):
    weights, results = seeded_weights(**XS), []
    data = vit.load_data(str(picture_folder(tmp_path / "data")), vit.Options())
    for kind in ("npz", "safetensors"):
        path = tmp_path / kind
        if kind == "npz":
            np.savez(path.open("wb"), **weights)
        else:
            write_safetensors(path, timm_arrays(weights))
        more = ["--total_steps=5", f"--pretrained={path}", f"--logdir={path}-run"]
        results.append(vit.train(vit.parse_options(["x", *TINY, *more])[1], data))
    assert equal(*results) and not equal(results[0], vit.adapt(seeded_params(**XS), 16, 2))


def header(**entry):
    """A file of one array, which is all right if entry is empty."""
    start = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    text = json.dumps({"cls_token": start | entry}).encode()
    return struct.pack("<Q", len(text)) + text + bytes(8)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"hello",
        bytes(8),
        struct.pack("<Q", 2**63) + b"{}",
        struct.pack("<Q", 100) + b"{}",
        struct.pack("<Q", 2) + b"[]",
        struct.pack("<Q", 2) + b"{}",
        struct.pack("<Q", 3) + b"\xff\xfe{",
        struct.pack("<Q", 200_000) + b"[" * 200_000,
        struct.pack("<Q", 10) + b'{"a": 1.0}',
        header()[:-1],
        header() + b"x",
        header(shape=[3]),
        header(shape=[-1, -2]),
        header(shape=[2**62, 4]),
        header(shape="2"),
        header(dtype="I64"),
        header(dtype=None),
        header(data_offsets=[0, 4]),
        header(data_offsets=[4, 8]),
        header(data_offsets=[8, 0]),
        header(data_offsets=[-8, 0]),
        header(data_offsets=[0, 2**63]),
        header(data_offsets=[0.0, 8.0]),
        header(data_offsets=[0]),
        header(data_offsets=None),
    ],
    ids=lambda data: repr(data[:90]),
)
def test_a_damaged_or_hostile_safetensors_file_is_bad_input(tmp_path, data):
    path = tmp_path / "x.safetensors"
    path.write_bytes(data)
    with pytest.raises(vit.BadInput, match="x.safetensors"):
        vit.load_checkpoint(path)


def test_safetensors_arrays_that_overlap_or_leave_a_gap_are_bad_input(tmp_path):
    for begin in (4, 12):
        own = {"dtype": "F32", "shape": [2], "data_offsets": [begin, begin + 8]}
        arrays = {"cls_token": np.ones(2, np.float32), "x": np.ones(1 + begin // 12, np.float32)}
        write_safetensors(tmp_path / "x", {"cls_token": arrays["cls_token"]}, more=own)
        with pytest.raises(vit.BadInput, match="does not begin"):
            vit.load_checkpoint(tmp_path / "x")


def damaged(data, r):
    """A copy of some bytes, cut or with a few changed."""
    broken = bytearray(data[: r.integers(1, len(data))] if r.random() < 0.3 else data)
    for place in r.integers(len(broken), size=r.integers(1, 4)):
        broken[place] ^= int(r.integers(1, 256))
    return bytes(broken)


def test_a_damaged_npz_is_bad_input_or_gives_the_right_weights(params, tmp_path):
    r, path, noticed = np.random.default_rng(0), tmp_path / "x.npz", 0
    np.savez(path, **seeded_weights())
    data = path.read_bytes()
    for _ in range(60):
        path.write_bytes(damaged(data, r))
        try:
            assert equal(vit.load_checkpoint(path), params)
        except vit.BadInput:
            noticed += 1
    assert noticed > 40


# --------------------------------------------------------------------------------------- Downloads


@pytest.fixture
def server():
    """A server: its address, {path: bytes} to serve, and the paths it was asked for."""
    served, asked = {}, []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            data = served.get(self.path)
            self.send_response(403 if data is None else 200)
            self.send_header("Content-Length", len(data or b""))
            self.end_headers()
            self.wfile.write((data or b"")[: 50_000 if "cut" in self.path else None])

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        threading.Thread(target=running.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}", served, asked
        running.shutdown()


def test_the_released_weights_are_looked_for_at_their_addresses():
    assert vit.BUCKET == "https://storage.googleapis.com/vit_models/"
    assert vit.HUB == "https://huggingface.co/timm/"


PLACES = {  # of ViT-B_16: for training, and for photos
    "IMAGENET_21K": (
        "/vit_models/imagenet21k/ViT-B_16.npz",
        "/timm/vit_base_patch16_224.orig_in21k/resolve/main/model.safetensors",
    ),
    "IMAGENET": (
        "/vit_models/imagenet21k+imagenet2012/ViT-B_16.npz",
        "/timm/vit_base_patch16_384.orig_in21k_ft_in1k/resolve/main/model.safetensors",
    ),
}


@pytest.fixture
def places(server, tmp_path, monkeypatch):
    """Both places of the released weights moved to a server that serves a small file of timm's."""
    address, served, _ = server
    monkeypatch.setattr(vit, "BUCKET", f"{address}/vit_models/")
    monkeypatch.setattr(vit, "HUB", f"{address}/timm/")
    write_safetensors(tmp_path / "small", timm_arrays(seeded_weights(**XS)))
    for _, second in PLACES.values():
        served[second] = (tmp_path / "small").read_bytes()
    return server


def test_training_takes_the_21k_weights_from_the_second_place_if_the_first_refuses(
    places, tmp_path
):
    options = vit.Options(data_dir=str(tmp_path), image_size=16)
    for _ in range(2):  # from the server, then from the disk
        found = vit.initial_params(options, 3)
        one_head = vit.to_params(seeded_weights(**XS | {"heads": 1}), "x")
        assert jax.tree.map(np.shape, found) == jax.tree.map(np.shape, vit.adapt(one_head, 16, 3))
        assert np.array_equal(found["cls"], seeded_weights(**XS)["cls"])
        assert places[2] == [*PLACES["IMAGENET_21K"]]


def test_photos_take_the_weights_that_know_imagenet(places, tmp_path):
    noise(20).save(tmp_path / "a.png")
    run_quietly([str(tmp_path / "a.png"), f"--data_dir={tmp_path}"])
    assert places[2] == [*PLACES["IMAGENET"]]


def test_if_both_places_refuse_the_line_names_both(places, tmp_path, capsys):
    address, served, asked = places
    served.clear()
    error = refused(["digits", *TINY, "--model=ViT-B_16", "--pretrained=released",
                     f"--data_dir={tmp_path}", f"--logdir={tmp_path}"], capsys)  # fmt: skip
    assert asked == [*PLACES["IMAGENET_21K"]] and error.count("403") == 2
    assert all(f"{address}{place}" in error for place in asked)


@pytest.mark.parametrize(
    "url, reason",
    [("/cut.npz", "50000 bytes"), ("/login.npz", "<!DOCTYPE html>"), ("/no.npz", "403")]
    + [("http://127.0.0.1:9/z.npz", "refused")],
)
def test_a_download_that_fails_says_why_and_leaves_no_file(server, tmp_path, url, reason):
    address, served, _ = server
    served |= {"/cut.npz": b"x" * 100_000, "/login.npz": b"<!DOCTYPE html> <p>Please log in."}
    url = url if url.startswith("http") else address + url
    with pytest.raises(vit.BadInput, match=reason) as error:
        vit.fetch([url], vit.Options(data_dir=str(tmp_path)), vit.load_checkpoint)
    assert url in str(error.value) and not [*(tmp_path / "downloads").glob("*")]


def test_addresses_that_end_alike_are_kept_apart_and_fetched_once(server, tmp_path):
    address, served, asked = server
    served |= {"/a/y.npz": b"a", "/b/y.npz": b"b"}
    options = vit.Options(data_dir=str(tmp_path))
    for name in ("a", "b", "a"):
        read = vit.fetch([f"{address}/{name}/y.npz"], options, lambda path: Path(path).read_text())
        assert read == name
    assert asked == ["/a/y.npz", "/b/y.npz"]  # the third is on the disk


# ---------------------------------------------------------------------------------------- Datasets


def test_pictures_of_every_kind_become_upright_rgb(tmp_path):
    red, exif, path = Image.new("RGB", (40, 20), (200, 30, 30)), Image.Exif(), tmp_path / "x"
    exif[0x0112] = 6  # the camera was turned by a quarter
    clear = red.convert("RGBA")
    clear.putalpha(100)
    for image, kind, options, colour in (
        (red, "jpeg", {}, red),
        (red, "jpeg", {"exif": exif}, red),
        (red.convert("CMYK"), "jpeg", {}, red),
        (red.convert("L"), "png", {}, red.convert("L")),
        (red.convert("P"), "png", {}, red.convert("P")),
        (red.convert("1"), "png", {}, red.convert("1")),
        (clear, "png", {}, red),
        (red, "webp", {}, red),
        (red, "gif", {"transparency": 0}, red),
        (red, "bmp", {}, red),
        (red, "tiff", {}, red),
    ):
        image.save(path, kind, **options)
        read = vit.decode(path, "x")
        assert read.mode == "RGB" and read.size == ((20, 40) if "exif" in options else (40, 20))
        if not options.get("transparency", 1) == 0:
            assert_allclose(np.mean(read, (0, 1)), np.mean(colour.convert("RGB"), (0, 1)), atol=6)


@pytest.mark.parametrize("kind", ["I;16", "I", "F"])
def test_pictures_of_more_than_8_bits_are_refused_in_a_line(tmp_path, kind):
    path = tmp_path / "x.tiff"
    Image.fromarray(np.full((8, 8), 300, {"I;16": "u2", "I": "i4", "F": "f4"}[kind])).save(path)
    with pytest.raises(vit.BadInput, match="a picture.*8 bits"):
        vit.decode(path, "a picture")


def test_a_damaged_picture_is_bad_input_or_a_picture_of_its_size(tmp_path):
    r, path = np.random.default_rng(0), tmp_path / "x"
    for kind in ("png", "jpeg", "gif", "webp"):
        noise(40).save(path, kind)
        data, noticed = path.read_bytes(), 0
        for _ in range(25):
            path.write_bytes(damaged(data, r))
            try:
                image = vit.decode(path, "a picture")
                assert image.mode == "RGB" and min(image.size) > 0
            except vit.BadInput as error:
                noticed += "a picture" in str(error)
        assert noticed >= 5, kind


def test_the_digits_are_labelled_as_drawn_and_tested_on_digits_never_trained_on():
    data = vit.load_data("digits", vit.Options())
    assert data["classes"] == [*"0123456789"] and vit.draw_digit(8007)[1] == 7
    assert (len(data["train"]), len(data["test"])) == (8000, 1000)
    assert not {*data["train"]} & {*data["test"]}
    labels = np.array([data["read"](i)[1] for i in data["test"]])
    images = np.array([data["read"](i)[0].convert("L") for i in data["test"]])
    means = np.array([images[labels == digit].mean(0) for digit in range(10)])
    distances = ((images[:, None].astype(float) - means) ** 2).sum((2, 3))
    assert np.mean(distances.argmin(1) == labels) > 0.7  # they look like what they are called


def test_a_folder_of_classes_keeps_every_tenth_picture_for_testing_whatever_the_disk_s_order(
    tmp_path, monkeypatch
):
    root = picture_folder(tmp_path, train=20) / "train"
    first, unsorted = vit.image_folder(root), glob.glob
    monkeypatch.setattr(glob, "glob", lambda *a, **k: unsorted(*a, **k)[::-1])
    data = vit.image_folder(root)
    assert data["classes"] == ["cat", "dog"] and not {*data["train"]} & {*data["test"]}
    assert [data[k] for k in ("train", "test")] == [first[k] for k in ("train", "test")]
    for split, count in (("train", 18), ("test", 2)):  # of each class
        examples = [*map(data["read"], data[split])]
        assert [label for _, label in examples] == [0] * count + [1] * count
        assert all((np.mean(image) > 120) == label for image, label in examples)


def test_folders_may_hold_links_capital_endings_and_what_is_no_picture(tmp_path):
    root = picture_folder(tmp_path / "data")
    (root / "train/dog").rename(tmp_path / "elsewhere")
    (root / "train/dog").symlink_to(tmp_path / "elsewhere")
    (root / "train/cat/3.png").rename(root / "train/cat/3.PNG")
    for name in ("notes.txt", "._1.png"):
        (root / "train/cat" / name).write_text("what people and macOS leave")
    shutil.copytree(tmp_path / "elsewhere", root / "train/.ipynb_checkpoints")
    data = vit.image_folder(root)
    assert data["classes"] == ["cat", "dog"] and len(data["train"]) == 16
    assert sum(label for _, label in map(data["read"], data["train"])) == 8


@pytest.mark.parametrize("name", ["test", "val", "validation"])
def test_a_folder_with_a_split_is_used_as_it_is(tmp_path, name):
    root = picture_folder(tmp_path)
    (root / "test").rename(root / name)
    data = vit.image_folder(root)
    assert (len(data["train"]), len(data["test"])) == (16, 10)
    assert all(f"/{name}/" in path for _, path in data["test"])


@pytest.mark.parametrize("name", ["cifar-10", "cifar-100"])
def test_cifar_is_98_percent_of_the_authors_archive_and_verified(name, tmp_path, monkeypatch):
    r, key, path = (
        np.random.RandomState(0),
        name.replace("-", ""),
        tmp_path / f"{name}-binary.tar.gz",
    )
    images, labels = r.randint(0, 256, (60, 32, 32, 3)), r.randint(0, 10, 60)
    coarse = b"\7"[: name == "cifar-100"]
    records = [
        coarse + bytes([label, *image.transpose(2, 0, 1).ravel()])
        for image, label in zip(images, labels, strict=True)
    ]
    names = [b"\n".join(b"class_%d" % i for i in range(10)) + b"\n\n"]
    files = {"train.bin": records[:50], "test.bin": records[50:], "fine_label_names.txt": names}
    if name == "cifar-10":
        files = {f"data_batch_{i + 1}.bin": records[10 * i : 10 * i + 10] for i in range(5)}
        files |= {"test_batch.bin": records[50:], "batches.meta.txt": names}
    with tarfile.open(path, "w:gz") as archive:
        for file, parts in files.items():
            info = tarfile.TarInfo(f"{name}-binary/{file}")
            info.size = len(b"".join(parts))
            archive.addfile(info, io.BytesIO(b"".join(parts)))
    assert vit.KRIZ == "https://www.cs.toronto.edu/~kriz/"
    monkeypatch.setattr(vit, "KRIZ", f"{tmp_path.as_uri()}/")
    monkeypatch.setitem(vit.CIFAR, key, hashlib.sha256(path.read_bytes()).hexdigest())
    options = vit.Options(data_dir=str(tmp_path))
    vit.load_data(key, options)
    path.unlink()
    data = vit.load_data(key, options)  # from the disk
    assert data["classes"] == [f"class_{i}" for i in range(10)]
    for split, places in (("train", range(49)), ("test", range(50, 60))):
        for (image, label), i in zip(map(data["read"], data[split]), places, strict=True):
            assert np.array_equal(image, images[i]) and label == labels[i]
    [file] = tmp_path.glob("downloads/*.gz")
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(vit.BadInput, match=f"{file}.*delete it"):
        vit.load_data(key, options)


@pytest.mark.parametrize(
    "name, splits, train, test",
    [
        ("one_split", {"train": 20}, range(18), range(18, 20)),
        ("two_splits", {"train": 20, "validation": 5}, range(20), range(100, 105)),
        ("all", {"train": 20, "validation": 5, "test": 3}, range(20), range(200, 203)),
        ("no_labels", {"train": 20, "validation": 5, "test": -3}, range(20), range(100, 105)),
    ],
)
def test_tfds_sets_are_read_without_tensorflow_and_tested_on_labels_never_trained_on(
    tmp_path, name, splits, train, test
):
    pytest.importorskip("array_record")  # not for Windows
    import tensorflow_datasets as tfds

    def split_generators(self, _):
        starts = {"train": 0, "validation": 100, "test": 200}
        return {split: self._generate_examples(starts[split], splits[split]) for split in splits}

    def generate_examples(self, start, count):
        for i in range(start, start + abs(count)):
            Image.new("L", (28, 28), i).save(tmp_path / "x.png")
            yield i, {"image": tmp_path / "x.png", "label": i % 10 if count > 0 else -1}

    own = {"_split_generators": split_generators, "_generate_examples": generate_examples}
    kind = types.new_class(f"Vit_{name}", (tfds.testing.DummyMnist,), {}, lambda x: x.update(own))
    kind(data_dir=tmp_path, file_format="array_record").download_and_prepare()
    data = vit.load_data(kind.name, vit.Options(data_dir=str(tmp_path)))
    assert [*data["classes"]] == [*"0123456789"] and "tensorflow" not in sys.modules
    for split, expected in (("train", train), ("test", test)):
        examples = [data["read"](data[split][i]) for i in range(len(data[split]))]
        assert sorted(image.getpixel((0, 0))[0] for image, _ in examples) == [*expected]
        assert all(label == image.getpixel((0, 0))[0] % 10 for image, label in examples)


def test_imagenet_is_trained_on_99_percent_and_tested_on_validation(monkeypatch):
    import tensorflow_datasets as tfds

    label = mock.Mock(names=[*"abc"])
    info = mock.Mock(splits=["train", "validation", "test"], features={"image": 0, "label": label})
    builder = mock.Mock(info=info)
    builder.name = "imagenet2012"
    builder.as_data_source = lambda split, **_: [{"label": -(split == "test"), "split": split}]
    monkeypatch.setattr(tfds, "builder", lambda *_, **__: builder)
    data = vit.load_data("imagenet2012", vit.Options())
    assert [data[x][0]["split"] for x in ("train", "test")] == ["train[:99%]", "validation"]


# ------------------------------------------------------------------------------------------ Photos


@pytest.fixture
def photos(tmp_path, monkeypatch, params):
    """Two photos and a checkpoint of 7 classes for 32 pixels in the working directory."""
    monkeypatch.chdir(tmp_path)
    vit.save_checkpoint("x.npz", seeded_params(classes=7), class_names=[*"abcdefg"])
    for photo, corner in (("a.jpg", -2), ("b.png", -1)):
        Image.effect_mandelbrot((90, 60), (corner, -1, 1, 1), 50).convert("RGB").save(photo)
    return ["a.jpg", "b.png"]


def test_photos_get_the_names_and_percents_of_the_checkpoint_at_its_size(photos):
    lines = run_quietly([*photos, "--pretrained=x.npz"]).splitlines()
    expected = []
    for photo in photos:
        pixels = Image.open(photo).resize((32, 32), vit.BILINEAR)
        logits = forward(seeded_params(classes=7), np.asarray(pixels)[None] / np.float32(127.5) - 1)
        shares = scipy.special.softmax(np.asarray(logits[0], np.float64))
        likeliest = np.argsort(-shares)[:5]
        expected += [f"{100 * shares[i]:.0f}% {'abcdefg'[i]}" for i in likeliest]
    found = [line.split() for line in lines if "%  " in line]
    assert [f"{float(share[:-1]):.0f}% {name}" for share, name in found] == expected
    assert all(sum(photo in line for line in lines) == 1 for photo in photos)


def test_rollout_is_the_flow_of_attention_from_patches_to_the_class_token(params):
    r = np.random.RandomState(0)
    weights = scipy.special.softmax(3 * r.standard_normal((3, 2, 4, 17, 17)), axis=-1)
    for image, rollout in enumerate(vit.attention_rollout(weights)):
        flow = np.eye(17)
        for block in weights[:, image]:
            flow = (0.5 * block.mean(0) + 0.5 * np.eye(17)) @ flow
        patches = flow[0, 1:].reshape(4, 4)
        assert_allclose(rollout, np.minimum(1, patches / np.percentile(patches, 99)), atol=1e-6)


def test_the_picture_of_attention_is_the_photo_and_the_photo_lit_by_the_rollout(photos):
    run_quietly([*photos, "--pretrained=x.npz"])
    for photo in photos:
        pixels = np.asarray(Image.open(photo).resize((32, 32), vit.BILINEAR))
        pixels = pixels[None] / np.float32(127.5) - 1
        model = functools.partial(vit.forward, return_attention=True)
        _, weights = jax.jit(model)(seeded_params(classes=7), pixels)
        light = 255 * (0.1 + 0.9 * vit.attention_rollout(np.asarray(weights))[0])
        light = np.asarray(Image.fromarray(light.astype(np.uint8)).resize((90, 60), vit.BILINEAR))
        both, original = Image.open(f"{photo}-attention.png"), np.asarray(Image.open(photo))
        assert np.array_equal(np.asarray(both)[:, :90], original)
        lit = original * (light[..., None] / 255)
        assert abs(np.asarray(both)[:, 90:] - lit).max() < 4


def test_a_checkpoint_of_1000_classes_knows_imagenet_s_names(photos):
    weights = seeded_weights(classes=1000)
    weights["head/bias"][[0, 207, 999]] = 300, 200, 100  # of imagenet_2012_labels.txt
    np.savez("y.npz", **weights)
    names = re.findall(r"%  (.*)", run_quietly(["a.jpg", "--pretrained=y.npz"]))
    assert names[:3] == [
        "tench, Tinca tinca",
        "golden retriever",
        "toilet tissue, toilet paper, bathroom tissue",
    ]


# --------------------------------------------------------------------------------- The command line

BIAS = "Transformer/encoderblock_1/LayerNorm_2/bias"
QUERY = "Transformer/encoderblock_0/MultiHeadDotProductAttention_1/query/kernel"
BAD_ARRAYS = {  # in checkpoints that are good otherwise: what is wrong, what the line says
    "pickled": ({"cls": np.array([{}], object)}, "allow_pickle"),
    "registers": ({"registers": np.ones(1, np.float32)}, "registers"),
    "half": ({"pre_logits/kernel": np.eye(32, dtype=np.float32)}, "pre_logits"),
    "misshapen": ({BIAS: np.zeros(7, np.float32)}, "(7,)"),
    "nan": ({BIAS: np.full(32, np.nan)}, BIAS),
    "ints": ({BIAS: np.zeros(32, int)}, BIAS),
    "huge": ({BIAS: np.full(32, 1e300)}, BIAS),
    "heads": ({QUERY: np.zeros((32, 100, 1), np.float32)}, "heads.npz"),
    "names": ({"class_names": np.array(["cat"])}, "class_names"),
}
BAD_FLAGS = {  # after digits --: what the line says
    "modle=ViT-B_16": "--modle",
    "model=ViT-Q_16": "ViT-Q_16",
    "model=B_16": "B_16",
    "model=ViT-XS_0": "ViT-XS_0",
    "decay_type=step": "step",
    "dtype=float16": "float16",
    "augment=all": "all",
    "total_steps=many": "many",
    "total_steps=0": "--total_steps=0",
    "total_steps=4294967296": "--total_steps",
    "batch_size=0": "--batch_size=0",
    "batch_size=9": "--batch_size=9",
    "base_lr=-1": "--base_lr=-1",
    "base_lr=nan": "--base_lr=nan",
    "image_size=30": "--image_size=30",
    "dropout=1.5": "--dropout=1.5",
    "warmup_steps=2": "--warmup_steps=2",
    "mixup_alpha=inf": "--mixup_alpha",
    "mixup_alpha=0.2 --batch_size=8": "--mixup_alpha",
    "seed=18446744073709551616": "--seed",
    "eval_only": "runs/digits/checkpoint.npz",
    "pretrained=released --model=ViT-S_14": "ViT-S_14",
    "eval_only --pretrained=good.npz": "good.npz",
    "num_processes=2": "--coordinator_address",
    "coordinator_address=foo": "'foo'",
    "coordinator_address=127.0.0.1:abc": "127.0.0.1:abc",
}
BAD_CHECKPOINTS = {  # after good --pretrained=: what the line says
    **{f"{name}.npz": words for name, (_, words) in BAD_ARRAYS.items()},
    "": "",
    "absent.npz": "absent.npz",
    "empty.npz": "empty.npz",
    "text.npz": "text.npz",
    "cut.npz": "cut.npz",
    "nothing.npz": "nothing.npz",
    "gap.npz": "encoderblock_1",
    "missing.npz": BIAS,
    "twice.npz": "two arrays of one name",
    "good.npz --image_size=30": "--image_size=30",
    "others.npz --eval_only": "other classes",
    "http://127.0.0.1:9/v.npz --data_dir=cache": "http://127.0.0.1:9/v.npz",
}
BAD_DATA = {  # what the line says
    "cifra10": "cifra10",
    "CIFAR10": "CIFAR10",
    "no_images": "no_images",
    "nothere.jpg": "nothere.jpg",
    "no/such/folder": "no/such/folder",
    "good --logdir=.": "checkpoint.npz",
    "one": "'cat'",
    "unknown": "'wolf'",
    "cut_image --pretrained=none": "dog/3.png",
    "text.npz digits": "text.npz digits",
    "text.npz --pretrained=good.npz": "text.npz",
    "bomb.png --pretrained=good.npz": "bomb.png",
}


@pytest.fixture(scope="module")
def bad(tmp_path_factory):
    """A folder with everything that is bad in the tables above, and with what is good."""
    root, flat = tmp_path_factory.mktemp("bad"), seeded_weights(classes=2)
    others = {"class_names": np.array(["cat", "wolf"])}
    for name, (arrays, _) in (BAD_ARRAYS | {"good": ({}, ""), "others": (others, "")}).items():
        np.savez(root / f"{name}.npz", **flat | arrays)
    np.savez(root / "nothing.npz", x=np.zeros(3))
    np.savez(root / "missing.npz", **{k: v for k, v in flat.items() if k != BIAS})
    np.savez(root / "gap.npz", **{k.replace("k_1/", "k_2/"): v for k, v in flat.items()})
    np.savez(root / "checkpoint.npz", **flat | {"train/step": np.int32(3)})
    good = (root / "good.npz").read_bytes()
    for name, data in (("empty", b""), ("text", b"hello"), ("cut", good[:-9000]), ("twice", good)):
        (root / f"{name}.npz").write_bytes(data)
    with zipfile.ZipFile(root / "twice.npz", "a") as file, pytest.warns(UserWarning):
        file.writestr("cls.npy", file.read("cls.npy"))
    for name in ("good", "one", "unknown", "cut_image"):
        picture_folder(root / name, classes=("cat", "dog")[: 1 if name == "one" else 2])
    (root / "unknown/test/dog").rename(root / "unknown/test/wolf")
    picture_folder(root / "no_images", train=0, test=0)
    image = root / "cut_image/train/dog/3.png"
    image.write_bytes(image.read_bytes()[:300])
    Image.new("1", (20_000, 20_000)).save(root / "bomb.png")
    return root


@pytest.mark.parametrize(
    "command, words",
    [
        *((f"digits --{flags}", words) for flags, words in BAD_FLAGS.items()),
        *((f"good --pretrained={file}", words) for file, words in BAD_CHECKPOINTS.items()),
        *BAD_DATA.items(),
    ],
)
def test_bad_input_is_one_line_and_status_2(command, words, bad, capsys, monkeypatch):
    monkeypatch.chdir(bad)
    data, *flags = command.split()
    error = refused([*TINY[1:], data, *flags], capsys)
    assert words in error and len(error) < 620


def test_help_explains_every_option_with_its_default(capsys):
    with pytest.raises(SystemExit, match="0"):
        vit.main(["--help"])
    out = " ".join(capsys.readouterr().out.split())
    for field in dataclasses.fields(vit.Options):
        assert re.search(rf"--{field.name} .*\S \({re.escape(str(field.default))}\)", out)


DIGITS = ["digits", *TINY, "--batch_size=8"]


def test_the_file_runs_when_it_is_piped_into_python(tmp_path):
    process = python("-", *DIGITS, f"--logdir={tmp_path}")
    status, out, error = finish(process, Path(vit.__file__).read_text())
    assert status == 0 and "test accuracy" in out and "Traceback" not in error


def test_the_module_is_imported_from_a_zip(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.write(vit.__file__, "vit.py")
    program = f"import sys, vit; assert 'x.zip' in vit.__file__; vit.main({DIGITS})"
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "x.zip")}
    status, out, error = finish(python("-c", program, cwd=tmp_path, env=environment))
    assert status == 0 and "test accuracy" in out and "Traceback" not in error


def test_the_head_of_the_file_asks_for_what_requirements_txt_asks_for():
    source = Path(vit.__file__)
    block = source.read_text().split("# ///")[1].split("dependencies")[1]
    lines = source.with_name("requirements.txt").read_text().splitlines()
    asked = [line.split("#")[0].strip() for line in lines]
    assert re.findall('"(.*?)"', block) == asked and len(asked) > 4
