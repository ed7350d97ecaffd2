# SPDX-License-Identifier: Apache-2.0
"""What vit.py promises, checked: pytest test_vit.py (two to three minutes on two CPU cores).

Expected numbers are the original implementation's (google-research/vision_transformer at c6de1e5,
float32, highest matmul precision), or NumPy, SciPy and Pillow written out, or a second way there.
"""
import ast
import dataclasses
import functools
import hashlib
import http.server
import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import threading
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"  # before jax starts

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage
from numpy.testing import assert_allclose
from PIL import Image

import vit

jax.config.update("jax_default_matmul_precision", "highest")
SMALL = (8, 32, 2, 4, 64)  # patch size, width, depth, heads, MLP width
TINY = ["--pretrained=none", "--model=ViT-XS_8", "--image_size=16", "--batch_size=16",
        "--accum_steps=1", "--warmup_steps=1", "--augment=none", "--log_every=1"]
IMAGES = np.random.RandomState(1).uniform(-1, 1, (4, 32, 32, 3)).astype(np.float32)
LABELS = np.array([1, 4, 2, 0])
forward = jax.jit(vit.forward)  # compiled once for all tests


def seeded_weights(classes=5):
    """{released name: array}, for which the original's numbers below were computed."""
    shapes = jax.eval_shape(lambda: vit.to_released(vit.init_params(
        jax.random.key(0), SMALL, 32, classes)))
    r = np.random.RandomState(0)
    return {name: (0.1 * r.standard_normal(shapes[name].shape)).astype(np.float32)
            + np.float32(name.endswith("/scale")) for name in sorted(shapes)}


@pytest.fixture(scope="module")
def params(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "seeded.npz"
    np.savez(path, **seeded_weights())
    return vit.load_checkpoint(path)


def random_params(model=SMALL, image_size=32, classes=5):
    """Small parameters in which, unlike in those for training, no array is zero."""
    params = jax.jit(vit.init_params, static_argnums=(1, 2, 3))(
        jax.random.key(0), model, image_size, classes)
    r = np.random.RandomState(0)
    return jax.tree.map(lambda p: np.float32(p + 0.1 * r.standard_normal(p.shape)), params)


def loss_of(params, images=IMAGES, labels=LABELS):
    return vit.cross_entropy(vit.forward(params, images), jax.nn.one_hot(labels, 5))


def equal(a, b):
    return all(jax.tree.leaves(jax.tree.map(np.array_equal, a, b)))


def all_close(a, b, atol):
    jax.tree.map(lambda a, b: assert_allclose(a, b, atol=atol), a, b)


def arrays_of(path):
    with np.load(path) as file:
        return dict(file)


# ------------------------------------------------------------------ The numbers are the original's


@pytest.mark.parametrize("size, logits", [
    (32, [0.13968338, 0.41093412, 0.3068053, -0.11844803, 0.60040045]),
    (16, [-0.08747111, 0.6735925, 0.42114395, 0.01757931, 0.7948882]),
    (48, [-0.28529721, 0.5231322, 0.7233297, 0.27619973, 0.5140243])])
def test_logits_at_any_resolution_equal_the_original(params, size, logits):
    r = np.random.RandomState(2)
    images = IMAGES if size == 32 else r.uniform(-1, 1, (2, size, size, 3)).astype(np.float32)
    assert_allclose(forward(vit.adapt(params, size), images)[0], logits, atol=5e-6)


def test_the_loss_and_every_gradient_equal_the_original(params):
    loss, grads = jax.jit(jax.value_and_grad(loss_of))(params)
    grads, r = jax.device_get(vit.to_released(grads)), np.random.RandomState(3)
    products = [np.vdot(grads[k], r.standard_normal(grads[k].shape)) for k in sorted(grads)]
    assert_allclose(products, [  # of each with a random direction
        0.126349, 0.027935, 0.145475, 0.005826, 0.063795, -0.166069, 0.351390, -0.377218, 0.173236,
        0.581771, 0, 0.088451, -0.003554, 1.348437, 0.001189, -0.030801, -0.211105, -1.400027,
        0.063067, -0.019732, -0.077804, -0.088163, -0.019895, 0.145312, -0.039812, 0.585964, 0,
        -0.307931, 0.459707, 0.005924, -0.019317, -0.090996, 0.243097, -0.590395, -0.642435,
        -0.179350, 0.056561, -1.730072, -0.368995, 1.325776], atol=1e-5)
    clipped, norm = jax.jit(vit.clip_by_global_norm)(grads, 1.0)
    assert abs(loss - 1.5707834) < 1e-5 and abs(norm - 3.2320464) < 1e-5
    all_close(clipped, {k: g / 3.2320464 for k, g in grads.items()}, 1e-6)


@pytest.mark.parametrize("dtype, losses, logits", [
    ("bfloat16", [1.5707833, 1.5707833, 1.4806235, 1.2611428, 1.1061978],
     [0.6176054, 0.5241724, 0.29380584, -0.9033976, 0.2977193]),
    ("float32", [1.5707833, 1.5707833, 1.4805456, 1.2608005, 1.1057192],
     [0.6180969, 0.5244506, 0.29388905, -0.9047332, 0.29700014])])
def test_five_updates_with_accumulation_equal_the_original(params, dtype, losses, logits):
    # XLA may keep more bits of a bfloat16 than it has; as it was when the numbers were computed:
    @functools.partial(jax.jit, compiler_options={"xla_allow_excess_precision": False})
    def update(step, params, momentum):
        halves = [jax.value_and_grad(loss_of)(params, IMAGES[h], LABELS[h])
                  for h in (slice(0, 2), slice(2, 4))]
        loss, grads = jax.tree.map(lambda *x: sum(x) / 2, *halves)
        grads, _ = vit.clip_by_global_norm(grads, 1.0)
        rate = vit.learning_rate(step, 0.03, 5, 2)
        return loss, vit.sgd_update(params, momentum, grads, rate)

    momentum = jax.tree.map(lambda m: m.astype(dtype), vit.sgd_init(params))
    for step, expected in enumerate(losses):
        loss, (params, momentum) = update(step, params, momentum)
        assert abs(loss - expected) < 1e-5
    assert_allclose(forward(params, IMAGES)[0], logits, atol=1e-5)


@pytest.mark.parametrize("base, total, warmup", [(0.03, 10_000, 500), (0.03, 20, 0)])
def test_learning_rates_are_the_published_schedule(base, total, warmup):
    for step in {0, warmup // 2, warmup, (warmup + total) // 2, total - 1, total}:
        done = max(0, step - warmup) / (total - warmup)
        for kind, rate in (("cosine", base * (1 + np.cos(np.pi * done)) / 2),
                           ("linear", base + (1e-5 - base) * done)):
            rate *= min(1, step / warmup) if warmup else 1
            assert abs(vit.learning_rate(step, base, total, warmup, kind) - rate) < 1e-7
    assert abs(vit.learning_rate(1500, 0.03, 10_000, 500) - 0.02918726) < 1e-7  # the original's


@pytest.mark.parametrize("size", [8, 16, 24, 48, 120])
def test_position_embeddings_are_resized_as_the_original_does(params, size):
    old = params["Transformer"]["posembed_input"]["pos_embedding"]
    new = vit.adapt(params, size)["Transformer"]["posembed_input"]["pos_embedding"]
    zoom = size / 8 / 4
    expected = scipy.ndimage.zoom(old[0, 1:].reshape(4, 4, 32), (zoom, zoom, 1), order=1)
    assert_allclose(new[0, 1:], expected.reshape(-1, 32), atol=1e-6)
    assert np.array_equal(new[0, 0], old[0, 0])


@pytest.mark.parametrize("model, count", [
    ("ViT-Ti_16", 5_717_416), ("ViT-S_16", 22_050_664), ("ViT-B_16", 86_567_656),
    ("ViT-B_32", 88_224_232), ("ViT-L_16", 304_326_632), ("ViT-L_32", 306_535_400),
    ("ViT-H_14", 632_045_800)])
def test_parameter_counts_are_the_published_ones(model, count):
    shapes = jax.eval_shape(lambda: vit.init_params(jax.random.key(0), model, 224, 1000))
    assert sum(p.size for p in jax.tree.leaves(shapes)) == count


def test_initial_parameters_have_the_original_distributions():
    d, patch = 192, 16
    params = jax.jit(vit.init_params, static_argnums=(1, 2, 3))(
        jax.random.key(0), f"ViT-Ti_{patch}", 224, 10)
    std = (1 / (3 * patch**2)) ** 0.5  # of a normal cut at two standard deviations, then rescaled
    expected = {  # the end of a name: standard deviation, largest value between
        "MultiHead.*kernel": ((2 / (d + d)) ** 0.5, 0.99, 1),  # uniform, heads counted together
        "MlpBlock.*kernel": ((2 / (d + 4 * d)) ** 0.5, 0.99, 1),
        "MlpBlock.*bias": (1e-6, 1.6, 4), "pos_embedding": (0.02, 1.6, 4),  # normal
        "embedding/kernel": (std, 1.2, 2 / 0.8796 / 3**0.5)}
    for path, x in jax.tree_util.tree_leaves_with_path(jax.device_get(params)):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        for pattern, (std, least, most) in expected.items():
            if re.search(pattern + "$", name):
                assert abs(x.std() / std - 1) < 0.03, name
                assert least < abs(x).max() / std / 3**0.5 < most * (1 + 1e-5), name
                break
        else:
            assert np.all(x == name.endswith("scale")), name


def test_mixup_blends_neighbours_and_dropout_keeps_the_mean():
    targets = np.eye(5, dtype=np.float32)[LABELS]
    for x, mixed in zip((IMAGES, targets), vit.mixup(IMAGES, targets, 0.3), strict=True):
        for i in range(4):
            assert_allclose(mixed[i], 0.3 * x[i] + 0.7 * x[i ^ 1], atol=1e-6)
    x = vit.dropout(jnp.ones(100_000), jax.random.key(0), 0.3)
    assert abs((x == 0).mean() - 0.3) < 0.01 and abs(x.mean() - 1) < 0.01


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
    r = np.random.default_rng(1).uniform(size=(2, 200_000))
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
    weights = np.maximum(0, 1 - abs(at[:, None] - np.arange(32)))
    expected = np.einsum("ik,jl,klc->ijc", weights, weights, image, optimize=True)
    assert abs(vit.to_array(Image.fromarray(image), 384) - expected).max() < 1.001


# ------------------------------------------------------------------------------------- The model


def test_recomputing_blocks_changes_no_gradient_and_bfloat16_little(params):
    usual, remat = (jax.jit(jax.grad(lambda p, r=r: vit.forward(p, IMAGES, remat=r).sum()))(params)
                    for r in (False, True))
    all_close(usual, remat, 1e-5)
    all_close(forward(params, IMAGES.astype(jnp.bfloat16)), forward(params, IMAGES), 0.05)


def test_each_function_of_the_model_works_when_pasted_alone():
    source = Path(vit.__file__).read_text()
    first, last = (source[: source.index(heading)].count("\n")
                   for heading in ("- 2. Model\n", "- 3. Learning\n"))
    parts = {getattr(part, "name", "SIZES"): part for part in ast.parse(source).body
             if first < part.lineno < last or getattr(part, "name", "") == "init_params"}

    def paste(name):
        wanted, done = {name}, {}
        while wanted := wanted - {*done}:
            name = wanted.pop()
            done[name] = ast.unparse(parts[name])
            wanted |= {node.id for node in ast.walk(parts[name]) if isinstance(node, ast.Name)
                       and node.id in parts}
        exec("import jax, jax.numpy as jnp\n" + "\n".join(done.values()), done)
        return done

    forward, init = paste("forward"), paste("init_params")  # with the functions that they call,
    assert {*parts} <= {*forward, *init}  # which are all
    params = jax.eval_shape(lambda: init["init_params"](jax.random.key(0), "ViT-XS_8", 16, 3))
    assert jax.eval_shape(lambda p: forward["forward"](
        p, jnp.ones((2, 16, 16, 3)), jax.random.key(0), 0.1), params).shape == (2, 3)


def test_attention_rows_sum_to_one_and_rollout_multiplies_them(params):
    logits, weights = jax.jit(functools.partial(vit.forward, return_attention=True))(params, IMAGES)
    assert_allclose(logits, forward(params, IMAGES), atol=1e-6)
    weights = np.asarray(weights)
    assert weights.shape == (2, 4, 4, 17, 17) and abs(weights.sum(-1) - 1).max() < 1e-5
    for image, rollout in enumerate(vit.attention_rollout(weights)):
        flow = np.eye(17)
        for block in weights[:, image]:
            flow = (0.5 * block.mean(0) + 0.5 * np.eye(17)) @ flow
        assert_allclose(rollout, flow[0, 1:].reshape(4, 4) / flow[0, 1:].max(), atol=1e-5)


# ----------------------------------------------------------------------------------- Checkpoints


def test_all_spellings_of_checkpoints_load_alike(params, tmp_path):
    renamed = {re.sub("(?<=Attention_)1|(?<=LayerNorm_)2|(?<=MlpBlock_)3", lambda old: {
        "1": "0", "2": "1", "3": "0"}[old[0]], k): v for k, v in seeded_weights().items()}
    for names in (seeded_weights(), renamed):
        for prefix in ("", "opt/target/", "params/"):
            np.savez(tmp_path / "x.npz", **{prefix + k: v for k, v in names.items()})
            assert equal(vit.load_checkpoint(tmp_path / "x.npz"), params)


def test_saving_keeps_the_order_of_many_blocks_and_writes_the_released_names(params, tmp_path):
    many = random_params((8, 16, 12, 2, 32), 16, 3)
    vit.save_checkpoint(tmp_path / "x.npz", many)
    assert equal(vit.load_checkpoint(tmp_path / "x.npz"), many)
    vit.save_checkpoint(tmp_path / "x.npz", params, [*"abcde"])
    arrays = arrays_of(tmp_path / "x.npz")
    assert arrays.pop("class_names").tolist() == [*"abcde"] and equal(arrays, seeded_weights())


@pytest.mark.parametrize("width", [32, 20])  # the model's, and another one
def test_pre_logits_are_used_until_the_model_is_fine_tuned(params, tmp_path, width):
    r = np.random.RandomState(0)
    kernel, head = (r.standard_normal(shape).astype(np.float32) / 5
                    for shape in ((32, width), (width, 5)))
    np.savez(tmp_path / "x.npz", **seeded_weights() | {
        "pre_logits/kernel": kernel, "pre_logits/bias": kernel[0], "head/kernel": head})
    whole = vit.load_checkpoint(tmp_path / "x.npz")
    features = forward(params | {"head": {"kernel": np.eye(32), "bias": np.zeros(32)}}, IMAGES)
    expected = np.tanh(features @ kernel + kernel[0]) @ head + params["head"]["bias"]
    assert_allclose(forward(whole, IMAGES), expected, atol=1e-5)
    tuned = vit.adapt(whole, 48, 7)
    assert "pre_logits" not in tuned and tuned["head"]["kernel"].shape == (32, 7)
    assert not np.any(forward(tuned, np.ones((1, 48, 48, 3), np.float32)))


def test_timm_reads_what_we_save_and_gives_the_same_logits(tmp_path):
    timm, torch = pytest.importorskip("timm"), pytest.importorskip("torch")
    params = random_params((16, 64, 3, 4, 256), classes=7)
    vit.save_checkpoint(tmp_path / "x.npz", params, [*"abcdefg"])
    model = timm.models.VisionTransformer(
        img_size=32, patch_size=16, embed_dim=64, depth=3, num_heads=4, num_classes=7,
        act_layer=functools.partial(torch.nn.GELU, approximate="tanh")).eval()
    model.load_pretrained(str(tmp_path / "x.npz"))
    theirs = model(torch.tensor(IMAGES.transpose(0, 3, 1, 2))).detach().numpy()
    assert_allclose(forward(params, IMAGES), theirs, atol=1e-5)


def test_a_disk_that_refuses_is_one_line_and_the_old_file_stays(params, tmp_path, monkeypatch):
    path = tmp_path / "x.npz"
    vit.save_checkpoint(path, params)
    before = path.read_bytes()

    def full(_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(vit.BadInput, match="x.npz.*No space left"):
        patch.setattr(os, "fsync", full)
        vit.save_checkpoint(path, jax.tree.map(lambda p: p + 1, params))
    assert path.read_bytes() == before and len(list(tmp_path.glob("*.partial"))) <= 1
    vit.save_checkpoint(path, params)  # and what was left of it is replaced
    assert [*tmp_path.iterdir()] == [path]


def test_random_damage_is_noticed_or_harmless(params, tmp_path):
    r = np.random.default_rng(0)
    np.savez(tmp_path / "x.npz", **seeded_weights())
    Image.fromarray(r.integers(0, 256, (40, 40, 3), np.uint8)).save(tmp_path / "x.png")
    for name, read in (("x.npz", vit.load_checkpoint), ("x.png", lambda p: vit.decode(p, p))):
        data, noticed, path = (tmp_path / name).read_bytes(), 0, tmp_path / f"bad-{name}"
        for _ in range(60):
            broken = bytearray(data[: r.integers(1, len(data))] if r.random() < 0.3 else data)
            for place in r.integers(len(broken), size=r.integers(1, 4)):
                broken[place] ^= int(r.integers(1, 256))
            path.write_bytes(broken)
            try:
                assert equal(read(path), params) or name == "x.png"  # never silently wrong
            except vit.BadInput:
                noticed += 1
        assert noticed > 40


# ------------------------------------------------------------------------------------------ Data


def test_images_of_any_mode_and_size_become_upright_rgb(tmp_path):
    red, exif = Image.new("RGB", (40, 20), (200, 30, 30)), Image.Exif()
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
        assert not expected or np.abs(np.mean(read, (0, 1)) - expected).max() < 6, name


def picture(label, i=0):
    pixels = np.random.RandomState(100 * label + i).randint(0, 80, (16 + i, 16, 3))
    return Image.fromarray((pixels + 150 * label).astype(np.uint8))


def picture_folder(root, train=8, test=5, classes=("cat", "dog")):
    for split, count in (("train", train), ("test", test)):
        for label, name in enumerate(classes):
            Path(root, split, name).mkdir(parents=True)
            for i in range(count):
                picture(label, i).save(Path(root, split, name, f"{i}.png"))
    return Path(root)


def test_a_folder_without_split_is_split_the_same_way_every_time(tmp_path):
    root = picture_folder(tmp_path, train=20) / "train"
    (root / "dog").rename(tmp_path / "elsewhere")
    (root / "dog").symlink_to(tmp_path / "elsewhere")  # links are followed
    for name in ("notes.txt", "._1.png"):  # no images
        (root / "cat" / name).write_text("what macOS leaves")
    for place in (root, root / "cat"):
        shutil.copytree(tmp_path / "elsewhere", place / ".ipynb_checkpoints")
    first, second = vit.image_folder(root), vit.image_folder(root)
    assert first["classes"] == ["cat", "dog"]
    for split, count in (("train", 36), ("test", 4)):
        for (image, label), (same, _) in zip(first[split], second[split], strict=True):
            assert image == same and label == (np.mean(image) > 120)
        assert len(first[split]) == count


COUNTING = vit.Split(range(40), lambda i: (Image.new("RGB", (4, 4), (i, i, i)), i))


def test_training_order_is_a_function_of_seed_and_step_alone():
    def labels(start, stop, seed=0):
        split, options = vit.Split(range(10), COUNTING.read), vit.Options(image_size=4, seed=seed)
        return [vit.training_example(split, options, i)[1] for i in range(start, stop)]

    assert sorted(labels(0, 10)) == sorted(labels(10, 20)) == list(range(10))
    assert labels(0, 10) != labels(10, 20) and labels(0, 10) != labels(0, 10, seed=1)
    assert labels(7, 15) == labels(0, 20)[7:15]
    image = Image.fromarray(np.random.RandomState(0).randint(0, 256, (64, 64, 3)).astype(np.uint8))
    first, same, *others = (
        vit.training_example([(image, 0)], vit.Options(image_size=16, seed=seed), i)[0]
        for seed, i in ((0, 5), (0, 5), (0, 6), (1, 5)))
    assert equal(first, same) and not any(equal(first, other) for other in others)


def test_batches_come_in_order_whole_and_pass_on_errors():
    shares = vit.shares(48, 2)  # of each device, for each accumulation step
    assert shares.shape == (8, 2, 3) and sorted(shares.ravel()) == list(range(48))
    example = functools.partial(vit.test_example, COUNTING, 4)
    for (images, labels), wanted in zip(vit.batches(example, shares), shares, strict=True):
        assert np.array_equal(labels, np.where(wanted < 40, wanted, -1))
        assert np.array_equal(images[..., 0, 0, 0], np.where(wanted < 40, wanted, 0))
    with pytest.raises(vit.BadInput, match="example"):
        list(vit.batches(lambda index: vit.require(False, f"example {index}"), shares))


@pytest.mark.parametrize("n, batch_size", [(37, 16), (5, 3)])
def test_evaluation_counts_every_image_exactly_once(n, batch_size):
    params = random_params(image_size=16, classes=40)
    images = np.stack([vit.test_example(COUNTING, 16, i)[0] for i in range(n)])
    guesses = np.asarray(forward(params, vit.to_pixels(images))).argmax(1)
    wrong = [(COUNTING[i][0], (int(guesses[i]) + (i % 3 == 0)) % 40) for i in range(n)]
    expected = np.mean([i % 3 != 0 for i in range(n)])
    assert vit.evaluate(vit.replicate(params), wrong, batch_size) == expected


class Server(http.server.SimpleHTTPRequestHandler):
    """Serves files of a folder, whatever the folder asked for; cut-... break off in the middle."""

    def do_GET(self):
        data = Path(self.directory, Path(self.path).name).read_bytes()
        self.send_response(200)
        self.send_header("Content-Length", len(data))
        self.end_headers()
        self.wfile.write(data[: len(data) // 2] if "cut" in self.path else data)


@pytest.fixture
def server(tmp_path):
    folder = tmp_path / "served"
    folder.mkdir()
    with http.server.ThreadingHTTPServer(
            ("127.0.0.1", 0), functools.partial(Server, directory=folder)) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield folder, f"http://127.0.0.1:{running.server_port}"
        running.shutdown()


def cifar_archive(path, name):
    """An archive as the authors of CIFAR pack it, 50 + 10 images: {split: [(pixels, label)]}."""
    r, parts = np.random.RandomState(0), [f"data_batch_{i}.bin" for i in range(1, 6)]
    parts, last = (parts, "test_batch.bin") if name == "cifar-10" else (["train.bin"], "test.bin")
    made, names = {"train": [], "test": []}, "\n".join(f"class_{i}" for i in range(10)) + "\n\n"
    files = {"batches.meta.txt": names, "fine_label_names.txt": names, "coarse_label_names.txt": ""}
    files = {file: text.encode() for file, text in files.items()}
    for file in (*parts, last):
        n = 10 if file == last else 50 // len(parts)
        examples = list(zip(r.randint(0, 256, (n, 32, 32, 3)), r.randint(0, 10, n), strict=True))
        made["test" if file == last else "train"] += examples
        files[file] = b"".join(
            b"\7"[: name == "cifar-100"] + bytes([label, *image.transpose(2, 0, 1).ravel()])
            for image, label in examples)
    with tarfile.open(path, "w:gz") as archive:
        for file, data in files.items():
            info = tarfile.TarInfo(f"{name}-binary/{file}")
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return made


@pytest.mark.parametrize("name", ["cifar-10", "cifar-100"])
def test_cifar_is_fetched_verified_and_read_without_unpacking(name, server, tmp_path, monkeypatch):
    served, key = server[0] / f"{name}-binary.tar.gz", name.replace("-", "")
    made, options = cifar_archive(served, name), vit.Options(data_dir=tmp_path)
    good, url = served.read_bytes(), f"{server[1]}/{served.name}"
    monkeypatch.setitem(
        vit.CIFAR, key, (url, hashlib.sha256(good).hexdigest(), *vit.CIFAR[key][2:]))
    served.write_bytes(b"<html>Please log in")  # as some networks answer, with status 200
    with pytest.raises(vit.BadInput, match="<html>Please log in"):
        vit.cifar(key, options)
    assert not list(tmp_path.glob("downloads/*.gz"))
    served.write_bytes(good)
    assert vit.cifar(key, options)["classes"] == [f"class_{i}" for i in range(10)]
    served.unlink()
    data = vit.cifar(key, options)  # from the disk
    assert (len(data["train"]), len(data["test"])) == (49, 10)
    for split in ("train", "test"):
        for (image, label), (pixels, same) in zip(data[split], made[split], strict=False):
            assert np.array_equal(image, pixels) and label == same
    [file] = tmp_path.glob("downloads/*.gz")
    file.write_bytes(good[:-100])
    with pytest.raises(vit.BadInput, match=f"{file}.*delete it"):
        vit.cifar(key, options)


def test_a_failed_download_leaves_no_such_file_and_a_good_one_replaces_it(params, server, tmp_path):
    folder, address = server
    options, kept = vit.Options(data_dir=tmp_path), tmp_path / "downloads"
    (folder / "cut-x.npz").write_bytes(b"x" * 100_000)
    (folder / "y.npz").write_text("<!DOCTYPE html> <p>Not here.")
    for url, reason in ((f"{address}/cut-x.npz", "50000 out of 100000"),
                        (f"{address}/a/y.npz", "<!DOCTYPE html>"),
                        ("http://127.0.0.1:9/z.npz", "refused")):
        with pytest.raises(vit.BadInput, match=reason) as error:
            vit.fetch(url, options, vit.read_npz)
        assert url in str(error.value) and not list(kept.glob("*.npz"))
        assert len(list(kept.glob(f"*{url[-5:]}*.partial"))) <= 1
    np.savez(folder / "y.npz", **seeded_weights())
    for part in ("a", "b"):  # addresses that end alike are different files
        url = f"{address}/{part}/y.npz"
        assert equal(vit.read_params(vit.fetch(url, options, vit.read_npz), url), params)
    assert len(list(kept.glob("*y.npz*"))) == len(list(kept.glob("*.npz"))) == 2


def test_tfds_datasets_are_read_as_array_record_without_tensorflow(tmp_path):
    pytest.importorskip("array_record")  # Linux only
    import tensorflow_datasets as tfds

    class TinyPhotos(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict({
                "image": tfds.features.Image(shape=(None, None, 3)),
                "label": tfds.features.ClassLabel(names=["a", "b"])}))

        def _split_generators(self, _):
            return {"train": self._generate_examples(20), "validation": self._generate_examples(5)}

        def _generate_examples(self, n):
            for i in range(n):
                Image.new("RGB", (10 + i, 8), (i, i, i)).save(tmp_path / "x.png")
                yield i, {"image": tmp_path / "x.png", "label": i % 2}

    TinyPhotos(data_dir=tmp_path, file_format="array_record").download_and_prepare()
    data = vit.load_data("tiny_photos", vit.Options(data_dir=tmp_path))
    assert data["classes"] == ["a", "b"] and (len(data["train"]), len(data["test"])) == (20, 5)
    examples = (data["train"][i] for i in range(20))
    assert {image.width - 10: label for image, label in examples} == {i: i % 2 for i in range(20)}
    assert "tensorflow" not in sys.modules
    with pytest.raises(vit.BadInput, match="cannot prepare mnist.*TensorFlow is installed, run"):
        vit.load_data("mnist", vit.Options(data_dir=tmp_path))


# -------------------------------------------------------------------------------------- Training


def run_updates(devices, accum_steps, steps):
    """Losses and parameters after some updates on the same batches, whatever the devices."""
    options = vit.Options(warmup_steps=0, base_lr=0.01, accum_steps=accum_steps)
    update = jax.pmap(vit.train_step.__wrapped__, "devices", devices=jax.devices()[:devices],
                      in_axes=(None, 0, 0, None), out_axes=None, static_broadcasted_argnums=3)
    params, losses, r = random_params(), [], np.random.RandomState(0)
    state = {"params": params, "momentum": vit.sgd_init(params), "step": np.int32(0)}
    for _ in range(steps):
        images, labels = r.randint(0, 256, (32, 32, 32, 3), np.uint8), r.randint(0, 5, 32)
        places = np.arange(32).reshape(devices, accum_steps, -1)
        state, loss, _ = update(state, images[places], labels[places], options)
        losses.append(float(loss))
    for leaf in jax.tree.leaves(state):  # all devices have arrived at the same
        assert all(np.array_equal(leaf, shard.data) for shard in leaf.addressable_shards)
    return losses, jax.device_get(state["params"]), (images / np.float32(127.5) - 1, labels)


def test_eight_devices_give_what_one_gives_and_a_step_is_its_parts_and_lowers_the_loss():
    losses, params, _ = run_updates(1, 1, 10)
    others, theirs, _ = run_updates(8, 2, 10)
    assert_allclose(others, losses, atol=1e-5)
    all_close(theirs, params, 1e-4)
    [loss], new, batch = run_updates(1, 1, 1)
    params, gradient = random_params(), jax.jit(jax.value_and_grad(loss_of))
    expected, grads = gradient(params, *batch)
    assert abs(loss - expected) < 1e-5 and gradient(new, *batch)[0] < expected
    grads, _ = jax.jit(vit.clip_by_global_norm)(grads, 1.0)
    all_close(new, jax.tree.map(lambda p, g: p - 0.01 * np.asarray(g), params, grads), 1e-6)


def own_data(test=lambda i: None):
    """A dataset of one's own; test(i) is called when test image i is read."""
    class Tests(list):
        def __getitem__(self, i):
            test(i)
            return super().__getitem__(i)

    return {"classes": ["cat", "dog"], "train": [(picture(i % 2, i), i % 2) for i in range(16)],
            "test": Tests((picture(i % 2, i), i % 2) for i in range(10))}


OWN = vit.Options(model="ViT-XS_8", pretrained="none", image_size=16, batch_size=16, accum_steps=1,
                  total_steps=30, warmup_steps=1, base_lr=0.1, augment="none", log_every=1)


def test_a_dataset_of_ones_own_is_learned_and_any_thread_may_train(tmp_path):
    with ThreadPoolExecutor(1) as pool:
        options = dataclasses.replace(OWN, logdir=tmp_path)
        params = pool.submit(vit.train, options, own_data()).result()
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(params))
    assert vit.evaluate(vit.replicate(params), own_data()["test"], 16) == 1


@pytest.mark.parametrize("log_every", [1, 100])
def test_a_signal_during_an_evaluation_loses_no_row_and_handlers_are_put_back(tmp_path, log_every):
    options = dataclasses.replace(OWN, logdir=tmp_path, total_steps=4, eval_every=2,
                                  log_every=log_every)
    before, send = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)], [1, 0, 1, 0]
    data = own_data(lambda i: i == 0 and send.pop(0) and os.kill(os.getpid(), signal.SIGTERM))
    for _ in range(2):  # in step 2, and in the last one
        with pytest.raises(KeyboardInterrupt):
            vit.train(options, data)
        assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == before
    vit.train(options, data)
    rows = [row.split(",") for row in (tmp_path / "metrics.csv").read_text().splitlines()[1:]]
    assert [row[0] for row in rows if row[-1]] == ["2", "4"] and not send
    saved = json.loads(str(arrays_of(tmp_path / "checkpoint.npz")["train/run"]))["rows"]
    assert [row[0] for row in saved if row[-1] != ""] == [2, 4]


def test_a_run_leaves_what_people_look_at_and_its_folder_is_refused_to_others(tmp_path, capsys):
    root, run = picture_folder(tmp_path / "data"), tmp_path / "run"
    path, command = run / "checkpoint.npz", [
        str(root), *TINY, "--total_steps=30", "--base_lr=0.1", f"--logdir={run}"]

    def refused(words, *flags):
        assert vit.main([*command, *flags]) == 2
        error = capsys.readouterr().err
        assert words in error and str(run) in error and error.count("\n") == 1

    with vit.locked(run):
        refused("another run is at work")
    assert vit.main(command) == 0
    out = capsys.readouterr().out
    assert "step 30/30  loss" in out and "images/s" in out and "100.00%" in accuracy_in(out)
    rows = (run / "metrics.csv").read_text().splitlines()
    assert rows[0] == "step,loss,learning_rate,images_per_second,test_accuracy"
    assert len(rows) == 32 and rows[-1] == "30,,,,1.0"
    assert Image.open(run / "first_batch.png").size == (8 * 16, 16)
    arrays = arrays_of(path)
    assert arrays["class_names"].tolist() == ["cat", "dog"]
    assert vit.main([str(root), "--eval_only", f"--pretrained={path}"]) == 0
    assert accuracy_in(capsys.readouterr().out) == accuracy_in(out)
    assert vit.main(command) == 0 and equal(arrays_of(path), arrays)  # nothing was left to do
    refused("base_lr=0.1, now it is 0.5", "--base_lr=0.5")
    (root / "train/cat/3.png").unlink()
    refused("training images=16, now it is 15")


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(
        tmp_path, capsys, monkeypatch):
    root, rate = picture_folder(tmp_path / "data"), vit.learning_rate
    monkeypatch.setattr(vit, "learning_rate", lambda step, *a: jnp.where(
        jnp.asarray(step) < 3, rate(step, *a), jnp.inf))
    assert vit.main([str(root), *TINY, "--total_steps=9", "--checkpoint_every=2",
                     f"--logdir={tmp_path / 'run'}"]) == 2
    error = capsys.readouterr().err
    assert "nan" in error and "checkpoint.npz" in error
    good = arrays_of(tmp_path / "run" / "checkpoint.npz")
    assert good["train/step"] == 2 and all(
        np.isfinite(v).all() for k, v in good.items() if v.dtype.kind == "f")


@pytest.mark.parametrize("file", ["train/dog/7.png", "test/cat/1.png"])
def test_an_unreadable_image_stops_the_run_but_loses_no_step(tmp_path, capsys, file):
    root, run = picture_folder(tmp_path / "data"), tmp_path / "run"
    (root / file).write_text("no image")
    assert vit.main([str(root), *TINY, "--total_steps=9", "--batch_size=8", "--eval_every=5",
                     f"--logdir={run}"]) == 2
    error, batch = capsys.readouterr().err, list(vit.epoch_order(0, 0, 16)).index(15) // 8
    assert file in error and error.count("\n") == 1
    assert arrays_of(run / "checkpoint.npz")["train/step"] == (5 if "test" in file else batch)


def cli(*arguments, devices=1, wait=True):
    """vit.py in a process of its own: status, what it prints, errors."""
    environment = os.environ | {
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}", "JAX_PLATFORMS": "cpu"}
    process = subprocess.Popen([sys.executable, vit.__file__, *map(str, arguments)], text=True,
                               env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    return finish(process) if wait else process


def finish(process):
    try:
        out, error = process.communicate(timeout=120)
    finally:
        process.kill()
    return process.returncode, out, error


def accuracy_in(out):
    return [line for line in out.splitlines() if line.startswith("test accuracy")][-1]


def without_speed(folder):
    """All that a run leaves, but the images per second."""
    arrays = arrays_of(folder / "checkpoint.npz")
    run = json.loads(str(arrays.pop("train/run")))
    table = [row.split(",") for row in (folder / "metrics.csv").read_text().splitlines()]
    return [[row[:3] + row[4:] for row in rows] for rows in (run["rows"], table)], run["fixed"], {
        name: array.tobytes() for name, array in arrays.items()}


def test_a_run_killed_stopped_or_no_longer_heard_ends_bit_for_bit_as_one_left_alone(tmp_path):
    root = picture_folder(tmp_path / "data")
    flags = [root, *TINY, "--augment=inception", "--dropout=0.1", "--mixup_alpha=0.2",
             "--total_steps=90", "--checkpoint_every=2", "--eval_every=25"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert cli(*flags, f"--logdir={whole}", devices=2)[0] == 0
    path, random, seen = killed / "checkpoint.npz", np.random.default_rng(time.time_ns()), 0
    for how in (signal.SIGKILL, "| head -2", signal.SIGTERM, signal.SIGINT, signal.SIGKILL):
        process = cli(*flags, f"--logdir={killed}", devices=2, wait=False)
        if how == "| head -2":
            assert process.stdout.readline() and process.stdout.readline()
            process.stdout.close()
            assert process.stderr.read() == "" and process.wait() == 128 + signal.SIGPIPE
        else:
            while process.poll() is None and (
                    not path.exists() or path.stat().st_mtime_ns == seen):
                time.sleep(0.01)  # until it has gone beyond what was there
            time.sleep(random.uniform(0, 0.3))
            process.send_signal(how)
            status, out, error = finish(process)
            assert status in (0, -how, 128 + how) and not error, error
            assert status != 128 + how or "same command" in out
        seen, step = path.stat().st_mtime_ns, arrays_of(path)["train/step"]  # whole at any moment
        rows = (killed / "metrics.csv").read_text().splitlines()
        if how != signal.SIGKILL:  # no step is lost
            assert rows[-1].startswith(f"{step},")
        assert len(list(killed.glob("*.partial"))) <= 1
    assert seen
    status, out, error = cli(*flags, f"--logdir={killed}", devices=2)
    assert status == 0 and f"step {step} of 90" in out
    assert without_speed(killed) == without_speed(whole) and not list(killed.glob("*.partial"))


# --------------------------------------------------------------------------------- Several hosts


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def two_hosts(*flags, **differing):
    """vit.py as two hosts, whose flags differ in what is given as pairs: finish() of each."""
    for _ in range(2):  # once more where the machine was too busy for Gloo to connect in time
        address, pairs = f"--coordinator_address=127.0.0.1:{free_port()}", differing.items()
        hosts = [cli(*(two[i] if name == "data" else f"--{name}={two[i]}" for name, two in pairs),
                     *flags, address, "--num_processes=2", f"--process_id={i}", devices=2,
                     wait=False) for i in (0, 1)]
        results = [finish(host) for host in hosts]
        if not re.search("Gloo.*(timed out|timeout)", f"{results}"):
            break
    return results


def test_two_processes_give_what_one_gives_with_as_many_devices(tmp_path):
    flags = [picture_folder(tmp_path / "data"), *TINY, "--total_steps=4", "--mixup_alpha=0.2",
             "--dropout=0.1", "--log_every=3"]
    (status, two, error), (other, silent, _) = two_hosts(*flags, f"--logdir={tmp_path / 'two'}")
    assert (status, other) == (0, 0), error
    status, one, _ = cli(*flags, f"--logdir={tmp_path / 'one'}", devices=4)
    assert status == 0 and accuracy_in(two) == accuracy_in(one) and "accuracy" not in silent
    first, second = (vit.load_checkpoint(tmp_path / name / "checkpoint.npz")
                     for name in ("one", "two"))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), first, second)


@pytest.mark.parametrize("what", ["other flags", "no folder", "bad images"])
def test_what_one_host_cannot_do_ends_both_at_once(tmp_path, what):
    good, bad = picture_folder(tmp_path / "good"), tmp_path / "bad"
    if what == "bad images":  # found later, when both are training
        for file in picture_folder(bad).glob("train/*/*.png"):
            file.write_text("no image")
    results = two_hosts(*TINY, "--total_steps=400", f"--logdir={tmp_path / 'run'}",
                        **{"seed": (0, 1)} if what == "other flags" else {"data": (good, bad)})
    assert [status for status, _, _ in results] == [2, 2]
    for _, _, error in results if what == "other flags" else results[1:]:
        assert ("seed" if what == "other flags" else str(bad)) in error.splitlines()[0]
        assert "Traceback" not in error


def test_a_host_does_not_wait_for_ever_for_one_that_never_comes():
    call = ("import vit; vit.join_hosts(vit.Options(coordinator_address='127.0.0.1:{}', "
            "num_processes=2), patience=3)")
    done = subprocess.run([sys.executable, "-c", call.format(free_port())], text=True, timeout=120,
                          cwd=Path(vit.__file__).parent, capture_output=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "to 127.0.0.1:" in (done.stdout + done.stderr)


# ------------------------------------------------------------------------------ Photos, bad input


def test_photos_are_classified_and_their_attention_is_drawn(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    vit.save_checkpoint("x.npz", random_params(classes=7), [f"kind {i}" for i in range(7)])
    for photo in ("a.jpg", "b.png"):
        Image.effect_mandelbrot((90, 60), (-2, -1, 1, 1), 50).convert("RGB").save(photo)
    assert vit.main(["a.jpg", "b.png", "--pretrained=x.npz"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 12 and all("kind" in line for line in lines[1:6])
    shares = [float(line.split("%")[0]) for line in lines[1:6]]
    assert shares == sorted(shares, reverse=True)
    for photo in ("a.jpg", "b.png"):
        assert Image.open(f"{photo}-attention.png").size == (180, 60)


@pytest.fixture(scope="module")
def bad(tmp_path_factory):
    """A folder full of what can be wrong."""
    root = tmp_path_factory.mktemp("bad")
    picture_folder(root / "good", test=2)
    flat, one = seeded_weights(classes=2), np.ones(1, np.float32)
    key = "Transformer/encoderblock_1/LayerNorm_2/bias"
    query = "Transformer/encoderblock_0/MultiHeadDotProductAttention_1/query/kernel"
    for name, arrays in {
            "good": {}, "pickled": {"cls": np.array([{}], object)}, "registers": {"registers": one},
            "half": {"pre_logits/kernel": np.eye(32, dtype=np.float32)},
            "misshapen": {key: np.zeros(7, np.float32)}, "nan": {key: np.full(32, np.nan)},
            "huge": {key: np.full(32, 1e300)}, "ints": {key: np.zeros(32, int)},
            "heads": {query: np.zeros((32, 100, 1), np.float32)},
            "names": {"class_names": np.array(["cat"])},
            "others": {"class_names": np.array(["cat", "wolf"])}}.items():
        np.savez(root / f"{name}.npz", **flat | arrays)
    np.savez(root / "nothing.npz", x=np.zeros(3))
    np.savez(root / "missing.npz", **{k: v for k, v in flat.items() if k != key})
    np.savez(root / "gap.npz", **{k.replace("_1/", "_2/") if "block_1/" in k else k: v
                                  for k, v in flat.items()})
    (root / "empty.npz").write_bytes(b"")
    (root / "text.npz").write_text("hello")
    (root / "cut.npz").write_bytes((root / "good.npz").read_bytes()[:-9000])
    shutil.copy(root / "good.npz", root / "twice.npz")
    with zipfile.ZipFile(root / "twice.npz", "a") as file, pytest.warns(UserWarning):
        file.writestr("cls.npy", file.read("cls.npy"))
    (root / "half").mkdir()
    np.savez(root / "half/checkpoint.npz", **flat | {"train/step": np.int32(3)})
    picture_folder(root / "one", classes=("cat",))
    picture_folder(root / "unknown")
    (root / "unknown/test/dog").rename(root / "unknown/test/wolf")
    (root / "no_images").mkdir()
    image = picture_folder(root / "cut_image") / "train/dog/3.png"
    image.write_bytes(image.read_bytes()[:300])
    (root / "text.jpg").write_text("no image")
    Image.new("1", (20_000, 20_000)).save(root / "bomb.png")
    Image.new("F", (20, 20)).save(root / "fractions.tiff")
    return root


TRAIN = " ".join(TINY)


@pytest.mark.parametrize("command, message", [
    ("cifra10", "cifra10"), ("CIFAR10", "CIFAR10"), ("nothere.jpg", "nothere.jpg"),
    ("imagenette/320px-v9", "imagenette/320px-v9"), ("no/such/folder", "no/such/folder"),
    ("digits --modle=ViT-B_16", "--modle"), ("digits --model=ViT-Q_16", "ViT-Q_16"),
    ("digits --model=B_16", "'B_16'"), ("digits --decay_type=step", "step"),
    ("digits --total_steps=many", "many"), ("digits --batch_size=0", "--batch_size=0"),
    ("digits --base_lr=-1", "--base_lr=-1.0"), ("digits --dropout=1.5", "--dropout=1.5"),
    ("digits --base_lr=nan", "--base_lr=nan"), ("digits --warmup_steps=2000", "2000"),
    ("digits --seed=18446744073709551616", "--seed"), ("digits --mixup_alpha=inf", "mixup_alpha"),
    ("digits --total_steps=4294967296", "--total_steps"),
    ("digits --image_size=80000", "--image_size=80000"), ("digits --image_size=30", "32 is"),
    ("digits --model=ViT-XS_0", "ViT-XS_0"), ("digits --batch_size=9", "--batch_size=9"),
    ("digits --pretrained=released --model=ViT-S_14 --image_size=28", "ViT-S_14"),
    ("digits --eval_only --pretrained=good.npz", "good.npz"),
    ("digits --num_processes=2", "--coordinator_address"),
    ("digits --coordinator_address=foo", "--coordinator_address='foo'"),
    ("digits --coordinator_address=127.0.0.1:abc", "127.0.0.1:abc"),
    ("good --pretrained=", "cannot read"), ("good --pretrained=absent.npz", "absent.npz"),
    ("good --pretrained=empty.npz", "empty.npz"), ("good --pretrained=text.npz", "text.npz"),
    ("good --pretrained=cut.npz", "cut.npz"), ("good --pretrained=pickled.npz", "allow_pickle"),
    ("good --pretrained=nothing.npz", "find a ViT in nothing.npz"),
    ("good --pretrained=missing.npz", "LayerNorm_2/bias is missing, should be (32,)"),
    ("good --pretrained=gap.npz", "encoderblock_1"),
    ("good --pretrained=registers.npz", "registers"),
    ("good --pretrained=misshapen.npz", "is (7,), should be (32,)"),
    ("good --pretrained=nan.npz", "NaN"), ("good --pretrained=ints.npz", "no floats"),
    ("good --pretrained=huge.npz", "infinity"), ("good --pretrained=heads.npz", "heads.npz"),
    ("good --pretrained=twice.npz", "two arrays of one name"),
    ("good --pretrained=half.npz", "pre_logits"), ("good --pretrained=names.npz", "2 classes"),
    ("good --pretrained=good.npz --model=ViT-B_16", "ViT-B_16"),
    ("good --pretrained=good.npz --image_size=30", "32 is"),
    ("good --eval_only --pretrained=others.npz", "knows other classes"),
    ("good --pretrained=http://127.0.0.1:9/v.npz --data_dir=cache", "v.npz by hand"),
    (f"good {TRAIN} --logdir=half", "half/checkpoint.npz"), ("no_images", "no_images"),
    ("one", "'cat'"), ("unknown", "'wolf'"), (f"cut_image {TRAIN}", "dog/3.png"),
    ("text.jpg --pretrained=good.npz", "text.jpg"), ("bomb.png --pretrained=good.npz", "bomb.png"),
    ("fractions.tiff --pretrained=good.npz", "fractions.tiff"),
    ("text.jpg digits", "text.jpg digits"),
])
def test_bad_input_is_one_line_and_status_2(command, message, bad, capsys, monkeypatch):
    monkeypatch.chdir(bad)
    assert vit.main(command.split()) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and len(error) < 600, error


def test_help_explains_every_flag_with_its_default(capsys):
    with pytest.raises(SystemExit) as exit:
        vit.main(["--help"])
    out = " ".join(capsys.readouterr().out.split())
    assert exit.value.code == 0
    for field in dataclasses.fields(vit.Options):
        assert re.search(rf"--{field.name} .*\S \({re.escape(str(field.default))}\)", out)


def test_the_head_of_the_file_asks_for_what_requirements_txt_asks_for():
    source = Path(vit.__file__)
    block = source.read_text().split("# ///")[1].split("dependencies")[1]
    lines = (source.parent / "requirements.txt").read_text().splitlines()
    assert re.findall('"(.*?)"', block) == [line.split("#")[0].strip() for line in lines]
