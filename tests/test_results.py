"""support/results.py: jobs that are done once, files that are whole, and means over seeds."""

import contextlib
import fcntl
import json
import math
import multiprocessing
import os
import re
import select
import signal
import subprocess
import sys
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from scipy import stats

from support import results
from support.runs import UserError, write_whole

FORK = multiprocessing.get_context("fork")  # Its processes have torch already.
CALLS = "calls.txt"


@pytest.fixture(autouse=True)
def old_handler_of_sigterm():
    handler = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, handler)


def git(folder, *words):
    subprocess.run(["git", "-c", "user.name=x", "-c", "user.email=x@x", *words], cwd=folder,
                   check=True, capture_output=True)


def experiment(seed, name, args):
    """Two runs with the seed as a result. The seeds 13 and 15 fail, and 14 is killed."""
    with open(args.out / CALLS, "a") as file:
        file.write(f"{seed} {name}\n")
    if seed == 13:
        raise ValueError("bad luck")
    if seed == 14:
        os.kill(os.getpid(), signal.SIGKILL)  # as Linux does when the memory is full
    if seed == 15:
        raise UserError("the loss is not finite")
    return [{"name": f"{name}{i}", "results": {"seed": seed, "empty": math.nan}} for i in range(2)]


def lock(path, pipe):
    """Lock a file like another run, say so, and keep the lock until there is an answer."""
    with open(path, "a") as file:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        pipe.send("locked")
        pipe.recv()


def test_finished_jobs_are_kept_and_not_repeated(tmp_path, monkeypatch, capsys):
    args, path = SimpleNamespace(workers=1, out=tmp_path), tmp_path / "results.json"

    def run(*jobs, **config):
        return results.run_or_continue(experiment, jobs, args, {"lr": 0.1, **config}, path)

    def calls():
        text = (tmp_path / CALLS).read_text()
        (tmp_path / CALLS).write_text("")
        return text.splitlines()

    with pytest.raises(ValueError, match="bad luck"):  # in a new process, which imports torch
        run((1, "a"), (13, "a"), (2, "a"))
    assert calls()[:2] == ["1 a", "13 a"]  # The third job may begin before the error is known.
    assert [run["name"] for run in json.loads(path.read_text())["runs"]] == ["a0", "a1"]
    monkeypatch.setattr(results, "CONTEXT", FORK)
    monkeypatch.setattr(sys, "argv", ["another command"])
    with pytest.raises(UserError, match="the memory was full"):
        run((1, "a"), (14, "a"))
    assert calls() == ["14 a"]
    with pytest.raises(UserError, match="^the loss is not finite$"):
        run((15, "a"))
    assert calls() == ["15 a"]
    capsys.readouterr()
    found = run((2, "a"), (1, "a"), (1, "b"))
    commands = [maker["command"].split()[-1] for maker in json.loads(path.read_text())["made_by"]]
    assert [run["made_by"] for run in found] == [1, 1, 0, 0, 1, 1] and len(commands) == 2
    assert calls() == ["2 a", "1 b"]
    first, *progress = capsys.readouterr().out.splitlines()
    assert first.startswith(f"jobs in {path} already: 1, made by commit ")
    assert [line.split(", ")[0] for line in progress] == ["1 of 2 jobs done", "2 of 2 jobs done"]
    # The numbers are those of the file: NaN is no JSON, and is left out.
    assert [(run["name"], run["results"]) for run in found] == [
        ("a0", {"seed": 2}), ("a1", {"seed": 2}), ("a0", {"seed": 1}), ("a1", {"seed": 1}),
        ("b0", {"seed": 1}), ("b1", {"seed": 1})]
    # The new file replaces the old one at once, or not at all.
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "replace", Mock(side_effect=KeyboardInterrupt))
        run((3, "b"))
    assert calls() == ["3 b"]
    # What a smaller command does not use stays in the file.
    assert len(run((1, "b"))) == 2 and calls() == []
    assert len(json.loads(path.read_text())["runs"]) == 6
    run((4, "c"))  # by the command that is in the file already
    content = json.loads(path.read_text())
    assert calls() == ["4 c"] and len(content["runs"]) == 8 and len(content["made_by"]) == 2
    with pytest.raises(UserError, match="with another lr, steps: use another --out"):
        run((3, "a"), lr=0.2, steps=5)
    pipe, end = FORK.Pipe()
    other = FORK.Process(target=lock, args=(tmp_path / "lock", end), daemon=True)
    other.start()
    assert pipe.poll(20) and pipe.recv() == "locked"  # No run has kept its lock.
    with pytest.raises(UserError, match="another run writes to --out"):
        run((3, "a"))
    pipe.send("end")
    other.join()
    path.unlink()
    path.mkdir()
    with pytest.raises(UserError, match="not a file of results: move it away"):
        run((3, "a"))
    path.rmdir()
    for broken in ("old", "[" * 100_000, "{}", "[1]", '{"config": 3',
                   '{"config": 3, "runs": [], "made_by": []}',
                   '{"config": {}, "runs": [{"seed": 0}], "made_by": []}'):
        path.write_text(broken)
        with pytest.raises(UserError, match="not a file of results: move it away"):
            run((3, "a"))
        assert path.read_text() == broken
    assert calls() == []


def wait_for_ever(started, args):
    os.write(started, b"%20d" % os.getpid())
    signal.pause()


@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGKILL])
def test_a_run_that_is_stopped_ends_all_its_processes(stop, tmp_path, monkeypatch):
    """The program handles SIGTERM as Ctrl-C. It cannot handle SIGKILL, but its workers notice.

    The program and its workers have the writing end of a pipe, and reading ends with the last one.
    """
    monkeypatch.setattr(results, "CONTEXT", FORK)
    reader, writer = os.pipe()

    def program():
        args, path = SimpleNamespace(workers=2), tmp_path / "results.json"
        sys.stderr = open(os.devnull, "w")  # for the traceback of KeyboardInterrupt
        results.run_or_continue(wait_for_ever, [(writer,)] * 5, args, {}, path)

    process = FORK.Process(target=program)
    process.start()
    os.close(writer)
    processes = [process.pid]
    try:
        for _ in range(2):  # Both workers are at work.
            assert select.select([reader], [], [], 20)[0]
            processes.append(int(os.read(reader, 20)))
        os.kill(process.pid, stop)
        process.join(20)
        assert process.exitcode == (1 if stop == signal.SIGTERM else -signal.SIGKILL)
        assert [path.name for path in tmp_path.iterdir()] == ["lock"]
        assert select.select([reader], [], [], 20)[0], "a worker goes on"
        assert os.read(reader, 20) == b""
        processes.clear()
    finally:
        for left in processes:
            with contextlib.suppress(ProcessLookupError):
                os.kill(left, signal.SIGKILL)
        os.close(reader)


def test_results_name_their_command_and_commit(tmp_path, monkeypatch):
    """In a repository of its own: a clean commit, a change, and a folder without a repository."""
    monkeypatch.setattr(results, "FOLDER", tmp_path)
    monkeypatch.setattr(sys, "argv", [str(tmp_path / "extras/a.py"), "--out", "two words"])
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert results.made_by()["commit"] == "unknown"
    git(tmp_path, "init")
    (tmp_path / "a").write_text("1")
    git(tmp_path, "add", "a")
    git(tmp_path, "commit", "-m", "first")
    clean = results.made_by()
    assert clean["command"] == "python extras/a.py --out 'two words'"
    assert re.fullmatch("[0-9a-f]{7,}", clean["commit"])
    (tmp_path / "untracked").write_text("1")
    assert results.made_by() == clean
    (tmp_path / "a").write_text("2")
    assert results.made_by()["commit"] == f"{clean['commit']} with changes"
    monkeypatch.setenv("PATH", "")
    assert results.made_by()["commit"] == "unknown"


def test_the_folder_of_the_commit_is_that_of_the_scripts():
    assert (results.FOLDER / "pmsn.py").is_file() and (results.FOLDER / "extras").is_dir()


def test_a_file_is_replaced_when_the_new_one_is_complete(tmp_path, monkeypatch):
    file, model = tmp_path / "results.json", tmp_path / "model.pt"

    def save_model(value):
        write_whole(model, lambda path: torch.save({"weight": torch.full((2,), value)}, path))

    results.save_json({"path": tmp_path, "loss": 1.0}, file)
    save_model(1.0)
    with pytest.raises(ValueError):
        results.save_json({"loss": math.nan}, file)  # It would be no JSON.
    with monkeypatch.context() as patch:

        def is_killed(*_):
            for temporary in tmp_path.glob("*.temporary"):
                temporary.write_bytes(temporary.read_bytes()[:3])
            raise KeyboardInterrupt
        patch.setattr(os, "replace", is_killed)
        with pytest.raises(KeyboardInterrupt):
            results.save_json({"loss": 2.0}, file)
        with pytest.raises(KeyboardInterrupt):
            save_model(0.0)
    assert len(list(tmp_path.glob("*.temporary"))) == 2  # So the names above are the right ones.
    assert json.loads(file.read_text()) == {"path": str(tmp_path), "loss": 1.0}
    assert torch.load(model, weights_only=True)["weight"].tolist() == [1, 1]
    results.save_json({"loss": 2.0}, file)
    assert json.loads(file.read_text()) == {"loss": 2.0}


def test_means_and_spreads_leave_out_what_is_missing_for_a_seed():
    both = {"digit": 1.0, "background": 2.0, "loss": math.nan}
    one = {"digit": 3.0, "loss": math.inf}
    runs = [{"exponent": 1.0, "results": results.finite(x)} for x in (both, one)]
    runs.append({"exponent": 0.0, "results": {"digit": 5.0}})
    summary = results.summarize(runs, key=lambda run: run["exponent"])
    assert summary[1.0] == {"n": 2, "digit": {"mean": 2.0, "std": pytest.approx(2**0.5),
                                              "interval": pytest.approx(12.706)}}
    assert summary[0.0]["n"] == 1
    assert all(math.isnan(summary[0.0]["digit"][name]) for name in ("std", "interval"))
    assert results.number_of_seeds(summary) == 2
    assert results.cell(summary[1.0], "digit") == "2.000 ± 1.414"
    assert results.cell(summary[1.0], "digit", "interval") == "2.000 ± 12.706"
    assert results.cell(summary[1.0], "background") == "-"
    assert results.cell(summary[1.0], "background", "interval") == "-"
    assert results.cell(summary[0.0], "digit") == "5.000"
    assert results.cell(summary[0.0], "digit", "interval") == "5.000"
    assert results.cell({"x": {"mean": -0.0004, "std": 0.01}}, "x") == "0.000 ± 0.010"
    assert results.cell({"x": {"mean": 44.26, "std": 1.04}}, "x") == "44.3 ± 1.0"


@pytest.mark.parametrize("n", range(2, 61))
def test_interval_against_scipy(n):
    values = np.random.default_rng(n).normal(5, 3, n)
    mean, half = results.interval(list(values))
    low, high = stats.t.interval(0.95, n - 1, values.mean(), stats.sem(values))
    assert mean == pytest.approx((low + high) / 2)
    assert half == pytest.approx((high - low) / 2, rel=1e-3)


def test_the_interval_of_one_value_is_unknown():
    mean, half = results.interval([3.0])
    assert mean == 3 and math.isnan(half)
