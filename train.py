"""Training: one loop, read from top to bottom.

    python train.py                          the small preset on walkers (synthetic pedestrians)
    python train.py --data PATH              the paper's recipe on a dataset (docs/data.md)
    python train.py --method lsmrl           the second method; FILE.py:CLASS: your own
    python train.py --resume runs/NAME       continues after the last complete epoch
    torchrun --nproc_per_node=N -- train.py ...    the same run on N GPUs (or processes of a CPU)

A run's folder: config.json, log.jsonl, last.pt, results.json, pictures. The result is the last
epoch's: the best one would be chosen on the test set.
A resumed run ends with the same bits as one that was not stopped (on a CPU): all random numbers
depend on seed, epoch, step and process alone.

Quick question: where is the validation set? (Neither benchmark has one: nothing is chosen here.)

Ours: bfloat16 for float16; 80 epochs; the warm-up; the small presets; exact resuming.
"""
import bisect
import math
import os
import time
from dataclasses import asdict, dataclass
from functools import partial
from types import SimpleNamespace

import walkers
from data import Frames, IdentitySampler, augment, load_dataset
from evaluate import report
from support import parallel, weights
from support.files import UserError, done, new_run, write_json
from support.options import Parser, cli, configure, early, load_method, option, progress

import numpy as np
import torch


@dataclass
class Config:
    """What every run chooses. Defaults: those of `--preset paper`; see also Method.recipe."""
    method: str = option("dinogrl", "dinogrl, lsmrl, or your own FILE.py:CLASS")
    seed: int = option(1, "report the spread of at least 3")
    precision: str = option("auto", "auto: float32 on a CPU, bfloat16 or float16 on a GPU",
                            ("auto", "bfloat16", "float16", "float32"))
    evaluate_every: int = option(0, "epochs between evaluations; 0: after the last alone")
    evaluate_first: bool = option(False, "before the first step too: what a prior does alone")
    device: str = option("", "cuda, cuda:1, cpu; default: cuda if there is one")
    data: str = option("", "HITSZ-VCM, BUPTCampus, or your own folders; none: walkers")
    reader: str = option("", "FILE.py:FUNCTION of your own that reads --data")
    init: str = option("", "a run whose weights to start from, all but its identities' own")
    auxiliary: bool = option(False, "BUPTCampus: train on its auxiliary set too")
    people: int = option(96, "training identities of the walkers that are drawn")
    size: tuple = option((256, 128), "height and width of the frames")
    frames: int = option(6, "per tracklet; more help a little and cost in proportion")
    test_frames: int = option(0, "per tracklet in the test; 0: as in training")
    frame_rule: str = option("", "chunks or linspace; none: as in the dataset's protocol")
    erase: float = option(0.5, "probability of random erasing; lower it for short runs")
    workers: int = option(min(8, os.cpu_count() or 1), "loader processes; 0: best on a laptop")
    test_batch: int = option(32, "tracklets at a time in evaluation")
    epochs: int = option(80, "0 evaluates the untrained model")
    steps: int = option(200, "per epoch")
    identities: int = option(4, "per step; halve them first if memory runs out")
    tracklets: int = option(4, "per identity and modality; 1 starves the triplet loss")
    optimizer: str = option("Adam", "AdamW: decoupled weight decay", ("Adam", "AdamW"))
    lr: float = option(3.5e-4, "learning rate; scale it with the identities")
    weight_decay: float = option(5e-4, "on every parameter, as in the release")
    warmup_epochs: int = option(10, "linear warm-up from 0.01 of the rate")
    milestones: tuple = option((40, 70), "epochs at which the rate falls tenfold")
    cosine: bool = option(False, "in place of milestones a cosine, to 0.01 of the rate")


def learning_rate_factor(config, epoch):    # counted from 0
    """Linear warm-up from 0.01, then x0.1 at each milestone, or a cosine to 0.01."""
    if epoch < config.warmup_epochs:
        return 0.01 + 0.99 * epoch / config.warmup_epochs
    if not config.cosine:
        return 0.1 ** bisect.bisect_right(config.milestones, epoch)
    past = (epoch - config.warmup_epochs) / (config.epochs - config.warmup_epochs)
    return 0.01 + 0.99 * (1 + math.cos(math.pi * past)) / 2


# -------------------------------------------------------------- the loop ----

def train(config, dataset, loader, augmented, model, autocast, optimizer, scaler, log, save, test):
    """Epochs done(log) + 1 to config.epochs. log: a dict for each epoch so far; augmented(uint8
    frames, modality, generator) -> normalised frames."""
    device, rank = model.device, parallel.processes()[0]
    label_of = {pid: label for label, pid in enumerate(dataset.classes)}
    label_of_tracklet = torch.tensor([label_of[t.pid] for t in dataset.train])
    data_parallel = parallel.shared(model)    # the model itself if there is one process

    for epoch in range(done(log), config.epochs):
        model.train()
        loader.batch_sampler.epoch = epoch
        torch.manual_seed(config.seed + 1000 * epoch + 10 ** 6 * rank)    # of dropout, of blanking
        for group in optimizer.param_groups:    # of model.parameter_groups()
            group["lr"] = config.lr * group["factor"] * learning_rate_factor(config, epoch)
        sums, start = {}, time.time()
        bar = progress(loader, f"epoch {epoch + 1}/{config.epochs}", disable=rank > 0 or None)
        for step, (frames, modality, index) in enumerate(bar):
            # Load: uint8 frames (B, T, 3, H, W), modality (B,), index of the tracklets (B,).
            rng = np.random.default_rng([config.seed, epoch, step, rank])
            frames = augmented(frames.to(device, non_blocking=True), modality, rng)
            label = label_of_tracklet[index].to(device, non_blocking=True)

            # Forward: named losses, already weighted.
            with autocast():
                losses, shown = data_parallel(frames, modality, label)
            loss = sum(losses.values())

            # Backward, step.
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()

            # Show: the means so far. Reading them waits for the GPU.
            for name, value in {**losses, **shown}.items():
                sums[name] = sums.get(name, 0) + torch.as_tensor(value, device=device).detach()
            if device.type == "cpu" or step % 10 == 9 or step + 1 == config.steps:
                means = parallel.averaged(sums, step + 1)
                bar.set_postfix_str(brief(means))
                if not all(map(math.isfinite, means.values())):
                    raise UserError(f"a loss is not finite in epoch {epoch + 1}, step {step + 1}: "
                                    f"{means}; resume with a lower --lr or --precision float32")
            if step == epoch == 0 and device.type == "cpu" and dataset.name != "walkers":
                hours = (time.time() - start) * config.steps / 3600
                parallel.say(f"no CUDA here: about {hours:.2g} hours an epoch on this CPU")

        # Log, save, evaluate.
        seconds = time.time() - start
        log.append({"epoch": epoch + 1, "lr": optimizer.param_groups[0]["lr"],
                    "losses": {name: means[name] for name in losses},
                    "shown": {name: means[name] for name in shown}, "seconds": round(seconds, 1)})
        parallel.say(f"epoch {epoch + 1}/{config.epochs}, {seconds:.0f} s: {brief(means)}")
        save()
        if is_due(config, epoch + 1):
            test()


def brief(means):
    return " ".join(f"{name} {mean:.2g}" for name, mean in means.items())


def is_due(config, epoch):    # for an evaluation
    every = config.evaluate_every or config.epochs
    return epoch == config.epochs or (epoch > 0 and epoch % every == 0)


def warm_up(model, loader, augmented, config, autocast, scaler):
    """Train model.warm_up_module alone, so that the rest never uses it untrained. [ours]"""
    steps, rank = model.warm_up_steps, parallel.processes()[0]
    first = 10 ** 6    # an epoch that never comes: batches and augmentation of its own
    model.train()
    module = model.get_submodule(model.warm_up_module)
    optimizer = torch.optim.Adam(module.parameters())
    for step in progress(range(steps), "warm-up", disable=rank > 0 or None):
        if step % config.steps == 0:
            loader.batch_sampler.epoch = first + step
            batches = iter(loader)
        frames, modality, _ = next(batches)
        rng = np.random.default_rng([config.seed, first, step, rank])
        frames = augmented(frames.to(model.device, non_blocking=True), modality, rng)
        with autocast():
            losses = model.warm_up_losses(frames)
        optimizer.param_groups[0]["lr"] = model.warm_up_lr * (1 - step / steps)
        optimizer.zero_grad()
        scaler.scale(sum(losses.values())).backward()
        parallel.average_gradients(module)
        scaler.step(optimizer)
        scaler.update()
    optimizer.zero_grad()    # nothing of it in the first real step
    parallel.say(f"warm-up, {steps} steps: {brief(losses)}")


# -------------------------------------------------- what a run is made of ----

def training_data(config):
    """The Dataset that --data names, or walkers, drawn if they are not there. Raises UserError."""
    if not config.data:
        with parallel.first_goes_first():
            config.data = walkers.drawn(config.people)
    dataset = load_dataset(config.data, config.reader, config.auxiliary)
    if not dataset.train:
        raise UserError(f"nobody to train on in {config.data}; expected train/, or a benchmark; "
                        "evaluate.py can test on it")
    return dataset


def loader_of(config, method, dataset, device):
    """One pass over it is one epoch: number loader.batch_sampler.epoch."""
    rank, world = parallel.processes()
    sampler = (method.sampler or IdentitySampler)(    # None: a method need not have its own
        dataset.train, P=config.identities, K=config.tracklets, steps=config.steps,
        seed=config.seed, rank=rank, world=world)
    frames = Frames(dataset.train, size=config.size, T=config.frames,
                    rule=config.frame_rule or dataset.frame_rule)
    return torch.utils.data.DataLoader(
        frames, batch_sampler=sampler, num_workers=config.workers, generator=torch.Generator(),
        pin_memory=device.type == "cuda", persistent_workers=config.workers > 0,
        worker_init_fn=parallel.ignore_interrupts)


def read_command_line(words=None):
    """words: None for this process's -> a namespace: config, options (the method's), method (its
    class), run, resume (folders), checkpoint (of resume), start (of init). Raises UserError."""
    first = early(words, "method", "resume", "init")
    checkpoint, start = (weights.read_checkpoint(first[name]) if first[name] else None
                         for name in ("resume", "init"))
    if checkpoint and start:
        raise UserError("--init starts a new run, --resume continues one; expected one of them")
    method = load_method(weights.method_of(checkpoint or start, first["method"]) or Config.method)
    parser = Parser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--run", metavar="DIR", help="its folder; default: a new one in runs/")
    parser.add_argument("--resume", metavar="RUN", help="a run's folder, to continue the run")
    config, options, given = configure(parser, words, Config, method, checkpoint, start)
    return SimpleNamespace(config=config, options=options, method=method, run=given.get("run"),
                           resume=first["resume"].removesuffix("/last.pt"), checkpoint=checkpoint,
                           start=start)


def main():
    asked = read_command_line()
    config, method, checkpoint = asked.config, asked.method, asked.checkpoint
    device, source = parallel.join(config.device), checkpoint or asked.start
    rank, world = parallel.processes()
    dataset = training_data(config)
    loader = loader_of(config, method, dataset, device)
    torch.backends.cudnn.benchmark = True    # the shapes are constant
    classes = checkpoint["classes"] if checkpoint else dataset.classes
    torch.manual_seed(config.seed)
    with parallel.first_goes_first():    # pre-trained weights are downloaded once a machine
        model = method(asked.options, len(classes), config.size, pretrained=not source)
    if source:
        others = () if checkpoint else model.of_identities    # other people's
        weights.take_weights(model, source, asked.resume or config.init, but=others)
    torch.manual_seed(config.seed + 10 ** 6 * rank)    # the warm-up's dropout
    model.to(device)
    optimizer = getattr(torch.optim, config.optimizer)(
        model.parameter_groups(), lr=config.lr, weight_decay=config.weight_decay, fused=True)
    dtype = parallel.precision_of(config.precision, device)
    autocast = partial(torch.autocast, device.type, dtype, enabled=dtype != torch.float32)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    if checkpoint:
        run = asked.resume
        log = weights.restore(checkpoint, run, config, dataset, optimizer, scaler)
    else:
        stem, log = os.path.basename(config.method).replace(".py:", "-").lower(), []
        run = new_run(asked.run, f"{stem}-{dataset.name}") if rank == 0 else ""
    if rank == 0:    # which alone writes
        chosen = {"config": asdict(config), "options": asdict(asked.options)}
        write_json(f"{run}/config.json", chosen)
    parallel.say(f"{config.method} on {dataset.name}: {len(dataset.classes)} training identities, "
                 f"{len(dataset.train):,} tracklets; {world} x {device}, {dtype}; run {run}")

    augmented = partial(method.augment or augment, erase=config.erase)
    save = partial(weights.save, run, log, model, optimizer, scaler, dataset, config,
                   asked.options)
    test = partial(report, model, dataset, config, run, {"method": config.method}, log)
    try:
        if not source and model.warm_up_steps:
            warm_up(model, loader, augmented, config, autocast, scaler)
        if not checkpoint:
            if config.evaluate_first:
                log.append({"epoch": 0, "seconds": 0})
                test()
            save()    # from here on a run that is killed can be resumed
        is_tested, epoch = log and "rank-1" in log[-1], done(log)
        if checkpoint and epoch >= config.epochs or not is_tested and is_due(config, epoch):
            test()    # the run was stopped before it, or has nothing to train
        train(config, dataset, loader, augmented, model, autocast, optimizer, scaler, log, save,
              test)
    except torch.cuda.OutOfMemoryError:
        raise UserError("the GPU's memory is full; lower --identities") from None
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"interrupted; continue: python train.py --resume {run}") from None
    parallel.leave()


if __name__ == "__main__":
    cli(main)
