"""Images of 32 x 32 pixels that we draw: digits, gratings. And a small encoder for them.

Everything is gray, (N, 1, h, w) with 1 for white. Each view of an image is randomly deformed, by
`digit_view` and `background_view`. Used by mnist_corner.py, which_prior.py, imbalance.py and
rcdm.py.
"""

import itertools
import math

import torch
import torch.nn.functional as F
from PIL import Image, ImageFont, ImageOps
from torch import nn
from torchvision.models.convnext import LayerNorm2d
from torchvision.transforms import v2

import pmsn
from support.figures import FONTS

SIZE = 32  # pixels per side of an image
WIDTHS = (16, 32, 64)  # channels of the encoder


# ---- Drawing -------------------------------------------------------------------------------------
def draw_digits(font):
    images = draw("0123456789", [font], (40, 29))  # All digits get the same height.
    return shrink(F.pad(images / 255, (0, 0, 5, 6))), torch.arange(10)


def shrink(images):
    return v2.functional.resize(images, 20, antialias=True)


def draw(characters, fonts, size):
    """White on black, in fonts that come with matplotlib: (fonts * characters, 1, h, w), uint8."""
    images = []
    for name, character in itertools.product(fonts, characters):
        font = ImageFont.truetype(FONTS / f"{name}.ttf", 40)
        mask = font.getmask(character)
        image = ImageOps.pad(Image.frombytes("L", mask.size, bytes(mask)), size)
        images.append(v2.functional.pil_to_tensor(image))
    return torch.stack(images)


def draw_gratings():
    """Ten gratings of 64 x 64 pixels, in [0, 1]. One and the next are unlike."""
    y, x = torch.meshgrid(torch.arange(64), torch.arange(64), indexing="ij")
    images = []
    for i in range(10):
        period, angle = (4, 9)[i % 2], i % 5 * math.pi / 5
        across = x * math.cos(angle) + y * math.sin(angle)
        images.append(0.5 + 0.5 * torch.sin(math.tau / period * across))
    return torch.stack(images)[:, None]


def sample(labels, exponent, count):
    """Random indices of `count` images. The label k = 0, 1 ... has the frequency (k + 1)^-exponent.

    So 0 is the most frequent digit, with all seeds.
    """
    frequencies = pmsn.power_law_prior(int(labels.max()) + 1, exponent)
    weights = (frequencies / labels.bincount())[labels]
    return weights.multinomial(count, replacement=True)


# ---- Random views --------------------------------------------------------------------------------
def digit_view(digits, deform, size=16):
    """Digits, randomly deformed, (B, 1, size, size). At `deform` 0 nothing is random."""
    # Each view is deformed anew. If both views were deformed alike, a frequent digit could be split
    # by its deformation at no cost, and the uniform prior would prefer the digit too.
    angle = random_numbers(digits, math.radians(20) * deform)
    shear = random_numbers(digits, 0.25 * deform)
    scale = random_numbers(digits, 0.15 * deform, 2, 1).exp()
    shift = random_numbers(digits, 0.2 * deform, 2, 1)
    # An elastic change: 4 x 4 random offsets, smooth in between.
    bend = random_numbers(digits, 0.12 * deform, 2, 4, 4)
    bend = F.interpolate(bend, size=size, mode="bicubic", align_corners=True)
    digits = warp(digits, size, angle, shear, scale, shift, bend.permute(0, 2, 3, 1))
    # The width of the stroke: a random threshold on the slightly blurred digit.
    ink = (digits + F.avg_pool2d(digits, 3, stride=1, padding=1)) / 2
    threshold = 0.4 + random_numbers(digits, 0.2 * deform, 1, 1, 1)
    return torch.sigmoid(12 * (ink - threshold))


def background_view(backgrounds):
    """A random crop, turned by up to 3 degrees: (B, 1, h, w) -> (B, 1, 32, 32)."""
    if backgrounds.shape[-1] > SIZE:
        # About 32 of the 64 pixels per side of a grating, at most 1.6 pixels from its middle.
        scale = 0.5 + random_numbers(backgrounds, 0.025, 1, 1)
        shift = random_numbers(backgrounds, 0.05, 2, 1)
    else:
        scale = 0.85 + random_numbers(backgrounds, 0.15, 1, 1)
        shift = 0.9 * (1 - scale) * random_numbers(backgrounds, 1, 2, 1)
    angle = random_numbers(backgrounds, math.radians(3))
    return warp(backgrounds, SIZE, angle, 0, scale, shift)


def random_numbers(images, reach, *shape):  # (B, *shape) in [-reach, reach], for B images
    return torch.empty(len(images), *shape).uniform_(-reach, reach)


def warp(images, size, angle, shear, scale, shift, bend=0):
    """Images with `size` pixels per side, whose pixel x shows the place A x + shift + bend.

    A is scale * R(angle) @ [[1, shear], [0, 1]].
    """
    cos, sin = angle.cos(), angle.sin()
    matrix = torch.stack([cos, shear * cos - sin, sin, shear * sin + cos], dim=1)
    affine = torch.cat([scale * matrix.view(-1, 2, 2), shift], dim=2)  # (B, 2, 3)
    grid = F.affine_grid(affine, (len(images), 1, size, size), align_corners=False)
    return F.grid_sample(images, grid + bend, padding_mode="border", align_corners=False)


# ---- A small encoder -----------------------------------------------------------------------------
def make_encoder(size):
    """Convolutions, then one layer on all positions: (B, 1, size, size) -> (B, 128)."""
    layers = []
    for inputs, outputs, kernel in zip((1, *WIDTHS), WIDTHS, (4, 3, 3)):
        layers += [nn.Conv2d(inputs, outputs, kernel, stride=2), LayerNorm2d(outputs), nn.GELU()]
    # Without padding, a position of the last feature map sees exactly 16 x 16 pixels, and the next
    # one is 8 pixels away. So a window gives one position, and an image gives 3 x 3 of them.
    positions = (size // 8 - 1) ** 2
    # The mean over the positions would lose where the digit is.
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(WIDTHS[-1] * positions, 128))


def make_head(dim):
    """(B, 128) -> (B, dim)"""
    return nn.Sequential(nn.Linear(128, dim), nn.BatchNorm1d(dim, affine=False))


def make_pmsn(encoder, num_prototypes, exponent, dim):
    """PMSN without masking for one of our small encoders, with embeddings of this dimension."""
    prior = pmsn.power_law_prior(num_prototypes, exponent)
    return pmsn.PMSN(encoder, prior, head=make_head(dim), output_dim=dim, patch_drop=0.0)


def schedule(done):
    """Learning rate, sharpening and EMA momentum when this share of the training is done."""
    warmup = min(1, 20 * done + 0.02)
    decay = 0.55 + 0.45 * math.cos(math.pi * done)  # from 1 to 0.1
    # Soft targets and a fast target network let the first clusters still change.
    sharpening = max(0.25, 0.6 - 0.5 * done)
    ema_momentum = 0.9 + 0.09 * min(1, 1.5 * done)
    return 2e-3 * warmup * decay, sharpening, ema_momentum
