"""support/images.py: data sets on disk, decoding of any image, and images that cannot be read."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torchvision.transforms import v2

import pmsn
from support.images import (Images, center_crop, check_readable, decode, draw_noise, find_images,
                            fingerprint, name_unreadable, normalize_images, open_image)
from support.runs import UserError

COUNTS = (24, 12, 8, 6)  # images per class


def draw(folder, counts=COUNTS, held_out=2):
    """Class folders in train and val, with noise as JPEGs of 24 x 24 pixels."""
    generator = np.random.default_rng(0)
    for split, numbers in (("train", counts), ("val", [held_out] * len(counts))):
        for c, count in enumerate(numbers):
            (folder / split / f"class{c}").mkdir(parents=True)
            for i in range(count):
                pixels = generator.integers(256, size=(24, 24, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / split / f"class{c}" / f"{i:03}.jpg")
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return draw(tmp_path_factory.mktemp("data"))


def touch(folder, *names):
    """Empty files. Whoever looks for images does not open them."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def names_of(paths, folder):
    return [str(Path(path).relative_to(folder)) for path in paths]


# ---- Data sets -----------------------------------------------------------------------------------
def write_json(folder, year, images):
    """The files of iNaturalist of a year. Category numbers have gaps."""
    category = {"class0": 7, "class1": 30, "class2": 31, "class3": 400}
    for split in ("train", "val"):
        files = sorted((images / split).rglob("*.jpg"), reverse=True)
        names = [(9 * i, str(f.relative_to(folder)), f.parent.name) for i, f in enumerate(files)]
        content = {"images": [{"id": i, "file_name": name} for i, name, _ in names],
                   "annotations": [{"image_id": i, "category_id": category[c]}
                                   for i, _, c in names]}
        (folder / f"{split}{year}.json").write_text(json.dumps(content))


@pytest.mark.parametrize("year", ["2018", "2017", "2019", ""])  # 2021 has no number
def test_folders_json_and_lists_give_the_same_images(year, data, tmp_path):
    shutil.copytree(data, tmp_path / "images")
    write_json(tmp_path, year, tmp_path / "images")
    lists = []
    for split in ("train", "val"):
        names = sorted((tmp_path / "images" / split).rglob("*.jpg"))
        lines = [f"{name.relative_to(tmp_path)} {name.parent.name[-1]}\n" for name in names]
        lists.append(tmp_path / f"{split}.txt")
        lists[-1].write_text("".join(lines))
    found = zip(find_images(tmp_path / "images"), find_images(tmp_path),
                find_images(tmp_path, lists), (list(COUNTS), [2, 2, 2, 2]), strict=True)
    for *splits, counts in found:
        expected, *others = [{(path, int(c)) for path, c in zip(*split)} for split in splits]
        assert all(Path(path).parent.name == f"class{c}" for path, c in expected)
        assert others == [expected, expected]
        assert torch.bincount(splits[0][1]).tolist() == counts
    assert find_images(data / "train")[1] is None
    assert find_images(tmp_path, lists[:1])[1] is None


@pytest.mark.parametrize("names, validation", [
    (["Train", "Val"], "Val"), (["training", "validation"], "validation"),
    (["train", "VALID"], "VALID"), (["train", "test"], None), (["train"], None),
    (["train", "val", "test"], "val"), (["train", "val", "plots"], "val")])
def test_folders_of_other_names_are_validation_or_named(names, validation, tmp_path, capsys):
    touch(tmp_path, *[f"{name}/cat/1.jpg" for name in names])
    (paths, _), found = find_images(tmp_path)
    assert paths == [str(tmp_path / names[0] / "cat" / "1.jpg")]
    assert (found and found[0]) == (validation and [str(tmp_path / validation / "cat" / "1.jpg")])
    unused = {*names} & {"test", "plots"}
    text = capsys.readouterr().out
    assert f"not used: {unused.pop()}. Only train" in text if unused else "not used" not in text


def test_train_can_be_the_name_of_a_class(tmp_path):
    """As in CIFAR-100: it has images and no folders, and there are other classes."""
    touch(tmp_path, "bus/1.jpg", "train/1.jpg", "test/1.jpg")
    (paths, labels), validation = find_images(tmp_path)
    assert names_of(paths, tmp_path) == ["bus/1.jpg", "test/1.jpg", "train/1.jpg"]
    assert labels.tolist() == [0, 1, 2] and validation is None


def test_only_files_in_visible_folders_are_images(tmp_path):
    """Hidden files and folders, text, named pipes, and links to a folder above are none.

    A linked folder and a linked image are. A link that leads nowhere is an unreadable image.
    """
    folder = tmp_path / "data"
    touch(folder, "a/deep/1.jpg", "a/.2.jpg", ".ipynb_checkpoints/3.jpg", "b/notes.txt", "b/4.JPEG",
          "../elsewhere/5.png")
    os.mkfifo(folder / "a" / "pipe.jpg")
    (folder / "b" / "pipe.jpg").symlink_to(folder / "a" / "pipe.jpg")
    (folder / "a" / "again").symlink_to(folder / "a")
    (folder / "a" / "deep" / "above").symlink_to(folder)
    (folder / "c").symlink_to(tmp_path / "elsewhere")
    (folder / "b" / "gone.jpg").symlink_to(tmp_path / "nowhere")
    (folder / "b" / "self.jpg").symlink_to(folder / "b" / "self.jpg")
    (folder / "b" / "self").symlink_to(folder / "b" / "self")
    touch(folder, "c2.png/set.png/6.png")
    (paths, labels), _ = find_images(folder)
    assert names_of(paths, folder) == ["a/deep/1.jpg", "b/4.JPEG", "b/gone.jpg", "b/self.jpg",
                                       "c/5.png", "c2.png/set.png/6.png"]
    assert labels.tolist() == [0, 1, 1, 1, 2, 3]
    for name in ("b/self.jpg", "b/gone.jpg", "a/pipe.jpg"):
        with pytest.raises(OSError, match="no such file"):
            decode(str(folder / name))


def test_files_with_other_endings_are_images_or_counted_in_one_line(tmp_path, capsys):
    """Those of the web (.jfif, .jpe, .gif, in any case) are read. Hidden files are no mistake."""
    for name, kind in (("a/1.jfif", "JPEG"), ("a/2.JPE", "JPEG"), ("b/3.gif", "GIF")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        left_red().save(tmp_path / name, kind)
    touch(tmp_path, "a/.DS_Store")
    (paths, labels), _ = find_images(tmp_path)
    assert names_of(paths, tmp_path) == ["a/1.jfif", "a/2.JPE", "b/3.gif"]
    assert labels.tolist() == [0, 0, 1] and capsys.readouterr().out == ""
    assert all(decode(path).shape == (3, 8, 16) for path in paths)
    touch(tmp_path, "a/4.jpg_large", "a/5.jpg_large", "b/deep/notes.txt", "b/README")
    assert len(find_images(tmp_path)[0][0]) == 3
    assert capsys.readouterr().out == (f"not used: 4 files in {tmp_path} that end in .jpg_large, "
                                       ".txt, README\n")
    touch(tmp_path, "a/x.a", "a/x.b", "a/x.c", "a/x.d", "a/x.e", "a/x.f")
    find_images(tmp_path)
    assert capsys.readouterr().out == (f"not used: 10 files in {tmp_path} that end in .a, .b, .c, "
                                       ".d, .e ...\n")


@pytest.mark.parametrize("train, val", [
    ("P\u00e9lican", "Pe\u0301lican"), ("Pe\u0301lican", "P\u00e9lican")])
def test_two_unicode_forms_of_a_name_are_one_class(train, val, tmp_path):
    """The letter with its accent is one character, or two. Both names look the same."""
    assert train != val
    touch(tmp_path, f"train/{train}/1.jpg", f"val/{val}/1.jpg", "train/Ara/1.jpg",
          "train/Zebra/1.jpg", "val/Zebra/1.jpg")
    (_, labels), (_, val_labels) = find_images(tmp_path)
    assert labels.tolist() == [0, 1, 2] and val_labels.tolist() == [1, 2]


def test_two_unicode_forms_of_a_name_are_one_class_within_a_split(tmp_path):
    touch(tmp_path, "P\u00e9lican/1.jpg", "Pe\u0301lican/2.jpg", "Ara/3.jpg", "Pf/4.jpg")
    paths, labels = find_images(tmp_path)[0]
    found = {Path(path).name: label for path, label in zip(paths, labels.tolist())}
    assert found == {"1.jpg": 2, "2.jpg": 2, "3.jpg": 0, "4.jpg": 1}


@pytest.mark.parametrize("content", [
    None, [], 3, {"images": [], "annotations": []}, {"images": None, "annotations": []},
    {"images": ["x.jpg"], "annotations": []}, {"images": [{"id": 3, "file_name": "x.jpg"}]},
    {"images": [{"id": 3, "file_name": "x.jpg"}], "annotations": []},
    {"images": [{"id": 3, "file_name": None}],
     "annotations": [{"image_id": 3, "category_id": 1}]},
    {"images": [{"id": 3, "file_name": "x.jpg"}],
     "annotations": [{"image_id": 3, "category_id": [1]}]},
    {"images": [{"id": i, "file_name": "x.jpg"} for i in range(2)],
     "annotations": [{"image_id": 0, "category_id": 1}, {"image_id": 1, "category_id": "1"}]}])
def test_json_of_another_kind_is_named(content, tmp_path):
    (tmp_path / "train2019.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="train2019.json"):
        find_images(tmp_path)
    (tmp_path / "train2019.json").write_text(json.dumps(content)[:-1] + "{")
    with pytest.raises(ValueError, match="train2019.json"):  # half a file
        find_images(tmp_path)


def test_lists_may_come_from_any_editor(tmp_path):
    """With a mark at the beginning, Windows line ends, blank last lines, names of any bytes."""
    (tmp_path / "list.txt").write_bytes(
        b"\xef\xbb\xbfa b.jpg 0\r\ncaf\xe9.jpg\t7\r\n\x0c\xc2\x85.jpg 7\r\n\r\n")
    (paths, labels), _ = find_images(tmp_path, [tmp_path / "list.txt"])
    names = [os.fsencode(path).removeprefix(os.fsencode(tmp_path) + b"/") for path in paths]
    assert names == [b"a b.jpg", b"caf\xe9.jpg", b"\x0c\xc2\x85.jpg"]
    assert labels.tolist() == [0, 1, 1]


@pytest.mark.parametrize("text, line", [
    ("", "line 1 is ''"), ("a.jpg\n", "line 1 is 'a.jpg'"), ("a.jpg cat\n", "line 1 is"),
    ("a.jpg 1\n\nb.jpg 2\n", "line 2 is ''"), ("a.jpg -1\n", "line 1 is 'a.jpg -1'"),
    ("a.jpg 1\nb.jpg 2\nc.j", "line 3 is 'c.j'"), ("a.jpg 1\nb.jpg ", "line 2 is 'b.jpg'")])
def test_lists_of_another_kind_are_named_with_their_line(text, line, tmp_path):
    (tmp_path / "list.txt").write_text(text)
    with pytest.raises(ValueError) as error:
        find_images(tmp_path, [tmp_path / "list.txt"])
    assert "list.txt must be a path and the number of a class" in str(error.value)
    assert line in str(error.value)


@pytest.mark.parametrize("change", [
    lambda paths, labels, data: (paths[:-1], labels[:-1], data),
    lambda paths, labels, data: (paths[1:] + paths[:1], labels.roll(-1), data),  # another order
    lambda paths, labels, data: (paths, labels.roll(1), data),
    lambda paths, labels, data: ([*paths[:-1], paths[-1] + "2"], labels, data),
    lambda paths, labels, data: Path(paths[0]).write_bytes(b"") or (paths, labels, data)])
def test_a_fingerprint_tells_names_labels_order_and_content(change, data, tmp_path):
    """The same images in another folder have the same one, also those that cannot be read."""
    found = []
    for folder in (tmp_path / "one", tmp_path / "deep" / "two"):
        shutil.copytree(data / "train", folder)
        (folder / "class3" / "z.jpg").symlink_to(tmp_path / "nowhere")
        (paths, labels), _ = find_images(folder)
        found.append(fingerprint(paths, labels, folder))
    assert found[0] == found[1] != fingerprint(*change(paths, labels, folder))


def test_a_fingerprint_does_not_read_more_than_about_a_hundred_images(tmp_path):
    touch(tmp_path, *[f"a/{i:04}.jpg" for i in range(1000)])
    (paths, labels), _ = find_images(tmp_path)
    before = fingerprint(paths, labels, tmp_path)
    for path in paths[1:10]:
        Path(path).write_bytes(b"other")
    assert fingerprint(paths, labels, tmp_path) == before
    Path(paths[990]).write_bytes(b"other")
    assert fingerprint(paths, labels, tmp_path) != before


def test_a_fingerprint_does_not_open_a_named_pipe(tmp_path, monkeypatch):
    """Opening it would wait for ever."""
    opened = []
    monkeypatch.setattr(Path, "read_bytes", lambda path: opened.append(path.name) or b"")
    os.mkfifo(tmp_path / "pipe.jpg")
    touch(tmp_path, "image.jpg")
    paths = [str(tmp_path / name) for name in ("pipe.jpg", "image.jpg", "nothing.jpg")]
    fingerprint(paths, torch.zeros(3, dtype=torch.long), tmp_path)
    assert opened == ["image.jpg"]


def test_noise_for_a_quick_run_is_a_data_set(tmp_path):
    draw_noise(tmp_path, count=40)
    (paths, labels), (val_paths, val_labels) = find_images(tmp_path)
    assert len(paths) == 32 and len(val_paths) == 8 and {*val_labels.tolist()} <= {*labels.tolist()}
    assert all(decode(path).shape == (3, 64, 64) for path in paths + val_paths)


# ---- Reading -------------------------------------------------------------------------------------
def left_red(mode="RGB"):
    pixels = np.zeros((8, 16, 3), np.uint8)
    pixels[:, :8, 0] = 255
    return Image.fromarray(pixels).convert(mode)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@pytest.mark.parametrize("fields", [1, 2, 513])
def test_images_are_turned_as_exif_says(fields, tmp_path):
    """Damage beside a readable orientation changes nothing."""
    exif = Image.Exif()
    exif[0x0112] = 6  # The image has to be turned by 90 degrees clockwise.
    if fields == 1:
        left_red().save(tmp_path / "turned.png", exif=exif)
    else:  # EXIF says that there are more fields, and after the orientation only noise follows.
        header = exif.tobytes()
        assert header[14:16] == b"\0\1"
        exif = header[:14] + fields.to_bytes(2, "big") + header[16:] + b"\xff" * 40
    left_red().save(tmp_path / "turned.jpg", exif=exif, quality=95)
    for path in tmp_path.iterdir():
        pixels = decode(str(path))
        assert pixels.shape == (3, 16, 8) and pixels[0, :6].min() > 150 > 100 > pixels[0, -6:].max()


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@pytest.mark.parametrize("noise", [b"MM\0*\xff\xff\xff\xff", b"MM", b"no EXIF at all"])
def test_images_with_noise_in_place_of_exif_are_not_turned(noise, tmp_path):
    left_red().save(tmp_path / "noise.jpg", exif=b"Exif\0\0" + noise, quality=95)
    pixels = decode(str(tmp_path / "noise.jpg"))
    assert pixels.shape == (3, 8, 16) and pixels[0, :, :6].min() > 150 > pixels[0, :, -6:].max()


@pytest.mark.parametrize("mode, name", [
    ("L", "x.jpg"), ("CMYK", "y.jpg"), ("RGBA", "z.png"), ("P", "p.png"), ("1", "b.png"),
    ("LA", "a.png"), ("RGB", "r.webp")])
def test_all_images_have_three_channels(mode, name, tmp_path):
    left_red(mode).save(tmp_path / name)
    pixels = decode(str(tmp_path / name))
    assert pixels.shape == (3, 8, 16) and pixels.dtype == torch.uint8
    assert pixels[0, :, :7].float().mean() > pixels[0, :, 9:].float().mean() + 50


@pytest.mark.parametrize("ending", ["png", "tif", "pgm"])
def test_sixteen_bits_keep_their_gray_levels(ending, tmp_path):
    levels = np.tile(np.arange(256) * 257, (8, 1)).astype(np.uint16)  # 0 .. 65535
    Image.fromarray(levels).save(tmp_path / f"ramp.{ending}")
    pixels = decode(str(tmp_path / f"ramp.{ending}"))
    assert pixels.shape == (3, 8, 256) and pixels[1, 0].tolist() == [*range(256)]


def test_sixteen_bits_are_turned_as_exif_says(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 8  # by 90 degrees counterclockwise
    Image.fromarray(np.full((8, 16), 513, np.uint16)).save(tmp_path / "turned.png", exif=exif)
    pixels = decode(str(tmp_path / "turned.png"))
    assert pixels.shape == (3, 16, 8) and pixels.unique().tolist() == [2]


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_other_deep_images_are_unreadable_and_not_white(dtype, tmp_path):
    Image.fromarray(np.full((8, 8), 300, dtype)).save(tmp_path / "deep.tif")
    with pytest.raises(OSError, match="32 bits"):
        decode(str(tmp_path / "deep.tif"))


@pytest.mark.parametrize("shape", [(60, 90), (90, 60), (64, 64), (31, 47)])
def test_center_crop_is_the_usual_one(shape):
    """Resize the shorter side to 256 / 224 of the size, crop. Only the order is another."""
    smooth = F.interpolate(torch.rand(1, 3, 6, 6), shape, mode="bicubic").clamp(0, 1)[0]
    image = (255 * smooth).to(torch.uint8)
    expected = v2.Compose([v2.Resize(32, antialias=True), v2.CenterCrop(28)])(image)
    found = center_crop(image, 28)
    assert found.shape == (3, 28, 28)
    assert (found.float() - expected.float()).abs().mean() < 6  # of 255


def test_a_strip_is_cropped_before_it_is_resized():
    """Otherwise this strip would become an image of 256 x 51,200,000 pixels."""
    strip = torch.zeros(3, 1, 200_000, dtype=torch.uint8)
    assert center_crop(strip, 224).shape == (3, 224, 224)
    assert center_crop(strip.mT, 224).shape == (3, 224, 224)


def test_every_error_has_the_path_and_the_reason(tmp_path, monkeypatch):
    """Readers of torchvision only show the error. A "decompression bomb" is no OSError for PIL."""
    large, text = tmp_path / "large.png", tmp_path / "text.png"
    Image.new("1", (60, 60)).save(large)
    text.write_text("no image")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    for path, reason in ((large, "3600 pixels"), (text, "cannot identify"),
                         (tmp_path / "none.png", "there is no such file")):
        with pytest.raises(OSError, match=reason) as error:
            open_image(str(path))
        assert str(error.value).startswith(f"{path}: ")


def test_images_are_normalized_by_a_numpy_formula():
    images = torch.randint(256, (2, 3, 4, 4), dtype=torch.uint8)
    mean, std = (np.array(x).reshape(1, 3, 1, 1) for x in (pmsn.IMAGENET_MEAN, pmsn.IMAGENET_STD))
    expected = (images.numpy() / 255 - mean) / std
    for given in (images, images / 255):
        np.testing.assert_allclose(normalize_images(given), expected, atol=1e-5)


def test_images_are_a_data_set(data):
    """A loader can shuffle them. Names need not be UTF-8. An error of the transform is no fault
    of the image."""
    paths = sorted(map(str, (data / "train").rglob("*.jpg")))
    images = Images([*paths, "caf\udce9.jpg"], lambda image: image)
    assert len(images) == 51 and images.path(0) == paths[0] and images.path(50) == "caf\udce9.jpg"
    loader = torch.utils.data.DataLoader(images, batch_size=25, shuffle=True)
    seen = [index for _, indices, _ in loader for index in indices.tolist()]
    assert sorted(seen) == [*range(51)] and seen != sorted(seen)
    with pytest.raises(ZeroDivisionError):
        Images(paths, lambda image: 1 / 0)[0]


# ---- Images that cannot be read ------------------------------------------------------------------
def reader(*broken, error=OSError("no image")):
    """A read for images 0, 1, 2 and so on, which are gray. The broken ones raise the error."""
    def read(number):
        if number in broken:
            raise error
        return torch.full((3, 16, 16), int(number) % 256, dtype=torch.uint8)
    return read


def test_the_next_image_replaces_an_unreadable_one():
    """After the last one the first one comes."""
    images = Images(range(10), lambda image: image, reader(3, 4, 9))
    for place, expected in ((2, 2), (3, 5), (4, 5), (9, 0)):
        image, index, readable = images[place]
        assert image.unique().tolist() == [expected] and index == place
        assert readable == (place == expected)


def test_a_hundred_unreadable_neighbors_become_black():
    """They may be less than 1% of the images, so the run goes on."""
    images = Images(range(20_000), lambda image: image, reader(0, *range(20, 170)))
    assert images[19][0].unique().tolist() == [19] and images[100][0].unique().tolist() == [170]
    black, index, readable = images[50]
    assert (index, readable) == (50, False) and black.max() == 0
    check_readable(images, "training")


def test_a_data_set_without_readable_images_is_named_with_a_reason():
    """A hundred images all over the data set are tried, not only the first ones."""
    with pytest.raises(OSError, match="^no validation image can be read, for example 0: no image$"):
        check_readable(Images(range(1000), None, reader(*range(1000))), "validation")
    check_readable(Images(range(1000), None, reader(*range(900))), "training")


def test_an_unreadable_image_is_named_once_with_the_reason(tmp_path, capsys, monkeypatch):
    """Here Pillow takes it for an attack, because it has too many pixels."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50)
    left_red().save(tmp_path / "large.png")
    images = Images([str(tmp_path / "large.png"), *["x"] * 199], lambda image: image)
    unreadable = set()
    for _ in range(2):
        name_unreadable(images, torch.tensor([0, 0]), unreadable)
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and line.startswith(f"unreadable image: {tmp_path}/large.png (")
    assert "Image size (128 pixels) exceeds limit of 100 pixels" in line
    name_unreadable(images, torch.tensor([0]), set())  # the next pass over the images
    assert capsys.readouterr().err == line


@pytest.mark.parametrize("error, reason", [
    (OSError("two\n  lines"), "two lines"), (KeyError(), "KeyError()"),
    (None, "only for a moment")])
def test_the_reason_is_one_line(error, reason, capsys):
    images = Images(range(9), None, reader(5, error=error) if error else reader())
    name_unreadable(images, torch.tensor([5]), set())
    assert capsys.readouterr().err == f"unreadable image: 5 ({reason})\n"


@pytest.mark.parametrize("count, processes, allowed", [
    (300, 1, 3), (300, 2, 1), (250, 1, 2), (10, 1, 1)])
def test_more_than_one_percent_of_unreadable_images_end_a_run(count, processes, allowed,
                                                              monkeypatch):
    """Of those of this process. One is always allowed."""
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    images, unreadable = Images(range(count), None, reader(*range(count))), set()
    for index in range(allowed):
        name_unreadable(images, torch.tensor([index]), unreadable)
    message = f"^{allowed + 1} of {count // processes} images cannot be read, which is more than 1%"
    with pytest.raises(UserError, match=message):
        name_unreadable(images, torch.tensor([allowed]), unreadable)
