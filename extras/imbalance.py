"""What class-imbalanced mini-batches do to five methods (table 1 and figure 5 of the paper).

SimCLR, VICReg, SwAV and MSN have a volume term, which spreads every mini-batch evenly. In a
mini-batch of one class all images share the class, so they can be spread only by something else,
and the network stops encoding the class. MAE has no volume term and should lose little. The paper
trains on the same images twice, with all classes per mini-batch and with few.

With one class per mini-batch, each step of the optimizer sees another class, too, which can hurt
any method. To tell both reasons apart, a step takes the mean gradient of several mini-batches
here, and there are three trainings with the same steps, images and start weights:

    all            the mini-batches of a step have all classes, each of them
    few in batch   each mini-batch has few classes, and those of a step together have all. The
                   images of a step are the same as before. Only how they are divided differs.
    few in step    all mini-batches of a step have the same few classes, as in the paper

What "few in batch" loses is lost by what a mini-batch computes together: the volume term, and
BatchNorm. (MAE has neither, so it shows how large random differences are.)

    python extras/imbalance.py                    # drawn glyphs, 7 minutes
    python extras/imbalance.py --data CIFAR10     # photographs, half an hour
    python extras/imbalance.py --quick            # a short run from end to end

--grouped_by takes another property than the class: mini-batches of images that are equally bright,
say, have all classes. By the paper the network then stops encoding how bright an image is, and
keeps the class. Properties of photographs are luminance, color and orientation in five bins, and of
glyphs the font and the second glyph (see support/glyphs.py). They are measured in any case.

We report what is lost: the accuracy on frozen features after training with all classes per
mini-batch, minus the accuracy after training with few. Linear probe and k-NN always learn from all
training images. (With more than 100 classes there is only k-NN.)

Unlike the paper, which trains ResNet-50 and vision transformers on ImageNet with mini-batches of
up to 4096 images, SimCLR, VICReg, SwAV and MSN have a small ResNet here, or convolutions for
glyphs. MAE hides patches, has a small vision transformer, and uses one of the two views. Each
method has its own learning rate. So compare losses of accuracy between methods, and not accuracies.
The paper's data2vec is left out: on CIFAR-10 it hardly learned in this time (extras/NOTEBOOK.md).

More methods, with --methods: With one class per mini-batch, the statistics of BatchNorm come from
one class. SimCLR-GroupNorm has no BatchNorm. PMSN (a steep prior in any order, see
pmsn.in_order_of) and MSN-5 (five prototypes) do not force a mini-batch of one class onto many
prototypes: do they lose less?

--out gets results.json and imbalance.png. A run is in results.json as soon as it is done, and the
same command continues from there. The seeds change weights and mini-batches, and not the images.
"""

import functools
import itertools
import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.swa_utils import update_bn

# The other scripts are in the folder above, and are not installed.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import pmsn
from support.drawings import SIZE, make_encoder
from support.evaluation import knn_predictions, linear_probe
from support.figures import Figure, write_figure
from support.glyphs import TRAIN_FONTS, GlyphImages
from support.images import normalize_images
from support.photographs import (load_splits, make_resnet, random_crops, read_images,
                                 warmup_cosine)
from support.results import cell, interval, number_of_seeds, run_or_continue, summarize
from support.runs import Distinct, Parser, UserError, available_cores, command, folder, number, say

PROPERTIES = ("luminance", "color", "orientation")  # of photographs
ARMS = {"batch": "few in batch", "step": "few in step"}
ARM_COLORS = {"batch": "#30638e", "step": "#b9c9d6"}
KIND = ("method", "arm", "classes_per_batch", "lr_scale")  # what runs of different seeds share


# ---- Data ----------------------------------------------------------------------------------------
@dataclass
class Images:
    views: Callable  # a random view of the images with these numbers, (B,) -> (B, C, 32, 32)
    all_views: Callable  # () -> one view of each image, (N, C, 32, 32), made by the first call
    labels: dict  # {property: (N,)}, the class first


def photographs(images, num_classes, edges=None):
    """Images of uint8 (N, 3, 32, 32), of which image i has class i % C, and edges of the bins.

    Properties are five bins, which are equally full if no `edges` are given.
    """
    values = low_level(images)
    edges = edges or {name: values[name].quantile(torch.arange(1, 5) / 5) for name in PROPERTIES}
    labels = {"class": torch.arange(len(images)) % num_classes}
    labels |= {name: torch.bucketize(values[name], edges[name]) for name in PROPERTIES}

    def views(index):  # random crops in random colors. 32 pixels are too few to blur.
        return pmsn.make_views([random_crops(images[index])[:, None]], blur_p=0.0)[0]

    return Images(views, functools.cache(lambda: normalize_images(images)), labels), edges


def low_level(images):
    """What needs no understanding of an image: {task: numbers (N,)}. A flip does not change it.

    Color is red minus blue. Orientation goes from 0 (vertical edges) to pi/2 (horizontal edges).
    """
    images = images.float() / 255
    red, green, blue = images.mean(dim=(2, 3)).unbind(dim=1)
    dy, dx = torch.gradient(images.mean(dim=1), dim=(1, 2))  # (N, H, W)
    # (dx + i dy)^2 has twice the angle of the gradient. So opposite gradients add up, and do not
    # cancel. The absolute value makes an angle and its mirror image equal.
    squares = torch.complex(dx, dy).square().sum(dim=(1, 2))
    return {
        "luminance": (red + green + blue) / 3,
        "color": red - blue,
        "orientation": squares.angle().abs() / 2,
    }


def glyph_images(num_classes, count, seed):
    """Images of two glyphs, equally many of each class: the class, and a second one of 16."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        # Both views always show the same class: a mini-batch of one class has no other.
        data = GlyphImages(TRAIN_FONTS, num_classes, 0.0, 1.0, count, disagree=0.0)
        font = torch.randint(len(TRAIN_FONTS), (count,))
    data.labels = torch.arange(count) % num_classes
    data.glyph_index = font * num_classes + data.labels
    labels = {"class": data.labels, "font": font, "second": data.backgrounds}
    return Images(data.views, functools.cache(data.all_views), labels)


@functools.cache  # A process loads the images once, for all of its runs.
def load_data(data, root, count, validation, num_glyphs):
    """Images for training and for tests, `count` of each at most, and 4,096 glyphs for tests.

    With `validation`, tests use a fifth of the training photographs, or other glyphs.
    """
    if data == "glyphs":
        count -= count % num_glyphs
        return (glyph_images(num_glyphs, count, 0),
                glyph_images(num_glyphs, min(count, 4096), 2 if validation else 1))
    splits = load_splits(data, root)
    num_classes = len(splits[0].classes)
    if count < num_classes:
        raise ValueError(f"--images {count} are less than one for each of the {num_classes} "
                         "classes")
    images, test_images = (read_images(split, count // num_classes) for split in splits)
    if validation:
        kept = len(images) // num_classes * 4 // 5 * num_classes
        images, test_images = images[:kept], images[kept:]
    train, edges = photographs(images, num_classes)
    return train, photographs(test_images, num_classes, edges)[0]


# ---- Encoders ------------------------------------------------------------------------------------
def make_head(norm=nn.BatchNorm1d):
    """The head of MSN, (B, 128) -> (B, 128), with another `norm` if there is one."""
    head = pmsn.projection_head(128, 256, 128)
    head[1], head[4] = norm(256), norm(256)
    return head


def group_norm(channels):
    return nn.GroupNorm(8, channels)


def convolutions(data, norm=nn.BatchNorm2d):
    """The encoder of all methods but MAE, (B, C, 32, 32) -> (B, 128). Glyphs: with LayerNorm."""
    return make_encoder(SIZE) if data == "glyphs" else make_resnet(norm)


def make_vit():
    return pmsn.VisionTransformer(SIZE, patch_size=4, embed_dim=96, depth=3, num_heads=3)


# ---- Methods: modules that map two views, (B, C, 32, 32) each, to (loss, terms) ------------------
class TwoViews(nn.Module):
    """SimCLR, VICReg and SwAV: a loss on the embeddings of both views. SwAV has prototypes too."""

    def __init__(self, encoder, loss, num_prototypes=0, norm=nn.BatchNorm1d):
        super().__init__()
        self.encoder, self.head, self.loss = encoder, make_head(norm), loss
        self.prototypes = nn.ParameterList()
        if num_prototypes:
            self.prototypes.append(torch.randn(num_prototypes, 128))  # becomes a parameter

    def forward(self, views):
        embeddings = self.head(self.encoder(torch.cat(views)))
        first, second = embeddings.chunk(2)
        return self.loss(first, second, *self.prototypes)


def simclr(encoder, **options):
    return TwoViews(encoder, functools.partial(pmsn.simclr_loss, temperature=0.2), **options)


def masked_siamese(encoder, exponent, num_prototypes=64):
    """MSN, or PMSN if the exponent of the prior is not 0. It masks no patches."""
    prior = pmsn.power_law_prior(num_prototypes, exponent)
    return pmsn.PMSN(encoder, prior, head=make_head(), output_dim=128, patch_drop=0)


class MAE(nn.Module):
    """Masked autoencoder (He et al., 2022): a quarter of the patches predicts the other pixels."""

    def __init__(self, width=64):
        super().__init__()
        self.encoder = make_vit()
        self.patch_size, num_patches = self.encoder.patch_size, math.prod(self.encoder.grid)
        self.decoder_embed = nn.Linear(self.encoder.embed_dim, width)
        self.mask_token = nn.Parameter(0.02 * torch.randn(width))
        self.decoder_pos_embed = nn.Parameter(0.02 * torch.randn(num_patches, width))
        self.decoder = nn.Sequential(
            pmsn.Block(width, 4), nn.LayerNorm(width), nn.Linear(width, 3 * self.patch_size**2))

    def forward(self, views):
        images = in_color(views[0])
        tokens = self.encoder.embed_patches(images)  # (B, N, dim)
        visible = pmsn.random_patches(tokens, 0.75)  # indices, (B, kept)
        kept = tokens.gather(1, visible[:, :, None].expand(-1, -1, tokens.shape[2]))
        encoded = run_blocks(self.encoder, kept)[:, 1:]  # without CLS
        encoded = self.decoder_embed(encoded)  # (B, kept, width)
        # The decoder sees the encoded patches at their places, and the mask token elsewhere.
        full = self.mask_token.expand(*tokens.shape[:2], -1)
        full = full.scatter(1, visible[:, :, None].expand_as(encoded), encoded)
        predictions = self.decoder(full + self.decoder_pos_embed)  # (B, N, 48)
        hidden = torch.ones(tokens.shape[:2], dtype=torch.bool).scatter(1, visible, False)
        return mae_loss(predictions, images, hidden, self.patch_size), {}


def mae_loss(predictions, images, hidden, patch_size):
    """Squared error on hidden patches (B, N). The pixels of each patch are standardized."""
    pixels = F.unfold(images, patch_size, stride=patch_size).transpose(1, 2)  # (B, N, 48)
    variance, mean = torch.var_mean(pixels, dim=-1, keepdim=True)
    pixels = (pixels - mean) / (variance + 1e-6).sqrt()
    return (predictions - pixels).square().mean(dim=-1)[hidden].mean()


def in_color(images):
    return images.expand(-1, 3, -1, -1)  # Gray images, too, have three channels.


def run_blocks(encoder, tokens):
    """The output of the last block after the final norm, (B, N, dim) -> (B, 1 + N, dim)."""
    cls = encoder.cls_token + encoder.pos_embed[:, :1]
    return encoder.norm(encoder.blocks(torch.cat([cls.expand(len(tokens), -1, -1), tokens], dim=1)))


# For each method: a function of the data that makes the module, the learning rates for photographs
# and glyphs, options of the loss, and the untrained encoder of the same architecture. The rates for
# glyphs are the best of three on validation images, as a mean over "all" and "few in batch". Those
# for photographs were chosen with all classes per mini-batch (extras/NOTEBOOK.md has both).
METHODS = {
    "SimCLR": (lambda data: simclr(convolutions(data)), (4e-3, 2e-3), {}, "random convolutions"),
    "VICReg": (lambda data: TwoViews(convolutions(data), pmsn.vicreg_loss), (2e-3, 2e-3), {},
               "random convolutions"),
    "SwAV": (lambda data: TwoViews(convolutions(data), pmsn.swav_loss, num_prototypes=64),
             (4e-3, 2e-3), {}, "random convolutions"),
    "MSN": (lambda data: masked_siamese(convolutions(data), exponent=0.0), (2e-3, 2e-3), {},
            "random convolutions"),
    "MAE": (lambda data: MAE(), (3e-3, 3e-3), {}, "random ViT"),
    "SimCLR-GroupNorm": (
        lambda data: simclr(convolutions(data, group_norm), norm=group_norm), (4e-3, 2e-3), {},
        "random convolutions"),
    # 64 prototypes are about 6 per class of CIFAR-10. The prior with exponent 2 has 5 effective
    # prototypes (the exponential of its entropy).
    "PMSN": (lambda data: masked_siamese(convolutions(data), exponent=2.0), (2e-3, 2e-3),
             {"any_order": True}, "random convolutions"),
    "MSN-5": (lambda data: masked_siamese(convolutions(data), 0.0, num_prototypes=5),
              (2e-3, 2e-3), {}, "random convolutions"),
}
WITH_VOLUME = ("SimCLR", "VICReg", "SwAV", "MSN")
UNTRAINED = {"random convolutions": convolutions, "random ViT": lambda data: make_vit(),
             "raw pixels": lambda data: None}


# ---- Training: one loop for all methods ----------------------------------------------------------
class Steps(torch.utils.data.Sampler):
    """A batch_sampler: `accumulate` mini-batches in a row are one step of the optimizer.

    A step has `classes_per_step` classes, and each of its mini-batches has `classes_per_batch` of
    them, all equally often. For one seed the images of a step are the same for any
    `classes_per_batch`. Only how they are divided differs. ValueError if they cannot be divided
    equally.
    """
    def __init__(self, labels, batch_size, accumulate, classes_per_batch, classes_per_step, seed):
        groups, rest = divmod(classes_per_step, classes_per_batch)
        if rest or accumulate % groups or batch_size % classes_per_batch:
            raise ValueError(
                f"{classes_per_batch} of {classes_per_step} classes per mini-batch need an "
                f"--accumulate that is a multiple of {classes_per_step} / {classes_per_batch}, and "
                f"a --batch_size that is a multiple of {classes_per_batch}")
        self.labels, self.accumulate, self.seed = labels, accumulate, seed
        # groups of classes that share mini-batches, classes of a group, mini-batches of a group
        self.shape = groups, classes_per_batch, accumulate // groups
        self.steps = pmsn.ClassBatchSampler(labels, batch_size * accumulate, classes_per_step,
                                            seed=seed)

    def __len__(self):
        return len(self.steps) * self.accumulate

    def set_epoch(self, epoch):
        self.steps.set_epoch(epoch)

    def __iter__(self):
        generator = torch.Generator().manual_seed(self.seed)
        for step in self.steps:
            step = torch.tensor(step)
            of_each_class = step[self.labels[step].argsort()].view(math.prod(self.shape[:2]), -1)
            # Other classes share a mini-batch in each step.
            of_each_class = of_each_class[torch.randperm(len(of_each_class), generator=generator)]
            batches = of_each_class.view(*self.shape, -1).transpose(1, 2)
            yield from batches.reshape(self.accumulate, -1).tolist()


def train(name, images, sampler, seed, lr, title, args):
    """The trained encoder. Only the sampler knows the classes: it makes the mini-batches.

    With the same seed, all classes and few classes per mini-batch have the same start weights and
    the same random numbers for views.
    """
    torch.manual_seed(seed)
    make_method, _, loss_options, _ = METHODS[name]
    method = make_method(args.data).to(memory_format=torch.channels_last)  # faster on CPUs
    parameters = [p for p in method.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, weight_decay=0.05)
    steps, began = args.epochs * len(sampler) // args.accumulate, time.monotonic()
    for epoch in range(1, args.epochs + 1):
        sampler.set_epoch(epoch)
        losses = []
        for i, batch in enumerate(sampler, start=(epoch - 1) * len(sampler)):
            index = torch.tensor(batch)
            loss, _ = method([images.views(index) for _ in range(2)], **loss_options)
            (loss / args.accumulate).backward()  # adds to the gradients of earlier mini-batches
            losses.append(loss.item())

            step, place = divmod(i, args.accumulate)
            if place == args.accumulate - 1:
                optimizer.param_groups[0]["lr"] = lr * warmup_cosine(step, steps)
                nn.utils.clip_grad_norm_(parameters, 3.0)
                optimizer.step()
                optimizer.zero_grad()
                if hasattr(method, "update_target"):
                    method.update_target(ema_momentum=0.99)
        mean_loss = np.mean(losses)
        if not math.isfinite(mean_loss):
            raise UserError(f"the loss of {name} is not finite in epoch {epoch}: try a lower "
                            "--lr_scale")
        left = round((time.monotonic() - began) * (args.epochs - epoch) / epoch)
        say(f"{title} {epoch:>5}/{args.epochs:<4} {mean_loss:>9.4f} {left // 60:>8}:{left % 60:02}")
    # The features of MSN are those of its target network.
    return method.target_encoder if isinstance(method, pmsn.PMSN) else method.encoder


# ---- Measuring -----------------------------------------------------------------------------------
@torch.no_grad()
def features(encoder, views):
    """Frozen features (N, dim) of views. A ViT gives [CLS, mean over patches].

    Without an encoder they are the images at 8 x 8 pixels.
    """
    if encoder is None:
        return F.avg_pool2d(views, 4).flatten(1)
    if isinstance(encoder, pmsn.VisionTransformer):
        def run(x):
            tokens = run_blocks(encoder, encoder.embed_patches(in_color(x)))
            return torch.cat([tokens[:, 0], tokens[:, 1:].mean(dim=1)], dim=1)
    else:
        run = encoder.eval()
    return torch.cat([run(part) for part in views.split(500)])


def measure(encoder, images, test_images):
    """Accuracies {"class_knn": ..., "class_probe": ..., ...} of k-NN and linear probe.

    Both learn from all training images, however the encoder was trained.
    """
    with torch.random.fork_rng():
        torch.manual_seed(0)  # the same views for all encoders
        views, test_views = images.all_views(), test_images.all_views()
    if encoder is not None:
        # In training, the statistics of BatchNorm may come from one class at a time. We take them
        # again from mini-batches of all classes: image i has class i % C. A ViT has no BatchNorm.
        update_bn(views.split(500), encoder)
    x, test_x = features(encoder, views), features(encoder, test_views)
    found = {}
    for name, labels in images.labels.items():
        methods = {"knn": knn_predictions}
        if labels.max() < 100:  # With more classes a probe takes longer than the training.
            methods["probe"] = linear_probe
        for method, predict in methods.items():
            correct = predict(x, labels, test_x) == test_images.labels[name]
            found[f"{name}_{method}"] = correct.double().mean().item()
    return found


def experiment(seed, name, arm, classes_per_batch, lr_scale, args):
    """The results of one encoder, as `run_or_continue` needs them.

    `arm` is "all", "batch" or "step" (where there are few classes), or None for an untrained
    encoder. Without few classes `classes_per_batch` is None.
    """
    torch.set_num_threads(1)  # Several runs side by side are faster than several threads.
    images, test_images = load(args)
    if arm is None:
        torch.manual_seed(seed)
        encoder = UNTRAINED[name](args.data)
    else:
        title = f"{seed:>4}  {name:<17} {arm:<5} {classes_per_batch or '':>7} {lr_scale:>8g}"
        lr = lr_scale * learning_rate(name, args.data)
        sampler = make_sampler(images, arm, classes_per_batch, seed, args)
        encoder = train(name, images, sampler, seed, lr, title, args)
    return [{"seed": seed, "method": name, "arm": arm, "classes_per_batch": classes_per_batch,
             "lr_scale": lr_scale, "results": measure(encoder, images, test_images)}]


def load(args):
    return load_data(args.data, args.root, args.images, args.validation, args.num_glyphs)


def learning_rate(name, data):
    return METHODS[name][1][data == "glyphs"]


def make_sampler(images, arm, classes_per_batch, seed, args):
    labels = images.labels[args.grouped_by]
    in_step = args.classes_per_step or len(labels.unique())
    if arm == "all":
        classes_per_batch = min(in_step, args.batch_size)
    elif arm == "step":
        in_step = classes_per_batch
    return Steps(labels, args.batch_size, args.accumulate, classes_per_batch, in_step, seed)


# ---- Tables and figures --------------------------------------------------------------------------
def add_losses(runs):
    """Add what few classes lose to the results of their runs: {"lost_class_knn": ...} and so on.

    It is the accuracy of "all" minus that of this run, with the same seed and learning rate.
    `lost_share` is a share of what the method learns of the class with "all": of the mean over
    seeds, minus that of the untrained encoder. It is left out if this is less than .05.
    """
    def key(run):
        return run["seed"], run["method"], run["lr_scale"]

    measured = class_measure(runs)
    before = {key(run): run["results"] for run in runs if run["arm"] == "all"}
    means = {group: row[measured]["mean"] for group, row in summarize(
        [run for run in runs if run["arm"] in ("all", None)],
        key=lambda run: (run["method"], run["lr_scale"])).items()}
    for run in runs:
        if run["arm"] in ("batch", "step"):
            results = run["results"]
            lost = {f"lost_{name}": before[key(run)][name] - results[name] for name in results}
            untrained = METHODS[run["method"]][-1], None
            learned = means[run["method"], run["lr_scale"]] - means[untrained]
            if learned >= 0.05:
                lost["lost_share"] = lost[f"lost_{measured}"] / learned
            results.update(lost)


def class_measure(runs):
    """The name of the accuracy for the class: of the linear probe, or of k-NN if there is none."""
    return "class_probe" if "class_probe" in runs[0]["results"] else "class_knn"


def plot(runs, args):
    """Figure 5: what few classes cost. A bar is a mean, with its 95% interval, a dot one seed."""
    counts, rates = args.classes_per_batch, args.lr_scale
    measured = class_measure(runs)
    kind = measured.split("_")[1]
    names = [name for name in runs[0]["results"] if name.endswith(kind)]
    figure = Figure(figsize=(3.2 * len(names) + 1, 1.2 + 3.2 * len(counts)), layout="constrained")
    axes = figure.subplots(len(counts), len(names), sharex=True, sharey="row", squeeze=False)
    width, findings = 0.8 / len(args.few_in), []
    for (row, count), (column, name) in itertools.product(enumerate(counts), enumerate(names)):
        ax = axes[row, column]
        for (i, arm), (place, method) in itertools.product(enumerate(args.few_in),
                                                           enumerate(args.methods)):
            lost = [100 * run["results"][f"lost_{name}"] for run in runs if (
                run["method"], run["arm"], run["classes_per_batch"], run["lr_scale"])
                == (method, arm, count, rates[0])]
            mean, half = interval(lost)
            x = place + width * (i - (len(args.few_in) - 1) / 2)
            ax.bar(x, mean, width, yerr=half, color=ARM_COLORS[arm], capsize=3,
                   label=ARMS[arm] if place == 0 else None)
            ax.plot([x] * len(lost), lost, "ko", markersize=3)
            if (row, column, i) == (len(counts) - 1, 0, 0):
                findings.append(f"{method} {mean:+.1f}" + f" ± {half:.1f}" * (len(lost) > 1))
        ax.axhline(0, color="black", linewidth=0.8)
        ax.set_xticks(range(len(args.methods)), args.methods, rotation=60)
        ax.set_title(f"{name.split('_')[0]}, with {few_values(count, args.grouped_by)}")
    axes[0, 0].legend(fontsize="small")
    figure.supylabel(f"lost accuracy of {kind}, points")
    few = few_values(counts[-1], args.grouped_by)
    figure.suptitle(f"Points of the class that are lost with {few} per mini-batch "
                    f"({ARMS[args.few_in[0]]}):\n{', '.join(findings)}; "
                    f"n = {len(args.seeds)} seeds, means and 95% intervals")
    return figure


def few_values(count, grouped_by):
    if count == 1:
        return f"one {grouped_by}"
    return f"{count} classes" if grouped_by == "class" else f"{count} kinds of {grouped_by}"


# ---- Command line --------------------------------------------------------------------------------
@command
def main(argv=None):
    parser = Parser("What class-imbalanced mini-batches do to five methods (table 1 of the paper)")
    add, several = parser.add_argument, {"nargs": "+", "action": Distinct}
    add("--data", default="glyphs", help="glyphs, CIFAR10 or a folder with train and test")
    add("--root", default="data", help="where torchvision keeps CIFAR10")
    add("--out", type=folder, help="folder for results and figure, if not a new one in runs")
    add("--methods", **several, choices=METHODS,
        help="what to train (default: SimCLR VICReg SwAV MSN, and MAE for photographs)")
    add("--seeds", **several, type=number(int, 0, 2**32 - 1), default=[0], help="one run each")
    add("--classes_per_batch", **several, type=number(int, 1), default=[1],
        help="to be compared with all classes")
    add("--few_in", **several, choices=ARMS, default=["batch"],
        help="few classes in each mini-batch, or in all mini-batches of a step")
    add("--classes_per_step", type=number(int, 1),
        help="classes of all mini-batches of a step together (default: all, glyphs: 8)")
    add("--grouped_by", default="class", help="class, or another property of the images")
    add("--images", type=number(int, 60), help="at most, per set (20,000; 32,768 glyphs)")
    add("--epochs", type=number(int, 1), default=6, help="of training")
    add("--batch_size", type=number(int, 4), help="images per mini-batch (40; 64 glyphs)")
    add("--accumulate", type=number(int, 1), help="mini-batches per step (10; glyphs: 8)")
    add("--lr_scale", **several, type=number(float, 1e-9), default=[1.0],
        help="times the learning rate of each method")
    add("--validation", action="store_true", help="test on images that are not the test images")
    add("--workers", type=number(int, 1, 1000), default=available_cores(), help="processes")
    add("--quick", action="store_true", help="1 epoch of two methods on few images")
    args = parser.parse_args(argv)
    glyphs = args.data == "glyphs"
    # On glyphs MAE learns no more of the class than random weights know.
    args.methods = args.methods or [*WITH_VOLUME] + ["MAE"] * (not glyphs)
    if args.quick:
        args.methods, args.epochs = ["SimCLR", "MAE"], 1
    name = "quick" if args.quick else Path(args.data).name
    args.out = args.out or Path("runs", f"imbalance_{name}")
    args.num_glyphs = 32 if args.quick else 512
    for option, of_photographs, of_glyphs in (
            ("images", 20_000, 512 if args.quick else 32_768),
            ("batch_size", 40, 16 if args.quick else 64), ("accumulate", 10, 8),
            ("classes_per_step", None, 8)):
        default = of_glyphs if glyphs else of_photographs
        setattr(args, option, getattr(args, option) or default)
    arms = [("all", None), *itertools.product(args.few_in, args.classes_per_batch)]
    try:
        images, _ = load(args)
        if args.grouped_by not in images.labels:
            raise ValueError(f"--grouped_by must be one of {', '.join(images.labels)}")
        most = make_sampler(images, "all", None, 0, args).shape[1]
        if max(args.classes_per_batch) >= most:
            raise ValueError(f"--classes_per_batch must be fewer than all, which are {most}")
        # All trainings of a method must have the same number of steps.
        steps = [len(make_sampler(images, *arm, 0, args)) for arm in arms]
        if len(set(steps)) > 1:
            raise ValueError(f"these images give {steps} mini-batches for {arms}. Choose "
                             "--batch_size and --images such that it divides the images of each "
                             "class")
    except (OSError, RuntimeError, ValueError) as error:
        raise UserError("cannot start with this --data, --images, --batch_size or --accumulate: "
                        f"{error}") from error
    jobs = [(seed, name, *arm, scale) for seed, name, arm, scale in itertools.product(
        args.seeds, args.methods, arms, args.lr_scale)]
    jobs += itertools.product(args.seeds, UNTRAINED, [None], [None], [None])
    config = {name: value for name, value in vars(args).items() if name not in (
        "out", "root", "methods", "seeds", "classes_per_batch", "few_in", "lr_scale", "workers")}
    config["rates"] = {name: learning_rate(name, args.data) for name in METHODS}

    say("seed  method            arm   classes lr_scale epoch        loss       left")
    runs = run_or_continue(experiment, jobs, args, config, args.out / "results.json")
    add_losses(runs)
    summary = summarize(runs, key=lambda run: tuple(run[name] for name in KIND))
    columns = list(dict.fromkeys(name for row in summary.values() for name in row if name != "n"))
    columns = [name for name in columns if name.startswith(("class", "lost"))]
    say(f"\naccuracy, and what is lost: mean ± 95% interval over n = {number_of_seeds(summary)} "
        f"seeds\n{'method':<19}{'arm':<6}{'classes':>7}{'lr_scale':>9}"
        + "".join(f"{column:>22}" for column in columns))
    for (name, *arm, scale), row in summary.items():
        say(f"{name:<19}{arm[0] or '':<6}{arm[1] or '':>7}{scale or '':>9}"
            + "".join(f"{cell(row, column, 'interval'):>22}" for column in columns))
    write_figure(args.out / "imbalance.png", plot, runs, args)
    say(f"results.json and imbalance.png are in {args.out}")


if __name__ == "__main__":
    main()
