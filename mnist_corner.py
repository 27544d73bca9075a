r"""The corner experiment (paper, section 5.1 and figure 3): the prior decides what is encoded.

Each image has a digit in one corner and a background, so images can be grouped in two ways. One of
the two features is long-tailed, and the other one is balanced. PMSN encodes the feature whose
frequencies are those of its prior: with a power-law prior the long-tailed one, and with the uniform
prior (MSN) the balanced one. This holds whichever of the two features is the long-tailed one.

    python mnist_corner.py              # synthetic data, no download, two minutes on two cores
    python mnist_corner.py --quick      # the same with too little data, half a minute
    python mnist_corner.py --curve --seeds 0 1 2     # seven priors, from uniform to steep
    python mnist_corner.py --mnist      # MNIST over ten images of CIFAR-10 (torchvision loads them)
    python mnist_corner.py --ordinary   # one start on whole images, which encodes both features

The loss has local minima, as the objective of K-means has. So we start twice for each prior, from
the same weights and on the same batches: one start sees only the corner with the digit, the other
one only the opposite corner, where there is no digit. Each start has 32 tries, as K-means has
several initializations: 32 heads with prototypes of their own on one encoder. The try with the
lowest loss goes on with whole images. So the result is what the *loss* prefers, and not what a
single run finds: an ordinary run on whole images encodes both features under both priors.

No label reaches the training. Not in the paper: these starts, the small encoder, no masking, and
the prior in any order (`in_order_of` in pmsn.py). --fixed_order is the loss of the paper.
--out gets results.json, neighbors.png (figure 3), preference.png (the loss of every try), and the
models.
"""

import argparse
import copy
import functools
import itertools
import math
import multiprocessing
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageFont, ImageOps
from torch import nn
from torchvision.models.convnext import LayerNorm2d
from torchvision.transforms import v2

import pmsn
from experiments import (Figure, cell, finite, number, number_of_seeds, parse, print_any_text,
                         run_in_processes, save, summarize)
import matplotlib

SIZE = 32  # pixels per side of an image
# What a start sees: the first row, the first column, and the pixels per side.
DIGIT, BACKGROUND, WHOLE = (0, 0, 16), (16, 16, 16), (0, 0, SIZE)
LABELS = ("digit", "background")
EXPONENT = 1.0  # of the long-tailed feature, and of the power-law prior
CURVE = (0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0)  # the exponents of --curve
BATCH_SIZE, DIM = 256, 32  # images per batch, dimension of the embeddings
# Everything in which the two kinds of data differ. `deform` is how much digits change their shape
# from view to view, and `contrast` is the contrast of the backgrounds, both from 0 to 1.
SYNTHETIC = {"deform": 0.3, "contrast": 0.8, "images": 15360, "epochs": 6, "loss_options": {}}
MNIST = {"deform": 0.0, "contrast": 1.0, "images": 30720, "epochs": 6,
         "loss_options": {"prior_weight": 3.0, "sinkhorn_iterations": 3}}

# ---- Data: gray images (N, 1, h, w) and labels (N,) ----------------------------------------------
def load_digits(args):
    """Digits for training and for the test. The synthetic ones are the same, in other shapes."""
    if args.mnist:
        splits = [torchvision.datasets.MNIST(args.root, train, download=True)
                  for train in (True, False)]
        splits = [(split.data[:, None] / 255, split.targets) for split in splits]
    else:
        # Each digit has one shape. With many fonts, groups of fonts would fit any prior.
        splits = [draw_digits("DejaVuSans")] * 2
    return [(v2.functional.resize(images, 20, antialias=True), labels) for images, labels in splits]

def draw_digits(font):
    images = draw("0123456789", [font], (40, 29))  # All digits get the same height.
    return F.pad(images / 255, (0, 0, 5, 6)), torch.arange(10)

def draw(characters, fonts, size):
    """White on black, in fonts that come with matplotlib: (fonts * characters, 1, h, w), uint8."""
    images = []
    for name, character in itertools.product(fonts, characters):
        font = ImageFont.truetype(f"{matplotlib.get_data_path()}/fonts/ttf/{name}.ttf", 40)
        mask = font.getmask(character)
        image = ImageOps.pad(Image.frombytes("L", mask.size, bytes(mask)), size)
        images.append(v2.functional.pil_to_tensor(image))
    return torch.stack(images)

def load_backgrounds(args):
    """Ten backgrounds (10, 1, h, w): gratings, or the first image of each class of CIFAR-10."""
    if args.mnist:
        gray = v2.Compose([v2.Grayscale(), v2.Resize(SIZE), v2.CenterCrop(SIZE), v2.PILToTensor()])
        if args.backgrounds:
            data = torchvision.datasets.ImageFolder(args.backgrounds, gray)
        else:
            data = torchvision.datasets.CIFAR10(args.root, transform=gray, download=True)
        _, first = np.unique(data.targets, return_index=True)
        images = torch.stack([data[i][0] for i in first]).float()
        std, mean = torch.std_mean(images, dim=(2, 3), keepdim=True)
        return 0.5 + 0.35 * (images - mean) / std.clamp_min(1)  # the contrast of the gratings
    return draw_gratings()

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
    """Random indices of `count` images. Class k = 1, 2 ... has a frequency of k^-exponent."""
    frequencies = pmsn.power_law_prior(int(labels.max()) + 1, exponent)
    weights = (frequencies / labels.bincount())[labels]
    return weights.multinomial(count, replacement=True)

def make_view(digits, backgrounds, settings):
    """Digits in a square over backgrounds, randomly changed: (B, 1, 32, 32), about in [-1, 1]."""
    images = 0.5 + settings["contrast"] * (background_view(backgrounds) - 0.5)
    crop(images, DIGIT)[:] = digit_view(digits, settings["deform"])
    return 2 * (images + 0.05 * torch.randn_like(images)) - 1

def crop(images, window):
    row, column, size = window
    return images[:, :, row : row + size, column : column + size]

def digit_view(digits, deform, size=16):
    """Digits in a random shape, (B, 1, size, size). At `deform` 0 nothing is random."""
    # If both views had the same shape, the uniform prior could split frequent digits by their shape
    # at no cost, and would encode the digit too.
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
        # Half of the side of a grating, which has 64 pixels, at most 1.6 pixels from its middle.
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
    """Images with `size` pixels per side, whose pixel x shows scale * R(angle) x + shift + bend."""
    cos, sin = angle.cos(), angle.sin()
    matrix = torch.stack([cos, shear * cos - sin, sin, shear * sin + cos], dim=1)
    affine = torch.cat([scale * matrix.view(-1, 2, 2), shift], dim=2)  # (B, 2, 3)
    grid = F.affine_grid(affine, (len(images), 1, size, size), align_corners=False)
    return F.grid_sample(images, grid + bend, padding_mode="border", align_corners=False)

# ---- Model ---------------------------------------------------------------------------------------
def make_encoder(size, widths=(16, 32, 64)):
    """Convolutions, then one layer on all positions: (B, 1, size, size) -> (B, 128)."""
    layers = []
    for inputs, outputs, kernel in zip((1, *widths), widths, (4, 3, 3)):
        layers += [nn.Conv2d(inputs, outputs, kernel, stride=2), LayerNorm2d(outputs), nn.GELU()]
    # Without padding, a position of the last feature map sees exactly 16 x 16 pixels, and the next
    # one is 8 pixels away. So a window gives one position, and an image gives 3 x 3 of them.
    positions = (size // 8 - 1) ** 2
    # The mean over the positions would lose where the digit is.
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(widths[-1] * positions, 128))

def make_head(dim):
    """(B, 128) -> (B, dim)"""
    return nn.Sequential(nn.Linear(128, dim), nn.BatchNorm1d(dim, affine=False))

class Start(nn.Module):
    """PMSN on one window of the images. Each try has its own head and prototypes."""
    def __init__(self, window, exponent, tries):
        super().__init__()
        self.window, self.exponent = window, exponent
        self.network = nn.Sequential(make_encoder(window[2]), make_head(tries * DIM))
        self.target = copy.deepcopy(self.network).requires_grad_(False)
        self.prototypes = nn.Parameter(torch.empty(tries, 10, DIM).uniform_(-1, 1))
        self.prior = pmsn.power_law_prior(10, exponent)

    def forward(self, views, **loss_options):
        """A target view and an anchor view (B, 1, 32, 32) -> the loss of every try (tries,)."""
        target_view, anchor_view = (crop(view, self.window) for view in views)
        anchors = self.network(anchor_view).unflatten(1, (-1, DIM))  # (B, tries, DIM)
        with torch.no_grad():
            targets = self.target(target_view).unflatten(1, (-1, DIM))
        loss = functools.partial(pmsn.pmsn_loss, prior=self.prior, **loss_options)
        # vmap computes the loss of one try after the other, but faster.
        losses, _ = torch.vmap(loss, in_dims=(1, 1, 0))(anchors, targets, self.prototypes)
        return losses

@torch.no_grad()
def widen(start, best):
    """The start with its best try for whole images. At first it computes exactly the same."""
    row, column, size = start.window
    whole = Start(WHOLE, start.exponent, tries=1)
    entries = slice(best * DIM, (best + 1) * DIM)
    for old, new in ((start.network, whole.network), (start.target, whole.target)):
        (old_encoder, old_head), (new_encoder, new_head) = old, new
        new_encoder[:-1].load_state_dict(old_encoder[:-1].state_dict())
        weight = old_encoder[-1].weight  # (128, 64 * positions)
        if size < SIZE:
            positions = torch.zeros(128, 64, 3, 3)  # The weight is 0 at the other eight positions.
            positions[:, :, row // 8, column // 8] = weight
            weight = positions.flatten(1)
        new_encoder[-1].weight.copy_(weight)
        new_encoder[-1].bias.copy_(old_encoder[-1].bias)
        new_head[0].weight.copy_(old_head[0].weight[entries])
        new_head[0].bias.copy_(old_head[0].bias[entries])
        new_head[1].running_mean.copy_(old_head[1].running_mean[entries])
        new_head[1].running_var.copy_(old_head[1].running_var[entries])
    whole.prototypes.copy_(start.prototypes[best : best + 1])
    return whole

# ---- Training ------------------------------------------------------------------------------------
def schedule(done):
    """Learning rate, sharpening and EMA momentum when this share of the training is done."""
    warmup = min(1, 20 * done + 0.02)
    decay = 0.55 + 0.45 * math.cos(math.pi * done)  # from 1 to 0.1
    # Soft targets and a fast target network let the first clusters still change.
    sharpening = max(0.25, 0.6 - 0.5 * done)
    ema_momentum = 0.9 + 0.09 * min(1, 1.5 * done)
    return 2e-3 * warmup * decay, sharpening, ema_momentum

def train(starts, stage, epochs, data, settings, title):
    """Train all starts on the same batches and views. Returns their losses in the last epoch."""
    # `data` has (images, indices into them) of the digits and of the backgrounds, without labels.
    steps_per_epoch = settings["images"] // BATCH_SIZE
    optimizers = [torch.optim.AdamW(start.parameters(), weight_decay=0.05) for start in starts]
    began = time.time()
    for epoch in range(epochs):
        losses = [torch.zeros(len(start.prototypes)) for start in starts]  # (tries,) each
        batches = torch.randperm(settings["images"]).split(BATCH_SIZE)
        for step, batch in enumerate(batches[:steps_per_epoch]):
            done = (epoch + step / steps_per_epoch) / epochs  # from 0 to 1
            lr, sharpening, ema_momentum = schedule(done)
            if stage == "whole":
                lr, sharpening, ema_momentum = lr / 2, 0.25, 0.99
            images = [bank[index[batch]] for bank, index in data]
            views = [make_view(*images, settings) for _ in range(2)]  # the target and one anchor

            for start, optimizer, total in zip(starts, optimizers, losses):
                loss = start(views, sharpening=sharpening, **settings["loss_options"])
                optimizer.param_groups[0]["lr"] = lr
                optimizer.zero_grad()
                loss.sum().backward()
                nn.utils.clip_grad_norm_(start.parameters(), 3.0)
                optimizer.step()
                pmsn.move_target(start.target, start.network, ema_momentum)
                total += loss.detach() / steps_per_epoch
        left = (time.time() - began) * (epochs / (epoch + 1) - 1)
        lowest = "".join(f"{loss.min():>7.3f}" for loss in losses)
        print(f"{title}{stage:>8}{epoch + 1:>6}{left:>6.0f}s {lowest}", flush=True)
    return losses

# ---- One experiment ------------------------------------------------------------------------------
def experiment(seed, long_tailed, args):
    """One seed and one kind of data, all priors: -> entries of results.json, images of figure 3."""
    torch.set_num_threads(1)  # faster here, and the same bits for any number of processes
    torch.manual_seed(seed)
    settings = make_settings(args)
    (digits, digit_labels), (test_digits, test_labels) = load_digits(args)
    backgrounds, kinds = load_backgrounds(args), torch.arange(10)
    digit_index = sample(digit_labels, kinds_exponent("digit", long_tailed), settings["images"])
    kind_index = sample(kinds, kinds_exponent("background", long_tailed), settings["images"])
    data = [(digits, digit_index), (backgrounds, kind_index)]

    windows = {"whole": WHOLE} if args.ordinary else {"digit": DIGIT, "background": BACKGROUND}
    starts = {}
    for exponent, name in itertools.product(args.exponents, windows):
        torch.manual_seed(seed)  # All starts and all priors get the same weights.
        starts[exponent, name] = Start(windows[name], exponent, args.tries)
    title = f"{seed:>4}{long_tailed:>12}"
    losses = train(starts.values(), "windows", settings["epochs"], data, settings, title)
    losses = dict(zip(starts, losses))
    chosen, finals = {}, []
    for exponent in args.exponents:
        # Of two starts with 32 tries each, the try with the lowest loss goes on.
        chosen[exponent] = min(windows, key=lambda name: losses[exponent, name].min())
        best = exponent, chosen[exponent]
        finals.append(widen(starts[best], int(losses[best].argmin())))
    train(finals, "whole", math.ceil(settings["epochs"] / 3), data, settings, title)

    # The test images are balanced, so chance is .1 for both features.
    index, background = sample(test_labels, 0.0, 2000), sample(kinds, 0.0, 2000)
    test = {"images": make_view(test_digits[index], backgrounds[background], settings),
            "digit": test_labels[index], "background": background}
    # The sizes of prototypes are those of the training images.
    index, background = digit_index[:2000], kind_index[:2000]
    seen = {"images": make_view(digits[index], backgrounds[background], settings),
            "digit": digit_labels[index], "background": background}
    records, pictures = [], {}
    for final in finals:
        exponent = final.exponent
        save(as_pmsn(final).state_dict(), model_path(args.out, long_tailed, exponent, seed))
        results, features = measure(final, test, seen)
        if not args.mnist:
            results["other_font"] = other_font(final, features, test, settings)
        tries = {name: losses[exponent, name].tolist() for name in windows}
        results |= {f"{name}_window": min(values) for name, values in tries.items()}
        records.append({"seed": seed, "long_tailed": long_tailed, "exponent": exponent,
                        "chosen": chosen[exponent], "results": finite(results), "tries": tries})
        _, queries = np.unique(test["digit"], return_index=True)  # the first image of each digit
        _, nearest = pmsn.nearest_neighbors(features[queries], features, 9)
        pictures[exponent] = {what: test[what][nearest].numpy() for what in ("images", *LABELS)}
    return records, pictures

def make_settings(args):
    settings = dict(MNIST if args.mnist else SYNTHETIC)
    settings["loss_options"] = {**settings["loss_options"], "any_order": not args.fixed_order}
    if args.quick:
        settings |= {"images": 2048, "epochs": 2}
    return settings

def kinds_exponent(feature, long_tailed):
    return EXPONENT if feature == long_tailed else 0.0

def model_path(folder, long_tailed, exponent, seed):
    return folder / f"model_{long_tailed}_{exponent:g}_{seed}.pt"

def as_pmsn(start):
    """The first try of a start that sees whole images, as a model of pmsn.py."""
    model = make_model(make_encoder(SIZE), 10, start.exponent)
    model.encoder, model.head = start.network
    model.target_encoder, model.target_head = start.target
    model.prototypes = nn.Parameter(start.prototypes[0].detach())
    return model

def make_model(encoder, num_prototypes, exponent, dim=DIM):
    prior = pmsn.power_law_prior(num_prototypes, exponent)
    return pmsn.PMSN(encoder, prior, head=make_head(dim), output_dim=dim, patch_drop=0.0)

# ---- Measures ------------------------------------------------------------------------------------
@torch.no_grad()
def measure(start, test, seen):
    """What encoder, projection and prototypes know, and the features (N, 128) of test images."""
    encoder, head = start.target.eval()
    features = encoder(test["images"])
    nearest = pmsn.cosine(head(encoder(seen["images"])), start.prototypes[0]).argmax(dim=1)
    results = {}
    for what in LABELS:
        results[f"same_{what}"] = agreement(features, test[what])
        results[f"projection_{what}"] = agreement(head(features), test[what])
        results[f"prototype_{what}"] = purity(nearest, seen[what])
    return results, features

def agreement(features, labels):
    """Share of the 10 nearest neighbors, without the image itself, that have its label."""
    _, nearest = pmsn.nearest_neighbors(features, features, 11)
    return (labels[nearest[:, 1:]] == labels[:, None]).float().mean().item()

def purity(groups, labels):
    """The share of images that have the most frequent label of their group."""
    counts = torch.zeros(int(groups.max()) + 1, int(labels.max()) + 1)
    counts.index_put_((groups, labels), torch.ones(()), accumulate=True)
    return (counts.amax(dim=1).sum() / len(groups)).item()

@torch.no_grad()
def other_font(start, features, test, settings):
    """How often neighbors of digits in two fonts that were not in the training share the digit."""
    images, labels = zip(*[draw_digits(font) for font in ("DejaVuSerif", "STIXGeneral")])
    images = v2.functional.resize(torch.cat(images), 20, antialias=True)
    index = torch.arange(20).repeat(50)
    backgrounds = draw_gratings()[torch.randint(10, index.shape)]
    queries = start.target[0](make_view(images[index], backgrounds, settings))
    _, nearest = pmsn.nearest_neighbors(queries, features, 10)
    return (test["digit"][nearest] == torch.cat(labels)[index, None]).float().mean().item()

# ---- What a loss could be at best ----------------------------------------------------------------
def exact_loss(kinds_exponent, prior_exponent, loss_options):
    """The loss of a network that groups ten kinds exactly: each kind has its own prototype."""
    # In a batch of 256 images the frequencies are not exact. So this is above 0 also for the prior
    # of the kinds.
    kinds = sample(torch.arange(10), kinds_exponent, 100 * BATCH_SIZE)
    corners, prior = torch.eye(10), pmsn.power_law_prior(10, prior_exponent)
    losses = [pmsn.pmsn_loss(corners[batch], corners[batch], corners, prior, **loss_options)[0]
              for batch in kinds.split(BATCH_SIZE)]
    return torch.stack(losses).mean().item()

def find_bounds(long_tailed, prior_exponent, loss_options):
    """{feature: {"exact": loss of the exact grouping, "lowest": lowest loss of any grouping}}"""
    torch.manual_seed(0)
    bounds = {}
    for feature in LABELS:
        of_kinds = kinds_exponent(feature, long_tailed)
        bounds[feature] = {
            "exact": exact_loss(of_kinds, prior_exponent, loss_options),
            "lowest": lowest_loss(of_kinds, prior_exponent, loss_options["any_order"])}
    return bounds

def lowest_loss(kinds_exponent, prior_exponent, any_order=False, tries=100, steps=400):
    """The lowest loss of any network that sees nothing but the kind of an image, of ten kinds.

    It can give a frequent kind several prototypes, and it can put rare kinds together. We search by
    gradient descent over a table with the prediction for each kind, from many starting points.
    """
    shares, prior = (pmsn.power_law_prior(10, x) for x in (kinds_exponent, prior_exponent))
    tables = (3 * torch.randn(tries, 10, 10)).requires_grad_()  # logits of each kind
    optimizer = torch.optim.Adam([tables], lr=0.05)

    def loss_of(table, sharpening):
        log_p = table.log_softmax(dim=1)  # (kinds, K)
        p_target = pmsn.sharpen(log_p, sharpening).exp().detach()
        p_bar = shares @ log_p.exp()
        log_prior = pmsn.in_order_of(p_bar, prior.log()) if any_order else prior.log()
        return shares @ -(p_target * log_p).sum(dim=1) + (p_bar * (p_bar.log() - log_prior)).sum()

    for step in range(steps):
        sharpening = max(0.25, 1 - 1.5 * step / steps)  # as above, and slower
        losses = torch.vmap(functools.partial(loss_of, sharpening=sharpening))(tables)
        optimizer.zero_grad()
        losses.sum().backward()
        optimizer.step()
    return losses.min().item()

# ---- Figures -------------------------------------------------------------------------------------
def plot_neighbors(pictures, summary, path):
    """Figure 3, two by two: which feature is long-tailed, and which prior."""
    figure = Figure(figsize=(13, 8.6), layout="constrained")
    axes = figure.subplots(2, 2)
    matches = 0
    for row, long_tailed in zip(axes, LABELS):
        for ax, exponent in zip(row, (EXPONENT, 0.0)):
            shown = pictures[long_tailed, exponent]
            same = {what: shown[what] == shown[what][:, :1] for what in LABELS}  # (10, 9)
            # Frames of 3 pixels: above in green for the same digit, below in blue for the same
            # background, and black for the image itself, which comes first.
            tiles = np.ones((10, 9, 38, 38, 3))
            tiles[same["digit"], :19] = 0.24, 0.62, 0.3
            tiles[same["background"], 19:] = 0.19, 0.39, 0.75
            tiles[:, 0] = 0
            tiles[..., 3:-3, 3:-3, :] = shown["images"][:, :, 0, :, :, None].clip(-1, 1) / 2 + 0.5
            ax.imshow(tiles[:5].transpose(0, 2, 1, 3, 4).reshape(190, 342, 3))
            ax.set_axis_off()
            found = summary[long_tailed, exponent]
            digit, background = (found[f"same_{what}"]["mean"] for what in LABELS)
            encoded = "digit" if digit > background else "background"
            matches += (encoded == long_tailed) == (exponent > 0)
            ax.set_title(f"long-tailed {long_tailed}s, {'power-law' if exponent else 'uniform'} "
                         f"prior: same {encoded}\n"
                         f"(same digit {digit:.2f}, same background {background:.2f})")
    figure.suptitle("Neighbors share the long-tailed feature under the power-law prior, and the "
                    f"balanced one under the uniform prior: {matches} of 4")
    figure.supxlabel("Each row: an image (black frame) and its nearest neighbors, last seed (green "
                     "above: same digit, blue below: same background).\n"
                     f"Numbers: 10 neighbors, mean over n = {number_of_seeds(summary)} seeds")
    figure.savefig(path)

def plot_preference(records, bounds, path):
    """The loss of every try of both starts, and the lowest possible losses."""
    exponents = sorted({record["exponent"] for record in records})
    figure = Figure(figsize=(6.5 + len(exponents), 5.5), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    wins = 0
    for ax, long_tailed in zip(axes, LABELS):
        panel = [record for record in records if record["long_tailed"] == long_tailed]
        for name, color, shift in zip(LABELS, ("#3d9e4d", "#3063bf"), (-0.17, 0.17)):
            label = f"start that sees the {name}, one dot per try"
            for place, exponent in enumerate(exponents):
                tries = [loss for record in panel if record["exponent"] == exponent
                         for loss in record["tries"][name]]
                places = place + shift + np.linspace(-0.12, 0.12, len(tries))
                ax.plot(places, tries, ".", color=color, alpha=0.5, label=label)
                if bounds:
                    for bound, style in (("exact", ":"), ("lowest", "-")):
                        loss = bounds[long_tailed, exponent][name][bound]
                        ax.hlines(loss, place + shift - 0.16, place + shift + 0.16, color, style)
                label = None
        wins += sum(record["chosen"] == long_tailed for record in panel if record["exponent"] > 0)
        wins += sum(record["chosen"] != long_tailed for record in panel if record["exponent"] == 0)
        ax.set_xticks(range(len(exponents)), [f"{exponent:g}" for exponent in exponents])
        other = LABELS[LABELS[0] == long_tailed]
        ax.set(title=f"long-tailed {long_tailed}s, balanced {other}s",
               xlabel="exponent of the prior (0: uniform)")
    axes[0].set_ylim(-0.01)
    axes[0].set_ylabel("loss (nats)")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2)
    seeds = len({record["seed"] for record in records})
    figure.suptitle(f"{wins} of {len(records)} times (n = {seeds} seeds), the lowest loss is that of "
                    "the long-tailed\nfeature (power law) or of the balanced one (uniform prior)")
    if bounds:
        figure.supxlabel("Lines: the lowest possible loss of any grouping by this feature (solid), "
                         "and of the exact one (dotted)", fontsize="medium")
    figure.savefig(path)

# ---- Command line --------------------------------------------------------------------------------
def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--mnist", action="store_true", help="MNIST and CIFAR-10 in place of drawn images")
    add("--root", default="data", help="where torchvision finds data sets, or downloads them")
    add("--backgrounds", help="with --mnist: a folder with ten folders of images, for CIFAR-10")
    add("--out", type=Path, default="runs/corner", help="folder for results and figures")
    add("--seeds", type=number(int, 0, 2_000_000_000), nargs="+", default=[0], help="one run each")
    add("--curve", action="store_true", help="seven priors instead of two")
    add("--ordinary", action="store_true", help="one start, on whole images")
    add("--tries", type=number(int, 1, 1000), default=32, help="heads and prototypes per start")
    add("--fixed_order", action="store_true", help="the loss of the paper: see pmsn.in_order_of")
    add("--workers", type=number(int, 1), default=multiprocessing.cpu_count(), help="processes")
    add("--quick", action="store_true", help="few images and epochs, in half a minute")
    args = parse(parser, argv)
    if args.backgrounds and not args.mnist:
        parser.error("--backgrounds is for --mnist")
    args.exponents = CURVE if args.curve else (0.0, EXPONENT)
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        load_digits(args)
        load_backgrounds(args)
    except (OSError, RuntimeError) as error:
        parser.error(f"cannot load the data or write to --out: {' '.join(str(error).split())}")

    settings = make_settings(args)
    print("lowest loss of each start: for each prior, of the digit and of the background window\n"
          "seed long-tailed   stage epoch   left   losses", flush=True)
    began, jobs = time.time(), list(itertools.product(args.seeds, LABELS))
    found = run_in_processes(experiment, jobs, args)
    records = sum((records for records, _ in found), [])
    config = {**vars(args), **settings, "torch": torch.__version__}
    # The results come first. Nothing that goes wrong with the table or a figure can lose them.
    save({"config": config, "runs": records}, args.out / "results.json")
    summary = summarize(records, key=lambda record: (record["long_tailed"], record["exponent"]))
    print(f"\nmean ± std over n = {len(args.seeds)} seeds")
    columns = [column for column in ("digit_window", "background_window", "same_digit",
               "same_background", "prototype_digit", "prototype_background", "other_font")
               if any(column in row for row in summary.values())]
    print("long-tailed prior" + "".join(f"{column:>21}" for column in columns))
    for (long_tailed, exponent), row in summary.items():
        print(f"{long_tailed:>11}{exponent:>6.2f}"
              + "".join(f"{cell(row, column):>21}" for column in columns))
    bounds = {}
    if not args.mnist and not args.ordinary:
        bounds = {arm: find_bounds(*arm, settings["loss_options"]) for arm in summary}
        print("\nThe loss of the exact grouping by a feature, and the lowest of any such grouping")
        for (long_tailed, exponent), features in bounds.items():
            print(f"{long_tailed:>11}{exponent:>6.2f}   " + "   ".join(
                f"{name} {bound['exact']:.3f} {bound['lowest']:.3f}"
                for name, bound in features.items()))
    pictures = {(records[0]["long_tailed"], exponent): picture
                for records, of_job in found for exponent, picture in of_job.items()}
    plot_neighbors(pictures, summary, args.out / "neighbors.png")  # of the last seed
    if not args.ordinary:
        plot_preference(records, bounds, args.out / "preference.png")
    print(f"After {time.time() - began:.0f} s, results.json and the figures are in {args.out}")

if __name__ == "__main__":
    print_any_text()
    main()
