"""Which prior for long-tailed data? Section 5.2 of the paper, small enough for a laptop.

The paper finds that a power-law prior helps on long-tailed iNat18 and hurts on balanced ImageNet.
Here the classes are 64 letters that we draw, or those of photographs (CIFAR-10 or a folder), and
they are balanced or long-tailed. With --contrasts above 0, each image also has one of 10 gratings,
all equally frequent. A network could group images by grating instead of by class, and the paper
expects that the uniform prior prefers this.

We train PMSN with priors from uniform to steep, and with these losses:

    plain        as in the paper
    relative     targets are sharpened relative to the prior (pmsn.sharpen_relative)
    Sinkhorn     targets are moved to the prior (pmsn.sinkhorn)
    both         both of these
    any_order    the prior in any order (pmsn.in_order_of)

All models of one seed and one kind of data start from the same weights, see the same views and have
the same learning rate. Then two classifiers (k-NN, linear probe) learn from frozen features, and
are tested on balanced images: `knn` and `probe` learn from the training images, which are
long-tailed as in the paper, `balanced_knn` and `balanced_probe` from balanced images. Letters are
tested in bold slanted fonts that no training image has. A supervised model and an untrained encoder
show how much there is to learn.

Perhaps training does not find the classes, although the loss would prefer them. With --from_labels
it starts there: first labels train a network with one prototype per class, and then each prior
continues from it without labels. Does the prior of the classes keep them?

    python extras/which_prior.py              # letters, few priors, two losses, 8 minutes
    python extras/which_prior.py --data CIFAR10 --contrasts 0   # photographs, 17 minutes
    python extras/which_prior.py --quick      # every step, with too little data, ten seconds

--out gets which_prior.json and which_prior.png. The models of one seed and one kind of data are in
which_prior.json as soon as they are done, and the same command continues from there.
Not in the paper: these images, the small encoders, a head with one layer and BatchNorm, no masking,
one anchor per image, schedules for sharpening and target network (for letters), and all losses but
the plain one.
"""

import functools
import itertools
import math
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.swa_utils import update_bn

# The other scripts are in the folder above, and are not installed.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import pmsn
from support.drawings import (SIZE, background_view, digit_view, draw, draw_gratings, make_encoder,
                              make_pmsn, sample, schedule)
from support.evaluation import agreement, knn_predictions, linear_probe
from support.figures import Figure, write_figure
from support.images import normalize_images
from support.photographs import (load_splits, make_resnet, random_crops, read_images,
                                 warmup_cosine)
from support.results import cell, number_of_seeds, run_or_continue, summarize
from support.runs import Distinct, Parser, UserError, available_cores, command, folder, number, say

# 64 characters that differ at any size. We left out symbols that look the same in several fonts.
# Otherwise a test image could be a copy of a training image.
CHARACTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ" "2345678" "abdefghjkmnqrty" "$&@?{]!" "ΓΔΞΠΣΦΨΩλ"
TRAIN_FONTS = ("DejaVuSans DejaVuSans-Bold DejaVuSansMono DejaVuSansMono-Bold DejaVuSerif "
               "DejaVuSerif-Bold DejaVuSans-Oblique DejaVuSerif-Italic STIXGeneral "
               "STIXGeneralBol STIXGeneralItalic DejaVuSansMono-Oblique").split()
TEST_FONTS = ("DejaVuSans-BoldOblique DejaVuSerif-BoldItalic DejaVuSansMono-BoldOblique "
              "STIXGeneralBolIta").split()
BATCH_SIZE = 256
LOSSES = {  # options of the loss
    "plain": {},
    "relative": {"relative_sharpening": True},
    "Sinkhorn": {"sinkhorn_iterations": 3},
    "both": {"relative_sharpening": True, "sinkhorn_iterations": 3},
    "any_order": {"any_order": True},
}
# What two runs have in common that differ in their seed only: the kind of data, and the model
SETTING = ("data_exponent", "contrast", "prior_exponent", "loss")
# Accuracies that are compared with the one of the uniform prior, for head, middle and tail too
GAINS = ("knn", "probe", "balanced_knn", "balanced_probe")


# ---- Data ----------------------------------------------------------------------------------------
class Letters:
    """Letters that are drawn anew for every view. Class, font and grating belong to the image.

    There are `count` images. The label k has the frequency (k + 1)^-exponent, and is the same
    letter for all seeds.
    """
    def __init__(self, fonts, num_classes, exponent, contrast, count):
        # The same order for all seeds. Head classes are not the first letters of the alphabet.
        order = np.random.default_rng(0).permutation(len(CHARACTERS))[:num_classes]
        # Font by font: the letter of a class in a font has the index font * num_classes + class.
        letters = draw([CHARACTERS[place] for place in order], fonts, (40, 40))
        self.letters = F.pad(letters, [4] * 4) / 255  # (fonts * classes, 1, 48, 48)
        self.gratings, self.contrast = draw_gratings(), contrast
        self.letter_index = sample(torch.arange(num_classes).repeat(len(fonts)), exponent, count)
        self.labels = self.letter_index % num_classes
        self.backgrounds = torch.randint(len(self.gratings), (count,))

    def views(self, index):
        """Random views of these images, (B, 1, 32, 32), about in [-1, 1]."""
        letters = digit_view(self.letters[self.letter_index[index]], deform=1.0, size=SIZE)
        gratings = background_view(self.gratings[self.backgrounds[index]])
        images = letters + (1 - letters) * self.contrast * gratings
        return 2 * (images + 0.05 * torch.randn_like(images)) - 1

    def all_views(self):
        """One view of every image, (count, 1, 32, 32)."""
        return torch.cat([self.views(part) for part in torch.arange(len(self.labels)).split(1000)])


class Photographs:
    """`count` photographs, or all of them, and gratings.

    `images` is uint8 (N, 3, 32, 32) and cycles through the C classes: image i has class i % C.
    `order` lists the classes from frequent to rare. The label of an image is the rank of its class
    in `order`: label k has the frequency (k + 1)^-exponent.
    """
    def __init__(self, images, order, exponent, contrast, count=None):
        prior = pmsn.power_law_prior(len(order), exponent)
        per_class = (prior * (count or len(images))).round().long()
        index, of_each_class = [], len(images) // len(order)
        for c, wanted in zip(order, per_class):
            chosen = torch.randperm(of_each_class)[:wanted]
            index.append(chosen * len(order) + c)
        index, labels = torch.cat(index), torch.arange(len(order)).repeat_interleave(per_class)
        # Mixed, because BatchNorm takes its statistics from parts of these images.
        mixed = torch.randperm(len(index))
        self.images, self.labels = images[index[mixed]], labels[mixed]
        self.gratings, self.contrast = draw_gratings(), contrast
        self.backgrounds = torch.randint(len(self.gratings), self.labels.shape)

    def views(self, index):
        """Random crops of these images in random colors, (B, 3, 32, 32)."""
        crops = random_crops(self.images[index])
        return pmsn.make_views([self.blend(crops, index)[:, None]], blur_p=0.0)[0]

    def all_views(self):
        """Every image as it is, with a grating, (count, 3, 32, 32)."""
        parts = torch.arange(len(self.labels)).split(1000)
        return torch.cat([normalize_images(self.blend(self.images[part] / 255, part))
                          for part in parts])

    def blend(self, images, index):
        """Blend the gratings of the images with these indices into images in [0, 1]."""
        if not self.contrast:
            return images
        gratings = background_view(self.gratings[self.backgrounds[index]])
        return torch.lerp(images, gratings.expand_as(images), self.contrast).clamp(0, 1)


@functools.cache  # A process loads the images once, for all of its runs.
def load_photographs(data, root):
    """Images for training and for tests, uint8 (N, 3, 32, 32) each, and the number of classes."""
    splits = load_splits(data, root)
    return *(read_images(split) for split in splits), len(splits[0].classes)


def make_data(exponent, contrast, args):
    """Images to train on, test images, and images for the classifiers with balanced labels.

    The last two are balanced. The last ones are as many letters as there are to train on, or all
    photographs of the training set.
    """
    if args.data == "letters":
        return (Letters(TRAIN_FONTS, args.classes, exponent, contrast, args.images),
                Letters(TEST_FONTS, args.classes, 0.0, contrast, args.images // 4),
                Letters(TRAIN_FONTS, args.classes, 0.0, contrast, args.images))
    images, test_images, num_classes = load_photographs(args.data, args.root)
    order = torch.randperm(num_classes).tolist()  # Each seed has other rare classes.
    return (Photographs(images, order, exponent, contrast, args.images),
            Photographs(test_images, order, 0.0, contrast),
            Photographs(images, order, 0.0, contrast))


# ---- Networks and training -----------------------------------------------------------------------
@dataclass
class Model:
    network: nn.Module  # PMSN, or a supervised classifier
    tested_encoder: nn.Module
    exponent: float | None  # of the prior, or None without PMSN
    losses: list  # names in LOSSES for which this is the model, or "supervised" or "random"
    options: dict = field(default_factory=dict)  # of the loss
    terms: dict = field(default_factory=dict)  # of the loss, means over the last epoch

    def __post_init__(self):
        self.network.to(memory_format=torch.channels_last)  # faster on CPUs
        self.optimizer = torch.optim.AdamW(self.network.parameters(), weight_decay=0.05)


def make_models(seed, args):
    """PMSN for each prior and loss. All encoders start equal."""
    models = {}
    for exponent, loss in itertools.product(args.prior_exponents, args.losses):
        options = dict(LOSSES[loss])
        if exponent == 0:
            # With the uniform prior these two change nothing. So plain, relative and any_order are
            # one model, which we train once, and so are Sinkhorn and both.
            options.pop("relative_sharpening", None)
            options.pop("any_order", None)
        key = (exponent, tuple(options))
        if key in models:
            models[key].losses.append(loss)
            continue
        network = make_network(seed, exponent, args)
        # The target network is tested, as in MSN.
        models[key] = Model(network, network.target_encoder, exponent, [loss], options)
    return list(models.values())


def make_network(seed, exponent, args):
    return make_pmsn(make_encoder_for(seed, args), args.prototypes, exponent, dim=64)


def make_encoder_for(seed, args):
    torch.manual_seed(seed)
    return make_encoder(SIZE) if args.data == "letters" else make_resnet()


def make_supervised(seed, args):
    """A classifier, which shows how much there is to learn. Its encoder starts like all others."""
    if args.from_labels:
        network = ClassPrototypes(make_network(seed, 0.0, args))
        return Model(network, network.pmsn.encoder, None, ["supervised"])
    encoder = make_encoder_for(seed, args)
    network = nn.Sequential(encoder, nn.GELU(), nn.Linear(128, args.classes))
    return Model(network, encoder, None, ["supervised"])


class ClassPrototypes(nn.Module):
    """A classifier: PMSN, whose prototype k stands for class k.

    Class 0 is the most frequent one, and prototype 0 has the largest share of a power law.
    """
    def __init__(self, network):
        super().__init__()
        self.pmsn = network

    def forward(self, view):
        """(B, K), log-probabilities of the classes"""
        embeddings = self.pmsn.head(self.pmsn.encoder(view))
        return pmsn.log_predictions(embeddings, self.pmsn.prototypes, temperature=0.1)


def start_from(network, models):
    """Let all models start from the anchor network and the prototypes of this PMSN."""
    network.update_target(0.0)  # Now its target network is equal to its anchor network.
    for model in models:
        model.network.load_state_dict({**network.state_dict(), "prior": model.network.prior})


def train(models, data, args, title):
    """Train all models on the same batches and views. model.terms are means over the last epoch."""
    count = len(data.labels)
    steps_per_epoch = count // BATCH_SIZE
    if steps_per_epoch == 0:
        raise UserError(f"{count} images are less than one mini-batch of {BATCH_SIZE}")
    steps, began = args.epochs * steps_per_epoch, time.monotonic()
    for epoch in range(args.epochs):
        for model in models:
            model.terms = {}
        batches = torch.randperm(count).split(BATCH_SIZE)
        for step, batch in enumerate(batches[:steps_per_epoch], start=epoch * steps_per_epoch):
            if args.data == "letters":
                lr, sharpening, ema_momentum = schedule(step / steps)
            else:  # constant sharpening, as in the paper
                lr, sharpening, ema_momentum = 2e-3 * warmup_cosine(step, steps), 0.25, 0.99
            views = [data.views(batch) for _ in range(2)]  # the target and one anchor
            for model in models:
                is_pmsn = model.exponent is not None
                if is_pmsn:
                    loss, terms = model.network(views, sharpening=sharpening, **model.options)
                else:
                    loss, terms = F.cross_entropy(model.network(views[1]), data.labels[batch]), {}
                model.optimizer.param_groups[0]["lr"] = lr
                model.optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(model.network.parameters(), 3.0)
                model.optimizer.step()
                if is_pmsn:
                    model.network.update_target(ema_momentum)
                for name, value in terms.items():
                    if value.ndim == 0:  # all but the mean prediction
                        mean = value.item() / steps_per_epoch
                        model.terms[name] = model.terms.get(name, 0.0) + mean
        for model in models:
            if not all(map(math.isfinite, model.terms.values())):
                raise UserError(f"the loss is not finite in epoch {epoch + 1}: prior exponent "
                                f"{model.exponent}, {', '.join(model.losses)}")
        left = (time.monotonic() - began) * (args.epochs / (epoch + 1) - 1)
        say(f"{title}{epoch + 1:>6}{left:>7.0f}s")


# ---- Measures ------------------------------------------------------------------------------------
@torch.no_grad()
def measure(model, sets, views, num_classes):
    """Accuracy on test images, and how the training images use the prototypes.

    `sets` are those of `make_data`, and `views` is one view of each of their images.
    """
    data, test, balanced = sets
    # In training, the statistics of BatchNorm (of the ResNet for photographs) followed an encoder
    # that was still changing. We take them again from the training images.
    encoder = model.tested_encoder
    update_bn(views[0].split(250), encoder)
    encoder.eval()
    features, test_features, balanced_features = [
        torch.cat([encoder(part) for part in x.split(1000)]) for x in views]
    found = {"same_background": agreement(test_features, test.backgrounds)}
    for name, predict in (("knn", knn_predictions), ("probe", linear_probe)):
        for kind, x, labels in (("", features, data.labels),
                                ("balanced_", balanced_features, balanced.labels)):
            correct = predict(x, labels, test_features) == test.labels
            found.update(by_group(kind + name, correct, test.labels, num_classes))
    network = getattr(model.network, "pmsn", model.network)  # of ClassPrototypes
    if isinstance(network, pmsn.PMSN):
        # The head is still in training mode, so its BatchNorm takes the statistics of this batch,
        # which has all training images.
        prototype = pmsn.cosine(network.target_head(features), network.prototypes).argmax(dim=1)
        # Is the class of an image the most frequent one of its prototype? (prototypes, classes)
        table = F.one_hot(prototype).T.double() @ F.one_hot(data.labels, num_classes).double()
        pure = table.argmax(dim=1)[prototype] == data.labels
        found.update(by_group("purity", pure, data.labels, num_classes))
    return found


def by_group(name, values, labels, num_classes):
    """Means of all values, and those of head, middle and tail: thirds of the classes by rank.

    Label 0 is the most frequent class. On balanced data the thirds are only random ones.
    """
    groups = labels * 3 // num_classes
    means = {f"{name}_{group}": values[groups == i].double().mean().item()
             for i, group in enumerate(("head", "middle", "tail"))}
    return {name: values.double().mean().item(), **means}


def experiment(seed, data_exponent, contrast, args):
    """All models for one kind of data. Returns their entries in which_prior.json."""
    torch.set_num_threads(1)  # faster here, and the same bits for any number of cores
    torch.manual_seed(seed)
    sets = make_data(data_exponent, contrast, args)
    views = [data.all_views() for data in sets]
    untrained = make_encoder_for(seed, args)
    random = Model(untrained, untrained, None, ["random"])
    models, supervised = make_models(seed, args), make_supervised(seed, args)
    torch.manual_seed(seed)  # The views do not depend on which models there are.
    title = f"{seed:>4}{data_exponent:>9.2f}{contrast:>10.2f}"
    if args.from_labels:
        train([supervised], sets[0], args, title)
        start_from(supervised.network.pmsn, models)
        train(models, sets[0], args, title)
    else:
        train([*models, supervised], sets[0], args, title)
    found = []
    for model in [random, *models, supervised]:
        results = {**model.terms, **measure(model, sets, views, args.classes)}
        found += [{"seed": seed, "data_exponent": data_exponent, "contrast": contrast,
                   "prior_exponent": model.exponent, "loss": loss, "results": results}
                  for loss in model.losses]
    return found


def add_gains(runs):
    """Add what a prior gains over the uniform one with the same seed, data and loss.

    Seeds differ more than priors, so this difference is more precise than the accuracies.
    """
    def key(run):
        return run["seed"], run["data_exponent"], run["contrast"], run["loss"]

    uniform = {key(run): run["results"] for run in runs if run["prior_exponent"] == 0}
    for run in runs:
        if key(run) in uniform:
            before, results = uniform[key(run)], run["results"]
            for name in before.keys() & results.keys():
                if name.startswith(GAINS):
                    results[f"gain_{name}"] = results[name] - before[name]


# ---- Figure --------------------------------------------------------------------------------------
def plot(summary):
    """Balanced probe over the exponent of the prior: a panel per kind of data, a line per loss."""
    kinds = {(data_exponent, contrast) for data_exponent, contrast, _, _ in summary}
    data_exponents, contrasts = [sorted(set(values)) for values in zip(*kinds)]
    rows, columns = len(contrasts), len(data_exponents)
    figure = Figure(figsize=(1 + 4 * columns, 1 + 3.4 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    for ax, kind in zip(axes.T.flat, itertools.product(data_exponents, contrasts)):
        probes = {(exponent, loss): row["balanced_probe"]
                  for (*of_data, exponent, loss), row in summary.items() if tuple(of_data) == kind}
        losses = [loss for loss in LOSSES if loss in {name for _, name in probes}]
        for i, loss in enumerate(losses):
            # Moved a little, so that the error bars do not hide one another
            shift = 0.02 * (i - (len(losses) - 1) / 2)
            exponents, mean, std = zip(*sorted(
                (exponent + shift, probe["mean"], probe["std"])
                for (exponent, name), probe in probes.items() if name == loss))
            ax.errorbar(exponents, mean, std, marker="o", capsize=3, label=loss)
        for loss, label, style in (("supervised", "supervised", "--"),
                                   ("random", "untrained", ":")):
            ax.axhline(probes[None, loss]["mean"], color="gray", linestyle=style, label=label)
        data_exponent, contrast = kind
        ax.axvline(data_exponent, color="gray", alpha=0.3)
        ax.set_title((f"classes k^-{data_exponent:g}" if data_exponent else "balanced classes")
                     + (f", gratings {contrast:g}" if contrast else ""))
    axes[0, 0].legend(fontsize="small")
    figure.suptitle("Which prior gives the best features?\n(vertical line: the exponent of the "
                    f"classes;\nbars: standard deviation, n = {number_of_seeds(summary)} seeds)")
    figure.supxlabel("exponent of the prior (0: uniform)")
    figure.supylabel("linear probe, balanced labels")
    return figure


# ---- Command line --------------------------------------------------------------------------------
@command
def main(argv=None):
    parser = Parser("Which prior for long-tailed data? Section 5.2 of the paper on a laptop")
    add, power = parser.add_argument, number(float, 0, 4)
    several = {"nargs": "+", "action": Distinct}
    add("--data", default="letters", help="letters, CIFAR10, or a folder with train and test")
    add("--root", default="data", help="where torchvision keeps CIFAR10")
    add("--data_exponents", type=power, **several, default=[0.0, 1.0], help="class frequencies")
    add("--contrasts", type=number(float, 0, 1), **several, default=[0.0, 0.7], help="of gratings")
    add("--prior_exponents", type=power, **several, default=[0.0, 0.5, 1.0], help="of the priors")
    add("--losses", choices=LOSSES, **several, default=["plain", "both"],
        help="options of the loss")
    add("--classes", type=number(int, 3, 64), default=64, help="how many letters and symbols")
    add("--prototypes", type=number(int, 2), default=64, help="number of prototypes")
    add("--out", type=folder, help="folder for results and figure, if not a new one in runs")
    add("--seeds", type=number(int, 0, 2_000_000_000), **several, default=[0], help="one run each")
    add("--images", type=number(int, 256), help="to train on (letters: 16,000, photographs: 5,800)")
    add("--epochs", type=number(int, 1), help="of training (letters: 10, photographs: 20)")
    add("--workers", type=number(int, 1, 1000), default=available_cores(), help="processes")
    add("--from_labels", action="store_true", help="start where labels lead")
    add("--quick", action="store_true", help="few images and models, in ten seconds")
    args = parser.parse_args(argv)
    if args.quick:
        args.data_exponents, args.contrasts, args.prior_exponents = [1.0], [0.7], [0.0, 1.0]
        args.images, args.epochs = 512, 1
    letters = args.data == "letters"
    name = "quick" if args.quick else Path(args.data).name
    args.out = args.out or Path("runs", f"which_prior_{name}")
    # 2,000 images of the most frequent of ten classes give 5,858 images with frequencies k^-1.
    args.images = args.images or (16_000 if letters else 5800)
    args.epochs = args.epochs or (10 if letters else 20)
    try:
        if not letters:
            images, _, args.classes = load_photographs(args.data, args.root)
            if args.classes < 3:
                raise ValueError("there must be three classes or more: frequent, middle and rare")
            most = max(args.images * pmsn.power_law_prior(args.classes, exponent)[0].item()
                       for exponent in args.data_exponents)
            if round(most) > len(images) // args.classes:
                raise ValueError(f"--images {args.images} needs {most:.0f} images of the most "
                                 f"frequent class, and there are {len(images) // args.classes}")
    except (OSError, RuntimeError, ValueError) as error:
        raise UserError(f"cannot load --data: {error}") from error
    if args.from_labels and args.prototypes != args.classes:
        parser.error(f"--from_labels needs one prototype per class: --prototypes {args.classes}")

    say("seed     data  contrast epoch    left")
    jobs = list(itertools.product(args.seeds, args.data_exponents, args.contrasts))
    config = {name: value for name, value in vars(args).items()
              if name not in ("data_exponents", "contrasts", "out", "root", "seeds", "workers")}
    runs = run_or_continue(experiment, jobs, args, config, args.out / "which_prior.json")
    add_gains(runs)
    summary = summarize(runs, key=lambda run: tuple(run[name] for name in SETTING))
    say(f"\nmean ± std over n = {number_of_seeds(summary)} seeds")
    columns = ["knn", "probe", "balanced_knn", "balanced_probe", "same_background",
               *(f"gain_{name}" for name in GAINS)]
    say("data contrast prior       loss" + "".join(f"{column:>20}" for column in columns))
    for (data_exponent, contrast, exponent, loss), row in summary.items():
        exponent = "" if exponent is None else f"{exponent:.2f}"
        say(f"{data_exponent:>4.2f}{contrast:>9.2f}{exponent:>6}{loss:>11}"
            + "".join(f"{cell(row, column):>20}" for column in columns))
    write_figure(args.out / "which_prior.png", plot, summary)
    say(f"which_prior.json and which_prior.png are in {args.out}")


if __name__ == "__main__":
    main()
