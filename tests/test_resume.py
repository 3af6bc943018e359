"""A run may stop at any moment: resumed, it ends with the bits of the run that was left alone."""
import functools
import json
import os
import shutil
import signal

from lsmrl import LSMRL
from scripts import OPTIONS, TINY_LSMRL, fails, here, log_of, results_of, succeeds, tensors_of
from support.files import write_atomic

import pytest
import torch


@pytest.fixture(scope="module")
def whole(walkers, tmp_path_factory):
    """A function: method -> the folder of a run of two epochs that nobody stopped."""
    @functools.cache
    def trained(method):
        folder = tmp_path_factory.mktemp("whole") / "run"
        new = ["--data", walkers, "--run", folder, *OPTIONS[method]]
        succeeds(here("train.py", *new, "--epochs", 2))
        return folder
    return trained


@pytest.fixture
def one_epoch(run_of, tmp_path):
    """A function: method -> a copy of its run of one epoch, to be changed."""
    def copied(method):
        return shutil.copytree(run_of(method), tmp_path / "parts")
    return copied


def same_run(a, b):
    """Two epochs: the same weights and optimizer, bit for bit, and the same log."""
    first, second = tensors_of(a), tensors_of(b)
    assert first["model"].keys() == second["model"].keys()
    for name, tensor in first["model"].items():
        assert torch.equal(tensor, second["model"][name]), name
    for number, state in first["optimizer"]["state"].items():
        for name, tensor in state.items():
            assert torch.equal(tensor, second["optimizer"]["state"][number][name]), name
    logs = [[[line[key] for key in ("epoch", "lr", "losses", "shown")] for line in log_of(folder)]
            for folder in (a, b)]
    assert logs[0] == logs[1] and [line[0] for line in logs[0]] == [1, 2]
    assert not list(b.glob("*.tmp"))


@pytest.mark.parametrize("method", OPTIONS)
def test_two_epochs_are_one_and_one_resumed(method, whole, one_epoch):
    """With a loader process on one side: they change nothing."""
    parts = one_epoch(method)
    succeeds(here("train.py", "--resume", parts, "--epochs", 2, "--workers", 1))
    same_run(whole(method), parts)
    assert results_of(parts)["directions"] == results_of(whole(method))["directions"]


def test_a_run_that_is_killed_is_resumed(whole, walkers, tmp_path):
    steps, forward = [], LSMRL.forward

    def killed_in_the_second_epoch(*given):
        steps.append(1)
        if len(steps) == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return forward(*given)

    new = ["--data", walkers, "--run", tmp_path / "run", *TINY_LSMRL, "--epochs", 2]
    child = os.fork()
    if child == 0:
        try:
            LSMRL.forward = killed_in_the_second_epoch
            here("train.py", *new)
        finally:
            os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert tensors_of(tmp_path / "run")["epoch"] == 1
    succeeds(here("train.py", "--resume", tmp_path / "run"))
    same_run(whole("lsmrl"), tmp_path / "run")


def test_ctrl_c_says_how_to_go_on(whole, one_epoch, monkeypatch):
    parts, forward = one_epoch("lsmrl"), LSMRL.forward

    def interrupted(*given):
        os.kill(os.getpid(), signal.SIGINT)
        return forward(*given)

    with monkeypatch.context() as patch:
        patch.setattr(LSMRL, "forward", interrupted)
        # A shell lets what it starts in the background ignore Ctrl-C.
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        result = here("train.py", "--resume", parts, "--epochs", 2, "--workers", 1)
        signal.signal(signal.SIGINT, before)
    assert result.returncode == 130 and f"train.py --resume {parts}" in result.stderr
    assert len(result.stderr.splitlines()) == 1 and tensors_of(parts)["epoch"] == 1
    succeeds(here("train.py", "--resume", parts, "--epochs", 2))
    same_run(whole("lsmrl"), parts)


def test_a_disk_that_fills_up_keeps_the_checkpoint(whole, one_epoch):
    resource, parts = pytest.importorskip("resource"), one_epoch("lsmrl")
    before = (parts / "last.pt").read_bytes()
    _, hard = limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, hard))
    try:
        result = here("train.py", "--resume", parts, "--epochs", 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    fails(result, "last.pt cannot be written", "untouched")
    assert (parts / "last.pt").read_bytes() == before and not list(parts.glob("*.tmp"))
    # The log knows the second epoch already, the checkpoint does not.
    assert len(log_of(parts)) == 2
    succeeds(here("train.py", "--resume", parts, "--epochs", 2))
    same_run(whole("lsmrl"), parts)


def test_a_failure_of_the_gpu_while_saving_is_not_one_of_the_disk(tmp_path):
    def write(file):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with pytest.raises(RuntimeError, match="CUDA error"):
        write_atomic(tmp_path / "last.pt", write)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("script, where, word", [
    ("train.py --resume", "forward", "--identities"),
    ("evaluate.py --checkpoint", "embed", "--test-batch")])
def test_a_full_gpu_is_one_line(script, where, word, one_epoch, monkeypatch):
    def full(*given):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    run = one_epoch("lsmrl")
    monkeypatch.setattr(LSMRL, where, full)
    more = ["--epochs", 2] if where == "forward" else []
    fails(here(*script.split(), run, *more), "memory is full", word)


def test_a_stop_at_the_last_moment_of_saving_keeps_the_checkpoint(one_epoch, monkeypatch):
    parts = one_epoch("lsmrl")
    before, replace = (parts / "last.pt").read_bytes(), os.replace

    def stopped(source, target):
        if os.path.basename(target) == "last.pt":
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", stopped)
    assert here("train.py", "--resume", parts, "--epochs", 2).returncode == 130
    assert (parts / "last.pt").read_bytes() == before and not list(parts.glob("*.tmp"))


def test_an_evaluation_that_a_stop_has_cost_is_made_up_for(one_epoch):
    parts = one_epoch("lsmrl")
    [line] = log_of(parts)
    stopped = {key: line[key] for key in ("epoch", "lr", "losses", "shown", "seconds")}
    (parts / "log.jsonl").write_text(json.dumps(stopped) + "\n")
    (parts / "results.json").unlink()
    succeeds(here("train.py", "--resume", parts, "--epochs", 2, "--evaluate-every", 1))
    first, second = log_of(parts)
    assert first == line and second["rank-1"].keys() == line["rank-1"].keys()


# --------------------------------------------------------------- refused ----

def test_a_folder_that_exists_is_refused(run_of, walkers):
    folder = run_of("lsmrl")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    new = ["--data", walkers, "--run", folder, *TINY_LSMRL]
    fails(here("train.py", *new), folder, "--resume")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_other_identities_another_method_and_no_checkpoint_are_refused(one_epoch, tmp_path):
    parts = one_epoch("lsmrl")
    fails(here("train.py", "--resume", parts, "--method", "dinogrl"), "dinogrl", "lsmrl")
    fails(here("train.py", "--resume", tmp_path / "nothing"), "nothing")
    torch.save({**tensors_of(parts), "classes": [1, 2, 3, 5]}, parts / "last.pt")
    fails(here("train.py", "--resume", parts, "--epochs", 2), "identities", "--data")


# ------------------------------------------------------------ other choices ----

def test_options_given_on_resuming_take_the_place_of_the_run_s(one_epoch):
    parts = one_epoch("lsmrl")
    words = ["--epochs", 2, "--lr", 1e-5, "--cosine", "off", "--boost", 7, "--weight-decay", 0.25]
    succeeds(here("train.py", "--resume", parts, *words))
    assert log_of(parts)[-1]["lr"] == pytest.approx(1e-5)
    slow, fast = tensors_of(parts)["optimizer"]["param_groups"]
    assert slow["weight_decay"] == 0.25 and fast["lr"] == pytest.approx(7e-5)


def test_an_optimizer_of_another_kind_resumes(walkers, tmp_path, monkeypatch):
    """On a dataset without a test set, which is trained on all the same."""
    def sgd(groups, lr, weight_decay, fused):
        groups[0]["weight_decay"] = 0.5    # of its own
        return torch.optim.SGD(groups, lr, momentum=0.9, weight_decay=weight_decay)

    monkeypatch.setattr(torch.optim, "AdamW", sgd)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train").symlink_to(walkers / "Train")    # PID/MODALITY/CAMERA
    for folder, epochs in ("whole", 2), ("parts", 1):
        new = ["--data", tmp_path / "data", "--run", tmp_path / folder, *TINY_LSMRL]
        succeeds(here("train.py", *new, "--epochs", epochs))
    succeeds(here("train.py", "--resume", tmp_path / "parts", "--epochs", 2))
    same_run(tmp_path / "whole", tmp_path / "parts")
    [state, *_] = tensors_of(tmp_path / "parts")["optimizer"]["state"].values()
    assert state.keys() == {"momentum_buffer"}
