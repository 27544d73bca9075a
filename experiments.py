"""What the experiments share: flags, processes, result files, and tables. Not the method.

Each experiment is a function of a seed and more. It runs once per job, in several processes, and
gives numbers. Here they become means and standard deviations over the seeds.
"""

import itertools
import json
import math
import multiprocessing
import os
import signal
import threading
import time
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import torch

# The scripts take these three from here as well. In some notebooks matplotlib can only be imported
# after train_inat.
from train_inat import Figure, number, print_any_text

def parse(parser, argv):
    """The arguments. In a list no value may stand twice, because its result would count twice."""
    args = parser.parse_args(argv)
    for name, values in vars(args).items():
        for value in values if isinstance(values, list) else ():
            if values.count(value) > 1:
                parser.error(f"argument --{name}: {value} is given twice")
    return args

def run_in_processes(experiment, jobs, args):
    """The results of experiment(*job, args) for all jobs, by `args.workers` processes."""
    began, results = time.time(), []
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
    with ProcessPoolExecutor(args.workers, multiprocessing.get_context("spawn"),
                             initializer=end_with_parent) as pool:
        try:
            for result in pool.map(experiment, *zip(*jobs), itertools.repeat(args)):
                results.append(result)
                left = (time.time() - began) * (len(jobs) / len(results) - 1)
                print(f"{len(results)} of {len(jobs)} runs done, about {left:.0f} s left",
                      flush=True)
        except BaseException:  # an error, or KeyboardInterrupt
            for process in multiprocessing.active_children():
                process.kill()
            raise
    return results

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

    A result that is missing for one of the seeds is left out.
    """
    groups, summary = {}, {}
    for run in runs:
        groups.setdefault(key(run), []).append(run["results"])
    for group, results in groups.items():
        summary[group] = row = {"n": len(results)}
        for name in results[0]:
            if all(name in result for result in results):
                values = [result[name] for result in results]
                spread = np.std(values, ddof=min(1, len(values) - 1))
                row[name] = {"mean": np.mean(values), "std": spread}
    return summary

def number_of_seeds(summary):
    return next(iter(summary.values()))["n"]

def cell(row, name):
    """A result in a table, or a dash if `summarize` has left it out."""
    return "{mean:.3f} ± {std:.3f}".format(**row[name]) if name in row else "-"
