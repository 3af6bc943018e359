"""Tracklets: both benchmarks read from disk, frames sampled, identities sampled, batches augmented on the device.

    --data PATH -> load_dataset -> Dataset(train tracklets, test tracklets, query and gallery of both directions)
       train: IdentitySampler (P identities x K tracklets x 2 modalities) -> Frames -> uint8 (B,T,3,H,W) -> augment
       test:  every test tracklet once, in order                          -> Frames -> uint8 (B,T,3,H,W) -> normalise

PATH may be HITSZ-VCM in any of its three layouts, or BUPTCampus; which one is seen from its files (README, Data).
`python data.py PATH` prints the statistics and every problem: run it once before the first training.

Quick question: why does every frame of a tracklet get the same crop, flip and erased rectangle? (Drawn anew per frame,
a walking person would jump and turn about six times a second, and gait is what moves.)

Ours, not the paper's: one draw of the augmentation per tracklet; the pad of the random crop scales with the image (10
pixels at height 256); an order of identities, tracklets and frames that depends on seed and epoch alone; the checks;
several processes (torchrun); frames that thermal cameras and animated files hold; --cache.
"""
import argparse
import functools
import hashlib
import json
import math
import multiprocessing
import os
import re
import signal
import sys
import time
from collections import defaultdict
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageOps, ImageSequence
from tqdm import tqdm

VISIBLE, INFRARED = "visible", "infrared"
DIRECTIONS = ("infrared->visible", "visible->infrared")    # query -> gallery


class UserError(Exception):
    """Anything a user can cause or cure: one line that says what was found, what was expected, what to do."""


def cli(main):
    """Runs main(); a UserError becomes one line on stderr and exit code 2, Ctrl-C exit code 130."""
    try:
        if hasattr(sys.stdout, "reconfigure"):
            sys.stdout.reconfigure(errors="backslashreplace")    # a file's name may be no text
        code = main()
        if processes()[1] > 1:
            dist.destroy_process_group()
        sys.exit(code)
    except UserError as error:
        rank = take_turn()
        # A DataLoader worker hands its exception on as a whole traceback, whose last line is the message.
        tqdm.write("error: " + f"(process {rank}) " * (rank > 0) + str(error).strip().splitlines()[-1].split("UserError: ")[-1],
                   file=sys.stderr)    # past open bars
        sys.exit(2)
    except RuntimeError as error:
        if processes()[1] == 1 or not re.search("gloo|nccl|peer|socket", str(error), re.IGNORECASE):
            raise
        time.sleep(2)
        tqdm.write(f"error: process {take_turn()} has lost the others ({' '.join(str(error).split())[:120]}); expected their lines above; start again",
                   file=sys.stderr)
        sys.exit(2)
    except OSError as error:    # too many open files, a vanished disk: the system's own words
        tqdm.write(f"error: {error}; check the disk, the permissions and --workers", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt as stop:    # train.py says in it how to go on
        if processes()[0] == 0:
            tqdm.write(str(stop) or "interrupted", file=sys.stderr)
        sys.exit(130)
    finally:
        if dist.is_available() and dist.is_torchelastic_launched():
            time.sleep(0.2)    # gloo's thread lets go of its last tensor a moment after its work is done, and aborts an interpreter that ends meanwhile


def take_turn():
    """-> this process's rank, after its turn to speak: torchrun ends all processes when the first ends, so that what all have to say
    is said once."""
    rank = int(os.environ["RANK"]) if dist.is_available() and dist.is_torchelastic_launched() else 0
    time.sleep(2 * rank)
    return rank


def processes():
    """-> this process's rank and their number; (0, 1) unless torchrun started several."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else (0, 1)


class Gathered(torch.autograd.Function):
    """See gathered."""

    @staticmethod
    def forward(ctx, x):
        parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(processes()[1])]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, gradient):
        rank, world = processes()
        return world * gradient.chunk(world)[rank]


class Chunks:
    """A step that --accumulate cuts into chunks (train.forward_backward). Each chunk goes through the network twice: first without
    gradient, to record what it hands to `gathered`, then with it, when `gathered` sets the others' records beside it."""
    step = None    # the Chunks of the step under way

    def __init__(self, number):
        self.records = [[] for _ in range(number)]

    def begin(self, chunk, recording):
        self.chunk, self.recording, self.calls = chunk, recording, 0

    def join(self, x):
        """x (B, ...) of the chunk under way -> (number * B, ...)."""
        if self.recording:
            self.records[self.chunk].append(x.detach())
            return torch.cat([x.detach()] * len(self.records))    # of the right shape; what comes of it is thrown away
        parts = [record[self.calls] for record in self.records]
        parts[self.chunk] = x.view_as(x)
        if x.requires_grad:    # the chunks' losses are averaged as the processes' are
            parts[self.chunk].register_hook(lambda gradient: gradient * len(self.records))
        self.calls += 1
        return torch.cat(parts)


def gathered(x):
    """x (B, ...) of this process -> (world * B, ...) of all of them, in order of rank; x itself where there is one. Of a step in chunks
    likewise: x of all chunks.

    For losses that compare tracklets: every process computes the same loss of the whole batch, and each sends the gradient of its own
    part back. DistributedDataParallel then takes the mean over processes where a sum is due: hence `world *` above. [ours]"""
    x = Chunks.step.join(x) if Chunks.step else x
    return x if processes()[1] == 1 or Chunks.step and Chunks.step.recording else Gathered.apply(x)


def write_atomic(path, write):
    """write(file) to a temporary name beside `path`, then os.replace: a reader sees the old file or the new, whole."""
    temporary = f"{path}.{os.getpid()}.tmp"
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"{path} cannot be written ({' '.join(str(error).split())[:120]}); what stood there before is untouched: "
                        "free some space or choose another folder") from None
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)


def option(default, help, least=None):
    """A dataclass field that becomes a command-line option. least: the smallest value that can work."""
    return field(default=default, metadata={"help": help, "least": least})


# --------------------------------------------------------------- datasets ----

@dataclass(frozen=True)
class Tracklet:
    """One person before one camera: paths of its frames in order ("clip.gif#3": the picture of that number, from 0, of an animated
    file). modality: "visible" or "infrared"."""
    frames: tuple
    pid: int
    camera: str
    modality: str


@dataclass
class Dataset:
    """train, test: lists of Tracklet. directions: {"infrared->visible": (query, gallery), ...}, indices into test.

    ignore_same_camera: a gallery tracklet with the query's pid and camera does not count. test_frames: "chunks" (first
    of each of T chunks) or "linspace". missing: listed frames that are no files. problems: why it cannot be used.
    notes: what one should know."""
    name: str
    root: str
    train: list = field(default_factory=list)
    test: list = field(default_factory=list)
    directions: dict = field(default_factory=dict)
    ignore_same_camera: bool = False
    test_frames: str = "chunks"
    missing: list = field(default_factory=list)
    problems: list = field(default_factory=list)
    notes: list = field(default_factory=list)

    @property
    def classes(self):
        """Training identities in ascending order; a label is a position in this list, the same in every run."""
        return sorted({t.pid for t in self.train})


def read_lines(path):
    try:
        with open(path, encoding="utf-8-sig") as file:
            return file.read().rstrip().splitlines()
    except FileNotFoundError:
        raise UserError(f"no file {path}; it belongs to the dataset: see README, Data") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as text ({error}); download it again") from None


HITSZ_LISTS = "track_train_info.txt", "track_test_info.txt", "train_name.txt", "test_name.txt"
BUPT_LISTS = "data_paths.json", "train.txt", "gallery.txt"
HITSZ_NAME = re.compile(r"(\d{1,9})M([12])D(\d{1,9})T\d+F([^/\\]+)")    # the numbers may be padded or not: letters decide


def is_walkers(path):
    return os.path.isfile(os.path.join(path, "walkers.json"))


def read_hitsz(root, info):
    """HITSZ-VCM. root: the folder given; info: where its txt files lie (they may lie in root itself)."""
    dataset = Dataset("walkers" if is_walkers(root) else "HITSZ-VCM", root, ignore_same_camera=True)
    rows = {"train": [], "test": []}    # per row a Tracklet, or None where the row is wrong
    for split in rows:
        folder = os.path.join(root, split.capitalize())
        folder = folder if os.path.isdir(folder) else root
        names_file, info_file = f"{split}_name.txt", f"track_{split}_info.txt"
        paths = []    # (path, (pid, modality, camera)) per line of the names file
        for i, name in enumerate(read_lines(os.path.join(info, names_file)), 1):
            match = HITSZ_NAME.fullmatch(name.strip())
            if match:
                pid, m, camera, file = match.groups()
                path = os.path.join(folder, pid, "ir" if m == "1" else "rgb", f"D{camera}", file)
                paths.append((path, (int(pid), int(m), int(camera))))
            else:
                paths.append(None)
                dataset.problems.append(f"{names_file} line {i}: {name.strip()[:60]!r} is no frame name; expected one such "
                                        "as 0001M2D3T1F1.jpg")
        for i, line in enumerate(read_lines(os.path.join(info, info_file)), 1):
            tracklet = None
            try:
                modality, start, end, pid, camera = (int(x.removesuffix(".0")) for x in line.split())
                if modality not in (1, 2) or not 1 <= start <= end <= len(paths):
                    raise ValueError
            except ValueError:
                dataset.problems.append(f"{info_file} row {i}: {line.strip()[:60]!r}; expected `modality start end pid "
                                        f"camera` with modality 1 or 2 and 1 <= start <= end <= {len(paths)}, the lines of "
                                        f"{names_file}")
            else:
                frames = [p for p in paths[start - 1:end] if p]
                tracklet = Tracklet(tuple(p for p, _ in frames), pid, f"D{camera}", INFRARED if modality == 1 else VISIBLE)
                if any(key != (pid, modality, camera) for _, key in frames):
                    dataset.notes.append(f"{info_file} row {i} says pid {pid}, modality {modality}, camera {camera}, but "
                                         f"its lines of {names_file} say otherwise; the row is believed")
            rows[split].append(tracklet)

    query = set()
    for word in " ".join(read_lines(os.path.join(info, "query_IDX.txt"))).replace(",", " ").split():
        row = int(word) if word.isdecimal() and len(word) < 10 else 0
        if not 1 <= row <= len(rows["test"]):
            dataset.problems.append(f"query_IDX.txt: {word[:60]!r} is no row of track_test_info.txt; expected 1.."
                                    f"{len(rows['test'])}")
        elif rows["test"][row - 1] and rows["test"][row - 1].modality != INFRARED:
            dataset.problems.append(f"query_IDX.txt: row {row} of track_test_info.txt is visible; queries are infrared")
        else:
            query.add(row - 1)

    # Short tracks are dropped only now: query_IDX counts rows of the whole file.
    long_enough = [(i, t) for i, t in enumerate(rows["test"]) if t and len(t.frames) >= 12]
    dataset.train = [t for t in rows["train"] if t and len(t.frames) >= 12]
    dataset.test = [t for _, t in long_enough]
    infrared = [new for new, (old, _) in enumerate(long_enough) if old in query]
    visible = [new for new, (old, t) in enumerate(long_enough) if old not in query and t.modality == VISIBLE]
    dataset.directions = {DIRECTIONS[0]: (infrared, visible), DIRECTIONS[1]: (visible, infrared)}
    for split, kept in (("train", dataset.train), ("test", dataset.test)):
        if len(kept) < len(rows[split]):
            dataset.notes.append(f"{split}: {len(rows[split]) - len(kept):,} of {len(rows[split]):,} tracks have under 12 frames: dropped")
    if len(infrared) + len(visible) < len(dataset.test):
        dataset.notes.append(f"{len(dataset.test) - len(infrared) - len(visible)} infrared test rows are in no query: left out")
    return dataset


def read_bupt(root, auxiliary):
    """BUPTCampus. root: the folder of train.txt, data_paths.json and DATA/. auxiliary: train on its auxiliary set too."""
    dataset = Dataset("BUPTCampus", root, test_frames="linspace")
    folder = os.path.abspath(os.path.join(root, "DATA"))
    try:
        paths = json.loads("\n".join(read_lines(os.path.join(root, "data_paths.json"))))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{root}/data_paths.json is no JSON ({str(error)[:80]}); download it again") from None

    def tracklet(where, pid, modality, camera, number):
        try:
            frames = paths[pid][modality][camera][number]
            if not frames or not isinstance(frames, list) or not all(isinstance(f, str) for f in frames):
                raise TypeError
        except (KeyError, TypeError, IndexError):
            dataset.problems.append(f"{where}: data_paths.json has no frames for [{pid}][{modality}][{camera}][{number}]")
            return None
        frames = tuple(os.path.normpath(os.path.join(folder, f)) for f in frames)
        outside = next((f for f in frames if not f.startswith(folder + os.sep)), None)
        if outside:
            dataset.problems.append(f"{where}: {outside} lies outside {folder}; refused")
            return None
        return Tracklet(frames, int(pid), camera, INFRARED if modality == "IR" else VISIBLE)

    def rows(name, modalities):
        for i, line in enumerate(read_lines(os.path.join(root, name)), 1):
            words = line.split()
            if len(words) == 4 and words[0].isdecimal() and len(words[0]) < 10 and words[1] in modalities:
                for modality in words[1].split("/"):
                    t = tracklet(f"{name} row {i}", words[0], modality, words[2], words[3])
                    if t:
                        yield t
            elif words:
                dataset.problems.append(f"{name} row {i}: {line.strip()[:60]!r}; expected `pid modality camera tracklet` "
                                        f"with modality {' or '.join(modalities)}")

    for name in ["train.txt"] + ["train_auxiliary.txt"] * auxiliary:
        dataset.train += rows(name, ("RGB/IR",))
    query, gallery = (list(dict.fromkeys(rows(name, ("RGB", "IR")))) for name in ("query.txt", "gallery.txt"))
    dataset.test = list(dict.fromkeys(query + gallery))    # a row may be in both: it is embedded once all the same
    place = {t: i for i, t in enumerate(dataset.test)}
    for direction in DIRECTIONS:
        query_modality, gallery_modality = direction.split("->")
        dataset.directions[direction] = ([place[t] for t in query if t.modality == query_modality],
                                         [place[t] for t in gallery if t.modality == gallery_modality])
    return dataset


def read_dataset(path, auxiliary=False):
    """Recognises and reads the dataset at `path`; its .problems lists what is wrong. Raises UserError if none is there."""
    if not os.path.isdir(path):
        raise UserError(f"no folder {path}; expected HITSZ-VCM or BUPTCampus; check the path")
    real = os.path.realpath(path)
    here = [os.path.join(path, "info"), path, os.path.dirname(real) if os.path.basename(real) == "DATA" else path]
    hitsz = next((f for f in here[:2] for name in HITSZ_LISTS if os.path.isfile(os.path.join(f, name))), None)
    bupt = next((f for f in here[1:] for name in BUPT_LISTS if os.path.isfile(os.path.join(f, name))), None)
    if hitsz:
        dataset = read_hitsz(path, hitsz)
    elif bupt:
        dataset = read_bupt(bupt, auxiliary)
    else:
        raise UserError(f"no dataset in {path}; expected Train/ Test/ info/ (HITSZ-VCM), or train.txt, data_paths.json and "
                        "DATA/ (BUPTCampus); see README, Data")

    by_folder = defaultdict(list)    # one listing per folder: half a million single look-ups would take minutes on NFS
    for t in dataset.train + dataset.test:
        for frame in t.frames:
            by_folder[os.path.dirname(frame)].append(os.path.basename(frame))
    for folder, names in by_folder.items():
        try:
            there = set(os.listdir(folder))
        except (OSError, ValueError):    # no such folder, or a name that no file can have
            there = set()
        dataset.missing += [os.path.join(folder, n) for n in dict.fromkeys(names) if n not in there]
    dataset.problems += [f"no file {frame}, though the dataset's lists name it" for frame in dataset.missing]
    if not dataset.train or not dataset.test:
        dataset.problems.append(f"{len(dataset.train)} training and {len(dataset.test)} test tracklets; expected some of each")
    modalities = defaultdict(set)
    for t in dataset.train:
        modalities[t.pid].add(t.modality)
    dataset.problems += [f"training identity {pid} has {next(iter(m))} tracklets only; expected both modalities: remove its rows"
                         for pid, m in sorted(modalities.items()) if len(m) == 1]
    for direction, (query, gallery) in dataset.directions.items():
        there = {dataset.test[i].pid for i in gallery}
        alone = sum(dataset.test[i].pid not in there for i in query)
        if alone:
            dataset.notes.append(f"{direction}: {alone} queries have no tracklet of their person in the gallery: not scored")
        if not query or len(gallery) < 20:
            dataset.problems.append(f"{direction}: {len(query)} queries and a gallery of {len(gallery)}; rank-20 needs at "
                                    "least 1 and 20")
    return dataset


def load_dataset(path, auxiliary=False):
    """read_dataset, refusing one that has problems. Raises UserError that names the first."""
    dataset = read_dataset(path, auxiliary)
    if dataset.problems:
        more = f" ({len(dataset.problems)} problems; python data.py {path} lists them)" if len(dataset.problems) > 1 else ""
        raise UserError(dataset.problems[0] + more)
    return dataset


# ----------------------------------------------------------------- frames ----

ANIMATED = re.compile(r"(.+\.(?:gif|tiff?|webp|apng|avifs?))#(\d+)", re.IGNORECASE | re.DOTALL)


def frame_indices(n, T, rng=None, rule="chunks"):
    """T of n frames, in order. With rng (training): one random frame of each of T equal chunks (ceil; the last frame
    repeated). Without: the first of each chunk, or by rule "linspace" every n/T-th, as each benchmark has it."""
    if rule == "linspace" and rng is None:
        return np.linspace(0, n, T, endpoint=False).astype(int)
    chunk = math.ceil(n / T)
    within = rng.integers(chunk, size=T) if rng is not None else 0
    return np.minimum(np.arange(T) * chunk + within, n - 1)


def picture(image, size):
    """An open image -> uint8 (3, H, W), upright, resized bilinearly.

    Deeper ones than 8 bits, as thermal cameras write them, are stretched from their darkest to their brightest value."""
    ImageOps.exif_transpose(image, in_place=True)
    if image.mode[0] in "IF":    # I, F, I;16 and its byte orders
        deep = np.nan_to_num(np.asarray(image, np.float32))
        image = Image.fromarray(((deep - deep.min()) * (255 / max(np.ptp(deep), 1e-6))).astype(np.uint8))
    if "transparency" in image.info:
        image = image.convert("RGBA")    # or pillow warns
    if image.mode != "RGB":    # pillow would make a copy
        image = image.convert("RGB")
    if image.size != tuple(size[::-1]):
        image = image.resize(size[::-1], Image.Resampling.BILINEAR)
    rows = np.frombuffer(image.tobytes("raw", "RGB;L"), np.uint8)    # each its red, its green, its blue: quicker to sort than pixels
    return torch.from_numpy(rows.reshape(size[0], 3, size[1]).swapaxes(0, 1).copy())


@functools.lru_cache(maxsize=1)
def animation(path, size, modified):
    """All pictures of an animated file: each builds on the one before, so reading one alone costs as much."""
    with Image.open(path) as image:
        return [picture(image.copy(), size) for image in ImageSequence.Iterator(image)]


def read_frame(path, size):
    """One frame -> uint8 (3, H, W), see picture. Raises UserError that names an unreadable file."""
    animated = ANIMATED.fullmatch(path)
    try:
        if animated:
            return animation(animated[1], tuple(size), os.path.getmtime(animated[1]))[int(animated[2])]
        with Image.open(path) as image:
            return picture(image, size)
    except Exception as error:    # pillow raises a dozen types for a bad file
        raise UserError(f"{path} cannot be read as an image ({' '.join(str(error).split())[:120]}); "
                        "download it again, or see python data.py for all such files") from None


class Frames(torch.utils.data.Dataset):
    """tracklets[index] -> uint8 frames (T, 3, H, W), modality (0 visible, 1 infrared), index.

    A key is an index (test), or (index, seed) where the seed alone decides which frames are drawn (training). cache: a Cache to
    read them from."""

    def __init__(self, tracklets, *, size, T, rule="chunks", cache=None):
        self.tracklets, self.size, self.T, self.rule, self.cache = tracklets, size, T, rule, cache

    def __len__(self):
        return len(self.tracklets)

    def paths(self, index, seed=None):
        """The T frames that are drawn."""
        frames = self.tracklets[index].frames
        rng = None if seed is None else np.random.default_rng(seed)
        return [frames[i] for i in frame_indices(len(frames), self.T, rng, self.rule)]

    def __getitem__(self, key):
        index, seed = key if isinstance(key, tuple) else (key, None)
        paths = self.paths(index, seed)
        frames = self.cache.read(paths) if self.cache else torch.stack([read_frame(path, self.size) for path in paths])
        return frames, int(self.tracklets[index].modality == INFRARED), index


class Cache:
    """--cache: the frames of all tracklets, resized to size (H, W), in one file: 64 hex digits that name them (their paths below root,
    their sizes in bytes, H and W), then uint8 (N, 3, H, W), mapped into memory. Made where there is none. Raises UserError for a file that is another's."""

    def __init__(self, path, tracklets, *, size, root, workers=0):
        frames = list(dict.fromkeys(f for t in tracklets for f in t.frames))
        self.path, self.shape, self.row, self.array = path, (len(frames), 3, *size), {f: i for i, f in enumerate(frames)}, None

        try:    # folder by folder: half a million single look-ups would take minutes on NFS
            entries = [entry for folder in dict.fromkeys(map(os.path.dirname, frames)) for entry in os.scandir(folder)]
            bytes_of = {entry.path: entry.stat().st_size for entry in entries}
            named = [(os.path.relpath(frame, root), bytes_of[frame]) for frame in frames]
        except (OSError, KeyError) as error:
            raise UserError(f"the training frames changed while --cache was made ({error}); start again") from None
        name = hashlib.sha256(json.dumps([list(size), *named]).encode()).hexdigest().encode()

        def write(file):
            file.write(name)
            loader = torch.utils.data.DataLoader(Frames([Tracklet((f,), -1, "", VISIBLE) for f in frames], size=size, T=1), batch_size=64,
                                                 num_workers=workers, worker_init_fn=ignore_interrupts, generator=torch.Generator())
            with tqdm(total=len(frames), desc=f"cache {path}", unit="frame") as bar:
                for batch, *_ in loader:
                    file.write(batch.numpy().tobytes())    # not through the mapping: a full disk would be a bus error there
                    bar.update(len(batch))
        if not os.path.lexists(path):
            write_atomic(path, write)
        try:
            with open(path, "rb") as file:
                if file.read(64) != name or os.path.getsize(path) != 64 + math.prod(self.shape):
                    raise UserError(f"--cache {path} holds other frames, or another --size, or is cut short; expected the {len(frames):,} training "
                                    f"frames at {size[0]}x{size[1]} as they are now: name another file, or remove this one")
        except OSError as error:
            raise UserError(f"--cache {path} cannot be read ({error}); expected a file, or a name that is free") from None

    def read(self, paths):
        """T paths -> uint8 (T, 3, H, W)."""
        if self.array is None:    # each loader process maps it itself
            self.array = np.memmap(self.path, np.uint8, "r", offset=64, shape=self.shape)
        return torch.from_numpy(self.array[[self.row[path] for path in paths]])


def ignore_interrupts(worker):
    """For loader processes: Ctrl-C goes to the whole group, but what to do about it is for the main process to say."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


class IdentitySampler:
    """Batches of keys for Frames: P identities x K tracklets of each modality, the visible ones first.

    The order is a function of seed and epoch (set .epoch) alone; .start leaves out the first steps of it. rank, world: every process draws the same P identities
    and takes its own share. An identity with fewer than K tracklets of a modality repeats some."""

    def __init__(self, tracklets, *, P, K, steps, seed, rank=0, world=1):
        by_pid = defaultdict(lambda: {VISIBLE: [], INFRARED: []})
        for i, t in enumerate(tracklets):
            by_pid[t.pid][t.modality].append(i)
        self.pids = [by_pid[pid] for pid in sorted(by_pid)]
        if not 2 <= P <= len(self.pids):
            raise UserError(f"--identities {P} a batch of {len(self.pids)} training identities; expected 2 to {len(self.pids)}")
        if P % world:
            raise UserError(f"--identities {P} cannot be shared by {world} processes; expected a multiple of {world}")
        self.P, self.K, self.steps, self.seed, self.rank, self.world, self.epoch = P, K, steps, seed, rank, world, 0
        self.start = 0

    def __len__(self):
        return self.steps - self.start

    def __iter__(self):
        rng = np.random.default_rng([self.seed, self.epoch])
        for step in range(self.steps):
            keys = {VISIBLE: [], INFRARED: []}
            for p, identity in enumerate(rng.choice(len(self.pids), self.P, replace=False)):
                for modality, indices in self.pids[identity].items():
                    if len(indices) >= self.K:
                        chosen = rng.choice(indices, self.K, replace=False)
                    else:    # all of them, and some again
                        chosen = np.append(rng.permutation(indices), rng.choice(indices, self.K - len(indices)))
                    seeds = rng.integers(2 ** 31, size=self.K)
                    if p % self.world == self.rank:
                        keys[modality] += [(int(i), int(s)) for i, s in zip(chosen, seeds)]
            if step >= self.start:
                yield keys[VISIBLE] + keys[INFRARED]


# ----------------------------------------------------------- augmentation ----

@functools.lru_cache
def constant(values, device):
    """Numbers (nested tuples) as a tensor, made once for each device: making one on a GPU waits for the GPU."""
    with torch.inference_mode(False):
        return torch.tensor(values, device=device)


def normalise(frames, channels=slice(None)):
    """uint8 (..., 3, H, W), or those of the channels that are there -> float32, ImageNet mean 0 and deviation 1."""
    mean, std = (constant(values, frames.device)[channels, None, None] for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    return (frames / 255).sub_(mean).div_(std)


def augment(frames, modality, rng, erase=0.5):
    """uint8 (B, T, 3, H, W), modality (B,), numpy Generator -> normalised float32, all frames of a tracklet alike.

    Pad + random crop, flip, random erasing (with probability `erase`); then one channel copied to all three for half of the visible tracklets,
    and for infrared a channel (3 of 4) or the gray mix (1 of 8). The numbers are drawn on the CPU: no device sync."""
    B, T, C, H, W = frames.shape
    pad = round(10 * H / 256)
    crops = [(*rng.integers(2 * pad + 1, size=2), rng.random() < 0.5) for _ in range(B)]
    out = torch.empty(frames.shape, device=frames.device)
    # The release fills with these numbers after normalisation: slightly bright, not the mean. Kept.
    fill, gray = (constant(values, frames.device)[:, None, None] for values in ((0.4914, 0.4822, 0.4465), (0.2989, 0.5870, 0.1140)))
    for b, (infrared, (top, left, flipped)) in enumerate(zip(modality.tolist(), crops)):    # one tracklet at a time stays in a CPU's cache
        box = erased_box(H, W, rng) if rng.random() < erase else None
        channel, mix = rng.integers(4 if infrared else 6), rng.random() < 0.5
        used = slice(channel, channel + 1) if channel < 3 else slice(None)
        tracklet = F.pad(frames[b, :, used], (pad,) * 4)[..., top:top + H, left:left + W]    # black, before normalisation
        tracklet = normalise(tracklet.flip(-1) if flipped else tracklet, used)
        if box:
            y, x, h, w = box
            tracklet[..., y:y + h, x:x + w] = fill[used]
        out[b] = (tracklet * gray).sum(1, keepdim=True) if channel == 3 and infrared and mix else tracklet    # one channel fills all three
    return out


def erased_box(H, W, rng):
    """Random erasing's rectangle (y, x, h, w): 2-40 % of the area, aspect 0.3-3.3. None if 100 tries do not fit."""
    for _ in range(100):
        area, aspect = rng.uniform(0.02, 0.4) * H * W, rng.uniform(0.3, 1 / 0.3)
        h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < h < H and 0 < w < W:
            return rng.integers(H - h + 1), rng.integers(W - w + 1), h, w


# ---------------------------------------------------- python data.py PATH ----

def check_frame(path):
    """None, or why the file cannot be read. Decodes it whole: a truncated JPEG opens well."""
    try:
        read_frame(path, (8, 4))
    except UserError as error:
        return str(error).split(";")[0]


def main():
    parser = argparse.ArgumentParser(description="Statistics and every problem of a dataset; exit code 0 if it is usable.")
    parser.add_argument("path", help="HITSZ-VCM (any layout) or BUPTCampus")
    parser.add_argument("--auxiliary", choices=("on", "off"), default="off", help="BUPTCampus: count its auxiliary training set too")
    args = parser.parse_args()
    dataset = read_dataset(args.path, args.auxiliary == "on")
    print(f"{dataset.name} in {dataset.root}\n\n{'split':<8}{'modality':<10}{'identities':>10}{'tracklets':>11}{'frames':>10}  cameras")
    for split in ("train", "test"):
        for modality in (VISIBLE, INFRARED):
            ts = [t for t in getattr(dataset, split) if t.modality == modality]
            cameras = sorted({t.camera for t in ts}, key=lambda c: (len(c), c))
            print(f"{split:<8}{modality:<10}{len({t.pid for t in ts}):>10,}{len(ts):>11,}"
                  f"{sum(len(t.frames) for t in ts):>10,}  {len(cameras)}: {' '.join(cameras)}")
    for direction, (query, gallery) in dataset.directions.items():
        print(f"{direction}: {len(query):,} queries, {len(gallery):,} gallery tracklets")
    missing = set(dataset.missing)
    frames = [f for f in dict.fromkeys(f for t in dataset.train + dataset.test for f in t.frames) if f not in missing]
    with multiprocessing.Pool(os.cpu_count()) as pool:
        dataset.problems += filter(None, tqdm(pool.imap(check_frame, frames, 64), "reading", len(frames), unit="frame"))
    for note in dataset.notes:
        print("note:", note)
    for problem in dataset.problems:
        print("problem:", problem)
    print(f"{len(dataset.problems)} problems" if dataset.problems else "no problems: usable")
    return 2 if dataset.problems else 0


if __name__ == "__main__":
    cli(main)
