"""What the experiments share: flags, processes, result files, and tables. Not the method.

Each experiment is a function of a seed and more. It runs once per job, in several processes, and
gives numbers. Here they become means and standard deviations over the seeds.
"""

import errno
import json
import math
import multiprocessing
import os
import platform
import shlex
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np
import torch

# The scripts take these three from here as well. In some notebooks matplotlib can only be imported
# after train_inat.
from train_inat import Figure, number, print_any_text

FOLDER = Path(__file__).resolve().parent

class UserError(Exception):
    """What a user can mend: main turns it into one line."""

def parse(parser, argv):
    """The arguments. In a list no value may stand twice, because its result would count twice."""
    args = parser.parse_args(argv)
    for name, values in vars(args).items():
        for value in values if isinstance(values, list) else ():
            if values.count(value) > 1:
                parser.error(f"argument --{name}: {value} is given twice")
    return args

def run_in_processes(experiment, jobs, args, keep=lambda *_: None):
    """The results of experiment(*job, args) for all jobs, by `args.workers` processes.

    keep(job, result, seconds) is called as soon as a job is done. UserError if a process is killed.
    """
    began = time.time()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
    with ProcessPoolExecutor(args.workers, multiprocessing.get_context("spawn"),
                             initializer=end_with_parent) as pool:
        try:
            futures = {pool.submit(timed, experiment, *job, args): job for job in jobs}
            for done, future in enumerate(as_completed(futures), start=1):
                keep(futures[future], *future.result())
                left = (time.time() - began) * (len(jobs) / done - 1)
                print(f"{done} of {len(jobs)} runs done, about {left:.0f} s left", flush=True)
        except BrokenProcessPool:
            raise UserError("a process was killed, perhaps because the memory was full: use fewer "
                            "--workers") from None
        except BaseException:  # an error, or KeyboardInterrupt
            for process in multiprocessing.active_children():
                process.kill()
            raise
    return [future.result()[0] for future in futures]

def timed(experiment, *arguments):
    began = time.time()
    return experiment(*arguments), time.time() - began

def run_or_continue(experiment, jobs, args, config, path):
    """The runs of all jobs. They are in the file `path` as soon as a job is done.

    experiment(*job, args) gives a list of runs, which are dictionaries. Jobs that are in the file
    already are not repeated, so the same command continues after a kill, and a command with more
    seeds adds to the file. `config` has the settings that all runs of a file share. Raises
    UserError if the file has other ones, is no file of results, or belongs to a running command.
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
        except (ValueError, KeyError, TypeError, AttributeError):
            raise UserError(f"{path} is not a file of results: move it away") from None
        if other:
            raise UserError(f"{path} has results with another {', '.join(other)}: use another "
                            "--out, or move it away")
        print(f"{path} has {len(finished)} runs already, made by commit {commits}", flush=True)

    maker = made_by()
    if maker not in makers:
        makers.append(maker)

    def keep(job, result, seconds):
        about = {"job": list(job), "made_by": makers.index(maker), "job_seconds": round(seconds)}
        runs.extend({**about, **run} for run in result)
        save({"config": config, "made_by": makers, "runs": runs}, path)

    run_in_processes(experiment, [job for job in jobs if list(job) not in finished], args, keep)
    lock.close()
    # The file can have more jobs. The table of this command has its own, in their order.
    return [run for job in jobs for run in runs if run["job"] == list(job)]

def lock_folder(folder):
    """An open file that locks the folder until it is closed. Two commands would lose results."""
    import fcntl  # is missing on Windows

    lock = open(folder / "lock", "w")
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):  # Some file systems have no locks.
            raise UserError(f"another command writes to --out {folder}") from None
    return lock

def made_by():
    """Command, commit of this folder, machine and versions, for a file of results.

    A script asks for them before its experiments, because a commit can follow while they run.
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

def end_with_parent():
    """Let this worker end when its parent ends, also if the parent is killed and cannot tell it."""
    def wait():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()

def finite(results):
    """The results {name: number} without NaN and infinity, which JSON does not have."""
    return {name: value for name, value in results.items() if math.isfinite(value)}

def save(content, path):
    """Write a file of results (.json) or a model (.pt)."""
    # A run can be killed while it writes. So a file gets its name when it is complete.
    temporary = path.with_name(f"{path.name}.tmp")
    if path.suffix == ".json":
        temporary.write_text(json.dumps(content, indent=1, default=str, allow_nan=False))
    else:
        torch.save(content, temporary)
    os.replace(temporary, path)

def summarize(runs, key):
    """{key(run): {"n": number of seeds, name of a result: {"mean": mean, "std": spread}}}.

    A result that is missing for one of the seeds is left out. The spread of one seed is NaN.
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
                row[name] = {"mean": np.mean(values), "std": spread}
    return summary

def number_of_seeds(summary):
    return next(iter(summary.values()))["n"]

def cell(row, name):
    """A result in a table, or a dash if `summarize` has left it out. One seed has no spread."""
    if name not in row:
        return "-"
    mean, std = row[name]["mean"], row[name]["std"]
    digits = 3 if abs(mean) < 10 else 1
    mean = round(float(mean), digits) + 0.0  # not -0.000
    return f"{mean:.{digits}f}" + ("" if math.isnan(std) else f" ± {std:.{digits}f}")
