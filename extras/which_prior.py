"""Which prior for long-tailed data? Section 5.2 of the paper, small enough for a laptop.

The paper finds that a power-law prior helps on long-tailed iNat18 and hurts on balanced ImageNet.
Here the classes are 64 letters that we draw, or those of photographs (CIFAR-10 or a folder), and
they are balanced or long-tailed. There are 10 gratings behind the letters, or blended into the
photographs, if their contrast is not 0. They are balanced, and a network could group by them
instead. The paper expects that the uniform prior prefers such a grouping.

We train PMSN with priors from uniform to steep, and with five losses: plain (as in the paper), with
targets that are sharpened relative to the prior, moved to the prior by Sinkhorn, or both, and with
the prior in any order. All models start from the same weights and see the same views. Then we test
their frozen features on images with balanced classes. (Letters are tested in bold slanted fonts
that are not in the training set.) The classifiers learn from the labels of the training images,
which are long-tailed too, as in the paper, or from balanced images.

    python extras/which_prior.py              # letters, few priors, two losses, 8 minutes
    python extras/which_prior.py --map --seeds 0 1 2    # the whole map, 80 minutes
    python extras/which_prior.py --data CIFAR10 --contrasts 0   # photographs, 25 minutes
    python extras/which_prior.py --quick      # every step, with too little data, half a minute

--out gets which_prior.json and which_prior.png. The models of one seed and one kind of data are in
which_prior.json as soon as they are done, and the same command continues from there.
Not in the paper: these images, the small encoders, no masking and one anchor per image, schedules
for sharpening and target network, relative sharpening, Sinkhorn with a prior, and any order.
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
from imbalance import load_splits, make_resnet, normalize, random_crops, read_images
from mnist_corner import (agreement, background_view, digit_view, draw, draw_gratings, make_encoder,
                          make_model, sample, schedule)

# 64 characters that differ at any size. Symbols are missing that look the same in several fonts,
# because a test image must not show what a training image shows.
CHARACTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ" "2345678" "abdefghjkmnqrty" "$&@?{]!" "ΓΔΞΠΣΦΨΩλ"
TRAIN_FONTS = ("DejaVuSans DejaVuSans-Bold DejaVuSansMono DejaVuSansMono-Bold DejaVuSerif "
               "DejaVuSerif-Bold DejaVuSans-Oblique DejaVuSerif-Italic STIXGeneral "
               "STIXGeneralBol STIXGeneralItalic DejaVuSansMono-Oblique").split()
TEST_FONTS = ("DejaVuSans-BoldOblique DejaVuSerif-BoldItalic DejaVuSansMono-BoldOblique "
              "STIXGeneralBolIta").split()
SIZE, BATCH_SIZE = 32, 256
METHODS = {  # options of the loss
    "plain": {},
    "relative": {"relative_sharpening": True},
    "Sinkhorn": {"sinkhorn_iterations": 3},
    "both": {"relative_sharpening": True, "sinkhorn_iterations": 3},
    "any_order": {"any_order": True},
}
GAINS = ("knn", "knn_tail", "probe", "probe_tail", "balanced_knn", "balanced_probe")

# ---- Data ----------------------------------------------------------------------------------------
class Letters:
    """`count` images with random classes, fonts and gratings. Their indices are (count,) each."""
    def __init__(self, fonts, num_classes, exponent, contrast, count):
        # The same order for all seeds. Head classes are not the first letters of the alphabet.
        order = np.random.default_rng(0).permutation(len(CHARACTERS))[:num_classes]
        letters = draw([CHARACTERS[place] for place in order], fonts, (40, 40))
        self.letters = F.pad(letters, [4] * 4) / 255  # (fonts * classes, 1, 48, 48)
        self.gratings, self.contrast = draw_gratings(), contrast
        self.letter_index = sample(torch.arange(num_classes).repeat(len(fonts)), exponent, count)
        self.labels = self.letter_index % num_classes
        self.fonts = self.letter_index // num_classes
        self.backgrounds = torch.randint(len(self.gratings), (count,))

    def views(self, index):
        """Random views of these images, (B, 1, 32, 32), about in [-1, 1]."""
        letters = digit_view(self.letters[self.letter_index[index]], 1.0, SIZE)
        gratings = background_view(self.gratings[self.backgrounds[index]])
        images = letters + (1 - letters) * self.contrast * gratings
        return 2 * (images + 0.05 * torch.randn_like(images)) - 1

    def all_views(self):
        """One view of every image, (count, 1, 32, 32)."""
        return torch.cat([self.views(part) for part in torch.arange(len(self.labels)).split(1000)])

class Photographs:
    """`count` photographs with gratings. Without a `count`, all of them.

    `images` is uint8 (N, 3, 32, 32), and the one with index i has class i % classes. The label of
    a class is its rank, order.index(class): the label k has the frequency (k + 1)^-exponent.
    """
    def __init__(self, images, order, exponent, contrast, count=None):
        prior = pmsn.power_law_prior(len(order), exponent)
        per_class = (prior * (count or len(images))).round().long()
        places = [torch.randperm(len(images) // len(order))[:n] for n in per_class]
        index = torch.cat([place * len(order) + c for place, c in zip(places, order)])
        labels = torch.arange(len(order)).repeat_interleave(per_class)
        # In a random order, every part of the images has about the same classes.
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
        return torch.cat([normalize(self.blend(self.images[part] / 255, part)) for part in parts])

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
    """Images to train on, test images, and balanced images for the classifiers.

    The last two are balanced. The balanced photographs contain those to train on.
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
def make_runs(seed, args):
    """One model per prior and method, and a supervised one. All encoders start equal."""
    runs = {}
    arms = [*itertools.product(args.prior_exponents, args.methods), (None, "supervised")]
    for exponent, method in arms:
        options = dict(METHODS.get(method, {}))
        if exponent == 0:
            # With the uniform prior these two change nothing, so several methods are one model.
            options.pop("relative_sharpening", None)
            options.pop("any_order", None)
        key = exponent, *options
        if key in runs:
            runs[key].methods.append(method)
            continue
        torch.manual_seed(seed)
        encoder = make_encoder_for(args)
        if method == "supervised":  # shows how much there is to learn, with labels
            model = nn.Sequential(encoder, nn.GELU(), nn.Linear(128, args.classes))
        else:
            options["prior_weight"] = args.prior_weight
            model = make_model(encoder, args.prototypes, exponent, dim=64)
            encoder = model.target_encoder  # We test the target network, as MSN does.
        model.to(memory_format=torch.channels_last)  # faster on CPUs
        optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.05)
        runs[key] = SimpleNamespace(exponent=exponent, methods=[method], model=model,
                                    loss_options=options, encoder=encoder, optimizer=optimizer)
    return list(runs.values())

def make_encoder_for(args):
    return make_encoder(SIZE) if args.data == "letters" else make_resnet()

def train(runs, data, args, title):
    """Train all runs on the same batches and views."""
    count = len(data.labels)
    steps_per_epoch = count // BATCH_SIZE
    began = time.time()
    for epoch in range(args.epochs):
        for run in runs:
            run.terms = {}
        batches = torch.randperm(count).split(BATCH_SIZE)
        for step, batch in enumerate(batches[:steps_per_epoch]):
            done = (epoch + step / steps_per_epoch) / args.epochs  # from 0 to 1
            lr, sharpening, ema_momentum = schedule(done)
            views = [data.views(batch) for _ in range(2)]  # the target and one anchor
            for run in runs:
                supervised = run.methods == ["supervised"]
                if supervised:
                    loss, terms = F.cross_entropy(run.model(views[1]), data.labels[batch]), {}
                else:
                    loss, terms = run.model(views, sharpening=sharpening, **run.loss_options)
                run.optimizer.param_groups[0]["lr"] = lr
                run.optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(run.model.parameters(), 3.0)
                run.optimizer.step()
                if not supervised:
                    run.model.update_target(ema_momentum)
                for name, value in terms.items():
                    if value.ndim == 0:
                        mean = value.item() / steps_per_epoch
                        run.terms[name] = run.terms.get(name, 0.0) + mean
        for run in runs:
            if not all(map(math.isfinite, run.terms.values())):
                raise UserError(f"the loss is not finite in epoch {epoch + 1}: prior exponent "
                                f"{run.exponent}, {', '.join(run.methods)}")
        left = (time.time() - began) * (args.epochs / (epoch + 1) - 1)
        print(f"{title}{epoch + 1:>6}{left:>7.0f}s", flush=True)

# ---- Measures ------------------------------------------------------------------------------------
@torch.no_grad()
def measure(run, sets, views, num_classes):
    """Accuracy on test images, and how the training images use the prototypes.

    `sets` are those of `make_data`, and `views` is one view of each of their images. k-NN and probe
    learn from the labels of the training images, balanced_knn and balanced_probe from balanced
    images.
    """
    data, test, balanced = sets
    # In training, the statistics of BatchNorm followed an encoder that was still changing.
    update_bn(views[0].split(250), run.encoder)
    run.encoder.eval()
    features, test_features, balanced_features = [
        torch.cat([run.encoder(part) for part in x.split(1000)]) for x in views]
    found = {"same_background": agreement(test_features, test.backgrounds)}
    if isinstance(data, Letters):
        found["same_font"] = agreement(test_features, test.fonts)
    for name, predict in (("knn", pmsn.knn_predictions), ("probe", pmsn.linear_probe)):
        right = predict(features, data.labels, test_features) == test.labels
        found.update(by_group(name, right, test.labels, num_classes))
        right = predict(balanced_features, balanced.labels, test_features) == test.labels
        found.update(by_group(f"balanced_{name}", right, test.labels, num_classes))
    if isinstance(run.model, pmsn.PMSN):
        # BatchNorm in the head takes its statistics from all training images.
        embeddings = run.model.target_head(features)
        prototype = pmsn.cosine(embeddings, run.model.prototypes).argmax(dim=1)
        pure, spread = prototype_use(prototype, data.labels, num_classes)
        found.update(by_group("purity", pure, data.labels, num_classes))
        found.update(by_group("spread", spread, torch.arange(num_classes), num_classes))
    return found

def prototype_use(prototype, labels, num_classes):
    """How classes share the prototypes, from the nearest prototype and the label of N images.

    First (N,): is the class of an image the most frequent one of its prototype? Then (classes,):
    over how many prototypes is a class spread? This is the exponential of an entropy, and NaN for
    a class without images.
    """
    table = F.one_hot(prototype).T.double() @ F.one_hot(labels, num_classes).double()
    pure = table.argmax(dim=1)[prototype] == labels
    spread = torch.special.entr(table / table.sum(dim=0)).sum(dim=0).exp()
    return pure, spread

def by_group(name, values, labels, num_classes):
    """Means of all values, and those of head, middle and tail: thirds of the classes by rank."""
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
    runs = make_runs(seed, args)
    torch.manual_seed(seed)
    untrained = SimpleNamespace(exponent=None, methods=["random"], model=None,
                                encoder=make_encoder_for(args), terms={})
    torch.manual_seed(seed)  # The views do not depend on the models.
    train(runs, sets[0], args, f"{seed:>4}{data_exponent:>9.2f}{contrast:>10.2f}")
    found = []
    for run in [untrained, *runs]:
        results = finite({**run.terms, **measure(run, sets, views, args.classes)})
        found += [{"seed": seed, "data_exponent": data_exponent, "contrast": contrast,
                   "prior_exponent": run.exponent, "method": method, "results": results}
                  for method in run.methods]
    return found

def add_gains(runs):
    """Add what a prior gains over the uniform one with the same seed, data and method.

    Seeds differ more than priors, so this difference is more precise than the accuracies.
    """
    def key(run):
        return run["seed"], run["data_exponent"], run["contrast"], run["method"]

    uniform = {key(run): run["results"] for run in runs if run["prior_exponent"] == 0}
    for run in runs:
        if key(run) in uniform:
            before, results = uniform[key(run)], run["results"]
            for name in set(GAINS) & set(results) & set(before):
                results[f"gain_{name}"] = results[name] - before[name]

# ---- Figure --------------------------------------------------------------------------------------
def plot(summary, path):
    """k-NN accuracy over the exponent of the prior: a panel per kind of data, a line per method."""
    data_exponents = sorted({arm[0] for arm in summary})
    contrasts = sorted({arm[1] for arm in summary})
    rows, columns = len(contrasts), len(data_exponents)
    figure = Figure(figsize=(1 + 4 * columns, 1 + 3.4 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    for ax, kind in zip(axes.T.flat, itertools.product(data_exponents, contrasts)):
        arms = {arm[2:]: row for arm, row in summary.items() if arm[:2] == kind}
        for i, method in enumerate(METHODS):  # side by side
            points = sorted((arm[0] + 0.02 * i - 0.03, row["knn"]["mean"], row["knn"]["std"])
                            for arm, row in arms.items() if arm[1] == method)
            if points:
                exponents, mean, std = zip(*points)
                ax.errorbar(exponents, mean, std, marker="o", capsize=3, label=method)
        for method, style in (("supervised", "--"), ("random", ":")):
            accuracy = arms[None, method]["knn"]["mean"]
            ax.axhline(accuracy, color="gray", linestyle=style, label=method)
        ax.axvline(kind[0], color="gray", alpha=0.3)
        ax.set_title(name_of(kind), fontsize="medium")
    axes[0, 0].legend(fontsize="small")
    figure.suptitle("Which prior gives the best features? The gray line is the one of the classes")
    figure.supxlabel("exponent of the prior (0: uniform)")
    figure.supylabel(f"k-NN accuracy on balanced images (n = {number_of_seeds(summary)} seeds)")
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
    add("--methods", choices=METHODS, nargs="+", default=["plain", "both"],
        help="options of the loss")
    add("--map", action="store_true", help="a larger choice of these four")
    add("--classes", type=number(int, 3, 64), default=64, help="how many letters and symbols")
    add("--prototypes", type=number(int, 2), default=64, help="number of prototypes")
    add("--prior_weight", type=number(float, 0, 1e6), default=1.0, help="weight of the KL term")
    add("--out", type=Path, help="folder for results and figure (default: one in runs)")
    add("--seeds", type=number(int, 0, 2_000_000_000), nargs="+", default=[0], help="one run each")
    add("--images", type=number(int, 256), help="to train on (letters: 16,000, photographs: 5,800)")
    add("--epochs", type=number(int, 1), help="of training (letters: 10, photographs: 30)")
    add("--workers", type=number(int, 1), default=multiprocessing.cpu_count(), help="processes")
    add("--quick", action="store_true", help="few images and models, in half a minute")
    args = parse(parser, argv)
    if args.map:
        args.data_exponents, args.contrasts = [0.0, 1.0, 1.5], [0.0, 0.7]
        args.prior_exponents, args.methods = [0.0, 0.25, 0.5, 1.0, 1.5], list(METHODS)
    if args.quick:
        args.data_exponents, args.prior_exponents = [1.0], [0.0, 1.0]
        args.images, args.epochs = 1024, 1
    letters = args.data == "letters"
    name = "quick" if args.quick else "map" if args.map else Path(args.data).name
    args.out = args.out or Path("runs", f"which_prior_{name}")
    args.images = args.images or (16_000 if letters else 5800)
    args.epochs = args.epochs or (10 if letters else 30)
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
    except (OSError, SyntaxError, RuntimeError, ValueError) as error:
        parser.error(f"cannot load --data or write to --out: {' '.join(str(error).split())}")

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
    keys = ("data_exponent", "contrast", "prior_exponent", "method")
    summary = summarize(runs, key=lambda run: tuple(run[name] for name in keys))
    print(f"\nmean ± std over n = {len(args.seeds)} seeds")
    columns = ["knn", "probe", "balanced_knn", "balanced_probe", "same_background",
               *(f"gain_{name}" for name in GAINS)]
    print("data contrast prior     method" + "".join(f"{column:>20}" for column in columns))
    for arm, row in summary.items():
        data_exponent, contrast, exponent, method = arm
        exponent = "" if exponent is None else f"{exponent:.2f}"
        print(f"{data_exponent:>4.2f}{contrast:>9.2f}{exponent:>6}{method:>11}"
              + "".join(f"{cell(row, column):>20}" for column in columns))
    plot(summary, args.out / "which_prior.png")
    print(f"After {time.time() - began:.0f} s, results and figure are in {args.out}")

if __name__ == "__main__":
    print_any_text()
    main()
