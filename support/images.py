"""Images on disk: which ones there are, with which labels, and how they are read.

All scripts decode images here. An image that cannot be read is named, and training goes on with the
next one. More than 1% of them end the run.
"""

import hashlib
import json
import os
import re
import unicodedata
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch.utils.data import Dataset
from torchvision.datasets import FakeData
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms import v2

import pmsn
from support.runs import UserError, say, warn, world_size

IMAGE_ENDINGS = (*IMG_EXTENSIONS, ".jfif", ".jpe", ".gif")  # .jpg, .png and so on


# ---- Data sets -----------------------------------------------------------------------------------
def find_images(data, lists=(), out=None):
    """(paths, labels (N,)) of the training images, and of the validation images or None.

    `data` is a folder of iNaturalist, or with folders of images. `lists` are text files in place of
    folders. `out` must not be beside classes or in one. Labels are the numbers of the classes in
    the order of their names. Raises ValueError or OSError with the reason if this is no data set.
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
    """[folder of the training images], or [... and folder of the validation images].

    `data` itself has the training images if its subfolders are classes. If it has a subfolder named
    train (or training), this one has, and val (or valid, validation) has the validation images.
    """
    subfolders = [path for path in sorted(data.iterdir())
                  if path.is_dir() and not path.name.startswith(".")]

    def named(*names):
        return [path for path in subfolders if path.name.lower() in names]

    train = named("train", "training")
    val, test = named("val", "valid", "validation"), named("test", "testing")
    splits = [*train, *val, *test]
    others = [path for path in subfolders if path not in splits]
    # One of the classes may have the name train, as in CIFAR-100, or test. Then there are images in
    # it, and no folders of classes.
    have_classes = any(child.is_dir() for path in splits for child in path.iterdir())
    if not have_classes and (others or not splits):
        return [data]
    for found in (train, val, test):
        if len(found) > 1:
            raise ValueError(f"which one is it: {' or '.join(path.name for path in found)}?")
    if not train:
        raise ValueError(f"there is a folder {splits[0].name}, but no folder train")
    unused = [path.name for path in (*others, *test)]
    if unused:
        say(f"not used: {', '.join(unused[:5])}{' ...' if len(unused) > 5 else ''}. Only "
            f"{' and '.join(path.name for path in (*train, *val))} are")
    return [*train, *val]


def read_folder(folder):
    """(paths, classes) of the images in class folders, in the order of names.

    Hidden files are skipped. Other files that are no images by their names are counted in a line.
    """
    paths, classes, others = [], [], []
    for entry in sorted(folder.iterdir()):
        if entry.is_dir() and not entry.name.startswith("."):
            images, no_images = image_files(entry, above=[os.path.realpath(folder)])
            paths += images
            others += no_images
            # Unicode has two forms of letters with accents, which look the same. Linux keeps the
            # form that it gets, and a copy from a Mac can have the other one.
            classes += [unicodedata.normalize("NFC", entry.name)] * len(images)
    if others:
        endings = sorted({os.path.splitext(path)[1] or os.path.basename(path) for path in others})
        say(f"not used: {len(others)} files in {folder} that end in {', '.join(endings[:5])}"
            + (" ..." if len(endings) > 5 else ""))
    if not paths:
        raise ValueError(f"{folder} has no folders with images ({', '.join(IMAGE_ENDINGS)})")
    return paths, classes


def image_files(folder, above):
    """The paths of images, and those of other files, in a folder and its subfolders.

    `above` are the folders above it.
    """
    real = os.path.realpath(folder)
    images, others = [], []
    if real in above:  # A symbolic link to a folder above would never end.
        return images, others
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        if entry.name.startswith("."):
            continue
        if os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir():
            found = image_files(entry.path, [*above, real])
            images += found[0]
            others += found[1]
        elif not entry.name.lower().endswith(IMAGE_ENDINGS):
            others.append(entry.path)
        # A broken link is kept, and later named as an unreadable image. A named pipe is not.
        elif entry.is_symlink() and not os.path.exists(entry.path) or entry.is_file():
            images.append(entry.path)
    return images, others


def read_json(file):
    """(paths, categories) of the images in a file of iNaturalist."""
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
    """(paths, labels) of lines "path label", as in ImageNet-LT. Paths start at the folder."""
    # Names of files may have any bytes. Some editors put an invisible mark (sig) at the beginning.
    text = file.read_text(encoding="utf-8-sig", errors="surrogateescape")
    paths, labels = [], []
    for i, line in enumerate(text.rstrip().split("\n"), start=1):
        words = line.rsplit(maxsplit=1)
        if len(words) < 2 or not words[1].isdecimal():
            raise ValueError(f"every line of {file} must be a path and the number of a class, but "
                             f"line {i} is {line!r:.200}")
        paths.append(os.path.join(folder, words[0]))
        labels.append(int(words[1]))
    return paths, labels


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


def draw_noise(folder, count=400):
    """Images of noise in train/class0 to class7 and val/class0 to class7, for --quick runs."""
    try:
        for i, (image, label) in enumerate(FakeData(count, (3, 64, 64), 8)):
            class_folder = folder / ("train" if i % 5 else "val") / f"class{label}"
            class_folder.mkdir(parents=True, exist_ok=True)
            image.save(class_folder / f"{i}.jpg")
    except OSError as error:
        raise UserError(f"cannot write images for --quick: {error}") from error


# ---- Reading -------------------------------------------------------------------------------------
def open_image(path):
    """An image file as a PIL image in RGB, turned as its EXIF orientation says.

    Gray levels of 16 bits lose their lower 8 bits. Raises OSError with path and reason if the file
    cannot be read.
    """
    try:
        if not os.path.isfile(path):  # Opening a named pipe would wait for ever.
            raise OSError("there is no such file")
        with Image.open(path) as image:
            # PNG and PGM have at most 16 bits, but PIL may read them as 32.
            if image.mode.startswith("I;16") or (image.mode == "I"
                                                 and image.format in ("PNG", "PPM")):
                levels = np.asarray(image).astype(np.int64) >> 8
                image, info = Image.fromarray(levels.astype(np.uint8)), image.info
                image.info.update(info)  # the EXIF orientation
            elif image.mode in ("I", "F"):
                # We do not know which number is white. PIL would take everything above 255 for it.
                raise OSError("it has gray levels of 32 bits, convert it to 8 bits")
            image = image.convert("RGB")
    except Exception as error:  # A damaged file leads to many kinds of errors.
        raise OSError(f"{path}: {str(error) or repr(error)}") from error
    try:
        ImageOps.exif_transpose(image, in_place=True)
    except Exception:  # A damaged EXIF field says nothing about the pixels.
        pass
    return image


def decode(path):
    """An image file as uint8 (3, H, W). See `open_image`."""
    return v2.functional.pil_to_tensor(open_image(path))


def center_crop(image, size):
    """The middle of an image: resized to 256 / 224 of the size, then cropped. (3, H, W) -> square.

    A square is cut out first, because a strip of 1 x 20,000 pixels would become enormous.
    """
    square = v2.functional.center_crop(image, [min(image.shape[1:])])
    resized = v2.functional.resize(square, [round(size * 256 / 224)], antialias=True)
    return v2.functional.center_crop(resized, [size])


def normalize_images(images):
    """Images (N, 3, H, W), uint8 or in [0, 1], as an encoder expects them."""
    images = v2.functional.to_dtype(images, torch.float32, scale=True)
    return v2.functional.normalize(images, pmsn.IMAGENET_MEAN, pmsn.IMAGENET_STD)


class Images(Dataset):
    """Items (transformed image, index, readable). The next image replaces an unreadable one.

    `read` maps a path to an image uint8 (3, H, W). A data set that is not made of files can have
    numbers in place of paths, and a `read` for them.
    """
    def __init__(self, paths, transform, read=decode):
        # All workers share an array. A list of strings would be copied into each of them. Names of
        # files are bytes.
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

    def why_unreadable(self, index):
        """Read an image again for the reason why this is not possible."""
        try:
            self.read(self.path(index))
        except Exception as error:
            reason = str(error).removeprefix(f"{self.path(index)}: ")
            return " ".join(reason.split()) or repr(error)
        return "only for a moment"


def check_readable(images, name):
    """Raise OSError if none of a hundred images can be read: was the archive unpacked?"""
    indices = range(0, len(images), max(1, len(images) // 100))
    for index in indices:
        try:
            images.read(images.path(index))
            return
        except Exception:  # A damaged file leads to many kinds of errors.
            pass
    raise OSError(f"no {name} image can be read, for example {images.path(indices[0])}: "
                  f"{images.why_unreadable(indices[0])}")


def name_unreadable(images, indices, unreadable):
    """Print the names of unreadable images, each of them once: `unreadable` has those before.

    Raises UserError for more than 1% of the images of a process.
    """
    for index in indices.tolist():
        path = images.path(index)
        if path not in unreadable:
            unreadable.add(path)
            warn(f"unreadable image: {path} ({images.why_unreadable(index)})")
    share = len(images) // world_size()
    if len(unreadable) > max(1, share // 100):
        raise UserError(f"{len(unreadable)} of {share} images cannot be read, which is more than "
                        "1%")
