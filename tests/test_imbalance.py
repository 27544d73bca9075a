"""extras/imbalance.py against NumPy and by hand, and whole runs of it."""

import functools
import itertools
import json
import math
import re
from types import SimpleNamespace
from unittest.mock import Mock, call

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.linear_model import LogisticRegression

import imbalance
import pmsn


# ---- Data ----------------------------------------------------------------------------------------
def test_synthetic_classes_do_not_tell_the_low_level():
    images, classes = imbalance.synthetic_images(2000, 0), torch.arange(2000) % 10
    assert images.shape == (2000, 3, 32, 32) and images.dtype == torch.uint8
    for task, values in imbalance.low_level(images).items():
        between = torch.stack([values[classes == c].mean() for c in range(10)]).std()
        assert between < 0.2 * values.std(), task
    # The center of a ring (classes 5 to 9) looks like the background in the corner.
    gray = images.float().mean(dim=1)
    contrast = (gray[:, 16, 16] - gray[:, 0, 0]).abs()
    assert contrast[classes >= 5].mean() < 0.5 * contrast[classes < 5].mean()


def test_low_level_measures_of_known_images():
    x = torch.arange(32.0)
    stripes = torch.sin(x).expand(32, 32)  # vertical
    tilted = torch.sin(0.5 * (x * math.cos(0.4) + x[:, None] * math.sin(0.4)))
    images = torch.stack([stripes, stripes.T, tilted, tilted.flip(1), tilted])
    images = (128 + 100 * images)[:, None].repeat(1, 3, 1, 1).to(torch.uint8)
    images[4] = torch.tensor([255, 0, 0]).view(3, 1, 1)  # red
    found = imbalance.low_level(images)
    assert found["luminance"][[0, 4]].tolist() == pytest.approx([0.5, 1 / 3], abs=0.02)
    assert found["color"].tolist() == pytest.approx([0, 0, 0, 0, 1], abs=1e-6)
    assert found["orientation"][:4].tolist() == pytest.approx([0, math.pi / 2, 0.4, 0.4], abs=0.05)


def test_folders_give_equally_many_images_per_class_and_bins_of_training(tmp_path):
    for folder, count in (("train/a", 10), ("train/b", 15), ("test/a", 5), ("test/b", 5)):
        (tmp_path / folder).mkdir(parents=True)
        for i in range(count):
            color = (10 * i, 90 * ("test" in folder), 200 * ("b" in folder))
            Image.new("RGB", (40, 30), color).save(tmp_path / folder / f"{i}.png")
    images, labels, test_images, test_labels = imbalance.load_data(str(tmp_path), "", 60)
    assert images.shape == (20, 3, 32, 32) and len(images.flatten(1).unique(dim=0)) == 20
    assert (images[:, 1] == 0).all() and (test_images[:, 1] > 0).all()
    assert (images[:, 2, 0, 0] > 0).tolist() == labels["class"].tolist() == [0, 1] * 10
    values, test_values = (imbalance.low_level(x)["color"].numpy() for x in (images, test_images))
    edges = np.quantile(values, (0.2, 0.4, 0.6, 0.8))
    assert test_labels["color"].tolist() == np.searchsorted(edges, test_values).tolist()


# ---- Encoders and methods ------------------------------------------------------------------------
def test_without_batch_norm_an_image_does_not_depend_on_its_batch():
    method, images = imbalance.METHODS["SimCLR-GroupNorm"][0](), torch.randn(6, 3, 32, 32)
    assert not any("BatchNorm" in type(module).__name__ for module in method.modules())
    with torch.no_grad():
        alone, together = [method.head(method.encoder(x)) for x in (images[:1], images)]
    torch.testing.assert_close(alone, together[:1], rtol=1e-4, atol=1e-5)


def standardize(x, ddof=0):
    return (x - x.mean(-1, keepdims=True)) / x.std(-1, ddof=ddof, keepdims=True)


def test_mae_loss_is_a_numpy_formula():
    predictions, images = torch.randn(2, 64, 48), torch.randn(2, 3, 32, 32)
    hidden = torch.rand(2, 64) < 0.5
    patches = images.numpy().reshape(2, 3, 8, 4, 8, 4).transpose(0, 2, 4, 1, 3, 5)
    target = standardize(patches.reshape(2, 64, 48), ddof=1)
    errors = ((predictions.numpy() - target) ** 2)[hidden.numpy()]
    loss = imbalance.mae_loss(predictions, images, hidden, 4)
    assert loss.item() == pytest.approx(errors.mean(), rel=1e-4)


def test_data2vec_loss_is_a_numpy_formula():
    predictions, *outputs = torch.randn(4, 2, 4, 6)
    hidden = torch.tensor([[True, False, True, False], [False, False, True, True]])
    target = standardize(standardize(torch.stack(outputs).numpy()).mean(0))
    errors = ((predictions.numpy() - target) ** 2)[hidden.numpy()]
    loss = imbalance.data2vec_loss(predictions, outputs, hidden)
    assert loss.item() == pytest.approx(errors.mean(), rel=1e-3)


def test_run_blocks_is_the_encoder():
    encoder, images, seen = imbalance.make_vit(8), torch.randn(2, 3, 32, 32), []
    for module in (*encoder.blocks, encoder.norm):
        module.register_forward_hook(lambda module, inputs, output: seen.append(output))
    encoder(images)
    found = imbalance.run_blocks(encoder, encoder.embed_patches(images))
    torch.testing.assert_close(found, seen[:4])


@pytest.mark.parametrize("name", imbalance.METHODS)
def test_every_method_trains_its_encoder_and_no_target(name):
    method = imbalance.METHODS[name][0]()
    loss, _ = method(list(torch.randn(2, 20, 3, 32, 32)), **imbalance.METHODS[name][2])
    loss.backward()
    for parameter_name, parameter in method.named_parameters():
        if "target" in parameter_name:
            assert parameter.grad is None and not parameter.requires_grad
        else:
            assert parameter.grad.abs().sum() > 0, parameter_name
    assert hasattr(method, "update_target") == (name in ("MSN", "PMSN", "MSN-5", "data2vec"))
    if name == "data2vec":
        method.encoder.norm.bias.data += 1
        method.update_target(ema_momentum=0.9)
        torch.testing.assert_close(method.target_encoder.norm.bias, torch.full((96,), 0.1))


@pytest.mark.parametrize("name, side, count", [("MAE", 8, 48), ("data2vec", 4, 10)])
def test_predictions_come_from_visible_patches_alone(name, side, count, monkeypatch):
    method, images, seen = imbalance.METHODS[name][0](), torch.rand(6, 3, 32, 32), []
    monkeypatch.setattr(imbalance, f"{name.lower()}_loss", lambda *x: seen.append(x))

    def predict(repainted):  # with other colors where `repainted` (6, side^2) is true
        mask = repainted.view(6, 1, side, side)
        mask = mask.repeat_interleave(32 // side, 2).repeat_interleave(32 // side, 3)
        torch.manual_seed(1)  # hides the same patches every time
        method([torch.where(mask, 1 - images, images)])
        return seen[-1][0]
    predictions, hidden = predict(torch.zeros(6, side**2, dtype=torch.bool)), seen[-1][2]
    assert (hidden.sum(dim=1) == count).all() and not torch.equal(hidden[0], hidden[1])
    torch.testing.assert_close(predict(hidden), predictions)
    assert ((predict(~hidden) - predictions).abs().amax(dim=2)[hidden] > 1e-4).all()


# ---- Training and measuring ----------------------------------------------------------------------
def test_training_has_the_classes_and_the_schedule_that_it_should(monkeypatch, capsys):
    recorder, steps = torch.nn.Module(), []
    recorder.encoder, recorder.update_target = torch.nn.Linear(1, 1), Mock()
    def forward(views):
        seen = (255 * views[0]).round().unique().tolist()
        steps.append((seen, recorder.encoder.weight.item()))
        return recorder.encoder.weight.sum(), {}
    recorder.forward = forward

    def make():
        weight.append(torch.randn(1))
        return recorder
    weight = []
    monkeypatch.setitem(imbalance.METHODS, "SimCLR", (make, 0.01, {}, "random ResNet"))
    monkeypatch.setattr(pmsn, "make_views", lambda crops, blur_p: crops)
    classes = torch.arange(200) % 10
    images = classes.to(torch.uint8)[:, None, None, None].expand(-1, 3, 8, 8)
    args = SimpleNamespace(epochs=4, lr=0.1, accumulate=1)
    sampler = pmsn.ClassBatchSampler(classes, 20, 2)
    torch.manual_seed(1)  # The seed of the run counts, and not this one.
    assert imbalance.train("SimCLR", images, sampler, 3, args) is recorder.encoder
    assert weight == [torch.randn(1, generator=torch.Generator().manual_seed(3))]
    batches, weights = zip(*steps)
    assert [len(classes) for classes in batches] == [2] * 40
    assert recorder.update_target.mock_calls == [call(ema_momentum=0.99)] * 40
    assert batches[:10] != batches[10:20]  # another order in every epoch
    # AdamW moves a weight whose gradient keeps its sign by the rate: up to .1, then down to 0.
    moves = -np.diff(weights)[[0, 3, 20, 38]]
    assert moves.tolist() == pytest.approx([0.025, 0.1, 0.05, 0], rel=0.2, abs=0.001)
    assert re.findall(r"\d/\d", capsys.readouterr().out) == ["1/4", "2/4", "3/4", "4/4"]


def test_accumulated_steps_have_the_same_images_for_any_number_of_classes():
    """Ten mini-batches of 20 per step, with 1, 2 or 10 classes: counted by hand."""
    classes, steps = torch.randperm(600) % 10, {}
    for count in (1, 2, 10):
        args = SimpleNamespace(batch_size=20, accumulate=10)
        sampler = imbalance.make_sampler(classes, count, 4, args)
        batches = []
        for epoch in (1, 2):
            sampler.set_epoch(epoch)
            batches += list(sampler)
        assert len(sampler) == 30 and len(batches) == 60
        for batch in batches:
            of_each = classes[batch].bincount(minlength=10)
            assert of_each[of_each > 0].tolist() == [20 // count] * count
        steps[count] = [sorted(sum(batches[i:i + 10], [])) for i in range(0, 60, 10)]
        assert all(classes[step].bincount().tolist() == [20] * 10 for step in steps[count])
        assert len(set(sum(steps[count][:3], []))) == 600  # an epoch has every image once
    assert steps[1] == steps[2] == steps[10] and steps[1][0] != steps[1][3]


@pytest.mark.parametrize("batch_size, count, accumulate, message", [
    (20, 3, 10, "3 classes per mini-batch do not divide 10 classes"),
    (20, 1, 4, "multiple of 10, and"), (15, 1, 10, "--batch_size that is a multiple of 10$")])
def test_steps_that_cannot_be_divided(batch_size, count, accumulate, message, tmp_path, capsys):
    with pytest.raises(SystemExit):
        imbalance.main(["--batch_size", str(batch_size), "--classes_per_batch", str(count),
                        "--accumulate", str(accumulate), "--images", "600",
                        "--out", str(tmp_path)])
    assert re.search(message, capsys.readouterr().err.strip())


def test_batch_norm_is_measured_with_balanced_classes():
    """Class 1 is brighter. Statistics of one class in training must not matter in the test.

    All test images have class 0. With their own statistics they would look like both classes.
    """
    classes = torch.arange(200) % 2
    images = torch.randint(90, (200, 3, 32, 32)) + 120 * classes[:, None, None, None]
    images = images.to(torch.uint8)
    encoder, labels, found = imbalance.make_resnet(), {"class": classes}, []
    test_images, test_labels = images[::2], {"class": classes[::2]}
    for seen in (0, 1):
        for _ in range(25):
            encoder.train()(imbalance.normalize_images(images[classes == seen]))
        found.append(imbalance.measure(encoder, images, labels, test_images, test_labels))
        statistics = encoder[1].running_mean
        expected = encoder[0](imbalance.normalize_images(images)).mean(dim=(0, 2, 3))
        torch.testing.assert_close(statistics, expected, rtol=1e-3, atol=1e-4)
    assert found[0] == found[1] == {"knn": 1.0, "class": 1.0}


def make_runs(accuracies):
    """Runs from {method: (class with ten, and with two classes for each seed)}."""
    return [{"seed": seed, "method": name, "classes_per_batch": count,
             "results": {"class": value, "color": 0.5 + seed * (count == 2)}}
            for name, seeds in accuracies.items() for seed, pair in enumerate(seeds)
            for count, value in zip((10, 2), pair)]


def test_drops_by_hand():
    """Two seeds. SimCLR loses .3 and .1 of the class, MAE 0 and .1. MSN has learned nothing."""
    runs = make_runs({"random ResNet": [(0.2, 0.2)] * 2, "random ViT/4": [(0.15, 0.15)] * 2,
                      "SimCLR": [(0.8, 0.5), (0.6, 0.5)], "MSN": [(0.24, 0.0), (0.24, 0.0)],
                      "MAE": [(0.5, 0.5), (0.5, 0.4)]})
    learned = imbalance.add_drops(runs, 10)
    assert learned == {"SimCLR", "MAE"}
    of_groups = imbalance.group_drops(runs, learned)

    def drops(runs, name, task):
        return [run["results"][f"drop_{task}"] for run in runs
                if (run["method"], run["classes_per_batch"]) == (name, 2)]

    assert drops(runs, "SimCLR", "class") == pytest.approx([0.3, 0.1])
    assert drops(runs, "SimCLR", "color") == [0, -1]
    assert all("drop_class" not in run["results"] for run in runs if run["classes_per_batch"] == 10)
    # Over both seeds SimCLR gained .5, and MAE .35.
    assert drops(runs, "SimCLR", "share") == pytest.approx([0.3 / 0.5, 0.1 / 0.5])
    assert drops(runs, "MAE", "share") == pytest.approx([0, 0.1 / 0.35])
    assert drops(of_groups, "with a volume term", "class") == pytest.approx([0.3, 0.1])
    assert drops(of_groups, "difference", "class") == pytest.approx([0.3, 0.0])
    assert drops(of_groups, "difference", "share") == pytest.approx([0.6, 0.2 - 0.1 / 0.35])
    assert {run["classes_per_batch"] for run in of_groups} == {2}
    # .51 is not .05 above a random ViT with .48, and nothing can be compared.
    runs = make_runs({"random ResNet": [(0.1, 0.1)], "random ViT/4": [(0.48, 0.48)],
                      "SimCLR": [(0.5, 0.4)], "MAE": [(0.51, 0.5)]})
    of_groups = imbalance.group_drops(runs, imbalance.add_drops(runs, 10))
    assert {run["method"] for run in of_groups} == {"with a volume term"}


# ---- Whole runs ----------------------------------------------------------------------------------
def test_quick_run_writes_everything(tmp_path, jobs_here, monkeypatch):
    """With a large penalty, the linear probe takes fewer steps."""
    monkeypatch.setattr(imbalance, "linear_probe",
                        functools.partial(imbalance.linear_probe, penalty=1000.0))
    imbalance.main(["--quick", "--workers", "1", "--out", str(tmp_path)])
    assert {path.name for path in tmp_path.iterdir()} == {"lock", "results.json", "imbalance.png"}
    content = json.loads((tmp_path / "results.json").read_text())
    runs = content["runs"]
    assert [(run["method"], run["classes_per_batch"]) for run in runs if run["seed"] == 0] == [
        *itertools.product(("SimCLR", "MAE"), (10, 1)),
        *[(name, 10) for name in imbalance.UNTRAINED]]
    assert content["config"]["rates"]["SimCLR"] == 4e-3 and len(content["config"]["rates"]) == 9
    assert all(0 < value < 1 for run in runs for value in run["results"].values())
    results = [run["results"] for run in runs]
    assert results[0] != results[1] and results[2] != results[3]  # ten classes and one class
    # The numbers of raw pixels, by NumPy and scikit-learn
    images, test_images = (imbalance.synthetic_images(100, seed) for seed in (0, 1))
    x, test_x = (images_to_pixels(x.numpy() / 255) for x in (images, test_images))
    cosines = unit(test_x) @ unit(x).T
    nearest = np.argsort(-cosines)[:, :20]
    votes = np.zeros((100, 10))
    for i in range(100):
        np.add.at(votes[i], nearest[i] % 10, np.exp(cosines[i, nearest[i]] / 0.07))
    assert results[-1]["knn"] == pytest.approx(
        np.mean(votes.argmax(axis=1) == np.arange(100) % 10), abs=0.004)
    x, test_x = (x - x.mean(axis=0)) / x.std(axis=0), (test_x - x.mean(axis=0)) / x.std(axis=0)
    values, test_values = (imbalance.low_level(x)["luminance"].numpy()
                           for x in (images, test_images))
    edges = np.quantile(values, (0.2, 0.4, 0.6, 0.8))
    for task, labels, test_labels in (
            ("class", np.arange(100) % 10, np.arange(100) % 10),
            ("luminance", np.searchsorted(edges, values), np.searchsorted(edges, test_values))):
        oracle = LogisticRegression(C=1e-3, max_iter=1000).fit(x, labels)
        assert results[-1][task] == pytest.approx(oracle.score(test_x, test_labels), abs=0.011)


def images_to_pixels(images):
    """Means over 4 x 4 pixels, normalized like all images: (N, 3, 32, 32) -> (N, 192)."""
    mean, std = (np.array(x).reshape(1, 3, 1, 1) for x in (pmsn.IMAGENET_MEAN, pmsn.IMAGENET_STD))
    images = (images - mean) / std
    return images.reshape(-1, 3, 8, 4, 8, 4).mean(axis=(3, 5)).reshape(len(images), -1)


def unit(x):
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def test_a_loss_that_is_not_finite_is_one_clear_line(tmp_path, jobs_here, monkeypatch, capsys):
    def make():
        method = torch.nn.Module()
        method.encoder = torch.nn.Linear(1, 1)
        method.forward = lambda views: (method.encoder.weight.sum() * math.inf, {})
        return method
    monkeypatch.setitem(imbalance.METHODS, "SimCLR", (make, 0.01, {}, "random ResNet"))
    with pytest.raises(SystemExit, match="^2$"):
        imbalance.main(["--quick", "--out", str(tmp_path)])
    _, line = capsys.readouterr().err.split("error: ", 1)
    assert line == "the loss of SimCLR is not finite in epoch 1: try a lower --lr\n"
    assert [path.name for path in tmp_path.iterdir()] == ["lock"]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_training_equals_a_plain_loop(accumulate, monkeypatch):
    """SimCLR without BatchNorm, so that no weight has a gradient that is only rounding.

    The loss is multiplied by 1000, so that all gradients are clipped. Adam hardly depends on their
    scale, so we compare their norms, too.
    """
    norms, clip = [], torch.nn.utils.clip_grad_norm_
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_",
                        lambda *args: norms.append(clip(*args).item()))
    def loss_of(first, second):
        loss, terms = pmsn.simclr_loss(first, second, temperature=0.2)
        return 1000 * loss, terms

    def make():
        return imbalance.TwoViews(loss_of, norms=(imbalance.group_norm, imbalance.group_norm))
    monkeypatch.setitem(imbalance.METHODS, "SimCLR", (make, 0.01, {}, "random ResNet"))
    images = torch.randint(256, (40 * accumulate, 3, 32, 32), dtype=torch.uint8)
    classes = torch.arange(len(images)) % 4
    args = SimpleNamespace(epochs=2, lr=0.02, accumulate=accumulate)
    sampler = pmsn.ClassBatchSampler(classes, 20, 2, seed=4)
    encoder = imbalance.train("SimCLR", images, sampler, 3, args)
    torch.manual_seed(3)
    twin = make().to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(twin.parameters(), weight_decay=0.05)
    for step in range(4):
        if step % 2 == 0:
            sampler.set_epoch(step // 2 + 1)
            batches = iter(list(sampler))
        optimizer.param_groups[0]["lr"] = 0.02 * (1 + math.cos(math.pi * step / 4)) / 2
        optimizer.zero_grad()
        losses = []
        for _ in range(accumulate):
            batch = images[next(batches)]
            crops = [imbalance.random_crops(batch)[:, None] for _ in range(2)]
            # In this order and memory format rounding is the same. Adam enlarges its differences.
            views = torch.cat(pmsn.make_views(crops, blur_p=0.0))
            first, second = twin.head(twin.encoder(views)).chunk(2)
            losses.append(loss_of(first, second)[0])
        torch.stack(losses).mean().backward()
        torch.nn.utils.clip_grad_norm_(twin.parameters(), 3.0)
        optimizer.step()
    assert len(norms) == 8 and norms[:4] == pytest.approx(norms[4:], rel=1e-4)
    for name, value in twin.encoder.state_dict().items():
        torch.testing.assert_close(encoder.state_dict()[name], value, rtol=1e-4, atol=1e-5,
                                   msg=name)


@pytest.mark.parametrize("name, any_order", [("MSN", False), ("PMSN", True)])
def test_msn_is_tested_with_its_target_and_pmsn_has_any_order(name, any_order, monkeypatch):
    seen = []

    def loss(self, views, **options):
        seen.append((self, options))
        return self.prototypes.sum(), {}
    monkeypatch.setattr(pmsn.PMSN, "forward", loss)
    images = torch.zeros(20, 3, 32, 32, dtype=torch.uint8)
    args = SimpleNamespace(epochs=1, lr=0.1, accumulate=1)
    sampler = pmsn.ClassBatchSampler(torch.arange(20) % 2, 10, 2)
    encoder = imbalance.train(name, images, sampler, 0, args)
    model, options = seen[-1]
    assert encoder is model.target_encoder and options.get("any_order", False) == any_order
