"""The README: its commands run, its example runs, its files exist. The help of every script."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import train_inat

REPOSITORY = Path(__file__).parents[1]
README = (REPOSITORY / "README.md").read_text()
BLOCKS = re.findall(r"```bash\n(.*?)```", README, re.S)
COMMANDS = [line for block in BLOCKS for line in block.splitlines() if line]
SCRIPTS = sorted(path for folder in (REPOSITORY, REPOSITORY / "extras")
                 for path in folder.glob("*.py") if path.name != "pmsn.py")

def test_the_first_two_commands_are_one_line_each_and_ci_runs_the_second():
    start = "python3 -m venv .venv && .venv/bin/pip install -e "
    assert COMMANDS[:2] == [start + ". && .venv/bin/python mnist_corner.py",
                            start + '".[test]" && .venv/bin/python -m pytest']
    assert COMMANDS[1] in (REPOSITORY / ".ci" / "run").read_text().replace(" --quiet", "")

@pytest.mark.parametrize("command", [c for c in COMMANDS if "train_inat.py --data" in c])
def test_training_commands_are_understood(command, tmp_path):
    words = shlex.split(command)
    place = words.index("train_inat.py")
    args = train_inat.parse([*words[place + 1:], "--out", str(tmp_path)])
    assert str(args.data) == "PATH"
    assert words[0] == "python" or "torchrun" in words[:2]

@pytest.mark.parametrize("code", re.findall(r"```python\n(.*?)```", README, re.S))
def test_the_example_runs(code):
    """The loss in a training loop of one's own, with stand-ins for what the reader brings."""
    torch.manual_seed(0)
    batches = [(torch.rand(8, 12), torch.rand(8, 12)) for _ in range(3)]
    names = {"encoder": torch.nn.Linear(12, 256), "ema_encoder": torch.nn.Linear(12, 256),
             "loader": batches, "class_counts": [5, 3, 2]}
    exec(code, names)
    assert torch.isfinite(names["loss"]) and names["prototypes"].grad.abs().sum() > 0
    assert {"effective_prototypes", "cross_entropy", "prior_kl"} <= set(names["terms"])

@pytest.mark.parametrize("file", ["README.md", "extras/README.md"])
def test_files_that_a_readme_names_exist(file):
    path = REPOSITORY / file
    links = re.findall(r"\]\((?!http|#)([^)#]+)[^)]*\)", path.read_text())
    assert len(links) > 5
    for link in links:
        assert (path.parent / link).exists(), link

def test_flags_and_functions_that_the_readmes_use_exist():
    source = "".join(path.read_text() for path in [*SCRIPTS, REPOSITORY / "pmsn.py"])
    extras = (REPOSITORY / "extras" / "README.md").read_text()
    commands = "".join(re.findall(r"```bash\n(.*?)```", extras, re.S))
    flags = {*re.findall(r"`(--[a-z_]+)[ `]", README), *re.findall(r" (--[a-z_]+)", commands)}
    assert len(flags) > 20
    for flag in flags:
        assert f'"{flag}"' in source, flag
    for name in set(re.findall(r"pmsn\.([a-z]\w+)\(", README)):
        assert f"def {name}(" in source, name

def test_pmsn_needs_torch_and_torchvision_only():
    code = ("import sys; import torch, torchvision; before = set(sys.modules); import pmsn; "
            "print(*sorted({m.split('.')[0] for m in set(sys.modules) - before}))")
    result = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True,
                            text=True, check=True)
    allowed = {"pmsn", "torch", "torchvision"} | set(sys.stdlib_module_names)
    assert set(result.stdout.split()) <= allowed

def test_help_works_from_any_folder_without_data(tmp_path):
    code = """if True:
        import runpy, sys
        for script in sys.argv[1:]:
            sys.argv = [script, "--help"]
            try:
                runpy.run_path(script, run_name="__main__")
            except SystemExit as end:
                assert end.code == 0, script"""
    result = subprocess.run([sys.executable, "-c", code, *SCRIPTS], cwd=tmp_path, text=True,
                            capture_output=True, timeout=100)
    assert result.returncode == 0, result.stderr
    assert all(f"usage: {script.name}" in result.stdout for script in SCRIPTS)
    assert not list(tmp_path.iterdir())
