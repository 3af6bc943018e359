"""Two processes, as torchrun starts them: the losses and gradients of one, and a run."""
import os

from scripts import OPTIONS, TINY, here, log_of, results_of, succeeds, tensors_of
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


def both(rank, port, folder, words):
    """What each of the two processes does: a step of each method, a run."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_PORT=str(port),
                      MASTER_ADDR="127.0.0.1", TORCHELASTIC_USE_AGENT_STORE="True")
    torch.set_num_threads(1)
    join("cpu")
    found = {"steps": steps(), "gathered": gradient_of_gathered()}
    result = succeeds(here("train.py", *words))
    torch.save({**found, "printed": result.stdout}, folder / f"{rank}.pt")


@pytest.fixture(scope="module")
def two(walkers, tmp_path_factory):
    """-> the folder of their run, what each of the two processes found and printed."""
    folder = tmp_path_factory.mktemp("two")
    words = ["--data", walkers, "--run", folder / "run", *TINY]
    # As torchrun: it lets them find each other in a store of its own, and sets their variables.
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    torch.multiprocessing.start_processes(
        both, (store.port, folder, words), nprocs=2, start_method="fork")
    return folder / "run", [torch.load(folder / f"{rank}.pt") for rank in (0, 1)]


def test_two_processes_have_the_losses_and_the_gradients_of_one(two):
    one = steps()
    pair = [found["steps"] for found in two[1]]
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
    for found, gradient in zip(two[1], ([2, 4], [6, 8]), strict=True):
        together, own = found["gathered"]
        assert together.tolist() == [5, 5, 6, 6] and own.tolist() == gradient


def test_a_run_of_two_is_told_once_and_resumed_by_one(two, tmp_path):
    folder, (first, second) = two
    assert first["printed"].count("equal error") == 1 and "2 x cpu" in first["printed"]
    assert second["printed"] == "" and len(log_of(folder)) == 1
    succeeds(here("evaluate.py", "--checkpoint", folder, "--out", tmp_path))
    for direction, scores in results_of(tmp_path)["directions"].items():
        assert scores == pytest.approx(results_of(folder)["directions"][direction], abs=1e-6)
    succeeds(here("train.py", "--resume", folder, "--epochs", 2))
    assert tensors_of(folder)["epoch"] == 2 and len(log_of(folder)) == 2
