"""The README's commands: those of the tests are CI's, those that need no download run, the others are understood."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import imbalance
import mnist_corner
import pmsn
import toy_kmeans
import train_inat

REPOSITORY = Path(__file__).parents[1]
README = (REPOSITORY / "README.md").read_text()
BLOCKS = re.findall(r"```bash\n(.*?)```", README, re.S)
COMMANDS = [line.split("#")[0].strip() for block in BLOCKS for line in block.splitlines() if line.strip()]


def test_ci_runs_the_readmes_test_commands():
    steps = (REPOSITORY / ".ci" / "run").read_text().replace(" --quiet", "").splitlines()
    block = next(block for block in BLOCKS if "pytest" in block)
    wanted = [line.strip() for line in block.splitlines() if line.strip() and not line.startswith(("git", "cd"))]
    assert len(wanted) == 4 and [step.strip() for step in steps if step.strip() in wanted] == wanted


def test_first_block_sets_up_and_runs_the_main_job():
    assert "pip install ." in BLOCKS[0] and BLOCKS[0].strip().endswith("python mnist_corner.py")


@pytest.mark.parametrize("command", sorted({c for c in COMMANDS if ".py" in c}))
def test_commands_are_understood(command, tmp_path):
    words = shlex.split(command)
    place = next(i for i, word in enumerate(words) if word.endswith(".py"))
    script, arguments = words[place], words[place + 1 :]
    module = {"mnist_corner.py": mnist_corner, "toy_kmeans.py": toy_kmeans, "train_inat.py": train_inat,
              "imbalance.py": imbalance}[script]
    assert words[:place] == ["python"] or words[0] == "torchrun"
    module.check(module.parse([*arguments, "--out", str(tmp_path)]))


@pytest.mark.parametrize("code", re.findall(r"```python\n(.*?)```", README, re.S))
def test_python_example_runs(code):
    """The loss in one's own training loop, with stand-ins for what the reader brings."""
    import torch

    torch.manual_seed(0)
    names = {"torch": torch, "encoder": torch.nn.Linear(12, 256), "ema_encoder": torch.nn.Linear(12, 256),
             "loader": [(torch.rand(8, 12), torch.rand(8, 12)) for _ in range(3)], "class_counts": [5, 3, 2]}
    exec(code, names)
    assert torch.isfinite(names["loss"]) and names["prototypes"].grad.abs().sum() > 0
    assert set(names["terms"]) == {"cross_entropy", "prior_kl", "mean_prediction", "effective_prototypes"}


def test_figures_and_files_that_the_readme_names_exist():
    for path in re.findall(r"\]\((?!http)([^)#]+)\)", README) + re.findall(r'src="([^"]+)"', README):
        assert (REPOSITORY / path).exists(), path


def test_names_in_the_readme_exist():
    table = README.split("## From paper to code")[1].split("\n### ")[0]
    names = set(re.findall(r"`(?:pmsn\.)?([A-Za-z_]\w+)`", table))
    assert names
    for name in names:
        assert any(hasattr(module, name) for module in (pmsn, mnist_corner, toy_kmeans, train_inat, imbalance)), name


def test_pmsn_imports_torch_and_the_standard_library_only():
    code = ("import sys; import torch, torchvision; before = set(sys.modules); import pmsn; "
            "print(*sorted({m.split('.')[0] for m in set(sys.modules) - before}))")
    loaded = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert set(loaded.stdout.split()) <= {"pmsn", "torch", "torchvision"} | set(sys.stdlib_module_names)


@pytest.mark.parametrize("script", sorted(path.name for path in REPOSITORY.glob("*.py") if path.name != "pmsn.py"))
def test_help_needs_no_data(script, tmp_path):
    result = subprocess.run([sys.executable, str(REPOSITORY / script), "--help"], cwd=tmp_path, capture_output=True,
                            text=True)
    assert result.returncode == 0 and "--out" in result.stdout and not list(tmp_path.iterdir())
