"""Several processes (torchrun, gloo): the loss and the gradients of one process on the same batch;
a run of two is saved, resumed, evaluated; whoever dies takes the others along."""
import json
import os
import signal
import sys
import time
from datetime import timedelta
from functools import partial
from pathlib import Path
from tempfile import TemporaryFile

import train
from data import INFRARED, VISIBLE, IdentitySampler, Tracklet
from scripts import (
    ROOT,
    TINY,
    fails,
    here,
    results_of,
    same_bits,
    small_network,
    start,
    succeeds,
    tensors_of,
)
from support import options, parallel
from support.files import UserError
from support.options import cli
from support.parallel import check_parent, join, processes, shared, wait_for_all

import pytest
import torch
import torch.distributed as dist

SMALLER = ["--dino-size", "112", "56"]


TORCHRUN = "from torch.distributed.run import main; main()"
# Its processes have torch already: seconds. They are its own children, in sessions of their own.
FORKING_TORCHRUN = """
import os
import runpy
import subprocess
import sys

import support.parallel

import torch.distributed.run


class Forked(subprocess.Popen):
    def _execute_child(self, words, executable, preexec, close, pass_fds, cwd, env, *_):
        self.pid, self._child_created = os.fork(), True
        if self.pid == 0:
            code = 1
            try:
                os.setsid()
                support.parallel.parent = os.getppid()    # as if imported only now
                os.environ.update(env)
                sys.path[:0] = env["PYTHONPATH"].split(os.pathsep)
                sys.argv = list(words[words.index("-u") + 1:])
                runpy.run_path(sys.argv[0], run_name="__main__")
            except SystemExit as stop:
                code = stop.code
            finally:    # torchrun's own frames are below
                os._exit(code)


handler = sys.modules["torch.distributed.elastic.multiprocessing.subprocess_handler."
                      "subprocess_handler"]
handler.Popen = Forked
torch.distributed.run.main()
"""


class Torchrun:
    """A function of this file, in two processes that torchrun starts."""

    def __init__(self, function, folder, *arguments, forked=False):
        program, torchrun = folder / f"{function}.py", folder / "torchrun.py"
        code = f"import sys, test_parallel; test_parallel.{function}(*sys.argv[1:])"
        program.write_text(code)
        torchrun.write_text(FORKING_TORCHRUN if forked else TORCHRUN)
        path = os.pathsep.join([str(ROOT / "tests"), str(ROOT)])
        reader, writer = os.pipe()
        self.out, self.err = os.fdopen(reader), TemporaryFile("w+")    # noqa: SIM115 - lives on
        with os.fdopen(writer) as out:
            self.job = start(torchrun, "--nproc_per_node=2", "--", program, folder, *arguments,
                             env={"PYTHONPATH": path}, files=[out, self.err])

    def end(self):
        """-> its exit code, and what all have printed."""
        with self.out, self.err:
            out = self.out.read()    # it ends when no process holds it any more
            returncode = int(self.job.answer())
            self.err.seek(0)
            return returncode, out, self.err.read()


def train_with(words):
    sys.argv = ["train.py", *words]
    train.main()


# ------------------------------------------------------ one step of one batch ----

def small_model(name):
    model = small_network(name)
    for child, part in model.named_children():
        if name == "dinogrl" and not child.endswith("head"):
            # On a CPU each process has batch norms and dropout of its own.
            part.eval()
    return model


def step(name):
    """A training step on four identities, all of them or this process's -> its losses and
    gradients."""
    rank, world = processes()
    model = small_model(name)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        # What starts at zero would hide its gradient's way.
        parameter.data += 0.02 * torch.randn(parameter.shape, generator=generator)
    frames = torch.randn(16, 2, 3, 64, 32, generator=generator)
    label = torch.tensor([0, 0, 1, 1, 3, 3, 5, 5]).repeat(2)
    modality = torch.arange(16) // 8    # the visible ones first
    shares = [[0, 1, 3, 5]] if world == 1 else [[0, 3], [1, 5]]
    mine = torch.isin(label, torch.tensor(shares[rank]))
    data_parallel = shared(model, torch.device("cpu"))
    losses, shown = data_parallel(frames[mine], modality[mine], label[mine])
    sum(losses.values()).backward()
    gradients = {key: parameter.grad for key, parameter in model.named_parameters()
                 if parameter.grad is not None}
    return {"losses": {key: loss.detach() for key, loss in losses.items()}, "shown": shown,
            "gradients": gradients}


def steps():
    """One of each method, in float64: in float32 the gradients of PBMGE's scalars, large ones that
    cancel, are half rounding."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "float", torch.Tensor.double)
        torch.set_default_dtype(torch.float64)
        try:
            return {name: step(name) for name in ("lsmrl", "dinogrl")}
        finally:
            torch.set_default_dtype(torch.float32)


# ------------------------------------------------------- what two processes do ----

def everything(folder, commands):
    """In each of two processes: the steps, the runs of which the last one is refused."""
    def main():
        join("cpu")
        torch.save(steps(), Path(folder) / f"steps-{processes()[0]}.pt")
        train.leave = stay
        for words in json.loads(commands):
            train_with(words)

    if options.rank_of_process() == 1:
        options.take_turn = wait_for_the_end
    cli(main)


def stay():
    """In place of leave: the next run is these processes' too."""


def wait_for_the_end():
    """What all have to say is said by the first: torchrun ends the other meanwhile."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.pause()


@pytest.fixture(scope="module")
def two(walkers, tmp_path_factory):
    """What two processes have left: their folder, stdout and stderr."""
    folder = tmp_path_factory.mktemp("two")
    new = ["--data", str(walkers), *TINY, *SMALLER]
    whole, parts = str(folder / "whole"), str(folder / "parts")
    commands = [[*new, "--run", whole, "--epochs", "2"], [*new, "--run", parts],
                ["--resume", parts, "--epochs", "2"],
                ["--data", str(folder / "nowhere"), "--run", str(folder / "refused")]]
    returncode, out, err = Torchrun("everything", folder, json.dumps(commands)).end()
    assert returncode == 1 and (folder / "steps-1.pt").exists(), err
    return folder, out, err


def test_two_processes_have_the_loss_and_the_gradients_of_one(two):
    folder = two[0]
    one = steps()
    first, second = (torch.load(folder / f"steps-{rank}.pt", weights_only=True) for rank in (0, 1))
    # Means over a process's own frames: their mean is the whole's.
    local = ("mask", "smooth_mask", "smooth_part", "diversity")
    for method in one:
        for name, loss in one[method]["losses"].items():
            pair = first[method]["losses"][name], second[method]["losses"][name]
            mean = sum(pair) / 2
            assert torch.isclose(mean, loss, rtol=1e-9, atol=1e-12), (method, name)
            # All others see the gathered batch.
            assert name in local or torch.isclose(*pair, rtol=1e-9), (method, name)
        assert one[method]["shown"].keys() == first[method]["shown"].keys()
        expected = one[method]["gradients"]
        largest = max(gradient.abs().max() for gradient in expected.values())
        for found in first[method]["gradients"], second[method]["gradients"]:
            assert found.keys() == expected.keys() and len(expected) > 50
            for name, gradient in expected.items():
                error = (found[name] - gradient).abs().max()
                assert error < 1e-9 * largest, (method, name)


def test_a_run_of_two_is_logged_saved_resumed_and_evaluated_once(two, tmp_path):
    folder, out, err = two
    whole, parts = folder / "whole", folder / "parts"
    assert out.count("infrared->visible") == out.count("2 x cpu") == 3, out
    assert "Warning" not in err and "\r" not in out + err
    assert err.count("epoch 1/2 2/2 [") == 1 and err.count("epoch 2/2 2/2 [") == 2, err
    assert sorted(os.listdir(whole)) == ["config.json", "curves.png", "last.pt", "lock",
                                         "log.jsonl", "results.json", "silhouettes-2.png"]
    # Dropout too goes on where each process was.
    same_bits(tensors_of(whole), tensors_of(parts))
    succeeds(here("evaluate.py", "--checkpoint", whole, "--json", tmp_path / "r.json"))
    alone = json.loads((tmp_path / "r.json").read_text())
    for direction, result in alone["directions"].items():
        assert result == pytest.approx(results_of(whole)["directions"][direction], abs=1e-6)


def test_what_two_processes_refuse_is_said_once(two):
    folder, _, err = two
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "no folder" in lines[0] and "nowhere" in lines[0], err
    assert not (folder / "refused").exists()


def test_identities_that_cannot_be_shared_are_refused(walkers, tmp_path):
    tracklets = [Tracklet(("a",), pid, "D1", VISIBLE) for pid in range(6)]
    with pytest.raises(UserError, match="multiple of 3"):
        IdentitySampler(tracklets, P=4, K=1, steps=1, seed=1, rank=0, world=3)
    fails(here("train.py", "--data", walkers, "--run", tmp_path / "run", *TINY,
               "--identities", 5), "--identities 5")


def test_the_identities_of_a_step_are_shared():
    tracklets = [Tracklet((f"{pid}{modality}{k}",), pid, "D1", modality) for pid in range(6)
                 for modality in (VISIBLE, INFRARED) for k in range(3)]

    def batches(rank, world):
        return IdentitySampler(tracklets, P=4, K=2, steps=5, seed=3, rank=rank, world=world)

    for whole, first, second in zip(batches(0, 1), batches(0, 2), batches(1, 2), strict=True):
        assert sorted(whole) == sorted(first + second) and len(first) == len(second) == 8
        people = [{tracklets[index].pid for index, _ in part} for part in (first, second)]
        assert not people[0] & people[1]


# ------------------------------------------------------------ who dies ----

def dying(folder, who, *words):
    """In each of two processes: a run in whose fifth step torchrun or process 1 is killed."""
    rank, augment, number = options.rank_of_process(), train.augment, 0

    def augment_and_kill(*arguments):
        nonlocal number
        number += 1
        if number == 5 and who == "process" and rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        if number == 5 and who == "torchrun" and rank == 0:
            os.kill(os.getppid(), signal.SIGKILL)
            while os.getppid() == parallel.parent:
                time.sleep(0.01)
        return augment(*arguments)

    train.augment = augment_and_kill
    cli(partial(train_with, words))


@pytest.mark.skipif(os.name == "nt", reason="processes there have no parent to lose")
def test_the_death_of_torchrun_or_of_a_process_ends_all(walkers, tmp_path):
    # So many steps that no run comes to its end by itself.
    endless = ["--data", walkers, *TINY, *SMALLER, "--steps", 1_000_000]
    started = {}
    for who in "torchrun", "process":
        folder = tmp_path / who
        folder.mkdir()
        started[who] = Torchrun("dying", folder, who, *endless, "--run", folder / "run",
                                forked=True)
    for who, process in started.items():
        returncode, out, err = process.end()
        assert returncode == (-signal.SIGKILL if who == "torchrun" else 1), err
        assert "2 x cpu" in out and "Everything is in" not in out
        assert "interrupted; " in err or "has lost the others" in err, err
        # The traceback of torchrun itself, where it lives, is its own.
        ours = err.split("Traceback")[0] if who == "process" else err
        assert "train.py" not in ours.replace("python train.py --resume", ""), err
        assert tensors_of(tmp_path / who / "run")["epoch"] == 0


def test_a_process_whose_torchrun_has_gone_stops(monkeypatch):
    check_parent()
    monkeypatch.setattr(parallel, "parent", -1)
    check_parent()    # there is no torchrun
    monkeypatch.setattr(parallel, "processes", lambda: (1, 2))
    with pytest.raises(KeyboardInterrupt, match="torchrun has gone"):
        check_parent()


# ------------------------------------------------------- units of one process ----

def test_a_step_is_waited_for_minutes_and_a_download_hours(monkeypatch):
    waits = {}
    for name, value in {"TORCHELASTIC_RUN_ID": "none", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(dist, "is_initialized", lambda: False)
    monkeypatch.setattr(dist, "init_process_group",
                        lambda backend, timeout: waits.update(step=timeout))

    def new_group(backend, timeout):
        waits["setting up"] = timeout
        return "the patient group"

    monkeypatch.setattr(dist, "new_group", new_group)
    monkeypatch.setattr(parallel, "patient", None)
    assert join("cpu") == torch.device("cpu")
    assert timedelta(minutes=2) <= waits["step"] <= timedelta(minutes=30)
    assert waits["setting up"] >= timedelta(hours=2)

    barriers = []
    monkeypatch.setattr(parallel, "processes", lambda: (0, 2))
    monkeypatch.setattr(dist, "barrier", lambda group: barriers.append(group))
    wait_for_all()
    assert barriers == ["the patient group"]


def test_batch_norms_are_synchronised_on_gpus_except_in_heads(monkeypatch):
    monkeypatch.setattr(parallel, "processes", lambda: (0, 2))
    monkeypatch.setattr(parallel, "DistributedDataParallel", lambda model, **_: model)

    def kinds(device):
        model = torch.nn.ModuleDict({name: torch.nn.Sequential(torch.nn.BatchNorm1d(2))
                                     for name in ("backbone", "gait_head", "heads")})
        model = shared(model, torch.device(device))
        return [type(module[0]).__name__ for module in model.values()]

    assert kinds("cpu") == ["BatchNorm1d", "BatchNorm1d", "BatchNorm1d"]
    assert kinds("cuda") == ["SyncBatchNorm", "BatchNorm1d", "BatchNorm1d"]
