"""What surrounds a run: flags, errors of one line, processes, whole files, checkpoints.

A mistake that a user can correct is a UserError, wherever it is found. `command` around main turns
it into one line and exit status 2. A log that breaks off (a full disk, a closed terminal) ends
nothing, because the files of a run are what counts.
"""

import argparse
import contextlib
import datetime
import errno
import functools
import math
import os
import socket
import sys
import threading
import time
import zipfile
from pathlib import Path

import torch
import torch.distributed as dist


class UserError(Exception):
    """What a user can correct, in one line."""


# ---- Command line --------------------------------------------------------------------------------
def command(main):
    """A decorator for the main function of a script. It reports a UserError in one line.

    Under torchrun, a process with such a line has five seconds in which the others stay quiet.
    """
    @functools.wraps(main)
    def run(argv=None):
        try:
            # Some terminals only take ASCII, and the name of a file may not be UTF-8.
            sys.stdout.reconfigure(errors="backslashreplace")
        except (AttributeError, OSError, ValueError):  # in a notebook, or the log is closed
            pass
        try:
            return main(argv)
        except UserError as error:
            message = " ".join(str(error).splitlines())
        except KeyboardInterrupt:
            warn(f"{script}: stopped")
            sys.exit(130)
        except RuntimeError:
            if world_size() > 1:
                # Perhaps another process has ended with a message, so that nobody answers this
                # one. Then torchrun has five seconds to end it before it prints this error.
                time.sleep(5)
            raise
        if rank() > 0:
            # Most mistakes are the same on all processes. The first process gets five seconds to
            # report them. Then torchrun ends this one.
            time.sleep(5)
            message = f"process {rank()}: {message}"
        warn(f"{script}: error: {message}")
        sys.exit(2)

    script = Path(main.__code__.co_filename).name
    return run


class Parser(argparse.ArgumentParser):
    """argparse whose --help has the defaults, and whose errors are UserErrors."""

    def __init__(self, description):
        super().__init__(description=description,
                         formatter_class=argparse.ArgumentDefaultsHelpFormatter)

    def error(self, message):
        raise UserError(message)


class Distinct(argparse.Action):
    """For flags with a list of values: none may be given twice, or its result would count twice."""

    def __call__(self, parser, namespace, values, option_string=None):
        for value in values:
            if values.count(value) > 1:
                raise argparse.ArgumentError(self, f"{value} is given twice")
        setattr(namespace, self.dest, values)


def number(kind, low, high=1e9):
    """An argparse type: a number from low to high. `kind` is int or float."""
    def number(text):  # argparse prints the name of this function: "invalid number value"
        value = kind(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"must be from {low} to {high:.10g}, got {text}")
        return value
    return number


def folder(text):
    """An argparse type: a path. An empty one would be the current folder."""
    if not text:
        raise argparse.ArgumentTypeError("is empty")
    return Path(text)


def available_cores():
    """The number of CPU cores of this job, which may be fewer than the machine has."""
    if hasattr(os, "sched_getaffinity"):  # Slurm and taskset give a job some of the cores.
        cores = len(os.sched_getaffinity(0))
    else:
        cores = os.cpu_count() or 1
    try:  # A container has a share of the time of all cores.
        microseconds, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        cores = min(cores, math.ceil(int(microseconds) / int(period)))
    except (OSError, ValueError):  # "max" is no limit.
        pass
    return max(1, cores)


# ---- Processes: torchrun starts one per GPU and sets these variables -----------------------------
def rank():
    return int(os.environ.get("RANK", 0))


def world_size():
    return int(os.environ.get("WORLD_SIZE", 1))


def say(*words):
    """Print on the first process only. If this is not possible any more, the run goes on."""
    if rank() == 0:
        try:
            print(*words, flush=True)
        except (OSError, ValueError):  # ValueError: standard output is closed.
            # What is still in the buffer would fail again when Python ends.
            sys.stdout = open(os.devnull, "w")


def warn(message):
    """Print a line for the user, on any process."""
    try:
        print(message, file=sys.stderr, flush=True)
    except (OSError, ValueError):
        sys.stderr = open(os.devnull, "w")


def start_processes():
    """The device of this process. Processes of torchrun find each other."""
    if world_size() > 1 and "RANK" not in os.environ:
        raise UserError("WORLD_SIZE is set, but RANK is not: start several processes with torchrun")
    if rank() >= world_size() or world_size() > 1 and "MASTER_ADDR" not in os.environ:
        raise UserError(f"this is process {rank()} of {world_size()}, and they cannot find each "
                        "other: start them with torchrun")
    cuda = torch.cuda.is_available()
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    device = torch.device(f"cuda:{local_rank}" if cuda else "cpu")
    if cuda:
        if local_rank >= torch.cuda.device_count():
            raise UserError(f"there are only {torch.cuda.device_count()} GPUs for the processes "
                            "here: lower --nproc_per_node")
        torch.cuda.set_device(device)
    if "TORCHELASTIC_RUN_ID" in os.environ:
        end_with_parent()
    if world_size() > 1:
        # Features and checkpoints go through the memory of the CPU, gradients through that of the
        # GPU. The other processes wait while the first one trains a linear probe.
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo",
                                timeout=datetime.timedelta(hours=2))
    return device


def end_with_parent(parent=None):
    """End this process soon after its parent, also if the parent is killed and cannot tell it.

    Otherwise it would go on, or wait for others for ever. `parent` is the process number of the
    parent. Without it, the parent must not have ended yet.
    """
    parent = parent or os.getppid()

    def wait():
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def from_first_process(value):
    """The value that the first process has, on all processes."""
    values = [value]
    if world_size() > 1:
        dist.broadcast_object_list(values, device=torch.device("cpu"))
    return values[0]


def check_equal_on_all_processes(settings):
    """Raise UserError if the settings {name: value} of a process are not those of the first one."""
    everywhere = [settings]
    if world_size() > 1:
        everywhere = [None] * world_size()
        dist.all_gather_object(everywhere, settings)
    for i, found in enumerate(everywhere):
        different = [name for name in settings if found[name] != everywhere[0][name]]
        if different:
            raise UserError(f"process {i} has other {', '.join(different)} than process 0. All "
                            "processes need the same flags and the same files")


# ---- The folder of a run -------------------------------------------------------------------------
def lock_folder(out):
    """Make the folder of a run, and lock it until the returned file is closed or this process ends.

    Raises UserError if another run has it. We lock with lockf and not with flock: a worker of a
    killed run would keep a flock, and the folder would stay locked.
    """
    import fcntl  # here, because Windows has none

    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = open(out / "lock", "a+")
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                lock.seek(0)
                owner = lock.read().strip()
                raise UserError(f"another run writes to --out {out}: process "
                                f"{owner or 'unknown'}") from None
            warn(f"warning: {out} cannot be locked ({error.strerror}). Do not start two runs with "
                 "the same --out")
        lock.truncate(0)
        lock.write(f"{os.getpid()} on {socket.gethostname()}\n")
        lock.flush()
    except OSError as error:
        raise UserError(f"cannot write to --out {out}: {error.strerror}") from error
    return lock


def write_whole(path, write):
    """Call write(temporary path), then move the file: a kill leaves the old file or the new one."""
    temporary = path.with_name(path.name + ".temporary")
    try:
        write(temporary)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save turns some errors into RuntimeError.
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise UserError(f"cannot write {path}, is the disk full? ({error})") from error


def save_file(content, path):
    """Write tensors and plain data, for `load_file`."""
    write_whole(path, lambda temporary: torch.save(content, temporary))


def load_file(path):
    """What torch.save has written. Raises ValueError if it was damaged since then."""
    if not os.path.isfile(path):
        raise OSError(f"{path} is no file")
    if zipfile.is_zipfile(path):  # Files of old versions of PyTorch have no checksums.
        with zipfile.ZipFile(path) as file:
            # torch.load does not compare the checksums. In the files that it writes, the field
            # external_attr of every part is 0. Another value can turn a tensor into a folder,
            # which is not read.
            damaged = file.testzip() or any(part.external_attr for part in file.infolist())
        if damaged:
            raise ValueError(f"{path} is damaged: its checksums are wrong")
    return torch.load(path, map_location="cpu", weights_only=True)


def load_checkpoint(path, parts, settings):
    """The checkpoint of an earlier run with these parts and settings: the same on all processes.

    None if there is no checkpoint. UserError if it cannot be read, or if it has other settings.
    """
    state = None
    if rank() == 0 and path.exists():
        try:
            state = load_file(path)
            missing = {*parts, "settings"} - state.keys()
            if missing:
                raise ValueError(f"it has no {missing.pop()}")
            old = state["settings"]
            changed = [name for name in settings | old if old.get(name) != settings.get(name)]
        except Exception as error:  # A damaged file leads to many kinds of errors.
            raise UserError(f"cannot read {path}. If it is damaged, or of another version, delete "
                            f"it to start again ({error!r:.300})") from error
        if changed:
            raise UserError(f"{path} has other settings ({', '.join(changed)}). Choose another "
                            "--out")
    return from_first_process(state)
