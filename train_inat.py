"""PMSN on iNaturalist 2018 or on your own long-tailed images (paper, section 5.2).

    python train_inat.py --data PATH --checkpoint_activations   # one GPU, or a CPU
    torchrun --nproc_per_node 8 train_inat.py --data PATH       # eight GPUs of one machine
    python train_inat.py --quick                                # all of it in a minute, on a CPU

PATH is iNaturalist 2018 as it is distributed (train2018.json, val2018.json, train_val2018/), or a
folder with one folder of images per class, or a folder with two such folders, train and val.
Labels serve the evaluation, --prior classes, --long_tail and --classes_per_batch, not the loss.

--out gets checkpoint.pt after every epoch, and the same command continues from it. Everything
random in an epoch depends only on seed, epoch, rank and --workers: a killed run repeats its
epoch, bit for bit on CPUs. --out also gets encoder.pt (for timm), metrics.jsonl and two figures.
"""

import argparse
import fcntl
import functools
import json
import math
import os
import sys
import time
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.distributed as dist
import torchvision
from PIL import Image, ImageOps
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import BatchSampler, DataLoader, Dataset, DistributedSampler, Subset
from torchvision.transforms import v2

import pmsn

MODELS = {"vit_micro": (96, 4, 3), "vit_tiny": (192, 12, 3),  # embed_dim, depth, num_heads
          "vit_small": (384, 12, 6), "vit_base": (768, 12, 12)}
TERMS = ("loss", "cross_entropy", "prior_kl", "effective_prototypes")
# A run can be continued with other values of these flags.
FREE_FLAGS = ("data", "out", "workers", "eval_every", "compile", "checkpoint_activations")

# ---- Data ----------------------------------------------------------------------------------------
def find_images(data):
    """(paths, labels (N,)) of the training images, and of the validation images or None."""
    as_json = (data / "train2018.json").exists()
    read, ending = (read_json, "2018.json") if as_json else (read_folder, "")
    train, val = data / f"train{ending}", data / f"val{ending}"
    splits = [read(train if train.exists() else data), *([read(val)] if val.exists() else [])]
    index = {name: i for i, name in enumerate(sorted(set(splits[0][1])))}
    splits = [(paths, torch.tensor([index[c] for c in classes])) for paths, classes in splits]
    return splits[0], splits[1] if val.exists() else None

def read_json(file):
    content = json.loads(file.read_text())
    category = {a["image_id"]: a["category_id"] for a in content["annotations"]}
    paths = [str(file.parent / image["file_name"]) for image in content["images"]]
    return paths, [category[image["id"]] for image in content["images"]]

def read_folder(folder):
    def is_image(path):
        return torchvision.datasets.folder.is_image_file(path) and Path(path).name[0] != "."
    images = torchvision.datasets.ImageFolder(folder, is_valid_file=is_image)
    return [path for path, _ in images.samples], [images.classes[i] for i in images.targets]

def decode(path):
    """An image file as uint8 (3, H, W), turned as its EXIF orientation says."""
    with Image.open(path) as image:
        image = ImageOps.exif_transpose(image).convert("RGB")
    return v2.functional.pil_to_tensor(image)

class Images(Dataset):
    """Items (transformed image, index, readable). The next image replaces an unreadable one."""

    def __init__(self, paths, transform, read=decode):
        self.paths = np.array(paths)  # Workers share an array, but they would copy a list.
        self.transform, self.read = transform, read

    def __getitem__(self, index):
        for shift in range(min(100, len(self.paths))):
            path = str(self.paths[(index + shift) % len(self.paths)])
            try:
                return self.transform(self.read(path)), index, shift == 0
            except Exception as error:  # A damaged file leads to many kinds of errors.
                reason = f"{path}: {error}"
        raise OSError(f"no image can be read, for example {reason}")

def name_unreadable(paths, indices, unreadable):
    """Name unreadable images once and add them to the set. More than 1% end the run."""
    for path in sorted({paths[i] for i in indices.tolist()} - unreadable):
        print(f"unreadable image: {path}", file=sys.stderr, flush=True)
        unreadable.add(path)
    if len(unreadable) > max(1, len(paths) // 100):
        fail(f"{len(unreadable)} of {len(paths)} images cannot be read, which is more than 1%")

# ---- Recipe of MSN -------------------------------------------------------------------------------
def make_optimizer(model):
    """AdamW, and the parameters whose gradient is clipped: those of encoder and head."""
    network = [*model.encoder.parameters(), *model.head.parameters()]
    # Biases, norms and prototypes have no weight decay.
    decayed = {"params": [p for p in network if p.ndim > 1]}
    others = [p for p in network if p.ndim <= 1] + [model.prototypes]
    groups = [decayed, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, fused=model.prototypes.is_cuda), network

def schedules(args, steps_per_epoch):
    """Learning rate, weight decay and EMA momentum of every step, (steps,) each."""
    def cosine(start, end, progress):
        return end + (start - end) * (0.5 + 0.5 * np.cos(np.pi * progress))

    steps = args.epochs * steps_per_epoch
    # MSN stretches its schedules to 1.25 times the training, so training ends before they do.
    step, warmup, stretched = np.arange(1, steps + 1), steps // 20, 1.25 * steps
    rising = args.lr * (0.2 + 0.8 * step / max(1, warmup))
    falling = cosine(args.lr, args.lr / 1000, (step - warmup) / (stretched - warmup))
    weight_decay = cosine(0.04, 0.4, step / stretched)
    ema_momentum = args.ema_momentum + (1 - args.ema_momentum) * (step - 1) / stretched
    lr = np.where(step < warmup, rising, falling)
    return lr.tolist(), weight_decay.tolist(), ema_momentum.tolist()

# ---- Evaluation of the frozen target encoder -----------------------------------------------------
def center_crop(size):
    return v2.Compose([v2.Resize(round(size * 256 / 224), antialias=True), v2.CenterCrop(size)])

@torch.no_grad()
def extract(encoder, images, labels, workers, rank, world_size, watch=iter):
    """Features (n, d) and labels (n,) of all readable images. `watch` can print the progress."""
    device = encoder.cls_token.device
    share = Subset(images, range(rank, len(labels), world_size))
    unreadable, found = set(), []
    for crops, index, readable in watch(DataLoader(share, batch_size=256, num_workers=workers)):
        name_unreadable(images.paths, index[~readable], unreadable)
        crops = v2.functional.to_dtype(crops.to(device), torch.float32, scale=True)
        crops = v2.functional.normalize(crops, pmsn.IMAGENET_MEAN, pmsn.IMAGENET_STD)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            features = encoder.forward(crops)  # `forward` is not compiled
        found.append((index[readable], features.float().cpu()[readable]))
    if world_size > 1:
        shares = [None] * world_size
        dist.all_gather_object(shares, found)
        found = sum(shares, [])
    indices, features = [torch.cat(parts) for parts in zip(*found)]
    if len(labels) - len(indices) > max(1, len(labels) // 100):
        fail(f"more than 1% of {len(labels)} images cannot be read")
    indices, order = indices.sort()  # the same order for any number of processes
    return features[order].to(device), labels[indices].to(device)

def accuracies(predicted, test_labels, labels):
    """Accuracy on all classes, and on those with many, medium and few training images."""
    counts = torch.bincount(labels, minlength=int(test_labels.max()) + 1)[test_labels]
    groups = {"all": counts >= 0, "many": counts > 100, "few": counts < 20}
    groups["medium"] = ~(groups["many"] | groups["few"])
    return {group: (predicted == test_labels)[chosen].double().mean().item()
            for group, chosen in groups.items() if chosen.any()}

def evaluate(encoder, training, validation, args, *ranks):
    """Accuracies of k-NN and of the linear probe."""
    (features, labels), (test_features, test_labels) = [
        extract(encoder, Images(paths, center_crop(args.image_size)), labels, args.workers, *ranks)
        for paths, labels in (training, validation)]
    knn = pmsn.knn_predictions(features, labels, test_features, min(20, len(features)))
    linear = pmsn.linear_probe(features, labels, test_features)
    return {f"{classifier}_{group}": accuracy
            for classifier, predicted in (("knn", knn), ("linear", linear))
            for group, accuracy in accuracies(predicted, test_labels, labels).items()}

# ---- Checkpoints and figures ---------------------------------------------------------------------
def fail(message):
    print(f"train_inat.py: error: {message}", file=sys.stderr, flush=True)
    sys.exit(2)

def load(path, settings):
    """The checkpoint of an earlier run with the same settings."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        changed = [name for name in settings if state["settings"].get(name) != settings[name]]
    except Exception as error:  # A damaged file leads to many kinds of errors.
        fail(f"cannot read {path}. If it is damaged, delete it to start again ({error!r})")
    if changed:
        fail(f"{path} has other settings ({', '.join(changed)}). Choose another --out")
    return state

def save(state, out):
    """Write all of --out. The checkpoint comes last: then a kill only repeats the epoch."""
    prefix = "target_encoder."
    encoder = {n.removeprefix(prefix): w for n, w in state["model"].items() if n.startswith(prefix)}
    lines, temporary = [json.dumps(line) + "\n" for line in state["history"]], out / "temporary"
    try:
        torch.save(encoder, out / "encoder.pt")
        (out / "metrics.jsonl").write_text("".join(lines))
        plot(state, out)
        torch.save(state, temporary)
        os.replace(temporary, out / "checkpoint.pt")
    except (OSError, RuntimeError) as error:  # torch.save turns some errors into RuntimeError
        temporary.unlink(missing_ok=True)
        fail(f"cannot write to {out}, is the disk full? ({error})")

def plot(state, out):
    """training.png has the history. prototypes.png compares the last epoch with the prior."""
    figure, axes = plt.subplots(1, 5, figsize=(17, 3.4), layout="constrained")
    for ax, name in [*zip(axes, TERMS), (axes[4], "knn_all"), (axes[4], "linear_all")]:
        lines = [line for line in state["history"] if name in line]
        ax.plot([line["epoch"] for line in lines], [line[name] for line in lines], label=name)
        ax.legend(frameon=False)
    figure.supxlabel("epoch (losses in nats, accuracy on validation images)")
    figure.savefig(out / "training.png", dpi=120)
    usage, prior = state["usage"], state["model"]["prior"].cpu()
    figure, ax = plt.subplots(figsize=(6, 4), layout="constrained")
    ax.loglog(range(1, len(prior) + 1), usage, ".", color="#d1495b", label="mean prediction")
    ax.loglog(range(1, len(prior) + 1), prior, "k--", label="prior")
    ax.set(xlabel="prototype", ylabel="share of the images",
           title=f"KL(use || prior) = {torch.xlogy(usage, usage / prior).sum():.3f} nats")
    ax.legend(frameon=False)
    figure.savefig(out / "prototypes.png", dpi=120)
    plt.close("all")

# ---- Training ------------------------------------------------------------------------------------
def main(argv=None):
    args = parse(argv)
    plt.switch_backend("Agg")  # needs no display
    # torchrun sets these variables for each of its processes.
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    cuda = torch.cuda.is_available()
    device = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if cuda else "cpu")
    if cuda:
        torch.cuda.set_device(device)
    if world_size > 1:
        dist.init_process_group("nccl" if cuda else "gloo")
    seed = 1_000_003 * args.seed  # a distance between seeds, because the epoch is added to them
    # Below 64 pixels, crops are larger and not blurred, as is usual for CIFAR.
    small = args.image_size < 64
    scales = {"rand_scale": (0.4, 1.0), "focal_scale": (0.2, 0.6)} if small else {}
    crop = functools.partial(pmsn.multi_crop, rand_size=args.image_size, focal_size=args.focal_size,
                             focal_views=args.focal_views, **scales)
    try:
        training, validation = find_images(args.data)
        Images(training[0][:5], crop)[0]  # raises OSError if the data set was not unpacked
        paths, labels = training
        if args.long_tail is not None:
            long_tail = pmsn.power_law_prior(len(labels.unique()), args.long_tail)
            kept = pmsn.long_tail_indices(labels, long_tail)
            paths, labels = training = [paths[i] for i in kept], labels[kept]
        counts = torch.bincount(labels)
        power_law = pmsn.power_law_prior(args.prototypes, args.exponent)
        prior = pmsn.class_prior(counts) if args.prior == "classes" else power_law
        sampler = DistributedSampler(labels, world_size, rank, seed=seed, drop_last=True)
        batches = BatchSampler(sampler, args.batch_size // world_size, drop_last=True)
        if args.classes_per_batch:
            sampler = batches = pmsn.ClassBatchSampler(
                labels, args.batch_size, args.classes_per_batch, rank, world_size, args.seed)
        if len(batches) == 0:
            raise ValueError(f"--batch_size {args.batch_size} is more than {len(paths)} images")
    except KeyError as error:
        fail(f"{error} is missing in --data {args.data}, or in its training images")
    except (OSError, ValueError) as error:
        fail(f"{error} (--data {args.data})")
    loader = DataLoader(Images(paths, crop), batch_sampler=batches, num_workers=args.workers,
                        pin_memory=cuda)
    torch.manual_seed(args.seed)
    encoder = pmsn.VisionTransformer(args.image_size, args.patch_size, *MODELS[args.model])
    head = pmsn.projection_head(encoder.embed_dim, 512 if args.model == "vit_micro" else 2048)
    model = pmsn.PMSN(encoder, prior, head=head, patch_drop=args.patch_drop,
                      sinkhorn_iterations=args.sinkhorn_iterations,
                      relative_sharpening=args.relative_sharpening).to(device)
    if cuda and world_size > 1:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    optimizer, clipped = make_optimizer(model)
    lr, weight_decay, ema_momentum = schedules(args, len(loader))
    settings = {name: value for name, value in vars(args).items() if name not in FREE_FLAGS}
    settings.update(processes=world_size, images_per_class=counts.tolist())
    path = args.out / "checkpoint.pt"
    state = [load(path, settings) if rank == 0 and path.exists() else None]
    if world_size > 1:
        dist.broadcast_object_list(state)
    if state[0]:
        model.load_state_dict(state[0]["model"])
        optimizer.load_state_dict(state[0]["optimizer"])
    history, unreadable = state[0]["history"] if state[0] else [], set()
    if args.checkpoint_activations:
        for block in model.encoder.blocks:
            block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
    if args.compile:
        torch._dynamo.config.optimize_ddp = False  # fails on checkpointed blocks
        model.encoder.compile(dynamic=False)
        model.target_encoder.compile(dynamic=False)
    say = functools.partial(print, flush=True) if rank == 0 else lambda *_: None
    say(f"{len(paths)} images, {len(counts)} classes, {args.prior} prior, {len(prior)} prototypes, "
        f"{world_size} x {device.type}, torch {torch.__version__}\n"
        "   epoch     loss       CE       KL    eff.       lr  images/s  hours left")
    for epoch in range(len(history), args.epochs + 1):
        # Everything random in this epoch follows from these two lines.
        torch.manual_seed(seed + epoch * world_size + rank)
        sampler.set_epoch(epoch)
        network = model
        if world_size > 1:
            # DDP changes the order of its sums after its first step. It gets a new wrapper in
            # every epoch, so that a restarted run has the same order as one without a restart.
            network = nn.parallel.DistributedDataParallel(model, [device] if cuda else None)
        line, sums, predictions = {"epoch": epoch}, 0.0, torch.zeros_like(model.prior)
        start = shown = time.time()
        # Epoch 0 has no steps. It evaluates the random weights.
        for i, (crops, index, readable) in enumerate(loader if epoch else (), start=1):
            name_unreadable(paths, index[~readable], unreadable)
            step = (epoch - 1) * len(loader) + i - 1
            optimizer.param_groups[0].update(lr=lr[step], weight_decay=weight_decay[step])
            optimizer.param_groups[1]["lr"] = lr[step]
            crops = [crop.to(device, non_blocking=True) for crop in crops]
            views = pmsn.make_views(crops, blur_p=0.0 if small else 0.5)
            with torch.autocast(device.type, torch.bfloat16, enabled=cuda):
                loss, terms = network(views)
            optimizer.zero_grad()
            loss.backward()
            norm = nn.utils.clip_grad_norm_(clipped, 3.0)
            optimizer.step()
            model.update_target(ema_momentum[step])

            terms["loss"] = loss.detach() + 0 * norm  # 0 * nan is nan: shows a bad gradient too
            sums += torch.stack([terms[name] for name in TERMS])
            predictions += terms["mean_prediction"] / len(loader)
            # The CPU has to wait for values of the GPU, so it reads them once per minute only.
            if i == len(loader) or time.time() - shown > 60:
                shown = time.time()
                means = (sums / i).tolist()
                if not math.isfinite(means[0]):
                    fail(f"loss or gradient is not finite in epoch {epoch}: lower --lr, new --out")
                line.update(zip(TERMS, means))
                speed = i / (shown - start)  # steps per second
                row = "{:8.2f} {:8.4f} {:8.4f} {:8.4f} {:7.1f} {:8.1e} {:9.1f} {:11.2f}"
                say(row.format((step + 1) / len(loader), *means, lr[step], speed * args.batch_size,
                               (len(lr) - step - 1) / speed / 3600))
        if validation and (epoch % args.eval_every == 0 or epoch == args.epochs):
            accuracy = evaluate(model.target_encoder, training, validation, args, rank, world_size)
            say(f"{epoch:8}", *[f"{name} {value:.3f}" for name, value in accuracy.items()])
            line.update(accuracy)
        history.append(line)
        if rank == 0 and epoch > 0:
            save({"model": model.state_dict(), "optimizer": optimizer.state_dict(),
                  "history": history, "usage": predictions.cpu(), "settings": settings}, args.out)
    say(f"{args.out}: checkpoint.pt encoder.pt metrics.jsonl training.png prototypes.png")
    if world_size > 1:
        dist.destroy_process_group()

# ---- Command line --------------------------------------------------------------------------------
def number(kind, low, high=math.inf):
    """An argparse type: a finite number from low to high."""
    def number(text):
        value = kind(text)
        if not low <= value <= high or math.isinf(value):
            raise argparse.ArgumentTypeError(f"must be finite, from {low} to {high}, got {text}")
        return value
    return number

def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--data", type=Path, help="iNaturalist 2018, or a folder with folders of images")
    add("--out", type=Path, help="folder of the run, runs/inat if it is not given")
    add("--model", default="vit_small", choices=MODELS, help="vision transformer")
    add("--patch_size", type=number(int, 1), default=16, help="pixels per side of a patch")
    add("--image_size", type=number(int, 8), default=224, help="pixels of target and masked views")
    add("--focal_size", type=number(int, 9), default=96, help="pixels of focal views")
    add("--focal_views", type=number(int, 0), default=10, help="focal views per image")
    add("--patch_drop", type=number(float, 0, 0.99), default=0.15, help="share of masked patches")
    add("--prior", default="power_law", choices=("power_law", "uniform", "classes"),
        help="uniform is MSN (add --sinkhorn_iterations 3); classes has one prototype per class")
    add("--exponent", type=number(float, 0), default=0.25, help="of the power law; 0 is uniform")
    add("--prototypes", type=number(int, 2), default=1024, help="number of prototypes")
    add("--sinkhorn_iterations", type=number(int, 0), default=0, help="see pmsn.sinkhorn")
    add("--relative_sharpening", action="store_true", help="for exponents near 1: pmsn.sharpen")
    add("--long_tail", type=number(float, 0, 10), help="exponent of classes, by dropping images")
    add("--classes_per_batch", type=number(int, 1), help="few classes per batch (paper, table 1)")
    add("--epochs", type=number(int, 1), default=300, help="the first twentieth is warm-up")
    add("--batch_size", type=number(int, 2), default=1024, help="images per step on all GPUs")
    add("--lr", type=number(float, 0), default=1e-3, help="highest learning rate")
    add("--ema_momentum", type=number(float, 0, 1), default=0.996, help="at the start; ends near 1")
    add("--workers", type=number(int, 0), default=8, help="processes per device that load images")
    add("--compile", action="store_true", help="use torch.compile")
    add("--checkpoint_activations", action="store_true", help="less memory, a third more time")
    add("--eval_every", type=number(int, 1), default=10, help="epochs between evaluations")
    add("--seed", type=number(int, 0, 2**32 - 1), default=0, help="seed of the training")
    add("--quick", action="store_true", help="tiny model, random images")
    args = parser.parse_args(argv)
    args.out = args.out or Path("runs/quick" if args.quick else "runs/inat")
    if args.quick:
        args.data = args.out / "quick_images"
        vars(args).update(model="vit_micro", image_size=32, focal_size=16, patch_size=4, workers=1,
                          focal_views=2, prototypes=16, batch_size=64, epochs=4, eval_every=2)
        if args.out.exists() and not args.data.exists():
            parser.error(f"--quick starts anew, but {args.out} is not from --quick")
    args.exponent = 0.0 if args.prior == "uniform" else args.exponent
    if args.data is None or args.out == Path(""):
        parser.error("--data is missing (only --quick needs none), or --out is empty or .")
    if args.image_size % args.patch_size or args.focal_size % args.patch_size:
        parser.error("--image_size and --focal_size must be multiples of --patch_size")
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    if args.batch_size % world_size or args.quick and world_size > 1:
        parser.error("--batch_size must be a multiple of the processes (with --quick only one)")
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        if int(os.environ.get("RANK", 0)) == 0:
            # The system releases this lock when the process ends, however it ends.
            parse.lock = open(args.out / "lock", "w")
            fcntl.lockf(parse.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if args.quick:
            (args.out / "checkpoint.pt").unlink(missing_ok=True)
            for i, (image, label) in enumerate(torchvision.datasets.FakeData(400, (3, 64, 64), 8)):
                folder = args.data / ("train" if i % 5 else "val") / f"class{label}"
                folder.mkdir(parents=True, exist_ok=True)
                image.save(folder / f"{i}.jpg")
    except BlockingIOError:
        parser.error(f"another run writes to --out {args.out}")
    except OSError as error:
        parser.error(f"cannot write or lock --out {args.out}: {error.strerror}")
    return args

if __name__ == "__main__":
    main()
