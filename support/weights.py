"""Weights: tensors read without running anything, loaded strictly, downloaded once.

    read_tensors(path)                    a torch file -> its contents
    load_strictly(module, tensors, what)  every tensor there, none besides, each as it should be
    download(what, fetch, ways_out)       the official source, or an error with the ways out
    read_checkpoint, rebuild              last.pt -> its dict -> the model

Quick question: why strictly, when torch can leave out what does not fit? (What is left out stays
random. The network runs, the loss falls, and the figures are a little worse: nobody notices.)

Ours, not the papers': all of it.
"""
import math
import os

from support.files import UserError, in_short

import torch


def read_tensors(path):
    """The contents of a torch file, opened with weights_only=True: nothing in it can run. Raises
    UserError."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"no file {path}; expected a torch file of tensors; check the "
                        "path") from None
    except Exception as error:    # a torn zip, a foreign pickle: torch raises a dozen types
        raise UserError(f"{path} cannot be read as a torch file of tensors "
                        f"({type(error).__name__}); it may be torn or of another kind: download or "
                        "save it again") from error


def named_tensors(tensors, what):
    """Its argument, if it is a dict of named tensors (a state dict). Raises UserError."""
    is_named = isinstance(tensors, dict) and all(isinstance(name, str) for name in tensors)
    if is_named and all(torch.is_tensor(tensor) for tensor in tensors.values()):
        return tensors
    raise UserError(f"{what} holds no dict of named tensors; expected a state dict: is it the "
                    "right file?")


def is_plain(tensor):
    """Are its numbers there, each at a place of its own? A file may hold sparse tensors, tensors
    without contents, and one number that claims to be a million."""
    if tensor.is_nested or tensor.layout != torch.strided:
        return False
    if tensor.is_meta or tensor.is_quantized:
        return False
    return tensor.untyped_storage().nbytes() >= tensor.numel() * tensor.element_size()


def misfit(tensor, wanted):
    """Why `tensor` cannot take the place of `wanted` (which may be on the meta device), or None."""
    if not is_plain(tensor):
        return "is no plain tensor (sparse, expanded or without contents)"
    if tensor.shape != wanted.shape:
        return f"is {tuple(tensor.shape)}, expected {tuple(wanted.shape)}"
    both_real = tensor.is_floating_point() and wanted.is_floating_point()
    if tensor.dtype != wanted.dtype and not both_real:
        return f"is {tensor.dtype}, expected {wanted.dtype}"
    return None


def misfits(tensors, wanted):
    """What keeps `tensors` from being `wanted`, both {name: tensor}, a line each. A wanted None may
    be any tensor."""
    missing = [f"{name} is missing" for name in wanted if name not in tensors]
    surplus = [f"{name} is surplus" for name in tensors if name not in wanted]
    there = [name for name in wanted if name in tensors and wanted[name] is not None]
    reasons = {name: misfit(tensors[name], wanted[name]) for name in there}
    return missing + surplus + [f"{name} {reason}" for name, reason in reasons.items() if reason]


def check_fit(module, tensors, what):
    """Raises UserError that names missing, surplus and unfitting tensors, nine at most."""
    wrong = misfits(named_tensors(tensors, what), module.state_dict())
    if wrong:
        more = f"; and {len(wrong) - 9} more: is it the right file?" if len(wrong) > 9 else ""
        raise UserError(f"{what} does not fit: {'; '.join(wrong[:9])}{more}")


def load_strictly(module, tensors, what):
    """Loads a state dict of which every tensor fits. Raises UserError, see check_fit."""
    check_fit(module, tensors, what)
    module.load_state_dict(tensors)


def download(what, fetch, ways_out):
    """fetch() -> what it returns, from the official source or torch.hub's cache. Raises UserError
    that names the ways out."""
    try:
        return fetch()
    except Exception as error:    # no network, no space, a changed address: a dozen types
        raise UserError(f"{what} is neither cached nor downloadable here ({type(error).__name__}: "
                        f"{in_short(error, 80)}); either run once with a network, or "
                        f"{ways_out}") from error


# ----------------------------------------------------------- checkpoints ----

def read_checkpoint(path):
    """A run's folder, or its last.pt -> the checkpoint's dict, whose keys are of the kinds that
    they should be. Raises UserError for anything that is none."""
    if os.path.isdir(path):
        path = os.path.join(path, "last.pt")
    checkpoint = read_tensors(path)
    kinds = {"model": dict, "config": dict, "classes": list, "method": str, "epoch": int}
    if not isinstance(checkpoint, dict) or not kinds.keys() <= checkpoint.keys():
        raise UserError(f"{path} is no checkpoint of train.py; expected a dict with "
                        f"{', '.join(sorted(kinds))}; the authors' files go by --official DIR")
    checkpoint.setdefault("dataset", "")    # older ones do not say what they were trained on
    for key, kind in {**kinds, "dataset": str}.items():
        if not isinstance(checkpoint[key], kind):
            found = in_short(repr(checkpoint[key]), 60)
            raise UserError(f"{path}: {key} is {found}; expected {kind.__name__}, as train.py "
                            "writes it")
    classes, epoch = checkpoint["classes"], checkpoint["epoch"]
    if not all(isinstance(name, str) for name in checkpoint["config"]) or not 0 <= epoch <= 10 ** 6:
        raise UserError(f"{path} has an unusable config or epoch; expected last.pt as train.py "
                        "wrote it")
    if {type(pid) for pid in classes} not in ({int}, {str}):
        raise UserError(f"{path}: classes are no list of identities; expected last.pt as train.py "
                        "wrote it")
    named_tensors(checkpoint["model"], f"{path}, model")
    return checkpoint


def rebuild(method, config, checkpoint, path):
    """A method's class, its configuration, a checkpoint -> the model. Raises UserError.

    First without any memory, on the meta device: a file whose configuration asks for more than its
    tensors hold is refused before anything is built."""
    what, classes = f"{path} (with its configuration)", len(checkpoint["classes"])
    try:
        with torch.device("meta"):
            outline = method(config, classes, pretrained=False)
        check_fit(outline, checkpoint["model"], what)
        model = method(config, classes, pretrained=False)
    except UserError:
        raise
    except Exception as error:    # whatever a network may say of such numbers
        raise UserError(f"{path} has no usable config ({type(error).__name__}: {in_short(error)}); "
                        "expected a checkpoint of this version of train.py") from None
    model.load_state_dict(checkpoint["model"])
    return model


MOMENTS = {"step", "exp_avg", "exp_avg_sq"}    # what Adam and AdamW keep of a parameter
CHOSEN = {"lr", "weight_decay", "fused"}    # by the configuration and the device


def check_optimizer_state(optimizer, state):
    """Raises ValueError unless `state` could be this optimizer's: torch itself does not look."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for index, values in state["state"].items():
        if index not in range(len(parameters)) or values.keys() != MOMENTS:
            raise ValueError(f"the state of parameter {index!r} is none of Adam's")
        for name, value in values.items():
            expected = torch.zeros(()) if name == "step" else parameters[index]
            if not torch.is_tensor(value) or misfit(value, expected):
                raise ValueError(f"{name} of parameter {index} is no tensor of its shape")
        if not 1 <= values["step"] < math.inf:
            raise ValueError(f"parameter {index} is at step {values['step']}")
    groups = optimizer.state_dict()["param_groups"]
    for group, own in zip(state["param_groups"], groups, strict=True):
        for name in ("lr", "weight_decay"):
            if type(group[name]) not in (int, float) or not math.isfinite(group[name]):
                raise ValueError(f"{name} is {in_short(repr(group[name]), 40)}")
        other = [name for name in own.keys() & group.keys() if group[name] != own[name]]
        if not CHOSEN.issuperset(other) or "params" not in group:
            raise ValueError(f"{', '.join(sorted(other)) or 'params'} is not this run's")


def check_scale(state):
    """Raises ValueError unless `state` could be that of float16's loss scaling."""
    if not all(type(number) in (int, float) for number in state.values()):
        raise ValueError("the scale of float16 is no number")
    if not all(0 <= number < math.inf for number in state.values()) or state["scale"] == 0:
        raise ValueError(f"the scale of float16 is {state['scale']}")
