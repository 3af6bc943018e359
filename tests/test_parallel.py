"""Two processes, as torchrun starts them: the losses and gradients of one, and a run."""
import os
from pathlib import Path

import train
from scripts import OPTIONS, ROOT, TINY, here, log_of, results_of, run, succeeds, tensors_of
from support.options import cli
from support.parallel import gathered, join, processes, shared
from train import read_command_line

import pytest
import torch


def small_step(words):
    """-> the network of a command line of train.py, for six people, and a batch for it: frames,
    modality, label of four people, each twice by day and twice by night. The same at each call."""
    asked = read_command_line(words)
    torch.manual_seed(0)
    model = asked.method(asked.options, 6, asked.config.size)
    for parameter in model.parameters():    # what starts at zero would hide its gradient's way
        parameter.data += 0.02 * torch.randn(parameter.shape)
    frames = torch.randn(16, 2, 3, *asked.config.size)
    return model, (frames, torch.arange(16) // 8, torch.tensor([0, 0, 1, 1, 3, 3, 5, 5] * 2))


def step(name):
    """A training step on a batch of four people, or on this process's two of them -> losses,
    gradients."""
    model, (frames, modality, label) = small_step(OPTIONS[name])
    model.eval()    # on a CPU each process has batch norms and dropout of its own, ...
    for part in model.whole_batch:    # ... but for these
        model.get_submodule(part).train()
    rank, world = processes()
    shares = [[0, 1, 3, 5]] if world == 1 else [[0, 3], [1, 5]]
    mine = torch.isin(label, torch.tensor(shares[rank]))
    data_parallel = shared(model)
    losses, _ = data_parallel(frames[mine], modality[mine], label[mine])
    sum(losses.values()).backward()
    gradients = {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
    return {key: loss.detach() for key, loss in losses.items()}, gradients


def steps():
    """One step of each method, in float64: float32's rounding would hide a wrong gradient."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "float", torch.Tensor.double)
        torch.set_default_dtype(torch.float64)
        try:
            return {name: step(name) for name in OPTIONS}
        finally:
            torch.set_default_dtype(torch.float32)


def gradient_of_gathered():
    """Each process's numbers, weighted by 1, 2, 3, 4 where all are together."""
    x = torch.full((2,), processes()[0] + 5.0, requires_grad=True)
    together = gathered(x)
    (together * torch.tensor([1.0, 2, 3, 4])).sum().backward()
    return together.detach(), x.grad


def both(folder):
    """What each of the two processes does, before it trains."""
    join("cpu")
    found = {"steps": steps(), "gathered": gradient_of_gathered()}
    torch.save(found, Path(folder) / f"{processes()[0]}.pt")
    cli(train.main)


PROGRAM = "import sys, test_parallel; test_parallel.both(sys.argv.pop(1))"


@pytest.fixture(scope="module")
def two(walkers, tmp_path_factory):
    """-> the folder with what two processes found and their run, and what they printed."""
    folder = tmp_path_factory.mktemp("two")
    (folder / "program.py").write_text(PROGRAM)
    path = os.pathsep.join([str(ROOT / "tests"), str(ROOT)])
    words = ["--data", walkers, "--run", folder / "run", *TINY]
    return folder, succeeds(run(
        "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--",
        folder / "program.py", folder, *words, env={"PYTHONPATH": path}))


def test_two_processes_have_the_losses_and_the_gradients_of_one(two):
    one = steps()
    pair = [torch.load(two[0] / f"{rank}.pt")["steps"] for rank in (0, 1)]
    for method, (losses, gradients) in one.items():
        largest = max(gradient.abs().max() for gradient in gradients.values())
        assert len(losses) > 3 and len(gradients) > 50
        for their_losses, their_gradients in (found[method] for found in pair):
            assert their_losses.keys() == losses.keys()
            assert their_gradients.keys() == gradients.keys()
            for name, loss in losses.items():    # of the gathered batch, in both
                assert torch.isclose(their_losses[name], loss, rtol=1e-9), (method, name)
            for name, gradient in gradients.items():
                error = (their_gradients[name] - gradient).abs().max()
                assert error < 1e-9 * largest, (method, name)


def test_gathered_sends_the_gradient_of_each_share_back(two):
    """Twice, since the mean over two processes is taken where a sum is due."""
    for rank, gradient in enumerate([[2.0, 4], [6, 8]]):
        found, own = torch.load(two[0] / f"{rank}.pt")["gathered"]
        assert found.tolist() == [5, 5, 6, 6] and own.tolist() == gradient


def test_a_run_of_two_is_told_once_and_resumed_by_one(two):
    folder, printed = two[0] / "run", two[1].stdout
    assert printed.count("2 x cpu") == printed.count("infrared->visible") == 1
    assert len(log_of(folder)) == 1 and results_of(folder)["directions"]
    evaluated = succeeds(here("evaluate.py", "--checkpoint", folder, "--out", two[0] / "out"))
    assert "infrared->visible" in evaluated.stdout
    for direction, scores in results_of(two[0] / "out")["directions"].items():
        assert scores == pytest.approx(results_of(folder)["directions"][direction], abs=1e-6)
    succeeds(here("train.py", "--resume", folder, "--epochs", 2))
    assert tensors_of(folder)["epoch"] == 2 and len(log_of(folder)) == 2
