"""Training on CUDA without a GPU: what is on the CPU is real, what is on CUDA is fake.

A fake tensor has a shape, a type and a device, but no numbers. torch asks a TorchDispatchMode
before each operation. Ours lets those of the CPU run; of those of CUDA it makes a fake result, and
what the CPU reads it invents: ones, and for `nonzero` half of the places. So all of train.py runs:
autocast with CUDA's lists, the backward pass, the scaler, an evaluation, a resume. It finds faults
(an operation on tensors of both devices, a product of two float types) and waits of the CPU for
the GPU (a number is read, a shape depends on numbers, a copy is not `non_blocking`), and counts
kernels (operations that compute or copy). It cannot see what kernels compute, or whether CUDA has
one for a type. All three, for the last step:

    python tests/test_cuda.py --preset small --epochs 1 --steps 2
"""
import ctypes
import sys
from contextlib import contextmanager
from traceback import walk_stack

import conftest  # noqa: F401    finds our modules, should pytest not run this
from scripts import OPTIONS, ROOT, here, log_of, succeeds
from support.pictures import evenly

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

# Of a step: which pixels are foreground; whether each tracklet has a partner. Each tenth step reads
# the losses too; this one is another.
WAITS = {"dinogrl": {"sasgl.py:codes_of": 1}, "lsmrl": {"lsmrl.py:partners": 1}}
GPU, FAKE = torch.device("cuda:0"), FakeTensorMode()
OURS = {str(path) for path in [*ROOT.glob("*.py"), *ROOT.glob("support/*.py")]}
READS = str.split("_local_scalar_dense equal nonzero _unique2")
PRODUCTS = str.split("mm bmm addmm baddbmm mv addmv dot convolution convolution_backward")
# What torch answers as if there were a GPU: no call of its driver. Then what a fake tensor cannot
# answer, and what is too slow here: all the pictures.
CUDA, TENSOR = "torch.cuda.", "torch._subclasses.fake_tensor."
ANSWERS = {
    CUDA + "is_available": lambda: True, CUDA + "is_bf16_supported": lambda **_: True,
    CUDA + "_lazy_init": int, CUDA + "set_device": str, CUDA + "current_device": int,
    CUDA + "is_current_stream_capturing": bool, "torch.Tensor.pin_memory": lambda x, *_: x,
    "torch.__future__._overwrite_module_params_on_conversion": True,
    TENSOR + "init_gpu_context": str, TENSOR + "init_cuda_context": str,    # torch 2.13, 2.4
    TENSOR + "FakeTensor.tolist": lambda x: x.cpu().tolist(),
    TENSOR + "FakeTensor.__format__": lambda x, form: format(x.item(), form),
    TENSOR + "FakeTensor.__reduce_ex__": lambda x, protocol: x.cpu().__reduce_ex__(protocol),
    "support.weights.digest": lambda module: "",
    "support.pictures.evenly": lambda x, n: evenly(x, min(n, 4))}


def on_gpu(x):    # a tensor, or the device of one to be made
    return isinstance(x, FakeTensor) or isinstance(x, torch.device) and x.type in ("cuda", "meta")


def faked(x):
    if isinstance(x, torch.Tensor) and not on_gpu(x):
        return torch.empty(x.shape, dtype=x.dtype, device=GPU if x.ndim else "cpu")
    return GPU if isinstance(x, torch.device) and on_gpu(x) else x


def place():
    """-> file.py:function of ours, with the operation in the backward pass; line."""
    node, line = torch._C._current_autograd_node(), 0
    for frame, line in walk_stack(None):    # noqa: B007    of the frame where it ends
        file, function = frame.f_code.co_filename, frame.f_code.co_name
        if file in OURS and function[0] != "<":    # <lambda>, <genexpr>
            break
    return f"{file[len(str(ROOT)) + 1:]}:{function}" + f" {type(node).__name__}" * bool(node), line


class Cuda(TorchDispatchMode):
    faults, waits, kernels = (), {}, 0

    def next_step(self, *_):
        self.last_step, self.waits, self.kernels = (self.waits, self.kernels), {}, 0

    def wait(self):
        name, line = place()
        self.waits.setdefault(name, []).append(line)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, func.overloadpacket.__name__
        leaves = tree_leaves((args, kwargs))
        if not any(map(on_gpu, leaves)):
            return func(*args, **kwargs)
        if name == "device":    # in the backward pass not CUDA: autograd would ask for its streams
            callers = {frame.f_code.co_name for frame, _ in walk_stack(None)}
            return torch.device("meta") if "_engine_run_backward" in callers else GPU
        if torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"):
            with self:    # in inference mode: what it is composed of
                return func.decompose(*args, **kwargs)
        self.kernels += not (func.is_view or "empty" in name or name == "_unsafe_view")
        if name in READS:
            return self.read(name, args[0])
        if name in ("copy_", "_to_copy"):
            return self.copied(func, *args, **kwargs)
        if name.strip("_") in ("index", "index_put", "index_put_impl"):    # a mask
            parts = [[*self.read("nonzero", i).T] if on_gpu(i) and i.dtype == torch.bool else [i]
                     for i in args[1]]
            args = args[0], sum(parts, []), *args[2:]
        tensors = [x for x in leaves if isinstance(x, torch.Tensor)]
        floats = {x.dtype for x in tensors if name in PRODUCTS and x.is_floating_point()}
        if len(floats) > 1 or any(x.ndim and not on_gpu(x) for x in tensors):
            self.faults += (name, {(str(x.device), x.dtype) for x in tensors}, *place()),
        if "_fused_adam" in name:    # torch 2.4 cannot fake it
            return None
        with FAKE:
            args, kwargs = tree_map(faked, (args, kwargs))
            return func(*args, **kwargs)

    def read(self, name, x):
        self.wait()
        found = x.new_empty((max(1, x.numel() // 2), x.ndim), dtype=torch.long)
        unique = found.sum(1).to(x.dtype), found.new_empty(x.shape), found.sum(1)
        return {"nonzero": found, "_unique2": unique}.get(name, True)

    def copied(self, func, to, source=None, non_blocking=False, **how):
        """copy_(to, source), or _to_copy(to, device=...)."""
        x, target = (to, how.get("device") or to) if source is None else (source, to)
        if on_gpu(x) != on_gpu(target) and not non_blocking:
            self.wait()
        if source is not None:
            return to if on_gpu(to) else to.fill_(1)
        if not on_gpu(target):
            return torch.ones(x.shape, dtype=how.get("dtype") or x.dtype)
        with FAKE:
            return func(faked(x), **how | {"device": GPU})


@contextmanager
def pretended_gpu():
    """torch as if there were a GPU -> the Cuda that sees what it would do."""
    library = ctypes.CDLL(f"{torch.__path__[0]}/lib/libc10.so")
    name = "_ZN3c104impl26device_guard_impl_registryE"    # asked where a device's streams are
    guards = (ctypes.c_void_p * 16).in_dll(library, name)
    own, guards[1] = guards[1], guards[14]    # of CUDA, of meta
    with pytest.MonkeyPatch.context() as patch, torch.autograd.set_multithreading_enabled(False), \
            torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH), \
            torch.backends.cudnn.flags(enabled=False), Cuda() as cuda:
        for name, answer in ANSWERS.items():
            patch.setattr(name, answer, raising=False)
        hook = register_optimizer_step_post_hook(cuda.next_step)
        yield cuda
    hook.remove()
    guards[1] = own


@pytest.mark.skipif(sys.platform != "linux" or torch.cuda.is_available(), reason="no GPU, Linux")
@pytest.mark.parametrize("method,precision", [("dinogrl", "bfloat16"), ("lsmrl", "float16")])
def test_a_run_on_cuda_mixes_nothing_and_waits_here_alone(
        walkers, tmp_path, monkeypatch, method, precision):
    run, words = tmp_path / "run", ("--device", "cuda:0", "--precision", precision)
    with pretended_gpu() as cuda:
        succeeds(here("train.py", "--data", walkers, "--run", run, *OPTIONS[method], *words))
        waits, _ = cuda.last_step
        monkeypatch.setattr("evaluate.report", lambda *_: None)    # once is enough
        succeeds(here("train.py", "--resume", run, "--epochs", 2, "--steps", 1, *words))
    assert not cuda.faults
    assert {name: len(lines) for name, lines in waits.items()} == WAITS[method], waits
    assert ["rank-1" in line for line in log_of(run)] == [True, False]


if __name__ == "__main__":
    with pretended_gpu() as cuda:
        succeeds(here("train.py", *sys.argv[1:], "--device", "cuda:0"))
    print(*cuda.faults, *cuda.last_step, sep="\n")
