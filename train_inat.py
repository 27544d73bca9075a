"""PMSN on iNaturalist 2018 or on your own long-tailed images (paper, section 5.2).

    python train_inat.py --data PATH --checkpoint_activations   # one GPU, or a CPU
    torchrun --nproc_per_node 8 train_inat.py --data PATH       # eight GPUs of one machine
    python train_inat.py --quick                                # all of it in a minute, on a CPU

PATH is one of these:

    iNaturalist    as it is distributed: train2018.json, val2018.json, train_val2018/ (or the same
                   files of 2017, 2019 or 2021)
    two folders    train/<class>/*.jpg and val/<class>/*.jpg (or validation/)
    one folder     <class>/*.jpg, without an evaluation
    with --list    the folder to which the paths in text files belong (ImageNet-LT, Places-LT)

Labels serve the evaluation, --prior classes, --long_tail and --classes_per_batch, not the loss.

--out gets checkpoint.pt after every epoch, and the same command continues from it. Everything
random in an epoch depends only on seed, epoch, rank and --workers: a killed run repeats its
epoch, bit for bit on CPUs. --out also gets metrics.jsonl, two figures, and encoder.pt: the weights
of the target encoder with the parameter names of timm. Normalize images with the mean and the
standard deviation of ImageNet (pmsn.IMAGENET_MEAN and IMAGENET_STD) for it. The defaults of timm's
vit_small_patch16_224, which are 0.5 and 0.5, are wrong here.

This script runs on Linux and macOS. For the method, read the sections Recipe and Training, and
main. The rest deals with files, with other processes and with what can go wrong.
"""

import argparse
import datetime
import errno
import functools
import hashlib
import io
import json
import math
import os
import re
import socket
import sys
import threading
import time
import zipfile
from pathlib import Path

# A notebook sets this variable to a plotting backend of its own. If the backend is not installed
# here, importing matplotlib fails. We only write files, and need no backend.
os.environ.pop("MPLBACKEND", None)
import numpy as np
import torch
import torch.distributed as dist
import torchvision
from matplotlib.figure import Figure
from PIL import Image, ImageOps
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import BatchSampler, DataLoader, Dataset, DistributedSampler, Subset
from torchvision.transforms import v2

import pmsn

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
TERMS = ("loss", "cross_entropy", "prior_kl", "effective_prototypes", "prototypes_per_view")
# The log has these five terms too. "eff." are effective prototypes, "view" prototypes per view.
HEADER = "   epoch     loss       CE       KL    eff.    view       lr  images/s  hours left"
ROW = "{:8.2f} {:8.4f} {:8.4f} {:8.4f} {:7.1f} {:7.1f} {:8.1e} {:9.1f} {:11.2f}"
# A run can be continued with other values of these flags.
FREE_FLAGS = ("data", "list", "out", "workers", "eval_every", "compile", "checkpoint_activations")
IMAGE_ENDINGS = torchvision.datasets.folder.IMG_EXTENSIONS  # .jpg, .png and so on


# ---- Processes: torchrun starts one per GPU and sets these variables -----------------------------
def rank():
    return int(os.environ.get("RANK", 0))


def world_size():
    return int(os.environ.get("WORLD_SIZE", 1))


def say(*words):
    """Print on the first process only."""
    if rank() == 0:
        print(*words, flush=True)


def fail(message, script="train_inat.py"):
    """End the run with one line and exit status 2, for what the user can correct."""
    if rank() > 0:
        # Most mistakes are the same on all processes. The first process gets five seconds to report
        # them. Then torchrun ends this one.
        time.sleep(5)
        message = f"process {rank()}: {message}"
    print(f"{script}: error: {message}", file=sys.stderr, flush=True)
    sys.exit(2)


def print_any_text():
    """Some terminals only take ASCII, and the name of a file may not be UTF-8."""
    if hasattr(sys.stdout, "reconfigure"):  # not in a notebook
        sys.stdout.reconfigure(errors="backslashreplace")


def start_processes():
    """The device of this process. Processes of torchrun find each other."""
    cuda = torch.cuda.is_available()
    device = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if cuda else "cpu")
    if cuda:
        torch.cuda.set_device(device)
    if "TORCHELASTIC_RUN_ID" in os.environ:
        threading.Thread(target=end_with_parent, args=[os.getppid()], daemon=True).start()
    if world_size() > 1:
        # Features and checkpoints go through the memory of the CPU, gradients through that of the
        # GPU. The other processes wait while the first one trains a linear probe.
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo",
                                timeout=datetime.timedelta(hours=2))
    return device


def end_with_parent(parent):
    """If torchrun is killed, its processes would go on, or wait for each other for ever."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


# ---- Data: a split is (paths, classes), later (paths, labels (N,)) -------------------------------
def find_images(data, lists=(), out=None):
    """(paths, labels (N,)) of the training images, and of the validation images or None.

    `lists` are text files in place of folders. `out` must not be beside classes or in one.
    Raises ValueError or OSError with the reason if this is not a data set.
    """
    jsons = [path for path in sorted(data.glob("train*.json"))
             if re.fullmatch(r"train(20\d\d)?\.json", path.name) and path.is_file()]
    if lists:
        splits = [read_list(file, data) for file in lists]
    elif len(jsons) > 1:
        raise ValueError(f"there is more than one data set: {', '.join(x.name for x in jsons)}")
    elif jsons:
        splits = [read_json(jsons[0])]
        val = jsons[0].with_name(jsons[0].name.replace("train", "val"))
        if val.exists():
            splits.append(read_json(val))
    else:
        folders = find_folders(data)
        if out and any(folder.resolve() in out.resolve().parents for folder in folders):
            raise ValueError(f"--out {out} would become a class: choose a folder elsewhere")
        splits = [read_folder(folder) for folder in folders]
    class_names = sorted(set(splits[0][1]))
    index = {name: i for i, name in enumerate(class_names)}
    for _, classes in splits:
        unknown = set(classes) - set(class_names)
        if unknown:
            raise ValueError(f"class {unknown.pop()!r} of the validation images is missing in the "
                             "training images")
    training, *validation = [(paths, torch.tensor([index[name] for name in classes]))
                             for paths, classes in splits]
    return training, validation[0] if validation else None


def find_folders(data):
    """The folder of the training images, and that of the validation images if there is one.

    There are three cases: train (and val) with folders of classes, which are returned. Or folders
    of classes only, where the given folder is returned. One of its classes may have the name train,
    as in CIFAR-100: then train has images and no folders. Or val without train, which is an error.
    """
    names = {"train": ("train", "training"), "val": ("val", "valid", "validation"),
             "test": ("test", "testing")}
    subfolders = [path for path in sorted(data.iterdir())
                  if path.is_dir() and not path.name.startswith(".")]
    folders = {split: [path for path in subfolders if path.name.lower() in names[split]]
               for split in names}
    named = folders["train"] + folders["val"] + folders["test"]
    others = [path for path in subfolders if path not in named]
    have_classes = any(child.is_dir() for path in named for child in path.iterdir())
    # Without folders of classes in train, val or test, all folders here are classes.
    if not have_classes and (others or not named):
        return [data]
    for found in folders.values():
        if len(found) > 1:
            raise ValueError(f"which one is it: {' or '.join(path.name for path in found)}?")
    if not folders["train"]:
        raise ValueError(f"there is a folder {named[0].name}, but no folder train")
    used = folders["train"] + folders["val"]
    unused = others + folders["test"]
    if unused:
        names = [path.name for path in unused]
        say(f"not used: {', '.join(names[:5])}{' ...' if len(names) > 5 else ''}. Only "
            f"{' and '.join(path.name for path in used)} are")
    return used


def read_folder(folder):
    """Images of class folders, in the order of their names. What is hidden is skipped."""
    paths, classes = [], []
    for entry in sorted(folder.iterdir()):
        if entry.is_dir() and not entry.name.startswith("."):
            found = image_files(entry, above=[os.path.realpath(folder)])
            paths += found
            classes += [entry.name] * len(found)
    if not paths:
        raise ValueError(f"{folder} has no folders with images ({', '.join(IMAGE_ENDINGS)})")
    return paths, classes


def image_files(folder, above):
    """The paths of the images in a folder and in its subfolders. `above` are those above it."""
    real = os.path.realpath(folder)
    if real in above:
        return []  # A symbolic link to a folder above would never end.
    found = []
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        if entry.name.startswith("."):
            continue
        if os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir():
            found += image_files(entry.path, [*above, real])
        elif entry.name.lower().endswith(IMAGE_ENDINGS):
            # A broken link is kept, and later named as an unreadable image. A named pipe is not.
            is_broken_link = entry.is_symlink() and not os.path.exists(entry.path)
            if is_broken_link or entry.is_file():
                found.append(entry.path)
    return found


def read_json(file):
    """Images and categories of iNaturalist."""
    try:
        content = json.loads(file.read_text(encoding="utf-8-sig"))
        category = {a["image_id"]: a["category_id"] for a in content["annotations"]}
        paths = [os.path.join(file.parent, image["file_name"]) for image in content["images"]]
        classes = [category[image["id"]] for image in content["images"]]
        sorted(set(classes))  # a TypeError if there are numbers and words
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise ValueError(f"{file.name} must have images with id and file_name, and annotations "
                         f"with image_id and category_id: {error!r:.200}") from error
    if not paths:
        raise ValueError(f"{file.name} has no images")
    return paths, classes


def read_list(file, folder):
    """Lines "path label", as of ImageNet-LT and Places-LT. Paths are relative to the folder."""
    # Names of files may have any bytes. Some editors put an invisible mark (sig) at the beginning.
    text = file.read_text(encoding="utf-8-sig", errors="surrogateescape")
    lines = [line.rsplit(maxsplit=1) for line in text.rstrip().split("\n")]
    if not all(len(line) == 2 and line[1].isdecimal() for line in lines):
        raise ValueError(f"every line of {file} must be a path and the number of a class")
    return [os.path.join(folder, path) for path, _ in lines], [int(label) for _, label in lines]


def decode(path):
    """An image file as uint8 (3, H, W), turned as its EXIF orientation says.

    Gray levels of 16 bits lose their lower 8 bits. Raises an error if the file cannot be read.
    """
    if not os.path.isfile(path):  # Opening a named pipe would wait for ever.
        raise OSError("there is no such file")
    with Image.open(path) as image:
        # PNG and PGM have at most 16 bits, but PIL may read them as 32.
        if image.mode.startswith("I;16") or image.mode == "I" and image.format in ("PNG", "PPM"):
            levels = np.asarray(image).astype(np.int64) >> 8
            image, info = Image.fromarray(levels.astype(np.uint8)), image.info
            image.info.update(info)  # the EXIF orientation
        elif image.mode in ("I", "F"):
            # We do not know which number is white, and PIL would take everything above 255 for it.
            raise OSError("it has gray levels of 32 bits, convert it to 8 bits")
        image = image.convert("RGB")
    try:
        ImageOps.exif_transpose(image, in_place=True)
    except Exception:  # A damaged EXIF field says nothing about the pixels.
        pass
    return v2.functional.pil_to_tensor(image)


class Images(Dataset):
    """Items (transformed image, index, readable). The next image replaces an unreadable one."""

    def __init__(self, paths, transform, read=decode):
        # All workers share an array. A list of strings would be copied into each of them. Names of
        # files are bytes. transfer.py has data sets with numbers in place of paths.
        self.paths = np.array([os.fsencode(path) if isinstance(path, str) else path
                               for path in paths])
        self.transform, self.read = transform, read

    def __len__(self):
        return len(self.paths)

    def path(self, index):
        path = self.paths[index]
        return os.fsdecode(path) if isinstance(path, bytes) else path

    def __getitem__(self, index):
        for i in range(index, index + 100):
            try:
                image = self.read(self.path(i % len(self)))
            except Exception:  # A damaged file leads to many kinds of errors.
                continue
            return self.transform(image), index, i == index
        black = torch.zeros(3, 64, 64, dtype=torch.uint8)  # if none of a hundred can be read
        return self.transform(black), index, False


def check_readable(images, name):
    """Raise OSError if none of a hundred images can be read: was the archive unpacked?"""
    reason = None
    for index in range(0, len(images), max(1, len(images) // 100)):
        try:
            images.read(images.path(index))
            return
        except Exception as error:
            reason = reason or f"{images.path(index)}: {error}"
    raise OSError(f"no {name} image can be read, for example {reason}")


def name_unreadable(images, indices, unreadable):
    """Print the names of unreadable images, each of them once: `unreadable` has those before.

    More than 1% of the images of a process end the run.
    """
    for path in sorted({images.path(i) for i in indices.tolist()} - unreadable):
        print(f"unreadable image: {path}", file=sys.stderr, flush=True)
        unreadable.add(path)
    share = len(images) // world_size()
    if len(unreadable) > max(1, share // 100):
        fail(f"{len(unreadable)} of {share} images cannot be read, which is more than 1%")


def read_data(args):
    """(paths, labels (N,)) of the training images, and of the validation images or None."""
    training, validation = find_images(args.data, args.list, args.out)
    check_readable(Images(training[0], None), "training")
    if validation:
        check_readable(Images(validation[0], None), "validation")
    else:
        say("there are no validation images, so there is no evaluation")
    if args.long_tail is not None:
        paths, labels = training
        long_tail = pmsn.power_law_prior(len(labels.unique()), args.long_tail)
        kept = pmsn.long_tail_indices(labels, long_tail)
        training = [paths[i] for i in kept], labels[kept]
    return training, validation


def make_batches(labels, args):
    """The mini-batches of this process, and a function of the epoch that gives them a new order."""
    if args.classes_per_batch:
        batches = pmsn.ClassBatchSampler(labels, args.batch_size, args.classes_per_batch, rank(),
                                         world_size(), args.seed)
        return batches, batches.set_epoch
    # The epoch is added to the seed, so the seeds of two runs are far apart.
    sampler = DistributedSampler(labels, world_size(), rank(), seed=1_000_003 * args.seed,
                                 drop_last=True)
    batches = BatchSampler(sampler, args.batch_size // world_size(), drop_last=True)
    if len(batches) == 0:
        raise ValueError(f"--batch_size {args.batch_size} is more than {len(labels)} images")
    return batches, sampler.set_epoch


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


def checkpoint_activations(model):
    """Keep only the input of each block, and compute the rest again in the backward pass."""
    for block in model.encoder.blocks:
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)


def compile_encoders(model, **options):
    model.encoder.compile(dynamic=False, **options)
    model.target_encoder.compile(dynamic=False, **options)


def make_optimizer(model):
    """AdamW with two groups. Biases, norms and prototypes have no weight decay.

    As in MSN, position embeddings and the CLS token have. The schedules set the weight decay of
    every step.
    """
    network = [*model.encoder.parameters(), *model.head.parameters()]
    decayed = {"params": [p for p in network if p.ndim > 1]}
    others = {"params": [p for p in network if p.ndim <= 1] + [model.prototypes],
              "weight_decay": 0.0}
    return torch.optim.AdamW([decayed, others], fused=model.prototypes.is_cuda)


def schedules(args, steps_per_epoch):
    """Learning rate, weight decay and EMA momentum of every step: a list of three numbers each."""
    def cosine_decay(start, end, progress):
        return end + (start - end) * (0.5 + 0.5 * np.cos(np.pi * progress))

    steps = args.epochs * steps_per_epoch
    # MSN stretches its schedules to 1.25 times the training, so training ends before they do.
    step, warmup, stretched = np.arange(1, steps + 1), steps // 20, 1.25 * steps
    rising = args.lr * (0.2 + 0.8 * step / max(1, warmup))
    falling = cosine_decay(args.lr, args.lr / 1000, (step - warmup) / (stretched - warmup))
    weight_decay = cosine_decay(0.04, 0.4, step / stretched)
    ema_momentum = args.ema_momentum + (1 - args.ema_momentum) * (step - 1) / stretched
    lr = np.where(step < warmup, rising, falling)
    return np.stack([lr, weight_decay, ema_momentum], axis=1).tolist()


def set_epoch_seed(epoch, args):
    """Everything random in an epoch follows from this, except the order of the images."""
    torch.manual_seed(1_000_003 * args.seed + epoch * world_size() + rank())


# ---- Training ------------------------------------------------------------------------------------
def train_one_epoch(model, network, loader, optimizer, schedule, epoch, color_options,
                    loss_options):
    """Train for one epoch, numbered from 1.

    `network` is the model, or DistributedDataParallel around it. `schedule` has the learning rate,
    the weight decay and the EMA momentum of all steps of the run. The options go to
    pmsn.make_views and to pmsn.pmsn_loss. Returns the means of the terms over the steps and all
    processes, and the mean prediction (K,).
    """
    device = model.prototypes.device
    cuda = device.type == "cuda"
    # As in MSN, the gradient of the prototypes is not clipped.
    clipped = [*model.encoder.parameters(), *model.head.parameters()]
    sums = torch.zeros(len(TERMS), device=device)
    norms = torch.zeros((), device=device)
    mean_prediction = torch.zeros_like(model.prior)
    unreadable = set()
    start = last_print = time.time()

    for i, (crops, index, readable) in enumerate(loader):
        name_unreadable(loader.dataset, index[~readable], unreadable)
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
        if is_last or time.time() - last_print > 60:
            last_print = time.time()
            means = sums / (i + 1)
            if is_last and world_size() > 1:
                dist.all_reduce(means)  # Every process has the cross-entropy of its own images.
                means /= world_size()
            if not (means.isfinite().all() and norms.isfinite()):
                fail("loss or gradient is not finite: lower --lr and choose another --out")
            steps_per_second = (i + 1) / (last_print - start)
            say(ROW.format((step + 1) / len(loader), *means.tolist(), lr,
                           steps_per_second * len(index) * world_size(),
                           (len(schedule) - step - 1) / steps_per_second / 3600))

    # The loss and the gradient of a step come before its update, so we look at the weights too.
    if not all(x.isfinite().all() for x in model.state_dict().values()):
        fail(f"weights are not finite after epoch {epoch}: lower --lr and choose another --out")
    return dict(zip(TERMS, means.tolist())), mean_prediction.cpu()


# ---- Evaluation of the frozen target encoder -----------------------------------------------------
def center_crop(image, size):
    """The middle of an image: resized to 256 / 224 of the size, then cropped. (3, H, W) -> square.

    A square is cut out first, because a strip of 1 x 20,000 pixels would become enormous.
    """
    square = v2.functional.center_crop(image, [min(image.shape[1:])])
    resized = v2.functional.resize(square, [round(size * 256 / 224)], antialias=True)
    return v2.functional.center_crop(resized, [size])


@torch.no_grad()
def extract(encoder, images, workers, watch=iter):
    """Features (n, d) and indices (n,) of all readable images, for the first process.

    Every process computes a share of them. The others return None. Features are on the device of
    the encoder, indices on the CPU. `watch` can print progress, in extras/transfer.py.
    """
    device = next(encoder.parameters()).device
    share = range(rank(), len(images), world_size())
    loader = DataLoader(Subset(images, share), batch_size=256, num_workers=workers)
    unreadable, is_readable = set(), torch.zeros(len(share), dtype=torch.bool)
    features, start = None, 0
    was_training = encoder.training
    encoder.eval()
    for crops, index, readable in watch(loader):
        name_unreadable(images, index[~readable], unreadable)
        crops = v2.functional.to_dtype(crops.to(device), torch.float32, scale=True)
        crops = v2.functional.normalize(crops, pmsn.IMAGENET_MEAN, pmsn.IMAGENET_STD)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            # This goes around torch.compile, which would compile again for these shapes.
            found = encoder.forward(crops)
        # One tensor for all batches. Thousands of small ones would leave holes in the memory.
        if features is None:
            features = torch.empty(len(share), found.shape[1])
        end = start + len(index)
        features[start:end], is_readable[start:end] = found.float().cpu(), readable
        start = end
    encoder.train(was_training)
    indices = torch.tensor(share)[is_readable]
    if features is not None:
        features = features[is_readable]
    if world_size() > 1:
        shares = [None] * world_size() if rank() == 0 else None
        dist.gather_object((features, indices), shares)
        if rank() > 0:
            return None
        # With fewer images than processes, some processes have none.
        features, indices = [torch.cat(parts) for parts in
                             zip(*[share for share in shares if share[0] is not None])]
    if len(indices) == 0 or len(images) - len(indices) > max(1, len(images) // 100):
        fail(f"{len(images) - len(indices)} of {len(images)} images cannot be read, which is more "
             "than 1%")
    indices, order = indices.sort()  # the same order for any number of processes
    return features[order].to(device), indices


def accuracies(predicted, test_labels, labels):
    """Accuracy on all classes, and on those with many, medium and few training images.

    Many are more than 100, and few are fewer than 20.
    """
    counts = torch.bincount(labels, minlength=int(test_labels.max()) + 1)[test_labels]
    groups = {"all": counts >= 0, "many": counts > 100, "few": counts < 20}
    groups["medium"] = ~(groups["many"] | groups["few"])
    return {group: (predicted == test_labels)[chosen].double().mean().item()
            for group, chosen in groups.items() if chosen.any()}


def evaluate(encoder, training, validation, args):
    """Accuracies of k-NN and of the linear probe, the same on all processes."""
    crop = functools.partial(center_crop, size=args.image_size)
    found = extract(encoder, Images(training[0], crop), args.workers)
    test_found = extract(encoder, Images(validation[0], crop), args.workers)
    answer = [None]
    if rank() == 0:
        features, indices = found
        labels = training[1][indices].to(features.device)
        test_features, test_indices = test_found
        test_labels = validation[1][test_indices].to(features.device)
        predictions = {
            "knn": pmsn.knn_predictions(features, labels, test_features, min(20, len(features))),
            "linear": pmsn.linear_probe(features, labels, test_features),
        }
        answer = [{f"{name}_{group}": accuracy for name, predicted in predictions.items()
                   for group, accuracy in accuracies(predicted, test_labels, labels).items()}]
    if world_size() > 1:
        dist.broadcast_object_list(answer, device=torch.device("cpu"))
    return answer[0]


def evaluate_if_due(encoder, history, training, validation, args):
    """Add accuracies to the last epoch of the history. Returns whether there are new ones."""
    line = history[-1]
    is_due = line["epoch"] % args.eval_every == 0 or line["epoch"] == args.epochs
    if validation is None or not is_due or "knn_all" in line:
        return False
    accuracy = evaluate(encoder, training, validation, args)
    say(f"{line['epoch']:8}", *[f"{name} {value:.3f}" for name, value in accuracy.items()])
    line.update(accuracy)
    return True


# ---- The folder of a run -------------------------------------------------------------------------
def open_folder(args):
    """Make --out and lock it, on the first process only.

    The lock lasts until the returned file is closed, or the process ends.
    """
    import fcntl  # is missing on Windows

    try:
        args.out.mkdir(parents=True, exist_ok=True)
        lock = open(args.out / "lock", "a+")
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                lock.seek(0)
                owner = lock.read().strip()
                fail(f"another run writes to --out {args.out}: process {owner or 'unknown'}")
            print(f"warning: {args.out} cannot be locked ({error.strerror}). Do not start two "
                  "runs with the same --out", file=sys.stderr, flush=True)
        lock.truncate(0)
        lock.write(f"{os.getpid()} on {socket.gethostname()}\n")
        lock.flush()
    except OSError as error:
        fail(f"cannot write to --out {args.out}: {error.strerror}")
    return lock


def fingerprint(paths, labels, data):
    """A hash of names and labels of all images, and of the content of a hundred of them."""
    start = str(data) + os.sep
    content = hashlib.sha256()
    for path, label in zip(paths, labels.tolist()):
        content.update(os.fsencode(path.removeprefix(start)) + b"\0%d\n" % label)
    for path in paths[::max(1, len(paths) // 100)]:
        try:
            image = Path(path).read_bytes() if os.path.isfile(path) else b""
        except OSError:
            image = b""
        content.update(hashlib.sha256(image).digest())
    return content.hexdigest()[:16]


def load_file(path):
    """What torch.save has written. Raises ValueError if it was damaged since then."""
    if not os.path.isfile(path):
        raise OSError(f"{path} is no file")
    if zipfile.is_zipfile(path):  # Files of old versions of PyTorch have no checksums.
        with zipfile.ZipFile(path) as file:
            # torch.load does not compare the checksums. And external_attr, a field of the table of
            # contents, is 0 in its files. Otherwise a tensor counts as a folder, and is not read.
            damaged = file.testzip() or any(part.external_attr for part in file.infolist())
        if damaged:
            raise ValueError(f"{path} is damaged: its checksums are wrong")
    return torch.load(path, map_location="cpu", weights_only=True)


def load_checkpoint(path, settings):
    """The checkpoint of an earlier run. One with other settings ends this run."""
    try:
        state = load_file(path)
        missing = {"model", "optimizer", "history", "usage", "settings"} - state.keys()
        if missing:
            raise ValueError(f"it has no {missing.pop()}")
        # The checkpoint of an older version has no value for a newer flag. Take the default.
        old = {**vars(make_parser().parse_args([])), **state["settings"]}
        changed = [name for name in settings if old.get(name, settings[name]) != settings[name]]
    except Exception as error:  # A damaged file leads to many kinds of errors.
        fail(f"cannot read {path}. If it is damaged, delete it to start again ({error!r:.300})")
    if changed:
        fail(f"{path} has other settings ({', '.join(changed)}). Choose another --out")
    return state


def resume(model, optimizer, settings, args):
    """Continue from --out on all processes.

    Returns the history, a list with a dictionary per epoch, and the mean prediction (K,) of the
    last epoch. In a new run the only epoch is number 0, that of the random weights.
    """
    path = args.out / "checkpoint.pt"
    state = [None]
    if rank() == 0 and path.exists():
        state = [load_checkpoint(path, settings)]
    if world_size() > 1:
        dist.broadcast_object_list(state, device=torch.device("cpu"))
    if state[0] is None:
        say(f"new run in {args.out}")
        return [{"epoch": 0}], None
    model.load_state_dict(state[0]["model"])
    optimizer.load_state_dict(state[0]["optimizer"])
    history, mean_prediction = state[0]["history"], state[0]["usage"]
    say(f"{args.out} continues after epoch {history[-1]['epoch']}")
    if rank() == 0:
        # A kill may have come between the checkpoint and these files, or somebody deleted one.
        save_outputs(model, history, args.out)
        draw_figures(model, history, mean_prediction, args.out)
    return history, mean_prediction


def write_whole(path, write):
    """Call write(temporary path), then move the file: a kill leaves the old file or the new one."""
    temporary = path.with_name(path.name + ".temporary")
    try:
        write(temporary)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save turns some errors into RuntimeError.
        temporary.unlink(missing_ok=True)
        fail(f"cannot write {path}, is the disk full? ({error})")


def save(model, optimizer, history, mean_prediction, settings, out):
    """Write the files of a run, on the first process. The checkpoint is the first of them."""
    if rank() > 0 or history[-1]["epoch"] == 0:
        return
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(),
             "history": history, "usage": mean_prediction, "settings": settings}
    write_whole(out / "checkpoint.pt", lambda path: torch.save(state, path))
    save_outputs(model, history, out)


def save_outputs(model, history, out):
    encoder = {name: weight.cpu() for name, weight in model.target_encoder.state_dict().items()}
    write_whole(out / "encoder.pt", lambda path: torch.save(encoder, path))
    lines = "".join(json.dumps(line) + "\n" for line in history)
    write_whole(out / "metrics.jsonl", lambda path: path.write_text(lines))


def draw_figures(model, history, mean_prediction, out):
    if rank() == 0:
        write_figure(out / "training.png", plot_history, history)
        write_figure(out / "prototypes.png", plot_prototypes, mean_prediction, model.prior.cpu())


def write_figure(path, plot, *content):
    """Write the figure plot(*content). If it cannot be drawn, there is a warning: it can wait."""
    picture = io.BytesIO()
    try:
        plot(*content).savefig(picture, format="png", dpi=120)
    except Exception as error:  # For example, a matplotlibrc asks for LaTeX, and there is none.
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        print(f"warning: cannot draw {path.name}: {reason}", file=sys.stderr, flush=True)
    else:
        write_whole(path, lambda temporary: temporary.write_bytes(picture.getvalue()))


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
    ax.loglog(places, mean_prediction[largest_first], ".", color="#d1495b", label="mean prediction")
    ax.loglog(places, prior[largest_first], "k--", label="prior")
    kl = torch.xlogy(mean_prediction, mean_prediction / prior).sum()
    ax.set(xlabel="prototype, largest prior first", ylabel="share of the images",
           title=f"KL(mean prediction || prior) = {kl:.3f} nats")
    ax.legend(frameon=False)
    return figure


# ---- Command line --------------------------------------------------------------------------------
def number(kind, low, high=1e9):
    """An argparse type: a number from low to high."""
    def number(text):  # argparse prints the name of this function: "invalid number value"
        value = kind(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"must be from {low} to {high:.10g}, got {text}")
        return value
    return number


def folder(text):
    """An argparse type: a path. An empty one would be the current folder."""
    if not text:
        raise argparse.ArgumentTypeError("is empty")
    return Path(text)


def make_parser():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.error = fail  # one line, and only once under torchrun
    add = parser.add_argument
    add("--data", type=folder, help="iNaturalist 2018, or a folder with folders of images")
    add("--list", type=Path, nargs="+", default=[], metavar="FILE",
        help="text files with lines 'path label', for training and validation: ImageNet-LT")
    add("--out", type=folder, help="folder of the run, runs/inat if it is not given")
    add("--model", default="vit_small", choices=MODELS, help="vision transformer")
    add("--patch_size", type=number(int, 1, 10_000), default=16, help="pixels per side of a patch")
    add("--image_size", type=number(int, 8, 10_000), default=224,
        help="pixels of target and masked views; below 64 crops are larger and not blurred")
    # The blur of the views pads by 8 pixels, and cannot take more than there are.
    add("--focal_size", type=number(int, 9, 10_000), default=96, help="pixels of focal views")
    add("--focal_views", type=number(int, 0, 1000), default=10, help="focal views per image")
    add("--patch_drop", type=number(float, 0, 0.99), default=0.15, help="share of masked patches")
    add("--prior", default="power_law", choices=PRIORS,
        help="uniform is MSN (add --sinkhorn_iterations 3); classes has one prototype per class")
    add("--exponent", type=number(float, 0),
        help="of --prior power_law, 0.25 if it is not given; 0 is uniform")
    add("--prototypes", type=number(int, 2, 1_000_000),
        help="number of prototypes, 1024 if it is not given; not for --prior classes")
    add("--sinkhorn_iterations", type=number(int, 0, 1000), default=0, help="see pmsn.sinkhorn")
    add("--relative_sharpening", action="store_true", help="for exponents near 1: pmsn.sharpen")
    add("--any_order", action="store_true", help="the prior in any order: pmsn.in_order_of")
    add("--long_tail", type=number(float, 0, 10), help="exponent of classes, by dropping images")
    add("--classes_per_batch", type=number(int, 1),
        help="few classes per batch (paper, table 1): every class needs at least batch_size / "
             "classes_per_batch images, as in ImageNet and not in iNaturalist")
    add("--epochs", type=number(int, 1, 10_000), default=300, help="the first twentieth is warm-up")
    add("--batch_size", type=number(int, 2, 1_000_000), default=1024,
        help="images per step on all GPUs")
    add("--lr", type=number(float, 0), default=1e-3, help="highest learning rate")
    add("--ema_momentum", type=number(float, 0, 1), default=0.996,
        help="at the start; it goes four fifths of the way to 1")
    add("--workers", type=number(int, 0, 1000), default=8,
        help="processes per device that load images")
    add("--compile", action="store_true", help="use torch.compile")
    add("--checkpoint_activations", action="store_true",
        help="a quarter of the memory, a fifth more computation")
    add("--eval_every", type=number(int, 1), default=10, help="epochs between evaluations")
    add("--seed", type=number(int, 0, 2**32 - 1), default=0, help="seed of the training")
    add("--quick", action="store_true",
        help="tiny model, random images, few epochs: flags of data, model, sizes, prior and length "
             "do not count")
    return parser


def parse(argv):
    parser = make_parser()
    args = parser.parse_args(argv)
    args.out = args.out or Path("runs/quick" if args.quick else "runs/inat")
    if args.out == Path("."):
        parser.error("--out must be a folder of its own, not the current one")
    if world_size() > 1 and "RANK" not in os.environ:
        parser.error("WORLD_SIZE is set, but RANK is not: start several processes with torchrun")
    if args.quick:
        args.data = args.out / "quick_images"
        vars(args).update(model="vit_micro", image_size=32, focal_size=16, patch_size=4, workers=1,
                          focal_views=2, prototypes=16, batch_size=64, epochs=2, eval_every=2,
                          prior="power_law", list=[])
        if world_size() > 1:
            parser.error("--quick is for one process")
    if args.data is None:
        parser.error("--data is missing: only --quick needs none")
    if len(args.list) > 2:
        parser.error("--list takes one file for training and one for validation")
    if args.prior != "power_law" and args.exponent is not None:
        parser.error(f"--exponent is for --prior power_law, not for {args.prior}")
    if args.prior == "classes" and args.prototypes is not None:
        parser.error("--prior classes has one prototype per class: leave --prototypes out")
    # The uniform prior does not look at the exponent. Its checkpoints have always had 0 there.
    if args.exponent is None:
        args.exponent = 0.0 if args.prior == "uniform" else 0.25
    if args.prototypes is None:
        args.prototypes = 1024
    if args.image_size % args.patch_size:
        parser.error("--image_size must be a multiple of --patch_size")
    if args.focal_views and args.focal_size % args.patch_size:
        parser.error("--focal_size must be a multiple of --patch_size")
    if args.batch_size % world_size():
        parser.error(f"--batch_size must be a multiple of the {world_size()} processes")
    if args.batch_size < 2 * world_size():
        parser.error("--batch_size must be at least two images per process, for BatchNorm")
    return args


def draw_quick_images(args):
    """Noise in class folders for --quick, which always starts anew."""
    # A folder with other files is not ours.
    if any(path.name != "lock" for path in args.out.iterdir()) and not args.data.exists():
        fail(f"--quick starts anew, but --out {args.out} is not from --quick")
    (args.out / "checkpoint.pt").unlink(missing_ok=True)
    for i, (image, label) in enumerate(torchvision.datasets.FakeData(400, (3, 64, 64), 8)):
        folder = args.data / ("train" if i % 5 else "val") / f"class{label}"
        folder.mkdir(parents=True, exist_ok=True)
        image.save(folder / f"{i}.jpg")


def main(argv=None):
    args = parse(argv)
    device = start_processes()
    cuda = device.type == "cuda"
    lock = open_folder(args) if rank() == 0 else None
    try:
        if args.quick:
            draw_quick_images(args)
        training, validation = read_data(args)
    except (OSError, ValueError, RecursionError) as error:
        fail(f"{error} (--data {args.data})")
    paths, labels = training
    try:
        prior = PRIORS[args.prior](labels, args)
        if len(prior) == 1:
            raise ValueError("--prior classes needs labels, and all images are in one folder")
        batches, set_epoch = make_batches(labels, args)
    except ValueError as error:
        fail(error)
    crop, color_options = view_options(args)
    loader = DataLoader(Images(paths, crop), batch_sampler=batches, num_workers=args.workers,
                        pin_memory=cuda)

    model = make_model(args, prior).to(device)
    if cuda and world_size() > 1:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    optimizer = make_optimizer(model)
    schedule = schedules(args, len(loader))
    loss_options = {"sinkhorn_iterations": args.sinkhorn_iterations,
                    "relative_sharpening": args.relative_sharpening,
                    "any_order": args.any_order}
    settings = {name: value for name, value in vars(args).items() if name not in FREE_FLAGS}
    settings["processes"] = world_size()
    if rank() == 0:
        settings["images"] = fingerprint(paths, labels, args.data)
        settings["validation"] = validation and fingerprint(*validation, args.data)
    history, mean_prediction = resume(model, optimizer, settings, args)
    if args.checkpoint_activations:
        checkpoint_activations(model)
    if args.compile:
        # The compiler's own support of DDP fails on checkpointed blocks.
        torch._dynamo.config.optimize_ddp = False
        compile_encoders(model)

    # With less than one image per mini-batch, a prototype cannot have its share of the prior.
    expected = args.batch_size * prior  # images per mini-batch
    say(f"{len(paths)} images, {len(labels.unique())} classes, {world_size()} x {device.type}, "
        f"torch {torch.__version__}\n{args.prior} prior: {len(prior)} prototypes, "
        f"{torch.special.entr(prior).sum().exp():.1f} effective, with {expected.min():.2f} to "
        f"{expected.max():.2f} images each per mini-batch\n{HEADER}")
    # Evaluate before the first epoch: in a new run (epoch 0), and after a kill in the middle of an
    # evaluation.
    if evaluate_if_due(model.target_encoder, history, training, validation, args):
        save(model, optimizer, history, mean_prediction, settings, args.out)
    first = history[-1]["epoch"] + 1
    network = model
    for epoch in range(first, args.epochs + 1):
        # Everything random in this epoch follows from these two lines.
        set_epoch_seed(epoch, args)
        set_epoch(epoch)
        # On CPUs DDP is made anew in every epoch, so that a restarted run has the bits of one
        # without a restart: after its first step, DDP changes the order of its sums.
        if world_size() > 1 and (epoch == first or not cuda):
            network = nn.parallel.DistributedDataParallel(model, [device] if cuda else None)
        terms, mean_prediction = train_one_epoch(model, network, loader, optimizer, schedule, epoch,
                                                 color_options, loss_options)
        history.append({"epoch": epoch, **terms})
        # The epoch is saved before its evaluation, so that nothing there can lose it.
        save(model, optimizer, history, mean_prediction, settings, args.out)
        if evaluate_if_due(model.target_encoder, history, training, validation, args):
            save(model, optimizer, history, mean_prediction, settings, args.out)
        draw_figures(model, history, mean_prediction, args.out)
    say(f"{args.out}: checkpoint.pt encoder.pt metrics.jsonl training.png prototypes.png")
    if world_size() > 1:
        dist.destroy_process_group()
    if lock:
        lock.close()


if __name__ == "__main__":
    print_any_text()
    try:
        main()
    except RuntimeError:
        if rank() > 0:
            # Perhaps the first process has ended with a message, so that nobody answers this one.
            # Then torchrun has five seconds to end it, before it prints what happened to it.
            time.sleep(5)
        raise
