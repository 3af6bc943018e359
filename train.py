"""Training: one loop, read from top to bottom. `python train.py` alone makes synthetic pedestrians and learns them.

    python train.py                          the small preset on walkers: minutes on a laptop's CPU, offline
    python train.py --data PATH              the paper's recipe on HITSZ-VCM or BUPTCampus
    python train.py --resume runs/NAME       goes on exactly where a run stopped

A run lives in one folder: config.json, log.jsonl (a line per epoch), last.pt, results.json, silhouettes.png. The result
is the last epoch's: choosing the best epoch by its test score would be choosing on the test set.

Quick question: where is the validation set? (Neither benchmark has one. So nothing here is chosen by a score.)

Ours, not the paper's: bfloat16 in place of float16 (which is an option); 80 epochs in all; the mask bottleneck's warm-up
where no trained one is given; the small preset; exact resuming.
"""
import argparse
import bisect
import ctypes
import json
import math
import os
import time
from dataclasses import asdict, dataclass, field, fields, replace

import numpy as np
import torch
from tqdm import tqdm

import walkers
from data import Frames, IdentitySampler, UserError, augment, cli, is_walkers, load_dataset
from evaluate import METHODS, choose_device, draw_silhouettes, evaluate, read_checkpoint, table, write_atomic, write_json
from sasgl import fill


def option(default, help):
    return field(default=default, metadata={"help": help})


@dataclass
class Config:
    """Every choice of a run. The defaults are `--preset paper`; PRESETS holds what `small` changes."""
    data: str = option("", "HITSZ-VCM or BUPTCampus folder; without it walkers are made under runs/ and learned")
    auxiliary: bool = option(False, "BUPTCampus: train on its auxiliary set too; about twice the identities")
    method: str = option("dinogrl", "which method to train")
    seed: int = option(1, "for weights, sampling and augmentation; report the spread of at least 3")
    device: str = option("", "cuda, cuda:1, cpu; default: cuda if there is one")
    # schedule
    epochs: int = option(80, "nothing moves much ten epochs after the last milestone; 0 evaluates the untrained model")
    steps: int = option(200, "steps per epoch")
    identities: int = option(4, "identities per step; halve it before anything else if memory runs out")
    tracklets: int = option(4, "tracklets per identity and modality in a step; fewer than 2 starves the triplet loss")
    frames: int = option(6, "frames per tracklet; more helps gait a little and costs in proportion")
    lr: float = option(3.5e-4, "Adam's learning rate; scale it with the identities per step")
    weight_decay: float = option(5e-4, "Adam's weight decay, on every parameter as in the release")
    warmup_epochs: int = option(10, "linear warm-up from 0.01 of the rate; shorten it only for smaller networks")
    milestones: tuple = option((40, 70), "epochs at which the rate falls tenfold")
    precision: str = option("auto", "auto, bfloat16, float16 (with loss scaling), float32; auto: bfloat16 on CUDA, else float32")
    # data
    size: tuple = option((256, 128), "height and width of the frames; the height is cut into 16 strips after 16-fold reduction")
    erase: float = option(0.5, "probability of random erasing; lower it for short runs, which underfit")
    workers: int = option(min(8, os.cpu_count() or 1), "loader processes; raise it if the GPU waits, 0 where reading is nothing beside a CPU step")
    test_batch: int = option(32, "tracklets at a time in evaluation")
    evaluate_every: int = option(0, "epochs between evaluations; 0: after the last only (curves cost an embedding pass each)")
    # model
    gait: bool = option(True, "off removes SASGL and the gait stream: the appearance baseline")
    pbmge: bool = option(True, "off removes the fusion: two independent streams")
    dinov2: str = option("dinov2_vits14", "dinov2_vits14, _vitb14, _vitl14 (each also with _reg), or tiny: random, offline")
    dinov2_weights: str = option("", "local file of the official DINOv2 tensors, instead of torch.hub")
    resnet_weights: str = option("imagenet", "imagenet (downloaded once), a file of torchvision's resnet50, or random")
    mask_branch: str = option("", "BigGait's MaskBranch_vits14.pt; without it the mask bottleneck is warmed up first")
    mask_warmup: int = option(500, "steps for the mask bottleneck alone where no --mask-branch is given; more if silhouettes "
                                   "come out as blocks of background")
    mask_lr: float = option(1e-2, "Adam's rate in that warm-up, falling linearly to 0")
    dim: int = option(256, "channels D of a part")
    width: int = option(64, "channels of the ResNets' stem; 64 is ResNet-50, and the only one ImageNet weights fit")
    blocks: tuple = option((3, 4, 6, 3), "blocks of layer1..layer4")
    strides: tuple = option((1, 2, 2, 1), "strides of layer1..layer4; last stride 1 keeps 16 rows for 16 strips")
    gait_strides: tuple = option((1, 2, 2, 1), "the same for the gait net, which starts at code_size")
    dino_size: tuple = option((448, 224), "what DINOv2 sees, multiples of 14; smaller is faster and blurs the silhouettes")
    code_size: tuple = option((64, 32), "height and width of silhouettes and codes")


PRESETS = {"paper": {},
           # A laptop's CPU, minutes: a tiny ViT, thin one-block ResNets, small frames.
           "small": dict(epochs=6, steps=60, identities=8, tracklets=2, frames=4, warmup_epochs=0, milestones=(4, 5), lr=3e-3,
                         size=(64, 32), workers=0, dinov2="tiny", resnet_weights="random", mask_warmup=60, erase=0.0, mask_lr=5e-2, dim=64, width=8,
                         blocks=(1, 1, 1, 1), strides=(1, 1, 1, 1), gait_strides=(2, 1, 1, 1), dino_size=(336, 168),
                         code_size=(32, 16))}


BAR = "{desc} {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"


def brief(means):
    """{"identity_gait": 5.1, "identity_appearance": 4.8, ...} -> "id 5.1/4.8 ...": a line for the progress bar, where every
    column counts. log.jsonl has the names in full."""
    groups = {}
    for name, value in means.items():
        groups.setdefault(name.split("_")[0], []).append(f"{value:.2g}")
    names = {"identity": "id", "triplet": "tri", "accuracy": "acc", "diversity": "div"}
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
    """The command line -> Config, checkpoint to go on from or None, the run's folder or None, the resumed one or None."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], argument_default=argparse.SUPPRESS)
    parser.add_argument("--preset", choices=PRESETS, help="paper (default for a real benchmark) or small (default for walkers)")
    parser.add_argument("--run", metavar="DIR", help="the run's folder; default: a new one under runs/")
    parser.add_argument("--resume", metavar="RUN", help="a run's folder; other options given here override its own")
    for f in fields(Config):
        name, kind, small = "--" + f.name.replace("_", "-"), type(f.default), PRESETS["small"].get(f.name, f.default)
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
        checkpoint = read_checkpoint(resume)
        missing = {"optimizer", "scheduler", "scaler", "random"} - checkpoint.keys()
        if missing:
            raise UserError(f"{resume} can be evaluated but not resumed: it has no {', '.join(sorted(missing))}")
        resume = resume if os.path.isdir(resume) else os.path.dirname(resume) or "."
        try:
            return replace(Config(**checkpoint["config"]), **given), checkpoint, run or resume, resume
        except TypeError as error:
            raise UserError(f"{resume} has another version's config ({error}); resume it with the code that wrote it") from None
    real = "data" in given and not is_walkers(given["data"])
    preset = preset or ("paper" if real else "small")
    return replace(Config(**PRESETS[preset]), **given), None, run, None


def check(config):
    """Raises UserError for a configuration that cannot work."""
    if config.method not in METHODS:
        raise UserError(f"--method {config.method} is not known; expected one of {', '.join(METHODS)}")
    for name, least in dict(epochs=0, workers=0, mask_warmup=0, evaluate_every=0, warmup_epochs=0, weight_decay=0, erase=0, seed=0,
                            steps=1, identities=2, tracklets=1, frames=1, test_batch=1, width=1, dim=1, lr=1e-12, mask_lr=1e-12).items():
        if not getattr(config, name) >= least:
            raise UserError(f"--{name.replace('_', '-')} {getattr(config, name)}; expected at least {least}")
    if list(config.milestones) != sorted(config.milestones):
        raise UserError(f"--milestones {config.milestones}; expected them in ascending order")
    if config.precision not in ("auto", "bfloat16", "float16", "float32"):
        raise UserError(f"--precision {config.precision}; expected auto, bfloat16, float16 or float32")
    for name, n in dict(size=2, dino_size=2, code_size=2, blocks=4, strides=4, gait_strides=4).items():
        if len(getattr(config, name)) != n or min(getattr(config, name)) < 1:
            raise UserError(f"--{name.replace('_', '-')} {getattr(config, name)}; expected {n} positive numbers")
    for name, height, strides in (("size", config.size[0] / 4, "strides"), ("code-size", config.code_size[0], "gait_strides")):
        rows = height / math.prod(getattr(config, strides))
        if rows % 16 and (config.gait or name == "size"):
            raise UserError(f"--{name} and --{strides.replace('_', '-')} leave maps of {rows:g} rows; expected a multiple of the 16 strips")
    if config.gait and (config.dino_size[0] % 14 or config.dino_size[1] % 14):
        raise UserError(f"--dino-size {config.dino_size}; expected multiples of 14, DINOv2's patch")


def run_folder(config, run, resume, name, first_epoch):
    """-> the run's folder, made if need be, and the log's lines so far. Raises UserError if `run` holds anything of another
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
            log = lines[:first_epoch]    # one an epoch; a run cut before its checkpoint has one too many
        elif os.listdir(run):
            raise UserError(f"{run} is not empty; choose another --run" + (f", or go on with it by --resume {run}" if
                            os.path.exists(os.path.join(run, "last.pt")) else ""))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{run} cannot be used ({error}); choose another --run") from None
    return run, log


def rate(config):
    """Epoch -> factor of the learning rate: linear warm-up from 0.01, then x0.1 at each milestone."""
    def factor(epoch):
        warm = min(1.0, epoch / config.warmup_epochs) if config.warmup_epochs else 1.0
        return (0.01 + 0.99 * warm) * 0.1 ** bisect.bisect_right(config.milestones, epoch)
    return factor


def warm_up_mask(model, loader, sampler, config, device):
    """Trains the mask bottleneck alone for a few steps, so that the rest never sees untrained silhouettes. [ours]"""
    optimizer = torch.optim.Adam(model.sasgl.mask_branch.parameters(), lr=config.mask_lr)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1, 0, config.mask_warmup)
    step, bar = 0, tqdm(total=config.mask_warmup, desc="mask warm-up", bar_format=BAR)
    while step < config.mask_warmup:
        sampler.epoch = 10 ** 6 + step    # batches of their own, which no epoch repeats
        for frames, modality, index in loader:
            losses = model.warm_up(augment(frames.to(device), modality, np.random.default_rng([config.seed, step]), config.erase))
            optimizer.zero_grad()
            sum(losses.values()).backward()
            optimizer.step()
            scheduler.step()
            bar.set_postfix_str(brief({name: value.item() for name, value in losses.items()}))
            bar.update()
            step += 1
            if step == config.mask_warmup:
                break
    bar.close()


def keep_memory():
    """Asks glibc to keep freed memory for the next step: handing 100 MB back and forth costs a CPU run a fifth of its time."""
    try:
        libc = ctypes.CDLL(None)
        for parameter, value in ((-3, 2 ** 30), (-1, 2 ** 31 - 1), (-2, 2 ** 28)):    # mmap threshold, trim threshold, top pad
            libc.mallopt(parameter, value)
    except (OSError, AttributeError, TypeError):    # another C library: only slower
        pass


def main():
    config, checkpoint, run, resume = parse()
    check(config)
    keep_memory()
    device = choose_device(config.device)
    precision = {"auto": "bfloat16" if device.type == "cuda" else "float32"}.get(config.precision, config.precision)
    dtype, start = getattr(torch, precision), time.time()

    # Data
    if not config.data:
        config.data = os.path.join("runs", "walkers")
        walkers.make_walkers(config.data, test_identities=24)
    dataset = load_dataset(config.data, config.auxiliary)
    label_of = {pid: label for label, pid in enumerate(dataset.classes)}
    label_of_tracklet = torch.tensor([label_of[t.pid] for t in dataset.train])
    sampler = IdentitySampler(dataset.train, P=config.identities, K=config.tracklets, steps=config.steps, seed=config.seed)
    loader = torch.utils.data.DataLoader(Frames(dataset.train, size=config.size, T=config.frames), batch_sampler=sampler,
                                         num_workers=config.workers, pin_memory=device.type == "cuda",
                                         persistent_workers=config.workers > 0,
                                         generator=torch.Generator())    # its own: it would draw from the model's otherwise

    # Model, optimizer
    torch.manual_seed(config.seed)
    model = METHODS[config.method](config, len(dataset.classes), pretrained=checkpoint is None).to(device)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=config.lr, weight_decay=config.weight_decay)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, rate(config))
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "float16")
    first_epoch = 0
    if checkpoint:
        if checkpoint["classes"] != dataset.classes:
            raise UserError(f"the run knows {len(checkpoint['classes'])} identities that are not the {len(dataset.classes)} of "
                            f"{config.data}; expected the dataset it was trained on: check --data")
        fill(model, checkpoint["model"], f"{run} (with these options)")
        optimizer.load_state_dict(checkpoint["optimizer"])
        scheduler.load_state_dict(checkpoint["scheduler"])
        if checkpoint["scaler"] and scaler.is_enabled():
            scaler.load_state_dict(checkpoint["scaler"])
        first_epoch = checkpoint["epoch"]
        scheduler.base_lrs = [config.lr]    # the schedule's options may have been overridden
        optimizer.param_groups[0].update(lr=config.lr * rate(config)(first_epoch), initial_lr=config.lr,
                                         weight_decay=config.weight_decay)
        torch.set_rng_state(checkpoint["random"]["cpu"])
        if device.type == "cuda" and checkpoint["random"]["cuda"] is not None:
            torch.cuda.set_rng_state(checkpoint["random"]["cuda"], device)
    run, log = run_folder(config, run, resume, dataset.name, first_epoch)
    write_json(os.path.join(run, "config.json"), asdict(config))
    print(f"{config.method} on {dataset.name}: {len(dataset.classes)} training identities, {len(dataset.train):,} tracklets; "
          f"{sum(p.numel() for p in trained):,} parameters to train; {device}, {precision}; run {run}")
    if checkpoint is None and config.epochs and config.gait and config.mask_warmup and not config.mask_branch:
        model.train()
        warm_up_mask(model, loader, sampler, config, device)

    for epoch in range(first_epoch, config.epochs):
        model.train()
        sampler.epoch, sums, epoch_start = epoch, {}, time.time()
        bar = tqdm(loader, desc=f"epoch {epoch + 1}/{config.epochs}", bar_format=BAR)
        for step, (frames, modality, index) in enumerate(bar):
            frames = augment(frames.to(device, non_blocking=True), modality,
                             np.random.default_rng([config.seed, epoch, step]), config.erase)
            label = label_of_tracklet[index].to(device)
            with torch.autocast(device.type, dtype, enabled=precision != "float32"):
                losses, shown = model(frames, modality.to(device), label)
            total = sum(losses.values())
            optimizer.zero_grad()
            scaler.scale(total).backward()
            scaler.step(optimizer)
            scaler.update()

            for name, value in {**losses, **shown}.items():
                sums[name] = sums.get(name, 0) + value.detach()
            if step % 10 == 9 or step == len(loader) - 1 or device.type == "cpu":    # reading a value waits for the GPU
                seconds = time.time() - epoch_start
                means = {name: (value / (step + 1)).item() for name, value in sums.items()}
                for name, value in means.items():
                    if not np.isfinite(value):
                        raise UserError(f"{name} is {value} in epoch {epoch + 1}, step {step + 1}; {epoch} whole epochs stand in "
                                        f"{run}: resume or begin again with a lower --lr or --precision float32")
                bar.set_postfix_str(f"{(step + 1) * frames.shape[0] * frames.shape[1] / seconds:.0f} frames/s "
                                    + brief(means))
            if epoch == first_epoch and step == min(2, config.steps - 1) and device.type == "cpu" and dataset.name != "walkers":
                bar.write(f"no CUDA here: about {seconds / (step + 1) * config.steps / 3600:.2g} hours an epoch on this CPU")

        # Log, save, evaluate
        line = {"epoch": epoch + 1, "lr": optimizer.param_groups[0]["lr"], **means, "seconds": round(time.time() - epoch_start, 1)}
        scheduler.step()
        log.append(json.dumps(line))
        write_atomic(os.path.join(run, "log.jsonl"), lambda file: file.write("".join(f"{entry}\n" for entry in log).encode()))
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict(),
                 "scaler": scaler.state_dict(), "epoch": epoch + 1, "config": asdict(config), "classes": dataset.classes,
                 "method": config.method,
                 "random": {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None}}
        write_atomic(os.path.join(run, "last.pt"), lambda file: torch.save(state, file))
        if epoch + 1 == config.epochs or (config.evaluate_every and (epoch + 1) % config.evaluate_every == 0):
            report(model, dataset, config, device, run, start)
    if first_epoch >= config.epochs:
        print(f"{run} has its {first_epoch} epochs already; raise --epochs to go on" if checkpoint else "the untrained model")
        report(model, dataset, config, device, run, start)


def report(model, dataset, config, device, run, start):
    """Evaluates, prints the table, writes results.json and silhouettes.png."""
    results, _ = evaluate(model, dataset, config, device)
    results = {"method": config.method, "dataset": dataset.name, **results, "seconds": round(time.time() - start, 1)}
    write_json(os.path.join(run, "results.json"), results)
    if config.gait:
        draw_silhouettes(os.path.join(run, "silhouettes.png"), model, dataset, config, device)
    print(f"\n{table(results)}\nEverything is in {run}{os.sep}" + ("; silhouettes.png shows what the model sees" if config.gait else ""))


if __name__ == "__main__":
    cli(main)
