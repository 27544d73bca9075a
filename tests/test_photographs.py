"""support/photographs.py: how small photographs are read and cropped, and the small ResNet."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torchvision.transforms import v2

import imbalance
import mnist_corner
import pmsn
import which_prior
from support import photographs


# ---- Reading -------------------------------------------------------------------------------------
def save_images(folder, image, classes, count, **options):
    for name in classes:
        (folder / name).mkdir(parents=True)
        for i in range(count):
            image.save(folder / name / f"{i}.png", **options)


def backgrounds(folder):
    args = SimpleNamespace(mnist=True, root="", backgrounds=str(folder / "train"))
    return mnist_corner.load_backgrounds(args)

def of_imbalance(folder, part):
    images = imbalance.load_data(str(folder), "", 60, False, None)[part].all_views()
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (pmsn.IMAGENET_MEAN, pmsn.IMAGENET_STD))
    return 255 * (images * std + mean)


READERS = {  # a folder with ten classes in train and in test -> images (N, C, 32, 32)
    "imbalance.py": lambda folder: of_imbalance(folder, 0),
    "imbalance.py, test": lambda folder: of_imbalance(folder, 1),
    "which_prior.py": lambda folder: which_prior.load_photographs(str(folder), "")[0],
    "which_prior.py, test": lambda folder: which_prior.load_photographs(str(folder), "")[1],
    "mnist_corner.py": backgrounds}


@pytest.mark.parametrize("reader", READERS)
def test_photographs_are_turned_as_their_exif_says(reader, tmp_path):
    """The upper half is light. The orientation 6 of a phone makes it the right half."""
    pixels = np.zeros((32, 32, 3), np.uint8)
    pixels[:16] = 255
    image = Image.fromarray(pixels)
    exif = image.getexif()
    exif[0x0112] = 6
    for split in ("train", "test"):
        save_images(tmp_path / split, image, "abcdefghij", 1, exif=exif)
    for found in READERS[reader](tmp_path).float():
        assert found[..., :16].max() < found[..., 16:].min()


@pytest.mark.parametrize("reader", READERS)
def test_photographs_with_16_bits_keep_their_gray_levels(reader, tmp_path):
    """PIL alone takes everything above 255 of 65,535 for white."""
    levels = np.tile(np.linspace(0, 65535, 32).astype(np.uint16), (32, 1))
    for split in ("train", "test"):
        save_images(tmp_path / split, Image.fromarray(levels), "abcdefghij", 1)
    for found in READERS[reader](tmp_path).float():
        expected = torch.linspace(0, 255, 32)
        if reader == "mnist_corner.py":  # which gives all backgrounds the same contrast
            expected = 0.5 + 0.35 * (expected - expected.mean()) / expected.std()
        step = expected[1] - expected[0]
        torch.testing.assert_close(found, expected.expand_as(found), rtol=0, atol=step.item() / 4)


def test_as_many_images_of_each_class_as_the_smallest_has(tmp_path):
    """The classes come in turn. The color of an image says its class, and how often it came."""
    for name, count in (("a", 5), ("b", 3), ("c", 4)):
        (tmp_path / "train" / name).mkdir(parents=True)
        (tmp_path / "test" / name).mkdir(parents=True)
        for i in range(count):
            image = Image.new("RGB", (40, 30), ("abc".index(name), 10 * i, 0))
            image.save(tmp_path / "train" / name / f"{i}.png")
            if i < 1:
                image.save(tmp_path / "test" / name / f"{i}.png")
    train, test = photographs.load_splits(str(tmp_path), "")
    found = photographs.read_images(train)
    assert found.shape == (9, 3, 32, 32) and found.dtype == torch.uint8
    assert found[:, 0, 0, 0].tolist() == [0, 1, 2] * 3
    assert len(found.flatten(1).unique(dim=0)) == 9  # no image twice
    assert photographs.read_images(train, per_class=2)[:, 0, 0, 0].tolist() == [0, 1, 2] * 2
    assert len(photographs.read_images(test)) == 3


def test_both_splits_must_have_the_same_classes(tmp_path):
    image = Image.new("RGB", (8, 8))
    save_images(tmp_path / "train", image, "abc", 1)
    save_images(tmp_path / "test", image, "abd", 1)
    with pytest.raises(ValueError, match="training and test images have different classes"):
        photographs.load_splits(str(tmp_path), "")


def test_cifar_is_loaded_by_torchvision(monkeypatch):
    def cifar(root, train, download):
        return SimpleNamespace(root=root, train=train, download=download, classes=["cat", "dog"])
    monkeypatch.setattr(photographs, "CIFAR10", cifar)
    train, test = photographs.load_splits("CIFAR10", "folder")
    assert train.train and not test.train
    assert train.root == test.root == "folder" and train.download and test.download


# ---- Views ---------------------------------------------------------------------------------------
def test_random_crops_are_those_of_torchvision():
    """A crop of an image that shows its coordinates tells where it was taken, and how large."""
    ramp = (8 * torch.arange(32.0) + 4).expand(32, 32)  # x in units of 1/8 pixel
    image = torch.stack([ramp, ramp.T, torch.full((32, 32), 77.0)]).to(torch.uint8)
    crops = 255 * photographs.random_crops(image.expand(4000, -1, -1, -1))
    assert crops.shape == (4000, 3, 32, 32) and (crops[:, 2] - 77).abs().max() < 1e-3
    library = v2.RandomResizedCrop(32, (0.2, 1.0), antialias=True)
    expected = torch.stack([library(image.float()) for _ in range(4000)])

    def box_of(x):  # the middle and the width of the crop, in x and in y
        middle = torch.stack([x[:, 0, :, 15:17].mean((1, 2)), x[:, 1, 15:17].mean((1, 2))], dim=1)
        width = torch.stack([x[:, 0, 16, 28] - x[:, 0, 16, 4], x[:, 1, 28, 16] - x[:, 1, 4, 16]], 1)
        return middle, width

    (middle, width), (their_middle, their_width) = box_of(crops), box_of(expected)
    flipped = width[:, 0] < 0
    assert flipped.float().mean().item() == pytest.approx(0.5, abs=0.03)
    assert (width[:, 1] > 0).all() and (their_width > 0).all()
    for ours, theirs in ((middle, their_middle), (width.abs(), their_width)):
        for q in (0.05, 0.25, 0.5, 0.75, 0.95):
            torch.testing.assert_close(ours.quantile(q, dim=0), theirs.quantile(q, dim=0),
                                       rtol=0, atol=10.0)  # a pixel of 32


def test_crops_of_another_area_are_smaller():
    """Crops of a twentieth of the area show at most sqrt(.05 * 4/3) of a side."""
    ramp = (8 * torch.arange(32.0) + 4).expand(1, 3, 32, 32).to(torch.uint8)
    crops = 255 * photographs.random_crops(ramp.expand(500, -1, -1, -1), area=(0.05, 0.05))
    shown = (crops[:, 0, 16].amax(dim=1) - crops[:, 0, 16].amin(dim=1)) / 8 * 32 / 31  # pixels
    largest = 32 * (0.05 * 4 / 3) ** 0.5
    assert 0.95 * largest < shown.max() < largest + 0.01


# ---- Training ------------------------------------------------------------------------------------
def test_the_rate_rises_over_a_tenth_of_the_steps_and_falls_to_zero():
    rates = [photographs.warmup_cosine(step, 40) for step in range(41)]
    assert rates[:4] == pytest.approx([0.25, 0.5, 0.75, 1.0], rel=0.02)
    assert rates[20] == pytest.approx(0.5) and rates[40] == pytest.approx(0)
    assert rates[30] == pytest.approx((1 - 0.5**0.5) / 2)
    assert np.diff(rates)[:3].min() > 0 > np.diff(rates)[3:].max()


def test_the_resnet_by_hand():
    """The same convolutions, one after the other, and BatchNorm from the batch by a formula."""
    encoder, images = photographs.make_resnet(), torch.randn(8, 3, 32, 32)

    def batch_norm(x):
        mean = x.mean(dim=(0, 2, 3), keepdim=True)
        variance = x.var(dim=(0, 2, 3), keepdim=True, correction=0)
        return (x - mean) / (variance + 1e-5).sqrt()

    weights = [p for p in encoder.parameters() if p.ndim == 4]
    assert [tuple(p.shape) for p in weights] == [
        (32, 3, 4, 4), (64, 32, 3, 3), (64, 64, 3, 3), (64, 32, 1, 1),
        (128, 64, 3, 3), (128, 128, 3, 3), (128, 64, 1, 1)]
    x = batch_norm(F.conv2d(images, weights[0], stride=2, padding=1)).relu()
    for first, second, shortcut in (weights[1:4], weights[4:]):
        h = batch_norm(F.conv2d(x, first, stride=2, padding=1)).relu()
        h = batch_norm(F.conv2d(h, second, padding=1))
        x = (h + batch_norm(F.conv2d(x, shortcut, stride=2))).relu()
    torch.testing.assert_close(encoder(images), x.mean(dim=(2, 3)), rtol=1e-4, atol=1e-5)
