# SPDX-License-Identifier: Apache-2.0
"""What vit.py promises, checked: pip install pytest scipy && pytest -q test_vit.py

Expected numbers are the original's (google-research/vision_transformer at c6de1e5, float32), or
come from NumPy, SciPy, Pillow or timm, or from a second way to the same result.
"""

import atexit
import functools
import io
import itertools
import json
import os
import re
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import urllib.request
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

# Every program is compiled once for all tests, and quickly rather than well, for eight devices.
os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp()
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
os.environ["XLA_FLAGS"] = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=1"
os.environ["XLA_FLAGS"] += " --xla_force_host_platform_device_count=8"

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import scipy
from numpy.testing import assert_allclose, assert_array_equal
from PIL import Image, PngImagePlugin

import vit

atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"])
jax.config.update("jax_default_matmul_precision", "highest")
forward, encoder_block = jax.jit(vit.forward), jax.jit(vit.encoder_block)


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
    """Every test runs in an empty folder of its own, which is also the user's home."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))


# ------------------------------------------------------------------------------ The three promises
def test_images_become_one_logit_for_each_class():
    params = vit.init_params(jax.random.key(0), "ViT-XS_8", image_size=16, num_classes=2)
    assert forward(params, jnp.zeros((4, 16, 16, 3))).shape == (4, 2)
    # 16 x 16 pixels are 4 patches of 8 x 8, and with the class token 5 tokens of width 64.
    assert params["Transformer"]["posembed_input"]["pos_embedding"].shape == (1, 5, 64)
    blocks = params["Transformer"]["encoderblock"]  # two of them, with four heads of 16 numbers
    assert blocks["MultiHeadDotProductAttention_1"]["query"]["kernel"].shape == (2, 64, 4, 16)


def test_saved_weights_have_the_released_names_and_give_the_same_logits_again():
    params = vit.init_params(jax.random.key(0), "ViT-XS_8", image_size=16, num_classes=2)
    params["head"]["kernel"] = jnp.ones((64, 2))
    vit.save_checkpoint("model.npz", params)
    loaded = vit.load_checkpoint("model.npz")
    images = np.random.default_rng(0).uniform(-1, 1, (4, 16, 16, 3)).astype(np.float32)
    assert_array_equal(forward(loaded, images), forward(params, images))
    assert "Transformer/encoderblock_1/LayerNorm_2/bias" in np.load("model.npz").files


def test_one_update_lowers_the_loss_on_its_batch():
    options = vit.Options(accum_steps=1, base_lr=0.1, total_steps=30, warmup_steps=0)
    params = vit.init_params(jax.random.key(0), "ViT-XS_8", image_size=16, num_classes=2)
    state = {"params": params, "momentum": vit.sgd_init(params), "step": np.int32(0)}
    rng, devices = np.random.default_rng(0), jax.local_device_count()
    images = rng.integers(0, 256, (devices, 1, 2, 16, 16, 3), np.uint8)
    labels = rng.integers(0, 2, (devices, 1, 2), np.int32)
    state, first_loss, _ = vit.train_step(vit.replicate(state), images, labels, options)
    state, second_loss, _ = vit.train_step(state, images, labels, options)
    assert second_loss < first_loss


# -------------------------------------------------------------------------- What many tests share
# The arrays of the released checkpoints with their axes, those of a block (@ is attention), and
# the sizes of the model whose numbers the original computed, and of a ViT-XS_8 for 16 pixels.
ARRAYS = """cls=11D embedding/kernel=PP3D embedding/bias=D head/kernel=DK head/bias=K
    Transformer/posembed_input/pos_embedding=1ND Transformer/encoder_norm/scale=D
    Transformer/encoder_norm/bias=D"""
BLOCK = """LayerNorm_0/scale=D LayerNorm_0/bias=D LayerNorm_2/scale=D LayerNorm_2/bias=D
    MlpBlock_3/Dense_0/kernel=DM MlpBlock_3/Dense_0/bias=M MlpBlock_3/Dense_1/kernel=MD
    MlpBlock_3/Dense_1/bias=D @/query/kernel=DAE @/query/bias=AE @/key/kernel=DAE @/key/bias=AE
    @/value/kernel=DAE @/value/bias=AE @/out/kernel=AED @/out/bias=D"""
GOLDEN = {"1": 1, "3": 3, "P": 8, "D": 32, "A": 4, "E": 8, "M": 64, "N": 17, "K": 5}
XS = {"D": 64, "E": 16, "M": 256, "N": 5, "K": 2}
EMBEDDINGS = "Transformer/posembed_input/pos_embedding"
BIAS = "Transformer/encoderblock_1/LayerNorm_2/bias"
# Options of a run that takes a second, and one more to be compiled for the first time.
TINY = "--pretrained=none --model=ViT-XS_8 --image_size=16 --batch_size=16 --accum_steps=1 "
TINY += "--warmup_steps=0 --total_steps=30 --base_lr=0.1 --augment=none --log_every=1 "
TINY += "--eval_every=15"


def seeded_weights(depth=2, **sizes):
    """{released name: array}; by default the weights that the original's numbers belong to."""
    r, weights, sizes = np.random.RandomState(0), {}, GOLDEN | sizes
    block = BLOCK.replace("@", "MultiHeadDotProductAttention_1").split()
    blocks = [f"Transformer/encoderblock_{i}/{row}" for i in range(depth) for row in block]
    for name, axes in sorted(row.split("=") for row in ARRAYS.split() + blocks):
        array = 0.1 * r.standard_normal([sizes[axis] for axis in axes])
        weights[name] = array.astype(np.float32) + np.float32(name.endswith("/scale"))
    return weights


def seeded_params(**sizes):
    return vit.to_params(seeded_weights(**sizes), "the seeded weights")


params = pytest.fixture(seeded_params, scope="module")


def released(params):
    """{released name: array}, as they are saved."""
    vit.save_checkpoint("released.npz", params)
    return dict(np.load("released.npz"))


def equal(a, b, atol=0):
    """Fails unless two trees have the same names, shapes, dtypes and, up to atol, numbers."""
    jax.tree.map(functools.partial(assert_allclose, rtol=0, atol=atol, strict=True), a, b)
    return jax.tree.leaves(a) != []


def noise(size, seed=0):
    return Image.fromarray(np.random.RandomState(seed).randint(0, 256, (size, size, 3), np.uint8))


def grey_png(grey):
    Image.new("RGB", (4, 4), (grey, grey, grey)).save(file := io.BytesIO(), "png")
    return file.getvalue()


def numbers(count, image=None):
    """The numbers 0 to count - 1 as data, each a grey of its own, or all one image."""
    data = {"train": range(count), "test": range(count), "classes": [*range(count)], "name": "n"}
    return data | {"read": lambda i: (image or Image.new("RGB", (4, 4), (i, i, i)), i)}


def picture_folder(root):
    """A folder of dark cats and light dogs, which a run of a second learns to tell apart."""
    for i, name in itertools.product(range(13), ("cat", "dog")):  # the last five are for testing
        path = Path(root, "train" if i < 8 else "test", name, f"{i}.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        noise(16 + i, i).point(lambda x, light=150 * (name == "dog"): x // 3 + light).save(path)
    return Path(root).absolute()


def run(command, status=0):
    """Runs a command: returns what it prints or, if it is to fail, the one line of its error."""
    with redirect_stdout(io.StringIO()) as out, redirect_stderr(io.StringIO()) as error:
        try:
            found = vit.main(command.split())
        except SystemExit as stop:  # of argparse, which first prints how to use the command
            found = stop.code
    error = error.getvalue()
    lines = [x for x in error.splitlines() if x and not x.startswith(("usage", "http"))]
    assert found == status, error
    assert not status or (len(lines) == 1 and ".py: " in lines[0] and len(lines[0]) < 660), error
    return lines[0] if status else out.getvalue()


def result(logdir):
    """All that a run leaves behind, but for the images per second."""
    arrays = vit.read_arrays(Path(logdir, "checkpoint.npz"))
    rows = [row.split(",") for row in Path(logdir, "metrics.csv").read_text().splitlines()]
    del arrays["train/run"]  # these rows again
    return [row[:3] + row[4:] for row in rows], {name: x.tobytes() for name, x in arrays.items()}


def start(*arguments, devices, cwd="."):
    """Starts Python in a process of its own."""
    more = {"XLA_FLAGS": f"{os.environ['XLA_FLAGS'][:-1]}{devices}"}
    more |= {"JAX_PLATFORMS": "cpu", "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo"}
    more |= {"PYTHONPATH": str(Path(vit.__file__).parent)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": cwd}
    return subprocess.Popen([sys.executable, *arguments], env=os.environ | more, **pipes)


# --------------------------------------------------------------------------------------- 1. Model
LOGITS = {  # the original's for the first image, by its size in pixels
    16: [0.11455977, -0.08617537, 1.2284868, -0.27920724, 0.18099135],
    32: [0.13968338, 0.41093412, 0.3068053, -0.11844803, 0.60040045],
    48: [-0.13794361, 0.29169971, 0.33027822, 0.16348258, 0.50354993],
}
INPUTS = {x: np.random.RandomState(1).uniform(-1, 1, (4, x, x, 3)).astype("f") for x in LOGITS}
IMAGES, TARGETS = INPUTS[32], np.eye(5, dtype="f")[[1, 4, 2, 0]]
LOSSES = [1.5707833, 1.5707833, 1.4806235, 1.2611428, 1.1061978]  # before each of five updates
UPDATED = [0.6176054, 0.5241724, 0.29380584, -0.9033976, 0.2977193]  # the logits after them
# The gradient of each array in the order of names, each multiplied by a random direction.
GRADIENTS = """ 0.126349  0.027935  0.145475  0.005826  0.063795 -0.166069
     0.351390 -0.377218  0.173236  0.581771  0         0.088451 -0.003554  1.348437  0.001189
    -0.030801 -0.211105 -1.400027  0.063067 -0.019732 -0.077804 -0.088163 -0.019895  0.145312
    -0.039812  0.585964  0        -0.307931  0.459707  0.005924 -0.019317 -0.090996  0.243097
    -0.590395 -0.642435 -0.179350  0.056561 -1.730072 -0.368995  1.325776"""


def assert_original(apply, params, resize, named, update, state):
    """Checks logits at three sizes, all gradients and five updates against the original's.

    named makes {released name: array} of gradients; update returns new params and state.
    """
    for size, logits in LOGITS.items():
        assert_allclose(apply(resize(params, size), INPUTS[size])[0], logits, atol=5e-6)
    loss_and_gradient = jax.value_and_grad(lambda p: vit.cross_entropy(apply(p, IMAGES), TARGETS))
    for step, expected in enumerate(LOSSES):
        loss, grads = loss_and_gradient(params)
        assert_allclose(loss, expected, atol=1e-5)
        if step == 0:
            r, arrays = np.random.RandomState(3), [x for _, x in sorted(named(grads).items())]
            products = [np.vdot(x, r.standard_normal(x.shape)) for x in arrays]
            assert_allclose(products, [*map(float, GRADIENTS.split())], atol=1e-5)
        # Outside of jit, inside which XLA may keep more bits of a bfloat16 than it has.
        params, state = update(params, state, grads, step)
    assert_allclose(apply(params, IMAGES)[0], UPDATED, atol=1e-5)


@pytest.mark.parametrize("remat", [False, True])
def test_logits_gradients_and_updates_equal_the_originals(params, remat):
    def update(params, momentum, grads, step):
        rate = vit.learning_rate(step, 0.03, total_steps=5, warmup_steps=2)
        return vit.sgd_update(params, momentum, vit.clip_by_global_norm(grads, 1.0), rate)

    apply = jax.jit(functools.partial(vit.forward, remat=remat))
    assert_original(apply, params, vit.adapt, released, update, vit.sgd_init(params))
    pytest.raises(TypeError, vit.forward, params, INPUTS[48])


@pytest.mark.skipif("UPSTREAM" not in os.environ, reason="UPSTREAM names no copy of the original")
def test_the_original_computes_these_numbers_again(monkeypatch):
    needed = "flax", "optax", "flax.training.checkpoints", "scipy.ndimage"
    flax, optax, *_ = map(pytest.importorskip, needed)
    monkeypatch.syspath_prepend(os.environ["UPSTREAM"])
    idle = "tensorflow.io clu pandas tqdm vit_jax.input_pipeline vit_jax.models tensorflow"
    idle = {name: mock.MagicMock(**{"gfile.GFile": open}) for name in idle.split()}
    with mock.patch.dict(sys.modules, idle):
        from vit_jax import checkpoint, models_vit, utils
    sizes = dict(num_layers=2, mlp_dim=64, num_heads=4, dropout_rate=0, attention_dropout_rate=0)
    model = models_vit.VisionTransformer(5, mock.Mock(size=(8, 8)), sizes, hidden_size=32)
    rates = utils.create_learning_rate_schedule(5, 0.03, "cosine", 2)
    sgd = optax.sgd(rates, momentum=0.9, accumulator_dtype="bfloat16")
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), sgd)
    named = functools.partial(flax.traverse_util.flatten_dict, sep="/")

    def resize(params, size):
        arrays, tokens = named(params), 1 + size**2 // 64
        table = checkpoint.interpolate_posembed(arrays[EMBEDDINGS], tokens, True)
        return vit.nest(arrays | {EMBEDDINGS: table})

    def update(params, state, grads, step):
        updates, state = optimizer.update(grads, state)
        return optax.apply_updates(params, updates), state

    np.savez("x.npz", **seeded_weights())
    params = checkpoint.load("x.npz")
    apply = jax.jit(lambda params, images: model.apply({"params": params}, images, train=False))
    assert_original(apply, params, resize, named, update, optimizer.init(params))


def test_initial_parameters_have_published_sizes_and_distributions_and_are_all_different():
    published = {"Ti_16": (3, 5717416), "S_16": (6, 22050664), "B_32": (12, 88224232)}
    published |= {"L_16": (16, 304326632), "H_14": (16, 632045800)}
    for name, (heads, count) in published.items():
        new = functools.partial(vit.init_params, jax.random.key(0), f"ViT-{name}", 224, 1000)
        assert sum(x.size for x in jax.tree.leaves(jax.eval_shape(new))) == count
        assert vit.SIZES[name[:-3]][2] == heads
    a, b = (6 / (64 + 64)) ** 0.5, (6 / (64 + 256)) ** 0.5  # of all heads together; of the MLP
    laws = {
        "MultiHead.*kernel": scipy.stats.uniform(-a, 2 * a),
        "MlpBlock.*kernel": scipy.stats.uniform(-b, 2 * b),
        "MlpBlock.*bias": scipy.stats.norm(0, 1e-6),
        "pos_embedding": scipy.stats.norm(0, 0.02),
        "^embedding/kernel": scipy.stats.truncnorm(-2, 2, 0, (3 * 8**2) ** -0.5 / 0.8796),
    }
    arrays, starts = released(vit.init_params(jax.random.key(0), "ViT-XS_8", 16, 2)), []
    for name, x in arrays.items():
        law = [law for pattern, law in laws.items() if re.search(pattern, name)]
        if law:
            assert scipy.stats.kstest(x.ravel(), law[0].cdf).pvalue > 1e-3, name
            starts.append(x.ravel()[:64])
        else:
            assert np.all(x == name.endswith("scale")), name
    assert abs(np.corrcoef(starts) - np.eye(18)).max() < 0.6  # it is 1 for one key twice


def test_dropout_comes_after_embeddings_attention_gelu_and_mlp(params):
    x, key = np.random.RandomState(0).standard_normal((100, 100)), jax.random.key(7)
    dropped = np.asarray(vit.dropout(x, key, 0.3))
    assert abs(np.mean(dropped == 0) - 0.3) < 0.02 and vit.dropout(x, None, 0.3) is x
    assert_allclose(dropped[dropped != 0], (x / 0.7)[dropped != 0], rtol=1e-5)
    first, *keys = jax.random.split(key, 3)
    x = vit.dropout(vit.embed(params, IMAGES), first, 0.3)
    for i, key in enumerate(keys):
        block = jax.tree.map(lambda p, i=i: p[i], params["Transformer"]["encoderblock"])
        one, two, three = jax.random.split(key, 3)
        y = vit.layer_norm(x, **block["LayerNorm_0"])
        x += vit.dropout(vit.attention(y, **block["MultiHeadDotProductAttention_1"])[0], one, 0.3)
        y = vit.linear(vit.layer_norm(x, **block["LayerNorm_2"]), **block["MlpBlock_3"]["Dense_0"])
        y = vit.dropout(jax.nn.gelu(y), two, 0.3)
        x += vit.dropout(vit.linear(y, **block["MlpBlock_3"]["Dense_1"]), three, 0.3)
    found = vit.forward(params, IMAGES, jax.random.key(7), 0.3)
    assert_allclose(found, vit.head(params, x), atol=1e-5)


def test_with_bfloat16_norms_softmax_and_logits_stay_in_float32(params):
    x = (100 + np.random.RandomState(0).standard_normal((1, 5, 32))).astype(jnp.bfloat16)
    y = vit.layer_norm(x, np.ones(32, "f"), np.zeros(32, "f"))
    assert_allclose(np.float64(y), scipy.stats.zscore(np.float64(x), axis=-1), atol=0.02)
    logits = forward(params, IMAGES.astype(jnp.bfloat16))
    assert_allclose(logits, forward(params, IMAGES), atol=0.05)
    block = jax.tree.map(lambda p: p[0], params["Transformer"]["encoderblock"])
    for found in (logits, encoder_block(y, block)[1]):  # with more digits than bfloat16 has
        assert found.dtype == np.float32 and np.mean(found == found.astype(y.dtype)) < 0.1


# ------------------------------------------------------------------------------------ 2. Learning
def test_an_update_on_eight_devices_is_what_its_description_says(params):
    options = {"total_steps": 10, "warmup_steps": 2, "base_lr": 0.1, "decay_type": "linear"}
    options |= {"grad_norm_clip": 0.1, "dropout": 0.5, "mixup_alpha": 0.7, "accum_steps": 2}
    options, r = vit.Options(**options, seed=3), np.random.RandomState(0)
    images = r.randint(0, 256, (8, 2, 3, 32, 32, 3), np.uint8)  # devices, parts, images of each
    labels = r.randint(0, 5, (8, 2, 3)).astype(np.int32)
    momentum = jax.tree.map(lambda p: np.full(p.shape, 0.5, jnp.bfloat16), params)
    state = {"params": params, "momentum": momentum, "step": np.int32(6)}
    found, loss, rate = jax.device_get(vit.train_step(state, images, labels, options))

    @jax.jit
    @jax.value_and_grad
    def loss_and_gradient(params, images, targets, key):
        return vit.cross_entropy(vit.forward(params, images, key, 0.5), targets)

    mixup_key, dropout_key = jax.random.split(jax.random.fold_in(jax.random.key(3), 6))
    share, parts = np.asarray(jax.random.beta(mixup_key, 0.7, 0.7)), []
    for device in range(8):
        keys = jax.random.split(jax.random.fold_in(dropout_key, device), 2)
        for x, y, key in zip(images[device], labels[device], keys, strict=True):
            batch = x / np.float32(127.5) - 1, np.eye(5, dtype="f")[y]
            batch = (share * z + (1 - share) * z[::-1] for z in batch)
            parts.append(loss_and_gradient(params, *batch, key))
    expected, grads = jax.tree.map(lambda *x: sum(x) / 16, *jax.device_get(parts))
    norm = np.sqrt(sum(np.vdot(g, g) for g in jax.tree.leaves(grads)))
    rates = vit.learning_rate(np.arange(11), 0.1, 10, 2, "linear")
    assert_allclose(rates, [0, 0.05, *np.linspace(0.1, 1e-5, 9)], atol=1e-8)
    assert norm > 0.2 and equal(jax.device_get(vit.clip_by_global_norm(grads, 2 * norm)), grads)
    momentum = jax.tree.map(lambda g: 0.44921875 + 0.1 / norm * g, grads)  # 0.9 in bfloat16 x 0.5
    updated = jax.tree.map(lambda p, m: p - rate * m, params, momentum)
    assert abs(loss - expected) < 1e-5 and abs(rate - rates[6]) < 1e-7
    assert found["step"] == 7 and equal(found["params"], updated, 2e-6)
    momentum = jax.tree.map(lambda m: m.astype(jnp.bfloat16), momentum)
    assert equal(found["momentum"], momentum, 2e-3)


def test_remat_bfloat16_and_cudnns_attention_reach_the_programs(params, monkeypatch):
    images, labels = np.zeros((8, 1, 2, 32, 32, 3), "u1"), np.zeros((8, 1, 2), "i4")
    state = {"params": params, "momentum": vit.sgd_init(params), "step": np.int32(0)}
    update = functools.partial(vit.train_step, state, images, labels)
    test = functools.partial(vit.eval_step, params, images[:, 0], labels[:, 0])

    def products(step, **flags):  # the dtypes of the matrix products of its program
        program = jax.make_jaxpr(lambda: step(vit.Options(accum_steps=1, **flags)))()
        return re.findall(r"(\w+)\[[\d,]*\] = dot_general", str(program))

    attend = jax.nn.dot_product_attention
    fused = mock.Mock(side_effect=lambda *qkv, implementation: attend(*qkv))
    monkeypatch.setattr(jax.nn, "dot_product_attention", fused)
    assert len(products(update, remat=True)) >= len(products(update)) + 4
    for step in (update, test):
        fused.reset_mock()
        assert "bf16" not in products(step) and products(step, dtype="bfloat16").count("bf16") > 4
        assert not fused.called and products(step, dtype="bfloat16", fused_attention=True)
        assert fused.call_args.kwargs == {"implementation": "cudnn"}
    assert_allclose(vit.forward(params, IMAGES, fused=True)[0], LOGITS[32], atol=1e-5)


# ------------------------------------------------------------------------------------ 3. Examples
def tensorflow_crops(width, height, count):
    """left, upper, w and h as tf.image.sample_distorted_bounding_box draws them."""
    r, smallest = np.random.RandomState(0), 0.05 * width * height
    aspect = r.uniform(0.75, 1.33, count)
    low = np.rint(np.sqrt(smallest / aspect))
    high = (np.rint(np.arange(1, height + 1) * aspect[:, None]) <= width).sum(1)
    h = np.floor(r.uniform(low, high + 1))
    h += h * np.rint(h * aspect) < smallest
    w = np.rint(h * aspect)
    return np.floor(r.uniform(0, width - w)), np.floor(r.uniform(0, height - h)), w, h


@pytest.mark.parametrize("width, height", [(32, 32), (500, 375)])
def test_crops_have_the_distribution_of_tensorflows(width, height):
    rng = np.random.default_rng(0)
    boxes = np.array([vit.inception_crop(rng, width, height) for _ in range(20_000)])
    left, upper, right, lower = boxes.T
    both = (left, upper, right - left, lower - upper), tensorflow_crops(width, height, 20_000)
    for a, b in zip(*([*x, x[2] * x[3], x[2] / x[3], x[0] + x[2]] for x in both), strict=True):
        assert scipy.stats.ks_2samp(a, b).pvalue > 1e-3
        assert abs(np.mean(a == a.max()) - np.mean(b == b.max())) < 0.006  # at the far end
        assert width > 32 or (a.min(), a.max()) == (b.min(), b.max())


def examples(data, indices, size, **flags):
    found = [vit.training_example(data, vit.Options(**flags), size, i) for i in indices]
    return np.stack([image for image, _ in found]), [label for _, label in found]


def test_each_epoch_shows_every_example_once_in_an_order_of_its_own():
    images, labels = examples(numbers(10), range(20), 4)
    first, second = labels[:10], labels[10:]
    assert labels == images[:, 0, 0, 0].tolist()
    assert sorted(first) == sorted(second) == [*range(10)] and first != second != sorted(second)
    assert first != examples(numbers(10), range(10), 4, seed=1)[1]
    for label in (-1, 10):
        data = numbers(10) | {"read": lambda i, label=label: (noise(4), label)}
        with pytest.raises(vit.BadInput, match=f"label.* {label}"):
            examples(data, [0], 4)


def test_every_crop_is_another_and_half_of_them_are_mirrored():
    picture, ramp = noise(64), Image.linear_gradient("L").rotate(90).convert("RGB")
    one, two, again = examples(numbers(1, picture), [5, 6, 5], 16)[0]
    [other] = examples(numbers(1, picture), [5], 16, seed=1)[0]
    assert equal(one, again) and len({x.tobytes() for x in (one, two, other)}) == 3
    images = examples(numbers(1, ramp), range(200), 16)[0].astype(int)
    assert 70 < sum(images[:, 0, 0, 0] > images[:, 0, -1, 0]) < 130
    assert equal(images[:, 0], images[:, -1])  # none is upside down


def test_devices_hosts_and_threads_share_out_every_place_of_a_batch_in_order(monkeypatch):
    wanted = np.random.RandomState(0).permutation(48).astype(np.int32).reshape(6, 4, 2)
    batches = [*vit.batches(lambda i: (np.full((2, 2, 3), i, np.uint8), i), wanted)]
    assert equal(np.stack([labels for _, labels in batches]), wanted)
    assert equal(np.stack([images[..., 1, 0, 2] for images, _ in batches]), np.uint8(wanted))
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {1, 3, 4, 5, 8}, raising=False)
    assert runpy.run_path(vit.__file__)["CPUS"] == 5  # as many as we may use
    monkeypatch.setattr(jax, "local_device_count", lambda: 2)
    assert vit.batch_positions(8, 2).tolist() == [[[0, 1], [2, 3]], [[4, 5], [6, 7]]]
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(jax, "process_index", mock.Mock(side_effect=(0, 1)))
    assert np.ravel([vit.batch_positions(16, 2) for _ in range(2)]).tolist() == [*range(16)]


# ------------------------------------------------------------------------ 4. Training, 5. Options
@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    """A run of 30 updates of 160 s on pictures, tested twice, for a million seconds each time."""
    root, lines, updates = tmp_path_factory.mktemp("learned"), [], itertools.count(0, 160)
    command = f"{picture_folder(root / 'data')} {TINY} --logdir={root / 'run'} "

    def now():
        return next(updates) + 1e6 * len([x for x in lines if "accuracy" in x])

    with mock.patch.multiple(vit, time=mock.Mock(perf_counter=now), say=lines.append):
        assert vit.main(command.split()) == 0
    return SimpleNamespace(root=root, logdir=root / "run", command=command, lines=lines)


def test_pictures_are_learned_and_each_update_and_evaluation_is_told_and_in_metrics(learned):
    (head, *rows), _ = result(learned.logdir)
    assert head == ["step", "loss", "learning_rate", "test_accuracy"]
    assert [(n, accuracy) for n, *_, accuracy in rows if accuracy] == [("15", "1.0"), ("30", "1.0")]
    updates = np.array([row[:3] for row in rows], float)
    assert updates[:, 0].tolist() == [*range(1, 31)] and updates[-1, 1] < 0.1
    assert_allclose(updates[0, 1], np.log(2), rtol=1e-5)  # the head was zeros
    assert_allclose(updates[:, 2], 0.1 * np.cos(np.pi / 60 * np.arange(30)) ** 2, rtol=1e-5)
    n, loss, rate = updates[19]  # 160 s each, without the evaluation after 15: 1,600 s left
    line = f"step 20/30  loss {loss:.4f}  lr {rate:.2e}  0.1 images/s  26:40 left, plus evaluations"
    assert line in learned.lines and len([x for x in learned.lines if "  0.1 images/s" in x]) == 30
    assert learned.lines[0].endswith("16 images for training and 10 for testing, of 2 classes")
    assert learned.lines.count("test accuracy 100.00% of 10 images") == 2
    data = vit.load_data(str(learned.root / "data"), vit.Options())
    images = [data["read"](data["train"][i])[0] for i in vit.epoch_order(0, 0, 16)[:8]]
    expected = np.hstack([image.resize((16, 16), Image.Resampling.BILINEAR) for image in images])
    assert np.array_equal(Image.open(learned.logdir / "first_batch.png"), expected)


def test_evaluation_counts_every_image_once_and_tests_what_a_run_would_go_on_from(learned):
    params = seeded_params(**XS)
    params["head"] = {"kernel": np.zeros((64, 2), "f"), "bias": np.float32([1, 0])}  # guesses 0
    for count, right in ((5, 2), (37, 16)):  # in batches of sixteen
        data = {"test": range(count), "read": lambda i: (noise(16), int(i % 5 > 1))}
        options = vit.Options(batch_size=32, accum_steps=2)
        assert vit.evaluate(vit.replicate(params), data, options) == right / count
    np.savez("x.npz", **seeded_weights(**XS), class_names=["cat", "dog"])
    command = f"{learned.command} --eval_only --pretrained=x.npz".replace("--image_size=16", "")
    with mock.patch.object(vit, "eval_step", side_effect=vit.eval_step) as eval_step:
        out = run(command)
        assert f"testing {learned.logdir}/checkpoint.npz" in out and "test accuracy 100.00%" in out
        assert eval_step.call_args.args[1].shape == (8, 2, 16, 16, 3)  # as the checkpoint has it
        assert "testing x.npz" in run(f"{command} --logdir=new --image_size=33 --dtype=bfloat16")
    assert eval_step.call_args.args[1].shape == (8, 2, 32, 32, 3)


def test_fine_tuning_returns_the_params_that_it_saves_or_ends_with_the_first_nan(learned):
    np.savez("x.npz", **seeded_weights(**XS | {"K": 7}))
    *_, options = vit.parse_options(f"own {TINY} --pretrained=~/x.npz".split())
    with mock.patch.object(vit, "training_example", side_effect=vit.training_example) as example:
        tuned = vit.train(options, numbers(2))
    assert {call.args[-1] for call in example.call_args_list} == {*range(30 * 16)}
    assert equal(vit.load_checkpoint("runs/own/checkpoint.npz"), tuned)
    moved = abs(tuned["cls"] - seeded_weights(**XS)["cls"])
    assert 0 < moved.max() < 0.3 and tuned["head"]["bias"].shape == (2,)  # a new head
    pytest.raises(vit.BadInput, vit.train, options, numbers(0)).match("no images for training")
    large = {"cls": np.full((1, 1, 64), 3e38, "f"), EMBEDDINGS: np.full((1, 5, 64), 3e38, "f")}
    np.savez("x.npz", **seeded_weights(**XS) | large)  # their sum is infinite
    assert "loss of step 1 is nan" in run(f"{learned.command} --pretrained=x.npz --logdir=new", 2)
    nan = jax.tree.map(lambda p: p + np.nan, tuned)
    pytest.raises(vit.BadInput, vit.save_checkpoint, "new/y.npz", nan).match("not finite")
    assert sorted(os.listdir("new")) == ["first_batch.png", "lock"]


def test_the_recipe_is_the_published_one_and_digits_have_their_own_and_are_drawn_as_labelled():
    # google-research/vision_transformer, vit_jax/configs/common.py, with its README's base_lr
    published = """batch_size=512 accum_steps=8 base_lr=0.03 decay_type=cosine warmup_steps=500
        grad_norm_clip=1.0 eval_every=100 image_size=384 dtype=float32 dropout=0.0 mixup_alpha=0.0
        augment=inception model=ViT-B_16 total_steps=10000"""
    digits = "model=ViT-XS_8 pretrained=none base_lr=0.1 total_steps=800 seed=4 logdir=runs/digits"
    recipes = {"cifar10": published, "--seed=4": digits, "digits --base_lr=0.2": "base_lr=0.2"}
    recipes["imagenet2012:5.1.0"] = published.replace("=10000", "=20000")
    for command, recipe in recipes.items():
        *_, options = vit.parse_options(command.split())
        assert {*recipe.split()} <= {f"{name}={x}" for name, x in vars(options).items()}
    data = vit.load_data("digits", vit.Options())
    images, labels = zip(*map(data["read"], range(500)), strict=True)
    assert labels == tuple(range(10)) * 50 and len({image.tobytes() for image in images}) == 500
    light = [np.mean([np.mean(image) for image in images[i::10]]) for i in range(10)]
    assert np.argsort(light)[:2].tolist() == [1, 7]  # the digits with the least ink
    assert (len({*data["train"]}), len({*data["test"]} - {*data["train"]})) == (8000, 1000)


# --------------------------------------------------------------------------------- 6. Checkpoints
KINDS = {"F32": np.float32, "F16": np.float16, "BF16": jnp.bfloat16}
# What timm calls the layers and arrays that are called otherwise in the release.
TIMM = """Transformer/encoderblock_=blocks. Transformer/encoder_norm=norm cls=cls_token
    Transformer/posembed_input/pos_embedding=pos_embed embedding/=patch_embed.proj/
    LayerNorm_0=norm1 LayerNorm_2=norm2 MlpBlock_3/Dense_0=mlp.fc1 MlpBlock_3/Dense_1=mlp.fc2
    MultiHeadDotProductAttention_1/out=attn.proj MultiHeadDotProductAttention_1=attn
    /=. scale=weight kernel=weight"""


def timm_arrays(**sizes):
    """The seeded weights of a ViT-XS_8 as timm stores them: {timm's name: array}."""
    arrays = {}
    for name, array in seeded_weights(**XS | sizes).items():
        if name == "embedding/kernel":
            array = array.transpose(3, 2, 0, 1)
        elif name.endswith("kernel"):  # of query, key, value and out with an axis of heads
            array = (array.reshape(64, 64) if array.ndim == 3 else array).T
        for ours, theirs in (line.split("=") for line in TIMM.split()):
            name = name.replace(ours, theirs)
        arrays[name] = array.ravel() if name.endswith("bias") else array
    for name in [name for name in arrays if "query" in name]:
        parts = [arrays.pop(name.replace("query", part)) for part in ("query", "key", "value")]
        arrays[name.replace("query", "qkv")] = np.concatenate(parts)
    return arrays


def safetensors(arrays, kind="F32", data=b""):
    """A .safetensors file: the length of a header, which is in any order, the header, and data."""
    header = {"__metadata__": {"format": "pt"}}
    for name, array in reversed(arrays.items()):
        begin, data = len(data), data + array.astype(KINDS[kind]).tobytes()
        place = {"shape": [*array.shape], "data_offsets": [begin, len(data)]}
        header = {name: {"dtype": kind} | place} | header
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


@pytest.mark.parametrize("kind, without", [("F32", "nothing"), ("F16", "head"), ("BF16", "head")])
def test_a_safetensors_file_of_timm_gives_exactly_the_weights_in_it(kind, without):
    arrays = {name: array for name, array in timm_arrays().items() if without not in name}
    Path("x").write_bytes(file := safetensors(arrays, kind))  # no ending tells what it is
    expected = {k: np.float32(x.astype(KINDS[kind])) for k, x in seeded_weights(**XS).items()}
    expected = {name: x for name, x in expected.items() if without not in name}
    assert equal(released(vit.load_checkpoint("x")), expected)
    for other in (file + b"more", safetensors(arrays, kind, data=b"a gap before the first")):
        Path("x").write_bytes(other)
        pytest.raises(vit.BadInput, vit.load_checkpoint, "x").match("do not follow each other")


def test_timm_reads_what_we_save_and_we_what_timm_saves():
    timm, torch = pytest.importorskip("timm"), pytest.importorskip("torch")
    params = seeded_params(depth=3, P=16, D=64, E=16, M=256, N=5, K=7)
    vit.save_checkpoint("x.npz", params, class_names=[*"abcdefg"])
    sizes = dict(img_size=32, patch_size=16, embed_dim=64, depth=3, num_heads=4, num_classes=7)
    gelu = functools.partial(torch.nn.GELU, approximate="tanh")
    model = timm.models.VisionTransformer(**sizes, act_layer=gelu).eval()
    model.load_pretrained("x.npz")
    theirs = model(torch.tensor(IMAGES.transpose(0, 3, 1, 2))).detach().numpy()
    assert_allclose(forward(params, IMAGES), theirs, atol=1e-5)
    Path("y").write_bytes(safetensors({name: x.numpy() for name, x in model.state_dict().items()}))
    assert equal(vit.load_checkpoint("y"), params)


def test_fine_tuning_drops_pre_logits_and_begins_with_a_head_of_zeros(params):
    kernel = np.random.RandomState(0).standard_normal((32, 32)).astype(np.float32) / 5
    more = {"pre_logits/kernel": kernel, "pre_logits/bias": kernel[0], "class_names": kernel}
    whole = vit.to_params(seeded_weights() | more, "x")
    features = forward(params | {"head": {"kernel": np.eye(32), "bias": np.zeros(32)}}, IMAGES)
    expected = vit.linear(np.tanh(features @ kernel + kernel[0]), **params["head"])
    assert_allclose(forward(whole, IMAGES), expected, atol=1e-5)
    for classes in (5, 7):  # as many as before, and others
        zeros = {"kernel": np.zeros((32, classes), "f"), "bias": np.zeros(classes, "f")}
        assert equal(vit.adapt(whole, 48, classes), vit.adapt(params, 48) | {"head": zeros})
    assert equal(vit.adapt(whole, 0), whole)
    assert equal(released(seeded_params(depth=12)), seeded_weights(depth=12))


@pytest.mark.parametrize("kind", ["npz", "safetensors", "png"])
def test_a_damaged_file_is_bad_input_or_gives_the_right_weights_or_a_picture(kind):
    params, r, noticed = seeded_params(**XS), np.random.default_rng(0), 0
    noise(40).save("x.png")
    vit.save_checkpoint("x.npz", params)
    Path("x.safetensors").write_bytes(safetensors(timm_arrays()))
    data = np.fromfile(f"x.{kind}", np.uint8)
    for i in range(40):
        broken = data.copy()  # in its beginning, as the arrays of safetensors have no checksums
        broken[r.integers(3000, size=1 + i % 3)] ^= np.uint8(1 + i)
        Path("x").write_bytes(broken[: r.integers(len(data)) if i % 4 == 0 else None].tobytes())
        try:
            if kind == "png":
                assert vit.decode("x", "x").size == (40, 40)
            else:
                assert equal(vit.load_checkpoint("x"), params)
        except vit.BadInput:  # and no other exception
            noticed += 1
    assert noticed > 25


# ------------------------------------------------------------------------------ 7. Runs and hosts
def test_ctrl_c_a_full_disk_and_full_memory_cost_nothing_but_time(learned, capsys):
    command = f"{learned.command} --logdir=~/new"
    with mock.patch.object(vit, "evaluate", side_effect=[1.0, KeyboardInterrupt]):
        assert "stopped" in run(command, 130)
    saved = result("new")
    with mock.patch.object(os, "fsync", side_effect=OSError(28, "No space left")):
        assert "No space left" in run(command, 2)
    assert result("new") == saved and not [*Path().rglob("*partial")]
    assert "step 15 of 30" in run(command) and result("new") == result(learned.logdir)
    assert "this run is complete" in run(command)
    full = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: x")
    with mock.patch.object(vit, "train", side_effect=[full, KeyError]):
        assert "out of memory: raise --accum_steps" in run(command, 2)
        assert vit.main(command.split()) == 1 and "Traceback" in capsys.readouterr().err  # a bug


def test_a_run_killed_at_any_moments_ends_bit_for_bit_as_one_left_alone_and_is_never_shared():
    options = f"{picture_folder('data')} {TINY} --dropout=0.1 --augment=inception --eval_every=3"
    for sign in ("step 4/", "step 16/"):
        process = start(vit.__file__, *options.split(), "--logdir=killed", devices=2)
        assert any(line.startswith(sign) for line in process.stdout)
        process.send_signal(signal.SIGSTOP)
        if sign == "step 4/":  # while it lives, a second run wants the same folder
            assert "another process" in run(f"{options} --logdir=killed --base_lr=0.2", 2)
        process.kill()
        process.communicate()
    step = int(vit.read_arrays("killed/checkpoint.npz")["train/step"])
    both = "import sys, vit\nfor x in 'killed', 'whole': vit.main([*sys.argv[1:], '--logdir=' + x])"
    out, _ = start("-c", both, *options.split(), devices=2).communicate(timeout=300)
    assert f"killed: step {step} of 30, on 2 x" in out and "whole: step 0" in out and step >= 3
    assert result("killed") == result("whole")


def test_a_run_is_resumed_only_with_the_options_and_data_that_define_it(learned):
    free = "--accum_steps=2 --remat --log_every=7 --eval_every=7 --data_dir=other"
    assert "step 30 of 30" in run(f"{learned.command} {free}")
    others = """--model=ViT-Ti_8 --pretrained=x --image_size=24 --dtype=bfloat16 --batch_size=32
        --total_steps=31 --warmup_steps=1 --base_lr=0.2 --decay_type=linear --grad_norm_clip=2
        --dropout=0.1 --mixup_alpha=0.2 --augment=inception --seed=1"""
    for other in others.split():
        changed = other.removeprefix("--").replace("=", " was .*, not ")
        assert re.search(f"another run.* its {changed}", run(f"{learned.command} {other}", 2))
    *_, options = vit.parse_options(learned.command.split())
    data = vit.load_data(str(learned.root / "data"), options)
    for other in ({"name": "x"}, {"classes": ["a", "b"]}, {"train": [1]}, {"test": [1]}):
        pytest.raises(vit.BadInput, vit.train, options, data | other).match("another run")
    with mock.patch.object(vit, "sgd_init", lambda params: {"v": params}):
        assert "another optimizer" in run(learned.command, 2)


HOST = """
import os, sys, vit
rank, address, *commands = sys.argv[1:]
for i, command in enumerate(commands):
    if i == 1:  # JAX lets hosts meet only once
        vit.join_hosts = lambda options: None
    flags = ["--num_processes=2", f"--coordinator_address={address}", f"--process_id={rank}"]
    print(f"status {vit.main(command.replace('RANK', rank).split() + flags)}", file=sys.stderr)
os._exit(7)  # the other host must not be left waiting
"""


def test_two_hosts_equal_one_and_end_together_and_are_told_where_they_differ(learned):
    bad, data = picture_folder("bad"), learned.root / "data"
    first = vit.load_data(str(bad), vit.Options())["train"][vit.epoch_order(0, 0, 16)[1]]
    Path(first[1]).write_text("no image")  # which the first host reads
    told = {f"{data} {TINY} --seed=RANK": "differ in seed", f"{data} {TINY} --logdir=run": None}
    told[f"{data} {TINY} --pretrained=x.npz"] = "differ in the weights"
    told[f"dataRANK {TINY}"] = "differ in data"
    with socket.create_server(("127.0.0.1", 0)) as free:
        address, hosts = f"127.0.0.1:{free.getsockname()[1]}", []
    for rank in "01":
        picture_folder(f"{rank}/data{rank}")
        weights = seeded_weights(**XS) | {"embedding/bias": np.full(64, rank, "f")}
        np.savez(f"{rank}/x.npz", **weights)
        arguments = rank, address, *told, f"{bad} {TINY} --logdir=bad"
        hosts.append(start("-c", HOST, *arguments, devices=2, cwd=rank))
    (out, error), (other_out, other_error) = (host.communicate(timeout=300) for host in hosts)
    for lines in (error, other_error):
        found = iter(re.findall(r"^vit\.py: .*|^status .*|^Trace.*", lines, re.M))
        for why in told.values():
            assert (not why or why in next(found)) and next(found) == f"status {2 if why else 0}"
    assert f"cannot read the image {first[1]}" in error and hosts[0].returncode == 7
    assert hosts[1].returncode not in (0, 7)  # JAX ended it
    one, two = (vit.load_checkpoint(Path(x, "checkpoint.npz")) for x in (learned.logdir, "0/run"))
    assert equal(one, two, 1e-5)
    assert out.count("test accuracy 100.00% of 10 images\n") == 2 and "on 4 x cpu" in out
    assert "waiting for all hosts" in other_out and not re.search("step|compil|accur", other_out)
    assert sorted(os.listdir("1")) == ["data1", "x.npz"]  # only the first writes


# ------------------------------------------------------------------------------------ 8. Datasets
@pytest.fixture
def hub(monkeypatch):
    """The Hugging Face hub: what it answers at each path (or a status), and what it was asked."""
    hub = SimpleNamespace(answers={}, asked=[])

    def urlopen(url, timeout):
        hub.asked.append(url.removeprefix("https://mirror"))
        answer = hub.answers.get(hub.asked[-1], 404)
        if isinstance(answer, int) or timeout != 60:  # seconds of silence
            raise urllib.error.HTTPError(url, answer, "the reason", {}, None)
        reply = mock.MagicMock(read=io.BytesIO(answer).read, length=10 * answer.startswith(b"cut"))
        reply.__enter__.return_value = reply  # its length is what is still to come
        return reply

    monkeypatch.setattr(urllib.request, "urlopen", urlopen)
    monkeypatch.setattr(vit, "HUB", "https://mirror")
    return hub


def load_set(hub, name, columns=("image", "labels"), config="default", types=(), **splits):
    """Puts a set on the hub, split=[for each file, its (grey, label)s], and loads it."""
    image, label = columns
    types = {"id": "Value", image: "Image", label: "ClassLabel"} | dict(types)
    names = {"names": [f"{label} {i}" for i in range(10)]}
    info = {"info": {"features": {x: names | {"_type": kind} for x, kind in types.items()}}}
    listing, path = {}, f"/api/datasets/{'/'.join(name.split('/')[:2])}/parquet"
    for split, (i, rows) in ((x, file) for x in splits for file in enumerate(splits[x])):
        table = {column: [9 - y for _, y in rows] for column in types}  # of columns not to be used
        table |= {image: [{"bytes": grey_png(x), "path": None} for x, _ in rows]}
        table = pa.table(table | {label: [y for _, y in rows]})
        table = table.replace_schema_metadata({"huggingface": json.dumps(info)})
        pq.write_table(table, file := io.BytesIO())
        place = f"{path}/{config}/{split.replace('_', '-')}/{i}.parquet"
        listing.setdefault(split.replace("_", "-"), []).append(f"https://huggingface.co{place}")
        hub.answers[place] = file.getvalue()
    hub.answers[path] = json.dumps({"default": {}} | {config: listing}).encode()
    return vit.load_data(f"hf://datasets/{name}", vit.Options())


def greys(first, count, label=None):
    return [(i, i % 10 if label is None else label) for i in range(first, first + count)]


def seen(data):
    """The greys of the images for training and testing; each label is the grey's last digit."""
    splits = [[*map(data["read"], data[split])] for split in ("train", "test")]
    assert all(label == image.getpixel((0, 0))[0] % 10 for image, label in itertools.chain(*splits))
    return [sorted(image.getpixel((0, 0))[0] for image, _ in split) for split in splits]


@pytest.mark.parametrize("name, label", [("cifar10", "label"), ("cifar100", "fine_label")])
def test_cifar_is_the_hubs_without_two_percent_and_is_fetched_once(hub, name, label):
    more = {"coarse_label": "ClassLabel"} if name == "cifar100" else {}
    splits = {"train": [greys(0, 100)], "test": [greys(200, 7)]}
    load_set(hub, f"uoft-cs/{name}", ("img", label), types=more, **splits)
    assert hub.asked[0] == f"/api/datasets/uoft-cs/{name}/parquet" and len(hub.asked) == 3
    hub.answers.clear()
    data = vit.load_data(name, vit.Options())
    assert seen(data) == [[*range(98)], [*range(200, 207)]] and len(hub.asked) == 3
    assert data["classes"] == [f"{label} {i}" for i in range(10)]


def test_a_set_of_the_hub_is_tested_on_labelled_images_never_trained_on_or_refused(hub, capsys):
    load = functools.partial(load_set, hub, train=[greys(0, 12), greys(12, 8)])
    tenth, hidden = [[i for i in range(20) if i % 10], [0, 10]], [greys(200, 3, label=-1)]
    found = load("me/two", validation=[greys(100, 5)])
    assert seen(found) == [[*range(20)], [*range(100, 105)]]
    assert seen(load("me/hidden", test=hidden)) == tenth
    assert seen(load("me/val", test=hidden, val=[greys(100, 3)]))[1] == [100, 101, 102]
    both = load("me/both", validation=[greys(100, 5)], test=[greys(200, 3)])
    assert seen(both)[1] == [200, 201, 202]
    assert seen(load("me/large", partial_test=[greys(200, 3)])) == tenth
    assert "partial-test" in capsys.readouterr().out
    alone = load_set(hub, "me/more/second", test=[greys(50, 3)], config="second")
    assert seen(alone) == [[], [50, 51, 52]]
    refused = {"a/more/third": ("train", "only .*'default'"), "a/x": ("extra", "no train.*'extra'")}
    for name, (split, why) in (refused | {"a/text": ("train", "no images")}).items():
        kinds = {"labels": "Value"} if name == "a/text" else {}
        with pytest.raises(vit.BadInput, match=f"{name} .*{why}"):
            load_set(hub, name, types=kinds, **{split: [greys(0, 3)]})
    answers = {"cut": (b"cut" * 9000, "10 bytes"), "gated": (401, "401"), "absent": (404, "404")}
    for name, (hub.answers[path := f"/api/datasets/a/{name}/parquet"], why) in answers.items():
        by_hand = f"by hand, put it at .*/downloads/mirror{path.replace('/', '--')}"
        line = run(f"hf://datasets/a/{name}", 2)
        assert re.search(f"https://mirror{path} .*{why}.*{by_hand}", line)
    assert not [*Path().rglob("downloads/*a--cut*"), *Path().rglob("downloads/*partial")]


def test_released_weights_are_timms_on_the_hub_or_its_mirror(hub, monkeypatch):
    models = {"ViT-Ti_16": "tiny_patch16_{}.augreg_{}", "ViT-B_16": "base_patch16_{}.orig_{}"}
    for model, name in models.items():
        for sizes in [("224", "in21k"), ("384", "in21k_ft_in1k")]:
            path = f"/timm/vit_{name.format(*sizes)}/resolve/main/model.safetensors"
            retriever = {"head.bias": 50 * np.eye(1000, dtype="f")[207]}
            hub.answers[path] = safetensors(timm_arrays(K=1000) | retriever)
            vit.pretrained_file(vit.Options(model=model), fine_tuned=sizes[0] == "384")
            assert hub.asked[-1] == path
    noise(20).save("a.png")
    hub.answers.clear()  # photos take the weights of ImageNet, and its names
    assert "100.00%  golden retriever" in run("a.png")
    monkeypatch.setenv("HF_ENDPOINT", "https://mirror/")
    assert runpy.run_path(vit.__file__)["HUB"] == "https://mirror"


def test_pictures_of_a_folder_lie_in_folders_called_as_their_class_and_others_are_counted(capsys):
    root = picture_folder("data")
    flat = vit.load_data(str(root / "train"), vit.Options())  # every tenth is for testing
    assert (len(flat["train"]), len({*flat["test"]} - {*flat["train"]})) == (14, 2)
    (root / "test").rename(root / "validation")
    (root / "train/dog").rename("elsewhere")
    (root / "train/dog").symlink_to(Path("elsewhere").absolute())  # a class may be a link
    (root / "train/again").symlink_to(root / "train")  # this one has no pictures, only folders
    (root / "train/cat/3.png").rename(root / "train/cat/3.PNG")
    (root / "train/dog/folder.jpg").mkdir()
    for name in ("a.heic", "b.heic", "c.eps", "._1.png", "picture"):
        (root / "train/cat" / name).write_text("not for Pillow")
    for name in (".ipynb_checkpoints", "@eaDir"):
        shutil.copytree("elsewhere", root / "train" / name)
    data = vit.load_data(str(root), vit.Options())
    assert data["classes"] == ["cat", "dog"] and len(data["test"]) == 10
    assert [label for _, label in map(data["read"], data["train"])] == [0] * 8 + [1] * 8
    [line] = re.findall(".* passed over .*", capsys.readouterr().out)
    assert all(x in line for x in ("'.heic': 2", "'.eps': 1", "'none': 1", "'folder': ")), line


def test_tfds_sets_are_tested_on_labelled_images_never_trained_on():
    pytest.importorskip("array_record")  # not for Windows
    import tensorflow_datasets as tfds

    def load(name, **splits):
        def examples(rows):
            yield from ((x, {"image": io.BytesIO(grey_png(x)), "label": y}) for x, y in rows)

        make = {"_split_generators": lambda *_: {x: examples(rows) for x, rows in splits.items()}}
        kind = type(name.title(), (tfds.testing.DummyMnist,), make)
        kind(data_dir="tensorflow_datasets", file_format="array_record").download_and_prepare()
        return seen(vit.load_data(name, vit.Options()))

    trained, tested = load("one", train=greys(0, 100))
    assert len(trained) == 90 and sorted(trained + tested) == [*range(100)]
    trained, tested = load("two", train=greys(0, 100), val=greys(100, 5))
    assert trained + tested == [*range(105)]
    splits = {"train": greys(0, 100), "validation": greys(100, 5), "test": greys(200, 5, label=-1)}
    trained, tested = load("imagenet2012", **splits)
    assert len(trained) == 99 and tested == [*range(100, 105)] and "tensorflow" not in sys.modules
    pytest.raises(vit.BadInput, load, "pairs", trainA=greys(0, 5)).match("no train .*'trainA'")
    [info] = Path("tensorflow_datasets/two").rglob("dataset_info.json")
    info.write_text(info.read_text().replace("array_record", "tfrecord"))
    prepare = "two must be prepared as ArrayRecord.*--data_dir"
    pytest.raises(vit.BadInput, vit.load_data, "two", vit.Options()).match(prepare)


def test_pictures_become_upright_rgb_on_white_even_with_damaged_metadata():
    (turned := Image.Exif()).update({0x0112: 6, 0x011A: 7.5})  # by a quarter; a resolution
    (text := PngImagePlugin.PngInfo()).add_text("x", "y" * (2 << 20), zip=True)
    more = {"jpeg": {"exif": turned}, "png": {"pnginfo": text, "icc_profile": bytes(2 << 20)}}
    kinds, red = {"jpeg": ("RGB", "CMYK"), "png": ("RGB", "L", "P", "1")}, (200, 30, 30)
    avif = {"avif"} & {*map(str.lower, Image.SAVE)}  # newer Pillows have it
    for kind in {"jpeg", "png", "webp", "bmp", "tiff", "gif", "ppm"} | avif:
        for mode in kinds.get(kind, ("RGB",)):
            image = Image.new("RGB", (40, 20), red).convert(mode)
            image.save(file := io.BytesIO(), kind, **more.get(kind, {}))
            for data in (file.getvalue(), file.getvalue().replace(b"\x1a\0\5", b"\x1a\0\2")):
                read = vit.decode(io.BytesIO(data), "x")  # the second: its resolution is a text
                assert (read.mode, read.size) == ("RGB", (20, 40) if kind == "jpeg" else (40, 20))
                near = abs(np.mean(read, (0, 1)) - np.mean(image.convert("RGB"), (0, 1)))
                assert max(near) < 6
    for mode in ("RGBA", "LA", "P", "RGB", "L"):  # what is transparent is white, whatever it hides
        image, alpha = Image.new("RGB", (9, 9), (51, 102, 204)).convert(mode), mode[-1] == "A"
        image.putalpha(0) if alpha else None
        image.save("x.png", **({} if alpha else {"transparency": image.getpixel((0, 0))}))
        assert (np.asarray(vit.decode("x.png", "x")) == 255).all(), mode


# ------------------------------------------------------------------- 9. Photos, 10. Command line
def test_photos_get_five_names_and_a_picture_lit_by_attention_in_any_terminal(params, monkeypatch):
    np.savez("x.npz", **seeded_weights(), class_names=[*"abcd犬"])
    photos, blocks = ("p.png", "../p.png"), params["Transformer"]["encoderblock"]
    Path("here").mkdir()
    monkeypatch.chdir("here")
    for left, photo in enumerate(photos, -2):
        Image.effect_mandelbrot((90, 60), (left, -1, 1, 1), 50).convert("RGB").save(photo)
    monkeypatch.setattr(sys, "argv", ["vit.py", *photos, "--pretrained=../x.npz"])
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    monkeypatch.setattr(os, "_exit", sys.exit)  # or a failure would end the tests without a word
    runpy.run_path(vit.__file__, run_name="__main__")
    lines, found = sys.stdout.buffer.getvalue().decode(), []
    for photo in photos:
        image = Image.open(photo).resize((32, 32), Image.Resampling.BILINEAR)
        x = vit.embed(params, np.asarray(image)[None] / np.float32(127.5) - 1)
        reached = np.eye(17)
        for i in range(2):
            x, weights = encoder_block(x, jax.tree.map(lambda p, i=i: p[i], blocks))
            reached = (weights[0].mean(axis=0) + np.eye(17)) / 2 @ reached
        shares = 100 * scipy.special.softmax(vit.head(params, x)[0])
        found += [(f"{shares[i]:.2f}", "abcd?"[i]) for i in np.argsort(-shares)]
        patches = reached[0, 1:].reshape(4, 4)
        light = np.uint8(26 + 229 * np.minimum(1, patches / np.percentile(patches, 99)))
        light = Image.fromarray(light).resize((90, 60), Image.Resampling.BILINEAR)
        picture = Image.open(photo.replace("../", "up--") + "-attention.png")
        left, right = np.hsplit(np.asarray(picture, float), 2)
        assert np.array_equal(left, Image.open(photo)) and right.std() > 5
        assert abs(right - left * np.asarray(light)[..., None] / 255).max() < 4
    assert re.findall(r"(\S+)%  (\S)$", lines, re.M) == found


@pytest.fixture(scope="module")
def bad(tmp_path_factory):
    """A folder of files and folders, each with one thing that is bad."""
    root, flat = tmp_path_factory.mktemp("bad"), seeded_weights(**XS)
    bad = {"inf": {BIAS: np.full(64, np.inf)}, "misshapen": {BIAS: np.zeros(7)}}
    bad |= {"oblong": {EMBEDDINGS: np.zeros((1, 4, 64))}, "missing": {BIAS: None}}
    bad |= {"pickled": {"cls": np.array([{}], object)}, "other": {"reg_token": np.ones(1)}}
    bad |= {"names": {"class_names": [*"ab"]}, "headless": {"head/kernel": None, "head/bias": None}}
    for name, more in bad.items():
        arrays = {k: x for k, x in (flat | more).items() if x is not None}
        np.savez(root / f"{name}.npz", **arrays)
    (root / "wide").write_bytes(safetensors({"cls_token": np.zeros((1, 1, 128))}))
    (root / "hf").write_bytes(safetensors({"vit.embeddings.cls_token": np.zeros(9)}))
    for name in ("good", "unknown", "cut_image"):
        picture_folder(root / name)
    (root / "unknown/test/dog").rename(root / "unknown/test/wolf")
    (root / "cut_image/train/dog/3.png").write_bytes(b"\x89PNG")
    Image.fromarray(np.full((8, 8), 300, "uint16")).save(root / "16.png")
    return root


# The line of error names the last word of the command, or what is written after a colon here.
BAD_COMMANDS = """--modle=ViT-B_16 | --model=ViT-Q | --total_steps=0 | --dropout=1 | --base_lr=nan
    --dtype=float16: 'float16' | --batch_size=24 --accum_steps=2: --batch_size=24 | --image_size=7
    --fused_attention: bfloat16 | --fused_attention --dtype=bfloat16: NVIDIA GPU
    --mixup_alpha=0.2 --batch_size=8: --mixup_alpha | --grad_norm_clip=0: --grad_norm_clip
    --warmup_steps=30: --total | --eval_only: runs/digits
    --coordinator_address=foo: =foo | --num_processes=2: HOST:PORT | cifra10 | hf://datasets/OWNER
    --pretrained=released --model=ViT-S_14 | --pretrained=absent.npz | mnist: must be prepared
    --pretrained=http://127.0.0.1:9/v.npz | unknown: 'wolf' | unknown/test/wolf: CLASS/*.jpg
    good --pretrained=names.npz --eval_only: classes | 16.png --pretrained=names.npz: 8 bits
    16.png --pretrained=headless.npz: no head | 16.png good
    16.png --pretrained=released --model=ViT-B_8: =ViT-B_8 is not among
    names.npz --pretrained=names.npz: image names.npz
    cut_image: put another picture in its place | good --pretrained=pickled.npz: allow_pickle
    good --pretrained=other.npz: reg_token | good --pretrained=inf.npz: LayerNorm_2/bias
    good --pretrained=misshapen.npz: (7,) | good --pretrained=missing.npz: LayerNorm_2/bias
    good --pretrained=oblong.npz: 3 patches | good --pretrained=wide: width 128
    good --pretrained=hf: transformers"""


@pytest.mark.parametrize("case", re.split(r"\s*[|\n]\s*", BAD_COMMANDS))
def test_bad_input_is_one_line_that_names_it_and_status_2(case, bad, monkeypatch):
    monkeypatch.chdir(bad)
    command, *words = case.split(": ")
    [words] = words or [command.split()[-1].removeprefix("--pretrained=")]
    assert words in run(f"{TINY} {command}", 2)


def test_the_recipes_of_the_readme_run_on_pictures_of_any_size(monkeypatch):
    def read(i):
        image, label = vit.draw_digit(i)
        return image.resize((32 + i % 3, 32)), label

    data = {"train": range(300), "test": range(300, 340), "classes": [*"0123456789"], "read": read}
    short = vit.PRESETS["digits"] | {"total_steps": 2, "warmup_steps": 1, "batch_size": 16}
    monkeypatch.setitem(vit.PRESETS, "digits", short)
    monkeypatch.setattr(vit, "load_data", lambda *_: data | {"name": "digits"})
    for name in ("sgd_init", "sgd_update"):
        monkeypatch.setattr(vit, name, getattr(vit, name))  # put back after AdamW
    vit.save_checkpoint("runs/digits/checkpoint.npz", seeded_params(**XS | {"N": 17, "K": 10}))
    readme, names = Path(vit.__file__).with_name("README.md").read_text(), {}
    [recipes] = re.findall(r"```python recipes\n(.*?)```", readme, re.S)
    exec(recipes, names)
    assert names["test_x"].shape == (40, 64)  # features
    assert "train/momentum/v/cls" in vit.read_arrays("runs/adamw/checkpoint.npz")
