"""The first script for a new machine: does training work on this GPU, how fast, how much memory?

    python extras/benchmark.py --gpu_check      # is everything right? A few minutes on a GPU
    python extras/benchmark.py --count          # FLOPs, memory and hours on 8 GPUs, without a GPU
    python extras/benchmark.py --data FOLDER    # speed, with the images in and below any folder
    python extras/benchmark.py                  # speed, with 64 synthetic JPEGs of 500 x 375 pixels
    python extras/benchmark.py --quick          # speed, with 8 of them

--gpu_check compares bfloat16 with float32, compiled with plain, the GPU with the CPU, and a run of
train_inat.py that is killed and restarted with one that is not. Each check prints one line: a
number, the bound that it must keep, and ok or FAILED. If a check failed, the exit status is 1.
Without a GPU it runs on the CPU with a small network, which shows that the script itself works.

The last three commands show where the time goes. A worker of the data loader decodes an image and
makes its crops (pmsn.multi_crop). Colors and blur are for the GPU, for all images of a mini-batch
at once (pmsn.make_views). All results are printed, and no file is kept.
"""

import contextlib
import datetime
import json
import math
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader, Dataset, default_collate
from torch.utils.flop_counter import FlopCounterMode
from torchvision.transforms import v2

# The other scripts are in the folder above, and are not installed.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import pmsn
from support.images import decode
from support.runs import Parser, available_cores, command, number, say
from train_inat import MODELS, checkpoint_activations, compile_encoders

TRAIN_INAT = Path(__file__).resolve().parents[1] / "train_inat.py"


# ---- Images --------------------------------------------------------------------------------------
def draw_images(folder, count):
    """JPEGs of smooth noise with some grain, so that decoding them is as much work as a photo."""
    for i in range(count):
        smooth = F.interpolate(torch.rand(1, 3, 12, 16), (375, 500), mode="bicubic")[0]
        grain = 0.05 * torch.randn(3, 375, 500)
        image = v2.functional.to_pil_image((smooth + grain).clamp(0, 1))
        image.save(Path(folder) / f"{i}.jpg", quality=95)


class Crops(Dataset):
    """What a worker makes: `count` items pmsn.multi_crop(image, **options).

    After the last image follows the first one again. With the default options an item is
    [target (1, 3, 224, 224), masked (1, 3, 224, 224), small (10, 3, 96, 96)], uint8.
    """

    def __init__(self, paths, count, **options):
        self.paths, self.count, self.options = paths, count, options

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        return pmsn.multi_crop(decode(self.paths[index % len(self.paths)]), **self.options)


def load_crops(paths, count, device, **options):
    """Crops of `count` images as a batch on the device: [(count, views, 3, S, S), ...]."""
    items = Crops(paths, count, **options)
    return [crops.to(device) for crops in default_collate([items[i] for i in range(count)])]


# ---- One core ------------------------------------------------------------------------------------
def benchmark_core(paths, repeats):
    """Print the milliseconds per image that one core needs for the views."""
    def milliseconds(function, items):
        """Processor time per image. The least of some repetitions has the least disturbance."""
        times = []
        for _ in range(repeats):
            began = time.process_time()
            for item in items:
                function(item)
            times.append(time.process_time() - began)
        return 1000 * min(times) / len(paths)

    crops = load_crops(paths, len(paths), "cpu")
    rows = {
        "decoding": milliseconds(decode, paths),
        "decoding and crops, in a worker": milliseconds(
            lambda path: pmsn.multi_crop(decode(path)), paths),
        "colors and blur, without a GPU": milliseconds(pmsn.make_views, [crops]),
    }
    title = f"one core, {len(paths)} images, 12 views each"
    say(f"{title:<40} {'ms per image':>14}")
    for name, value in rows.items():
        say(f"{name:<40} {value:>14.2f}")


# ---- The training step, as in train_inat.py ------------------------------------------------------
def make_model(vit, image_size=224, patch_size=16):
    """PMSN with 1024 prototypes. `vit` is (embed_dim, depth, num_heads)."""
    encoder = pmsn.VisionTransformer(image_size, patch_size, *vit)
    return pmsn.PMSN(encoder, pmsn.power_law_prior(1024, 0.25))


def make_train_step(model):
    """A function of views that does a whole step: forward, backward, AdamW and moving average."""
    device = model.prototypes.device
    cuda = device.type == "cuda"
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(trained, fused=cuda)

    def train_step(views):
        with torch.autocast(device.type, torch.bfloat16, enabled=cuda):
            loss, _ = model(views)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        model.update_target(0.996)

    return train_step


def synchronize():
    """The GPU works behind the CPU, so a clock has to wait for it."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def calls_per_second(function, items, warmup):
    """Call function(item) for all items. The clock starts after the first `warmup` calls."""
    for i, item in enumerate(items):
        if i == warmup:
            synchronize()
            began = time.perf_counter()
        function(item)
    synchronize()
    return (i + 1 - warmup) / (time.perf_counter() - began)


def matrix_rate(device, size):
    """FLOP/s of products of bfloat16 matrices (size, size): the most that a step could reach."""
    x = torch.randn(size, size, device=device, dtype=torch.bfloat16)
    return 2 * size**3 * calls_per_second(lambda _: x @ x, range(150), warmup=50)


# ---- One GPU -------------------------------------------------------------------------------------
def benchmark_gpu(paths, args):
    """Print the images per second of the training step, alone and with images from files."""
    device = torch.device("cuda:0")
    flops = count_step(MODELS[args.model])["plain"]["flops"]
    model = make_model(MODELS[args.model]).to(device)
    train_step = make_train_step(model)
    if args.compile:
        compile_encoders(model)

    def views_and_step(crops):
        train_step(pmsn.make_views([crop.to(device, non_blocking=True) for crop in crops]))

    crops = load_crops(paths, args.batch_size, device)
    best = matrix_rate(device, 8192)
    alone = args.batch_size * calls_per_second(train_step, [pmsn.make_views(crops)] * 25, warmup=5)
    torch.cuda.reset_peak_memory_stats()
    with_views = args.batch_size * calls_per_second(views_and_step, [crops] * 25, warmup=5)
    memory = torch.cuda.max_memory_allocated() / 2**30
    # The workers load two batches each ahead of the step, and the warmup uses these up.
    images = Crops(paths, 7 * args.workers * args.batch_size)
    loader = DataLoader(images, args.batch_size, num_workers=args.workers, pin_memory=True)
    from_files = args.batch_size * calls_per_second(views_and_step, loader,
                                                    warmup=3 * args.workers)

    say(f"\n{torch.cuda.get_device_name()}, {args.model}, batch {args.batch_size}, bf16, "
          f"compile: {args.compile}, {args.workers} workers, peak memory {memory:.1f} GiB")
    say(f"{'':<40} {'images per s':>14}")
    say(f"{'step alone':<40} {alone:>14.0f}")
    say(f"{'step, colors and blur':<40} {with_views:>14.0f}")
    say(f"{'step, colors and blur, from files':<40} {from_files:>14.0f}")
    say(f"With images from files, the GPU waits {max(0, 1 - from_files / with_views):.1%} of the "
          "time.")
    say(f"The step alone has {flops * alone / best:.0%} of the measured bf16 matrix rate, "
          f"which is {best / 1e12:.0f} TFLOP/s.")


# ---- What a step needs, counted without a GPU ----------------------------------------------------
GPUS, BATCH = 8, 1024  # MSN trains with 128 images per GPU.
H100_RATE, SHARE_REACHED = 989e12, 0.4  # FLOP/s, dense bfloat16; the share is an assumption
INAT_IMAGES, EPOCHS = 437_513, 300


@contextlib.contextmanager
def shapes_only():
    """Inside, tensors have shapes but no values: a step takes neither memory nor arithmetic."""
    # pmsn.check_prior looks at the values of a prior, and here it has none.
    with FakeTensorMode(allow_non_fake_inputs=True), mock.patch.object(pmsn, "check_prior"):
        yield


def empty_views(images):
    """Views of MSN's recipe: target and masked (B, 3, 224, 224), 10 small crops of 96 pixels."""
    large, small = (images, 3, 224, 224), (10 * images, 3, 96, 96)
    return [torch.empty(large), torch.empty(large), torch.empty(small)]


def count_flops(model, views):
    """FLOPs of a training step: forward, backward and target. A product and a sum count as two."""
    # FlopCounterMode does not know the flash attention of CPUs. It does know the matrix products
    # of the plain formula, which are the same ones.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        loss, _ = model(views)
        loss.backward()
    return counter.get_total_flops()


def saved_bytes(model, views):
    """Bytes that the forward pass under bfloat16 autocast keeps for the backward pass.

    Each storage counts once, and the parameters do not count. The fast attention of CPUs keeps
    q, k, v, its result and one float per head and token. The flash attention of CUDA does too.
    """
    storages = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        storages[id(storage)] = storage
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with hooks, torch.autocast("cpu", torch.bfloat16):
        model(views)
    for parameter in model.parameters():
        storages.pop(id(parameter.untyped_storage()), None)
    return sum(storage.nbytes() for storage in storages.values())


def count_step(vit):
    """What a step of MSN's recipe needs, without and with activation checkpointing.

    `vit` is (embed_dim, depth, num_heads). Returns {"plain": counts, "checkpointed": counts} with
    flops              per image
    activations        bytes per image that wait for the backward pass
    fixed              bytes that wait for it with any number of images (bfloat16 weights)
    block              bytes per image of all activations of one block
    trained, target    numbers of parameters
    """
    model = make_model(vit)
    trained = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    target = sum(weight.numel() for weight in model.parameters() if not weight.requires_grad)
    counts = {}
    with shapes_only():
        model.to_empty(device="cpu")
        for name in ("plain", "checkpointed"):
            if name == "checkpointed":
                checkpoint_activations(model)
            # A step keeps a fixed number of bytes, and some more for each image. So steps with two
            # and with four images differ by the bytes of two images, and the others are fixed.
            two, four = [saved_bytes(model, empty_views(images)) for images in (2, 4)]
            per_image = (four - two) / 2
            fixed = two - 2 * per_image
            counts[name] = {
                "flops": count_flops(model, empty_views(2)) / 2,
                "activations": per_image,
                "fixed": fixed,
                "trained": trained,
                "target": target,
            }
    # With checkpointing a block keeps its input only, which it has in common with its neighbor.
    saved = counts["plain"]["activations"] - counts["checkpointed"]["activations"]
    for count in counts.values():
        count["block"] = saved / vit[1]
    return counts


def memory_parts(count, images, gpus):
    """Bytes on one GPU with this number of images, by purpose. The sum estimates the peak."""
    # Each trained weight has a gradient and two averages of AdamW, in float32. With several GPUs,
    # DDP has a second copy of the gradient. A target weight has nothing else.
    floats = 5 if gpus > 1 else 4
    # A view is uint8 when it arrives, and float32 after make_views.
    pixels = sum(x.numel() for x in empty_views(1))
    return {
        "weights, gradients, AdamW, target": 4 * (floats * count["trained"] + count["target"]),
        "weights in bfloat16": count["fixed"],
        "crops and views": 5 * pixels * images,
        "activations": count["activations"] * images,
        # The backward pass has gradients of activations too, and checkpointing restores a block.
        # Both need about as much memory as the activations of one block.
        "backward pass of one block": count["block"] * images,
    }


def print_counts():
    """A table for ViT-S and ViT-B with patches of 16 pixels: FLOPs, memory, hours on 8 H100."""
    images = BATCH // GPUS
    columns = []  # (model, plain or checkpointed)
    table = {}  # {name of a row: its cell in each column}
    for model in ("vit_small", "vit_base"):
        for kind, count in count_step(MODELS[model]).items():
            columns.append((model, kind))
            rate = SHARE_REACHED * H100_RATE / count["flops"]  # images per second and GPU
            parts = memory_parts(count, images, GPUS)
            rows = {
                "GFLOP per image": f"{count['flops'] / 1e9:.1f}",
                f"PFLOP per step of {BATCH} images": f"{BATCH * count['flops'] / 1e15:.3f}",
                "MB of activations per image": f"{count['activations'] / 1e6:.1f}",
                **{f"GiB: {name}": f"{size / 2**30:.2f}" for name, size in parts.items()},
                f"GiB per GPU of {images} images, in all": f"{sum(parts.values()) / 2**30:.1f}",
                **{f"GiB, in all, of one GPU with {batch} images":
                   f"{sum(memory_parts(count, batch, 1).values()) / 2**30:.1f}"
                   for batch in (256, 512, BATCH)},
                "images per second and GPU": f"{rate:.0f}",
                "hours for iNat18": f"{EPOCHS * INAT_IMAGES / (GPUS * rate) / 3600:.2f}",
            }
            for name, value in rows.items():
                table.setdefault(name, []).append(value)
    say(f"Patch 16, 1024 prototypes, a target view and a masked view of 224 pixels (15% of the "
          f"patches dropped),\n10 small crops of 96 pixels, batch {BATCH} over {GPUS} GPUs, "
          f"bfloat16 autocast. Counted, not measured.\n")
    for names in zip(*columns):
        say(f"{'':<44}", *[f"{name:>13}" for name in names])
    for name, values in table.items():
        say(f"{name:<44}", *[f"{value:>13}" for value in values])
    say(f"\nSpeed and hours assume {SHARE_REACHED:.0%} of {H100_RATE / 1e12:.0f} TFLOP/s (dense "
          f"bfloat16 rate of an H100).\niNat18 has {INAT_IMAGES:,} images, and training {EPOCHS} "
          "epochs. The workers of the data loader must keep up:\nwithout --count this script shows "
          "how long a core needs per image. Checkpointed: --checkpoint_activations.\nAttention "
          "keeps q, k, v, its result and one float per head and token, as flash attention does.")


# ---- The check of a new machine ------------------------------------------------------------------
# The small network is for CPUs. Eight images per view: make_views draws random numbers for eight
# images at a time on a CPU and for all at once on a GPU, so with more they would be different ones.
LARGE = {"image_size": 224, "patch_size": 16, "focal_size": 96, "vit": MODELS["vit_small"]}
SMALL = {"image_size": 32, "patch_size": 8, "focal_size": 16, "vit": (96, 2, 3)}
CHECK_IMAGES = 8


def gpu_check(paths, folder, args):
    """Run all checks, print a line for each, and return the number of failed ones.

    A check is a generator, and each of its rows is printed as soon as it is there. If a check
    raises an error, this is one more failed row, and the next check follows.
    """
    cuda = torch.cuda.is_available()
    device = torch.device("cuda:0" if cuda else "cpu")
    if cuda:
        torch.cuda.set_device(device)
    size = LARGE if cuda and not args.quick else SMALL
    # A generator does nothing until the loop below asks for its first row.
    checks = {
        "bfloat16 against float32": precision_rows(paths, device, size),
        "checkpointed and compiled against plain": compile_rows(paths, device, size),
        "views on this device against the CPU": view_rows(paths, device, size),
        "one process of DDP against none": process_rows(paths, device, size, folder),
        "train_inat.py: killed and restarted": restart_rows(paths, device, size, folder),
        "speed and memory": speed_rows(paths, device, size, args),
    }
    name = torch.cuda.get_device_name() if cuda else "CPU, because there is no CUDA GPU"
    say(f"{name}, torch {torch.__version__}\n{'':<62} {'measured':>9}    bound")
    began = time.perf_counter()
    results = []  # True for each row that keeps its bound
    for title, rows in checks.items():
        say(title)
        try:
            for row in rows:
                results.append(print_row(*row))
        except Exception as error:
            traceback.print_exc()
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            say(f"  {'stopped by an error':<60} {'-':>9}    {'-':<9} FAILED {reason[:200]}")
            results.append(False)
    failed = results.count(False)
    seconds = time.perf_counter() - began
    say(f"{failed} of {len(results)} failed, in {seconds:.0f} seconds")
    return failed


def print_row(name, value, relation, bound):
    """Print a row. Returns whether its number keeps its bound."""
    # Every comparison with nan is false, so nan fails.
    ok = {"<=": value <= bound, ">=": value >= bound, "==": value == bound}[relation]
    say(f"  {name:<60} {value:>9.3g} {relation} {bound:<9.3g} {'ok' if ok else 'FAILED'}")
    return ok


def relative_difference(x, reference):
    """norm(x - reference) / norm(reference), for tensors of any shape."""
    x, reference = x.double(), reference.double()
    return (torch.linalg.vector_norm(x - reference) / torch.linalg.vector_norm(reference)).item()


def make_check(paths, device, size):
    """A model with random weights and views of images, the same ones in every call."""
    torch.manual_seed(0)
    model = make_model(size["vit"], size["image_size"], size["patch_size"]).to(device)
    crops = load_crops(paths, CHECK_IMAGES, device, rand_size=size["image_size"],
                       focal_size=size["focal_size"], focal_views=1)
    return model, crops, pmsn.make_views(crops)


def run_step(network, views, bfloat16=False):
    """The loss and the gradient of all trained weights, (n,). Patches are dropped as ever."""
    device = views[0].device
    torch.manual_seed(0)
    network.zero_grad()
    with torch.autocast(device.type, torch.bfloat16, enabled=bfloat16):
        loss, _ = network(views)
    loss.backward()
    return loss.detach(), flat_gradient(network)


def flat_gradient(module):
    """The gradients of all trained weights, one after the other, (n,)."""
    return torch.cat([weight.grad.flatten() for weight in module.parameters()
                      if weight.requires_grad])


# ---- The six checks. Each row is (name, measured number, relation, bound) ------------------------
def precision_rows(paths, device, size):
    """bfloat16 autocast against float32: the encoder, the loss, and a whole step."""
    model, _, views = make_check(paths, device, size)
    features, gradient = encoder_step(model.encoder, views, bfloat16=False)
    mixed_features, mixed_gradient = encoder_step(model.encoder, views, bfloat16=True)
    # bfloat16 rounds by up to 2^-9 = 0.002. Over five seeds on a CPU, the small network had .004
    # to .006 for features and .005 to .007 for the gradient. ViT-S had .008 and .010.
    yield "encoder: features", relative_difference(mixed_features, features), "<=", 0.02
    yield "encoder: gradient", relative_difference(mixed_gradient, gradient), "<=", 0.04

    # The loss gets embeddings in bfloat16 and must compute in float32. On a CPU the differences
    # were 1e-7 and 4e-7. With cosines in bfloat16 they were 3e-4 and 7e-3.
    anchors, targets, prototypes, prior = loss_inputs()
    with torch.autocast(device.type, torch.bfloat16):
        loss, _ = pmsn.pmsn_loss(anchors.to(device), targets.to(device), prototypes.to(device),
                                 prior.to(device))
    gradient, = torch.autograd.grad(loss, prototypes)
    exact = loss_by_formula(*(x.double() for x in (anchors, targets, prototypes, prior)))
    exact_gradient, = torch.autograd.grad(exact, prototypes)
    yield "loss of bfloat16 embeddings", relative_difference(loss.cpu(), exact), "<=", 1e-5
    yield ("loss of bfloat16 embeddings: gradient of prototypes",
           relative_difference(gradient, exact_gradient), "<=", 1e-4)

    # In a whole step, cosines are divided by the temperature 0.1, and targets are sharpened by
    # 0.25. This multiplies the errors of the targets by 40. On a CPU the loss had 1e-4 to 1e-3
    # and the gradient .04 to .10, with ViT-S as with the small network.
    loss, gradient = run_step(model, views)
    mixed_loss, mixed_gradient = run_step(model, views, bfloat16=True)
    yield "whole step: loss", relative_difference(mixed_loss, loss), "<=", 0.003
    yield "whole step: gradient", relative_difference(mixed_gradient, gradient), "<=", 0.2


def encoder_step(encoder, views, bfloat16):
    """Features of masked and small views, (16, d), and the gradient of a random sum of them."""
    device = views[0].device
    torch.manual_seed(0)
    encoder.zero_grad()
    with torch.autocast(device.type, torch.bfloat16, enabled=bfloat16):
        features = torch.cat([encoder(views[1], patch_drop=0.15), encoder(views[2])])
    weights = torch.randn(features.shape, generator=torch.Generator().manual_seed(0))
    (features.float() * weights.to(device)).sum().backward()
    return features.detach(), flat_gradient(encoder)


def loss_inputs():
    """Anchors (192, 256) and targets (64, 256) in bfloat16, prototypes (1024, 256), a prior."""
    generator = torch.Generator().manual_seed(0)
    prototypes = torch.randn(1024, 256, generator=generator)
    # Near its prototype, an embedding has predictions that are neither constant nor certain.
    targets = prototypes[:64] + torch.randn(64, 256, generator=generator)
    anchors = targets.repeat(3, 1) + torch.randn(192, 256, generator=generator)
    prior = pmsn.power_law_prior(1024, 0.25)
    return anchors.bfloat16(), targets.bfloat16(), prototypes.requires_grad_(), prior


def loss_by_formula(anchors, targets, prototypes, prior):
    """The loss of pmsn.pmsn_loss with its default options, from its formula."""
    prototypes = F.normalize(prototypes, dim=1)
    p = F.softmax(F.normalize(anchors, dim=1) @ prototypes.T / 0.1, dim=1)
    # Sharpening by 0.25 takes the fourth power.
    p_target = F.softmax(4 * F.normalize(targets, dim=1) @ prototypes.T / 0.1, dim=1).detach()
    p_target = p_target.repeat(len(anchors) // len(targets), 1)
    p_bar = p.mean(dim=0)
    return -(p_target * p.log()).sum(dim=1).mean() + (p_bar * (p_bar / prior).log()).sum()


def compile_rows(paths, device, size):
    """Checkpointed activations and compiled encoders, as with the two flags of train_inat.py."""
    # The time to compile grows with the number of blocks, and four are enough to find a mistake.
    dim, depth, heads = size["vit"]
    size = {**size, "vit": (dim, min(depth, 4), heads)}
    # A compiler would draw other random numbers, and drop other patches, without this option.
    # On CPUs, the compiler of C++ takes minutes or is missing. The steps before it run there too.
    name, options = "inductor", {"options": {"fallback_random": True}}
    if device.type == "cpu":
        name, options = "aot_eager", {"backend": "aot_eager"}

    model, _, views = make_check(paths, device, size)
    _, gradient = run_step(model, views, bfloat16=True)
    checkpoint_activations(model)
    _, checkpointed = run_step(model, views, bfloat16=True)
    # On a CPU the bits are the same. On a GPU the backward pass of attention adds in a varying
    # order, and now and then a sum is rounded to the neighboring number of bfloat16 (2^-8).
    yield ("checkpointed, bfloat16: gradient",
           relative_difference(checkpointed, gradient), "<=", 2e-3)

    # TF32 convolutions, which are PyTorch's default on a GPU, would be less exact than float32.
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        model, _, views = make_check(paths, device, size)
        loss, gradient = run_step(model, views)
        torch.compiler.reset()
        compile_encoders(model, **options)
        compiled_loss, compiled_gradient = run_step(model, views)
    # With the C++ compiler of a CPU the differences were 7e-8 and 4e-6.
    yield (f"compiled ({name}), float32: loss",
           relative_difference(compiled_loss, loss), "<=", 1e-5)
    yield (f"compiled ({name}), float32: gradient",
           relative_difference(compiled_gradient, gradient), "<=", 1e-3)

    model, _, views = make_check(paths, device, size)
    checkpoint_activations(model)
    torch.compiler.reset()
    compile_encoders(model, **options)
    loss_both, gradient_both = run_step(model, views, bfloat16=True)
    torch.compiler.reset()
    # Rounded numbers of compiled and plain steps differ, so both have the bounds of precision_rows.
    yield (f"both ({name}), bfloat16 against float32: loss",
           relative_difference(loss_both, loss), "<=", 3e-3)
    yield (f"both ({name}), bfloat16 against float32: gradient",
           relative_difference(gradient_both, gradient), "<=", 0.2)


def view_rows(paths, device, size):
    """pmsn.make_views with the same random numbers, which are drawn on the CPU for any device."""
    _, crops, _ = make_check(paths, device, size)
    torch.manual_seed(0)
    views = pmsn.make_views(crops)
    torch.manual_seed(0)
    expected = pmsn.make_views([crop.cpu() for crop in crops])
    for name, view, on_cpu in zip(("target", "masked", "small"), views, expected):
        # Normalized pixels lie between -2.2 and 2.7. On a CPU, float32 and float64 differ by 1e-6,
        # and a blur with TF32 convolutions would differ by about 1e-3.
        difference = (view.cpu() - on_cpu).abs().max().item()
        yield f"make_views, {name} view: largest difference", difference, "<=", 1e-4


def process_rows(paths, device, size, folder):
    """A step of DistributedDataParallel with one process, and what train_inat.py communicates."""
    cuda = device.type == "cuda"
    backend = "NCCL" if cuda else "gloo"
    model, _, views = make_check(paths, device, size)
    loss, gradient = run_step(model, views)
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", rank=0, world_size=1,
                            init_method=f"file://{folder}/rendezvous",
                            timeout=datetime.timedelta(seconds=60))
    try:
        x = torch.arange(3.0, device=device)
        dist.all_reduce(x)
        dist.all_reduce(x, dist.ReduceOp.MAX)
        yield f"{backend}: all_reduce, sum", x.sum().item(), "==", 3
        answer, gathered = [{"epoch": 1}], [None]
        dist.broadcast_object_list(answer, device=torch.device("cpu"))
        dist.gather_object(answer[0], gathered)
        yield "gloo: an object comes back", gathered[0]["epoch"], "==", 1
        # With one process, SyncBatchNorm has nobody to talk to and computes what BatchNorm does.
        # Its own reduction needs two GPUs, and nothing here tests it.
        norm = "BatchNorm"
        if cuda:
            model, norm = nn.SyncBatchNorm.convert_sync_batchnorm(model), "SyncBatchNorm"
        network = nn.parallel.DistributedDataParallel(model, [device] if cuda else None)
        ddp_loss, ddp_gradient = run_step(network, views)
        # On a CPU the bits are the same. On a GPU a few sums have a varying order, in float32.
        yield f"DDP and {norm}: loss", relative_difference(ddp_loss, loss), "<=", 1e-5
        yield f"DDP and {norm}: gradient", relative_difference(ddp_gradient, gradient), "<=", 1e-4
    finally:
        dist.destroy_process_group()


def restart_rows(paths, device, size, folder):
    """Two epochs of train_inat.py. One run is killed after its first checkpoint, then restarted."""
    cuda = device.type == "cuda"
    flags = {"model": "vit_small", "batch_size": 64, "workers": 4}
    if size is SMALL:
        flags = {"model": "vit_micro", "batch_size": 16, "workers": 1, "focal_views": 2,
                 "prototypes": 16}
    folder = Path(folder)
    flags.update(data=folder / "images", epochs=2, image_size=size["image_size"],
                 patch_size=size["patch_size"], focal_size=size["focal_size"])
    # Four steps per epoch: in longer runs the rounding errors of a GPU would grow too much.
    link_images(paths, folder / "images" / "train", 4 * flags["batch_size"])
    link_images(paths, folder / "images" / "val", flags["batch_size"])
    command = [sys.executable, TRAIN_INAT]
    for name, value in flags.items():
        command += [f"--{name}", value]

    killed, whole = folder / "killed", folder / "whole"
    run_training(command, killed, kill=True)
    first = load_weights(killed)
    log = run_training(command, killed)
    found = re.search(r"continues after epoch (\d+)", log)
    yield "the restarted run continues after epoch", int(found[1]) if found else math.nan, "==", 1
    lines = (killed / "metrics.jsonl").read_text().splitlines()
    epochs = [json.loads(line)["epoch"] for line in lines]
    yield "its metrics.jsonl has the epochs 0, 1, 2 (1: yes)", epochs == [0, 1, 2], "==", 1

    run_training(command, whole)
    # What the kill changed in the weights, compared to what the second epoch changed. On a CPU all
    # bits must be the same. A GPU adds in a varying order. We simulated this on a CPU by random
    # numbers in the gradient. With relative size 1e-4 in each step, the result was 0.03, and with
    # 1e-3 it was 0.1. Other images in epoch 2 gave 0.5, a forgotten target network 1.1, and a
    # forgotten state of AdamW 1.7.
    end, expected = load_weights(killed), load_weights(whole)
    moved = torch.linalg.vector_norm(expected - first)
    difference = (torch.linalg.vector_norm(end - expected) / moved).item()
    yield "its weights against a run without a kill", difference, "<=", 0.3 if cuda else 0


def link_images(paths, folder, count):
    """Links to images in four class folders. With few paths, an image has several links."""
    for i in range(count):
        source = Path(paths[i % len(paths)]).resolve()
        link = folder / f"class{i % 4}" / f"{i}{source.suffix}"
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(source)


def load_weights(out):
    """All floats of the model in checkpoint.pt, (n,), in float64."""
    state = torch.load(out / "checkpoint.pt", map_location="cpu", weights_only=True)["model"]
    return torch.cat([x.double().flatten() for x in state.values() if x.is_floating_point()])


def run_training(command, out, kill=False):
    """Run train_inat.py until it ends, or kill it after its first checkpoint. Returns its log.

    RuntimeError with the end of the log if it does not end as expected within 150 seconds.
    """
    environment = dict(os.environ)
    if not torch.cuda.is_available():
        # Sums in several threads of a CPU could have a varying order.
        environment.update(CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="1")
    log = out.with_suffix(".log")
    with open(log, "w") as file:
        process = subprocess.Popen([*map(str, command), "--out", out], stdout=file, stderr=file,
                                   env=environment, start_new_session=True)
    deadline = time.monotonic() + 150
    try:
        while process.poll() is None and time.monotonic() < deadline:
            if kill and (out / "checkpoint.pt").exists():
                break
            time.sleep(0.01)
    finally:
        # The session of the process has its data loaders too.
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        status = process.wait()
    text = log.read_text(errors="replace")
    if status != (-signal.SIGKILL if kill else 0):
        end = " ".join(text.split())[-150:]
        raise RuntimeError(f"train_inat.py ended with status {status}: {end}")
    return text


def speed_rows(paths, device, size, args):
    """Images per second of the training step with make_views, and the peak of its GPU memory."""
    if device.type == "cpu":
        model, crops, _ = make_check(paths, device, size)
        train_step = make_train_step(model)
        rate = CHECK_IMAGES * calls_per_second(
            lambda crops: train_step(pmsn.make_views(crops)), [crops] * 6, warmup=2)
        yield "small network on the CPU: images per second", rate, ">=", 0
        return

    counts = count_step(MODELS[args.model])["plain"]
    before = torch.cuda.memory_allocated()
    model = make_model(MODELS[args.model]).to(device)
    crops = load_crops(paths, args.batch_size, device)
    train_step = make_train_step(model)
    if args.compile:
        compile_encoders(model)
    torch.cuda.reset_peak_memory_stats()
    rate = args.batch_size * calls_per_second(
        lambda crops: train_step(pmsn.make_views(crops)), [crops] * 25, warmup=5)
    peak = torch.cuda.max_memory_allocated() - before
    # In float32, an A100 or H100 cannot reach a tenth of its rate in bfloat16.
    slowest = 0.1 * matrix_rate(device, 8192) / counts["flops"]
    title = f"{args.model}, batch {args.batch_size}"
    yield f"{title}: images per second", rate, ">=", slowest
    # The bound is what --count expects, and half of it in addition.
    expected = sum(memory_parts(counts, args.batch_size, gpus=1).values())
    yield f"{title}: peak of GPU memory in GiB", peak / 2**30, "<=", 1.5 * expected / 2**30


# ---- Command line --------------------------------------------------------------------------------
@command
def main(argv=None):
    parser = Parser("Does training work on this machine, how fast, and with how much memory?")
    add = parser.add_argument
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--gpu_check", action="store_true", help="is everything right on this GPU?")
    what.add_argument("--count", action="store_true", help="FLOPs, memory and hours on 8 H100")
    add("--data", type=Path, help="a folder with images (default: synthetic ones)")
    add("--model", default="vit_small", choices=MODELS, help="vision transformer")
    add("--batch_size", type=number(int, 8), default=128, help="images on a GPU")
    add("--workers", type=number(int, 1, 1000), default=available_cores(),
        help="processes that load images")
    add("--compile", action="store_true", help="use torch.compile on the GPU")
    add("--seed", type=number(int, 0, 2**32 - 1), default=0, help="of weights and synthetic images")
    add("--quick", action="store_true", help="8 images, and a small network for the check")
    args = parser.parse_args(argv)
    torch.manual_seed(args.seed)
    if args.count:
        print_counts()
        return
    count, repeats = (8, 1) if args.quick else (64, 3)
    with tempfile.TemporaryDirectory() as folder:
        if args.data is None:
            draw_images(folder, count)
        files = sorted((args.data or Path(folder)).rglob("*"))
        paths = [str(path) for path in files if path.suffix.lower() in (".jpg", ".jpeg", ".png")]
        if not paths:
            parser.error(f"--data {args.data} has no images (.jpg, .jpeg or .png)")
        if args.gpu_check:
            sys.exit(1 if gpu_check(paths, folder, args) else 0)
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        benchmark_core(paths[:count], repeats)
        torch.set_num_threads(threads)
        if torch.cuda.is_available():
            benchmark_gpu(paths, args)
        else:
            say("There is no CUDA GPU here. With one, the training step is measured too.")


if __name__ == "__main__":
    main()
