"""train_inat.py: data, recipe, restarts after any death, faults of the data and of the machine."""

import json
import math
import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import pmsn
import train_inat

COUNTS = (24, 12, 8, 6)  # images per class: 5 steps of 10 images per epoch
SMALL = ["--model", "vit_micro", "--image_size", "16", "--focal_size", "16", "--patch_size", "8",
         "--focal_views", "1", "--prototypes", "6", "--batch_size", "10", "--epochs", "3",
         "--workers", "0", "--eval_every", "100"]
FORK = multiprocessing.get_context("fork")  # a child has torch imported already

def draw(folder, counts, held_out=2):
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
    return draw(tmp_path_factory.mktemp("data"), COUNTS)

def start(out, *argv, rank=0, world_size=1, port=0, before=lambda: None):
    """train_inat.main in a process of its own. `before` is called in it first."""
    def child():
        sys.stdout = sys.stderr = open(f"{out}.log{rank}", "w", buffering=1)
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), MASTER_ADDR="127.0.0.1",
                          MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo")
        before()
        train_inat.main([*SMALL, "--out", str(out), *map(str, argv)])
    process = FORK.Process(target=child)
    process.start()
    return process

def finish(out, *processes, status=0):
    """Wait for the end, check the exit status of every process, return what rank 0 printed."""
    for process in processes:
        process.join(100)
        assert process.exitcode == status, Path(f"{out}.log0").read_text()
    return Path(f"{out}.log0").read_text()

def run(out, *argv, status=0, **options):
    return finish(out, start(out, *argv, **options), status=status)

def checkpoint(out):
    return torch.load(out / "checkpoint.pt", weights_only=True)

def metrics(out):
    file = out / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

def assert_same_run(one, two):
    """The same bits in weights, target, optimizer and usage, and the same log."""
    assert metrics(one) == metrics(two)
    one, two = checkpoint(one), checkpoint(two)
    for part in ("model", "optimizer", "usage"):
        torch.testing.assert_close(one[part], two[part], atol=0, rtol=0)

def wait_for(condition, seconds=60):
    end = time.time() + seconds
    while not condition():
        assert time.time() < end
        time.sleep(0.005)

@pytest.fixture(scope="module")
def undisturbed(data, tmp_path_factory):
    """A run of 3 epochs that nobody stopped."""
    out = tmp_path_factory.mktemp("runs") / "undisturbed"
    run(out, "--data", data)
    return out

# ---- Data ----------------------------------------------------------------------------------------
def test_folders_and_json_give_the_same_images(data, tmp_path):
    """Category numbers have gaps. Other files, and files with a dot in front, are no images."""
    shutil.copytree(data, tmp_path / "images")
    category = {"class0": 7, "class1": 30, "class2": 31, "class3": 400}
    for split in ("train", "val"):
        files = sorted((tmp_path / "images" / split).rglob("*.jpg"), reverse=True)
        names = [(9 * i, str(f.relative_to(tmp_path)), f.parent.name) for i, f in enumerate(files)]
        content = {"images": [{"id": i, "file_name": name} for i, name, _ in names],
                   "annotations": [{"image_id": i, "category_id": category[c]}
                                   for i, _, c in names]}
        (tmp_path / f"{split}2018.json").write_text(json.dumps(content))
    shutil.copy(data / "train/class0/000.jpg", tmp_path / "images/train/class0/._000.jpg")
    (tmp_path / "images/train/class1/notes.txt").write_text("not an image")
    for split, other in zip(train_inat.find_images(tmp_path / "images"),
                            train_inat.find_images(tmp_path)):
        expected = {Path(path).name + str(int(c)) for path, c in zip(*split)}
        assert {Path(path).name + str(int(c)) for path, c in zip(*other)} == expected
        assert torch.bincount(split[1]).tolist() in (list(COUNTS), [2, 2, 2, 2])
    assert train_inat.find_images(data / "train")[1] is None

def test_images_are_turned_as_exif_says_and_have_three_channels(tmp_path):
    left_red = np.zeros((8, 16, 3), np.uint8)
    left_red[:, :8, 0] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # the image has to be turned by 90 degrees clockwise
    Image.fromarray(left_red).save(tmp_path / "turned.jpg", exif=exif, quality=95)
    pixels = train_inat.decode(str(tmp_path / "turned.jpg"))
    assert pixels.shape == (3, 16, 8) and pixels[0, :6].min() > 150 and pixels[0, -6:].max() < 100
    for mode, name in (("L", "x.jpg"), ("CMYK", "y.jpg"), ("RGBA", "z.png"), ("P", "p.png")):
        Image.new(mode, (20, 30)).save(tmp_path / name)
        assert train_inat.decode(str(tmp_path / name)).shape == (3, 30, 20)

# ---- Recipe --------------------------------------------------------------------------------------
def test_schedules_by_hand(tmp_path):
    """10 epochs of 4 steps: 2 steps of warm-up, stretched to 50 steps, the first one is step 1."""
    args = train_inat.parse(["--data", "x", "--out", str(tmp_path), "--epochs", "10",
                             "--lr", "1", "--ema_momentum", "0.9"])
    steps = list(zip(*train_inat.schedules(args, 4), strict=True))
    assert len(steps) == 40
    for step, (lr, weight_decay, ema_momentum) in enumerate(steps, start=1):
        fall = 0.001 + 0.999 * (1 + math.cos(math.pi * (step - 2) / 48)) / 2
        assert lr == pytest.approx(0.2 + 0.4 * step if step < 2 else fall)
        decay = 0.4 - 0.36 * (1 + math.cos(math.pi * step / 50)) / 2
        assert weight_decay == pytest.approx(decay)
        assert ema_momentum == pytest.approx(0.9 + 0.1 * (step - 1) / 50)

def test_prototypes_and_vectors_have_no_weight_decay_and_prototypes_are_not_clipped():
    encoder = pmsn.VisionTransformer(16, 8, 12, 1, 3)
    model = pmsn.PMSN(encoder, pmsn.power_law_prior(5, 1.0), head=pmsn.projection_head(12, 8))
    optimizer, clipped = train_inat.make_optimizer(model)
    decayed, others = ({id(p) for p in group["params"]} for group in optimizer.param_groups)
    assert optimizer.param_groups[1]["weight_decay"] == 0
    trained = [p for p in model.parameters() if p.requires_grad]
    assert decayed == {id(p) for p in trained if p.ndim > 1 and p is not model.prototypes}
    assert decayed | others == {id(p) for p in trained}
    assert {id(p) for p in clipped} == {id(p) for p in trained if p is not model.prototypes}

def test_defaults_are_the_published_recipe(tmp_path):
    args = train_inat.parse(["--data", "x", "--out", str(tmp_path)])
    expected = dict(model="vit_small", patch_size=16, image_size=224, focal_size=96, lr=1e-3,
                    focal_views=10, patch_drop=0.15, prototypes=1024, batch_size=1024, epochs=300,
                    ema_momentum=0.996, exponent=0.25, prior="power_law", sinkhorn_iterations=0)
    assert expected.items() <= vars(args).items() and len(vars(args)) <= 25

# ---- Stopping and going on -----------------------------------------------------------------------
def test_the_files_of_a_run(undisturbed):
    """encoder.pt is the target encoder. It fits a VisionTransformer, as do the weights of timm."""
    lines = metrics(undisturbed)
    assert [line["epoch"] for line in lines] == [0, 1, 2, 3]
    assert "knn_all" in lines[0] and "linear_all" in lines[3] and "knn_all" not in lines[1]
    assert lines[3]["loss"] == pytest.approx(lines[3]["cross_entropy"] + lines[3]["prior_kl"])
    assert checkpoint(undisturbed)["usage"].sum().item() == pytest.approx(1)
    weights = torch.load(undisturbed / "encoder.pt", weights_only=True)
    pmsn.VisionTransformer(16, 8, *train_inat.MODELS["vit_micro"]).load_state_dict(weights)
    model = checkpoint(undisturbed)["model"]
    assert all(torch.equal(weights[name], model[f"target_encoder.{name}"]) for name in weights)
    assert not torch.equal(weights["cls_token"], model["encoder.cls_token"])

def break_save_of_epoch_2(how):
    """The checkpoint meets a full disk, or a kill when half of it is written."""
    def save(content, path, plain=torch.save):
        of_epoch_2 = len(content.get("history", [])) == 3
        if of_epoch_2 and how == "full disk":
            raise OSError(28, "No space left on device")
        plain(content, path)
        if of_epoch_2:
            os.truncate(path, os.path.getsize(path) // 2)
            os.kill(os.getpid(), signal.SIGKILL)
    torch.save = save

def test_killed_at_any_moment_ends_with_the_same_bits(data, undisturbed, tmp_path):
    """A kill during a save, a full disk, two kills at random moments. The last start runs to the
    end. Epoch 1 has checkpointed activations: they change no bit, and the flag may change."""
    out, random = tmp_path / "out", np.random.default_rng()
    run(out, "--data", data, "--checkpoint_activations", status=-signal.SIGKILL,
        before=lambda: break_save_of_epoch_2("kill"))
    assert len(checkpoint(out)["history"]) == 2
    text = run(out, "--data", data, status=2, before=lambda: break_save_of_epoch_2("full disk"))
    assert "is the disk full?" in text.splitlines()[-1] and "Traceback" not in text
    assert len(checkpoint(out)["history"]) == 2 and not (out / "temporary").exists()
    for _ in range(2):
        process = start(out, "--data", data)
        time.sleep(random.uniform(0.2, 2.0))
        process.kill()
        process.join()
    run(out, "--data", data)
    assert_same_run(undisturbed, out)

@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="child processes are in /proc")
def test_torchrun_restarts_a_dead_process_with_the_same_bits(data, tmp_path):
    """DDP changes the order of its sums after a first step. With 3 processes it would show."""
    options = ["--data", data / "train", "--batch_size", "12",
               "--classes_per_batch", "2", "--seed", str(2**32 - 1)]
    one, two = tmp_path / "one", tmp_path / "two"
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
    finish(one, *[start(one, *options, rank=rank, world_size=3, port=port) for rank in range(3)])
    # The README's command, of which one process dies after the first epoch.
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "3",
               "--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0", "--max-restarts", "3",
               train_inat.__file__, *SMALL, *options, "--out", two]
    environment = {**os.environ, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
                   "GLOO_SOCKET_IFNAME": "lo"}
    process = subprocess.Popen(command, env=environment, text=True, stdout=subprocess.PIPE)
    wait_for((two / "checkpoint.pt").exists)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
    os.kill(int(children.split()[-1]), signal.SIGKILL)
    output, _ = process.communicate(timeout=150)
    assert process.returncode == 0 and output.count("50 images") == 2
    assert_same_run(one, two)

def test_a_compiled_run_has_the_losses_of_one_that_is_not(data, undisturbed, tmp_path):
    def without_a_compiler(plain=nn.Module.compile):
        nn.Module.compile = lambda self, **options: plain(self, backend="aot_eager", **options)
    options = ["--data", data, "--focal_views", 0, "--epochs", 1]
    run(tmp_path / "out", *options, "--compile", "--checkpoint_activations",
        before=without_a_compiler)
    run(tmp_path / "plain", *options)
    found, expected = metrics(tmp_path / "out")[1], metrics(tmp_path / "plain")[1]
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-3)

# ---- Faults --------------------------------------------------------------------------------------
@pytest.mark.parametrize("split", ["train", "val"])
def test_an_unreadable_image_is_named_and_more_than_one_percent_end_the_run(split, tmp_path):
    folder = draw(tmp_path / "data", (60, 60), held_out=60)
    broken = folder / split / "class1" / "005.jpg"
    broken.write_bytes(broken.read_bytes()[:300])
    text = run(tmp_path / "out", "--data", folder, "--epochs", 1)
    named = [line for line in text.splitlines() if line.startswith("unreadable")]
    assert set(named) == {f"unreadable image: {broken}"}
    assert len(named) == (3 if split == "train" else 2)  # once in each pass over the images
    (folder / split / "class0" / "007.jpg").write_text("no image")
    text = run(tmp_path / "out2", "--data", folder, "--epochs", 1, status=2)
    assert "2 of 120 images cannot be read, which is more than 1%" in text.splitlines()[-1]

def test_unreadable_images_have_no_features(tmp_path):
    folder = draw(tmp_path, (4, 4))
    (folder / "train/class0/002.jpg").write_text("no image")
    (paths, labels), _ = train_inat.find_images(folder)
    images = train_inat.Images(paths, train_inat.center_crop(16))
    encoder = pmsn.VisionTransformer(16, 8, 12, 1, 3)
    features, labels = train_inat.extract(encoder, images, labels, 0, 0, 1)
    assert len(features) == 7 and labels.tolist() == [0, 0, 0, 1, 1, 1, 1]
    replaced, index, readable = images[2]
    assert (index, readable) == (2, False) and torch.equal(replaced, images[3][0])

def test_a_step_that_is_not_finite_is_not_saved(data, tmp_path):
    """The last gradient of the second epoch is not finite, when all losses of the epoch were."""
    def break_step_10(norms=iter([1.0] * 9 + [math.nan])):
        nn.utils.clip_grad_norm_ = lambda *_: next(norms)
    text = run(tmp_path / "out", "--data", data / "train", before=break_step_10, status=2)
    assert text.splitlines()[-1] == ("train_inat.py: error: loss or gradient is not finite in "
                                     "epoch 2: lower --lr, new --out")
    assert len(checkpoint(tmp_path / "out")["history"]) == 2

def test_other_settings_other_data_and_damage_are_refused(data, undisturbed, tmp_path):
    out = shutil.copytree(undisturbed, tmp_path / "out")
    text = run(out, "--data", data, "--lr", 0.5, status=2)
    assert text.splitlines()[-1].endswith("has other settings (lr). Choose another --out")
    other = draw(tmp_path / "data", (20, 16, 8, 6))  # as many images, other classes
    assert "other settings (images_per_class)" in run(out, "--data", other, status=2)
    (out / "checkpoint.pt").write_bytes((out / "checkpoint.pt").read_bytes()[:5000])
    text = run(out, "--data", data, status=2)
    assert "checkpoint.pt. If it is damaged, delete it" in text.splitlines()[-1]

def test_a_second_run_in_the_same_folder_is_refused(data, tmp_path):
    """Right after kill -9 the folder is free again, even while the worker is still ending."""
    options = ["--data", data / "train", "--epochs", 500]
    first = start(tmp_path / "out", *options, "--workers", 1)
    wait_for(lambda: metrics(tmp_path / "out"))
    text = run(tmp_path / "out", *options, status=2)
    assert "error: another run writes to --out" in text.splitlines()[-1]
    first.kill()
    first.join()
    lines = len(metrics(tmp_path / "out"))
    third = start(tmp_path / "out", *options)
    wait_for(lambda: len(metrics(tmp_path / "out")) > lines)
    third.kill()
    third.join()

@pytest.mark.parametrize("change, message", [
    (["--data", "/nowhere"], "/nowhere"),
    (["--data", "UNKNOWN"], "'c' is missing in --data"),
    (["--data", "NOT_UNPACKED"], "no image can be read, for example"),
    (["--batch_size", "100"], "--batch_size 100 is more than 50 images"),
    (["--classes_per_batch", "5"], "2 images of 5 classes per batch do not fit"),
    (["--image_size", "20"], "must be multiples of --patch_size"),
    (["--exponent", "-1"], "argument --exponent: must be finite, from 0 to inf, got -1"),
    (["--exponent", "300"], "a prior must be positive"),
    (["--lr", "nan"], "argument --lr: must be finite, from"),
    (["--out", ""], "--out is empty"),
    (["--out", "/proc/x"], "cannot write or lock --out /proc/x: No such file or directory"),
    (["--quick", "--out", "FOREIGN"], "is not from --quick"),
])
def test_mistakes_are_one_clear_line(change, message, data, tmp_path, capsys):
    for name in ("UNKNOWN/train/a", "UNKNOWN/val/c", "FOREIGN/train"):
        shutil.copytree(data / "train/class0", tmp_path / name)
    content = {"images": [{"id": 1, "file_name": "none.jpg"}],
               "annotations": [{"image_id": 1, "category_id": 2}]}
    (tmp_path / "NOT_UNPACKED").mkdir()
    (tmp_path / "NOT_UNPACKED" / "train2018.json").write_text(json.dumps(content))
    argv = [*SMALL, "--data", str(data), "--out", str(tmp_path / "out")]
    argv += [str(tmp_path / word) if word.isupper() else word for word in change]
    with pytest.raises(SystemExit) as error:
        train_inat.main(argv)
    last = capsys.readouterr().err.splitlines()[-1]
    assert error.value.code == 2 and message in last, last
    assert (tmp_path / "FOREIGN" / "train").exists()

# ---- Evaluation ----------------------------------------------------------------------------------
def test_shots_are_counted_on_training_images(monkeypatch):
    """Features are the label, but the rarest class looks like the most frequent one."""
    counts = torch.tensor([150, 100, 20, 19, 3])
    labels, test_labels = torch.arange(5).repeat_interleave(counts), torch.arange(5).repeat(4)
    features, test_features = torch.eye(5)[labels], torch.eye(5)[test_labels]
    test_features[test_labels == 4] = torch.eye(5)[0]
    answers = iter([(features, labels), (test_features, test_labels)])
    monkeypatch.setattr(train_inat, "extract", lambda *_: next(answers))
    args, split = SimpleNamespace(image_size=16, workers=0), ([], None)
    found = train_inat.evaluate(None, split, split, args)
    expected = {"all": 0.8, "many": 1.0, "medium": 1.0, "few": 0.5}
    for method in ("knn", "linear"):
        for name, value in expected.items():
            assert found[f"{method}_{name}"] == pytest.approx(value)
