"""Several processes (torchrun, gloo): the loss and the gradients of one process on the same batch; a run of two is saved, resumed, evaluated."""
import json
import os
import subprocess
import sys

import pytest
import torch

from data import IdentitySampler, Tracklet
from test_scripts import ROOT, TINY, fails, here, run, same_bits, tensors_of

# Run by one process or by two: writes the losses and gradients of one training step on the same 4 identities.
STEP = """
import sys
import torch
from torch.nn.parallel import DistributedDataParallel
import lsmrl, model, train
from data import cli, processes
from evaluate import choose_device
from sasgl import foreground_statistics

torch.Tensor.float = torch.Tensor.double    # in float32 the gradients of PBMGE's scalars, large ones that cancel, are half rounding
torch.set_default_dtype(torch.float64)
choose_device("cpu")
torch.set_num_threads(1)
rank, world = processes()
results = {}
for method, module in ("lsmrl", lsmrl), ("dinogrl", model):
    options = train.config_of(method)
    small = dict(options.small, width=8, dim=8, dino_size=(112, 56), code_size=(16, 8), gait_strides=(1, 1, 1, 1)) if method == "dinogrl" else options.small
    torch.manual_seed(0)
    net = module.build(options(**small), 6).train()
    for name, part in net.named_children():
        if method == "dinogrl" and not name.endswith("head"):
            part.eval()    # on a CPU each process has batch norms and dropout of its own
    generator = torch.Generator().manual_seed(1)
    for name, parameter in net.named_parameters():    # what starts at zero would hide its gradient's way
        parameter.data += 0.02 * torch.randn(parameter.shape, generator=generator)
    frames = torch.randn(16, 2, 3, 64, 32, generator=generator)
    label = torch.tensor([0, 0, 1, 1, 3, 3, 5, 5]).repeat(2)    # the visible ones first
    modality = torch.arange(16) // 8
    mine = torch.isin(label, torch.tensor([[0, 1, 3, 5], [0, 3]][world - 1] if rank == 0 else [1, 5]))
    parallel = DistributedDataParallel(net, find_unused_parameters=True) if world > 1 else net
    losses, shown = parallel(frames[mine], modality[mine], label[mine])
    sum(losses.values()).backward()
    results[method] = {"losses": {k: v.detach() for k, v in losses.items()}, "shown": shown,
                       "gradients": {k: p.grad for k, p in net.named_parameters() if p.grad is not None}}
maps, foreground = torch.randn(4, 4, 2, 5) + 10 * torch.arange(4)[:, None, None, None], torch.rand(4, 8, 4) < torch.arange(1, 5)[:, None, None] / 5
results["statistics"] = foreground_statistics(maps[rank::world], foreground[rank::world])
torch.save(results, f"{sys.argv[1]}-{world}-{rank}.pt")
cli(lambda: None)
"""


def torchrun(*command):
    return subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--", *map(str, command)], cwd=ROOT, capture_output=True,
                          text=True, timeout=280, env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}, stdin=subprocess.DEVNULL)


def test_two_processes_have_the_loss_and_the_gradients_of_one(tmp_path):
    (tmp_path / "step.py").write_text(STEP)
    result = torchrun(tmp_path / "step.py", tmp_path / "step")
    assert result.returncode == 0, result.stderr
    assert run(tmp_path / "step.py", tmp_path / "step", env={"PYTHONPATH": str(ROOT)}).returncode == 0
    one, first, second = (torch.load(tmp_path / f"step-{name}.pt", weights_only=True) for name in ("1-0", "2-0", "2-1"))
    for statistics in zip(one.pop("statistics"), first.pop("statistics"), second.pop("statistics")):
        for found in statistics[1:]:
            torch.testing.assert_close(found, statistics[0])
    for method in one:
        local = ("mask", "smooth_mask", "smooth_part", "diversity")    # means over a process's own frames: their mean is the whole's
        for name, loss in one[method]["losses"].items():
            pair = first[method]["losses"][name], second[method]["losses"][name]
            assert torch.isclose(sum(pair) / 2, loss, rtol=1e-9, atol=1e-12), (method, name)
            assert name in local or torch.isclose(*pair, rtol=1e-9), (method, name)    # all see the gathered batch
        assert one[method]["shown"].keys() == first[method]["shown"].keys()
        expected = one[method]["gradients"]
        largest = max(gradient.abs().max() for gradient in expected.values())
        for found in first[method]["gradients"], second[method]["gradients"]:
            assert found.keys() == expected.keys() and len(expected) > 50
            for name, gradient in expected.items():
                assert (found[name] - gradient).abs().max() < 1e-9 * largest, (method, name)


def test_the_identities_of_a_step_are_shared():
    tracklets = [Tracklet((f"{pid}{m}{k}",), pid, "D1", m) for pid in range(6) for m in ("visible", "infrared") for k in range(3)]
    sampler = lambda rank, world: list(IdentitySampler(tracklets, P=4, K=2, steps=5, seed=3, rank=rank, world=world))
    for whole, a, b in zip(sampler(0, 1), sampler(0, 2), sampler(1, 2)):
        assert sorted(whole) == sorted(a + b) and len(a) == len(b) == 8
        assert not {tracklets[i].pid for i, _ in a} & {tracklets[i].pid for i, _ in b}


def test_a_run_of_two_processes_is_logged_saved_resumed_and_evaluated_once(walkers, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    (tmp_path / "runs.py").write_text("import json, sys, train\ndef main():\n"    # one start of torchrun for three runs
                                      "    for line in json.loads(sys.argv[1]):\n        sys.argv = ['train.py', *line]\n        train.main()\ntrain.cli(main)\n")
    result = torchrun(tmp_path / "runs.py", json.dumps([["--data", str(walkers), "--run", str(whole), *TINY, "--epochs", "2"],
                                                        ["--data", str(walkers), "--run", str(parts), *TINY], ["--resume", str(parts), "--epochs", "2"]]))
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("infrared->visible") == result.stdout.count("2 x cpu") == 3 and "Warning" not in result.stderr
    assert result.stderr.count("epoch 2/2 0/2 [00:00<?]") == 2, result.stderr
    assert sorted(p.name for p in whole.iterdir()) == ["config.json", "curves.png", "last.pt", "log.jsonl", "results.json", "silhouettes-2.png"]
    same_bits(tensors_of(whole), tensors_of(parts))    # dropout too goes on where each process was
    alone = here("evaluate.py", "--checkpoint", whole, "--json", tmp_path / "r.json")
    assert alone.returncode == 0, alone.stderr
    for direction, r in json.loads((tmp_path / "r.json").read_text())["directions"].items():
        assert r == pytest.approx(json.loads((whole / "results.json").read_text())["directions"][direction], abs=1e-6)


def test_what_two_processes_cannot_share_is_refused_once(walkers, tmp_path):
    result = torchrun("train.py", "--data", tmp_path / "nowhere", "--run", tmp_path / "run", *TINY)
    assert result.returncode != 0 and result.stderr.count("error: ") == 1 and "no folder" in result.stderr, result.stderr
    with pytest.raises(Exception, match="multiple of 3"):
        IdentitySampler([Tracklet(("a",), pid, "D1", "visible") for pid in range(6)], P=4, K=1, steps=1, seed=1, rank=0, world=3)
    fails(here("train.py", "--data", walkers, "--run", tmp_path / "run", *TINY, "--identities", 5), "--identities 5")
