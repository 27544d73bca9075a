"""What class-imbalanced mini-batches do to six methods (table 1 and figure 5 of the paper).

The paper trains on the same images twice: mini-batches hold all classes, or only a few of them.
SimCLR, VICReg, SwAV and MSN have a volume term, which spreads every mini-batch evenly. The class
cannot spread a mini-batch of two classes, so other features must, and the class is lost. MAE and
data2vec have no volume term and should lose little.

    python extras/imbalance.py                    # synthetic images, no download
    python extras/imbalance.py --data CIFAR10     # or a folder with train and test
    python extras/imbalance.py --quick            # a short run from end to end

The results go to results.json and imbalance.png in --out.
All methods share a small vision transformer, the views, the training loop and a linear probe, and
run on the CPU. In the paper SimCLR trains a ResNet-50 on mini-batches of 4096 images of ImageNet.
"""

import argparse
import copy
import math
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import default_collate
from torchvision.datasets import CIFAR10, ImageFolder
from torchvision.transforms import v2

# The other scripts are in the folder above, and are not installed.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import pmsn
from experiments import Figure, number, parse, print_any_text, save

# These rates gave the best class accuracy with balanced mini-batches. A third of each and three
# times each were worse. An earlier version of this script chose them, on other synthetic images.
RATES = {"SimCLR": 1e-3, "VICReg": 1e-3, "SwAV": 1e-3, "MSN": 3e-4, "MAE": 3e-3, "data2vec": 3e-3}
# Epochs per epoch of SimCLR. With these all methods train for about the same time on a CPU.
EPOCH_FACTORS = {"SimCLR": 1, "VICReg": 1, "SwAV": 1, "MSN": 1.5, "MAE": 2.5, "data2vec": 1.5}
VOLUME = ("SimCLR", "VICReg", "SwAV", "MSN")
GROUPS = {"with a volume term": VOLUME, "without one": ("MAE", "data2vec")}
TASKS = ("class", "luminance", "color", "orientation")  # the last three are low-level
SIZE, PATCH = 32, 8  # pixels

# ---- Data: images, their classes, and what is low-level about them -------------------------------
def synthetic_images(count, seed):
    """Shapes, uint8 (N, 3, 32, 32). Image i has class i % 10.

    The class is the number of lobes (0, 2, 3, 4 or 5), and whether the shape is full or a ring.
    Colors, place, size, angle and the grating in the background do not depend on the class.
    """
    generator = torch.Generator().manual_seed(seed)

    def uniform(low, high, *shape):
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
    # The shape is darker or lighter than the background, and both have a tint of their own.
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
    # As complex numbers, opposite gradients have the same square, and their squares add up.
    squares = torch.complex(dx, dy).square().sum(dim=(1, 2))
    return {
        "luminance": (red + green + blue) / 3,
        "color": red - blue,
        "orientation": squares.angle().abs() / 2,
    }

def load_data(args):
    """Training images uint8 (N, 3, 32, 32) and {task: labels (N,)}, then the same for testing.

    Image i has class i % C. Low-level labels are five bins, equally full for training images.
    """
    if args.data == "synthetic":
        num_classes = 10
        sets = [synthetic_images(args.images // 10 * 10, seed) for seed in (0, 1)]
    else:
        if args.data == "CIFAR10":
            splits = [CIFAR10(args.root, train, download=True) for train in (True, False)]
        else:
            splits = [ImageFolder(Path(args.data, name)) for name in ("train", "test")]
        if splits[0].classes != splits[1].classes:
            raise ValueError("training and test images have different classes")
        num_classes = len(splits[0].classes)
        sets = [read_images(split, args.images // num_classes) for split in splits]
    labels = [{"class": torch.arange(len(images)) % num_classes} for images in sets]
    training_values, test_values = low_level(sets[0]), low_level(sets[1])
    for task in args.tasks[1:]:
        edges = training_values[task].quantile(torch.arange(1, 5) / 5)
        labels[0][task] = torch.bucketize(training_values[task], edges)
        labels[1][task] = torch.bucketize(test_values[task], edges)
    return sets[0], labels[0], sets[1], labels[1]

def read_images(dataset, per_class):
    """Images of a torchvision dataset, the same number of each class and the classes in turn."""
    uniform = pmsn.power_law_prior(len(dataset.classes), 0.0)
    index = pmsn.long_tail_indices(torch.tensor(dataset.targets), uniform)
    index = index.view(len(uniform), -1)[:, :per_class]  # (C, n)
    images = [dataset[i][0].resize((SIZE, SIZE)) for i in index.T.flatten().tolist()]
    return torch.stack([v2.functional.pil_to_tensor(image) for image in images])

# ---- Methods: modules that map two views, (B, 3, 32, 32) each, to (loss, terms) ------------------
def make_encoder():
    return pmsn.VisionTransformer(SIZE, PATCH, embed_dim=96, depth=3, num_heads=3)

class TwoViews(nn.Module):
    """SimCLR, VICReg and SwAV: a loss on the embeddings of both views. SwAV has prototypes too."""

    def __init__(self, loss, output_dim, prototypes=()):
        super().__init__()
        self.encoder, self.loss = make_encoder(), loss
        self.head = pmsn.projection_head(self.encoder.embed_dim, 256, output_dim)
        self.prototypes = nn.ParameterList(prototypes)

    def forward(self, views):
        embeddings = self.head(self.encoder(torch.cat(views)))
        first, second = embeddings.chunk(2)
        return self.loss(first, second, *self.prototypes)

class MAE(nn.Module):
    """Masked autoencoder (He et al., 2022): a quarter of the patches predicts the other pixels."""

    def __init__(self, width=64):
        super().__init__()
        self.encoder = make_encoder()
        self.decoder_embed = nn.Linear(self.encoder.embed_dim, width)
        self.mask_token = nn.Parameter(0.02 * torch.randn(width))
        self.decoder_pos_embed = nn.Parameter(0.02 * torch.randn((SIZE // PATCH) ** 2, width))
        self.decoder = nn.Sequential(
            pmsn.Block(width, 4), nn.LayerNorm(width), nn.Linear(width, 3 * PATCH**2))

    def forward(self, views):
        tokens = self.encoder.embed_patches(views[0])  # (B, N, dim)
        kept, visible = pmsn.drop_patches(tokens, 0.75)
        encoded = run_blocks(self.encoder, kept)[-1][:, 1:]  # without CLS
        encoded = self.decoder_embed(encoded)  # (B, kept, width)
        # The decoder sees the encoded patches at their places, and the mask token elsewhere.
        full = self.mask_token.expand(*tokens.shape[:2], -1)
        full = full.scatter(1, visible[:, :, None].expand_as(encoded), encoded)
        predictions = self.decoder(full + self.decoder_pos_embed)  # (B, N, 3 * PATCH^2)
        hidden = F.one_hot(visible, tokens.shape[1]).sum(dim=1) == 0  # (B, N)
        return mae_loss(predictions, views[0], hidden), {}

def mae_loss(predictions, images, hidden):
    """Squared error on hidden patches (B, N). The pixels of each patch are standardized."""
    pixels = F.unfold(images, PATCH, stride=PATCH).transpose(1, 2)  # (B, N, 3 * PATCH^2)
    variance, mean = torch.var_mean(pixels, dim=-1, keepdim=True)
    pixels = (pixels - mean) / (variance + 1e-6).sqrt()
    return (predictions - pixels).square().mean(dim=-1)[hidden].mean()

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
        self.encoder = make_encoder()
        self.mask_token = nn.Parameter(0.02 * torch.randn(self.encoder.embed_dim))
        self.head = nn.Linear(self.encoder.embed_dim, self.encoder.embed_dim)
        self.target_encoder = copy.deepcopy(self.encoder).requires_grad_(False)

    def forward(self, views):
        # We hide random patches. The original hides blocks, and its loss is smooth L1.
        tokens = self.encoder.embed_patches(views[0])  # (B, N, dim)
        _, visible = pmsn.drop_patches(tokens, 0.6)
        hidden = F.one_hot(visible, tokens.shape[1]).sum(dim=1) == 0  # (B, N)
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

METHODS = {
    "SimCLR": lambda: TwoViews(pmsn.simclr_loss, 128),
    "VICReg": lambda: TwoViews(pmsn.vicreg_loss, 64),
    "SwAV": lambda: TwoViews(pmsn.swav_loss, 128, [torch.randn(20, 128)]),
    "MSN": lambda: pmsn.PMSN(make_encoder(), pmsn.power_law_prior(20, 0.0),
                             head=pmsn.projection_head(96, 256)),
    "MAE": MAE,
    "data2vec": Data2Vec,
}

# ---- Training: one loop for all methods ----------------------------------------------------------
def train(parser, args, name, images, sampler, seed):
    """The trained encoder. Only the sampler knows the classes: it makes the mini-batches."""
    torch.manual_seed(seed)
    method = METHODS[name]()
    parameters = [p for p in method.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, weight_decay=0.05)
    sampler.seed = seed
    epochs = math.ceil(args.epochs * EPOCH_FACTORS[name])
    steps, began = epochs * len(sampler), time.time()
    for epoch in range(1, epochs + 1):
        sampler.set_epoch(epoch)
        losses = []
        for step, batch in enumerate(sampler, start=(epoch - 1) * len(sampler)):
            # The learning rate rises over the first tenth and follows a cosine to zero.
            rise = min(1.0, (step + 1) / (0.1 * steps))
            fall = 0.5 + 0.5 * math.cos(math.pi * step / steps)
            optimizer.param_groups[0]["lr"] = (args.lr or RATES[name]) * rise * fall

            # Two random crops of each image, in random colors. 32 pixels are too few to blur.
            # Cropping one image at a time takes a fifth of a step of SimCLR.
            crops = [pmsn.multi_crop(image, rand_size=SIZE, focal_views=0, rand_scale=(0.3, 1.0))
                     for image in images[batch]]
            views = pmsn.make_views(default_collate(crops), blur_p=0.0)

            loss, _ = method(views)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 3.0)
            optimizer.step()
            # Only MSN and data2vec have a target network.
            if hasattr(method, "update_target"):
                method.update_target(ema_momentum=0.99)
            losses.append(loss.item())
        mean_loss = np.mean(losses)
        if not math.isfinite(mean_loss):
            parser.error(f"the loss of {name} is not finite in epoch {epoch}: try a lower --lr")
        left = round((time.time() - began) * (epochs - epoch) / epoch)
        print(f"{seed:>4}  {name:<9} {sampler.classes_per_batch:>17} {epoch:>5}/{epochs:<4} "
              f"{mean_loss:>9.4f} {left // 60:>8}:{left % 60:02}", flush=True)
    return method.encoder

# ---- Measuring -----------------------------------------------------------------------------------
@torch.no_grad()
def features(encoder, images):
    """Frozen features (N, 2 * dim): CLS and the mean over patches. None gives 8 x 8 pixels."""
    images = v2.functional.to_dtype(images, torch.float32, scale=True)
    images = v2.functional.normalize(images, pmsn.IMAGENET_MEAN, pmsn.IMAGENET_STD)
    if encoder is None:
        return F.avg_pool2d(images, 4).flatten(1)
    tokens = run_blocks(encoder, encoder.embed_patches(images))[-1]
    return torch.cat([tokens[:, 0], tokens[:, 1:].mean(dim=1)], dim=1)

def measure(encoder, images, labels, test_images, test_labels):
    """The accuracy of a linear probe for each task, in %. Labels are {task: labels (N,)}."""
    x, test_x = features(encoder, images), features(encoder, test_images)
    accuracies = []
    for task in labels:
        correct = pmsn.linear_probe(x, labels[task], test_x) == test_labels[task]
        accuracies.append(100 * correct.double().mean().item())
    return accuracies

def summarize(scores, untrained):
    """{row: (seeds, 6)}: the class accuracy of both runs, and the accuracy lost for each task."""
    table = {}
    for name, runs in scores.items():
        accuracy = np.array(runs)  # (seeds, balanced and imbalanced, tasks)
        lost = accuracy[:, 0] - accuracy[:, 1]
        table[name] = np.column_stack([accuracy[:, :, 0], lost])
    # A method has learned if it beats a random encoder by 5 points. The others cannot lose much.
    for group, names in GROUPS.items():
        rows = [row for name, row in table.items()
                if name in names and row[:, 0].mean() >= untrained + 5]
        if rows:
            table[group] = np.mean(rows, axis=0)
    if all(group in table for group in GROUPS):
        table["difference"] = table["with a volume term"] - table["without one"]
    return table

def text(values):
    """Mean ± standard deviation over seeds."""
    spread = f" ± {np.std(values, ddof=1):.1f}" if len(values) > 1 else ""
    return f"{np.mean(values):.1f}{spread}"

def plot(table, args):
    """Figure 5: what imbalanced mini-batches cost. A bar is a mean over seeds, a dot one seed."""
    figure = Figure(figsize=(13, 4), layout="constrained")
    axes = figure.subplots(1, len(args.tasks), sharey=True)
    for column, (ax, task) in enumerate(zip(axes, args.tasks), start=2):
        for name in args.methods:
            lost = table[name][:, column]
            ax.bar(name, lost.mean(), color="#30638e" if name in VOLUME else "#8c8c8c")
            ax.plot([name] * len(lost), lost, "ko", markersize=3.5)
        ax.axhline(0, color="black", linewidth=0.8)
        ax.tick_params(axis="x", rotation=60)
        ax.set_title(task)
    axes[0].set_ylabel("accuracy lost, in points\n(blue: with a volume term)")
    lost = [f"{text(table[group][:, 2])} points {group}" for group in GROUPS if group in table]
    title = ", ".join(lost) or "no method learned the class"
    batch = f"{args.classes_per_batch} instead of all classes per mini-batch"
    figure.suptitle(f"Class accuracy lost with {batch}: {title}")
    figure.savefig(args.out / "imbalance.png", dpi=130)

# ---- Command line --------------------------------------------------------------------------------
def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("--data", default="synthetic", help="synthetic, CIFAR10 or a folder with train and test")
    add("--root", default="data", help="where torchvision keeps CIFAR10 (default: data)")
    add("--out", type=Path, default="runs/imbalance", help="default: runs/imbalance")
    add("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="default: all six")
    add("--seeds", nargs="+", type=number(int, 0, 2**32 - 1), default=[0], help="default: 0")
    add("--classes_per_batch", type=number(int, 1), default=2, help="default: 2")
    add("--images", type=number(int, 60), default=4800, help="at most, per set (default: 4800)")
    add("--epochs", type=number(int, 1), default=16, help="epochs of SimCLR (default: 16)")
    add("--batch_size", type=number(int, 4), default=60, help="images per batch (default: 60)")
    add("--lr", type=number(float, 1e-9), help="learning rate (default: one for each method)")
    add("--quick", action="store_true", help="1 epoch of two methods, 300 images, two tasks")
    args = parse(parser, argv)
    args.tasks = TASKS[:2] if args.quick else TASKS
    if args.quick:
        args.methods, args.images, args.epochs = ["SimCLR", "MAE"], 300, 1
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        # If we cannot write here, the user should know it before the training.
        tempfile.TemporaryFile(dir=args.out).close()
        data = load_data(args)
        images, classes = data[0], data[1]["class"]
        samplers = [pmsn.ClassBatchSampler(classes, args.batch_size, count)
                    for count in (len(classes.unique()), args.classes_per_batch)]
    except (OSError, SyntaxError, RuntimeError, ValueError) as error:
        parser.error(f"cannot start with this --data, --out or --batch_size: {error}")

    print("seed  method    classes per batch epoch        loss       left")
    # All accuracies: scores[name][seed][0 for balanced, 1 for imbalanced][task].
    scores = {name: [] for name in args.methods}
    baselines = {"random encoder": [], "raw pixels": []}
    for seed in args.seeds:
        torch.manual_seed(seed)
        baselines["random encoder"].append(measure(make_encoder(), *data))
        baselines["raw pixels"].append(measure(None, *data))
        for name in scores:
            encoders = [train(parser, args, name, images, s, seed) for s in samplers]
            scores[name].append([measure(encoder, *data) for encoder in encoders])
        results = {"config": vars(args), "scores": scores, "baselines": baselines}
        try:
            save(results, args.out / "results.json")
        except OSError as error:
            parser.error(f"cannot write to --out: {error}")

    table = summarize(scores, untrained=np.mean(baselines["random encoder"], axis=0)[0])
    print("\nclass accuracy in %, and what imbalanced mini-batches cost for each task, in points")
    print(" " * 24 + "balanced    imbalanced" + "".join(f"{task:>14}" for task in args.tasks))
    for name, row in table.items():
        print(f"{name:<18}" + "".join(f"{text(x):>14}" for x in row.T))
    for name, accuracies in baselines.items():
        print(f"{name:<18}{text(np.array(accuracies)[:, 0]):>14}")
    try:
        plot(table, args)
    except OSError as error:
        parser.error(f"cannot write to --out: {error}")
    print(f"\n{args.out}: results.json imbalance.png")

if __name__ == "__main__":
    print_any_text()
    main()
