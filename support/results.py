"""Experiments with several seeds: their files of results, and means for tables.

An experiment is a function of a job, for example of a seed, and of the arguments. It returns runs:
dictionaries with the seed, the setting and the "results", which are numbers. Jobs run side by side.
A file of results has

    config      the settings that all of its runs share
    made_by     command, commit, machine and versions of each command that added to it
    runs        one entry per run, with the job, its seconds, and the number of its made_by
"""

import json
import math
import multiprocessing
import os
import platform
import shlex
import signal
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np
import torch

from support.runs import UserError, end_with_parent, lock_folder, say, write_whole

FOLDER = Path(__file__).resolve().parents[1]  # of the scripts
CONTEXT = multiprocessing.get_context("spawn")  # A process that uses CUDA cannot be forked.


# ---- Jobs and their file -------------------------------------------------------------------------
def run_or_continue(experiment, jobs, args, config, path):
    """The runs of all jobs. They are in the file `path` as soon as a job is done.

    experiment(*job, args) gives a list of runs. Jobs that are in the file already are not repeated,
    so the same command continues after a kill, and a command with more seeds adds to the file. The
    folder of the file is made and locked. Raises UserError if the file has another config, is no
    file of results, or belongs to a running command.
    """
    config = json.loads(json.dumps(config, default=str))  # as it looks in the file
    runs, makers, finished = [], [], []
    lock = lock_folder(path.parent)
    if path.exists():
        try:
            content = json.loads(path.read_text())
            found, runs, makers = content["config"], content["runs"], content["made_by"]
            other = [name for name in config | found if config.get(name) != found.get(name)]
            finished = [run["job"] for run in runs]
            commits = ", ".join(dict.fromkeys(maker["commit"] for maker in makers))
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise UserError(f"{path} is not a file of results: move it away") from None
        if other:
            raise UserError(f"{path} has results with another {', '.join(other)}: use another "
                            "--out, or move it away")
        say(f"jobs in {path} already: {len({*map(str, finished)})}, made by commit {commits}")

    maker = made_by()
    if maker not in makers:
        makers.append(maker)

    def keep(job, found, seconds):
        about = {"job": list(job), "made_by": makers.index(maker), "job_seconds": round(seconds)}
        runs.extend({**about, **run, "results": finite(run["results"])} for run in found)
        save_json({"config": config, "made_by": makers, "runs": runs}, path)

    run_in_processes(experiment, [job for job in jobs if list(job) not in finished], args, keep)
    lock.close()
    # The file can have more jobs. The table of this command has its own, in their order.
    return [run for job in jobs for run in runs if run["job"] == list(job)]


def run_in_processes(experiment, jobs, args, keep):
    """Call experiment(*job, args) for all jobs, in `args.workers` processes.

    keep(job, runs, seconds) is called as soon as a job is done. Raises UserError if a process is
    killed.
    """
    began = time.monotonic()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
    with ProcessPoolExecutor(args.workers, CONTEXT, initializer=end_with_parent,
                             initargs=(os.getpid(),)) as pool:
        try:
            futures = {pool.submit(timed, experiment, *job, args): job for job in jobs}
            for done, future in enumerate(as_completed(futures), start=1):
                keep(futures[future], *future.result())
                left = (time.monotonic() - began) * (len(jobs) / done - 1)
                say(f"{done} of {len(jobs)} jobs done, about {left:.0f} s left")
        except BrokenProcessPool:
            raise UserError("a process was killed, perhaps because the memory was full: use fewer "
                            "--workers") from None
        except BaseException:  # an error, or KeyboardInterrupt
            for process in multiprocessing.active_children():
                process.kill()
            raise


def timed(experiment, *arguments):
    began = time.monotonic()
    return experiment(*arguments), time.monotonic() - began


def made_by():
    """Command, commit of this folder, machine and versions, for a file of results.

    They are asked for before the experiments, because a commit can follow while these run.
    """
    def git(*words):
        return subprocess.run(["git", *words], cwd=FOLDER, capture_output=True, text=True).stdout

    try:
        commit = git("rev-parse", "--short", "HEAD").strip() or "unknown"
        if git("status", "--porcelain", "--untracked-files=no"):
            commit += " with changes"
    except OSError:  # There is no git.
        commit = "unknown"
    script = os.path.relpath(sys.argv[0], FOLDER)
    cpu = f"{platform.machine()} with {torch.backends.cpu.get_cpu_capability()}"
    machine = f"{os.cpu_count()} cores, {cpu}"
    if torch.cuda.is_available():
        machine += f", {torch.cuda.get_device_name()}"
    return {"command": shlex.join(["python", script, *sys.argv[1:]]), "commit": commit,
            "machine": machine, "python": platform.python_version(), "torch": torch.__version__}


def finite(results):
    """The results {name: number} without NaN and infinity, which JSON does not have."""
    return {name: value for name, value in results.items() if math.isfinite(value)}


def save_json(content, path):
    text = json.dumps(content, indent=1, default=str, allow_nan=False)
    write_whole(path, lambda temporary: temporary.write_text(text))


# ---- Tables --------------------------------------------------------------------------------------
def summarize(runs, key):
    """{key(run): {"n": number of seeds, name: {"mean": mean, "std": spread, "interval": half}}}.

    A result that is missing for one of the seeds is left out. The spread of one seed is NaN, and so
    is its interval (see `interval`).
    """
    groups, summary = {}, {}
    for run in runs:
        groups.setdefault(key(run), []).append(run["results"])
    for group, results in groups.items():
        summary[group] = row = {"n": len(results)}
        for name in results[0]:
            if all(name in result for result in results):
                values = [result[name] for result in results]
                spread = np.std(values, ddof=1) if len(values) > 1 else math.nan
                mean, half = interval(values)
                row[name] = {"mean": mean, "std": spread, "interval": half}
    return summary


def interval(values):
    """The mean of independent values, and half of its 95% interval by Student's t distribution.

    With one value the interval is NaN.
    """
    n = len(values)
    if n < 2:
        return np.mean(values), math.nan
    # The 97.5% quantiles of t with 1, 2 ... degrees of freedom. Later ones are near 1.96 + 2.5 / n.
    quantiles = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201,
                 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086)
    t = quantiles[n - 2] if n - 2 < len(quantiles) else 1.96 + 2.5 / (n - 1)
    return np.mean(values), t * np.std(values, ddof=1) / math.sqrt(n)


def number_of_seeds(summary):
    """The number of seeds of the first group of `summarize`. The others have as many."""
    return next(iter(summary.values()))["n"]


def cell(row, name, spread="std"):
    """A result in a table, or a dash if `summarize` has left it out. One seed has no spread.

    `spread` is "std" or "interval".
    """
    if name not in row:
        return "-"
    mean, std = row[name]["mean"], row[name][spread]
    digits = 3 if abs(mean) < 10 else 1
    mean = round(float(mean), digits) + 0.0  # not -0.000
    return f"{mean:.{digits}f}" + ("" if math.isnan(std) else f" ± {std:.{digits}f}")
