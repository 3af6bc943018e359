"""Runs scripts, each in a process that it forks: torch is imported once, which takes seconds.

tests/scripts.py starts it, with a socket as standard input. A byte there begins a job and brings
three files: a socket of the job's own, what is to be its standard output, and standard error. On
the job's socket comes a line of JSON,

    {"script", "words", "cwd", "env", "moments", "limits", "reader"}

and what it answers, a line each, is "waiting", or the exit code. At each of the job's moments, the
number-th time that something happens, something is done: a signal, say.
"""
import atexit
import json
import os
import resource
import runpy
import signal
import socket
import sys
from contextlib import suppress

import evaluate
import support.files
import train
from support.options import cli

import torch._dynamo  # noqa: I001 - last, since it takes a second

channel = None    # the job's socket
readers = []


def do(what):
    if what == "SIGKILL":
        os.kill(os.getpid(), signal.SIGKILL)
    elif what == "wait":
        channel.write(b"waiting\n")
        channel.readline()
    elif what == "close":
        os.close(readers.pop())
    else:    # the loader processes get it too, as from a terminal
        os.killpg(0, getattr(signal, what))


class Cut:
    """A file; before its byte of that number is written, something is done."""

    def __init__(self, file, byte, what):
        self.file, self.left, self.what = file, byte, what

    def write(self, data):
        if 0 <= self.left < len(data):
            self.file.write(data[:self.left])
            self.file.flush()
            data, self.left = data[self.left:], -1
            do(self.what)
        self.left -= len(data)
        return self.file.write(data)

    def __getattr__(self, name):
        return getattr(self.file, name)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.file.close()


def at_the_moment(function, is_meant, number, what, byte=None):
    """The function; at its number-th call that is meant, something is done first, or once so many
    bytes are written."""
    def watched(*arguments, **named):
        nonlocal number
        number -= is_meant(*arguments)
        comes = number == 0 and is_meant(*arguments)
        if comes and byte is None:
            do(what)
        result = function(*arguments, **named)
        return Cut(result, byte, what) if comes and byte is not None else result
    return watched


def watch(at, number, what, file="", byte=None):
    calls = {"step": (train, "augment"), "evaluation": (train, "evaluate"),
             "pictures": (train, "draw_pictures"), "embedding": (evaluate, "normalise")}
    if at in calls:
        where, name = calls[at]
        watched = at_the_moment(getattr(where, name), lambda *_: True, number, what)
        setattr(where, name, watched)
    elif at == "replace":
        def is_target(source, target):
            return os.path.basename(target) == file
        os.replace = at_the_moment(os.replace, is_target, number, what)
    else:
        def is_temporary(path, *_):
            return os.path.basename(path).startswith(file + ".")
        support.files.open = at_the_moment(open, is_temporary, number, what, byte)


def work(job, files):
    """The job itself."""
    os.setsid()
    for stream, file in enumerate(files):
        os.dup2(file, stream)
        os.close(file)
    if job["reader"]:
        reader, writer = os.pipe()
        readers.append(reader)
        os.dup2(writer, 1)
    os.chdir(job["cwd"])
    os.environ.update(job["env"])
    for moment in job["moments"]:
        do(moment["what"]) if moment["at"] == "start" else watch(**moment)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    for name, limit in job["limits"].items():
        resource.setrlimit(getattr(resource, name), (limit, limit))
    sys.argv = [job["script"], *job["words"]]
    sys.path[0] = os.path.dirname(os.path.abspath(job["script"]))
    if job["moments"]:    # they change these modules, and not a second time what is in them
        cli({"train.py": train.main, "evaluate.py": evaluate.main}[job["script"]])
    else:
        run_whole(job["script"])


def run_whole(script):
    """A script, and the end of its process but for the clearing of torch's modules, which takes as
    long as a small run."""
    code = 0
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as stop:
        if not isinstance(stop.code, int):
            raise
        code = stop.code
    atexit._run_exitfuncs()
    sys.stdout.flush()
    os._exit(code)


def follow(own, out, err):
    """Does a job and tells its exit code."""
    global channel
    channel = os.fdopen(own, "r+b", buffering=0)
    job = json.loads(channel.readline())
    pid = os.fork()
    if pid == 0:
        return work(job, [os.open(os.devnull, os.O_RDONLY), out, err])
    os.close(out)
    os.close(err)
    status = os.waitpid(pid, 0)[1]
    channel.write(b"%d\n" % os.waitstatus_to_exitcode(status))
    return os._exit(0)


def serve():
    """Returns in the process of a job, and where there are no more."""
    jobs = socket.socket(fileno=0)
    while files := socket.recv_fds(jobs, 1, 3)[1]:
        if os.fork() == 0:
            return follow(*files)
        for file in files:
            os.close(file)
        with suppress(ChildProcessError):    # there are none
            while os.waitpid(-1, os.WNOHANG)[0]:    # one that has ended
                pass
    return None


# A power cut is no part of the tests, and a busy disk takes seconds for each file that is to
# outlive one. Nor is a worn-out disk: half the time of a checkpoint of a gigabyte is its checksums.
os.fsync = lambda file: None
torch.serialization.set_crc32_options(False)
signal.signal(signal.SIGINT, signal.default_int_handler)    # whatever the shell has left it at
serve()
