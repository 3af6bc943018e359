"""The device, and several processes as torchrun starts them: one per GPU, all share one batch."""
import os
import signal
import time
from contextlib import contextmanager
from datetime import timedelta

from support.files import UserError, in_short

import torch
import torch.distributed as dist
from torch.nn import SyncBatchNorm
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

patient = None    # the group in which processes wait hours for one another: a download, a test


def processes():
    """-> rank of this process, number of processes: (0, 1) unless torchrun started several."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def several():
    return processes()[1] > 1


def say(text):
    if processes()[0] == 0:
        print(text, flush=True)


def ignore_interrupts(worker):
    """For loader processes: after Ctrl-C the main process ends them."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def join(name):
    """cuda, cuda:1, cpu or "" (CUDA if there is one) -> torch.device. Under torchrun the processes
    join, and each has its own GPU. Raises UserError."""
    global patient
    is_torchrun = int(os.environ.get("WORLD_SIZE", 1)) > 1
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    if is_torchrun and name == "cuda":
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        device = torch.empty(1, device=name).device
        if device.type == "cuda":
            torch.cuda.set_device(device)    # or a context is made on GPU 0 too
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name} cannot be used ({in_short(error, 80)}); expected cuda, "
                        "cuda:1, ... or cpu, and a GPU for each process") from None
    if is_torchrun and not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        patient = dist.new_group(backend="gloo", timeout=timedelta(hours=6))
    return device


def precision_of(name, device):
    """auto, bfloat16, float16, float32 -> torch.dtype."""
    if name == "auto" and device.type == "cpu":
        name = "float32"
    elif name == "auto":    # T4 and V100 have no bfloat16 in hardware
        has_bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
        name = "bfloat16" if has_bfloat16 else "float16"
    return getattr(torch, name)


def leave():
    if several():
        dist.destroy_process_group()
        time.sleep(0.2)    # or gloo's thread aborts the interpreter that ends


def wait_for_all():
    """Returns when every process has come here, be it hours later."""
    if several():
        dist.barrier(group=patient)


@contextmanager
def first_goes_first():
    """One process of each machine downloads or draws; the others come after it and find it done."""
    is_first = os.environ.get("LOCAL_RANK", "0") == "0"
    if not is_first:
        wait_for_all()
    yield
    if is_first:
        wait_for_all()


def total(number, device):
    """A number of each process -> the sum over those whose batch norms see one another's pixels."""
    if several() and device.type == "cuda":
        number = torch.tensor(number, device=device)
        dist.all_reduce(number)
    return int(number)


def averaged(sums, steps):
    """{name: sum} -> {name: mean over steps and processes}."""
    values = torch.stack([value.double() for value in sums.values()]) / steps / processes()[1]
    if several():
        dist.all_reduce(values)
    return dict(zip(sums, values.tolist(), strict=True))


class Gathered(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        parts = [torch.empty_like(x) for _ in range(processes()[1])]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, gradient):
        rank, world = processes()
        return world * gradient.chunk(world)[rank]


def gathered(x):
    """x (B, ...) of this process -> (world * B, ...) of all, in order of rank. Each process gets
    the gradient of its own part, times `world`: DistributedDataParallel takes the mean."""
    return Gathered.apply(x) if several() else x


def shared(model):
    """The model as each process calls it: gradients are averaged. On GPUs batch norms see the batch
    of all processes (modules of whole_batch are given it); torch has none such for CPUs."""
    if not several():
        return model
    if model.device.type == "cuda":
        whole = [m for name in model.whole_batch for m in model.get_submodule(name).modules()]
        for module in list(model.modules()):
            for name, child in module.named_children():
                if isinstance(child, _BatchNorm) and child not in whole:
                    setattr(module, name, SyncBatchNorm.convert_sync_batchnorm(child))
    # Unused parameters: by an ablation, say. No device_ids: modality stays on the CPU.
    return DistributedDataParallel(model, find_unused_parameters=True)


def average_gradients(module):
    """For what is trained outside `shared`: the warm-up of a part."""
    for parameter in module.parameters() if several() else []:
        dist.all_reduce(parameter.grad)
        parameter.grad /= processes()[1]
