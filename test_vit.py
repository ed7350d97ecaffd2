# SPDX-License-Identifier: Apache-2.0
"""What vit.py promises, checked: pytest test_vit.py (two to three minutes on two CPU cores).

Expected numbers are the original implementation's (google-research/vision_transformer at c6de1e5,
float32, highest matmul precision), or NumPy, SciPy and Pillow written out, or a second way there.
"""
import ast
import functools
import hashlib
import http.server
import io
import os
import signal
import socket
import subprocess
import sys
import tarfile
import threading
import time
from pathlib import Path

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"  # before jax starts

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage
from PIL import Image

import vit

jax.config.update("jax_default_matmul_precision", "highest")
SMALL = (8, 32, 2, 4, 64)  # patch size, width, depth, heads, MLP width
TINY = ["--pretrained=none", "--model=ViT-XS_8", "--image_size=16", "--batch_size=8",
        "--accum_steps=2", "--warmup_steps=1", "--augment=none", "--log_every=1"]


def seeded_weights(classes=5):
    """{released name: array}, for which the original's numbers below were computed."""
    shapes = jax.eval_shape(lambda: vit.unstack(vit.init_params(
        jax.random.key(0), SMALL, 32, classes)))
    r = np.random.RandomState(0)
    return {name: (0.1 * r.standard_normal(shapes[name].shape)).astype(np.float32)
            + np.float32(name.endswith("/scale")) for name in sorted(shapes)}


@pytest.fixture(scope="module")
def params(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "seeded.npz"
    np.savez(path, **seeded_weights())
    return vit.load_checkpoint(path)


IMAGES = np.random.RandomState(1).uniform(-1, 1, (4, 32, 32, 3)).astype(np.float32)
LABELS = np.array([1, 4, 2, 0])
forward = jax.jit(vit.forward)  # compiled once for all tests


def loss_of(params, images=IMAGES, labels=LABELS):
    return vit.cross_entropy(forward(params, images), jax.nn.one_hot(labels, 5))


def random_params(seed=0, image_size=32, classes=5):
    """Small parameters in which, unlike in those for training, no array is zero."""
    params = vit.init_params(jax.random.key(seed), SMALL, image_size, classes)
    r = np.random.RandomState(seed)
    return jax.tree.map(lambda p: np.float32(p + 0.1 * r.standard_normal(p.shape)), params)


def equal(a, b):
    return all(jax.tree.leaves(jax.tree.map(np.array_equal, a, b)))


# ------------------------------------------------------------------ The numbers are the original's


def test_logits_and_loss_equal_the_original(params):
    np.testing.assert_allclose(forward(params, IMAGES)[0], [
        0.13968338, 0.41093412, 0.3068053, -0.11844803, 0.60040045], atol=5e-6)
    assert abs(loss_of(params) - 1.5707834) < 1e-5


def test_every_gradient_equals_the_original(params):
    grads = vit.unstack(jax.grad(loss_of)(params))
    r = np.random.RandomState(3)  # each gradient's product with a random direction
    products = [np.vdot(grads[k], r.standard_normal(grads[k].shape)) for k in sorted(grads)]
    np.testing.assert_allclose(products, [
        0.126349, 0.027935, 0.145475, 0.005826, 0.063795, -0.166069, 0.351390, -0.377218, 0.173236,
        0.581771, 0, 0.088451, -0.003554, 1.348437, 0.001189, -0.030801, -0.211105, -1.400027,
        0.063067, -0.019732, -0.077804, -0.088163, -0.019895, 0.145312, -0.039812, 0.585964, 0,
        -0.307931, 0.459707, 0.005924, -0.019317, -0.090996, 0.243097, -0.590395, -0.642435,
        -0.179350, 0.056561, -1.730072, -0.368995, 1.325776], atol=1e-5)
    clipped, norm = vit.clip_by_global_norm(grads, 1.0)
    assert abs(norm - 3.2320464) < 1e-5
    assert abs(np.sqrt(sum((g**2).sum() for g in clipped.values())) - 1) < 1e-5
    assert equal(vit.clip_by_global_norm(grads, 10.0)[0], grads)


@pytest.mark.parametrize("dtype, losses, logits", [
    ("bfloat16", [1.5707833, 1.5707833, 1.4806235, 1.2611428, 1.1061978],
     [0.6176054, 0.5241724, 0.29380584, -0.9033976, 0.2977193]),
    ("float32", [1.5707833, 1.5707833, 1.4805456, 1.2608005, 1.1057192],
     [0.6180969, 0.5244506, 0.29388905, -0.9047332, 0.29700014])])
def test_five_updates_with_accumulation_equal_the_original(params, dtype, losses, logits):
    momentum = vit.sgd_init(params, jnp.dtype(dtype))
    gradient = jax.jit(jax.value_and_grad(loss_of))
    for step, expected in enumerate(losses):
        halves = [gradient(params, IMAGES[h], LABELS[h]) for h in (slice(0, 2), slice(2, 4))]
        loss, grads = jax.tree.map(lambda *x: sum(x) / 2, *halves)
        assert abs(loss - expected) < 1e-5
        grads, _ = vit.clip_by_global_norm(grads, 1.0)
        rate = vit.learning_rate(step, 0.03, 5, 2)
        params, momentum = vit.sgd_update(params, momentum, grads, rate)
    np.testing.assert_allclose(forward(params, IMAGES)[0], logits, atol=1e-5)


@pytest.mark.parametrize("kind", ["cosine", "linear"])
@pytest.mark.parametrize("base, total, warmup", [
    (0.03, 10_000, 500), (0.01, 500, 50), (0.03, 20, 0)])
def test_learning_rates_are_the_published_schedule(kind, base, total, warmup):
    for step in {0, warmup // 2, warmup, (warmup + total) // 2, total - 1, total}:
        done = max(0, step - warmup) / (total - warmup)
        rate = base * (1 + np.cos(np.pi * done)) / 2 if kind == "cosine" else (
            base + (1e-5 - base) * done)
        rate *= min(1, step / warmup) if warmup else 1
        assert abs(vit.learning_rate(step, base, total, warmup, kind) - rate) < 1e-7
    assert abs(vit.learning_rate(1500, 0.03, 10_000, 500) - 0.02918726) < 1e-7  # the original's


@pytest.mark.parametrize("size", [8, 16, 24, 48, 120])
def test_position_embeddings_are_resized_as_the_original_does(params, size):
    old = params["Transformer"]["posembed_input"]["pos_embedding"]
    new = vit.at_image_size(params, size)["Transformer"]["posembed_input"]["pos_embedding"]
    zoom = size / 8 / 4
    expected = scipy.ndimage.zoom(old[0, 1:].reshape(4, 4, 32), (zoom, zoom, 1), order=1)
    np.testing.assert_allclose(new[0, 1:], expected.reshape(-1, 32), atol=1e-6)
    np.testing.assert_array_equal(new[0, 0], old[0, 0])


@pytest.mark.parametrize("size, logits", [
    (16, [-0.08747111, 0.6735925, 0.42114395, 0.01757931, 0.7948882]),
    (48, [-0.28529721, 0.5231322, 0.7233297, 0.27619973, 0.5140243])])
def test_logits_at_another_resolution_equal_the_original(params, size, logits):
    images = np.random.RandomState(2).uniform(-1, 1, (2, size, size, 3)).astype(np.float32)
    got = forward(vit.at_image_size(params, size), images)[0]
    np.testing.assert_allclose(got, logits, atol=5e-6)


@pytest.mark.parametrize("model, count", [
    ("ViT-B_16", 86_567_656), ("ViT-B_32", 88_224_232),
    ("ViT-L_16", 304_326_632), ("ViT-L_32", 306_535_400)])
def test_parameter_counts_are_the_published_ones(model, count):
    shapes = jax.eval_shape(lambda: vit.init_params(jax.random.key(0), model, 224, 1000))
    assert sum(p.size for p in jax.tree.leaves(shapes)) == count


@pytest.mark.parametrize("model", ["ViT-Ti_16", "ViT-S_14", "ViT-B_8", "ViT-H_14"])
def test_parameter_counts_follow_the_formula(model):
    patch, d, depth, _, hidden = vit.parse_model(model)
    shapes = jax.eval_shape(lambda: vit.init_params(jax.random.key(0), model, 224, 1000))
    block = 4 * (d * d + d) + (d * hidden + hidden) + (hidden * d + d) + 4 * d
    rest = (3 * patch**2 + 1) * d + d + (1 + (224 // patch) ** 2) * d + 2 * d + 1001 * 1000
    count = depth * block + rest - 1001 * 1000 + (d + 1) * 1000
    assert sum(p.size for p in jax.tree.leaves(shapes)) == count


def test_initial_parameters_have_the_original_distributions():
    d, hidden, patch = 192, 768, 16
    flat = vit.flatten(vit.init_params(jax.random.key(0), "ViT-Ti_16", 224, 10))

    def is_uniform(x, limit):
        return abs(x).max() <= limit * (1 + 1e-6) and abs(x.std() / (limit / 3**0.5) - 1) < 0.02

    for name, x in flat.items():
        x = np.asarray(x)
        if "MultiHead" in name and name.endswith("kernel"):
            assert is_uniform(x, (6 / (d + d)) ** 0.5), name  # heads counted together
            assert all(is_uniform(block, (6 / (d + d)) ** 0.5) for block in x), name
        elif "MlpBlock" in name and name.endswith("kernel"):
            assert is_uniform(x, (6 / (d + hidden)) ** 0.5), name
        elif "MlpBlock" in name:
            assert abs(x.std() / 1e-6 - 1) < 0.1 and abs(x).max() > 2.5e-6, name
        elif name == "embedding/kernel":  # a normal cut at two standard deviations, then rescaled
            std = (1 / (3 * patch**2)) ** 0.5
            assert abs(x.std() / std - 1) < 0.02 and abs(x).max() <= 2 * std / 0.8796 + 1e-6, name
        elif name.endswith("pos_embedding"):
            assert abs(x.std() / 0.02 - 1) < 0.02 and abs(x).max() > 0.07, name
        else:
            assert np.all(x == name.endswith("scale")), name


def test_mixup_blends_a_batch_with_itself_reversed():
    targets = np.eye(5, dtype=np.float32)[LABELS]
    images, mixed = vit.mixup(IMAGES, targets, 0.3)
    for i in range(4):
        np.testing.assert_allclose(images[i], 0.3 * IMAGES[i] + 0.7 * IMAGES[3 - i], atol=1e-6)
        expected = np.zeros(5)
        expected[LABELS[i]] += 0.3
        expected[LABELS[3 - i]] += 0.7
        np.testing.assert_allclose(mixed[i], expected, atol=1e-6)


def test_crops_have_the_distribution_of_the_original():
    # TensorFlow's sampler: the aspect ratio is uniform, then the height among those that fit.
    rng, width, height = np.random.default_rng(0), 500, 375
    boxes = np.array([vit.inception_crop(rng, width, height) for _ in range(20_000)])
    left, upper, right, lower = boxes.T
    assert left.min() == upper.min() == 0 and right.max() == width and lower.max() == height
    w, h = right - left, lower - upper
    area, aspect = w * h / (width * height), w / h
    assert 0.049 < area.min() < 0.055 and 0.97 < area.max() <= 1
    assert 0.745 < aspect.min() < 0.76 and 1.32 < aspect.max() < 1.34
    r = np.random.default_rng(1).uniform(size=(3, 200_000))
    a = 0.75 + r[0] * (4 / 3 - 0.75)
    low, high = np.sqrt(0.05 * width * height / a), np.minimum(height, width / a)
    expected = (low + r[1] * (high - low)) ** 2 * a / (width * height)
    for share in (0.1, 0.25, 0.5, 0.75, 0.9):
        assert abs(np.quantile(area, share) - np.quantile(expected, share)) < 0.015
        assert abs(np.quantile(aspect, share) - np.quantile(a, share)) < 0.015
    free = width - w
    assert abs((left / np.maximum(free, 1))[free > 50].mean() - 0.5) < 0.01


def test_enlarging_is_bilinear_interpolation_within_one_grey_level():
    image = np.random.RandomState(0).randint(0, 256, (32, 32, 3)).astype(np.uint8)
    at = np.clip((np.arange(384) + 0.5) * 32 / 384 - 0.5, 0, 31)
    low = np.minimum(at.astype(int), 30)
    part = (at - low)[:, None]
    rows = image[low] * (1 - part[..., None]) + image[low + 1] * part[..., None]
    expected = rows[:, low] * (1 - part) + rows[:, low + 1] * part
    assert abs(vit.to_array(Image.fromarray(image), 384) - expected).max() < 1.001


def test_dropout_zeroes_its_share_and_keeps_the_mean():
    x = vit.dropout(jnp.ones(100_000), jax.random.key(0), 0.3)
    assert abs((x == 0).mean() - 0.3) < 0.01 and abs(x.mean() - 1) < 0.01


def test_bfloat16_activations_stay_near_float32(params):
    np.testing.assert_allclose(forward(params, IMAGES.astype(jnp.bfloat16)),
                               forward(params, IMAGES), atol=0.05)


def test_recomputing_blocks_changes_no_gradient(params):
    usual, remat = (jax.grad(lambda p, r=r: vit.forward(p, IMAGES, remat=r).sum())(params)
                    for r in (False, True))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), usual, remat)


def test_each_function_of_the_model_works_when_pasted_alone():
    source = Path(vit.__file__).read_text()
    source = source[source.index("- 1. Model"): source.index("- 2. Weights")].split("\n", 1)[1]
    source = source.rsplit("\n# -", 1)[0]
    functions = {f.name: f for f in ast.parse(source).body}

    def paste(name):
        wanted, done = [name], {}
        while wanted:
            f = functions[wanted.pop()]
            done[f.name] = ast.get_source_segment(source, f)
            wanted += [n.id for n in ast.walk(f) if isinstance(n, ast.Name)
                       and n.id in functions and n.id not in done]
        namespace = {}
        exec("import jax, jax.numpy as jnp\n" + "\n".join(done.values()), namespace)
        return namespace[name]

    key, x = jax.random.key(0), jnp.ones((2, 5, 32))
    params = paste("init_params")(key, SMALL, 16, 3)
    block = jax.tree.map(lambda a: a[0], params["Transformer"]["encoderblock"])
    calls = {
        "parse_model": (lambda f: f("ViT-B_16"), None),
        "linear": (lambda f: f(x, jnp.ones((32, 4, 2)), jnp.ones((4, 2))), (2, 5, 8)),
        "layer_norm": (lambda f: f(x, jnp.ones(32), jnp.ones(32)), (2, 5, 32)),
        "dropout": (lambda f: f(x, key, 0.5), (2, 5, 32)),
        "patch_embedding": (lambda f: f(jnp.ones((2, 16, 16, 3)), **params["embedding"]),
                            (2, 4, 32)),
        "attention": (lambda f: f(x, **block["MultiHeadDotProductAttention_1"])[0], (2, 5, 32)),
        "mlp": (lambda f: f(x, **block["MlpBlock_3"]), (2, 5, 32)),
        "encoder_block": (lambda f: f(x, block, key, 0.1)[0], (2, 5, 32)),
        "forward": (lambda f: f(params, jnp.ones((2, 16, 16, 3)), key, 0.1), (2, 3)),
        "init_params": (lambda f: f(key, "ViT-XS_8", 16, 3)["cls"], (1, 1, 64)),
    }
    assert set(calls) == set(functions)
    for name, (call, shape) in calls.items():
        result = call(paste(name))
        assert shape is None or result.shape == shape, name


# ---------------------------------------------------------------------------------- Checkpoints


def test_all_spellings_of_checkpoints_load_alike(params, tmp_path):
    flat = seeded_weights()
    renamed = {k.replace("MultiHeadDotProductAttention_1", "MultiHeadDotProductAttention_0")
               .replace("LayerNorm_2", "LayerNorm_1").replace("MlpBlock_3", "MlpBlock_0"): v
               for k, v in flat.items()}
    for names in (flat, renamed):
        for prefix in ("", "opt/target/", "params/"):
            np.savez(tmp_path / "x.npz", **{prefix + k: v for k, v in names.items()})
            assert equal(vit.load_checkpoint(tmp_path / "x.npz"), params)


def test_more_than_ten_blocks_keep_their_order(tmp_path):
    params = jax.device_get(vit.init_params(jax.random.key(0), (8, 16, 12, 2, 32), 16, 3))
    vit.save_checkpoint(tmp_path / "x.npz", params)
    assert equal(vit.load_checkpoint(tmp_path / "x.npz"), params)


def test_saving_writes_the_released_names_and_class_names(params, tmp_path):
    vit.save_checkpoint(tmp_path / "x.npz", params, ["a", "b", "c", "d", "e"])
    with np.load(tmp_path / "x.npz") as file:
        assert set(file) == {*seeded_weights(), "class_names"}
        assert all(np.array_equal(file[k], v) for k, v in seeded_weights().items())
        assert file["class_names"].tolist() == ["a", "b", "c", "d", "e"]


def test_pretrained_weights_get_a_zero_head_and_lose_pre_logits(params, tmp_path):
    flat = seeded_weights() | {"pre_logits/kernel": np.eye(32, dtype=np.float32) * 0.5,
                               "pre_logits/bias": np.ones(32, np.float32)}
    np.savez(tmp_path / "x.npz", **flat)
    whole = vit.load_checkpoint(tmp_path / "x.npz")
    logits, features = forward(whole, IMAGES), forward(params | {"head": {
        "kernel": np.eye(32, dtype=np.float32), "bias": np.zeros(32, np.float32)}}, IMAGES)
    head = np.tanh(features * 0.5 + 1) @ flat["head/kernel"] + flat["head/bias"]
    np.testing.assert_allclose(logits, head, atol=1e-5)
    tuned = vit.load_pretrained(tmp_path / "x.npz", 48, 7)
    assert "pre_logits" not in tuned and tuned["head"]["kernel"].shape == (32, 7)
    assert not np.any(forward(tuned, np.ones((1, 48, 48, 3), np.float32)))


def test_timm_reads_what_we_save_and_gives_the_same_logits(tmp_path):
    timm, torch = pytest.importorskip("timm"), pytest.importorskip("torch")
    params = vit.init_params(jax.random.key(0), (16, 64, 3, 4, 256), 32, 7)
    r = np.random.RandomState(0)
    params = jax.tree.map(lambda p: np.float32(p + 0.1 * r.standard_normal(p.shape)), params)
    vit.save_checkpoint(tmp_path / "x.npz", params, list("abcdefg"))
    model = timm.models.VisionTransformer(
        img_size=32, patch_size=16, embed_dim=64, depth=3, num_heads=4, num_classes=7,
        act_layer=functools.partial(torch.nn.GELU, approximate="tanh")).eval()
    model.load_pretrained(str(tmp_path / "x.npz"))
    theirs = model(torch.tensor(IMAGES.transpose(0, 3, 1, 2))).detach().numpy()
    np.testing.assert_allclose(forward(params, IMAGES), theirs, atol=1e-5)


# --------------------------------------------------------------------------------------- Images


def test_images_of_any_mode_and_size_become_upright_rgb(tmp_path):
    red = Image.new("RGB", (40, 20), (200, 30, 30))
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned by a quarter
    grey16 = Image.fromarray(np.full((20, 40), 128 * 256, np.uint16))
    clear = red.convert("RGBA")
    clear.putalpha(100)
    for name, image, options, expected in (
            ("a.jpg", red, {}, (200, 30, 30)), ("b.png", red.convert("P"), {}, None),
            ("c.png", red.convert("L"), {}, None), ("d.png", clear, {}, (200, 30, 30)),
            ("e.jpg", red.convert("CMYK"), {}, (200, 30, 30)), ("f.webp", red, {}, (200, 30, 30)),
            ("g.jpg", red, {"exif": exif}, (200, 30, 30)), ("h.png", grey16, {}, (128, 128, 128)),
            ("i.gif", red, {"transparency": 0}, None), ("j.png", red.convert("1"), {}, None)):
        image.save(tmp_path / name, **options)
        read = vit.decode(tmp_path / name, name)
        assert read.mode == "RGB" and read.size == ((20, 40) if options.get("exif") else (40, 20))
        if expected:
            assert np.abs(np.asarray(read).mean((0, 1)) - expected).max() < 6, name


def picture_folder(root, split="train", count=8, classes=("cat", "dog")):
    for label, name in enumerate(classes):
        for i in range(count):
            path = Path(root, split, name, f"{i}.png")
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = np.random.RandomState(100 * label + i).randint(0, 80, (16 + i, 16, 3))
            Image.fromarray((pixels + 150 * label).astype(np.uint8)).save(path)
    return Path(root)


def test_a_folder_without_split_is_split_the_same_way_every_time(tmp_path):
    root = picture_folder(tmp_path, "", count=20)
    (root / "cat" / "notes.txt").write_text("no image")
    first, second = vit.image_folder(root), vit.image_folder(root)
    assert first["classes"] == ["cat", "dog"]
    assert (first["train"][0], first["test"][0]) == (36, 4)
    for split in ("train", "test"):
        for i in range(first[split][0]):
            assert equal(*(np.asarray(data[split][1](i)[0]) for data in (first, second)))


def counting_split(n):
    """Image i is filled with the number i."""
    return n, lambda i: (Image.new("RGB", (4, 4), (i, i, i)), i)


def test_training_order_is_a_function_of_seed_and_step_alone():
    split = counting_split(10)

    def labels(start, stop, seed=0):
        return [vit.training_example(split, 4, "inception", seed, i)[1] for i in range(start, stop)]

    assert sorted(labels(0, 10)) == sorted(labels(10, 20)) == list(range(10))
    assert labels(0, 10) != labels(10, 20) and labels(0, 10) != labels(0, 10, seed=1)
    assert labels(7, 15) == labels(0, 20)[7:15]
    image = Image.fromarray(np.random.RandomState(0).randint(0, 256, (64, 64, 3)).astype(np.uint8))
    crops = [vit.training_example((1, lambda i: (image, 0)), 16, "inception", seed, i)[0]
             for seed, i in ((0, 5), (0, 5), (0, 6), (1, 5))]
    assert equal(crops[0], crops[1]) and not equal(crops[0], crops[2])
    assert not equal(crops[0], crops[3])


def test_batches_come_in_order_and_pass_on_errors():
    places = [np.arange(6).reshape(2, 3) + 6 * i for i in range(7)]
    example = functools.partial(vit.test_example, counting_split(40), 4)
    for (images, labels), wanted in zip(vit.batches(example, places, 4), places, strict=True):
        expected = np.where(wanted < 40, wanted, -1)
        np.testing.assert_array_equal(labels, expected)
        np.testing.assert_array_equal(images[..., 0, 0, 0], np.maximum(expected, 0))

    def broken(index):
        raise vit.BadInput(f"example {index}")

    with pytest.raises(vit.BadInput, match="example"):
        list(vit.batches(broken, places, 4))


@pytest.mark.parametrize("n, batch_size", [(37, 16), (5, 24), (37, 3)])
def test_evaluation_counts_every_image_exactly_once(n, batch_size):
    params = random_params(image_size=16, classes=40)
    n, read = counting_split(n)
    images = np.stack([vit.test_example((n, read), 16, i)[0] for i in range(n)])
    guesses = np.asarray(forward(params, vit.to_pixels(images))).argmax(1)
    wrong = n, lambda i: (read(i)[0], (int(guesses[i]) + (i % 3 == 0)) % 40)
    expected = np.mean([i % 3 != 0 for i in range(n)])
    assert vit.evaluate(vit.replicate(params), wrong, 16, batch_size) == expected


@pytest.mark.parametrize("mirrored", [False, True])
def test_a_batch_is_shared_out_whole_and_mixup_pairs_stay_together(mirrored):
    shares = vit.shares(64, 2, mirrored)
    assert shares.shape == (8, 2, 4) and sorted(shares.ravel()) == list(range(64))
    if mirrored:
        assert np.all(shares + shares[..., ::-1] == 63)


class Server(http.server.SimpleHTTPRequestHandler):
    """Serves files of a folder; those called cut-... break off in the middle."""

    def do_GET(self):
        path = Path(self.directory, Path(self.path).name)
        if not path.exists():
            return self.send_error(404)
        data = path.read_bytes()
        self.send_response(200)
        self.send_header("Content-Length", len(data))
        self.end_headers()
        self.wfile.write(data[: len(data) // 2] if "cut" in self.path else data)

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("served")
    with http.server.ThreadingHTTPServer(
            ("127.0.0.1", 0), functools.partial(Server, directory=folder)) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield folder, f"http://127.0.0.1:{running.server_port}/"
        running.shutdown()


def cifar_archive(path, name):
    """An archive as the authors of CIFAR pack it, 50 + 10 images: {split: [(pixels, label)]}."""
    r, made = np.random.RandomState(0), {}
    with tarfile.open(path, "w:gz") as archive:
        def add(file, data):
            info = tarfile.TarInfo(f"{name}-binary/{file}")
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))

        def records(n):
            pixels, labels = r.randint(0, 256, (n, 32, 32, 3)), r.randint(0, 10, n)
            data = b"".join((b"\7" if name == "cifar-100" else b"") + bytes([label])
                            + image.transpose(2, 0, 1).astype(np.uint8).tobytes()
                            for image, label in zip(pixels, labels, strict=True))
            return data, list(zip(pixels, labels, strict=True))

        made["train"], parts = [], ["train.bin"]
        if name == "cifar-10":
            parts = [f"data_batch_{i}.bin" for i in range(1, 6)]
        for part in parts:
            data, examples = records(50 // len(parts))
            add(part, data)
            made["train"] += examples
        data, made["test"] = records(10)
        add("test_batch.bin" if name == "cifar-10" else "test.bin", data)
        names = [f"class {i}".replace(" ", "_") for i in range(10)]
        file = "batches.meta.txt" if name == "cifar-10" else "fine_label_names.txt"
        add(file, ("\n".join(names) + "\n\n").encode())
        add("coarse_label_names.txt", b"coarse\n")
    return made


@pytest.mark.parametrize("name", ["cifar-10", "cifar-100"])
def test_cifar_is_fetched_verified_and_read_without_unpacking(name, server, tmp_path, monkeypatch):
    folder, address = server
    made = cifar_archive(folder / f"{name}-binary.tar.gz", name)
    digest = hashlib.sha256((folder / f"{name}-binary.tar.gz").read_bytes()).hexdigest()
    key = name.replace("-", "")
    url, rest = address + f"{name}-binary.tar.gz", vit.CIFAR[key][2:]
    monkeypatch.setitem(vit.CIFAR, key, (url, "0" * 64, *rest))
    with pytest.raises(vit.BadInput, match=f"SHA-256 is {digest}"):
        vit.cifar(key, tmp_path)
    assert not list((tmp_path / "downloads").iterdir())  # nothing wrong is kept
    monkeypatch.setitem(vit.CIFAR, key, (url, digest, *rest))
    data = vit.cifar(key, tmp_path)
    (folder / f"{name}-binary.tar.gz").unlink()
    assert vit.cifar(key, tmp_path)["classes"] == data["classes"]
    assert data["classes"] == [f"class_{i}" for i in range(10)]
    assert (data["train"][0], data["test"][0]) == (49, 10)
    for split in ("train", "test"):
        for i in range(data[split][0]):
            image, label = data[split][1](i)
            assert np.array_equal(image, made[split][i][0]) and label == made[split][i][1]


def test_files_of_one_name_in_two_folders_of_a_server_are_kept_apart(server, tmp_path):
    folder, address = server
    (folder / "same.npz").write_bytes(b"PK\5\6" + bytes(18))  # an empty archive
    options = {"model": "ViT-B_16", "data_dir": tmp_path}
    paths = {vit.checkpoint_path(options | {"pretrained": f"{address}{part}/same.npz"})
             for part in ("imagenet21k", "imagenet21k+imagenet2012")}
    assert len(paths) == 2 and all(path.exists() for path in paths)


def test_a_download_cut_short_or_without_network_leaves_nothing(server, tmp_path):
    folder, address = server
    (folder / "cut-x.npz").write_bytes(b"x" * 100_000)
    (folder / "y.npz").write_bytes(b"this is no archive")
    for url, reason in ((address + "cut-x.npz", "cut short after 50000 of 100000"),
                        (address + "y.npz", "cut short"), (address + "none.npz", "404"),
                        ("http://127.0.0.1:9/x.npz", "refused")):
        with pytest.raises(vit.BadInput, match=reason) as error:
            vit.fetch(url, tmp_path)
        assert url in str(error.value) and str(tmp_path) in str(error.value)
    assert not list(tmp_path.iterdir())


def test_tfds_datasets_are_read_as_array_record_without_tensorflow(tmp_path, monkeypatch):
    pytest.importorskip("array_record")  # Linux only
    import tensorflow_datasets as tfds

    monkeypatch.setattr(vit.importlib.util, "find_spec", lambda name: None)

    class TinyPhotos(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            return tfds.core.DatasetInfo(builder=self, supervised_keys=("image", "label"),
                                         features=tfds.features.FeaturesDict({
                                             "image": tfds.features.Image(shape=(None, None, 3)),
                                             "label": tfds.features.ClassLabel(names=["a", "b"])}))

        def _split_generators(self, _):
            return {"train": self._generate_examples(20), "validation": self._generate_examples(5)}

        def _generate_examples(self, n):
            for i in range(n):
                file = io.BytesIO()
                Image.new("RGB", (10 + i, 8), (i, i, i)).save(file, "PNG")
                file.seek(0)
                yield i, {"image": file, "label": i % 2}

    TinyPhotos(data_dir=tmp_path, file_format="array_record").download_and_prepare()
    data = vit.load_data("tiny_photos", tmp_path)
    assert data["classes"] == ["a", "b"] and (data["train"][0], data["test"][0]) == (20, 5)
    found = {data["train"][1](i)[0].getpixel((0, 0))[0]: data["train"][1](i)[1] for i in range(20)}
    assert found == {i: i % 2 for i in range(20)}
    assert "tensorflow" not in sys.modules
    with pytest.raises(vit.BadInput, match="mnist is not prepared as ArrayRecord.*tensorflow"):
        vit.load_data("mnist", tmp_path)


# ------------------------------------------------------------------------------------- Training


def run_updates(devices, accum_steps, steps=10, **options):
    """Losses and parameters after some updates on the same batches, whatever the devices."""
    params, losses = random_params(), []
    update = jax.pmap(functools.partial(vit.train_step, total_steps=20, warmup_steps=2, **options),
                      "devices", devices=jax.devices()[:devices], in_axes=(None, 0, 0, None, 0),
                      out_axes=None)
    state = {"params": params, "momentum": vit.sgd_init(params), "step": np.int32(0)}
    r = np.random.RandomState(0)
    for step in range(steps):
        images = r.randint(0, 256, (32, 32, 32, 3)).astype(np.uint8)
        labels = r.randint(0, 5, 32).astype(np.int32)
        places = np.arange(32).reshape(devices, accum_steps, -1)
        if options.get("mixup_alpha"):  # a place and its mirror image in the same micro-batch
            front, back = np.arange(32).reshape(2, devices * accum_steps, -1)
            places = np.concatenate([front, back[::-1]], 1).reshape(places.shape)
        state, (loss, norm, *_) = update(state, images[places], labels[places],
                                         np.float32(step / steps), np.zeros(devices))
        losses.append(float(loss))
        assert norm > 0
    for leaf in jax.tree.leaves(state):  # all devices have arrived at the same
        assert all(np.array_equal(leaf, shard.data) for shard in leaf.addressable_shards)
    return losses, jax.device_get(state["params"])


def test_eight_devices_and_accumulation_give_what_one_device_gives():
    losses, params = run_updates(1, 1, mixup_alpha=0.5)
    for devices, accum_steps in ((8, 2),):
        others, theirs = run_updates(devices, accum_steps, mixup_alpha=0.5)
        np.testing.assert_allclose(others, losses, atol=1e-5)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), theirs, params)
    assert losses[-1] != losses[0]


def test_one_step_on_one_batch_lowers_its_loss_and_equals_the_parts(params):
    images = np.uint8(IMAGES * 127.5 + 127.5)
    state = {"params": params, "momentum": vit.sgd_init(params), "step": np.int32(0)}
    update = jax.pmap(functools.partial(vit.train_step, warmup_steps=0, base_lr=0.01), "devices",
                      devices=jax.devices()[:1], in_axes=(None, 0, 0), out_axes=None)
    state, (loss, norm, *_) = update(state, images[None, None], np.int32(LABELS)[None, None])
    new = jax.device_get(state["params"])
    pixels = images / np.float32(127.5) - 1
    expected, grads = jax.value_and_grad(loss_of)(params, pixels)
    assert abs(loss - expected) < 1e-5 and loss_of(new, pixels) < expected
    scale = min(1, 1 / norm)
    jax.tree.map(lambda n, p, g: np.testing.assert_allclose(n, p - 0.01 * scale * g, atol=1e-6),
                 new, params, grads)


def cli(*arguments, devices=1, cwd=None, wait=True):
    """vit.py in a process of its own."""
    environment = os.environ | {
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}", "JAX_PLATFORMS": "cpu"}
    process = subprocess.Popen(
        [sys.executable, vit.__file__, *map(str, arguments)], cwd=cwd, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    if not wait:
        return process
    out, error = process.communicate(timeout=300)
    assert "Traceback" not in error, error
    return process.returncode, out, error


def arrays_of(path):
    with np.load(path) as file:
        return {name: file[name] for name in file}


def accuracy_in(out):
    return [line for line in out.splitlines() if line.startswith("test accuracy")][-1]


def test_a_killed_run_ends_bit_for_bit_as_one_that_was_not(tmp_path):
    root = picture_folder(tmp_path / "data")
    picture_folder(root, "test", count=5)
    flags = [root, *TINY, "--augment=inception", "--dropout=0.1", "--mixup_alpha=0.2",
             "--batch_size=16", "--total_steps=60", "--checkpoint_every=2", "--eval_every=25"]
    status, out, _ = cli(*flags, f"--logdir={tmp_path / 'whole'}", devices=2)
    assert status == 0 and accuracy_in(out)
    whole = arrays_of(tmp_path / "whole" / "checkpoint.npz")
    path, kills, seen = tmp_path / "killed" / "checkpoint.npz", 0, 0
    random = np.random.default_rng(int(time.time()))
    for number in (signal.SIGKILL, signal.SIGTERM, signal.SIGKILL):
        process = cli(*flags, f"--logdir={tmp_path / 'killed'}", devices=2, wait=False)
        while process.poll() is None and (
                not path.exists() or path.stat().st_mtime_ns == seen):
            time.sleep(0.01)  # until it has gone beyond what was there
        time.sleep(random.uniform(0, 0.3))
        process.send_signal(number)
        out, error = process.communicate()
        kills += process.returncode == -signal.SIGKILL
        if process.returncode == 128 + signal.SIGTERM:
            assert "the same command goes on" in out and not error
        seen = path.stat().st_mtime_ns
        assert arrays_of(path)  # whole at any moment
    status, out, _ = cli(*flags, f"--logdir={tmp_path / 'killed'}", devices=2)
    assert status == 0 and kills >= 1 and ("going on after step" in out or "are done" in out)
    killed = arrays_of(path)
    assert set(killed) == set(whole)
    assert all(killed[name].tobytes() == whole[name].tobytes() for name in whole)
    rows = (tmp_path / "killed" / "metrics.csv").read_text().splitlines()[1:]
    assert [int(row.split(",")[0]) for row in rows if row.split(",")[1]] == list(range(1, 61))
    accuracy = accuracy_in(out)
    # once more: nothing to do but to evaluate; and --eval_only agrees to the digit
    status, out, _ = cli(*flags, f"--logdir={tmp_path / 'killed'}", devices=2)
    assert status == 0 and "all 60 steps are done" in out and accuracy_in(out) == accuracy
    assert accuracy_in(cli(root, "--eval_only", f"--pretrained={path}")[1]) == accuracy
    status, _, error = cli(*flags, "--base_lr=0.5", f"--logdir={tmp_path / 'killed'}", devices=2)
    assert status == 2 and "base_lr=0.03" in error and "0.5" in error


def test_two_processes_give_what_one_gives_with_as_many_devices(tmp_path):
    root = picture_folder(tmp_path / "data")
    picture_folder(root, "test", count=5)
    flags = [root, *TINY, "--total_steps=4", "--mixup_alpha=0.2", "--dropout=0.1",
             "--batch_size=16", "--log_every=3"]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    hosts = [cli(*flags, f"--logdir={tmp_path / 'two'}", f"--coordinator_address=127.0.0.1:{port}",
                 "--num_processes=2", f"--process_id={i}", devices=2, wait=False) for i in (0, 1)]
    status, one, _ = cli(*flags, f"--logdir={tmp_path / 'one'}", devices=4)
    assert status == 0
    outs = [host.communicate(timeout=300) for host in hosts]
    assert [host.returncode for host in hosts] == [0, 0], outs
    assert accuracy_in(outs[0][0]) == accuracy_in(one) and "accuracy" not in outs[1][0]
    first, second = (vit.flatten(vit.load_checkpoint(tmp_path / name / "checkpoint.npz"))
                     for name in ("one", "two"))
    for name in first:
        np.testing.assert_allclose(first[name], second[name], atol=1e-6, err_msg=name)


def test_training_on_a_folder_learns_and_leaves_what_people_look_at(tmp_path, capsys):
    root = picture_folder(tmp_path / "data")
    picture_folder(root, "test", count=5)
    assert vit.main([str(root), *TINY, "--total_steps=30", "--base_lr=0.1", "--batch_size=16",
                     "--accum_steps=1", f"--logdir={tmp_path / 'run'}"]) == 0
    out = capsys.readouterr().out
    assert "step 30/30  loss" in out and "images/s" in out and "100.00%" in accuracy_in(out)
    rows = (tmp_path / "run" / "metrics.csv").read_text().splitlines()
    assert rows[0] == "step,loss,learning_rate,images_per_second,test_accuracy"
    assert len(rows) == 32 and rows[-1] == "30,,,,1.0"
    assert Image.open(tmp_path / "run" / "first_batch.png").size == (8 * 16, 2 * 16)
    with np.load(tmp_path / "run" / "checkpoint.npz") as file:
        assert file["class_names"].tolist() == ["cat", "dog"]


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(tmp_path, capsys,
                                                                          monkeypatch):
    root = picture_folder(tmp_path / "data")
    picture_folder(root, "test", count=2)
    rate = vit.learning_rate
    monkeypatch.setattr(vit, "learning_rate", lambda step, *a: jnp.where(
        jnp.asarray(step) < 3, rate(step, *a), jnp.inf))
    assert vit.main([str(root), *TINY, "--total_steps=9", "--checkpoint_every=2",
                     "--batch_size=16", f"--logdir={tmp_path / 'run'}"]) == 2
    error = capsys.readouterr().err
    assert "nan" in error and "checkpoint.npz" in error
    good = arrays_of(tmp_path / "run" / "checkpoint.npz")
    assert good["train/step"] == 2 and all(
        np.isfinite(v).all() for k, v in good.items() if v.dtype.kind == "f")


# ---------------------------------------------------------------------------------------- Photos


def test_attention_rows_sum_to_one_and_rollout_multiplies_them(params):
    logits, weights = vit.forward(params, IMAGES, return_attention=True)
    np.testing.assert_allclose(logits, forward(params, IMAGES), atol=1e-6)
    assert weights.shape == (2, 4, 4, 17, 17)
    np.testing.assert_allclose(weights.sum(-1), 1, atol=1e-5)
    weights = np.asarray(weights)
    for image in range(4):
        flow = np.eye(17)
        for block in weights[:, image]:
            flow = (0.5 * block.mean(0) + 0.5 * np.eye(17)) @ flow
        expected = flow[0, 1:].reshape(4, 4) / flow[0, 1:].max()
        np.testing.assert_allclose(vit.attention_rollout(weights)[image], expected, atol=1e-5)


def test_photos_are_classified_and_their_attention_is_drawn(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = [f"kind {i}" for i in range(7)]
    vit.save_checkpoint(tmp_path / "x.npz", random_params(classes=7), names)
    photos = [tmp_path / "a.jpg", tmp_path / "b.png"]
    for photo in photos:
        Image.effect_mandelbrot((90, 60), (-2, -1, 1, 1), 50).convert("RGB").save(photo)
    assert vit.main([*map(str, photos), "--pretrained=x.npz"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 12 and all("kind" in line for line in lines[1:6])
    shares = [float(line.split("%")[0]) for line in lines[1:6]]
    assert shares == sorted(shares, reverse=True)
    assert Image.open("a-attention.png").size == Image.open("b-attention.png").size == (180, 60)


# ------------------------------------------------------------------------------------- Bad input


@pytest.fixture(scope="module")
def bad(tmp_path_factory):
    """A folder full of what can be wrong."""
    root = tmp_path_factory.mktemp("bad")
    good = picture_folder(root / "good")
    picture_folder(good, "test", count=2)
    flat = seeded_weights(classes=2)
    key = "Transformer/encoderblock_1/LayerNorm_2/bias"
    (root / "empty.npz").write_bytes(b"")
    (root / "text.npz").write_text("hello")
    np.savez(root / "good.npz", **flat)
    (root / "cut.npz").write_bytes((root / "good.npz").read_bytes()[:-9000])
    np.savez(root / "pickled.npz", **flat | {"cls": np.array([{}], object)})
    np.savez(root / "nothing.npz", x=np.zeros(3))
    np.savez(root / "missing.npz", **{k: v for k, v in flat.items() if k != key})
    np.savez(root / "half.npz", **flat | {"pre_logits/kernel": np.eye(32, dtype=np.float32)})
    np.savez(root / "gap.npz", **{k.replace("_1/", "_2/") if "block_1/" in k else k: v
                                  for k, v in flat.items()})
    np.savez(root / "extra.npz", **flat | {"registers": np.zeros(3, np.float32)})
    np.savez(root / "misshapen.npz", **flat | {key: np.zeros(7, np.float32)})
    np.savez(root / "nan.npz", **flat | {key: np.full(32, np.nan, np.float32)})
    np.savez(root / "ints.npz", **flat | {key: np.zeros(32, int)})
    np.savez(root / "names.npz", **flat | {"class_names": np.array(["cat"])})
    np.savez(root / "others.npz", **flat | {"class_names": np.array(["cat", "wolf"])})
    picture_folder(root / "one", classes=("cat",))
    picture_folder(root / "one", "test", classes=("cat",))
    picture_folder(root / "unknown")
    picture_folder(root / "unknown", "test", count=1, classes=("cat", "wolf"))
    (root / "no_images").mkdir()
    for name in ("broken", "cut_image"):
        picture_folder(picture_folder(root / name), "test", count=1)
    (root / "broken/train/cat/0.png").write_text("no image")
    image = root / "cut_image/train/dog/3.png"
    image.write_bytes(image.read_bytes()[:300])
    (root / "text.jpg").write_text("no image")
    Image.new("1", (20_000, 20_000)).save(root / "bomb.png")
    return root


@pytest.mark.parametrize("command, message", [
    ("cifra10", "cifar10"), ("imagenette/320px-v9", "imagenette/320px-v9"),
    ("no/such/folder", "no/such/folder"),
    ("digits --modle=ViT-B_16", "did you mean --model?"), ("digits --model=ViT-Q_16", "ViT-Q_16"),
    ("digits --model=B_16", "'B_16'"), ("digits --decay_type=step", "step"),
    ("digits --total_steps=many", "many"), ("digits --batch_size=0", "--batch_size=0"),
    ("digits --base_lr=-1", "--base_lr=-1.0"), ("digits --dropout=1.5", "--dropout=1.5"),
    ("digits --base_lr=nan", "--base_lr=nan"), ("digits --warmup_steps=2000", "2000"),
    ("digits --image_size=30", "32 is"), ("digits --model=ViT-XS_0", "ViT-XS_0"),
    ("digits --batch_size=9", "--batch_size=9"),
    ("digits --batch_size=8 --mixup_alpha=1", "16 is"),
    ("digits --pretrained=released --model=ViT-S_14 --image_size=28", "ViT-S_14"),
    ("good --pretrained=absent.npz", "absent.npz"), ("good --pretrained=empty.npz", "empty.npz"),
    ("good --pretrained=text.npz", "text.npz"), ("good --pretrained=cut.npz", "cut.npz"),
    ("good --pretrained=pickled.npz", "allow_pickle"), ("good --pretrained=nothing.npz", "no ViT"),
    ("good --pretrained=missing.npz", "LayerNorm_2/bias is missing, should be (32,)"),
    ("good --pretrained=gap.npz", "encoderblock_1"), ("good --pretrained=extra.npz", "registers"),
    ("good --pretrained=misshapen.npz", "is (7,), should be (32,)"),
    ("good --pretrained=nan.npz", "NaN"), ("good --pretrained=ints.npz", "no floats"),
    ("good --pretrained=good.npz --model=ViT-B_16", "ViT-B_16"),
    ("good --pretrained=good.npz --image_size=30", "32 is"),
    ("digits --eval_only --pretrained=good.npz", "2 classes"),
    ("digits --eval_only", "--pretrained=FILE"), ("digits --num_processes=2", "--num_processes=2"),
    ("good --pretrained=half.npz", "pre_logits/bias is missing"),
    ("good --pretrained=http://127.0.0.1:9/v.npz --data_dir=cache", "v.npz by hand"),
    ("no_images --pretrained=none", "no_images"), ("one --pretrained=none", "'cat'"),
    ("unknown --pretrained=none", "'wolf'"),
    ("broken --model=ViT-XS_8 --pretrained=none --image_size=16 --batch_size=16 --accum_steps=1",
     "cat/0.png"),
    ("cut_image --model=ViT-XS_8 --pretrained=none --image_size=16 --batch_size=16 --accum_steps=1",
     "dog/3.png"),
    ("good --eval_only --pretrained=names.npz", "names 1 classes, its head has 2"),
    ("good --eval_only --pretrained=others.npz", "knows other classes (cat, wolf, ...)"),
    ("text.jpg --pretrained=good.npz", "text.jpg"), ("bomb.png --pretrained=good.npz", "bomb.png"),
    ("text.jpg digits", "text.jpg digits"),
])
def test_bad_input_is_one_line_and_status_2(command, message, bad, capsys, monkeypatch):
    monkeypatch.chdir(bad)
    assert vit.main(command.split()) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and len(error) < 600, error


def test_an_unreadable_image_stops_the_run_but_loses_no_step(tmp_path, capsys):
    root = picture_folder(tmp_path / "data")
    picture_folder(root, "test", count=1)
    (root / "train/dog/7.png").write_text("no image")
    status = vit.main([str(root), *TINY, "--total_steps=9", "--batch_size=8", "--accum_steps=1",
                       f"--logdir={tmp_path / 'run'}"])
    assert status == 2 and "dog/7.png" in capsys.readouterr().err
    saved = arrays_of(tmp_path / "run" / "checkpoint.npz")["train/step"]
    order = vit.epoch_order(0, 0, 16)
    assert saved == list(order).index(15) // 8  # the step in whose batch the image is


def test_a_disk_that_refuses_is_one_line_and_the_old_file_stays(params, tmp_path, monkeypatch):
    path = tmp_path / "x.npz"
    vit.save_checkpoint(path, params)
    before = path.read_bytes()

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(vit.BadInput, match="x.npz.*No space left"):
        vit.save_checkpoint(path, jax.tree.map(lambda p: p + 1, params))
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_random_damage_is_noticed_or_harmless(params, tmp_path):
    r = np.random.default_rng(0)
    np.savez(tmp_path / "x.npz", **seeded_weights())
    Image.fromarray(r.integers(0, 256, (40, 40, 3), np.uint8)).save(tmp_path / "x.png")
    for name, read in (("x.npz", vit.load_checkpoint), ("x.png", lambda p: vit.decode(p, p))):
        data, noticed = (tmp_path / name).read_bytes(), 0
        for _ in range(60):
            broken = bytearray(data[: r.integers(len(data))] if r.random() < 0.3 else data)
            for place in r.integers(len(broken) or 1, size=r.integers(1, 4)):
                if broken:
                    broken[place] ^= int(r.integers(1, 256))
            (tmp_path / f"bad-{name}").write_bytes(broken)
            try:
                result = read(tmp_path / f"bad-{name}")
                assert name == "x.png" or equal(result, params)  # never silently wrong
            except vit.BadInput:
                noticed += 1
        assert noticed > 40


def test_help_explains_every_flag_with_its_default(capsys):
    with pytest.raises(SystemExit) as exit:
        vit.main(["--help"])
    out = " ".join(capsys.readouterr().out.split())
    assert exit.value.code == 0
    for flags in vit.FLAGS.values():
        for name, (_, meaning) in flags.items():
            assert f"--{name}" in out and f"({vit.DEFAULTS[name]}" in out, name
            assert meaning.split()[0] in out
