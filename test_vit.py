# SPDX-License-Identifier: Apache-2.0
"""What vit.py promises, checked: pytest test_vit.py (about two minutes on two CPU cores).

Expected numbers are the original's (google-research/vision_transformer at c6de1e5, float32), or
come from NumPy, SciPy, Pillow or timm, or from a second way to the same result.
"""

import atexit
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
import tempfile
import threading
import time
import zipfile
from pathlib import Path
from unittest import mock

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"  # before JAX starts
os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp()  # for this run of the tests alone
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy
from numpy.testing import assert_allclose
from PIL import Image

import vit

atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"])
jax.config.update("jax_default_matmul_precision", "highest")

# -------------------------------------------------------------------------- What many tests share

# The arrays of the released imagenet21k+imagenet2012/ViT-B_16.npz, and their shapes; then those of
# each block, after Transformer/encoderblock_0/ to Transformer/encoderblock_11/.
VIT_B_16 = """cls=1,1,768 embedding/kernel=16,16,3,768 embedding/bias=768 head/kernel=768,1000
    head/bias=1000 Transformer/posembed_input/pos_embedding=1,577,768
    Transformer/encoder_norm/scale=768 Transformer/encoder_norm/bias=768"""
VIT_B_16_BLOCK = """LayerNorm_0/scale=768 LayerNorm_0/bias=768 LayerNorm_2/scale=768
    LayerNorm_2/bias=768 MultiHeadDotProductAttention_1/query/kernel=768,12,64
    MultiHeadDotProductAttention_1/query/bias=12,64 MultiHeadDotProductAttention_1/key/bias=12,64
    MultiHeadDotProductAttention_1/key/kernel=768,12,64 MlpBlock_3/Dense_0/kernel=768,3072
    MultiHeadDotProductAttention_1/value/kernel=768,12,64 MlpBlock_3/Dense_0/bias=3072
    MultiHeadDotProductAttention_1/value/bias=12,64 MlpBlock_3/Dense_1/kernel=3072,768
    MultiHeadDotProductAttention_1/out/kernel=12,64,768 MlpBlock_3/Dense_1/bias=768
    MultiHeadDotProductAttention_1/out/bias=768"""
IMAGES = np.random.RandomState(1).uniform(-1, 1, (4, 32, 32, 3)).astype(np.float32)
LABELS = np.array([1, 4, 2, 0])
XS = {"d": 64, "mlp": 256, "tokens": 5, "classes": 2}  # a ViT-XS_8 for 16 pixels
TINY = (  # options of a run that takes a second, and one more to be compiled for the first time
    "--pretrained=none --model=ViT-XS_8 --image_size=16 --batch_size=16 --accum_steps=1 "
    "--warmup_steps=1 --total_steps=30 --base_lr=0.1 --augment=none --log_every=1 --eval_every=15 "
)


def released_shapes(patch=8, d=32, depth=2, heads=4, mlp=64, tokens=17, classes=5):
    """{released name: shape}; by default of the model whose numbers the original computed."""
    own = {16: patch, 768: d, 12: heads, 64: d // heads, 3072: mlp, 577: tokens, 1000: classes}
    names, block = VIT_B_16.split(), VIT_B_16_BLOCK.split()
    names += [f"Transformer/encoderblock_{i}/{name}" for i in range(depth) for name in block]
    shapes = {name: shape.split(",") for name, shape in (line.split("=") for line in names)}
    return {name: tuple(own.get(int(n), int(n)) for n in shapes[name]) for name in sorted(shapes)}


def seeded_weights(**sizes):
    """{released name: array}; by default the weights that the original's numbers belong to."""
    r, weights = np.random.RandomState(0), {}
    for name, shape in released_shapes(**sizes).items():
        weights[name] = (0.1 * r.standard_normal(shape)).astype(np.float32)
        weights[name] += np.float32(name.endswith("/scale"))
    return weights


def seeded_params(**sizes):
    return vit.to_params(seeded_weights(**sizes), "the seeded weights")


params = pytest.fixture(seeded_params, scope="module")
forward, clip = jax.jit(vit.forward), jax.jit(vit.clip_by_global_norm)
with_attention = jax.jit(functools.partial(vit.forward, return_attention=True))
# Without this option XLA may keep more bits of a bfloat16 than it has.
sgd_update = jax.jit(vit.sgd_update, compiler_options={"xla_allow_excess_precision": False})


@functools.partial(jax.jit, static_argnums=3)
@jax.value_and_grad
def loss_and_gradient(params, images, labels, remat=False):
    logits = vit.forward(params, images, remat=remat)
    return vit.cross_entropy(logits, jax.nn.one_hot(labels, 5))


def equal(a, b):
    """Whether two trees hold the same bits."""
    same = jax.tree.map(lambda x, y: x.dtype == y.dtype and np.array_equal(x, y), a, b)
    return all(jax.tree.leaves(same))


def all_close(a, b, atol):
    jax.tree.map(lambda x, y: assert_allclose(x, y, atol=atol), a, b)


def noise(size, seed=0):
    pixels = np.random.RandomState(seed).randint(0, 256, (size, size, 3))
    return Image.fromarray(pixels.astype(np.uint8))


def pixels_of(images):
    return np.asarray(images) / np.float32(127.5) - 1


def picture_folder(root, train=8, test=5, classes=("cat", "dog")):
    """A folder of dark cats and light dogs, which a run of a second learns to tell apart."""
    for label, name in enumerate(classes):
        for split, i in [("train", i) for i in range(train)] + [("test", i) for i in range(test)]:
            Path(root, split, name).mkdir(parents=True, exist_ok=True)
            pixels = np.random.RandomState(100 * label + i).randint(0, 80, (16 + i, 16, 3))
            image = Image.fromarray((pixels + 150 * label).astype(np.uint8))
            image.save(Path(root, split, name, f"{i}.png"))
    return Path(root)


def output_of(command):
    """What a command prints that ends well."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert vit.main(command.split()) == 0
    return out.getvalue()


def refused(command, capsys):
    """The one line of a command that is refused with status 2."""
    assert vit.main(command.split()) == 2
    error = capsys.readouterr().err
    assert error.startswith("vit.py: ") and error.count("\n") == 1, error
    return error


def metrics(run):
    return [row.split(",") for row in Path(run, "metrics.csv").read_text().splitlines()]


def result(run):
    """All that a run leaves behind, but for the images per second."""
    arrays = vit.read_arrays(Path(run, "checkpoint.npz"))
    saved = json.loads(str(arrays.pop("train/run")))
    rows = [[row[:3] + row[4:] for row in rows] for rows in (saved.pop("rows"), metrics(run))]
    return {name: array.tobytes() for name, array in arrays.items()}, rows, saved


def start(arguments, devices=1, **environment):
    """Starts Python in a process of its own."""
    environment |= {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
    environment |= {"JAX_PLATFORMS": "cpu", "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo"}
    pipes = {name: subprocess.PIPE for name in ("stdin", "stdout", "stderr")}
    where = {"env": os.environ | environment, "cwd": Path(vit.__file__).parent}
    return subprocess.Popen([sys.executable, *arguments.split()], text=True, **pipes, **where)


def finish(process, stdin=None):
    """Its exit status, output, and errors, of which none is a traceback."""
    try:
        out, error = process.communicate(stdin, timeout=600)
    finally:
        process.kill()
    assert "Traceback" not in error
    return process.returncode, out, error


# ----------------------------------------------------------------- The numbers are the original's

LOGITS = {  # of the first image, by its size in pixels
    16: [-0.08747111, 0.6735925, 0.42114395, 0.01757931, 0.7948882],
    32: [0.13968338, 0.41093412, 0.3068053, -0.11844803, 0.60040045],
    48: [-0.28529721, 0.5231322, 0.7233297, 0.27619973, 0.5140243],
}
LOSSES = {  # before each of five updates, by the dtype of momentum
    "bfloat16": [1.5707833, 1.5707833, 1.4806235, 1.2611428, 1.1061978],
    "float32": [1.5707833, 1.5707833, 1.4805456, 1.2608005, 1.1057192],
}
UPDATED = {  # the logits after them
    "bfloat16": [0.6176054, 0.5241724, 0.29380584, -0.9033976, 0.2977193],
    "float32": [0.6180969, 0.5244506, 0.29388905, -0.9047332, 0.29700014],
}
NORM, GRADIENTS = (
    3.2320464,
    """ 0.126349  0.027935  0.145475  0.005826  0.063795 -0.166069
     0.351390 -0.377218  0.173236  0.581771  0         0.088451 -0.003554  1.348437  0.001189
    -0.030801 -0.211105 -1.400027  0.063067 -0.019732 -0.077804 -0.088163 -0.019895  0.145312
    -0.039812  0.585964  0        -0.307931  0.459707  0.005924 -0.019317 -0.090996  0.243097
    -0.590395 -0.642435 -0.179350  0.056561 -1.730072 -0.368995  1.325776""",
)


def golden_images(size):
    r = np.random.RandomState(2)
    return IMAGES if size == 32 else r.uniform(-1, 1, (2, size, size, 3)).astype(np.float32)


def assert_golden(grads):
    """Compares {name: gradient}, each multiplied by a random direction."""
    r = np.random.RandomState(3)
    products = [np.vdot(grads[k], r.standard_normal(grads[k].shape)) for k in sorted(grads)]
    assert_allclose(products, [*map(float, GRADIENTS.split())], atol=1e-5)


@pytest.mark.parametrize("size", LOGITS)
def test_logits_at_any_resolution_equal_the_original(params, size):
    logits = forward(vit.adapt(params, size), golden_images(size))
    assert_allclose(logits[0], LOGITS[size], atol=5e-6)


def test_the_loss_every_gradient_and_their_clipped_norm_equal_the_original(params):
    loss, grads = jax.device_get(loss_and_gradient(params, IMAGES, LABELS))
    assert abs(loss - 1.5707834) < 1e-5
    assert_golden(vit.to_released(grads))
    all_close(clip(grads, 1.0), jax.tree.map(lambda g: g / NORM, grads), 1e-6)
    all_close(clip(grads, 4.0), grads, 0)


@pytest.mark.parametrize("dtype", LOSSES)
def test_five_updates_with_accumulation_equal_the_original(params, dtype):
    momentum = jax.tree.map(lambda m: m.astype(dtype), jax.device_get(vit.sgd_init(params)))
    for step, expected in enumerate(LOSSES[dtype]):
        halves = [loss_and_gradient(params, IMAGES[h], LABELS[h]) for h in ([0, 1], [2, 3])]
        loss, grads = jax.tree.map(lambda *x: sum(x) / 2, *jax.device_get(halves))
        assert abs(loss - expected) < 1e-5
        rate = vit.learning_rate(step, 0.03, 5, 2)
        params, momentum = sgd_update(params, momentum, clip(grads, 1.0), rate)
    assert_allclose(forward(params, IMAGES)[0], UPDATED[dtype], atol=1e-5)


@pytest.mark.skipif("UPSTREAM" not in os.environ, reason="UPSTREAM names no copy of the original")
def test_the_original_computes_these_numbers_again(tmp_path, monkeypatch):
    needed = "flax", "optax", "scipy.ndimage", "flax.training.checkpoints"
    flax, optax, _, _ = map(pytest.importorskip, needed)
    monkeypatch.syspath_prepend(os.environ["UPSTREAM"])
    idle = "tensorflow.io clu pandas tqdm vit_jax.input_pipeline vit_jax.models tensorflow"
    idle = {name: mock.MagicMock(**{"gfile.GFile": open}) for name in [*idle.split()]}
    with mock.patch.dict(sys.modules, idle):
        from vit_jax import checkpoint, models_vit, train, utils
    sizes = dict(num_layers=2, mlp_dim=64, num_heads=4, dropout_rate=0, attention_dropout_rate=0)
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
    for dtype, losses in LOSSES.items():
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
        logits = model.apply({"params": tuned}, IMAGES, train=False)
        assert_allclose(logits[0], UPDATED[dtype], atol=1e-5)
    assert_golden(first)
    assert_allclose(optax.tree.norm(first), NORM, atol=1e-5)
    assert_allclose(schedule(10_000, 0.03, "cosine", 500)(1500), 0.02918726, atol=1e-7)


@pytest.mark.parametrize("total, warmup", [(10_000, 500), (20, 0)])
def test_the_learning_rate_rises_in_a_line_and_falls_in_a_cosine_or_a_line(total, warmup):
    steps = np.array([0, warmup // 2, warmup, (warmup + total) // 2, total - 1, total])
    done = np.maximum(0, steps - warmup) / (total - warmup)
    cosine, linear = 0.03 * (1 + np.cos(np.pi * done)) / 2, 0.03 + (1e-5 - 0.03) * done
    for kind, rates in (("cosine", cosine), ("linear", linear)):
        rates = rates * np.minimum(1, steps / warmup) if warmup else rates
        assert_allclose(vit.learning_rate(steps, 0.03, total, warmup, kind), rates, atol=1e-8)
    assert abs(vit.learning_rate(1500, 0.03, 10_000, 500) - 0.02918726) < 1e-8  # the original's


def test_the_recipe_is_the_published_one():
    # google-research/vision_transformer, vit_jax/configs/common.py: get_config and
    # DATASET_PRESETS; base_lr as in its README's table of results. Splits: see Datasets below.
    config = dict(batch_size=512, accum_steps=8, base_lr=0.03, decay_type="cosine")
    config |= dict(warmup_steps=500, grad_norm_clip=1.0, eval_every=100, log_every=10)
    config |= dict(image_size=384, dtype="float32", dropout=0.0, mixup_alpha=0.0)
    for data, total_steps in (("cifar10", 10_000), ("cifar100", 10_000), ("imagenet2012", 20_000)):
        _, options = vit.parse_options([data])
        published = config | {"total_steps": total_steps, "augment": "inception"}
        assert {name: getattr(options, name) for name in published} == published


@pytest.mark.parametrize(
    "model, millions",
    [("Ti_16", 5.717416), ("S_16", 22.050664), ("B_16", 86.567656), ("B_32", 88.224232)]
    + [("L_16", 304.326632), ("L_32", 306.5354), ("H_14", 632.0458)],
)
def test_models_have_the_published_number_of_parameters(model, millions):
    shapes = jax.eval_shape(lambda: vit.init_params(jax.random.key(0), f"ViT-{model}", 224, 1000))
    assert sum(p.size for p in jax.tree.leaves(shapes)) == round(1e6 * millions)


def test_names_and_shapes_are_those_of_the_released_file():
    params = jax.eval_shape(lambda: vit.init_params(jax.random.key(0), "ViT-B_16", 384, 1000))
    shapes = {name: x.shape for name, x in jax.eval_shape(vit.to_released, params).items()}
    assert shapes == released_shapes(16, 768, 12, 12, 3072, 577, 1000)


def test_initial_parameters_have_the_original_distributions_and_numbers_of_their_own():
    init = jax.jit(vit.init_params, static_argnums=(1, 2, 3))
    both = [jax.device_get(init(jax.random.key(i), "ViT-XS_8", 128, 10)) for i in (0, 1)]
    expected = {  # in a name: deviation; the largest value over it, from and to
        "MultiHead.*kernel": ((2 / (64 + 64)) ** 0.5, 1.71, 3**0.5),  # uniform, heads together
        "MlpBlock.*kernel": ((2 / (64 + 256)) ** 0.5, 1.71, 3**0.5),
        "MlpBlock.*bias": (1e-6, 2, 5),  # normal
        "pos_embedding": (0.02, 3.2, 6),
        "'embedding.*kernel": (1 / (3 * 8**2) ** 0.5, 2.2, 2 / 0.8796),  # normal, cut at twice it
    }
    starts = []
    for path, x in jax.tree.leaves_with_path(both):
        name = jax.tree_util.keystr(path)
        [known] = [v for k, v in expected.items() if re.search(k, name)] or [None]
        if known:
            assert abs(x.std() / known[0] - 1) < 3 / x.size**0.5, name
            assert known[1] < abs(x).max() / known[0] < known[2] * 1.00001, name
            starts.append(x.ravel()[:128])
        else:
            assert np.all(x == ("scale" in name)), name
    alike = np.corrcoef(starts) - np.eye(len(starts))
    assert len(starts) == 2 * 10 and abs(alike).max() < 0.5


# --------------------------------------------------------------------------------------- The model


def test_layer_norm_computes_in_float32_whatever_it_is_given():
    x = (100 + np.random.RandomState(0).standard_normal((5, 64))).astype(jnp.bfloat16)
    found = jax.jit(vit.layer_norm)(x, np.ones(64, "f"), np.zeros(64, "f"))
    assert found.dtype == jnp.bfloat16
    assert_allclose(np.float64(found), scipy.stats.zscore(np.float64(x), axis=-1), atol=0.02)


def test_dropout_zeroes_its_share_and_keeps_the_mean():
    x = np.asarray(vit.dropout(np.ones(100_000, np.float32), jax.random.key(0), 0.3))
    assert abs((x == 0).mean() - 0.3) < 0.01 and abs(x.mean() - 1) < 0.01


def test_fused_attention_and_its_gradients_equal_attention_written_out(monkeypatch):
    on_a_cpu = functools.partial(jax.nn.dot_product_attention, implementation="xla")
    on_a_cpu = lambda *qkv, implementation, attend=on_a_cpu, **more: attend(*qkv, **more)  # noqa: E731
    monkeypatch.setattr(jax.nn, "dot_product_attention", on_a_cpu)
    *qkv, direction = np.random.RandomState(0).standard_normal((4, 2, 17, 4, 8)).astype(np.float32)

    def written_out(q, k, v):
        powers = jnp.exp(jnp.einsum("bqah,bkah->baqk", q, k) / 8**0.5)
        return jnp.einsum("baqk,bkah->bqah", powers / powers.sum(axis=-1, keepdims=True), v)

    results = []
    for attend in (written_out, vit.fused_attention):
        values, backward = jax.vjp(jax.jit(attend), *qkv)
        results.append((values, backward(direction)))
    all_close(*results, 1e-6)


@jax.jit
def tokens_of(params):
    """What goes into the first block."""
    x = vit.patch_embedding(IMAGES, **params["embedding"])
    x = jnp.concatenate([jnp.broadcast_to(params["cls"], (4, 1, 32)), x], axis=1)
    return x + params["Transformer"]["posembed_input"]["pos_embedding"]


def block_of(params, i):
    return jax.tree.map(lambda p: p[i], params["Transformer"]["encoderblock"])


def test_attention_weights_say_where_each_token_looks_and_change_no_logit(params):
    logits, weights = jax.device_get(with_attention(params, IMAGES))
    assert_allclose(logits, forward(params, IMAGES), atol=1e-6)
    block = block_of(params, 0)
    x = np.asarray(vit.layer_norm(tokens_of(params), **block["LayerNorm_0"]))
    query, key = (block["MultiHeadDotProductAttention_1"][name] for name in ("query", "key"))
    q, k = (np.einsum("bnd,dah->bnah", x, p["kernel"]) + p["bias"] for p in (query, key))
    scores = np.einsum("bqah,bkah->baqk", q, k) / np.sqrt(8)
    assert_allclose(weights[0], scipy.special.softmax(scores, axis=-1), atol=1e-5)


def test_dropout_comes_after_embeddings_attention_gelu_and_mlp(params):
    @jax.jit
    def written_out(params, key):
        keys, norm = jax.random.split(key, 3), params["Transformer"]["encoder_norm"]
        x = vit.dropout(tokens_of(params), keys[0], 0.5)
        for i in (0, 1):
            own, block = jax.random.split(keys[1 + i], 3), block_of(params, i)
            y = vit.layer_norm(x, **block["LayerNorm_0"])
            y, _ = vit.attention(y, **block["MultiHeadDotProductAttention_1"])
            x = x + vit.dropout(y, own[0], 0.5)
            y = vit.layer_norm(x, **block["LayerNorm_2"])
            y = jax.nn.gelu(vit.linear(y, **block["MlpBlock_3"]["Dense_0"]))
            y = vit.linear(vit.dropout(y, own[1], 0.5), **block["MlpBlock_3"]["Dense_1"])
            x = x + vit.dropout(y, own[2], 0.5)
        return vit.linear(vit.layer_norm(x, **norm)[:, 0], **params["head"])

    dropping, key = jax.jit(functools.partial(vit.forward, dropout_rate=0.5)), jax.random.key(7)
    assert_allclose(dropping(params, IMAGES, key), written_out(params, key), atol=1e-5)


def test_with_bfloat16_softmax_and_logits_stay_in_float32(params):
    logits, weights = jax.device_get(with_attention(params, jnp.asarray(IMAGES, jnp.bfloat16)))
    assert_allclose(logits, forward(params, IMAGES), atol=0.05)
    for x in (logits, weights):  # in float32, and not rounded before
        assert x.dtype == np.float32 and np.mean(x == x.astype(jnp.bfloat16)) < 0.1


def test_remat_changes_no_gradient(params):
    plain, remat = (loss_and_gradient(params, IMAGES, LABELS, remat) for remat in (False, True))
    all_close(plain, remat, 1e-5)


def test_the_model_needs_nothing_but_jax_when_it_is_pasted_elsewhere():
    model = Path(vit.__file__).read_text().split("- 1. Model\n")[1].split("- 2. Learning\n")[0]
    pasted, key = {}, jax.random.key(0)
    exec(f"import jax, jax.numpy as jnp\n{model}", pasted)
    params = jax.eval_shape(lambda: pasted["init_params"](key, "ViT-XS_8", 16, 3))
    images = np.ones((2, 16, 16, 3), np.float32)
    assert jax.eval_shape(lambda p: pasted["forward"](p, images, key, 0.1), params).shape == (2, 3)


# -------------------------------------------------------------------------------------- One update


def one_update(params, step=6, images=None, labels=None, parts=1, each=1, **options):
    """train_step on eight devices, from a momentum of 0.5: state, loss, rate, images, labels."""
    options = {"total_steps": 10, "warmup_steps": 2, "base_lr": 0.1, "accum_steps": parts} | options
    r, shape = np.random.RandomState(0), (8, parts, each)
    images = r.randint(0, 256, (*shape, 32, 32, 3), np.uint8) if images is None else images
    labels = r.randint(0, 5, shape).astype(np.int32) if labels is None else labels
    momentum = jax.tree.map(lambda p: np.full(p.shape, 0.5, jnp.bfloat16), params)
    state = {"params": params, "momentum": momentum, "step": np.int32(step)}
    results = vit.train_step(state, images, labels, vit.Options(**options))
    return *jax.device_get(results), images, labels


def test_an_update_is_the_rate_of_its_step_times_momentum_and_clipped_mean_gradient(params):
    options = {"decay_type": "linear", "grad_norm_clip": 0.1}
    state, loss, rate, images, labels = one_update(params, parts=2, **options)
    inputs = pixels_of(images.reshape(-1, 32, 32, 3)), labels.ravel()
    expected, grads = jax.device_get(loss_and_gradient(params, *inputs))
    norm = np.sqrt(sum(np.vdot(g, g) for g in jax.tree.leaves(grads)))
    momentum = jax.tree.map(lambda g: 0.44921875 + 0.1 / norm * g, grads)  # 0.9 in bfloat16 x 0.5
    assert abs(loss - expected) < 1e-5 and norm > 0.2 and state["step"] == 7
    assert abs(rate - (0.1 + (1e-5 - 0.1) * (6 - 2) / (10 - 2))) < 1e-7
    all_close(state["params"], jax.tree.map(lambda p, m: p - rate * m, params, momentum), 1e-6)
    all_close(state["momentum"], momentum, 2e-3)


def test_momentum_starts_as_zeros_in_bfloat16(params):
    zeros = jax.tree.map(lambda p: np.zeros(p.shape, jnp.bfloat16), params)
    assert equal(vit.sgd_init(params), zeros)


def test_dropout_in_training_differs_from_step_to_step_part_to_part_and_device_to_device(params):
    images = np.broadcast_to(np.asarray(noise(32)), (8, 2, 1, 32, 32, 3))

    def loss(step, labels):  # of one image everywhere, with these labels for 8 devices x 2 parts
        labels = np.broadcast_to(np.int32(labels), (8, 2))[..., None]
        return float(one_update(params, step, images, labels, parts=2, dropout=0.5)[1])

    half = (loss(6, 1) + loss(6, 4)) / 2  # if the same entries were dropped everywhere
    assert abs(loss(6, 1) - loss(7, 1)) > 1e-4
    assert abs(loss(6, [1, 4]) - half) > 1e-4
    assert abs(loss(6, [[1]] * 4 + [[4]] * 4) - half) > 1e-4


def test_mixup_in_training_blends_images_and_targets_of_each_part_by_one_beta_draw(params):
    _, loss, _, images, labels = one_update(params, parts=2, each=3, mixup_alpha=0.7)
    key, _ = jax.random.split(jax.random.fold_in(jax.random.key(0), 6))  # of seed 0, step 6
    share = np.asarray(jax.random.beta(key, 0.7, 0.7))
    images, targets = pixels_of(images).reshape(16, 3, 32, 32, 3), np.eye(5)[labels.reshape(16, 3)]
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


def test_crops_have_the_distribution_of_the_original():
    # TensorFlow's sampler, with an area of 5 % or more and an aspect ratio from 3/4 to 4/3: the
    # ratio is uniform, then the height among those that fit.
    rng, width, height, at = np.random.default_rng(0), 500, 375, (0, 0.1, 0.25, 0.5, 0.75, 0.9, 1)
    boxes = np.array([vit.inception_crop(rng, width, height) for _ in range(20_000)])
    left, upper, right, lower = boxes.T
    assert left.min() == upper.min() == 0 and right.max() == width and lower.max() == height
    assert abs((left + right).mean() - width) < 4 and abs((upper + lower).mean() - height) < 4
    w, h = right - left, lower - upper
    aspect, share = np.random.default_rng(1).uniform((3 / 4, 0), (4 / 3, 1), (200_000, 2)).T
    low = np.sqrt(0.05 * width * height / aspect)
    area = (low + share * (np.minimum(height, width / aspect) - low)) ** 2 * aspect
    assert_allclose(np.quantile(w / h, at), np.quantile(aspect, at), atol=0.015)
    assert_allclose(np.quantile(w * h, at), np.quantile(area, at), atol=0.015 * width * height)


def test_enlarged_images_are_interpolated_between_pixels_as_in_the_original():
    at = np.clip((np.arange(384) + 0.5) * 32 / 384 - 0.5, 0, 31)
    weights = np.maximum(0, 1 - abs(at[:, None] - np.arange(32)))
    expected = np.einsum("ik,jl,klc->ijc", weights, weights, np.asarray(noise(32)), optimize=True)
    assert abs(vit.to_array(noise(32), 384) - expected).max() < 1.001  # within one grey level


def test_shrunk_images_are_averaged():
    assert 5 < vit.to_array(noise(64), 8).std() < 15  # of four pixels each: 37 and more


def numbers(count, image=None):
    """The numbers 0 to count - 1 as data, each a grey of its own, or all one image."""
    read = lambda i: (image or Image.new("RGB", (4, 4), (i, i, i)), i)  # noqa: E731
    return {"train": range(count), "test": range(2), "classes": [*range(count)], "read": read}


def example(data, index, size=4, **options):
    return vit.training_example(data, vit.Options(**options), size, index)


def test_half_of_the_training_images_are_mirrored():
    ramp = Image.linear_gradient("L").rotate(90).convert("RGB")
    images = [example(numbers(1, ramp), i)[0] for i in range(200)]
    assert 70 < sum(int(image[0, 0, 0]) > int(image[0, -1, 0]) for image in images) < 130


def test_each_epoch_shows_every_example_once_in_an_order_of_its_own():
    def labels(start, stop, seed=0):
        examples = [example(numbers(10), i, seed=seed) for i in range(start, stop)]
        assert all(image[0, 0, 0] == label for image, label in examples)
        return [label for _, label in examples]

    assert sorted(labels(0, 10)) == sorted(labels(10, 20)) == [*range(10)]
    assert labels(0, 10) != labels(10, 20) and labels(0, 10) != labels(0, 10, seed=1)


def test_an_example_depends_on_seed_and_index_alone():
    seeds = (0, 5), (0, 5), (0, 6), (1, 5)
    first, same, *others = (example(numbers(1, noise(64)), i, 16, seed=s)[0] for s, i in seeds)
    assert equal(first, same) and not any(equal(first, other) for other in others)


@pytest.mark.parametrize("label", [-1, 10])
def test_a_label_without_a_class_is_refused(label):
    data = numbers(10) | {"read": lambda i: (noise(4), label)}
    pytest.raises(vit.BadInput, example, data, 0).match(f"label.* {label}")


def test_hosts_devices_and_parts_share_out_every_place_of_a_batch_in_order(monkeypatch):
    monkeypatch.setattr(jax, "local_device_count", lambda: 2)
    assert vit.batch_positions(8, 2).tolist() == [[[0, 1], [2, 3]], [[4, 5], [6, 7]]]
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(jax, "process_index", mock.Mock(side_effect=(0, 1)))
    assert np.ravel([vit.batch_positions(16, 2), vit.batch_positions(16, 2)]).tolist() == [
        *range(16)
    ]


def test_batches_come_in_order_and_whole():
    wanted = np.random.RandomState(0).permutation(48).astype(np.int32).reshape(6, 4, 2)
    batches = [*vit.batches(lambda i: (np.full((2, 2, 3), i, np.uint8), i), wanted)]
    assert equal(np.stack([labels for _, labels in batches]), wanted)
    assert equal(np.stack([images[..., 1, 0, 2] for images, _ in batches]), np.uint8(wanted))


def test_an_example_that_cannot_be_read_is_reported_after_the_batches_before_it():
    read = mock.Mock(side_effect=lambda i: vit.require(i != 5, "example 5") or (np.zeros(1), i))
    batches = vit.batches(read, np.arange(8).reshape(4, 2))
    assert [next(batches)[1].tolist() for _ in range(2)] == [[0, 1], [2, 3]]
    pytest.raises(vit.BadInput, next, batches).match("example 5")


# ---------------------------------------------------------------------------------------- Training


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    """A run of 30 updates on pictures, evaluated twice: (folder of the run, command, output)."""
    root = tmp_path_factory.mktemp("learned")
    command = f"{picture_folder(root / 'data')} {TINY} --logdir={root / 'run'} "
    return root / "run", command, output_of(command)


def test_pictures_are_learned_and_each_update_and_evaluation_is_in_metrics(learned):
    head, *rows = metrics(learned[0])
    assert head == ["step", "loss", "learning_rate", "images_per_second", "test_accuracy"]
    assert [row for row in rows if row[4]] == [[n, "", "", "", "1.0"] for n in ("15", "30")]
    first, *others = [row[3] for row in rows if not row[4]]  # the first has only been compiled
    assert first == "" and all(float(images_per_second) > 0 for images_per_second in others)
    updates = np.array([row[:3] for row in rows if not row[4]], float)
    assert updates[:, 0].tolist() == [*range(1, 31)] and updates[-1, 1] < 0.1
    assert_allclose(updates[[0, 1], [1, 2]], [np.log(2), 0.1], rtol=1e-5)  # the head was zeros


def test_the_first_updates_the_due_and_the_last_have_a_line_of_progress(learned, tmp_path):
    out = output_of(f"{learned[1]} --log_every=20 --logdir={tmp_path}")
    assert re.search(r"^compiling an update of 16 images of 16 x 16 pixels \.\.\.$", out, re.M)
    assert re.search(r"^compiled and computed the first update in \d+ s$", out, re.M)
    lines = re.findall(r"^step (\d+)/30  loss [\d.]+  lr \S+  (.*)$", out, re.M)
    assert [step for step, _ in lines] == ["2", "20", "30"]
    assert all(re.fullmatch(r"[\d.]+ images/s  \d+ s left", rest) for _, rest in lines)
    assert out.count("test accuracy 100.00% of 10 images\n") == 2


def test_times_are_written_as_people_write_them():
    times = {0.4: "0 s", 89: "89 s", 720: "12 min", 3570: "1 h 0 min", 11520: "3 h 12 min"}
    assert {seconds: vit.duration(seconds) for seconds in times} == times


def test_the_first_images_are_drawn_as_the_model_sees_them(learned):
    data = vit.load_data(learned[1].split()[0], vit.Options())
    images = [data["read"](data["train"][i])[0] for i in vit.epoch_order(0, 0, 16)[:8]]
    expected = np.hstack([image.resize((16, 16), Image.Resampling.BILINEAR) for image in images])
    assert np.array_equal(Image.open(learned[0] / "first_batch.png"), expected)


def test_evaluation_alone_reads_the_checkpoint_of_the_run(learned, monkeypatch):
    monkeypatch.chdir(learned[0].parent)
    shutil.copytree("run", "runs/data")
    assert "test accuracy 100.00% of 10 images" in output_of("data --eval_only")


@pytest.mark.parametrize("count", [5, 37])  # in batches of eight
def test_evaluation_counts_every_image_once_and_no_padding(count):
    params, labels = seeded_params(tokens=5, classes=40), [int(i % 5 > 1) for i in range(count)]
    params["head"] = {"kernel": np.zeros((32, 40), "f"), "bias": -np.arange(40.0)}  # guesses 0
    data = {"test": range(count), "read": lambda i: (noise(16), labels[i])}
    options = vit.Options(batch_size=3, accum_steps=1)
    assert vit.evaluate(vit.replicate(params), data, options) == labels.count(0) / count


def test_a_loss_that_is_not_finite_ends_the_run(learned, tmp_path, capsys, monkeypatch):
    def update(state, *batch, update=vit.train_step):
        state, loss, rate = update(state, *batch)
        return state, jnp.where(state["step"] < 5, loss, jnp.nan), rate

    monkeypatch.setattr(vit, "train_step", update)
    assert "loss of step 5 is nan" in refused(f"{learned[1]} --logdir={tmp_path}", capsys)
    assert [row[0] for row in metrics(tmp_path)] == ["step", "1", "2", "3", "4"]


def test_an_unreadable_image_ends_the_run_and_the_last_evaluation_stays(tmp_path, capsys):
    data = vit.image_folder(picture_folder(tmp_path / "data", train=16))
    path = data["train"][vit.epoch_order(0, 0, 32)[-1]][1]  # in the second batch of sixteen
    Path(path).write_text("no image")
    assert path in refused(f"{tmp_path}/data {TINY} --eval_every=1 --logdir={tmp_path}", capsys)
    assert vit.read_arrays(tmp_path / "checkpoint.npz")["train/step"] == 1


# -------------------------------------------------------------------- One way to stop, and to start


def test_ctrl_c_is_one_line_and_the_same_command_goes_on(learned, tmp_path, capsys, monkeypatch):
    def save(*run, save=vit.save_run):
        save(*run)
        os.kill(os.getpid(), signal.SIGINT)

    command = f"{learned[1]} --logdir={tmp_path}"
    with monkeypatch.context() as patch:
        patch.setattr(vit, "save_run", save)
        assert vit.main(command.split()) == 130
    error = capsys.readouterr().err
    assert error.startswith("vit.py: stopped; ") and error.count("\n") == 1
    assert "step 15 of 30" in output_of(command) and result(tmp_path) == result(learned[0])


@pytest.mark.parametrize("devices, more", [(1, ""), (2, "--dropout=0.1 --augment=inception")])
def test_a_run_killed_at_any_moments_ends_bit_for_bit_as_one_left_alone(tmp_path, devices, more):
    path, data = tmp_path / "killed/checkpoint.npz", picture_folder(tmp_path / "data")
    command = f"{vit.__file__} {data} {TINY} {more} --eval_every=3 --logdir={tmp_path}/"
    alone, moments = start(f"{command}whole", devices), np.random.default_rng()
    for while_starting in (True, False, False):
        process, before = start(f"{command}killed", devices), [*path.parent.glob("*.npz")]
        before = before and path.stat().st_mtime_ns
        while process.poll() is None and not while_starting:
            if path.exists() and path.stat().st_mtime_ns != before:
                break  # it has gone beyond what was there
            time.sleep(0.01)
        time.sleep(moments.uniform(0, 4 if while_starting else 0.3))
        process.kill()
        assert finish(process)[0] in (0, -signal.SIGKILL)
        assert while_starting or vit.load_checkpoint(path)  # whole at any time
    step = int(vit.read_arrays(path)["train/step"])
    status, out, _ = finish(start(f"{command}killed", devices))
    assert status == finish(alone)[0] == 0 and f"step {step} of 30, on {devices} x" in out
    assert result(tmp_path / "killed") == result(tmp_path / "whole")


def test_a_full_disk_is_one_line_and_the_old_file_stays(learned, tmp_path, capsys, monkeypatch):
    path, params = tmp_path / "run/checkpoint.npz", seeded_params()
    vit.save_checkpoint(path, params)
    monkeypatch.setattr(os, "fsync", mock.Mock(side_effect=OSError(28, "No space left")))
    pytest.raises(OSError, vit.save_checkpoint, path, vit.adapt(params, 16)).match("No space left")
    assert "No space" in refused(f"{learned[1]} --logdir={tmp_path / 'new'}", capsys)
    assert equal(vit.load_checkpoint(path), params) and [*tmp_path.rglob("check*")] == [path]


def test_params_that_are_not_finite_are_never_saved(params, tmp_path):
    params = jax.tree.map(lambda p: p + np.nan, params)
    pytest.raises(vit.BadInput, vit.save_checkpoint, tmp_path / "x", params).match("nan or inf")
    assert not [*tmp_path.iterdir()]


def test_folders_whose_runs_have_one_name_do_not_resume_each_other(tmp_path, capsys, monkeypatch):
    for name in ("a/b", "w/a/b", "w/a-b"):
        picture_folder(tmp_path / name)
    monkeypatch.chdir(tmp_path / "w")
    assert output_of(f"a/b {TINY}") and Path("runs/a-b/checkpoint.npz").exists()
    assert "step 30 of 30" in output_of(f"./a/b/ {TINY}")  # the same folder
    for other in ("a-b", "../a/b"):
        assert "its data was" in refused(f"{other} {TINY}", capsys)


def test_all_options_but_a_few_and_the_data_are_part_of_what_a_run_is(tmp_path):
    free = "accum_steps remat log_every eval_every eval_only logdir data_dir"
    free += " coordinator_address num_processes process_id"
    assert sorted(vit.PER_HOST + vit.MAY_CHANGE) == sorted(free.split())
    data, first = numbers(5) | {"name": "numbers"}, vit.Options(logdir=str(tmp_path))
    params = seeded_params()
    state = {"params": params, "momentum": vit.sgd_init(params), "step": 3}
    vit.save_run(first, data, state, [[1, 2]])
    other = {"model": "ViT-S_16", "dtype": "bfloat16", "decay_type": "linear", "augment": "none"}
    other |= {"dropout": 0.5, "pretrained": "x", "coordinator_address": "x", "data_dir": "x"}
    other["process_id"] = 0  # nothing else is below the number of processes
    for name, value in vars(first).items():
        new = other.get(name, value if name == "logdir" else value + type(value)(1))
        changed = dataclasses.replace(first, **{name: new})
        if name in free.split():
            assert vit.start_or_resume(changed, data)[1] == [[1, 2]]
        else:
            refusal = pytest.raises(vit.BadInput, vit.start_or_resume, changed, data)
            refusal.match(f"its {name} was {value}, not {new}")
    for change in ({"train": range(4)}, {"test": range(4)}, {"classes": "abcde"}, {"name": "x"}):
        refusal = pytest.raises(vit.BadInput, vit.start_or_resume, first, data | change)
        refusal.match("its (number of|classes|data)")


# ------------------------------------------------------------------------------------------- Hosts


def two_hosts(command, logdirs):
    """What became of a command on two hosts of two devices each: [finish(...), finish(...)]."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        command += f" --coordinator_address=127.0.0.1:{free.getsockname()[1]} --num_processes=2"
    command += " --process_id="
    hosts = [start(f"{command}{i} --logdir={logdirs[i]}", devices=2) for i in (0, 1)]
    return [finish(host) for host in hosts]


@pytest.fixture(scope="module")
def hosts(tmp_path_factory):
    """One host and two, the first of which cannot read an image of the fourth update."""
    root = tmp_path_factory.mktemp("hosts")
    items = vit.image_folder(picture_folder(root / "data", train=32))["train"]
    bad = items[vit.epoch_order(0, 0, 64)[48]][1]
    Path(bad).write_text("no image")
    command = f"{vit.__file__} {root / 'data'} {TINY} --dropout=0.1 --eval_every=3"
    one = start(f"{command} --logdir={root / 'one'}", devices=4)
    two = two_hosts(command, [root / "first", root / "second"])
    return root, command, bad, finish(one), two


def test_two_hosts_compute_what_one_computes(hosts):
    root, _, _, (_, out, _), ((_, same, _), _) = hosts
    one, two = (vit.read_arrays(root / name / "checkpoint.npz") for name in ("one", "first"))
    assert one["train/step"] == two["train/step"] == 3
    all_close(vit.to_params(one, "one"), vit.to_params(two, "two"), 1e-6)
    assert re.findall("test accuracy .*", out) == re.findall("test accuracy .*", same) != []


def test_only_the_first_host_writes_files_and_progress(hosts):
    root, _, _, _, (_, (_, out, _)) = hosts
    assert (root / "first/metrics.csv").exists() and not [*root.glob("second/*")]
    [line] = [line for line in out.splitlines() if not line.startswith("[Gloo]")]
    assert line.startswith("waiting for all hosts")


def test_a_host_that_cannot_read_says_so_in_a_line_and_the_other_ends_too(hosts):
    _, _, bad, one, (first, second) = hosts
    for status, _, error in (one, first):
        assert status == 2 and error.startswith("vit.py: ") and bad in error.splitlines()[0]
    assert second[0] not in (0, None)


def test_hosts_whose_checkpoints_differ_are_all_told_so(hosts, tmp_path):
    root, command, _, _, _ = hosts
    shutil.copytree(root / "first", tmp_path / "first")
    for status, _, error in two_hosts(command, [tmp_path / "first", tmp_path / "second"]):
        assert status == 2 and "vit.py: the hosts differ in step of checkpoint.npz" in error


# ------------------------------------------------------------------------------------ Checkpoints


@pytest.mark.parametrize("prefix", ["", "opt/target/", "params/"])
def test_every_spelling_of_the_names_loads_alike(params, prefix):
    newer = {"Attention_1/": "Attention_0/", "LayerNorm_2": "LayerNorm_1", "Block_3/": "Block_0/"}
    arrays = {prefix + name: array for name, array in seeded_weights().items()}
    assert equal(vit.to_params(arrays, "x"), params)
    for old, new in newer.items():
        arrays = {name.replace(old, new): array for name, array in arrays.items()}
    assert equal(vit.to_params(arrays, "x"), params)


def test_a_checkpoint_is_saved_under_the_released_names_with_more_beside_it(tmp_path):
    vit.save_checkpoint(tmp_path / "x.npz", seeded_params(depth=12), class_names=[*"abc"])
    with np.load(tmp_path / "x.npz") as file:
        saved = dict(file)
    assert saved.pop("class_names").tolist() == [*"abc"] and equal(saved, seeded_weights(depth=12))


def test_pre_logits_and_the_head_are_used_until_fine_tuning_which_begins_with_zeros(params):
    kernel = np.random.RandomState(0).standard_normal((32, 32)).astype(np.float32) / 5
    more = {"pre_logits/kernel": kernel, "pre_logits/bias": kernel[0]}
    whole = vit.to_params(seeded_weights() | more, "x")
    features = forward(params | {"head": {"kernel": np.eye(32), "bias": np.zeros(32)}}, IMAGES)
    hidden, head = np.tanh(features @ kernel + kernel[0]), params["head"]
    assert_allclose(forward(whole, IMAGES), hidden @ head["kernel"] + head["bias"], atol=1e-5)
    for classes in (5, 7):  # as many as before, and others
        zeros = {"kernel": np.zeros((32, classes), "f"), "bias": np.zeros(classes, "f")}
        tuned = vit.adapt(whole, 48, classes)
        assert "pre_logits" not in tuned and equal(tuned["head"], zeros)


@pytest.mark.parametrize("grid", [2, 3, 4, 7])
def test_position_embeddings_are_resized_as_scipy_zooms_them(params, grid):
    old = params["Transformer"]["posembed_input"]["pos_embedding"]
    new = vit.resize_position_embeddings(old, grid)
    patches, zoom = old[0, 1:].reshape(4, 4, 32), (grid / 4, grid / 4, 1)
    expected = scipy.ndimage.zoom(patches, zoom, order=1).reshape(grid * grid, 32)
    assert_allclose(new[0], np.concatenate([old[0, :1], expected]), atol=1e-6)


def test_timm_reads_what_we_save_and_gives_the_same_logits(tmp_path):
    timm, torch = pytest.importorskip("timm"), pytest.importorskip("torch")
    params = seeded_params(patch=16, d=64, depth=3, mlp=256, tokens=5, classes=7)
    vit.save_checkpoint(tmp_path / "x.npz", params, class_names=[*"abcdefg"])
    sizes = dict(img_size=32, patch_size=16, embed_dim=64, depth=3, num_heads=4, num_classes=7)
    gelu = functools.partial(torch.nn.GELU, approximate="tanh")
    model = timm.models.VisionTransformer(**sizes, act_layer=gelu).eval()
    model.load_pretrained(str(tmp_path / "x.npz"))
    theirs = model(torch.tensor(IMAGES.transpose(0, 3, 1, 2))).detach().numpy()
    assert_allclose(forward(params, IMAGES), theirs, atol=1e-5)


KINDS = {"F32": np.float32, "F16": np.float16, "BF16": jnp.bfloat16}
TIMM = """cls_token=cls pos_embed=Transformer/posembed_input/pos_embedding head.bias=head/bias
    patch_embed.proj.weight=embedding/kernel patch_embed.proj.bias=embedding/bias
    norm.weight=Transformer/encoder_norm/scale norm.bias=Transformer/encoder_norm/bias
    head.weight=head/kernel"""
TIMM_BLOCK = """norm1.weight=LayerNorm_0/scale norm1.bias=LayerNorm_0/bias
    norm2.weight=LayerNorm_2/scale norm2.bias=LayerNorm_2/bias
    attn.proj.weight=MultiHeadDotProductAttention_1/out/kernel
    attn.proj.bias=MultiHeadDotProductAttention_1/out/bias
    mlp.fc1.weight=MlpBlock_3/Dense_0/kernel mlp.fc1.bias=MlpBlock_3/Dense_0/bias
    mlp.fc2.weight=MlpBlock_3/Dense_1/kernel mlp.fc2.bias=MlpBlock_3/Dense_1/bias"""


def timm_arrays(weights):
    """{released name: array} of a ViT-XS_8 -> {timm's name: array}, linear weights transposed."""
    arrays, ours = {}, dict(line.split("=") for line in TIMM.split())
    for i in (0, 1):
        start = f"Transformer/encoderblock_{i}/"
        names = [line.split("=") for line in TIMM_BLOCK.split()]
        ours |= {f"blocks.{i}.{name}": start + released for name, released in names}
        parts = [f"{start}MultiHeadDotProductAttention_1/{x}/" for x in ("query", "key", "value")]
        kernels = [weights[f"{part}kernel"].reshape(64, 64).T for part in parts]
        arrays[f"blocks.{i}.attn.qkv.weight"] = np.concatenate(kernels)
        biases = [weights[f"{part}bias"].ravel() for part in parts]
        arrays[f"blocks.{i}.attn.qkv.bias"] = np.concatenate(biases)
    for name, released in ours.items():
        array = weights[released]
        if released == "embedding/kernel":
            array = array.transpose(3, 2, 0, 1)
        elif released.endswith("/kernel"):
            array = array.reshape(-1, array.shape[-1]).T
        arrays[name] = array
    return arrays


def write_safetensors(path, arrays, dtype="F32", data=b""):
    """A .safetensors file, written out: the length of a header, the header, the bytes."""
    header = {"__metadata__": {"format": "pt"}}
    for name, array in arrays.items():
        begin, data = len(data), data + array.astype(KINDS[dtype]).tobytes()
        place = {"shape": [*array.shape], "data_offsets": [begin, len(data)]}
        header[name] = {"dtype": dtype} | place
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


@pytest.mark.parametrize("dtype", KINDS)
@pytest.mark.parametrize("without", ["head", "nothing"])
def test_a_safetensors_file_of_timm_gives_exactly_the_weights_in_it(tmp_path, dtype, without):
    weights = seeded_weights(**XS)
    arrays = {k: x for k, x in timm_arrays(weights).items() if without not in k}
    path = write_safetensors(tmp_path / "x", arrays, dtype)
    found = vit.to_released(vit.load_checkpoint(path))
    rounded = {k: np.float32(x.astype(KINDS[dtype])) for k, x in weights.items()}
    assert equal(found, {k: x for k, x in rounded.items() if without not in k})


@pytest.mark.parametrize("width, heads", [(64, 4), (384, 6), (512, 8), (1280, 16)])
def test_heads_are_those_of_the_released_model_of_this_width_or_as_in_timm(width, heads):
    qkv = {"cls_token": np.zeros((1, 1, width)), "blocks.7.attn.qkv.bias": np.arange(3 * width)}
    found = vit.from_timm(qkv)
    key = found["Transformer/encoderblock_7/MultiHeadDotProductAttention_1/key/bias"]
    assert equal(key, np.arange(width, 2 * width).reshape(heads, width // heads))


@pytest.mark.parametrize(
    "name",
    ["blocks.0.ls1.gamma", "blocks.0.attn.q_norm.weight", "reg_token", "fc_norm.weight"]
    + ["head_dist.weight", "norm_pre.bias", "patch_embed.backbone.weight"],
)
def test_weights_of_another_model_are_refused_by_the_name_of_what_is_too_much(tmp_path, name):
    arrays = timm_arrays(seeded_weights(**XS)) | {name: np.ones(64, np.float32)}
    path = write_safetensors(tmp_path / "x", arrays)
    refusal = pytest.raises(vit.BadInput, vit.load_checkpoint, path)
    refusal.match(f"{name}.*another kind")


def test_updates_from_a_safetensors_file_equal_those_from_an_npz_to_the_bit(tmp_path):
    weights, tuned = seeded_weights(**XS), []
    write_safetensors(tmp_path / "x.safetensors", timm_arrays(weights))
    np.savez(tmp_path / "x.npz", **weights)
    own = {"train": range(16), "test": range(2), "classes": [*"ab"]}  # no folder, no TFDS set
    own["read"] = lambda i: (noise(16, i), i % 2)
    for file in (tmp_path / "x.npz", tmp_path / "x.safetensors"):
        flags = f"own {TINY} --pretrained={file} --logdir={file}-run"
        tuned.append(vit.train(vit.parse_options(flags.split())[1], own))
    assert equal(*tuned) and not equal(tuned[0]["cls"], weights["cls"])
    assert equal(vit.load_checkpoint(f"{file}-run/checkpoint.npz"), tuned[0])


def one_array(**entry):
    """A .safetensors file of one array, which is all right if nothing is changed in its entry."""
    text = json.dumps({"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | entry})
    return struct.pack("<Q", len(text)) + text.encode() + bytes(8)


@pytest.mark.parametrize(
    "data",
    [b"", b"hello", bytes(8), struct.pack("<Q", 2**63) + b"{}", struct.pack("<Q", 9) + b"{}"]
    + [struct.pack("<Q", len(text)) + text for text in (b"[]", b"{}", b"\xff\xfe", b'{"x": 1.0}')]
    + [struct.pack("<Q", 100_000) + b"[" * 100_000, one_array()[:-1]]
    + [one_array(shape=shape) for shape in ([3], [-1, -2], [2**62, 4], "2", None)]
    + [one_array(dtype=dtype) for dtype in ("I64", "F64", None)]
    + [one_array(data_offsets=x) for x in ([0, 4], [4, 8], [8, 0], [-8, 0], [0, 2**63], [0], 0)],
    ids=lambda data: repr(data[:99]),
)
def test_a_damaged_or_hostile_safetensors_file_is_bad_input(tmp_path, data):
    (tmp_path / "x").write_bytes(data)
    pytest.raises(vit.BadInput, vit.load_checkpoint, tmp_path / "x").match(str(tmp_path / "x"))


@pytest.mark.parametrize("before, after", [(bytes(4), b""), (b"", bytes(4))])
def test_bytes_that_belong_to_no_array_make_a_safetensors_file_bad_input(tmp_path, before, after):
    path = write_safetensors(tmp_path / "x", timm_arrays(seeded_weights(**XS)), data=before)
    path.write_bytes(path.read_bytes() + after)
    pytest.raises(vit.BadInput, vit.load_checkpoint, path).match("x.* bytes|begin")


@pytest.mark.parametrize("kind", ["npz", "png", "jpeg", "gif", "webp"])
def test_a_damaged_file_is_bad_input_or_gives_the_right_weights_or_a_picture(tmp_path, kind):
    r, path, params, noticed = np.random.default_rng(0), tmp_path / "x", seeded_params(**XS), 0
    with path.open("wb") as file:
        np.savez(file, **seeded_weights(**XS)) if kind == "npz" else noise(40).save(file, kind)
    data = path.read_bytes()
    for i in range(40):
        broken = bytearray(data[: len(data) if i % 3 else r.integers(1, len(data))])
        for place in r.integers(len(broken), size=r.integers(1, 4)):
            broken[place] ^= int(r.integers(1, 256))
        path.write_bytes(broken)
        try:
            found = vit.load_checkpoint(path) if kind == "npz" else vit.decode(path, "x")
            assert equal(found, params) if kind == "npz" else found.mode == "RGB"
        except vit.BadInput:
            noticed += 1
    assert noticed > (25 if kind == "npz" else 8)


# --------------------------------------------------------------------------------------- Downloads


@pytest.fixture
def server(monkeypatch):
    """A server, also of what is released: its address, what it serves, what it was asked for."""
    served, asked = {}, []

    class Handler(http.server.BaseHTTPRequestHandler):
        log_message = mock.Mock()

        def do_GET(self):
            asked.append(self.path)
            data = served.get(self.path, b"")
            self.send_response(200 if data else 403)
            self.send_header("Content-Length", len(data) * (1 + ("cut" in self.path)))
            self.end_headers()
            self.wfile.write(data)

    assert vit.BUCKET == "https://storage.googleapis.com/vit_models/"
    assert vit.HUB == "https://huggingface.co/timm/"
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        threading.Thread(target=running.serve_forever, args=(0.01,), daemon=True).start()
        address = f"http://127.0.0.1:{running.server_port}"
        monkeypatch.setattr(vit, "BUCKET", f"{address}/vit_models/")
        monkeypatch.setattr(vit, "HUB", f"{address}/timm/")
        yield address, served, asked
        running.shutdown()


TRAINING = ["/vit_models/imagenet21k/ViT-B_16.npz"]
TRAINING += ["/timm/vit_base_patch16_224.orig_in21k/resolve/main/model.safetensors"]
PHOTOS = ["/vit_models/imagenet21k+imagenet2012/ViT-B_16.npz"]
PHOTOS += ["/timm/vit_base_patch16_384.orig_in21k_ft_in1k/resolve/main/model.safetensors"]


def test_training_takes_the_21k_weights_from_the_second_place_if_the_first_refuses(
    server, tmp_path
):
    weights, options = seeded_weights(**XS), vit.Options(data_dir=str(tmp_path), image_size=16)
    path = write_safetensors(tmp_path / "x", timm_arrays(weights))
    server[1][TRAINING[1]] = path.read_bytes()
    for _ in range(2):  # from the server, then from the disk
        found = vit.initial_params(options, 3)
        assert equal(found["cls"], weights["cls"]) and server[2] == TRAINING


def test_photos_take_the_weights_that_know_imagenet(server, tmp_path):
    path = write_safetensors(tmp_path / "x", timm_arrays(seeded_weights(**XS)))
    server[1][PHOTOS[1]] = path.read_bytes()
    noise(20).save(tmp_path / "a.png")
    assert output_of(f"{tmp_path / 'a.png'} --data_dir={tmp_path}") and server[2] == PHOTOS


def test_if_both_places_refuse_the_line_names_both(server, tmp_path, capsys):
    more = f"--model=ViT-B_16 --pretrained=released --data_dir={tmp_path} --logdir={tmp_path}"
    error = refused(f"digits {TINY} {more}", capsys)
    assert error.count("403") == 2 and all(server[0] + place in error for place in TRAINING)


@pytest.mark.parametrize("file, why", [("cut", "50000"), ("login", "<!DOCTYPE"), ("no", "403")])
def test_a_download_that_fails_says_why_and_leaves_no_file(server, tmp_path, file, why):
    server[1].update({"/cut": b"x" * 50_000, "/login": b"<!DOCTYPE html>"})
    urls, options = [f"{server[0]}/{file}"], vit.Options(data_dir=str(tmp_path))
    refusal = pytest.raises(vit.BadInput, vit.fetch, urls, options, vit.load_checkpoint)
    refusal.match(f"{urls[0]}.*{why}")
    assert not [*tmp_path.glob("downloads/*")]


def test_addresses_that_end_alike_are_kept_apart_and_fetched_once(server, tmp_path):
    server[1].update({"/a/y": b"a", "/b/y": b"b"})
    for name in ("a", "b", "a"):
        urls, options = [f"{server[0]}/{name}/y"], vit.Options(data_dir=str(tmp_path))
        assert vit.fetch(urls, options, lambda path: Path(path).read_text()) == name
    assert server[2] == ["/a/y", "/b/y"]  # the third is on the disk


# ---------------------------------------------------------------------------------------- Datasets

RED = Image.new("RGB", (40, 20), (200, 30, 30))


@pytest.mark.parametrize(
    "image, kind, turned",
    [(RED, kind, 0) for kind in ("jpeg", "png", "webp", "bmp", "tiff", "gif")]
    + [(RED.convert(mode), "png", 0) for mode in ("L", "P", "1", "RGBA")]
    + [(RED.convert("CMYK"), "jpeg", 0), (RED, "jpeg", 6)],  # 6: the camera, by a quarter
)
def test_pictures_of_every_kind_become_upright_rgb(tmp_path, image, kind, turned):
    exif = Image.Exif()
    exif[0x0112] = turned
    image.save(tmp_path / "x", kind, **({"exif": exif} if turned else {}))
    read = vit.decode(tmp_path / "x", "x")
    assert read.mode == "RGB" and read.size == ((20, 40) if turned else (40, 20))
    assert_allclose(np.mean(read, (0, 1)), np.mean(image.convert("RGB"), (0, 1)), atol=6)


@pytest.mark.parametrize("kind", [np.uint16, np.int32, np.float32])
def test_pictures_of_more_than_8_bits_are_refused(tmp_path, kind):
    Image.fromarray(np.full((8, 8), 300, kind)).save(tmp_path / "x.tiff")
    pytest.raises(vit.BadInput, vit.decode, tmp_path / "x.tiff", "a name").match("a name.*8 bits")


def test_digits_are_labelled_as_drawn_and_tested_on_digits_never_trained_on():
    data = vit.load_data("digits", vit.Options())
    assert data["classes"] == [*"0123456789"] and vit.draw_digit(8007)[1] == 7
    assert (len({*data["train"]}), len({*data["test"]} - {*data["train"]})) == (8000, 1000)


def test_every_tenth_picture_of_a_folder_is_for_testing_in_any_order_of_the_disk(
    tmp_path, monkeypatch
):
    root, unsorted = picture_folder(tmp_path, train=20) / "train", glob.glob
    data = vit.image_folder(root)
    monkeypatch.setattr(glob, "glob", lambda *a, **k: unsorted(*a, **k)[::-1])
    assert [vit.image_folder(root)[x] for x in ("train", "test")] == [data["train"], data["test"]]
    assert not {*data["train"]} & {*data["test"]}
    for split, count in (("train", 18), ("test", 2)):  # of each class
        labels = [label for _, label in map(data["read"], data[split])]
        assert labels == [0] * count + [1] * count


@pytest.mark.parametrize("split", ["test", "val", "validation"])
def test_folders_may_hold_links_capital_endings_and_what_is_no_picture(tmp_path, split):
    root = picture_folder(tmp_path / "data")
    (root / "test").rename(root / split)
    (root / "train/dog").rename(tmp_path / "elsewhere")
    (root / "train/dog").symlink_to(tmp_path / "elsewhere")
    (root / "train/cat/3.png").rename(root / "train/cat/3.PNG")
    for name in ("notes.txt", "._1.png"):
        (root / "train/cat" / name).write_text("what people and macOS leave")
    shutil.copytree(tmp_path / "elsewhere", root / "train/.ipynb_checkpoints")
    data = vit.image_folder(root)
    assert data["classes"] == ["cat", "dog"] and (len(data["train"]), len(data["test"])) == (16, 10)
    assert [label for _, label in map(data["read"], data["train"])] == [0] * 8 + [1] * 8


@pytest.mark.parametrize("name", ["cifar-10", "cifar-100"])
def test_cifar_is_98_percent_of_the_authors_archive_which_is_verified(name, tmp_path, monkeypatch):
    r, coarse = np.random.RandomState(0), [7] if name == "cifar-100" else []  # before each label
    images, labels = r.randint(0, 256, (60, 32, 32, 3)), r.randint(0, 10, 60)
    rows = [bytes([*coarse, labels[i], *images[i].transpose(2, 0, 1).ravel()]) for i in range(60)]
    files = {f"data_batch_{i}.bin": rows[10 * i - 10 : 10 * i] for i in range(1, 6)}
    files = {"train.bin": rows[:50]} if coarse else files
    files |= {"test.bin" if coarse else "test_batch.bin": rows[50:]}
    files |= {"fine_label_names.txt" if coarse else "batches.meta.txt": [b"zero\none\n\n"]}
    folder, options = tmp_path / f"{name}-binary", vit.Options(data_dir=str(tmp_path))
    folder.mkdir()
    for file, parts in files.items():
        (folder / file).write_bytes(b"".join(parts))
    archive = Path(shutil.make_archive(folder, "gztar", tmp_path, folder.name)).read_bytes()
    assert vit.KRIZ == "https://www.cs.toronto.edu/~kriz/"
    monkeypatch.setattr(vit, "KRIZ", f"{tmp_path.as_uri()}/")
    name = name.replace("-", "")
    monkeypatch.setitem(vit.CIFAR, name, hashlib.sha256(archive).hexdigest())
    data = vit.load_data(name, options)
    assert data["classes"] == ["zero", "one"]
    for split, places in (("train", range(49)), ("test", range(50, 60))):
        for (image, label), i in zip(map(data["read"], data[split]), places, strict=True):
            assert np.array_equal(image, images[i]) and label == labels[i]
    [file] = tmp_path.glob("downloads/*.gz")
    file.write_bytes(archive[:-100])
    pytest.raises(vit.BadInput, vit.load_data, name, options).match(f"{file}.*delete it")


@pytest.mark.parametrize(
    "name, counts, train, tested",
    [("one", {"train": 20}, 18, range(20))]
    + [("two", {"train": 20, "validation": 5}, 20, range(100, 105))]
    + [("all", {"train": 20, "validation": 5, "test": 3}, 20, range(200, 203))]
    + [("unlabelled", {"train": 20, "validation": 5, "test": -3}, 20, range(100, 105))],
)
def test_tfds_sets_need_no_tensorflow_and_are_tested_on_labelled_images_never_trained_on(
    tmp_path, name, counts, train, tested
):
    pytest.importorskip("array_record")  # not for Windows
    import tensorflow_datasets as tfds

    def examples(first, count):
        for i in range(first, first + abs(count)):
            Image.new("L", (28, 28), i).save(tmp_path / "x.png")
            yield i, {"image": tmp_path / "x.png", "label": i % 10 if count > 0 else -1}

    firsts = {"train": 0, "validation": 100, "test": 200}
    make = lambda *_: {x: examples(firsts[x], count) for x, count in counts.items()}  # noqa: E731
    kind = type(f"Vit_{name}", (tfds.testing.DummyMnist,), {"_split_generators": make})
    kind(data_dir=tmp_path, file_format="array_record").download_and_prepare()
    data = vit.load_data(kind.name, vit.Options(data_dir=str(tmp_path)))
    assert "tensorflow" not in sys.modules and [*data["classes"]] == [*"0123456789"]
    read = {x: [data["read"](data[x][i]) for i in range(len(data[x]))] for x in ("train", "test")}
    read = {x: {image.getpixel((0, 0))[0]: label for image, label in read[x]} for x in read}
    assert all(label == i % 10 for i, label in (read["train"] | read["test"]).items())
    assert len(read["train"]) == train and len(read["test"]) == (len(tested) if train == 20 else 2)
    assert {*read["test"]} <= {*tested} - {*read["train"]}


def test_imagenet_is_trained_on_99_percent_and_tested_on_validation(monkeypatch):
    import tensorflow_datasets as tfds

    builder = mock.MagicMock()
    builder.name, builder.info.splits = "imagenet2012", ["train", "validation", "test"]
    builder.info.features = {"image": 0, "label": mock.Mock(names=["a", "b"])}
    builder.as_data_source = lambda split, **_: [{"label": -(split == "test"), "split": split}]
    monkeypatch.setattr(tfds, "builder", lambda *_, **__: builder)
    data = vit.load_data("imagenet2012", vit.Options())
    assert [data[x][0]["split"] for x in ("train", "test")] == ["train[:99%]", "validation"]


# ------------------------------------------------------------------------------------------ Photos


@pytest.fixture
def photos(tmp_path, monkeypatch):
    """What is printed for two photos with a checkpoint for 32 pixels; its logits and attention."""
    monkeypatch.chdir(tmp_path)
    params, inputs = seeded_params(classes=7), []
    vit.save_checkpoint("x.npz", params, class_names=[*"abcdefg"])
    for name, left in (("a.jpg", -2), ("b.png", -1)):
        Image.effect_mandelbrot((90, 60), (left, -1, 1, 1), 50).convert("RGB").save(name)
        inputs.append(Image.open(name).resize((32, 32), Image.Resampling.BILINEAR))
    logits, weights = with_attention(params, pixels_of(np.stack(inputs)))
    return output_of("a.jpg b.png --pretrained=x.npz"), np.float64(logits), np.float64(weights)


def test_photos_get_the_names_and_percents_of_the_checkpoint_at_its_size(photos):
    out, logits, _ = photos
    found = re.findall(r"(\S+)%  (\S)$", out, re.M)
    shares = 100 * scipy.special.softmax(logits, axis=-1)
    likeliest = np.argsort(-shares, axis=-1)[:, :5]
    assert [name for _, name in found] == [[*"abcdefg"][i] for i in likeliest.ravel()]
    expected = np.take_along_axis(shares, likeliest, axis=-1).ravel()
    assert_allclose([float(share) for share, _ in found], expected, atol=0.006)


def test_each_photo_is_drawn_beside_itself_lit_by_the_flow_of_attention(photos):
    _, _, weights = photos
    for i, photo in enumerate(("a.jpg", "b.png")):
        first, second = (0.5 * block.mean(0) + 0.5 * np.eye(17) for block in weights[:, i])
        patches = (second @ first)[0, 1:].reshape(4, 4)
        light = 26 + 229 * np.minimum(1, patches / np.percentile(patches, 99))
        light = Image.fromarray(light.astype(np.uint8)).resize((90, 60), Image.Resampling.BILINEAR)
        left, right = np.hsplit(np.asarray(Image.open(f"{photo}-attention.png"), float), 2)
        assert np.array_equal(left, Image.open(photo)) and right.std() > 5
        assert abs(right - left * np.asarray(light)[..., None] / 255).max() < 4


def test_a_checkpoint_of_1000_classes_is_taken_for_one_of_imagenet(photos):
    weights = seeded_weights(classes=1000)
    weights["head/bias"][[0, 207, 999]] = 30, 28, 26
    np.savez("y.npz", **weights)
    names = re.findall(r"%  (.{16})", output_of("a.jpg --pretrained=y.npz"))
    assert names[:3] == ["tench, Tinca tin", "golden retriever", "toilet tissue, t"]


# -------------------------------------------------------------------------------- The command line

BIAS = "Transformer/encoderblock_1/LayerNorm_2/bias"
QUERY = "Transformer/encoderblock_0/MultiHeadDotProductAttention_1/query/kernel"


@pytest.fixture(scope="module")
def bad(tmp_path_factory):
    """A folder of files and folders, each with one thing that is bad."""
    root, flat = tmp_path_factory.mktemp("bad"), seeded_weights(**XS)
    bad = {"pickled cls": np.array([{}], object), "registers registers": np.ones(1, "f")}
    bad |= {"half pre_logits/kernel": np.eye(64, dtype="f"), f"nan {BIAS}": np.full(64, np.nan)}
    bad |= {f"misshapen {BIAS}": np.zeros(7, "f"), f"heads {QUERY}": np.ones((64, 9, 1), "f")}
    bad |= {f"ints {BIAS}": np.zeros(64, int)}
    bad |= {"names class_names": np.array(["cat"]), "others class_names": np.array([*"ab"])}
    for names, array in (bad | {"good cls": flat["cls"]}).items():
        file, name = names.split()
        np.savez(root / f"{file}.npz", **flat | {name: array})
    np.savez(root / "nothing.npz", x=np.zeros(3))
    np.savez(root / "missing.npz", **{k: v for k, v in flat.items() if k != BIAS})
    np.savez(root / "gap.npz", **{k.replace("k_1/", "k_2/"): v for k, v in flat.items()})
    good = (root / "good.npz").read_bytes()
    for name, data in (("empty", b""), ("text", b"hello"), ("cut", good[:-9000])):
        (root / f"{name}.npz").write_bytes(data)
    shutil.copy(root / "good.npz", root / "checkpoint.npz")
    for name in ("good", "one", "unknown", "cut_image"):
        picture_folder(root / name, classes=("cat", "dog")[: 1 if name == "one" else 2])
    (root / "unknown/test/dog").rename(root / "unknown/test/wolf")
    (root / "cut_image/train/dog/3.png").write_bytes(b"\x89PNG")
    (root / "no_images/train/cat").mkdir(parents=True)
    Image.new("1", (20_000, 20_000)).save(root / "bomb.png")
    noise(8).save(root / "x.png")
    return root


BAD_COMMANDS = """ digits --modle=ViT-B_16: --modle | digits --model=ViT-Q_16: ViT-Q_16
    digits --model=B_16: B_16 | digits --model=ViT-XS_0: ViT-XS_0 | digits --dtype=float16: dtype
    digits --decay_type=step: step | digits --augment=all: all | digits --total_steps=many: many
    digits --total_steps=0: steps=0 | digits --total_steps=4294967296: total | cifra10: cifra10
    digits --batch_size=0: size=0 | digits --batch_size=9: size=9 | digits --base_lr=-1: base_lr=-1
    digits --base_lr=nan: base_lr=nan | digits --image_size=7: size=7 | digits --dropout=1.5: 1.5
    digits --warmup_steps=30: steps=30 | digits --seed=18446744073709551616: --seed
    digits --mixup_alpha=inf: mixup | digits --mixup_alpha=0.2 --batch_size=8: mixup_alpha
    digits --num_processes=2: --coordinator_address | digits --coordinator_address=foo: 'foo'
    digits --coordinator_address=127.0.0.1:abc: 127.0.0.1:abc | digits --eval_only: runs/digits
    digits --pretrained=released --model=ViT-S_14: ViT-S_14 | good --pretrained=absent: absent
    digits --eval_only --pretrained=good.npz: good.npz | good --pretrained=pickled.npz: allow_pickle
    good --pretrained=registers.npz: registers | good --pretrained=half.npz: pre_logits/bias
    good --pretrained=misshapen.npz: (7,) | good --pretrained=nan.npz: LayerNorm_2/bias
    good --pretrained=ints.npz: LayerNorm_2/bias
    good --pretrained=heads.npz: heads.npz | x.png --pretrained=names.npz: names.npz
    good --pretrained=empty.npz: empty.npz | good --pretrained=text.npz: text.npz
    good --pretrained=cut.npz: cut.npz | good --pretrained=nothing.npz: nothing.npz
    good --pretrained=gap.npz: encoderblock_1 | good --pretrained=missing.npz: LayerNorm_2/bias
    good --pretrained=good.npz --image_size=7: size=7
    good --pretrained=others.npz --eval_only: other classes | good --pretrained=: No such file
    good --pretrained=http://127.0.0.1:9/v.npz --data_dir=cache: http://127.0.0.1:9/v.npz
    CIFAR10: CIFAR10 | no_images: no_images | nothere.jpg: nothere.jpg | one: 'cat'
    no/such/folder: no/such/folder | good --logdir=.: checkpoint.npz | unknown: 'wolf'
    cut_image --pretrained=none: dog/3.png | text.npz digits: text.npz digits
    text.npz --pretrained=good.npz: text.npz | bomb.png --pretrained=good.npz: bomb.png"""


@pytest.mark.parametrize("case", re.split(r"\s*\n\s*|\s*\|\s*", BAD_COMMANDS.strip()))
def test_bad_input_is_one_line_and_status_2(case, bad, capsys, monkeypatch):
    monkeypatch.chdir(bad)
    command, words = case.rsplit(": ", 1)
    error = refused(TINY.removeprefix("--pretrained=none ") + command, capsys)
    assert words in error and len(error) < 620


def test_help_explains_every_option_with_its_default(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")
    with pytest.raises(SystemExit, match="0"):
        vit.main(["--help"])
    out = " ".join(capsys.readouterr().out.split())
    for field in dataclasses.fields(vit.Options):
        assert re.search(rf"--{field.name} .*\S \({re.escape(str(field.default))}\)", out)


def test_the_file_runs_when_it_is_piped_into_python(learned, tmp_path):
    process = start(f"- {learned[1]} --logdir={tmp_path}")
    status, out, _ = finish(process, Path(vit.__file__).read_text())
    assert status == 0 and out.count("test accuracy 100.00%") == 2


def test_the_module_works_from_inside_a_zip(learned, tmp_path):
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.write(vit.__file__, "zipped.py")
    process = start(f"-m zipped {learned[1]} --logdir={tmp_path}", PYTHONPATH=f"{tmp_path}/x.zip")
    status, out, _ = finish(process)
    assert status == 0 and out.count("test accuracy 100.00%") == 2


def test_the_head_of_the_file_asks_for_what_requirements_txt_asks_for():
    source = Path(vit.__file__)
    block = source.read_text().split("# ///")[1].split("dependencies")[1]
    lines = source.with_name("requirements.txt").read_text().splitlines()
    assert re.findall('"(.*?)"', block) == [line.split("#")[0].strip() for line in lines]


# ---------------------------------------------------------------------------------------- README

README = Path(vit.__file__).with_name("README.md").read_text()


def test_the_readme_names_the_lines_where_parts_begin_and_shows_code_as_it_is():
    source = Path(vit.__file__).read_text()
    found = re.findall(r"(\d+\. [A-Z][\w, ]+?) \((\d+)\)", " ".join(README.split()))
    lines = source.splitlines()
    heads = [(x.strip("# -"), str(i)) for i, x in enumerate(lines, 1) if x.startswith("# -----")]
    assert found == heads and len(heads) == 12
    [shown] = re.findall(r"```python\n(.*?)```", README, re.S)
    assert shown in source


def test_the_recipes_of_the_readme_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("sgd_init", "sgd_update"):
        monkeypatch.setattr(vit, name, getattr(vit, name))  # put back after AdamW
    params = vit.init_params(jax.random.key(0), "ViT-XS_8", 32, 10)
    params["head"]["kernel"] = jax.random.normal(jax.random.key(1), (64, 10))
    vit.save_checkpoint("runs/digits/checkpoint.npz", params)
    [recipes] = re.findall(r"```python recipes\n(.*?)```", README, re.S)
    recipes = recipes.split("\n\n")
    assert len(recipes) == 5 and all(recipe.count("\n") <= 8 for recipe in recipes)
    short = '"--logdir=runs/adamw", "--total_steps=2", "--warmup_steps=1"'
    names = {}
    for recipe in recipes:
        exec(recipe.replace('"--logdir=runs/adamw"', short), names)
    out = capsys.readouterr().out
    assert float(re.search(r"linear probe: ([\d.]+)%", out)[1]) > 30  # by chance 10
    assert len(re.findall(r"^\d: [\d.]+%$", out, re.M)) == 10
    assert Image.open("mistakes.png").size == (8 * 32, 32)
    wrong = names["probabilities"].argmax(1) != names["test_labels"]
    sure = names["probabilities"].max(1)[names["surest"]]
    assert wrong[names["surest"]].all() and sure[0] == names["probabilities"].max(1)[wrong].max()
    assert "train/momentum/1/head/kernel" in vit.read_arrays(
        "runs/adamw/checkpoint.npz"
    )  # two of each array
