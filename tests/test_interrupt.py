"""A run may be stopped at any moment, and nothing is lost: resumed, it ends with the weights of the run that was left alone."""
import errno
import json
import os
import random
import re
import signal
import subprocess
import sys
import time

import pytest
import torch

from data import UserError
from evaluate import write_json
from test_scripts import ROOT, TINY_LSMRL, fails, here, run, same_bits, tensors_of, together

LONGER = [*TINY_LSMRL, "--epochs", "4", "--steps", "30"]    # some seconds of training


@pytest.fixture(scope="module")
def whole(walkers, tmp_path_factory):
    """The run that was left alone."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    result = run("train.py", "--data", walkers, "--run", folder, *LONGER)
    assert result.returncode == 0, result.stderr
    return folder


def start(*command):
    return subprocess.Popen([sys.executable, "train.py", *map(str, command)], cwd=ROOT, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                            stderr=subprocess.PIPE, text=True, start_new_session=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


def same_run(a, b):
    """The same weights, bit for bit, the same optimizer, the same log but for the seconds."""
    same_bits(tensors_of(a), tensors_of(b))
    logs = [[{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in (folder / "log.jsonl").read_text().splitlines()]
            for folder in (a, b)]
    assert logs[0] == logs[1] and len(logs[0]) == 4
    assert json.loads((a / "results.json").read_text())["directions"] == json.loads((b / "results.json").read_text())["directions"]


def test_ctrl_c_saves_the_step_and_says_how_to_go_on(whole, walkers, tmp_path):
    process = start("--data", walkers, "--run", tmp_path / "run", *LONGER, "--workers", 1)
    seen = ""
    while not re.search(r"epoch 2/4 \d+/30 ", seen) and process.poll() is None:    # the bar skips numbers
        seen += process.stderr.read(1)
    os.killpg(process.pid, signal.SIGINT)    # as a terminal does: the loader processes get it too
    rest = process.communicate(timeout=60)[1]
    assert process.returncode == 130 and "Traceback" not in rest, rest
    message = rest.strip().splitlines()[-1]
    state = tensors_of(tmp_path / "run")
    assert state["epoch"] == 1 and 1 <= state["step"] < 30
    assert f"after step {state['step']} of epoch 2" in message and f"python train.py --resume {tmp_path / 'run'}" in message
    fails(here("train.py", "--resume", tmp_path / "run", "--steps", 1), "--steps 1", "interrupted")
    result = run("train.py", "--resume", tmp_path / "run")
    assert result.returncode == 0, result.stderr
    same_run(whole, tmp_path / "run")


def killed_five_times(folder, walkers, rng):
    """-> how many of the kills came while a file was being written."""
    while_writing, command = 0, ["--data", walkers, "--run", folder, *LONGER]
    for kill in range(5):
        process = start(*command)
        began, patience = time.time(), 10 if kill % 2 else rng.uniform(1.3, 3)
        while time.time() - began < patience and process.poll() is None:
            if kill % 2 and folder.exists() and any(name.endswith(".tmp") for name in os.listdir(folder)):
                while_writing += 1
                break
        process.kill()
        process.communicate()
        if (folder / "last.pt").exists():
            tensors_of(folder)    # readable, always
            command = ["--resume", folder]
        elif folder.exists():    # killed before the first save: nothing to go on with
            for path in folder.iterdir():
                path.unlink()
    result = run("train.py", *command)
    assert result.returncode == 0, result.stderr
    assert not [p for p in folder.iterdir() if p.name.endswith(".tmp")]
    return while_writing


def test_two_runs_killed_ten_times_end_as_the_run_that_was_left_alone(whole, walkers, tmp_path):
    folders = tmp_path / "a", tmp_path / "b"
    assert any(together(lambda folder: killed_five_times(folder, walkers, random.Random(folder.name)), *folders))
    for folder in folders:
        same_run(whole, folder)


def test_a_loss_that_is_not_finite_is_named_with_its_tracklets(whole, walkers, tmp_path):
    before = tensors_of(whole)
    before["model"]["bank"].fill_(0)
    before["model"]["prompts.words"].fill_(float("nan"))
    (tmp_path / "run").mkdir()
    torch.save(before, tmp_path / "run" / "last.pt")
    content = (tmp_path / "run" / "last.pt").read_bytes()
    fails(here("train.py", "--resume", tmp_path / "run", "--epochs", 5), "is nan in epoch 5, step 1;", "Train/000", "older and good")
    assert (tmp_path / "run" / "last.pt").read_bytes() == content


def test_a_read_only_folder_keeps_the_old_file_and_says_so(tmp_path, monkeypatch):
    (tmp_path / "results.json").write_text("before")
    for name in "open", "replace":    # refused at once, or at the last moment
        def refuse(*_):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        with monkeypatch.context() as patch:
            patch.setattr(*(("builtins.open", refuse) if name == "open" else (os, "replace", refuse)))
            with pytest.raises(UserError, match="results.json cannot be written .*Read-only file system.* untouched"):
                write_json(tmp_path / "results.json", {})
        assert (tmp_path / "results.json").read_text() == "before" and len(list(tmp_path.iterdir())) == 1


def test_a_full_disk_keeps_the_checkpoint_and_says_so(whole, tmp_path):
    import resource
    (tmp_path / "run").mkdir()
    content = (whole / "last.pt").read_bytes()
    (tmp_path / "run" / "last.pt").write_bytes(content)
    result = subprocess.run([sys.executable, "train.py", "--resume", tmp_path / "run", "--epochs", "5", "--steps", "1"], cwd=ROOT, text=True, capture_output=True,
                            preexec_fn=lambda: (signal.signal(signal.SIGXFSZ, signal.SIG_IGN), resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))))
    fails(result, "last.pt cannot be written", "untouched")
    assert (tmp_path / "run" / "last.pt").read_bytes() == content and not list((tmp_path / "run").glob("*.tmp"))
