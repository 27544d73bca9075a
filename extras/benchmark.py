"""Where the time of train_inat.py goes: making the views on one core, and training on one GPU.

    python extras/benchmark.py --data FOLDER    # any folder with images, also in its subfolders
    python extras/benchmark.py                  # 64 synthetic JPEGs of 500 x 375 pixels
    python extras/benchmark.py --quick          # 8 of them

The usual pipeline makes every view of an image with PIL, in a worker of the data loader. Ours
decodes and crops in the worker (pmsn.multi_crop). Colors and blur are for the GPU, for all images
of a mini-batch at once (pmsn.make_views). All results are printed, and no file is written.
"""

import argparse
import math
import os
import random
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image, ImageFilter, ImageOps
from torch.utils.data import DataLoader, Dataset, default_collate
from torch.utils.flop_counter import FlopCounterMode
from torchvision import transforms
from torchvision.transforms import v2

import pmsn

MODELS = {"vit_tiny": (192, 12, 3), "vit_small": (384, 12, 6), "vit_base": (768, 12, 12)}

# ---- Data ----------------------------------------------------------------------------------------
def draw_images(folder, count):
    """JPEGs of smooth noise with some grain, so that decoding them is as much work as a photo."""
    for i in range(count):
        smooth = F.interpolate(torch.rand(1, 3, 12, 16), (375, 500), mode="bicubic")[0]
        grain = 0.05 * torch.randn(3, 375, 500)
        image = v2.functional.to_pil_image((smooth + grain).clamp(0, 1))
        image.save(Path(folder) / f"{i}.jpg", quality=95)

class Images(Dataset):
    """Items pipeline(path). It goes through the paths again and again, up to `count` items."""

    def __init__(self, paths, pipeline, count):
        self.paths, self.pipeline, self.count = paths, pipeline, count

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        return self.pipeline(self.paths[index % len(self.paths)])

# ---- Two pipelines: path -> [target (1, 3, S, S), rand (1, 3, S, S), focal (10, 3, s, s)] --------
def decode(path):
    with Image.open(path) as image:
        return ImageOps.exif_transpose(image).convert("RGB")

def our_pipeline(path):
    return pmsn.multi_crop(v2.functional.pil_to_tensor(decode(path)))

def usual_pipeline(path):
    image = decode(path)
    large, small = usual_view(224, (0.3, 1.0)), usual_view(96, (0.05, 0.3))
    focal = torch.stack([small(image) for _ in range(10)])
    return [large(image)[None], large(image)[None], focal]

def usual_view(size, scale):
    """The random view of MSN by the classes of torchvision: PIL image -> (3, size, size)."""
    return transforms.Compose([
        transforms.RandomResizedCrop(size, scale),
        transforms.RandomHorizontalFlip(),
        transforms.RandomApply([transforms.ColorJitter(0.4, 0.4, 0.4, 0.1)], 0.8),
        transforms.RandomGrayscale(0.2),
        transforms.RandomApply([blur], 0.5),
        transforms.ToTensor(),
        transforms.Normalize(pmsn.IMAGENET_MEAN, pmsn.IMAGENET_STD),
    ])

def blur(image):
    return image.filter(ImageFilter.GaussianBlur(random.uniform(0.1, 2.0)))

# ---- One core ------------------------------------------------------------------------------------
def benchmark_core(paths, repeats):
    def milliseconds(function, items):
        """Processor time per image. The least of some repetitions has the least disturbance."""
        times = []
        for _ in range(repeats):
            began = time.process_time()
            for item in items:
                function(item)
            times.append(time.process_time() - began)
        return 1000 * min(times) / len(paths)

    crops = default_collate([our_pipeline(path) for path in paths])
    usual, ours = milliseconds(usual_pipeline, paths), milliseconds(our_pipeline, paths)
    colors = milliseconds(pmsn.make_views, [crops])
    rows = {
        "usual pipeline, in a worker": usual,
        "ours, in a worker": ours,
        "decoding, a part of both": milliseconds(decode, paths),
        "ours, colors and blur without a GPU": colors,
        "ours, all of it without a GPU": ours + colors,
    }
    title = f"one core, {len(paths)} images, 12 views each"
    print(f"{title:<40} {'ms per image':>14} {'share':>8}")
    for name, value in rows.items():
        print(f"{name:<40} {value:>14.2f} {value / usual:>8.2f}")

# ---- One GPU -------------------------------------------------------------------------------------
def benchmark_gpu(paths, args):
    encoder = pmsn.VisionTransformer(224, 16, *MODELS[args.model])
    model = pmsn.PMSN(encoder, pmsn.power_law_prior(1024, 0.25)).cuda()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, fused=True)

    def train_step(views):
        with torch.autocast("cuda", torch.bfloat16):
            loss, _ = model(views)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        model.update_target(0.996)

    def batches_per_second(step, batches, warmup):
        for i, batch in enumerate(batches):
            if i == warmup:
                # The GPU works behind the CPU, so the clock has to wait for it.
                torch.cuda.synchronize()
                began = time.perf_counter()
            step(batch)
        torch.cuda.synchronize()
        return (i + 1 - warmup) / (time.perf_counter() - began)

    def our_views(batch):
        return pmsn.make_views([crops.cuda(non_blocking=True) for crops in batch])

    def usual_views(batch):  # (B, views, 3, S, S) -> (views * B, 3, S, S)
        views = [x.cuda(non_blocking=True) for x in batch]
        return [x.transpose(0, 1).flatten(0, 1) for x in views]

    images = Images(paths, our_pipeline, args.batch_size)
    batch = [crops.cuda() for crops in default_collate([images[i] for i in range(len(images))])]
    # FLOPs are counted on eight images, and before the encoders are compiled.
    with FlopCounterMode(display=False) as counter:
        train_step(our_views([crops[:8] for crops in batch]))
    flops = counter.get_total_flops() / 8
    if args.compile:
        model.encoder.compile(dynamic=False)
        model.target_encoder.compile(dynamic=False)
    x = torch.randn(8192, 8192, device=batch[0].device, dtype=torch.bfloat16)
    matrix_rate = 2 * 8192**3 * batches_per_second(lambda _: x @ x, range(150), warmup=50)

    alone = args.batch_size * batches_per_second(train_step, [our_views(batch)] * 25, warmup=5)
    torch.cuda.reset_peak_memory_stats()
    with_views = args.batch_size * batches_per_second(
        lambda crops: train_step(our_views(crops)), [batch] * 25, warmup=5)
    memory = torch.cuda.max_memory_allocated() / 2**30
    print(f"\n{torch.cuda.get_device_name()}, {args.model}, batch {args.batch_size}, bf16, "
          f"compile: {args.compile}, {args.workers} workers, peak memory {memory:.1f} GiB")
    print(f"{'':<40} {'images per s':>14} {'waiting':>8}")
    print(f"{'step alone':<40} {alone:>14.0f}")
    print(f"{'step with make_views':<40} {with_views:>14.0f}")
    pipelines = [("ours, from files", our_pipeline, our_views, with_views),
                 ("usual pipeline, from files", usual_pipeline, usual_views, alone)]
    for name, pipeline, make_views, limit in pipelines:
        # The workers load two batches each ahead of the step, and the warmup uses these up.
        images = Images(paths, pipeline, 7 * args.workers * args.batch_size)
        loader = DataLoader(images, args.batch_size, num_workers=args.workers, pin_memory=True)
        rate = args.batch_size * batches_per_second(
            lambda crops: train_step(make_views(crops)), loader, warmup=3 * args.workers)
        print(f"{name:<40} {rate:>14.0f} {max(0, 1 - rate / limit):>8.1%}")
    print(f"The step alone has {flops * alone / matrix_rate:.0%} of the measured bf16 matrix rate, "
          f"which is {matrix_rate / 1e12:.0f} TFLOP/s.")

# ---- Command line --------------------------------------------------------------------------------
def number(kind, low, high=math.inf):
    """An argparse type: a finite number of this kind from low to high."""
    def number(text):
        value = kind(text)
        if not low <= value <= high or math.isinf(value):
            raise argparse.ArgumentTypeError(f"must be finite, from {low} to {high}, got {text}")
        return value
    return number

def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("--data", type=Path, help="a folder with images (default: synthetic ones)")
    add("--model", default="vit_small", choices=MODELS, help="default: vit_small")
    add("--batch_size", type=number(int, 8), default=256, help="on a GPU (default: 256)")
    add("--workers", type=number(int, 1), default=os.cpu_count(), help="default: all cores")
    add("--compile", action="store_true", help="use torch.compile on the GPU")
    add("--seed", type=number(int, 0, 2**32 - 1), default=0, help="default: 0")
    add("--quick", action="store_true", help="8 images, once")
    args = parser.parse_args(argv)
    torch.manual_seed(args.seed)
    random.seed(args.seed)
    count, repeats = (8, 1) if args.quick else (64, 3)
    with tempfile.TemporaryDirectory() as folder:
        if args.data is None:
            draw_images(folder, count)
        files = sorted((args.data or Path(folder)).rglob("*"))
        paths = [str(path) for path in files if path.suffix.lower() in (".jpg", ".jpeg", ".png")]
        if not paths:
            parser.error(f"--data {args.data} has no images (.jpg, .jpeg or .png)")
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        benchmark_core(paths[:count], repeats)
        torch.set_num_threads(threads)
        if torch.cuda.is_available():
            benchmark_gpu(paths, args)
        else:
            print("There is no CUDA GPU here. With one, the training step is measured too.")

if __name__ == "__main__":
    main()
