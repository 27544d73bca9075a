"""Which prior for long-tailed data? Section 5.2 of the paper, small enough for a laptop.

The paper finds that a power-law prior helps on long-tailed iNat18 and hurts on balanced ImageNet.
Here the classes are 64 letters that we draw, or those of photographs (CIFAR-10 or a folder), and
they are balanced or long-tailed. With --contrasts above 0, each image also has one of 10 gratings,
all equally frequent. A network could group images by grating instead of by class, and the paper
expects that the uniform prior prefers this.

We train PMSN with priors from uniform to steep, and with these losses:

    plain        as in the paper
    relative     targets are sharpened relative to the prior (pmsn.sharpen)
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
    python extras/which_prior.py --map --seeds 0 1 2    # the whole map, 80 minutes
    python extras/which_prior.py --data CIFAR10 --contrasts 0   # photographs, 17 minutes
    python extras/which_prior.py --quick      # every step, with too little data, half a minute

--out gets which_prior.json and which_prior.png. The models of one seed and one kind of data are in
which_prior.json as soon as they are done, and the same command continues from there.
Not in the paper: these images, the small encoders, a head with one layer (and BatchNorm), no masking
and one anchor per image, schedules for sharpening and target network (for letters), and all losses
but the plain one.
"""

import argparse
import functools
import itertools
import math
import multiprocessing
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.swa_utils import update_bn

# The other scripts are in the folder above, and are not installed.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import pmsn
from experiments import (Figure, UserError, cell, finite, number, number_of_seeds, parse,
                         print_any_text, run_or_continue, summarize)
from imbalance import (load_splits, make_resnet, normalize_images, random_crops, read_images,
                       warmup_cosine)
from mnist_corner import (agreement, background_view, digit_view, draw, draw_gratings, make_encoder,
                          make_model, sample, schedule)

# 64 characters that differ at any size. We left out symbols that look the same in several fonts.
# Otherwise a test image could be a copy of a training image.
CHARACTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ" "2345678" "abdefghjkmnqrty" "$&@?{]!" "ΓΔΞΠΣΦΨΩλ"
TRAIN_FONTS = ("DejaVuSans DejaVuSans-Bold DejaVuSansMono DejaVuSansMono-Bold DejaVuSerif "
               "DejaVuSerif-Bold DejaVuSans-Oblique DejaVuSerif-Italic STIXGeneral "
               "STIXGeneralBol STIXGeneralItalic DejaVuSansMono-Oblique").split()
TEST_FONTS = ("DejaVuSans-BoldOblique DejaVuSerif-BoldItalic DejaVuSansMono-BoldOblique "
              "STIXGeneralBolIta").split()
SIZE, BATCH_SIZE = 32, 256
LOSSES = {  # options of the loss
    "plain": {},
    "relative": {"relative_sharpening": True},
    "Sinkhorn": {"sinkhorn_iterations": 3},
    "both": {"relative_sharpening": True, "sinkhorn_iterations": 3},
    "any_order": {"any_order": True},
}
# What two runs have in common that differ in their seed only: the kind of data, and the model
SETTING = ("data_exponent", "contrast", "prior_exponent", "loss")
# Accuracies that are compared with the one of the uniform prior
GAINS = ("knn", "probe", "balanced_knn", "balanced_probe", "balanced_probe_head",
         "balanced_probe_middle", "balanced_probe_tail")

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
        self.fonts = self.letter_index // num_classes
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
    """Images to train on, test images, and images for the balanced classifiers.

    The last two are balanced. For letters these are as many as those to train on. For photographs
    they are the whole training set, which includes the images to train on.
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
def make_models(seed, args):
    """One model per prior and loss, and a supervised one. All encoders start equal."""
    models = {}
    arms = [*itertools.product(args.prior_exponents, args.losses), (None, "supervised")]
    for exponent, loss in arms:
        options = dict(LOSSES.get(loss, {}))
        if exponent == 0:
            # With the uniform prior these two change nothing. So plain, relative and any_order are
            # one model, which we train once, and so are Sinkhorn and both.
            options.pop("relative_sharpening", None)
            options.pop("any_order", None)
        arm = (exponent, tuple(options))
        if arm in models:
            models[arm].losses.append(loss)
            continue
        torch.manual_seed(seed)
        encoder = tested_encoder = make_encoder_for(args)
        if loss == "supervised":  # shows how much there is to learn, with labels
            if args.from_labels:
                network = ClassPrototypes(make_model(encoder, args.prototypes, 0.0, dim=64))
            else:
                network = nn.Sequential(encoder, nn.GELU(), nn.Linear(128, args.classes))
        else:
            options["prior_weight"] = args.prior_weight
            network = make_model(encoder, args.prototypes, exponent, dim=64)
            tested_encoder = network.target_encoder  # as MSN does
        network.to(memory_format=torch.channels_last)  # faster on CPUs
        optimizer = torch.optim.AdamW(network.parameters(), weight_decay=0.05)
        models[arm] = SimpleNamespace(exponent=exponent, losses=[loss], network=network,
                                      tested_encoder=tested_encoder, options=options,
                                      optimizer=optimizer)
    return list(models.values())

def make_encoder_for(args):
    return make_encoder(SIZE) if args.data == "letters" else make_resnet()

class ClassPrototypes(nn.Module):
    """A supervised classifier: a PMSN whose prototype k stands for class k.

    Class 0 is the most frequent one, and prototype 0 has the largest share of a power law.
    """
    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, view):
        """(B, K), log-probabilities of the classes"""
        embeddings = self.network.head(self.network.encoder(view))
        return pmsn.log_predictions(embeddings, self.network.prototypes, temperature=0.1)

def start_from_labels(models, data, args, title):
    """Train the last model, which is the supervised one, and let the others start from it."""
    *others, supervised = models
    train([supervised], data, args, title)
    supervised.network = start = supervised.network.network
    start.update_target(0.0)  # The target network becomes equal to the anchor network.
    for model in others:
        model.network.load_state_dict({**start.state_dict(), "prior": model.network.prior})
    return others

def train(models, data, args, title):
    """Train all models on the same batches and views. model.terms are means over the last epoch."""
    count = len(data.labels)
    steps_per_epoch = count // BATCH_SIZE
    if steps_per_epoch == 0:
        raise UserError(f"{count} images are less than one mini-batch of {BATCH_SIZE}")
    steps, began = args.epochs * steps_per_epoch, time.time()
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
                is_pmsn = isinstance(model.network, pmsn.PMSN)
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
        left = (time.time() - began) * (args.epochs / (epoch + 1) - 1)
        print(f"{title}{epoch + 1:>6}{left:>7.0f}s", flush=True)

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
    if isinstance(data, Letters):
        found["same_font"] = agreement(test_features, test.fonts)
    for name, predict in (("knn", pmsn.knn_predictions), ("probe", pmsn.linear_probe)):
        correct = predict(features, data.labels, test_features) == test.labels
        found.update(by_group(name, correct, test.labels, num_classes))
        correct = predict(balanced_features, balanced.labels, test_features) == test.labels
        found.update(by_group(f"balanced_{name}", correct, test.labels, num_classes))
    if isinstance(model.network, pmsn.PMSN):
        # The head is still in training mode, so its BatchNorm takes the statistics of this batch,
        # which has all training images.
        embeddings = model.network.target_head(features)
        prototype = pmsn.cosine(embeddings, model.network.prototypes).argmax(dim=1)
        pure, spread = prototype_use(prototype, data.labels, num_classes)
        found.update(by_group("purity", pure, data.labels, num_classes))
        found.update(by_group("spread", spread, torch.arange(num_classes), num_classes))
    return found

def prototype_use(prototype, labels, num_classes):
    """How classes share the prototypes, from the nearest prototype and the label of N images.

    First (N,): is the class of an image the most frequent one of its prototype? Then (classes,):
    the exponential of the entropy of the prototypes of a class, which says over how many of them
    the class is spread. It is NaN for a class without images.
    """
    # Numbers of images, (prototypes, classes)
    table = F.one_hot(prototype).T.double() @ F.one_hot(labels, num_classes).double()
    pure = table.argmax(dim=1)[prototype] == labels
    spread = torch.special.entr(table / table.sum(dim=0)).sum(dim=0).exp()
    return pure, spread

def by_group(name, values, labels, num_classes):
    """Means of all values, and those of head, middle and tail: thirds of the classes by rank.

    Label 0 is the most frequent class. On balanced data the thirds are only random ones.
    """
    groups = labels * 3 // num_classes
    means = {f"{name}_{group}": values[groups == i].double().nanmean().item()
             for i, group in enumerate(("head", "middle", "tail"))}
    return {name: values.double().nanmean().item(), **means}

def experiment(seed, data_exponent, contrast, args):
    """All models for one kind of data. Returns their entries in which_prior.json."""
    torch.set_num_threads(1)  # faster here, and the same bits for any number of cores
    torch.manual_seed(seed)
    sets = make_data(data_exponent, contrast, args)
    views = [data.all_views() for data in sets]
    models = make_models(seed, args)
    torch.manual_seed(seed)  # The untrained encoder is equal to those of the models.
    untrained = SimpleNamespace(exponent=None, losses=["random"], network=None,
                                tested_encoder=make_encoder_for(args), terms={})
    torch.manual_seed(seed)  # The views do not depend on which models there are.
    title = f"{seed:>4}{data_exponent:>9.2f}{contrast:>10.2f}"
    unlabeled = start_from_labels(models, sets[0], args, title) if args.from_labels else models
    train(unlabeled, sets[0], args, title)
    found = []
    for model in [untrained, *models]:
        results = finite({**model.terms, **measure(model, sets, views, args.classes)})
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
            for name in GAINS:
                if name in results and name in before:
                    results[f"gain_{name}"] = results[name] - before[name]

# ---- Figure --------------------------------------------------------------------------------------
def plot(summary, path):
    """Balanced probe over the exponent of the prior: a panel per kind of data, a line per loss."""
    kinds = {(data_exponent, contrast) for data_exponent, contrast, _, _ in summary}
    data_exponents, contrasts = [sorted(set(values)) for values in zip(*kinds)]
    rows, columns = len(contrasts), len(data_exponents)
    figure = Figure(figsize=(1 + 4 * columns, 1 + 3.4 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    for ax, kind in zip(axes.T.flat, itertools.product(data_exponents, contrasts)):
        rows_of = {(exponent, loss): row for (*of_data, exponent, loss), row in summary.items()
                   if tuple(of_data) == kind}
        arms = {arm: row["balanced_probe"] for arm, row in rows_of.items()}
        shown = [loss for loss in LOSSES if loss in {name for _, name in arms}]
        for i, loss in enumerate(shown):
            # Moved a little, so that the error bars do not hide one another
            shift = 0.02 * (i - (len(shown) - 1) / 2)
            exponents, mean, std = zip(*sorted(
                (exponent + shift, probe["mean"], probe["std"])
                for (exponent, name), probe in arms.items() if name == loss))
            ax.errorbar(exponents, mean, std, marker="o", capsize=3, label=loss)
        for name, label, style in (("supervised", "supervised", "--"),
                                   ("random", "untrained", ":")):
            ax.axhline(arms[None, name]["mean"], color="gray", linestyle=style, label=label)
        ax.axvline(kind[0], color="gray", alpha=0.3)
        best = max((arm for arm in arms if arm[0] is not None), key=lambda arm: arms[arm]["mean"])
        gain = f"gains {cell(rows_of[best], 'gain_balanced_probe')}" if best[0] else "is best"
        ax.set_title(f"{name_of(kind)}: {best[1]}, exponent {best[0]:g} {gain}", fontsize="medium")
    axes[0, 0].legend(fontsize="small")
    figure.suptitle("Which prior gives the best features, and what does it gain over the uniform "
                    "one?\n(vertical line: the exponent of the classes; bars: standard deviation, "
                    f"n = {number_of_seeds(summary)} seeds)")
    figure.supxlabel("exponent of the prior (0: uniform)")
    figure.supylabel("linear probe, balanced labels")
    figure.savefig(path)

def name_of(kind):
    classes = f"classes k^-{kind[0]:g}" if kind[0] else "balanced classes"
    return f"{classes}, gratings {kind[1]:g}" if kind[1] else classes

# ---- Command line --------------------------------------------------------------------------------
def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add, power = parser.add_argument, number(float, 0, 4)
    add("--data", default="letters", help="letters, CIFAR10, or a folder with train and test")
    add("--root", default="data", help="where torchvision keeps CIFAR10")
    add("--data_exponents", type=power, nargs="+", default=[0.0, 1.0], help="class frequencies")
    add("--contrasts", type=number(float, 0, 1), nargs="+", default=[0.0, 0.7], help="of gratings")
    add("--prior_exponents", type=power, nargs="+", default=[0.0, 0.5, 1.0], help="of the priors")
    add("--losses", choices=LOSSES, nargs="+", default=["plain", "both"],
        help="options of the loss")
    add("--map", action="store_true", help="more of the four flags above")
    add("--classes", type=number(int, 3, 64), default=64, help="how many letters and symbols")
    add("--prototypes", type=number(int, 2), default=64, help="number of prototypes")
    add("--prior_weight", type=number(float, 0, 1e6), default=1.0, help="weight of the KL term")
    add("--out", type=Path, help="folder for results and figure, if not a new one in runs")
    add("--seeds", type=number(int, 0, 2_000_000_000), nargs="+", default=[0], help="one run each")
    add("--images", type=number(int, 256), help="to train on (letters: 16,000, photographs: 5,800)")
    add("--epochs", type=number(int, 1), help="of training (letters: 10, photographs: 20)")
    add("--workers", type=number(int, 1), default=multiprocessing.cpu_count(), help="processes")
    add("--from_labels", action="store_true", help="start where labels lead")
    add("--quick", action="store_true", help="few images and models, in half a minute")
    args = parse(parser, argv)
    if args.map:
        args.data_exponents, args.contrasts = [0.0, 1.0, 1.5], [0.0, 0.7]
        args.prior_exponents, args.losses = [0.0, 0.25, 0.5, 1.0, 1.5], list(LOSSES)
    if args.quick:
        args.data_exponents, args.prior_exponents = [1.0], [0.0, 1.0]
        args.images, args.epochs = 1024, 1
    letters = args.data == "letters"
    name = "quick" if args.quick else "map" if args.map else Path(args.data).name
    args.out = args.out or Path("runs", f"which_prior_{name}")
    # 2,000 images of the most frequent of ten classes give 5,858 images with frequencies k^-1.
    args.images = args.images or (16_000 if letters else 5800)
    args.epochs = args.epochs or (10 if letters else 20)
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        if not letters:
            images, _, args.classes = load_photographs(args.data, args.root)
            if args.classes < 3:
                raise ValueError("there must be three classes or more: frequent, middle and rare")
            most = max(args.images * pmsn.power_law_prior(args.classes, exponent)[0].item()
                       for exponent in args.data_exponents)
            if round(most) > len(images) // args.classes:
                raise ValueError(f"--images {args.images} needs {most:.0f} images of the most "
                                 f"frequent class, and there are {len(images) // args.classes}")
    # A broken image can cause a SyntaxError.
    except (OSError, SyntaxError, RuntimeError, ValueError) as error:
        parser.error(f"cannot load --data or write to --out: {' '.join(str(error).split())}")
    if args.from_labels and args.prototypes != args.classes:
        parser.error(f"--from_labels needs one prototype per class: --prototypes {args.classes}")

    print("seed     data  contrast epoch    left", flush=True)
    began = time.time()
    jobs = list(itertools.product(args.seeds, args.data_exponents, args.contrasts))
    config = {name: value for name, value in vars(args).items()
              if name not in ("data_exponents", "contrasts", "map", "out", "root", "seeds",
                              "workers")}
    try:
        runs = run_or_continue(experiment, jobs, args, config, args.out / "which_prior.json")
    except (OSError, UserError) as error:
        parser.error(str(error))
    add_gains(runs)
    summary = summarize(runs, key=lambda run: tuple(run[name] for name in SETTING))
    print(f"\nmean ± std over n = {number_of_seeds(summary)} seeds")
    columns = ["knn", "probe", "balanced_knn", "balanced_probe", "same_background",
               *(f"gain_{name}" for name in GAINS)]
    print("data contrast prior       loss" + "".join(f"{column:>20}" for column in columns))
    for (data_exponent, contrast, exponent, loss), row in summary.items():
        exponent = "" if exponent is None else f"{exponent:.2f}"
        print(f"{data_exponent:>4.2f}{contrast:>9.2f}{exponent:>6}{loss:>11}"
              + "".join(f"{cell(row, column):>20}" for column in columns))
    plot(summary, args.out / "which_prior.png")
    print(f"After {time.time() - began:.0f} s, results and figure are in {args.out}")

if __name__ == "__main__":
    print_any_text()
    main()
