"""Every problem of a dataset: `python data.py PATH`.

    problems_of(dataset, rules)    what makes training or ranking impossible, a line each
    check(dataset, rules)          the first one as a UserError
    main_of(load, rules, show)     statistics, all problems, and every frame decoded once

A dataset of data.py and one that your own reader returned meet the same checks. rules: the frame
rules that exist.
"""
import multiprocessing
import os
import signal
from collections import defaultdict

from support.files import UserError
from support.footage import file_of, natural, read_frame
from support.options import Parser, progress

MOST = 20    # lines of each kind of problem


def missing_frames(dataset):
    """Listed files that are not on the disk. One listing a folder: single look-ups take minutes on
    a network's disk."""
    by_folder = defaultdict(dict)    # folder -> the files wanted there, in order
    for t in dataset.train + dataset.test:
        for file in map(file_of, t.frames):
            folder, name = os.path.split(file)
            by_folder[folder][name] = file
    for folder, wanted in by_folder.items():
        there = set(os.listdir(folder or ".")) if os.path.isdir(folder or ".") else set()
        yield from (file for name, file in wanted.items() if name not in there)


def wrong_tracklets(dataset):
    for t in dataset.train + dataset.test:
        if not isinstance(t.frames, tuple) or not t.frames:
            yield f"a tracklet of {t.pid} has frames {t.frames!r}; expected a tuple of paths"
        if t.modality not in ("visible", "infrared"):
            yield f"a tracklet of {t.pid} has modality {t.modality!r}; expected visible or infrared"
    if not dataset.train and not dataset.test:
        yield f"no tracklets in {dataset.root}; expected some"
    for split in (dataset.train, dataset.test):
        if len({type(t.pid) for t in split}) > 1:
            yield "some pids are numbers and some are names; expected one kind in a split"


def wrong_identities(dataset):
    """What makes training impossible."""
    modalities = defaultdict(set)
    for t in dataset.train:
        modalities[t.pid].add(t.modality)
    for pid, found in modalities.items():
        if len(found) == 1:
            yield (f"training identity {pid} has {min(found)} tracklets only; expected both "
                   "modalities: remove its rows or its folder")
    if len(modalities) == 1:
        yield "1 training identity; expected 2 or more: add people"


def is_answered(dataset, query, gallery):
    """For each query: has its person a tracklet in the gallery that counts?"""
    cameras_of = defaultdict(set)
    for t in (dataset.test[i] for i in gallery):
        cameras_of[t.pid].add(t.camera)
    for t in (dataset.test[i] for i in query):
        ignored = {t.camera} if dataset.ignore_same_camera else set()
        yield bool(cameras_of[t.pid] - ignored)


def wrong_directions(dataset, rules):
    """What makes ranking impossible."""
    if dataset.test and not dataset.directions:
        yield "test tracklets, but no directions; expected Dataset.set_test(query, gallery)"
    for direction, (query, gallery) in dataset.directions.items():
        if dataset.test and not any(is_answered(dataset, query, gallery)):
            yield (f"{direction}: {len(query)} queries, {len(gallery)} gallery tracklets and not "
                   "one right answer; expected some")
    if dataset.frame_rule not in rules:
        yield f"frame rule {dataset.frame_rule!r}; expected one of {', '.join(rules)}"


def problems_of(dataset, rules):
    """-> a list of lines for each kind of problem. Unreadable frames are not among them."""
    missing = [f"no file {file}, but the dataset's lists name it" for file in
               missing_frames(dataset)]
    return [list(wrong_tracklets(dataset)), missing, list(wrong_identities(dataset)),
            list(wrong_directions(dataset, rules))]


def check(dataset, rules):
    """Raises UserError for the first problem."""
    problems = sum(problems_of(dataset, rules), [])
    if problems:
        more = f" ({len(problems)} problems: python data.py lists them)" * (len(problems) > 1)
        raise UserError(problems[0] + more)


# ---------------------------------------------------- python data.py PATH ----

def unreadable(frame):
    """None, or why the frame cannot be read. It is decoded whole: a torn JPEG opens well."""
    try:
        read_frame(frame, (8, 4))    # any small size
    except UserError as error:
        return str(error).split(";")[0]


def print_statistics(dataset):
    print(f"{dataset.name} in {dataset.root}\n")
    print(f"{'split':<8}{'modality':<10}{'identities':>10}{'tracklets':>11}{'frames':>10}  cameras")
    for split, tracklets in (("train", dataset.train), ("test", dataset.test)):
        for modality in ("visible", "infrared"):
            mine = [t for t in tracklets if t.modality == modality]
            people, frames = len({t.pid for t in mine}), sum(len(t.frames) for t in mine)
            cameras = sorted({str(t.camera) for t in mine} - {"None"}, key=natural)
            print(f"{split:<8}{modality:<10}{people:>10,}{len(mine):>11,}{frames:>10,}  "
                  f"{len(cameras)}: {' '.join(cameras)}")
    for direction, (query, gallery) in dataset.directions.items():
        without = [*is_answered(dataset, query, gallery)].count(False)
        print(f"{direction}: {len(query):,} queries, {len(gallery):,} gallery tracklets"
              + f"; {without} queries without an answer: not scored" * (without > 0))


def main_of(load, rules, show):
    """`python data.py PATH` -> exit code 0 if the dataset is usable, else 2. load: load_dataset;
    show: what to do without PATH."""
    parser = Parser(description="Statistics and every problem of a dataset.")
    parser.set_defaults(path="", reader="", auxiliary=False)
    parser.add_argument("path", metavar="PATH", nargs="?", help="the dataset's folder")
    parser.add_argument("--auxiliary", action="store_true", help="BUPTCampus: with that set")
    parser.add_argument("--reader", metavar="FILE.py:FUNCTION", help="your own: path -> Dataset")
    args = parser.parse_args()
    if not args.path:
        return show()
    dataset = load(args.path, args.reader, args.auxiliary, checked=False)
    print_statistics(dataset)
    missing = set(missing_frames(dataset))
    frames = dict.fromkeys(frame for t in dataset.train + dataset.test for frame in t.frames)
    frames = [frame for frame in frames if file_of(frame) not in missing]
    # Ctrl-C is for the parent, which ends the pool.
    with multiprocessing.Pool(initializer=signal.signal,
                              initargs=(signal.SIGINT, signal.SIG_IGN)) as pool:
        read = pool.imap(unreadable, frames, chunksize=64)
        torn = [why for why in progress(read, "reading", len(frames)) if why]
    kinds = [*problems_of(dataset, rules), torn]
    for lines in kinds:
        for line in lines[:MOST]:
            print("problem:", line)
        if len(lines) > MOST:
            print(f"problem: ... and {len(lines) - MOST:,} more of this kind")
    number = sum(map(len, kinds))
    print(f"{number:,} problems" if number else "no problems: usable")
    return 2 if number else 0
