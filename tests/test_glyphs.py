"""support/glyphs.py: which glyphs there are, how often they are drawn, and what a view shows."""

import itertools
import unicodedata

import pytest
import torch
import torch.nn.functional as F

from support import glyphs


def test_no_two_glyphs_look_alike():
    """Shrunk to 10 x 10 pixels, any two of them differ, in every font, and none is empty."""
    assert len(glyphs.GLYPHS) == 576 == len(set(glyphs.GLYPHS))
    # No accents that Unicode has in two ways: an editor may change one to the other.
    assert unicodedata.normalize("NFKC", glyphs.GLYPHS) == glyphs.GLYPHS
    for font in glyphs.TRAIN_FONTS + glyphs.TEST_FONTS:
        images = F.avg_pool2d(glyphs.load_glyphs(glyphs.GLYPHS, [font]), 4).flatten(1)
        distances = torch.pdist(images)
        # A box that stands for a glyph which the font does not have would be twice in the list.
        assert distances.min() > 1.2, font
        assert images.mean(dim=1).min() > 0.02


def test_classes_follow_the_exponent_and_nothing_else_does():
    data = glyphs.GlyphImages(glyphs.TRAIN_FONTS, 4, 1.0, 0.5, 24_000, backgrounds=5)
    assert torch.bincount(data.labels) / 960 == pytest.approx([12, 6, 4, 3], abs=0.5)  # k^-1
    head = data.labels == 0
    fonts = data.glyph_index // 4  # The glyphs are listed font by font.
    for values, kinds in ((fonts, 9), (data.backgrounds, 5)):
        shares = torch.bincount(values[head]) / 11_520
        assert shares == pytest.approx([1 / kinds] * kinds, abs=0.015)


def test_test_images_are_in_other_fonts():
    """Otherwise a test image could be a copy of a training image."""
    train, test = [F.avg_pool2d(glyphs.load_glyphs(glyphs.GLYPHS, fonts), 4).view(
        len(fonts), 576, -1) for fonts in (glyphs.TRAIN_FONTS, glyphs.TEST_FONTS)]
    for a, b in itertools.product(train, test):
        assert (a - b).norm(dim=1).min() > 0.5


def test_an_image_shows_its_class_and_its_background():
    """The mean over random deformations looks like the glyph, in its corner, and only there."""
    data = glyphs.GlyphImages(["DejaVuSans"], 8, 0.0, 0.6, 4000, backgrounds=6, deform=0.3)
    views = data.all_views()
    assert views.shape == (4000, 1, 32, 32)
    for corner, bank, shown, peak in ((slice(0, 18), data.glyphs, data.labels, 1.0),
                                      (slice(14, 32), data.background_glyphs, data.backgrounds,
                                       0.6)):
        x = views[:, :, corner, corner]
        means = torch.stack([x[shown == c].mean(dim=0).flatten() for c in range(len(bank))])
        expected = F.interpolate(bank, 18, mode="bilinear").flatten(1)
        found = torch.cat([expected, means]).corrcoef()[:len(bank), len(bank):]
        assert found.argmax(dim=1).tolist() == list(range(len(bank)))
        assert means.max().item() == pytest.approx(2 * peak - 1, abs=0.15)
    data.contrast = 0.0
    without = data.all_views()
    assert without[:, :, 18:].mean().item() == pytest.approx(-1, abs=0.01)
    assert without[:, :, :18, :18].mean() > -0.9


def test_views_disagree_in_a_twentieth_of_the_cases(monkeypatch):
    """5% of the views show the class of a random image, which often is the same class."""
    data = glyphs.GlyphImages(["DejaVuSans"], 3, 1.0, 1.0, 20_000, backgrounds=4)
    monkeypatch.setattr(data, "render", lambda *shown: shown)
    index = torch.arange(20_000)
    shown = data.views(index)
    for values, own in zip(shown, (data.glyph_index, data.backgrounds)):
        shares = torch.bincount(own) / len(own)
        other = (values != own).double().mean().item()
        assert other == pytest.approx(0.05 * (1 - shares.square().sum().item()), abs=0.005)
    both = ((shown[0] != data.glyph_index) & (shown[1] != data.backgrounds)).double().mean()
    assert both < 0.003  # The two features disagree independently of one another.
    pairs = data.views(torch.tensor([7] * 500))  # Views are of the images with these numbers.
    assert (pairs[0] == data.glyph_index[7]).double().mean() > 0.9
