"""The README: its commands run, its example runs, its files exist. All scripts: help, errors."""

import ast
import functools
import io
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from matplotlib.figure import Figure

import imbalance
import mnist_corner
import pmsn
import rcdm
import toy_kmeans
import train_inat
import transfer
import which_feature
import which_prior

REPOSITORY = Path(__file__).parents[1]
README = (REPOSITORY / "README.md").read_text()
RECIPE = (REPOSITORY / "extras" / "RECIPE.md").read_text()
BLOCKS = re.findall(r"```bash\n(.*?)```", README + RECIPE, re.S)
EXAMPLES = re.findall(r"```python\n(.*?)```", README, re.S)
COMMANDS = [line for block in BLOCKS for line in block.splitlines() if line]
SCRIPTS = sorted(path for folder in (REPOSITORY, REPOSITORY / "extras")
                 for path in folder.glob("*.py") if path.name != "pmsn.py")


@pytest.mark.parametrize("command", [c for c in COMMANDS if "train_inat.py --data PATH" in c])
def test_training_commands_are_understood(command, tmp_path):
    words = shlex.split(command)
    place = words.index("train_inat.py")
    args = train_inat.parse([*words[place + 1:], "--out", str(tmp_path)])
    assert str(args.data) == "PATH"
    assert words[0] == "python" or "torchrun" in words[:2]


def test_the_five_lines_are_the_loss():
    names = {"prior": pmsn.power_law_prior(5, 1.0)}
    for name, count in (("anchors", 8), ("targets", 8), ("prototypes", 5)):
        names[name] = torch.nn.functional.normalize(torch.randn(count, 6))
    loss, _ = pmsn.pmsn_loss(**names)
    exec(EXAMPLES[0], names)
    torch.testing.assert_close(names["loss"], loss)


def test_the_example_loop_runs():
    """With stand-ins for what the reader brings."""
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


@pytest.mark.parametrize("file, at_least", [
    ("README.md", 6), ("extras/README.md", 6), ("extras/CONTROLS.md", 6), ("extras/NOTEBOOK.md", 1),
    ("extras/RECIPE.md", 0), ("CONTRIBUTING.md", 0)])
def test_files_that_a_document_names_exist(file, at_least):
    path = REPOSITORY / file
    links = re.findall(r"\]\((?!http|#)([^)#]+)[^)]*\)", path.read_text())
    assert len(links) >= at_least
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
        # argparse.BooleanOptionalAction makes a flag --no-x for a flag --x.
        negated = f'"{flag.replace("--no-", "--")}", action=argparse.BooleanOptionalAction'
        assert f'"{flag}"' in source or negated in source, flag
    for file in ("README.md", *(f"extras/{name}.md" for name in (
            "README", "CONTROLS", "RECIPE", "NOTEBOOK"))):
        names = set(re.findall(r"\bpmsn\.(?!py\b)(\w+)", (REPOSITORY / file).read_text()))
        missing = [name for name in names if not hasattr(pmsn, name)]
        assert not missing, f"{file} names {missing}"
    install = "python3 -m venv .venv && .venv/bin/pip install -e "
    assert COMMANDS[0] == install + ". && .venv/bin/python mnist_corner.py"
    assert COMMANDS[1] == install + '".[test]" && .venv/bin/python -m pytest'
    assert COMMANDS[1] in (REPOSITORY / ".ci" / "run").read_text().replace(" --quiet", "")


def imports(path):
    """The modules that a file imports anywhere, as in `import a.b` or `from a.b import c`."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: an import with dots"
            # `from support import drawings` imports the module support.drawings.
            modules = [f"{node.module}.{alias.name}" for alias in node.names]
            names |= {name if is_ours(name) else node.module for name in modules}
    return names


def is_ours(name):
    return any((REPOSITORY / folder / f"{name.replace('.', '/')}.py").exists()
               for folder in (".", "extras", "results"))


def test_pmsn_needs_torch_and_torchvision_only():
    imported = {name.split(".")[0] for name in imports(REPOSITORY / "pmsn.py")}
    assert imported - sys.stdlib_module_names == {"torch", "torchvision"}


def test_everything_imports_downwards():
    """pmsn.py nothing, support/ only pmsn and without a circle, scripts only pmsn and support."""
    allowed = {"rcdm.py": {"mnist_corner"}, "benchmark.py": {"train_inat"},
               "make.py": {"imbalance", "mnist_corner", "which_feature", "which_prior"}}
    files = [*SCRIPTS, REPOSITORY / "results" / "make.py"]
    assert len(files) == 10
    for path in files:
        ours = {name for name in imports(path) if is_ours(name) or name.startswith("support")}
        others = {name for name in ours if name != "pmsn" and not name.startswith("support.")}
        assert ours and others == allowed.get(path.name, set()), path
        # support/ makes sure that no missing backend for notebooks stops its import.
        assert not any(name.startswith("matplotlib") for name in imports(path)), path
    above = {path.stem: imports(path) for path in (REPOSITORY / "support").glob("*.py")}
    assert len(above) == 10
    for name, imported in above.items():
        ours = {module for module in imported if is_ours(module) or module.startswith("support")}
        assert {module.split(".")[0] for module in ours} <= {"pmsn", "support"}, name
        above[name] = {module.split(".")[1] for module in ours - {"pmsn"}}
    while above:  # Take away what imports nothing that is left.
        lowest = [name for name, imported in above.items() if not imported & above.keys()]
        assert lowest, f"a circle of imports: {above}"
        for name in lowest:
            del above[name]


def test_help_works_from_any_folder_without_data(tmp_path):
    """In a terminal that takes ASCII. The first one in a notebook whose backend is missing, too.

    The others get matplotlib from support/ as well, see the test of imports.
    """
    code = """if True:
        import os, runpy, sys
        import torch.utils.flop_counter, torchvision  # once, because they take seconds
        for i, script in enumerate(sys.argv[1:]):
            if i == 1:
                del os.environ["MPLBACKEND"]
                import matplotlib.figure
            if os.fork() == 0:
                sys.argv = [script, "--help"]
                sys.path[0] = os.path.dirname(script)  # as `python script` has it
                try:
                    runpy.run_path(script, run_name="__main__")
                except SystemExit as end:
                    assert end.code == 0, script
                    assert sys.stdout.errors != "strict", script
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
    (mnist_corner, "--workers 0", "--workers: must be from 1 to 1000, got 0"),
    (mnist_corner, "--seeds -1", "--seeds: must be from 0 to 2000000000, got -1"),
    (mnist_corner, "--backgrounds no/such", "--backgrounds is for --mnist"),
    (which_prior, "--prior_exponents 50", "to 4"),
    (which_prior, "--contrasts nan", "to 1"),
    (which_prior, "--prior_weight 1", "unrecognized arguments: --prior_weight 1"),
    (which_prior, "--map", "unrecognized arguments: --map"),
    (toy_kmeans, "--seed -1", "--seed: must be from 0 to 4294967295, got -1"),
    (toy_kmeans, "--imbalance 0.5", "--imbalance: must be from 1 to 100, got 0.5"),
    *[(script, f"{flag} {'9' * digits}", f"{flag}: must be from") for digits in (20, 400)
      for script, flag in ((mnist_corner, "--workers"), (toy_kmeans, "--seed"),
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
    (imbalance, "--images 10000", "--images, --batch_size or --accumulate: 64 images of 8 classes"),
    (imbalance, "--classes_per_batch 8", "must be fewer than all, which are 8"),
    (rcdm, "--models no", "no/results.json"),
    (transfer, "--encoder random --task folder", "one --data per --task"),
    (transfer, "--encoder random --task folder folder --data x x", "is given twice"),
    (transfer, "--encoder /nowhere --task folder --data x", "--encoder /nowhere has no weights"),
    (transfer, f"--encoder {__file__} --task folder --data x", "has no weights of a vision"),
    *[(transfer, f"--encoder random --task {task} --data x", f"--data x must have {layout}")
      for task, (_, layout) in transfer.TASKS.items()],
    (transfer, "--quick --out /proc/x", "/proc/x"),
    *[(script, "--out /proc/x", "/proc/x")
      for script in (mnist_corner, toy_kmeans, imbalance, rcdm, which_prior)]])
def test_mistakes_are_one_clear_line(script, options, message, tmp_path, monkeypatch, capsys):
    no_network = Mock(side_effect=RuntimeError("downloading:\nno route"))
    monkeypatch.setattr("torchvision.datasets.MNIST", no_network)
    monkeypatch.setattr("torchvision.datasets.CIFAR100", no_network)
    with pytest.raises(SystemExit, match="^2$"):
        script.main(["--out", str(tmp_path), *options.split()])
    _, line = capsys.readouterr().err.split("error: ", 1)
    assert message in line and line.count("\n") == 1


# ---- Experiments: their files, tables and figures, with jobs that only count ---------------------
def corner_runs(part, seed, long_tailed, contrast, args):
    torch.save({}, args.out / f"pictures_{long_tailed}_{seed}.pt")
    return [{"seed": seed, "long_tailed": long_tailed, "exponent": exponent, "contrast": contrast,
             "results": {"loss": 0.5, "difference": 0.5}, "heads": []}
            for exponent in mnist_corner.PRIORS]


def rcdm_runs(seed, exponent, args):
    torch.save({}, args.out / f"pictures_{exponent:g}_{seed}.pt")
    return [{"seed": seed, "exponent": exponent, "results": {"loss": 0.5}}]


def imbalance_runs(seed, name, arm, classes_per_batch, lr_scale, args):
    return [{"seed": seed, "method": name, "arm": arm, "classes_per_batch": classes_per_batch,
             "lr_scale": lr_scale, "results": dict.fromkeys(("class_knn", "font_knn"), 0.5)}]


def which_prior_runs(setting, seed, data_exponent, contrast, args):
    models = [(None, "random"), (0.0, "plain"), (1.0, "plain"), (None, "supervised")]
    return [{"setting": setting, "seed": seed, "data_exponent": data_exponent,
             "contrast": contrast, "loss": loss, "prior_exponent": exponent,
             "results": {"balanced_probe": 0.5}} for exponent, loss in models]


def which_feature_runs(part, seed, data_exponent, args):
    return [{"seed": seed, "data_exponent": data_exponent, "prior_exponent": exponent,
             "loss": "plain", "results": {"class": 0.5}} for exponent in (0.0, 1.0)]

# For each script: its file of results, its plots and figures, its jobs per seed, and their runs.
EXPERIMENTS = {
    mnist_corner: ("results.json", {"plot_neighbors": "neighbors.png",
                                    "plot_preference": "preference.png"}, 2, corner_runs),
    rcdm: ("rcdm.json", {"plot_prototypes": "rcdm.png"}, 2, rcdm_runs),
    imbalance: ("results.json", {"plot": "imbalance.png"}, 7, imbalance_runs),
    which_prior: ("which_prior.json", {"plot": "which_prior.png"}, 1, which_prior_runs),
    which_feature: ("which_feature.json", {"plot": "which_feature.png"}, 2, which_feature_runs)}


def counted_job(find_runs, *job):
    """The runs of a job, which is written down. The file `kill` has the number of the last job."""
    *job, args = job
    if job[0] == "lowest_losses":  # once for all seeds
        if find_runs is which_feature_runs:
            return [{"data_exponent": job[1], "prior_exponent": 0.0,
                     "results": {"class": 0.5, "background": 0.4}}]
        return [{"disagree": job[1], "exponent": 0.0, "results": {"both": 0.5}}]
    with open(args.out / "calls.txt", "a") as file:
        file.write(f"{job}\n")
    kill = args.out / "kill"
    if kill.exists() and len(calls(args.out)) == int(kill.read_text()):
        raise KeyboardInterrupt
    return find_runs(*job, args)


def calls(out):
    return (out / "calls.txt").read_text().splitlines()


@pytest.fixture(params=EXPERIMENTS, ids=lambda script: script.__name__)
def script(request, tmp_path, jobs_here, monkeypatch):
    """A script whose jobs only count, and whose figures are empty."""
    script, (_, plots, _, find_runs) = request.param, EXPERIMENTS[request.param]
    monkeypatch.setattr(script, "experiment", functools.partial(counted_job, find_runs))
    for plot in plots:
        monkeypatch.setattr(script, plot, lambda *_: Figure(figsize=(1, 1)))
    monkeypatch.setattr(rcdm, "load_images", Mock())
    monkeypatch.setattr(rcdm, "load_pmsn", Mock())
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "results.json").write_text('{"config": {"exponent": 1}}')
    return script


def start(script, out, *seeds):
    models = ["--models", str(out / "models")] if script is rcdm else []
    script.main(["--quick", "--out", str(out), "--seeds", *seeds, *models])


def runs_in_file(script, out):
    """Those of seeds."""
    runs = json.loads((out / EXPERIMENTS[script][0]).read_text())["runs"]
    return [run for run in runs if "seed" in run]


def test_a_killed_experiment_continues_where_it_was(script, tmp_path):
    """It is killed in the last job of its second seed. Then there is a third seed."""
    _, plots, per_seed, _ = EXPERIMENTS[script]
    (tmp_path / "kill").write_text(str(2 * per_seed))
    with pytest.raises(SystemExit, match="^130$"):
        start(script, tmp_path, "0", "1")
    done = {tuple(run["job"]) for run in runs_in_file(script, tmp_path)}
    assert len(calls(tmp_path)) == 2 * per_seed and len(done) == 2 * per_seed - 1
    assert not list(tmp_path.glob("*.png"))
    (tmp_path / "kill").unlink()
    start(script, tmp_path, "0", "1")
    assert calls(tmp_path)[2 * per_seed:] == calls(tmp_path)[2 * per_seed - 1 : 2 * per_seed]
    start(script, tmp_path, "0", "1", "2")
    last = [ast.literal_eval(job) for job in calls(tmp_path)[2 * per_seed + 1:]]
    assert len(last) == per_seed and all(2 in job[:2] for job in last)
    assert len({tuple(run["job"]) for run in runs_in_file(script, tmp_path)}) == 3 * per_seed
    assert {path.name for path in tmp_path.glob("*.png")} == set(plots.values())


def test_results_are_in_the_file_before_the_table(script, tmp_path, monkeypatch):
    monkeypatch.setattr(script, "summarize", Mock(side_effect=RuntimeError("no table")))
    with pytest.raises(RuntimeError, match="no table"):
        start(script, tmp_path, "0", "1")
    done = {tuple(run["job"]) for run in runs_in_file(script, tmp_path)}
    assert len(done) == 2 * EXPERIMENTS[script][2]


def test_a_figure_that_cannot_be_drawn_costs_a_warning_only(
        script, tmp_path, monkeypatch, capsys):
    """A figure can need LaTeX that is missing. All results are in the file before."""
    (first, figure), *others = EXPERIMENTS[script][1].items()
    found = []

    def plot(*_):
        found.extend(runs_in_file(script, tmp_path))
        raise RuntimeError("no LaTeX\nsecond line")
    monkeypatch.setattr(script, first, plot)
    start(script, tmp_path, "0")
    assert len({tuple(run["job"]) for run in found}) == EXPERIMENTS[script][2]
    output = capsys.readouterr()
    assert output.err == f"warning: cannot draw {figure}: no LaTeX\n"
    assert re.search("mean ± (std|95% interval) over n = 1 seeds", output.out)
    assert {path.name for path in tmp_path.glob("*.png")} == {name for _, name in others}


def test_a_log_that_breaks_off_costs_nothing(script, tmp_path, monkeypatch):
    """Nobody reads standard output and standard error any more, as after `| head -1`."""
    files = []
    for name in ("stdout", "stderr"):
        reader, writer = os.pipe()
        os.close(reader)
        files.append(os.fdopen(writer, "w"))
        monkeypatch.setattr(sys, name, files[-1])
    _, plots, per_seed, _ = EXPERIMENTS[script]
    start(script, tmp_path, "0")
    for file in files:
        with pytest.raises(BrokenPipeError):
            file.write("x")
            file.close()
    assert len(calls(tmp_path)) == per_seed
    assert {path.name for path in tmp_path.glob("*.png")} == set(plots.values())


def test_a_terminal_that_takes_only_ascii_has_the_table(script, tmp_path, monkeypatch):
    terminal = io.TextIOWrapper(io.BytesIO(), "ascii")
    monkeypatch.setattr(sys, "stdout", terminal)
    start(script, tmp_path, "0", "1")
    terminal.flush()
    assert re.search(rb"mean \\xb1 (std|95% interval) over n = 2 seeds", terminal.buffer.getvalue())


@pytest.mark.parametrize("script", EXPERIMENTS, ids=lambda script: script.__name__)
def test_as_many_processes_as_cores_of_this_job(script, monkeypatch, capsys):
    """Slurm or taskset give the job one of 64 cores."""
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {5}, raising=False)
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit, match="^0$"):
        script.main(["--help"])
    assert re.search(r"--workers WORKERS +processes \(default: 1\)", capsys.readouterr().out)
