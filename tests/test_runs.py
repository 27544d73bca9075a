"""support/runs.py: flags, errors of one line, a log that breaks off, processes, files of a run.

Processes are forked, so that they do not import PyTorch again. They see each other as those of
torchrun do.
"""

import errno
import fcntl
import io
import multiprocessing
import os
import pickle
import resource
import signal
import socket
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
import torch

from support import runs
from support.runs import UserError

FORK = multiprocessing.get_context("fork")


def free_port():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def see_each_other(rank, world_size, port):
    """What torchrun does for a process on this machine."""
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), MASTER_ADDR="127.0.0.1",
                      MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo")


def together(count, function):
    """What function() returns, or the UserError that it raises, in each of `count` processes."""
    port = free_port()

    def child(rank, answer):
        torch.cuda.is_available = lambda: False  # A process that uses a GPU cannot be forked.
        see_each_other(rank, count, port)
        runs.start_processes()
        try:
            found = function()
        except UserError as error:
            found = error
        answer.send_bytes(pickle.dumps(found))

    processes, answers, found = [], [], []
    for rank in range(count):
        receive, send = FORK.Pipe(duplex=False)
        processes.append(FORK.Process(target=child, args=(rank, send)))
        processes[-1].start()
        send.close()  # A process that dies leaves an EOFError, and not a wait for ever.
        answers.append(receive)
    for process, answer in zip(processes, answers):
        assert answer.poll(100)
        found.append(pickle.loads(answer.recv_bytes()))
        process.join()
    return found


def in_a_process(function):
    """What function() returns in a process of its own, whose limits and patches end with it."""
    receive, send = FORK.Pipe(duplex=False)
    process = FORK.Process(target=lambda: send.send(function()))
    process.start()
    send.close()
    assert receive.poll(100)
    found = receive.recv()
    process.join()
    return found


def wait_for(condition, seconds=60):
    end = time.time() + seconds
    while not condition():
        assert time.time() < end
        time.sleep(0.005)


def is_running(pid):
    """A zombie has ended. It only waits for somebody who asks for its exit status."""
    try:
        return ") Z " not in Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False


needs_proc = pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="there is no /proc")


# ---- Command line --------------------------------------------------------------------------------
def test_a_mistake_is_one_line_and_the_first_process_has_five_seconds_to_report_it(
        monkeypatch, capsys):
    waited = []
    monkeypatch.setattr(runs.time, "sleep", waited.append)

    @runs.command
    def main(argv=None):
        raise UserError(f"no {argv}\nin two lines")

    for rank, seconds, line in (("0", [], "no x in two lines"),
                                ("1", [5], "process 1: no x in two lines")):
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(SystemExit, match="^2$"):
            main("x")
        assert waited == seconds
        assert capsys.readouterr().err == f"test_runs.py: error: {line}\n"


def test_other_errors_stay_and_torchrun_has_five_seconds_to_end_the_other_processes(monkeypatch):
    """If a process ends with a message, the others fail because it does not answer."""
    waited = []
    monkeypatch.setattr(runs.time, "sleep", waited.append)
    for rank, processes, error, seconds in (
            ("0", "1", RuntimeError("x"), []), ("1", "2", ValueError("x"), []),
            ("0", "2", RuntimeError("x"), [5]), ("1", "2", RuntimeError("x"), [5, 5])):
        @runs.command
        def main(argv=None, error=error):
            raise error

        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("WORLD_SIZE", processes)
        with pytest.raises(type(error), match="^x$") as found:
            main()
        assert found.value is error and waited == seconds


def test_ctrl_c_is_one_line(capsys):
    @runs.command
    def main(argv=None):
        raise KeyboardInterrupt

    with pytest.raises(SystemExit, match="^130$"):
        main()
    assert capsys.readouterr().err == "test_runs.py: stopped\n"


@pytest.mark.parametrize("rank, processes, address", [
    ("2", "2", "127.0.0.1"), ("1", "1", "127.0.0.1"), ("0", "2", "")])
def test_processes_that_cannot_find_each_other_are_told_how(rank, processes, address, monkeypatch):
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", processes)
    if address:
        monkeypatch.setenv("MASTER_ADDR", address)
    else:
        monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(UserError, match=f"process {rank} of {processes}.*with torchrun"):
        runs.start_processes()


def test_a_command_prints_any_text_and_returns_what_it_returns(monkeypatch):
    """Some terminals only take ASCII, and in a notebook standard output is another object."""
    @runs.command
    def main(argv=None):
        """Its text."""
        print("caf\xe9 \udce9")
        return argv

    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    assert main(["a"]) == ["a"] and main() is None and main.__doc__ == "Its text."
    sys.stdout.flush()
    assert sys.stdout.buffer.getvalue() == 2 * b"caf\\xe9 \\udce9\n"
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    assert main("b") == "b" and sys.stdout.getvalue() == "caf\xe9 \udce9\n"


def parser():
    parser = runs.Parser("A script.")
    parser.add_argument("--count", type=runs.number(int, 2, 5000), default=3, help="how many")
    parser.add_argument("--share", type=runs.number(float, 0))
    parser.add_argument("--out", type=runs.folder)
    parser.add_argument("--seeds", type=int, nargs="+", action=runs.Distinct, default=[0])
    return parser


def test_flags_have_bounds_and_lists_have_distinct_values():
    args = parser().parse_args(["--count", "5000", "--share", "1e9", "--out", "a/b", "--seeds", "2",
                                "0", "1"])
    assert (args.count, args.share, args.out) == (5000, 1e9, Path("a/b"))
    assert args.seeds == [2, 0, 1] and parser().parse_args([]).seeds == [0]
    assert type(parser().parse_args(["--share", "0"]).share) is float
    assert "how many (default: 3)" in parser().format_help()


@pytest.mark.parametrize("argv, message", [
    (["--count", "1"], "argument --count: must be from 2 to 5000, got 1"),
    (["--count", "5001"], "argument --count: must be from 2 to 5000, got 5001"),
    (["--count", "2.5"], "argument --count: invalid number value: '2.5'"),
    (["--share", "1000000001"], "argument --share: must be from 0 to 1000000000, got 1000000001"),
    (["--share", "-1"], "argument --share: must be from 0 to 1000000000, got -1"),
    (["--share", "nan"], "argument --share: must be from 0 to 1000000000, got nan"),
    (["--share", "inf"], "argument --share: must be from 0 to 1000000000, got inf"),
    (["--out", ""], "argument --out: is empty"),
    (["--seeds", "1", "2", "01"], "argument --seeds: 1 is given twice"),
    (["--what"], "unrecognized arguments: --what")])
def test_wrong_flags_are_mistakes_of_the_user(argv, message):
    with pytest.raises(UserError) as error:
        parser().parse_args(argv)
    assert str(error.value) == message


@pytest.mark.parametrize("limit, of_six, of_all", [
    ("max 100000", 6, 64), (None, 6, 64), ("", 6, 64), ("1600000 100000", 6, 16),
    ("200000 100000", 2, 2), ("150000 100000", 2, 2), ("20000 100000", 1, 1)])
def test_cores_are_those_of_the_job_and_of_the_container(limit, of_six, of_all, tmp_path,
                                                         monkeypatch):
    """A container has a share of the time of all cores, which is rounded up."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {*range(2, 8)}, raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    file = tmp_path / "sys/fs/cgroup/cpu.max"
    file.parent.mkdir(parents=True)
    if limit is not None:
        file.write_text(f"{limit}\n")
    monkeypatch.setattr(runs, "Path", lambda path: tmp_path / path.lstrip("/"))
    assert runs.available_cores() == of_six
    monkeypatch.delattr(os, "sched_getaffinity")  # as on macOS
    assert runs.available_cores() == of_all
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert runs.available_cores() == 1


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system has no affinity")
def test_a_job_on_one_core_has_one():
    def on_one_core():
        os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])
        return runs.available_cores()
    assert in_a_process(on_one_core) == 1


# ---- A log that breaks off -----------------------------------------------------------------------
def closed():
    file = open(os.devnull, "w")
    file.close()
    return file


def without_reader():
    """A pipe whose other end is closed, as in `script | head -1`."""
    receive, send = os.pipe()
    os.close(receive)
    return open(send, "w")


def on_a_full_disk():
    return open("/dev/full", "w")


needs_full = pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
def close_broken(file):
    """What the file still has cannot be written, and must not fail in the test that comes next."""
    try:
        file.close()
    except OSError:
        pass


LOGS = [closed, without_reader, pytest.param(on_a_full_disk, marks=needs_full)]


@pytest.mark.parametrize("break_off", LOGS)
@pytest.mark.parametrize("stream, speak", [("stdout", runs.say), ("stderr", runs.warn)])
def test_a_log_that_breaks_off_raises_nothing(stream, speak, break_off, monkeypatch):
    """Neither at once nor later, when others print or when the stream is flushed at the end."""
    broken = break_off()
    monkeypatch.setattr(sys, stream, broken)
    for _ in range(2):
        speak("a line")
    print("another line", file=getattr(sys, stream), flush=True)
    assert getattr(sys, stream) is not broken
    close_broken(broken)


@pytest.mark.parametrize("break_off", LOGS)
def test_a_command_reports_a_mistake_without_a_log(break_off, monkeypatch, capsys):
    """Its exit status is 2 even if the line cannot be printed."""
    @runs.command
    def main(argv=None):
        raise UserError("no x")

    for stream, text in (("stdout", "test_runs.py: error: no x\n"), ("stderr", "")):
        with monkeypatch.context() as patch, pytest.raises(SystemExit, match="^2$"):
            broken = break_off()
            patch.setattr(sys, stream, broken)
            main()
        assert capsys.readouterr().err == text
        close_broken(broken)


@needs_full
def test_a_log_that_breaks_off_does_not_change_the_exit_status():
    """A real interpreter, which flushes its streams at the end. It has an empty torch."""
    code = ("import sys, types; torch = types.ModuleType('torch')\n"
            "torch.distributed = types.ModuleType('torch.distributed')\n"
            "sys.modules.update({'torch': torch, 'torch.distributed': torch.distributed})\n"
            "from support.runs import command, say\n"
            "@command\n"
            "def main(argv=None):\n"
            "    say('one'); say('two'); print('three')\n"
            "main()\n")
    with open("/dev/full", "w") as full:
        process = subprocess.run([sys.executable, "-c", code], cwd=Path(runs.__file__).parents[1],
                                 stdout=full, stderr=subprocess.PIPE, text=True)
    assert (process.returncode, process.stderr) == (0, "")


def test_only_the_first_process_says_something_and_all_of_them_warn(monkeypatch, capsys):
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        runs.say("process", int(rank))
        runs.warn(f"warning of {rank}")
    found = capsys.readouterr()
    assert (found.out, found.err) == ("process 0\n", "warning of 0\nwarning of 1\n")


# ---- Processes -----------------------------------------------------------------------------------
def test_all_processes_get_the_value_of_the_first_one():
    value = {"weights": torch.arange(3), "epoch": 7}
    found = together(3, lambda: runs.from_first_process(value if runs.rank() == 0 else "other"))
    for one in found:
        assert one["epoch"] == 7 and torch.equal(one["weights"], torch.arange(3))
    assert runs.from_first_process(value) is value  # without other processes


def test_settings_that_are_not_those_of_the_first_process_are_named():
    def check(*of_process):
        return together(3, lambda: runs.check_equal_on_all_processes(of_process[runs.rank()]))

    same = {"lr": 0.1, "images": "abc", "validation": None}
    assert check(same, dict(same), dict(same)) == [None, None, None]
    for error in check(same, same, {"lr": 0.2, "images": "abc", "validation": "x"}):
        assert isinstance(error, UserError) and str(error).startswith(
            "process 2 has other lr, validation than process 0. All processes need the same")
    runs.check_equal_on_all_processes(same)  # without other processes


def test_several_processes_are_started_with_torchrun(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(UserError, match="WORLD_SIZE is set, but RANK is not"):
        runs.start_processes()


def test_processes_of_torchrun_end_with_it_and_others_go_on(monkeypatch):
    ends = []
    monkeypatch.setattr(runs, "end_with_parent", lambda: ends.append("with torchrun"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert runs.start_processes() == torch.device("cpu") and ends == []
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    runs.start_processes()
    assert ends == ["with torchrun"]


def family(in_parent=lambda: None, in_child=lambda: None):
    """Fork a process that calls in_parent() and forks a child, which calls in_child().

    Returns the process, and the id of the child. Then both do nothing.
    """
    receive, send = FORK.Pipe(duplex=False)

    def parent():
        kept = in_parent()
        if os.fork() == 0:
            in_child()
            send.send(os.getpid())
        signal.pause()
        del kept

    process = FORK.Process(target=parent)
    process.start()
    assert receive.poll(20)
    return process, receive.recv()


@needs_proc
def test_a_process_ends_with_its_parent_and_not_before(monkeypatch):
    """Also if the parent is killed, so that it cannot tell its child."""
    plain_sleep = time.sleep
    monkeypatch.setattr(runs.time, "sleep", lambda seconds: plain_sleep(seconds / 50))
    parent, child = family(in_child=runs.end_with_parent)
    plain_sleep(0.2)
    assert is_running(child)
    parent.kill()
    parent.join()
    wait_for(lambda: not is_running(child), seconds=10)


@needs_proc
def test_a_process_whose_parent_has_ended_already_ends_too(monkeypatch):
    """It was killed while the child imported torch, so the child's parent is another one now."""
    ended = FORK.Process(target=lambda: None)
    ended.start()
    ended.join()
    plain_sleep = time.sleep
    monkeypatch.setattr(runs.time, "sleep", lambda seconds: plain_sleep(seconds / 50))

    def child():
        runs.end_with_parent(ended.pid)
        signal.pause()

    process = FORK.Process(target=child, daemon=True)  # It does not outlive this test.
    process.start()
    process.join(10)
    assert process.exitcode == 1


# ---- The folder of a run -------------------------------------------------------------------------
def locked(out):
    """The message that a second process gets, or None if the folder is free."""
    def lock():
        try:
            runs.lock_folder(out).close()
        except UserError as error:
            return str(error)
    return in_a_process(lock)


def test_a_folder_is_made_and_belongs_to_one_process(tmp_path):
    out = tmp_path / "deep" / "run"
    lock = runs.lock_folder(out)
    assert locked(out) == (f"another run writes to --out {out}: process {os.getpid()} on "
                           f"{socket.gethostname()}")
    assert (out / "lock").read_text() == f"{os.getpid()} on {socket.gethostname()}\n"
    lock.close()
    assert locked(out) is None
    runs.lock_folder(out).close()
    assert (out / "lock").read_text() == f"{os.getpid()} on {socket.gethostname()}\n"


@needs_proc
def test_a_child_of_a_killed_run_does_not_keep_the_lock(tmp_path):
    """A worker that loads images lives on for some seconds, and has all open files of the run."""
    process, child = family(in_parent=lambda: runs.lock_folder(tmp_path))
    try:
        assert f"process {process.pid} on" in locked(tmp_path)
        process.kill()
        process.join()
        assert is_running(child) and locked(tmp_path) is None
    finally:
        os.kill(child, signal.SIGKILL)


def test_a_file_system_without_locks_gets_a_warning(tmp_path, monkeypatch, capsys):
    def lockf(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", lockf)
    runs.lock_folder(tmp_path).close()
    assert capsys.readouterr().err == (f"warning: {tmp_path} cannot be locked (No locks available)."
                                       " Do not start two runs with the same --out\n")
    assert str(os.getpid()) in (tmp_path / "lock").read_text()


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    for out in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(UserError, match=f"^cannot write to --out {out}: "):
            runs.lock_folder(out)


@pytest.mark.parametrize("write", [
    lambda path: path.write_text("new" * 10_000), lambda path: torch.save(torch.ones(9999), path)])
def test_a_full_disk_leaves_the_old_file_and_nothing_else(write, tmp_path):
    """Here a process may not write more than 5000 bytes into a file."""
    path = tmp_path / "file.pt"
    path.write_text("old")

    def write_too_much():
        resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))
        try:
            runs.write_whole(path, write)
        except UserError as error:
            return str(error)

    assert in_a_process(write_too_much).startswith(f"cannot write {path}, is the disk full? (")
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["file.pt"]
    runs.write_whole(path, write)
    assert path.stat().st_size > 5000 and os.listdir(tmp_path) == ["file.pt"]


def test_a_file_is_not_there_before_it_is_whole(tmp_path):
    def write(path):
        path.write_text("half")
        assert path.parent == tmp_path and (tmp_path / "file").read_text() == "old"
        path.write_text("whole")

    (tmp_path / "file").write_text("old")
    runs.write_whole(tmp_path / "file", write)
    assert (tmp_path / "file").read_text() == "whole"


def test_no_bit_of_a_file_can_flip_unseen(tmp_path):
    """What can still be read is what was written. torch.load alone would take other weights."""
    content = {"weights": torch.arange(3.0), "history": [{"epoch": 1}], "seed": 3}
    torch.save(content, tmp_path / "file.pt")
    whole = (tmp_path / "file.pt").read_bytes()
    assert repr(runs.load_file(tmp_path / "file.pt")) == repr(content)
    weights, refused = whole.index(content["weights"].numpy().tobytes()), set()
    flips = [(place, 1 << place % 8) for place in range(0, len(whole), 3)]
    # A part of the file with numbers becomes a folder, which torch.load does not read.
    entry = whole.rindex(b"PK\x01\x02", 0, whole.rindex(b"/data/0"))
    flips.append((entry + 38, 0x10))
    for place, bit in flips:
        damaged = bytearray(whole)
        damaged[place] ^= bit
        (tmp_path / "file.pt").write_bytes(damaged)
        try:
            found = runs.load_file(tmp_path / "file.pt")
        except Exception:
            refused.add(place)
        else:
            assert repr(found) == repr(content), place
    assert refused >= {place for place in range(weights, weights + 12) if place % 3 == 0}


def test_only_whole_files_of_weights_are_loaded(tmp_path):
    """No other kind of pickle, which could call any function."""
    file = tmp_path / "file.pt"
    with pytest.raises(OSError, match="file.pt is no file"):
        runs.load_file(file)
    with pytest.raises(OSError, match=f"{tmp_path} is no file"):
        runs.load_file(tmp_path)
    os.mkfifo(file)  # Opening it would wait for ever.
    with pytest.raises(OSError, match="file.pt is no file"):
        runs.load_file(file)
    file.unlink()
    torch.save({"weights": types.SimpleNamespace()}, file)
    with pytest.raises(pickle.UnpicklingError):
        runs.load_file(file)


def test_a_checkpoint_is_that_of_the_first_process(tmp_path):
    """The others may not see its folder, or find other files there."""
    state = {"model": torch.arange(3), "settings": {"lr": 0.1, "images": "x"}}
    torch.save(state, tmp_path / "checkpoint.pt")
    (tmp_path / "damaged.pt").touch()

    def load():
        path = tmp_path / ("checkpoint.pt" if runs.rank() == 0 else "damaged.pt")
        return runs.load_checkpoint(path, ("model",), {"images": "x", "lr": 0.1})

    for found in together(2, load):
        assert torch.equal(found["model"], torch.arange(3))
        assert found["settings"] == state["settings"]
    assert runs.load_checkpoint(tmp_path / "nothing.pt", ("model",), {}) is None


@pytest.mark.parametrize("change, message", [
    ({"settings": {"lr": 0.2, "seed": 1, "images": "x"}}, "has other settings (lr, seed)"),
    ({"settings": {"lr": 0.1}}, "has other settings (images)"),  # a version without this flag
    ({"settings": {"lr": 0.1, "images": "x", "old": 1}}, "has other settings (old)"),
    ({"model": None, "weights": 1}, None),
    ({"settings": 3}, "If it is damaged, or of another"),
    ({"settings": None}, "it has no settings"),
    ({"history": None}, "it has no history")])
def test_a_checkpoint_of_another_run_is_refused(change, message, tmp_path):
    """In `change`, None leaves a part out."""
    state = {"model": 1, "history": [], "settings": {"lr": 0.1, "images": "x"}} | change
    torch.save({name: part for name, part in state.items() if part is not None}, tmp_path / "c.pt")
    with pytest.raises(UserError) as error:
        runs.load_checkpoint(tmp_path / "c.pt", ("model", "history"), {"lr": 0.1, "images": "x"})
    starts = (f"{tmp_path}/c.pt has other", f"cannot read {tmp_path}/c.pt. If it is damaged")
    assert str(error.value).startswith(starts)
    assert (message or "it has no model") in str(error.value)
