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
    train, test = imbalance.load_data(str(tmp_path), "", 60, False, None)
    images, test_images = (255 * denormalize(x.all_views()) for x in (train, test))
    assert images.shape == (20, 3, 32, 32) and len(images.flatten(1).unique(dim=0)) == 20
    assert (images[:, 1] < 1).all() and (test_images[:, 1] > 80).all()
    classes = (images[:, 2, 0, 0] > 100).int().tolist()
    assert classes == train.labels["class"].tolist() == [0, 1] * 10
    values, test_values = (imbalance.low_level(x)["color"].numpy() for x in (images, test_images))
    edges = np.quantile(values, (0.2, 0.4, 0.6, 0.8))
    assert test.labels["color"].tolist() == np.searchsorted(edges, test_values).tolist()
    assert not torch.equal(*(train.views(torch.tensor([3])) for _ in range(2)))
    # For validation, the last fifth of the training images of each class is tested.
    train, validation = imbalance.load_data(str(tmp_path), "", 60, True, None)
    torch.testing.assert_close(
        255 * denormalize(torch.cat([train.all_views(), validation.all_views()])), images)
    assert validation.labels["class"].tolist() == [0, 1, 0, 1]


def denormalize(images):
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (pmsn.IMAGENET_MEAN, pmsn.IMAGENET_STD))
    return images * std + mean


def test_glyph_images_have_equally_many_of_each_class_and_show_it_in_all_views(monkeypatch):
    train, test = imbalance.load_data("glyphs", "", 2100, False, 64)
    assert train.labels["class"].tolist() == [*range(64)] * 32
    for name, kinds in (("font", 9), ("second", 16)):
        counts = train.labels[name].bincount().tolist()
        assert len(counts) == kinds and min(counts) > 0.6 * 2048 / kinds, name
    assert not torch.equal(train.labels["font"], test.labels["font"])
    data, index = train.views.__self__, torch.arange(5, 500)
    monkeypatch.setattr(data, "render", lambda *shown: shown)
    assert [x.tolist() for x in train.views(index)] == [
        (64 * train.labels["font"] + train.labels["class"])[index].tolist(),
        train.labels["second"][index].tolist()]
    other = imbalance.load_data("glyphs", "", 2100, True, 64)[1]
    assert not torch.equal(other.labels["second"], test.labels["second"])


# ---- Encoders and methods ------------------------------------------------------------------------
def test_without_batch_norm_an_image_does_not_depend_on_its_batch():
    method, images = imbalance.METHODS["SimCLR-GroupNorm"][0]("CIFAR10"), torch.randn(6, 3, 32, 32)
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


def test_run_blocks_is_the_encoder():
    encoder, images = imbalance.make_vit(), torch.randn(2, 3, 32, 32)
    found = imbalance.run_blocks(encoder, encoder.embed_patches(images))
    assert found.shape == (2, 65, 96)
    torch.testing.assert_close(found[:, 0], encoder(images))


@pytest.mark.parametrize("name, data", [
    *itertools.product(imbalance.METHODS, ("glyphs", "CIFAR10"))])
def test_every_method_trains_its_encoder_and_no_target(name, data):
    method = imbalance.METHODS[name][0](data)
    channels = 1 if data == "glyphs" else 3
    loss, _ = method(list(torch.randn(2, 20, channels, 32, 32)), **imbalance.METHODS[name][2])
    loss.backward()
    for parameter_name, parameter in method.named_parameters():
        if "target" in parameter_name:
            assert parameter.grad is None and not parameter.requires_grad
        else:
            assert parameter.grad.abs().sum() > 0, parameter_name
    assert hasattr(method, "update_target") == (name in ("MSN", "PMSN", "MSN-5"))


def test_predictions_come_from_visible_patches_alone(monkeypatch):
    method, images, seen = imbalance.MAE(), torch.rand(6, 3, 32, 32), []
    monkeypatch.setattr(imbalance, "mae_loss", lambda *x: seen.append(x))

    def predict(repainted):  # with other colors where `repainted` (6, 64) is true
        mask = repainted.view(6, 1, 8, 8).repeat_interleave(4, 2).repeat_interleave(4, 3)
        torch.manual_seed(1)  # hides the same patches every time
        method([torch.where(mask, 1 - images, images)])
        return seen[-1][0]
    predictions, hidden = predict(torch.zeros(6, 64, dtype=torch.bool)), seen[-1][2]
    assert (hidden.sum(dim=1) == 48).all() and not torch.equal(hidden[0], hidden[1])
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

    def make(data):
        weight.append(torch.randn(1))
        return recorder
    weight = []
    monkeypatch.setitem(imbalance.METHODS, "SimCLR", (make, None, {}, None))
    classes = torch.arange(200) % 10
    images = SimpleNamespace(views=lambda index: classes[index] / 255)
    args = SimpleNamespace(epochs=4, accumulate=1, data="any")
    sampler = pmsn.ClassBatchSampler(classes, 20, 2)
    torch.manual_seed(1)  # The seed of the run counts, and not this one.
    assert imbalance.train("SimCLR", images, sampler, 3, 0.1, "", args) is recorder.encoder
    assert weight == [torch.randn(1, generator=torch.Generator().manual_seed(3))]
    batches, weights = zip(*steps)
    assert [len(classes) for classes in batches] == [2] * 40
    assert recorder.update_target.mock_calls == [call(ema_momentum=0.99)] * 40
    assert batches[:10] != batches[10:20]  # another order in every epoch
    # AdamW moves a weight whose gradient keeps its sign by the rate: up to .1, then down to 0.
    moves = -np.diff(weights)[[0, 3, 20, 38]]
    assert moves.tolist() == pytest.approx([0.025, 0.1, 0.05, 0], rel=0.2, abs=0.001)
    assert re.findall(r"\d/\d", capsys.readouterr().out) == ["1/4", "2/4", "3/4", "4/4"]


def steps_of(classes, *options, epochs=(1, 2)):
    """The mini-batches of these epochs, of 20 images each, and lists of those of each step."""
    sampler, batches = imbalance.Steps(classes, 20, 10, *options, seed=4), []
    for epoch in epochs:
        sampler.set_epoch(epoch)
        found = list(sampler)
        assert len(found) == len(sampler)
        batches += found
    return batches, [sorted(sum(batches[i:i + 10], [])) for i in range(0, len(batches), 10)]


def test_steps_have_the_same_images_for_any_number_of_classes_per_mini_batch():
    """Ten mini-batches of 20 per step, with 1, 2 or 10 of 10 classes: counted by hand."""
    classes, steps = torch.randperm(600) % 10, {}
    for count in (1, 2, 10):
        batches, steps[count] = steps_of(classes, count, 10)
        assert len(batches) == 60
        pairs = set()
        for batch in batches:
            of_each = classes[batch].bincount(minlength=10)
            assert of_each[of_each > 0].tolist() == [20 // count] * count
            pairs.add(tuple(of_each.nonzero()[:, 0].tolist()))
        # Of two classes per mini-batch, there are more pairs than five that stay the same.
        assert len(pairs) == {1: 10, 10: 1}[count] if count != 2 else len(pairs) > 9
        assert all(classes[step].bincount().tolist() == [20] * 10 for step in steps[count])
        assert len(set(sum(steps[count][:3], []))) == 600  # an epoch has every image once
    assert steps[1] == steps[2] == steps[10] and steps[1][0] != steps[1][3]


def test_steps_of_few_classes_and_of_some():
    """With 2 classes per step all of its mini-batches have both. With 5, each has one of the 5."""
    classes = torch.arange(2000) % 10
    batches, steps = steps_of(classes, 2, 2, epochs=[1])
    assert all(classes[batch].bincount()[classes[batch].unique()].tolist() == [10, 10]
               for batch in batches)
    assert all(len(classes[step].unique()) == 2 for step in steps) and len(steps) == 10
    batches, steps = steps_of(classes, 1, 5, epochs=[1])
    assert all(len(classes[batch].unique()) == 1 for batch in batches)
    assert all(len(classes[step].unique()) == 5 for step in steps) and len(steps) == 10


@pytest.mark.parametrize("arm, few, expected", [
    ("all", None, (8, 8)), ("batch", 2, (2, 8)), ("step", 2, (2, 2))])
def test_arms(arm, few, expected, monkeypatch):
    images = imbalance.Images(None, None, {"font": torch.arange(64) % 8})
    monkeypatch.setattr(imbalance, "Steps", lambda labels, size, accumulate, *counts: counts)
    args = SimpleNamespace(grouped_by="font", classes_per_step=None, batch_size=16, accumulate=4)
    assert imbalance.make_sampler(images, arm, few, 7, args) == (*expected, 7)
    args.batch_size = 4  # At most as many classes as images
    if arm == "all":
        assert imbalance.make_sampler(images, arm, few, 7, args) == (4, 8, 7)


@pytest.mark.parametrize("options, message", [
    ("--classes_per_batch 3", "3 of 8 classes per mini-batch need an --accumulate"),
    ("--accumulate 4", "multiple of 8 / 1, and"),
    ("--batch_size 20", "a --batch_size that is a multiple of 8$"),
    ("--grouped_by color", "--grouped_by must be one of class, font, second"),
    ("--few_in step", "512 images of 1 classes per batch do not fit classes of 64 to 64 images")])
def test_steps_that_cannot_be_divided(options, message, tmp_path, capsys):
    with pytest.raises(SystemExit, match="^2$"):
        imbalance.main([*options.split(), "--out", str(tmp_path)])
    assert re.search(message, capsys.readouterr().err.strip())
    assert not list(tmp_path.iterdir())


def test_batch_norm_is_measured_with_balanced_classes():
    """Class 1 is brighter. Statistics of one class in training must not matter in the test.

    All test images have class 0. With their own statistics they would look like both classes.
    """
    classes = torch.arange(200) % 2
    images = torch.randint(90, (200, 3, 32, 32)) + 120 * classes[:, None, None, None]
    views = imbalance.normalize_images(images.to(torch.uint8))
    encoder, found = imbalance.make_resnet(), []
    train, test = (imbalance.Images(None, lambda x=x: x, {"class": y})
                   for x, y in ((views, classes), (views[::2], classes[::2])))
    for seen in (0, 1):
        for _ in range(25):
            encoder.train()(views[classes == seen])
        found.append(imbalance.measure(encoder, train, test))
        statistics = encoder[1].running_mean
        expected = encoder[0](views).mean(dim=(0, 2, 3))
        torch.testing.assert_close(statistics, expected, rtol=1e-3, atol=1e-4)
    assert found[0] == found[1] == {"class_knn": 1.0, "class_probe": 1.0}


def test_more_than_a_hundred_classes_have_no_probe():
    x, classes = torch.randn(300, 3, 32, 32), torch.arange(300) % 101
    images = imbalance.Images(None, lambda: x, {"class": classes, "color": classes % 5})
    found = imbalance.measure(None, images, images)
    assert found.keys() == {"class_knn", "color_knn", "color_probe"}


def make_runs(accuracies):
    """Runs from {method: {arm: (class for each seed)}}."""
    return [{"seed": seed, "method": name, "arm": arm, "lr_scale": arm and 1.0,
             "classes_per_batch": None if arm in (None, "all") else 1,
             "results": {"class_knn": value, "font_knn": 0.5 + seed * (arm == "step")}}
            for name, arms in accuracies.items() for arm, seeds in arms.items()
            for seed, value in enumerate(seeds)]


def test_what_is_lost_by_hand():
    """Two seeds. SimCLR loses .3 and .1 of the class, MAE 0 and .1. MSN has learned nothing."""
    runs = make_runs({
        "random convolutions": {None: (0.2, 0.2)}, "random ViT": {None: (0.15, 0.15)},
        "SimCLR": {"all": (0.8, 0.6), "batch": (0.5, 0.5), "step": (0.4, 0.6)},
        "MSN": {"all": (0.24, 0.24), "batch": (0, 0)},
        "MAE": {"all": (0.5, 0.5), "batch": (0.5, 0.4)}})
    imbalance.add_losses(runs)

    def lost(method, arm, name):
        return [run["results"][f"lost_{name}"] for run in runs
                if (run["method"], run["arm"]) == (method, arm)]

    assert lost("SimCLR", "batch", "class_knn") == pytest.approx([0.3, 0.1])
    assert lost("SimCLR", "step", "class_knn") == pytest.approx([0.4, 0])
    assert lost("SimCLR", "step", "font_knn") == [0, -1]
    # Over both seeds SimCLR learned .5, and MAE .35.
    assert lost("SimCLR", "batch", "share") == pytest.approx([0.3 / 0.5, 0.1 / 0.5])
    assert lost("MAE", "batch", "share") == pytest.approx([0, 0.1 / 0.35])
    assert all("lost_class_knn" not in run["results"] for run in runs
               if run["arm"] in ("all", None))
    assert lost("MSN", "batch", "class_knn") == pytest.approx([0.24, 0.24])
    assert not any("lost_share" in run["results"] for run in runs if run["method"] == "MSN")


# ---- Whole runs ----------------------------------------------------------------------------------
def test_quick_run_writes_everything(tmp_path, jobs_here, monkeypatch):
    """With a large penalty, the linear probe takes fewer steps."""
    monkeypatch.setattr(imbalance, "linear_probe",
                        functools.partial(imbalance.linear_probe, penalty=1000.0))
    imbalance.main(["--quick", "--workers", "1", "--out", str(tmp_path)])
    assert {path.name for path in tmp_path.iterdir()} == {"lock", "results.json", "imbalance.png"}
    content = json.loads((tmp_path / "results.json").read_text())
    runs = content["runs"]
    assert [(run["method"], run["arm"], run["classes_per_batch"]) for run in runs] == [
        *((name, *arm) for name in ("SimCLR", "MAE") for arm in (("all", None), ("batch", 1))),
        *[(name, None, None) for name in imbalance.UNTRAINED]]
    assert content["config"]["rates"].keys() == imbalance.METHODS.keys()
    assert all(0 <= value <= 1 for run in runs for value in run["results"].values())
    results = [run["results"] for run in runs]
    assert results[0] != results[1] and results[2] != results[3]  # all classes and one class
    # The numbers of raw pixels, by NumPy and scikit-learn
    train, test = imbalance.load_data("glyphs", "data", 512, False, 32)
    torch.manual_seed(0)
    x, test_x = (pixels(images.all_views().numpy()) for images in (train, test))
    cosines = unit(test_x) @ unit(x).T
    nearest = np.argsort(-cosines)[:, :20]
    classes, test_classes = (images.labels["class"].numpy() for images in (train, test))
    votes = np.zeros((len(test_x), 32))
    for i in range(len(test_x)):
        np.add.at(votes[i], classes[nearest[i]], np.exp(cosines[i, nearest[i]] / 0.07))
    assert results[-1]["class_knn"] == pytest.approx(
        np.mean(votes.argmax(axis=1) == test_classes), abs=0.004)
    x, test_x = (x - x.mean(axis=0)) / x.std(axis=0), (test_x - x.mean(axis=0)) / x.std(axis=0)
    for name in train.labels:
        oracle = LogisticRegression(C=1e-3, max_iter=1000).fit(x, train.labels[name].numpy())
        assert results[-1][f"{name}_probe"] == pytest.approx(
            oracle.score(test_x, test.labels[name].numpy()), abs=0.004)


def pixels(images):
    """Means over 4 x 4 pixels: (N, 1, 32, 32) -> (N, 64)."""
    return images.reshape(-1, 8, 4, 8, 4).mean(axis=(2, 4)).reshape(len(images), -1)


def unit(x):
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def test_a_loss_that_is_not_finite_is_one_clear_line(tmp_path, jobs_here, monkeypatch, capsys):
    def make(data):
        method = torch.nn.Module()
        method.encoder = torch.nn.Linear(1, 1)
        method.forward = lambda views: (method.encoder.weight.sum() * math.inf, {})
        return method
    monkeypatch.setitem(imbalance.METHODS, "SimCLR", (make, (1, 1), {}, None))
    with pytest.raises(SystemExit, match="^2$"):
        imbalance.main(["--quick", "--out", str(tmp_path)])
    _, line = capsys.readouterr().err.split("error: ", 1)
    assert line == "the loss of SimCLR is not finite in epoch 1: try a lower --lr_scale\n"
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

    def make(data):
        encoder = imbalance.convolutions(data, imbalance.group_norm)
        return imbalance.TwoViews(encoder, loss_of, norm=imbalance.group_norm)
    monkeypatch.setitem(imbalance.METHODS, "SimCLR", (make, None, {}, None))
    images = torch.randint(256, (40 * accumulate, 3, 32, 32), dtype=torch.uint8)
    classes = torch.arange(len(images)) % 4
    args = SimpleNamespace(epochs=2, accumulate=accumulate, data="CIFAR10")
    sampler = pmsn.ClassBatchSampler(classes, 20, 2, seed=4)
    dataset, _ = imbalance.photographs(images, 4)
    encoder = imbalance.train("SimCLR", dataset, sampler, 3, 0.02, "", args)
    torch.manual_seed(3)
    twin = make("CIFAR10").to(memory_format=torch.channels_last)
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
            # In this order and memory format rounding is the same. Adam enlarges its differences.
            views = torch.cat([pmsn.make_views([imbalance.random_crops(batch)[:, None]],
                                               blur_p=0.0)[0] for _ in range(2)])
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
    images = imbalance.Images(lambda index: torch.zeros(len(index), 1, 32, 32), None, None)
    args = SimpleNamespace(epochs=1, accumulate=1, data="glyphs")
    sampler = pmsn.ClassBatchSampler(torch.arange(20) % 2, 10, 2)
    encoder = imbalance.train(name, images, sampler, 0, 0.1, "", args)
    model, options = seen[-1]
    assert encoder is model.target_encoder and options.get("any_order", False) == any_order
