# SPDX-License-Identifier: Apache-2.0
"""What vit.py promises, checked: pytest test_vit.py (about two minutes on two CPU cores).

Expected numbers are the original implementation's (google-research/vision_transformer at c6de1e5,
float32, highest matmul precision), or NumPy and Pillow written out, or a second way there.
"""
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
from unittest import mock

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"  # before jax starts

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose
from PIL import Image

import vit

jax.config.update("jax_default_matmul_precision", "highest")
SMALL = (8, 32, 2, 4, 64)  # patch size, width, depth, heads, MLP width
TINY = ["--pretrained=none", "--model=ViT-XS_8", "--image_size=16", "--batch_size=16",
        "--accum_steps=1", "--warmup_steps=1", "--augment=none", "--log_every=1"]
IMAGES = np.random.RandomState(1).uniform(-1, 1, (4, 32, 32, 3)).astype(np.float32)
LABELS = np.array([1, 4, 2, 0])

def seeded_weights(model=SMALL, image_size=32, classes=5):
    """{released name: array}; by default those for which the original's numbers were computed."""
    shapes = jax.eval_shape(lambda: vit.to_released(vit.init_params(
        jax.random.key(0), model, image_size, classes)))
    r = np.random.RandomState(0)
    return {name: (0.1 * r.standard_normal(shapes[name].shape)).astype(np.float32)
            + np.float32(name.endswith("/scale")) for name in sorted(shapes)}

def seeded_params(*sizes):
    return vit.read_params(seeded_weights(*sizes), "the seeded weights")

params = pytest.fixture(seeded_params, scope="module")

def loss_of(params, images=IMAGES, labels=LABELS, remat=False):
    return vit.cross_entropy(vit.forward(params, images, remat=remat), jax.nn.one_hot(labels, 5))

forward, clip = jax.jit(vit.forward), jax.jit(vit.clip_by_global_norm)  # compiled once for all
loss_and_gradient = jax.jit(jax.value_and_grad(loss_of), static_argnames="remat")

def equal(a, b):
    return all(jax.tree.leaves(jax.tree.map(np.array_equal, a, b)))

def all_close(a, b, atol):
    jax.tree.map(lambda a, b: assert_allclose(a, b, atol=atol), a, b)

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
    loss, grads = loss_and_gradient(params)
    grads, r = jax.device_get(vit.to_released(grads)), np.random.RandomState(3)
    products = [np.vdot(grads[k], r.standard_normal(grads[k].shape)) for k in sorted(grads)]
    assert_allclose(products, [  # of each with a random direction
        0.126349, 0.027935, 0.145475, 0.005826, 0.063795, -0.166069, 0.351390, -0.377218, 0.173236,
        0.581771, 0, 0.088451, -0.003554, 1.348437, 0.001189, -0.030801, -0.211105, -1.400027,
        0.063067, -0.019732, -0.077804, -0.088163, -0.019895, 0.145312, -0.039812, 0.585964, 0,
        -0.307931, 0.459707, 0.005924, -0.019317, -0.090996, 0.243097, -0.590395, -0.642435,
        -0.179350, 0.056561, -1.730072, -0.368995, 1.325776], atol=1e-5)
    assert abs(loss - 1.5707834) < 1e-5
    all_close(clip(grads, 1.0), {k: g / 3.2320464 for k, g in grads.items()}, 1e-6)  # its norm
    all_close(clip(grads, 4.0), grads, 0)

@pytest.mark.parametrize("dtype, losses, logits", [
    ("bfloat16", [1.5707833, 1.5707833, 1.4806235, 1.2611428, 1.1061978],
     [0.6176054, 0.5241724, 0.29380584, -0.9033976, 0.2977193]),
    ("float32", [1.5707833, 1.5707833, 1.4805456, 1.2608005, 1.1057192],
     [0.6180969, 0.5244506, 0.29388905, -0.9047332, 0.29700014])])
def test_five_updates_with_accumulation_equal_the_original(params, dtype, losses, logits):
    momentum = jax.tree.map(lambda m: m.astype(dtype), vit.sgd_init(params))
    for step, expected in enumerate(losses):
        halves = [loss_and_gradient(params, IMAGES[h], LABELS[h]) for h in ([0, 1], [2, 3])]
        loss, grads = jax.tree.map(lambda *x: sum(x) / 2, *halves)
        assert abs(loss - expected) < 1e-5
        # Not under jit, where XLA may keep more bits of a bfloat16 than it has.
        params, momentum = vit.sgd_update(
            params, momentum, clip(grads, 1.0), vit.learning_rate(step, 0.03, 5, 2))
    assert_allclose(forward(params, IMAGES)[0], logits, atol=1e-5)

def test_learning_rates_and_parameter_counts_are_the_published_ones():
    for total, warmup in ((10_000, 500), (20, 0)):
        for step in {0, warmup // 2, warmup, (warmup + total) // 2, total - 1, total}:
            done = max(0, step - warmup) / (total - warmup)
            for kind, rate in (("cosine", 0.03 * (1 + np.cos(np.pi * done)) / 2),
                               ("linear", 0.03 + (1e-5 - 0.03) * done)):
                rate *= min(1, step / warmup) if warmup else 1
                assert abs(vit.learning_rate(step, 0.03, total, warmup, kind) - rate) < 1e-7
    assert abs(vit.learning_rate(1500, 0.03, 10_000, 500) - 0.02918726) < 1e-7  # the original's
    for model, count in {
            "ViT-Ti_16": 5_717_416, "ViT-S_16": 22_050_664, "ViT-B_16": 86_567_656,
            "ViT-B_32": 88_224_232, "ViT-L_16": 304_326_632, "ViT-L_32": 306_535_400,
            "ViT-H_14": 632_045_800}.items():
        shapes = jax.eval_shape(lambda m=model: vit.init_params(jax.random.key(0), m, 224, 1000))
        assert sum(p.size for p in jax.tree.leaves(shapes)) == count, model

def test_initial_parameters_have_the_original_distributions():
    d, params = 192, jax.device_get(vit.init_params(jax.random.key(0), "ViT-Ti_16", 224, 10))
    expected = {  # in a name: standard deviation, largest value between
        "MultiHead.*kernel": ((2 / (d + d)) ** 0.5, 0.99, 1),  # uniform, heads counted together
        "MlpBlock.*kernel": ((2 / (d + 4 * d)) ** 0.5, 0.99, 1),
        "MlpBlock.*bias": (1e-6, 1.6, 4), "pos_embedding": (0.02, 1.6, 4),  # normal
        "'embedding.*kernel": (1 / (3 * 16**2) ** 0.5, 1.2, 2 / 0.8796 / 3**0.5)}  # normal, cut
    for path, x in jax.tree_util.tree_leaves_with_path(params):
        name = jax.tree_util.keystr(path)
        for std, least, most in (v for pattern, v in expected.items() if re.search(pattern, name)):
            assert abs(x.std() / std - 1) < 0.03, name
            assert least < abs(x).max() / std / 3**0.5 < most * (1 + 1e-5), name
            break
        else:
            assert np.all(x == ("scale" in name)), name

def test_mixup_blends_with_the_reversed_batch_and_dropout_keeps_the_mean():
    targets = np.eye(5, dtype=np.float32)[LABELS]
    for x, mixed in zip((IMAGES, targets), vit.mixup(IMAGES, targets, 0.3), strict=True):
        assert_allclose(mixed, 0.3 * x + 0.7 * x[[3, 2, 1, 0]], atol=1e-6)
    x = vit.dropout(jnp.ones(100_000), jax.random.key(0), 0.3)
    assert abs((x == 0).mean() - 0.3) < 0.01 and abs(x.mean() - 1) < 0.01

def test_crops_have_the_distribution_and_enlarging_the_result_of_the_original():
    # TensorFlow's sampler: the aspect ratio is uniform, then the height among those that fit.
    rng, width, height, at = np.random.default_rng(0), 500, 375, (0, 0.1, 0.25, 0.5, 0.75, 0.9, 1)
    left, upper, right, lower = np.array(
        [vit.inception_crop(rng, width, height) for _ in range(20_000)]).T
    assert left.min() == upper.min() == 0 and right.max() == width and lower.max() == height
    w, h, free = right - left, lower - upper, width - right + left
    aspect, share = np.random.default_rng(1).uniform((3 / 4, 0), (4 / 3, 1), (200_000, 2)).T
    low = np.sqrt(0.05 * width * height / aspect)
    tall = low + share * (np.minimum(height, width / aspect) - low)
    for x, expected in ((w / h, aspect), (w * h / width / height, tall**2 * aspect / 375 / 500)):
        assert_allclose(np.quantile(x, at), np.quantile(expected, at), atol=0.015)
    assert abs((left / np.maximum(free, 1))[free > 50].mean() - 0.5) < 0.01
    # Where Pillow enlarges, it interpolates as TensorFlow, within one grey level.
    image = np.random.RandomState(0).randint(0, 256, (32, 32, 3)).astype(np.uint8)
    at = np.clip((np.arange(384) + 0.5) * 32 / 384 - 0.5, 0, 31)
    weights = np.maximum(0, 1 - abs(at[:, None] - np.arange(32)))
    expected = np.einsum("ik,jl,klc->ijc", weights, weights, image, optimize=True)
    assert abs(vit.to_array(Image.fromarray(image), 384) - expected).max() < 1.001

# ------------------------------------------------------------------------------------- The model

def test_the_model_needs_nothing_but_jax_when_it_is_pasted_elsewhere():
    model = Path(vit.__file__).read_text().split("- 2. Model\n")[1].split("- 3. Learning\n")[0]
    pasted = {}
    exec(f"import jax, jax.numpy as jnp\n{model}", pasted)
    params = jax.eval_shape(lambda: pasted["init_params"](jax.random.key(0), "ViT-XS_8", 16, 3))
    assert jax.eval_shape(lambda p: pasted["forward"](
        p, jnp.ones((2, 16, 16, 3)), jax.random.key(0), 0.1), params).shape == (2, 3)

def test_recomputing_and_attention_change_no_result_and_bfloat16_little(params):
    all_close(loss_and_gradient(params), loss_and_gradient(params, remat=True), 1e-5)
    all_close(forward(params, IMAGES.astype(jnp.bfloat16)), forward(params, IMAGES), 0.05)
    logits, weights = jax.jit(functools.partial(vit.forward, return_attention=True))(params, IMAGES)
    assert_allclose(logits, forward(params, IMAGES), atol=1e-6)
    weights = np.asarray(weights)
    assert weights.shape == (2, 4, 4, 17, 17) and abs(weights.sum(-1) - 1).max() < 1e-5
    for image, rollout in enumerate(vit.attention_rollout(weights)):
        below, above = 0.5 * weights[:, image].mean(1) + 0.5 * np.eye(17)
        flow = (above @ below)[0, 1:].reshape(4, 4)
        assert_allclose(rollout, flow / flow.max(), atol=1e-5)

def test_all_spellings_load_alike_and_the_released_one_is_saved_with_blocks_in_order(tmp_path):
    sizes, path = ((8, 16, 12, 2, 32), 16, 3), tmp_path / "x.npz"
    names, saved, params = [*"abc"], seeded_weights(*sizes), seeded_params(*sizes)
    renamed = {re.sub("(?<=Attention_)1|(?<=LayerNorm_)2|(?<=MlpBlock_)3", lambda old: {
        "1": "0", "2": "1", "3": "0"}[old[0]], name): array for name, array in saved.items()}
    for arrays in (saved, renamed):
        for prefix in ("", "opt/target/", "params/"):
            np.savez(path, **{prefix + name: array for name, array in arrays.items()})
            assert equal(vit.load_checkpoint(path), params)
    vit.save_checkpoint(path, params, class_names=names)
    assert equal(vit.read_npz(path), saved | {"class_names": np.array(names)})

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
    params = seeded_params((16, 64, 3, 4, 256), 32, 7)
    vit.save_checkpoint(tmp_path / "x.npz", params, class_names=[*"abcdefg"])
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
    with monkeypatch.context() as patch, pytest.raises(vit.BadInput, match="x.npz.*No space left"):
        patch.setattr(os, "fsync", mock.Mock(side_effect=OSError(28, "No space left")))
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
    red, exif, path = Image.new("RGB", (40, 20), (200, 30, 30)), Image.Exif(), tmp_path / "x"
    exif[0x0112] = 6  # the camera was turned by a quarter
    grey16, clear = Image.fromarray(np.full((20, 40), 128 * 256, np.uint16)), red.convert("RGBA")
    clear.putalpha(100)
    for image, kind, options, expected in (
            (red, "jpeg", {}, red), (red.convert("P"), "png", {}, None), (clear, "png", {}, red),
            (red.convert("L"), "png", {}, red.convert("L")), (red, "webp", {}, red),
            (red.convert("CMYK"), "jpeg", {}, red), (red, "jpeg", {"exif": exif}, red),
            (grey16, "png", {}, Image.new("L", (40, 20), 128)), (red.convert("1"), "png", {}, None),
            (red, "gif", {"transparency": 0}, None)):
        image.save(path, kind, **options)
        read = vit.decode(path, "x")
        assert read.mode == "RGB" and read.size == ((20, 40) if "exif" in options else (40, 20))
        if expected:
            assert_allclose(np.mean(read, (0, 1)), np.mean(expected.convert("RGB"), (0, 1)), atol=6)

def picture_folder(root, train=8, test=5, classes=("cat", "dog")):
    for split, count in (("train", train), ("test", test)):
        for label, name in enumerate(classes):
            Path(root, split, name).mkdir(parents=True)
            for i in range(count):
                pixels = np.random.RandomState(100 * label + i).randint(0, 80, (16 + i, 16, 3))
                image = Image.fromarray((pixels + 150 * label).astype(np.uint8))
                image.save(Path(root, split, name, f"{i}.png"))
    return Path(root)

def test_a_folder_without_split_is_split_the_same_way_every_time(tmp_path):
    root = picture_folder(tmp_path, train=20) / "train"
    (root / "dog").rename(tmp_path / "elsewhere")
    (root / "dog").symlink_to(tmp_path / "elsewhere")  # links are followed
    for name in ("notes.txt", "._1.png"):  # no images
        (root / "cat" / name).write_text("what macOS leaves")
    for place in (root, root / "cat"):
        shutil.copytree(tmp_path / "elsewhere", place / ".ipynb_checkpoints")
    data = vit.image_folder(root)
    assert data["classes"] == ["cat", "dog"]
    assert not {*data["train"]} & {*data["test"]}
    for split, count in (("train", 18), ("test", 2)):  # of each class
        labels = [label for image, label in map(data["read"], data[split])]
        assert labels == [int(np.mean(data["read"](item)[0]) > 120) for item in data[split]]
        assert labels == [0] * count + [1] * count

COUNTING = {"train": range(10), "test": range(40), "classes": [*map(str, range(40))],
            "read": lambda i: (Image.new("RGB", (4, 4), (i, i, i)), i)}

def test_training_order_is_a_function_of_seed_and_step_alone():
    def labels(start, stop, seed=0):
        options = vit.Options(image_size=4, seed=seed)
        return [vit.training_example(COUNTING, options, i)[1] for i in range(start, stop)]
    assert sorted(labels(0, 10)) == sorted(labels(10, 20)) == list(range(10))
    assert labels(0, 10) != labels(10, 20) and labels(0, 10) != labels(0, 10, seed=1)
    assert labels(7, 15) == labels(0, 20)[7:15]
    image = Image.fromarray(np.random.RandomState(0).randint(0, 256, (64, 64, 3)).astype(np.uint8))
    first, same, *others = (
        vit.training_example({"train": [(image, 0)], "read": tuple},
                             vit.Options(image_size=16, seed=seed), i)[0]
        for seed, i in ((0, 5), (0, 5), (0, 6), (1, 5)))
    assert equal(first, same) and not any(equal(first, other) for other in others)

def test_batches_come_in_order_whole_and_pass_on_errors():
    shares = vit.shares(48, 2)  # of each device, for each accumulation step
    assert shares.shape == (8, 2, 3) and sorted(shares.ravel()) == list(range(48))
    batches = vit.batches(lambda i: (np.full((2, 2, 3), i, np.uint8), i), shares)
    for (images, labels), wanted in zip(batches, shares, strict=True):
        assert equal(labels, wanted) and equal(images[..., 0, 0, 0], wanted)
    with pytest.raises(vit.BadInput, match="example"):
        list(vit.batches(lambda index: vit.require(False, f"example {index}"), shares))

def test_evaluation_counts_every_image_exactly_once():
    params = seeded_params((8, 16, 1, 2, 32), 16, 40)
    images = np.stack([vit.to_array(COUNTING["read"](i)[0], 16) for i in range(37)])
    guesses = np.asarray(forward(params, vit.to_pixels(images))).argmax(1)
    labels = [(int(guesses[i]) + (i % 3 == 0)) % 40 for i in range(37)]  # a third is wrong
    read, options = COUNTING["read"], vit.Options(batch_size=3, accum_steps=1)
    for n in (37, 5):
        data = {"test": range(n), "read": lambda i: (read(i)[0], labels[i])}
        accuracy = vit.evaluate(vit.replicate(params), data, options)
        assert accuracy == np.mean([i % 3 != 0 for i in range(n)])

@pytest.mark.parametrize("name", ["cifar-10", "cifar-100"])
def test_cifar_is_verified_and_read_without_unpacking(name, tmp_path, monkeypatch):
    r, key, path = np.random.RandomState(0), name.replace("-", ""), tmp_path / "archive.tar.gz"
    images, labels = r.randint(0, 256, (60, 32, 32, 3)), r.randint(0, 10, 60)
    records = [b"\7"[: name == "cifar-100"] + bytes([label, *image.transpose(2, 0, 1).ravel()])
               for image, label in zip(images, labels, strict=True)]
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
    monkeypatch.setitem(vit.CIFAR, key, (
        path.as_uri(), hashlib.sha256(path.read_bytes()).hexdigest(), *vit.CIFAR[key][2:]))
    vit.cifar(key, vit.Options(data_dir=tmp_path))
    path.unlink()
    data = vit.cifar(key, vit.Options(data_dir=tmp_path))  # from the disk
    assert data["classes"] == [f"class_{i}" for i in range(10)]
    for split, places in (("train", range(49)), ("test", range(50, 60))):
        for (image, label), i in zip(map(data["read"], data[split]), places, strict=True):
            assert np.array_equal(image, images[i]) and label == labels[i]
    [file] = tmp_path.glob("downloads/*.gz")
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(vit.BadInput, match=f"{file}.*delete it"):
        vit.cifar(key, vit.Options(data_dir=tmp_path))

def test_a_failed_download_leaves_no_such_file_and_a_good_one_replaces_it(tmp_path):
    kept, options = tmp_path / "downloads", vit.Options(data_dir=tmp_path)
    served = {"/cut-x.npz": b"x" * 100_000, "/a/y.npz": b"<!DOCTYPE html> <p>Please log in."}
    class Server(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.send_header("Content-Length", len(served[self.path]))
            self.end_headers()
            self.wfile.write(served[self.path][: 50_000 if "cut-" in self.path else None])
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        for url, reason in ((f"{address}/cut-x.npz", "50000 out of 100000"),
                            (f"{address}/a/y.npz", "<!DOCTYPE html>"),
                            ("http://127.0.0.1:9/z.npz", "refused")):
            with pytest.raises(vit.BadInput, match=reason) as error:
                vit.fetch(url, options, vit.read_npz)
            assert url in str(error.value) and not list(kept.glob("*.npz"))
            assert len(list(kept.glob(f"*{url[-5:]}*.partial"))) <= 1
        np.savez(tmp_path / "y.npz", **seeded_weights())
        for name in ("/a/y.npz", "/b/y.npz"):  # addresses that end alike are different files
            served[name] = (tmp_path / "y.npz").read_bytes()
            path = vit.fetch(address + name, options, vit.read_npz)
            assert equal(vit.read_npz(path), seeded_weights())
        server.shutdown()
    assert len(list(kept.glob("*y.npz*"))) == len(list(kept.glob("*.npz"))) == 2

def test_tfds_datasets_are_read_as_array_record_without_tensorflow(tmp_path):
    pytest.importorskip("array_record")  # Linux only
    import tensorflow_datasets as tfds
    class TinyPhotos(tfds.testing.DummyMnist):
        def _split_generators(self, _):
            return {"train": self._generate_examples(20), "validation": self._generate_examples(5)}
        def _generate_examples(self, n):
            for i in range(n):
                Image.new("L", (28, 28), i).save(tmp_path / "x.png")
                yield i, {"image": tmp_path / "x.png", "label": i % 10}
    TinyPhotos(data_dir=tmp_path, file_format="array_record").download_and_prepare()
    data = vit.load_data("tiny_photos", vit.Options(data_dir=tmp_path))
    assert [*data["classes"]] == [*"0123456789"] and len(data["test"]) == 5
    for image, label in (data["read"](data["train"][i]) for i in range(20)):
        assert image.mode == "RGB" and label == np.asarray(image)[0, 0, 0] % 10
    assert "tensorflow" not in sys.modules
    with pytest.raises(vit.BadInput, match="cannot use mnist.*where TensorFlow is"):
        vit.load_data("mnist", vit.Options(data_dir=tmp_path))

# -------------------------------------------------------------------------------------- Training

def test_eight_devices_give_what_one_gives_and_a_step_is_its_parts_and_lowers_the_loss():
    start, r = seeded_params((8, 16, 2, 2, 32), 16), np.random.RandomState(0)
    batches = [(r.randint(0, 256, (32, 16, 16, 3), np.uint8), r.randint(0, 5, 32))
               for _ in range(5)]
    def losses_and_params(devices, accum_steps):  # after each step
        options = vit.Options(warmup_steps=0, base_lr=0.01, accum_steps=accum_steps)
        update = jax.pmap(vit.train_step.__wrapped__, "devices", devices=jax.devices()[:devices],
                          in_axes=(None, 0, 0, None), out_axes=None, static_broadcasted_argnums=3)
        state = {"params": start, "momentum": vit.sgd_init(start), "step": np.int32(0)}
        places = np.arange(32).reshape(devices, accum_steps, -1)
        for images, labels in batches:
            state, loss, _ = update(state, images[places], labels[places], options)
            for leaf in jax.tree.leaves(state):  # all devices have arrived at the same
                assert all(np.array_equal(leaf, shard.data) for shard in leaf.addressable_shards)
            state = jax.device_get(state)  # to compile for arrays on devices would take seconds
            yield float(loss), state["params"]
    one, eight = [*losses_and_params(1, 1)], [*losses_and_params(8, 2)]
    all_close(one, eight, 1e-5)
    (loss, new), batch = one[0], (batches[0][0] / np.float32(127.5) - 1, batches[0][1])
    expected, grads = loss_and_gradient(start, *batch)
    assert abs(loss - expected) < 1e-5 and loss_and_gradient(new, *batch)[0] < expected
    all_close(new, jax.tree.map(lambda p, g: p - 0.01 * g, start, clip(grads, 1.0)), 1e-6)

accuracy = re.compile("^test accuracy (.*) of", re.M).findall

def metrics(run):
    return [row.split(",") for row in (run / "metrics.csv").read_text().splitlines()]

def test_a_dataset_of_ones_own_is_learned_in_any_thread_and_signals_in_evaluations_lose_no_row(
        tmp_path, capsys, monkeypatch):
    data = vit.image_folder(picture_folder(tmp_path / "data"))
    examples = [*map(data["read"], data["train"])]
    signals, both = [], (signal.SIGTERM, signal.SIGINT)
    def read(i):
        if i == 100 and signals:
            os.kill(os.getpid(), signals.pop(0))
        return examples[i % 16]
    data = {"classes": ["cat", "dog"], "train": range(16), "test": range(100, 110), "read": read}
    command = ["own", *TINY, "--total_steps=30", "--base_lr=0.1", "--eval_every=15"]
    _, options = vit.parse_options([*command, f"--logdir={tmp_path / 'thread'}"])
    with ThreadPoolExecutor(1) as pool:
        params = pool.submit(vit.train, options, data).result()
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(params))
    assert vit.evaluate(vit.replicate(params), data, options) == 1
    monkeypatch.setattr(vit, "load_data", lambda *_: data)
    signals += [signal.SIGTERM, 0, signal.SIGINT]  # in step 15, none when it goes on, in the last
    before = [signal.getsignal(number) for number in both]
    for status in (*(128 + number for number in both), 0):
        assert vit.main([*command, "--log_every=9", f"--logdir={tmp_path}"]) == status
        assert ("same command" in capsys.readouterr().err) == (status > 0)
        assert [signal.getsignal(number) for number in both] == before  # handlers are put back
    assert [row[0] for row in metrics(tmp_path) if row[-1]] == ["step", "15", "30"]
    saved = json.loads(str(vit.read_npz(tmp_path / "checkpoint.npz")["train/run"]))["rows"]
    assert [row[0] for row in saved if row[-1] != ""] == [15, 30]

def test_a_run_leaves_what_people_look_at_and_its_folder_is_refused_to_others(tmp_path, capsys):
    root, run = picture_folder(tmp_path / "data"), tmp_path / "run"
    path, command = run / "checkpoint.npz", [
        str(root), *TINY, "--total_steps=30", "--base_lr=0.1", f"--logdir={run}"]
    def refused(words, *flags):
        assert vit.main([*command, *flags]) == 2
        error = capsys.readouterr().err
        assert words in error and str(run) in error and error.count("\n") == 1
    with vit.lock(run):
        refused("another run is at work")
    assert vit.main(command) == 0
    out = capsys.readouterr().out
    assert "step 30/30  loss" in out and "images/s" in out and accuracy(out) == ["100.00%"]
    head, *_, last = rows = metrics(run)
    assert head == ["step", "loss", "learning_rate", "images_per_second", "test_accuracy"]
    assert len(rows) == 32 and last == ["30", "", "", "", "1.0"]
    assert Image.open(run / "first_batch.png").size == (8 * 16, 16)
    arrays = vit.read_npz(path)
    assert arrays["class_names"].tolist() == ["cat", "dog"]
    assert vit.main([str(root), "--eval_only", f"--logdir={run}"]) == 0
    assert accuracy(capsys.readouterr().out) == ["100.00%"]
    assert vit.main(command) == 0 and equal(vit.read_npz(path), arrays)  # nothing was left to do
    refused("base_lr was 0.1, now it is 0.5", "--base_lr=0.5")
    (root / "train/cat/3.png").unlink()
    refused("training images was 16, now it is 15")

@pytest.mark.parametrize("trouble, step", [("nan", 2), ("test/cat/1.png", 4),
    ("train/dog/7.png", [*vit.epoch_order(0, 0, 16)].index(15) // 8)])
def test_an_infinite_loss_or_unreadable_image_ends_the_run_and_what_was_good_is_kept(
        tmp_path, capsys, monkeypatch, trouble, step):
    root, rate = picture_folder(tmp_path / "data"), vit.learning_rate
    if trouble == "nan":
        monkeypatch.setattr(vit, "learning_rate", lambda step, *a: jnp.where(
            jnp.asarray(step) < 3, rate(step, *a), jnp.inf))
    else:
        (root / trouble).write_text("no image")
    assert vit.main([str(root), *TINY, "--total_steps=9", "--batch_size=8", "--eval_every=4",
                     "--checkpoint_every=2", f"--logdir={tmp_path}"]) == 2
    error, saved = capsys.readouterr().err, vit.read_npz(tmp_path / "checkpoint.npz")
    assert trouble in error and error.count("\n") == 1 and saved["train/step"] == step
    assert all(np.isfinite(v).all() for v in saved.values() if v.dtype.kind == "f")

def python(*arguments, devices=1):  # a process of its own
    flags = f"--xla_force_host_platform_device_count={devices}"
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    return subprocess.Popen(
        [sys.executable, *map(str, arguments)], text=True, env=environment,
        cwd=Path(vit.__file__).parent, stdout=subprocess.PIPE, stderr=subprocess.PIPE)

def finish(process):
    try:
        out, error = process.communicate(timeout=120)
    finally:
        process.kill()
    return process.returncode, out, error

def without_speed(folder):
    arrays = vit.read_npz(folder / "checkpoint.npz")
    run = json.loads(str(arrays.pop("train/run")))
    return [[row[:3] + row[4:] for row in rows] for rows in (run["rows"], metrics(folder))], {
        name: array.tobytes() for name, array in arrays.items()}, run["fixed"]

def test_a_run_killed_stopped_or_no_longer_heard_ends_bit_for_bit_as_one_left_alone(tmp_path):
    command = [vit.__file__, picture_folder(tmp_path / "data"), *TINY, "--augment=inception",
               "--dropout=0.1", "--mixup_alpha=0.2", "--total_steps=40", "--checkpoint_every=2",
               "--eval_every=15", "--logdir"]
    whole, killed, seen = tmp_path / "whole", tmp_path / "killed", 0
    start = functools.partial(python, *command, devices=2)
    alone, path = start(whole), killed / "checkpoint.npz"
    for how in (signal.SIGKILL, "| head -2", signal.SIGINT):
        process = start(killed)
        if how == "| head -2":
            assert process.stdout.readline() and process.stdout.readline()
            process.stdout.close()
            assert process.stderr.read() == "" and process.wait() == 128 + signal.SIGPIPE
        else:
            while process.poll() is None and (
                    not path.exists() or path.stat().st_mtime_ns == seen):
                time.sleep(0.01)  # until it has gone beyond what was there
            time.sleep(np.random.default_rng(time.time_ns()).uniform(0, 0.2))
            process.send_signal(how)
            status, out, error = finish(process)
            stopped = "stopped; run the same command to go on\n"
            assert status in (0, -how, 128 + how) and error == stopped * (status > 0), error
        seen, step = path.stat().st_mtime_ns, vit.read_npz(path)["train/step"]  # whole at any time
        assert how == signal.SIGKILL or metrics(killed)[-1][0] == str(step)  # no step is lost
        assert len(list(killed.glob("*.partial"))) <= 1
    status, out, error = finish(start(killed))
    assert status == finish(alone)[0] == 0 and f"step {step} of 40" in out, error
    assert without_speed(killed) == without_speed(whole) and not list(killed.glob("*.partial"))

def free_address():
    with socket.create_server(("127.0.0.1", 0)) as free:
        return f"127.0.0.1:{free.getsockname()[1]}"

def two_hosts(*flags, differing=("--log_every=3",) * 2):  # vit.py, with one more flag for each
    for _ in range(2):  # once more where the machine was too busy for Gloo to connect in time
        both = [*flags, f"--coordinator_address={free_address()}", "--num_processes=2"]
        hosts = [python(vit.__file__, own, *both, f"--process_id={i}", devices=2)
                 for i, own in enumerate(differing)]
        results = [finish(host) for host in hosts]
        if not re.search("Gloo.*(timed out|timeout)", f"{results}"):
            break
    return results

def test_two_hosts_give_what_one_gives_and_end_together_where_one_cannot_read(tmp_path):
    root = picture_folder(tmp_path / "data", train=32)
    _, bad = vit.image_folder(root)["train"][vit.epoch_order(0, 0, 64)[-1]]  # the second host's
    Path(bad).write_text("no image")
    flags = [root, *TINY, "--total_steps=9", "--mixup_alpha=0.2", "--dropout=0.1", "--log_every=3",
             "--eval_every=3", "--checkpoint_every=3"]
    (first, two, _), (second, silent, error) = two_hosts(*flags, f"--logdir={tmp_path / 'two'}")
    assert str(bad) in error.splitlines()[0] and "Traceback" not in error and first == second == 2
    status, one, error = finish(
        python(vit.__file__, *flags, f"--logdir={tmp_path / 'one'}", devices=4))
    assert status == 2 and str(bad) in error
    assert accuracy(two) == accuracy(one) != [] and "accuracy" not in silent
    a, b = (vit.read_npz(tmp_path / name / "checkpoint.npz") for name in ("one", "two"))
    assert a["train/step"] == b["train/step"] == 3
    all_close(vit.read_params(a, "one"), vit.read_params(b, "two"), 1e-6)

def test_hosts_that_differ_fail_or_never_come_let_none_wait_for_ever(tmp_path):
    options = f"coordinator_address='{free_address()}', num_processes=2"
    waiting = python("-c", f"import vit; vit.join_hosts(vit.Options({options}), patience=3)")
    good, bad = picture_folder(tmp_path / "good"), tmp_path / "bad"
    for differing, word in (("--seed=0", "--seed=1"), "seed"), ((good, bad), str(bad)):
        common = [] if good in differing else [good]
        results = two_hosts(*common, *TINY, f"--logdir={tmp_path}", differing=differing)
        assert [status for status, _, _ in results] == [2, 2]
        assert word in results[1][2].splitlines()[0] and "Traceback" not in f"{results}"
    status, out, error = finish(waiting)
    assert status == 2 and "to 127.0.0.1:" in out and "Traceback" not in error

def test_photos_are_classified_and_their_attention_is_drawn(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    vit.save_checkpoint("x.npz", seeded_params(SMALL, 32, 7), class_names=[*"abcdefg"])
    for photo in ("a.jpg", "b.png"):
        Image.effect_mandelbrot((90, 60), (-2, -1, 1, 1), 50).convert("RGB").save(photo)
    assert vit.main(["a.jpg", "b.png", "--pretrained=x.npz"]) == 0
    shares = re.findall(r"(\S+)%  [a-g]", capsys.readouterr().out)
    assert len(shares) == 10 and shares[:5] == sorted(shares[:5], key=float, reverse=True)
    assert all(Image.open(f"{x}-attention.png").size == (180, 60) for x in ("a.jpg", "b.png"))

BIAS = "Transformer/encoderblock_1/LayerNorm_2/bias"
QUERY = "Transformer/encoderblock_0/MultiHeadDotProductAttention_1/query/kernel"
BAD_ARRAYS = {  # of checkpoints, otherwise good: what is wrong, what the error says
    "pickled": ({"cls": np.array([{}], object)}, "allow_pickle"),
    "registers": ({"registers": np.ones(1, np.float32)}, "registers"),
    "half": ({"pre_logits/kernel": np.eye(32, dtype=np.float32)}, "pre_logits"),
    "misshapen": ({BIAS: np.zeros(7, np.float32)}, "(7,)"),
    "nan": ({BIAS: np.full(32, np.nan)}, "NaN"), "ints": ({BIAS: np.zeros(32, int)}, "'i'"),
    "huge": ({BIAS: np.full(32, 1e300)}, "infinity"),
    "heads": ({QUERY: np.zeros((32, 100, 1), np.float32)}, "heads.npz"),
    "names": ({"class_names": np.array(["cat"])}, "class_names")}
FLAGS = (  # after digits --
    ("modle=ViT-B_16", "--modle"), ("model=ViT-Q_16", "ViT-Q_16"), ("model=B_16", "make a B_16"),
    ("model=ViT-XS_0", "ViT-XS_0"), ("decay_type=step", "step"), ("total_steps=many", "many"),
    ("batch_size=0", "--batch_size=0"), ("batch_size=9", "--batch_size=9"),
    ("base_lr=-1", "--base_lr=-1.0"), ("base_lr=nan", "--base_lr=nan"), ("image_size=30", "no mul"),
    ("dropout=1.5", "--dropout=1.5"), ("warmup_steps=2000", "2000"), ("mixup_alpha=inf", "alpha"),
    ("seed=18446744073709551616", "--seed"), ("total_steps=4294967296", "--total_steps"),
    ("image_size=80000", "--image_size=80000"), ("eval_only", "runs/digits/checkpoint.npz"),
    ("pretrained=released --model=ViT-S_14 --image_size=28", "ViT-S_14"),
    ("eval_only --pretrained=good.npz", "good.npz"), ("num_processes=2", "--coordinator_address"),
    ("coordinator_address=foo", "--coordinator_address='foo'"),
    ("coordinator_address=127.0.0.1:abc", "127.0.0.1:abc"))
CHECKPOINTS = (  # after good --pretrained=
    *((f"{name}.npz", message) for name, (_, message) in BAD_ARRAYS.items()),
    ("", "read the checkpoint ''"), ("absent.npz", "absent.npz"), ("empty.npz", "empty.npz"),
    ("text.npz", "text.npz"), ("cut.npz", "cut.npz"), ("nothing.npz", "find a ViT in nothing.npz"),
    ("gap.npz", "encoderblock_1"), ("missing.npz", "1/LayerNorm_2/bias', 'f', (32,)"),
    ("twice.npz", "two arrays of one name"), ("good.npz --model=ViT-B_16", "ViT-B_16"),
    ("good.npz --image_size=30", "no multiple"), ("others.npz --eval_only", "knows other classes"),
    ("http://127.0.0.1:9/v.npz --data_dir=cache", "v.npz by hand"))

@pytest.fixture(scope="module")
def bad(tmp_path_factory):
    root, flat = tmp_path_factory.mktemp("bad"), seeded_weights(classes=2)
    others = {"class_names": np.array(["cat", "wolf"])}
    for name, (arrays, _) in (BAD_ARRAYS | {"good": ({}, ""), "others": (others, "")}).items():
        np.savez(root / f"{name}.npz", **flat | arrays)
    np.savez(root / "nothing.npz", x=np.zeros(3))
    np.savez(root / "missing.npz", **{k: v for k, v in flat.items() if k != BIAS})
    np.savez(root / "gap.npz", **{k.replace("k_1/", "k_2/"): v for k, v in flat.items()})
    good = (root / "good.npz").read_bytes()
    for name, data in (("empty", b""), ("text", b"hello"), ("cut", good[:-9000]), ("twice", good)):
        (root / f"{name}.npz").write_bytes(data)
    with zipfile.ZipFile(root / "twice.npz", "a") as file, pytest.warns(UserWarning):
        file.writestr("cls.npy", file.read("cls.npy"))
    for name in ("good", "one", "unknown", "cut_image"):
        picture_folder(root / name, classes=("cat", "dog")[: 1 if name == "one" else 2])
    np.savez(root / "checkpoint.npz", **flat | {"train/step": np.int32(3)})
    (root / "unknown/test/dog").rename(root / "unknown/test/wolf")
    picture_folder(root / "no_images", train=0, test=0)
    image = root / "cut_image/train/dog/3.png"
    image.write_bytes(image.read_bytes()[:300])
    Image.new("1", (20_000, 20_000)).save(root / "bomb.png")
    Image.new("F", (20, 20)).save(root / "x.tiff")
    return root

@pytest.mark.parametrize("command, message", [
    *((f"digits --{flags}", message) for flags, message in FLAGS),
    *((f"good --pretrained={file}", message) for file, message in CHECKPOINTS),
    *((f"{image} --pretrained=good.npz", image) for image in ("text.npz", "bomb.png", "x.tiff")),
    ("cifra10", "cifar10"), ("CIFAR10", "no file, no folder"), ("no_images", "must hold"),
    ("nothere.jpg", "no file, no folder"), ("imagenette/320px-v9", "imagenette/320px-v9"),
    ("no/such/folder", "no/such/folder"), ("good --logdir=.", "checkpoint.npz"),
    ("one", "'cat'"), ("unknown", "'wolf'"), ("cut_image --logdir=cut", "dog/3.png"),
    ("text.npz digits", "text.npz digits")])
def test_bad_input_is_one_line_and_status_2(command, message, bad, capsys, monkeypatch):
    monkeypatch.chdir(bad)
    assert vit.main([*command.split(), *(TINY if "--logdir" in command else ())]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and len(error) < 600, error

def test_help_explains_every_flag_with_its_default(capsys):
    with pytest.raises(SystemExit, match="0"):
        vit.main(["--help"])
    out = " ".join(capsys.readouterr().out.split())
    for field in dataclasses.fields(vit.Options):
        assert re.search(rf"--{field.name} .*\S \({re.escape(str(field.default))}\)", out)

def test_the_head_of_the_file_asks_for_what_requirements_txt_asks_for():
    source = Path(vit.__file__)
    block = source.read_text().split("# ///")[1].split("dependencies")[1]
    lines = source.with_name("requirements.txt").read_text().splitlines()
    assert re.findall('"(.*?)"', block) == [line.split("#")[0].strip() for line in lines]
