"""The device, and several processes as torchrun starts them: one on each GPU, one batch in all.

Each process computes the whole batch's losses from the embeddings of all, and the gradient of its
own part. With one process, every function here is the simplest case of itself.

Quick question: why must batch norms of several processes be synchronised? (Their statistics are the
batch's. Those of 8 tracklets differ from those of 32, and so does what is learned.)
"""
import os
import signal
import time
from contextlib import contextmanager
from datetime import timedelta

from support.files import UserError

import torch
import torch.distributed as dist
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

patient = None    # the group in which processes wait hours for one another: a download, a test


def processes():
    """-> rank of this process, number of processes: (0, 1) unless torchrun started several."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def say(text):
    """Print, once for all processes."""
    if processes()[0] == 0:
        print(text, flush=True)


def ignore_interrupts(worker):
    """For loader processes: Ctrl-C reaches all, and the main process answers it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def join(name):
    """"" (CUDA if there is one), cuda, cuda:1, cpu -> torch.device; under torchrun each process's
    own, and the processes join. Raises UserError."""
    global patient
    several = int(os.environ.get("WORLD_SIZE", 1)) > 1
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    if several and name == "cuda":
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name} cannot be used ({str(error).splitlines()[0][:80]}); "
                        "expected cuda, cuda:1, ... or cpu, and a GPU for each process") from None
    if several and not dist.is_initialized():
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        patient = dist.new_group(backend="gloo", timeout=timedelta(hours=6))
    return device


def precision_of(name, device):
    """auto, bfloat16, float16, float32 -> torch.dtype."""
    if name == "auto" and device.type != "cuda":
        return torch.float32
    if name == "auto":    # T4 and V100 have no bfloat16 in hardware
        has_bfloat16 = torch.cuda.get_device_capability(device) >= (8, 0)
        return torch.bfloat16 if has_bfloat16 else torch.float16
    return getattr(torch, name)


def leave():
    """The end of a script that has succeeded."""
    if processes()[1] > 1:
        dist.destroy_process_group()
        time.sleep(0.2)    # gloo's thread needs a moment, or it aborts an interpreter that ends


def wait_for_all():
    """Returns when every process has come here, be it hours later."""
    if processes()[1] > 1:
        dist.barrier(group=patient)


@contextmanager
def first_goes_first():
    """The first process of each machine does it, then the others: what is downloaded or drawn is
    there already."""
    first = processes()[1] == 1 or os.environ["LOCAL_RANK"] == "0"
    if not first:
        wait_for_all()
    yield
    if first:
        wait_for_all()


def from_first(make):
    """make() of process 0, in all processes."""
    values = [make() if processes()[0] == 0 else None]
    if processes()[1] > 1:
        dist.broadcast_object_list(values)
    return values[0]


def collect(value):
    """Any value of each process, be they ready hours apart -> all of them in process 0, None in the
    others."""
    rank, world = processes()
    values = [value] * world if rank == 0 else None
    if world > 1:
        dist.gather_object(value, values, group=patient)
    return values


def averaged(sums, steps):
    """{name: sum} -> {name: mean over steps and processes}."""
    values = torch.stack([value.double() for value in sums.values()])
    if processes()[1] > 1:
        dist.all_reduce(values)
    return dict(zip(sums, (values / steps / processes()[1]).tolist(), strict=True))


# -------------------------------------------------- gradients of one batch ----

class Gathered(torch.autograd.Function):
    """See gathered."""

    @staticmethod
    def forward(ctx, x):
        parts = [torch.empty_like(x, memory_format=torch.contiguous_format)
                 for _ in range(processes()[1])]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, gradient):
        rank, world = processes()
        return world * gradient.chunk(world)[rank]


def gathered(x):
    """x (B, ...) of this process -> (world * B, ...) of all of them, in order of rank, for losses
    that compare tracklets: every process computes the same loss of the whole batch. Its gradient
    goes back to each one's part, `world *` since DistributedDataParallel then takes a mean."""
    return x if processes()[1] == 1 else Gathered.apply(x)


def shared(model):
    """The model as each process calls it: gradients are averaged over processes. On GPUs batch
    norms see the batch of all processes (those of model.whole_batch are given it); torch has no
    such batch norm for CPUs, where each process uses its own share."""
    if processes()[1] == 1:
        return model
    whole = {module for name in model.whole_batch
             for module in model.get_submodule(name).modules()}
    for module in list(model.modules()) if model.device.type == "cuda" else []:
        for name, child in module.named_children():
            if isinstance(child, _BatchNorm) and child not in whole:
                setattr(module, name, torch.nn.SyncBatchNorm.convert_sync_batchnorm(child))
    # Unused parameters: by an ablation, say. No device_ids: modality stays on the CPU.
    return DistributedDataParallel(model, find_unused_parameters=True)


def average_gradients(module):
    """For what is trained outside `shared`: the warm-up of a part."""
    for parameter in module.parameters() if processes()[1] > 1 else []:
        dist.all_reduce(parameter.grad)
        parameter.grad /= processes()[1]


def take_buffers_of_first(model):
    """Process 0's batch norms are the ones that are saved: they count in an evaluation too."""
    for buffer in model.buffers() if processes()[1] > 1 else []:
        dist.broadcast(buffer, 0)


# ----------------------------------------------------------- random states ----

def random_states(device):
    """{"cpu": (processes, bytes), "cuda": the same or None}."""
    cpu = gathered(torch.get_rng_state()[None].to(device)).cpu()
    if device.type != "cuda":
        return {"cpu": cpu, "cuda": None}
    return {"cpu": cpu, "cuda": gathered(torch.cuda.get_rng_state(device)[None].to(device)).cpu()}


def restore_random_states(states, device):
    """By another number of processes or on another device than saved: as far as it fits."""
    rank = processes()[0]
    if rank < len(states["cpu"]):    # cloned: torch reads a view from its storage's beginning
        torch.set_rng_state(states["cpu"][rank].clone())
    if device.type == "cuda" and states["cuda"] is not None and rank < len(states["cuda"]):
        torch.cuda.set_rng_state(states["cuda"][rank].clone(), device)
