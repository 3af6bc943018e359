"""Tracklets: datasets read from disk, frames and identities sampled, batches augmented.

    --data PATH -> load_datasets -> Dataset: train and test tracklets; for each direction, which
                                             test tracklets are queries and which are the gallery
       train: IdentitySampler: P identities x K tracklets x 2 modalities -> Frames -> augment
       test:  every test tracklet once, in order                         -> Frames -> normalise

What comes out of either: float32 frames (B, T, 3, H, W), modality (B,), 0 visible, 1 infrared, and
index (B,): each tracklet's place among the train or the test tracklets.
PATH may be HITSZ-VCM, BUPTCampus or folders of one's own; which one is seen from what lies there
(docs/data.md). Any other goes by --reader. `python data.py PATH` prints the statistics and every
problem: run it once before the first training.

Quick question: why does every frame of a tracklet get the same crop, flip and erased rectangle?
(Drawn anew per frame, a walking person would jump and turn from one frame to the next, and no part
of the body would be where it was.)

Ours, not the paper's: one draw of the augmentation per tracklet; the pad of the random crop scales
with the image (10 pixels at height 256); an order of identities, tracklets and frames that depends
on seed and epoch alone; the frame rule `consecutive` (which frames of a tracklet are read); the
checks.
"""
import json
import math
import multiprocessing
import os
import re
import sys
from collections import defaultdict
from dataclasses import dataclass, field, replace
from functools import partial

from support.files import UserError, in_short, printable, read_lines
from support.footage import (
    file_of,
    find_footage,
    folders_under,
    list_folder,
    read_frame,
    readable_extensions,
)
from support.options import (
    Parser,
    as_typed,
    cli,
    leave_signals_to_parent,
    load_own,
    one_line,
    progress,
    say,
)

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

VISIBLE, INFRARED = "visible", "infrared"
MODALITIES = (VISIBLE, INFRARED)    # in tensors: 0 and 1
DIRECTIONS = ("infrared->visible", "visible->infrared")    # query -> gallery


@dataclass(frozen=True)
class Tracklet:
    """One person before one camera: paths of its frames in order ("clip.gif#3": the picture of that
    number, from 0, of an animated file). pid: a natural number below 10^9 or a name, all of a
    split (train, test) alike. camera: "" where it is not known. modality: "visible" or
    "infrared"."""
    frames: tuple
    pid: int | str
    camera: str
    modality: str


@dataclass
class Dataset:
    """train, test: lists of Tracklet; one of them may be empty. directions: {"infrared->visible":
    (query, gallery), ...}, both indices into test: see set_test.

    ignore_same_camera: a gallery tracklet with the query's pid and camera does not count.
    frame_rule: which frames the protocol takes, a name of FRAME_RULES. missing: listed frames that
    are no files. problems: why it cannot be used. notes: what one should know. train_name: where
    train is more than `name` says, see load_datasets."""
    name: str
    root: str
    train: list = field(default_factory=list)
    test: list = field(default_factory=list)
    directions: dict = field(default_factory=dict)
    ignore_same_camera: bool = False
    frame_rule: str = "chunks"
    missing: list = field(default_factory=list)
    problems: list = field(default_factory=list)
    notes: list = field(default_factory=list)
    train_name: str = ""

    def set_test(self, query, gallery):
        """Lists of Tracklet, of either modality -> test and directions: the queries of one modality
        against the gallery of the other. One that is listed twice is embedded once."""
        # dict.fromkeys drops what comes again (Tracklets are frozen, hence hashable) and keeps the
        # order.
        query, gallery = list(dict.fromkeys(query)), list(dict.fromkeys(gallery))
        self.test = list(dict.fromkeys(query + gallery))
        index_of = {tracklet: i for i, tracklet in enumerate(self.test)}
        for direction in DIRECTIONS:
            query_modality, gallery_modality = direction.split("->")
            self.directions[direction] = (
                [index_of[t] for t in query if t.modality == query_modality],
                [index_of[t] for t in gallery if t.modality == gallery_modality])

    @property
    def classes(self):
        """Training identities in ascending order; a label is a position in this list, the same in
        every run."""
        return sorted({t.pid for t in self.train})


# ------------------------------------------------------------- HITSZ-VCM ----

HITSZ_LISTS = "track_train_info.txt", "track_test_info.txt", "train_name.txt", "test_name.txt"
# 0001M2D3T1F1.jpg: pid, M modality, D camera, T track, F file. It is the file
# Train/0001/rgb/D3/1.jpg: a track has no folder. Numbers may be padded or not, so the letters
# decide.
HITSZ_NAME = re.compile(r"(\d{1,9})M([12])D(\d{1,9})T\d+F([^/\\]+)")
HITSZ_MODALITY = {1: INFRARED, 2: VISIBLE}
HITSZ_FOLDER = {1: "ir", 2: "rgb"}
SHORTEST = 12    # tracks of fewer frames are dropped, as everyone does


def is_walkers(path):
    """Is it the synthetic demo dataset that walkers.py draws, in HITSZ-VCM's layout?"""
    return os.path.isfile(os.path.join(path, "walkers.json"))


def read_hitsz(root, info, auxiliary):
    """HITSZ-VCM -> Dataset. info: where its txt files lie (they may lie in root itself). auxiliary:
    not used, it has no such set."""
    name = "walkers" if is_walkers(root) else "HITSZ-VCM"
    dataset = Dataset(name, root, ignore_same_camera=True)
    rows = {split: read_hitsz_tracks(dataset, info, split) for split in ("train", "test")}
    query_rows = read_hitsz_queries(dataset, info, rows["test"])
    dataset.train = [t for t in rows["train"] if t and len(t.frames) >= SHORTEST]

    # Short test tracks are dropped after the queries are read: query_IDX counts rows of the whole
    # file. The queries are also the gallery of visible->infrared. An infrared row that is no query
    # is embedded, but stands in no direction.
    infrared, visible, in_no_direction = [], [], 0
    for row, tracklet in enumerate(rows["test"]):
        if not tracklet or len(tracklet.frames) < SHORTEST:
            continue
        index = len(dataset.test)
        dataset.test.append(tracklet)
        if row in query_rows:    # queries are infrared
            infrared.append(index)
        elif tracklet.modality == VISIBLE:
            visible.append(index)
        else:
            in_no_direction += 1
    dataset.directions = {DIRECTIONS[0]: (infrared, visible), DIRECTIONS[1]: (visible, infrared)}

    for split, kept in (("train", dataset.train), ("test", dataset.test)):
        total = len([t for t in rows[split] if t])    # a wrong row is among the problems already
        dropped = total - len(kept)
        if dropped:
            dataset.notes.append(f"{split}: {dropped:,} of {total:,} tracks have under {SHORTEST} "
                                 "frames: dropped")
    if in_no_direction:
        dataset.notes.append(f"{in_no_direction} infrared test rows are no queries: embedded, but "
                             "in no direction")
    check_both(dataset)
    return dataset


def check_both(dataset):
    """A benchmark without one of its halves is a broken download; folders of one's own may be."""
    if not dataset.train or not dataset.test:
        dataset.problems.append(f"{len(dataset.train)} training and {len(dataset.test)} test "
                                "tracklets; expected some of each")


def hitsz_folder(root, split):
    """Where the identity folders of a split lie: Train/Train/0001, Train/0001 or 0001."""
    folder = os.path.join(root, split.capitalize())
    for candidate in (os.path.join(folder, split.capitalize()), folder):
        if os.path.isdir(candidate):
            return candidate
    return root


def read_hitsz_names(dataset, info, split):
    """train_name.txt or test_name.txt -> a list with an item for each line: (path of the frame,
    (pid, m, camera)), or None where the line is wrong. m: 1 infrared, 2 visible."""
    folder, names_file, entries = hitsz_folder(dataset.root, split), f"{split}_name.txt", []
    for number, line in enumerate(read_lines(os.path.join(info, names_file)), 1):
        match = HITSZ_NAME.fullmatch(line.strip())
        if match is None:
            dataset.problems.append(f"{names_file} line {number}: {line.strip()[:60]!r} is no "
                                    "frame name; expected one such as 0001M2D3T1F1.jpg")
            entries.append(None)
            continue
        pid, m, camera, file = match.groups()
        path = os.path.join(folder, pid, HITSZ_FOLDER[int(m)], f"D{camera}", file)
        entries.append((path, (int(pid), int(m), int(camera))))
    return entries


def read_hitsz_tracks(dataset, info, split):
    """track_train_info.txt or track_test_info.txt -> a list with an item for each row: a Tracklet,
    or None where the row is wrong."""
    entries, tracklets = read_hitsz_names(dataset, info, split), []
    info_file = f"track_{split}_info.txt"
    for number, line in enumerate(read_lines(os.path.join(info, info_file)), 1):
        try:
            # Some copies were exported as floats: "1.0".
            m, start, end, pid, camera = (int(word.removesuffix(".0")) for word in line.split())
            if m not in HITSZ_MODALITY or not 1 <= start <= end <= len(entries):
                raise ValueError
        except ValueError:
            dataset.problems.append(f"{info_file} row {number}: {line.strip()[:60]!r}; expected "
                                    "`modality start end pid camera` with modality 1 or 2 and 1 <= "
                                    f"start <= end <= {len(entries)}, the lines of "
                                    f"{split}_name.txt")
            tracklets.append(None)
            continue
        listed = [entry for entry in entries[start - 1:end] if entry]
        if any(written != (pid, m, camera) for _, written in listed):
            dataset.notes.append(f"{info_file} row {number} says pid {pid}, modality {m}, camera "
                                 f"{camera}, but its lines of {split}_name.txt say otherwise; the "
                                 "row is believed")
        paths = tuple(path for path, _ in listed)
        tracklets.append(Tracklet(paths, pid, f"D{camera}", HITSZ_MODALITY[m]))
    return tracklets


def read_hitsz_queries(dataset, info, test_rows):
    """query_IDX.txt -> the set of rows (from 0) of track_test_info.txt that are queries."""
    query = set()
    text = " ".join(read_lines(os.path.join(info, "query_IDX.txt")))
    for word in text.replace(",", " ").split():
        # Anything but a number of at most 9 digits becomes 0, which the next line refuses.
        row = int(word) if word.isdecimal() and len(word) < 10 else 0
        if not 1 <= row <= len(test_rows):
            dataset.problems.append(f"query_IDX.txt: {word[:60]!r} is no row of "
                                    f"track_test_info.txt; expected 1..{len(test_rows)}")
        elif test_rows[row - 1] and test_rows[row - 1].modality != INFRARED:
            dataset.problems.append(f"query_IDX.txt: row {row} of track_test_info.txt is visible; "
                                    "queries are infrared")
        else:
            query.add(row - 1)
    return query


# ------------------------------------------------------------ BUPTCampus ----

BUPT_LISTS = "data_paths.json", "train.txt", "gallery.txt"
BUPT_MODALITY = {"RGB": VISIBLE, "IR": INFRARED}


def read_bupt(root, auxiliary):
    """BUPTCampus -> Dataset. root: the folder of train.txt, data_paths.json and DATA/. auxiliary:
    train on its auxiliary set too."""
    dataset = Dataset("BUPTCampus", root, frame_rule="linspace")
    try:
        paths = json.loads("\n".join(read_lines(os.path.join(root, "data_paths.json"))))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{os.path.join(root, 'data_paths.json')} is no JSON ({str(error)[:80]}); "
                        "download it again") from None
    pair = ("RGB/IR",)    # a row is an aligned pair
    dataset.train = read_bupt_rows(dataset, paths, "train.txt", pair)
    if auxiliary:
        short = os.path.isfile(os.path.join(root, "train_aux.txt"))    # as some copies call it
        name = "train_aux.txt" if short else "train_auxiliary.txt"
        dataset.train += read_bupt_rows(dataset, paths, name, pair)
    query = read_bupt_rows(dataset, paths, "query.txt", ("RGB", "IR"))
    gallery = read_bupt_rows(dataset, paths, "gallery.txt", ("RGB", "IR"))
    dataset.set_test(query, gallery)
    check_both(dataset)
    return dataset


def read_bupt_rows(dataset, paths, name, modalities):
    """A list of `pid modality camera tracklet` -> Tracklets; a row RGB/IR is an aligned pair.
    modalities: what the second column may hold."""
    tracklets = []
    for number, line in enumerate(read_lines(os.path.join(dataset.root, name)), 1):
        words, where = line.split(), f"{name} row {number}"
        if not words:
            continue
        is_row = len(words) == 4 and words[1] in modalities
        if not is_row or not re.fullmatch("[0-9]{1,9}", words[0]):
            dataset.problems.append(f"{where}: {line.strip()[:60]!r}; expected `pid modality "
                                    f"camera tracklet` with modality {' or '.join(modalities)}")
            continue
        pid, written, camera, track = words
        for modality in written.split("/"):
            frames = bupt_frames(dataset, paths, where, (pid, modality, camera, track))
            if frames:
                tracklets.append(Tracklet(frames, int(pid), camera, BUPT_MODALITY[modality]))
    return tracklets


def bupt_frames(dataset, paths, where, keys):
    """data_paths.json's frames of [pid][modality][camera][tracklet], as paths, or None."""
    try:
        frames = paths
        for key in keys:
            frames = frames[key]
        are_paths = isinstance(frames, list) and all(isinstance(frame, str) for frame in frames)
        if not frames or not are_paths:
            raise TypeError
    except (KeyError, TypeError, IndexError):
        dataset.problems.append(f"{where}: data_paths.json has no frames for "
                                + "".join(f"[{key}]" for key in keys))
        return None
    folder = os.path.abspath(os.path.join(dataset.root, "DATA"))
    frames = [os.path.normpath(os.path.join(folder, frame)) for frame in frames]
    outside = [frame for frame in frames if not frame.startswith(folder + os.sep)]
    if outside:
        dataset.problems.append(f"{where}: {outside[0]} lies outside {folder}; refused")
        return None
    return tuple(frames)


# --------------------------------------------------- folders of one's own ----

OWN_SPLITS = "train", "query", "gallery"
OWN_MODALITY = {VISIBLE: VISIBLE, "rgb": VISIBLE, INFRARED: INFRARED, "ir": INFRARED}
OWN_LAYOUT = "PID/MODALITY/TRACK or PID/MODALITY/CAMERA/TRACK"


def folder_names(path):
    """Names as they are written on the disk: asking for train would find HITSZ-VCM's Train too,
    where the file system does not tell them apart."""
    try:
        return {entry.name for entry in os.scandir(path) if entry.is_dir()}
    except OSError:    # recognise looks everywhere; whoever reads it says so
        return set()


def read_own(root, auxiliary):
    """root/{train,query,gallery}/PID/MODALITY/[CAMERA/]TRACK/*.jpg -> Dataset. auxiliary: not used,
    it has no such set."""
    dataset = Dataset(os.path.basename(os.path.abspath(root)), root)
    people = {split: own_people(dataset, split) for split in OWN_SPLITS}
    # Train and test separately: a single name among the test's people turns all of its numbers into
    # names (as_pids), and is not to turn the training's.
    of_test = as_pids(people["query"] + people["gallery"])
    pids = {"train": as_pids(people["train"]), "query": of_test, "gallery": of_test}
    train, query, gallery = ([tracklet for person in people[split]
                              for tracklet in own_tracklets(dataset, person, pids[split])]
                             for split in OWN_SPLITS)
    dataset.train = train
    if bool(query) != bool(gallery):
        dataset.problems.append(f"{root}: {len(query)} query and {len(gallery)} gallery tracklets; "
                                "expected some of each, or neither folder")
    elif query:
        dataset.set_test(query, gallery)
    for direction in dataset.directions:
        if not dataset.directions[direction][0]:
            [other] = set(DIRECTIONS) - {direction}
            dataset.directions[direction] = dataset.directions[other][::-1]
            dataset.notes.append(f"{direction}: query/ has no such tracklets; {other} with the "
                                 "roles swapped, as in HITSZ-VCM")
    return dataset


def own_people(dataset, split):
    """The folders of a split's identities, none where there is no such split."""
    if split not in folder_names(dataset.root):
        return []
    folder = os.path.normpath(os.path.join(dataset.root, split))    # as find_footage has its paths
    files, people = list_folder(folder)
    extensions = readable_extensions()
    loose = [file for file in files if os.path.splitext(file)[1].lower() in extensions]
    if loose:
        dataset.problems.append(f"{folder} holds {len(loose)} loose frames, such as "
                                f"{os.path.basename(loose[0])}; expected them in {OWN_LAYOUT}")
    return people


def as_pids(people):
    """Folders of people -> {name: pid}: numbers if all are below 10^9 and none comes twice (7,
    007), else the names."""
    names = {os.path.basename(person) for person in people}
    numbers = {name: int(name) for name in names if re.fullmatch("[0-9]{1,9}", name)}
    are_numbers = len(set(numbers.values())) == len(names)
    return numbers if are_numbers else {name: name for name in names}


def own_tracklets(dataset, person, pids):
    """The folder of an identity -> its Tracklets, in natural order. What is wrong in it goes to
    dataset.problems."""
    try:
        folders = [folder for folder, _ in folders_under(person)]
        footage = find_footage(person)
    except UserError as error:    # loose frames, no frames, a file that cannot be read
        dataset.problems.append(str(error))
        return []
    tracklets, filled = [], set()
    levels, misplaced = defaultdict(set), {}    # modality folder: its depths; a folder: why
    for name, frames in footage.items():
        place = os.path.dirname(file_of(frames[0]))
        filled.add(place)
        words = name.split("/")
        modality = OWN_MODALITY.get(words[0].lower())
        if len(words) not in (2, 3):
            misplaced[place] = f"{place} holds frames; expected them in {OWN_LAYOUT}"
        elif modality is None:
            folder = os.path.join(person, words[0])
            misplaced[folder] = f"{folder} is no modality; expected {' or '.join(OWN_MODALITY)}"
        else:
            levels[words[0]].add(len(words))
            pid = pids[os.path.basename(person)]
            tracklets.append(Tracklet(frames, pid, "".join(words[1:-1]), modality))
    dataset.problems += misplaced.values()
    mixed = [os.path.join(person, name) for name, depths in levels.items() if len(depths) > 1]
    dataset.problems += [f"{folder} has tracks inside and outside of cameras' folders; expected "
                         "one or the other" for folder in mixed]
    # Folders with no folder in them, and no frame.
    empty = set(folders) - filled - {os.path.dirname(folder) for folder in folders}
    dataset.problems += [f"{folder} holds no frames; expected a track's: fill it or remove it"
                         for folder in sorted(empty)]
    return tracklets


# --------------------------------------------------------------- any one ----

def recognise(path):
    """A folder -> a function of `auxiliary` that reads it into a Dataset; None if the folder is no
    dataset."""
    for info in (os.path.join(path, "info"), path):
        if any(os.path.isfile(os.path.join(info, name)) for name in HITSZ_LISTS):
            return partial(read_hitsz, path, info)
    roots, real = [path], os.path.realpath(path)    # of "." too
    if os.path.basename(real) == "DATA":    # BUPTCampus' DATA itself: its lists lie above it
        roots.append(os.path.dirname(real))
    for root in roots:
        if any(os.path.isfile(os.path.join(root, name)) for name in BUPT_LISTS):
            return partial(read_bupt, root)
    return partial(read_own, path) if folder_names(path) & set(OWN_SPLITS) else None


def holds_images(path):
    """Is there an image anywhere below?"""
    extensions = tuple(Image.registered_extensions())
    return any(file.lower().endswith(extensions) for _, _, files in os.walk(path) for file in files)


def find_reader(path):
    """recognise's function, for `path` or for the one folder in it that is a dataset. Raises
    UserError."""
    if not os.path.isdir(path):
        raise UserError(f"no folder {path}; expected HITSZ-VCM, BUPTCampus or folders of your own; "
                        "check the path")
    reader = recognise(path)
    if reader:
        return reader
    inner = [os.path.join(path, name) for name in sorted(os.listdir(path))]
    inner = [folder for folder in inner if os.path.isdir(folder) and recognise(folder)]
    if len(inner) == 1:    # an unpacked archive, with a folder of its own
        return recognise(inner[0])
    if inner:
        raise UserError(f"several datasets in {path} ({', '.join(map(os.path.basename, inner))}); "
                        "expected one: name it")
    if holds_images(path):
        raise UserError(f"no dataset in {path}, but images: expected the lists of HITSZ-VCM "
                        "(info/) or BUPTCampus (train.txt, data_paths.json), or your own train/ "
                        "query/ gallery/ (docs/data.md), or --reader; footage of unknown people "
                        "goes to evaluate.py --checkpoint RUN --query DIR --gallery DIR, see "
                        "docs/footage.md")
    raise UserError(f"no dataset in {path}; expected Train/ Test/ info/ (HITSZ-VCM), or train.txt, "
                    "data_paths.json and DATA/ (BUPTCampus), or your own train/ query/ gallery/, "
                    "or --reader; see docs/data.md")


# ------------------------------------------------- a reader of one's own ----

NO_READER = "none"    # of --reader: the folder is recognised


def load_reader(reader):
    """FILE.py:FUNCTION -> the path of FILE.py, and the function; none -> (None, None). Raises
    UserError."""
    if reader == NO_READER:
        return None, None
    file, function = load_own("--reader", reader, "FILE.py:FUNCTION of your own, or none")
    if not callable(function):
        raise UserError(f"--reader {reader}: {file} has no such function; expected one of a path "
                        "that returns a Dataset")
    return file, function


def read_by(reader, path):
    """FILE.py:FUNCTION -> the Dataset that FUNCTION(path) returns, looked at. Raises UserError that
    names the reader, whatever happens in it."""
    what = f"--reader {reader}"
    file, function = load_reader(reader)
    if not os.path.exists(path):
        raise UserError(f"no folder {path} for {what}; check the path")
    with one_line(what, file):
        dataset = function(path)
        fault = fault_of(dataset)
    if fault:
        raise UserError(f"{what} returned {fault}")
    return dataset


def fault_of(dataset):
    """What is wrong with what a reader has returned, and what was expected; None if nothing is."""
    if not isinstance(dataset, Dataset):
        return f"{type(dataset).__name__}; expected the Dataset of data.py"
    if not isinstance(dataset.name, str) or not isinstance(dataset.root, (str, os.PathLike)):
        return f"name {dataset.name!r} and root {dataset.root!r}; expected text"
    if dataset.frame_rule not in list(FRAME_RULES):
        return (f"frame_rule {in_short(repr(dataset.frame_rule))}; expected one of "
                f"{', '.join(FRAME_RULES)}")
    for name in ("train", "test", "missing", "problems", "notes"):
        found = getattr(dataset, name)
        if not isinstance(found, list):
            return f"{name} {in_short(repr(found))}; expected a list"
    for text in dataset.missing + dataset.problems + dataset.notes:
        if not isinstance(text, str):
            return f"{in_short(repr(text))} as missing, a problem or a note; expected text"
    tracklets = dataset.train + dataset.test
    for t in tracklets:
        if not isinstance(t, Tracklet):
            return f"{in_short(repr(t))} as a tracklet; expected a Tracklet"
        are_texts = all(type(text) is str for text in (t.camera, *t.frames))
        is_whole = t.frames and are_texts and t.modality in MODALITIES
        if not is_whole or type(t.frames) is not tuple or not is_pid(t.pid):
            return (f"a tracklet of {t.pid!r}, {t.camera!r}, {t.modality!r} and the frames "
                    f"{in_short(repr(t.frames))}; expected pid: a natural number below 10^9 or a "
                    f"name, camera: text, modality: {' or '.join(MODALITIES)}, frames: a tuple of "
                    "paths as text")
    for split in (dataset.train, dataset.test):
        if len({type(t.pid) for t in split}) > 1:
            return "some pids as numbers and some as names; expected all of a split alike"
    if not are_directions(dataset.directions, len(dataset.test)):
        return ("directions that do not belong to its test tracklets; expected those of "
                "Dataset.set_test(query, gallery)")
    return None


def is_pid(pid):
    return type(pid) is str or (type(pid) is int and 0 <= pid < 10 ** 9)


def are_directions(directions, number):
    """Are they pairs of indices into so many test tracklets?"""
    if number and set(directions) != set(DIRECTIONS):
        return False
    if any(len(pair) != 2 for pair in directions.values()):
        return False
    places = [place for pair in directions.values() for side in pair for place in side]
    # 1.0 is no index.
    return all(isinstance(place, (int, np.integer)) and 0 <= place < number for place in places)


def check_reader(given, stored, run):
    """given: what was typed, {option: value}; stored: the reader that a run's checkpoint names,
    which is never believed. Raises UserError unless the command line says something of it."""
    if stored != NO_READER and "reader" not in given:
        raise UserError(f"{run} was trained on what --reader {in_short(stored)} reads, which is "
                        "code of your own; expected --reader FILE.py:FUNCTION, so that it is run "
                        "because you say so, or --reader none for a dataset that needs none")


def find_missing_frames(dataset):
    """Adds the listed frames that are no files to dataset.missing and .problems."""
    # One listing per folder: single look-ups take minutes on NFS. folder -> names, as the keys of a
    # dict: a set that keeps their order.
    by_folder = defaultdict(dict)
    for t in dataset.train + dataset.test:
        for file in map(file_of, t.frames):
            by_folder[os.path.dirname(file)][os.path.basename(file)] = True
    other_case = []
    for folder, names in by_folder.items():
        try:
            there = set(os.listdir(folder or "."))
        except (OSError, ValueError):    # no such folder, or a name that no file can have
            there = set()
        lower = {name.lower(): name for name in there}
        for name in names:
            if name in there:
                continue
            frame = os.path.join(folder, name)
            dataset.missing.append(frame)
            if name.lower() in lower:
                other_case.append((frame, lower[name.lower()]))
            else:
                dataset.problems.append(f"no file {frame}, though the dataset's lists name it")
    if other_case:
        listed, found = other_case[0]
        dataset.problems.append(f"{len(other_case):,} files differ from the dataset's lists in "
                                f"upper and lower case alone: {found} instead of {listed}; rename "
                                "them")


def check_identities(dataset):
    """Adds to dataset.problems what makes training or ranking impossible, to .notes what is odd."""
    if not dataset.train:
        dataset.notes.append("nobody to train on: it can only be tested on")
    if not dataset.test:
        dataset.notes.append("nothing to test on: it can only be trained on")
    if not dataset.train and not dataset.test and not dataset.problems:
        dataset.problems.append(f"no tracklets in {dataset.root}; expected some")
    modalities = defaultdict(set)
    for t in dataset.train:
        modalities[t.pid].add(t.modality)
    for pid, there in sorted(modalities.items()):
        if len(there) == 1:
            [only] = there
            dataset.problems.append(f"training identity {pid} has {only} tracklets only; expected "
                                    "both modalities: remove its rows or its folder")
    if len(modalities) == 1:
        dataset.problems.append("1 training identity; expected 2 or more: add people")
    for direction, (query, gallery) in dataset.directions.items():
        cameras_of = defaultdict(set)
        for t in (dataset.test[i] for i in gallery):
            cameras_of[t.pid].add(t.camera)
        unanswered = 0
        for t in (dataset.test[i] for i in query):
            cameras = cameras_of[t.pid]
            if dataset.ignore_same_camera:
                cameras = cameras - {t.camera}
            if not cameras:
                unanswered += 1
        if unanswered:
            dataset.notes.append(f"{direction}: {unanswered} queries have no tracklet of their "
                                 "person in the gallery that counts: not scored")
        # No query has an answer, or there is no query. An empty test set was reported above.
        if dataset.test and unanswered == len(query):
            dataset.problems.append(f"{direction}: {len(query)} queries and a gallery of "
                                    f"{len(gallery)}, without one right answer; expected some")


def read_dataset(path, auxiliary=False, reader=NO_READER):
    """Recognises and reads the dataset at `path`, or has FILE.py:FUNCTION read it; its .problems
    lists what is wrong. Raises UserError if none is there."""
    dataset = find_reader(path)(auxiliary) if reader == NO_READER else read_by(reader, path)
    find_missing_frames(dataset)
    check_identities(dataset)
    return dataset


def load_dataset(path, auxiliary=False, reader=NO_READER):
    """read_dataset, refusing one that has problems. Raises UserError that names the first."""
    dataset = read_dataset(path, auxiliary, reader)
    if dataset.problems:
        number, more = len(dataset.problems), ""
        if number > 1:
            words = f"{path} --reader {reader}" if reader != NO_READER else path
            more = f" ({number} problems; python data.py {words} lists them)"
        raise UserError(dataset.problems[0] + more)
    return dataset


def check_once(folders, paths):
    """folders: what --data's paths lead to. Raises UserError if one comes twice."""
    if len(set(map(os.path.realpath, folders))) < len(folders):
        raise UserError(f"--data {in_short(as_typed(paths))} names a folder twice; expected each "
                        "once")


def load_datasets(paths, auxiliary=False, reader=NO_READER):
    """--data A B ... -> a Dataset to train on all of them, and to test on the first that can be
    tested on. A single one is left as it is; of several, A's 7 becomes "A:7", so that equal numbers
    are not taken for one person. Raises UserError."""
    check_once(paths, paths)
    datasets = [load_dataset(path, auxiliary, reader) for path in paths]
    if len(datasets) == 1:
        return datasets[0]
    if reader == NO_READER:    # a reader of one's own may give any root
        check_once([dataset.root for dataset in datasets], paths)
    train, names = [], set()
    for path, dataset in zip(paths, datasets, strict=True):
        stem = os.path.basename(os.path.abspath(path)).replace(":", "-")
        name, number = stem, 1
        while name in names:
            number += 1
            name = f"{stem}-{number}"
        names.add(name)
        train += [replace(t, pid=f"{name}:{t.pid}") for t in dataset.train]
    tested = next((dataset for dataset in datasets if dataset.test), datasets[0])
    train_name = " + ".join(dataset.name for dataset in datasets if dataset.train)
    return replace(tested, train=train, train_name=train_name)


# ----------------------------------------------------------------- frames ----

def chunks(n, T, rng=None):
    """T of n frames, in order. They are cut into T chunks of ceil(n / T), the last frame repeated
    as needed; of each the first, or with rng (training) a random one."""
    length = math.ceil(n / T)
    within = 0 if rng is None else rng.integers(length, size=T)
    return np.minimum(np.arange(T) * length + within, n - 1)


def linspace(n, T, rng=None):
    """BUPTCampus' protocol: every n/T-th of n frames; in training as in chunks."""
    return np.linspace(0, n, T, endpoint=False).astype(int) if rng is None else chunks(n, T, rng)


def consecutive(n, T, rng=None):
    """T successive ones of n frames, from the middle, or with rng from anywhere; of fewer than T
    the last is repeated. [ours]"""
    n_starts = max(1, n - T + 1)
    start = n_starts // 2 if rng is None else rng.integers(n_starts)
    return np.minimum(start + np.arange(T), n - 1)


# (n, T, rng or None) -> T indices. A rule of your own goes here: --frame-rule NAME, in training and
# test.
FRAME_RULES = {"chunks": chunks, "linspace": linspace, "consecutive": consecutive}


def chosen_rule(config, dataset):
    """The rule of a run, by name: its --frame-rule, or the one of the dataset's protocol. Raises
    UserError."""
    rule = config.frame_rule or dataset.frame_rule
    if rule not in FRAME_RULES:
        raise UserError(f"--frame-rule {rule} is not known; expected one of "
                        f"{', '.join(FRAME_RULES)}")
    return rule


class Frames(torch.utils.data.Dataset):
    """tracklets[index] -> uint8 frames (T, 3, H, W), modality (0 visible, 1 infrared), index.

    A key is an index (test), or (index, seed), where the seed alone decides which frames are drawn
    (training). rule: a name of FRAME_RULES. cache: a support.footage.FrameCache to read from."""

    def __init__(self, tracklets, *, size, T, rule="chunks", cache=None):
        self.tracklets, self.size, self.T, self.rule, self.cache = tracklets, size, T, rule, cache

    def __len__(self):
        return len(self.tracklets)

    def paths(self, index, seed=None):
        """The T frames that are drawn."""
        frames = self.tracklets[index].frames
        rng = None if seed is None else np.random.default_rng(seed)
        return [frames[i] for i in FRAME_RULES[self.rule](len(frames), self.T, rng)]

    def __getitem__(self, key):
        index, seed = key if isinstance(key, tuple) else (key, None)
        paths = self.paths(index, seed)
        if self.cache:
            frames = self.cache.read(paths)
        else:
            frames = torch.stack([read_frame(path, self.size) for path in paths])
        return frames, MODALITIES.index(self.tracklets[index].modality), index


class IdentitySampler:
    """Batches of keys for Frames: P identities x K tracklets of each modality, the visible ones
    first.

    The order is a function of seed and epoch (set .epoch) alone. rank, world: every process draws
    the same P identities and takes its own share. An identity with fewer than K tracklets of a
    modality repeats some. Raises UserError if P cannot be drawn or shared."""

    def __init__(self, tracklets, *, P, K, steps, seed, rank=0, world=1):
        by_pid = defaultdict(lambda: {VISIBLE: [], INFRARED: []})
        for i, t in enumerate(tracklets):
            by_pid[t.pid][t.modality].append(i)
        self.identities = [by_pid[pid] for pid in sorted(by_pid)]
        if not 2 <= P <= len(self.identities):
            raise UserError(f"--identities {P} a batch of {len(self.identities)} training "
                            f"identities; expected 2 to {len(self.identities)}")
        if P % world:
            raise UserError(f"--identities {P} cannot be shared by {world} processes; expected a "
                            f"multiple of {world}")
        self.P, self.K, self.steps, self.seed = P, K, steps, seed
        self.rank, self.world, self.epoch = rank, world, 0

    def __len__(self):
        return self.steps

    def __iter__(self):
        rng = np.random.default_rng([self.seed, self.epoch])
        for _ in range(self.steps):
            keys = {VISIBLE: [], INFRARED: []}
            drawn = rng.choice(len(self.identities), self.P, replace=False)
            for p, i in enumerate(drawn):
                for modality, indices in self.identities[i].items():
                    tracklets = self.draw(indices, rng)
                    frame_seeds = rng.integers(2 ** 31, size=self.K)
                    if p % self.world == self.rank:
                        pairs = zip(tracklets.tolist(), frame_seeds.tolist(), strict=True)
                        keys[modality] += pairs
            yield keys[VISIBLE] + keys[INFRARED]

    def draw(self, indices, rng):
        """K of an identity's tracklets; where there are fewer, all of them and some again."""
        if len(indices) >= self.K:
            return rng.choice(indices, self.K, replace=False)
        return np.append(rng.permutation(indices), rng.choice(indices, self.K - len(indices)))


# ----------------------------------------------------------- augmentation ----

MEAN, STD = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])    # ImageNet's
GRAY = torch.tensor([0.2989, 0.5870, 0.1140])
# The release fills with these after normalisation: slightly bright, not the mean. Kept.
ERASED = torch.tensor([0.4914, 0.4822, 0.4465])


def normalise(frames, channels=slice(None)):
    """uint8 (..., C, H, W) -> float32, mean 0, deviation 1. channels: a slice, which of red, green
    and blue the C are; by default all three."""
    mean = MEAN[channels, None, None].to(frames.device)
    std = STD[channels, None, None].to(frames.device)
    return (frames / 255).sub_(mean).div_(std)


def augment(frames, modality, rng, erase=0.5):
    """uint8 (B, T, 3, H, W), modality (B,), numpy Generator -> normalised float32, all frames of a
    tracklet alike.

    Pad + random crop, flip, random erasing (with probability `erase`); then one channel copied to
    all three for half of the visible tracklets, and for infrared a channel (3 of 4) or the gray mix
    (1 of 8). The numbers are drawn on the CPU: a GPU is not waited for."""
    B, T, C, H, W = frames.shape
    pad = round(10 * H / 256)
    # All crops first: the order of the draws is part of what a seed means.
    crops = [(*rng.integers(2 * pad + 1, size=2), rng.random() < 0.5) for _ in range(B)]
    gray = GRAY[:, None, None].to(frames.device)
    fill = ERASED[:, None, None].to(frames.device)
    out = torch.empty(frames.shape, device=frames.device)
    # One tracklet at a time fits the processor's cache, which is faster than the whole batch.
    for b, is_infrared in enumerate(modality.tolist()):
        top, left, is_flipped = crops[b]
        box = erased_box(H, W, rng) if rng.random() < erase else None
        # 0, 1, 2: that channel alone, so 3 of 6 visible and 3 of 4 infrared tracklets. Else all
        # three; half of such infrared ones, 1 of 8, are mixed to gray.
        channel = rng.integers(4 if is_infrared else 6)
        coin = rng.random()
        is_mixed = is_infrared and channel == 3 and coin < 0.5
        used = slice(channel, channel + 1) if channel < 3 else slice(None)

        padded = F.pad(frames[b, :, used], (pad, pad, pad, pad))    # black, before normalisation
        tracklet = padded[..., top:top + H, left:left + W]
        tracklet = normalise(tracklet.flip(-1) if is_flipped else tracklet, used)
        if box:
            y, x, h, w = box
            tracklet[..., y:y + h, x:x + w] = fill[used]
        if is_mixed:
            tracklet = (tracklet * gray).sum(1, keepdim=True)
        out[b] = tracklet    # one channel fills all three
    return out


def erased_box(H, W, rng):
    """Random erasing's rectangle (y, x, h, w): 2-40 % of the area, aspect 0.3-3.3. None if 100
    tries do not fit."""
    for _ in range(100):
        area = rng.uniform(0.02, 0.4) * H * W
        aspect = rng.uniform(0.3, 1 / 0.3)
        h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < h < H and 0 < w < W:
            return rng.integers(H - h + 1), rng.integers(W - w + 1), h, w
    return None


# ---------------------------------------------------- python data.py PATH ----

def check_frame(path):
    """None, or why the file cannot be read. Decodes it whole: a truncated JPEG opens well."""
    try:
        read_frame(path, (8, 4))    # any small size: a large one would take longer
    except UserError as error:
        return str(error).split(";")[0]    # what is wrong, without the advice behind it


def print_statistics(dataset):
    say(printable(f"{dataset.name} in {dataset.root}") + "\n")
    say(f"{'split':<8}{'modality':<10}{'identities':>10}{'tracklets':>11}{'frames':>10}  cameras")
    for split, tracklets in (("train", dataset.train), ("test", dataset.test)):
        for modality in MODALITIES:
            mine = [t for t in tracklets if t.modality == modality]
            people, frames = len({t.pid for t in mine}), sum(len(t.frames) for t in mine)
            cameras = {t.camera for t in mine} - {""}
            cameras = sorted(cameras, key=lambda camera: (len(camera), camera))    # D2 before D10
            say(f"{split:<8}{modality:<10}{people:>10,}{len(mine):>11,}{frames:>10,}  "
                f"{len(cameras)}: "
                + printable(" ".join(cameras)))
    for direction, (query, gallery) in dataset.directions.items():
        say(f"{direction}: {len(query):,} queries, {len(gallery):,} gallery tracklets")


def main():
    parser = Parser(description="Statistics and every problem of a dataset; exit code 0 if it is "
                                "usable.")
    parser.add_argument("path", metavar="PATH", help="HITSZ-VCM (any layout), BUPTCampus, or "
                        "train/ query/ gallery/ of your own")
    parser.add_argument("--auxiliary", choices=("on", "off"), default="off",
                        help="BUPTCampus: count its auxiliary training set too")
    parser.add_argument("--reader", metavar="FILE.py:FUNCTION", default=NO_READER,
                        help="a function of yours that reads it: path -> Dataset")
    args = parser.parse_args()
    dataset = read_dataset(args.path, args.auxiliary == "on", args.reader)
    print_statistics(dataset)
    missing, everything = set(dataset.missing), dataset.train + dataset.test
    frames = dict.fromkeys(frame for t in everything for frame in t.frames if frame not in missing)
    with multiprocessing.Pool(os.cpu_count(), leave_signals_to_parent) as pool:
        checked = pool.imap(check_frame, frames, chunksize=64)
        dataset.problems += filter(None, progress(checked, "reading", total=len(frames)))
        # The workers end by themselves: one killed while starting prints a traceback.
        pool.close()
        pool.join()
    for note in dataset.notes:
        say("note: " + printable(note))
    for problem in dataset.problems:
        say("problem: " + printable(problem))
    say(f"{len(dataset.problems)} problems" if dataset.problems else "no problems: usable")
    return 2 if dataset.problems else 0


if __name__ == "__main__":
    sys.modules["data"] = sys.modules[__name__]    # for a reader, which imports our Dataset
    cli(main)
