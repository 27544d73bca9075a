"""What class-imbalanced mini-batches do to seven methods (table 1 and figure 5 of the paper).

The same images, the same number of images of every class, only the composition of mini-batches changes: all classes in
a batch, or few. Methods with a volume term (SimCLR, VICReg, SwAV, MSN) spread every batch; one that holds two classes
is then spread by something else than the class. MAE and data2vec have no such term. PMSN's prior can follow the batch.

    python imbalance.py                       # embedded data, no download
    python imbalance.py --data CIFAR10        # downloaded by torchvision to --root; or a folder of class folders
    python imbalance.py --quick               # the same path end to end

One small vision transformer, one training loop, one linear probe on frozen features, for all. Not the paper's: the size
(there up to 4096 images a batch, a data set of 1000 classes), a ridge regression as probe, PMSN's prior. Writes
results.json and imbalance.png to --out.
"""

import argparse
import copy
import json
import math
import os
import platform
import sys
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
from torch import nn
from torchvision.datasets.folder import find_classes
from torchvision.transforms import v2

import pmsn

VOLUME, NO_VOLUME = ("SimCLR", "VICReg", "SwAV", "MSN"), ("MAE", "data2vec")
METHODS = (*VOLUME, "PMSN", *NO_VOLUME)
BASELINES = ("random encoder", "raw pixels")
KINDS = {"semantic": ["class"], "low-level": ["luminance", "colour", "orientation"]}
TASKS = {task: kind for kind, tasks in KINDS.items() for task in tasks}
SIZE, PATCH = 32, 8  # pixels
LEARNED = 0.05  # a method has learned if it is so much better for the class than a random encoder


class UserError(Exception):
    """Something the user can put right: one line, exit status 2."""


# ---- Data: images, their class, and what is low-level about them -----------------------------------------------------


def drawn_images(count, seed):
    """Ten classes of shapes, equally many of each, shuffled: uint8 (N, 3, 32, 32), classes (N,).

    A class is a number of lobes (none, 2, 3, 4, 5), filled or a ring. Colours, darker or lighter than what is behind,
    place, size, turn and a grating behind the shape know nothing of it."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(low, high, *shape):
        return low + (high - low) * torch.rand(count, *shape, 1, 1, generator=generator)

    classes = torch.randperm(count, generator=generator) % 10
    lobes, ring = torch.tensor([0, 2, 3, 4, 5])[classes % 5, None, None], (classes >= 5)[:, None, None]
    y, x = torch.meshgrid(torch.arange(SIZE) + 0.5, torch.arange(SIZE) + 0.5, indexing="ij")
    across, down = x - uniform(14, 18), y - uniform(14, 18)
    wave = torch.cos(lobes * (torch.atan2(down, across) + uniform(0, 2 * math.pi))) * (lobes > 0)
    edge = uniform(8, 11) * (1 + 0.35 * wave)
    radius = (across**2 + down**2).sqrt()
    shape = torch.sigmoid(2 * (edge - radius)) * torch.where(ring, torch.sigmoid(2 * (radius - 0.55 * edge)), 1.0)
    angle = uniform(0, math.pi)
    grating = torch.sin((x * angle.cos() + y * angle.sin()) * uniform(0.6, 1.2) + uniform(0, 2 * math.pi))
    light, tints = uniform(0.3, 0.7, 1), uniform(-0.12, 0.12, 2, 3)
    contrast = torch.where(uniform(0, 1, 1) < 0.5, -1, 1) * uniform(0.25, 0.45, 1)
    behind = light + tints[:, 0] + uniform(0, 0.08, 1) * grating[:, None]
    images = torch.lerp(behind, (light + contrast + tints[:, 1]).expand_as(behind), shape[:, None])
    return (255 * images.clamp(0, 1)).to(torch.uint8), classes


def load_images(args, train):
    """Images uint8 (N, 3, 32, 32), stretched to that size, and classes (N,) of --data, shuffled; --images at most."""
    if args.data == "drawn":
        return drawn_images(args.images, 2 * args.data_seed + (not train))
    data, numbers = find_cifar10(args.root, train) if args.data == "CIFAR10" else find_folder(Path(args.data), train)
    generator = torch.Generator().manual_seed(2 * args.data_seed + (not train))
    numbers = numbers[torch.randperm(len(numbers), generator=generator)[: args.images]]
    images = []
    for i in numbers.tolist():
        try:
            image = data[i][0]
        except (OSError, SyntaxError) as error:  # PIL raises both
            raise UserError(f"cannot read {data.samples[i][0]}: {error}") from None
        images.append(v2.functional.pil_to_tensor(image.resize((SIZE, SIZE))))
    return torch.stack(images), torch.tensor(data.targets)[numbers]


def find_cifar10(root, train):
    """CIFAR-10 of torchvision and the numbers (N,) of the images to use."""
    try:
        data = torchvision.datasets.CIFAR10(root, train=train, download=True)
    except Exception as error:  # whatever the network or the disk answers
        raise UserError(f"CIFAR10 could not be downloaded to {root}: {error}; the default --data needs no "
                        "download") from None
    return data, torch.arange(len(data))


def find_folder(folder, train):
    """The same of folder/train and folder/test (or val); without these, of the folder, every fifth held out."""
    if not folder.is_dir():
        raise UserError(f"--data {folder}: neither drawn, CIFAR10 nor a folder that exists")
    splits = [folder / name for name in ("train", "test", "val") if (folder / name).is_dir()][:2]
    if splits and (len(splits) == 1 or splits[0].name != "train"):
        raise UserError(f"--data {folder}: wanted are train and test (or val), or class folders; there is "
                        f"{splits[0].name} without its other half")
    try:
        if splits and find_classes(splits[0])[0] != find_classes(splits[1])[0]:
            raise UserError(f"--data {folder}: {splits[0].name} and {splits[1].name} hold different classes")
        data = torchvision.datasets.ImageFolder(splits[0 if train else 1] if splits else folder)
    except OSError as error:
        raise UserError(f"--data {folder}: {error}") from None
    numbers = torch.arange(len(data))
    return data, numbers if splits else numbers[(numbers % 5 > 0) == train]


def low_level(images):
    """What can be told from an image without knowing what it shows, of (N, 3, H, W) uint8: {name: numbers (N,)}.

    Mean luminance and mean colour (red minus blue), which a view's colour jitter moves but does not hide; dominant
    orientation of edges, 0 (vertical) to pi/2 (horizontal), the same in the mirror, by the structure tensor."""
    images = images.float() / 255
    grey = images.mean(dim=1)
    dx, dy = grey[:, 1:-1, 2:] - grey[:, 1:-1, :-2], grey[:, 2:, 1:-1] - grey[:, :-2, 1:-1]
    twice = torch.atan2(2 * (dx * dy).sum(dim=(1, 2)), (dx**2 - dy**2).sum(dim=(1, 2)))
    return {"luminance": grey.mean(dim=(1, 2)), "colour": (images[:, 0] - images[:, 2]).mean(dim=(1, 2)),
            "orientation": twice.abs() / 2}


def in_bins(values, training_values, bins=5):
    """Numbers (N,) to 0..bins-1, equally many training values in each."""
    return torch.bucketize(values, training_values.quantile(torch.arange(1, bins) / bins))


# ---- Methods: each a module, forward(images) -> loss -----------------------------------------------------------------


def make_encoder():
    return pmsn.VisionTransformer(image_size=SIZE, patch_size=PATCH, embed_dim=96, depth=3, num_heads=3)


def two_views(images):
    """Two views of every image, as all methods see them: random crop, flip, colour jitter, greyscale."""
    return pmsn.multi_crop(images, rand_size=SIZE, focal_views=0, rand_scale=(0.3, 1.0), blur_p=0.0)


class TwoViews(nn.Module):
    """SimCLR, VICReg and SwAV: two views through one encoder and head, a loss of `pmsn.py` on the embeddings."""

    def __init__(self, loss, output_dim=128, prototypes=None):
        super().__init__()
        self.encoder, self.loss = make_encoder(), loss
        self.head = pmsn.projection_head(self.encoder.embed_dim, 256, output_dim)
        self.prototypes = None if prototypes is None else nn.Parameter(torch.randn(prototypes, output_dim))

    def forward(self, images):
        first, second = self.head(self.encoder(torch.cat(two_views(images)))).chunk(2)
        return self.loss(first, second, *([] if self.prototypes is None else [self.prototypes]))[0]


class MSN(pmsn.PMSN):
    """MSN: PMSN with the uniform prior. With `present`, the share of the classes that a batch holds, PMSN with a prior
    that follows the batch: that share of the prototypes, whichever its targets use most, gets 95% of the images.

    Ours, not the paper's, and weak: nothing keeps all batches from using the same few prototypes."""

    def __init__(self, prototypes=20, present=1.0):
        encoder = make_encoder()
        super().__init__(encoder, pmsn.uniform_prior(prototypes), patch_drop=0.15,
                         head=pmsn.projection_head(encoder.embed_dim, 256, 256))
        self.batch_prior = batch_prior(prototypes, present)

    def forward(self, images):
        views = two_views(images)
        if self.batch_prior.min() < self.batch_prior.max():
            with torch.no_grad():
                embeddings = self.target_head(self.target_encoder(views[0]))
                used = pmsn.log_predictions(embeddings, self.prototypes, 0.1).exp().mean(dim=0)
            self.prior[used.argsort(descending=True)] = self.batch_prior.to(used)
        return super().forward(views)[0]


def batch_prior(prototypes, present, share=0.95):
    """Prior (K,), sorted, of a batch that holds the share `present` of the classes; uniform if it holds all."""
    many = max(1, round(prototypes * present))
    if many == prototypes:
        return pmsn.uniform_prior(prototypes)
    counts = torch.full((prototypes,), (1 - share) / (prototypes - many))
    counts[:many] = share / many
    return pmsn.class_prior(counts)


def patches(images):
    """(B, 3, H, W) -> (B, N, 3 * PATCH^2), in the order of the encoder's tokens."""
    return F.unfold(images, PATCH, stride=PATCH).transpose(1, 2)


class MAE(nn.Module):
    """Masked autoencoder (He et al., 2022): from a quarter of the patches, the pixels of the others.

    Pixels are normalised by each patch's mean and standard deviation; a decoder of one block."""

    def __init__(self, mask_ratio=0.75, width=64):
        super().__init__()
        self.encoder, self.mask_ratio = make_encoder(), mask_ratio
        tokens = self.encoder.grid[0] * self.encoder.grid[1]
        self.decoder_embed = nn.Linear(self.encoder.embed_dim, width)
        self.mask_token = nn.Parameter(torch.randn(width) * 0.02)
        self.decoder_pos_embed = nn.Parameter(torch.randn(tokens, width) * 0.02)
        self.decoder = nn.Sequential(pmsn.Block(width, 4), nn.LayerNorm(width), nn.Linear(width, 3 * PATCH**2))

    def forward(self, images):
        images = two_views(images)[0]
        tokens = self.encoder.embed_patches(images)
        kept, indices = pmsn.drop_patches(tokens, self.mask_ratio)
        encoded = self.decoder_embed(run_blocks(self.encoder, kept)[-1][:, 1:])  # (B, kept, width)
        full = self.mask_token.expand(len(images), tokens.shape[1], -1).scatter(
            1, indices[:, :, None].expand_as(encoded), encoded)
        return mae_loss(self.decoder(full + self.decoder_pos_embed), patches(images), indices)


def mae_loss(predictions, pixels, kept):
    """Mean squared error on the patches that were not `kept` (B, n), each normalised by itself; (B, N, P) twice."""
    variance, mean = torch.var_mean(pixels, dim=-1, keepdim=True)
    error = (predictions - (pixels - mean) / (variance + 1e-6).sqrt()).square().mean(dim=-1)  # (B, N)
    hidden = torch.ones_like(error).scatter(1, kept, 0.0)
    return (error * hidden).sum() / hidden.sum()


def run_blocks(encoder, tokens):
    """The output of every block and last that of the final norm, a list of (B, 1 + n, dim), CLS first."""
    cls = (encoder.cls_token + encoder.pos_embed[:, :1]).expand(len(tokens), -1, -1)
    x, outputs = torch.cat([cls, tokens], dim=1), []
    for block in encoder.blocks:
        x = block(x)
        outputs.append(x)
    return [*outputs, encoder.norm(x)]


class Data2Vec(nn.Module):
    """data2vec (Baevski et al., 2022): from a masked image, the target network's features of the hidden patches.

    Targets are the mean of its blocks' outputs (here of all, data2vec's top ones), normalised over features before and
    after; the target network sees all patches. Squared error and random patches instead of smooth L1 and blocks."""

    def __init__(self, mask_ratio=0.6):
        super().__init__()
        self.encoder, self.mask_ratio = make_encoder(), mask_ratio
        self.mask_token = nn.Parameter(torch.randn(self.encoder.embed_dim) * 0.02)
        self.head = nn.Linear(self.encoder.embed_dim, self.encoder.embed_dim)
        self.target_encoder = copy.deepcopy(self.encoder).requires_grad_(False)

    def forward(self, images):
        images = two_views(images)[0]
        tokens = self.encoder.embed_patches(images)
        hidden = torch.rand(tokens.shape[:2], device=tokens.device).argsort(dim=1).argsort(dim=1)
        hidden = hidden < self.mask_ratio * tokens.shape[1]  # (B, N)
        tokens = torch.where(hidden[..., None], self.mask_token + self.encoder.pos_embed[:, 1:], tokens)
        predictions = self.head(run_blocks(self.encoder, tokens)[-1][:, 1:])
        with torch.no_grad():
            outputs = run_blocks(self.target_encoder, self.target_encoder.embed_patches(images))[:-1]
        return data2vec_loss(predictions, [x[:, 1:] for x in outputs], hidden)

    @torch.no_grad()
    def update_target(self, momentum):
        for old, new in zip(self.target_encoder.parameters(), self.encoder.parameters()):
            old.lerp_(new, 1 - momentum)


def data2vec_loss(predictions, outputs, hidden):
    """Mean squared error on `hidden` patches (B, N) to the mean of normalised block outputs, (B, N, dim) each."""
    targets = sum(F.layer_norm(x, x.shape[-1:]) for x in outputs) / len(outputs)
    targets = F.layer_norm(targets, targets.shape[-1:])
    return (predictions - targets).square().mean(dim=-1)[hidden].mean()


def make_method(name, present):
    """A method by its name; `present` is the share of the classes that a batch holds."""
    return {"SimCLR": lambda: TwoViews(pmsn.simclr_loss),
            "VICReg": lambda: TwoViews(pmsn.vicreg_loss, output_dim=64),
            "SwAV": lambda: TwoViews(pmsn.swav_loss, prototypes=20),
            "MSN": MSN,
            "PMSN": lambda: MSN(present=present),
            "MAE": MAE,
            "data2vec": Data2Vec}[name]()


# ---- Training and measuring ------------------------------------------------------------------------------------------

# Each better for the class than a third of it and three times it, after training as below by balanced mini-batches of
# other drawn images (--data_seed 1, seed 10).
RATES = {"SimCLR": 1e-3, "VICReg": 1e-3, "SwAV": 1e-3, "MSN": 3e-4, "PMSN": 3e-4, "MAE": 3e-3, "data2vec": 3e-3}
# Epochs of a method for one of SimCLR, so that all train for about the same time on a CPU.
EPOCH_FACTORS = {"SimCLR": 1, "VICReg": 1, "SwAV": 1, "MSN": 1.5, "PMSN": 1.5, "MAE": 2.5, "data2vec": 1.5}


def train(name, images, classes, classes_per_batch, args, seed, report):
    """The encoder that `name` learns from mini-batches of `classes_per_batch` classes; labels compose
    batches, and say how many classes the prior of PMSN is for.

    After every epoch report(epoch, epochs, mean loss) is called. UserError for a loss that is not finite."""
    torch.manual_seed(seed)
    number = len(classes.unique())
    method = make_method(name, classes_per_batch / number).to(images.device)
    optimizer = torch.optim.AdamW([p for p in method.parameters() if p.requires_grad], weight_decay=0.05)
    batches = pmsn.ClassBatchSampler(classes, args.batch_size, classes_per_batch, seed=seed)
    epochs = math.ceil(args.epochs * EPOCH_FACTORS[name])
    steps, step = epochs * len(batches), 0
    for epoch in range(epochs):
        batches.set_epoch(epoch)
        losses = []
        for batch in batches:
            rate = args.lr or RATES[name]
            optimizer.param_groups[0]["lr"] = rate * min(1, (step + 1) / (0.1 * steps)) * (
                0.5 + 0.5 * math.cos(math.pi * step / steps))
            loss = method(images[batch])
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(method.parameters(), 3.0)
            optimizer.step()
            if hasattr(method, "target_encoder"):
                method.update_target(0.99)
            losses.append(loss.detach())
            step += 1
        mean = torch.stack(losses).mean().item()
        if not math.isfinite(mean):
            raise UserError(f"{name}: the loss of epoch {epoch + 1} is not finite; a lower --lr may help")
        report(epoch + 1, epochs, mean)
    return method.encoder


@torch.no_grad()
def features(encoder, images):
    """Frozen features (N, 2 dim): the last layer's CLS and mean over patches; None: 16 x 16 pixels, (N, 768)."""
    images = torchvision.transforms.functional.normalize(
        images.float() / 255, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    if encoder is None:
        return F.avg_pool2d(images, 2).flatten(1)
    encoder.eval()
    last = [run_blocks(encoder, encoder.embed_patches(x))[-1] for x in images.split(500)]
    return torch.cat([torch.cat([x[:, 0], x[:, 1:].mean(dim=1)], dim=1) for x in last])


def linear_probe(x, labels, test_x, test_labels):
    """Test accuracy of ridge regression onto one-hot labels, its strength chosen on a fifth of the training images.

    That is every fifth one, so images must come shuffled."""
    deviation, mean = torch.std_mean(x, dim=0)
    x, test_x = (F.pad((z - mean) / (deviation + 1e-6), (0, 1), value=1.0).cpu().double() for z in (x, test_x))
    y, labels, test_labels = F.one_hot(labels).cpu().double(), labels.cpu(), test_labels.cpu()

    def accuracy(fit, scored, targets, strength):
        gram = x[fit].T @ x[fit] / len(x[fit]) + strength * torch.eye(x.shape[1], dtype=x.dtype)
        weights = torch.linalg.solve(gram, x[fit].T @ y[fit])
        return ((scored @ weights).argmax(dim=1) == targets).double().mean().item()

    held_out = torch.arange(len(x)) % 5 == 0
    best = max((1e-4, 1e-3, 1e-2, 1e-1, 1.0), key=lambda s: accuracy(~held_out, x[held_out], labels[held_out], s))
    return accuracy(slice(None), test_x, test_labels, best)


def measure(encoder, data):
    """Accuracy of the linear probe for every task."""
    x, test_x = features(encoder, data["train"][0]), features(encoder, data["test"][0])
    return {task: linear_probe(x, data["train"][1][task], test_x, data["test"][1][task]) for task in TASKS}


def load_data(args, device):
    """{"train": (images, {task: labels}), "test": ...}; the bins of low-level tasks are those of training images."""
    images, classes = load_images(args, True)
    test_images, test_classes = load_images(args, False)
    numbers, test_numbers = low_level(images), low_level(test_images)
    labels = {"class": classes, **{task: in_bins(x, x) for task, x in numbers.items()}}
    test_labels = {"class": test_classes, **{task: in_bins(x, numbers[task]) for task, x in test_numbers.items()}}
    for task, x in labels.items():
        if len(x.unique()) < 2:
            raise UserError(f"--data {args.data}: all images are alike in {task}")
    return {"train": (images.to(device), labels), "test": (test_images.to(device), test_labels)}


def marginals(classes, classes_per_batch, batch_size):
    """Share of each class over an epoch of mini-batches, (C,), and the numbers of classes in a batch that occurred.

    ValueError if there are no such mini-batches, or one would hold an image twice."""
    batches = list(pmsn.ClassBatchSampler(classes, batch_size, classes_per_batch))
    if any(len(set(batch)) < len(batch) for batch in batches):
        raise ValueError("one would hold an image twice; a smaller --batch_size or more images may help")
    batches = [classes[torch.tensor(batch)] for batch in batches]
    share = torch.bincount(torch.cat(batches), minlength=int(classes.max()) + 1) / sum(map(len, batches))
    return share, sorted({len(batch.unique()) for batch in batches})


# ---- Results ---------------------------------------------------------------------------------------------------------


def mean_std(values):
    return {"mean": float(np.mean(values)), "std": float(np.std(values, ddof=1)) if len(values) > 1 else None}


def drop(scores, method, tasks):
    """What imbalanced mini-batches cost, a number a seed: balanced minus imbalanced, mean over tasks."""
    balanced, imbalanced = (scores[method][sampling] for sampling in ("balanced", "imbalanced"))
    return [float(np.mean([b[task] - i[task] for task in tasks])) for b, i in zip(balanced, imbalanced)]


def summarise(scores):
    """Means and deviations over seeds, who learned, and the difference of differences; plain numbers for json."""
    table = {}
    untrained = [run["class"] for run in scores["random encoder"]["balanced"]]
    for method in (m for m in METHODS if m in scores):
        cells = {sampling: {task: mean_std([run[task] for run in runs]) for task in TASKS}
                 for sampling, runs in scores[method].items()}
        drops = {name: mean_std(drop(scores, method, tasks))
                 for name, tasks in {**{task: [task] for task in TASKS}, **KINDS}.items()}
        gain = [run["class"] - u for run, u in zip(scores[method]["balanced"], untrained)]
        table[method] = {**cells, "drop": drops, "gain_over_random": mean_std(gain),
                         "learned": float(np.mean(gain)) >= LEARNED}
    groups = [[m for m in group if m in table and table[m]["learned"]] for group in (VOLUME, NO_VOLUME)]
    claim = None
    if all(groups):
        claim = {"volume": groups[0], "no_volume": groups[1]}
        for kind, tasks in KINDS.items():
            means = [np.mean([drop(scores, m, tasks) for m in group], axis=0) for group in groups]
            claim[kind] = {"volume": mean_std(means[0]), "no_volume": mean_std(means[1]),
                           "difference": mean_std(means[0] - means[1])}
    return {"methods": table, "claim": claim,
            "baselines": {name: {task: mean_std([run[task] for run in scores[name]["balanced"]]) for task in TASKS}
                          for name in BASELINES}}


def text(cell, digits=1):
    """A mean and deviation in percentage points."""
    spread = "" if cell["std"] is None else f" ± {100 * cell['std']:.{digits}f}"
    return f"{100 * cell['mean']:.{digits}f}{spread}"


def number_of_classes(count):
    return f"{count} class{'es' * (count > 1)}"


def print_results(summary, classes_per_batch):
    print("\nlinear probe, accuracy in %, mean ± std over seeds; imbalanced: mini-batches of "
          f"{number_of_classes(classes_per_batch)}")
    for task, kind in TASKS.items():
        print(f"\n{f'{task} ({kind})':<23} {'balanced':>12} {'imbalanced':>12} {'drop':>12}")
        for method, row in summary["methods"].items():
            print(f"{method:<23} {text(row['balanced'][task]):>12} {text(row['imbalanced'][task]):>12} "
                  f"{text(row['drop'][task]):>12}" + ("" if row["learned"] else "   did not learn here"))
        for name, row in summary["baselines"].items():
            print(f"{name:<23} {text(row[task]):>12}")
    if not all(row["learned"] for row in summary["methods"].values()):
        print(f"\ndid not learn here: class, balanced, less than {100 * LEARNED:.0f} points over the random encoder")
    claim = summary["claim"]
    if claim is None:
        print("\nThe claim needs a method with a volume term and one without that learned.")
        return
    print(f"\n{'mean drop':<23} {'volume term':>12} {'none':>12} {'difference of differences':>26}")
    for kind in KINDS:
        cells = [text(claim[kind][column]) for column in ("volume", "no_volume", "difference")]
        print(f"{kind:<23} {cells[0]:>12} {cells[1]:>12} {cells[2]:>26}")
    print(f"volume term: {', '.join(claim['volume'])}; none: {', '.join(claim['no_volume'])}")


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


def plot(scores, summary, classes_per_batch, path):
    """Fig. 5: what imbalanced mini-batches change, for the class and for what is low-level; a point is a seed."""
    methods = list(summary["methods"])
    groups = {"volume term": (VOLUME, "#30638e"), "volume term, prior follows the mini-batch": (("PMSN",), "#d1495b"),
              "none": (NO_VOLUME, "#8c8c8c")}
    colours = [next(colour for group, colour in groups.values() if m in group) for m in methods]
    figure, axes = plt.subplots(1, len(TASKS), figsize=(14, 4.4), layout="constrained", sharey=True)
    for ax, (task, kind) in zip(axes, TASKS.items()):
        ax.bar(methods, [100 * summary["methods"][m]["drop"][task]["mean"] for m in methods], color=colours)
        for place, method in enumerate(methods):
            drops = [100 * d for d in drop(scores, method, [task])]
            ax.plot([place] * len(drops), drops, "o", color="black", markersize=3.5)
        ax.axhline(0, color="black", linewidth=0.8)
        ax.set_title(f"{task} ({kind})")
        ax.set_xticks(range(len(methods)), [m if summary["methods"][m]["learned"] else f"{m} (did not learn)"
                                            for m in methods], rotation=45, ha="right", rotation_mode="anchor")
    axes[0].set_ylabel(f"lost by mini-batches of {number_of_classes(classes_per_batch)}\n(linear probe, points)")
    if summary["claim"] is not None:
        figure.suptitle("class accuracy lost: {volume} points with a volume term, {no_volume} without".format(
            **{name: text(cell) for name, cell in summary["claim"]["semantic"].items()}))
    figure.legend([plt.Rectangle((0, 0), 1, 1, color=colour) for _, colour in groups.values()], groups,
                  loc="outside lower center", ncols=3, frameon=False)
    write_whole(path, lambda temporary: figure.savefig(temporary, format="png", dpi=130))
    plt.close(figure)


# ---- Command line ----------------------------------------------------------------------------------------------------


def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("--data", default="drawn", help="drawn, CIFAR10 or a folder of class folders, or of `train` and `test` "
        "(default: drawn)")
    add("--root", default="data", help="where torchvision finds or puts CIFAR10 (default: data)")
    add("--out", type=Path, default="runs/imbalance", help="folder for results (default: runs/imbalance)")
    add("--methods", nargs="+", default=list(METHODS), choices=METHODS, help="default: all seven")
    add("--seeds", type=int, nargs="+", default=[0], help="of weights and batches (default: 0)")
    add("--data_seed", type=int, default=0, help="which images (default: 0)")
    add("--classes_per_batch", type=int, default=2, help="of an imbalanced mini-batch (default: 2)")
    add("--images", type=int, default=5000, help="to train on, and as many to test, at most (default: 5000)")
    add("--epochs", type=int, default=16, help="of SimCLR, VICReg and SwAV; MSN, PMSN and data2vec take 1.5 times, MAE "
        "2.5 times as many, in the same time (default: 16)")
    add("--batch_size", type=int, default=64, help="default: 64")
    add("--lr", type=float, help="learning rate of every method (default: each method's own)")
    add("--quick", action="store_true", help="the same path with few images, 1 epoch")
    args = parser.parse_args(argv)
    args.methods = [method for method in METHODS if method in args.methods]
    if args.quick:
        args.images, args.epochs, args.batch_size, args.seeds = min(args.images, 500), 1, 50, args.seeds[:1]
    return args


def check(args):
    """UserError for what is wrong with the arguments."""
    for name, low in (("classes_per_batch", 1), ("images", 200), ("epochs", 1), ("batch_size", 4)):
        if getattr(args, name) < low:
            raise UserError(f"--{name} must be at least {low}, got {getattr(args, name)}")
    if args.lr is not None and not args.lr > 0:
        raise UserError(f"--lr must be positive, got {args.lr}")
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=args.out).close()
    except OSError as error:
        raise UserError(f"cannot write to --out {args.out}: {error.strerror}") from None


def main(argv=None):
    args = parse(argv)
    check(args)
    device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    data = load_data(args, device)
    images, classes = data["train"][0], data["train"][1]["class"]
    number = len(classes.unique())
    samplings = {"balanced": number, "imbalanced": args.classes_per_batch}
    if args.classes_per_batch >= number:
        raise UserError(f"--classes_per_batch must be less than the {number} classes of --data {args.data}, got "
                        f"{args.classes_per_batch}")
    if args.batch_size > len(images):
        raise UserError(f"--batch_size {args.batch_size} is larger than the data set of {len(images)} images")
    shares = {}
    for sampling, count in samplings.items():
        try:
            shares[sampling], present = marginals(classes, count, args.batch_size)
        except ValueError as error:
            raise UserError(f"{sampling} mini-batches, {args.batch_size} images of {count} classes: {error}") from None
        print(f"{sampling:<10} mini-batches of {args.batch_size}: {present} of {number} classes each, class shares in "
              f"an epoch {shares[sampling].min():.3f}..{shares[sampling].max():.3f}")
    print(f"the two shares of a class differ by {(shares['balanced'] - shares['imbalanced']).abs().max():.3f} at most")
    print(f"{len(images)} images of {args.data}, {device}, {torch.get_num_threads()} threads, "
          f"torch {torch.__version__}")

    scores = {name: {sampling: [] for sampling in samplings} for name in args.methods}
    scores.update({name: {"balanced": []} for name in BASELINES})
    work = len(args.seeds) * len(samplings) * len(args.methods)  # every run is about as long as the others
    began, done = time.time(), 0.0

    def report(epoch, epochs, loss):
        nonlocal done
        done += 1 / epochs
        left = round((time.time() - began) / done * (work - done))
        print(f"{seed:>4} {name:<9} {sampling:<10} {epoch:>3}/{epochs:<3} {loss:>9.4f} "
              f"{left // 3600:>3}:{left // 60 % 60:02}:{left % 60:02}", flush=True)

    print(f"{'seed':>4} {'method':<9} {'batches':<10} {'epoch':>7} {'loss':>9} {'left':>9}")
    for seed in args.seeds:
        torch.manual_seed(seed)
        scores["random encoder"]["balanced"].append(measure(make_encoder().to(device), data))
        scores["raw pixels"]["balanced"].append(measure(None, data))
        for name in args.methods:
            for sampling, count in samplings.items():
                encoder = train(name, images, classes, count, args, seed, report)
                scores[name][sampling].append(measure(encoder, data))
        summary = summarise(scores)
        config = {**vars(args), "out": str(args.out), "rates": RATES, "epoch_factors": EPOCH_FACTORS,
                  "device": device, "threads": torch.get_num_threads(), "torch": torch.__version__,
                  "python": platform.python_version()}
        content = json.dumps({"config": config, "scores": scores, "summary": summary}, indent=1)
        write_whole(args.out / "results.json", lambda temporary: temporary.write_text(content))
        plot(scores, summary, args.classes_per_batch, args.out / "imbalance.png")
    print_results(summary, args.classes_per_batch)
    print(f"\n{args.out}: results.json imbalance.png")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(f"imbalance.py: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\nimbalance.py: stopped; results of finished seeds are kept", file=sys.stderr)
        sys.exit(130)
