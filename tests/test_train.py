"""train_inat.py: data, schedules, exact resumption after any death, errors, evaluation, timm."""

import contextlib
import json
import math
import os
import signal
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
from torch._subclasses.fake_tensor import FakeTensorMode

import pmsn
import train_inat

REPOSITORY = Path(__file__).parents[1]
COUNTS = [24, 12, 8, 6]  # images of each class
SMALL = ["--model", "vit_micro", "--image_size", "16", "--focal_size", "8", "--patch_size", "8", "--focal_views", "1",
         "--storage_size", "24", "--prototypes", "6", "--batch_size", "10", "--epochs", "3", "--warmup", "1",
         "--log_every", "1", "--workers", "0", "--eval_every", "100"]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return train_inat.make_images(tmp_path_factory.mktemp("folders"), COUNTS, 24)


def parse(*options):
    args = train_inat.parse([*SMALL, *map(str, options)])
    train_inat.check(args)
    return args


def run(*arguments, code=None, processes=1, **options):
    """The script as a user runs it; `code` is Python to run before it, in its process."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    start = ["-c", f"import sys; sys.argv[0] = 'train_inat.py'\n{code}\nimport runpy\n"
             "runpy.run_path('train_inat.py', run_name='__main__')"] if code else ["train_inat.py"]
    command = [sys.executable, *(torchrun if processes > 1 else []), *start, *SMALL, *map(str, arguments)]
    return subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            env={**os.environ, "OMP_NUM_THREADS": "1"}, **options)


def finish(process, status=0):
    out, err = process.communicate(timeout=120)
    assert process.returncode == status, (process.returncode, out[-2000:], err[-2000:])
    return out, err


def weights(out):
    return torch.load(out / "checkpoint.pt", weights_only=True)


def assert_same_run(one, two):
    """Bit-identical weights, target, optimiser, usage and random state."""
    one, two = weights(one), weights(two)
    assert one["step"] == two["step"] and one.keys() == two.keys()
    for name, value in one["model"].items():
        assert torch.equal(value, two["model"][name]), name
    for number, state in one["optimizer"]["state"].items():
        for name, value in state.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(two["optimizer"]["state"][number][name])), name
    assert torch.equal(one["usage"], two["usage"])
    assert all(torch.equal(a["cpu"], b["cpu"]) for a, b in zip(one["random"], two["random"]))


@pytest.fixture(scope="module")
def undisturbed(data, tmp_path_factory):
    """A run of 15 steps that nobody stopped."""
    out = tmp_path_factory.mktemp("undisturbed")
    finish(run("--data", data, "--out", out))
    return out


# ---- Data ------------------------------------------------------------------------------------------------------------


def test_both_layouts_list_the_same_classes(data, tmp_path):
    inat = train_inat.make_images(tmp_path / "inat", COUNTS, 24, layout="inat")
    for folder in (data, inat):
        (paths, labels), (val_paths, val_labels) = train_inat.find_images(folder)
        assert torch.bincount(labels).tolist() == COUNTS and len(paths) == sum(COUNTS)
        assert torch.bincount(val_labels).tolist() == [2, 2, 2, 2]
        assert all(Path(path).is_file() for path in [*paths, *val_paths])
        assert not set(paths) & set(val_paths)
    for path, label in zip(*train_inat.find_images(inat)[0]):
        assert Path(path).parent.name == f"{label:04}"


def test_category_numbers_may_have_gaps_and_no_validation_is_fine(tmp_path):
    content = {"images": [{"id": 5, "file_name": "a.jpg"}, {"id": 3, "file_name": "b.jpg"}],
               "annotations": [{"image_id": 3, "category_id": 70}, {"image_id": 5, "category_id": 9}]}
    (tmp_path / "train2018.json").write_text(json.dumps(content))
    (paths, labels), validation = train_inat.find_images(tmp_path)
    assert [Path(p).name for p in paths] == ["a.jpg", "b.jpg"] and labels.tolist() == [0, 1] and validation is None


def test_a_folder_of_class_folders_is_all_training(data):
    (paths, labels), validation = train_inat.find_images(data / "train")
    assert torch.bincount(labels).tolist() == COUNTS and validation is None


def test_long_tail_is_a_power_law_subset(data):
    (paths, labels), _ = train_inat.find_images(data, long_tail=2.0)
    assert torch.bincount(labels).tolist() == [23, 5, 2, 1]  # 34 images, shares k^-2 / 1.4236, rounded down
    everything = dict(zip(*train_inat.find_images(data)[0]))
    assert all(everything[path] == label for path, label in zip(paths, labels))


@pytest.mark.parametrize("height, width", [(600, 450), (50, 70), (64, 64)])
def test_decoding_is_the_stretched_image(height, width, tmp_path):
    y, x = np.mgrid[:height, :width]
    smooth = np.stack([255 * (x + 0.5) / width, 255 * (y + 0.5) / height, 128 + 0 * x], axis=2).astype(np.uint8)
    Image.fromarray(smooth).save(tmp_path / "smooth.jpg", quality=98, subsampling=0)
    pixels, size = train_inat.decode(tmp_path / "smooth.jpg", 64)
    assert pixels.shape == (64, 64, 3) and pixels.dtype == torch.uint8 and size.tolist() == [height, width]
    ramp = torch.arange(64).add(0.5) * 255 / 64
    assert (pixels[..., 0] - ramp).abs().mean() < 2 and (pixels[..., 1] - ramp[:, None]).abs().mean() < 2


def test_grey_and_transparent_images_become_rgb(tmp_path):
    for mode in ("L", "RGBA", "P", "CMYK"):
        path = tmp_path / ("x.jpg" if mode == "CMYK" else "x.png")
        Image.new(mode, (20, 30)).save(path)
        assert train_inat.decode(path, 16)[0].shape == (16, 16, 3)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_ranks_share_the_same_global_batches(world_size):
    """Whatever the number of processes, a step's batch is the same; epochs are complete and differ."""
    def batches(rank, start=0, world_size=world_size):
        return list(train_inat.Batches(22, 8, start, 6, rank=rank, world_size=world_size, seed=3))

    one = [set(batch) for batch in batches(0, world_size=1)]
    shares = [batches(rank) for rank in range(world_size)]
    for step in range(6):
        parts = [share[step] for share in shares]
        assert set().union(*parts) == one[step] and sum(map(len, parts)) == len(one[step]) == 8
    for epoch in range(3):
        assert len(one[2 * epoch] | one[2 * epoch + 1]) == 16
    assert one[0] != one[2]
    assert [batches(0, start=3) == batches(0)[3:], len(train_inat.Batches(22, 8, 2, 6))] == [True, 4]


# ---- Recipe ----------------------------------------------------------------------------------------------------------


def test_schedules_by_hand():
    """4 steps an epoch, 10 epochs, 2 of warm-up: stretched to 50 steps, of which 40 are made."""
    args = parse("--data", "x", "--epochs", 10, "--warmup", 2, "--lr", 1.0, "--momentum", 0.9)
    lr, weight_decay, momentum = train_inat.schedules(args, 4)
    assert len(lr) == len(weight_decay) == len(momentum) == 40
    for step in range(40):
        rise = 0.2 + 0.8 * step / 8
        fall = 0.001 + 0.999 * (1 + math.cos(math.pi * (step - 8) / 42)) / 2
        assert lr[step] == pytest.approx(rise if step < 8 else fall)
        assert weight_decay[step] == pytest.approx(0.4 - 0.36 * (1 + math.cos(math.pi * step / 50)) / 2)
        assert momentum[step] == pytest.approx(0.9 + 0.1 * step / 49)


def test_defaults_are_the_published_recipe():
    args = train_inat.parse(["--data", "x"])
    model = train_inat.make_model(args, train_inat.make_prior(args, None))
    assert model.encoder.embed_dim == 384 and len(model.encoder.blocks) == 12 and model.encoder.grid == (14, 14)
    assert model.prototypes.shape == (1024, 256) and model.head.fc1.out_features == model.head.fc2.out_features == 2048
    assert model.patch_drop == 0.15 and args.batch_size == 1024 and args.lr == 1e-3 and args.clip == 3.0
    torch.testing.assert_close(model.prior[0] / model.prior[15], torch.tensor(16**0.25))
    views = train_inat.make_views(args, torch.zeros(2, 32, 32, 3, dtype=torch.uint8), torch.tensor([[9, 9], [32, 32]]))
    assert [tuple(view.shape) for view in views] == [(2, 3, 224, 224), (2, 3, 224, 224), (20, 3, 96, 96)]


def test_priors_by_name():
    labels = torch.tensor([0, 2, 2, 2, 3, 3])  # no image of class 1
    torch.testing.assert_close(train_inat.make_prior(parse("--data", "x", "--prior", "classes"), labels),
                               torch.tensor([3, 2, 1]) / 6)
    torch.testing.assert_close(train_inat.make_prior(parse("--data", "x", "--prior", "uniform"), labels),
                               torch.full((6,), 1 / 6))


def test_vectors_are_not_decayed():
    model = train_inat.make_model(parse("--data", "x"), pmsn.uniform_prior(6))
    decayed, others = train_inat.make_optimizer(model, CPU).param_groups
    assert {p.ndim for p in others["params"]} == {1} and others["weight_decay"] == 0
    trained = [p for p in model.parameters() if p.requires_grad]
    assert len(decayed["params"]) + len(others["params"]) == len(trained)
    assert any(p is model.prototypes for p in decayed["params"])


class Linear(nn.Linear):
    """An encoder without batch statistics."""
    embed_dim = 5

    def forward(self, images):
        return super().forward(images.flatten(1))


@pytest.mark.parametrize("options", [{}, {"weight": 3.0, "relative_sharpening": True}])
def test_accumulated_step_is_the_whole_batchs(options, monkeypatch):
    """In float64, with views that are not random: gradients and terms of 4 parts equal those of the batch at once."""
    monkeypatch.setattr(train_inat, "make_views", lambda args, pixels, sizes: [pixels + 0.1, pixels, pixels * 0.9])
    pixels, sizes = torch.randn(12, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64), torch.ones(12)
    found = []
    for accumulate in (1, 4):
        torch.manual_seed(0)
        model = pmsn.PMSN(Linear(6, 5), pmsn.power_law_prior(7, 1.5), head=nn.Linear(5, 3), output_dim=3, patch_drop=0,
                          **options).double()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        args = parse("--data", "x", "--accumulate", accumulate, "--clip", 1e9)
        terms = train_inat.optimise(model, optimizer, args, pixels, sizes, CPU)
        found.append((terms, [p.grad for p in model.parameters() if p.requires_grad]))
    (whole, gradients), (parts, summed) = found
    for name in (*train_inat.TERMS, "mean_prediction"):
        torch.testing.assert_close(parts[name], whole[name], rtol=1e-9, atol=1e-12)
    for one, two in zip(summed, gradients):
        torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("options", [[], ["--accumulate", 2], ["--sinkhorn_iterations", 2, "--relative_sharpening"]])
def test_a_step_on_cuda_waits_for_nothing_and_mixes_no_devices(options, monkeypatch):
    """Simulated, all but the backward pass: fake tensors of a CUDA device have no values, so that `.item()`, a mask as
    index or an operand on the CPU raise. bfloat16 in the encoder, float32 in the loss."""
    cuda, dtypes = torch.device("cuda"), []
    try:
        with FakeTensorMode():
            torch.empty(2, 2, device=cuda)[0]
    except RuntimeError:
        pytest.skip(f"torch {torch.__version__} does not simulate CUDA without its driver")
    args = train_inat.parse(["--data", "x", "--model", "vit_micro", "--image_size", "64", "--focal_size", "32",
                             "--precision", "bf16", *map(str, options)])
    model = train_inat.make_model(args, pmsn.power_law_prior(12, 0.25))
    model.encoder.blocks[0].mlp.register_forward_hook(lambda module, inputs, output: dtypes.append(output.dtype))

    def backward(loss):
        assert loss.device.type == "cuda" and loss.dtype == torch.float32
        for parameter in model.parameters():
            parameter.grad = torch.empty_like(parameter) if parameter.requires_grad else None

    monkeypatch.setattr(torch.Tensor, "backward", backward)
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *args: True)
    monkeypatch.setattr(train_inat, "fork_random", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(pmsn, "constant", pmsn.constant.__wrapped__)  # not kept for real tensors
    monkeypatch.setattr(torch, "randperm", lambda count: np.random.permutation(count))  # on the CPU, of real numbers
    with FakeTensorMode():
        for module in model.modules():
            for name, parameter in module.named_parameters(recurse=False):
                fake = torch.empty(parameter.shape, device=cuda)
                setattr(module, name, nn.Parameter(fake, requires_grad=parameter.requires_grad))
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, torch.empty(buffer.shape, dtype=buffer.dtype, device=cuda))
        optimizer = train_inat.make_optimizer(model, cuda)
        pixels = torch.empty(8, 96, 96, 3, dtype=torch.uint8, device=cuda)
        terms = train_inat.optimise(model, optimizer, args, pixels, torch.empty(8, 2, device=cuda), cuda)
        model.update_target(0.99)
    assert {(term.device.type, term.dtype) for term in terms.values()} == {("cuda", torch.float32)}
    assert dtypes and set(dtypes) == {torch.bfloat16}


def test_images_per_second_and_time_left_by_hand(tmp_path, monkeypatch, capsys):
    """Steps of 2 s; evaluations of 50 s before the first and of 6 s after the second."""
    now = 100.0
    monkeypatch.setattr(train_inat, "time", SimpleNamespace(perf_counter=lambda: now))
    args = parse("--data", "x", "--out", tmp_path, "--log_every", 2)
    log = train_inat.Log(args, 0, 0, 10, 2)
    terms = {name: torch.tensor(1.0) for name in train_inat.TERMS}
    for step, evaluation in ((1, 50), (2, 0), (3, 6), (4, 0)):
        now += evaluation
        log.skip(evaluation)
        now += 2
        log.add(step, terms, 0.5, 0.1)
    for line in train_inat.read_lines(tmp_path / "metrics.jsonl"):
        assert line["images_per_second"] == 5 and line["waiting"] == 0.25 and line["loss"] == 1
    left = [line.split()[-1] for line in capsys.readouterr().out.splitlines()[1:]]
    assert left == ["0:00:16", "0:00:21"]  # 8 steps of 2 s; 6 of 14 / 4 s


# ---- Stopping and going on -------------------------------------------------------------------------------------------


def test_run_leaves_its_files(undisturbed):
    assert {"checkpoint.pt", "checkpoint_previous.pt", "encoder.pt", "metrics.jsonl", "evaluation.jsonl",
            "training.png", "prototypes.png"} == {path.name for path in undisturbed.iterdir()}
    lines = [json.loads(line) for line in (undisturbed / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 16))
    assert all(line["loss"] == pytest.approx(line["cross_entropy"] + line["prior_kl"], abs=1e-5) for line in lines)
    assert [json.loads(line)["epoch"] for line in (undisturbed / "evaluation.jsonl").read_text().splitlines()] == [0, 3]


def test_killed_at_random_steps_ends_with_the_same_bits(data, undisturbed, tmp_path):
    """kill -9 twice, wherever it hits, checkpoints every two steps."""
    options = ["--data", data, "--out", tmp_path, "--save_every", 2, "--workers", 1]
    generator = np.random.default_rng(0)
    for _ in range(2):
        process = run(*options)
        target = generator.integers(2, 8) + len(metrics(tmp_path))
        while len(metrics(tmp_path)) < target and process.poll() is None:
            time.sleep(0.01)
        process.kill()
        process.communicate()
    out, _ = finish(run(*options))
    assert "going on after step" in out
    assert_same_run(tmp_path, undisturbed)
    assert [line["step"] for line in metrics(tmp_path)] == list(range(1, 16))


def test_compiled_encoders_train(data, tmp_path):
    """As on CUDA, with the graphs that torch.compile makes, but without its code generator: both view sizes, parts,
    checkpointed activations; losses are those of a run that is not compiled."""
    code = """
import torch
def compile(self, plain=torch.nn.Module.compile, **options):
    plain(self, backend='aot_eager', **options)
torch.nn.Module.compile = compile"""
    options = ["--data", data, "--epochs", 1, "--accumulate", 5]
    finish(run(*options, "--out", tmp_path / "one"))
    finish(run(*options, "--out", tmp_path / "two", "--compile", "--checkpoint_activations", code=code))
    one, two = ([line["loss"] for line in metrics(tmp_path / name)] for name in ("one", "two"))
    assert len(one) == 5 and one == pytest.approx(two, rel=1e-3)


def test_short_epochs_and_names_that_are_not_ascii(tmp_path):
    """Fewer steps in an epoch than between lines; all that is missing of a finished run is made up."""
    data = train_inat.make_images(tmp_path / "Bäume", [12, 8], 24)
    options = ["--data", data, "--out", tmp_path / "out", "--log_every", 50, "--epochs", 1]
    finish(run(*options))
    encoder = (tmp_path / "out" / "encoder.pt").read_bytes()
    (tmp_path / "out" / "encoder.pt").unlink()
    (tmp_path / "out" / "evaluation.jsonl").unlink()
    finish(run(*options))
    assert len((tmp_path / "out" / "encoder.pt").read_bytes()) == len(encoder)
    assert [line["epoch"] for line in train_inat.read_lines(tmp_path / "out" / "evaluation.jsonl")] == [1]


def test_checkpointed_activations_change_no_bit(data, undisturbed, tmp_path):
    finish(run("--data", data, "--out", tmp_path, "--checkpoint_activations"))
    assert_same_run(tmp_path, undisturbed)


def metrics(out):
    return train_inat.read_lines(out / "metrics.jsonl")


@pytest.mark.parametrize("moment", ["half written", "between the moves"])
def test_killed_during_a_save_ends_with_the_same_bits(moment, data, undisturbed, tmp_path):
    code = {"half written": """
import os, torch
def save(state, path, plain=torch.save):
    plain(state, path)
    if 'step' in state and state['step'] == 7:
        os.truncate(path, os.path.getsize(path) // 2)
        os.kill(os.getpid(), 9)
torch.save = save""", "between the moves": """
import os
def replace(old, new, plain=os.replace, moves=[]):
    plain(old, new)
    moves.append(str(new))
    if sum('previous' in move for move in moves) == 4:
        os.kill(os.getpid(), 9)
os.replace = replace"""}[moment]
    options = ["--data", data, "--out", tmp_path, "--save_every", 1]
    finish(run(*options, code=code), -9)
    assert not (tmp_path / "checkpoint.pt").exists() or weights(tmp_path)["step"] == 6
    finish(run(*options))
    assert_same_run(tmp_path, undisturbed)


@pytest.mark.parametrize("name", [signal.SIGTERM, signal.SIGINT])
def test_signals_finish_the_step_and_save(name, data, undisturbed, tmp_path):
    options = ["--data", data, "--out", tmp_path, "--workers", 1]
    process = run(*options)
    while len(metrics(tmp_path)) < 3 and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(name)
    _, err = finish(process, 130)
    assert err == "train_inat.py: stopped; the same command goes on from the checkpoint\n"
    assert weights(tmp_path)["step"] == len(metrics(tmp_path)) >= 3
    if name == signal.SIGTERM:
        finish(run(*options))
        assert_same_run(tmp_path, undisturbed)


def test_two_processes_killed_and_restarted_end_with_the_same_bits(data, tmp_path):
    options = ["--data", data, "--save_every", 2]
    finish(run(*options, "--out", tmp_path / "one", processes=2))
    process = run(*options, "--out", tmp_path / "two", processes=2, start_new_session=True)
    while len(metrics(tmp_path / "two")) < 5 and process.poll() is None:
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    for pid in [int(p.name) for p in Path("/proc").iterdir() if p.name.isdigit()]:  # torchrun's children left over
        try:
            if str(tmp_path / "two") in Path(f"/proc/{pid}/cmdline").read_text():
                os.kill(pid, signal.SIGKILL)
        except OSError:
            pass
    process.communicate()
    finish(run(*options, "--out", tmp_path / "two", processes=2))
    assert_same_run(tmp_path / "one", tmp_path / "two")
    assert len(weights(tmp_path / "two")["random"]) == 2


# ---- Faults ----------------------------------------------------------------------------------------------------------


def test_an_unreadable_image_is_named_once_and_replaced(tmp_path):
    data = train_inat.make_images(tmp_path / "data", [60, 60], 24)
    broken = sorted((data / "train").rglob("*.jpg"))[5]
    broken.write_bytes(broken.read_bytes()[:300])
    out, err = finish(run("--data", data, "--out", tmp_path / "out"))
    assert err == f"unreadable image, skipped: {broken}\n"
    assert weights(tmp_path / "out")["unreadable"] == [5]
    paths = train_inat.find_images(data)[0][0]
    images = train_inat.Images(paths, 24)
    assert images[5][2:] == (6, [5]) and torch.equal(images[5][0], images[6][0])


def test_more_than_one_percent_unreadable_stops(tmp_path):
    data = train_inat.make_images(tmp_path / "data", [60, 60], 24)
    for path in sorted((data / "train").rglob("*.jpg"))[:2]:
        path.write_text("no image")
    _, err = finish(run("--data", data, "--out", tmp_path / "out"), 2)
    assert "2 of 120 images could not be read, more than 1%" in err.splitlines()[-1] and "Traceback" not in err


def test_all_unreadable_does_not_hang():
    images = train_inat.Images(["/nowhere/a.jpg"] * 5, 8)
    pixels, size, index, unreadable = images[2]
    assert set(unreadable) == set(range(5)) and pixels.shape == (8, 8, 3)


def test_a_loss_that_is_not_finite_names_step_and_checkpoint(data, tmp_path):
    code = """
import pmsn
def loss(*arguments, plain=pmsn.pmsn_loss, calls=[], **options):
    calls.append(1)
    value, terms = plain(*arguments, **options)
    return value * (float('nan') if len(calls) == 7 else 1), terms
pmsn.pmsn_loss = loss"""
    _, err = finish(run("--data", data, "--out", tmp_path, "--save_every", 3, "--log_every", 2, code=code), 2)
    assert err == ("train_inat.py: loss or gradient is not finite since step 7; the last good checkpoint is "
                   f"{tmp_path / 'checkpoint.pt'}, of step 6\n")
    assert weights(tmp_path)["step"] == 6


def test_a_gradient_that_is_not_finite_is_not_saved(data, tmp_path):
    code = """
import torch
def clip(parameters, norm, plain=torch.nn.utils.clip_grad_norm_, calls=[]):
    calls.append(1)
    parameters = list(parameters)
    if len(calls) == 4:
        next(p for p in parameters if p.grad is not None).grad.fill_(float('nan'))
    return plain(parameters, norm)
torch.nn.utils.clip_grad_norm_ = clip"""
    _, err = finish(run("--data", data, "--out", tmp_path, "--save_every", 2, "--log_every", 100, "--clip", 0,
                        code=code), 2)
    assert "loss or gradient is not finite since step 4; the last good checkpoint" in err
    state = weights(tmp_path)
    assert state["step"] == 2 and all(value.isfinite().all() for value in state["model"].values())


def test_a_full_disk_is_one_line_and_leaves_the_last_checkpoint(data, tmp_path):
    code = """
import torch
def save(state, path, plain=torch.save):
    if 'step' in state and state['step'] == 4:
        raise OSError(28, 'No space left on device')
    plain(state, path)
torch.save = save"""
    _, err = finish(run("--data", data, "--out", tmp_path, "--save_every", 2, code=code), 2)
    assert err == f"train_inat.py: cannot write {tmp_path / 'checkpoint.pt'}: No space left on device\n"
    assert weights(tmp_path)["step"] == 2 and not list(tmp_path.glob("*.tmp"))


def test_another_runs_checkpoint_is_not_continued(data, undisturbed):
    _, err = finish(run("--data", data, "--out", undisturbed, "--lr", 0.5), 2)
    assert "lr was 0.001, is 0.5; choose another --out" in err and len(err.splitlines()) == 1


def test_a_damaged_checkpoint_is_said(tmp_path):
    (tmp_path / "checkpoint.pt").write_text("no checkpoint")
    with pytest.raises(train_inat.UserError, match="is not a whole checkpoint of this script"):
        train_inat.load_checkpoint(tmp_path)


@pytest.mark.parametrize("arguments, message", [
    ([], "--data is needed: iNat18 or a folder of class folders; --quick makes its own images"),
    (["--data", "/nowhere"], "--data /nowhere: no such folder"),
    (["--data", "DATA", "--batch_size", "1000"], "--batch_size 1000 is larger than the data set of 50 images"),
    (["--data", "DATA", "--accumulate", "3"], "--batch_size 10 is not a multiple of 1 processes times --accumulate 3"),
    (["--data", "DATA", "--image_size", "20"], "--image_size 20 is not a multiple of --patch_size 8"),
    (["--data", "DATA", "--prototypes", "1"], "num_prototypes must be at least 2, got 1"),
    (["--data", "DATA", "--exponent", "-1"], "exponent must be finite and not negative, got -1.0"),
    (["--data", "DATA", "--epochs", "0"], "--epochs must be at least 1, got 0"),
    (["--data", "DATA", "--out", "/proc/x"], "cannot write to --out /proc/x: No such file or directory"),
    (["--data", "DATA", "--eval", "/nowhere.pt"], "/nowhere.pt: no such checkpoint"),
    (["--benchmark", "--accumulate", "2"], "--benchmark measures whole batches: without --accumulate and "
     "--checkpoint_activations"),
])
def test_bad_input_is_named(arguments, message, data, tmp_path):
    arguments = [str(data) if argument == "DATA" else argument for argument in arguments]
    with pytest.raises(train_inat.UserError) as error:
        train_inat.main([*SMALL, "--out", str(tmp_path), *arguments])
    assert str(error.value) == message


def test_folders_without_images_are_named(tmp_path):
    with pytest.raises(train_inat.UserError, match="has no class folders"):
        train_inat.find_images(tmp_path)
    (tmp_path / "a").mkdir()
    with pytest.raises(train_inat.UserError, match="has class folders but no images in them"):
        train_inat.find_images(tmp_path)
    (tmp_path / "train2018.json").write_text('{"images": [{}]}')
    with pytest.raises(train_inat.UserError, match="is not as iNaturalist distributes it: KeyError"):
        train_inat.find_images(tmp_path)


# ---- Evaluation and timm ---------------------------------------------------------------------------------------------


def test_centre_crop_is_torchvisions(tmp_path):
    """Resize to 256 and crop 224, of a smooth image stored as a stretched square."""
    v2 = pytest.importorskip("torchvision.transforms.v2")
    y, x = np.mgrid[:300, :400]
    smooth = np.stack([x * 255 / 400, y * 255 / 300, (x + y) * 255 / 700], axis=2).astype(np.uint8)
    Image.fromarray(smooth).save(tmp_path / "x.png")
    pixels, size = train_inat.decode(tmp_path / "x.png", 320)
    boxes = train_inat.centre_boxes(size[None], 320)
    found = pmsn.resized_crop(pixels.permute(2, 0, 1)[None] / 255, boxes, 224)
    wanted = v2.Compose([v2.ToImage(), v2.Resize(256), v2.CenterCrop(224), v2.ToDtype(torch.float32, scale=True)])(
        Image.fromarray(smooth))
    assert (found[0] - wanted).abs().max() < 0.02


def test_shots_are_counted_on_training_images(monkeypatch, tmp_path):
    """Features that are the label: k-NN and probe are right where classes were seen, and groups hold their classes."""
    counts = [150, 100, 20, 19, 3]
    labels, test_labels = torch.arange(5).repeat_interleave(torch.tensor(counts)), torch.arange(5).repeat(4)
    features, test_features = (torch.eye(5)[x] for x in (labels, test_labels))
    test_features[test_labels == 4] = torch.eye(5)[0]  # the rarest class looks like the most frequent
    answers = iter([(features, labels), (test_features, test_labels)])
    monkeypatch.setattr(train_inat, "extract", lambda *_: next(answers))
    result = train_inat.evaluate(parse("--data", "x", "--out", tmp_path), nn.Identity(), None, None, 0, 1, CPU, 7)
    wanted = {"all": 0.8, "many": 1.0, "medium": 1.0, "few": 0.5}
    assert result["knn"] == pytest.approx(wanted) and result["linear"] == pytest.approx(wanted)
    assert json.loads((tmp_path / "evaluation.jsonl").read_text()) == {"epoch": 7, "knn": result["knn"],
                                                                       "linear": result["linear"]}


def test_linear_probe_is_as_good_as_scikit_learns():
    linear_model = pytest.importorskip("sklearn.linear_model", reason="scikit-learn is the oracle here")
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(4, 10, generator=generator) * 1.2
    labels, test_labels = (torch.randint(4, (n,), generator=generator) for n in (2000, 1000))
    x, y = (centres[z] + torch.randn(len(z), 10, generator=generator) for z in (labels, test_labels))
    ours = (train_inat.linear_probe(x, labels, y, 0) == test_labels).double().mean().item()
    oracle = linear_model.LogisticRegression(max_iter=1000).fit(x.numpy(), labels.numpy())
    assert ours == pytest.approx(oracle.score(y.numpy(), test_labels.numpy()), abs=0.02)


def test_evaluation_leaves_the_random_state_alone(data, tmp_path):
    args = parse("--data", data, "--out", tmp_path)
    encoder, splits = train_inat.make_encoder(args), train_inat.find_images(data)
    before = torch.get_rng_state()
    train_inat.evaluate(args, encoder, *splits, 0, 1, CPU, 0)
    assert torch.equal(before, torch.get_rng_state())


def test_a_checkpoint_is_evaluated_alone(data, undisturbed, tmp_path):
    out, _ = finish(run("--data", data, "--out", tmp_path, "--eval", undisturbed / "checkpoint.pt"))
    during = json.loads((undisturbed / "evaluation.jsonl").read_text().splitlines()[-1])
    alone = json.loads((tmp_path / "evaluation.jsonl").read_text())
    assert alone["knn"] == during["knn"] and alone["linear"] == during["linear"] and "linear probe" in out


def test_encoder_file_is_timms(tmp_path):
    timm = pytest.importorskip("timm", reason="timm is the oracle here")
    args = train_inat.parse(["--data", "x"])
    model = train_inat.make_model(args, pmsn.uniform_prior(4))
    torch.save(model.target_encoder.state_dict(), tmp_path / "encoder.pt")
    oracle = timm.create_model("vit_small_patch16_224", num_classes=0)
    oracle.load_state_dict(torch.load(tmp_path / "encoder.pt", weights_only=True))
    images = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(model.target_encoder(images), oracle.eval()(images), atol=1e-4, rtol=1e-4)


def test_quick_runs_the_whole_path(tmp_path):
    result = subprocess.run([sys.executable, "train_inat.py", "--quick", "--out", str(tmp_path)], cwd=REPOSITORY,
                            capture_output=True, text=True, timeout=200)
    assert result.returncode == 0, result.stderr
    assert "as if killed; started again" in result.stdout and "going on after step 10" in result.stdout
    assert result.stdout.count("k-NN") == 4 and {"checkpoint.pt", "encoder.pt", "training.png"} <= {
        path.name for path in tmp_path.iterdir()}


def test_benchmark_prints_a_table(tmp_path):
    out, _ = finish(run("--benchmark", "--out", tmp_path))
    assert "usual pipeline, a worker" in out and "multi_crop on the CPU" in out
