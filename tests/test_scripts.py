"""The README: its commands run, its example runs, its files exist. All scripts: help, errors."""

import io
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from PIL import Image

import imbalance
import mnist_corner
import pmsn
import rcdm
import toy_kmeans
import train_inat
import transfer
import which_prior

REPOSITORY = Path(__file__).parents[1]
README = (REPOSITORY / "README.md").read_text()
RECIPE = (REPOSITORY / "extras" / "RECIPE.md").read_text()
BLOCKS = re.findall(r"```bash\n(.*?)```", README + RECIPE, re.S)
EXAMPLES = re.findall(r"```python\n(.*?)```", README, re.S)
COMMANDS = [line for block in BLOCKS for line in block.splitlines() if line]
SCRIPTS = sorted(path for folder in (REPOSITORY, REPOSITORY / "extras")
                 for path in folder.glob("*.py") if path.name not in ("pmsn.py", "experiments.py"))
COLUMNS = "digit_loss background_loss same_digit same_background loss"
RESULTS = dict.fromkeys(COLUMNS.split(), 0.5)

@pytest.mark.parametrize("command", [c for c in COMMANDS if "train_inat.py --data PATH" in c])
def test_training_commands_are_understood(command, tmp_path):
    words = shlex.split(command)
    place = words.index("train_inat.py")
    args = train_inat.parse([*words[place + 1:], "--out", str(tmp_path)])
    assert str(args.data) == "PATH"
    assert words[0] == "python" or "torchrun" in words[:2]

def test_the_five_lines_are_the_loss():
    torch.manual_seed(0)
    names = {"prior": pmsn.power_law_prior(5, 1.0)}
    for name, count in (("anchors", 8), ("targets", 8), ("prototypes", 5)):
        names[name] = torch.nn.functional.normalize(torch.randn(count, 6))
    loss, _ = pmsn.pmsn_loss(**names)
    exec(EXAMPLES[0], names)
    torch.testing.assert_close(names["loss"], loss)

def test_the_example_loop_runs():
    """With stand-ins for what the reader brings."""
    torch.manual_seed(0)
    names = {"backbone": torch.nn.Linear(12, 384), "device": "cpu",
             "loader": [(torch.rand(8, 12), torch.rand(8, 12)) for _ in range(3)]}
    start = names["backbone"].weight.clone()
    exec(EXAMPLES[1], names)
    assert torch.isfinite(names["loss"]) and names["prototypes"].grad.abs().sum() > 0
    moved, moved_slowly = [(names[name][0].weight - start).abs().mean()
                           for name in ("encoder", "ema_encoder")]
    assert moved > 10 * moved_slowly > 0 and not names["ema_encoder"][0].weight.requires_grad
    named = set(re.findall(r"^\| `(\w+)`", README, re.M))
    assert len(named) == 3 and named <= set(names["terms"])

@pytest.mark.parametrize("file", ["README.md", "extras/README.md", "extras/CONTROLS.md"])
def test_files_that_a_readme_names_exist(file):
    path = REPOSITORY / file
    links = re.findall(r"\]\((?!http|#)([^)#]+)[^)]*\)", path.read_text())
    assert len(links) > 5
    for link in links:
        assert (path.parent / link).exists(), link

def test_flags_functions_and_commands_of_the_readmes_exist():
    source = "".join(path.read_text() for path in [*SCRIPTS, REPOSITORY / "pmsn.py"])
    extras = "".join((REPOSITORY / "extras" / name).read_text()
                     for name in ("README.md", "CONTROLS.md"))
    commands = "".join(re.findall(r"```bash\n(.*?)```", extras, re.S))
    flags = {*re.findall(r"[ `](--[a-z][a-z_-]+)", README + RECIPE + commands)}
    flags -= {"--nproc_per_node", "--nnodes", "--rdzv_endpoint", "--rdzv_backend",
              "--max-restarts", "--shm-size", "--lambd"}  # of torchrun, docker and MSN
    assert len(flags) > 20
    for flag in flags:
        assert f'"{flag}"' in source, flag
    for name in set(re.findall(r"pmsn\.([a-z]\w+)\(", README)):
        assert f"def {name}(" in source, name
    install = "python3 -m venv .venv && .venv/bin/pip install -e "
    assert COMMANDS[0] == install + ". && .venv/bin/python mnist_corner.py"
    assert COMMANDS[1] == install + '".[test]" && .venv/bin/python -m pytest'
    assert COMMANDS[1] in (REPOSITORY / ".ci" / "run").read_text().replace(" --quiet", "")

def test_pmsn_needs_torch_and_torchvision_only():
    source = (REPOSITORY / "pmsn.py").read_text()
    imported = {*re.findall(r"^ *(?:from|import) (\w+)", source, re.M)}
    assert imported - sys.stdlib_module_names == {"torch", "torchvision"}

@pytest.mark.slow
def test_help_works_from_any_folder_without_data(tmp_path):
    """Also from a notebook whose backend is not installed, and in a terminal that takes ASCII."""
    code = """if True:
        import os, runpy, sys
        import pmsn  # once for all scripts, because torch takes seconds
        for script in sys.argv[1:]:
            if os.fork() == 0:
                sys.argv = [script, "--help"]
                sys.path[0] = os.path.dirname(script)  # as `python script` has it
                try:
                    runpy.run_path(script, run_name="__main__")
                except SystemExit as end:
                    assert end.code == 0, script
                    # benchmark.py prints ASCII only.
                    assert script.endswith("benchmark.py") or sys.stdout.errors != "strict", script
                sys.stdout.flush()
                os._exit(0)  # Tidying up would take longer than all the rest.
            assert os.wait()[1] == 0, script"""
    result = subprocess.run([sys.executable, "-c", code, *SCRIPTS], cwd=tmp_path, text=True,
                            env={**os.environ, "PYTHONIOENCODING": "ascii",
                                 "MPLBACKEND": "module://matplotlib_inline.backend_inline"},
                            capture_output=True, timeout=100)
    assert result.returncode == 0, result.stderr
    assert all(f"usage: {script.name}" in result.stdout for script in SCRIPTS)
    assert not list(tmp_path.iterdir())

@pytest.mark.parametrize("script, options, message", [
    (mnist_corner, "--mnist", "downloading: no route"),
    (mnist_corner, "--tries 0", "--tries: must be from 1 to 1000, got 0"),
    (mnist_corner, "--seeds -1", "--seeds: must be from 0 to 2000000000, got -1"),
    (mnist_corner, "--backgrounds no/such", "--backgrounds is for --mnist"),
    (which_prior, "--prior_exponents 50", "to 4"),
    (which_prior, "--contrasts nan", "to 1"),
    (which_prior, "--prior_weight inf", "inf"),
    (toy_kmeans, "--seed -1", "--seed: must be from 0 to 4294967295, got -1"),
    (toy_kmeans, "--imbalance 0.5", "--imbalance: must be from 1 to 100, got 0.5"),
    *[(script, f"{flag} {'9' * digits}", f"{flag}: must be from") for digits in (20, 400)
      for script, flag in ((mnist_corner, "--tries"), (toy_kmeans, "--seed"),
                           (imbalance, "--batch_size"), (rcdm, "--steps"),
                           (which_prior, "--prototypes"), (which_prior, "--prior_exponents"))],
    *[(script, "--seeds 3 0 3", "--seeds: 3 is given twice")
      for script in (mnist_corner, imbalance, rcdm, which_prior)],
    (imbalance, "--methods MAE MSN MAE", "--methods: MAE is given twice"),
    (which_prior, "--losses plain plain", "--losses: plain is given twice"),
    (which_prior, "--prior_exponents 0 0.0", "--prior_exponents: 0.0 is given twice"),
    (which_prior, "--data_exponents 1 .5 1", "--data_exponents: 1.0 is given twice"),
    (which_prior, "--contrasts .7 .70", "--contrasts: 0.7 is given twice"),
    (which_prior, "--data /nowhere", "No such file or directory: '/nowhere/train'"),
    (imbalance, "--data /nowhere", "No such file or directory: '/nowhere/train'"),
    (imbalance, "--images 100", "--images, --batch_size or --accumulate: 25 images of"),
    (imbalance, "--images 4000", "4000 images give [16, 10] mini-batches of [10, 1] classes"),
    (imbalance, "--classes_per_batch 10", "must be other than all 10 classes"),
    (imbalance, "--quick --lr 1e9", "the loss of SimCLR is not finite in epoch 1: try a lower"),
    (rcdm, "--models no", "no/results.json"),
    (transfer, "--encoder random --task folder", "one --data per --task"),
    (transfer, "--encoder random --task folder folder --data x x", "is given twice"),
    (transfer, "--encoder /nowhere --task folder --data x", "--encoder /nowhere has no weights"),
    (transfer, f"--encoder {__file__} --task folder --data x", "has no weights of a vision"),
    *[(transfer, f"--encoder random --task {task} --data x", f"--data x must have {layout}")
      for task, (_, layout) in transfer.TASKS.items()],
    *[(script, "--out /proc/x", "/proc/x")
      for script in (mnist_corner, toy_kmeans, imbalance, rcdm, which_prior, transfer)]])
def test_mistakes_are_one_clear_line(script, options, message, tmp_path, monkeypatch, capsys):
    no_network = Mock(side_effect=RuntimeError("downloading:\nno route"))
    monkeypatch.setattr("torchvision.datasets.MNIST", no_network)
    monkeypatch.setattr("torchvision.datasets.CIFAR100", no_network)
    with pytest.raises(SystemExit, match="^2$"):
        script.main(["--out", str(tmp_path), *options.split()])
    _, line = capsys.readouterr().err.split("error: ", 1)
    assert message in line and line.count("\n") == 1

@pytest.mark.slow
@pytest.mark.parametrize("script, file, fakes", [
    (mnist_corner, "results.json", {
        "run_in_processes": lambda *_: [([{"long_tailed": "digit", "exponent": 0.0,
                                           "results": RESULTS}], {})],
        "plot_neighbors": None}),
    (rcdm, "rcdm.json", {
        "CornerImages": Mock(), "load_pmsn": Mock(), "plot": None,
        "run_in_processes": lambda *_: [({"exponent": x, "results": RESULTS}, 0)
                                        for x in (0, 1)]})])
def test_results_are_safe_before_the_table_and_the_figures(
        script, file, fakes, tmp_path, monkeypatch, capsys):
    """A figure can need LaTeX that is missing, and a terminal can refuse the sign ±."""
    options = ["--quick", "--seeds", "0", "1", "--out", str(tmp_path)]
    if script is rcdm:
        (tmp_path / "results.json").write_text('{"config": {"exponent": 1}}')
        options += ["--models", str(tmp_path)]
    no_figure = Mock(side_effect=RuntimeError("no LaTeX"))
    for name, fake in fakes.items():
        monkeypatch.setattr(script, name, fake or no_figure)

    with pytest.raises(RuntimeError, match="no LaTeX"):
        script.main(options)
    assert " ± " in capsys.readouterr().out
    assert json.loads((tmp_path / file).read_text())["config"]["quick"]

    # The new results replace the old ones at once, or not at all.
    (tmp_path / file).write_text("old")
    if script is rcdm:
        (tmp_path / "results.json").write_text('{"config": {"exponent": 1}}')
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            script.main(options)
    assert (tmp_path / file).read_text() == "old"

    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), "ascii"))
    with pytest.raises(UnicodeEncodeError):
        script.main(options)
    assert json.loads((tmp_path / file).read_text())["config"]["quick"]
