"""Training on CUDA without a GPU: what is on the CPU is real, what is on CUDA is fake.

A fake tensor has a shape, a type and a device, but no numbers. torch asks a TorchDispatchMode
before each operation. Ours lets those of the CPU run; those of CUDA give fake tensors; what the CPU
reads of them is made up. So all of train.py runs. Faults: an operation on tensors of both devices,
a product of two float types. Waits of the CPU for the GPU: it reads a number, a shape depends on
numbers, a copy between the two is not `non_blocking`. Kernels: operations of CUDA that compute or
copy. Not seen: what they compute, whether CUDA has one for a type, time, memory. All three:

    PYTHONPATH=. python tests/test_cuda.py --preset small --epochs 1 --steps 2
"""
import ctypes
import sys
from collections import Counter
from contextlib import contextmanager
from traceback import walk_stack

from scripts import OPTIONS, ROOT, here, log_of, succeeds
from support.pictures import evenly

import pytest
import torch
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

# Of a step: which pixels are foreground; has each tracklet a partner? Each tenth reads the losses.
WAITS = {"dinogrl": {"sasgl.py:codes_of": 1}, "lsmrl": {"lsmrl.py:partners": 1}}
GPU, FAKE = torch.device("cuda:0"), FakeTensorMode()
OURS = {str(path) for path in [*ROOT.glob("*.py"), *ROOT.glob("support/*.py")]}
PRODUCTS = str.split("mm bmm addmm baddbmm mv addmv dot convolution convolution_backward")
ANSWERS = {    # as if there were a GPU; what a fake tensor cannot answer; fewer pictures: seconds
    "torch.cuda.is_available": lambda: True, "torch.cuda.is_bf16_supported": lambda **_: True,
    "torch.cuda._lazy_init": int, "torch.cuda.set_device": str,
    "torch.cuda.is_current_stream_capturing": bool, "torch.Tensor.pin_memory": lambda x, *_: x,
    "torch._subclasses.fake_tensor.init_cuda_context": str,    # torch 2.4; later by another name:
    "torch._subclasses.fake_tensor.init_gpu_context": str, "torch.backends.cudnn.enabled": False,
    "torch.__future__._overwrite_module_params_on_conversion": True,
    "torch._subclasses.FakeTensor.__format__": lambda x, form: format(x.item(), form),
    "torch._subclasses.FakeTensor.__reduce_ex__": lambda x, n: x.cpu().__reduce_ex__(n),
    "torch._subclasses.FakeTensor.tolist": lambda x: x.cpu().tolist(),
    "support.pictures.evenly": lambda x, n: evenly(x, min(n, 4))}


def on_gpu(x):    # a tensor, or the device of one to be made
    return isinstance(x, FakeTensor) or isinstance(x, torch.device) and x.type in ("cuda", "meta")


class Cuda(TorchDispatchMode):
    faults, waits, kernels = (), (), 0

    def next_step(self):
        self.last_step, self.waits, self.kernels = (self.waits, self.kernels), (), 0

    def place(self):    # file.py:function of ours; line
        stack = ((frame.f_code, line) for frame, line in walk_stack(sys._getframe()))
        code, line = next(x for x in stack if x[0].co_filename in OURS and x[0].co_name[0] != "<")
        return f"{code.co_filename[len(f'{ROOT}/'):]}:{code.co_name}", line

    def faked(self, x):
        if isinstance(x, torch.Tensor) and not on_gpu(x):
            return torch.empty(x.shape, dtype=x.dtype, device=GPU if x.ndim else "cpu")
        return GPU if isinstance(x, torch.device) and on_gpu(x) else x

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, func.overloadpacket.__name__
        leaves = tree_leaves((args, kwargs))
        if not any(map(on_gpu, leaves)):
            return func(*args, **kwargs)
        if name == "device":    # in the backward pass not CUDA: autograd would ask for its streams
            callers = {frame.f_code.co_name for frame, _ in walk_stack(sys._getframe())}
            return torch.device("meta") if "_engine_run_backward" in callers else GPU
        if torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"):
            with self:    # in inference mode: what it is composed of
                return func.decompose(*args, **kwargs)
        self.kernels += not (func.is_view or "empty" in name or name == "_unsafe_view")
        if name in ("_local_scalar_dense", "equal", "nonzero", "_unique2"):
            self.waits += self.place(),
            some = args[0].new_empty((max(1, args[0].numel() // 2), args[0].ndim), dtype=torch.long)
            unique = some.sum(1), some.new_empty(args[0].shape), some.sum(1)
            return {"nonzero": some, "_unique2": unique}.get(name, True)
        tensors = [x for x in leaves if isinstance(x, torch.Tensor)]
        floats = {x.dtype for x in tensors if name in PRODUCTS and x.is_floating_point()}
        if name in ("copy_", "_to_copy"):    # (to, x, non_blocking), (x, device=...)
            x, to = args[:2][-1], kwargs.get("device") or args[0]
            if on_gpu(x) != on_gpu(to) and True not in (kwargs.get("non_blocking"), *args[2:]):
                self.waits += self.place(),
            if not on_gpu(to):
                ones = torch.ones(x.shape, dtype=kwargs.get("dtype") or x.dtype)
                return ones if name == "_to_copy" else to.copy_(ones)
        elif len(floats) > 1 or any(x.ndim and not on_gpu(x) for x in tensors):
            self.faults += (name, floats or "of both devices", *self.place()),
        with FAKE:    # torch 2.4 cannot fake Adam
            args, kwargs = tree_map(self.faked, (args, kwargs))
            return None if "_fused_adam" in name else func(*args, **kwargs)


@contextmanager
def pretended_gpu():
    library = ctypes.CDLL(f"{torch.__path__[0]}/lib/libc10.so")    # whose table knows the streams
    guards = (ctypes.c_void_p * 16).in_dll(library, "_ZN3c104impl26device_guard_impl_registryE")
    own, guards[1] = guards[1], guards[14]    # CUDA's, and meta's, which has none
    with pytest.MonkeyPatch.context() as patch, torch.autograd.set_multithreading_enabled(False), \
            torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH), Cuda() as cuda:
        for name, answer in ANSWERS.items():
            patch.setattr(name, answer, raising=False)
        update = torch.amp.GradScaler.update    # which ends a step
        patch.setattr(torch.amp.GradScaler, "update", lambda x: [update(x), cuda.next_step()])
        yield cuda
    guards[1] = own


@pytest.mark.skipif(sys.platform != "linux" or torch.cuda.is_available(), reason="no GPU, Linux")
@pytest.mark.parametrize("method,precision", [("dinogrl", "bfloat16"), ("lsmrl", "float16")])
def test_a_run_mixes_nothing_and_waits_here(walkers, tmp_path, monkeypatch, method, precision):
    run, words = tmp_path / "run", ("--device", "cuda:0", "--precision", precision)
    with pretended_gpu() as cuda:
        succeeds(here("train.py", "--data", walkers, "--run", run, *OPTIONS[method], *words))
        waits, _ = cuda.last_step
        monkeypatch.setattr("evaluate.report", lambda *_: None)    # once is enough
        succeeds(here("train.py", "--resume", run, "--epochs", 2, "--steps", 1, *words))
    assert not cuda.faults
    assert Counter(name for name, _ in waits) == WAITS[method], Counter(waits)
    assert "rank-1" in log_of(run)[0] and len(log_of(run)) == 2


if __name__ == "__main__":
    with pretended_gpu() as cuda:
        succeeds(here("train.py", *sys.argv[1:], "--device", "cuda:0"))
    print(cuda.faults, Counter(cuda.last_step[0]), cuda.last_step[1], sep="\n")
