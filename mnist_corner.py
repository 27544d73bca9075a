"""The corner experiment (paper, section 5.1 and figure 3): the prior decides what is encoded.

Each image has a digit in its top-left corner and a background. The digits are long-tailed and the
backgrounds balanced, so the images can be grouped in two ways. We train PMSN with two priors, from
the same weights and on the same batches. With a power-law prior, which matches the digits, it
encodes the digit. With the uniform prior (MSN) it encodes the background. Training sees no label.

    python mnist_corner.py                                         # synthetic data, no download
    python mnist_corner.py --quick                                 # all of it in half a minute
    python mnist_corner.py --digits MNIST --backgrounds CIFAR10    # the paper's data
    python mnist_corner.py --digits MNIST --backgrounds FOLDER     # one folder per class in FOLDER

Like K-means, the loss has local minima, and the remedy is the same: for each prior we train several
short runs and continue the one with the lowest loss. Each of these starts sees one quarter of the
images, and then the rest fades in. Three things are not in the paper and hold for both priors:
sharpening is relative to the prior, Sinkhorn moves targets onto it, and prior_weight is 3.
--out gets results.json, neighbors.png (figure 3), prototypes.png and training.png.
"""

import argparse
import itertools
import json
import math
import tempfile
import time
from pathlib import Path

import matplotlib
matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageFont, ImageOps
from torch import nn
from torchvision.datasets.folder import is_image_file
from torchvision.transforms import v2

import pmsn

SIZE, CORNER = 32, 16  # pixels per side of an image, and of the digit in its corner
NAMES = {"power_law": "power-law prior (PMSN)", "uniform": "uniform prior (MSN)"}
COLORS = {"power_law": "#d1495b", "uniform": "#30638e"}
LABELS = ("digit", "background")
COLUMNS = "loss cross_entropy prior_kl effective_prototypes same_digit same_background".split()
FONTS = ("DejaVuSans DejaVuSans-Bold DejaVuSansMono DejaVuSansMono-Bold DejaVuSerif "
         "DejaVuSerif-Bold STIXGeneral STIXGeneralBol cmr10 cmb10 cmss10 cmtt10").split()

# ---- Data: [training, test], each with gray images (N, 1, h, w) and labels (N,) ------------------
def load_digits(name, root):
    if name == "synthetic":
        return [synthetic_digits()] * 2
    dataset = getattr(torchvision.datasets, name)
    splits = [dataset(root, train, download=True) for train in (True, False)]
    return [(shrink(split.data[:, None]), split.targets) for split in splits]

def shrink(images):  # uint8 -> (N, 1, 20, 20) in [0, 1]
    return v2.functional.resize(images / 255, 20, antialias=True)

def synthetic_digits():
    """The digits in 12 fonts that come with matplotlib: 120 images."""
    images = []
    for name in FONTS:
        font = ImageFont.truetype(f"{matplotlib.get_data_path()}/fonts/ttf/{name}.ttf", 40)
        for digit in range(10):
            mask = font.getmask(str(digit))
            glyph = Image.frombytes("L", mask.size, bytes(mask))
            glyph = ImageOps.pad(glyph, (40, 29))  # All digits get the same height.
            images.append(v2.functional.pil_to_tensor(glyph))
    images = F.pad(torch.stack(images), (0, 0, 5, 6))  # (120, 1, 40, 40)
    return shrink(images), torch.arange(10).repeat(12)

def load_backgrounds(name, root, scenes):
    """All have the same mean and contrast. `scenes` per class are in training and test alike."""
    if name == "synthetic":
        return [synthetic_backgrounds()] * 2
    gray = v2.Compose([v2.Grayscale(), v2.Resize(SIZE), v2.CenterCrop(SIZE), v2.PILToTensor()])
    if name in ("CIFAR10", "CIFAR100"):
        data = getattr(torchvision.datasets, name)(root, transform=gray, download=True)
    else:
        data = torchvision.datasets.ImageFolder(name, gray, is_valid_file=lambda path: (
            Path(path).name[0] != "." and is_image_file(path)))
    labels = torch.tensor(data.targets)
    place = F.one_hot(labels).cumsum(dim=0)[torch.arange(len(labels)), labels] - 1  # in its class
    # Every fifth image of a class is held out for the test.
    splits = [place % 5 != 0, place % 5 == 0] if scenes is None else [place < scenes] * 2
    if len(labels[splits[0]].unique()) < max(2, len(data.classes)):
        raise ValueError("two classes of two images are needed, or of one image with --scenes 1")
    return [(read_images(data, keep), labels[keep]) for keep in splits]

def read_images(data, keep):
    images = []
    for i in np.flatnonzero(keep):
        try:
            images.append(data[i][0])
        except Exception as error:  # PIL raises many kinds.
            raise ValueError(f"{data.samples[i][0]} is damaged, remove it ({error!r})") from None
    images = torch.stack(images).float()
    std, mean = torch.std_mean(images, dim=(2, 3), keepdim=True)
    return 0.5 + 0.35 * (images - mean) / std.clamp_min(1)  # The gratings have .35 too.

def synthetic_backgrounds():
    """Ten gratings, of five angles and two periods: images (10, 1, 64, 64) in [0, 1]."""
    y, x = torch.meshgrid(torch.arange(64), torch.arange(64), indexing="ij")
    images = []
    for period, angle in itertools.product((4, 9), np.arange(5) * math.pi / 5):
        across = x * math.cos(angle) + y * math.sin(angle)
        images.append(0.5 + 0.5 * torch.sin(math.tau / period * across))
    return torch.stack(images)[:, None], torch.arange(10)

def sample(images, labels, exponent, count, seed):
    """`count` images and labels, with frequencies k^-exponent. Images repeat only if they must."""
    generator = np.random.default_rng(seed)
    prior = pmsn.power_law_prior(int(labels.max()) + 1, exponent)
    # We round the cumulative sums, and not the shares, so that the numbers sum to `count`.
    ends = (count * prior.cumsum(0)).round().long()
    chosen = []
    for c, wanted in enumerate(np.diff(ends, prepend=0)):
        members = generator.permutation(np.flatnonzero(labels == c))
        chosen.append(np.resize(members, wanted))  # It repeats them if they are too few.
    chosen = generator.permutation(np.concatenate(chosen))
    return images[chosen], labels[chosen]

def make_view(digits, backgrounds, args):
    """Digits on backgrounds, both in random shapes: (B, 1, 32, 32), about in [-1, 1]."""
    images = 0.5 + args.contrast * (background_view(backgrounds) - 0.5)
    images[:, :, :CORNER, :CORNER] = digit_view(digits, args.deform)
    return 2 * (images + 0.05 * torch.randn_like(images)) - 1

def digit_view(digits, reach):
    """Digits in a random shape: (B, 1, h, w) -> (B, 1, 16, 16). At `reach` 0 nothing is random."""
    # If both views had the same handwriting, the uniform prior could split frequent digits by
    # handwriting at no cost, and would encode the digit too.
    angle = random_numbers(digits, math.radians(20) * reach)
    shear = random_numbers(digits, 0.25 * reach)
    scale = random_numbers(digits, 0.15 * reach, 2, 1).exp()
    shift = random_numbers(digits, 0.2 * reach, 2, 1)
    # An elastic change: 4 x 4 random offsets, smooth in between.
    bend = random_numbers(digits, 0.12 * reach, 2, 4, 4)
    bend = F.interpolate(bend, size=CORNER, mode="bicubic", align_corners=True)
    digits = warp(digits, CORNER, angle, shear, scale, shift, bend.permute(0, 2, 3, 1))
    # The width of the stroke: a random threshold on the slightly blurred digit.
    ink = (digits + F.avg_pool2d(digits, 3, stride=1, padding=1)) / 2
    threshold = 0.4 + random_numbers(digits, 0.2 * reach, 1, 1, 1)
    return torch.sigmoid(12 * (ink - threshold))

def background_view(backgrounds):
    """A random crop, turned by up to 3 degrees: (B, 1, h, w) -> (B, 1, 32, 32)."""
    # Half of a grating, which has 64 pixels, or most of another background, which has 32.
    mean, reach = (0.5, 0.025) if backgrounds.shape[-1] > SIZE else (0.85, 0.15)
    scale = mean + random_numbers(backgrounds, reach, 1, 1)
    angle = random_numbers(backgrounds, math.radians(3))
    shift = 0.9 * (1 - scale) * random_numbers(backgrounds, 1, 2, 1)
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

# ---- Model and training --------------------------------------------------------------------------
def make_model(prior, prior_weight):
    """A convolutional encoder (B, 1, 32, 32) -> (B, 128), and a linear head -> (B, 64)."""
    layers = []
    for inputs, outputs, kernel in [(1, 32, 5), (32, 64, 3), (64, 64, 3)]:
        layers += [nn.Conv2d(inputs, outputs, kernel, stride=2, padding=kernel // 2),
                   nn.GroupNorm(1, outputs), nn.GELU()]
    # The mean over the positions would lose where the digit is.
    encoder = nn.Sequential(*layers, nn.Flatten(), nn.Linear(64 * 4 * 4, 128))
    head = nn.Sequential(nn.Linear(128, 64), nn.BatchNorm1d(64, affine=False))
    return pmsn.PMSN(encoder, prior, head=head, output_dim=64, patch_drop=0.0,
                     prior_weight=prior_weight, sinkhorn_iterations=10, relative_sharpening=True)

def train(name, prior, data, test, args, seed, times, parser):
    """Train several starts, continue the best one: -> model, its history, losses of all starts."""
    # `data` has digits and backgrounds without labels. `test` has labels, but it only measures.
    # Each start sees one quarter of the images. With --starts 0 the only start sees all of them.
    quarters = F.interpolate(torch.eye(4).view(4, 1, 2, 2), SIZE)  # (4, 1, 32, 32), 1 is visible
    masks = quarters[: args.starts] if args.starts else torch.ones(1, 1, SIZE, SIZE)
    all_epochs = len(args.seeds) * len(NAMES) * (len(masks) + 1) * args.epochs
    steps_per_epoch = args.images // args.batch_size
    starts = []
    for start in [*range(1, len(masks) + 1), "best"]:
        if start == "best":
            torch.manual_seed(seed + 1)
            losses = [history[-1]["loss"] for _, history, _ in starts]
            model, history, quarter = starts[losses.index(min(losses))]
        else:
            torch.manual_seed(seed)  # Both priors get the same weights, batches and views.
            starts.append((make_model(prior, args.prior_weight), [], masks[start - 1]))
            model, history, quarter = starts[-1]
        optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.05)

        for epoch in range(args.epochs):
            batches = torch.randperm(args.images).split(args.batch_size)
            means = {}
            for step, batch in enumerate(batches[:steps_per_epoch]):
                done = (epoch + step / steps_per_epoch) / args.epochs  # from 0 to 1
                warmup = min(1, 20 * done + 0.02)
                decay = 0.1 + 0.9 * (0.5 + 0.5 * math.cos(math.pi * done))
                optimizer.param_groups[0]["lr"] = args.lr * warmup * decay
                if start == "best":
                    sharpening, ema_momentum = 0.25, 0.99
                    mask = quarter + (1 - quarter) * min(1, 3 * done)  # The rest fades in.
                else:
                    # Soft targets and a fast target network let the first clusters still change.
                    sharpening = max(0.25, 0.6 - 0.5 * done)
                    ema_momentum = 0.9 + 0.09 * min(1, 1.5 * done)
                    mask = quarter
                # Two views of each image: the target and one anchor.
                images = [bank[batch] for bank in data]
                views = [mask * make_view(*images, args) for _ in range(2)]
                model.loss_options["sharpening"] = sharpening
                loss, terms = model(views)
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(model.parameters(), 3.0)
                optimizer.step()
                model.update_target(ema_momentum)
                terms["loss"] = loss.detach()
                means = {key: means.get(key, 0) + terms[key] / steps_per_epoch for key in terms}

            row = {key: value.tolist() for key, value in means.items()}
            if not math.isfinite(row["loss"]):
                parser.error("the loss is not finite, use a smaller --lr or --prior_weight")
            # The test images have the mask that the training images had last.
            features = embed(model, mask * test["images"])["encoder"]
            for what in LABELS:
                row[f"same_{what}"] = agreement(features, test[what])
            history.append(row)
            times.append(time.time())
            left = np.diff(times).mean() * (all_epochs + 1 - len(times))
            values = "".join(f"{row[key]:>9.3f}" for key in COLUMNS)
            print(f"{seed:>4} {name:>9} {start:>5} {len(history):>5}{values}{left:>6.0f}s",
                  flush=True)
    return model, history, losses

# ---- Measuring and figures -----------------------------------------------------------------------
@torch.no_grad()
def embed(model, images):
    """The target network's encoder outputs (N, 128), projections (N, 64), assignments (N, K)."""
    model.eval()
    encoder = torch.cat([model.target_encoder(part) for part in images.split(500)])
    projection = model.target_head(encoder)
    model.train()
    log_p = pmsn.log_predictions(projection, model.prototypes, 0.1)
    return {"encoder": encoder, "projection": projection, "assignment": log_p.exp()}

def agreement(features, labels):
    """Share of the 10 nearest neighbors, without the image itself, that have its label."""
    _, nearest = pmsn.nearest_neighbors(features, features, 11)
    return (labels[nearest[:, 1:]] == labels[:, None]).float().mean().item()

def mosaic(ax, images, colors):
    """Show images (rows, columns, 1, 32, 32) in frames with these colors (rows, columns, 3)."""
    framed = colors[..., None, None].repeat(1, 1, 1, SIZE + 6, SIZE + 6)
    framed[..., 3:-3, 3:-3] = (images.clamp(-1, 1) + 1) / 2
    grid = torchvision.utils.make_grid(framed.flatten(0, 1), len(colors[0]), 1, pad_value=1)
    ax.imshow(grid.permute(1, 2, 0).numpy())
    ax.set_axis_off()

def plot_neighbors(models, test, summary, path):
    """Figure 3: one image per digit and its 8 nearest neighbors, for each prior."""
    _, queries = np.unique(test["digit"], return_index=True)  # the first image of each digit
    figure, axes = plt.subplots(1, 2, figsize=(13, 8.2), layout="constrained")
    wins = []
    for ax, (name, model) in zip(axes, models.items()):
        features = embed(model, test["images"])["encoder"]
        _, nearest = pmsn.nearest_neighbors(features[queries], features, 9)
        digits = test["digit"][nearest]  # (10, 9), first the image itself
        same = digits == digits[:, :1]
        colors = torch.where(same[..., None], torch.tensor([0.24, 0.62, 0.3]), 1.0)
        colors[:, 0] = 0
        mosaic(ax, test["images"][nearest], colors)
        digit, background = (summary[name][f"same_{what}_encoder"]["mean"] for what in LABELS)
        wins.append("digit" if digit > background else "background")
        ax.set_title(f"{NAMES[name]}\nsame digit {digit:.2f}, same background {background:.2f}",
                     color=COLORS[name])
    figure.suptitle(f"Neighbors share the {wins[0]} under the power-law prior and the {wins[1]} "
                    "under the uniform prior")
    figure.supxlabel("Each row shows an image (black) and its neighbors (green: same digit). The "
                     f"numbers are for 10 neighbors, mean over n = {summary[name]['n']} seeds")
    figure.savefig(path)

def plot_prototypes(models, test, runs, path):
    """The usage of the prototypes next to their prior, and the images nearest to each of them."""
    figure, axes = plt.subplots(2, 2, figsize=(13, 7), layout="constrained")
    for (top, bottom), (name, model), run in zip(axes.T, models.items(), runs):
        prior, last = model.prior[:10], run["history"][-1]
        top.bar(range(len(prior)), last["mean_prediction"][:10], color=COLORS[name])
        top.plot(prior, "ko")
        top.set_title(f"{NAMES[name]}, KL {last['prior_kl']:.3f} nats per batch")
        assignment = embed(model, test["images"])["assignment"][:, :10]
        nearest = assignment.topk(5, dim=0).indices  # (5, 10)
        mosaic(bottom, test["images"][nearest], torch.ones(*nearest.shape, 3))
    figure.suptitle("Usage of prototypes (bars) follows the prior (dots). Below: their images")
    figure.savefig(path)

def plot_training(runs, summary, path):
    """One line per prior and seed: the start with the lowest loss, then whole images."""
    figure, axes = plt.subplots(1, 6, figsize=(20, 3.6), layout="constrained")
    for ax, key in zip(axes, COLUMNS):
        for run in runs:
            values = [row[key] for row in run["history"]]
            epochs = range(1, len(values) + 1)
            ax.plot(epochs, values, color=COLORS[run["prior"]])
        ax.set(title=key, xlabel="epoch", xticks=epochs[::3])
    axes[0].legend(NAMES.values())
    figure.suptitle("The best start, then whole images. Neighbors with the same digit in the end: "
                    f"{summary['power_law']['same_digit_encoder']['mean']:.2f} (power-law prior), "
                    f"{summary['uniform']['same_digit_encoder']['mean']:.2f} (uniform prior)")
    figure.savefig(path)

# ---- Command line --------------------------------------------------------------------------------
def number(kind, low, high=math.inf):
    """An argparse type: a finite number of this kind from low to high."""
    def number(text):
        value = kind(text)
        if not low <= value <= high or math.isinf(value):
            raise argparse.ArgumentTypeError(f"must be finite, from {low} to {high}, got {text}")
        return value
    return number

def main(argv=None):
    parser = argparse.ArgumentParser(description="The corner experiment on synthetic data or yours",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--digits", default="synthetic", choices="synthetic MNIST FashionMNIST KMNIST".split())
    add("--backgrounds", default="synthetic", help="CIFAR10, CIFAR100 or a folder of class folders")
    add("--scenes", type=number(int, 1), help="backgrounds per class, all of them if not given")
    add("--root", default="data", help="where torchvision finds data sets, or downloads them")
    add("--out", type=Path, default="runs/corner", help="folder for results and figures")
    add("--seeds", type=number(int, 0, 2**32 - 1), nargs="+", default=[0], help="each for one run")
    add("--exponent", type=number(float, 0, 4), default=1.0, help="of digits and their prior")
    add("--prototypes", type=number(int, 2), default=10, help="number of prototypes")
    add("--prior_weight", type=number(float, 0), default=3.0, help="weight of the KL term")
    add("--contrast", type=number(float, 0, 1), default=0.5, help="contrast of the backgrounds")
    add("--deform", type=number(float, 0, 1), default=0.35, help="how much digits change shape")
    add("--images", type=number(int, 500), default=17000, help="training images")
    add("--epochs", type=number(int, 1), default=7, help="of each start, and then of the best one")
    add("--starts", type=number(int, 0, 4), default=4, help="0 is one start on whole images")
    add("--batch_size", type=number(int, 2), default=256, help="images per step")
    add("--lr", type=number(float, 0), default=2e-3, help="highest learning rate")
    add("--quick", action="store_true", help="few images, 2 epochs and 2 starts, in half a minute")
    args = parser.parse_args(argv)
    if args.quick:
        args.images, args.epochs, args.starts = 1500, 2, 2
    if args.batch_size > args.images:
        parser.error(f"--batch_size {args.batch_size} is larger than --images {args.images}")
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=args.out).close()
    except OSError as error:
        parser.error(f"cannot write to --out {args.out}: {error.strerror}")
    try:
        digit_banks = load_digits(args.digits, args.root)
        background_banks = load_backgrounds(args.backgrounds, args.root, args.scenes)
    except (OSError, RuntimeError, ValueError) as error:
        parser.error(f"cannot load the data: {' '.join(str(error).split())}. "
                     "--digits synthetic --backgrounds synthetic need none")

    print("seed     prior start epoch     loss       CE       KL     eff.    digit  backgr.   left")
    times, runs, models = [time.time()], [], {}  # times: the start, then the end of each epoch
    for seed in args.seeds:
        data = [sample(*digit_banks[0], args.exponent, args.images, seed)[0],
                sample(*background_banks[0], 0.0, args.images, seed + 1)[0]]
        # Test digits are balanced, so chance is the same for all of them.
        test_digits, digit = sample(*digit_banks[1], 0.0, 2000, seed + 1000)
        test_backgrounds, background = sample(*background_banks[1], 0.0, 2000, seed + 1001)
        torch.manual_seed(seed)
        images = make_view(test_digits, test_backgrounds, args)
        test = {"images": images, "digit": digit, "background": background}
        for name, exponent in zip(NAMES, (args.exponent, 0.0)):
            prior = pmsn.power_law_prior(args.prototypes, exponent)
            model, history, losses = train(name, prior, data, test, args, seed, times, parser)
            spaces = embed(model, images)
            results = {f"same_{what}_{space}": agreement(features, test[what])
                       for space, features in spaces.items() for what in LABELS}
            results["prior_kl"] = history[-1]["prior_kl"]
            # One half of the test images trains a linear probe for the digit.
            features = spaces["encoder"]
            predicted = pmsn.linear_probe(features[::2], digit[::2], features[1::2], seed)
            results["digit_linear_accuracy"] = (predicted == digit[1::2]).float().mean().item()
            runs.append({"prior": name, "seed": seed, "results": results,
                         "start_losses": losses, "history": history})
            models[name] = model
        summary = {}
        for name in NAMES:
            summary[name] = {"n": len(runs) // 2}
            for key in results:
                values = np.array([run["results"][key] for run in runs if run["prior"] == name])
                summary[name][key] = {"mean": values.mean()}
                if len(values) > 1:
                    summary[name][key]["std"] = values.std(ddof=1)
        config = {**vars(args), "torch": torch.__version__, "torchvision": torchvision.__version__}
        content = {"config": config, "runs": runs, "summary": summary}
        try:
            (args.out / "results.json").write_text(json.dumps(content, indent=1, default=str))
            plot_neighbors(models, test, summary, args.out / "neighbors.png")
            plot_prototypes(models, test, runs[-2:], args.out / "prototypes.png")
            plot_training(runs, summary, args.out / "training.png")
        except OSError as error:
            parser.error(f"cannot write to --out {args.out}, is the disk full? ({error})")
        plt.close("all")

    print(f"\nmean ± std over n = {len(args.seeds)} seeds        power_law           uniform")
    for key in results:
        cells = [" ± ".join(f"{x:.3f}" for x in row[key].values()) for row in summary.values()]
        print(f"{key:<28}{cells[0]:>18}{cells[1]:>18}")
    print(f"After {times[-1] - times[0]:.0f} s, results.json and the figures are in {args.out}")

if __name__ == "__main__":
    main()
