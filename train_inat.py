"""PMSN on iNaturalist 2018 or on your own long-tailed images (paper section 5.2), from one device to many.

    python train_inat.py --data PATH                                   # one GPU (or CPU, MPS)
    torchrun --nproc_per_node 8 train_inat.py --data PATH              # one machine
    torchrun --nnodes 4 --nproc_per_node 8 --rdzv_endpoint HOST:29500 --rdzv_backend c10d --max-restarts 3 \\
        train_inat.py --data PATH
    python train_inat.py --data PATH --eval runs/inat/checkpoint.pt    # k-NN and linear probe, nothing trained
    python train_inat.py --quick                                       # the whole path on made images, on a CPU
    python train_inat.py --benchmark                                   # where the time goes, here

PATH is iNat18 as it is distributed (train2018.json, val2018.json, train_val2018/...) or a folder of class folders, or
one that holds `train` and `val` (or `test`), folders of class folders. Labels measure results; in training they serve
--prior classes and --long_tail alone.

Workers decode each image once and stretch it to a square of uint8; all views of a batch are made on the device by
`pmsn.multi_crop`, from crop boxes drawn in the original image. Started again with the same --out, training goes on
where the last checkpoint left it, bit for bit on a CPU.

Writes to --out: checkpoint.pt, checkpoint_previous.pt, encoder.pt (the target encoder, for timm), metrics.jsonl,
evaluation.jsonl, training.png, prototypes.png.
"""

import argparse
import contextlib
import functools
import json
import math
import os
import signal
import sys
import tempfile
import time
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torch.utils.checkpoint
import torchvision
from PIL import Image, ImageFilter
from torch import nn
from torch.utils.data import DataLoader, Dataset

import pmsn

POWER_LAW, UNIFORM = "#d1495b", "#30638e"  # colours, the same in every figure
TERMS = ("loss", "cross_entropy", "prior_kl", "effective_prototypes")
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of `multi_crop`'s views
SHOTS = {"many": (101, math.inf), "medium": (20, 100), "few": (1, 19)}  # training images of a class
SETTINGS = ("model", "prior", "exponent", "prototypes", "epochs", "warmup", "batch_size", "accumulate", "lr",
            "momentum", "clip", "image_size", "focal_size", "focal_views", "patch_size", "patch_drop", "storage_size",
            "seed", "sinkhorn_iterations", "relative_sharpening", "long_tail")  # a run and its continuation share them


class UserError(Exception):
    """Something the user can put right: one line, exit status 2."""


# ---- Data: files and labels; one decoding an image -------------------------------------------------------------------


def find_images(data, long_tail=None):
    """Training and validation images of a folder: (paths, labels (N,)) twice, None for a split that is not there.

    With `long_tail`, an exponent, training is a subset in which class k of C has a share in proportion to
    (k + 1)^-exponent."""
    training, validation = find_splits(Path(data))
    if long_tail is not None:
        paths, labels = training
        try:
            kept = pmsn.long_tail_indices(labels, pmsn.power_law_prior(int(labels.max()) + 1, long_tail))
        except ValueError as error:
            raise UserError(f"--long_tail {long_tail}: {error}") from None
        training = [paths[i] for i in kept], labels[kept]
    return training, validation


def find_splits(data):
    if not data.is_dir():
        raise UserError(f"--data {data}: no such folder")
    if (data / "train2018.json").exists():
        categories = {}
        return tuple(read_inat(data, data / f"{split}2018.json", categories) for split in ("train", "val"))
    train = data / "train" if (data / "train").is_dir() else data
    try:
        classes = torchvision.datasets.folder.find_classes(train)[0]
    except FileNotFoundError:
        raise UserError(f"--data {train} has no class folders") from None
    held_out = next((data / name for name in ("val", "test") if train != data and (data / name).is_dir()), None)
    return read_folder(train, classes), held_out and read_folder(held_out, classes)


def read_inat(data, file, numbers):
    """Paths and labels of a split of iNaturalist from its json; `numbers` {category: class} is filled by the first."""
    if not file.exists():
        return None
    try:
        content = json.loads(file.read_text())
        category = {a["image_id"]: a["category_id"] for a in content["annotations"]}
        if not numbers:
            numbers.update({c: i for i, c in enumerate(sorted(set(category.values())))})
        images = [(str(data / image["file_name"]), numbers[category[image["id"]]]) for image in content["images"]]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file} is not as iNaturalist distributes it: {type(error).__name__} {error}") from None
    return [path for path, _ in images], torch.tensor([label for _, label in images])


def read_folder(folder, classes):
    """Paths and labels of a folder of class folders; class numbers are places in `classes`, names."""
    images = torchvision.datasets.folder.make_dataset(
        str(folder), {name: i for i, name in enumerate(classes)}, allow_empty=True,
        extensions=torchvision.datasets.folder.IMG_EXTENSIONS)
    if not images:
        raise UserError(f"--data {folder} has class folders but no images in them")
    return [path for path, _ in images], torch.tensor([label for _, label in images])


def decode(path, size):
    """An image file as uint8 (size, size, 3), stretched to a square, and its original height and width."""
    with Image.open(path) as image:
        original = image.height, image.width
        image.draft("RGB", (size, size))  # JPEG: decoded at 1/2, 1/4 or 1/8 where that is still large enough
        pixels = np.array(image.convert("RGB").resize((size, size), Image.BILINEAR))
    return torch.from_numpy(pixels), torch.tensor(original)


class Images(Dataset):
    """Decoded images: (pixels (S, S, 3), original size (2,), index, indices that could not be read).

    An unreadable image is replaced by the next one that can be read; its index says which that is."""

    def __init__(self, paths, size):
        self.paths = np.array([os.fsencode(path) for path in paths])  # one array: forked workers do not copy it
        self.size = size

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, index):
        unreadable = []
        for i in range(index, index + 100):
            i %= len(self)
            try:
                return *decode(os.fsdecode(self.paths[i]), self.size), i, unreadable
            except Exception:  # PIL raises whatever a damaged file leads it to
                unreadable.append(i)
        return torch.zeros(self.size, self.size, 3, dtype=torch.uint8), torch.tensor([1, 1]), index, unreadable


def collate(samples):
    pixels, sizes, indices, unreadable = zip(*samples)
    return torch.stack(pixels), torch.stack(sizes), torch.tensor(indices), sum(unreadable, [])


def ignore_signals(_):
    """Workers leave SIGTERM and Ctrl-C to the process that trains, which ends them itself (`load`, `give_up`)."""
    for name in (signal.SIGTERM, signal.SIGINT):
        signal.signal(name, signal.SIG_IGN)


def load(images, batches, workers):
    """Yields `batches` of images, decoded ahead by workers, which end with this generator.

    With a random generator of its own: the views' random state does not depend on when loading started."""
    yield from DataLoader(images, batch_sampler=batches, num_workers=workers, collate_fn=collate,
                          pin_memory=torch.cuda.is_available(), generator=torch.Generator(),
                          worker_init_fn=ignore_signals, prefetch_factor=2 if workers else None)


class Batches:
    """Index lists of the steps start..stop of training, this rank's share of each global batch.

    Every epoch is another permutation, a function of seed and epoch alone; what does not fill a batch is left out."""

    def __init__(self, count, batch_size, start, stop, *, rank=0, world_size=1, seed=0):
        self.count, self.batch_size, self.steps = count, batch_size, range(start, stop)
        self.rank, self.world_size, self.seed = rank, world_size, seed

    def __len__(self):
        return len(self.steps)

    def __iter__(self):
        epoch, steps_an_epoch = None, self.count // self.batch_size
        for step in self.steps:
            if epoch != step // steps_an_epoch:
                epoch = step // steps_an_epoch
                generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
                order = torch.randperm(self.count, generator=generator)
            start = step % steps_an_epoch * self.batch_size
            yield order[start : start + self.batch_size][self.rank :: self.world_size].tolist()


class Unreadable:
    """Images that could not be read: each is named once; more than 1% of the data set end the run."""

    def __init__(self, paths):
        self.paths, self.known = paths, set()

    def add(self, indices, report=True):
        for i in set(indices) - self.known if report else ():
            print(f"unreadable image, skipped: {self.paths[i]}", file=sys.stderr, flush=True)
        self.known.update(indices)
        if len(self.known) > max(1, len(self.paths) // 100):
            raise UserError(f"{len(self.known)} of {len(self.paths)} images could not be read, more than 1%; the last: "
                            f"{self.paths[max(self.known)]}")


# ---- Recipe ----------------------------------------------------------------------------------------------------------


def schedules(args, steps_an_epoch):
    """Learning rate, weight decay and target momentum of every step, (steps,) each: MSN's, stretched to 1.25.

    Learning rate: linear from a fifth of args.lr to args.lr, then cosine towards args.lr / 1000; weight decay: cosine
    from .04 to .4; momentum: linear from args.momentum to 1. Training stops after 1 / 1.25 of each."""
    steps, warmup = args.epochs * steps_an_epoch, min(args.warmup, args.epochs) * steps_an_epoch
    stretched = int(1.25 * steps)

    def cosine(start, end, count):
        return end + (start - end) * (0.5 + 0.5 * np.cos(np.pi * np.arange(count) / max(1, count)))

    lr = np.concatenate([np.linspace(args.lr / 5, args.lr, warmup, endpoint=False),
                         cosine(args.lr, args.lr / 1000, stretched - warmup)])[:steps]
    weight_decay = cosine(0.04, 0.4, stretched)[:steps]
    momentum = np.linspace(args.momentum, 1, stretched)[:steps]
    assert len(lr) == len(weight_decay) == len(momentum) == steps
    return lr, weight_decay, momentum


def make_prior(args, labels):
    if args.prior == "classes":  # one prototype a class
        counts = torch.bincount(labels)
        if (counts > 0).sum() < 2:
            raise UserError("--prior classes needs images of at least two classes")
        return pmsn.class_prior(counts[counts > 0])
    return pmsn.power_law_prior(args.prototypes, args.exponent if args.prior == "power_law" else 0.0)


def make_encoder(args):
    options = {"image_size": args.image_size, "patch_size": args.patch_size}
    if args.model == "vit_micro":  # for CPUs: half a million parameters
        return pmsn.VisionTransformer(embed_dim=96, depth=4, num_heads=3, **options)
    return getattr(pmsn, args.model)(**options)


def make_model(args, prior):
    torch.manual_seed(args.seed)
    encoder = make_encoder(args)
    hidden = 2048 if args.model != "vit_micro" else 512
    return pmsn.PMSN(encoder, prior, head=pmsn.projection_head(encoder.embed_dim, hidden), patch_drop=args.patch_drop,
                     sinkhorn_iterations=args.sinkhorn_iterations, relative_sharpening=args.relative_sharpening)


def compile_encoders(model):
    """In place, for each view size: with dynamic shapes the backward of the position embedding's resize would fail."""
    for encoder in (model.encoder, model.target_encoder):
        encoder.compile(dynamic=False)


def make_optimizer(model, device):
    """AdamW; biases, norms and other vectors are not decayed."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW([{"params": [p for p in parameters if p.ndim > 1]},
                              {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0}],
                             fused=device.type == "cuda")


def make_views(args, pixels, sizes):
    """All views of a batch of stretched uint8 images (B, S, S, 3), on their device.

    Below 64 pixels crops are larger and not blurred, as is usual for CIFAR."""
    of_cifar = {"blur_p": 0.0, "rand_scale": (0.4, 1.0), "focal_scale": (0.2, 0.6)} if args.image_size < 64 else {}
    return pmsn.multi_crop(pixels.permute(0, 3, 1, 2), sizes, rand_size=args.image_size, focal_size=args.focal_size,
                           focal_views=args.focal_views, **of_cifar)


def autocast(args, device):
    return torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16")


def optimise(model, optimizer, args, pixels, sizes, device):
    """One step on this rank's batch, in args.accumulate parts; returns (loss, terms) of the whole batch.

    KL(p_bar || pi) of the batch is not the mean of its parts' KLs. So p_bar of the whole batch is found first, without
    gradients, with the random numbers of the pass that follows; each part's KL is then linear in its own p, at that
    p_bar (see `pmsn_loss`), and value and gradient are those of the whole batch. BatchNorm and Sinkhorn do work on
    parts. Costs one more forward pass, views included."""
    parts = list(zip(pixels.chunk(args.accumulate), sizes.chunk(args.accumulate)))
    p_bar = None
    if len(parts) > 1:
        with torch.no_grad(), fork_random(device), autocast(args, device):
            p_bar = sum(model(make_views(args, *part))[1]["mean_prediction"] for part in parts) / len(parts)
    optimizer.zero_grad()
    sums = None
    for number, part in enumerate(parts, 1):
        last = number == len(parts) or not hasattr(model, "no_sync")
        with contextlib.nullcontext() if last else model.no_sync():
            with autocast(args, device):
                loss, terms = model(make_views(args, *part), mean_prediction=p_bar)
            (loss / len(parts)).backward()
        terms = {"loss": loss.detach(), **terms}
        sums = terms if sums is None else {name: sums[name] + terms[name] for name in sums}
    norm = nn.utils.clip_grad_norm_(model.parameters(), args.clip or math.inf)
    optimizer.step()
    return {"norm": norm, **{name: total / len(parts) for name, total in sums.items()}}


# ---- Processes, random state, checkpoints ----------------------------------------------------------------------------


def start_processes():
    """This process's rank, the number of processes and its device; torchrun's environment, or a single process."""
    rank, world_size, local = (int(os.environ.get(name, default)) for name, default in
                               (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    if torch.cuda.is_available():
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    else:
        device = torch.device("mps" if torch.backends.mps.is_available() and world_size == 1 else "cpu")
    if world_size > 1:
        cuda = device.type == "cuda"
        dist.init_process_group("nccl" if cuda else "gloo", device_id=device if cuda else None)
    return rank, world_size, device


def gather(value):
    """A picklable value of every rank, as a list."""
    if pmsn.world_size() == 1:
        return [value]
    values = [None] * pmsn.world_size()
    dist.all_gather_object(values, value)
    return values


def random_state(device):
    states = {"cpu": torch.get_rng_state()}
    if device.type != "cpu":
        states[device.type] = getattr(torch, device.type).get_rng_state()
    return states


def restore_random(states, device):
    torch.set_rng_state(states["cpu"])
    if device.type in states and device.type != "cpu":
        getattr(torch, device.type).set_rng_state(states[device.type])


@contextlib.contextmanager
def fork_random(device):
    """Inside, random numbers are drawn that the code after it will draw again."""
    states = random_state(device)
    try:
        yield
    finally:
        restore_random(states, device)


def write_whole(path, write, previous=None):
    """Call write(temporary path), then fsync and move it to `path`, so that `path` is never half-written.

    What stood there before is kept as `previous`; stopped between the two moves, `previous` is what there is."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        write(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        if previous and path.exists():
            os.replace(path, previous)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save raises RuntimeError on a full disk
        raise UserError(f"cannot write {path}: {getattr(error, 'strerror', None) or error}") from None
    finally:
        temporary.unlink(missing_ok=True)


def load_checkpoint(out):
    """The newest checkpoint of a folder, None if there is none."""
    for name in ("checkpoint.pt", "checkpoint_previous.pt"):
        if (out / name).exists():
            return read_checkpoint(out / name)
    return None


def read_checkpoint(path):
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # whatever torch.load makes of a damaged or foreign file
        state = None
    if not isinstance(state, dict) or "settings" not in state:
        raise UserError(f"{path} is not a whole checkpoint of this script; the one before it is "
                        f"{path.with_name('checkpoint_previous.pt')}")
    return state


# ---- Training --------------------------------------------------------------------------------------------------------


def train(args, rank, world_size, device, until=None):
    """Train from the last checkpoint of args.out, or from the start, to the end or to step `until`.

    Returns the step reached."""
    training, validation = find_images(args.data, args.long_tail)
    paths, labels = training
    steps_an_epoch = len(paths) // args.batch_size
    if steps_an_epoch == 0:
        raise UserError(f"--batch_size {args.batch_size} is larger than the data set of {len(paths)} images")
    if args.batch_size % (world_size * args.accumulate):
        raise UserError(f"--batch_size {args.batch_size} is not a multiple of {world_size} processes times "
                        f"--accumulate {args.accumulate}")
    if args.batch_size == args.accumulate:
        raise UserError(f"--accumulate {args.accumulate} leaves one image a part: BatchNorm needs two")
    prior = make_prior(args, labels)
    lr, weight_decay, momentum = schedules(args, steps_an_epoch)
    model = make_model(args, prior).to(device)
    optimizer = make_optimizer(model, device)
    state = load_checkpoint(args.out)
    step, usage, unreadable = 0, torch.zeros_like(model.prior), Unreadable(paths)
    torch.manual_seed(args.seed + 1_000_003 * (rank + 1))
    this_run = {"images": len(paths), "processes": world_size,
                **{name: getattr(args, name) for name in SETTINGS}}
    if state is not None:
        for name, value in this_run.items():
            if state["settings"].get(name) != value:
                raise UserError(f"{args.out} holds a checkpoint of another run: {name} was "
                                f"{state['settings'].get(name)}, is {value}; choose another --out")
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step, unreadable.known = state["step"], set(state["unreadable"])
        usage.copy_(state["usage"])
    if len(set(gather(step))) > 1:
        raise UserError(f"--out {args.out} must be one folder that all machines share")
    stop = len(lr) if until is None else min(until, len(lr))
    log = Log(args, rank, step, len(lr), steps_an_epoch)
    log.say(f"{len(paths)} images, {len(labels.unique())} classes, prior {args.prior} over {len(prior)} prototypes, "
            f"{args.model}, {device.type} x {world_size}, torch {torch.__version__}"
            + (f"; going on after step {step}" if step else ""))

    if args.checkpoint_activations:
        for block in model.encoder.blocks:
            block.forward = functools.partial(torch.utils.checkpoint.checkpoint, block.forward, use_reentrant=False)
    if args.compile:
        if args.checkpoint_activations:  # torch 2.4 cannot split such graphs for DDP
            torch._dynamo.config.optimize_ddp = False
        compile_encoders(model)
    parallel = model
    if world_size > 1:
        parallel = nn.parallel.DistributedDataParallel(model, [device] if device.type == "cuda" else None)
    signals = Signals(world_size)
    saved, first_bad = step, torch.full((), math.inf, device=device)
    batches = Batches(len(paths), args.batch_size, step, stop, rank=rank, world_size=world_size, seed=args.seed)
    if state is not None:
        restore_random(state["random"][rank], device)

    def finish_epoch(epoch):
        began = time.perf_counter()
        if validation and (epoch % args.eval_every == 0 or step == len(lr)):
            evaluate(args, model.target_encoder, training, validation, rank, world_size, device, epoch)
        if rank == 0 and step:
            encoder = {name: value.cpu() for name, value in model.target_encoder.state_dict().items()}
            write_whole(args.out / "encoder.pt", functools.partial(torch.save, encoder))
            plot_training(args.out)
            plot_prototypes(args.out, usage.cpu(), prior, args.prior)
        log.skip(time.perf_counter() - began)

    def stop_if_not_finite():  # p_bar is that of all ranks: what is not finite in one is not in any
        if first_bad.isfinite():
            last = f"the last good checkpoint is {args.out / 'checkpoint.pt'}, of step {saved}"
            raise UserError(f"loss or gradient is not finite since step {int(first_bad)}; "
                            f"{last if saved else 'there is no checkpoint yet'}")

    def save():
        stop_if_not_finite()
        unreadable.add(sum(gather(sorted(unreadable.known)), []), report=False)  # other ranks have named theirs
        states = gather(random_state(device))
        if rank == 0:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step, "usage": usage,
                     "random": states, "unreadable": sorted(unreadable.known), "settings": this_run}
            write_whole(args.out / "checkpoint.pt", functools.partial(torch.save, state),
                        previous=args.out / "checkpoint_previous.pt")
        gather(None)  # torchrun gives the others 30 s once a process has ended: none before the file is whole

    if step % steps_an_epoch == 0:  # epoch 0: random weights; another: its checkpoint may be all there is of it
        finish_epoch(step // steps_an_epoch)
    with contextlib.closing(load(Images(paths, args.storage_size), batches, args.workers)) as batches:
        began = time.perf_counter()
        for pixels, sizes, _, bad in batches:
            waited = time.perf_counter() - began
            unreadable.add(bad)
            optimizer.param_groups[0]["lr"] = optimizer.param_groups[1]["lr"] = float(lr[step])
            optimizer.param_groups[0]["weight_decay"] = float(weight_decay[step])
            terms = optimise(parallel, optimizer, args, pixels.to(device, non_blocking=True),
                             sizes.to(device, non_blocking=True), device)
            model.update_target(float(momentum[step]))
            step += 1
            usage.lerp_(terms["mean_prediction"], max(0.01, 1 / step))
            fine = (terms["loss"] + terms["norm"]).isfinite()
            first_bad = torch.where(fine | first_bad.isfinite(), first_bad, step)
            log.add(step, terms, waited, float(lr[step - 1]))
            if log.due(step):
                stop_if_not_finite()
            stopped, end_of_epoch = signals.received(), step % steps_an_epoch == 0
            if stopped or end_of_epoch or step % args.save_every == 0 or step == stop:
                save()
                saved = step
            if stopped:
                raise KeyboardInterrupt
            if end_of_epoch:
                finish_epoch(step // steps_an_epoch)
            began = time.perf_counter()
    return step


class Signals:
    """Remembers SIGTERM and Ctrl-C until the step is done; all ranks learn of what one received, without a GPU."""

    def __init__(self, world_size):
        self.flag = False
        self.group = dist.new_group(backend="gloo") if world_size > 1 else None
        for name in (signal.SIGTERM, signal.SIGINT):
            signal.signal(name, lambda *_: setattr(self, "flag", True))

    def received(self):
        flag = torch.tensor(float(self.flag))  # what comes during the exchange counts at the next step, for all
        if self.group is not None:
            dist.all_reduce(flag, dist.ReduceOp.MAX, group=self.group)
        return bool(flag)


def append(file, line):
    """Add a dictionary to a file of json lines."""
    try:
        with open(file, "a") as opened:
            opened.write(json.dumps(line) + "\n")
    except OSError as error:
        raise UserError(f"cannot write {file}: {error.strerror}") from None


def read_lines(file):
    """The whole lines of a file of json lines, a list of dictionaries; none if there is no file."""
    lines = file.read_text().splitlines(True) if file.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


class Log:
    """Rank 0: an aligned line every args.log_every steps, the same in metrics.jsonl. No value leaves the device between
    lines; so on CUDA the time spent waiting for data, as the CPU sees it, is an upper bound: the GPU may be busy."""

    def __init__(self, args, rank, step, steps, steps_an_epoch):
        self.args, self.active, self.steps, self.steps_an_epoch = args, rank == 0, steps, steps_an_epoch
        self.file = args.out / "metrics.jsonl"
        self.began, self.since, self.first, self.header = time.perf_counter(), step, step, False
        self.sums, self.waited = 0, 0.0
        self.last = self.began
        for file, key, last in (("metrics.jsonl", "step", step),
                                ("evaluation.jsonl", "epoch", math.ceil(step / steps_an_epoch) - 1)):
            if self.active:  # what comes after the checkpoint will be written again
                lines = read_lines(args.out / file)
                kept = "".join(json.dumps(line) + "\n" for line in lines if line[key] <= last)
                write_whole(args.out / file, lambda temporary: temporary.write_text(kept))

    def say(self, text):
        if self.active:
            print(text, flush=True)

    def skip(self, seconds):
        """Leave an evaluation out of images/s; the one before the first line out of the time left, too."""
        self.last += seconds
        self.began += seconds if self.since == self.first else 0

    def due(self, step):
        return step % self.args.log_every == 0 or step == self.steps

    def add(self, step, terms, waited, lr):
        self.sums = self.sums + torch.stack([terms[name] for name in TERMS])
        self.waited += waited
        if not self.due(step):
            return
        count = step - self.since
        values = dict(zip(TERMS, (self.sums / count).tolist()))
        now = time.perf_counter()
        line = {"step": step, "epoch": step / self.steps_an_epoch, **values, "lr": lr,
                "images_per_second": count * self.args.batch_size / (now - self.last),
                "waiting": self.waited / (now - self.last)}
        left = (now - self.began) / (step - self.first) * (self.steps - step)
        if not self.header:
            self.say(f"{'step':>8} {'epoch':>7} {'loss':>8} {'CE':>8} {'KL':>8} {'eff.':>7} {'lr':>9} {'images/s':>9} "
                     f"{'waiting':>8} {'left':>9}")
            self.header = True
        self.say(f"{step:>8} {line['epoch']:>7.2f} {values['loss']:>8.4f} {values['cross_entropy']:>8.4f} "
                 f"{values['prior_kl']:>8.4f} {values['effective_prototypes']:>7.1f} {lr:>9.2e} "
                 f"{line['images_per_second']:>9.1f} {line['waiting']:>8.1%} "
                 f"{int(left // 3600):>3}:{int(left // 60 % 60):02}:{int(left % 60):02}")
        if self.active and math.isfinite(values["loss"]):
            append(self.file, line)
        self.sums, self.waited, self.since, self.last = 0, 0.0, step, now


# ---- Evaluation on frozen features -----------------------------------------------------------------------------------


@torch.no_grad()
def extract(args, encoder, split, rank, world_size, device):
    """Features (N, d), float32 on the device, and labels (N,) of a split: the centre crop of every readable image."""
    paths, labels = split
    mine = list(range(rank, len(paths), world_size))
    chunks = [mine[i : i + 256] for i in range(0, len(mine), 256)]
    features, indices = [torch.empty(0, encoder.embed_dim)], [torch.empty(0, dtype=torch.long)]
    for pixels, sizes, index, _ in load(Images(paths, args.storage_size), chunks, args.workers):
        images = pixels.to(device).permute(0, 3, 1, 2).float() / 255
        images = pmsn.resized_crop(images, centre_boxes(sizes.to(device), args.storage_size), args.image_size)
        images = torchvision.transforms.functional.normalize(images, MEAN, STD)
        with autocast(args, device):
            features.append(encoder.forward(images).float().cpu())  # not compiled: other shapes, few batches
        indices.append(index)
    parts = gather((torch.cat(features), torch.cat(indices)))
    features, indices = (torch.cat(x) for x in zip(*parts))
    indices, first = np.unique(indices.numpy(), return_index=True)  # in order, without stand-ins for the unreadable
    return features[first].to(device), labels[indices].to(device)


def centre_boxes(sizes, storage_size, share=224 / 256):
    """Boxes (B, 4) in the stretched image of the centre square, 7/8 of the shorter side of the original."""
    side = share * sizes.min(dim=1, keepdim=True).values * storage_size / sizes  # (B, 2) height, width
    return torch.cat([(storage_size - side) / 2, side], dim=1)


def evaluate(args, encoder, training, validation, rank, world_size, device, epoch):
    """Weighted k-NN and linear probe on target features, overall and by the number of training images of a class."""
    with fork_random(device):
        encoder.eval()
        features, labels = extract(args, encoder, training, rank, world_size, device)
        test_features, test_labels = extract(args, encoder, validation, rank, world_size, device)
        encoder.train()
        counts = torch.bincount(labels, minlength=int(test_labels.max()) + 1)[test_labels]
        groups = {"all": counts >= 0, **{name: (counts >= low) & (counts <= high)
                                         for name, (low, high) in SHOTS.items()}}
        predictions = {"knn": pmsn.knn_predictions(features, labels, test_features, k=min(20, len(features))),
                       "linear": linear_probe(features, labels, test_features, args.seed)}
        accuracy = {method: {name: (found == test_labels)[group].cpu().double().mean().item()
                             for name, group in groups.items() if group.any()}
                    for method, found in predictions.items()}
    result = {"epoch": epoch, **accuracy}
    if rank == 0:
        append(args.out / "evaluation.jsonl", result)
        for name, values in (("k-NN", accuracy["knn"]), ("linear probe", accuracy["linear"])):
            print(f"epoch {epoch:>4} {name:<13}" + "".join(f" {group} {value:6.3f}" for group, value in
                                                           values.items()), flush=True)
    return result


def linear_probe(features, labels, test_features, seed, epochs=30, batch_size=256, lr=3e-3):
    """Predictions (Q,) of softmax regression on standardised features: AdamW, cosine learning rate, `epochs` passes or
    1,000 steps, whichever is more."""
    deviation, mean = torch.std_mean(features, dim=0)
    features, test_features = ((x - mean) / (deviation + 1e-6) for x in (features, test_features))
    layer = nn.Linear(features.shape[1], int(labels.max()) + 1, device=features.device)
    nn.init.zeros_(layer.weight), nn.init.zeros_(layer.bias)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=lr, weight_decay=1e-2)
    generator = torch.Generator().manual_seed(seed)
    epochs = max(epochs, math.ceil(1000 * batch_size / len(features)))
    steps = epochs * math.ceil(len(features) / batch_size)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(epochs):
        for batch in torch.randperm(len(features), generator=generator).to(features.device).split(batch_size):
            optimizer.zero_grad()
            F.cross_entropy(layer(features[batch]), labels[batch]).backward()
            optimizer.step()
            scheduler.step()
    with torch.no_grad():
        return torch.cat([layer(x).argmax(dim=1) for x in test_features.split(8192)])


# ---- Figures ---------------------------------------------------------------------------------------------------------


def save_figure(figure, path):
    write_whole(path, lambda temporary: figure.savefig(temporary, format="png", dpi=120))
    plt.close(figure)


def plot_training(out):
    """Curves of metrics.jsonl, and of evaluation.jsonl where there is one."""
    lines, evaluations = read_lines(out / "metrics.jsonl"), read_lines(out / "evaluation.jsonl")
    titles = {"loss": "loss (nats)", "cross_entropy": "cross-entropy (nats)",
              "prior_kl": "KL(mean prediction || prior) (nats)", "effective_prototypes": "effective prototypes"}
    figure, axes = plt.subplots(1, 5, figsize=(17, 3.4), layout="constrained")
    for ax, (name, title) in zip(axes, titles.items()):
        ax.plot([line["epoch"] for line in lines], [line[name] for line in lines], color="0.2")
        ax.set(title=title, xlabel="epoch")
    for name, title in (("knn", "k-NN"), ("linear", "linear probe")):
        axes[4].plot([e["epoch"] for e in evaluations], [e[name]["all"] for e in evaluations], "o-", label=title)
    axes[4].set(title="accuracy on validation images", xlabel="epoch", ylim=(0, 1))
    if evaluations:
        axes[4].legend(frameon=False)
    save_figure(figure, out / "training.png")


def plot_prototypes(out, usage, prior, name):
    """Share of the images that each prototype gets (moving average of p_bar) against the prior."""
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    rank = np.arange(1, len(prior) + 1)
    axes.plot(rank, usage.clamp_min(1e-8), ".", color=UNIFORM if name == "uniform" else POWER_LAW,
              label="usage (mean prediction, last 100 steps)")
    axes.plot(rank, prior, "k--", label=f"prior ({name})")
    axes.set(xscale="log", yscale="log", xlabel="prototype", ylabel="share of the images",
             title=f"KL(usage || prior) = {(usage * (usage / prior).log()).nansum():.3f} nats")
    axes.legend(frameon=False)
    save_figure(figure, out / "prototypes.png")


# ---- Made images, for --quick, --benchmark and tests -----------------------------------------------------------------


def make_images(folder, counts, size, layout="folders", seed=0):
    """JPEGs of gratings, a colour and direction for each class, counts[c] of class c; a tenth more, at least 2, for
    validation. `layout` is "folders" (train/ and val/) or "inat" (train_val2018/ and two json files)."""
    generator = np.random.default_rng(seed)
    splits = {"train": list(counts), "val": [max(2, count // 10) for count in counts]}
    for split, numbers in splits.items():
        content = {"images": [], "annotations": [], "categories": [{"id": 10 + c} for c in range(len(counts))]}
        for c, count in enumerate(numbers):
            within = f"train_val2018/Made/{c:04}" if layout == "inat" else f"{split}/class{c:04}"
            (folder / within).mkdir(parents=True, exist_ok=True)
            for i in range(count):
                h, w = (int(size * generator.uniform(0.75, 1)) for _ in range(2))
                y, x = np.mgrid[:h, :w]
                angle, phase = np.pi * c / len(counts) + generator.normal() * 0.1, generator.uniform(0, 6)
                wave = np.sin(phase + (x * np.cos(angle) + y * np.sin(angle)) * 30 / size)[..., None]
                colour = np.cos(np.array([0, 2, 4]) + 2.4 * c) * 60
                pixels = 128 + colour + 50 * wave + generator.normal(size=(h, w, 3)) * 10
                name = f"{within}/{split}{i:05}.jpg"
                Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / name, quality=90)
                number = len(content["images"])
                content["images"].append({"id": number, "file_name": name})
                content["annotations"].append({"image_id": number, "category_id": 10 + c})
        if layout == "inat":
            (folder / f"{split}2018.json").write_text(json.dumps(content))
    return folder


def quick(args, device):
    """The whole path on made images: train, stop in the middle, go on from the checkpoint, evaluate, figures."""
    counts = [120, 60, 40, 30, 24, 20, 17, 15]
    for name in ("checkpoint.pt", "checkpoint_previous.pt"):
        (args.out / name).unlink(missing_ok=True)
    with tempfile.TemporaryDirectory(dir=args.out) as folder:
        args.data = make_images(Path(folder), counts, 64)
        half = args.epochs * (sum(counts) // args.batch_size) // 2
        train(args, 0, 1, device, until=half)
        print(f"stopped after step {half}, as if killed; started again:")
        return train(args, 0, 1, device)


# ---- Benchmark -------------------------------------------------------------------------------------------------------


def blur_pil(image):
    return image.filter(ImageFilter.GaussianBlur(np.random.uniform(0.1, 2.0)))


class UsualImages(Dataset):
    """The usual pipeline: every view of an image made by torchvision from PIL, in the worker."""

    def __init__(self, paths, args):
        t = torchvision.transforms
        jitter, blur = t.RandomApply([t.ColorJitter(0.4, 0.4, 0.4, 0.1)], 0.8), t.RandomApply([blur_pil], 0.5)

        def views(size, scale):
            return t.Compose([t.RandomResizedCrop(size, scale), t.RandomHorizontalFlip(), jitter,
                              t.RandomGrayscale(0.2), blur, t.ToTensor(), t.Normalize(MEAN, STD)])

        self.paths, self.focal_views = paths, args.focal_views
        self.large, self.small = views(args.image_size, (0.3, 1.0)), views(args.focal_size, (0.05, 0.3))

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, index):
        with Image.open(self.paths[index]) as image:
            image = image.convert("RGB")
        return [self.large(image), self.large(image)], [self.small(image) for _ in range(self.focal_views)]


def usual_collate(samples):
    large, small = (list(zip(*views)) for views in zip(*samples))  # by view, then by image
    focal = [torch.cat([torch.stack(view) for view in small])] if small else []
    return [torch.stack(large[0]), torch.stack(large[1]), *focal]


def milliseconds(function, repeat=5):
    """Processor time of the best of several calls."""
    best = math.inf
    for _ in range(repeat):
        began = time.process_time()
        function()
        best = min(best, time.process_time() - began)
    return 1000 * best


def benchmark(args, device):
    """Prints a table: what an image costs the workers, and with a CUDA GPU what a step costs."""
    threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as folder:
        if args.data is None:
            make_images(Path(folder), [64], 450)
        paths = find_images(args.data or folder)[0][0]
        torch.set_num_threads(1)
        usual = UsualImages(paths, args)
        some = [paths[i % len(paths)] for i in range(32)]
        stored = [decode(path, args.storage_size) for path in some]
        batch = [torch.stack(x) for x in zip(*stored)]
        rows = {"usual pipeline, a worker": milliseconds(lambda: [usual[i % len(paths)] for i in range(32)], 2) / 32,
                "  decoding alone": milliseconds(lambda: [Image.open(p).convert("RGB") for p in some]) / 32,
                f"ours, a worker (to {args.storage_size} px)": milliseconds(
                    lambda: [decode(path, args.storage_size) for path in some]) / 32,
                "ours, multi_crop on the CPU": milliseconds(lambda: make_views(args, *batch), 3) / 32}
        torch.set_num_threads(threads)
        print(f"one core, {1 + 1 + args.focal_views} views an image, {len(paths)} images"
              f"{' made here' if args.data is None else ''}")
        for name, value in rows.items():
            print(f"  {name:<36} {value:>8.2f} ms an image {value / rows['usual pipeline, a worker']:>6.2f}")
        if device.type != "cuda":
            print("no CUDA GPU here: images/s, memory, share of the matrix rate and waiting time are not measured")
            return
        benchmark_device(args, device, paths)


def benchmark_device(args, device, paths):
    """Images/s of the step alone and from files by both pipelines, share of the measured bf16 matrix rate, memory."""
    from torch.utils.flop_counter import FlopCounterMode

    size = min(args.batch_size, 256)  # the usual pipeline's batches are large: 2.3 MB an image
    workers = max(1, args.workers)
    model = make_model(args, pmsn.power_law_prior(args.prototypes, args.exponent)).to(device)
    optimizer = make_optimizer(model, device)
    print(f"{torch.cuda.get_device_name(device)}, {workers} workers, {args.model}, batch {size}, "
          f"{args.precision}, compile {args.compile}, torch {torch.__version__}")

    def step(views):
        optimizer.zero_grad()
        with autocast(args, device):
            loss, _ = model(views)
        loss.backward()
        optimizer.step()
        model.update_target(0.996)

    def rate(batches, make, warmup, count):  # images/s
        for i, batch in zip(range(warmup + count), batches):
            step(make(batch))
            if i + 1 == warmup:  # what was decoded before is used up
                torch.cuda.synchronize()
                began = time.perf_counter()
        torch.cuda.synchronize()
        return count * size / (time.perf_counter() - began)

    def to_device(tensors):
        return [x.to(device, non_blocking=True) for x in tensors]

    images = Images(paths, args.storage_size)
    pixels, sizes, _, _ = collate([images[i % len(paths)] for i in range(size)])
    pixels, sizes = to_device([pixels, sizes])
    counter = FlopCounterMode(display=False)
    with counter:
        step(make_views(args, pixels[:8], sizes[:8]))
    flops = counter.get_total_flops() / 8
    if args.compile:
        compile_encoders(model)
    a = torch.randn(8192, 8192, device=device, dtype=torch.bfloat16)
    for i in range(150):
        if i == 50:
            torch.cuda.synchronize()
            began = time.perf_counter()
        a @ a
    torch.cuda.synchronize()
    matrix = 100 * 2 * 8192**3 / (time.perf_counter() - began)

    views = make_views(args, pixels, sizes)
    alone = rate([views] * 25, lambda v: v, 5, 20)
    print(f"  step alone                  {alone:>9.0f} images/s, {flops * alone / 1e12:.0f} TFLOP/s, "
          f"{flops * alone / matrix:.0%} of the matrix rate of {matrix / 1e12:.0f}")
    del views
    torch.cuda.reset_peak_memory_stats()
    with_views = rate([None] * 25, lambda _: make_views(args, pixels, sizes), 5, 20)
    print(f"  step with multi_crop        {with_views:>9.0f} images/s, memory "
          f"{torch.cuda.max_memory_allocated() / 2**30:.1f} GiB")
    warmup, count = 3 * workers, 4 * workers  # workers hold up to two batches each, and one in the making
    plan = [[(i * size + j) % len(paths) for j in range(size)] for i in range(warmup + count)]
    ours = rate(load(images, plan, workers), lambda b: make_views(args, *to_device(b[:2])), warmup, count)
    print(f"  ours, from files            {ours:>9.0f} images/s, waiting for data {max(0, 1 - ours / with_views):.1%}; "
          f"300 epochs of iNat18 in batches of {size}: {300 * 437_513 / ours / 3600:.0f} hours")
    loader = DataLoader(UsualImages(paths, args), batch_sampler=plan, num_workers=workers, pin_memory=True,
                        collate_fn=usual_collate, prefetch_factor=1)
    usual = rate(loader, to_device, warmup, count)
    print(f"  usual pipeline, from files  {usual:>9.0f} images/s, waiting for data {max(0, 1 - usual / alone):.1%}; "
          f"ours is {ours / usual:.2f} times that")


# ---- Command line ----------------------------------------------------------------------------------------------------


def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("--data", type=Path, help="iNat18, or a folder of class folders, or of `train` and `val`")
    add("--long_tail", type=float, metavar="EXPONENT", help="train on a subset with power-law class frequencies")
    add("--out", type=Path, help="checkpoints, figures and logs (default: runs/inat; with --quick runs/quick; with "
        "--eval the folder of the checkpoint)")
    add("--model", default="vit_small", choices=("vit_micro", "vit_tiny", "vit_small", "vit_base"),
        help="default: vit_small")
    add("--prior", default="power_law", choices=("power_law", "uniform", "classes"), help="uniform is MSN; classes: "
        "one prototype a class, its share of the images (default: power_law)")
    add("--exponent", type=float, default=0.25, help="of the power law (default: .25)")
    add("--prototypes", type=int, default=1024, help="default: 1024")
    add("--epochs", type=int, default=300, help="default: 300")
    add("--warmup", type=int, default=15, help="epochs of rising learning rate (default: 15)")
    add("--batch_size", type=int, default=1024, help="images a step, of all processes (default: 1024)")
    add("--accumulate", type=int, default=1, help="parts that a process takes its share of the batch in (default: 1)")
    add("--lr", type=float, default=1e-3, help="peak learning rate, for the global batch (default: .001)")
    add("--momentum", type=float, default=0.996, help="of the target at the start; it rises to 1 (default: .996)")
    add("--clip", type=float, default=3.0, help="largest norm of the gradient; 0: any (default: 3)")
    add("--image_size", type=int, default=224, help="pixels of target and masked views (default: 224)")
    add("--focal_size", type=int, default=96, help="pixels of focal views (default: 96)")
    add("--focal_views", type=int, default=10, help="focal views an image (default: 10)")
    add("--patch_size", type=int, default=16, help="default: 16")
    add("--patch_drop", type=float, default=0.15, help="share of patches that a masked view loses (default: .15)")
    add("--sinkhorn_iterations", type=int, default=0, help="onto the prior, for the targets (default: 0, off)")
    add("--relative_sharpening", action="store_true", help="relative to the prior; for steep ones (default: off)")
    add("--storage_size", type=int, default=320, help="pixels at which workers hand images over (default: 320)")
    add("--workers", type=int, help="decoding processes a device (default: its share of the cores less 1, up to 16)")
    add("--precision", choices=("bf16", "fp32"), help="default: bf16 on CUDA, fp32 elsewhere")
    add("--compile", action=argparse.BooleanOptionalAction, help="torch.compile (default: on CUDA)")
    add("--checkpoint_activations", action="store_true", help="less memory, more time")
    add("--log_every", type=int, default=20, help="steps between lines (default: 20)")
    add("--save_every", type=int, default=500, help="steps between checkpoints, beside every epoch's (default: 500)")
    add("--eval_every", type=int, default=10, help="epochs between evaluations, beside the last (default: 10)")
    add("--eval", type=Path, metavar="CHECKPOINT", help="evaluate a checkpoint of these options, train nothing")
    add("--seed", type=int, default=0, help="default: 0")
    add("--quick", action="store_true", help="the whole path on made images, under 90 seconds on two cores")
    add("--benchmark", action="store_true", help="where the time goes, on --data or on made images")
    args = parser.parse_args(argv)
    args.out = args.out or (args.eval.parent if args.eval else Path("runs/quick" if args.quick else "runs/inat"))
    if args.quick:
        args.model, args.image_size, args.focal_size, args.patch_size = "vit_micro", 32, 16, 4
        args.storage_size, args.focal_views, args.prototypes = 64, 2, 16
        args.batch_size, args.epochs, args.warmup, args.log_every, args.eval_every = 64, 4, 1, 2, 2
    if args.workers is None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 2
        args.workers = max(1, min(16, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)) - 1))
    cuda = torch.cuda.is_available()
    args.precision = args.precision or ("bf16" if cuda else "fp32")
    args.compile = cuda if args.compile is None else args.compile
    return args


def check(args):
    """UserError for what is wrong with the arguments."""
    if args.data is None and not (args.quick or args.benchmark):
        raise UserError("--data is needed: iNat18 or a folder of class folders; --quick makes its own images")
    if args.eval and not args.eval.is_file():
        raise UserError(f"{args.eval}: no such checkpoint")
    if args.benchmark and (args.accumulate > 1 or args.checkpoint_activations):
        raise UserError("--benchmark measures whole batches: without --accumulate and --checkpoint_activations")
    if args.long_tail is not None and not 0 <= args.long_tail < 10:
        raise UserError(f"--long_tail must be in 0..10, got {args.long_tail}")
    for name, low, high in (("epochs", 1, None), ("warmup", 0, None), ("batch_size", 2, None), ("accumulate", 1, None),
                            ("image_size", 8, None), ("focal_size", 8, None), ("focal_views", 0, None),
                            ("patch_size", 1, None), ("patch_drop", 0, 0.99), ("sinkhorn_iterations", 0, None),
                            ("storage_size", 8, None), ("workers", 0, None), ("log_every", 1, None),
                            ("save_every", 1, None), ("eval_every", 1, None), ("momentum", 0, 1), ("lr", 0, None),
                            ("clip", 0, None), ("seed", 0, None)):
        value = getattr(args, name)
        if not (low <= value and (high is None or value <= high)):
            allowed = f"at least {low}" if high is None else f"in {low}..{high}"
            raise UserError(f"--{name} must be {allowed}, got {value}")
    for name in ("image_size", "focal_size"):
        if getattr(args, name) % args.patch_size:
            raise UserError(f"--{name} {getattr(args, name)} is not a multiple of --patch_size {args.patch_size}")
    try:
        pmsn.power_law_prior(args.prototypes, args.exponent)
    except ValueError as error:
        raise UserError(str(error)) from None
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=args.out).close()
    except OSError as error:
        raise UserError(f"cannot write to --out {args.out}: {error.strerror}") from None


def main(argv=None):
    args = parse(argv)
    check(args)
    rank, world_size, device = start_processes()
    if world_size > 1 and (args.quick or args.benchmark):
        raise UserError("--quick and --benchmark run in one process, without torchrun")
    if args.benchmark:
        benchmark(args, device)
    elif args.quick:
        quick(args, device)
    elif args.eval:
        training, validation = find_images(args.data, args.long_tail)
        if validation is None:
            raise UserError(f"--data {args.data} has no validation images: a folder `val` beside `train`")
        encoder, state = make_encoder(args), read_checkpoint(args.eval)
        epoch = state["step"] // (state["settings"]["images"] // state["settings"]["batch_size"])
        try:
            encoder.load_state_dict({name.removeprefix("target_encoder."): value
                                     for name, value in state["model"].items() if name.startswith("target_encoder.")})
        except RuntimeError:
            raise UserError(f"{args.eval} is of another network than --model {args.model} with these sizes") from None
        evaluate(args, encoder.to(device), training, validation, rank, world_size, device, epoch)
    else:
        train(args, rank, world_size, device)
    if rank == 0 and not args.benchmark:
        print(f"{args.out}: " + " ".join(sorted(path.name for path in args.out.iterdir() if path.is_file())))
    if dist.is_initialized():
        dist.destroy_process_group()


def give_up(message, status):
    """Print one line and end this process and its workers, at once where other ranks may wait for it."""
    print(f"train_inat.py: {message}", file=sys.stderr, flush=True)
    for worker in torch.multiprocessing.active_children():
        worker.kill()
    if dist.is_initialized():
        sys.stdout.flush()
        os._exit(status)
    sys.exit(status)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        give_up(error, 2)
    except torch.cuda.OutOfMemoryError:
        give_up("out of GPU memory: try --accumulate 2, 4, ... or --checkpoint_activations; with --benchmark a smaller "
                "--batch_size", 2)
    except KeyboardInterrupt:
        give_up("stopped; the same command goes on from the checkpoint", 130)
