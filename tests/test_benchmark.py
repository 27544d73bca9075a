"""extras/benchmark.py: the check of a new machine, and what a step needs, counted by hand too.

On a machine with a GPU, these tests use the CPU all the same.
"""

import json
import multiprocessing
import os
import re
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from matplotlib.figure import Figure
from PIL import Image

import benchmark
import pmsn
import train_inat
from support.images import find_images

CPU = torch.device("cpu")
ROW = re.compile(r"^  (\S.*?) +(\S+) (<=|>=|==|  ) (\S+) +(ok|FAILED)( .*)?$")


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def draw_small_images(folder, count):
    """As benchmark.draw_images, but images that are decoded in no time."""
    for i in range(count):
        noise = torch.randint(256, (48, 64, 3), dtype=torch.uint8)
        Image.fromarray(noise.numpy()).save(Path(folder) / f"{i}.jpg")


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    torch.manual_seed(0)
    benchmark.draw_images(folder, 2)
    return [str(path) for path in sorted(folder.iterdir())]


def gpu_check(capsys):
    """Run --gpu_check. Returns its exit status, {name: (number, bound, ok)}, and its last line."""
    with pytest.raises(SystemExit) as end:
        benchmark.main(["--gpu_check", "--quick"])
    _, _, *lines, last = capsys.readouterr().out.splitlines()
    found = [ROW.match(line) for line in lines if line.startswith("  ")]
    assert all(found) and len({len(row[0][:row.start(5)]) for row in found}) == 1  # aligned
    return end.value.code, {row[1]: (row[2], row[4], row[5] == "ok") for row in found}, last


def failures(rows):
    """The names of the rows that do not keep their bound."""
    return [row[0] for row in rows if not benchmark.print_row(*row)]


def forked_training(command, out, kill=False):
    """As benchmark.run_training, but in a child that has imported torch already."""
    log = out.with_suffix(".log")

    def child():
        sys.stdout = sys.stderr = open(log, "w", buffering=1)
        Figure.savefig = lambda *arguments, **options: None  # Drawing takes longer than training.
        # Without workers of its own, because starting them takes longer than training.
        train_inat.main([*map(str, command[2:]), "--out", str(out), "--workers", "0"])

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    while kill and not (out / "checkpoint.pt").exists() and process.is_alive():
        time.sleep(0.01)
    if kill:
        process.kill()
    process.join(100)
    assert process.exitcode == (-signal.SIGKILL if kill else 0), log.read_text()
    return log.read_text()


# ---- The check of a new machine ------------------------------------------------------------------
@pytest.mark.slow
def test_all_checks_hold_on_a_cpu_and_each_prints_one_line(monkeypatch, capsys):
    monkeypatch.setattr(benchmark, "draw_images", draw_small_images)
    monkeypatch.setattr(benchmark, "run_training", forked_training)
    monkeypatch.setitem(benchmark.SMALL, "vit", (96, 1, 3))  # Compiling takes a second per block.
    status, rows, last = gpu_check(capsys)
    assert status == 0 and all(ok for _, _, ok in rows.values())
    assert len(rows) == 22 and last.startswith("0 of 22 failed, in ")
    # A killed run, a compiled step and one process of DDP have the bits of the plain ones on a CPU.
    exact = ["checkpointed, bfloat16: gradient", "compiled (aot_eager), float32: gradient",
             "DDP and BatchNorm: gradient", "its weights against a run without a kill"]
    assert [float(rows[name][0]) for name in exact] == [0, 0, 0, 0]
    # Rounding to bfloat16 shows: a check that compared a step with itself would have 0.
    for name in ("encoder: features", "encoder: gradient", "whole step: gradient"):
        assert 1e-3 < float(rows[name][0]) < float(rows[name][1])
    assert not dist.is_initialized()


def test_a_failed_row_and_an_error_do_not_stop_the_others(monkeypatch, capsys):
    def other_blur(images, sigma, calls=[]):
        calls.append(0)
        # The first blur of all belongs to make_check, the next ones to the two sides of the check.
        return images + 0.01 * len(calls)

    def no_route(*arguments, **options):
        raise ConnectionError("no route to \N{LATIN SMALL LETTER O WITH DIAERESIS}\nsecond line")

    monkeypatch.setattr(benchmark, "draw_images", draw_small_images)
    monkeypatch.setattr(pmsn, "gaussian_blur", other_blur)
    monkeypatch.setattr(dist, "broadcast_object_list", no_route)
    monkeypatch.setattr(benchmark, "compile_rows", lambda *_: iter([("nan", torch.nan, "<=", 1)]))
    monkeypatch.setattr(benchmark, "restart_rows", lambda *_: iter([("late", 2, "<=", 3)]))
    status, rows, last = gpu_check(capsys)
    assert status == 1
    failed = {name for name, (_, _, ok) in rows.items() if not ok}
    views = ("target", "masked", "small")
    assert failed == {"nan", "stopped by an error",
                      *(f"make_views, {view} view: largest difference" for view in views)}
    # Rows before an error are kept, and what the check has opened is closed.
    assert rows["gloo: all_reduce, sum"][2] and not dist.is_initialized()
    assert rows["late"][2] and "small network on the CPU: images per second" in rows
    assert last.startswith(f"5 of {len(rows)} failed, in ")


def bfloat16_cosine(x, y):
    """A mistake: the product is under autocast."""
    return F.normalize(x, dim=-1) @ F.normalize(y, dim=-1).T


def bfloat16_predictions(embeddings, prototypes, temperature):
    """A mistake: the predictions are rounded to bfloat16."""
    logits = pmsn.cosine(embeddings, prototypes) / temperature
    return F.log_softmax(logits, dim=-1).bfloat16()


@pytest.mark.parametrize("name, mistake", [("cosine", bfloat16_cosine),
                                           ("log_predictions", bfloat16_predictions)])
def test_a_loss_in_bfloat16_fails(name, mistake, paths, monkeypatch):
    monkeypatch.setattr(pmsn, name, mistake)
    failed = failures(benchmark.precision_rows(paths, CPU, benchmark.SMALL))
    assert {"loss of bfloat16 embeddings",
            "loss of bfloat16 embeddings: gradient of prototypes"} <= set(failed)


def test_checkpointing_that_computes_something_else_fails(paths, monkeypatch):
    def without_dropping(model):
        # The trained encoder no longer drops patches.
        forward = model.encoder.forward
        model.encoder.forward = lambda images, patch_drop=0.0: forward(images)

    monkeypatch.setattr(benchmark, "checkpoint_activations", without_dropping)
    rows = benchmark.compile_rows(paths, CPU, benchmark.SMALL)
    assert failures([next(rows)]) == ["checkpointed, bfloat16: gradient"]


def test_a_restart_that_begins_anew_or_has_other_weights_fails(paths, tmp_path, monkeypatch):
    """A stand-in for train_inat.py writes what it is told to."""
    def stand_in(weights, says, epochs):
        runs = iter(zip(weights, says))

        def run_training(command, out, kill=False):
            out.mkdir(exist_ok=True)
            weight, text = next(runs)
            torch.save({"model": {"w": torch.tensor([weight])}}, out / "checkpoint.pt")
            lines = [json.dumps({"epoch": epoch}) + "\n" for epoch in epochs]
            (out / "metrics.jsonl").write_text("".join(lines))
            return text
        return run_training

    says = ["", "x continues after epoch 1\n", ""]
    for i, (weights, texts, epochs, expected) in enumerate([
            ((1.0, 2.0, 2.0), says, (0, 1, 2), []),
            ((1.0, 2.0, 2.0), ["", "new run", ""], (0, 1, 2), ["the restarted run continues after "
                                                               "epoch"]),
            ((1.0, 2.0, 2.0), says, (0, 1), ["its metrics.jsonl has the epochs 0, 1, 2 (1: yes)"]),
            ((1.0, 2.1, 2.0), says, (0, 1, 2), ["its weights against a run without a kill"])]):
        (tmp_path / str(i)).mkdir()
        monkeypatch.setattr(benchmark, "run_training", stand_in(weights, texts, epochs))
        rows = benchmark.restart_rows(paths, CPU, benchmark.SMALL, tmp_path / str(i))
        assert failures(rows) == expected


def test_a_training_is_killed_after_its_first_checkpoint_and_its_faults_are_named(tmp_path):
    script = tmp_path / "script.py"
    script.write_text("""if True:
        import pathlib, sys, time
        what, _, out = sys.argv[1:]
        print("says", what, flush=True)
        if what == "kill":
            pathlib.Path(out).mkdir()
            pathlib.Path(out, "checkpoint.pt").touch()
            time.sleep(100)
        sys.exit(3 if what == "fail" else 0)""")
    command = [sys.executable, script]
    assert benchmark.run_training([*command, "end"], tmp_path / "a") == "says end\n"
    assert benchmark.run_training([*command, "kill"], tmp_path / "b", kill=True) == "says kill\n"
    with pytest.raises(RuntimeError, match="ended with status 3: says fail"):
        benchmark.run_training([*command, "fail"], tmp_path / "c")
    with pytest.raises(RuntimeError, match="ended with status 0: says end"):
        benchmark.run_training([*command, "end"], tmp_path / "d", kill=True)


def test_links_are_images_in_classes(paths, tmp_path):
    benchmark.link_images(paths, tmp_path / "train", 6)
    (found, labels), val = find_images(tmp_path)
    assert val is None and labels.unique().tolist() == [0, 1, 2, 3]
    assert [os.path.realpath(path) for path in found].count(os.path.realpath(paths[0])) == 3


# ---- What a step needs ---------------------------------------------------------------------------
DIM, DEPTH, HEADS = 384, 1, 6
# Tokens with the CLS token: the target view, the masked view, ten small views.
TARGET, MASKED, SMALL = 1 + 196, 1 + 166, 1 + 36
TRAINED = MASKED + 10 * SMALL


@pytest.fixture(scope="module")
def counts():
    return benchmark.count_step((DIM, DEPTH, HEADS))


def block_flops(tokens):
    """qkv, proj and the two layers of the MLP have 12 dim^2 weights. Attention has two products."""
    return 2 * tokens * 12 * DIM**2 + 2 * 2 * tokens**2 * DIM


def test_flops_are_those_of_a_formula(counts):
    patch = 2 * 3 * 16**2 * DIM
    head = 2 * (DIM * 2048 + 2048 * 2048 + 2048 * 256) + 2 * 256 * 1024  # with the prototypes
    blocks = DEPTH * (block_flops(MASKED) + 10 * block_flops(SMALL))
    target = 196 * patch + DEPTH * block_flops(TARGET) + head
    # The gradients of weights and of inputs cost a forward pass each. Pixels need no gradient.
    expected = target + 2 * (196 + 360) * patch + 3 * (blocks + 11 * head)
    assert counts["plain"]["flops"] == expected
    # Checkpointing computes the blocks again, except for their last layer, whose result is unused.
    again = blocks - DEPTH * TRAINED * 2 * 4 * DIM**2
    assert counts["checkpointed"]["flops"] == expected + again


def test_activations_are_those_of_a_formula(counts):
    floats = 4 * (DIM + 2)  # the input of a norm in float32, its mean and its deviation
    # Also in bfloat16: the inputs of qkv, proj, fc1 and fc2, q, k and v, and the input of GELU.
    block = 2 * floats + 2 * (1 + 3 + 1 + 1 + 4 + 4) * DIM + 4 * HEADS
    # Checkpointing keeps the input of the first norm, without its mean and its deviation.
    saved = counts["plain"]["activations"] - counts["checkpointed"]["activations"]
    assert saved == DEPTH * TRAINED * (block - 4 * DIM)
    # The rest belongs to patches and head: pixels in bfloat16, patches and their order, last norm.
    pixels, order = 2 * 3 * (224**2 + 10 * 96**2), 196 * (4 * DIM + 8)
    # Per view: features, 2 * 3 hidden layers, the embedding and the normalized one, its norm before
    # and after a clamp, and twice the predictions. The target has its predictions once.
    head = 2 * DIM + 2 * 6 * 2048 + 4 * (2 * 256 + 2 + 2 * 1024)
    rest = pixels + order + TRAINED * floats + 11 * head + 4 * 1024
    assert counts["plain"]["activations"] == DEPTH * TRAINED * block + rest


def test_counting_without_numbers_is_counting_with_numbers():
    """The same network on real tensors. The bytes are linear in the images: each needs as many."""
    vit = (48, 1, 3)
    counts = benchmark.count_step(vit)
    model = benchmark.make_model(vit)
    for name in ("plain", "checkpointed"):
        if name == "checkpointed":
            benchmark.checkpoint_activations(model)
        count = counts[name]
        two, three, four = [benchmark.saved_bytes(model, benchmark.empty_views(images))
                            for images in (2, 3, 4)]
        assert four - three == three - two == count["activations"]
        # Only the statistics of BatchNorm have another precision without numbers.
        assert two - 2 * (three - two) == pytest.approx(count["fixed"], rel=0.02)


def test_weights_of_vit_small_have_the_memory_of_its_parameters():
    """timm gives 21.67 million parameters for ViT-S/16 without its classifier."""
    head = DIM * 2048 + 2048 * 2048 + 2048 * 256 + 2 * 2048 + 256 + 4 * 2048
    encoder = 21_665_664
    model = benchmark.make_model(benchmark.MODELS["vit_small"])
    assert sum(p.numel() for p in model.target_encoder.parameters()) == encoder
    count = {"trained": encoder + head + 1024 * 256, "target": encoder + head, "fixed": 0,
             "activations": 1e6, "block": 0}
    assert sum(p.numel() for p in model.parameters()) == count["trained"] + count["target"]
    parts = benchmark.memory_parts(count, images=4, gpus=1)
    assert parts["weights, gradients, AdamW, target"] == 16 * count["trained"] + 4 * count["target"]
    assert parts["activations"] == 4e6
    assert parts["crops and views"] == 4 * 5 * 3 * (2 * 224**2 + 10 * 96**2)
    with_ddp = benchmark.memory_parts(count, images=4, gpus=8)
    assert sum(with_ddp.values()) - sum(parts.values()) == 4 * count["trained"]


def test_the_table_of_counts_has_hours_that_follow_from_flops(monkeypatch, capsys):
    counted = {"flops": 1e9, "activations": 2**20, "fixed": 0, "block": 0, "trained": 0,
               "target": 0}
    monkeypatch.setattr(benchmark, "count_step", lambda vit: {"plain": counted})
    benchmark.main(["--count"])
    text = capsys.readouterr().out
    rows = dict(re.findall(r"^(\S.*?) {2,}([\d.]+) +[\d.]+$", text, re.MULTILINE))
    images_per_second = 0.4 * 989e12 / 1e9
    assert float(rows["images per second and GPU"]) == images_per_second
    hours = 300 * 437_513 / images_per_second / 8 / 3600
    assert float(rows["hours for iNat18"]) == pytest.approx(hours, abs=0.01)
    assert float(rows["GiB: activations"]) == pytest.approx(128 / 1024, abs=0.01)


# ---- One core and the command line ---------------------------------------------------------------
def test_the_table_of_one_core_has_milliseconds_per_image(monkeypatch, capsys):
    """A clock that counts calls: decoding takes a second, crops two more, colors four per batch."""
    seconds = [0.0]

    def stand_in(duration):
        def function(argument):
            seconds[0] += duration
            return argument
        return function

    monkeypatch.setattr(time, "process_time", lambda: seconds[0])
    for module, name, duration in ((benchmark, "decode", 1), (pmsn, "multi_crop", 2),
                                   (pmsn, "make_views", 4)):
        monkeypatch.setattr(module, name, stand_in(duration))
    monkeypatch.setattr(benchmark, "load_crops", lambda *arguments: None)
    benchmark.main(["--quick"])
    rows = re.findall(r"^(.+?) {2,}([\d.]+)$", capsys.readouterr().out, re.MULTILINE)
    assert [float(milliseconds) for _, milliseconds in rows] == [1000, 3000, 4000 / 8]


@pytest.mark.parametrize("options, message", [
    ("--gpu_check --count", "not allowed with argument"),
    ("--data /nowhere", "--data /nowhere has no images (.jpg, .jpeg or .png)"),
    ("--batch_size " + "9" * 400, "--batch_size: must be from 8 to 1000000000, got 999"),
    ("--workers 1.5", "--workers: invalid number value: '1.5'"),
    ("--seed nan", "--seed: invalid number value: 'nan'")])
def test_mistakes_are_one_line_and_exit_status_2(options, message, capsys):
    with pytest.raises(SystemExit, match="^2$"):
        benchmark.main(options.split())
    _, line = capsys.readouterr().err.split("error: ", 1)
    assert message in line and line.count("\n") == 1


def test_the_text_is_ascii():
    """Some terminals print nothing else."""
    with open(benchmark.__file__, encoding="utf-8") as file:
        assert file.read().isascii()
