"""Transfer (section 5.2 of the paper): how good are frozen features on other tasks?

    python extras/transfer.py --encoder runs/inat/encoder.pt random --task cifar100 --data DIR
    python extras/transfer.py --encoder runs/pmsn/encoder.pt runs/msn/encoder.pt random \
        --task folder clevr_count kitti_dist --data IMAGENET CLEVR KITTI --shots 1 2 5 13
    torchrun --nproc_per_node 8 extras/transfer.py ...    # eight GPUs compute the features
    python extras/transfer.py --quick                     # tiny, after train_inat.py --quick

An encoder is encoder.pt of train_inat.py, a checkpoint of MSN, weights of a vision transformer of
timm, or `random`: untrained weights in the shape of the first encoder. Every --task needs one
folder in --data, as the authors of the data set distribute it (see TASKS below):

    folder        classes of ImageNet, Places205, or your own images
    inat18        species of iNaturalist 2018
    cifar100      classes of CIFAR-100
    clevr_count   CLEVR: the number of objects, from 3 to 10
    clevr_dist    CLEVR: the distance of the closest object, in six bins
    kitti_dist    KITTI: the distance of the closest vehicle, in three bins, or no vehicle

Each encoder and task gets a linear probe, a k-NN classifier, and with --shots k a logistic
regression on k images per class, as in MSN. If there are several encoders, the first two are
compared. Run `pip install -e .` first. --out gets transfer.json, transfer.png (only for several
encoders), and the features, which are not computed again for other tasks with the same images.
"""

import argparse
import functools
import hashlib
import json
import math
import os
import time
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from torch.utils.data import Dataset
from torchvision.transforms import v2

import pmsn
import train_inat
from train_inat import number

PENALTIES = (0.0, 1e-4, 1e-3, 1e-2)  # of the linear probe
DRAWS = 3  # of the images for --shots

# ---- Tasks: (training, test), each with a list of images and labels (n,) -------------------------
def read_classes(data):
    """ImageNet, Places205, iNat18: the classes of the data set itself."""
    training, test = train_inat.find_images(data)
    if test is None:
        raise ValueError("there are no validation images")
    return training, test

def read_cifar100(data):
    splits = [torchvision.datasets.CIFAR100(data, train, download=True) for train in (True, False)]
    return [(split, torch.tensor(split.targets)) for split in splits]

def read_clevr(data, label_of):
    """Labels of the Visual Task Adaptation Benchmark (VTAB, Zhai et al., 2019).

    As there, the test images are those of CLEVR's validation, whose scenes are published.
    """
    splits = []
    for split in ("train", "val"):
        scenes = json.loads((data / "scenes" / f"CLEVR_{split}_scenes.json").read_text())["scenes"]
        paths = [str(data / "images" / split / scene["image_filename"]) for scene in scenes]
        splits.append((paths, torch.tensor([label_of(scene["objects"]) for scene in scenes])))
    return splits

def clevr_count(objects):
    return len(objects) - 3

def clevr_dist(objects):
    distance = min(shape["pixel_coords"][2] for shape in objects)
    return int(np.searchsorted((8.0, 8.5, 9.0, 9.5, 10.0), distance))

def read_kitti(data):
    """Labels of VTAB. Only the training images have labels, so a tenth of the videos is the test.

    The choice of these videos is the one of TensorFlow Datasets, which VTAB uses. VTAB's other
    two splits (training, validation) are one here. Was this the split of the paper too? (?)
    """
    lines = (data / "mapping" / "train_mapping.txt").read_text().splitlines()
    order = (data / "mapping" / "train_rand.txt").read_text().split(",")
    videos = np.array([lines[int(line) - 1].split()[1] for line in order])  # of every image
    names = np.unique(videos)
    chosen = np.random.RandomState(123).choice(names, max(1, len(names) // 10), replace=False)
    splits = [], []
    for i, is_test in enumerate(np.isin(videos, chosen)):
        objects = (data / "training" / "label_2" / f"{i:06}.txt").read_text()
        path = data / "training" / "image_2" / f"{i:06}.png"
        splits[int(is_test)].append((str(path), kitti_dist(objects)))
    return [(paths, torch.tensor(labels)) for paths, labels in (zip(*split) for split in splits)]

def kitti_dist(objects):
    """0 to 2: the closest vehicle is nearer than 8 m, 20 m, or farther. 3: there is no vehicle."""
    distances = [1000.0]
    for line in objects.splitlines():
        kind, *values = line.split()
        if kind in ("Car", "Van", "Truck"):
            distances.append(float(values[12]))  # z, along the axis of the camera, in meters
    return int(np.searchsorted((8.0, 20.0, 999.0), min(distances)))

# How a task is read, and what its folder must have.
CLEVR = "images/ and scenes/ of CLEVR_v1.0"
TASKS = {
    "folder": (read_classes, "train/<class>/ and val/<class>/"),
    "inat18": (read_classes, "train2018.json, val2018.json and train_val2018/"),
    "cifar100": (read_cifar100, "cifar-100-python/, or nothing, for a download"),
    "clevr_count": (functools.partial(read_clevr, label_of=clevr_count), CLEVR),
    "clevr_dist": (functools.partial(read_clevr, label_of=clevr_dist), CLEVR),
    "kitti_dist": (read_kitti, "training/image_2/, training/label_2/, and mapping/ of the devkit"),
}
# As in VTAB, these images are resized as a whole: a crop would lose objects.
WHOLE_IMAGES = ("clevr_count", "clevr_dist", "kitti_dist")

class InMemory(Dataset):
    """Items (transformed image, index, readable) of a data set of torchvision."""
    def __init__(self, dataset, transform):
        self.dataset, self.transform = dataset, transform
        self.paths = [f"{dataset} {i}" for i in range(len(dataset))]

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, index):
        image, _ = self.dataset[index]
        return self.transform(v2.functional.pil_to_tensor(image)), index, True

# ---- Encoders ------------------------------------------------------------------------------------
def load_encoder(path):
    """A vision transformer with the weights of a file. Its shape follows from the weights."""
    state = torch.load(path, map_location="cpu", weights_only=True)
    state = state.get("target_encoder", state)  # of a checkpoint of MSN
    state = {name.removeprefix("module."): weight for name, weight in state.items()}
    # Heads are not part of the encoder: "fc." in MSN, "head." in timm.
    state = {name: weight for name, weight in state.items() if name[:3] not in ("fc.", "hea")}
    dim, _, patch_size, _ = state["patch_embed.proj.weight"].shape
    grid = math.isqrt(state["pos_embed"].shape[1])
    depth = len({name.split(".")[1] for name in state if name.startswith("blocks.")})
    num_heads = 3 if dim <= 192 else dim // 64  # weights do not tell it
    encoder = pmsn.VisionTransformer(grid * patch_size, patch_size, dim, depth, num_heads)
    encoder.load_state_dict(state)
    return encoder

def random_encoder(like, seed):
    """Untrained weights in the shape of another encoder."""
    torch.manual_seed(seed)
    image_size, dim = like.grid[0] * like.patch_size, like.embed_dim
    num_heads, depth = like.blocks[0].attn.num_heads, len(like.blocks)
    return pmsn.VisionTransformer(image_size, like.patch_size, dim, depth, num_heads)

def features_of(encoder, images, whole, args, title):
    """Features (n, d) and indices (n,) of the readable images, from --out if they are there."""
    size = encoder.grid[0] * encoder.patch_size
    transform = v2.Resize((size, size), antialias=True) if whole else train_inat.center_crop(size)
    kind = train_inat.Images if isinstance(images, (list, tuple)) else InMemory
    images = kind(images, transform)
    # The name of the file depends on weights, image files and size.
    name = hashlib.sha1(repr((whole, list(images.paths))).encode())
    for weight in encoder.state_dict().values():
        name.update(weight.cpu().numpy().tobytes())
    path = args.out / f"features_{name.hexdigest()[:16]}.pt"
    is_there = [path.exists()]
    if args.world_size > 1:
        dist.broadcast_object_list(is_there)  # All processes do what the first one does.
    if is_there[0]:
        return torch.load(path, map_location=encoder.cls_token.device)
    indices = torch.arange(len(images.paths))
    found = train_inat.extract(encoder, images, indices, args.workers, args.rank, args.world_size,
                               functools.partial(progress, title=title))
    if args.rank == 0:
        torch.save(found, args.out / "temporary")
        os.replace(args.out / "temporary", path)
    return found

def progress(loader, title):
    """The batches of the loader. Prints how many are done, and the time that is left."""
    began = shown = time.time()
    for i, batch in enumerate(loader, start=1):
        yield batch
        if i == len(loader) or time.time() - shown > 10:
            shown = time.time()
            left = (shown - began) * (len(loader) / i - 1)
            print(f"{title}: {i:>6} of {len(loader)} batches {left:>7.0f}s left", flush=True)

# ---- Classifiers on frozen features (N, d): -> classes (Q,) of test features (Q, d) --------------
def probe(features, labels, test_features, seed):
    """The linear probe. A fifth of the training images chooses its penalty."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    held_out, kept = order.tensor_split([len(order) // 5])

    def accuracy(penalty):
        predicted = pmsn.linear_probe(features[kept], labels[kept], features[held_out], seed,
                                      penalty)
        return (predicted == labels[held_out]).float().mean()
    penalty = max(PENALTIES, key=accuracy)
    return pmsn.linear_probe(features, labels, test_features, seed, penalty)

def draw_shots(labels, shots, seed):
    """Indices of `shots` random images per class, or of all images of a smaller class."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    order = order.to(labels.device)
    return torch.cat([order[labels[order] == c][:shots] for c in labels.unique()])

def logistic_regression(features, labels, test_features, penalty=0.0025):
    """The low-shot classifier of MSN: minimizes sum(CE) + penalty / 2 * |W|^2, without a bias.

    As there, each feature vector is centered and gets unit length.
    """
    features, test_features = [F.normalize(x - x.mean(dim=1, keepdim=True), dim=1)
                               for x in (features, test_features)]
    weight = features.new_zeros(features.shape[1], int(labels.max()) + 1, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight], max_iter=500, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(features @ weight, labels)
        loss = loss + penalty / 2 / len(labels) * weight.square().sum()
        loss.backward()
        return loss
    optimizer.step(closure)
    return (test_features @ weight).argmax(dim=1)

def predict(training, test, args):
    """{classifier: one or more predictions (Q,)}."""
    (features, labels), (test_features, _) = training, test
    found = {"linear": [probe(features, labels, test_features, args.seed)],
             "k-NN": [pmsn.knn_predictions(features, labels, test_features,
                                           min(20, len(features)))]}
    for shots in args.shots:
        found[f"{shots} shots"] = []
        for draw in range(DRAWS):
            chosen = draw_shots(labels, shots, DRAWS * args.seed + draw)
            found[f"{shots} shots"].append(
                logistic_regression(features[chosen], labels[chosen], test_features))
    return found

# ---- Results -------------------------------------------------------------------------------------
def score(predictions, test_labels, labels):
    """Accuracies in percent: means over the predictions, and their spread."""
    found = []
    for predicted in predictions:
        accuracies = train_inat.accuracies("on", predicted, test_labels, labels)
        if len(accuracies) == 2:  # "all" and one group, which has all classes
            accuracies = {"on_all": accuracies["on_all"]}
        right = (predicted == test_labels).double()
        classes = [right[test_labels == c].mean().item() for c in test_labels.unique()]
        found.append({**accuracies, "on_class": np.mean(classes)})
    means = {name[3:]: 100 * np.mean([result[name] for result in found]) for name in found[0]}
    if len(found) > 1:
        means["std"] = 100 * np.std([result["on_all"] for result in found], ddof=1)
    return means

def compare(first, second, test_labels):
    """Percent that the first encoder is better, and the standard error over the test images.

    Both have the same test images, so the error is that of the difference per image.
    """
    first, second = [torch.stack([(x == test_labels).double() for x in predictions]).mean(dim=0)
                     for predictions in (first, second)]
    difference = 100 * (first - second)
    return difference.mean().item(), (difference.std() / math.sqrt(len(difference))).item()

def print_tables(results, differences):
    columns = "all class many medium few std".split()
    print("\naccuracy in percent (class: mean over classes, std: over draws of shots)")
    print(f"{'task':<12}{'classifier':<12}" + "".join(f"{x:>10}" for x in columns) + "  encoder")
    for row in results:
        cells = [f"{row[x]:.2f}" if x in row else "" for x in columns]
        print(f"{row['task']:<12}{row['classifier']:<12}" + "".join(f"{x:>10}" for x in cells)
              + f"  {row['encoder']}")
    if differences:
        print("\nfirst encoder - second encoder (± standard error over the test images)")
    for row in differences:
        print(f"{row['task']:<12}{row['classifier']:<12}{row['mean']:>+10.2f} ± "
              f"{row['standard_error']:.2f}")

def plot(differences, encoders, path):
    """How much better the first encoder is than the second: a bar per task and classifier."""
    figure, ax = plt.subplots(figsize=(8, 2 + 0.35 * len(differences)), layout="constrained")
    names = [f"{row['task']}, {row['classifier']}" for row in differences]
    means = np.array([row["mean"] for row in differences])
    errors = 2 * np.array([row["standard_error"] for row in differences])
    colors = np.where(means > 0, "#2e86ab", "#d1495b")
    ax.barh(names, means, xerr=errors, color=colors, capsize=3)
    ax.invert_yaxis()
    ax.axvline(0, color="black", linewidth=1)
    ax.set_xlabel("difference of the accuracies in percent, ± 2 standard errors over test images")
    better, worse = (means > errors).sum(), (means < -errors).sum()
    figure.suptitle(f"{encoders[0]} is better in {better} and worse in {worse}\n"
                    f"of {len(means)} comparisons with {encoders[1]}")
    figure.savefig(path)

# ---- Command line --------------------------------------------------------------------------------
def parse(argv):
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--encoder", nargs="+", default=[], help="files of weights, or random")
    add("--task", nargs="+", default=[], choices=TASKS, help="what the features are tested on")
    add("--data", nargs="+", default=[], type=Path, help="one folder per task")
    add("--shots", nargs="+", default=[], type=number(int, 1), help="images per class")
    add("--out", type=Path, default="runs/transfer", help="folder for results and features")
    add("--workers", type=number(int, 0), default=8, help="processes per device that load images")
    add("--seed", type=number(int, 0, 2**30), default=0, help="of random weights and of the shots")
    add("--quick", action="store_true", help="tiny network and images of train_inat.py --quick")
    args = parser.parse_args(argv)
    args.rank = int(os.environ.get("RANK", 0))  # of torchrun
    args.world_size = int(os.environ.get("WORLD_SIZE", 1))
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        if args.quick:
            folder = args.out / "train_inat"
            train_inat.main(["--quick", "--out", str(folder)])
            args.encoder, args.task = [str(folder / "encoder.pt"), "random"], ["folder"]
            args.data, args.shots, args.workers = [folder / "quick_images"], [1, 5], 0
    except OSError as error:
        parser.error(f"cannot write to --out: {error}")
    if not args.encoder or not args.task or len(args.task) != len(args.data):
        parser.error("give at least one --encoder and one --task, and one --data per --task")
    encoders = {}
    for name in args.encoder:
        try:
            encoders[name] = None if name == "random" else load_encoder(name)
        except Exception as error:  # whatever a wrong file can cause
            parser.error(f"--encoder {name} has no weights of a vision transformer: {error!r:.200}")
    trained = [encoder for encoder in encoders.values() if encoder]
    like = trained[0] if trained else pmsn.VisionTransformer()
    encoders = {name: encoder or random_encoder(like, args.seed)
                for name, encoder in encoders.items()}
    splits = {}
    for task, data in zip(args.task, args.data):
        try:
            read, layout = TASKS[task]
            splits[task] = read(data)
        except Exception as error:  # whatever a wrong folder can cause
            parser.error(f"--data {data} must have {layout} for {task}: {error!r:.200}")
    return args, encoders, splits

def main(argv=None):
    args, encoders, splits = parse(argv)
    cuda = torch.cuda.is_available()
    device = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if cuda else "cpu")
    if args.world_size > 1:
        dist.init_process_group("nccl" if cuda else "gloo")
    results, differences = [], []
    for task, (training, test) in splits.items():
        predictions = {}
        for name, encoder in encoders.items():
            encoder.to(device).eval()
            found = []
            for title, (images, labels) in (("training", training), ("test", test)):
                features, indices = features_of(encoder, images, task in WHOLE_IMAGES, args,
                                                f"{task}, {name}, {title} images")
                found.append((features, labels.to(device)[indices]))
            if args.rank == 0:
                predictions[name] = predict(*found, args)
        if args.rank > 0:
            continue
        labels, test_labels = found[0][1], found[1][1]
        for classifier in predictions[name]:
            both = [predictions[name][classifier] for name in encoders]
            about = {"task": task, "classifier": classifier}
            for name, predicted in zip(encoders, both):
                scores = score(predicted, test_labels, labels)
                results.append({**about, "encoder": name, **scores})
            if len(both) > 1:
                mean, error = compare(*both[:2], test_labels)
                differences.append({**about, "mean": mean, "standard_error": error})
        content = {"config": {**vars(args), "torch": torch.__version__},
                   "results": results, "differences": differences}
        (args.out / "transfer.json").write_text(json.dumps(content, indent=1, default=str))
    if args.rank == 0:
        print_tables(results, differences)
        if differences:
            plot(differences, list(encoders), args.out / "transfer.png")
        print(f"results and features are in {args.out}")
    if args.world_size > 1:
        dist.destroy_process_group()

if __name__ == "__main__":
    main()
