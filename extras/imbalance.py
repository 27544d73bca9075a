"""What class-imbalanced mini-batches do to six methods (table 1 and figure 5 of the paper).

The paper trains on the same images twice: mini-batches hold all classes, or only a few of them.
SimCLR, VICReg, SwAV and MSN have a volume term, which spreads every mini-batch evenly. In a
mini-batch of one class all images share the class. So the network can spread them only by other
features (color, place, angle), and it stops encoding the class. MAE and data2vec have no volume
term and should lose little.

    python extras/imbalance.py                    # synthetic images, no download, 8 minutes
    python extras/imbalance.py --data CIFAR10 --images 20000 --classes_per_batch 2 1
    python extras/imbalance.py --quick            # a short run from end to end

We report the drop: the accuracy of a linear probe on frozen features after training with all
classes per mini-batch, minus the accuracy after training with few. Both trainings have the same
images, start weights, number of steps, batch size and learning rate, and the probe always learns
from all training images. Only the sampler differs. We look at the class, and as a control at three
low-level properties of an image, which should not drop: luminance, color and orientation.

Unlike the paper, which trains ResNet-50 and vision transformers on ImageNet with mini-batches of
up to 4096 images, SimCLR, VICReg, SwAV and MSN have a small ResNet here. MAE and data2vec hide
patches and have a small vision transformer, and they use one of the two views. Each method has its
own learning rate. So only drops can be compared between methods, and not accuracies. On the
synthetic images only SimCLR, VICReg and SwAV learn the class in this time.

More methods, with --methods: With one class per mini-batch, the statistics of BatchNorm come from
one class. SimCLR-GroupNorm has no BatchNorm. PMSN (a steep prior in any order, see
pmsn.in_order_of) and MSN-5 (five prototypes) do not force a mini-batch of one class onto many
prototypes: do they lose less?

With one class per mini-batch each step of the optimizer sees another class, which can hurt any
method. --batch_size 40 --accumulate 10 takes this away: each step takes the mean gradient of ten
mini-batches, which together have all classes, and are the same 400 images for any number of
classes per mini-batch. What is lost then, is lost by what a mini-batch computes together: the
volume term, and BatchNorm. (MAE has neither. There only random numbers differ.)

--data is synthetic, CIFAR10, or a folder with train/<class> and test/<class>. --out gets
results.json and imbalance.png. A run is in results.json as soon as it is done, and the same command
continues from there. The seeds change weights and mini-batches, and not the images.
"""

import copy
import functools
import itertools
import math
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.swa_utils import update_bn

# The other scripts are in the folder above, and are not installed.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import pmsn
from support.drawings import SIZE
from support.evaluation import knn_predictions, linear_probe
from support.figures import UNIFORM, Figure, write_figure
from support.images import normalize_images
from support.photographs import (load_splits, make_resnet, random_crops, read_images,
                                 warmup_cosine)
from support.results import cell, number_of_seeds, run_or_continue, summarize
from support.runs import Distinct, Parser, UserError, available_cores, command, folder, number, say

GROUPS = {"with a volume term": ("SimCLR", "VICReg", "SwAV", "MSN"),
          "without a volume term": ("MAE", "data2vec")}
LOW_LEVEL = ("luminance", "color", "orientation")
TASKS = ("class", *LOW_LEVEL)


# ---- Data: images, their classes, and what is low-level about them -------------------------------
def synthetic_images(count, seed):
    """Shapes, uint8 (N, 3, 32, 32). Image i has class i % 10.

    The class is the number of lobes (0, 2, 3, 4 or 5), and whether the shape is full or a ring.
    Colors, place, size, angle and the grating in the background do not depend on the class.
    """
    generator = torch.Generator().manual_seed(seed)

    def uniform(low, high, *shape):  # random numbers (N, *shape, 1, 1), for each image its own
        return low + (high - low) * torch.rand(count, *shape, 1, 1, generator=generator)

    classes = torch.arange(count).view(-1, 1, 1) % 10
    lobes = torch.tensor([0, 2, 3, 4, 5])[classes % 5]
    pixel = torch.arange(SIZE) + 0.5
    y, x = torch.meshgrid(pixel, pixel, indexing="ij")  # (32, 32)
    # The outline of the shape in polar coordinates. Without lobes it is a circle.
    dx, dy = x - uniform(14, 18), y - uniform(14, 18)  # (N, 32, 32)
    radius = torch.hypot(dx, dy)
    angle = torch.atan2(dy, dx) + uniform(0, 2 * math.pi)
    outline = uniform(8, 11) * (1 + 0.35 * torch.sin(lobes * angle))
    shape = torch.sigmoid(2 * (outline - radius))  # 1 inside, 0 outside
    ring = shape * torch.sigmoid(2 * (radius - 0.55 * outline))
    shape = torch.where(classes >= 5, ring, shape)
    # The shape is darker or lighter than the background. Each of them has its own tint.
    direction = uniform(0, math.pi)
    along = x * direction.cos() + y * direction.sin()
    grating = torch.sin(along * uniform(0.6, 1.2) + uniform(0, 2 * math.pi))
    light = uniform(0.3, 0.7, 1)
    background = light + uniform(-0.12, 0.12, 3) + uniform(0, 0.08, 1) * grating[:, None]
    contrast = uniform(-1, 1, 1).sign() * uniform(0.25, 0.45, 1)
    foreground = light + contrast + uniform(-0.12, 0.12, 3)
    images = torch.lerp(background, foreground.expand_as(background), shape[:, None])
    return (255 * images.clamp(0, 1)).to(torch.uint8)


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


@functools.cache  # A process loads the images once, for all of its runs.
def load_data(data, root, count):
    """Training images uint8 (N, 3, 32, 32) and {task: labels (N,)}, then the same for testing.

    `count` is the number of images in each of both sets. Image i has class i % C. Low-level labels
    are five bins, equally full for training images.
    """
    if data == "synthetic":
        num_classes = 10
        sets = [synthetic_images(count // 10 * 10, seed) for seed in (0, 1)]
    else:
        splits = load_splits(data, root)
        num_classes = len(splits[0].classes)
        if count < num_classes:
            raise ValueError(f"--images {count} are less than one for each of the {num_classes} "
                             "classes")
        sets = [read_images(split, count // num_classes) for split in splits]
    labels = [{"class": torch.arange(len(images)) % num_classes} for images in sets]
    training_values, test_values = low_level(sets[0]), low_level(sets[1])
    for task in LOW_LEVEL:
        edges = training_values[task].quantile(torch.arange(1, 5) / 5)
        labels[0][task] = torch.bucketize(training_values[task], edges)
        labels[1][task] = torch.bucketize(test_values[task], edges)
    return sets[0], labels[0], sets[1], labels[1]


# ---- Encoders ------------------------------------------------------------------------------------
def make_head(norm=nn.BatchNorm1d):
    """The head of MSN, (B, 128) -> (B, 128), with another `norm` if there is one."""
    head = pmsn.projection_head(128, 256, 128)
    head[1], head[4] = norm(256), norm(256)
    return head


def group_norm(channels):
    return nn.GroupNorm(8, channels)


def make_vit(patch_size):
    return pmsn.VisionTransformer(SIZE, patch_size, embed_dim=96, depth=3, num_heads=3)


# ---- Methods: modules that map two views, (B, 3, 32, 32) each, to (loss, terms) ------------------
class TwoViews(nn.Module):
    """SimCLR, VICReg and SwAV: a loss on the embeddings of both views. SwAV has prototypes too."""

    def __init__(self, loss, *, num_prototypes=0, norms=(nn.BatchNorm2d, nn.BatchNorm1d)):
        super().__init__()
        self.encoder, self.head, self.loss = make_resnet(norms[0]), make_head(norms[1]), loss
        self.prototypes = nn.ParameterList()
        if num_prototypes:
            self.prototypes.append(torch.randn(num_prototypes, 128))  # becomes a parameter

    def forward(self, views):
        embeddings = self.head(self.encoder(torch.cat(views)))
        first, second = embeddings.chunk(2)
        return self.loss(first, second, *self.prototypes)


def simclr(**options):
    return TwoViews(functools.partial(pmsn.simclr_loss, temperature=0.2), **options)


def masked_siamese(exponent, num_prototypes=64):
    """MSN, or PMSN if the exponent of the prior is not 0. It masks no patches of the ResNet."""
    prior = pmsn.power_law_prior(num_prototypes, exponent)
    return pmsn.PMSN(make_resnet(), prior, head=make_head(), output_dim=128, patch_drop=0)


class MAE(nn.Module):
    """Masked autoencoder (He et al., 2022): a quarter of the patches predicts the other pixels."""

    def __init__(self, width=64, patch_size=4):
        super().__init__()
        self.patch_size, num_patches = patch_size, (SIZE // patch_size) ** 2
        self.encoder = make_vit(patch_size)
        self.decoder_embed = nn.Linear(self.encoder.embed_dim, width)
        self.mask_token = nn.Parameter(0.02 * torch.randn(width))
        self.decoder_pos_embed = nn.Parameter(0.02 * torch.randn(num_patches, width))
        self.decoder = nn.Sequential(
            pmsn.Block(width, 4), nn.LayerNorm(width), nn.Linear(width, 3 * patch_size**2))

    def forward(self, views):
        tokens = self.encoder.embed_patches(views[0])  # (B, N, dim)
        visible = pmsn.random_patches(tokens, 0.75)  # indices, (B, kept)
        kept = tokens.gather(1, visible[:, :, None].expand(-1, -1, tokens.shape[2]))
        encoded = run_blocks(self.encoder, kept)[-1][:, 1:]  # without CLS
        encoded = self.decoder_embed(encoded)  # (B, kept, width)
        # The decoder sees the encoded patches at their places, and the mask token elsewhere.
        full = self.mask_token.expand(*tokens.shape[:2], -1)
        full = full.scatter(1, visible[:, :, None].expand_as(encoded), encoded)
        predictions = self.decoder(full + self.decoder_pos_embed)  # (B, N, 48)
        hidden = not_among(visible, tokens.shape[1])
        return mae_loss(predictions, views[0], hidden, self.patch_size), {}


def mae_loss(predictions, images, hidden, patch_size):
    """Squared error on hidden patches (B, N). The pixels of each patch are standardized."""
    pixels = F.unfold(images, patch_size, stride=patch_size).transpose(1, 2)  # (B, N, 48)
    variance, mean = torch.var_mean(pixels, dim=-1, keepdim=True)
    pixels = (pixels - mean) / (variance + 1e-6).sqrt()
    return (predictions - pixels).square().mean(dim=-1)[hidden].mean()


def not_among(indices, count):
    """Where (B, count) is no index of (B, n)?"""
    everywhere = torch.ones(len(indices), count, dtype=torch.bool)
    return everywhere.scatter(1, indices, False)


def run_blocks(encoder, tokens):
    """The outputs of all blocks and last of the final norm: a list of (B, 1 + N, dim)."""
    cls = encoder.cls_token + encoder.pos_embed[:, :1]
    outputs = [torch.cat([cls.expand(len(tokens), -1, -1), tokens], dim=1)]
    for block in encoder.blocks:
        outputs.append(block(outputs[-1]))
    return [*outputs[1:], encoder.norm(outputs[-1])]


class Data2Vec(nn.Module):
    """data2vec (Baevski et al., 2022): predict a target network's features of hidden patches."""

    def __init__(self):
        super().__init__()
        # All patches pass the encoder here. With patches of 4 pixels it would be four times slower.
        self.encoder = make_vit(patch_size=8)
        self.mask_token = nn.Parameter(0.02 * torch.randn(self.encoder.embed_dim))
        self.head = nn.Linear(self.encoder.embed_dim, self.encoder.embed_dim)
        self.target_encoder = copy.deepcopy(self.encoder).requires_grad_(False)

    def forward(self, views):
        # We hide random patches. The original hides blocks, and its loss is smooth L1.
        tokens = self.encoder.embed_patches(views[0])  # (B, N, dim)
        visible = pmsn.random_patches(tokens, 0.6)
        hidden = not_among(visible, tokens.shape[1])
        mask = self.mask_token + self.encoder.pos_embed[:, 1:]
        tokens = torch.where(hidden[:, :, None], mask, tokens)
        predictions = self.head(run_blocks(self.encoder, tokens)[-1][:, 1:])
        with torch.no_grad():
            tokens = self.target_encoder.embed_patches(views[0])
            outputs = run_blocks(self.target_encoder, tokens)[:-1]
        return data2vec_loss(predictions, [x[:, 1:] for x in outputs], hidden), {}

    def update_target(self, ema_momentum):
        pmsn.move_target(self.target_encoder, self.encoder, ema_momentum)


def data2vec_loss(predictions, outputs, hidden):
    """Squared error on hidden patches (B, N) to the mean of normalized outputs (B, N, dim)."""
    targets = sum(F.layer_norm(x, x.shape[-1:]) for x in outputs) / len(outputs)
    targets = F.layer_norm(targets, targets.shape[-1:])
    return (predictions - targets).square().mean(dim=-1)[hidden].mean()

# For each method: the module, the learning rate, options of the loss, and the untrained encoder of
# the same architecture. On CIFAR-10 with all classes per mini-batch (seed 10) we tried three
# learning rates for VICReg, two for SimCLR, SwAV, MSN and data2vec, and only this one for MAE. The
# others take the one of SimCLR or MSN.
METHODS = {
    "SimCLR": (simclr, 4e-3, {}, "random ResNet"),
    "VICReg": (lambda: TwoViews(pmsn.vicreg_loss), 2e-3, {}, "random ResNet"),
    "SwAV": (lambda: TwoViews(pmsn.swav_loss, num_prototypes=64), 4e-3, {}, "random ResNet"),
    "MSN": (lambda: masked_siamese(exponent=0.0), 2e-3, {}, "random ResNet"),
    "MAE": (MAE, 3e-3, {}, "random ViT/4"),
    "data2vec": (Data2Vec, 4e-3, {}, "random ViT/8"),
    "SimCLR-GroupNorm": (lambda: simclr(norms=(group_norm, group_norm)), 4e-3, {}, "random ResNet"),
    # 64 prototypes are about 6 per class. The prior with exponent 2 has 5 effective prototypes (the
    # exponential of its entropy).
    "PMSN": (lambda: masked_siamese(exponent=2.0), 2e-3, {"any_order": True}, "random ResNet"),
    "MSN-5": (lambda: masked_siamese(0.0, num_prototypes=5), 2e-3, {}, "random ResNet"),
}
UNTRAINED = {"random ResNet": make_resnet, "random ViT/4": lambda: make_vit(4),
             "random ViT/8": lambda: make_vit(8), "raw pixels": lambda: None}


# ---- Training: one loop for all methods ----------------------------------------------------------
class BalancedSteps(torch.utils.data.Sampler):
    """A batch_sampler: `accumulate` mini-batches in a row have equally many images of all classes.

    Each of these mini-batches has `classes_per_batch` classes. For one seed the images of a step
    are the same for any `classes_per_batch`. Only how they are divided differs. ValueError if they
    cannot be divided equally.
    """
    def __init__(self, labels, batch_size, classes_per_batch, accumulate, seed):
        num_classes = len(labels.unique())
        if num_classes % classes_per_batch:
            raise ValueError(f"{classes_per_batch} classes per mini-batch do not divide "
                             f"{num_classes} classes")
        groups = num_classes // classes_per_batch  # of classes that share mini-batches
        if accumulate % groups or batch_size % classes_per_batch:
            raise ValueError(f"{classes_per_batch} of {num_classes} classes per mini-batch need an "
                             f"--accumulate that is a multiple of {groups}, and a --batch_size "
                             f"that is a multiple of {classes_per_batch}")
        self.labels, self.accumulate = labels, accumulate
        self.shape = groups, classes_per_batch, accumulate // groups, -1
        self.steps = pmsn.ClassBatchSampler(labels, batch_size * accumulate, num_classes, seed=seed)
        self.classes_per_batch, self.set_epoch = classes_per_batch, self.steps.set_epoch

    def __len__(self):
        return len(self.steps) * self.accumulate

    def __iter__(self):
        for step in self.steps:
            step = torch.tensor(step)
            by_class = step[self.labels[step].argsort()].view(self.shape)
            yield from by_class.transpose(1, 2).reshape(self.accumulate, -1).tolist()


def make_sampler(labels, classes_per_batch, seed, args):
    if args.accumulate == 1:
        return pmsn.ClassBatchSampler(labels, args.batch_size, classes_per_batch, seed=seed)
    return BalancedSteps(labels, args.batch_size, classes_per_batch, args.accumulate, seed)


def train(name, images, sampler, seed, args):
    """The trained encoder. Only the sampler knows the classes: it makes the mini-batches.

    With the same seed, all classes and few classes per mini-batch have the same start weights and
    the same random numbers for crops and colors.
    """
    torch.manual_seed(seed)
    make_method, best_lr, loss_options, _ = METHODS[name]
    method = make_method().to(memory_format=torch.channels_last)  # faster on CPUs
    parameters = [p for p in method.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, weight_decay=0.05)
    steps, began = args.epochs * len(sampler) // args.accumulate, time.monotonic()
    for epoch in range(1, args.epochs + 1):
        sampler.set_epoch(epoch)
        losses = []
        for i, batch in enumerate(sampler, start=(epoch - 1) * len(sampler)):
            # Two random crops of each image, in random colors. 32 pixels are too few to blur.
            crops = [random_crops(images[batch])[:, None] for _ in range(2)]  # (B, 1, 3, 32, 32)
            views = pmsn.make_views(crops, blur_p=0.0)  # colors, and normalization

            loss, _ = method(views, **loss_options)
            (loss / args.accumulate).backward()  # adds to the gradients of earlier mini-batches
            losses.append(loss.item())

            step, place = divmod(i, args.accumulate)
            if place == args.accumulate - 1:
                lr = (args.lr or best_lr) * warmup_cosine(step, steps)
                optimizer.param_groups[0]["lr"] = lr
                nn.utils.clip_grad_norm_(parameters, 3.0)
                optimizer.step()
                optimizer.zero_grad()
                if hasattr(method, "update_target"):
                    method.update_target(ema_momentum=0.99)
        mean_loss = np.mean(losses)
        if not math.isfinite(mean_loss):
            raise UserError(f"the loss of {name} is not finite in epoch {epoch}: try a lower --lr")
        left = round((time.monotonic() - began) * (args.epochs - epoch) / epoch)
        say(f"{seed:>4}  {name:<17} {sampler.classes_per_batch:>17} {epoch:>5}/{args.epochs:<4} "
            f"{mean_loss:>9.4f} {left // 60:>8}:{left % 60:02}")
    # The features of MSN are those of its target network. data2vec's are those of its student.
    return method.target_encoder if isinstance(method, pmsn.PMSN) else method.encoder


# ---- Measuring -----------------------------------------------------------------------------------
@torch.no_grad()
def features(encoder, images):
    """Frozen features (N, dim) of uint8 images. A ViT gives [CLS, mean over patches].

    Without an encoder they are the images at 8 x 8 pixels.
    """
    if encoder is None:
        return F.avg_pool2d(normalize_images(images), 4).flatten(1)
    if isinstance(encoder, pmsn.VisionTransformer):
        def run(x):
            tokens = run_blocks(encoder, encoder.embed_patches(x))[-1]
            return torch.cat([tokens[:, 0], tokens[:, 1:].mean(dim=1)], dim=1)
    else:
        run = encoder.eval()
    return torch.cat([run(normalize_images(part)) for part in images.split(500)])


def measure(encoder, images, labels, test_images, test_labels):
    """{task: accuracy of a linear probe}, and k-NN for the class. Labels are {task: labels (N,)}.

    Probe and k-NN learn from all training images, however the encoder was trained.
    """
    if encoder is not None:
        # In training, the statistics of BatchNorm may come from one class at a time. We take them
        # again from mini-batches of all classes: image i has class i % C. A ViT has no BatchNorm.
        update_bn((normalize_images(part) for part in images.split(500)), encoder)
    x, test_x = features(encoder, images), features(encoder, test_images)
    nearest = knn_predictions(x, labels["class"], test_x)
    correct = {"knn": nearest == test_labels["class"]}
    for task in labels:
        correct[task] = linear_probe(x, labels[task], test_x) == test_labels[task]
    return {task: values.double().mean().item() for task, values in correct.items()}


def experiment(seed, name, classes_per_batch, args):
    """The results of one encoder, as `run_or_continue` needs them.

    An untrained encoder counts as one that has seen all classes per mini-batch.
    """
    torch.set_num_threads(1)  # Several runs side by side are faster than several threads.
    data = load_data(args.data, args.root, args.images)
    images, labels = data[:2]
    if name in UNTRAINED:
        torch.manual_seed(seed)
        encoder = UNTRAINED[name]()
    else:
        sampler = make_sampler(labels["class"], classes_per_batch, seed, args)
        encoder = train(name, images, sampler, seed, args)
    return [{"seed": seed, "method": name, "classes_per_batch": classes_per_batch,
             "results": measure(encoder, *data)}]


# ---- Tables and figures --------------------------------------------------------------------------
def add_drops(runs, num_classes):
    """Add the drop in each task to the results of the runs with few classes per mini-batch.

    `drop_share` is the drop of the class as a share of what the method had gained over an untrained
    encoder. Returns the methods that have learned the class: with all classes per mini-batch they
    are .05 better than their untrained encoder. The others have little to lose.
    """
    of_all = [run for run in runs if run["classes_per_batch"] == num_classes]
    balanced = {(run["seed"], run["method"]): run["results"] for run in of_all}
    means = {name: row["class"]["mean"]
             for name, row in summarize(of_all, key=lambda run: run["method"]).items()}
    learned = {name for name, (*_, untrained) in METHODS.items()
               if name in means and means[name] >= means[untrained] + 0.05}
    for run in runs:
        if run["classes_per_batch"] != num_classes:
            seed, name, results = run["seed"], run["method"], run["results"]
            before = balanced[seed, name]
            drops = {f"drop_{task}": before[task] - results[task] for task in before}
            if name in learned:
                untrained = METHODS[name][-1]
                gained = means[name] - means[untrained]
                drops["drop_share"] = drops["drop_class"] / gained
            results.update(drops)
    return learned


def group_drops(runs, learned):
    """The mean drops of both groups of methods, and their difference, for each seed.

    They look like runs, so that they can stand in the same table. Only methods that have learned
    the class are in a mean.
    """
    found = []
    with_drops = [run for run in runs if "drop_class" in run["results"]]
    for seed, classes in dict.fromkeys((run["seed"], run["classes_per_batch"])
                                       for run in with_drops):
        of_groups = {}
        for group, names in GROUPS.items():
            results = [run["results"] for run in with_drops
                       if run["method"] in learned.intersection(names)
                       and (run["seed"], run["classes_per_batch"]) == (seed, classes)]
            if results:
                of_groups[group] = {name: np.mean([result[name] for result in results])
                                    for name in results[0] if name.startswith("drop")}
        if len(of_groups) == 2:
            with_volume, without = of_groups.values()
            of_groups["difference"] = {name: with_volume[name] - without[name] for name in without}
        found += [{"seed": seed, "method": group, "classes_per_batch": classes, "results": results}
                  for group, results in of_groups.items()]
    return found


def plot(runs, learned, classes_per_batch, args):
    """Figure 5: what imbalanced mini-batches cost. A bar is a mean over seeds, a dot one seed."""
    rows, columns = len(classes_per_batch), len(TASKS)
    figure = Figure(figsize=(13, 1 + 3.2 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    for ax, (count, task) in zip(axes.flat, itertools.product(classes_per_batch, TASKS)):
        for name in args.methods:
            drops = [run["results"][f"drop_{task}"] for run in runs
                     if (run["method"], run["classes_per_batch"]) == (name, count)]
            volume = name not in GROUPS["without a volume term"]
            ax.bar(name, np.mean(drops), color=UNIFORM if volume else "#8c8c8c",
                   alpha=1.0 if name in learned else 0.3)
            ax.plot([name] * len(drops), drops, "ko", markersize=3.5)
        ax.axhline(0, color="black", linewidth=0.8)
        ax.tick_params(axis="x", rotation=60)
        ax.set_title(f"{task}, {count} class{'es' * (count > 1)}")
    figure.supylabel("drop in accuracy")
    figure.suptitle("What mini-batches with few classes cost, against all classes (blue: with a "
                    "volume term; pale: did not learn the class; "
                    f"a dot is one of {len(args.seeds)} seeds)")
    return figure


# ---- Command line --------------------------------------------------------------------------------
@command
def main(argv=None):
    parser = Parser("What class-imbalanced mini-batches do to six methods (table 1 of the paper)")
    add, several = parser.add_argument, {"nargs": "+", "action": Distinct}
    add("--data", default="synthetic", help="synthetic, CIFAR10 or a folder with train and test")
    add("--root", default="data", help="where torchvision keeps CIFAR10")
    add("--out", type=folder, help="folder for results and figure, if not a new one in runs")
    add("--methods", **several, choices=METHODS, default=sum(GROUPS.values(), ()),
        help="what to train")
    add("--seeds", **several, type=number(int, 0, 2**32 - 1), default=[0], help="one run each")
    add("--classes_per_batch", **several, type=number(int, 1), default=[1],
        help="to be compared with all classes")
    add("--images", type=number(int, 60), default=5000, help="at most, per set")
    add("--epochs", type=number(int, 1), default=6, help="of training")
    add("--batch_size", type=number(int, 4), default=250, help="images per mini-batch")
    add("--accumulate", type=number(int, 1), default=1, help="mini-batches per optimizer step")
    add("--lr", type=number(float, 1e-9), help="learning rate (default: one for each method)")
    add("--workers", type=number(int, 1, 1000), default=available_cores(), help="processes")
    add("--quick", action="store_true", help="1 epoch of two methods on 100 images")
    args = parser.parse_args(argv)
    if args.quick:
        args.methods, args.images, args.epochs = ["SimCLR", "MAE"], 100, 1
    name = "quick" if args.quick else Path(args.data).name
    args.out = args.out or Path("runs", f"imbalance_{name}")
    try:
        classes = load_data(args.data, args.root, args.images)[1]["class"]
        num_classes = len(classes.unique())
        if args.quick:
            args.batch_size = num_classes
        counts = [num_classes, *(n for n in args.classes_per_batch if n != num_classes)]
        if len(counts) == 1:
            raise ValueError(f"--classes_per_batch must be other than all {num_classes} classes")
        # Both trainings of a method must have the same number of steps.
        steps = [len(make_sampler(classes, count, 0, args)) for count in counts]
        if len(set(steps)) > 1:
            raise ValueError(
                f"{len(classes)} images give {steps} mini-batches of {counts} classes. Choose "
                "--batch_size and --images such that it divides the images of each class")
    except (OSError, RuntimeError, ValueError) as error:
        raise UserError("cannot start with this --data, --images, --batch_size or --accumulate: "
                        f"{error}") from error
    jobs = [*itertools.product(args.seeds, args.methods, counts),
            *itertools.product(args.seeds, UNTRAINED, [num_classes])]
    config = {name: value for name, value in vars(args).items()
              if name not in ("out", "root", "methods", "seeds", "classes_per_batch", "workers")}
    config["rates"] = {name: args.lr or lr for name, (_, lr, *_) in METHODS.items()}

    say("seed  method            classes per batch epoch        loss       left")
    runs = run_or_continue(experiment, jobs, args, config, args.out / "results.json")
    learned = add_drops(runs, num_classes)
    summary = summarize(runs + group_drops(runs, learned),
                        key=lambda run: (run["method"], run["classes_per_batch"]))
    columns = ["class", "knn", "drop_share",
               *(f"drop_{task}" for task in ("class", "knn", *LOW_LEVEL))]
    say(f"\naccuracy, and its drop against all classes per mini-batch: mean ± std over "
        f"n = {number_of_seeds(summary)} seeds")
    say(f"{'method':<22}{'classes':>9}" + "".join(f"{column:>18}" for column in columns))
    for (name, count), row in summary.items():
        say(f"{name:<22}{count:>9}" + "".join(f"{cell(row, column):>18}" for column in columns))
    write_figure(args.out / "imbalance.png", plot, runs, learned, counts[1:], args)
    say(f"results.json and imbalance.png are in {args.out}")


if __name__ == "__main__":
    main()
