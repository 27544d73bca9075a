r"""The corner experiment (paper, section 5.1 and figure 3): the prior decides what is encoded.

Each image has a digit in one corner and a background. The digits are long-tailed and the
backgrounds balanced, so the images can be grouped in two ways. We train PMSN with two priors, from
the same weights and on the same batches. With a power-law prior, which matches the digits, it
encodes the digit. With the uniform prior (MSN) it encodes the background. The loss sees no label.

    python mnist_corner.py              # synthetic data, no download, two minutes on two cores
    python mnist_corner.py --quick      # the same with too little data, half a minute
    python mnist_corner.py --curve --seeds 0 1 2     # seven priors, from uniform to steep
    python mnist_corner.py --digits MNIST --backgrounds CIFAR10 --deform 0 --overcluster 50 \
        --prior_weight 3 --relative_sharpening --sinkhorn_iterations 10

The loss has local minima, as K-means has, so we train from several starts: the same weights on nine
windows of the images, in a regular grid. For each prior, the start with the lowest loss goes on
with whole images. The digit fills one of the windows exactly, for all priors alike. So the result
is what the loss prefers, and not what a single start finds.
The loss is the paper's. Not in the paper: these starts, the small encoder, and no masking.
--out gets results.json, neighbors.png (figure 3), the models, and with --curve preference.png.
"""

import argparse
import itertools
import json
import math
import multiprocessing
import os
import signal
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageFont, ImageOps
from torch import nn
from torchvision.transforms import v2

import pmsn
# This comes before matplotlib, which fails in some notebooks otherwise.
from train_inat import Figure, number, print_any_text
import matplotlib

SIZE, WINDOW = 32, 16  # pixels per side: of an image; of the digit and of what a start sees
CURVE = (0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0)  # the exponents of --curve
BATCH_SIZE = 256
LABELS = ("digit", "background")
TERMS = ("loss", "cross_entropy", "prior_kl", "effective_prototypes")
FONTS = ("DejaVuSans DejaVuSans-Bold DejaVuSansMono DejaVuSansMono-Bold DejaVuSerif "
         "DejaVuSerif-Bold STIXGeneral STIXGeneralBol cmr10 cmb10 cmss10 cmtt10").split()

# ---- Data: gray images (N, 1, h, w) and labels (N,) ----------------------------------------------
def load_digits(name, root):
    """Digits for training and for the test. The synthetic ones are the same, in other shapes."""
    if name == "synthetic":
        images = draw("0123456789", FONTS, (40, 29))  # All digits get the same height.
        labels = torch.arange(10).repeat(len(FONTS))
        splits = [(F.pad(images, (0, 0, 5, 6)), labels)] * 2
    else:
        splits = [torchvision.datasets.MNIST(root, train, download=True) for train in (True, False)]
        splits = [(split.data[:, None], split.targets) for split in splits]
    return [(v2.functional.resize(images / 255, 20, antialias=True), labels)
            for images, labels in splits]

def draw(characters, fonts, size):
    """White on black, in fonts that come with matplotlib: (fonts * characters, 1, h, w), uint8."""
    images = []
    for name, character in itertools.product(fonts, characters):
        font = ImageFont.truetype(f"{matplotlib.get_data_path()}/fonts/ttf/{name}.ttf", 40)
        mask = font.getmask(character)
        image = ImageOps.pad(Image.frombytes("L", mask.size, bytes(mask)), size)
        images.append(v2.functional.pil_to_tensor(image))
    return torch.stack(images)

def load_backgrounds(name, root):
    """Ten gratings, or the first image of each class: (N, 1, h, w). Their index is their label."""
    if name == "synthetic":
        y, x = torch.meshgrid(torch.arange(64), torch.arange(64), indexing="ij")
        images = []
        for period, angle in itertools.product((4, 9), np.arange(5) * math.pi / 5):
            across = x * math.cos(angle) + y * math.sin(angle)
            images.append(0.5 + 0.5 * torch.sin(math.tau / period * across))
        return torch.stack(images)[:, None]  # 64 x 64 pixels, in [0, 1]
    gray = v2.Compose([v2.Grayscale(), v2.Resize(SIZE), v2.CenterCrop(SIZE), v2.PILToTensor()])
    if name == "CIFAR10":
        data = torchvision.datasets.CIFAR10(root, transform=gray, download=True)
    else:
        data = torchvision.datasets.ImageFolder(name, gray)
    _, first = np.unique(data.targets, return_index=True)
    images = torch.stack([data[i][0] for i in first]).float()
    std, mean = torch.std_mean(images, dim=(2, 3), keepdim=True)
    return 0.5 + 0.35 * (images - mean) / std.clamp_min(1)  # the contrast of the gratings

def sample(labels, exponent, count):
    """Random indices of `count` images. Class k = 1, 2 ... has a frequency of k^-exponent."""
    frequencies = pmsn.power_law_prior(int(labels.max()) + 1, exponent)
    weights = (frequencies / labels.bincount())[labels]
    return weights.multinomial(count, replacement=True)

def make_view(digits, backgrounds, args):
    """Digits in a square over backgrounds, randomly changed: (B, 1, 32, 32), about in [-1, 1]."""
    images = 0.5 + args.contrast * (background_view(backgrounds) - 0.5)
    crop(images, (0, 0, WINDOW))[:] = digit_view(digits, args.deform)
    return 2 * (images + 0.05 * torch.randn_like(images)) - 1

def crop(images, window):
    row, column, size = window
    return images[:, :, row : row + size, column : column + size]

def digit_view(digits, deform, size=WINDOW):
    """Digits in a random shape, (B, 1, size, size). At `deform` 0 nothing is random."""
    # If both views had the same shape, the uniform prior could split frequent digits by their font
    # at no cost, and would encode the digit too. MNIST has no fonts, and needs no change.
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
    # Half of the side of a grating, which has 64 pixels. 70% to 100% of the others, which have 32.
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
def make_encoder(size, widths=(32, 64, 64)):
    """Convolutions, then one layer on all positions: (B, 1, size, size) -> (B, 128)."""
    layers = []
    for inputs, outputs, kernel in zip((1, *widths), widths, (5, 3, 3)):
        layers += [nn.Conv2d(inputs, outputs, kernel, stride=2, padding=kernel // 2),
                   nn.GroupNorm(1, outputs), nn.GELU()]
    # The mean over the positions would lose where the digit is.
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(64 * (size // 8) ** 2, 128))

def make_model(encoder, num_prototypes, exponent):
    head = nn.Sequential(nn.Linear(128, 64), nn.BatchNorm1d(64, affine=False))
    return pmsn.PMSN(encoder, pmsn.power_law_prior(num_prototypes, exponent), head=head,
                     output_dim=64, patch_drop=0.0)

def make_start(window, seed, exponent, args):
    """A model that sees one window (row, column, size) of the images."""
    torch.manual_seed(seed)  # All starts and all priors get the same weights.
    model = make_model(make_encoder(window[2]), 10, exponent)  # ten prototypes
    models = nn.ModuleList([model])
    if args.overcluster:
        # A second model on the same encoder, with more prototypes, sees finer differences.
        models.append(make_model(model.encoder, args.overcluster, exponent))
    return SimpleNamespace(window=window, models=models)

def widen(start):
    """Let the model of a window take whole images, at first with weight 0 at new positions."""
    model, (row, column, size) = start.models[0], start.window
    left, top = column // 8, row // 8
    for encoder in (model.encoder, model.target_encoder) if size < SIZE else ():
        linear = encoder[-1]
        weight = linear.weight.detach().view(128, 64, 2, 2)
        weight = F.pad(weight, (left, 2 - left, top, 2 - top))  # (128, 64, 4, 4), 0 elsewhere
        linear.weight = nn.Parameter(weight.flatten(1), linear.weight.requires_grad)
    return SimpleNamespace(window=(0, 0, SIZE), models=start.models[:1])

def schedule(done):
    """Learning rate, sharpening and EMA momentum when this share of the training is done."""
    warmup = min(1, 20 * done + 0.02)
    decay = 0.55 + 0.45 * math.cos(math.pi * done)  # from 1 to 0.1
    # Soft targets and a fast target network let the first clusters still change.
    sharpening = max(0.25, 0.6 - 0.5 * done)
    ema_momentum = 0.9 + 0.09 * min(1, 1.5 * done)
    return 2e-3 * warmup * decay, sharpening, ema_momentum

def train(runs, stage, epochs, data, args, progress):
    """Train all runs on the same batches and views, each on its own window of the images."""
    # `data` has (images, indices into them) of the digits and of the backgrounds, without labels.
    steps_per_epoch = args.images // BATCH_SIZE
    for run in runs:
        run.optimizer = torch.optim.AdamW(run.models.parameters(), weight_decay=0.05)
    for epoch in range(epochs):
        for run in runs:
            run.terms = dict.fromkeys(TERMS, 0.0)
        batches = torch.randperm(args.images).split(BATCH_SIZE)
        for step, batch in enumerate(batches[:steps_per_epoch]):
            done = (epoch + step / steps_per_epoch) / epochs  # from 0 to 1
            lr, sharpening, ema_momentum = schedule(done)
            if stage == "whole":
                lr, sharpening, ema_momentum = lr / 2, 0.25, 0.99
            images = [bank[index[batch]] for bank, index in data]
            views = [make_view(*images, args) for _ in range(2)]  # the target and one anchor

            for run in runs:
                crops = [crop(view, run.window) for view in views]
                losses, terms = zip(*[
                    model(crops, sharpening=sharpening, prior_weight=args.prior_weight,
                          sinkhorn_iterations=args.sinkhorn_iterations,
                          relative_sharpening=args.relative_sharpening)
                    for model in run.models])
                run.optimizer.param_groups[0]["lr"] = lr
                run.optimizer.zero_grad()
                sum(losses).backward()
                nn.utils.clip_grad_norm_(run.models.parameters(), 3.0)
                run.optimizer.step()
                for model in run.models:
                    model.update_target(ema_momentum)
                values = {"loss": losses[0], **terms[0]}  # without the overclustering
                for key in TERMS:
                    run.terms[key] += values[key].item() / steps_per_epoch
        progress.done += 1
        left = (time.time() - progress.began) * (progress.all / progress.done - 1)
        best = min(runs, key=lambda run: run.terms["loss"])
        terms = "".join(f"{value:>9.3f}" for value in best.terms.values())
        print(f"{progress.name}{best.window!s:>13}{epoch + 1:>6}{terms}{left:>6.0f}s", flush=True)

# ---- One experiment ------------------------------------------------------------------------------
def experiment(seed, exponent, args):
    """One seed and one prior: -> its entry in results.json, and the images of figure 3."""
    torch.set_num_threads(1)  # faster here, and the same bits for any number of cores
    torch.manual_seed(seed)
    (digits, digit_labels), (test_digits, test_labels) = load_digits(args.digits, args.root)
    backgrounds = load_backgrounds(args.backgrounds, args.root)
    kinds = torch.arange(len(backgrounds))
    data = [(digits, sample(digit_labels, args.exponent, args.images)),
            (backgrounds, sample(kinds, 0.0, args.images))]
    # Test digits are balanced, so chance is .1 for all of them.
    index, background = sample(test_labels, 0.0, 2000), sample(kinds, 0.0, 2000)
    images = make_view(test_digits[index], backgrounds[background], args)
    test = {"images": images, "digit": test_labels[index], "background": background}

    places = itertools.product((0, 8, 16), repeat=2)
    windows = [(*place, WINDOW) for place in places] if args.starts else [(0, 0, SIZE)]
    starts = [make_start(window, seed, exponent, args) for window in windows]
    whole_epochs = math.ceil(args.epochs / 2)
    progress = SimpleNamespace(name=f"{seed:>4}{exponent:>9.2f}", began=time.time(), done=0)
    progress.all = args.epochs + whole_epochs
    train(starts, "starts", args.epochs, data, args, progress)
    # Only for the report, before `widen` changes the best start. The loss chooses.
    for start in starts:
        measure(start, test)
        start.encodes = max(LABELS, key=lambda what: start.terms[f"same_{what}"])
    final = widen(min(starts, key=lambda start: start.terms["loss"]))
    train([final], "whole", whole_epochs, data, args, progress)
    save(final.models[0].state_dict(), args.out / f"model_{exponent:g}_{seed}.pt")
    features = measure(final, test)
    for what in LABELS:
        losses = [start.terms["loss"] for start in starts if start.encodes == what]
        # It can happen that no start encodes the digit, or that none encodes the background.
        if losses:
            final.terms[f"{what}_start"] = min(losses)
    record = {"seed": seed, "exponent": exponent, "results": finite(final.terms), "starts": [
        {"window": start.window, "encodes": start.encodes, **finite(start.terms)}
        for start in starts]}
    _, queries = np.unique(test["digit"], return_index=True)  # the first image of each digit
    _, nearest = pmsn.nearest_neighbors(features[queries], features, 9)
    return record, (images[nearest, 0].numpy(), test["digit"][nearest].numpy())

@torch.no_grad()
def measure(run, test):
    """Features (N, 128) of what the run sees. Adds same_digit and same_background to its terms."""
    features = run.models[0].target_encoder(crop(test["images"], run.window))
    for what in LABELS:
        run.terms[f"same_{what}"] = agreement(features, test[what])
    return features

def agreement(features, labels):
    """Share of the 10 nearest neighbors, without the image itself, that have its label."""
    _, nearest = pmsn.nearest_neighbors(features, features, 11)
    return (labels[nearest[:, 1:]] == labels[:, None]).float().mean().item()

# ---- Figures -------------------------------------------------------------------------------------
def plot_neighbors(pictures, summary, data_exponent, path):
    """Figure 3: one image per digit and its 8 nearest neighbors, for each prior."""
    figure = Figure(figsize=(13, 8.2), layout="constrained")
    axes = figure.subplots(1, 2)
    wins = []
    for ax, exponent, name in zip(axes, (data_exponent, 0.0), ("power-law", "uniform")):
        row, (images, digits) = summary[exponent], pictures[exponent]
        same = digits == digits[:, :1]  # (10, 9), first the image itself
        # Frames of 3 pixels: green for the same digit, black for the image itself.
        tiles = np.ones((10, 9, 38, 38, 3))
        tiles[same] = 0.24, 0.62, 0.3
        tiles[:, 0] = 0
        tiles[..., 3:-3, 3:-3, :] = images[..., None].clip(-1, 1) / 2 + 0.5
        ax.imshow(tiles.transpose(0, 2, 1, 3, 4).reshape(380, 342, 3))
        ax.set_axis_off()
        digit, background = (row[f"same_{what}"]["mean"] for what in LABELS)
        ax.set_title(f"{name} prior\nsame digit {digit:.2f}, same background {background:.2f}")
        wins.append("digit" if digit > background else "background")
    figure.suptitle(f"Neighbors share the {wins[0]} under the power-law prior and the {wins[1]} "
                    "under the uniform prior")
    figure.supxlabel("Each row: an image (black) and its neighbors (green: same digit), last seed. "
                     f"Numbers: 10 neighbors, mean over n = {number_of_seeds(summary)} seeds")
    figure.savefig(path)

def plot_preference(summary, data_exponent, path):
    """The lowest loss of a digit start and of a background start, for each prior."""
    figure = Figure(figsize=(8, 7), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=[2, 1])
    for ax, key, label in [
            (top, "digit_start", "best start that encodes the digit"),
            (top, "background_start", "best start that encodes the background"),
            (bottom, "same_digit", "start with the lowest loss, after whole images")]:
        shown = {exponent: row[key] for exponent, row in summary.items() if key in row}
        mean, std = ([values[of] for values in shown.values()] for of in ("mean", "std"))
        ax.errorbar(list(shown), mean, std, marker="o", label=label)
    for ax in (top, bottom):
        ax.axvline(data_exponent, color="gray", linestyle=":", label="exponent of the digits")
        ax.legend()
        ax.set_ylim(0)
    top.set_ylabel("loss of the start (nats)")
    bottom.set(xlabel="exponent of the prior (0: uniform)", ylabel="neighbors with\nsame digit")
    wins = []
    for exponent, row in summary.items():
        digit, background = row.get("digit_start"), row.get("background_start")
        if digit and background:
            if digit["mean"] + digit["std"] < background["mean"] - background["std"]:
                wins.append(f"{exponent:g}")
    where = f"exponents {', '.join(wins)}" if wins else "no exponent that has both kinds of starts"
    figure.suptitle(f"The loss is lower for the digit at {where}\n"
                    f"(mean ± standard deviation, n = {number_of_seeds(summary)} seeds)")
    figure.savefig(path)

# ---- Command line --------------------------------------------------------------------------------
def parse(parser, argv):
    """The arguments. In a list no value may stand twice, because its result would count twice."""
    args = parser.parse_args(argv)
    for name, values in vars(args).items():
        for value in values if isinstance(values, list) else ():
            if values.count(value) > 1:
                parser.error(f"argument --{name}: {value} is given twice")
    return args

def run_in_processes(experiment, jobs, args):
    """The results of experiment(*job, args) for all jobs, by `args.workers` processes."""
    began, results = time.time(), []
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
    with ProcessPoolExecutor(args.workers, multiprocessing.get_context("spawn"),
                             initializer=end_with_parent) as pool:
        try:
            for result in pool.map(experiment, *zip(*jobs), itertools.repeat(args)):
                results.append(result)
                left = (time.time() - began) * (len(jobs) / len(results) - 1)
                print(f"{len(results)} of {len(jobs)} runs done, about {left:.0f} s left",
                      flush=True)
        except BaseException:  # an error, or KeyboardInterrupt
            for process in multiprocessing.active_children():
                process.kill()
            raise
    return results

def end_with_parent():
    """Let this worker end when its parent ends, also if the parent is killed and cannot tell it."""
    def wait():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()

def finite(results):
    """The results {name: number} without NaN and infinity, which JSON does not have."""
    return {name: value for name, value in results.items() if math.isfinite(value)}

def save(content, path):
    """Write a file of results (.json) or a model (.pt)."""
    # A run can be killed while it writes. So a file gets its name when it is complete.
    temporary = path.with_name(f"{path.name}.tmp")
    if path.suffix == ".json":
        temporary.write_text(json.dumps(content, indent=1, default=str, allow_nan=False))
    else:
        torch.save(content, temporary)
    os.replace(temporary, path)

def summarize(runs, key):
    """{key(run): {"n": number of seeds, name of a result: {"mean": mean, "std": spread}}}.

    A result that is missing for one of the seeds is left out.
    """
    groups, summary = {}, {}
    for run in runs:
        groups.setdefault(key(run), []).append(run["results"])
    for group, results in groups.items():
        summary[group] = row = {"n": len(results)}
        for name in results[0]:
            if all(name in result for result in results):
                values = [result[name] for result in results]
                spread = np.std(values, ddof=min(1, len(values) - 1))
                row[name] = {"mean": np.mean(values), "std": spread}
    return summary

def number_of_seeds(summary):
    return next(iter(summary.values()))["n"]

def cell(row, name):
    """A result in a table, or a dash if `summarize` has left it out."""
    return "{mean:.3f} ± {std:.3f}".format(**row[name]) if name in row else "-"

def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--digits", default="synthetic", choices=("synthetic", "MNIST"), help="source of digits")
    add("--backgrounds", default="synthetic", help="CIFAR10 or a folder of class folders")
    add("--root", default="data", help="where torchvision finds data sets, or downloads them")
    add("--out", type=Path, default="runs/corner", help="folder for results and figures")
    add("--seeds", type=number(int, 0, 2_000_000_000), nargs="+", default=[0], help="one run each")
    add("--curve", action="store_true", help="seven priors instead of two: preference.png")
    add("--workers", type=number(int, 1), default=multiprocessing.cpu_count(), help="processes")
    add("--exponent", type=number(float, 0, 4), default=1.0, help="of digits and their prior")
    add("--overcluster", type=number(int, 2), help="prototypes of a second head for the starts")
    add("--prior_weight", type=number(float, 0, 1e6), default=1.0, help="weight of the KL term")
    add("--sinkhorn_iterations", type=number(int, 0), default=0, help="of targets onto the prior")
    add("--relative_sharpening", action="store_true", help="relative to the prior, see pmsn.py")
    add("--contrast", type=number(float, 0, 1), default=0.5, help="contrast of the backgrounds")
    add("--deform", type=number(float, 0, 1), default=0.2, help="how much digits change shape")
    add("--images", type=number(int, BATCH_SIZE), default=15360, help="training images")
    add("--epochs", type=number(int, 1), default=6, help="of the starts; whole images get half")
    add("--starts", type=int, choices=(0, 9), default=9, help="0 is one start on whole images")
    add("--quick", action="store_true", help="few images and epochs, in half a minute")
    args = parse(parser, argv)
    if args.quick:
        args.images, args.epochs = 1024, 2
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        load_digits(args.digits, args.root)
        load_backgrounds(args.backgrounds, args.root)
    except (OSError, RuntimeError) as error:
        parser.error(f"cannot load the data or write to --out: {' '.join(str(error).split())}. "
                     "--digits synthetic --backgrounds synthetic need no data")

    exponents = sorted({0.0, args.exponent, *(CURVE if args.curve else [])})
    print("seed exponent  best window epoch     loss       CE       KL     eff.   left", flush=True)
    began, jobs = time.time(), list(itertools.product(args.seeds, exponents))
    found = run_in_processes(experiment, jobs, args)
    runs = [run for run, _ in found]
    summary = summarize(runs, key=lambda run: run["exponent"])
    config = {**vars(args), "torch": torch.__version__}
    # The results come first. Nothing that goes wrong with the table or a figure can lose them.
    save({"config": config, "runs": runs, "summary": summary}, args.out / "results.json")
    print(f"\nmean ± std over n = {len(args.seeds)} seeds")
    columns = "digit_start background_start same_digit same_background prior_kl".split()
    print("exponent" + "".join(f"{column:>18}" for column in columns))
    for exponent, row in summary.items():
        print(f"{exponent:>8.2f}" + "".join(f"{cell(row, column):>18}" for column in columns))
    pictures = {run["exponent"]: picture for run, picture in found}  # of the last seed
    plot_neighbors(pictures, summary, args.exponent, args.out / "neighbors.png")
    if args.curve:
        plot_preference(summary, args.exponent, args.out / "preference.png")
    print(f"After {time.time() - began:.0f} s, results.json and the figures are in {args.out}")

if __name__ == "__main__":
    print_any_text()
    main()
