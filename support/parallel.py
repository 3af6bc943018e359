"""Several processes, as torchrun starts them: one on each GPU, with one batch between them.

    device = join("")                  this process's device; the processes find each other
    gathered(x)                        the tracklets of all, for losses that compare tracklets
    model = shared(model, device)      gradients averaged, batch norms synchronised (on GPUs)
    with first_goes_first(): ...       one process of a machine downloads, the others find it there

Each process computes the whole batch's losses from the embeddings of all, and the gradient of its
own part. Where there is one process, every function here is the simplest case of itself.

Quick question: why is a batch norm of several processes a matter at all? (Its statistics are the
batch's. Of 8 tracklets they differ from those of 32, and so does what is learned.)

Ours, not the papers': all of it.
"""
import os
import time
from contextlib import contextmanager
from datetime import timedelta

from support.files import UserError
from support.options import is_torchrun_s, rank_of_process

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

STEP, SETTING_UP = timedelta(minutes=10), timedelta(hours=6)    # how long the others are waited for
patient = None      # the group in which one waits for hours: a download, a cache, an evaluation
parent = os.getppid()


def processes():
    """-> this process's rank and their number; (0, 1) unless torchrun started several."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def torchrun_started_several():
    return is_torchrun_s() and int(os.environ["WORLD_SIZE"]) > 1


def join(name):
    """"" (CUDA if there is one), cuda, cuda:1, cpu -> torch.device; under torchrun each process's
    own, and the processes join. Raises UserError if it cannot be used."""
    global patient
    several = torchrun_started_several()
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    if several and name.startswith("cuda"):
        here, gpus = int(os.environ["LOCAL_WORLD_SIZE"]), torch.cuda.device_count()
        if name != "cuda" or here > gpus:
            raise UserError(f"--device {name} and {here} processes on {gpus} GPUs; expected "
                            "--device cuda and a GPU for each: lower --nproc_per_node")
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        device = torch.device(name)
        if device.type not in ("cpu", "cuda"):
            raise RuntimeError("not supported")
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name} cannot be used ({str(error).splitlines()[0][:80]}); "
                        "expected cuda, cuda:1, ... or cpu") from None
    if several and not dist.is_initialized():
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=STEP)
        patient = dist.new_group(backend="gloo", timeout=SETTING_UP)
    return device


def leave():
    """The end of a script that has succeeded."""
    if processes()[1] > 1:
        dist.destroy_process_group()
        # gloo's thread lets go of its last tensor a moment after its work is done, and aborts an
        # interpreter that ends meanwhile.
        time.sleep(0.2)


def check_parent():
    """Raises KeyboardInterrupt where torchrun itself was killed: nobody would ever stop us."""
    if processes()[1] > 1 and os.getppid() != parent:
        raise KeyboardInterrupt(f"process {rank_of_process()}: torchrun has gone; stopped")


def wait_for_all():
    """Returns when every process has come here, be it hours later."""
    if processes()[1] > 1:
        dist.barrier(group=patient)


@contextmanager
def first_goes_first():
    """The first process of each machine does it, then the others: what is downloaded or made is
    there already."""
    first = not torchrun_started_several() or os.environ["LOCAL_RANK"] == "0"
    if not first:
        wait_for_all()
    yield
    if first:
        wait_for_all()


def from_first(value):
    """The value that process 0 has, in all of them."""
    values = [value]
    if processes()[1] > 1:
        dist.broadcast_object_list(values)
    return values[0]


def from_all(value):
    """The values that the processes have, in all of them, in order of rank."""
    world = processes()[1]
    values = [value] * world
    if world > 1:
        dist.all_gather_object(values, value)
    return values


def averaged(numbers):
    """A tensor -> its mean over the processes."""
    world = processes()[1]
    if world > 1:
        dist.all_reduce(numbers)
    return numbers / world


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
    """x (B, ...) of this process -> (world * B, ...) of all of them, in order of rank; x itself
    where there is one.

    For losses that compare tracklets: every process computes the same loss of the whole batch, and
    sends the gradient of its own part back. DistributedDataParallel then takes the mean over
    processes where a sum is due: hence `world *` above."""
    return x if processes()[1] == 1 else Gathered.apply(x)


def shared(model, device):
    """The model as each process calls it: gradients are averaged over processes.

    On GPUs batch norms see the batch of all; torch has no synchronised batch norm for CPUs, where
    each process normalises by its own share. What is called ...head or ...heads is left alone: it
    is given the gathered batch already."""
    if processes()[1] == 1:
        return model
    if device.type == "cuda":
        for name, module in model.named_children():
            if not name.endswith(("head", "heads")):
                setattr(model, name, torch.nn.SyncBatchNorm.convert_sync_batchnorm(module))
    # Unused parameters: by an ablation, say. No device_ids: modality stays on the CPU.
    return DistributedDataParallel(model, find_unused_parameters=True)


def average_gradients(module):
    """For what is trained outside `shared`: the warm-up of a part."""
    for parameter in module.parameters():
        if parameter.grad is not None:
            parameter.grad = averaged(parameter.grad)


def take_buffers_of_first(model):
    """Process 0's batch norms are the ones that are saved: they count in an evaluation too."""
    if processes()[1] > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)


def collect_in_first(rows, device):
    """rows (n, ...) of each process, n the same in all -> a list of them in process 0, None in the
    others."""
    rank, world = processes()
    if world == 1:
        return [rows]
    wait_for_all()    # embedding a benchmark takes a while, and not the same while for all
    rows = rows.to(device)
    everyone = [torch.empty_like(rows) for _ in range(world)] if rank == 0 else None
    dist.gather(rows, everyone)
    return everyone


# ----------------------------------------------------------- random states ----

def random_states(device):
    """{"cpu": (processes, bytes), "cuda": the same or None}: what goes on exactly needs them."""
    cpu = gathered(torch.get_rng_state()[None].to(device)).cpu()
    if device.type != "cuda":
        return {"cpu": cpu, "cuda": None}
    return {"cpu": cpu, "cuda": gathered(torch.cuda.get_rng_state(device)[None].to(device)).cpu()}


def restore_random_states(states, device):
    """By another number of processes or on another device than saved: as far as it fits."""
    rank = processes()[0]

    def of_this_process(kind):
        rows = None if states[kind] is None else torch.atleast_2d(states[kind])
        # Cloned: torch reads a view from its storage's beginning.
        return rows[rank].clone() if rows is not None and rank < len(rows) else None

    cpu = of_this_process("cpu")
    if cpu is not None:
        torch.set_rng_state(cpu)
    cuda = of_this_process("cuda") if device.type == "cuda" else None
    if cuda is not None:
        torch.cuda.set_rng_state(cuda, device)
