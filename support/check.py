"""Every problem of a dataset: `python data.py PATH`."""
import functools
import multiprocessing
import os
from collections import defaultdict

from support.files import UserError
from support.footage import file_of, natural, notes_on, read_frame
from support.options import Parser, on_off, progress
from support.parallel import ignore_interrupts, say

MOST = 20    # lines of each kind of problem


def files_of(dataset):
    return {file_of(frame): frame for t in dataset.train + dataset.test for frame in t.frames}


def missing_files(dataset):
    @functools.cache    # looking up single files takes minutes on a network disk
    def names_in(folder):
        return set(os.listdir(folder) if os.path.isdir(folder) else ())

    return [f"no file {file}, but the dataset's lists name it" for file in files_of(dataset)
            if os.path.basename(file) not in names_in(os.path.dirname(file))]


def unanswered(dataset, query, gallery):
    """How many queries have no right answer in the gallery."""
    cameras_of = defaultdict(set)
    for i in gallery:
        t = dataset.test[i]
        cameras_of[t.pid].add(t.camera)
    number = 0
    for i in query:
        t = dataset.test[i]
        ignored = {t.camera} if dataset.ignore_same_camera else set()
        number += cameras_of[t.pid] <= ignored
    return number


def unranked(dataset):
    """The directions in which no query has a right answer."""
    return [name for name, (query, gallery) in dataset.directions.items()
            if unanswered(dataset, query, gallery) == len(query)]


def notes(dataset):
    """What is odd, but not wrong, a line each."""
    yield from dataset.notes
    lost = unranked(dataset)
    for direction in lost if len(lost) < len(dataset.directions) else []:    # else: wrong_lists
        yield f"{direction} is not ranked: no query has a right answer in the gallery"
    yield from notes_on([t.frames[0] for t in dataset.train + dataset.test])


def wrong_lists(dataset):
    """What makes ranking or training impossible."""
    if not dataset.train + dataset.test:
        yield f"no tracklets in {dataset.root}; expected some"
    if dataset.test and not dataset.directions:
        yield "test tracklets, but no directions; expected Dataset.set_test(query, gallery)"
    elif dataset.test and len(unranked(dataset)) == len(dataset.directions):
        yield "not one query has a right answer in the gallery; expected the same pids in both"
    modalities = defaultdict(set)
    for t in dataset.train:
        modalities[t.pid].add(t.modality)
    if len(modalities) == 1:
        yield "1 training identity; expected 2 or more"
    for pid, found in modalities.items():
        if found != {"visible", "infrared"}:
            yield f"training identity {pid} has only {sorted(found)}; expected visible and infrared"


def check(dataset):
    """Print the notes. Raises UserError for the first problem."""
    for note in notes(dataset):
        say(f"note: {note}")
    problems = [*wrong_lists(dataset), *missing_files(dataset)]
    if problems:
        raise UserError(f"{problems[0]} (problem 1 of {len(problems)}; python data.py lists all)")


def unreadable(frame):
    """Why a frame cannot be read, or None. It is decoded whole: a torn JPEG opens well."""
    try:
        read_frame(frame, (8, 4))    # any small size
    except UserError as error:
        return str(error).split(";")[0]


def torn(frames):
    """-> {frame that cannot be read: why}."""
    with multiprocessing.Pool(None, ignore_interrupts, (0,)) as pool:
        reasons = progress(pool.imap(unreadable, frames, chunksize=64), "reading", len(frames))
        return {frame: why for frame, why in zip(frames, reasons, strict=True) if why}


def print_statistics(dataset):
    print(f"{dataset.name} in {dataset.root}\n")
    print("split   modality  identities  tracklets    frames  cameras")
    for split in ("train", "test"):
        for modality in ("visible", "infrared"):
            mine = [t for t in getattr(dataset, split) if t.modality == modality]
            people = {t.pid for t in mine}
            cameras = {str(t.camera) for t in mine if t.camera}
            print(f"{split:<8}{modality:<10}{len(people):>10,}{len(mine):>11,}"
                  f"{sum(len(t.frames) for t in mine):>10,}",
                  *sorted(cameras, key=natural))
    for direction, (query, gallery) in dataset.directions.items():
        print(f"{direction}: {len(query):,} queries ({unanswered(dataset, query, gallery):,} "
              f"without an answer: not scored), {len(gallery):,} gallery tracklets")


def main_of(load, show):
    """`python data.py PATH` -> exit code 0 if the dataset is usable, else 2. Without PATH: show."""
    parser = Parser(description="Statistics and every problem of a dataset.")
    parser.add_argument("path", nargs="?", default="")
    parser.add_argument("--auxiliary", type=on_off, default=False, help="on|off, of BUPTCampus")
    parser.add_argument("--reader", default="", help="your own FILE.py:FUNCTION: path -> Dataset")
    args = parser.parse_args()
    if not args.path:
        return show()
    dataset = load(args.path, args.reader, args.auxiliary, checked=False)
    print_statistics(dataset)
    for note in notes(dataset):
        print("note:", note)
    frames = [frame for file, frame in files_of(dataset).items() if os.path.isfile(file)]
    kinds = list(wrong_lists(dataset)), missing_files(dataset), list(torn(frames).values())
    for lines in kinds:
        for line in lines[:MOST]:
            print("problem:", line)
        if len(lines) > MOST:
            print(f"problem: ... and {len(lines) - MOST:,} more of this kind")
    number = sum(map(len, kinds))
    print(f"{number:,} problems" if number else "no problems: usable")
    return 2 if number else 0
