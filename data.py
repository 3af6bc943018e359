"""Tracklets: datasets read from disk, frames and identities sampled, batches augmented.

    PATH -> load_dataset -> Dataset: train and test tracklets; queries and gallery by direction
       train: IdentitySampler: P identities x K tracklets x 2 modalities -> Frames -> augment
       test:  every test tracklet once, in order                         -> Frames -> normalise

A tracklet is a series of frames of one person before one camera. Both paths end in float32 frames
(B, T, 3, H, W), modality (B,), 0 visible, 1 infrared, and index (B,) of the tracklets in the split.

Quick question: why does every frame of a tracklet get the same crop, flip and erased rectangle?
(Drawn anew per frame, a walking person would jump and turn from one frame to the next.)

Ours, not the paper's: one draw of the augmentation per tracklet; a pad of the random crop that
scales with the image; an order that depends on seed and epoch alone.
"""
import glob
import math
import os
import re
from dataclasses import dataclass, field

from support.check import check, main_of
from support.files import UserError, integers, parsed, read_json
from support.footage import find_footage, normalise, read_frames, sent
from support.options import cli, load_own

import numpy as np
import torch
import torch.nn.functional as F

VISIBLE, INFRARED = "visible", "infrared"
MODALITIES = (VISIBLE, INFRARED)    # in tensors: 0 and 1
DIRECTIONS = ("infrared->visible", "visible->infrared")    # query -> gallery


@dataclass(frozen=True)
class Tracklet:
    """frames: a tuple of paths in order ("clip.gif#3": picture 3 of an animated file). pid: an int
    or a str, camera: a str; None if unknown. modality: "visible" or "infrared"."""
    frames: tuple
    pid: int | str | None
    camera: str | None
    modality: str


@dataclass
class Dataset:
    """directions: {"infrared->visible": (query, gallery), ...}: indices into test. frame_rule: one
    of FRAME_RULES. Gallery tracklets of the query's pid and camera may be ignored."""
    name: str
    root: str
    train: list = field(default_factory=list)
    test: list = field(default_factory=list)
    directions: dict = field(default_factory=dict)
    ignore_same_camera: bool = False
    frame_rule: str = "chunks"
    notes: list = field(default_factory=list)    # lines about what is odd in it

    def set_test(self, query, gallery):
        """Lists of Tracklet -> test, each tracklet once, and directions: queries of one modality
        against the gallery of the other. Without queries, as in HITSZ-VCM, roles are swapped."""
        self.test = list(dict.fromkeys([*query, *gallery]))
        index_of = {tracklet: i for i, tracklet in enumerate(self.test)}
        for direction in DIRECTIONS:
            modalities = direction.split("->")
            is_asked = any(t.modality == modalities[0] for t in query)
            sides = (query, gallery) if is_asked else (gallery, query)
            self.directions[direction] = tuple(
                [index_of[t] for t in dict.fromkeys(side) if t.modality == modality]
                for side, modality in zip(sides, modalities, strict=True))

    @property
    def classes(self):
        """Training identities, ascending; a label is a position in this list."""
        return sorted({t.pid for t in self.train})


# -------------------------------------------------------------- on disk ----

HITSZ_NAME = re.compile(r"(\d+)M([12])D(\d+)T\d+F(.+)")    # pid, modality, camera, track, file
HITSZ_MODALITY = {1: INFRARED, 2: VISIBLE}
OWN_TRACK = re.compile(r"([^/]+)/(visible|rgb|infrared|ir)/(?:([^/]+)/)?[^/]+", re.I)
HITSZ = str.split("track_train_info.txt track_test_info.txt train_name.txt test_name.txt "
                        "query_IDX.txt")
BUPT = str.split("data_paths.json train.txt query.txt gallery.txt")
OWN_SPLITS = "train", "query", "gallery"
SHORTEST = 12    # HITSZ-VCM's tracks of fewer frames are dropped, as everyone does


def hitsz_tracks(root, info, split):
    """SPLIT_name.txt and track_SPLIT_info.txt, in the folder `info` -> a Tracklet for each row.
    0001M2D3T1F1.jpg is the file Train/0001/rgb/D3/1.jpg: a track has no folder."""
    folders = [os.path.join(root, *[split.capitalize()] * depth) for depth in (2, 1, 0)]
    folder = next(filter(os.path.isdir, folders))    # Train/Train, Train, or root itself

    def frame_of(line):
        pid, m, camera, file = HITSZ_NAME.fullmatch(line.strip()).groups()
        return os.path.join(folder, pid, {"1": "ir", "2": "rgb"}[m], f"D{camera}", file)

    def track_of(line):
        m, start, end, pid, camera = integers(line)
        if not 1 <= start <= end <= len(frames):
            raise ValueError    # parsed turns any failure into a UserError
        return Tracklet(tuple(frames[start - 1:end]), pid, f"D{camera}", HITSZ_MODALITY[m])

    frames = parsed(os.path.join(info, f"{split}_name.txt"), frame_of,
                    "a frame such as 0001M2D3T1F1.jpg")
    return parsed(os.path.join(info, f"track_{split}_info.txt"), track_of,
                  f"`modality start end pid camera`, lines start to end of {split}_name.txt")


def read_hitsz(root, info):
    """query_IDX.txt lists the rows of the test tracks (from 1) that are queries, all infrared; the
    visible ones are the gallery."""
    is_walkers = os.path.isfile(os.path.join(root, "walkers.json"))
    dataset = Dataset("walkers" if is_walkers else "HITSZ-VCM", root, ignore_same_camera=True)
    train, test = hitsz_tracks(root, info, "train"), hitsz_tracks(root, info, "test")
    infrared = {row: t for row, t in enumerate(test, 1) if t.modality == INFRARED}
    query = sum(parsed(os.path.join(info, "query_IDX.txt"),
                       lambda line: [infrared[row] for row in integers(line)],
                       "infrared rows of track_test_info.txt"), [])

    def long(tracklets):
        return [t for t in tracklets if len(t.frames) >= SHORTEST]

    dataset.train = long(train)
    dataset.set_test(long(query), long(t for t in test if t.modality == VISIBLE))
    return dataset


def read_bupt(root, auxiliary=False):
    """Rows are `pid modality camera tracklet`; RGB/IR is an aligned pair."""
    paths = read_json(os.path.join(root, "data_paths.json"))

    def pair_of(line):
        pid, modalities, camera, track = line.split()
        frames = {m: paths[pid][m][camera][track] for m in modalities.split("/")}
        return [Tracklet(tuple(os.path.join(root, "DATA", frame) for frame in frames[m]), int(pid),
                         camera, {"RGB": VISIBLE, "IR": INFRARED}[m]) for m in frames]

    def rows(name):
        return sum(parsed(os.path.join(root, name), pair_of, "`pid modality camera tracklet`, "
                          "with frames in data_paths.json"), [])

    dataset = Dataset("BUPTCampus", root, frame_rule="linspace")
    dataset.train = rows("train.txt")
    if auxiliary:
        is_short = os.path.isfile(os.path.join(root, "train_aux.txt"))    # a name in some copies
        dataset.train += rows("train_aux.txt" if is_short else "train_auxiliary.txt")
    dataset.set_test(rows("query.txt"), rows("gallery.txt"))
    return dataset


def read_own(root):
    """Your own folders: root/{train,query,gallery}/PID/MODALITY/[CAMERA/]TRACK/*.jpg."""
    def tracks(split):
        folder = os.path.join(root, split)
        for name, frames in (find_footage(folder) if os.path.isdir(folder) else {}).items():
            match = OWN_TRACK.fullmatch(name)
            if not match:
                raise UserError(f"{folder}/{name} holds frames; expected PID/MODALITY/TRACK or "
                                "PID/MODALITY/CAMERA/TRACK, MODALITY visible or infrared")
            pid, modality, camera = match.groups()
            is_visible = modality.lower() in ("visible", "rgb")
            yield Tracklet(frames, pid, camera, VISIBLE if is_visible else INFRARED)

    dataset = Dataset(os.path.basename(os.path.abspath(root)), root, list(tracks("train")))
    dataset.set_test(list(tracks("query")), list(tracks("gallery")))
    folders = {name for name in next(os.walk(root))[1] if not name.startswith(".")}
    if others := folders - {*OWN_SPLITS, "masks"}:
        dataset.notes.append(f"not read: {', '.join(sorted(others))} in {root}; expected train/ "
                             "query/ gallery/, in lower case")
    return dataset


def lists_in(path):
    """Yields a folder, a benchmark's lists, and those of them that it holds."""
    info, above = os.path.join(path, "info"), os.path.dirname(os.path.abspath(path))    # of DATA
    for folder, lists in (info, HITSZ), (path, HITSZ), (path, BUPT), (above, BUPT):
        yield folder, lists, [f for f in lists if os.path.isfile(os.path.join(folder, f))]


def recognise(path, auxiliary):
    """A folder -> its Dataset, or None if it holds no known dataset."""
    for folder, lists, there in lists_in(path):
        if there == lists:
            return read_hitsz(path, folder) if lists is HITSZ else read_bupt(folder, auxiliary)
    is_own = any(os.path.isdir(os.path.join(path, split)) for split in OWN_SPLITS)
    return read_own(path) if is_own else None


def load_dataset(path, reader="", auxiliary=False, checked=True):
    """A folder -> Dataset. reader: your own FILE.py:FUNCTION, path -> Dataset; checked: whether its
    first problem (support/check.py) is a UserError. Raises UserError."""
    if reader:
        dataset = load_own("--reader", reader)(path)
    else:    # an unpacked archive has a folder of its own
        folders = [path, *sorted(glob.glob(os.path.join(glob.escape(path), "*", "")))]
        dataset = next(filter(None, (recognise(folder, auxiliary) for folder in folders)), None)
    if not isinstance(dataset, Dataset):
        half = [f"{' '.join(there)} in {folder} without all of {' '.join(lists)}; "
                for folder, lists, there in lists_in(path) if there]
        raise UserError(f"no dataset in {path}; {''.join(half)}expected HITSZ-VCM, BUPTCampus, "
                        "your own train/ query/ gallery/ (docs/data.md), or --reader; search.py is "
                        "for footage")
    if checked:
        check(dataset)
    return dataset


# ----------------------------------------------------------------- frames ----

def chunks(n, T, rng=None):
    """T of n frames, in order: they are cut into T chunks of ceil(n / T), the last frame repeated
    as needed; each chunk gives its first frame, or with rng (training) a random one."""
    length = math.ceil(n / T)
    within = 0 if rng is None else rng.integers(length, size=T)
    return np.minimum(np.arange(T) * length + within, n - 1)


def linspace(n, T, rng=None):
    """BUPTCampus' protocol: every n/T-th of n frames; in training as in chunks."""
    return np.linspace(0, n, T, endpoint=False).astype(int) if rng is None else chunks(n, T, rng)


# (n, T, rng or None) -> T indices. A rule of your own goes here: --frame-rule NAME.
FRAME_RULES = {"chunks": chunks, "linspace": linspace}


class Frames(torch.utils.data.Dataset):
    """tracklets[index] -> uint8 frames (T, 3, H, W), modality (0 visible, 1 infrared), index. A key
    is an index (test), or (index, seed) (training): the seed decides which frames are drawn."""

    def __init__(self, tracklets, *, size, T, rule="chunks"):
        if rule not in FRAME_RULES:
            raise UserError(f"frame rule {rule}; expected one of {', '.join(FRAME_RULES)}")
        self.tracklets, self.size, self.T, self.rule = tracklets, size, T, rule

    def __len__(self):
        return len(self.tracklets)

    def __getitem__(self, key):
        index, seed = key if isinstance(key, tuple) else (key, None)
        frames = self.tracklets[index].frames
        rng = None if seed is None else np.random.default_rng(seed)
        drawn = FRAME_RULES[self.rule](len(frames), self.T, rng)
        frames = read_frames([frames[i] for i in drawn], self.size)
        return frames, MODALITIES.index(self.tracklets[index].modality), index


class IdentitySampler:
    """Batches of keys for Frames: P identities x K tracklets of each modality, visible ones first.

    The order depends on seed and .epoch alone. rank, world: every process draws the same P
    identities and takes its share. Raises UserError if P cannot be drawn or shared."""

    def __init__(self, tracklets, *, P, K, steps, seed, rank=0, world=1):
        by_pid = {t.pid: {VISIBLE: [], INFRARED: []} for t in tracklets}
        for i, t in enumerate(tracklets):
            by_pid[t.pid][t.modality].append(i)
        self.identities = [by_pid[pid] for pid in sorted(by_pid)]
        if not 2 <= P <= len(self.identities) or P % world or K < 1:
            raise UserError(f"{P} identities x {K} tracklets in a batch of {world} processes; "
                            f"expected 2 to {len(self.identities)}, a multiple of {world}")
        self.P, self.K, self.steps, self.seed = P, K, steps, seed
        self.rank, self.world, self.epoch = rank, world, 0

    def __len__(self):
        return self.steps

    def __iter__(self):
        rng = np.random.default_rng([self.seed, self.epoch])
        for _ in range(self.steps):
            keys = {VISIBLE: [], INFRARED: []}
            for p, i in enumerate(rng.choice(len(self.identities), self.P, replace=False)):
                for modality, indices in self.identities[i].items():
                    drawn = self.draw(indices, rng).tolist()
                    seeds = rng.integers(2 ** 31, size=self.K).tolist()
                    if p % self.world == self.rank:
                        keys[modality] += zip(drawn, seeds, strict=True)
            yield keys[VISIBLE] + keys[INFRARED]

    def draw(self, indices, rng):
        """K of an identity's tracklets, some twice if it has fewer (at least one: see check)."""
        if len(indices) >= self.K:
            return rng.choice(indices, self.K, replace=False)
        return np.append(rng.permutation(indices), rng.choice(indices, self.K - len(indices)))


# ----------------------------------------------------------- augmentation ----

GRAY = torch.tensor([0.2989, 0.5870, 0.1140])
# The release fills with these after normalisation: slightly bright, not the mean. Kept.
ERASED = torch.tensor([0.4914, 0.4822, 0.4465])


def augment(frames, modality, rng, erase=0.5):
    """uint8 (B, T, 3, H, W), modality (B,), numpy Generator -> normalised float32, all frames of a
    tracklet alike: pad and random crop, flip, random erasing (with probability `erase`), then one
    channel copied to all three for half of the visible tracklets, and for infrared ones a channel
    (3 of 4) or the gray mix (1 of 8). Numbers are drawn on the CPU: nothing waits for a GPU."""
    B, T, C, H, W = frames.shape
    pad = round(10 * H / 256)
    # All crops first: the order of the draws is part of what a seed means.
    crops = [(*rng.integers(2 * pad + 1, size=2), rng.random() < 0.5) for _ in range(B)]
    gray, fill = (sent(x, frames.device)[:, None, None] for x in (GRAY, ERASED))
    out = torch.empty(frames.shape, device=frames.device)
    # One tracklet at a time fits the processor's cache, which is faster than the whole batch.
    for b, is_infrared in enumerate(modality.tolist()):
        top, left, is_flipped = crops[b]
        box = erased_box(H, W, rng) if rng.random() < erase else None
        # 0, 1, 2: that channel alone. Otherwise all three; half of such infrared ones become gray.
        channel = rng.integers(4 if is_infrared else 6)
        coin = rng.random()
        is_mixed = is_infrared and channel == 3 and coin < 0.5
        used = slice(channel, channel + 1) if channel < 3 else slice(None)

        padded = F.pad(frames[b, :, used], [pad] * 4)    # black, before normalisation
        tracklet = padded[..., top:top + H, left:left + W]
        tracklet = normalise(tracklet.flip(-1) if is_flipped else tracklet, used)    # its channels
        if box:
            y, x, h, w = box
            tracklet[..., y:y + h, x:x + w] = fill[used]
        if is_mixed:
            tracklet = (tracklet * gray).sum(1, keepdim=True)
        out[b] = tracklet    # one channel fills all three
    return out


def erased_box(H, W, rng):
    """Random erasing's (y, x, h, w): 2-40 % of the area, aspect 0.3-3.3; None if 100 tries fail."""
    for _ in range(100):
        area = rng.uniform(0.02, 0.4) * H * W
        aspect = rng.uniform(0.3, 1 / 0.3)
        h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < h < H and 0 < w < W:
            return rng.integers(H - h + 1), rng.integers(W - w + 1), h, w
    return None


def show():
    """`python data.py` alone: which of 24 frames each rule draws, in the test and in training."""
    for name, rule in FRAME_RULES.items():
        print(f"{name:12}", rule(24, 6), rule(24, 6, np.random.default_rng(1)))


if __name__ == "__main__":
    import data  # so that a reader's Dataset is the same class

    cli(lambda: main_of(data.load_dataset, show))
