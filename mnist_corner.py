"""The corner experiment (paper section 5.1, figure 3): what the prior decides, seen in nearest neighbours.

Images with a digit in the top-left corner over a background. The digits are long-tailed, the ten kinds of background
balanced, so that the images can be grouped in two ways. PMSN is trained twice, from the same weights, on the same
batches, with the same hyper-parameters. With a power-law prior that matches the digits it encodes the digit; with
the uniform prior (= MSN) it encodes the background. Labels choose which images exist and measure the results;
training never sees them.

    python mnist_corner.py                                        # embedded data, no download
    python mnist_corner.py --quick                                # the same path end to end in under a minute
    python mnist_corner.py --digits MNIST --backgrounds CIFAR10   # the paper's setting; downloads to --root
    python mnist_corner.py --digits MNIST --backgrounds FOLDER    # a folder of images for each kind of background

The loss has local minima, like that of K-means, and the remedy is that of K-means: several starts, of which each
prior goes on with the one whose loss is lowest. Each start sees one quarter of the images, the first that with the
digit; then the rest fades in (see `train`). `--starts 0` does without. Sharpening is relative to the prior, targets
are projected onto it by Sinkhorn, and KL has the weight 3, for both priors; the paper's plain loss has none of these.

Writes results.json, neighbours.png, prototypes.png and training.png to --out.
"""

import argparse
import json
import math
import os
import platform
import sys
import tempfile
import time
from functools import cache, partial
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageDraw, ImageFont
from torch import nn
from torchvision.transforms import v2

import pmsn

COLOURS = {"power_law": "#d1495b", "uniform": "#30638e"}  # the same in every figure
NAMES = {"power_law": "power-law prior (PMSN)", "uniform": "uniform prior (MSN)"}
SIZE, CORNER = 32, 16  # pixels: the image, the digit in its corner
TERMS = ("cross_entropy", "prior_kl", "effective_prototypes")  # of pmsn_loss, as history and curves show them
QUARTERS = [(0, 0), (0, 16), (16, 0), (16, 16)]  # top, left of what each start sees first


class UserError(Exception):
    """Something the user can put right: one line, exit status 2."""


# ---- Data: digits and backgrounds as greyscale banks, pasted together and augmented when a batch is made ------------


def drawn_digits():
    """The ten digits in the text fonts that ship with matplotlib: (N, 1, 40, 40) in [0, 1], labels (N,)."""
    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    names = [f"DejaVu{family}{style}" for family in ("Sans", "SansMono", "Serif") for style in ("", "-Bold")]
    names += ["STIXGeneral", "STIXGeneralBol", "cmr10", "cmb10", "cmss10", "cmtt10"]
    images = []
    for name in names:
        font = ImageFont.truetype(str(folder / f"{name}.ttf"), 40)
        for digit in range(10):
            canvas = Image.new("L", (80, 80))
            ImageDraw.Draw(canvas).text((20, 10), str(digit), fill=255, font=font)
            glyph = canvas.crop(canvas.getbbox())
            glyph = glyph.resize((round(glyph.width * 29 / glyph.height), 29), Image.BICUBIC)
            canvas = Image.new("L", (40, 40))
            canvas.paste(glyph, ((40 - glyph.width) // 2, 5))
            images.append(v2.functional.pil_to_tensor(canvas))
    return torch.stack(images).float() / 255, torch.arange(10).repeat(len(names))


def drawn_backgrounds():
    """Gratings of five orientations and two periods, ten kinds: (10, 1, 64, 64) in [0, 1], labels (10,)."""
    y, x = torch.meshgrid(torch.arange(64.0), torch.arange(64.0), indexing="ij")
    angle = torch.arange(5).repeat(2)[:, None, None] * math.pi / 5
    period = torch.tensor([4.0, 9.0]).repeat_interleave(5)[:, None, None]
    wave = torch.sin(2 * math.pi * (x * angle.cos() + y * angle.sin()) / period)
    return (0.5 + 0.5 * wave)[:, None], torch.arange(10)


def load_digits(name, root, train):
    """Digit images (N, 1, h, w) in [0, 1] and labels (N,) 0..9. Drawn ones are the same for training and test."""
    if name == "drawn":
        return drawn_digits()
    data = download(getattr(torchvision.datasets, name), name, root, train)
    return data.data[:, None].float() / 255, data.targets


def load_backgrounds(name, root, train, scenes):
    """Background images (N, 1, h, w), their kinds (N,), and the share of their side that a view shows (low, high).

    `scenes` is the number of images of each kind, None for all. Every fifth image of a folder's kind is held out,
    unless `scenes` limits the backgrounds: then training and test show the same ones in fresh views."""
    if name == "drawn":
        return *drawn_backgrounds(), (0.475, 0.525)
    if name in ("CIFAR10", "CIFAR100"):
        data = download(getattr(torchvision.datasets, name), name, root, train or scenes is not None)
        images, kinds = torch.from_numpy(data.data).permute(0, 3, 1, 2), torch.tensor(data.targets)
        images = v2.functional.rgb_to_grayscale(images).float()
    else:
        images, kinds = load_folder(name)
    keep = torch.arange(len(kinds))
    if scenes is not None:
        keep = torch.cat([(kinds == kind).nonzero().flatten()[:scenes] for kind in kinds.unique()])
    elif name not in ("CIFAR10", "CIFAR100"):
        place = torch.cat([torch.arange(n) for n in torch.bincount(kinds).tolist()])  # of an image within its kind
        keep = keep[(place % 5 != 0) if train else (place % 5 == 0)]
        if len(kinds[keep].unique()) < len(kinds.unique()):
            raise UserError(f"--backgrounds {name} has a kind of one image, which cannot be held out; use --scenes 1")
    images, kinds = images[keep], kinds[keep]
    deviation, mean = torch.std_mean(images, dim=(2, 3), keepdim=True)
    return 0.5 + 0.35 * (images - mean) / deviation.clamp_min(1), kinds, (0.7, 1.0)  # .35: as the gratings


@cache  # training and test images of every seed come from the same files
def load_folder(folder):
    """Greyscale images (N, 1, 32, 32) in 0..255 of an ImageFolder, and their classes (N,)."""
    if not Path(folder).is_dir():
        raise UserError(f"--backgrounds {folder}: neither drawn, CIFAR10, CIFAR100 nor a folder that exists")
    try:
        data = torchvision.datasets.ImageFolder(folder)
    except FileNotFoundError as error:
        raise UserError(f"--backgrounds {folder} must hold one folder of images for each kind: {error}") from None
    if len(data.classes) < 2:
        raise UserError(f"--backgrounds {folder} holds one kind of background; at least two are needed")
    shape = v2.Compose([v2.Grayscale(), v2.Resize(SIZE), v2.CenterCrop(SIZE), v2.PILToTensor()])
    images = []
    for path, _ in data.samples:
        try:
            images.append(shape(data.loader(path)))
        except (OSError, SyntaxError) as error:  # PIL raises both
            raise UserError(f"cannot read the image {path}: {error}; remove or replace it") from None
    return torch.stack(images).float(), torch.tensor(data.targets)


def download(dataset, name, root, train):
    try:
        return dataset(root, train=train, download=True)
    except (OSError, RuntimeError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"{name} is not in {root} and could not be downloaded ({reason}); "
                        "--digits drawn --backgrounds drawn need no download") from None


def draw(labels, prior, count, seed):
    """`count` indices whose labels follow `prior`, no image used more often than it must be."""
    repeats = math.ceil((count * prior / torch.bincount(labels, minlength=len(prior))).max()) + 1
    pool = torch.arange(len(labels)).repeat(repeats)
    return pool[pmsn.long_tail_indices(labels[pool], prior, num_images=count, seed=seed)]


class CornerImages:
    """Pairs of a digit and a background; `view(i)` draws images (B, 1, 32, 32) of pairs i (B,), shape changed anew."""

    def __init__(self, args, digit_prior, count, train, seed, device):
        digits, digit_labels = load_digits(args.digits, args.root, train)
        backgrounds, kinds, self.zoom = load_backgrounds(args.backgrounds, args.root, train, args.scenes)
        digit = draw(digit_labels, digit_prior, count, seed)
        background = draw(kinds, pmsn.uniform_prior(int(kinds.max()) + 1), count, seed + 1)
        count = min(len(digit), len(background))
        if train and count < args.batch_size:
            raise UserError(f"--batch_size {args.batch_size} is larger than the data set of {count} images")
        digit, background = digit[:count], background[:count]
        self.digit_labels, self.kinds = digit_labels[digit].to(device), kinds[background].to(device)
        self.digits = F.interpolate(digits, size=20, mode="bilinear", antialias=True).to(device)
        self.backgrounds = backgrounds.to(device)
        self.digit, self.background = digit.to(device), background.to(device)
        self.contrast, self.deform = args.contrast, args.deform

    def __len__(self):
        return len(self.digit)

    def view(self, i):
        digit, background = self.digits[self.digit[i]], self.backgrounds[self.background[i]]
        images = 0.5 + self.contrast * (background_view(background, self.zoom) - 0.5)
        images[:, :, :CORNER, :CORNER] = digit_view(digit, self.deform)
        return 2 * (images + 0.05 * torch.randn_like(images)) - 1


def uniform(images, reach, *shape):
    """Numbers in [-reach, reach], (B, *shape), on the images' device."""
    return torch.empty(len(images), *shape, device=images.device).uniform_(-reach, reach)


def digit_view(digits, reach):
    """Digits in a random shape, (B, 1, h, w) -> (B, 1, 16, 16): affine, elastic and stroke width.

    At `reach` 1 up to 20 degrees, a shear of .25, 15% of size, 1.6 pixels of shift. Without shape changes both views
    share an image's handwriting, and splitting the head digit by handwriting costs the uniform prior nothing."""
    angle, shear = uniform(digits, reach * math.radians(20)), uniform(digits, reach * 0.25)
    x, y = uniform(digits, reach * 0.15).exp(), uniform(digits, reach * 0.15).exp()
    matrix = torch.stack([x * angle.cos(), x * (shear * angle.cos() - angle.sin()),
                          y * angle.sin(), y * (shear * angle.sin() + angle.cos())], dim=1).view(-1, 2, 2)
    matrix = torch.cat([matrix, uniform(digits, reach * 0.2, 2, 1)], dim=2)
    grid = F.affine_grid(matrix, (len(digits), 1, CORNER, CORNER), align_corners=False)
    bend = F.interpolate(uniform(digits, reach * 0.12, 2, 4, 4), size=CORNER, mode="bicubic", align_corners=True)
    digits = F.grid_sample(digits, grid + bend.permute(0, 2, 3, 1), align_corners=False)
    ink = (digits + F.avg_pool2d(digits, 3, stride=1, padding=1)) / 2
    return torch.sigmoid(12 * (ink - 0.4 - uniform(digits, reach * 0.2, 1, 1, 1)))


def background_view(backgrounds, zoom):
    """A random crop of every background, turned by up to 3 degrees, (B, 1, h, w) -> (B, 1, 32, 32)."""
    angle = uniform(backgrounds, math.radians(3))
    share = sum(zoom) / 2 + uniform(backgrounds, (zoom[1] - zoom[0]) / 2)
    shift = uniform(backgrounds, 1, 2, 1) * (1 - share)[:, None, None] * 0.9
    matrix = torch.stack([share * angle.cos(), -share * angle.sin(), share * angle.sin(), share * angle.cos()], dim=1)
    matrix = torch.cat([matrix.view(-1, 2, 2), shift], dim=2)
    grid = F.affine_grid(matrix, (len(backgrounds), 1, SIZE, SIZE), align_corners=False)
    return F.grid_sample(backgrounds, grid, padding_mode="reflection", align_corners=False)


# ---- Training -----------------------------------------------------------------------------------------------------


class ConvEncoder(nn.Module):
    """(B, 1, 32, 32) -> (B, 128): three convolutions, flattened, so that place is not lost."""

    embed_dim = 128

    def __init__(self, width=32):
        super().__init__()
        layers, channels = [], 1
        for out, kernel in ((width, 5), (2 * width, 3), (2 * width, 3)):
            layers += [nn.Conv2d(channels, out, kernel, stride=2, padding=kernel // 2), nn.GroupNorm(1, out), nn.GELU()]
            channels = out
        self.layers = nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels * (SIZE // 8) ** 2, self.embed_dim))

    def forward(self, images):
        return self.layers(images)


def make_model(prior, args):
    """PMSN with a small head: linear, then BatchNorm without scale and shift, 64 dimensions."""
    head = nn.Sequential(nn.Linear(ConvEncoder.embed_dim, 64), nn.BatchNorm1d(64, affine=False))
    return pmsn.PMSN(ConvEncoder(), prior, head=head, output_dim=64, patch_drop=0.0, weight=args.weight,
                     sinkhorn_iterations=10, relative_sharpening=True)


def train(prior, data, test, args, seed, report):
    """PMSN with several starts, K-means' remedy for local minima: returns model, history and the starts' losses.

    Every start sees one quarter of the images, the rest grey. The one whose loss is lowest goes on with whole images.
    With --starts 0 there is one start, on whole images. Everything random follows `seed` alone, whatever the prior,
    and no label is looked at."""
    quarters = QUARTERS[: args.starts] or [None]
    starts = []
    for number, quarter in enumerate(quarters, 1):
        torch.manual_seed(seed)
        model = make_model(prior, args).to(data.digits.device)
        history = fit(model, data, test, args, quarter, False, [], partial(report, number))
        starts.append((model, history))
    losses = [history[-1]["loss"] for _, history in starts]
    best = losses.index(min(losses))
    model, history = starts[best]
    torch.manual_seed(seed + 1)
    return model, fit(model, data, test, args, quarters[best], True, history, partial(report, "best")), losses


def fit(model, data, test, args, quarter, whole, history, report):
    """Train for args.epochs on one quarter (top, left) of the images, None for all; if `whole`, the rest fades in.

    On a quarter: learning rate from args.lr to a tenth of it, sharpening from .6 to .25, target momentum from .9
    to .99. On whole images, which fade in over the first third: the same learning rate, .25 and .99.
    Returns `history` with one dictionary an epoch added."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], weight_decay=0.05)
    visible = torch.zeros(1, 1, SIZE, SIZE, device=data.digits.device)
    top, left = quarter or (0, 0)
    extent = SIZE if quarter is None else SIZE // 2
    visible[:, :, top : top + extent, left : left + extent] = 1
    steps_an_epoch = len(data) // args.batch_size
    for epoch in range(args.epochs):
        order = torch.randperm(len(data)).to(visible.device)
        sums = torch.zeros(4, device=visible.device)
        for i in range(steps_an_epoch):
            done = (epoch + i / steps_an_epoch) / args.epochs  # 0..1
            decay = 0.1 + 0.9 * (0.5 + 0.5 * math.cos(math.pi * done))
            optimizer.param_groups[0]["lr"] = args.lr * min(1, 20 * done + 0.02) * decay
            model.loss_options["sharpening"] = 0.25 if whole else max(0.25, 0.6 - 0.5 * done)
            seen = visible + (1 - visible) * min(1, 3 * done) if whole else visible

            batch = order[i * args.batch_size : (i + 1) * args.batch_size]
            loss, terms = model([data.view(batch) * seen, data.view(batch) * seen])
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 3.0)
            optimizer.step()
            model.update_target(0.99 if whole else 0.9 + 0.09 * min(1, 1.5 * done))
            sums += torch.stack([loss.detach(), *(terms[name] for name in TERMS)]) / steps_an_epoch
        features = embed(model, test["images"][:1000] * seen)["encoder"]
        measures = dict(zip(("loss", *TERMS), sums.tolist()))
        measures["digit_agreement"] = agreement(features, test["digits"][:1000])
        measures["background_agreement"] = agreement(features, test["kinds"][:1000])
        history.append(measures)
        report(history)
    return history


# ---- Measuring ----------------------------------------------------------------------------------------------------


@torch.no_grad()
def embed(model, images):
    """Features of the target branch in three spaces: encoder (N, 128), projection (N, 64), assignment (N, K)."""
    model.eval()
    encoder = torch.cat([model.target_encoder(x) for x in images.split(500)])
    projection = model.target_head(encoder)
    model.train()
    return {"encoder": encoder, "projection": projection,
            "assignment": pmsn.log_predictions(projection, model.prototypes, 0.1).exp()}


def agreement(features, labels, k=10):
    """Share of the k nearest neighbours, oneself left out, that have the same label."""
    _, nearest = pmsn.neighbours(features, features, k + 1)
    return (labels[nearest[:, 1:]] == labels[:, None]).cpu().double().mean().item()


def linear_accuracy(features, labels, test_features, test_labels):
    """Test accuracy of a ridge regression onto one-hot labels."""
    def design(x):
        x = (x - features.mean(dim=0)) / (features.std(dim=0) + 1e-6)
        return F.pad(x, (0, 1), value=1.0).cpu().double()

    x, y = design(features), F.one_hot(labels.cpu()).double()
    weights = torch.linalg.solve(x.T @ x + 1e-3 * len(x) * torch.eye(x.shape[1], dtype=x.dtype), x.T @ y)
    return ((design(test_features) @ weights).argmax(dim=1) == test_labels.cpu()).double().mean().item()


def summarise(runs):
    """Mean and standard deviation over seeds of every measure, for each prior."""
    summary = {}
    for prior in NAMES:
        mine = [run for run in runs if run["prior"] == prior]
        summary[prior] = {"n": len(mine)}
        for measure in ("digit_agreement", "background_agreement", "digit_linear_accuracy", "prior_kl", "seconds"):
            values = np.array([run[measure] for run in mine])
            std = values.std(ddof=1) if len(mine) > 1 else None
            summary[prior][measure] = {"mean": values.mean(), "std": std}
    return summary


# ---- Figures ------------------------------------------------------------------------------------------------------


def write_whole(path, write):
    """Call write(temporary path) and move the result to `path`, so that `path` is never half-written."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        write(temporary)
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from None
    finally:
        temporary.unlink(missing_ok=True)


def save(figure, path):
    write_whole(path, lambda temporary: figure.savefig(temporary, format="png", dpi=130))
    plt.close(figure)


def show(axes, image, frame="none"):
    axes.imshow(image.squeeze().cpu(), cmap="gray", vmin=-1, vmax=1)
    axes.set(xticks=[], yticks=[])
    for spine in axes.spines.values():
        spine.set(color=frame, linewidth=3)


def plot_neighbours(shown, summary, seed, path, count=8):
    """Fig. 3: a reference image of every digit, then its nearest neighbours, one block a prior."""
    test, figure = shown["test"], plt.figure(figsize=(13, 8.4))
    blocks = figure.add_gridspec(1, 2, left=0.01, right=0.99, top=0.84, bottom=0.02, wspace=0.06)
    rows = [int((test["digits"] == digit).nonzero()[0]) for digit in range(10)]
    wins = {}
    for block, prior in zip(blocks, NAMES):
        features = shown[prior]["encoder"]
        _, nearest = pmsn.neighbours(features[rows], features, count + 1)
        grid = block.subgridspec(10, count + 1, width_ratios=[1.25] + [1] * count, hspace=0.06, wspace=0.06)
        for row, (reference, found) in enumerate(zip(rows, nearest[:, 1:].tolist())):
            show(figure.add_subplot(grid[row, 0]), test["images"][reference], "black")
            for column, image in enumerate(found):
                same = test["digits"][image] == test["digits"][reference]
                show(figure.add_subplot(grid[row, column + 1]), test["images"][image], "#3c9d4e" if same else "none")
        digit, background = (summary[prior][f"{what}_agreement"]["mean"] for what in ("digit", "background"))
        wins[prior] = "digit" if digit > background else "background"
        box = block.get_position(figure)
        figure.text((box.x0 + box.x1) / 2, 0.855, f"{NAMES[prior]}\nsame digit {digit:.2f}, same background "
                    f"{background:.2f}", ha="center", color=COLOURS[prior], fontsize=13)
    verdict = (f"Neighbours share the {wins['power_law']} under the power-law prior, the {wins['uniform']} under the "
               "uniform prior" if wins["power_law"] != wins["uniform"] else
               f"Neighbours share the {wins['uniform']} under both priors")
    figure.suptitle(verdict, fontsize=15, y=0.985)
    figure.text(0.5, 0.93, f"left of each block: the reference image (seed {seed}); green frame: same digit; numbers: "
                f"share of the 10 nearest neighbours, mean over {summary['uniform']['n']} seed(s), chance "
                f"{1 / len(test['digits'].unique()):.2g} and {1 / len(test['kinds'].unique()):.2g}",
                ha="center", fontsize=10, color="0.35")
    save(figure, path)


def plot_prototypes(shown, path, count=5):
    """Usage of the prototypes against their prior, and the held-out images that each prototype claims most surely."""
    test, figure = shown["test"], plt.figure(figsize=(13, 6.6))
    blocks = figure.add_gridspec(1, 2, left=0.05, right=0.99, top=0.86, bottom=0.02, wspace=0.13)
    for block, prior in zip(blocks, NAMES):
        assignment, usage = shown[prior]["assignment"], shown[prior]["usage"].cpu()
        number = min(10, len(usage))
        grid = block.subgridspec(2, 1, height_ratios=[1, 1.9], hspace=0.12)
        axes = figure.add_subplot(grid[0])
        axes.bar(range(number), usage[:number], color=COLOURS[prior], alpha=0.75, label="usage (mean prediction)")
        axes.plot(range(number), shown[prior]["prior"][:number], "k_", markersize=22, markeredgewidth=2, label="prior")
        axes.set(title=NAMES[prior], xticks=[], xlim=(-0.5, number - 0.5), ylabel="share of images")
        axes.set_ylim(top=1.35 * max(usage.max(), shown[prior]["prior"].max()))
        axes.legend(frameon=False, loc="upper right", ncols=2)
        pictures = grid[1].subgridspec(count, number, hspace=0.06, wspace=0.06)
        for k in range(number):
            for row, image in enumerate(assignment[:, k].topk(count).indices.tolist()):
                show(figure.add_subplot(pictures[row, k]), test["images"][image])
    figure.suptitle("What each prototype stands for: its share of the images, and the images nearest to it",
                    fontsize=14)
    save(figure, path)


def plot_training(runs, path):
    """Curves of every run: the chosen start, then whole images."""
    titles = {"cross_entropy": "cross-entropy (nats)", "prior_kl": "KL(mean prediction || prior) (nats)",
              "effective_prototypes": "effective prototypes", "digit_agreement": "neighbours with the same digit"}
    figure, axes = plt.subplots(1, 4, figsize=(14, 3.6), layout="constrained")
    for ax, (key, title) in zip(axes, titles.items()):
        for run in runs:
            first = run["seed"] == runs[0]["seed"]
            ax.plot(range(1, len(run["history"]) + 1), [h[key] for h in run["history"]], color=COLOURS[run["prior"]],
                    alpha=0.8, label=NAMES[run["prior"]] if first else None)
        ax.axvline(len(runs[0]["history"]) / 2 + 0.5, color="0.7", linestyle=":", linewidth=1)
        ax.set(xlabel="epoch", title=title)
        ax.xaxis.get_major_locator().set_params(integer=True)
    axes[0].legend(frameon=False, fontsize=9)
    axes[3].set(ylim=(0, 1))
    figure.suptitle("The start with the lowest loss, one line a seed; right of the dotted line: whole images")
    save(figure, path)


# ---- Command line -------------------------------------------------------------------------------------------------


def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], epilog="Everything runs on a CPU, a CUDA "
                                     "or an MPS device, whichever is there.")
    add = parser.add_argument
    add("--digits", default="drawn", help="drawn, MNIST, FashionMNIST or KMNIST (default: drawn)")
    add("--backgrounds", default="drawn", help="drawn, CIFAR10, CIFAR100 or a folder with one folder of images a kind")
    add("--scenes", type=int, help="images of each background kind (default: all)")
    add("--root", default="data", help="where torchvision finds or puts data sets (default: data)")
    add("--out", default="runs/corner", type=Path, help="folder for results and figures (default: runs/corner)")
    add("--seeds", type=int, nargs="+", default=[0], help="one experiment each (default: 0)")
    add("--exponent", type=float, default=1.0, help="digit frequencies are k^-exponent (default: 1)")
    add("--prior", type=float, nargs="+", help="the matched prior as numbers, instead of the power law")
    add("--prototypes", type=int, default=10, help="number of prototypes K (default: 10)")
    add("--weight", type=float, default=3.0, help="weight of KL(p_bar || prior) (default: 3)")
    add("--contrast", type=float, default=0.5, help="of the backgrounds, 0..1 (default: .5)")
    add("--deform", type=float, default=0.35, help="reach of the digits' shape changes, 0..1 (default: .35)")
    add("--images", type=int, default=17000, help="training images (default: 17000)")
    add("--epochs", type=int, default=7, help="of each start, and then of the best one (default: 7)")
    add("--starts", type=int, default=4, help="starts, each on another quarter of the images (default: 4); 0: one "
        "start, on whole images")
    add("--batch_size", type=int, default=256, help="default: 256")
    add("--lr", type=float, default=2e-3, help="learning rate of AdamW (default: .002)")
    add("--quick", action="store_true", help="the same path in under a minute: fewer images, 2 epochs, 2 starts")
    args = parser.parse_args(argv)
    if args.quick:
        args.images, args.epochs, args.starts = min(args.images, 3000), 2, min(args.starts, 2)
        args.seeds = args.seeds[:1]
    return args


def check(args):
    """UserError for what is wrong with the arguments; returns the priors of digits and prototypes."""
    if args.digits not in ("drawn", "MNIST", "FashionMNIST", "KMNIST"):
        raise UserError(f"--digits {args.digits}: choose drawn, MNIST, FashionMNIST or KMNIST")
    for name, low, high in (("starts", 0, 4), ("epochs", 1, None), ("batch_size", 2, None), ("contrast", 0, 1),
                            ("deform", 0, 1), ("weight", 0, None), ("lr", 0, None), ("scenes", 1, None)):
        value = getattr(args, name)
        if value is not None and not (low <= value and (high is None or value <= high)):
            allowed = f"at least {low}" if high is None else f"in {low}..{high}"
            raise UserError(f"--{name} must be {allowed}, got {value}")
    if args.images < 500:
        raise UserError(f"--images must be at least 500, got {args.images}")
    if args.batch_size > args.images:
        raise UserError(f"--batch_size {args.batch_size} is larger than the data set of {args.images} --images")
    try:
        digits = pmsn.power_law_prior(10, args.exponent)
        matched = pmsn.power_law_prior(args.prototypes, args.exponent)
        if args.prior is not None:
            matched = torch.tensor(args.prior)
            pmsn.check_prior(matched, args.prototypes)
    except ValueError as error:
        raise UserError(str(error)) from None
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=args.out).close()
    except OSError as error:
        raise UserError(f"cannot write to --out {args.out}: {error.strerror}") from None
    return digits, {"power_law": matched, "uniform": pmsn.uniform_prior(args.prototypes)}


class Progress:
    """Prints a line an epoch, with the time left for all that is still to come."""

    def __init__(self, epochs_in_all):
        self.began = self.last = time.time()
        self.finished, self.epochs_in_all = 0, epochs_in_all
        print(f"{'seed':>4} {'prior':<9} {'start':>5} {'epoch':>5} {'loss':>7} {'CE':>7} {'KL':>7} {'eff.':>5} "
              f"{'digit':>6} {'backgr.':>7} {'images/s':>8} {'left':>6}")

    def __call__(self, seed, prior, images, start, history):
        self.finished, now, row = self.finished + 1, time.time(), history[-1]
        left = round((now - self.began) / self.finished * (self.epochs_in_all - self.finished))
        print(f"{seed:>4} {prior:<9} {start:>5} {len(history):>5} {row['loss']:>7.3f} {row['cross_entropy']:>7.3f} "
              f"{row['prior_kl']:>7.3f} {row['effective_prototypes']:>5.1f} {row['digit_agreement']:>6.2f} "
              f"{row['background_agreement']:>7.2f} {images / (now - self.last):>8.0f} "
              f"{left // 60:>3}:{left % 60:02}", flush=True)
        self.last = now


def experiment(args, seed, digit_prior, priors, device, progress):
    """Both priors on the same data: their results, and what the figures show of them."""
    data = CornerImages(args, digit_prior, args.images, True, seed, device)
    held_out = CornerImages(args, pmsn.uniform_prior(10), 1000 if args.quick else 4000, False, seed + 1000, device)
    torch.manual_seed(seed)
    images = {"images": held_out.view(torch.arange(len(held_out), device=device)),
              "digits": held_out.digit_labels, "kinds": held_out.kinds}
    half = len(held_out) // 2  # one half trains the linear probe, the other measures everything
    fitted, test = {k: v[:half] for k, v in images.items()}, {k: v[half:] for k, v in images.items()}
    runs, shown = [], {"test": test}
    for name, prior in priors.items():
        began = time.time()
        model, history, losses = train(prior, data, test, args, seed, partial(progress, seed, name, len(data)))
        spaces = embed(model, test["images"])
        by_space = {space: {"digit": agreement(x, test["digits"]), "background": agreement(x, test["kinds"])}
                    for space, x in spaces.items()}
        probe = linear_accuracy(embed(model, fitted["images"])["encoder"], fitted["digits"],
                                spaces["encoder"], test["digits"])
        runs.append({"prior": name, "seed": seed, "digit_agreement": by_space["encoder"]["digit"],
                     "background_agreement": by_space["encoder"]["background"], "digit_linear_accuracy": probe,
                     "prior_kl": history[-1]["prior_kl"], "seconds": time.time() - began,
                     "agreement": by_space, "start_losses": losses, "history": history})
        like_training = data.view(torch.arange(min(2000, len(data)), device=device))
        shown[name] = {**spaces, "prior": prior, "usage": embed(model, like_training)["assignment"].mean(dim=0)}
    return runs, shown


def main(argv=None):
    args = parse(argv)
    digit_prior, priors = check(args)
    device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    config = {**vars(args), "out": str(args.out), "device": device, "threads": torch.get_num_threads(),
              "torch": torch.__version__, "python": platform.python_version()}
    print(f"digits {args.digits}, backgrounds {args.backgrounds}, K {args.prototypes}, exponent {args.exponent:g}, "
          f"{device}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    progress = Progress(len(args.seeds) * len(priors) * (max(args.starts, 1) + 1) * args.epochs)
    runs, shown = [], None
    for seed in args.seeds:
        of_seed, images = experiment(args, seed, digit_prior, priors, device, progress)
        runs, shown = runs + of_seed, shown or images
        summary = summarise(runs)
        text = json.dumps({"config": config, "runs": runs, "summary": summary}, indent=1)
        write_whole(args.out / "results.json", lambda temporary: temporary.write_text(text))
    plot_neighbours(shown, summary, args.seeds[0], args.out / "neighbours.png")
    plot_prototypes(shown, args.out / "prototypes.png")
    plot_training(runs, args.out / "training.png")
    print_results(runs, summary)
    print(f"\n{args.out}: results.json neighbours.png prototypes.png training.png")


def print_results(runs, summary):
    print("\nloss of each start (1 top left, 2 top right, 3 bottom left, 4 bottom right quarter); the lowest goes on")
    for run in runs:
        print(f"  seed {run['seed']} {run['prior']:<9} " + " ".join(f"{loss:7.3f}" for loss in run["start_losses"]))
    print(f"\nshare of the 10 nearest neighbours (encoder features), mean ± std over "
          f"{summary['uniform']['n']} seed(s)")
    print(f"{'prior':<10} {'same digit':>14} {'same background':>16} {'linear digit':>14} {'KL':>14} {'seconds':>9}")
    for prior in NAMES:
        def cell(measure, digits=3):
            mean, std = summary[prior][measure]["mean"], summary[prior][measure]["std"]
            return f"{mean:.{digits}f}" + ("" if std is None else f" ± {std:.{digits}f}")

        print(f"{prior:<10} {cell('digit_agreement'):>14} {cell('background_agreement'):>16} "
              f"{cell('digit_linear_accuracy'):>14} {cell('prior_kl'):>14} {summary[prior]['seconds']['mean']:>9.0f}")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(f"mnist_corner.py: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\nmnist_corner.py: stopped; results of finished seeds are kept", file=sys.stderr)
        sys.exit(130)
