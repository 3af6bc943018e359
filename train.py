"""Training: one loop, read from top to bottom. `python train.py` alone makes synthetic pedestrians and learns them.

    python train.py                          the small preset on walkers: minutes on a laptop's CPU, offline
    python train.py --data PATH              the paper's recipe on HITSZ-VCM or BUPTCampus
    python train.py --method lsmrl ...       the second method, with its own recipe and its own small preset
    python train.py --resume runs/NAME       goes on exactly where a run stopped, be it by Ctrl-C or by a kill
    torchrun --nproc_per_node=N -- train.py ...    the same run on N GPUs (or processes of a CPU)

A run lives in one folder: config.json, log.jsonl (a line per epoch), last.pt, results.json, curves.png, for each evaluation a
silhouettes-EPOCH.png (DinoGRL). The result is the last epoch's: choosing the best epoch by its test score would be choosing on the
test set.

Of several processes each takes its share of a step's identities; gathered (data.py) lets the losses that compare tracklets see them
all, DistributedDataParallel averages the gradients, process 0 logs and saves.

Quick question: where is the validation set? (Neither benchmark has one. So nothing here is chosen by a score.)

Ours, not the papers': bfloat16 in place of float16 (which is an option); DinoGRL's 80 epochs in all; the mask bottleneck's warm-up
where no trained one is given; the small presets; exact resuming.
"""
import argparse
import bisect
import json
import math
import os
import re
import signal
import time
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, fields, make_dataclass, replace
from functools import partial

os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")    # or each process warns that it found no unused parameter, before its first step

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint as recomputed
from tqdm import tqdm

import walkers
from data import (Cache, Chunks, Frames, IdentitySampler, UserError, augment, cli, gathered, ignore_interrupts, is_walkers, load_dataset, option,
                  processes, write_atomic)
from evaluate import METHODS, choose_device, evaluate, keep_memory, read_checkpoint, table, write_json, write_picture
from pictures import draw_curves, draw_silhouettes, samples
from sasgl import fill


@dataclass
class Config:
    """Every choice of a run that is not the method's own. A method adds its Options, which may change a default here. The defaults
    are `--preset paper`; Options.small holds what `--preset small` changes."""
    data: str = option("", "HITSZ-VCM or BUPTCampus folder; without it walkers are made under runs/ and learned")
    auxiliary: bool = option(False, "BUPTCampus: train on its auxiliary set too; about twice the identities")
    method: str = option("dinogrl", "which method to train: dinogrl or lsmrl; with --help it lists that method's options")
    seed: int = option(1, "for weights, sampling and augmentation; report the spread of at least 3", 0)
    device: str = option("", "cuda, cuda:1, cpu; default: cuda if there is one")
    # schedule
    epochs: int = option(80, "nothing moves much ten epochs after the last milestone; 0 evaluates the untrained model", 0)
    steps: int = option(200, "steps per epoch", 1)
    identities: int = option(4, "identities per step, of all processes together; halve it before anything else if memory runs out", 2)
    tracklets: int = option(4, "tracklets per identity and modality in a step; fewer than 2 starves the triplet loss", 1)
    frames: int = option(6, "frames per tracklet; more helps a little and costs in proportion", 1)
    optimizer: str = option("Adam", "Adam, or AdamW: decoupled weight decay")
    lr: float = option(3.5e-4, "learning rate; scale it with the identities per step", 1e-12)
    weight_decay: float = option(5e-4, "weight decay, on every parameter as in the release", 0)
    warmup_epochs: int = option(10, "linear warm-up from 0.01 of the rate; shorten it only for smaller networks", 0)
    milestones: tuple = option((40, 70), "epochs at which the rate falls tenfold")
    cosine: bool = option(False, "instead of milestones: after the warm-up the rate follows a cosine that ends at 0.01 after the last epoch")
    precision: str = option("auto", "auto, bfloat16, float16 (with loss scaling), float32; auto: bfloat16 on CUDA, else float32")
    checkpoint_activations: bool = option(False, "compute activations again in the backward pass: far less memory, 1.2 times the time, the same results")
    accumulate: int = option(1, "cut a step into this many chunks of identities, with the full batch's loss: less memory, 1.5 times the time", 1)
    # data
    size: tuple = option((256, 128), "height and width of the frames; the height is cut into 16 strips after 16-fold reduction", 1)
    erase: float = option(0.5, "probability of random erasing; lower it for short runs, which underfit", 0)
    cache: str = option("", "file for the training frames, resized and decoded, made once: for when reading images is what the GPU waits for")
    workers: int = option(min(8, os.cpu_count() or 1), "loader processes; raise it if the GPU waits, 0 where reading is nothing beside a CPU step", 0)
    test_batch: int = option(32, "tracklets at a time in evaluation", 1)
    evaluate_every: int = option(0, "epochs between evaluations; 0: after the last only (curves cost an embedding pass each)", 0)


def config_of(method):
    """The dataclass of a method's whole configuration: Config with the method's Options."""
    if method not in METHODS:
        raise UserError(f"--method {method} is not known; expected one of {', '.join(METHODS)}")
    return make_dataclass("Config", [], bases=(METHODS[method][1], Config))


BAR = "{desc} {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"


def brief(means):
    """{"identity_gait": 5.1, "identity_appearance": 4.8, ...} -> "id 5.1/4.8 ...": a line for the progress bar, where every
    column counts. log.jsonl has the names in full."""
    groups = {}
    for name, value in means.items():
        groups.setdefault(name.split("_")[0], []).append(f"{value:.2g}")
    names = {"identity": "id", "triplet": "tri", "accuracy": "acc", "diversity": "div", "contrast": "con", "consistency": "cons"}
    return " ".join(f"{names.get(name, name)} {'/'.join(values)}" for name, values in groups.items())


def written(value):
    """A default as it would be typed."""
    if isinstance(value, tuple):
        return " ".join(map(str, value))
    return {True: "on", False: "off", "": "none"}.get(value, value) if isinstance(value, (bool, str)) else value


def on_off(word):
    if word not in ("on", "off"):
        raise argparse.ArgumentTypeError(f"{word!r}; expected on or off")
    return word == "on"


def parse():
    """The command line -> the method's Config, checkpoint to go on from or None, the run's folder or None, the resumed one or None."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)    # which method decides which options there are
    first.add_argument("--method")
    first.add_argument("--resume")
    first, _ = first.parse_known_args()
    if "" in (first.method, first.resume):
        raise UserError("--method or --resume is empty; name a method, a run, or drop the option: is a shell variable unset?")
    checkpoint = read_checkpoint(first.resume) if first.resume else None
    method = checkpoint["method"] if checkpoint else first.method or Config.method
    if first.method not in (None, method):
        raise UserError(f"--method {first.method} cannot resume a run of {method}; drop it, or begin a new run")
    kind_of_config = config_of(method)
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], argument_default=argparse.SUPPRESS, allow_abbrev=False)
    parser.add_argument("--preset", choices=("paper", "small"), help="paper (default for a real benchmark) or small (default for walkers)")
    parser.add_argument("--run", metavar="DIR", help="the run's folder; default: a new one under runs/")
    parser.add_argument("--resume", metavar="RUN", help="a run's folder; other options given here override its own")
    for f in fields(kind_of_config):
        name, kind, small = "--" + f.name.replace("_", "-"), type(f.default), kind_of_config.small.get(f.name, f.default)
        show = f"{f.metadata['help']} ({written(f.default)}" + (f"; small: {written(small)})" if small != f.default else ")")
        if kind is bool:
            parser.add_argument(name, type=on_off, metavar="on|off", help=show)
        elif kind is tuple:
            parser.add_argument(name, type=int, nargs="*", metavar="N", help=show)
        else:
            parser.add_argument(name, type=kind, metavar={int: "N", float: "X", str: "NAME"}[kind], help=show)
    given = {k: tuple(v) if isinstance(v, list) else v for k, v in vars(parser.parse_args()).items()}
    preset, run, resume = (given.pop(k, None) for k in ("preset", "run", "resume"))
    if given.get("data") == "":
        parser.error("--data is empty; name a folder, or drop it for walkers")
    if resume and preset:
        parser.error("--preset cannot be changed on --resume; name the options to override")
    if resume:
        missing = {"optimizer", "scheduler", "scaler", "random"} - checkpoint.keys()
        if missing:
            raise UserError(f"{resume} can be evaluated but not resumed: it has no {', '.join(sorted(missing))}")
        resume = resume if os.path.isdir(resume) else os.path.dirname(resume) or "."
        try:
            config = kind_of_config(**checkpoint["config"])
        except (TypeError, ValueError) as error:
            raise UserError(f"{resume} has another version's config ({error}); resume it with the code that wrote it") from None
        if given.get("optimizer", config.optimizer) != config.optimizer:
            raise UserError(f"--optimizer {given['optimizer']} cannot go on with the state of {config.optimizer}; drop it, or begin a new run")
        return replace(config, **given), checkpoint, run or resume, resume
    real = "data" in given and not is_walkers(given["data"])
    preset = kind_of_config.small if (preset or ("paper" if real else "small")) == "small" else {}
    return kind_of_config(**{**preset, **given, "method": method}), None, run, None


def check(config):
    """Raises UserError for a configuration that cannot work."""
    for f in fields(config):
        value, least = getattr(config, f.name), f.metadata["least"]
        if type(value) is not type(f.default) and (type(f.default), type(value)) != (float, int):    # a checkpoint may hold anything
            raise UserError(f"{f.name} is {value!r:.60}; expected {type(f.default).__name__}, as in {f.default!r}")
        several = value if isinstance(value, tuple) else (value,)
        if isinstance(value, tuple) and (least is not None and len(value) != len(f.default) or not all(type(v) is int for v in value)):
            raise UserError(f"--{f.name.replace('_', '-')} {written(value)}; expected {len(f.default)} numbers")
        if least is not None and not all(least <= v < math.inf for v in several):
            raise UserError(f"--{f.name.replace('_', '-')} {written(value)}; expected at least {least}" + " and finite" * isinstance(value, float))
    if list(config.milestones) != sorted(config.milestones):
        raise UserError(f"--milestones {written(config.milestones)}; expected them in ascending order")
    for name, known in (("precision", ("auto", "bfloat16", "float16", "float32")), ("optimizer", ("Adam", "AdamW"))):
        if getattr(config, name) not in known:
            raise UserError(f"--{name} {getattr(config, name)}; expected one of {', '.join(known)}")
    config.check()


def run_folder(config, run, resume, name, first_epoch):
    """-> the run's folder, made if need be, and the log so far, a dict an epoch. Raises UserError if `run` holds anything of another
    run: nothing is ever overwritten."""
    if run is None:
        stem = os.path.join("runs", f"{config.method}-{name.lower()}")
        run = next(r for r in (f"{stem}-{n}" for n in range(1, 10 ** 6)) if not os.path.exists(r))
    log = []
    try:
        os.makedirs(run, exist_ok=True)
        if resume and os.path.samefile(run, resume):
            path = os.path.join(run, "log.jsonl")
            lines = open(path, encoding="utf-8").read().splitlines() if os.path.exists(path) else []
            log = [line for line in map(json.loads, lines) if line["epoch"] <= first_epoch]    # a run cut before its checkpoint has one more
            for leftover in [name for name in os.listdir(run) if re.search(r"\.\d+\.tmp$", name)]:
                os.remove(os.path.join(run, leftover))    # what write_atomic was writing when the run was killed
        elif set(os.listdir(run)) - {"config.json"}:    # that alone is left by a run that was stopped before its first step
            raise UserError(f"{run} is not empty; choose another --run" + (f", or go on with it by --resume {run}" if
                            os.path.exists(os.path.join(run, "last.pt")) else ""))
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{run}/log.jsonl has a line that is none ({type(error).__name__}: {' '.join(str(error).split())[:80]}); expected one JSON object "
                        "an epoch; remove that line") from None
    except OSError as error:
        raise UserError(f"{run} cannot be used ({error}); choose another --run") from None
    return run, log


def rate(config):
    """Epoch -> factor of the learning rate: linear warm-up from 0.01, then x0.1 at each milestone, or a cosine that
    would be at 0.01 one epoch after the last."""
    def factor(epoch):
        if epoch < config.warmup_epochs:
            return 0.01 + 0.99 * epoch / config.warmup_epochs
        if config.cosine:
            past = min(1.0, (epoch - config.warmup_epochs) / max(1, config.epochs - config.warmup_epochs))
            return 0.01 + 0.99 * (1 + math.cos(math.pi * past)) / 2
        return 0.1 ** bisect.bisect_right(config.milestones, epoch)
    return factor


def warm_up(model, loader, sampler, config, device):
    """Trains the module of model.warm_up_stage alone for a few steps, so that the rest never sees it untrained. [ours]"""
    (module, steps, lr), (rank, world) = model.warm_up_stage, processes()
    optimizer = torch.optim.Adam(module.parameters(), lr=lr)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1, 0, steps)
    step, bar = 0, tqdm(total=steps, desc="warm-up", bar_format=BAR, disable=rank > 0)
    while step < steps:
        sampler.epoch = 10 ** 6 + step    # batches of their own, which no epoch repeats
        for frames, modality, index in loader:
            losses = model.warm_up(augment(frames.to(device), modality, np.random.default_rng([config.seed, step, 0, rank]), config.erase))
            optimizer.zero_grad()
            sum(losses.values()).backward()
            for parameter in module.parameters() if world > 1 else ():    # DistributedDataParallel is for the whole model
                dist.all_reduce(parameter.grad)
                parameter.grad /= world
            optimizer.step()
            scheduler.step()
            bar.set_postfix_str(brief({name: value.item() for name, value in losses.items()}))
            bar.update()
            step += 1
            if step == steps:
                break
    bar.close()


# ------------------------------------------------------------ a step, with less memory ----

@contextmanager
def untracked(module):
    """Batch norms inside go on normalising by the batch at hand, and leave their running statistics as they are."""
    kept = [(m, m.momentum, m.num_batches_tracked) for m in module.modules() if getattr(m, "running_mean", None) is not None]
    for norm, _, batches in kept:
        norm.momentum, norm.num_batches_tracked = 0.0, batches.clone()
    try:
        yield
    finally:
        for norm, momentum, batches in kept:
            norm.momentum, norm.num_batches_tracked = momentum, batches


def recompute(model):
    """--checkpoint-activations: the modules of `model` whose class says `recomputable` keep their input alone and compute the rest once
    more in the backward pass. [ours]"""
    for module in model.modules():
        if getattr(module, "recomputable", False):
            contexts = lambda module=module: (nullcontext(), untracked(module))    # else a batch would be counted twice
            module.forward = partial(recomputed, module.forward, use_reentrant=False, context_fn=contexts)


def forward_backward(model, frames, modality, label, accumulate=1, autocast=nullcontext, scale=lambda loss: loss):
    """Adds the gradient of scale(sum of losses) of a batch to its parameters' -> losses, shown (see DinoGRL.forward), detached.

    frames (B, T, 3, H, W), modality and label (B,); model may be a DistributedDataParallel. accumulate > 1: the batch goes through the
    network in that many chunks of whole identities, twice (see data.Chunks; as GradCache, Gao et al. 2021), so that losses which compare
    tracklets compare them all; batch norms inside the network and SASGL's blanking of codes see their chunk alone. [ours]"""
    def backward(chunk):
        with autocast():
            losses, shown = model(frames[chunk], modality[chunk], label[chunk])
        scale(sum(losses.values()) / accumulate).backward()
        return {k: v.detach() for k, v in losses.items()}, {k: v.detach() for k, v in shown.items()}
    if accumulate == 1:
        return backward(slice(None))

    net, device = getattr(model, "module", model), frames.device
    heads = torch.nn.ModuleList(part for name, part in net.named_children() if name.endswith(("head", "heads")))    # these see the whole batch
    pids = label.tolist()
    order = {pid: i for i, pid in enumerate(dict.fromkeys(pids))}
    place = torch.tensor([order[pid] * accumulate // len(order) for pid in pids])
    chunks = [(place == a).nonzero()[:, 0] for a in range(accumulate)]
    Chunks.step, states, results = Chunks(accumulate), [], []
    try:
        with torch.no_grad(), untracked(net), autocast():
            for a, chunk in enumerate(chunks):
                states.append((torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None))
                Chunks.step.begin(a, recording=True)
                net(frames[chunk], modality[chunk], label[chunk])
        for a, chunk in enumerate(chunks):
            last = a == accumulate - 1
            torch.set_rng_state(states[a][0])    # the same dropout
            if device.type == "cuda":
                torch.cuda.set_rng_state(states[a][1], device)
            Chunks.step.begin(a, recording=False)
            with nullcontext() if last else untracked(heads), nullcontext() if last or model is net else model.no_sync():
                results.append(backward(chunk))
    finally:
        Chunks.step = None
    return tuple({name: torch.stack([values[i][name] for values in results]).mean(0) for name in results[0][i]} for i in (0, 1))


def main():
    config, checkpoint, run, resume = parse()
    check(config)
    keep_memory()
    device = choose_device(config.device)
    rank, world = processes()
    if config.accumulate > 1 and config.identities % (config.accumulate * world):
        raise UserError(f"--accumulate {config.accumulate} chunks in each of {world} processes of --identities {config.identities}; expected chunks of whole "
                        "identities: raise --identities or lower --accumulate")
    precision = {"auto": "bfloat16" if device.type == "cuda" else "float32"}.get(config.precision, config.precision)
    autocast = partial(torch.autocast, device.type, getattr(torch, precision), enabled=precision != "float32")
    start = time.time()

    # Data
    if not config.data:
        config.data = os.path.join("runs", "walkers")
        if rank == 0:
            walkers.make_walkers(config.data, test_identities=24)
        if world > 1:
            dist.barrier()
    dataset = load_dataset(config.data, config.auxiliary)
    label_of = {pid: label for label, pid in enumerate(dataset.classes)}
    label_of_tracklet = torch.tensor([label_of[t.pid] for t in dataset.train])
    sampler = IdentitySampler(dataset.train, P=config.identities, K=config.tracklets, steps=config.steps, seed=config.seed, rank=rank, world=world)
    cache = None
    if config.cache:
        make = partial(Cache, config.cache, dataset.train, size=config.size, root=dataset.root, workers=config.workers)
        first_here = world == 1 or os.environ["LOCAL_RANK"] == "0"
        cache = make() if first_here else None
        if world > 1:
            dist.barrier()    # the first process of a machine makes it where there is none
        cache = cache or make()
    loader = torch.utils.data.DataLoader(Frames(dataset.train, size=config.size, T=config.frames, cache=cache), batch_sampler=sampler,
                                         num_workers=config.workers, pin_memory=device.type == "cuda",
                                         persistent_workers=config.workers > 0, worker_init_fn=ignore_interrupts,
                                         generator=torch.Generator())    # its own: it would draw from the model's otherwise

    # Model, optimizer
    torch.manual_seed(config.seed)
    waits = world > 1 and os.environ["LOCAL_RANK"] != "0"
    if waits:
        dist.barrier()    # while the first process of the machine downloads what is missing
    model = METHODS[config.method][0](config, len(dataset.classes), pretrained=resume is None).to(device)
    if world > 1 and not waits:
        dist.barrier()
    groups = model.parameter_groups()
    rates = [config.lr * group.pop("factor") for group in groups]
    optimizer = getattr(torch.optim, config.optimizer)([{**group, "lr": lr} for group, lr in zip(groups, rates)],
                                                       weight_decay=config.weight_decay, fused=device.type == "cuda")
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, rate(config))
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "float16")
    if rank:
        torch.manual_seed(config.seed + 10 ** 6 * rank)    # the same weights, but dropout of its own
    first_epoch, first_step, sums = 0, 0, {}
    if checkpoint:
        if checkpoint["classes"] != dataset.classes:
            raise UserError(f"the run knows other identities than the {len(dataset.classes)} of {config.data}; expected the dataset it "
                            "was trained on: check --data")
        fill(model, checkpoint["model"], f"{run} (with these options)")
        try:
            for group in checkpoint["optimizer"]["param_groups"]:
                group["fused"] = device.type == "cuda"    # the run may have been another device's
            optimizer.load_state_dict(checkpoint["optimizer"])
            scheduler.load_state_dict(checkpoint["scheduler"])
            if checkpoint["scaler"] and scaler.is_enabled():
                scaler.load_state_dict(checkpoint["scaler"])
            first_epoch, first_step, sums = int(checkpoint["epoch"]), int(checkpoint.get("step", 0)), dict(checkpoint.get("sums", {}))
            for kind, restore in {"cpu": torch.set_rng_state, "cuda": lambda state: torch.cuda.set_rng_state(state, device)}.items():
                states = checkpoint["random"][kind]    # a row per process
                if kind in ("cpu", device.type) and states is not None and rank < len(torch.atleast_2d(states)):
                    restore(torch.atleast_2d(states)[rank].clone())    # torch reads a view from its storage's beginning
        except Exception as error:    # torch says a dozen things of a state that is none
            raise UserError(f"{resume} can be evaluated but not resumed ({type(error).__name__}: {' '.join(str(error).split())[:120]}); expected "
                            "last.pt as train.py wrote it") from None
        if first_step >= config.steps:
            raise UserError(f"--steps {config.steps}; {run} was interrupted after step {first_step} of an epoch; expected more steps")
        scheduler.base_lrs = rates    # the schedule's options may have been overridden
        for group, lr in zip(optimizer.param_groups, rates):
            group.update(lr=lr * rate(config)(first_epoch), initial_lr=lr, weight_decay=config.weight_decay)
        checkpoint = None    # gigabytes that nobody needs any more
    place = [*run_folder(config, run, resume, dataset.name, first_epoch)] if rank == 0 else [None, None]
    if world > 1:
        dist.broadcast_object_list(place)
    run, log = place
    if rank == 0:
        write_json(os.path.join(run, "config.json"), asdict(config))
        print(f"{config.method} on {dataset.name}: {len(dataset.classes)} training identities, {len(dataset.train):,} tracklets; "
              f"{sum(p.numel() for p in model.parameters() if p.requires_grad):,} parameters to train; "
              f"{device if world == 1 else f'{world} x {device.type}'}, {precision}; run {run}")
    if resume is None and config.epochs and model.warm_up_stage:
        model.train()
        warm_up(model, loader, sampler, config, device)
    if config.checkpoint_activations:
        recompute(model)
    parallel = model
    if world > 1:
        if device.type == "cuda":    # torch has no synchronised batch norm for CPUs: there each process normalises its share (but for ForegroundNorm)
            for name, module in model.named_children():
                if not name.endswith(("head", "heads")):    # these see the gathered batch already
                    setattr(model, name, torch.nn.SyncBatchNorm.convert_sync_batchnorm(module))
        parallel = DistributedDataParallel(model, find_unused_parameters=True)    # by an ablation, say; no device_ids: modality stays on the CPU

    def save(epoch, step=0, sums={}):
        """Everything that going on exactly needs: `epoch` whole epochs and `step` steps of the next are done."""
        random = {"cpu": gathered(torch.get_rng_state()[None].to(device)).cpu(),    # (processes, bytes)
                  "cuda": gathered(torch.cuda.get_rng_state(device)[None].to(device)).cpu() if device.type == "cuda" else None}
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict(),
                 "scaler": scaler.state_dict(), "epoch": epoch, "step": step, "sums": sums, "config": asdict(config),
                 "classes": dataset.classes, "method": config.method, "random": random}

        def write(file):
            try:
                torch.save(state, file)
            except RuntimeError as error:    # what torch makes of a full disk
                raise OSError(error) from None
        if rank == 0:
            write_atomic(os.path.join(run, "last.pt"), write)

    if resume is None and config.epochs:
        save(0)    # from here on a run that is killed can be resumed
    interrupted = []

    def on_interrupt(*_):    # the step is finished first; a second Ctrl-C stops at once
        interrupted.append(True)
        if world == 1:    # of several processes each may hear it twice, from the terminal and from torchrun
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def due(epoch):
        return epoch == config.epochs or bool(config.evaluate_every) and epoch % config.evaluate_every == 0

    if log and not first_step and first_epoch < config.epochs and due(first_epoch) and "rank-1" not in log[-1]:
        report(model, dataset, config, device, run, log, first_epoch, start)    # the run was stopped before it came to that
    for epoch in range(first_epoch, config.epochs):
        model.train()
        sampler.epoch, sampler.start, recent, epoch_start = epoch, first_step, [], time.time()
        signal.signal(signal.SIGINT, on_interrupt)
        bar = tqdm(loader, desc=f"epoch {epoch + 1}/{config.epochs}", bar_format=BAR, initial=first_step, total=config.steps, disable=rank > 0)
        for step, (frames, modality, index) in enumerate(bar, first_step):
            frames = augment(frames.to(device, non_blocking=True), modality,
                             np.random.default_rng([config.seed, epoch, step, rank]), config.erase)
            label = label_of_tracklet[index].to(device, non_blocking=True)
            optimizer.zero_grad()
            losses, shown = forward_backward(parallel, frames, modality, label, config.accumulate, autocast, scaler.scale)
            scaler.step(optimizer)
            scaler.update()

            values = {**losses, **shown}
            sums = {name: sums.get(name, 0) + value for name, value in values.items()}
            recent.append((step, index, values))
            stop = False
            if step % 10 == 9 or step == config.steps - 1 or device.type == "cpu" or interrupted and world == 1:    # reading a value waits for the GPU
                seconds = time.time() - epoch_start
                numbers = torch.stack([(value / (step + 1)).double().to(device) for value in sums.values()] + [torch.tensor(len(interrupted), device=device).double()])
                if world > 1:
                    dist.all_reduce(numbers)    # what one process knows (a Ctrl-C too), all know
                *means, stop = (numbers / world).tolist()
                means = dict(zip(sums, means))
                if not all(np.isfinite(value) for value in means.values()):
                    raise UserError(culprit(recent, dataset, f"epoch {epoch + 1}", run))
                recent.clear()
                bar.set_postfix_str(f"{(step + 1 - first_step) * world * frames.shape[0] * frames.shape[1] / seconds:.0f} frames/s "
                                    + brief(means))
            if epoch == first_epoch and step == min(first_step + 2, config.steps - 1) and device.type == "cpu" and dataset.name != "walkers" and rank == 0:
                bar.write(f"no CUDA here: about {seconds / (step + 1 - first_step) * config.steps / 3600:.2g} hours an epoch on this CPU")
            if stop and step + 1 < config.steps:
                save(epoch, step + 1, {name: gathered(value.to(device)[None]).mean() for name, value in sums.items()})
                bar.close()
                raise KeyboardInterrupt(f"interrupted and saved after step {step + 1} of epoch {epoch + 1}; go on: python train.py --resume {run}")

        # Log, save, evaluate
        line = {"epoch": epoch + 1, "lr": optimizer.param_groups[0]["lr"], **means, "seconds": round(time.time() - epoch_start, 1)}
        scheduler.step()
        log.append(line)
        first_step, sums = 0, {}
        if rank == 0:
            write_log(run, log)
        save(epoch + 1)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if stop:
            raise KeyboardInterrupt(f"interrupted and saved after epoch {epoch + 1}; go on: python train.py --resume {run}")
        if due(epoch + 1):
            report(model, dataset, config, device, run, log, epoch + 1, start)
    if first_epoch >= config.epochs:
        if rank == 0:
            print(f"{run} has its {first_epoch} epochs already; raise --epochs to go on" if resume else "the untrained model")
        report(model, dataset, config, device, run, log, first_epoch, start)


def culprit(recent, dataset, epoch, run):
    """recent: (step, tracklet indices, {name: value}) of the steps since all was well -> the words that name the first value which is
    not finite, in whichever process, and the tracklets of its batch. last.pt is older, and good."""
    words = None
    for step, index, values in recent:
        for name, value in values.items():
            if not (words or value.isfinite()):
                batch = " ".join(os.path.relpath(os.path.dirname(dataset.train[i].frames[0]), dataset.root) for i in index.tolist())
                words = (f"{name} is {value.item()} in {epoch}, step {step + 1}; {run}/last.pt is older and good: resume it with a lower "
                         f"--lr or --precision float32, or look at the batch's tracklets: {batch}")
    everyone = [words]
    if processes()[1] > 1:
        everyone = [None] * processes()[1]
        dist.all_gather_object(everyone, words)
    return next(filter(None, everyone), f"the mean of a loss is not finite in {epoch}; {run}/last.pt is older and good: resume it with a lower --lr")


def write_log(run, log):
    write_atomic(os.path.join(run, "log.jsonl"), lambda file: file.write("".join(f"{json.dumps(line)}\n" for line in log).encode()))


def report(model, dataset, config, device, run, log, epoch, start):
    """Evaluates, prints the table, writes results.json and the pictures, adds Rank-1 and mAP to the last line of the log."""
    for buffer in model.buffers() if processes()[1] > 1 else ():    # process 0's batch norms, which are saved, count
        dist.broadcast(buffer, 0)
    try:
        results, *_ = evaluate(model, dataset, config, device)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"interrupted in the evaluation after epoch {epoch}, which is saved; go on: python train.py --resume {run}") from None
    if results is None:    # process 0 does the rest
        return
    results = {"method": config.method, "dataset": dataset.name, **results, "seconds": round(time.time() - start, 1)}
    write_json(os.path.join(run, "results.json"), results)
    drawn = []
    if getattr(model, "sasgl", None) is not None:
        drawn.append(f"silhouettes-{epoch}.png shows what the model sees")
        write_picture(os.path.join(run, f"silhouettes-{epoch}.png"), draw_silhouettes(model, dataset, samples(dataset.test), config, device))
    if log:
        log[-1].update({key: {d: r[key] for d, r in results["directions"].items()} for key in ("rank-1", "mAP")})
        write_log(run, log)
        drawn.append("curves.png how it learned")
        write_picture(os.path.join(run, "curves.png"), draw_curves(log, f"{config.method} on {dataset.name}"))
    print(f"\n{table(results)}\nEverything is in {run}{os.sep}" + "; ".join(["", *drawn]))


if __name__ == "__main__":
    cli(main)
