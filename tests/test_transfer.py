"""extras/transfer.py: official layouts in miniature, classifiers against scikit-learn, a run."""

import argparse
import hashlib
import json
import pickle
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

import pmsn
import support.images
import transfer
from test_evaluation import overlapping_classes, standardize


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def draw_clevr(folder, distances):
    """Scenes with objects at these distances. The gray level is their number, the left is white."""
    for split, scenes in distances.items():
        content = []
        for i, scene in enumerate(scenes):
            name = f"CLEVR_{split}_{i:06}.png"
            objects = [{"pixel_coords": [240, 160, z], "shape": "cube"} for z in scene]
            content.append({"image_filename": name, "split": split, "objects": objects})
            path = folder / "images" / split / name
            path.parent.mkdir(parents=True, exist_ok=True)
            image = Image.new("RGB", (48, 32), (20 * len(scene),) * 3)
            image.paste((255, 255, 255), (0, 0, 6, 32))
            image.save(path)
        write(folder / "scenes" / f"CLEVR_{split}_scenes.json", json.dumps({"scenes": content}))
    return folder


# ---- Tasks ---------------------------------------------------------------------------------------
def test_clevr_by_hand(tmp_path):
    """VTAB's bins begin at 0, 8, 8.5, 9, 9.5 and 10. The closest object counts."""
    nearest = [7.99, 8.0, 8.01, 8.7, 9.2, 9.9, 10.1]
    scenes = [[z, *[z + 1] * (2 + i)] for i, z in enumerate(nearest)]  # 3 to 9 objects
    draw_clevr(tmp_path, {"train": scenes, "val": scenes[::-1]})
    (paths, counts), (test_paths, _) = transfer.TASKS["clevr_count"][0](tmp_path)
    assert counts.tolist() == [0, 1, 2, 3, 4, 5, 6] and all(Path(path).exists() for path in paths)
    assert {Path(path).parent.name for path in test_paths} == {"val"}
    (_, distances), (_, test_distances) = transfer.TASKS["clevr_dist"][0](tmp_path)
    assert distances.tolist() == [0, 0, 1, 2, 3, 4, 5] == test_distances.tolist()[::-1]


def test_kitti_by_hand(tmp_path):
    """Twenty videos of three images, in a random order. Two videos are the test."""
    objects = {  # type, truncated, occluded, alpha, box (4), size (3), x, y, z, rotation
        0: "Car 0.00 0 -1.58 587 173 614 200 1.65 1.67 3.64 -0.65 1.71 46.70 -1.59\n"
           "Van 0.00 0 -1.58 587 173 614 200 1.65 1.67 3.64 -0.65 1.71 7.50 -1.59\n",
        1: "Pedestrian 0.00 0 -0.2 712 143 810 307 1.89 0.48 1.20 1.84 1.47 5.41 0.01\n"
           "Truck 0.00 0 -1.57 599 156 629 189 2.85 2.63 12.34 0.47 1.49 19.44 -1.56\n",
        2: "Car 0.88 3 -0.69 0 192 402 374 1.60 1.57 3.23 -2.70 1.74 60.68 -1.29\n",
        3: "DontCare -1 -1 -10 503 169 590 190 -1 -1 -1 -1000 -1000 -1000 -10\n"}
    order = torch.randperm(60, generator=torch.Generator().manual_seed(0)).tolist()
    lines = [f"2011_09_26 2011_09_26_drive_{i // 3:04}_sync {i:010}" for i in range(60)]
    write(tmp_path / "mapping/train_mapping.txt", "\n".join(lines) + "\n")
    write(tmp_path / "mapping/train_rand.txt", ",".join(str(i + 1) for i in order) + "\n")
    for i in range(60):
        write(tmp_path / f"training/label_2/{i:06}.txt", objects[i % 4])
    splits = transfer.TASKS["kitti_dist"][0](tmp_path)
    for paths, labels in splits:
        assert labels.tolist() == [int(Path(path).stem) % 4 for path in paths]
    np.random.seed(123)  # as TensorFlow Datasets chooses the videos
    videos = [f"2011_09_26_drive_{i:04}_sync" for i in range(20)]
    chosen = np.random.choice(videos, 2, replace=False)
    expected = [i for i in range(60) if lines[order[i]].split()[1] in chosen]
    assert [int(Path(path).stem) for path in splits[1][0]] == expected and len(expected) == 6
    assert len(splits[0][0]) == 54


def test_cifar100_in_the_python_version(tmp_path, monkeypatch):
    folder, pixels = tmp_path / "cifar-100-python", np.arange(3072, dtype=np.uint8)
    folder.mkdir()
    contents = {"train": {"data": np.stack([pixels, 255 - pixels]), "fine_labels": [7, 99]},
                "test": {"data": pixels[None], "fine_labels": [3]},
                "meta": {"fine_label_names": [str(i) for i in range(100)]}}
    for name, content in contents.items():
        (folder / name).write_bytes(pickle.dumps(content))
    sums = {name: hashlib.md5((folder / name).read_bytes()).hexdigest() for name in contents}
    for attribute, name in (("train_list", "train"), ("test_list", "test")):
        monkeypatch.setattr(torchvision.datasets.CIFAR100, attribute, [[name, sums[name]]])
    meta = {"filename": "meta", "key": "fine_label_names", "md5": sums["meta"]}
    monkeypatch.setattr(torchvision.datasets.CIFAR100, "meta", meta)
    (images, labels), (_, test_labels) = transfer.read_cifar100(tmp_path)
    assert labels.tolist() == [7, 99] and test_labels.tolist() == [3]
    image = transfer.read_item(images, "1")
    np.testing.assert_array_equal(image.numpy(), 255 - pixels.reshape(3, 32, 32))


# ---- Encoders ------------------------------------------------------------------------------------
@pytest.mark.parametrize("wrap, head", [
    (lambda state: state, "head.weight"),
    (lambda state: {"target_encoder": {f"module.{k}": x for k, x in state.items()}, "epoch": 3},
     "fc.fc1.weight"),
    (lambda state: {"model": {f"target_encoder.{k}": x for k, x in state.items()}
                    | {f"encoder.{k}": 0 * x for k, x in state.items()}, "history": []},
     "head.weight"),
    (lambda state: {f"module._orig_mod.{k}": x for k, x in state.items()}, "head.weight")],
    ids=["timm", "MSN", "checkpoint.pt", "compiled"])
def test_weights_of_timm_msn_and_checkpoints(wrap, head, tmp_path):
    timm = pytest.importorskip("timm", reason="timm is the oracle here")
    oracle = timm.models.vision_transformer.VisionTransformer(
        img_size=32, patch_size=8, embed_dim=192, depth=2, num_heads=3, num_classes=0).eval()
    torch.save(wrap({**oracle.state_dict(), head: torch.zeros(5, 192)}), tmp_path / "weights.pth")
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    encoder = transfer.load_encoder(tmp_path / "weights.pth")
    torch.testing.assert_close(encoder(images), oracle(images), atol=1e-5, rtol=1e-5)
    other = transfer.random_encoder(encoder, 0)
    assert other(images).shape == (2, 192) and not torch.equal(other(images), encoder(images))


@pytest.fixture(scope="module")
def weights():
    torch.manual_seed(0)
    return pmsn.VisionTransformer(16, 8, 96, 1, 3).state_dict()


def zeros(weights):
    return {name: 0 * weight for name, weight in weights.items()}


def assert_loads(content, weights, path):
    """The encoder of a file with this content has these weights, bit for bit."""
    torch.save(content, path)
    found = transfer.load_encoder(path).state_dict()
    assert found.keys() == weights.keys()
    for name, weight in weights.items():
        torch.testing.assert_close(found[name], weight, atol=0, rtol=0, msg=name)


@pytest.mark.parametrize("prefix", [
    "module._orig_mod.", "_orig_mod.module.", "module.module._orig_mod.",
    "_orig_mod.module.target_encoder.", "target_encoder._orig_mod.module.", "module.backbone."])
def test_prefixes_of_wrappers_in_any_order(prefix, weights, tmp_path):
    """Names without the prefix belong to other parts of the network, and are left out."""
    content = {prefix + name: weight for name, weight in weights.items()}
    content |= {"n_averaged": torch.tensor(3), "predictor.weight": torch.ones(2)}
    assert_loads(content, weights, tmp_path / "weights.pt")


@pytest.mark.parametrize("start, compiled", [("", "_orig_mod."),
                                             ("blocks.0.", "blocks.0._orig_mod.")])
def test_the_encoder_or_its_blocks_are_compiled(start, compiled, weights, tmp_path):
    content = {compiled + name.removeprefix(start) if name.startswith(start) else name: weight
               for name, weight in weights.items()}
    assert any("_orig_mod" in name for name in content)
    assert_loads(content, weights, tmp_path / "weights.pt")


@pytest.mark.parametrize("raw, average", [
    ("state_dict", "state_dict_ema"), ("model", "model_ema"), ("student", "teacher"),
    ("encoder", "target_encoder")])
def test_of_two_sets_of_weights_the_average_is_taken(raw, average, weights, tmp_path, capsys):
    path = tmp_path / "last.pth.tar"
    assert_loads({raw: zeros(weights), average: weights, "epoch": 3}, weights, path)
    assert capsys.readouterr().out == (
        f"{path} has several sets of weights: we take {average}, not {raw}\n")
    # With one set only, whichever it is, there is nothing to say.
    for content in ({raw: weights}, {raw: weights, average: None}, {average: weights}):
        assert_loads(content, weights, path)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("library", ["timm", "MAE", "DINO"])
def test_checkpoints_hold_the_flags_of_their_training(library, weights, tmp_path):
    """As these three write them: argparse.Namespace beside the weights, and parts of their own."""
    args = argparse.Namespace(lr=0.1, model="vit", betas=(0.9, 0.95), sizes=[224, 96], resume=None,
                              distributed=True, nested=argparse.Namespace(seed=0))
    if library == "timm":
        content = {"epoch": 3, "arch": "vit", "metric": 71.5, "args": args,
                   "state_dict": {**weights, "head.weight": torch.ones(5, 96)}}
    elif library == "MAE":
        decoder = {"mask_token": torch.ones(1, 1, 8), "decoder_embed.weight": torch.ones(8, 96),
                   "decoder_blocks.0.norm1.weight": torch.ones(8)}
        content = {"model": {**weights, **decoder}, "optimizer": {"state": {}}, "args": args}
    else:
        teacher = {f"backbone.{name}": weight for name, weight in weights.items()}
        teacher["head.mlp.0.weight"] = torch.ones(8, 96)
        student = {f"module.{name}": 0 * weight for name, weight in teacher.items()}
        content = {"student": student, "teacher": teacher, "args": args}
    assert_loads(content, weights, tmp_path / "checkpoint.pth")


@pytest.mark.parametrize("change, reason", [
    (lambda state: {"model": state, "args": Fraction(1, 2)},
     "the file has a Python object of the class fractions.Fraction; save only its weights"),
    (lambda state: [state], "the file has a list instead of a dict of weights"),
    (lambda state: {"epoch": 3}, "expected names as in encoder.pt, such as patch_embed.proj.weight,"
                                 " and found no tensors"),
    (lambda state: {f"layer{i}.weight": torch.ones(1) for i in range(99)},
     "expected names as in encoder.pt, such as patch_embed.proj.weight, and found layer0.weight, "),
    (lambda state: {**state, "reg_token": torch.ones(1, 4, 96)},
     "reg_token has the shape (1, 4, 96) in the file and none in a plain vision transformer. 1 "),
    (lambda state: {name: x for name, x in state.items() if not name.startswith("norm.")},
     "norm.weight has the shape none in the file and (96,) in a plain vision transformer. 2 "),
    (lambda state: {**state, "pos_embed": torch.ones(1, 7, 96)},
     "pos_embed has the shape (1, 7, 96) in the file and (1, 5, 96) in a plain vision"),
    (lambda state: {name: x for name, x in state.items() if name != "pos_embed"},
     "there are no position embeddings (pos_embed)"),
    (lambda state: {**state, "patch_embed.proj.weight": torch.ones(96, 192)},
     "patch_embed.proj.weight has the shape (96, 192), which is not that of a convolution"),
    (lambda state: {**state, "patch_embed.proj.weight": torch.ones(100, 3, 8, 8)},
     "we do not know the number of heads for features of 100 numbers, only for 96, 192, "),
    (lambda state: b"# no weights", "torch.load cannot read the file (Unsupported operand 35)"),
    (lambda state: b"", "torch.load cannot read the file (it is empty or ends too early)")])
def test_why_a_file_is_refused_is_one_short_line(change, reason, weights, tmp_path, capsys):
    path, content = tmp_path / "weights.pt", change(weights)
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    with pytest.raises(SystemExit, match="^2$"):
        transfer.main(["--encoder", str(path), "--task", "folder", "--data", "x", "--out",
                       str(tmp_path)])
    start = f"--encoder {path} has no weights of a vision transformer that can be read: "
    _, line = capsys.readouterr().err.split(start, 1)
    assert line.startswith(reason) and line.count("\n") == 1 and len(line) < 202


def test_errors_in_one_line():
    assert transfer.one_line(KeyError("scenes")) == "KeyError: 'scenes'"
    assert transfer.one_line(OSError(2, "no such file", "x")) == "[Errno 2] no such file: 'x'"
    assert transfer.one_line(ValueError("a\n\tb" + 300 * "c")) == "a b" + 197 * "c"


# ---- Classifiers ---------------------------------------------------------------------------------
def test_classifiers_equal_scikit_learns():
    linear_model = pytest.importorskip("sklearn.linear_model", reason="scikit-learn is the oracle")
    x, y, test_x, test_y = overlapping_classes()
    predicted, penalty = transfer.probe(x, y, test_x, seed=0)
    unit, test_unit = standardize(x, test_x)
    oracle = linear_model.LogisticRegression(C=1 / penalty, max_iter=1000).fit(unit, y)
    accuracy = (predicted == test_y).double().mean()
    assert accuracy.item() == pytest.approx(oracle.score(test_unit, test_y), abs=0.01)
    # The low-shot classifier, on 60 images. Its features are centered and get unit length.
    unit, test_unit = [z - z.mean(dim=1, keepdim=True) for z in (x[:60], test_x)]
    unit, test_unit = [z / z.norm(dim=1, keepdim=True) for z in (unit, test_unit)]
    oracle = linear_model.LogisticRegression(C=400, fit_intercept=False, max_iter=9999, tol=1e-8)
    # The labels can be keys of a data base. A column for each number up to them fits no memory.
    keys = 10**12 * y[:60] + 7
    oracle.fit(unit, keys)
    predicted = transfer.low_shot(x[:60], keys, test_x)
    assert (predicted.numpy() == oracle.predict(test_unit)).mean() > 0.99


def test_probe_chooses_its_penalty_on_held_out_images(monkeypatch):
    """The best value on the held-out fifth is taken. No test image takes part in the choice."""
    features, labels = torch.arange(50.0)[:, None], torch.zeros(50, dtype=torch.long)
    calls = []

    def linear_probe(x, y, test_x, penalty):
        calls.append((penalty, {*x[:, 0].tolist()}, {*test_x[:, 0].tolist()}))
        wrong = abs(transfer.PENALTIES.index(penalty) - 1)
        return torch.full((len(test_x),), wrong)
    monkeypatch.setattr(transfer, "linear_probe", linear_probe)
    _, penalty = transfer.probe(features, labels, features + 1000, seed=0)
    *choices, final = calls
    assert [call[0] for call in choices] == list(transfer.PENALTIES)
    for _, kept, held_out in choices:
        assert len(kept) == 40 and len(held_out) == 10 and kept | held_out == {*range(50)}
    assert final[0] == penalty == transfer.PENALTIES[1]
    assert len(final[1]) == 50 and min(final[2]) == 1000


def test_shots_are_stratified_and_reproducible():
    labels = torch.tensor([0] * 50 + [1] * 3 + [2] * 50)
    one, again, other = (transfer.draw_shots(labels, 5, seed) for seed in (1, 1, 2))
    assert torch.bincount(labels[one]).tolist() == [5, 3, 5] and len(one.unique()) == 13
    assert torch.equal(one, again) and set(one.tolist()) != set(other.tolist())


def test_scores_and_differences_by_hand():
    labels = torch.tensor([0] * 150 + [1] * 10)
    test_labels = torch.tensor([0, 0, 0, 1])
    first, second = torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 1, 0])
    found = transfer.score(torch.stack([first, second]), test_labels, labels)
    assert found == pytest.approx({"all": 50, "many": 50, "few": 50, "class": (5 / 6 + 1 / 6) * 50,
                                   "std": 100 * 0.5**1.5})
    # Per image the differences are 0, 1, 0, 1: the mean is 1/2 and the variance is 1/3.
    found = transfer.compare(first[None], second[None], test_labels)
    assert found == pytest.approx((50, 100 * (1 / 3) ** 0.5 / 2))
    # A second draw without a difference: means 1/2 and 0 of the draws, variance 1/8. Per image
    # the mean differences are 0, 1/2, 0, 1/2, with a variance of 1/12.
    found = transfer.compare(torch.stack([first, first]), torch.stack([second, first]), test_labels)
    assert found == pytest.approx((25, 100 * (1 / 12 / 4 + 1 / 8 / 2) ** 0.5))
    balanced = transfer.score(first[None], test_labels, torch.arange(300) % 2)
    assert balanced.keys() == {"all", "class"}


# ---- Whole runs ----------------------------------------------------------------------------------
def test_quick_run_end_to_end(tmp_path, monkeypatch, capsys):
    """Here with a third of its images."""
    monkeypatch.setattr(support.images, "FakeData",
                        lambda count, *shape: torchvision.datasets.FakeData(count // 3, *shape))
    transfer.main(["--quick", "--out", str(tmp_path)])
    assert min(Image.open(tmp_path / "transfer.png").size) > 300
    content = json.loads((tmp_path / "transfer.json").read_text())
    results, differences = content["results"], content["differences"]
    classifiers = ["linear", "k-NN", "1-shot", "5-shot"]
    assert [row["classifier"] for row in results[::2]] == classifiers
    assert ["std" in row for row in results[::2]] == [False, False, True, True]
    encoder = str(tmp_path / "quick_encoder.pt")
    for first, second, difference in zip(results[::2], results[1::2], differences, strict=True):
        assert (first["encoder"], second["encoder"]) == (encoder, "random")
        assert difference["mean"] == pytest.approx(first["all"] - second["all"])
    # Another run reads the features instead of computing them, and finds the same.
    monkeypatch.setattr(pmsn.VisionTransformer, "forward", None)
    capsys.readouterr()  # The first run has printed this row too.
    transfer.main(["--encoder", encoder, "--task", "folder", "--data",
                   str(tmp_path / "quick_images"), "--out", str(tmp_path)])
    again = json.loads((tmp_path / "transfer.json").read_text())
    assert again["results"] == results[:3:2] and not again["differences"]
    assert f"folder quick_images     linear    {results[0]['all']:9.2f}" in capsys.readouterr().out


def test_one_test_image_is_no_test(tmp_path, capsys):
    """There would be no standard error. This is said before features are computed."""
    draw_clevr(tmp_path, {"train": [[9] * 5] * 4, "val": [[9] * 5]})
    with pytest.raises(SystemExit, match="^2$"):
        transfer.main(["--encoder", "random", "--task", "clevr_count", "--data", str(tmp_path),
                       "--out", str(tmp_path / "out")])
    assert "there are fewer than two test images" in capsys.readouterr().err


def test_clevr_computes_features_once_for_both_tasks_and_sees_whole_images(tmp_path, monkeypatch):
    """One of the four test images cannot be read, and counts as a wrong answer."""
    few, many = [7, 9, 9], [9] * 10
    draw_clevr(tmp_path, {"train": [few, many] * 20, "val": [few, many, many, few]})
    write(tmp_path / "images/val/CLEVR_val_000001.png", "no image")
    seen, forward = [], pmsn.VisionTransformer.forward
    monkeypatch.setattr(pmsn.VisionTransformer, "forward", lambda self, images: (
        seen.append(images), forward(self, images))[1])
    torch.save(pmsn.VisionTransformer(16, 8, 96, 1, 3).state_dict(), tmp_path / "encoder.pt")
    transfer.main(["--encoder", str(tmp_path / "encoder.pt"), "--task", "clevr_count",
                   "clevr_dist", "--data", str(tmp_path), str(tmp_path), "--out",
                   str(tmp_path / "out"), "--workers", "0"])
    assert [images.shape for images in seen] == [(40, 3, 16, 16), (4, 3, 16, 16)]
    assert (seen[0][..., 0] > seen[0][..., 8] + 0.5).all()  # The white left side is there.
    results = json.loads((tmp_path / "out" / "transfer.json").read_text())["results"]
    found = [(row["task"], row["classifier"], row["all"]) for row in results]
    assert found[:2] == [("clevr_count", "linear", 75), ("clevr_count", "k-NN", 75)]
    assert [task for task, _, _ in found[2:]] == ["clevr_dist"] * 2
