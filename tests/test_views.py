"""Augmentations against torchvision, and how often, how independently and in which order they happen."""

import itertools
import math

import numpy as np
import pytest
import torch

import pmsn

transforms = pytest.importorskip("torchvision.transforms", reason="torchvision is the oracle of these tests")
TF = pytest.importorskip("torchvision.transforms.v2.functional")

NOTHING = {"jitter_p": 0.0, "grey_p": 0.0, "blur_p": 0.0, "flip_p": 0.0, "mean": (0, 0, 0), "std": (1, 1, 1)}
WHOLE = {"rand_scale": (1.0, 1.0), "focal_scale": (1.0, 1.0)}  # square images: the crop is the image


def random_images(batch=4, height=24, width=30, seed=0):
    return torch.rand(batch, 3, height, width, generator=torch.Generator().manual_seed(seed))


def ks_distance(a, b):
    """The two-sample Kolmogorov-Smirnov statistic: the largest distance between the distribution functions."""
    a, b = np.sort(np.asarray(a, dtype=np.float64)), np.sort(np.asarray(b, dtype=np.float64))
    at = np.concatenate([a, b])
    return np.abs(np.searchsorted(a, at, "right") / len(a) - np.searchsorted(b, at, "right") / len(b)).max()


def ks_limit(a, b):
    """Exceeded with probability .0005 if the distributions are equal."""
    return 2.03 * math.sqrt(1 / len(a) + 1 / len(b))


# ---- Crop and resize -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [7, 16, 33, 64])
def test_resized_crop_equals_torchvision(size):
    """Up- and down-scaling, whole image, corners, one row, one pixel; each image by its own box."""
    boxes = [(0, 0, 24, 30), (0, 0, 10, 12), (14, 18, 10, 12), (3, 5, 20, 7), (11, 2, 1, 28), (23, 29, 1, 1),
             (1, 1, 16, 16)]
    images = random_images(len(boxes))
    got = pmsn.resized_crop(images, torch.tensor(boxes, dtype=torch.float32), size)
    for image, box, result in zip(images, boxes, got):
        expected = TF.resized_crop(image, *box, size=[size, size], antialias=True)
        torch.testing.assert_close(result, expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize("stretched", [False, True])
@pytest.mark.parametrize("height, width, scale", [(40, 60, (0.3, 1.0)), (40, 60, (0.05, 0.3)), (9, 8, (0.2, 0.9)),
                                                  (30, 100, (0.3, 1.0))])
def test_random_boxes_are_drawn_as_torchvision_draws_them(height, width, scale, stretched):
    """Two-sample comparison of every coordinate, of area, ratio and slack. The last: often no draw fits.

    Stretched: the same in the pixels of the originals, which share their batch with others of another size."""
    torch.manual_seed(0)
    if stretched:
        sizes = torch.tensor([[height, width], [70, 20]]).repeat(4000, 1)
        ours = pmsn.random_boxes(torch.empty(8000, 1, 32, 48), scale, sizes)[::2].double()
        ours = (ours * torch.tensor([height / 32, width / 48]).repeat(2)).numpy()
        np.testing.assert_allclose(ours, ours.round(), atol=1e-4)
        ours = ours.round()
    else:
        ours = pmsn.random_boxes(torch.empty(4000, 1, height, width), scale).double().numpy()
    image = torch.empty(1, height, width)
    theirs = np.array([transforms.RandomResizedCrop.get_params(image, scale, (3 / 4, 4 / 3)) for _ in range(4000)])
    assert (ours == ours.round()).all() and ours.min() >= 0 and ours[:, 2:].min() >= 1
    assert (ours[:, 0] + ours[:, 2]).max() <= height and (ours[:, 1] + ours[:, 3]).max() <= width

    def measures(boxes):
        top, left, h, w = boxes.T
        return {"top": top, "left": left, "height": h, "width": w, "area": h * w, "ratio": w / h,
                "below": height - top - h, "right": width - left - w}

    for (name, a), b in zip(measures(ours).items(), measures(theirs).values()):
        assert ks_distance(a, b) < ks_limit(a, b), name


def waves(height, width):
    """A smooth image, (3, height, width), the same scene at every size."""
    y, x = (torch.arange(height)[:, None] + 0.5) / height, (torch.arange(width) + 0.5) / width
    return torch.stack([0.5 + 0.4 * torch.sin(6 * x + 3 * y), 0.5 + 0.4 * torch.cos(7 * y - 2 * x), x * y])


@pytest.mark.parametrize("height, width", [(300, 200), (90, 240)])
def test_stretched_images_give_the_views_of_the_originals(height, width):
    """The same draws: a stretched image, cropped by its original size, shows what the original shows; without the size
    it shows something else."""
    views = []
    for image, sizes in ((waves(height, width), None), (waves(160, 160), torch.tensor([[height, width]]).expand(10, 2)),
                         (waves(160, 160), None)):
        torch.manual_seed(0)
        views.append(pmsn.multi_crop(image.expand(10, -1, -1, -1), sizes, rand_size=32, focal_size=16, **NOTHING))
    for original, stretched, wrong in zip(*views):
        torch.testing.assert_close(stretched, original, atol=0.01, rtol=0)
        assert (wrong - original).abs().max() > 0.1


@pytest.mark.parametrize("original", [1000, 31])
def test_boxes_smaller_than_a_stored_pixel(original):
    """A constant image stays constant, wherever the boxes begin and end."""
    images, sizes = torch.full((200, 3, 10, 10), 0.7), torch.full((200, 2), original)
    boxes = pmsn.random_boxes(images, (1e-5, 0.05), sizes)
    torch.testing.assert_close(pmsn.resized_crop(images, boxes, 4), images[:, :, :4, :4], atol=1e-6, rtol=0)


@pytest.mark.parametrize("height, width", [(20, 200), (200, 20), (33, 71), (71, 33), (32, 32)])
def test_fallback_box_is_torchvisions(height, width):
    """With scale (1, 1) no draw fits (but the whole square): the largest centred box of an allowed ratio, exactly."""
    ours = pmsn.random_boxes(torch.empty(50, 1, height, width), (1.0, 1.0)).long()
    image = torch.empty(1, height, width)
    theirs = torch.tensor(transforms.RandomResizedCrop.get_params(image, (1.0, 1.0), (3 / 4, 4 / 3)))
    assert torch.equal(ours, theirs.expand(50, 4))


# ---- Colour and blur -------------------------------------------------------------------------------------------------


def test_grey_equals_torchvision():
    images = random_images()
    torch.testing.assert_close(pmsn.grey(images), TF.rgb_to_grayscale(images), atol=1e-6, rtol=0)


def test_turn_hue_equals_torchvision():
    """Random colours, primaries, greys and two equal channels; turns over the whole circle."""
    images = random_images(9)
    special = [(1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 0, 0), (1, 1, 1), (0.5, 0.5, 0.5), (1, 1, 0), (0.2, 0.7, 0.7),
               (0.9, 0.1, 0.9)]
    images[:, :, 0, : len(special)] = torch.tensor(special).T
    turns = [-0.5, -0.3, -0.1, -0.02, 0.0, 0.02, 0.17, 0.34, 0.5]
    got = pmsn.turn_hue(images, torch.tensor(turns).view(-1, 1, 1, 1))
    for image, turn, result in zip(images, turns, got):
        torch.testing.assert_close(result, TF.adjust_hue(image, turn), atol=2e-5, rtol=0)


@pytest.mark.parametrize("sigma", [0.1, 0.3, 0.8, 1.3, 2.0])
def test_gaussian_blur_equals_torchvision(sigma):
    """A kernel of 23 pixels holds all of a sigma of 2; both reflect at the border. Two sigmas in a batch, and none."""
    images = random_images(3)
    got = pmsn.gaussian_blur(images, torch.tensor([sigma, 0.0, 1.0]).view(3, 1, 1, 1))
    torch.testing.assert_close(got[0], TF.gaussian_blur(images[0], [23, 23], [sigma, sigma]), atol=1e-5, rtol=0)
    assert torch.equal(got[1], images[1])
    torch.testing.assert_close(got[2], TF.gaussian_blur(images[2], [23, 23], [1.0, 1.0]), atol=1e-5, rtol=0)


def jitter_with_its_draws(monkeypatch, images, strength, apply):
    """colour_jitter and the numbers it drew: [(low, high, draw (B,)), ...]."""
    draws, original = [], torch.Tensor.uniform_

    def uniform(tensor, low=0.0, high=1.0, **options):
        original(tensor, low, high, **options)
        draws.append((low, high, tensor.flatten().clone()))
        return tensor

    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "uniform_", uniform)
        return pmsn.colour_jitter(images, strength, apply), draws


def test_colour_jitter_is_torchvisions_steps_in_some_order(monkeypatch):
    """Four factors are drawn for each image; one around 0, the hue's. Some assignment of the others to brightness,
    contrast and saturation, and some order of the four steps, must give torchvision's result for all images alike."""
    adjust = {"brightness": TF.adjust_brightness, "contrast": TF.adjust_contrast,
              "saturation": TF.adjust_saturation, "hue": TF.adjust_hue}
    apply = torch.tensor([True, True, False]).view(3, 1, 1, 1)
    images, assignments, orders = random_images(3, 6, 5), set(), set()
    for seed in range(8):
        torch.manual_seed(seed)
        got, draws = jitter_with_its_draws(monkeypatch, images, 1.0, apply)
        torch.testing.assert_close(got[2], images[2], atol=1e-5, rtol=0)  # `apply` is false
        assert sorted((round(low, 6), round(high, 6)) for low, high, _ in draws) == [(-0.2, 0.2)] + [(0.2, 1.8)] * 3
        hue = next(draw for low, _, draw in draws if low < 0)
        others = [draw for low, _, draw in draws if low > 0]
        found = []
        for names in itertools.permutations(["brightness", "contrast", "saturation"]):
            factors = {"hue": hue, **dict(zip(names, others))}
            for order in itertools.permutations(factors):
                expected = []
                for i in range(2):
                    image = images[i]
                    for step in order:
                        image = adjust[step](image, factors[step][i].item())
                    expected.append(image)
                if (torch.stack(expected) - got[:2]).abs().max() < 1e-4:
                    found.append((names, order))
        assert found, seed
        assignments |= {names for names, _ in found[:1]}
        orders |= {order for _, order in found[:1]}
    assert len(assignments) == 1 and len(orders) >= 4  # one meaning for each factor, several orders


def test_strength_of_the_jitter():
    """A uniform grey of .5 feels the brightness alone: at strength .5 a factor uniform in .6 .. 1.4, so .3 .. .7."""
    torch.manual_seed(0)
    images, apply = torch.full((3000, 3, 2, 2), 0.5), torch.ones(3000, 1, 1, 1, dtype=torch.bool)
    level = pmsn.colour_jitter(images, 0.5, apply)[:, 0, 0, 0].numpy()
    uniform = np.linspace(0.3, 0.7, 3000)
    assert ks_distance(level, uniform) < ks_limit(level, uniform)


# ---- multi_crop ------------------------------------------------------------------------------------------------------


def test_shapes_and_defaults():
    images = random_images(2, 40, 50)
    target, rand, focal = pmsn.multi_crop(images)  # MSN: one masked view of 224, ten focal views of 96
    assert target.shape == (2, 3, 224, 224) and rand.shape == (2, 3, 224, 224) and focal.shape == (20, 3, 96, 96)
    views = pmsn.multi_crop(images, rand_views=3, focal_views=2, rand_size=16, focal_size=8)
    assert [v.shape for v in views] == [(2, 3, 16, 16), (6, 3, 16, 16), (4, 3, 8, 8)]
    assert len(pmsn.multi_crop(images, focal_views=0, rand_size=16)) == 2
    assert all(v.dtype == torch.float32 and v.isfinite().all() for v in views)


@pytest.mark.parametrize("shape", [(3, 8, 8), (2, 1, 8, 8), (2, 8, 8, 3)])
def test_refused_images(shape):
    with pytest.raises(ValueError, match="images"):
        pmsn.multi_crop(torch.zeros(shape))


def test_bytes_and_floats_give_the_same_views():
    images = torch.randint(0, 256, (3, 3, 20, 20), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    both = []
    for x in (images, images.numpy().astype(np.float32) / 255):
        torch.manual_seed(0)
        both.append(pmsn.multi_crop(torch.as_tensor(x), rand_size=16, focal_size=8, focal_views=2))
    for a, b in zip(*both):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=0)


def test_without_augmentation_a_view_is_the_normalised_image():
    """(x - mean) / std by hand, with the defaults' ImageNet statistics."""
    images = random_images(2, 16, 16)
    options = {k: v for k, v in NOTHING.items() if k not in ("mean", "std")}
    mean, std = np.array([0.485, 0.456, 0.406]).reshape(3, 1, 1), np.array([0.229, 0.224, 0.225]).reshape(3, 1, 1)
    for view in pmsn.multi_crop(images, rand_size=16, focal_size=16, focal_views=1, **WHOLE, **options):
        np.testing.assert_allclose(view, (images.numpy() - mean) / std, atol=2e-5)


def test_views_are_in_view_major_order():
    """Images of one grey level each: entry i of a view's stack shows image i modulo B. More images than `multi_crop`
    takes at a time on a CPU."""
    levels = torch.linspace(0.1, 0.9, 19)
    images = levels.view(19, 1, 1, 1).expand(19, 3, 20, 20)
    views = pmsn.multi_crop(images, rand_views=2, focal_views=4, rand_size=12, focal_size=6, **NOTHING)
    for view, count in zip(views, (1, 2, 4)):
        torch.testing.assert_close(view.mean(dim=(1, 2, 3)), levels.repeat(count), atol=1e-5, rtol=0)


def test_all_views_differ():
    """Five copies of an image, and several views of each: no two alike, neither between images nor between views."""
    torch.manual_seed(0)
    views = pmsn.multi_crop(random_images(1, 32, 32).expand(5, -1, -1, -1), rand_views=2, focal_views=3, rand_size=12,
                            focal_size=12)
    views = torch.cat(views).flatten(1)  # (30, .)
    assert len(views) == 30 and torch.cdist(views, views).fill_diagonal_(math.inf).min() > 0.1


def test_scales_of_the_crops():
    """Pixels that tell their position: red goes from 0 to 1 left to right, green top to bottom. A crop's area follows.

    Area shares are uniform in the scale (aspect ratios that do not fit take a little of its top): target and rand views
    in .3 .. .6, focal views in .05 .. .2."""
    torch.manual_seed(0)
    across = (torch.arange(64) + 0.5) / 64
    image = torch.stack([across.expand(64, 64), across[:, None].expand(64, 64), torch.zeros(64, 64)])
    views = pmsn.multi_crop(image.expand(400, -1, -1, -1), focal_views=1, rand_size=8, focal_size=8,
                            rand_scale=(0.3, 0.6), focal_scale=(0.05, 0.2), **NOTHING)
    for view, (low, high) in zip(views, ((0.3, 0.6), (0.3, 0.6), (0.05, 0.2))):
        # columns 2 and 5, away from the border, are 3 / 8 of the width apart
        area = ((view[:, 0, 4, 5] - view[:, 0, 4, 2]) * 8 / 3 * (view[:, 1, 5, 4] - view[:, 1, 2, 4]) * 8 / 3).numpy()
        uniform = np.linspace(low, high, 400)
        assert ks_distance(area, uniform) < ks_limit(area, uniform)


def test_frequency_of_flips():
    """A left-to-right ramp falls after a flip; in each view .3 of 1000 images, within 5 sigma."""
    torch.manual_seed(0)
    ramp = (torch.arange(8) / 8).expand(1000, 3, 8, 8)
    for view in pmsn.multi_crop(ramp, rand_size=8, focal_size=8, focal_views=1, **WHOLE, **{**NOTHING, "flip_p": 0.3}):
        flipped = view[:, 0, 0, 0] > view[:, 0, 0, -1]
        assert abs(flipped.float().mean() - 0.3) < 5 * math.sqrt(0.3 * 0.7 / 1000)
        torch.testing.assert_close(view[flipped], ramp[flipped].flip(-1), atol=1e-5, rtol=0)
        torch.testing.assert_close(view[~flipped], ramp[~flipped], atol=1e-5, rtol=0)


def test_frequency_of_grey_and_jitter():
    """.2 of the images have equal channels; .7 of the images change their colour: 1000 images a view, 5 sigma."""
    torch.manual_seed(0)
    images = random_images(1000, 4, 4)
    options = {"rand_size": 4, "focal_size": 4, "focal_views": 1, **WHOLE, **NOTHING}
    for view in pmsn.multi_crop(images, **{**options, "grey_p": 0.2}):
        is_grey = (view.amax(dim=1) - view.amin(dim=1)).amax(dim=(1, 2)) < 1e-6
        assert abs(is_grey.float().mean() - 0.2) < 5 * math.sqrt(0.2 * 0.8 / 1000)
        torch.testing.assert_close(view[~is_grey], images[~is_grey], atol=1e-5, rtol=0)
    for view in pmsn.multi_crop(images, **{**options, "jitter_p": 0.7}):
        changed = (view - images).abs().amax(dim=(1, 2, 3)) > 1e-4
        assert abs(changed.float().mean() - 0.7) < 5 * math.sqrt(0.7 * 0.3 / 1000)


def test_frequency_and_width_of_the_blur():
    """A bright pixel's value after the blur, (1 / sum_j exp(-j^2 / 2 sigma^2))^2, tells sigma: uniform in .1 .. 2."""
    torch.manual_seed(0)
    images = torch.zeros(1000, 3, 31, 31)
    images[:, :, 15, 15] = 1
    grid = np.linspace(0.3, 2.0, 2000)  # below .3 the bright pixel hardly loses anything
    peak = np.array([sum(math.exp(-0.5 * (j / s) ** 2) for j in range(-15, 16)) ** -2 for s in grid])
    views = pmsn.multi_crop(images, rand_size=31, focal_size=31, focal_views=0, **WHOLE, **{**NOTHING, "blur_p": 0.6})
    for view in views:
        value = view[:, 0, 15, 15].numpy()
        blurred = value < peak[0]
        expected = 0.6 * (2.0 - 0.3) / (2.0 - 0.1)
        assert abs(blurred.mean() - expected) < 5 * math.sqrt(expected * (1 - expected) / 1000)
        sigma = np.interp(value[blurred], peak[::-1], grid[::-1])
        assert ks_distance(sigma, grid) < ks_limit(sigma, grid)


def test_an_images_views_do_not_depend_on_the_other_images():
    """The same draws, another first image: the other images' views stay as they were."""
    images = random_images(4, 20, 20)
    others = images.clone()
    others[0] = random_images(1, 20, 20, seed=9)[0]
    both = []
    for x in (images, others):
        torch.manual_seed(0)
        both.append(pmsn.multi_crop(x, rand_views=2, focal_views=3, rand_size=12, focal_size=6))
    for a, b in zip(*both):
        a, b = a.unflatten(0, (-1, 4)), b.unflatten(0, (-1, 4))
        torch.testing.assert_close(a[:, 1:], b[:, 1:], atol=1e-6, rtol=0)
        assert (a[:, 0] - b[:, 0]).abs().amax(dim=(1, 2, 3)).min() > 1e-3


def test_draws_of_different_images_and_views_are_independent():
    """Flips of two images in three views, 800 times: every two of the six agree half the time, within 5 sigma."""
    torch.manual_seed(0)
    ramp = (torch.arange(4) / 4).expand(1600, 3, 4, 4)
    views = pmsn.multi_crop(ramp, rand_size=4, focal_size=4, focal_views=1, **WHOLE, **{**NOTHING, "flip_p": 0.5})
    flipped = torch.cat([(v[:, 0, 0, 0] > v[:, 0, 0, -1]).view(2, 800) for v in views])  # (6, 800)
    for a, b in itertools.combinations(flipped, 2):
        assert abs((a == b).float().mean() - 0.5) < 5 * math.sqrt(0.25 / 800)
