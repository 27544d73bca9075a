"""The corner experiment (paper, section 5.1 and figure 3): the prior decides what is encoded.

Each image has a digit in one corner and a background, so images can be grouped in two ways. One of
the two features is long-tailed, and the other one is balanced. The loss of PMSN prefers the feature
whose frequencies are those of the prior: with a power-law prior the long-tailed one, and with the
uniform prior (MSN) the balanced one. This holds whichever of the two features is the long-tailed
one: in 12 of 12 runs here, and in 11 of 12 with the loss exactly as in the paper (--fixed_order).

    python mnist_corner.py              # synthetic data, no download, two minutes on two cores
    python mnist_corner.py --quick      # the same with less training, less than a minute
    python mnist_corner.py --curve --seeds 0 1 2     # seven priors, from uniform to steep
    python mnist_corner.py --mnist      # MNIST over ten images of CIFAR-10 (torchvision loads them)
    python mnist_corner.py --ordinary   # one network on whole images, which encodes both features

For each prior we train two networks, from the same weights and on the same batches. One sees only a
window with the digit, and the other one only a window with background. The loss says which of the
two groupings it prefers, and this network goes on with whole images. The loss has local minima, as
the objective of K-means has. So each network has 32 tries, as K-means has several initializations:
32 heads with prototypes of their own on one encoder, of which the one with the lowest loss counts.

So the losses are the result. What the neighbors show in figure 3 follows from the window. An
ordinary run on whole images does not show it: it encodes both features under both priors.

No label reaches the training. Ours, and not the paper's: windows and tries, the small encoder, no
masking, and the prior in any order (`in_order_of` in pmsn.py). --mnist also takes a larger weight
for the KL, and Sinkhorn.
--out gets results.json, neighbors.png (figure 3), the models, and but for --ordinary preference.png
(the loss of every try).
"""

import copy
import functools
import itertools
import math
import time

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torchvision.transforms import v2

import pmsn
from support.drawings import (SIZE, WIDTHS, background_view, digit_view, draw_digits, draw_gratings,
                              make_encoder, make_head, make_pmsn, sample, schedule, shrink)
from support.evaluation import agreement, nearest_neighbors, purity
from support.figures import Figure, write_figure
from support.images import IMAGE_ENDINGS, open_image
from support.results import cell, number_of_seeds, run_or_continue, summarize
from support.runs import (Distinct, Parser, UserError, available_cores, command, folder, load_file,
                          number, save_file, say)

# What a network sees: the first row, the first column, and the pixels per side.
DIGIT, BACKGROUND, WHOLE = (0, 0, 16), (16, 16, 16), (0, 0, SIZE)
LABELS = ("digit", "background")
LINES = {"exact": ("exact grouping", ":"), "lowest": ("best grouping found", "-")}
EXPONENT = 1.0  # of the long-tailed feature, and of the power-law prior
CURVE = (0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0)  # the exponents of --curve
BATCH_SIZE, DIM = 256, 32  # images per batch, dimension of the embeddings
# Settings that depend on the data. `deform` is how much a digit is deformed in each view, and
# `contrast` is the contrast of the backgrounds, both from 0 to 1.
SYNTHETIC = {"deform": 0.3, "contrast": 0.8, "images": 15360, "epochs": 6, "loss_options": {}}
MNIST = {"deform": 0.05, "contrast": 1.0, "images": 30720, "epochs": 6,
         "loss_options": {"prior_weight": 3.0, "sinkhorn_iterations": 3}}


# ---- Data: gray images (N, 1, h, w) and labels (N,) ----------------------------------------------
def load_digits(args):
    """Digits for training and for the test. The synthetic ones are the same, deformed anew."""
    if args.mnist:
        splits = [torchvision.datasets.MNIST(args.root, train, download=True)
                  for train in (True, False)]
        return [(shrink(split.data[:, None] / 255), split.targets) for split in splits]
    # Only one font: groups of letters in different fonts would have sizes that fit any prior.
    return [draw_digits("DejaVuSans")] * 2


def load_backgrounds(args):
    """Ten backgrounds (10, 1, h, w): gratings, or the first image of each class of CIFAR-10."""
    if args.mnist:
        gray = v2.Compose([v2.Grayscale(), v2.Resize(SIZE), v2.CenterCrop(SIZE), v2.PILToTensor()])
        if args.backgrounds:
            data = torchvision.datasets.DatasetFolder(args.backgrounds, open_image, IMAGE_ENDINGS,
                                                      transform=gray)
        else:
            data = torchvision.datasets.CIFAR10(args.root, transform=gray, download=True)
        labels, first = np.unique(data.targets, return_index=True)
        if len(labels) != 10:
            raise RuntimeError(f"--backgrounds needs ten folders of images, got {len(labels)}")
        images = torch.stack([data[i][0] for i in first]).float()
        std, mean = torch.std_mean(images, dim=(2, 3), keepdim=True)
        return 0.5 + 0.35 * (images - mean) / std.clamp_min(1)  # the contrast of the gratings
    return draw_gratings()


def make_view(digits, backgrounds, settings):
    """Digits in a black square over backgrounds, randomly changed: (B, 1, 32, 32) in about [-1, 1].

    The square hides the background.
    """
    images = 0.5 + settings["contrast"] * (background_view(backgrounds) - 0.5)
    crop(images, DIGIT)[:] = digit_view(digits, settings["deform"])
    return 2 * (images + 0.05 * torch.randn_like(images)) - 1


def crop(images, window):
    row, column, size = window
    return images[:, :, row : row + size, column : column + size]


# ---- Model ---------------------------------------------------------------------------------------
class WindowPMSN(nn.Module):
    """PMSN on one window of the images. Each try has its own head and prototypes.

    The tries share the encoder, so they cost little. But they are less independent than networks.
    """
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
        # vmap computes the losses of all tries at once.
        losses, _ = torch.vmap(loss, in_dims=(1, 1, 0))(anchors, targets, self.prototypes)
        return losses


@torch.no_grad()
def widen(model, best):
    """The best try of a model, for whole images. At first it computes exactly the same."""
    row, column, size = model.window
    whole = WindowPMSN(WHOLE, model.exponent, tries=1)
    entries = slice(best * DIM, (best + 1) * DIM)
    for old, new in ((model.network, whole.network), (model.target, whole.target)):
        (old_encoder, old_head), (new_encoder, new_head) = old, new
        new_encoder[:-1].load_state_dict(old_encoder[:-1].state_dict())
        weight = old_encoder[-1].weight  # (128, 64 * positions)
        if size < SIZE:
            positions = torch.zeros(128, WIDTHS[-1], 3, 3)  # 0 at the eight new positions
            positions[:, :, row // 8, column // 8] = weight
            weight = positions.flatten(1)
        new_encoder[-1].weight.copy_(weight)
        new_encoder[-1].bias.copy_(old_encoder[-1].bias)
        new_head[0].weight.copy_(old_head[0].weight[entries])
        new_head[0].bias.copy_(old_head[0].bias[entries])
        new_head[1].running_mean.copy_(old_head[1].running_mean[entries])
        new_head[1].running_var.copy_(old_head[1].running_var[entries])
    whole.prototypes.copy_(model.prototypes[best : best + 1])
    return whole


# ---- Training ------------------------------------------------------------------------------------
def schedule_of_whole_images(done):
    lr, _, _ = schedule(done)
    return lr / 2, 0.25, 0.99


def train(models, schedule_of, epochs, data, settings, title):
    """Train all models on the same batches and views. Returns their losses in the last epoch."""
    # `data` has (images, indices into them) of the digits and of the backgrounds, without labels.
    steps_per_epoch = settings["images"] // BATCH_SIZE
    optimizers = [torch.optim.AdamW(model.parameters(), weight_decay=0.05) for model in models]
    began = time.monotonic()
    for epoch in range(epochs):
        losses = [torch.zeros(len(model.prototypes)) for model in models]  # (tries,) each
        for step, batch in enumerate(torch.randperm(settings["images"]).split(BATCH_SIZE)):
            done = (epoch + step / steps_per_epoch) / epochs  # from 0 to 1
            lr, sharpening, ema_momentum = schedule_of(done)
            images = [bank[index[batch]] for bank, index in data]
            views = [make_view(*images, settings) for _ in range(2)]  # the target and one anchor

            for model, optimizer, total in zip(models, optimizers, losses):
                loss = model(views, sharpening=sharpening, **settings["loss_options"])  # (tries,)
                optimizer.param_groups[0]["lr"] = lr
                optimizer.zero_grad()
                loss.sum().backward()
                nn.utils.clip_grad_norm_(model.parameters(), 3.0)
                optimizer.step()
                pmsn.move_target(model.target, model.network, ema_momentum)
                total += loss.detach() / steps_per_epoch
        left = (time.monotonic() - began) * (epochs / (epoch + 1) - 1)
        lowest = "".join(f"{loss.min():>7.3f}" for loss in losses)
        say(f"{title}{epoch + 1:>6}{left:>6.0f}s {lowest}")
    return losses


# ---- One experiment ------------------------------------------------------------------------------
def experiment(seed, long_tailed, args):
    """One seed, with all priors: its runs. The images of figure 3 go to a file."""
    torch.set_num_threads(1)  # faster here, and the same bits for any number of processes
    torch.manual_seed(seed)
    settings = make_settings(args)
    (digits, digit_labels), (test_digits, test_labels) = load_digits(args)
    backgrounds, background_labels = load_backgrounds(args), torch.arange(10)
    digit_index = sample(digit_labels, class_exponent("digit", long_tailed), settings["images"])
    background_index = sample(background_labels, class_exponent("background", long_tailed),
                              settings["images"])
    data = [(digits, digit_index), (backgrounds, background_index)]

    windows = {"whole": WHOLE} if args.ordinary else {"digit": DIGIT, "background": BACKGROUND}
    models = {}
    for exponent, name in itertools.product(args.exponents, windows):
        torch.manual_seed(seed)  # Both windows and all priors get the same weights.
        models[exponent, name] = WindowPMSN(windows[name], exponent, args.tries)
    title = f"{seed:>4}{long_tailed:>12}"
    losses = train(models.values(), schedule, settings["epochs"], data, settings,
                   f"{title}   first")
    losses = dict(zip(models, losses))
    chosen, finals = {}, []
    for exponent in args.exponents:
        # The try with the lowest loss goes on, of all tries on both windows.
        chosen[exponent] = min(windows, key=lambda name: losses[exponent, name].min())
        best = exponent, chosen[exponent]
        finals.append(widen(models[best], int(losses[best].argmin())))
    torch.manual_seed(seed)  # whatever the number of priors
    train(finals, schedule_of_whole_images, math.ceil(settings["epochs"] / 3), data, settings,
          f"{title}  second")

    torch.manual_seed(seed)
    # The test images are balanced, so chance is .1 for both features.
    index = sample(test_labels, 0.0, 2000)
    background = sample(background_labels, 0.0, 2000)
    test = {"images": make_view(test_digits[index], backgrounds[background], settings),
            "digit": test_labels[index], "background": background}
    # Prototypes were trained for long-tailed shares, so they are judged on images with these.
    index, background = digit_index[:2000], background_index[:2000]
    seen = {"images": make_view(digits[index], backgrounds[background], settings),
            "digit": digit_labels[index], "background": background}
    queries = None if args.mnist else draw_other_fonts(backgrounds, settings)
    records, pictures = [], {}
    for final in finals:
        exponent = final.exponent
        save_file(as_pmsn(final).state_dict(), model_path(args.out, long_tailed, exponent, seed))
        results, features = measure(final, test, seen, queries)
        tries = {name: losses[exponent, name].tolist() for name in windows}
        results |= {f"{name}_loss": min(values) for name, values in tries.items()}
        records.append({"seed": seed, "long_tailed": long_tailed, "exponent": exponent,
                        "chosen": chosen[exponent], "results": results, "tries": tries})
        _, first = np.unique(test["digit"], return_index=True)  # an image of each digit
        _, nearest = nearest_neighbors(features[first[::2]], features, 9)
        pictures[exponent] = {what: test[what][nearest] for what in ("images", *LABELS)}
    save_file(pictures, pictures_path(args.out, long_tailed, seed))
    return records


def make_settings(args):
    settings = dict(MNIST if args.mnist else SYNTHETIC)
    settings["loss_options"] = {**settings["loss_options"], "any_order": not args.fixed_order}
    if args.quick:
        settings |= {"images": 7680, "epochs": 4}
    return settings


def class_exponent(feature, long_tailed):
    return EXPONENT if feature == long_tailed else 0.0


def model_path(folder, long_tailed, exponent, seed):
    return folder / f"model_{long_tailed}_{exponent:g}_{seed}.pt"


def pictures_path(folder, long_tailed, seed):
    return folder / f"pictures_{long_tailed}_{seed}.pt"


def load_pictures(folder, seed):
    return {(long_tailed, exponent): picture for long_tailed in LABELS
            for exponent, picture in load_file(pictures_path(folder, long_tailed, seed)).items()}


def as_pmsn(final):
    """The only try of a network on whole images, as a model of pmsn.py."""
    model = make_pmsn(make_encoder(SIZE), 10, final.exponent, DIM)
    model.encoder, model.head = final.network
    model.target_encoder, model.target_head = final.target
    model.prototypes = nn.Parameter(final.prototypes[0].detach())
    return model


# ---- Measures ------------------------------------------------------------------------------------
def draw_other_fonts(backgrounds, settings):
    """1,000 images with digits of two fonts that are not in the training, and their labels."""
    glyphs, labels = zip(*[draw_digits(font) for font in ("DejaVuSerif", "STIXGeneral")])
    glyphs = torch.cat(glyphs)
    index = torch.arange(20).repeat(50)
    backgrounds = backgrounds[torch.randint(10, index.shape)]
    return make_view(glyphs[index], backgrounds, settings), torch.cat(labels)[index]


@torch.no_grad()
def measure(final, test, seen, queries):
    """What encoder, projection and prototypes know, and the features (N, 128) of test images."""
    encoder, head = final.target.eval()
    features = encoder(test["images"])
    prototype = pmsn.cosine(head(encoder(seen["images"])), final.prototypes[0]).argmax(dim=1)
    results = {}
    for what in LABELS:
        results[f"same_{what}"] = agreement(features, test[what])
        results[f"projection_{what}"] = agreement(head(features), test[what])
        results[f"prototype_{what}"] = purity(prototype, seen[what])
    if queries:
        images, labels = queries
        _, nearest = nearest_neighbors(encoder(images), features, 10)
        results["other_font"] = (test["digit"][nearest] == labels[:, None]).float().mean().item()
    return results, features


# ---- What a loss could be at best ----------------------------------------------------------------
def reference_losses(of_classes, of_prior, any_order):
    """Losses of a network that knows the class of each image, without any training of a network.

    `of_classes` and `of_prior` are the exponents of the ten classes and of the prior. "exact" is
    the grouping in which each class has its own prototype. "lowest" is the best one that we find:
    it can give a frequent class several prototypes, and put rare classes together.
    """
    torch.manual_seed(0)
    shares, prior = (pmsn.power_law_prior(10, exponent) for exponent in (of_classes, of_prior))
    # The shares of the classes in 400 batches, which are not exactly those of the data.
    batches = shares.multinomial(400 * BATCH_SIZE, replacement=True).view(400, -1)
    batches = F.one_hot(batches).float().mean(dim=1)  # (400, 10)
    exact = loss_of_grouping(100 * torch.eye(10), batches, prior, any_order).item()
    found = loss_of_grouping(find_grouping(shares, prior), batches, prior, any_order).item()
    return {"exact": exact, "lowest": min(exact, found)}


def loss_of_grouping(table, batches, prior, any_order=True, sharpening=0.25):
    """The mean loss over batches (n, classes) if an image of class c has the logits table[c]."""
    log_p = table.log_softmax(dim=1)  # (classes, K)
    p_target = pmsn.sharpen(log_p, sharpening).exp().detach()
    p_bar = batches @ log_p.exp()  # (n, K)
    log_prior = prior.log()
    if any_order:
        log_prior = pmsn.in_order_of(p_bar, log_prior)  # for each batch
    cross_entropy = batches @ -(p_target * log_p).sum(dim=1)
    prior_kl = (torch.xlogy(p_bar, p_bar) - p_bar * log_prior).sum(dim=1)
    return (cross_entropy + prior_kl).mean()


def find_grouping(shares, prior, tries=100, steps=400):
    """A grouping of classes with these shares with a low loss: logits (classes, K).

    We search by gradient descent from many random tables. Nothing is learned here, and every table
    is possible. So a window that shows nothing but the class can hardly have a lower loss.
    """
    tables = (3 * torch.randn(tries, 10, 10)).requires_grad_()
    optimizer = torch.optim.Adam([tables], lr=0.05)
    for step in range(steps):
        sharpening = max(0.25, 1 - 1.5 * step / steps)  # from soft targets on, as in `schedule`
        loss = functools.partial(loss_of_grouping, batches=shares[None], prior=prior,
                                 sharpening=sharpening)
        losses = torch.vmap(loss)(tables)
        optimizer.zero_grad()
        losses.sum().backward()
        optimizer.step()
    best = tables[losses.argmin()].detach()
    # Number the prototypes as the prior does, for the loss without `any_order`.
    p_bar = shares @ best.softmax(dim=1)
    return best[:, p_bar.argsort(descending=True)]


# ---- Figures -------------------------------------------------------------------------------------
def should_choose(long_tailed, exponent):
    """The feature that matches the prior."""
    balanced = "background" if long_tailed == "digit" else "digit"
    return long_tailed if exponent else balanced


def plot_neighbors(pictures, summary):
    """Figure 3, two by two: which feature is long-tailed, and which prior."""
    figure = Figure(figsize=(13, 9), layout="constrained")
    axes = figure.subplots(2, 2)
    matches = 0
    for row, long_tailed in zip(axes, LABELS):
        for ax, exponent in zip(row, (0.0, EXPONENT)):
            shown, found = pictures[long_tailed, exponent], summary[long_tailed, exponent]
            same = {what: (shown[what] == shown[what][:, :1]).numpy() for what in LABELS}  # (5, 9)
            # Frames of 3 pixels: above in green for the same digit, below in blue for the same
            # background, and black for the image itself, which comes first.
            tiles = np.ones((5, 9, 38, 38, 3))
            tiles[same["digit"], :19] = 0.24, 0.62, 0.3
            tiles[same["background"], 19:] = 0.19, 0.39, 0.75
            tiles[:, 0] = 0
            tiles[..., 3:-3, 3:-3, :] = shown["images"][:, :, 0, :, :, None].clamp(-1, 1) / 2 + 0.5
            ax.imshow(tiles.transpose(0, 2, 1, 3, 4).reshape(190, 342, 3))
            ax.set_axis_off()
            shares = {what: found[f"same_{what}"]["mean"] for what in LABELS}
            encoded = [what for what, share in shares.items() if share > 0.5]
            matches += encoded == [should_choose(long_tailed, exponent)]
            losses = [f"{what} {found[f'{what}_loss']['mean']:.3f}" for what in LABELS
                      if f"{what}_loss" in found]
            ax.set_title(
                f"long-tailed {long_tailed}s, {'power-law' if exponent else 'uniform'} prior\n"
                + (f"loss of the windows: {', '.join(losses)}\n" if losses else "")
                + f"neighbors: same digit {shares['digit']:.2f}, "
                f"same background {shares['background']:.2f}")
    figure.suptitle(f"In {matches} of 4 panels, more than half of the neighbors share the feature "
                    "whose frequencies are those of the prior,\n"
                    "and less than half share the other one (by chance: 0.10)")
    figure.supxlabel("Each row: an image (black frame) and its nearest neighbors, last seed (green "
                     "above: same digit, blue below: same background).\n"
                     f"Numbers: means over n = {number_of_seeds(summary)} seeds")
    return figure


def plot_preference(records, references):
    """The loss of every try on both windows, and the reference losses."""
    exponents = sorted({record["exponent"] for record in records})
    figure = Figure(figsize=(6.5 + len(exponents), 6), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    wins = []
    for ax, long_tailed in zip(axes, LABELS):
        panel = [record for record in records if record["long_tailed"] == long_tailed]
        for feature, color, shift in zip(LABELS, ("#3d9e4d", "#3063bf"), (-0.17, 0.17)):
            for place, exponent in enumerate(exponents):
                tries = [loss for record in panel if record["exponent"] == exponent
                         for loss in record["tries"][feature]]
                places = place + shift + np.linspace(-0.12, 0.12, len(tries))
                ax.plot(places, tries, ".", color=color, alpha=0.5,
                        label="" if place else f"window with the {feature}: one dot per try")
                arm = class_exponent(feature, long_tailed), exponent
                for name, loss in references.get(arm, {}).items():
                    text, style = LINES[name]
                    ax.hlines(loss, place + shift - 0.16, place + shift + 0.16, color, style,
                              label="" if place else f"{text}, by the {feature}")
        wins += [record["chosen"] == should_choose(long_tailed, record["exponent"])
                 for record in panel if record["exponent"] in (0, EXPONENT)]
        ax.set_xticks(range(len(exponents)), [f"{exponent:g}" for exponent in exponents])
        ax.set(title=f"long-tailed {long_tailed}s, balanced {should_choose(long_tailed, 0.0)}s",
               xlabel="exponent of the prior (0: uniform)")
    axes[0].set_ylim(-0.01)
    axes[0].set_ylabel("loss (nats)")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2)
    seeds = len({record["seed"] for record in records})
    figure.suptitle(f"{sum(wins)} of {len(wins)} times (n = {seeds} seeds), the best of all tries "
                    "sees the long-tailed feature\nunder the power law (exponent "
                    f"{EXPONENT:g}), and the balanced one under the uniform prior")
    return figure


# ---- Command line --------------------------------------------------------------------------------
@command
def main(argv=None):
    parser = Parser("The corner experiment: the prior decides what is encoded (figure 3)")
    add = parser.add_argument
    add("--mnist", action="store_true", help="MNIST and CIFAR-10 in place of drawn images")
    add("--root", default="data", help="where torchvision finds data sets, or downloads them")
    add("--backgrounds", help="with --mnist: a folder with ten folders of images, for CIFAR-10")
    add("--out", type=folder, default="runs/corner", help="folder for results and figures")
    add("--seeds", type=number(int, 0, 2_000_000_000), nargs="+", action=Distinct, default=[0],
        help="one run each")
    add("--curve", action="store_true", help="seven priors instead of two")
    add("--ordinary", action="store_true", help="one network with one try, on whole images")
    add("--tries", type=number(int, 1, 1000), default=32, help="heads and prototypes per network")
    add("--fixed_order", action="store_true", help="share k for prototype k, as in the paper")
    add("--workers", type=number(int, 1, 1000), default=available_cores(), help="processes")
    add("--quick", action="store_true", help="fewer images and epochs, in less than a minute")
    args = parser.parse_args(argv)
    if args.ordinary:
        args.tries = 1
    if args.backgrounds and not args.mnist:
        parser.error("--backgrounds is for --mnist")
    args.exponents = CURVE if args.curve else (0.0, EXPONENT)
    try:
        load_digits(args)  # Data sets are loaded from the network here, and once.
        load_backgrounds(args)
    except (OSError, RuntimeError) as error:
        raise UserError(f"cannot load the data: {error}") from error

    settings = make_settings(args)
    jobs = list(itertools.product(args.seeds, LABELS))
    references = {}
    if not args.mnist and not args.ordinary:  # They are for classes that a network knows exactly.
        references = {arm: reference_losses(*arm, not args.fixed_order)
                      for arm in itertools.product((EXPONENT, 0.0), args.exponents)}
    config = {name: value for name, value in vars(args).items()
              if name not in ("out", "seeds", "workers")}
    config |= settings
    # Rounded, so that another machine can continue the run.
    config["references"] = [
        {"of_classes": of_classes, "of_prior": of_prior,
         **{name: round(loss, 4) for name, loss in losses.items()}}
        for (of_classes, of_prior), losses in references.items()]
    windows = "the whole image" if args.ordinary else "the digit's and the background's window"
    say(f"Lowest loss of each network, for the priors {', '.join(map(str, args.exponents))}.\n"
        f"First part: {windows}, for each prior. Second part: the winner for each prior\n"
        "seed long-tailed    part epoch   left   losses")
    records = run_or_continue(experiment, jobs, args, config, args.out / "results.json")

    summary = summarize(records, key=lambda record: (record["long_tailed"], record["exponent"]))
    say(f"\nmean ± std over n = {len(args.seeds)} seeds")
    columns = [column for column in (
        "digit_loss", "background_loss", "whole_loss", "same_digit", "same_background",
        "prototype_digit", "prototype_background", "other_font")
        if any(column in row for row in summary.values())]
    say("long-tailed prior" + "".join(f"{column:>21}" for column in columns))
    for (long_tailed, exponent), row in summary.items():
        say(f"{long_tailed:>11}{exponent:>6.2f}"
            + "".join(f"{cell(row, column):>21}" for column in columns))
    if references:
        say("\nWhat a loss could be\nclasses prior   exact grouping   lowest that we find")
    for (of_classes, of_prior), losses in references.items():
        say(f"{of_classes:>7.2f}{of_prior:>6.2f}{losses['exact']:>17.3f}"
            f"{losses['lowest']:>22.3f}")
    write_figure(args.out / "neighbors.png", lambda: plot_neighbors(
        load_pictures(args.out, args.seeds[-1]), summary))
    if not args.ordinary:
        write_figure(args.out / "preference.png", plot_preference, records, references)
    say(f"results.json and the figures are in {args.out}")


if __name__ == "__main__":
    main()
