"""Scripts as a user runs them: run("train.py", "--data", ...) in a process of its own, here(...) in
this one, seconds sooner. Both with one thread: the same sums in the same order."""
import io
import json
import os
import runpy
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from types import SimpleNamespace

import torch

ROOT = Path(__file__).parent.parent
# Runs of a second: the small presets, smaller still.
TINY = str.split(
    "--preset small --epochs 1 --steps 2 --identities 2 --frames 2 --mask-warmup 2 --workers 0 "
    "--width 8 --dim 8 --dino-size 112 56 --code-size 16 8 --size 64 32 --test-frames 0")
TINY_LSMRL = str.split(
    "--method lsmrl --preset small --epochs 1 --steps 2 --identities 2 --frames 2 --size 64 32 "
    "--groups 2 --workers 0 --test-frames 0 --evaluate-first off")
OPTIONS = {"dinogrl": TINY, "lsmrl": TINY_LSMRL}


def run(*words, cwd=ROOT, env=None):
    command = [sys.executable, *map(str, words)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", **(env or {})}
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True)


def here(script, *words):
    out, err, argv, code = io.StringIO(), io.StringIO(), sys.argv, 0
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    sys.argv = [script, *map(str, words)]
    try:
        with redirect_stdout(out), redirect_stderr(err):
            runpy.run_path(str(ROOT / script), run_name="__main__")
    except SystemExit as stop:
        code = stop.code or 0
    finally:
        sys.argv = argv
        torch.set_num_threads(threads)
    return SimpleNamespace(returncode=code, stdout=out.getvalue(), stderr=err.getvalue())


def succeeds(result):
    """Its argument, whose exit code is 0."""
    assert result.returncode == 0 and "Traceback" not in result.stderr, result.stderr
    return result


def fails(result, *words):
    """Exit code 2, one line of error that holds all the words, no traceback."""
    lines = result.stderr.splitlines()
    assert result.returncode == 2 and len(lines) == 1, result.stderr
    assert all(str(word) in lines[0] for word in words), lines[0]


def tensors_of(folder):
    return torch.load(Path(folder) / "last.pt", weights_only=True)


def log_of(folder):
    return [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text().splitlines()]


def results_of(folder):
    return json.loads((Path(folder) / "results.json").read_text())
