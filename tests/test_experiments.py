"""experiments.py: files that are whole or not written, and means over seeds."""

import json
import math
import os
import re
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

import experiments

CALLS = "calls.txt"
LOCK = """import experiments, pathlib, sys
lock = experiments.lock_folder(pathlib.Path(sys.argv[1]))
print("locked", flush=True)
sys.stdin.read()"""

def git(folder, *words):
    subprocess.run(["git", "-c", "user.name=x", "-c", "user.email=x@x", *words], cwd=folder,
                   check=True, capture_output=True)

def experiment(seed, name, args):
    """Two runs with the seed as a result. The seed 13 fails, and 14 is killed."""
    with open(args.out / CALLS, "a") as file:
        file.write(f"{seed} {name}\n")
    if seed == 13:
        raise ValueError("bad luck")
    if seed == 14:
        os.kill(os.getpid(), signal.SIGKILL)  # as Linux does when the memory is full
    return [{"name": f"{name}{i}", "results": {"seed": seed}} for i in range(2)]

def test_finished_jobs_are_kept_and_not_repeated(tmp_path, monkeypatch):
    args, path = SimpleNamespace(workers=1, out=tmp_path), tmp_path / "results.json"

    def run(*jobs, **config):
        return experiments.run_or_continue(experiment, jobs, args, {"lr": 0.1, **config}, path)

    def calls():
        text = (tmp_path / CALLS).read_text()
        (tmp_path / CALLS).write_text("")
        return text.splitlines()

    with pytest.raises(ValueError, match="bad luck"):
        run((1, "a"), (13, "a"), (2, "a"))
    assert calls()[:2] == ["1 a", "13 a"]  # The third job may begin before the error is known.
    assert [run["name"] for run in json.loads(path.read_text())["runs"]] == ["a0", "a1"]
    monkeypatch.setattr(sys, "argv", ["another command"])
    with pytest.raises(experiments.UserError, match="the memory was full"):
        run((1, "a"), (14, "a"))
    assert calls() == ["14 a"]
    found = run((2, "a"), (1, "a"), (1, "b"))
    commands = [maker["command"].split()[-1] for maker in json.loads(path.read_text())["made_by"]]
    assert [run["made_by"] for run in found] == [1, 1, 0, 0, 1, 1] and len(commands) == 2
    assert calls() == ["2 a", "1 b"]
    assert [(run["name"], run["results"]["seed"]) for run in found] == [
        ("a0", 2), ("a1", 2), ("a0", 1), ("a1", 1), ("b0", 1), ("b1", 1)]
    # What a smaller command does not use stays in the file.
    assert len(run((1, "b"))) == 2 and calls() == []
    assert len(json.loads(path.read_text())["runs"]) == 6
    with pytest.raises(experiments.UserError, match="with another lr, steps: use another --out"):
        run((3, "a"), lr=0.2, steps=5)
    with subprocess.Popen([sys.executable, "-c", LOCK, tmp_path], stdin=subprocess.PIPE,
                          stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"locked\n"
        with pytest.raises(experiments.UserError, match="another command writes to --out"):
            run((3, "a"))
        other.stdin.close()
    for broken in ("old", "{}", "[1]", '{"config": 3', '{"config": 3, "runs": [], "made_by": []}',
                   '{"config": {}, "runs": [{"seed": 0}], "made_by": []}'):
        path.write_text(broken)
        with pytest.raises(experiments.UserError, match="not a file of results: move it away"):
            run((3, "a"))
        assert path.read_text() == broken
    assert calls() == []

def test_results_name_their_command_and_commit(tmp_path, monkeypatch):
    """In a repository of its own: a clean commit, a change, and a folder without a repository."""
    monkeypatch.setattr(experiments, "FOLDER", tmp_path)
    monkeypatch.setattr(sys, "argv", [str(tmp_path / "extras/a.py"), "--out", "two words"])
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert experiments.made_by()["commit"] == "unknown"
    git(tmp_path, "init")
    (tmp_path / "a").write_text("1")
    git(tmp_path, "add", "a")
    git(tmp_path, "commit", "-m", "first")
    clean = experiments.made_by()
    assert clean["command"] == "python extras/a.py --out 'two words'"
    assert re.fullmatch("[0-9a-f]{7,}", clean["commit"])
    (tmp_path / "untracked").write_text("1")
    assert experiments.made_by() == clean
    (tmp_path / "a").write_text("2")
    assert experiments.made_by()["commit"] == f"{clean['commit']} with changes"
    monkeypatch.setenv("PATH", "")
    assert experiments.made_by()["commit"] == "unknown"

def test_a_file_is_replaced_when_the_new_one_is_complete(tmp_path, monkeypatch):
    results, model = tmp_path / "results.json", tmp_path / "model.pt"
    experiments.save({"path": tmp_path, "loss": 1.0}, results)
    experiments.save({"weight": torch.ones(2)}, model)
    with pytest.raises(ValueError):
        experiments.save({"loss": math.nan}, results)  # It would be no JSON.
    with monkeypatch.context() as patch:

        def is_killed(*_):
            for temporary in tmp_path.glob("*.tmp"):
                temporary.write_bytes(temporary.read_bytes()[:3])
            raise KeyboardInterrupt
        patch.setattr(os, "replace", is_killed)
        for content, path in (({"loss": 2.0}, results), ({"weight": torch.zeros(2)}, model)):
            with pytest.raises(KeyboardInterrupt):
                experiments.save(content, path)
    assert json.loads(results.read_text()) == {"path": str(tmp_path), "loss": 1.0}
    assert torch.load(model, weights_only=True)["weight"].tolist() == [1, 1]
    experiments.save({"loss": 2.0}, results)
    assert json.loads(results.read_text()) == {"loss": 2.0}

def test_means_and_spreads_leave_out_what_is_missing_for_a_seed():
    both = {"digit": 1.0, "background": 2.0, "loss": math.nan}
    one = {"digit": 3.0, "loss": math.inf}
    runs = [{"exponent": 1.0, "results": experiments.finite(x)} for x in (both, one)]
    runs.append({"exponent": 0.0, "results": {"digit": 5.0}})
    summary = experiments.summarize(runs, key=lambda run: run["exponent"])
    assert summary[1.0] == {"n": 2, "digit": {"mean": 2.0, "std": pytest.approx(2**0.5)}}
    assert summary[0.0]["n"] == 1 and math.isnan(summary[0.0]["digit"]["std"])
    assert experiments.number_of_seeds(summary) == 2
    assert experiments.cell(summary[1.0], "digit") == "2.000 ± 1.414"
    assert experiments.cell(summary[1.0], "background") == "-"
    assert experiments.cell(summary[0.0], "digit") == "5.000"
    assert experiments.cell({"x": {"mean": -0.0004, "std": 0.01}}, "x") == "0.000 ± 0.010"
    assert experiments.cell({"x": {"mean": 44.26, "std": 1.04}}, "x") == "44.3 ± 1.0"
