"""Weights: tensors read without running anything, loaded strictly, downloaded once; checkpoints."""
import json
import os
import warnings
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

from support.files import UserError, done, in_short, read_log, write_atomic, write_log
from support.options import add_options, early, fill, load_method
from support.parallel import join, processes

import torch

COUNTER = "num_batches_tracked"    # of a batch norm; files of 2017 lack it
RELEASE = "best_model.pth"    # one of the authors' three files


def read_tensors(path):
    """A .safetensors or torch file -> the dict in it. Nothing in it is run. Raises UserError."""
    try:
        if str(path).endswith(".safetensors"):
            return read_safetensors(path)
        return dict(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:    # a torn zip, another pickle: torch raises a dozen types
        raise UserError(f"{path} cannot be read as a torch file of named tensors "
                        f"({type(error).__name__}); check the path, or download or save it again"
                        ) from error


DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16,
          "BF16": torch.bfloat16, "I64": torch.int64}


def read_safetensors(path):
    """The length of a JSON header in 8 bytes, the header, the numbers -> {name: tensor}."""
    content = bytearray(Path(path).read_bytes())
    start = 8 + int.from_bytes(content[:8], "little")
    tensors = {}
    for name, about in json.loads(content[8:start]).items():
        if name != "__metadata__":
            first, last = about["data_offsets"]
            numbers = content[start + first:start + last]
            flat = torch.frombuffer(numbers, dtype=DTYPES[about["dtype"]])
            tensors[name] = flat.view(about["shape"])
    return tensors


def read_pretrained(path):
    """A file of others, whose tensors lie under state_dict, model or teacher, or have `module.`
    before their names -> {name: tensor}. Raises UserError."""
    tensors = read_tensors(path)
    for key in "state_dict", "model", "teacher", "state_dict":
        if isinstance(tensors.get(key), dict):
            tensors = tensors[key]
    return {name.removeprefix("module."): tensor for name, tensor in tensors.items()}


def load_strictly(module, tensors, what, name_of=str):
    """Load a state dict that must fit exactly (but for COUNTERs, as in torch). name_of: our name of
    a tensor -> its name there. Raises UserError."""
    own = {name_of(name): tensor.shape for name, tensor in module.state_dict().items()}
    tensors = {name: torch.tensor(0) for name in own if name.endswith(COUNTER)} | tensors
    found = {name: getattr(tensor, "shape", None) for name, tensor in tensors.items()}
    both = own.keys() & found.keys()
    kinds = {"missing": own.keys() - both, "surplus": found.keys() - both,
             "of another shape": {name for name in both if own[name] != found[name]}}
    if wrong := [f"{len(names)} tensors are {kind}, such as {min(names)}"
                 for kind, names in kinds.items() if names]:
        raise UserError(f"{what} does not fit: {'; '.join(wrong)}; is it the right file?")
    module.load_state_dict({name: tensors[name_of(name)] for name in module.state_dict()})


def download(what, ways_out, fetch, *words, **settings):
    """fetch(*words, **settings), without warnings. Raises UserError that names the ways out."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")    # three about xFormers, harmless
            return fetch(*words, **settings)
    except Exception as error:    # no network, no space, a changed address: a dozen types
        raise UserError(f"{what} is neither cached nor downloadable here ({type(error).__name__}: "
                        f"{in_short(error, 80)}); either run once with a network, or "
                        f"{ways_out}") from error


def without_frozen(model):
    return {n: tensor for n, tensor in model.state_dict().items() if not n.startswith(model.frozen)}


def read_checkpoint(path):
    """The folder of a run, or its last.pt -> the dict that train.py saved. Raises UserError."""
    if os.path.isdir(path):
        path = f"{path}/last.pt"
    checkpoint = read_tensors(path)
    if not checkpoint.keys() >= {"model", "config", "options", "classes", "method"}:
        raise UserError(f"{path} is not a checkpoint of this version of train.py: train again, or "
                        "check out the version that wrote it")
    return checkpoint


def take_weights(model, checkpoint, path, but=()):
    """Load a checkpoint's tensors, all `but` those of such names. Raises UserError."""
    kept = *model.frozen, *but
    tensors = {n: tensor for n, tensor in checkpoint["model"].items() if not n.startswith(kept)}
    own = {n: tensor for n, tensor in model.state_dict().items() if n.startswith(kept)}
    load_strictly(model, tensors | own, path)


def method_of(checkpoint, given):
    """The name of the method to load. Your own code is run only if --method names it, never because
    a checkpoint does. Raises UserError."""
    if not checkpoint:
        return given
    stored = checkpoint["method"]
    is_same = given.rpartition(":")[2] == stored.rpartition(":")[2]    # its file may have moved
    if (given or ":" in stored) and not is_same:
        raise UserError(f"--method {given or 'is not given'}; it is a run of {stored}: expected "
                        "that method, FILE.py:CLASS if it is your own code")
    return given or stored


def save(run, log, model, optimizer, scaler, dataset, config, options):
    """Process 0 writes log.jsonl and last.pt: all that a resume needs."""
    checkpoint = {
        "model": without_frozen(model), "epoch": done(log),
        "optimizer": optimizer.state_dict(), "scaler": scaler.state_dict(),
        "config": asdict(config), "options": asdict(options), "method": config.method,
        "classes": dataset.classes, "dataset": dataset.name}
    if processes()[0] == 0:
        # The log first: a surplus line is dropped on resuming, a missing one would be lost.
        write_log(run, log)
        write_atomic(f"{run}/last.pt", lambda file: torch.save(checkpoint, file))


def restore(checkpoint, run, config, dataset, optimizer, scaler):
    """Optimizer and scaler as they were -> the log so far. Raises UserError."""
    if checkpoint["classes"] != dataset.classes:
        raise UserError(f"{run} was trained on other identities than those of {config.data}; "
                        "expected the same dataset: check --data")
    state = checkpoint["optimizer"]
    for stored, own in zip(state["param_groups"], optimizer.param_groups, strict=True):
        stored |= own | {"params": stored["params"]}    # rates by this command line and this device
    optimizer.load_state_dict(state)
    if checkpoint["scaler"]:
        scaler.load_state_dict(checkpoint["scaler"])
    return read_log(run, checkpoint["epoch"])


def add_run_options(parser):
    parser.add_argument("--checkpoint", metavar="RUN", help="a run's folder, its last.pt, or the "
                        "folder of the authors' three files")
    group = parser.add_argument_group("in place of the run's own values (see train.py --help)")
    for name in "data", "reader", "frame-rule", "device", "method":
        group.add_argument(f"--{name}")
    for name in "frames", "test-frames", "workers", "test-batch":
        group.add_argument(f"--{name}", type=int)
    path, method = early(None, "checkpoint", "method").values()
    if path and not os.path.isfile(f"{path}/{RELEASE}"):
        checkpoint = read_checkpoint(path)
        method = load_method(method_of(checkpoint, method))
        add_options(group, method.Options, checkpoint["options"])


def load_run(path, given=None):
    """See --checkpoint -> model in eval mode, its config (a namespace), {"method", "dataset",
    "classes", ...}. given: {option: value} in place of the run's own. Raises UserError."""
    given = given or {}
    if not path:
        raise UserError("no run; expected --checkpoint RUN; see --help")
    if os.path.isfile(f"{path}/{RELEASE}"):
        from support.official import load_release

        model, config = load_release(load_method("dinogrl"), path)
        checkpoint = {"method": "dinogrl", "dataset": "", "classes": []}
    else:
        checkpoint = read_checkpoint(path)
        method = load_method(method_of(checkpoint, given.get("method", "")))
        config = checkpoint["config"]
        options = fill(method.Options, checkpoint["options"] | given)
        model = method(options, len(checkpoint["classes"]), config["size"], pretrained=False)
        take_weights(model, checkpoint, path)
    if "frames" in given:    # counts here, unless test_frames is given too
        config["test_frames"] = 0
    config = {name: given.get(name, value) for name, value in config.items()}
    model.eval().to(join(given.get("device", "")))
    return model, SimpleNamespace(**config), checkpoint


def check_reader(config, given):
    """Your own reader is run only where the command line names it. Raises UserError."""
    if config.reader and "reader" not in given:
        raise UserError(f"the run's reader {config.reader} is your own code; expected --reader "
                        'FILE.py:FUNCTION, or --reader "" for a dataset that needs none')
