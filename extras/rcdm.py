"""What a prototype stands for, drawn by a diffusion model (figures 2 and 4 of the paper).

RCDM (Bordes et al., 2022) is a diffusion model that draws images for a given representation. We
draw many images for one prototype. What they share is what the prototype stands for, and what
differs between them is what it leaves open. The images and the models are those of mnist_corner.py
with long-tailed digits: with the power-law prior a prototype should stand for digits, and with the
uniform prior for a background.

    python extras/rcdm.py               # two models, a diffusion model for each: 15 to 45 minutes
    python extras/rcdm.py --quick       # every step, with too little data, in half a minute
    python extras/rcdm.py --models runs/corner      # models that mnist_corner.py has trained

A model is the new network of step 3 there, which has learned what its prototypes need. The
diffusion model sees images like the ones that this network has seen, with its projections, scaled
to length 1. It sees no label. Prototypes live in the same space, so afterwards a prototype can take
the place of a projection.
Not in the paper: a small U-Net, flow matching, and noise on the projections (see `add_noise`).
--out gets rcdm.png, rcdm.json, and the trained models.
"""

import itertools
import json
import math
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

# The other scripts are in the folder above, and are not installed.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import mnist_corner
from mnist_corner import CLASSES, DIM, EXPONENT, LABELS, NUM_PROTOTYPES, model_path
from support import drawings
from support.evaluation import purity
from support.figures import Figure, write_figure
from support.results import cell, number_of_seeds, run_or_continue, summarize
from support.runs import (Distinct, Parser, UserError, available_cores, command, folder, load_file,
                          number, save_file, say)

BATCH_SIZE = 128
SIMILAR = 100  # images whose projections are the most similar ones to a prototype
PRIORS = {EXPONENT: "power-law prior (PMSN)", 0.0: "uniform prior (MSN)"}  # by their exponents


# ---- RCDM: a U-Net and flow matching (Lipman et al., 2023) --------------------------------------
class Block(nn.Module):
    """A residual block. The condition scales and shifts the normalized features, as in RCDM."""
    def __init__(self, inputs, outputs):
        super().__init__()
        self.norm1 = nn.GroupNorm(8, inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.norm2 = nn.GroupNorm(8, outputs, affine=False)
        self.scale_and_shift = nn.Linear(128, 2 * outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.skip = nn.Conv2d(inputs, outputs, 1)
        # At first a block is only its skip connection.
        nn.init.zeros_(self.conv2.weight)
        nn.init.zeros_(self.conv2.bias)

    def forward(self, x, condition):
        scale, shift = self.scale_and_shift(condition)[:, :, None, None].chunk(2, dim=1)
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.norm2(h) * (1 + scale) + shift
        return self.skip(x) + self.conv2(F.silu(h))


class UNet(nn.Module):
    """Noisy images (B, 1, 32, 32), times (B,), projections (B, DIM) -> velocities of the images."""
    def __init__(self):
        super().__init__()
        self.condition = nn.Sequential(
            nn.Linear(12 + DIM, 128), nn.SiLU(), nn.Linear(128, 128), nn.SiLU())
        self.first = nn.Conv2d(4, 32, 3, padding=1)
        # The names give the number of positions per side.
        self.down16, self.down8, self.down4 = Block(32, 32), Block(32, 64), Block(64, 128)
        self.up4, self.up8, self.up16 = Block(128, 128), Block(128 + 64, 64), Block(64 + 32, 32)
        self.last = nn.Sequential(nn.GroupNorm(8, 32), nn.SiLU(), nn.Conv2d(32, 4, 3, padding=1))

    def forward(self, images, times, projections):
        angles = math.pi * times[:, None] * 2.0 ** torch.arange(6, device=times.device)  # (B, 6)
        # Entries of a vector of length 1 are small. The factor makes them as large as the others.
        projections = math.sqrt(DIM) * projections
        condition = torch.cat([angles.sin(), angles.cos(), projections], dim=1)
        condition = self.condition(condition)  # (B, 128)
        # Four pixels become four channels, so there are a quarter of the positions.
        x = self.first(F.pixel_unshuffle(images, 2))  # (B, 32, 16, 16)
        skip16 = self.down16(x, condition)  # (B, 32, 16, 16)
        skip8 = self.down8(F.avg_pool2d(skip16, 2), condition)  # (B, 64, 8, 8)
        x = self.down4(F.avg_pool2d(skip8, 2), condition)  # (B, 128, 4, 4)
        x = F.interpolate(self.up4(x, condition), scale_factor=2)  # (B, 128, 8, 8)
        x = self.up8(torch.cat([x, skip8], dim=1), condition)  # (B, 64, 8, 8)
        x = F.interpolate(x, scale_factor=2)  # (B, 64, 16, 16)
        x = self.up16(torch.cat([x, skip16], dim=1), condition)  # (B, 32, 16, 16)
        return F.pixel_shuffle(self.last(x), 2)


def flow_loss(model, images, projections):
    """Flow matching: x_t = (1 - t) image + t noise, and the model predicts dx_t / dt."""
    noise = torch.randn_like(images)
    # Times near 0 and 1 are rarer, because they teach less (Esser et al., 2024).
    times = torch.randn(len(images), device=images.device).sigmoid()
    t = times[:, None, None, None]
    velocities = model((1 - t) * images + t * noise, times, projections)
    return F.mse_loss(velocities, noise - images)


def sample(velocity, noise, steps=25):
    """Follow dx/dt = velocity(x, t) from noise (t = 1) to images (t = 0), by the midpoint rule."""
    x, step = noise, 1 / steps
    for i in range(steps):
        t = 1 - i * step
        middle = x - velocity(x, t) * step / 2
        x = x - velocity(middle, t - step / 2) * step
    return x


@torch.no_grad()
def draw(unet, projections, noise):
    """Samples (R, S, 1, 32, 32) of projections (R, DIM), from noise (R or 1, S, 1, 32, 32)."""
    rows = []
    for projection, x in zip(projections, itertools.cycle(noise)):
        condition = projection.expand(len(x), -1)
        rows.append(sample(lambda x, t: unet(x, x.new_full((len(x),), t), condition), x))
    return torch.stack(rows)


# ---- PMSN and its images -------------------------------------------------------------------------
def load_pmsn(path, exponent):
    """A model of mnist_corner.py."""
    encoder = drawings.make_encoder(drawings.SIZE)
    model = drawings.make_pmsn(encoder, NUM_PROTOTYPES, exponent, DIM)
    model.load_state_dict(load_file(path))
    return model.eval().requires_grad_(False)


def project(model, images):
    """Projections (N, DIM) of images, with length 1, by the network that the winner has taught."""
    # Not by the target network: this is the winner, whose encoder SimCLR has trained.
    parts = [model.head(model.encoder(part)) for part in images.split(1000)]
    return F.normalize(torch.cat(parts), dim=1)


def add_noise(projections, length=0.5):
    """Add normal noise of about this length to projections (N, DIM), and scale them to length 1."""
    # No image has its projection exactly at a prototype. With noise, the diffusion model learns
    # what images have in common whose projections are near a point, whatever the point.
    noise = length / math.sqrt(DIM) * torch.randn_like(projections)
    return F.normalize(projections + noise, dim=1)


def load_images(corner):
    """The images for training and for the test, for these settings of mnist_corner.py."""
    args = SimpleNamespace(**corner)
    return mnist_corner.load_images(args, "digit", mnist_corner.make_settings(args))


def draw_images(source, count, balanced=False):
    """Random images (count, 1, 32, 32) with labels. Each shows its own digit and background."""
    pairs = source.draw(count, balanced)
    return source.render(pairs), source.labels_of(pairs)


# ---- Training ------------------------------------------------------------------------------------
def train_classifier(source, steps):
    """A supervised network for digit and background: (B, 1, 32, 32) -> (B, 2, CLASSES)."""
    network = nn.Sequential(drawings.make_encoder(drawings.SIZE), nn.GELU(),
                            nn.Linear(128, 2 * CLASSES), nn.Unflatten(1, (2, -1)))
    optimizer = torch.optim.AdamW(network.parameters())
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 2e-3 * (1 - step / steps)
        images, labels = draw_images(source, 256, balanced=True)
        outputs = network(images)
        loss = sum(F.cross_entropy(outputs[:, i], labels[what]) for i, what in enumerate(LABELS))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return network


def train_unet(model, source, steps, name):
    """A diffusion model for the projections of one PMSN, and its loss in the last 100 steps."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, unet = model.to(device), UNet().to(device)
    optimizer = torch.optim.AdamW(unet.parameters())
    began, losses = time.monotonic(), []
    for step in range(1, steps + 1):
        optimizer.param_groups[0]["lr"] = 2e-3 * min(1, step / 100) * (1 - step / (steps + 1))
        images = draw_images(source, BATCH_SIZE)[0].to(device)
        projections = add_noise(project(model, images))
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            loss = flow_loss(unet, images, projections)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
        if step % 100 == 0 or step == steps:
            left = (time.monotonic() - began) * (steps / step - 1)
            mean = np.mean(losses[-100:])
            say(f"{name}{step:>7}{mean:>9.4f}{left:>7.0f}s")
    model.cpu()
    return unet.cpu(), mean


# ---- One experiment ------------------------------------------------------------------------------
def experiment(seed, exponent, args):
    """Draw the prototypes of one PMSN. Returns its run. The images of the figure go to a file."""
    torch.set_num_threads(1)  # faster here, because the runs are side by side
    torch.manual_seed(seed)  # Both priors get the same weights, batches and noise.
    source, test_source = load_images(args.corner)
    model = load_pmsn(model_path(args.models, "digit", exponent, seed), exponent)
    classifier = train_classifier(source, args.steps // 4)
    unet, loss = train_unet(model, source, args.steps, name=f"{seed:>4}{exponent:>9.2f}")
    save_file(unet.state_dict(), args.out / f"unet_{exponent:g}_{seed}.pt")

    torch.manual_seed(seed)  # A saved U-Net draws the same again.
    prototypes = F.normalize(model.prototypes, dim=1)  # (K, DIM)
    numbers = torch.arange(len(prototypes))
    images, labels = draw_images(source, 10_000)  # as in training
    cosines = project(model, images) @ prototypes.T  # (10,000, K)
    highest, groups = cosines.max(dim=1)
    shares = groups.bincount(minlength=len(prototypes)) / len(groups)  # of the images, (K,)
    # The images most similar to a prototype can share more than all of its images do. Samples are
    # drawn for the place of the prototype itself, so they can share this, too.
    similar = cosines.topk(SIMILAR, dim=0).indices.T.flatten()  # (K * SIMILAR,)
    similar_to = numbers.repeat_interleave(SIMILAR)
    noise = torch.randn(len(prototypes), args.samples, 1, 32, 32)
    samples = draw(unet, prototypes, noise).flatten(0, 1)
    drawn_from = numbers.repeat_interleave(args.samples)
    nearest = (project(model, samples) @ prototypes.T).argmax(dim=1)
    faithful = (nearest == drawn_from).float().view(-1, args.samples).mean(dim=1)  # (K,)
    test_images, test_labels = draw_images(test_source, 2000, balanced=True)

    results = {"loss": loss, "cosine": highest.mean().item()}
    # The share of samples whose nearest prototype is the one from which they were drawn.
    results["faithfulness"] = (shares @ faithful).item()
    found, test_found = classify(classifier, samples), classify(classifier, test_images)
    for what in LABELS:
        chance = labels[what][: len(samples)]  # labels of any images
        results[f"{what}_of_samples"] = purity(drawn_from, found[what], shares)
        results[f"{what}_by_chance"] = purity(drawn_from, chance, shares)
        results[f"{what}_of_images"] = purity(groups, labels[what], shares)
        results[f"{what}_of_nearest"] = purity(similar_to, labels[what][similar], shares)
        right = test_found[what] == test_labels[what]
        results[f"{what}_accuracy"] = right.float().mean().item()
    record = {"seed": seed, "exponent": exponent, "results": results,
              "shares": shares.tolist()}

    # In the figure all rows get the same noise, so that one sees what the prototype changes.
    order = shares.argsort(descending=True)
    pictures = {"shares": shares[order],
                "prototypes": draw(unet, prototypes[order], noise[:1, :8])}
    save_file(pictures, pictures_path(args.out, exponent, seed))
    return [record]


def pictures_path(folder, exponent, seed):
    return folder / f"pictures_{exponent:g}_{seed}.pt"


def load_pictures(folder, seed):
    return {exponent: load_file(pictures_path(folder, exponent, seed)) for exponent in PRIORS}


@torch.no_grad()
def classify(network, images):
    outputs = torch.cat([network(part) for part in images.split(1000)])
    return dict(zip(LABELS, outputs.argmax(dim=2).T))


# ---- Figures -------------------------------------------------------------------------------------
def show(ax, images):
    """Images (rows, columns, 1, 32, 32) in about [-1, 1] as one picture with white lines."""
    rows, columns = images.shape[:2]
    tiles = np.ones((rows, columns, 34, 34))
    tiles[..., 1:-1, 1:-1] = images[:, :, 0].clamp(-1, 1) / 2 + 0.5
    tiles = tiles.transpose(0, 2, 1, 3).reshape(34 * rows, 34 * columns)
    ax.imshow(tiles, cmap="gray", vmin=0, vmax=1)
    ax.set(xticks=[], yticks=[])
    ax.spines[:].set_visible(False)


def plot_prototypes(pictures, summary):
    """Samples of the prototypes of both models, and what these samples have in common."""
    figure = Figure(figsize=(12, 4.7), layout="constrained")
    wins = {}
    for ax, (exponent, shown) in zip(figure.subplots(1, 2), pictures.items()):
        # A prototype stands for the feature that its samples share more often than by chance. If
        # the shares are less than .3 of the way from chance to 1, it stands for nothing clear.
        row, agree, scores = summary[exponent], [], {"nothing": 0.3}
        for what in LABELS:
            share, chance = (row[f"{what}_{of}"]["mean"] for of in ("of_samples", "by_chance"))
            agree.append(f"the same {what}: {share:.2f} (by chance {chance:.2f})")
            scores[f"a {what}"] = (share - chance) / (1 - chance)
        wins[exponent] = max(scores, key=scores.get)
        ax.set_title("\n".join([f"{PRIORS[exponent]}: samples of a prototype show", *agree]))
        show(ax, shown["prototypes"])
        ax.set_yticks(17 + 34 * np.arange(len(shown["shares"])),
                      [f"{share:.0%}" for share in shown["shares"]])
    figure.suptitle(f"A prototype stands for {wins[EXPONENT]} under the power-law prior and for "
                    f"{wins[0.0]} under the uniform prior", fontsize="x-large")
    figure.supxlabel("Each row: samples of one prototype, last seed (left: its share of images). "
                     "Each column: the same noise. Numbers: mean over "
                     f"n = {number_of_seeds(summary)} seeds",
                     fontsize="medium")
    return figure


# ---- Command line --------------------------------------------------------------------------------
@command
def main(argv=None):
    parser = Parser("What a prototype stands for, drawn by a diffusion model (figures 2 and 4)")
    add = parser.add_argument
    add("--models", type=Path, help="--out of mnist_corner.py (default: train models in --out)")
    add("--out", type=folder, default="runs/rcdm", help="folder for results and the figure")
    add("--seeds", type=number(int, 0, 2_000_000_000), nargs="+", action=Distinct, default=[0],
        help="one run each")
    add("--steps", type=number(int, 10), default=1600, help="of the diffusion model")
    add("--workers", type=number(int, 1, 1000), default=available_cores(), help="processes")
    add("--quick", action="store_true", help="few images and steps, in half a minute")
    args = parser.parse_args(argv)
    args.samples = 64  # of each prototype
    if args.quick:
        args.steps, args.samples = 10, 4
    seeds = list(map(str, args.seeds))
    if args.models is None:
        args.models = args.out / ("quick_models" if args.quick else "models")
        say(f"mnist_corner.py trains the models in {args.models}")
        flags = ["--workers", str(args.workers), *["--quick"] * args.quick]
        mnist_corner.main(["--out", str(args.models), "--seeds", *seeds, *flags])
    jobs = list(itertools.product(args.seeds, PRIORS))
    try:
        args.corner = json.loads((args.models / "results.json").read_text())["config"]
        load_images(args.corner)
        for seed, exponent in jobs:
            load_pmsn(model_path(args.models, "digit", exponent, seed), exponent)
    except Exception as error:  # whatever a wrong file can cause
        raise UserError(f"cannot use {args.models}: {error}. It must be the --out of one run of "
                        f"mnist_corner.py, with --seeds {' '.join(seeds)}") from error

    say("seed exponent   step     loss    left")
    config = {name: value for name, value in vars(args).items()
              if name not in ("models", "out", "seeds", "workers")}
    runs = run_or_continue(experiment, jobs, args, config, args.out / "rcdm.json")
    summary = summarize(runs, key=lambda run: run["exponent"])
    say(f"\nmean ± std over n = {len(args.seeds)} seeds")
    say("exponent".ljust(24) + "".join(f"{exponent:>18.2f}" for exponent in summary))
    for key in runs[0]["results"]:
        say(f"{key:<24}" + "".join(f"{cell(row, key):>18}" for row in summary.values()))
    write_figure(args.out / "rcdm.png", lambda: plot_prototypes(
        load_pictures(args.out, args.seeds[-1]), summary))
    say(f"rcdm.json and the figure are in {args.out}")


if __name__ == "__main__":
    main()
