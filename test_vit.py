# SPDX-License-Identifier: Apache-2.0
"""What vit.py promises, checked: pytest test_vit.py (about two minutes on two CPU cores).

Expected numbers are the original's (google-research/vision_transformer at c6de1e5, float32), or
come from NumPy, SciPy, Pillow or timm, or from a second way to the same result.
"""

import atexit
import functools
import glob
import hashlib
import http.client
import io
import itertools
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
import zipfile
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp()  # for this run of the tests alone
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"  # before JAX starts

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
SOURCE = Path(vit.__file__).read_text()
README = Path(vit.__file__).with_name("README.md").read_text()
IMAGES = np.random.RandomState(1).uniform(-1, 1, (4, 32, 32, 3)).astype(np.float32)
TARGETS = np.eye(5, dtype=np.float32)[[1, 4, 2, 0]]
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
forward = jax.jit(vit.forward)
with_attention = jax.jit(functools.partial(vit.forward, return_attention=True))


@functools.partial(jax.jit, static_argnames=("remat", "rate"))
@jax.value_and_grad
def loss_and_gradient(params, images, targets, remat=False, key=None, rate=0.0):
    return vit.cross_entropy(vit.forward(params, images, key, rate, remat), targets)


def equal(a, b):
    """Whether two trees hold the same bits, and any."""
    same = jax.tree.map(lambda x, y: x.dtype == y.dtype and np.array_equal(x, y), a, b)
    return jax.tree.leaves(same) != [] and jax.tree.all(same)


def all_close(a, b, atol):
    assert jax.tree.leaves(a)
    jax.tree.map(lambda x, y: assert_allclose(x, y, atol=atol), a, b)


def noise(size, seed=0):
    return Image.fromarray(np.random.RandomState(seed).randint(0, 256, (size, size, 3), np.uint8))


def picture_folder(root, train=8):
    """A folder of dark cats and light dogs, which a run of a second learns to tell apart."""
    for i in range(train + 5):  # the last five are for testing
        for label, name in enumerate(("cat", "dog")):
            path = Path(root, "train" if i < train else "test", name, f"{i}.png")
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.asarray(noise(16 + i, i)) // 3 + np.uint8(150 * label)).save(path)
    return Path(root)


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
    """Every test runs in an empty folder of its own, which is also the user's home."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))


@pytest.fixture
def run(capsys):
    """Runs a command: returns what it prints or, if it is to fail, its one line of error."""

    def run(command, status=0):
        assert vit.main(command.split()) == status
        out, error = capsys.readouterr()
        assert status == 0 or re.fullmatch("vit.py: .*\n", error), error
        return error if status else out

    return run


def metrics(logdir):
    return [row.split(",") for row in Path(logdir, "metrics.csv").read_text().splitlines()]


def result(logdir):
    """All that a run leaves behind, but for the images per second."""
    arrays = vit.read_arrays(Path(logdir, "checkpoint.npz"))
    rows = [row[:3] + row[4:] for row in metrics(logdir)]  # also in train/run
    return {name: x.tobytes() for name, x in arrays.items() if name != "train/run"}, rows


def start(arguments, devices=1):
    """Starts Python in a process of its own."""
    environment = {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
    environment |= {"JAX_PLATFORMS": "cpu", "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo"}
    pipes = {name: subprocess.PIPE for name in ("stdin", "stdout", "stderr")}
    command = [sys.executable, *arguments.split()]
    return subprocess.Popen(command, text=True, env=os.environ | environment, **pipes)


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
LOSSES = [1.5707833, 1.5707833, 1.4806235, 1.2611428, 1.1061978]  # before each of five updates
UPDATED = [0.6176054, 0.5241724, 0.29380584, -0.9033976, 0.2977193]  # the logits after them
GRADIENTS = """ 0.126349  0.027935  0.145475  0.005826  0.063795 -0.166069
     0.351390 -0.377218  0.173236  0.581771  0         0.088451 -0.003554  1.348437  0.001189
    -0.030801 -0.211105 -1.400027  0.063067 -0.019732 -0.077804 -0.088163 -0.019895  0.145312
    -0.039812  0.585964  0        -0.307931  0.459707  0.005924 -0.019317 -0.090996  0.243097
    -0.590395 -0.642435 -0.179350  0.056561 -1.730072 -0.368995  1.325776"""


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


@pytest.mark.parametrize("remat", [False, True])
def test_the_loss_and_every_gradient_equal_the_original_with_remat_and_without(params, remat):
    loss, grads = jax.device_get(loss_and_gradient(params, IMAGES, TARGETS, remat))
    assert abs(loss - LOSSES[0]) < 1e-5
    assert_golden(vit.to_released(grads))


def test_five_updates_with_accumulation_equal_the_original(params):
    # Without this option XLA may keep more bits of a bfloat16 than it has.
    exactly = {"xla_allow_excess_precision": False}
    update = jax.jit(vit.sgd_update, compiler_options=exactly)
    clip, momentum = jax.jit(vit.clip_by_global_norm), vit.sgd_init(params)
    for step, expected in enumerate(LOSSES):
        halves = [loss_and_gradient(params, IMAGES[h], TARGETS[h]) for h in ([0, 1], [2, 3])]
        loss, grads = jax.tree.map(lambda *x: sum(x) / 2, *halves)
        assert abs(loss - expected) < 1e-5
        rate = vit.learning_rate(step, 0.03, 5, 2)
        params, momentum = update(params, momentum, clip(grads, 1.0), rate)
    assert_allclose(forward(params, IMAGES)[0], UPDATED, atol=1e-5)


@pytest.mark.skipif("UPSTREAM" not in os.environ, reason="UPSTREAM names no copy of the original")
def test_the_original_computes_these_numbers_again(monkeypatch):
    needed = "flax", "optax", "scipy.ndimage", "flax.training.checkpoints"
    flax, optax, _, _ = map(pytest.importorskip, needed)
    monkeypatch.syspath_prepend(os.environ["UPSTREAM"])
    idle = "tensorflow.io clu pandas tqdm vit_jax.input_pipeline vit_jax.models tensorflow"
    idle = {name: mock.MagicMock(**{"gfile.GFile": open}) for name in idle.split()}
    with mock.patch.dict(sys.modules, idle):
        from vit_jax import checkpoint, models_vit, train, utils
    sizes = dict(num_layers=2, mlp_dim=64, num_heads=4, dropout_rate=0, attention_dropout_rate=0)
    model = models_vit.VisionTransformer(5, mock.Mock(size=(8, 8)), sizes, hidden_size=32)
    np.savez("x.npz", **seeded_weights())
    params = checkpoint.load("x.npz")
    table = params["Transformer"]["posembed_input"]
    stored = table["pos_embedding"]
    for size in (16, 48, 32):
        table["pos_embedding"] = checkpoint.interpolate_posembed(stored, 1 + size**2 // 64, True)
        logits = model.apply({"params": params}, golden_images(size), train=False)
        assert_allclose(logits[0], LOGITS[size], atol=1e-5)
    batch = {"image": IMAGES[None], "label": TARGETS[None]}
    schedule = utils.create_learning_rate_schedule
    assert_allclose(schedule(10_000, 0.03, "cosine", 500)(1500), 0.02918726, atol=1e-7)
    sgd = optax.sgd(schedule(5, 0.03, "cosine", 2), momentum=0.9, accumulator_dtype="bfloat16")
    tx = optax.chain(optax.clip_by_global_norm(1.0), sgd)  # below, outside of jit, because that
    keep = optax.GradientTransformation(None, lambda grads, _: (grads, grads))  # keeps more bits
    step = train.make_update_fn(apply_fn=model.apply, accum_steps=2, tx=keep)
    state = tx.init(params)
    for i, expected in enumerate(LOSSES):
        inputs = jax.tree.map(lambda x: np.asarray(x)[None], params)  # for one device
        _, grads, loss, _ = step(inputs, np.zeros(1), batch, jax.random.key(0)[None])
        assert_allclose(loss, expected, atol=1e-5)
        grads = jax.tree.map(lambda x: np.asarray(x)[0], grads)
        if i == 0:
            assert_golden(flax.traverse_util.flatten_dict(grads, sep="/"))
        updates, state = tx.update(grads, state)
        params = optax.apply_updates(params, updates)
    logits = model.apply({"params": params}, IMAGES, train=False)
    assert_allclose(logits[0], UPDATED, atol=1e-5)


def test_the_learning_rate_rises_in_a_line_and_falls_in_a_cosine_or_a_line():
    steps, rates = np.array([0, 250, 500, 1500, 5250, 10_000]), {}
    rates["cosine"] = [0, 0.015, 0.03, 0.02918726, 0.015, 0]  # the fourth is the original's
    rates["linear"] = [0, 0.015, 0.03, 0.02684316, 0.015005, 1e-5]
    for kind, expected in rates.items():
        assert_allclose(vit.learning_rate(steps, 0.03, 10_000, 500, kind), expected, atol=1e-8)
        without_warmup = vit.learning_rate(steps[2:] - 500, 0.03, 9500, 0, kind)
        assert_allclose(without_warmup, expected[2:], atol=1e-8)


def test_the_recipe_is_the_published_one_and_digits_have_their_own():
    # google-research/vision_transformer, vit_jax/configs/common.py: get_config and DATASET_PRESETS;
    # base_lr as in its README's table of results. For the splits, see Datasets below.
    published = dict(batch_size=512, accum_steps=8, base_lr=0.03, decay_type="cosine", dropout=0.0)
    published |= dict(warmup_steps=500, grad_norm_clip=1.0, eval_every=100, log_every=10)
    published |= dict(total_steps=10_000, image_size=384, dtype="float32", mixup_alpha=0.0)
    published |= dict(augment="inception")
    digits = dict(model="ViT-XS_8", pretrained="none", image_size=32, augment="none", base_lr=0.1)
    digits |= dict(batch_size=64, accum_steps=1, total_steps=800, warmup_steps=100)
    recipes = dict(cifar10=published, cifar100=published, digits=digits)
    recipes["imagenet2012:5.1.0"] = published | {"total_steps": 20_000}
    for data, recipe in recipes.items():
        *_, options = vit.parse_options([data])
        assert recipe.items() <= vars(options).items(), data


def test_released_models_are_called_as_timm_calls_them():
    words = {"Ti": "tiny", "S": "small", "B": "base", "L": "large", "H": "huge"}
    names = [re.fullmatch(r"ViT-(\w+)_(\d+)", name).groups() for name in vit.PRE_TRAINED]
    later = {("Ti", "16"), ("S", "32"), ("S", "16"), ("B", "8")}  # of arXiv 2106.10270
    for (size, patch), timm in zip(names, vit.PRE_TRAINED.values(), strict=True):
        training = "augreg" if (size, patch) in later else "orig"
        assert timm == f"vit_{words[size]}_patch{patch}_224.{training}_in21k"
    for name, timm in vit.FINE_TUNED.items():  # B_32 and L_16 of the paper are not there
        base, training = vit.PRE_TRAINED[name].removesuffix("_in21k").split("_224.")
        training = "augreg" if name in ("ViT-B_32", "ViT-L_16") else training
        assert timm == f"{base}_384.{training}_in21k_ft_in1k"


@pytest.mark.parametrize(
    "model, count",
    [("Ti_16", 5_717_416), ("S_16", 22_050_664), ("B_16", 86_567_656), ("B_32", 88_224_232)]
    + [("L_16", 304_326_632), ("L_32", 306_535_400), ("H_14", 632_045_800)],
)
def test_models_have_the_published_number_of_parameters(model, count):
    shapes = jax.eval_shape(lambda: vit.init_params(jax.random.key(0), f"ViT-{model}", 224, 1000))
    assert sum(p.size for p in jax.tree.leaves(shapes)) == count


def test_names_and_shapes_are_those_of_the_released_file():
    params = jax.eval_shape(lambda: vit.init_params(jax.random.key(0), "ViT-B_16", 384, 1000))
    shapes = {name: x.shape for name, x in jax.eval_shape(vit.to_released, params).items()}
    assert shapes == released_shapes(16, 768, 12, 12, 3072, 577, 1000)


def test_initial_parameters_have_the_original_distributions_and_numbers_of_their_own():
    init = jax.jit(vit.init_params, static_argnums=(1, 2, 3))
    normal, bound = scipy.stats.norm, lambda limit: scipy.stats.uniform(-limit, 2 * limit)
    expected = {  # what a name is like: its distribution; all others are zeros or ones
        "MultiHead.*kernel": bound((6 / (64 + 64)) ** 0.5),  # the heads together
        "MlpBlock.*kernel": bound((6 / (64 + 256)) ** 0.5),
        "MlpBlock.*bias": normal(0, 1e-6),
        "pos_embedding": normal(0, 0.02),
        "^embedding.*kernel": scipy.stats.truncnorm(-2, 2, 0, (3 * 8**2) ** -0.5 / 0.8796),
    }
    starts = []
    for seed in (0, 1):
        params = jax.device_get(init(jax.random.key(seed), "ViT-XS_8", 128, 10))
        for name, x in vit.to_released(params).items():
            known = [one for pattern, one in expected.items() if re.search(pattern, name)]
            assert known or np.all(x == name.endswith("scale")), name
            for distribution in known:
                assert scipy.stats.kstest(x.ravel(), distribution.cdf).pvalue > 1e-3, name
                starts.append(x.ravel()[:64])
    alike = np.corrcoef(starts) - np.eye(2 * 18)  # near 1 for arrays made with the same key
    assert abs(alike).max() < 0.6


# --------------------------------------------------------------------------------------- The model


def test_layer_norm_computes_in_float32_whatever_it_is_given():
    x = (100 + np.random.RandomState(0).standard_normal((5, 64))).astype(jnp.bfloat16)
    found = jax.jit(vit.layer_norm)(x, np.ones(64, "f"), np.zeros(64, "f"))
    assert found.dtype == jnp.bfloat16
    assert_allclose(np.float64(found), scipy.stats.zscore(np.float64(x), axis=-1), atol=0.02)


def attend(q, k, v):
    """Attention written out: [B, N, A, E] each -> [B, N, A, E], and its weights."""
    weights = jax.nn.softmax(jnp.einsum("bqae,bkae->baqk", q, k) / 8**0.5)
    return jnp.einsum("baqk,bkae->bqae", weights, v), weights


@functools.partial(jax.jit, static_argnums=2)
def written_out(params, key, rate):
    """The model written out, for IMAGES: its logits, and the attention weights of its blocks."""

    def dropout(x, key):  # zeroes a share of the entries and keeps the mean
        return x * jax.random.bernoulli(key, 1 - rate, x.shape) / (1 - rate)

    encoder, all_weights = params["Transformer"], []
    x = vit.patch_embedding(IMAGES, **params["embedding"])
    x = jnp.concatenate([jnp.broadcast_to(params["cls"], (4, 1, 32)), x], axis=1)
    first, *keys = jax.random.split(key, 3)
    x = dropout(x + encoder["posembed_input"]["pos_embedding"], first)
    for i, key in enumerate(keys):
        block = jax.tree.map(lambda p, i=i: p[i], encoder["encoderblock"])
        one, two, three = jax.random.split(key, 3)
        heads, layers = block["MultiHeadDotProductAttention_1"], block["MlpBlock_3"]
        y = vit.layer_norm(x, **block["LayerNorm_0"])
        qkv = (vit.linear(y, **heads[part]) for part in ("query", "key", "value"))
        y, weights = attend(*(z.reshape(4, 17, 4, 8) for z in qkv))
        all_weights.append(weights)
        x += dropout(vit.linear(y.reshape(4, 17, 32), **heads["out"]), one)
        y = vit.layer_norm(x, **block["LayerNorm_2"])
        y = dropout(jax.nn.gelu(vit.linear(y, **layers["Dense_0"])), two)
        x += dropout(vit.linear(y, **layers["Dense_1"]), three)
    x = vit.layer_norm(x, **encoder["encoder_norm"])[:, 0]
    return vit.linear(x, **params["head"]), jnp.stack(all_weights)


def test_dropout_comes_after_embeddings_attention_gelu_and_mlp(params):
    key, dropping = jax.random.key(7), jax.jit(functools.partial(vit.forward, dropout_rate=0.3))
    logits, _ = written_out(params, key, 0.3)
    assert_allclose(dropping(params, IMAGES, key), logits, atol=1e-5)


def test_attention_weights_say_where_each_token_looks_and_change_no_logit(params):
    found = with_attention(params, IMAGES)
    all_close(found, written_out(params, jax.random.key(0), 0.0), 1e-5)
    assert_allclose(found[0], forward(params, IMAGES), atol=1e-6)


def test_fused_attention_and_its_gradients_equal_attention_written_out(monkeypatch):
    def on_a_cpu(*qkv, implementation, attend=jax.nn.dot_product_attention, **lengths):
        return attend(*qkv, implementation="xla", **lengths)

    monkeypatch.setattr(jax.nn, "dot_product_attention", on_a_cpu)
    *qkv, direction = np.random.RandomState(0).standard_normal((4, 2, 17, 4, 8)).astype(np.float32)
    values, backward = jax.vjp(jax.jit(vit.fused_attention), *qkv)
    expected, expected_backward, _ = jax.vjp(attend, *qkv, has_aux=True)
    all_close((values, backward(direction)), (expected, expected_backward(direction)), 1e-6)


@pytest.mark.parametrize(
    "kind, capability, dtype",
    [("NVIDIA A100", "8.0", "bfloat16"), ("NVIDIA A100", "8.0", "float32")]
    + [("NVIDIA GeForce RTX 2080", "7.5", "bfloat16"), ("TPU v5e", "-", "bfloat16")],
)
def test_attention_is_fused_where_cudnn_can_do_it(params, monkeypatch, kind, capability, dtype):
    device = SimpleNamespace(device_kind=kind, compute_capability=capability)
    monkeypatch.setattr(jax, "devices", lambda: [device])
    fused = mock.Mock(side_effect=lambda q, k, v: v)
    monkeypatch.setattr(vit, "fused_attention", fused)
    jax.eval_shape(vit.forward, params, jnp.asarray(IMAGES, dtype))
    assert fused.called == (capability == "8.0" and dtype == "bfloat16")


def test_with_bfloat16_softmax_and_logits_stay_in_float32(params):
    logits, weights = jax.device_get(with_attention(params, jnp.asarray(IMAGES, jnp.bfloat16)))
    assert_allclose(logits, forward(params, IMAGES), atol=0.05)
    for x in (logits, weights):  # in float32, and not rounded before
        assert x.dtype == np.float32 and np.mean(x == x.astype(jnp.bfloat16)) < 0.1


def test_the_model_needs_nothing_but_jax_when_it_is_pasted_elsewhere():
    model = SOURCE.split("- 1. Model\n")[1].split("- 2. Learning\n")[0]
    pasted, key = {}, jax.random.key(0)
    exec(f"import jax, jax.numpy as jnp\n{model}", pasted)
    params = jax.eval_shape(lambda: pasted["init_params"](key, "ViT-XS_8", 16, 3))
    images = np.ones((2, 16, 16, 3), np.float32)
    assert jax.eval_shape(lambda p: pasted["forward"](p, images, key, 0.1), params).shape == (2, 3)


# -------------------------------------------------------------------------------------- One update


@pytest.mark.parametrize(
    "flags",
    [{"decay_type": "linear", "grad_norm_clip": 0.1}, {"grad_norm_clip": 100}]
    + [{"dropout": 0.5}, {"mixup_alpha": 0.7}],
    ids=str,
)
def test_an_update_on_eight_devices_is_what_its_description_says(params, flags):
    schedule = {"total_steps": 10, "warmup_steps": 2, "base_lr": 0.1}
    options, r = vit.Options(**flags, **schedule, accum_steps=2, seed=3), np.random.RandomState(0)
    images = r.randint(0, 256, (8, 2, 3, 32, 32, 3), np.uint8)  # devices, parts, images of each
    labels = r.randint(0, 5, (8, 2, 3)).astype(np.int32)
    momentum = jax.tree.map(lambda p: np.full(p.shape, 0.5, jnp.bfloat16), params)
    state = {"params": params, "momentum": momentum, "step": np.int32(6)}
    found, loss, rate = jax.device_get(vit.train_step(state, images, labels, options))

    mixup_key, dropout_key = jax.random.split(jax.random.fold_in(jax.random.key(3), 6))
    share = np.asarray(jax.random.beta(mixup_key, 0.7, 0.7)) if options.mixup_alpha else 1
    pixels, parts = images / np.float32(127.5) - 1, []
    for device in range(8):
        keys = jax.random.split(jax.random.fold_in(dropout_key, device), 2)
        for x, y, key in zip(pixels[device], labels[device], keys, strict=True):
            x, y = (share * z + (1 - share) * z[::-1] for z in (x, np.eye(5)[y]))
            parts.append(loss_and_gradient(params, x, y, key=key, rate=options.dropout))
    expected, grads = jax.tree.map(lambda *x: sum(x) / 16, *jax.device_get(parts))
    norm = np.sqrt(sum(np.vdot(g, g) for g in jax.tree.leaves(grads)))
    scale = min(1, options.grad_norm_clip / norm)
    momentum = jax.tree.map(lambda g: 0.44921875 + scale * g, grads)  # 0.9 in bfloat16 x 0.5
    decayed = {"cosine": 0.1 * np.cos(np.pi / 4) ** 2, "linear": 0.1 + (1e-5 - 0.1) * 4 / 8}
    assert abs(loss - expected) < 1e-5 and abs(rate - decayed[options.decay_type]) < 1e-7
    assert found["step"] == 7
    all_close(found["params"], jax.tree.map(lambda p, m: p - rate * m, params, momentum), 2e-6)
    all_close(found["momentum"], momentum, 2e-3)


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


def numbers(count, image=None):
    """The numbers 0 to count - 1 as data, each a grey of its own, or all one image."""
    read = lambda i: (image or Image.new("RGB", (4, 4), (i, i, i)), i)  # noqa: E731
    return {"train": range(count), "test": range(2), "classes": [*range(count)], "read": read}


@pytest.mark.parametrize("width, height", [(500, 375), (375, 500)])
def test_crops_have_the_distribution_of_the_original(width, height):
    # TensorFlow's sampler, with an area of 5 % or more and an aspect ratio from 3/4 to 4/3: the
    # ratio is uniform, then the height among those that fit.
    rng, at = np.random.default_rng(0), (0, 0.1, 0.25, 0.5, 0.75, 0.9, 1)
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


def test_images_are_interpolated_as_in_the_original_and_averaged_where_they_shrink():
    at = np.clip((np.arange(384) + 0.5) * 32 / 384 - 0.5, 0, 31)
    weights = np.maximum(0, 1 - abs(at[:, None] - np.arange(32)))
    expected = np.einsum("ik,jl,klc->ijc", weights, weights, np.asarray(noise(32)), optimize=True)
    assert abs(vit.to_array(noise(32), 384) - expected).max() < 1.001  # within one grey level
    assert 5 < vit.to_array(noise(64), 8).std() < 15  # of four pixels each: 37 and more


def test_half_of_the_training_images_are_mirrored():
    ramp = Image.linear_gradient("L").rotate(90).convert("RGB")
    images = [vit.training_example(numbers(1, ramp), vit.Options(), 4, i)[0] for i in range(200)]
    assert 70 < sum(int(image[0, 0, 0]) > int(image[0, -1, 0]) for image in images) < 130


def test_each_epoch_shows_every_example_once_in_an_order_of_its_own():
    def labels(start, stop, seed=0):
        arguments = numbers(10), vit.Options(seed=seed), 4
        examples = [vit.training_example(*arguments, i) for i in range(start, stop)]
        assert all(image[0, 0, 0] == label for image, label in examples)
        return [label for _, label in examples]

    assert sorted(labels(0, 10)) == sorted(labels(10, 20)) == [*range(10)]
    assert labels(0, 10) != labels(10, 20) and labels(0, 10) != labels(0, 10, seed=1)


def test_an_example_depends_on_seed_and_index_alone():
    def image(seed, index):
        return vit.training_example(numbers(1, noise(64)), vit.Options(seed=seed), 16, index)[0]

    first, same, *others = image(0, 5), image(0, 5), image(0, 6), image(1, 5)
    assert equal(first, same) and not any(equal(first, other) for other in others)


@pytest.mark.parametrize("label", [-1, 10])
def test_a_label_without_a_class_is_refused(label):
    data = numbers(10) | {"read": lambda i: (noise(4), label)}
    with pytest.raises(vit.BadInput, match=f"label.* {label}"):
        vit.training_example(data, vit.Options(), 4, 0)


def test_hosts_devices_and_parts_share_out_every_place_of_a_batch_in_order(monkeypatch):
    monkeypatch.setattr(jax, "local_device_count", lambda: 2)
    assert vit.batch_positions(8, 2).tolist() == [[[0, 1], [2, 3]], [[4, 5], [6, 7]]]
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(jax, "process_index", mock.Mock(side_effect=(0, 1)))
    both = [vit.batch_positions(16, 2) for _ in range(2)]
    assert np.ravel(both).tolist() == [*range(16)]


def test_batches_come_in_order_and_whole():
    wanted = np.random.RandomState(0).permutation(48).astype(np.int32).reshape(6, 4, 2)
    batches = [*vit.batches(lambda i: (np.full((2, 2, 3), i, np.uint8), i), wanted)]
    assert equal(np.stack([labels for _, labels in batches]), wanted)
    assert equal(np.stack([images[..., 1, 0, 2] for images, _ in batches]), np.uint8(wanted))


# ---------------------------------------------------------------------------------------- Training


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    """A run of 30 updates on pictures, evaluated twice: its folder, and its command."""
    root = tmp_path_factory.mktemp("learned")
    command = f"{picture_folder(root / 'data')} {TINY} --logdir={root / 'run'} "
    assert vit.main(command.split()) == 0
    return SimpleNamespace(logdir=root / "run", command=command)


def test_pictures_are_learned_and_each_update_and_evaluation_is_in_metrics(learned):
    arrays = vit.read_arrays(learned.logdir / "checkpoint.npz")
    assert arrays["class_names"].tolist() == ["cat", "dog"]
    head, *rows = metrics(learned.logdir)
    assert head == ["step", "loss", "learning_rate", "images_per_second", "test_accuracy"]
    assert [row for row in rows if row[4]] == [[n, "", "", "", "1.0"] for n in ("15", "30")]
    updates = np.array([row[:4] for row in rows if not row[4]], float)
    assert updates[:, 0].tolist() == [*range(1, 31)] and updates[-1, 1] < 0.1 < updates[-1, 3]
    assert_allclose(updates[[0, 1], [1, 2]], [np.log(2), 0.1], rtol=1e-5)  # the head was zeros


def test_the_first_updates_the_due_and_the_last_have_a_line_of_progress(run, learned, monkeypatch):
    clock = itertools.count(0, 160)  # 160 seconds pass from one look at it to the next
    monkeypatch.setattr(vit, "time", mock.Mock(perf_counter=clock.__next__))
    out = run(f"{learned.command} --log_every=20 --logdir=new")
    assert "16 images for training and 10 for testing, of 2 classes" in out
    assert re.search(r"^compiling an update of 16 images of 16 x 16 pixels \.\.\.$", out, re.M)
    hint = "(no GPU or TPU found; for a CPU: --model=ViT-Ti_16 --image_size=224)"
    assert re.findall(r"^step (\d+)/30  loss [\d.]+  lr \S+  (.*)$", out, re.M) == [
        ("1", "compiled and computed in 3 min"),
        ("2", f"0.1 images/s  1 h 15 min left, plus evaluations {hint}"),
        ("20", "0.5 images/s  5 min left, plus evaluations"),  # without the evaluation after 15
        ("30", "1.0 images/s  0 s left, plus evaluations"),
    ]
    [(loss, rate)] = re.findall(r"^step 20/30  loss (\S+)  lr (\S+)", out, re.M)
    [row] = [row for row in metrics("new") if row[0] == "20"]
    assert abs(float(loss) - float(row[1])) < 1e-4 and float(rate) == float(f"{float(row[2]):.2e}")
    assert float(row[3]) == 0.5 and out.count("test accuracy 100.00% of 10 images\n") == 2


def test_the_first_images_are_drawn_as_the_model_sees_them(learned):
    data = vit.load_data(learned.command.split()[0], vit.Options())
    images = [data["read"](data["train"][i])[0] for i in vit.epoch_order(0, 0, 16)[:8]]
    expected = np.hstack([image.resize((16, 16), Image.Resampling.BILINEAR) for image in images])
    assert np.array_equal(Image.open(learned.logdir / "first_batch.png"), expected)


@pytest.mark.parametrize("flag, size", [("", 16), ("--image_size=33", 32)])
def test_evaluation_alone_takes_the_checkpoint_of_the_run_at_its_size(run, learned, flag, size):
    shutil.copytree(learned.logdir, "runs/data")
    with mock.patch.object(vit, "eval_step", side_effect=vit.eval_step) as eval_step:
        command = f"{picture_folder('data')} --eval_only --dtype=bfloat16 {flag}"
        assert "test accuracy 100.00%" in run(command)
    _, images, _, dtype = eval_step.call_args.args
    assert images.shape[2:] == (size, size, 3) and dtype == "bfloat16"


@pytest.mark.parametrize("count", [5, 37, 41])  # in batches of eight
def test_evaluation_counts_every_image_once_and_no_padding(count, monkeypatch, capsys):
    monkeypatch.setattr(vit, "time", mock.Mock(perf_counter=itertools.count(0, 11).__next__))
    params, labels = seeded_params(tokens=5, classes=40), [int(i % 5 > 1) for i in range(count)]
    params["head"] = {"kernel": np.zeros((32, 40), "f"), "bias": -np.arange(40.0)}  # guesses 0
    data = {"test": range(count), "read": lambda i: (noise(16), labels[i])}
    options = vit.Options(batch_size=3, accum_steps=1)
    assert vit.evaluate(vit.replicate(params), data, options) == labels.count(0) / count
    left = vit.duration(11 / 8 * (count - 8))
    assert count < 8 or f"evaluated 8 of {count} images, {left} left" in capsys.readouterr().out


def test_a_loss_that_is_not_finite_ends_the_run(run, learned, monkeypatch):
    def update(state, *batch, update=vit.train_step):
        state, loss, rate = update(state, *batch)
        return state, jnp.where(state["step"] < 5, loss, jnp.inf), rate

    monkeypatch.setattr(vit, "train_step", update)
    assert "loss of step 5 is inf" in run(f"{learned.command} --logdir=new", 2)
    assert [row[0] for row in metrics("new")] == ["step", "1", "2", "3", "4"]


def test_fine_tuning_on_data_of_your_own_returns_the_params_that_it_saves():
    np.savez("x.npz", **seeded_weights(**XS))
    *_, options = vit.parse_options(f"own {TINY} --pretrained=~/x.npz".split())
    tuned = vit.train(options, numbers(16))
    assert equal(vit.load_checkpoint("runs/own/checkpoint.npz"), tuned)
    with pytest.raises(vit.BadInput, match="no images for training"):
        vit.train(options, numbers(0))
    moved = abs(tuned["cls"] - seeded_weights(**XS)["cls"])
    assert 0 < moved.max() < 0.3 and tuned["head"]["bias"].shape == (16,)  # a new head


# -------------------------------------------------------------------- One way to stop, and to start


def test_ctrl_c_is_one_line_and_the_same_command_goes_on(run, learned):
    command = f"{learned.command} --logdir=~/new"
    with mock.patch.object(vit, "evaluate", side_effect=[1.0, KeyboardInterrupt]):
        stopped = "vit.py: stopped; a training run resumes from its last evaluation\n"
        assert run(command, 130) == stopped
    out = run(command)
    assert "step 15 of 30" in out and re.search(r"step 16/30 .* compiled and computed in", out)
    assert result("new") == result(learned.logdir)


@pytest.mark.parametrize("devices, more", [(1, ""), (2, "--dropout=0.1 --augment=inception")])
def test_a_run_killed_at_any_moments_ends_bit_for_bit_as_one_left_alone(devices, more):
    command = f"{vit.__file__} {picture_folder('data')} {TINY} {more} --eval_every=3 --logdir="
    alone, moments = start(f"{command}whole", devices), np.random.default_rng()
    for sign in ("compiling", "step 4/", "step 16/"):  # killed a moment after it prints this
        process = start(f"{command}killed", devices)
        next((line for line in process.stdout if line.startswith(sign)), None)
        time.sleep(moments.uniform(0, 0.3))
        process.kill()
        assert finish(process)[0] in (0, -signal.SIGKILL)
    step = int(vit.read_arrays("killed/checkpoint.npz")["train/step"])
    status, out, _ = finish(start(f"{command}killed", devices))
    assert status == finish(alone)[0] == 0 and f"step {step} of 30, on {devices} x" in out
    assert result("killed") == result("whole")


def test_a_full_disk_is_one_line_and_the_old_file_stays(run, learned, monkeypatch):
    path, params = Path("run/checkpoint.npz"), seeded_params()
    vit.save_checkpoint(path, params)
    monkeypatch.setattr(os, "fsync", mock.Mock(side_effect=OSError(28, "No space left")))
    pytest.raises(OSError, vit.save_checkpoint, path, vit.adapt(params, 16)).match("No space left")
    assert "No space left" in run(f"{learned.command} --logdir=new", 2)
    assert equal(vit.load_checkpoint(path), params) and [*Path().rglob("check*")] == [path]


def test_params_that_are_not_finite_are_never_saved(params):
    params = jax.tree.map(lambda p: p + np.nan, params)
    pytest.raises(vit.BadInput, vit.save_checkpoint, "x", params).match("nan or inf")
    assert not os.listdir()


def test_folders_whose_runs_have_one_name_do_not_resume_each_other(run, monkeypatch):
    for name in ("a/b", "w/a/b", "w/a-b"):
        picture_folder(name)
    monkeypatch.chdir("w")
    assert run(f"a/b {TINY}") and Path("runs/a-b/checkpoint.npz").exists()
    assert "step 30 of 30" in run(f"./a/b/ {TINY}")  # the same folder
    for path, logdir in {".": "runs/data", "C:\\a\\b": "runs/C-a-b"}.items():
        assert vit.parse_options([path])[-1].logdir == logdir
    for other in ("a-b", "../a/b"):
        assert "its data was" in run(f"{other} {TINY}", 2)


OF_A_HOST = ["logdir", "data_dir", "coordinator_address", "process_id"]
MAY_CHANGE = ["num_processes", "accum_steps", "remat", "log_every", "eval_every", "eval_only"]


def test_a_run_is_resumed_only_with_the_options_and_data_that_define_it(params):
    options, data = vit.Options(logdir="run"), numbers(5) | {"name": "numbers"}
    identity = {k: v for k, v in vars(options).items() if k not in OF_A_HOST + MAY_CHANGE}
    identity |= {"data": "numbers", "classes": [*range(5)]}
    identity |= {"number of train images": 5, "number of test images": 2}
    assert vit.identity_of(options, data) == identity
    state = {"params": params, "momentum": vit.sgd_init(params), "step": 3}
    vit.save_run(options, data, state, [[1, 2]])
    assert vit.start_or_resume(options, data)[1] == [[1, 2]]
    for name in identity:
        other = "run/checkpoint.npz", identity | {name: "other"}
        pytest.raises(vit.BadInput, vit.resume, *other).match(f"its {name} was ")
    vit.save_run(options, data, state | {"momentum": {"v": params["cls"]}}, [])
    with pytest.raises(vit.BadInput, match="another optimizer"):
        vit.start_or_resume(options, data)


def test_hosts_have_to_agree_on_everything_but_where_each_of_them_is(params, monkeypatch):
    gather = mock.Mock(side_effect=lambda mine: np.stack([gather.mock_calls[0].args[0], mine]))
    monkeypatch.setattr(vit.multihost_utils, "process_allgather", gather)
    monkeypatch.setattr(vit, "initial_params", lambda *_: params)
    options, data = vit.Options(), numbers(5)
    with mock.patch.object(vit, "same_on_all_hosts", wraps=vit.same_on_all_hosts) as same:
        vit.start_or_resume(options, data)  # on the first host
    [values] = same.call_args.args
    assert values == vars(options) | vit.identity_of(options, data) | {"step of checkpoint.npz": 0}
    vit.same_on_all_hosts(values | dict.fromkeys(OF_A_HOST, "other"))  # on a second
    for name in values.keys() - OF_A_HOST:
        other = values | {name: "other"}
        pytest.raises(vit.BadInput, vit.same_on_all_hosts, other).match(f"differ in {name}, ")


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
    return SimpleNamespace(root=root, command=command, bad=bad, one=finish(one), two=two)


def test_two_hosts_compute_what_one_computes(hosts):
    params = [vit.load_checkpoint(hosts.root / x / "checkpoint.npz") for x in ("one", "first")]
    all_close(*params, 1e-6)
    one, two = (re.findall("test accuracy .*", out) for _, out, _ in (hosts.one, hosts.two[0]))
    assert one == two != []


def test_only_the_first_host_writes_files_and_progress(hosts):
    assert (hosts.root / "first/metrics.csv").exists() and not [*hosts.root.glob("second/*")]
    second = hosts.two[1][1]  # into which Gloo's threads write, too, at times across each other
    assert "waiting for all hosts" in second and not re.search("step|compiling|accuracy", second)


def test_an_image_that_cannot_be_read_ends_the_run_and_the_last_evaluation_stays(hosts):
    for name, (status, _, error) in (("one", hosts.one), ("first", hosts.two[0])):
        assert status == 2 and re.search(f"^vit.py: .*{hosts.bad}", error, re.M)
        assert vit.read_arrays(hosts.root / name / "checkpoint.npz")["train/step"] == 3
    assert hosts.two[1][0] not in (0, None)  # the other host ends, too


def test_hosts_whose_checkpoints_differ_are_all_told_so(hosts):
    shutil.copytree(hosts.root / "first", "first")
    for status, _, error in two_hosts(hosts.command, ["first", "second"]):
        assert status == 2 and "vit.py: the hosts differ in step of checkpoint.npz" in error


# ------------------------------------------------------------------------------------ Checkpoints


@pytest.mark.parametrize("prefix", ["", "opt/target/", "params/"])
def test_every_spelling_of_the_names_loads_alike(params, prefix):
    arrays = {prefix + name: array for name, array in seeded_weights().items()}
    arrays["opt/state/step"] = np.zeros(1)  # no parameter
    assert equal(vit.to_params(arrays, "x"), params)
    newer = {"Attention_1/": "Attention_0/", "LayerNorm_2": "LayerNorm_1", "Block_3/": "Block_0/"}
    for old, new in newer.items():
        arrays = {name.replace(old, new): array for name, array in arrays.items()}
    assert equal(vit.to_params(arrays, "x"), params)


def test_a_checkpoint_is_saved_under_the_released_names_with_more_beside_it():
    vit.save_checkpoint("x.npz", seeded_params(depth=12), class_names=[*"abc"])
    with np.load("x.npz") as file:
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


def test_timm_reads_what_we_save_and_gives_the_same_logits():
    timm, torch = pytest.importorskip("timm"), pytest.importorskip("torch")
    params = seeded_params(patch=16, d=64, depth=3, mlp=256, tokens=5, classes=7)
    vit.save_checkpoint("x.npz", params, class_names=[*"abcdefg"])
    sizes = dict(img_size=32, patch_size=16, embed_dim=64, depth=3, num_heads=4, num_classes=7)
    gelu = functools.partial(torch.nn.GELU, approximate="tanh")
    model = timm.models.VisionTransformer(**sizes, act_layer=gelu).eval()
    model.load_pretrained("x.npz")
    theirs = model(torch.tensor(IMAGES.transpose(0, 3, 1, 2))).detach().numpy()
    assert_allclose(forward(params, IMAGES), theirs, atol=1e-5)


KINDS = {"F32": np.float32, "F16": np.float16, "BF16": jnp.bfloat16}
# What timm calls the layers and arrays that are called otherwise in the release.
TIMM = """Transformer/encoderblock_=blocks. Transformer/encoder_norm=norm cls=cls_token
    Transformer/posembed_input/pos_embedding=pos_embed embedding/=patch_embed.proj/
    LayerNorm_0=norm1 LayerNorm_2=norm2 MlpBlock_3/Dense_0=mlp.fc1 MlpBlock_3/Dense_1=mlp.fc2
    MultiHeadDotProductAttention_1/out=attn.proj MultiHeadDotProductAttention_1=attn
    /=. scale=weight kernel=weight"""


def timm_arrays():
    """The seeded weights of a ViT-XS_8 as timm stores them: {timm's name: array}."""
    arrays = {}
    for name, array in seeded_weights(**XS).items():
        if name == "embedding/kernel":
            array = array.transpose(3, 2, 0, 1)
        elif name.endswith("kernel"):  # of query, key, value and out with an axis of heads
            array = (array.reshape(64, 64) if array.ndim == 3 else array).T
        elif name.endswith("bias"):
            array = array.ravel()
        for ours, theirs in (line.split("=") for line in TIMM.split()):
            name = name.replace(ours, theirs)
        arrays[name] = array
    for name in [name for name in arrays if "query" in name]:
        parts = [arrays.pop(name.replace("query", part)) for part in ("query", "key", "value")]
        arrays[name.replace("query", "qkv")] = np.concatenate(parts)
    return arrays


def with_length(text, length=None):
    return (len(text) if length is None else length).to_bytes(8, "little") + text


def safetensors(arrays, kind="F32", data=b""):
    """A .safetensors file: a header, then data and the arrays."""
    header = {"__metadata__": {"format": "pt"}} if kind == "F32" else {}
    for name, array in arrays.items():
        begin, data = len(data), data + array.astype(KINDS[kind]).tobytes()
        place = {"shape": [*array.shape], "data_offsets": [begin, len(data)]}
        header[name] = {"dtype": kind} | place
    header = dict(reversed(header.items()))  # which is in any order
    return with_length(json.dumps(header).encode()) + data


@pytest.mark.parametrize("dtype", KINDS)
@pytest.mark.parametrize("without", ["head", "nothing"])
def test_a_safetensors_file_of_timm_gives_exactly_the_weights_in_it(dtype, without):
    arrays = {name: array for name, array in timm_arrays().items() if without not in name}
    Path("x").write_bytes(safetensors(arrays, dtype))
    found = vit.to_released(vit.load_checkpoint("x"))
    rounded = {k: np.float32(x.astype(KINDS[dtype])) for k, x in seeded_weights(**XS).items()}
    assert equal(found, {k: x for k, x in rounded.items() if without not in k})


@pytest.mark.parametrize("width, heads", [(64, 4), (384, 6), (512, 8), (1280, 16)])
def test_heads_are_those_of_the_released_model_of_this_width_or_as_in_timm(width, heads):
    qkv = {"cls_token": np.zeros((1, 1, width)), "blocks.11.attn.qkv.bias": np.arange(3 * width)}
    found = vit.from_timm(qkv)
    key = found["Transformer/encoderblock_11/MultiHeadDotProductAttention_1/key/bias"]
    assert equal(key, np.arange(width, 2 * width).reshape(heads, width // heads))


HOSTILE = [with_length(x) for x in (b"[]", b"{}", b"\xff\xfe", b'{"x": 1.0}', b"[" * 100_000)]
HOSTILE += [b"", b"hello", bytes(8), with_length(b"{}", 2**63), with_length(b"{}", 9)]
HOSTILE += [safetensors(timm_arrays())[:-1], safetensors(timm_arrays()) + bytes(4)]
HOSTILE += [safetensors(timm_arrays(), data=bytes(4))]


@pytest.mark.parametrize("data", HOSTILE, ids=lambda data: repr(data[:30]))
def test_a_hostile_safetensors_file_is_bad_input(data):
    Path("x").write_bytes(data)
    pytest.raises(vit.BadInput, vit.load_checkpoint, "x").match("^x, ")


@pytest.mark.parametrize("kind", ["npz", "safetensors", "png", "jpeg", "gif", "webp"])
def test_a_damaged_file_is_bad_input_or_gives_the_right_weights_or_a_picture(kind):
    path, weights, noticed = Path(f"x.{kind}"), kind in ("npz", "safetensors"), 0
    r, params = np.random.default_rng(0), seeded_params(**XS)
    if kind == "npz":
        np.savez(path, **seeded_weights(**XS))
    elif kind == "safetensors":
        path.write_bytes(safetensors(timm_arrays()))
    else:
        noise(40).save(path)
    data = np.fromfile(path, np.uint8)
    end = 3000 if kind == "safetensors" else len(data)  # its arrays have no checksums
    for i in range(40):
        broken = data.copy()
        broken[r.integers(end, size=1 + i % 3)] ^= np.uint8(1 + i)
        broken[: r.integers(len(data)) if i % 4 == 0 else None].tofile(path)
        try:
            found = vit.load_checkpoint(path) if weights else vit.decode(path, "x")
            assert equal(found, params) if weights else found.mode == "RGB"
        except vit.BadInput:  # and no other exception
            noticed += 1
    assert noticed > (25 if weights else 8)


# --------------------------------------------------------------------------------------- Downloads


@pytest.fixture
def web(monkeypatch):
    """A web of our own: what it has at an address, or raises, and what it was asked for."""
    web = SimpleNamespace(contents={}, asked=[])

    def urlopen(url, timeout):
        assert timeout == 60  # seconds of silence
        web.asked.append(url)
        content = web.contents.get(url, urllib.error.HTTPError(url, 403, "the reason", {}, None))
        if isinstance(content, Exception):
            raise content
        headers = {"Content-Length": len(content) * (1 + url.endswith("cut"))}
        return urllib.response.addinfourl(io.BytesIO(content), headers, url)

    monkeypatch.setattr(urllib.request, "urlopen", urlopen)
    return web


PLACES = """https://storage.googleapis.com/vit_models/{}/ViT-B_16.npz
    https://huggingface.co/timm/vit_base_patch16_{}/resolve/main/model.safetensors"""
TRAINING = PLACES.format("imagenet21k", "224.orig_in21k").split()
PHOTOS = PLACES.format("imagenet21k+imagenet2012", "384.orig_in21k_ft_in1k").split()


def test_training_takes_the_21k_weights_from_the_second_place_if_the_first_refuses(web):
    web.contents[TRAINING[1]] = safetensors(timm_arrays())
    found = vit.initial_params(vit.Options(image_size=16), 3)
    assert equal(found["cls"], seeded_weights(**XS)["cls"]) and web.asked == TRAINING


def test_photos_take_the_weights_that_know_imagenet(run, web):
    web.contents[PHOTOS[1]] = safetensors(timm_arrays())
    noise(20).save("a.png")
    assert run("a.png") and web.asked == PHOTOS
    other = PHOTOS[1].replace("16_384.orig", "32_384.augreg")  # the authors' has other weights
    web.contents[other] = web.contents[PHOTOS[1]]
    assert run("a.png --model=ViT-B_32") and web.asked == [*PHOTOS, other]


def test_a_download_that_fails_names_every_address_and_its_reason_and_leaves_no_file(run, web):
    web.contents |= {"https://a/cut": b"x" * 50_000, "https://a/login": b"<!DOCTYPE html>"}
    web.contents["https://a/broken"] = http.client.BadStatusLine("what?")
    reasons = {"cut": "50000", "login": "<!DOCTYPE", "no": "403", "broken": "what"}
    addresses = [f"https://a/{name}" for name in reasons]
    line = " or ".join(rf"https://a/{name} \(.*{why}.*\)" for name, why in reasons.items())
    with pytest.raises(vit.BadInput, match=line):
        vit.fetch(addresses, vit.Options(), vit.load_checkpoint)
    assert web.asked == addresses and not [*Path().rglob("downloads/*")]


def test_addresses_that_end_alike_are_kept_apart_and_fetched_once(web):
    web.contents.update({"https://a/y": b"a", "https://b/y": b"b"})
    for name in ("a", "b", "a"):
        found = vit.fetch([f"https://{name}/y"], vit.Options(), lambda path: Path(path).read_text())
        assert found == name
    assert web.asked == ["https://a/y", "https://b/y"]  # the third is on the disk


# ---------------------------------------------------------------------------------------- Datasets

RED = Image.new("RGB", (40, 20), (200, 30, 30))


@pytest.mark.parametrize(
    "image, kind, turned",
    [(RED, kind, 0) for kind in ("jpeg", "png", "webp", "bmp", "tiff", "gif")]
    + [(RED.convert(mode), "png", 0) for mode in ("L", "P", "1", "RGBA")]
    + [(RED.convert("CMYK"), "jpeg", 0), (RED, "jpeg", 6)],  # 6: the camera, by a quarter
)
def test_pictures_of_every_kind_become_upright_rgb(image, kind, turned):
    exif = Image.Exif()
    exif[0x0112] = turned
    image.save("x", kind, **({"exif": exif} if turned else {}))
    read = vit.decode("x", "x")
    assert read.mode == "RGB" and read.size == ((20, 40) if turned else (40, 20))
    assert_allclose(np.mean(read, (0, 1)), np.mean(image.convert("RGB"), (0, 1)), atol=6)


def test_digits_are_labelled_as_drawn_and_tested_on_digits_never_trained_on():
    data = vit.load_data("digits", vit.Options())
    assert data["classes"] == [*"0123456789"] and vit.draw_digit(8007)[1] == 7
    assert (len({*data["train"]}), len({*data["test"]} - {*data["train"]})) == (8000, 1000)


def test_every_tenth_picture_of_a_folder_is_for_testing_in_any_order_of_the_disk(monkeypatch):
    root, unsorted = picture_folder("data", train=20) / "train", glob.glob
    data = vit.image_folder(root)
    monkeypatch.setattr(glob, "glob", lambda *a, **k: unsorted(*a, **k)[::-1])
    assert [vit.image_folder(root)[x] for x in ("train", "test")] == [data["train"], data["test"]]
    assert not {*data["train"]} & {*data["test"]}
    for split, count in (("train", 18), ("test", 2)):  # of each class
        labels = [label for _, label in map(data["read"], data[split])]
        assert labels == [0] * count + [1] * count


@pytest.mark.parametrize("split", ["test", "val", "validation"])
def test_folders_may_hold_links_capital_endings_and_what_is_no_picture(split):
    root = picture_folder("data")
    (root / "test").rename(root / split)
    (root / "train/dog").rename("elsewhere")
    (root / "train/dog").symlink_to(Path("elsewhere").absolute())
    (root / "train/cat/3.png").rename(root / "train/cat/3.PNG")
    for name in ("notes.txt", "._1.png"):
        (root / "train/cat" / name).write_text("what people and macOS leave")
    shutil.copytree("elsewhere", root / "train/.ipynb_checkpoints")
    data = vit.image_folder(root)
    assert data["classes"] == ["cat", "dog"] and (len(data["train"]), len(data["test"])) == (16, 10)
    assert [label for _, label in map(data["read"], data["train"])] == [0] * 8 + [1] * 8


@pytest.mark.parametrize(
    "name, train, test, names",
    [("cifar10", [f"data_batch_{i}" for i in range(1, 6)], "test_batch", "batches.meta.txt")]
    + [("cifar100", ["train"], "test", "fine_label_names.txt")],
)
def test_cifar_is_98_percent_of_a_verified_archive(name, train, test, names, web, monkeypatch):
    at = int(name == "cifar100")  # where the label is: there, after a coarse one
    rows = np.random.RandomState(0).randint(0, 256, (60, at + 1 + 3 * 32 * 32), np.uint8)
    folder = Path("x")
    folder.mkdir()
    (folder / names).write_text("zero\none\n\n")
    parts = [*np.split(rows[:50], len(train)), rows[50:]]
    for file, part in zip([*train, test], parts, strict=True):
        part.tofile(folder / f"{file}.bin")
    archive = Path(shutil.make_archive("x", "gztar", ".", folder)).read_bytes()
    address = name.replace("cifar", "https://www.cs.toronto.edu/~kriz/cifar-") + "-binary.tar.gz"
    web.contents[address] = archive
    assert [vit.CIFAR[x][:8] for x in ("cifar10", "cifar100")] == ["c4a38c50", "58a81ae1"]
    monkeypatch.setitem(vit.CIFAR, name, hashlib.sha256(archive).hexdigest())
    data = vit.load_data(name, vit.Options())
    assert data["classes"] == ["zero", "one"]
    for split, expected in (("train", rows[:49]), ("test", rows[50:])):
        for (image, label), row in zip(map(data["read"], data[split]), expected, strict=True):
            pixels = row[at + 1 :].reshape(3, 32, 32).transpose(1, 2, 0)
            assert label == row[at] and np.array_equal(image, pixels)
    [file] = Path("tensorflow_datasets").glob("downloads/*.gz")
    file.write_bytes(archive[:-100])
    pytest.raises(vit.BadInput, vit.load_data, name, vit.Options()).match(f"{file}.*delete it")


@pytest.mark.parametrize(
    "name, counts, sizes, tested",
    [("one", {"train": 20}, (18, 2), range(20)), ("no", {"test": 3}, (0, 3), range(200, 203))]
    + [("two", {"train": 20, "validation": 5}, (20, 5), range(100, 105))]
    + [("all", {"train": 20, "validation": 5, "test": 3}, (20, 3), range(200, 203))]
    + [("unlabelled", {"train": 20, "validation": 5, "test": -3}, (20, 5), range(100, 105))]
    + [("imagenet2012", {"train": 100, "validation": 5, "test": -3}, (99, 5), range(100, 105))],
)
def test_tfds_sets_are_tested_on_labelled_images_never_trained_on(name, counts, sizes, tested):
    pytest.importorskip("array_record")  # not for Windows
    import tensorflow_datasets as tfds

    def examples(first, count):  # grey images from first on; of a negative count, without labels
        for grey in range(first, first + abs(count)):
            Image.new("L", (28, 28), grey).save("x.png")
            yield grey, {"image": Path("x.png"), "label": grey % 10 if count > 0 else -1}

    firsts = {"train": 0, "validation": 100, "test": 200}
    make = lambda *_: {x: examples(firsts[x], count) for x, count in counts.items()}  # noqa: E731
    kind = type(name.title(), (tfds.testing.DummyMnist,), {"_split_generators": make})
    kind(data_dir="tensorflow_datasets", file_format="array_record").download_and_prepare()
    data = vit.load_data(name, vit.Options())
    assert "tensorflow" not in sys.modules and data["classes"] == [*"0123456789"]
    train, test = ([*map(data["read"], data[split])] for split in ("train", "test"))
    assert all(label == image.getpixel((0, 0))[0] % 10 for image, label in train + test)
    trained, tests = ({image.getpixel((0, 0))[0] for image, _ in split} for split in (train, test))
    assert (len(trained), len(tests)) == sizes and tests <= {*tested} - trained
    [info] = Path("tensorflow_datasets").rglob("dataset_info.json")
    info.write_text(info.read_text().replace("array_record", "tfrecord"))
    pytest.raises(vit.BadInput, vit.load_data, name, vit.Options()).match("TFRECORD.* data_dir")


# ------------------------------------------------------------------------------------------ Photos


@pytest.fixture
def photos(run):
    """What is printed for two photos with a checkpoint for 32 pixels; its logits and attention."""
    params, inputs = seeded_params(classes=7), []
    vit.save_checkpoint("x.npz", params, class_names=[*"abcdefg"])
    os.mkdir("in")
    for name, left in (("in/a.jpg", -2), ("in/b.png", -1)):
        Image.effect_mandelbrot((90, 60), (left, -1, 1, 1), 50).convert("RGB").save(name)
        inputs.append(Image.open(name).resize((32, 32), Image.Resampling.BILINEAR))
    logits, weights = with_attention(params, np.stack(inputs) / np.float32(127.5) - 1)
    return run("in/a.jpg in/b.png --pretrained=x.npz"), np.float64(logits), np.float64(weights)


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
        assert np.array_equal(left, Image.open(f"in/{photo}")) and right.std() > 5
        assert abs(right - left * np.asarray(light)[..., None] / 255).max() < 4


def test_a_checkpoint_of_1000_classes_is_taken_for_one_of_imagenet(run, photos):
    weights = seeded_weights(classes=1000)
    weights["head/bias"][[0, 207, 999]] = 30, 28, 26
    np.savez("y.npz", **weights)
    names = re.findall(r"%  (.{16})", run("in/a.jpg --pretrained=y.npz"))
    assert names[:3] == ["tench, Tinca tin", "golden retriever", "toilet tissue, t"]


# -------------------------------------------------------------------------------- The command line

EMBEDDINGS = "Transformer/posembed_input/pos_embedding"
BIAS = "Transformer/encoderblock_1/LayerNorm_2/bias"
OTHER_MODELS = """blocks.0.ls1.gamma blocks.0.attn.q_norm.weight reg_token fc_norm.weight
    head_dist.weight norm_pre.bias patch_embed.backbone.weight"""  # have these arrays
BITS = "uint16", "int32", "float32"  # and so more of them than a picture is to have


@pytest.fixture(scope="module")
def bad(tmp_path_factory):
    """A folder of files and folders, each with one thing that is bad."""
    root, flat = tmp_path_factory.mktemp("bad"), seeded_weights(**XS)
    bad = {"pickled cls": np.array([{}], object), "registers registers": np.ones(1, "f")}
    bad |= {"half pre_logits/kernel": np.eye(64, dtype="f"), f"inf {BIAS}": np.full(64, np.inf)}
    bad |= {f"misshapen {BIAS}": np.zeros(7, "f"), f"ints {BIAS}": np.zeros(64, int)}
    bad |= {"names class_names": np.array(["cat"]), "others class_names": np.array([*"ab"])}
    bad |= {f"oblong {EMBEDDINGS}": np.zeros((1, 4, 64), "f")}
    for names, array in (bad | {"good cls": flat["cls"], "checkpoint cls": flat["cls"]}).items():
        file, name = names.split()
        np.savez(root / f"{file}.npz", **flat | {name: array})
    np.savez(root / "three.npz", **seeded_weights(**XS | {"classes": 3}))
    np.savez(root / "nothing.npz", x=np.zeros(3))
    np.savez(root / "headless.npz", **{k: v for k, v in flat.items() if "head/" not in k})
    np.savez(root / "missing.npz", **{k: v for k, v in flat.items() if k != BIAS})
    for name in OTHER_MODELS.split():
        (root / name).write_bytes(safetensors(timm_arrays() | {name: np.ones(64)}))
    for kind in BITS:
        Image.fromarray(np.full((8, 8), 300, kind)).save(root / f"{kind}.tiff")
    with zipfile.ZipFile(root / "torch.pth", "w") as archive:
        archive.writestr("archive/data.pkl", "x")
    for name in ("good", "one", "unknown", "cut_image", "nested"):
        picture_folder(root / name)
    shutil.rmtree(root / "one/train/dog")
    (root / "unknown/test/dog").rename(root / "unknown/test/wolf")
    (root / "nested/train").rename(root / "nested/Training")
    (root / "cut_image/train/dog/3.png").write_bytes(b"\x89PNG")
    (root / "no_images/train/cat").mkdir(parents=True)
    Image.new("1", (20_000, 20_000)).save(root / "bomb.png")
    noise(8).save(root / "x.png")
    return root


# Each line of error names the last word of the command, or what is written after a colon here.
BAD_COMMANDS = """digits --modle=ViT-B_16 | digits --model=ViT-Q_16 | digits --model=B_16
    digits --model=ViT-XS_0 | digits --model=ViT-B_16.npz | digits --dtype=float16
    digits --decay_type=step | digits --augment=all | digits --total_steps=0
    digits --total_steps=many: many | digits --total_steps=4294967296 | digits --batch_size=0
    digits --batch_size=24 --accum_steps=2: 24 is not a multiple of 8 devices x --accum_steps=2
    digits --accum_steps=0 | digits --log_every=0 | digits --eval_every=0 | digits --warmup_steps=-1
    digits --base_lr=-1 | digits --base_lr=nan | digits --image_size=7 | digits --dropout=1.5
    digits --mixup_alpha=0.2 --batch_size=8: --mixup_alpha | digits --warmup_steps=30
    digits --eval_only: runs/digits | digits --process_id=1
    digits --num_processes=2: --coordinator_address | digits --coordinator_address=foo: 'foo'
    digits --coordinator_address=127.0.0.1:abc: 127.0.0.1:abc
    digits --pretrained=released --model=ViT-S_14 | digits --eval_only --pretrained=good.npz
    good --pretrained=absent | good --pretrained=: No such file | good --pretrained=nothing.npz
    good --pretrained=pickled.npz: allow_pickle | good --pretrained=registers.npz: registers
    good --pretrained=half.npz: pre_logits/bias | good --pretrained=inf.npz: LayerNorm_2/bias
    good --pretrained=misshapen.npz: (7,) | good --pretrained=ints.npz: LayerNorm_2/bias
    good --pretrained=torch.pth: such as PyTorch's | good --pretrained=oblong.npz: not for square
    good --pretrained=missing.npz: LayerNorm_2/bias
    good --pretrained=three.npz --eval_only: other classes
    good --pretrained=others.npz --eval_only: other classes
    good --pretrained=headless.npz --eval_only: or no head
    good --data_dir=cache --pretrained=https://127.0.0.1:9/v.npz: cannot use https
    good --data_dir=cache --pretrained=http://127.0.0.1:9/v.npz | good --logdir=.: checkpoint.npz
    x.png --pretrained=headless.npz: no head | x.png --pretrained=names.npz
    bomb.png --pretrained=good.npz: bomb.png | good.npz --pretrained=good.npz: image good.npz
    good.npz digits: good.npz digits | cut_image --pretrained=none: dog/3.png | one: 'cat'
    unknown: 'wolf' | nested: CLASS/*.jpg | no_images | mnist: must be prepared | cifra10
    CIFAR10 | no/such/folder | nothere.jpg"""
BAD_COMMANDS = re.split(r"\s*[|\n]\s*", BAD_COMMANDS)
BAD_COMMANDS += [f"good --pretrained={name}: {name}, so" for name in OTHER_MODELS.split()]
BAD_COMMANDS += [f"{x}.tiff --pretrained=good.npz: {x}.tiff (save it with 8 bits" for x in BITS]


@pytest.mark.parametrize("case", BAD_COMMANDS)
def test_bad_input_is_one_line_and_status_2(run, case, bad, monkeypatch):
    monkeypatch.chdir(bad)
    command, *words = case.rsplit(": ", 1)
    error = run(TINY.removeprefix("--pretrained=none ") + command, 2)
    [words] = words or [command.split()[-1].removeprefix("--pretrained=")]
    assert words in error and len(error) < 620


def test_a_missing_package_and_full_memory_are_one_line(run, monkeypatch):
    full = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: x")
    monkeypatch.setattr(vit, "train", mock.Mock(side_effect=[ImportError("no jpeg"), full]))
    assert run("digits", 2) == "vit.py: no jpeg\n"
    assert re.match("vit.py: out of memory; .*--accum_steps", run("digits", 2))


def test_a_bug_of_ours_shows_its_traceback(monkeypatch):
    monkeypatch.setattr(vit, "train", mock.Mock(side_effect=ZeroDivisionError))
    pytest.raises(ZeroDivisionError, vit.main, ["digits"])


def test_help_explains_every_option_with_its_default(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")
    with pytest.raises(SystemExit, match="0"):
        vit.main(["--help"])
    out = " ".join(capsys.readouterr().out.split())
    for name, default in vars(vit.Options()).items():
        assert re.search(rf"--{name} .*\S \({re.escape(str(default))}\)", out)


@pytest.mark.parametrize("how", ["-", "x.zip"])
def test_the_file_runs_piped_into_python_and_from_inside_a_zip(learned, how):
    with zipfile.ZipFile("x.zip", "w") as archive:
        archive.writestr("__main__.py", SOURCE)
    status, out, _ = finish(start(f"{how} {learned.command} --logdir=new"), SOURCE)
    assert status == 0 and out.count("test accuracy 100.00%") == 2


def test_the_head_of_the_file_asks_for_what_requirements_txt_asks_for():
    block = SOURCE.split("# ///")[1].split("dependencies")[1]
    lines = Path(vit.__file__).with_name("requirements.txt").read_text().splitlines()
    assert re.findall('"(.*?)"', block) == [line.split("#")[0].strip() for line in lines]


# ---------------------------------------------------------------------------------------- README


def test_the_readme_names_the_lines_where_parts_begin_and_shows_code_as_it_is():
    found = re.findall(r"(\d+\. [A-Z][\w, ]+?) \((\d+)\)", " ".join(README.split()))
    lines = enumerate(SOURCE.splitlines(), 1)
    heads = [(x.strip("# -"), str(i)) for i, x in lines if x.startswith("# -----")]
    assert found == heads and len(heads) == 12
    [shown] = re.findall(r"```python\n(.*?)```", README, re.S)
    assert shown in SOURCE


def test_the_recipes_of_the_readme_run(monkeypatch, capsys):
    for name in ("sgd_init", "sgd_update"):
        monkeypatch.setattr(vit, name, getattr(vit, name))  # put back after AdamW
    params = vit.init_params(jax.random.key(0), "ViT-XS_8", 32, 10)
    params["head"]["kernel"] = jax.random.normal(jax.random.key(1), (64, 10))
    vit.save_checkpoint("runs/digits/checkpoint.npz", params)
    [recipes] = re.findall(r"```python recipes\n(.*?)```", README, re.S)
    assert all(recipe.count("\n") <= 8 for recipe in recipes.split("\n\n"))
    short = '"--logdir=runs/adamw", "--total_steps=2", "--warmup_steps=1"'
    names = {}
    exec(recipes.replace('"--logdir=runs/adamw"', short), names)
    out = capsys.readouterr().out
    assert float(re.search(r"linear probe: ([\d.]+)%", out)[1]) > 30  # by chance 10
    assert len(re.findall(r"^\d: [\d.]+%$", out, re.M)) == 10
    assert Image.open("mistakes.png").size == (8 * 32, 32)
    wrong = names["probabilities"].argmax(1) != names["test_labels"]
    sure = names["probabilities"].max(1)[names["surest"]]
    assert wrong[names["surest"]].all() and sure[0] == names["probabilities"].max(1)[wrong].max()
    assert "train/momentum/1/cls" in vit.read_arrays("runs/adamw/checkpoint.npz")
