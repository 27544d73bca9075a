"""Transfer (section 5.2 of the paper): how good are frozen features on other tasks?

    python extras/transfer.py --encoder runs/inat/encoder.pt random --task cifar100 --data DIR
    python extras/transfer.py --encoder runs/pmsn/encoder.pt runs/msn/encoder.pt random \
        --task folder clevr_count kitti_dist --data IMAGENET CLEVR KITTI --shots 1 2 5 13
    torchrun --nproc_per_node 8 extras/transfer.py ...    # eight GPUs compute the features
    python extras/transfer.py --quick                     # a tiny network and images of noise

An encoder is encoder.pt or checkpoint.pt of train_inat.py (its target encoder), a checkpoint of
MSN, DINO or MAE, weights of a vision transformer of timm that expect the mean and the standard
deviation of ImageNet, or `random`: untrained weights in the shape of the last file in --encoder.
Every --task needs one folder in --data (see TASKS below):

    folder        classes of ImageNet, Places205, or your own images (inat18: of iNaturalist 2018)
    cifar100      classes of CIFAR-100
    clevr_count   CLEVR: the number of objects, from 3 to 10
    clevr_dist    CLEVR: the distance of the closest object, in six bins
    kitti_dist    KITTI: the distance of the closest vehicle, in three bins, or no vehicle

Each encoder and task gets a linear probe, a k-NN classifier, and with --shots k a logistic
regression on k images per class. If there are several encoders, the first two are compared. --out
gets transfer.json, transfer.png (only for several encoders), and the features, which are not
computed again for the same weights and file names.
"""

import argparse
import hashlib
import json
import math
import pickle
import re
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from torchvision.transforms import v2

# The other scripts are in the folder above, and are not installed.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import pmsn
from support.evaluation import (accuracies, extract, knn_predictions, linear_probe,
                                logistic_regression)
from support.figures import Figure, write_figure
from support.images import Images, center_crop, draw_noise, find_images
from support.results import made_by, save_json
from support.runs import (Parser, UserError, available_cores, command, folder, load_file,
                          lock_folder, number, rank, save_file, say, start_processes, world_size)

NUM_HEADS = {96: 3, 192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16}  # of features of this dimension
PENALTIES = (0.1, 1.0, 10.0, 100.0, 1000.0)  # of the linear probe
DRAWS = 3  # random choices of the images for --shots


# ---- Tasks: [(images, labels (n,))] of training and test. Images are paths or a data set ---------
def read_classes(data):
    """The classes of the data set itself: ImageNet, Places205, iNat18."""
    training, test = find_images(data)
    if test is None:
        raise ValueError("there are no validation images")
    return training, test


def read_cifar100(data):
    download = world_size() == 1  # Several processes would collide.
    splits = [torchvision.datasets.CIFAR100(data, train, download=download)
              for train in (True, False)]
    return [(split, torch.tensor(split.targets)) for split in splits]


def read_item(dataset, index):
    """An image of a data set of torchvision, uint8 (3, H, W)."""
    image, _ = dataset[int(index)]
    return v2.functional.pil_to_tensor(image)


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


def clevr_dist(objects):
    distance = min(shape["pixel_coords"][2] for shape in objects)
    return int(np.searchsorted((8.0, 8.5, 9.0, 9.5, 10.0), distance))  # how many are smaller


def read_kitti(data):
    """Labels of VTAB. Only KITTI's training images have labels: a tenth of its videos is the test.

    These are the test videos of TensorFlow Datasets, from which VTAB reads. We do not know the
    test images of the paper (?). Those of VISSL are random frames, which makes the task easier.
    """
    mapping = (data / "mapping" / "train_mapping.txt").read_text().splitlines()
    row_of_image = (data / "mapping" / "train_rand.txt").read_text().split(",")
    videos = np.array([mapping[int(row) - 1].split()[1] for row in row_of_image])  # of all images
    all_videos = np.unique(videos)
    random = np.random.RandomState(123)  # the seed of TensorFlow Datasets
    test_videos = random.choice(all_videos, len(all_videos) // 10, replace=False)
    training, test = ([], []), ([], [])
    for i, video in enumerate(videos):
        objects = (data / "training" / "label_2" / f"{i:06}.txt").read_text()
        paths, labels = test if video in test_videos else training
        paths.append(str(data / "training" / "image_2" / f"{i:06}.png"))
        labels.append(kitti_dist(objects))
    return [(paths, torch.tensor(labels)) for paths, labels in (training, test)]


def kitti_dist(objects):
    """0: the closest vehicle is at most 8 m away. 1: at most 20 m. 2: farther. 3: no vehicle."""
    distances = [1000.0]
    for line in objects.splitlines():
        words = line.split()
        if words[0] in ("Car", "Van", "Truck"):
            distances.append(float(words[13]))  # z in meters, along the axis of the camera
    return int(np.searchsorted((8.0, 20.0, 999.0), min(distances)))

# How a task is read, and what its folder must have.
CLEVR = "images/ and scenes/ of CLEVR_v1.0"
TASKS = {
    "folder": (read_classes, "train/<class>/*.jpg and val/<class>/*.jpg"),
    "inat18": (read_classes, "train2018.json, val2018.json and train_val2018/"),
    "cifar100": (read_cifar100, "cifar-100-python/ (one process downloads it)"),
    "clevr_count": (lambda data: read_clevr(data, lambda objects: len(objects) - 3), CLEVR),
    "clevr_dist": (lambda data: read_clevr(data, clevr_dist), CLEVR),
    "kitti_dist": (read_kitti, "training/image_2/, training/label_2/, and mapping/ of the devkit"),
}


# ---- Encoders and their features -----------------------------------------------------------------
# Checkpoints have their weights below one of these keys. The keys of the first line are for moving
# averages of the weights below the others, so they are better if a file has both.
WEIGHT_SETS = ("target_encoder", "teacher", "state_dict_ema", "model_ema",
               "state_dict", "model", "student", "encoder")
# What DistributedDataParallel, DINO and pmsn.PMSN put before the names of the encoder's weights.
PREFIXES = ("module.", "backbone.", "target_encoder.")
# What is beside the encoder: heads of MSN (fc, pred), of timm and DINO (head), MAE's decoder.
OTHER_PARTS = ("fc.", "pred.", "head.", "mask_token", "decoder_")
# Many checkpoints hold the flags of their training, which are data and run no code.
torch.serialization.add_safe_globals([argparse.Namespace])


def read_weights(path):
    """The encoder's weights in a file, {name: tensor}, with the names that timm gives them.

    Raises an error of one line that says what is wrong with the file.
    """
    try:
        weights = load_file(path)
    except (pickle.UnpicklingError, EOFError) as error:
        # The message of torch is long, and begins with advice.
        refused = re.search(r"GLOBAL ([\w.]+) w", str(error))  # "was not allowed", "whose module"
        if refused:
            raise ValueError(f"the file has a Python object of the class {refused[1]}; save only "
                             "its weights") from error
        reason = str(error).rpartition("WeightsUnpickler error:")[2].strip().partition("\n")[0]
        raise ValueError("torch.load cannot read the file "
                         f"({reason or 'it is empty or ends too early'})") from error
    if not isinstance(weights, dict):
        raise ValueError(f"the file has a {type(weights).__name__} instead of a dict of weights")
    while sets := [key for key in WEIGHT_SETS if isinstance(weights.get(key), dict)]:
        if len(sets) > 1:
            say(f"{path} has several sets of weights: we take {sets[0]}, not "
                f"{' or '.join(sets[1:])}")
        weights = weights[sets[0]]
    # torch.compile puts _orig_mod before the names in whatever it has compiled: the whole network,
    # or each block.
    weights = {str(name).replace("_orig_mod.", ""): weight for name, weight in weights.items()
               if isinstance(weight, torch.Tensor)}
    # Prefixes come in any order and number. Each pass takes one off, and leaves out what does not
    # have it: that is another part of the network.
    while "patch_embed.proj.weight" not in weights:
        prefix = next((prefix for prefix in PREFIXES
                       if any(name.startswith(prefix) for name in weights)), None)
        if prefix is None:
            found = ", ".join(weights)[:60] or "no tensors"
            raise ValueError("expected names as in encoder.pt, such as patch_embed.proj.weight, "
                             f"and found {found}")
        weights = {name.removeprefix(prefix): weight for name, weight in weights.items()
                   if name.startswith(prefix)}
    return {name: weight for name, weight in weights.items() if not name.startswith(OTHER_PARTS)}


def load_encoder(path):
    """A vision transformer with the weights of a file. Its shape follows from the weights."""
    weights = read_weights(path)
    shape = weights["patch_embed.proj.weight"].shape  # (embed_dim, 3, patch_size, patch_size)
    if len(shape) != 4:
        raise ValueError(f"patch_embed.proj.weight has the shape {tuple(shape)}, which is not that "
                         "of a convolution over images")
    dim, patch_size = shape[0], shape[-1]
    if "pos_embed" not in weights:
        raise ValueError("there are no position embeddings (pos_embed)")
    if dim not in NUM_HEADS:
        raise ValueError(f"we do not know the number of heads for features of {dim} numbers, only "
                         f"for {', '.join(map(str, NUM_HEADS))}")
    # A square of patches has an embedding per patch, and one more is for the CLS token. The root
    # of both together rounds down to the side of the square.
    grid = math.isqrt(weights["pos_embed"].numel() // dim)
    depth = len({name.split(".")[1] for name in weights if name.startswith("blocks.")})
    encoder = pmsn.VisionTransformer(grid * patch_size, patch_size, dim, depth, NUM_HEADS[dim])
    # load_state_dict would list all differences, and they can be hundreds.
    found, expected = [{name: tuple(weight.shape) for name, weight in state.items()}
                       for state in (weights, encoder.state_dict())]
    wrong = [name for name in {**found, **expected} if found.get(name) != expected.get(name)]
    if wrong:
        raise ValueError(f"{wrong[0]} has the shape {found.get(wrong[0], 'none')} in the file and "
                         f"{expected.get(wrong[0], 'none')} in a plain vision transformer. "
                         f"{len(wrong)} weights differ")
    encoder.load_state_dict(weights)
    return encoder


def random_encoder(like, seed):
    """Untrained weights in the shape of another encoder."""
    torch.manual_seed(seed)
    return pmsn.VisionTransformer(like.grid[0] * like.patch_size, like.patch_size, like.embed_dim,
                                  len(like.blocks), like.blocks[0].attn.num_heads)


def prepare(encoder, images, task, content, start):
    """The data set of an encoder, and the file in which its features are kept: start_hash.pt."""
    size = encoder.grid[0] * encoder.patch_size
    # As in VTAB, these images are resized as a whole. A crop would lose objects.
    whole = task in ("clevr_count", "clevr_dist", "kitti_dist")
    transform = (v2.Resize((size, size), antialias=True) if whole else
                 partial(center_crop, size=size))
    if task == "cifar100":
        dataset = Images(range(len(images)), transform, partial(read_item, images))
    else:
        dataset = Images(images, transform)
    # Other weights, images or crops, or another precision (bfloat16 on GPUs) get another file.
    content.update(repr((whole, torch.cuda.is_available())).encode())
    content.update(dataset.paths.tobytes())
    return dataset, Path(f"{start}_{content.hexdigest()[:12]}.pt")


def compute(encoder, dataset, path, args, title):
    """Write the features (n, d) of all readable images, and the indices (n,) of these images."""
    watch = partial(progress, title=title) if rank() == 0 else iter
    found = extract(encoder, dataset, args.workers, watch)
    if rank() == 0:
        if not found[0].isfinite().all():
            raise UserError(f"{title}: there are features that are not finite")
        save_file(found, path)


def is_whole(path):
    """Whether there is such a file of features. A damaged one is computed again."""
    try:
        load_file(path)
    except Exception:  # A damaged file leads to many kinds of errors.
        return False
    return True


def load_features(path, num_images, device):
    """Features (n, d) of the readable images, and the indices (n,) of these images."""
    features, indices = load_file(path)
    if len(indices) < num_images:
        say(f"{num_images - len(indices)} of {num_images} images could not be read. Delete "
            f"{path} to try again")
    return features.to(device), indices.to(device)


def progress(loader, title):
    """The batches of the loader. Prints how many are done, and the time that is left."""
    began = time.monotonic()
    for i, batch in enumerate(loader, start=1):
        yield batch
        if i % 20 == 0 or i == len(loader):
            left = (time.monotonic() - began) * (len(loader) / i - 1)
            say(f"{title}: {i:>6} of {len(loader)} batches {left:>7.0f}s left")


# ---- Classifiers: features (N, d), labels (N,), test features (Q, d) -> classes (Q,) -------------
def probe(features, labels, test_features, seed):
    """The linear probe, and its penalty: the best one for a fifth of the training images."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    held_out, kept = order.tensor_split([len(order) // 5])

    def accuracy(penalty):
        predicted = linear_probe(features[kept], labels[kept], features[held_out], penalty)
        return (predicted == labels[held_out]).float().mean()

    penalty = max(PENALTIES, key=accuracy)
    # The probe that is tested learns from all training images.
    return linear_probe(features, labels, test_features, penalty), penalty


def draw_shots(labels, shots, seed):
    """Indices of `shots` random images per class, or of all images of a smaller class."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    order = order.to(labels.device)
    shuffled = labels[order]
    return torch.cat([order[shuffled == c][:shots] for c in labels.unique()])


def low_shot(features, labels, test_features):
    """The low-shot classifier of MSN: logistic regression without biases, with the penalty .0025.

    As there, each feature vector is centered and gets unit length. MSN takes features before the
    last LayerNorm, and we take them after it, as in all our evaluations.
    """
    features, test_features = [F.normalize(x - x.mean(dim=1, keepdim=True), dim=1)
                               for x in (features, test_features)]
    # There is one column of weights per number from 0, and labels can have large gaps.
    classes, labels = labels.unique(return_inverse=True)
    weight, _ = logistic_regression(features, labels, penalty=0.0025, with_bias=False)
    return classes[(test_features @ weight).argmax(dim=1)]


def predict(features, labels, test_features, args):
    """{classifier: predictions (draws, Q)}, with one draw except for --shots, and the penalty."""
    linear, penalty = probe(features, labels, test_features, args.seed)
    knn = knn_predictions(features, labels, test_features)
    found = {"linear": linear[None], "k-NN": knn[None]}
    for shots in args.shots:
        draws = []
        for draw in range(DRAWS):
            chosen = draw_shots(labels, shots, DRAWS * args.seed + draw)
            draws.append(low_shot(features[chosen], labels[chosen], test_features))
        found[f"{shots}-shot"] = torch.stack(draws)
    return found, penalty


# ---- Results -------------------------------------------------------------------------------------
def score(predictions, test_labels, labels):
    """Accuracies in percent: means over the draws (draws, Q), and the spread of "all"."""
    rows = []
    for predicted in predictions:
        row = accuracies(predicted, test_labels, labels)
        if len(row) == 2:  # "all", and one group with the same images
            row = {"all": row["all"]}
        right = (predicted == test_labels).double()
        classes = [right[test_labels == c].mean().item() for c in test_labels.unique()]
        rows.append({**row, "class": np.mean(classes)})
    means = {name: 100 * np.mean([row[name] for row in rows]) for name in rows[0]}
    if len(rows) > 1:
        means["std"] = 100 * np.std([row["all"] for row in rows], ddof=1)
    return means


def compare(first, second, test_labels):
    """By how many points the first encoder is better, and the standard error of this number.

    Both predictions (draws, Q) are about the same images, so we take the spread of the difference.
    """
    difference = 100 * ((first == test_labels).double() - (second == test_labels).double())
    variance = difference.mean(dim=0).var() / len(test_labels)
    if len(difference) > 1:
        # Other test images and other draws would both change the difference: variances add up.
        variance = variance + difference.mean(dim=1).var() / len(difference)
    return difference.mean().item(), variance.sqrt().item()


def print_tables(results, differences):
    columns = "all class many medium few std".split()
    say("\naccuracy in percent (class: mean over the classes, std: over draws of the shots)")
    say(f"{'task':<24}{'classifier':<10}" + "".join(f"{x:>9}" for x in columns) + "  encoder")
    for row in results:
        cells = [f"{row[x]:.2f}" if x in row else "" for x in columns]
        say(f"{row['task']:<24}{row['classifier']:<10}" + "".join(f"{x:>9}" for x in cells)
              + f"  {row['encoder']}")
    if differences:
        say("\nfirst encoder - second encoder (+- standard error)")
    for row in differences:
        say(f"{row['task']:<24}{row['classifier']:<10}{row['mean']:>+9.2f} +- "
              f"{row['standard_error']:.2f}")


def plot(differences, encoders):
    """How much better the first encoder is than the second: a bar per task and classifier."""
    figure = Figure(figsize=(8, 2 + 0.35 * len(differences)), layout="constrained")
    ax = figure.subplots()
    names = [f"{row['task']}, {row['classifier']}" for row in differences]
    means = np.array([row["mean"] for row in differences])
    errors = 2 * np.array([row["standard_error"] for row in differences])
    ax.barh(names, means, xerr=errors, color="#2e86ab", capsize=3)
    ax.invert_yaxis()
    ax.axvline(0, color="black", linewidth=1)
    ax.set_xlabel("difference of accuracies in points, with two standard errors")
    better, worse = (means > errors).sum(), (means < -errors).sum()
    figure.suptitle(f"{encoders[0]} is better in {better} and worse in {worse}\n"
                    f"of {len(means)} comparisons with {encoders[1]}")
    return figure


# ---- Command line --------------------------------------------------------------------------------
def one_line(error):
    """What an error says, in one line of at most 200 characters."""
    text = str(error)
    if not isinstance(error, (OSError, ValueError)):
        text = f"{type(error).__name__}: {text}"  # KeyError, for example, only has the key.
    return " ".join(text.split())[:200]


def parse(argv):
    parser = Parser("Transfer (section 5.2 of the paper): frozen features on other tasks")
    add = parser.add_argument
    add("--encoder", nargs="+", default=[], help="files of weights, or random")
    add("--task", nargs="+", default=[], choices=TASKS, help="what the features are tested on")
    add("--data", nargs="+", default=[], type=Path, help="one folder per task")
    add("--shots", nargs="+", default=[], type=number(int, 1), help="images per class")
    add("--out", type=folder, default="runs/transfer", help="folder for results and features")
    add("--workers", type=number(int, 0, 1000), default=min(8, available_cores()),
        help="processes per device that load images: 8, or the number of cores")
    add("--seed", type=number(int, 0, 2**30), default=0, help="of random weights and of the shots")
    add("--quick", action="store_true", help="a tiny untrained network, and images of noise")
    args = parser.parse_args(argv)
    if args.quick:
        if world_size() > 1:
            parser.error("--quick is for one process")
        args.encoder, args.task = [str(args.out / "quick_encoder.pt"), "random"], ["folder"]
        args.data, args.shots, args.workers = [args.out / "quick_images"], [1, 5], 0
    if not args.encoder or not args.task or len(args.task) != len(args.data):
        parser.error("give at least one --encoder and one --task, and one --data per --task")
    names = [f"{task} {data.name}" if task == "folder" else task
             for task, data in zip(args.task, args.data)]
    if len({*names}) < len(names) or len({*args.encoder}) < len(args.encoder):
        parser.error("the same --task, or folder of the same name, or --encoder, is given twice")
    return args, names


def load(args, names):
    """{name: encoder}, and [(name, task, folder, training, test)] of all tasks."""
    encoders, like, tasks = {}, None, []
    for name in args.encoder:
        try:
            if name != "random":
                encoders[name] = like = load_encoder(name)
        except Exception as error:  # whatever a wrong file can cause
            raise UserError(f"--encoder {name} has no weights of a vision transformer that can be "
                            f"read: {one_line(error)}") from error
    if "random" in args.encoder:
        encoders["random"] = random_encoder(like or pmsn.VisionTransformer(), args.seed)
    encoders = {name: encoders[name] for name in args.encoder}  # in the order of the command line
    for name, task, data in zip(names, args.task, args.data):
        read, layout = TASKS[task]
        try:
            training, test = read(data)
            if len(test[1]) < 2:
                raise ValueError("there are fewer than two test images")
            tasks.append((name, task, data, training, test))
        except Exception as error:  # whatever a wrong folder can cause
            raise UserError(
                f"--data {data} must have {layout} for {task}: {one_line(error)}") from error
    return encoders, tasks


@command
def main(argv=None):
    args, names = parse(argv)
    maker = made_by()
    device = start_processes()
    lock = lock_folder(args.out) if rank() == 0 else None
    if args.quick:
        draw_noise(args.data[0])
        torch.manual_seed(1)
        small = pmsn.VisionTransformer(32, 4, embed_dim=96, depth=2, num_heads=3).state_dict()
        save_file(small, Path(args.encoder[0]))
    encoders, tasks = load(args, names)
    # All processes compute the features that are missing. Two tasks can have the same features.
    files, missing = {}, {}
    for encoder_name, encoder in encoders.items():
        tensors = encoder.state_dict().values()
        weights = hashlib.sha1(b"".join(weight.numpy().tobytes() for weight in tensors))
        for name, task, data, *splits in tasks:
            for split, (images, _) in zip(("training", "test"), splits):
                start = args.out / f"{data.name}_{split}"
                dataset, path = prepare(encoder, images, task, weights.copy(), start)
                files[name, encoder_name, split] = path
                if not is_whole(path):
                    missing[path] = encoder, dataset, f"{name}, {encoder_name}, {split} images"
    for path, (encoder, dataset, title) in missing.items():
        compute(encoder.to(device), dataset, path, args, title)
    if world_size() > 1:
        torch.distributed.destroy_process_group()
    if rank() > 0:
        return

    results, differences = [], []
    for name, _, _, (_, labels), (_, test_labels) in tasks:
        answers = {}
        for encoder_name in encoders:
            (features, indices), (test_features, test_indices) = [
                load_features(files[name, encoder_name, split], num_images, device)
                for split, num_images in (("training", len(labels)), ("test", len(test_labels)))]
            found, penalty = predict(features, labels.to(device)[indices], test_features, args)
            say(f"{name}, {encoder_name}: the linear probe has the penalty {penalty:g}")
            for classifier, predicted in found.items():
                # An image that cannot be read counts as a wrong answer.
                answer = torch.full((len(predicted), len(test_labels)), -1)
                answer[:, test_indices.cpu()] = predicted.cpu()
                answers.setdefault(classifier, []).append(answer)
        for classifier, of_encoders in answers.items():
            about = {"task": name, "classifier": classifier}
            for encoder_name, answer in zip(encoders, of_encoders):
                scores = score(answer, test_labels, labels)
                results.append({**about, "encoder": encoder_name, **scores})
            if len(encoders) > 1:
                mean, error = compare(*of_encoders[:2], test_labels)
                differences.append({**about, "mean": mean, "standard_error": error})
        content = {"config": vars(args), "made_by": [maker], "results": results,
                   "differences": differences}
        save_json(content, args.out / "transfer.json")
    print_tables(results, differences)
    if differences:
        write_figure(args.out / "transfer.png", plot, differences, list(encoders))
    say(f"Results and features are in {args.out}")
    lock.close()


if __name__ == "__main__":
    main()
