"""Training: one loop, read from top to bottom. `python train.py` alone draws walkers and learns
them.

    python train.py                          the small preset on walkers: minutes on a CPU, offline
    python train.py --data PATH              the paper's recipe on a dataset (docs/data.md)
    python train.py --data A B               on two together, tested on the first
    python train.py --method lsmrl ...       the second method, with its own recipe and small preset
    python train.py --method FILE.py:CLASS   a method of your own
    python train.py --resume runs/NAME       goes on after the last whole epoch
    torchrun --nproc_per_node=N -- train.py ...    the same run on N GPUs (or processes of a CPU)

A run lives in one folder: config.json, log.jsonl (a line an epoch), last.pt, results.json,
curves.png, for each evaluation a silhouettes-EPOCH.png (DinoGRL). The result is the last epoch's:
choosing the best epoch by its test score would be choosing on the test set.

What makes a resumed run end with the same bits as one that was left alone (on a CPU):
- which tracklets: a function of seed and epoch (IdentitySampler);
- which frames of them: a seed in each key, so that it matters not which loader process draws them;
- augmentation: a generator made of seed, epoch, step and process;
- dropout and blanking: torch's random state, saved with the checkpoint;
- a generator for the loader alone: otherwise it would draw from torch's random state;
- batch norms' statistics and the optimizer's moments, saved with the checkpoint.

Quick question: where is the validation set? (Neither benchmark has one. So nothing here is chosen
by a score.)

Ours, not the papers': bfloat16 in place of float16 (which is an option); DinoGRL's 80 epochs; the
warm-up of a part that must not be seen untrained; the small presets; exact resuming.
"""
import bisect
import itertools
import math
import os
import re
import time
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial

import walkers
from data import (
    Frames,
    IdentitySampler,
    augment,
    check_reader,
    chosen_rule,
    is_walkers,
    load_datasets,
    load_reader,
)
from evaluate import (
    EvaluationOptions,
    evaluate,
    has_silhouettes,
    joined,
    method_of,
    reading_sheet,
    silhouette_sheet,
    table,
    training_note,
)
from support.files import (
    RunFolder,
    UserError,
    in_short,
    printable,
    write_atomic,
    write_json,
    write_picture,
)
from support.footage import FrameCache, ignore_interrupts, relative
from support.options import (
    Bar,
    Parser,
    add_options,
    as_typed,
    check_ranges,
    cli,
    given_options,
    load_method,
    option,
    say,
    stored_config,
    tell,
)
from support.parallel import (
    average_gradients,
    averaged,
    check_parent,
    first_goes_first,
    from_all,
    from_first,
    join,
    leave,
    processes,
    random_states,
    restore_random_states,
    shared,
    take_buffers_of_first,
    wait_for_all,
)
from support.pictures import draw_curves
from support.weights import check_optimizer_state, check_scale, read_checkpoint, rebuild

import numpy as np
import torch
from torch.utils.checkpoint import checkpoint as recomputed


@dataclass
class Config(EvaluationOptions):
    """Every choice of a run that is not the method's own: these, and those that an evaluation needs
    too. method_and_config joins them with the method's Options, whose defaults take the place of
    the ones here. The defaults are `--preset paper`; Options.small holds what `--preset small`
    changes."""
    method: str = option(
        "dinogrl", "dinogrl, lsmrl, or FILE.py:CLASS of your own; with --help it lists that "
        "method's options", group="run")
    seed: int = option(
        1, "for weights, sampling and augmentation; report the spread of at least 3",
        least=0, most=2 ** 62, group="run")
    precision: str = option(
        "auto", "auto, bfloat16, float16 (with loss scaling), float32; auto: bfloat16 on CUDA, "
        "else float32", group="run")
    checkpoint_activations: bool = option(
        False, "compute activations again in the backward pass: far less memory, 1.2 times the "
        "time, the same results", group="run")
    evaluate_every: int = option(
        0, "epochs between evaluations, each of which embeds the whole test set; 0: after the last "
        "alone, and curves.png has one point of Rank-1", least=0, most=100_000, group="run")
    auxiliary: bool = option(
        False, "BUPTCampus: train on its auxiliary set too; about twice the identities",
        group="data")
    people: int = option(
        96, "training identities of the walkers that are drawn where --data is missing",
        least=2, most=8000, group="data")
    erase: float = option(
        0.5, "probability of random erasing; lower it for short runs, which underfit",
        least=0, most=1, group="data")
    cache: str = option(
        "", "file for the training frames, resized and decoded, made once: for when reading images "
        "is what the GPU waits for", group="data")
    epochs: int = option(
        80, "nothing moves much ten epochs after the last milestone; 0 evaluates the untrained "
        "model", least=0, most=100_000, group="schedule")
    steps: int = option(200, "steps per epoch", least=1, most=1_000_000, group="schedule")
    identities: int = option(
        4, "identities per step, of all processes together; halve it before anything else if "
        "memory runs out", least=2, most=100_000, group="schedule")
    tracklets: int = option(
        4, "tracklets per identity and modality in a step; fewer than 2 starves the triplet loss",
        least=1, most=1024, group="schedule")
    optimizer: str = option("Adam", "Adam, or AdamW: decoupled weight decay", group="schedule")
    lr: float = option(
        3.5e-4, "learning rate; scale it with the identities per step",
        least=1e-12, most=100, group="schedule")
    weight_decay: float = option(
        5e-4, "weight decay, on every parameter as in the release",
        least=0, most=100, group="schedule")
    warmup_epochs: int = option(
        10, "linear warm-up from 0.01 of the rate; shorten it only for smaller networks",
        least=0, most=100_000, group="schedule")
    milestones: tuple = option(
        (40, 70), "epochs at which the rate falls tenfold", group="schedule")
    cosine: bool = option(
        False, "instead of milestones: after the warm-up the rate follows a cosine that ends at "
        "0.01 after the last epoch", group="schedule")


# -------------------------------------------------------------- the loop ----

def train(config, method, dataset, device, run, checkpoint):
    """A whole run: builds, loops, evaluates. run: its RunFolder (.resume: the folder to go on from
    or None; .log: a dict for each epoch). checkpoint: the one to go on from, or None."""
    rank, _ = processes()
    loader = training_loader(config, dataset, device)
    label_of = {pid: label for label, pid in enumerate(dataset.classes)}
    label_of_tracklet = torch.tensor([label_of[t.pid] for t in dataset.train])

    torch.manual_seed(config.seed)
    with first_goes_first():    # pre-trained weights are downloaded once a machine
        model = build(config, method, dataset, checkpoint, run).to(device)
    torch.manual_seed(config.seed + 10 ** 6 * rank)    # the same weights, but dropout of its own
    state = TrainingState(model, config, device)
    first_epoch = state.restore(checkpoint, run) if checkpoint else 0
    if checkpoint:
        checkpoint.clear()    # gigabytes that nobody needs any more
    begin(run, config, dataset, model, device, first_epoch)
    if not run.resume and config.epochs:
        warm_up(model, loader, config, device)
    if config.checkpoint_activations:
        recompute_activations(model)
    data_parallel = shared(model, device)    # the model itself where there is one process
    autocast = partial(torch.autocast, device.type, state.dtype, enabled=state.is_mixed)
    if not run.resume:
        state.save(run, dataset, epoch=0)    # from here on a run that is killed can be resumed
    catch_up_evaluation(model, dataset, config, device, run, first_epoch)

    for epoch in range(first_epoch, config.epochs):
        model.train()
        state.set_rate(epoch)
        loader.batch_sampler.epoch = epoch
        means = EpochMeans(epoch, config, dataset, device, run)
        for step, (frames, modality, index) in enumerate(loader):
            # Load: uint8 frames (B, T, 3, H, W), modality (B,), index of the tracklets (B,).
            rng = np.random.default_rng([config.seed, epoch, step, rank])
            frames = augment(frames.to(device, non_blocking=True), modality, rng, config.erase)
            label = label_of_tracklet[index].to(device, non_blocking=True)

            # Forward: named losses, already weighted.
            with autocast():
                losses, shown = data_parallel(frames, modality, label)

            # Backward, step.
            state.optimizer.zero_grad()
            state.scaler.scale(sum(losses.values())).backward()
            state.scaler.step(state.optimizer)
            state.scaler.update()

            # Show.
            means.add(losses, shown, index)

        # Log, save, evaluate.
        run.log.append({"epoch": epoch + 1, "lr": state.rate(), **means.close()})
        state.save(run, dataset, epoch + 1)
        if is_due(epoch + 1, config):
            report(model, dataset, config, device, run, epoch + 1)

    if first_epoch >= config.epochs:    # the loop above had nothing to do
        say_once(nothing_to_train(run, first_epoch))
        report(model, dataset, config, device, run, first_epoch)


def main():
    config, method, run, checkpoint = read_command_line()
    run.check()    # before anything is read or downloaded: is the folder free?
    device = join(config.device)
    dataset = training_data(config)
    try:
        train(config, method, dataset, device, run, checkpoint)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(how_to_go_on(run)) from None    # cli prints it
    leave()


def nothing_to_train(run, epochs):
    if run.resume:
        return f"{printable(run.path)} has its {epochs} epochs already; raise --epochs to go on"
    return "the untrained model"


def how_to_go_on(run):
    """What to say after Ctrl-C."""
    if not run.path or not os.path.exists(run.file(run.CHECKPOINT)):
        return "interrupted before the first checkpoint; start again"
    return (f"interrupted; {run.file(run.CHECKPOINT)} holds {run.whole_epochs} whole epochs; go "
            f"on: python train.py --resume {run.path}")


# --------------------------------------------------------- what a run is made of ----

def training_data(config):
    """The Dataset that --data names, or walkers, drawn if they are not there. Raises UserError."""
    if not config.data:
        drawn = "walkers" if config.people == Config.people else f"walkers-{config.people}"
        config.data = (os.path.join("runs", drawn),)
        with first_goes_first():
            if processes()[0] == 0:    # one process in all draws; the others wait
                walkers.make_walkers(*config.data, train_identities=config.people)
    dataset = load_datasets(config.data, config.auxiliary, config.reader)
    if not dataset.train:
        raise UserError(f"nobody to train on in {as_typed(config.data)}; expected train/, or a "
                        "benchmark; evaluate.py can test on it")
    # For the checkpoint; declared in EvaluationOptions.
    config.trained_on = dataset.train_name or dataset.name, config.data, dataset.classes
    return dataset


def training_loader(config, dataset, device):
    """One pass over it is one epoch: the one that loader.batch_sampler.epoch says."""
    rank, world = processes()
    sampler = IdentitySampler(dataset.train, P=config.identities, K=config.tracklets,
                              steps=config.steps, seed=config.seed, rank=rank, world=world)
    cache = None
    if config.cache:
        frames = [frame for t in dataset.train for frame in t.frames]
        with first_goes_first():    # FrameCache writes the file if it is missing
            cache = FrameCache(config.cache, frames, size=config.size, root=dataset.root,
                               workers=config.workers)
    training_frames = Frames(dataset.train, size=config.size, T=config.frames,
                             rule=chosen_rule(config, dataset), cache=cache)
    return torch.utils.data.DataLoader(
        training_frames, batch_sampler=sampler, num_workers=config.workers,
        pin_memory=device.type == "cuda", persistent_workers=config.workers > 0,
        worker_init_fn=ignore_interrupts, generator=torch.Generator())


def build(config, method, dataset, checkpoint, run):
    """The model, pre-trained or as the checkpoint has it. Raises UserError."""
    if checkpoint is None:
        return method(config, len(dataset.classes), pretrained=True)
    if checkpoint["classes"] != dataset.classes:
        raise UserError(f"the run knows other identities than the {len(dataset.classes)} of "
                        f"{as_typed(config.data)}; expected what it was trained on: check --data")
    return rebuild(method, config, checkpoint, run.resume)


def learning_rate_factor(config, epoch):
    """The factor on the learning rate in an epoch, counted from 0: linear warm-up from 0.01, then
    x0.1 at each milestone, or a cosine that would be at 0.01 one epoch after the last."""
    if epoch < config.warmup_epochs:
        return 0.01 + 0.99 * epoch / config.warmup_epochs
    if not config.cosine:
        return 0.1 ** bisect.bisect_right(config.milestones, epoch)
    rest = max(1, config.epochs - config.warmup_epochs)
    past = min(1.0, (epoch - config.warmup_epochs) / rest)
    return 0.01 + 0.99 * (1 + math.cos(math.pi * past)) / 2


def precision_of(config, device):
    if config.precision == "auto":
        return "bfloat16" if device.type == "cuda" else "float32"
    return config.precision


class TrainingState:
    """What training changes: the model's tensors, the optimizer's, the rate, the scale of
    float16."""

    def __init__(self, model, config, device):
        self.model, self.config, self.device = model, config, device
        precision = precision_of(config, device)
        self.dtype, self.is_mixed = getattr(torch, precision), precision != "float32"
        groups = [{"params": group["params"], "lr": config.lr * group["factor"]}
                  for group in model.parameter_groups()]
        optimizer_class = {"Adam": torch.optim.Adam, "AdamW": torch.optim.AdamW}[config.optimizer]
        self.rates = [group["lr"] for group in groups]
        self.optimizer = optimizer_class(groups, weight_decay=config.weight_decay,
                                         fused=device.type == "cuda")
        self.scaler = torch.amp.GradScaler(device.type, enabled=precision == "float16")

    def set_rate(self, epoch):
        """To be called before each epoch."""
        factor = learning_rate_factor(self.config, epoch)
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * factor

    def rate(self):
        return self.optimizer.param_groups[0]["lr"]

    def save(self, run, dataset, epoch):
        """All processes come here; process 0 writes the log, then last.pt: all that an exact resume
        needs, after `epoch` whole epochs."""
        checkpoint = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(),
                      "scaler": self.scaler.state_dict(), "epoch": epoch,
                      "config": asdict(self.config), "classes": dataset.classes,
                      "method": self.config.method, "dataset": self.config.trained_on[0],
                      "random": random_states(self.device)}

        def write(file):
            try:
                torch.save(checkpoint, file)
            except RuntimeError as error:
                # torch hides what really happened behind an error of its own: a full disk, Ctrl-C.
                raise error.__context__ or OSError(error) from None

        if processes()[0] == 0:
            # The log first: a surplus line is dropped on resuming, a missing one is lost.
            if epoch:    # nothing is logged before the first one
                run.write_log()
            write_atomic(run.file(run.CHECKPOINT), write)
            run.whole_epochs = epoch

    def restore(self, checkpoint, run):
        """-> how many whole epochs are done. Raises UserError."""
        try:
            check_optimizer_state(self.optimizer, checkpoint["optimizer"])
            for group in checkpoint["optimizer"]["param_groups"]:
                # The run may have been another device's.
                group["fused"] = self.device.type == "cuda"
            self.optimizer.load_state_dict(checkpoint["optimizer"])
            if checkpoint["scaler"] and self.scaler.is_enabled():
                check_scale(checkpoint["scaler"])
                self.scaler.load_state_dict(checkpoint["scaler"])
            restore_random_states(checkpoint["random"], self.device)
        except Exception as error:    # torch raises a dozen types for an invalid state
            raise UserError(f"{run.resume} can be evaluated but not resumed "
                            f"({type(error).__name__}: {in_short(error)}); expected last.pt as "
                            "train.py wrote it") from None
        # Rates and decay: always this command line's, not the checkpoint's. See set_rate.
        for group in self.optimizer.param_groups:
            group["weight_decay"] = self.config.weight_decay
        return checkpoint["epoch"]


def begin(run, config, dataset, model, device, first_epoch):
    """Process 0 takes the run's folder, for all; says what begins."""
    rank, world = processes()
    name = config.trained_on[0]
    if rank == 0:
        stem = f"{config.method.rpartition(':')[2]}-{name}".lower()
        run.claim(re.sub(r"[^\w-]+", "-", stem)[:60].strip("-"), first_epoch)
        write_json(run.file(run.CONFIG), asdict(config))
    run.path, run.log = from_first((run.path, run.log))
    parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    where = str(device) if world == 1 else f"{world} x {device.type}"
    say_once(f"{config.method} on {printable(name)}: {len(dataset.classes)} training identities, "
             f"{len(dataset.train):,} tracklets; {parameters:,} parameters to train; {where}, "
             f"{precision_of(config, device)}; run {printable(run.path)}")
    if not dataset.test:
        say_once(f"nothing to test on in {printable(as_typed(config.data))}: there will be no "
                 "table and no results.json")


WARM_UP_EPOCH = 10 ** 6    # batches and augmentation of its own, which no epoch repeats


def warm_up(model, loader, config, device):
    """Trains model.warm_up_module alone for model.warm_up_steps, so that the rest never sees it
    untrained. [ours]"""
    steps, rank = model.warm_up_steps, processes()[0]
    if not steps:
        return
    model.train()
    module = model.warm_up_module
    optimizer = torch.optim.Adam(module.parameters(), lr=model.warm_up_lr)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=1, end_factor=0,
                                                  total_iters=steps)
    with Bar("warm-up", steps, keep=True, hidden=rank > 0) as bar:
        for step, (frames, modality, _) in enumerate(warm_up_batches(loader, steps)):
            rng = np.random.default_rng([config.seed, WARM_UP_EPOCH, step, rank])
            frames = augment(frames.to(device), modality, rng, config.erase)
            losses = model.warm_up_losses(frames)
            optimizer.zero_grad()
            sum(losses.values()).backward()
            average_gradients(module)
            optimizer.step()
            scheduler.step()
            bar.update(note=brief({name: loss.item() for name, loss in losses.items()}))


def warm_up_batches(loader, steps):
    """`steps` batches, in as many passes as it takes."""
    for first in range(0, steps, len(loader)):
        loader.batch_sampler.epoch = WARM_UP_EPOCH + first    # a number that no epoch has
        yield from itertools.islice(loader, steps - first)


# ------------------------------------------------------------ memory for time ----

@contextmanager
def untracked(module):
    """Batch norms inside go on normalising by the batch at hand, and leave their running statistics
    as they are."""
    norms = [m for m in module.modules() if getattr(m, "running_mean", None) is not None]
    before = [(norm, norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm, _, batches in before:
        # A clone: a batch norm counts in place, so on a tensor that is dropped afterwards.
        norm.momentum, norm.num_batches_tracked = 0.0, batches.clone()
    try:
        yield
    finally:
        for norm, momentum, batches in before:
            norm.momentum, norm.num_batches_tracked = momentum, batches


def recompute_activations(model):
    """--checkpoint-activations: the modules of `model` whose class says `recomputable` keep their
    input alone and compute the rest once more in the backward pass, by torch.utils.checkpoint.
    [ours]"""
    def contexts(module):
        # (context of the forward pass, context of its repetition): statistics move in the first
        # alone.
        return nullcontext(), untracked(module)

    for module in model.modules():
        if getattr(module, "recomputable", False):
            module.forward = partial(recomputed, module.forward, use_reentrant=False,
                                     context_fn=partial(contexts, module))


# ----------------------------------------------------------- what a run shows ----

SHORT = {"identity": "id", "triplet": "tri", "accuracy": "acc", "diversity": "div",
         "contrast": "con", "consistency": "cons"}


def brief(means):
    """{"identity_gait": 5.1, "identity_appearance": 4.8, ...} -> "id 5.1/4.8 ...": a line for the
    progress bar, where every column counts. log.jsonl has the names in full."""
    groups = {}    # by what stands before the first _
    for name, value in means.items():
        groups.setdefault(name.split("_")[0], []).append(f"{value:.2g}")
    return " ".join(f"{SHORT.get(name, name)} {'/'.join(values)}"
                    for name, values in groups.items())


class EpochMeans:
    """The means of an epoch's losses so far, over steps and processes, on the progress bar. A loss
    that is not finite ends the run with the names of its tracklets."""

    def __init__(self, epoch, config, dataset, device, run):
        self.epoch, self.config, self.dataset = epoch, config, dataset
        self.device, self.run = device, run
        self.rank, self.world = processes()
        self.step, self.start, self.means = 0, time.time(), {}
        self.sums = {}      # name: sum over the steps so far
        self.recent = []    # (step, tracklets' indices, values) since the last check
        self.bar = Bar(f"epoch {epoch + 1}/{config.epochs}", config.steps, keep=True,
                       hidden=self.rank > 0)

    def add(self, losses, shown, index):
        """After each step: named losses, other named values, indices of its tracklets."""
        self.step += 1
        self.loss_names, self.shown_names = list(losses), list(shown)
        values = {name: value.detach() for name, value in {**losses, **shown}.items()}
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0) + value
        self.recent.append((self.step, index, values))
        # Reading a value waits for the GPU. On a CPU every step is read.
        if self.device.type == "cpu" or self.step % 10 == 0 or self.step == self.config.steps:
            self.read(tracklets=len(index))

    def read(self, tracklets):
        """The means over steps and processes, to the bar; stops at one that is not finite."""
        check_parent()    # ends this process if torchrun was killed
        sums = torch.stack([value.double() for value in self.sums.values()])
        values = (averaged(sums) / self.step).tolist()
        self.means = dict(zip(self.sums, values, strict=True))
        if not all(math.isfinite(value) for value in values):
            raise UserError(self.culprit())
        frames = self.step * tracklets * self.config.frames * self.world
        rate = frames / (time.time() - self.start)
        self.bar.update(len(self.recent), f"{rate:.0f} frames/s {brief(self.means)}")
        self.recent.clear()
        if self.step == 3:    # on a CPU, where every step is read
            self.say_how_long()

    def say_how_long(self):
        """On a CPU a real benchmark takes days: better said at once."""
        is_real = self.config.trained_on[0] != "walkers"
        if is_real and self.device.type == "cpu" and self.rank == 0 and self.epoch == 0:
            hours = (time.time() - self.start) / self.step * self.config.steps / 3600
            tell(f"no CUDA here: about {hours:.2g} hours an epoch on this CPU")

    def culprit(self):
        """The words that name the first value which is not finite, in whichever process, and the
        tracklets of its batch. last.pt is older, and good."""
        where = f"epoch {self.epoch + 1}"
        advice = (f"{self.run.file(self.run.CHECKPOINT)} is older and good: resume it with a lower "
                  "--lr or --precision float32")
        mine = None
        for step, index, values in self.recent:
            wrong = [name for name, value in values.items() if not value.isfinite()]
            if wrong:
                first_frames = [self.dataset.train[i].frames[0] for i in index.tolist()]
                batch = " ".join(relative(os.path.dirname(frame), self.dataset.root)
                                 for frame in first_frames)
                mine = (f"{wrong[0]} is {values[wrong[0]].item()} in {where}, step {step}; "
                        f"{advice}, or look at the batch's tracklets: {batch}")
                break
        # All processes come here: the mean is the same in all.
        found = [words for words in from_all(mine) if words]
        return found[0] if found else f"the mean of a loss is not finite in {where}; {advice}"

    def close(self):
        """-> the epoch's part of the log."""
        self.bar.close()
        return {"losses": {name: self.means[name] for name in self.loss_names},
                "shown": {name: self.means[name] for name in self.shown_names},
                "seconds": round(time.time() - self.start, 1)}


def say_once(text):
    if processes()[0] == 0:
        say(text)


# --------------------------------------------------------------- evaluation ----

def is_due(epoch, config):
    """Is there an evaluation after that many epochs?"""
    return epoch == config.epochs or (config.evaluate_every and epoch % config.evaluate_every == 0)


def catch_up_evaluation(model, dataset, config, device, run, epoch):
    """A run may have been stopped after its last checkpoint and before the evaluation that was
    due."""
    # Without rank-1 in the log's last line there was none: report adds it. After the last epoch
    # train itself reports, behind its loop.
    if run.log and epoch < config.epochs and is_due(epoch, config) and "rank-1" not in run.log[-1]:
        report(model, dataset, config, device, run, epoch)


def for_the_log(directions):
    """{direction: its results} -> what the log keeps: {"rank-1": {direction: share}, "mAP": ...}"""
    return {key: {d: r[key] for d, r in directions.items()} for key in ("rank-1", "mAP")}


def report(model, dataset, config, device, run, epoch):
    """Evaluates, if there is something to test on; writes results.json and the pictures, adds
    Rank-1 and mAP, each stream's too, to the last line of the log; prints the table."""
    take_buffers_of_first(model)    # all evaluate with the batch norms of process 0
    start, words = time.time(), ""
    results = evaluate(model, dataset, config, device)[0] if dataset.test else None
    if results is not None:    # process 0
        trained = sum(line.get("seconds", 0) for line in run.log)
        results = {"method": config.method, "dataset": dataset.name,
                   **training_note(dataset, config), **results,
                   "seconds": round(trained + time.time() - start, 1)}
        write_json(run.file("results.json"), results)
        if run.log:
            streams = {name: for_the_log(alone) for name, alone in results["streams"].items()}
            run.log[-1] |= {**for_the_log(results["directions"]), "streams": streams}
        words = f"\n{table(results)}\n"
    if processes()[0] == 0:
        drawn = draw_pictures(model, dataset, config, device, run, epoch)
        # Last: catch_up_evaluation takes a logged rank-1 as proof that all of this was done.
        if run.log:
            run.write_log()
        if epoch == config.epochs:
            words += f"Everything is in {printable(run.path)}{os.sep}{drawn}"
        if words:
            say(words)
    wait_for_all()


def draw_pictures(model, dataset, config, device, run, epoch):
    """Draws what the model sees and how it learned -> the words that say so."""
    words = ""
    if has_silhouettes(model):
        name = f"silhouettes-{epoch}.png"
        write_picture(run.file(name), silhouette_sheet(model, dataset, config, device))
        words += f"; {name} shows what the model sees"
    if hasattr(model, "reading") and dataset.test:
        name = f"reading-{epoch}.png"
        write_picture(run.file(name), reading_sheet(model, dataset, config, device))
        words += f"; {name} shows where it looks, and whose sentences it reads"
    if run.log:
        title = f"{config.method} on {config.trained_on[0]}"
        write_picture(run.file("curves.png"), draw_curves(run.log, title))
        words += "; curves.png how it learned"
    return words


# ------------------------------------------------------------- command line ----

def method_and_config(name):
    """A method's name -> its class, and the dataclass of its whole configuration. Raises
    UserError."""
    method = load_method(name)
    return method, joined(method.Options, Config)


def first_look(words):
    """Which method and which run: they decide what other options there are."""
    parser = Parser(add_help=False)
    parser.add_argument("--method", default="")
    parser.add_argument("--resume", default="")
    args, _ = parser.parse_known_args(words)
    return args.method, args.resume


def read_command_line(words=None):
    """words: of the command line, None for this process's own -> the configuration, the method's
    class, the RunFolder, the checkpoint to go on from or None. Raises UserError."""
    method_name, resume = first_look(words)
    checkpoint = read_checkpoint(resume) if resume else None
    if checkpoint:
        method_name = method_of(checkpoint, method_name, resume)
    method, config_class = method_and_config(method_name or Config.method)
    parser = Parser(description=__doc__.split("\n\n")[0])
    runs = parser.add_argument_group("run")
    runs.add_argument("--preset", choices=("paper", "small"), help="paper (default for a real "
                      "benchmark) or small (default for walkers)")
    runs.add_argument("--run", metavar="DIR",
                      help="the run's folder; default: a new one under runs/")
    runs.add_argument("--resume", metavar="RUN", help="a run's folder; other options given here "
                      "override its own")
    add_options(parser, config_class, method.Options.small)
    given = given_options(parser.parse_args(words))    # Parser leaves out what was not typed
    preset, run_path = given.pop("preset", None), given.pop("run", None)
    empty = [name for name in ("method", "resume", "data")
             if name in given and not (given[name] and all(given[name]))]
    if empty:
        raise UserError(f"--{empty[0]} is empty; name one, or drop the option: is a shell variable "
                        "unset?")
    given.pop("resume", None)
    if checkpoint:
        if preset:
            raise UserError("--preset cannot be changed on --resume; name the options to override")
        config = resumed_config(config_class, checkpoint, given, resume)
        if not os.path.isdir(resume):    # last.pt itself
            resume = os.path.dirname(resume) or "."
        run_path = run_path or resume
    else:
        folders = given.get("data", ())    # none: walkers will be drawn
        is_real = not all(is_walkers(folder) for folder in folders)
        preset = preset or ("paper" if is_real else "small")
        changed = method.Options.small if preset == "small" else {}
        config = config_class(**{**changed, **given})
    check(config)
    return config, method, RunFolder(run_path, resume or None), checkpoint


def resumed_config(config_class, checkpoint, given, resume):
    """A checkpoint's configuration, overridden by what was given. Raises UserError."""
    missing = {"optimizer", "scaler", "random"} - checkpoint.keys()
    if missing:
        raise UserError(f"{resume} can be evaluated but not resumed: it has no "
                        f"{', '.join(sorted(missing))}")
    if checkpoint.get("step"):
        raise UserError(f"{resume} was saved in the middle of an epoch, by an older version; it "
                        "can be evaluated, or resumed with the code that wrote it")
    stored = stored_config(config_class, checkpoint["config"], resume)
    check_reader(given, stored.reader, resume)
    given_optimizer = given.get("optimizer", stored.optimizer)
    if given_optimizer != stored.optimizer:
        raise UserError(f"--optimizer {given_optimizer} cannot go on with the state of "
                        f"{stored.optimizer}; drop it, or begin a new run")
    # --cache is a file that is written: only whoever runs this may name it, never a checkpoint. The
    # method is the one that method_of has checked: the stored configuration may name another.
    return replace(stored, **{"cache": "", "method": checkpoint["method"], **given})


def check(config):
    """Raises UserError for a configuration that cannot work."""
    check_ranges(config)
    if list(config.milestones) != sorted(config.milestones):
        words = " ".join(map(str, config.milestones))
        raise UserError(f"--milestones {words}; expected them in ascending order")
    known = {"precision": ("auto", "bfloat16", "float16", "float32"),
             "optimizer": ("Adam", "AdamW")}
    for name, values in known.items():
        if getattr(config, name) not in values:
            raise UserError(f"--{name} {getattr(config, name)}; expected one of "
                            f"{', '.join(values)}")
    config.check()
    load_reader(config.reader)


if __name__ == "__main__":
    cli(main)
