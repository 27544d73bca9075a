"""train_inat.py: recipe, every step of the loop, restarts after any death, faults.

Most runs are in forked processes, which do not import PyTorch again.
"""

import copy
import fcntl
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import pmsn
import train_inat
from support.images import Images
from test_images import COUNTS, draw
from test_runs import FORK, LOGS, free_port, is_running, needs_proc, see_each_other, wait_for

SMALL = ["--model", "vit_micro", "--image_size", "16", "--focal_size", "16", "--patch_size", "8",
         "--focal_views", "1", "--prototypes", "6", "--batch_size", "10", "--epochs", "3",
         "--workers", "0", "--eval_every", "100"]  # 5 steps of 10 images per epoch


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return draw(tmp_path_factory.mktemp("data"))


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch):
    """Runs have the same bits on CPUs, and a process that uses a GPU cannot be forked."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def start(out, *argv, rank=0, world_size=1, port=0, before=lambda: None, figures=False):
    """train_inat.main in a process of its own. `before` is called in it first.

    Figures take longer than the training, so most runs have none.
    """
    def child():
        if not figures:
            train_inat.draw_figures = lambda *_: None
        torch.cuda.is_available = lambda: False
        sys.stdout = sys.stderr = open(f"{out}.log{rank}", "w", buffering=1)
        see_each_other(rank, world_size, port)
        before()
        train_inat.main([*SMALL, "--out", str(out), *map(str, argv)])

    process = FORK.Process(target=child)
    process.start()
    return process


def start_two(out, *argv, options=((), ()), **keywords):
    """Two processes that see each other. Each one has options of its own."""
    port = free_port()
    return [start(out, *argv, *more, rank=rank, world_size=2, port=port, **keywords)
            for rank, more in enumerate(options)]


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
    """The same bits in weights, target, optimizer and mean prediction, and the same log."""
    assert metrics(one) == metrics(two)
    one, two = checkpoint(one), checkpoint(two)
    for part in ("model", "optimizer", "mean_prediction"):
        torch.testing.assert_close(one[part], two[part], atol=0, rtol=0)


@pytest.fixture(scope="module")
def undisturbed(data, tmp_path_factory):
    """A run of 3 epochs that nobody stopped."""
    out = tmp_path_factory.mktemp("runs") / "undisturbed"
    run(out, "--data", data)
    return out


# ---- Recipe --------------------------------------------------------------------------------------
def test_schedules_by_hand(tmp_path):
    """10 epochs of 4 steps: 2 steps of warm-up, stretched to 50 steps, the first one is step 1."""
    args = train_inat.parse(["--data", "x", "--out", str(tmp_path), "--epochs", "10",
                             "--lr", "1", "--ema_momentum", "0.9"])
    steps = train_inat.schedules(args, 4)
    assert len(steps) == 40
    for step, (lr, weight_decay, ema_momentum) in enumerate(steps, start=1):
        fall = 0.001 + 0.999 * (1 + math.cos(math.pi * (step - 2) / 48)) / 2
        assert lr == pytest.approx(0.2 + 0.4 * step if step < 2 else fall)
        decay = 0.4 - 0.36 * (1 + math.cos(math.pi * step / 50)) / 2
        assert weight_decay == pytest.approx(decay)
        assert ema_momentum == pytest.approx(0.9 + 0.1 * (step - 1) / 50)


def test_prototypes_and_vectors_have_no_weight_decay():
    encoder = pmsn.VisionTransformer(16, 8, 12, 1, 3)
    model = pmsn.PMSN(encoder, pmsn.power_law_prior(5, 1.0), head=pmsn.projection_head(12, 8))
    optimizer = train_inat.make_optimizer(model)
    decayed, others = ({id(p) for p in group["params"]} for group in optimizer.param_groups)
    assert optimizer.param_groups[1]["weight_decay"] == 0
    trained = [p for p in model.parameters() if p.requires_grad]
    assert decayed == {id(p) for p in trained if p.ndim > 1 and p is not model.prototypes}
    assert decayed | others == {id(p) for p in trained}


def arguments(tmp_path, *argv):
    return train_inat.parse(["--data", "x", "--out", str(tmp_path), *argv])


def test_defaults_are_the_published_recipe_with_relative_sharpening(tmp_path, monkeypatch):
    args = arguments(tmp_path)
    expected = dict(model="vit_small", patch_size=16, image_size=224, focal_size=96, lr=1e-3,
                    focal_views=10, patch_drop=0.15, prototypes=1024, batch_size=1024, epochs=300,
                    ema_momentum=0.996, exponent=0.25, prior="power_law", sinkhorn_iterations=0,
                    relative_sharpening=True, any_order=False)
    assert not arguments(tmp_path, "--no-relative_sharpening").relative_sharpening
    assert expected.items() <= vars(args).items() and len(vars(args)) <= 27
    for cores, workers in ((3, 3), (64, 8)):
        monkeypatch.setattr(train_inat, "available_cores", lambda: cores)
        assert arguments(tmp_path).workers == workers
    # The crops are those of pmsn.multi_crop, and half of the views are blurred.
    crop, color_options = train_inat.view_options(args)
    image = torch.zeros(3, 300, 300, dtype=torch.uint8)
    assert [x.shape[0::2] for x in crop(image)] == [(1, 224), (1, 224), (10, 96)]
    assert color_options == {} and not {"rand_scale", "focal_scale"} & {*crop.keywords}
    small = arguments(tmp_path, "--image_size", "32", "--focal_size", "16")
    crop, color_options = train_inat.view_options(small)
    assert color_options == {"blur_p": 0.0} and crop.keywords["rand_scale"] == (0.4, 1.0)


def test_the_three_priors(tmp_path):
    labels = torch.tensor([0, 1, 1, 1, 2, 2])
    for argv, expected in (
            (["--prior", "classes"], [1 / 6, 1 / 2, 1 / 3]),
            (["--prior", "uniform", "--prototypes", "4"], [1 / 4] * 4),
            (["--exponent", "1", "--prototypes", "3"], [6 / 11, 3 / 11, 2 / 11]),
            (["--prototypes", "2"], [2**0.25 / (1 + 2**0.25), 1 / (1 + 2**0.25)])):
        args = arguments(tmp_path, *argv)
        prior = train_inat.PRIORS[args.prior](labels, args)
        torch.testing.assert_close(prior, torch.tensor(expected))


def test_quick_runs_keep_the_flags_of_the_prior():
    args = train_inat.parse(["--quick", "--prior", "uniform", "--epochs", "9"])
    assert (args.prior, args.prototypes, args.epochs) == ("uniform", 16, 2)
    assert train_inat.parse(["--quick", "--exponent", "1"]).exponent == 1
    # Small images are not blurred, so their focal views may be small.
    sizes = ["--image_size", "32", "--focal_size", "8", "--patch_size", "8"]
    assert train_inat.parse(["--data", "x", *sizes]).focal_size == 8


# ---- Every step of the loop ----------------------------------------------------------------------
STEPS = 20  # 4 epochs of 5 steps


def train_in_float64(out, data, monkeypatch, *argv):
    """Run train_inat.main. Returns the model before, and what each step gets to see: the crops,
    their indices, and the state of the random numbers."""
    models, indices, steps = [], [], []
    make_model, make_views = train_inat.make_model, pmsn.make_views
    getitem = Images.__getitem__

    def double_model(*args):
        models.append(make_model(*args).double())
        return copy.deepcopy(models[0])

    def recorded_views(crops, **options):
        steps.append((crops, indices[-10:], torch.get_rng_state()))
        return [view.double() for view in make_views(crops, **options)]

    def recorded_item(self, index):
        indices.append(index)
        return getitem(self, index)

    monkeypatch.setitem(train_inat.MODELS, "vit_micro", (24, 2, 3))
    monkeypatch.setattr(train_inat, "make_model", double_model)
    monkeypatch.setattr(pmsn, "make_views", recorded_views)
    monkeypatch.setattr(Images, "__getitem__", recorded_item)
    monkeypatch.setattr(train_inat, "draw_figures", lambda *_: None)
    train_inat.main([*SMALL, "--data", str(data / "train"), "--out", str(out), "--epochs", "4",
                     *argv])
    monkeypatch.undo()
    return models[0], steps


def plain_loop(model, steps, prior, patch_drop=0.15, peak_lr=1e-3, first_momentum=0.996, **options):
    """MSN's recipe, without a function of train_inat. Trains the model, returns its predictions."""
    def cosine(start, end, share):
        return end + (start - end) * (1 + math.cos(math.pi * share)) / 2

    network = nn.ModuleList([model.encoder, model.head])
    target = nn.ModuleList([model.target_encoder, model.target_head])
    optimizer = torch.optim.AdamW([
        {"params": [p for p in network.parameters() if p.ndim > 1]},
        {"params": [p for p in network.parameters() if p.ndim == 1], "weight_decay": 0.0},
        {"params": [model.prototypes], "weight_decay": 0.0}])
    predictions = []
    for t, (crops, _, random_state) in enumerate(steps, start=1):
        # The warm-up is the first step.
        lr = cosine(peak_lr, peak_lr / 1000, (t - 1) / (1.25 * STEPS - 1))
        momentum = first_momentum + (1 - first_momentum) * (t - 1) / (1.25 * STEPS)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.param_groups[0]["weight_decay"] = cosine(0.04, 0.4, t / (1.25 * STEPS))
        torch.set_rng_state(random_state)
        views = [view.double() for view in pmsn.make_views(crops, blur_p=0.0)]
        anchors = [model.head(model.encoder(views[1], patch_drop=patch_drop))]
        anchors += [model.head(model.encoder(view)) for view in views[2:]]
        targets = model.target_head(model.target_encoder(views[0]))
        loss, terms = pmsn.pmsn_loss(torch.cat(anchors), targets, model.prototypes, prior,
                                     **options)
        predictions.append(terms["mean_prediction"])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 3.0)
        optimizer.step()
        for slow, fast in zip(target.parameters(), network.parameters()):
            slow.data = momentum * slow.data + (1 - momentum) * fast.data
    return predictions


ALL_OPTIONS = [
    "--prior", "classes", "--patch_drop", "0.5", "--sinkhorn_iterations", "2",
    "--no-relative_sharpening", "--any_order", "--focal_views", "2", "--lr", "0.002",
    "--ema_momentum", "0.9", "--seed", "3", "--checkpoint_activations"]


@pytest.mark.parametrize("argv, prior, options", [
    ([], [k**-0.25 for k in range(1, 7)], dict(relative_sharpening=True)),
    (ALL_OPTIONS, COUNTS, dict(patch_drop=0.5, peak_lr=0.002, first_momentum=0.9,
                               sinkhorn_iterations=2, relative_sharpening=False, any_order=True))])
def test_twenty_steps_equal_a_plain_loop(argv, prior, options, data, tmp_path, monkeypatch):
    """In float64, with the same crops and random numbers: all weights and statistics agree.

    Each epoch has all images once, in a new order, and no step has the random numbers of another.
    """
    if "classes" in argv:
        without_prototypes = [word for word in SMALL if word not in ("--prototypes", "6")]
        monkeypatch.setattr(f"{__name__}.SMALL", without_prototypes)
    model, steps = train_in_float64(tmp_path / "out", data, monkeypatch, *argv)
    assert len(steps) == STEPS == len({tuple(state.tolist()) for _, _, state in steps})
    epochs = [sum((index for _, index, _ in steps[i : i + 5]), []) for i in range(0, STEPS, 5)]
    assert all(sorted(epoch) == [*range(50)] for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    seed = 3 if argv else 0
    first = torch.randperm(50, generator=torch.Generator().manual_seed(1_000_003 * seed + 1))
    assert epochs[0] == first.tolist()  # the order of DistributedSampler in epoch 1
    before = copy.deepcopy(model.target_encoder.cls_token)
    prior = torch.tensor(prior, dtype=torch.float64)
    predictions = plain_loop(model, steps, (prior / prior.sum()).float(), **options)
    found = checkpoint(tmp_path / "out")["model"]
    mean_prediction = torch.stack(predictions[-5:]).mean(dim=0)  # of the last epoch
    torch.testing.assert_close(checkpoint(tmp_path / "out")["mean_prediction"], mean_prediction)
    for name, expected in model.state_dict().items():
        torch.testing.assert_close(found[name], expected, atol=1e-8, rtol=1e-8)
    assert (found["target_encoder.cls_token"] - before).abs().max() > 1e-5


def test_the_target_encoder_is_evaluated(data, tmp_path, monkeypatch):
    """Its weights of that moment. Between two evaluations, both networks have moved."""
    seen = []
    monkeypatch.setattr(train_inat, "draw_figures", lambda *_: None)
    monkeypatch.setattr(train_inat, "evaluate", lambda encoder, *_: seen.append(
        copy.deepcopy(encoder.state_dict())) or {"knn_all": 0.5, "linear_all": 0.5})
    train_inat.main([*SMALL, "--data", str(data), "--out", str(tmp_path / "out"), "--epochs", "2",
                     "--eval_every", "1", "--ema_momentum", "0.9"])
    assert len(seen) == 3  # epochs 0, 1 and 2
    model = checkpoint(tmp_path / "out")["model"]
    for name, weight in seen[-1].items():
        assert torch.equal(weight, model[f"target_encoder.{name}"])
        assert not torch.equal(weight, model[f"encoder.{name}"])
    assert not torch.equal(seen[0]["cls_token"], seen[1]["cls_token"])


def test_two_processes_have_other_images_and_random_numbers_and_log_the_mean(data, tmp_path):
    def record():
        seen, plain_views, plain_loss = [], pmsn.make_views, pmsn.pmsn_loss

        def make_views(crops, **options):
            seen.append({"crops": crops[0], "random": torch.get_rng_state()})
            return plain_views(crops, **options)

        def pmsn_loss(*arguments, **options):
            loss, terms = plain_loss(*arguments, **options)
            seen[-1]["cross_entropy"] = terms["cross_entropy"]
            torch.save(seen, tmp_path / f"{os.environ['RANK']}.pt")
            return loss, terms
        pmsn.make_views, pmsn.pmsn_loss = make_views, pmsn_loss
    finish(tmp_path / "out", *start_two(tmp_path / "out", "--data", data, "--epochs", 2,
                                        before=record))
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert len(first) == len(second) == 10
    states = {tuple(step["random"].tolist()) for step in first + second}
    assert len(states) == 20
    images = [image for step in first[:5] + second[:5] for image in step["crops"]]
    assert len(images) == 50 and len(torch.stack(images).flatten(1).unique(dim=0)) == 50
    for epoch in (1, 2):
        steps = [step["cross_entropy"] for seen in (first, second)
                 for step in seen[5 * epoch - 5 : 5 * epoch]]
        mean = torch.stack(steps).mean().item()
        assert metrics(tmp_path / "out")[epoch]["cross_entropy"] == pytest.approx(mean, rel=1e-5)


@pytest.mark.parametrize("what", ["images", "labels", "validation", "lr", "eval_every"])
def test_processes_with_other_data_or_flags_end_at_the_start(what, data, tmp_path):
    """For example, a copy of the images on a second machine is not complete."""
    names = sorted((data / "train").rglob("*.jpg"))
    files, options = {}, []
    for file, first, last, period in (("all", 0, 50, 2), ("fewer", 0, 49, 2), ("labels", 0, 50, 3)):
        files[file] = tmp_path / f"{file}.txt"
        files[file].write_text("".join(f"{name} {int(i % period > 0)}\n"
                                       for i, name in enumerate(names[first:last])))
    for rank in range(2):
        other = what if rank == 1 else None
        training = {"images": "fewer", "labels": "labels"}.get(other, "all")
        validation = {"validation": "fewer"}.get(other, "all")
        options.append(["--list", files[training], files[validation],
                        "--lr", {"lr": 0.5}.get(other, 0.001),
                        "--eval_every", {"eval_every": 1}.get(other, 100)])

    def wait_for_nobody():
        time.sleep = lambda seconds: None

    out = tmp_path / "out"
    text = finish(out, *start_two(out, "--data", data, options=options, before=wait_for_nobody),
                  status=2)
    name = {"labels": "images"}.get(what, what)
    line = (f"process 1 has other {name} than process 0. All processes need the same flags and the "
            "same files\n")
    assert text == f"train_inat.py: error: {line}"
    assert Path(f"{out}.log1").read_text() == f"train_inat.py: error: process 1: {line}"
    assert os.listdir(out) == ["lock"]


# ---- Stopping and going on -----------------------------------------------------------------------
def test_the_files_of_a_run(undisturbed):
    """encoder.pt is the target encoder. It fits a VisionTransformer, as do the weights of timm."""
    lines = metrics(undisturbed)
    assert [line["epoch"] for line in lines] == [0, 1, 2, 3]
    assert "knn_all" in lines[0] and "linear_all" in lines[3] and "knn_all" not in lines[1]
    assert lines[3]["loss"] == pytest.approx(lines[3]["cross_entropy"] + lines[3]["prior_kl"])
    assert checkpoint(undisturbed)["mean_prediction"].sum().item() == pytest.approx(1)
    shares = np.arange(1, 7) ** -0.25 / (np.arange(1, 7) ** -0.25).sum()
    effective = np.exp(-(shares * np.log(shares)).sum())
    assert (f"6 prototypes, {effective:.1f} effective, with {10 * shares.min():.2f} to "
            f"{10 * shares.max():.2f} images each") in Path(f"{undisturbed}.log0").read_text()
    weights = torch.load(undisturbed / "encoder.pt", weights_only=True)
    pmsn.VisionTransformer(16, 8, *train_inat.MODELS["vit_micro"]).load_state_dict(weights)
    model = checkpoint(undisturbed)["model"]
    assert all(torch.equal(weights[name], model[f"target_encoder.{name}"]) for name in weights)
    assert not torch.equal(weights["cls_token"], model["encoder.cls_token"])


def break_save_of_epoch_2(how):
    """A full disk, or a kill when half of checkpoint.pt, or of encoder.pt, is written."""
    saved = []

    def save(content, path, plain=torch.save):
        saved.append(path.name)
        of_epoch_2 = "history" in content and len(content["history"]) == 3
        if of_epoch_2 and how == "full disk":
            raise OSError(28, "No space left on device")
        plain(content, path)
        after_epoch_2 = how == "kill at encoder.pt" and len(saved) == 4
        if of_epoch_2 and how == "kill at checkpoint.pt" or after_epoch_2:
            os.truncate(path, os.path.getsize(path) // 2)
            os.kill(os.getpid(), signal.SIGKILL)
    torch.save = save


def test_killed_at_any_moment_ends_with_the_same_bits(data, undisturbed, tmp_path):
    """Kills during the two saves, a full disk, two kills at random moments. The last start runs to
    the end. Epoch 1 has checkpointed activations: they change no bit, and the flag may change."""
    out, random = tmp_path / "out", np.random.default_rng()
    text = run(out, "--data", data, "--checkpoint_activations", status=-signal.SIGKILL,
               before=lambda: break_save_of_epoch_2("kill at checkpoint.pt"))
    assert f"new run in {out}" in text and len(checkpoint(out)["history"]) == 2
    text = run(out, "--data", data, status=2, before=lambda: break_save_of_epoch_2("full disk"))
    assert f"{out} continues after epoch 1" in text
    assert "is the disk full?" in text.splitlines()[-1] and "Traceback" not in text
    assert len(checkpoint(out)["history"]) == 2 and not list(out.glob("*.temporary"))
    first = torch.load(out / "encoder.pt", weights_only=True)
    # The first of its four saves is that of the files of epoch 1, which it finds.
    shutil.copytree(out, tmp_path / "again")
    run(tmp_path / "again", "--data", data, status=-signal.SIGKILL,
        before=lambda: break_save_of_epoch_2("kill at encoder.pt"))
    whole = torch.load(tmp_path / "again" / "encoder.pt", weights_only=True)
    assert not torch.equal(first["cls_token"], whole["cls_token"])
    run(tmp_path / "again", "--data", data)
    for _ in range(2):
        process = start(out, "--data", data)
        time.sleep(random.uniform(0.1, 1.0))
        process.kill()
        process.join()
    run(out, "--data", data)
    assert_same_run(undisturbed, out)
    assert_same_run(undisturbed, tmp_path / "again")


def test_a_failed_evaluation_loses_nothing_and_is_repeated(data, undisturbed, tmp_path):
    """The evaluation of the last epoch runs out of memory. The next start evaluates that epoch."""
    def break_evaluation(calls=iter(range(9)), plain=train_inat.evaluate):
        def evaluate(*arguments):
            if next(calls) == 1:
                raise torch.OutOfMemoryError("out of memory")
            return plain(*arguments)
        train_inat.evaluate = evaluate
    text = run(tmp_path / "out", "--data", data, status=1, before=break_evaluation)
    assert "out of memory" in text
    assert len(checkpoint(tmp_path / "out")["history"]) == 4 == len(metrics(tmp_path / "out"))
    text = run(tmp_path / "out", "--data", data)
    assert "continues after epoch 3" in text and "linear_all" in text
    assert_same_run(undisturbed, tmp_path / "out")


def test_files_that_are_gone_come_back_from_the_checkpoint(data, undisturbed, tmp_path):
    """Here figures cannot be drawn, which costs nothing but a warning."""
    def break_figures():
        def savefig(*_, **__):
            raise RuntimeError("Failed to process string with tex\nbecause latex is not there")
        train_inat.Figure.savefig = savefig
    out = shutil.copytree(undisturbed, tmp_path / "out")
    for name in ("encoder.pt", "metrics.jsonl"):
        (out / name).unlink()
    text = run(out, "--data", data, before=break_figures, figures=True)
    assert "warning: cannot draw training.png: Failed to process string with tex\n" in text
    assert "disk" not in text and not (out / "training.png").exists()
    assert "linear_all" not in text  # The last epoch is not evaluated again.
    assert metrics(out) == metrics(undisturbed)
    assert (out / "encoder.pt").read_bytes() == (undisturbed / "encoder.pt").read_bytes()
    run(out, "--data", data, figures=True)
    for name in ("training.png", "prototypes.png"):
        assert min(Image.open(out / name).size) > 300


def test_a_quick_run_starts_anew(tmp_path, monkeypatch, capsys):
    """It needs no data, and has other settings than the one before."""
    monkeypatch.setitem(train_inat.MODELS, "vit_micro", (24, 1, 3))
    plain_draw_noise = train_inat.draw_noise
    monkeypatch.setattr(train_inat, "draw_noise", lambda folder: plain_draw_noise(folder, 80))
    monkeypatch.setattr(train_inat, "draw_figures", lambda *_: None)
    monkeypatch.setattr(train_inat, "evaluate", lambda *_: {"knn_all": 0.5, "linear_all": 0.25})
    for seed in ("0", "1"):
        train_inat.main(["--quick", "--out", str(tmp_path / "out"), "--seed", seed])
        text = capsys.readouterr().out
        assert f"new run in {tmp_path}/out\n64 images, 8 classes, 1 x cpu" in text
        assert text.count("knn_all 0.500 linear_all 0.250\n") == 2
    assert [line["epoch"] for line in metrics(tmp_path / "out")] == [0, 1, 2]


def test_an_epoch_is_saved_before_its_row_and_then_drawn(data, tmp_path, monkeypatch):
    """So nothing that breaks the log or a figure can lose it."""
    events, out = [], tmp_path / "out"

    def say(*words):
        if re.match(r" +\d\.\d\d ", words[0]):
            events.append(("row", float(words[0].split()[0]), checkpoint(out)["history"][-1]))

    monkeypatch.setattr(train_inat, "say", say)
    monkeypatch.setattr(train_inat, "draw_figures", lambda run:
                        events.append(("figures", run.history[-1]["epoch"], run.history[-1])))
    train_inat.main([*SMALL, "--data", str(data / "train"), "--out", str(out), "--epochs", "2"])
    assert [event[:2] for event in events] == [("figures", 0), ("row", 1), ("figures", 1),
                                               ("row", 2), ("figures", 2)]
    assert [event[2]["epoch"] for event in events] == [0, 1, 1, 2, 2]


@pytest.mark.parametrize("break_off", LOGS)
def test_a_log_that_breaks_off_ends_nothing(break_off, data, tmp_path):
    def break_log():
        sys.stdout = break_off()

    run(tmp_path / "out", "--data", data, "--epochs", 1, before=break_log)
    assert len(checkpoint(tmp_path / "out")["history"]) == 2 == len(metrics(tmp_path / "out"))
    assert "linear_all" in metrics(tmp_path / "out")[1]


def torchrun(out, processes, *argv):
    """The README's command for several machines, with restarts."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(processes),
               "--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0", "--max-restarts", "3",
               train_inat.__file__, *SMALL, *map(str, argv), "--out", str(out)]
    environment = {**os.environ, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
                   "GLOO_SOCKET_IFNAME": "lo"}
    return subprocess.Popen(command, env=environment, text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT)


def children(pid):
    return [int(x) for x in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.slow
@needs_proc
def test_torchrun_restarts_a_dead_process_with_the_same_bits(data, tmp_path):
    """DDP changes the order of its sums after a first step. With 3 processes it would show."""
    options = ["--data", data / "train", "--batch_size", "12",
               "--classes_per_batch", "2", "--seed", str(2**32 - 1)]
    one, two = tmp_path / "one", tmp_path / "two"
    port = free_port()
    finish(one, *[start(one, *options, rank=rank, world_size=3, port=port) for rank in range(3)])
    process = torchrun(two, 3, *options)  # One of its processes dies after the first epoch.
    wait_for((two / "checkpoint.pt").exists)
    os.kill(children(process.pid)[-1], signal.SIGKILL)
    output, _ = process.communicate(timeout=150)
    assert process.returncode == 0 and output.count("50 images") == 2
    assert_same_run(one, two)


@pytest.mark.slow
@needs_proc
def test_processes_end_with_torchrun_and_free_the_folder(data, tmp_path):
    """After kill -9 of torchrun they would train on, or wait for each other with the lock."""
    process = torchrun(tmp_path / "out", 2, "--data", data / "train", "--epochs", 500)
    wait_for((tmp_path / "out" / "checkpoint.pt").exists)
    workers = children(process.pid)
    process.kill()
    process.wait()
    assert len(workers) == 2
    wait_for(lambda: not any(is_running(pid) for pid in workers), seconds=10)
    with open(tmp_path / "out" / "lock", "a") as lock:
        wait_for(lambda: is_free(lock), seconds=10)


def is_free(lock):
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@pytest.mark.slow
def test_a_mistake_is_reported_once_by_torchrun(data, tmp_path):
    """Not by each of the processes. --max-restarts would repeat it, so the README has it apart."""
    process = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
         train_inat.__file__, *SMALL, "--data", str(data), "--lr", "nan", "--out", str(tmp_path)],
        text=True, capture_output=True, timeout=100)
    assert process.stderr.count("train_inat.py: error: argument --lr: must be from") == 1
    traceback = f'Traceback (most recent call last):\n  File "{train_inat.__file__}'
    assert traceback not in process.stderr


@pytest.mark.slow
def test_a_compiled_run_has_the_losses_of_one_that_is_not(data, tmp_path):
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
    options = ["--data", folder, "--epochs", 1, "--batch_size", 40]
    text = run(tmp_path / "out", *options)
    named = [line for line in text.splitlines() if line.startswith("unreadable")]
    with pytest.raises(OSError) as error:
        Image.open(broken).load()
    assert set(named) == {f"unreadable image: {broken} ({error.value})"}
    assert len(named) == (3 if split == "train" else 2)  # once in each pass over the images
    (folder / split / "class0" / "007.jpg").write_text("no image")
    text = run(tmp_path / "out2", *options, status=2)
    assert "2 of 120 images cannot be read, which is more than 1%" in text.splitlines()[-1]


def test_a_step_that_is_not_finite_is_not_saved(data, tmp_path):
    """The last gradient of the second epoch is not finite, when all losses of the epoch were."""
    def break_step_10(norms=iter([1.0] * 9 + [math.nan])):
        nn.utils.clip_grad_norm_ = lambda *_: next(norms)
    text = run(tmp_path / "out", "--data", data / "train", before=break_step_10, status=2)
    assert text.splitlines()[-1] == ("train_inat.py: error: loss or gradient is not finite: lower "
                                     "--lr and choose another --out")
    assert len(checkpoint(tmp_path / "out")["history"]) == 2


def test_weights_that_are_not_finite_are_not_saved(data, tmp_path):
    """The last update of the second epoch breaks the weights, after finite loss and gradient."""
    def break_step_10(steps=iter(range(1, 16)), plain=torch.optim.AdamW.step):
        def step(self):
            plain(self)
            if next(steps) == 10:
                self.param_groups[1]["params"][0].data.fill_(math.inf)
        torch.optim.AdamW.step = step
    text = run(tmp_path / "out", "--data", data / "train", before=break_step_10, status=2)
    assert "error: weights are not finite after epoch 2" in text.splitlines()[-1]
    assert len(checkpoint(tmp_path / "out")["history"]) == 2


def test_other_settings_are_refused(data, undisturbed, tmp_path):
    out = shutil.copytree(undisturbed, tmp_path / "out")
    text = run(out, "--data", data, "--lr", 0.5, "--seed", 1, status=2)
    assert text.splitlines()[-1].endswith("has other settings (lr, seed). Choose another --out")


@pytest.mark.parametrize("change", [
    "rename an image", "swap two classes", "rename a class", "replace an image", "move an image"])
def test_other_data_of_the_same_size_is_refused(change, data, undisturbed, tmp_path):
    """The same images in another folder are the same data."""
    out, other = shutil.copytree(undisturbed, tmp_path / "out"), tmp_path / "other"
    shutil.copytree(data, other)
    if change == "rename an image":
        run(out, "--data", other)
        (other / "train/class0/003.jpg").rename(other / "train/class0/003b.jpg")
    elif change == "swap two classes":
        for old, new in (("class2", "x"), ("class3", "class2"), ("x", "class3")):
            (other / "train" / old).rename(other / "train" / new)
    elif change == "rename a class":
        for split in ("train", "val"):
            (other / split / "class3").rename(other / split / "class4")
    elif change == "replace an image":
        shutil.copy(data / "train/class0/003.jpg", other / "train/class1/003.jpg")
    else:
        (other / "train/class0/023.jpg").rename(other / "train/class1/012.jpg")
    assert "has other settings (images" in run(out, "--data", other, status=2)


def test_other_labels_of_a_list_and_other_validation_images_are_other_data(data, tmp_path):
    names = sorted((data / "train").rglob("*.jpg"))
    lists = [tmp_path / "train.txt", tmp_path / "val.txt"]
    options = ["--data", data, "--list", *lists, "--epochs", 1, "--long_tail", 0.5]

    def write(file, labels):
        file.write_text("".join(f"{name} {label}\n" for name, label in zip(names, labels)))
    for file in lists:
        write(file, [i % 2 for i in range(50)])
    text = run(tmp_path / "out", *options)
    assert "43 images, 2 classes" in text  # 25 images, and 25 / 2^.5 = 17.7
    write(lists[1], [int(i % 3 > 0) for i in range(50)])
    assert "has other settings (validation)" in run(tmp_path / "out", *options, status=2)
    write(lists[1], [i % 2 for i in range(50)])
    write(lists[0], [i // 2 % 2 for i in range(50)])
    assert "has other settings (images)" in run(tmp_path / "out", *options, status=2)


def test_a_damaged_checkpoint_is_refused(data, undisturbed, tmp_path):
    """Half a file, a single bit of the weights, and a bit that makes a folder of a part of the
    file. torch.load would take the last two."""
    out = shutil.copytree(undisturbed, tmp_path / "out")
    content = (out / "checkpoint.pt").read_bytes()
    flipped, folder = bytearray(content), bytearray(content)
    flipped[len(content) // 2] ^= 1
    folder[content.rindex(b"PK\x01\x02") + 38] ^= 0x10
    for damaged in (content[:5000], flipped, folder):
        (out / "checkpoint.pt").write_bytes(damaged)
        text = run(out, "--data", data, status=2)
        last = text.splitlines()[-1]
        assert "checkpoint.pt. If it is damaged, or of another version, delete it" in last


def test_a_second_run_in_the_same_folder_is_refused(data, tmp_path):
    """Right after kill -9 the folder is free again, even while the worker is still ending."""
    options = ["--data", data / "train", "--epochs", 500]
    first = start(tmp_path / "out", *options, "--workers", 1)
    wait_for(lambda: metrics(tmp_path / "out"))
    text = run(tmp_path / "out", *options, status=2)
    last = text.splitlines()[-1]
    assert "error: another run writes to --out" in last and f"process {first.pid} on " in last
    first.kill()
    first.join()
    lines = len(metrics(tmp_path / "out"))
    third = start(tmp_path / "out", *options)
    wait_for(lambda: len(metrics(tmp_path / "out")) > lines)
    third.kill()
    third.join()


@pytest.mark.parametrize("change, message", [
    (["--data", "/nowhere"], "/nowhere"),
    (["--data", "UNKNOWN"], "class 'c' of the validation images is missing in the training"),
    (["--data", "NOT_UNPACKED"], "no training image can be read, for example"),
    (["--data", "UNREADABLE"], "no validation image can be read, for example"),
    (["--data", "ONLY_TEST"], "there is a folder test, but no folder train"),
    (["--data", "TWO_TRAINS"], "which one is it: train or training?"),
    (["--data", "TWO_YEARS"], "more than one data set: train2018.json, train2019.json"),
    (["--data", "EMPTY"], "has no folders with images (.jpg"),
    (["--list", "/nowhere"], "No such file or directory: '/nowhere'"),
    (["--list", "a", "b", "c"], "--list takes one file for training and one for validation"),
    (["--batch_size", "100"], "--batch_size 100 is more than 50 images"),
    (["--classes_per_batch", "5"], "2 images of 5 classes per batch do not fit"),
    (["--classes_per_batch", "5", "--batch_size", "11"], "must be a multiple of 5 classes"),
    (["--image_size", "20"], "--image_size must be a multiple of --patch_size"),
    (["--focal_size", "20"], "--focal_size must be a multiple of --patch_size"),
    (["--image_size", "64", "--focal_size", "8"], "--focal_size must be more than 8 pixels"),
    (["--exponent", "-1"], "argument --exponent: must be from 0 to 1000000000, got -1"),
    (["--exponent", "1" * 400], "argument --exponent: must be from 0 to"),
    (["--epochs", "1" * 400], "argument --epochs: must be from 1 to"),
    (["--epochs", "1e3"], "argument --epochs: invalid number value: '1e3'"),
    (["--prior", "uniform", "--exponent", "1"], "--exponent is for --prior power_law, not for"),
    (["--prior", "classes"], "--prior classes has one prototype per class: leave --prototypes out"),
    (["--exponent", "300"], "a prior must be positive"),
    (["--lr", "nan"], "argument --lr: must be from 0 to 1000000000, got nan"),
    (["--lr", "inf"], "argument --lr: must be from 0 to 1000000000, got inf"),
    (["--seed", "-1"], "argument --seed: must be from 0 to 4294967295, got -1"),
    (["--out", ""], "argument --out: is empty"),
    (["--data", ""], "argument --data: is empty"),
    (["--out", "."], "--out must be a folder of its own"),
    (["--data", "PLAIN", "--out", "PLAIN/runs"], "would become a class: choose a folder elsewhere"),
    (["--data", "UNREADABLE", "--out", "UNREADABLE/train/x"], "would become a class: choose"),
    (["--epochs", "1000000000"], "argument --epochs: must be from 1 to 10000, got 1000000000"),
    (["--list", "PIPES"], "no training image can be read, for example"),
    (["--out", "/proc/x"], "cannot write to --out /proc/x: No such file or directory"),
    (["--quick", "--out", "FOREIGN"], "is not from --quick"),
])
def test_mistakes_are_one_clear_line(change, message, data, tmp_path, capsys):
    for name in ("UNKNOWN/train/a", "UNKNOWN/val/c", "FOREIGN/train", "ONLY_TEST/test/a",
                 "TWO_TRAINS/train/a", "PLAIN/a", "TWO_TRAINS/training/a", "UNREADABLE/train/a"):
        shutil.copytree(data / "train/class0", tmp_path / name)
    (tmp_path / "EMPTY" / "a").mkdir(parents=True)
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "PIPES").write_text(f"{tmp_path}/pipe.jpg 0\n\0.jpg 1\n")
    for name in ("UNREADABLE/val/a/1.jpg", "TWO_YEARS/train2018.json", "TWO_YEARS/train2019.json"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("no image")
    content = {"images": [{"id": 1, "file_name": "none.jpg"}],
               "annotations": [{"image_id": 1, "category_id": 2}]}
    (tmp_path / "NOT_UNPACKED").mkdir()
    (tmp_path / "NOT_UNPACKED" / "train2018.json").write_text(json.dumps(content))
    argv = [*SMALL, "--data", str(data), "--out", str(tmp_path / "out")]
    argv += [str(tmp_path / word) if word.split("/")[0].isupper() else word for word in change]
    with pytest.raises(SystemExit) as error:
        train_inat.main(argv)
    text = capsys.readouterr().err
    assert error.value.code == 2 and message in text and text.count("\n") == 1, text
    assert (tmp_path / "FOREIGN" / "train").exists()


def test_one_class_is_no_prior(data, tmp_path, capsys):
    """There would be one prototype and a loss of 0."""
    place = SMALL.index("--prototypes")
    argv = [*SMALL[:place], *SMALL[place + 2:], "--prior", "classes"]
    shutil.copytree(data / "train/class0", tmp_path / "images" / "all")
    with pytest.raises(SystemExit, match="^2$"):
        train_inat.main([*argv, "--data", str(tmp_path / "images"), "--out", str(tmp_path / "out")])
    assert "--prior classes needs labels" in capsys.readouterr().err
