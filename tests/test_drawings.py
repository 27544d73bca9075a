"""support/drawings.py: digits, gratings, their random views, and the small encoder."""

import math

import numpy as np
import pytest
import torch

from support import drawings


def coordinates(size, count=1):
    """Two images (2, count, 1, size, size) whose pixels are their own x, and their own y."""
    x = (2 * torch.arange(size) + 1) / size - 1
    return torch.stack([x.expand(size, size), x[:, None].expand(size, size)]).expand(
        count, -1, -1, -1).transpose(0, 1)[:, :, None]


# ---- Drawing -------------------------------------------------------------------------------------
def test_frequencies_follow_the_exponent():
    labels = torch.arange(3).repeat_interleave(torch.tensor([30, 4, 100]))
    index = drawings.sample(labels, 1.0, 11000)
    counts = torch.bincount(labels[index])
    assert (counts - torch.tensor([6000, 3000, 2000])).abs().max() < 200  # four sigma
    rare = torch.bincount(index)[30:34]  # all images of a class are equally frequent
    assert (rare - 750).abs().max() < 120


def test_characters_are_drawn_font_by_font():
    fonts = ["DejaVuSans", "DejaVuSerif"]
    images = drawings.draw("I8", fonts, (40, 29))
    assert images.shape == (4, 1, 29, 40) and images.dtype == torch.uint8
    assert len(images.flatten(1).unique(dim=0)) == 4
    for i, (character, font) in enumerate((c, f) for f in fonts for c in "I8"):
        torch.testing.assert_close(images[i:i + 1], drawings.draw(character, [font], (40, 29)))
    # White on black, over the whole height. An I is narrower than an 8, in any font.
    assert images.amax(dim=(1, 2, 3)).min() > 250 and (images[..., 0] == 0).all()
    assert (images.amax(dim=3)[..., [0, -1]] > 30).all()
    ink = images.float().mean(dim=(1, 2, 3))
    assert ink[0] < ink[1] and ink[2] < ink[3]


def test_digits_are_ten_and_equally_high():
    digits, labels = drawings.draw_digits("DejaVuSans")
    assert digits.shape == (10, 1, 20, 20) and labels.tolist() == list(range(10))
    assert digits.min() >= 0 and 0.9 < digits.amax(dim=(1, 2, 3)).min() <= digits.max() <= 1
    heights = (digits.amax(dim=(1, 3)) > 0.3).sum(dim=1)
    assert heights.unique().tolist() == [15]  # 29 of 40 pixels, in 20


def test_gratings_have_two_periods_and_five_angles():
    """Their Fourier transforms have one peak each, at 64 / period cycles in the right direction."""
    gratings = drawings.draw_gratings()
    assert gratings.shape == (10, 1, 64, 64) and gratings.min() >= 0 and gratings.max() <= 1
    for i, grating in enumerate(gratings[:, 0].numpy()):
        spectrum = abs(np.fft.rfft2(grating - grating.mean()))
        rows, columns = np.unravel_index(spectrum.argmax(), spectrum.shape)
        rows = rows - 64 if rows > 32 else rows
        assert np.hypot(rows, columns) == pytest.approx(64 / (4 if i % 2 == 0 else 9), abs=0.8)
        angle, expected = np.arctan2(rows, columns) % np.pi, i % 5 * np.pi / 5
        assert abs((angle - expected + 0.5) % np.pi - 0.5) < 0.1
    neighbors = torch.corrcoef(gratings.flatten(1)).diagonal(1)
    assert neighbors.abs().max() < 0.1


# ---- Random views --------------------------------------------------------------------------------
def test_warp_shows_the_place_of_its_formula():
    """An image of coordinates shows where each pixel was taken: A x + shift + bend, by hand."""
    count, size = 5, 24
    angle, shear = torch.rand(count) - 0.5, torch.rand(count) - 0.5
    scale, shift = 0.3 + 0.2 * torch.rand(count, 2, 1), 0.2 * torch.rand(count, 2, 1) - 0.1
    bend = 0.05 * torch.randn(count, size, size, 2)
    found = [drawings.warp(images, size, angle, shear, scale, shift, bend).numpy()
             for images in coordinates(32, count)]
    place = (2 * np.arange(size) + 1) / size - 1
    for i in range(count):
        (a, b), (c, d) = ((math.cos(angle[i]), -math.sin(angle[i])),
                          (math.sin(angle[i]), math.cos(angle[i])))
        for row, column in ((0, 0), (3, 20), (11, 11), (23, 5), (14, 23)):
            x, y = place[column], place[row]
            sheared = x + shear[i].item() * y
            expected = np.array([a * sheared + b * y, c * sheared + d * y])
            expected = scale[i, :, 0].numpy() * expected + shift[i, :, 0].numpy()
            expected += bend[i, row, column].numpy()
            assert [x[i, 0, row, column] for x in found] == pytest.approx(expected, abs=1e-4)


def test_digits_are_deformed_anew_in_each_view():
    digit = drawings.draw_digits("DejaVuSans")[0][8:9].expand(6, -1, -1, -1)
    still = drawings.digit_view(digit, deform=0.0)
    assert still.shape == (6, 1, 16, 16) and still.min() >= 0 and still.max() <= 1
    for other in (still[1:], drawings.digit_view(digit, deform=0.0)[1:]):
        torch.testing.assert_close(other, still[:1].expand_as(other))  # Nothing is random.
    first, second = (drawings.digit_view(digit, deform=1.0, size=32) for _ in range(2))
    assert first.shape == (6, 1, 32, 32) and first.min() >= 0 and first.max() <= 1
    views = torch.cat([first, second]).flatten(1)
    different = torch.cdist(views, views, p=1) / views.shape[1]
    assert different[~torch.eye(12, dtype=torch.bool)].min() > 0.02


def test_a_stroke_has_the_width_of_a_threshold():
    """Without a change of place, an even gray becomes its sigmoid: white above .4, black below."""
    gray = torch.linspace(0, 1, 11).view(11, 1, 1, 1).expand(-1, 1, 20, 20)
    found = drawings.digit_view(gray, deform=0.0)[:, 0, 8, 8]
    assert found.tolist() == pytest.approx(
        [1 / (1 + math.exp(-12 * (i / 10 - 0.4))) for i in range(11)], abs=1e-5)


@pytest.mark.parametrize("size, low, high", [(64, 0.475, 0.525), (32, 0.7, 1.0)])
def test_backgrounds_are_moved_but_stay_inside(size, low, high):
    """Measured on images of coordinates: zoom, angle and place of 500 views."""
    seed = torch.random.get_rng_state()
    shown = []
    for images in coordinates(size, 500):
        torch.random.set_rng_state(seed)  # the same views of both coordinates
        shown.append(drawings.background_view(images))
    x, y = (view[:, 0] for view in shown)
    assert x.shape == (500, 32, 32)
    # From pixel 12 to pixel 19: 7 of 16 pixels per unit
    along = torch.stack([x[:, 16, 19] - x[:, 16, 12], y[:, 16, 19] - y[:, 16, 12]]) / (7 / 16)
    zoom, angle = torch.hypot(*along), torch.atan2(along[1], along[0])
    assert zoom.min() > low - 1e-3 and zoom.max() < high + 1e-3
    assert zoom.max() - zoom.min() > 0.9 * (high - low)
    assert angle.abs().max() < math.radians(3) + 1e-3 and angle.abs().max() > math.radians(2.7)
    middle = torch.stack([v[:, 15:17, 15:17].mean(dim=(1, 2)) for v in (x, y)])
    reach = 0.05 if size == 64 else 0.9 * (1 - zoom)
    assert (middle.abs() < reach + 2e-3).all() and (middle.abs() > 0.8 * reach).any(dim=1).all()


# ---- A small encoder -----------------------------------------------------------------------------
def test_each_position_of_the_encoder_sees_16_pixels():
    encoder = drawings.make_encoder(32)
    images = torch.randn(2, 1, 32, 32, requires_grad=True)
    positions = encoder[:-2](images)  # before flattening
    assert positions.shape == (2, 64, 3, 3) and encoder(images).shape == (2, 128)
    for row in range(3):
        for column in range(3):
            gradient, = torch.autograd.grad(positions[0, :, row, column].square().sum(), images,
                                            retain_graph=True)
            seen = torch.zeros(32, 32, dtype=torch.bool)
            seen[8 * row:8 * row + 16, 8 * column:8 * column + 16] = True
            assert torch.equal(gradient[0, 0] != 0, seen) and (gradient[1] == 0).all()
    window = drawings.make_encoder(16)
    assert window[:-2](torch.randn(1, 1, 16, 16)).shape == (1, 64, 1, 1)
    assert window(torch.randn(2, 1, 16, 16)).shape == (2, 128)


def test_a_model_of_the_drawings_is_pmsn_without_masking():
    encoder = drawings.make_encoder(16)
    model = drawings.make_pmsn(encoder, num_prototypes=4, exponent=1.0, dim=6)
    assert model.encoder is encoder and model.prototypes.shape == (4, 6)
    assert model.prior.tolist() == pytest.approx([12 / 25, 6 / 25, 4 / 25, 3 / 25])
    images = torch.randn(30, 1, 16, 16)
    embeddings = model.head(model.encoder(images))
    assert embeddings.mean(dim=0).tolist() == pytest.approx([0] * 6, abs=1e-5)  # by BatchNorm
    assert embeddings.var(dim=0, correction=0).tolist() == pytest.approx([1] * 6, abs=0.01)
    with torch.no_grad():
        first, second = (model([images, images])[0] for _ in range(2))
    torch.testing.assert_close(first, second, rtol=0, atol=0)  # Masking would be random.


def test_the_schedule_by_hand():
    assert drawings.schedule(0.0) == pytest.approx((2e-3 * 0.02, 0.6, 0.9))
    assert drawings.schedule(0.01) == pytest.approx((2e-3 * 0.22, 0.595, 0.90135), rel=1e-3)
    assert drawings.schedule(0.5) == pytest.approx((2e-3 * 0.55, 0.35, 0.9675))
    assert drawings.schedule(1.0) == pytest.approx((2e-4, 0.25, 0.99))
