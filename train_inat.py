"""PMSN on iNaturalist 2018 or on your own long-tailed images (paper, section 5.2).

To be read after pmsn.py: the recipe of MSN, one epoch of training, and main. A first reading ends
with main. What it calls for data, files, figures and flags follows, and the rest is in support/.

    python train_inat.py --data PATH --checkpoint_activations   # one GPU, or a CPU
    torchrun --nproc_per_node 8 train_inat.py --data PATH       # eight GPUs of one machine
    python train_inat.py --quick                                # all of it in a minute, on a CPU

PATH is one of these:

    iNaturalist    as it is distributed: train2018.json, val2018.json, train_val2018/ (or the same
                   files of 2017, 2019 or 2021)
    two folders    train/<class>/*.jpg and val/<class>/*.jpg (or validation/)
    one folder     <class>/*.jpg, without an evaluation
    with --list    the folder to which the paths in text files belong (ImageNet-LT, Places-LT)

The loss does not use labels. They serve the evaluation, --prior classes, --long_tail and
--classes_per_batch.

--out gets checkpoint.pt after every epoch, and the same command continues from it. Everything
random in an epoch depends only on seed, epoch, rank, number of processes and --workers: a killed
run repeats its epoch, bit for bit on CPUs. --out also gets metrics.jsonl, two figures, and
encoder.pt: the weights of the target encoder with the parameter names of timm. Before you use it,
normalize images with the mean and the standard deviation of ImageNet (pmsn.IMAGENET_MEAN and
IMAGENET_STD). timm's defaults for vit_small_patch16_224, which are 0.5 and 0.5, are wrong here.

An evaluation prints the accuracies of k-NN and of a linear probe on the validation images: over all
classes, and over those with many (more than 100), medium and few (fewer than 20) training images.

This script runs on Linux and macOS.
"""

import argparse
import functools
import json
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.checkpoint import checkpoint as recompute
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler

import pmsn
from support.evaluation import evaluate
from support.figures import POWER_LAW, Figure, write_figure
from support.images import (Images, check_readable, decode, draw_noise, find_images, fingerprint,
                            name_unreadable)
from support.runs import (Parser, UserError, available_cores, check_equal_on_all_processes, command,
                          folder, load_checkpoint, lock_folder, number, rank, save_file, say,
                          start_processes, world_size, write_whole)

MODELS = {  # embed_dim, depth, num_heads
    "vit_micro": (96, 4, 3),
    "vit_tiny": (192, 12, 3),
    "vit_small": (384, 12, 6),
    "vit_base": (768, 12, 12),
}
# A prior (K,) from the labels (N,) of the training images and the arguments.
PRIORS = {
    "power_law": lambda labels, args: pmsn.power_law_prior(args.prototypes, args.exponent),
    "uniform": lambda labels, args: pmsn.power_law_prior(args.prototypes, exponent=0.0),
    "classes": lambda labels, args: pmsn.class_prior(torch.bincount(labels)),
}
# A run can be continued with other values of these flags. (The data may be in another place, but
# the images must be the same: see `fingerprint`. With other --workers the random crops are others.)
FREE_FLAGS = ("data", "list", "out", "workers", "eval_every", "compile", "checkpoint_activations")


# ---- Recipe of MSN -------------------------------------------------------------------------------
def view_options(args):
    """The random crops of an image (a function), and the options of pmsn.make_views."""
    sizes = {"rand_size": args.image_size, "focal_size": args.focal_size,
             "focal_views": args.focal_views}
    if args.image_size < 64:
        # As is usual for CIFAR, crops of small images are larger, and they are not blurred.
        crop = functools.partial(pmsn.multi_crop, **sizes, rand_scale=(0.4, 1.0),
                                 focal_scale=(0.2, 0.6))
        return crop, {"blur_p": 0.0}
    return functools.partial(pmsn.multi_crop, **sizes), {}


def make_model(args, prior):
    """PMSN with random weights that depend on --seed only."""
    torch.manual_seed(args.seed)
    encoder = pmsn.VisionTransformer(args.image_size, args.patch_size, *MODELS[args.model])
    hidden_dim = 512 if args.model == "vit_micro" else 2048
    return pmsn.PMSN(encoder, prior, head=pmsn.projection_head(encoder.embed_dim, hidden_dim),
                     patch_drop=args.patch_drop)


def make_optimizer(model):
    """AdamW with two groups. Biases, norms and prototypes have no weight decay.

    As in MSN, position embeddings and the CLS token do have weight decay. The schedules set its
    value for every step.
    """
    network = [*model.encoder.parameters(), *model.head.parameters()]
    decayed = {"params": [p for p in network if p.ndim > 1]}
    others = {"params": [p for p in network if p.ndim <= 1] + [model.prototypes],
              "weight_decay": 0.0}
    return torch.optim.AdamW([decayed, others], fused=model.prototypes.is_cuda)


def schedules(args, steps_per_epoch):
    """Learning rate, weight decay and EMA momentum of every step: a list of three numbers each."""
    def cosine_path(start, end, progress):
        return end + (start - end) * (0.5 + 0.5 * np.cos(np.pi * progress))

    steps = args.epochs * steps_per_epoch
    warmup = steps // 20
    # As in MSN, schedules are made for 1.25 times the steps. So training ends before they do, with
    # a learning rate above 0 and a target network that still moves.
    schedule_steps = 1.25 * steps
    step = np.arange(1, steps + 1)
    rising = args.lr * (0.2 + 0.8 * step / max(1, warmup))
    falling = cosine_path(args.lr, args.lr / 1000, (step - warmup) / (schedule_steps - warmup))
    lr = np.where(step < warmup, rising, falling)
    weight_decay = cosine_path(0.04, 0.4, step / schedule_steps)
    ema_momentum = args.ema_momentum + (1 - args.ema_momentum) * (step - 1) / schedule_steps
    return np.stack([lr, weight_decay, ema_momentum], axis=1).tolist()


# ---- Training ------------------------------------------------------------------------------------
TERMS = ("loss", "cross_entropy", "prior_kl", "effective_prototypes", "prototypes_per_view")
# The columns of the log. CE is the cross-entropy, KL prior_kl, "eff." effective_prototypes, and
# "view" prototypes_per_view.
HEADER = "   epoch     loss       CE       KL    eff.    view       lr  images/s  hours left"
ROW = "{:8.2f} {:8.4f} {:8.4f} {:8.4f} {:7.1f} {:7.1f} {:8.1e} {:9.1f} {:11.2f}"


def train_one_epoch(model, network, loader, optimizer, schedule, epoch, color_options,
                    loss_options):
    """Train for one epoch, numbered from 1.

    `network` is the model, or DistributedDataParallel around it. `schedule` has the learning rate,
    the weight decay and the EMA momentum of all steps of the run. The options go to
    pmsn.make_views and to pmsn.pmsn_loss. Returns the means of the terms over the steps and all
    processes, the mean prediction (K,), and the line of the log for this epoch. `main` prints it
    after it has saved the epoch: what is in the log is saved.
    """
    device = model.prototypes.device
    cuda = device.type == "cuda"
    # As in MSN, the gradient of the prototypes is not clipped.
    clipped = [*model.encoder.parameters(), *model.head.parameters()]
    sums = torch.zeros(len(TERMS), device=device)
    norms = torch.zeros((), device=device)  # only to see whether all gradients were finite
    mean_prediction = torch.zeros_like(model.prior)
    unreadable = set()
    start = last_print = time.monotonic()

    # Crops are those of pmsn.multi_crop, collated. `index` (B,) are the numbers of the images, and
    # `readable` (B,) is False where a file could not be read, and the next image took its place.
    for i, (crops, index, readable) in enumerate(loader):
        name_unreadable(loader.dataset, index[~readable], unreadable)  # Over 1% end the run.
        step = (epoch - 1) * len(loader) + i
        lr, weight_decay, ema_momentum = schedule[step]
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.param_groups[0]["weight_decay"] = weight_decay  # The other group has none.

        crops = [crop.to(device, non_blocking=True) for crop in crops]
        views = pmsn.make_views(crops, **color_options)
        with torch.autocast(device.type, torch.bfloat16, enabled=cuda):
            loss, terms = network(views, **loss_options)
        optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(clipped, 3.0)
        optimizer.step()
        model.update_target(ema_momentum)

        terms["loss"] = loss.detach()
        sums += torch.stack([terms[name] for name in TERMS])
        norms += norm
        mean_prediction += terms["mean_prediction"] / len(loader)
        # The CPU has to wait for values of the GPU. So it reads them once per minute, and after the
        # last step.
        is_last = i + 1 == len(loader)
        now = time.monotonic()
        if is_last or now - last_print > 60:
            last_print = now
            means = sums / (i + 1)
            if is_last and world_size() > 1:
                # Every process has the cross-entropy of its own images. (The mean prediction is
                # that of all processes already.)
                dist.all_reduce(means)
                means /= world_size()
            if not (means.isfinite().all() and norms.isfinite()):
                raise UserError("loss or gradient is not finite: lower --lr and choose another "
                                "--out")
            steps_per_second = (i + 1) / (now - start)
            row = ROW.format((step + 1) / len(loader), *means.tolist(), lr,
                             steps_per_second * len(index) * world_size(),
                             (len(schedule) - step - 1) / steps_per_second / 3600)
            if not is_last:
                say(row)

    # The loss and the gradient of a step come before its update, so we look at the weights too.
    if not all(x.isfinite().all() for x in model.state_dict().values()):
        raise UserError(f"weights are not finite after epoch {epoch}: lower --lr and choose "
                        "another --out")
    return dict(zip(TERMS, means.tolist())), mean_prediction.cpu(), row


# ---- A run ---------------------------------------------------------------------------------------
@dataclass
class Run:
    """What a run saves after every epoch."""
    model: pmsn.PMSN
    optimizer: torch.optim.Optimizer
    settings: dict  # A checkpoint with other settings is refused.
    out: Path
    history: list  # a dictionary per epoch; epoch 0 is the network before training
    mean_prediction: torch.Tensor | None = None  # (K,), of the last epoch


@command
def main(argv=None):
    args = parse(argv)
    device = start_processes()
    cuda = device.type == "cuda"
    lock = lock_folder(args.out) if rank() == 0 else None
    if args.quick:
        prepare_quick(args)

    training, validation = read_data(args)
    paths, labels = training
    settings = find_settings(training, validation, args)
    try:
        prior = PRIORS[args.prior](labels, args)
        batches, set_epoch = make_batches(labels, args)
    except ValueError as error:
        raise UserError(error) from error
    if len(prior) == 1:
        raise UserError("--prior classes needs labels, and all images are in one folder")
    crop, color_options = view_options(args)
    loader = DataLoader(Images(paths, crop, decode), batch_sampler=batches,
                        num_workers=args.workers, pin_memory=cuda)

    model = make_model(args, prior).to(device)
    if cuda and world_size() > 1:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    if args.checkpoint_activations:
        checkpoint_activations(model)
    if args.compile:
        compile_encoders(model)
    optimizer = make_optimizer(model)
    schedule = schedules(args, len(loader))
    loss_options = {"sinkhorn_iterations": args.sinkhorn_iterations,
                    "relative_sharpening": args.relative_sharpening,
                    "any_order": args.any_order}
    run = Run(model, optimizer, settings, args.out, history=[{"epoch": 0}])
    resume(run)

    # A certain prediction gives a whole image to a prototype. So a prototype that should get less
    # than one image per mini-batch cannot have its share while predictions are certain. (By default
    # the rarest one should get .75 images of 1024.)
    expected = args.batch_size * prior  # images per mini-batch
    say(f"{len(paths)} images, {len(labels.unique())} classes, {world_size()} x {device.type}, "
        f"torch {torch.__version__}\n{args.prior} prior: {len(prior)} prototypes, "
        f"{torch.special.entr(prior).sum().exp():.1f} effective, with {expected.min():.2f} to "
        f"{expected.max():.2f} images each per mini-batch\n{HEADER}")
    # The network before training, or the last epoch of a run that was killed in its evaluation.
    evaluate_if_due(run, training, validation, args)
    draw_figures(run)
    first = run.history[-1]["epoch"] + 1
    network = model
    for epoch in range(first, args.epochs + 1):
        # Everything random in this epoch follows from these two lines.
        torch.manual_seed(1_000_003 * args.seed + epoch * world_size() + rank())
        set_epoch(epoch)
        # DDP changes the order of its sums after its first step. On CPUs we make a new DDP in every
        # epoch, so that a restarted run has the same bits as one without a restart.
        if world_size() > 1 and (epoch == first or not cuda):
            network = nn.parallel.DistributedDataParallel(model, [device] if cuda else None)
        terms, run.mean_prediction, row = train_one_epoch(
            model, network, loader, optimizer, schedule, epoch, color_options, loss_options)
        run.history.append({"epoch": epoch, **terms})
        save(run)  # before the evaluation, so that nothing there can lose the epoch
        say(row)
        evaluate_if_due(run, training, validation, args)
        draw_figures(run)
    say(f"{args.out}: checkpoint.pt encoder.pt metrics.jsonl training.png prototypes.png")
    if world_size() > 1:
        dist.destroy_process_group()
    if lock:
        lock.close()


def evaluate_if_due(run, training, validation, args):
    """Evaluate the target encoder, unless this is done, and save the accuracies in the history."""
    line = run.history[-1]
    is_due = line["epoch"] % args.eval_every == 0 or line["epoch"] == args.epochs
    if validation is None or not is_due or "knn_all" in line:
        return
    accuracies = evaluate(run.model.target_encoder, training, validation, args.image_size,
                          args.workers)
    line.update(accuracies)
    save(run)
    say(f"{line['epoch']:8}", *[f"{name} {value:.3f}" for name, value in accuracies.items()])


def checkpoint_activations(model):
    """Keep only the input of each block, and compute the rest again in the backward pass."""
    for block in model.encoder.blocks:
        block.forward = functools.partial(recompute, block.forward, use_reentrant=False)


def compile_encoders(model, **options):  # with other options in extras/benchmark.py
    # The compiler's own support of DDP fails on checkpointed blocks.
    torch._dynamo.config.optimize_ddp = False
    model.encoder.compile(dynamic=False, **options)
    model.target_encoder.compile(dynamic=False, **options)


# ---- Data: (paths, labels (N,)) ------------------------------------------------------------------
def read_data(args):
    """(paths, labels (N,)) of the training images, and of the validation images or None."""
    try:
        training, validation = find_images(args.data, args.list, args.out)
        check_readable(Images(training[0], None, decode), "training")  # It tries a few.
        if validation:
            check_readable(Images(validation[0], None, decode), "validation")
        if args.long_tail is not None:
            paths, labels = training
            long_tail = pmsn.power_law_prior(len(labels.unique()), args.long_tail)
            kept = pmsn.long_tail_indices(labels, long_tail)
            training = [paths[i] for i in kept], labels[kept]
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{error} (--data {args.data})") from error
    if validation is None:
        say("there are no validation images, so there is no evaluation")
    return training, validation


def make_batches(labels, args):
    """The mini-batches of this process, and a function of the epoch that gives them a new order."""
    if args.classes_per_batch:
        batches = pmsn.ClassBatchSampler(labels, args.batch_size, args.classes_per_batch, rank(),
                                         world_size(), args.seed)
        return batches, batches.set_epoch
    # The sampler uses seed + epoch. Without the factor, epoch 1 of --seed 1 would have the order of
    # epoch 2 of --seed 0.
    sampler = DistributedSampler(labels, world_size(), rank(), seed=1_000_003 * args.seed,
                                 drop_last=True)
    batches = BatchSampler(sampler, args.batch_size // world_size(), drop_last=True)
    if len(batches) == 0:
        raise ValueError(f"--batch_size {args.batch_size} is more than {len(labels)} images")
    return batches, sampler.set_epoch


def find_settings(training, validation, args):
    """What must be the same if a run continues: flags, images and labels."""
    settings = {name: value for name, value in vars(args).items() if name not in FREE_FLAGS}
    settings["processes"] = world_size()
    settings["images"] = fingerprint(*training, args.data)
    settings["validation"] = None if validation is None else fingerprint(*validation, args.data)
    # A process with other images would mix labels, and one with another --eval_every would make the
    # others wait for ever.
    check_equal_on_all_processes({**settings, "eval_every": args.eval_every})
    return settings


def prepare_quick(args):
    """Images of noise for --quick, which always starts anew.

    Raises UserError if the folder has anything but a lock or an earlier run of --quick.
    """
    if not args.data.exists() and any(path.name != "lock" for path in args.out.iterdir()):
        raise UserError(f"--quick starts anew, but --out {args.out} is not from --quick")
    (args.out / "checkpoint.pt").unlink(missing_ok=True)
    draw_noise(args.data)


# ---- The files of a run --------------------------------------------------------------------------
def resume(run):
    """Continue from the checkpoint in the folder of the run, if there is one, on all processes."""
    parts = ("model", "optimizer", "history", "mean_prediction")
    state = load_checkpoint(run.out / "checkpoint.pt", parts, run.settings)
    if state is None:
        say(f"new run in {run.out}")
        return
    run.model.load_state_dict(state["model"])
    run.optimizer.load_state_dict(state["optimizer"])
    run.history, run.mean_prediction = state["history"], state["mean_prediction"]
    say(f"{run.out} continues after epoch {run.history[-1]['epoch']}")
    # A kill may have come between the checkpoint and these files, or somebody deleted one.
    save_outputs(run)


def save(run):
    """Write the files of a run, on the first process. The checkpoint is the first of them."""
    if rank() == 0 and run.history[-1]["epoch"] > 0:
        state = {"model": run.model.state_dict(), "optimizer": run.optimizer.state_dict(),
                 "history": run.history, "mean_prediction": run.mean_prediction,
                 "settings": run.settings}
        save_file(state, run.out / "checkpoint.pt")
        save_outputs(run)


def save_outputs(run):
    if rank() == 0:
        encoder = {name: x.cpu() for name, x in run.model.target_encoder.state_dict().items()}
        save_file(encoder, run.out / "encoder.pt")
        lines = "".join(json.dumps(line) + "\n" for line in run.history)
        write_whole(run.out / "metrics.jsonl", lambda path: path.write_text(lines))


def draw_figures(run):
    if rank() == 0 and run.history[-1]["epoch"] > 0:
        write_figure(run.out / "training.png", plot_history, run.history)
        write_figure(run.out / "prototypes.png", plot_prototypes, run.mean_prediction,
                     run.model.prior.cpu())


def plot_history(history):
    """Terms of the loss and accuracies over the epochs."""
    figure = Figure(figsize=(17, 3.4), layout="constrained")
    axes = figure.subplots(1, 5)
    names = (*TERMS, "knn_all", "linear_all")
    for ax, name in zip(axes[[0, 1, 2, 3, 3, 4, 4]], names):
        lines = [line for line in history if name in line]
        ax.plot([line["epoch"] for line in lines], [line[name] for line in lines], label=name)
        ax.legend(frameon=False)
    figure.supxlabel("epoch (losses in nats, accuracy on validation images)")
    return figure


def plot_prototypes(mean_prediction, prior):
    """The mean prediction of the last epoch, (K,), beside the prior."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    ax = figure.subplots()
    largest_first = prior.argsort(descending=True, stable=True)
    places = range(1, len(prior) + 1)
    ax.loglog(places, mean_prediction[largest_first], ".", color=POWER_LAW, label="mean prediction")
    ax.loglog(places, prior[largest_first], "k--", label="prior")
    kl = torch.xlogy(mean_prediction, mean_prediction / prior).sum()
    ax.set(xlabel="prototype, largest prior first", ylabel="share of the images",
           title=f"KL(mean prediction || prior) = {kl:.3f} nats")
    ax.legend(frameon=False)
    return figure


# ---- Command line --------------------------------------------------------------------------------
def parse(argv):
    parser = Parser("PMSN on iNaturalist 2018 or on your own long-tailed images")
    add = parser.add_argument
    add("--data", type=folder, help="iNaturalist 2018, or a folder with folders of images")
    add("--list", type=Path, nargs="+", default=[], metavar="FILE",
        help="text files with lines 'path label', for training and validation: ImageNet-LT")
    add("--out", type=folder, help="folder of the run, runs/inat if it is not given")
    add("--model", default="vit_small", choices=MODELS, help="vision transformer")
    add("--patch_size", type=number(int, 1, 10_000), default=16, help="pixels per side of a patch")
    add("--image_size", type=number(int, 8, 10_000), default=224,
        help="pixels of target and masked views; below 64 crops are larger and not blurred")
    add("--focal_size", type=number(int, 1, 10_000), default=96, help="pixels of focal views")
    add("--focal_views", type=number(int, 0, 1000), default=10, help="focal views per image")
    add("--patch_drop", type=number(float, 0, 0.99), default=0.15, help="share of masked patches")
    add("--prior", default="power_law", choices=PRIORS,
        help="uniform is MSN (add --sinkhorn_iterations 3); classes has one prototype per class")
    add("--exponent", type=number(float, 0),
        help="of --prior power_law, 0.25 if it is not given; 0 is uniform")
    add("--prototypes", type=number(int, 2, 1_000_000),
        help="number of prototypes, 1024 (--quick: 16) if it is not given; not for --prior classes")
    add("--sinkhorn_iterations", type=number(int, 0, 1000), default=0, help="see pmsn.sinkhorn")
    add("--relative_sharpening", action=argparse.BooleanOptionalAction, default=True,
        help="pmsn.sharpen_relative, never clearly worse than the paper's loss in our experiments "
             "(extras/README.md), which is --no-relative_sharpening")
    add("--any_order", action="store_true", help="the prior in any order: pmsn.in_order_of")
    add("--long_tail", type=number(float, 0, 10),
        help="drop images, so that classes have the frequencies k^-LONG_TAIL")
    add("--classes_per_batch", type=number(int, 1),
        help="few classes per batch (paper, table 1): every class needs at least batch_size / "
             "classes_per_batch images, as in ImageNet and not in iNaturalist")
    add("--epochs", type=number(int, 1, 10_000), default=300, help="the first twentieth is warm-up")
    add("--batch_size", type=number(int, 2, 1_000_000), default=1024,
        help="images per step on all GPUs")
    add("--lr", type=number(float, 0), default=1e-3, help="highest learning rate")
    add("--ema_momentum", type=number(float, 0, 1), default=0.996,
        help="at the start; it goes four fifths of the way to 1")
    add("--workers", type=number(int, 0, 1000), default=min(8, available_cores()),
        help="processes per device that load images: 8, or the number of cores (only with the same "
             "number a run continues with the same crops)")
    add("--compile", action="store_true", help="use torch.compile")
    add("--checkpoint_activations", action="store_true",
        help="a quarter of the memory, a fifth more computation")
    add("--eval_every", type=number(int, 1), default=10, help="epochs between evaluations")
    add("--seed", type=number(int, 0, 2**32 - 1), default=0, help="seed of the training")
    add("--quick", action="store_true",
        help="tiny model, images of noise, two epochs: flags of data, model, sizes and length do "
             "not count")
    args = parser.parse_args(argv)

    args.out = args.out or Path("runs/quick" if args.quick else "runs/inat")
    if args.out == Path("."):
        parser.error("--out must be a folder of its own, not the current one")
    if args.quick:
        if world_size() > 1:
            parser.error("--quick is for one process")
        args.data = args.out / "quick_images"
        vars(args).update(list=[], model="vit_micro", image_size=32, focal_size=16, patch_size=4,
                          focal_views=2, batch_size=64, epochs=2, eval_every=2, workers=1)
    if args.data is None:
        parser.error("--data is missing: only --quick needs none")
    if len(args.list) > 2:
        parser.error("--list takes one file for training and one for validation")
    if args.prior != "power_law" and args.exponent is not None:
        parser.error(f"--exponent is for --prior power_law, not for {args.prior}")
    if args.prior == "classes" and args.prototypes is not None:
        parser.error("--prior classes has one prototype per class: leave --prototypes out")
    # From here on they have their defaults, also for the priors that do not use them.
    if args.exponent is None:
        args.exponent = 0.25
    if args.prototypes is None:
        args.prototypes = 16 if args.quick else 1024
    if args.image_size % args.patch_size:
        parser.error("--image_size must be a multiple of --patch_size")
    if args.focal_views and args.focal_size % args.patch_size:
        parser.error("--focal_size must be a multiple of --patch_size")
    if args.focal_views and args.image_size >= 64 and args.focal_size <= pmsn.BLUR_REACH:
        parser.error(f"--focal_size must be more than {pmsn.BLUR_REACH} pixels, because focal "
                     "views are blurred")
    if args.batch_size % world_size():
        parser.error(f"--batch_size must be a multiple of the {world_size()} processes")
    if args.batch_size < 2 * world_size():
        parser.error("--batch_size must be at least two images per process, for BatchNorm")
    return args


if __name__ == "__main__":
    main()
