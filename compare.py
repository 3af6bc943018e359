"""The quick baseline for a new idea: several seeds of several variants of a run, side by side.

    python compare.py "whole:" "no fusion: --pbmge off" "no gait: --gait off"
    python compare.py --seeds 5 --data PATH "whole:" "mine: --method my_idea.py:Mine --pull 0.1"

A variant is "NAME: OPTIONS of train.py"; the options that stand outside of all go to every run.

    each seed of each variant -> python train.py ... --run OUT/NAME-seedN -> results.json
    -> a table: mean ± standard deviation, and the paired difference to the first variant

The same command goes on where it was stopped, and runs nothing twice: it knows a run by its options
and by the file of a method and that of a reader of your own. When the repository's files have
changed, what such a file imports, weights, or the data behind a path, choose another --out.

A paired difference is that of two variants under the same seed: on the same data and with batches
of the same size both have seen the same ones, so what makes a seed an easy one drops out. The table
has its mean over the seeds, with an interval: 95 of 100 intervals that are made so hold the mean
which endless seeds would have. Where one holds 0, the luck of the seeds is enough to explain what
was found. The luck of the test people, who are the same for all, is not in it.

Quick question: why does the interval of 3 seeds reach 4.3 standard errors to either side, not 2?
(Three numbers know their own spread badly. With 10 seeds it is 2.3, of smaller errors.)

Ours, not the papers': all of it.
"""
import json
import math
import os
import re
import shlex
import subprocess
import sys
from dataclasses import asdict, dataclass, replace
from statistics import mean, stdev
from typing import NamedTuple

import train
from data import NO_READER
from support.files import (
    RunFolder,
    UserError,
    check_writable,
    in_short,
    printable,
    write_json,
    write_picture,
)
from support.options import (
    METHODS,
    Parser,
    add_options,
    as_typed,
    check_ranges,
    cli,
    given_options,
    option,
    say,
    tell,
)
from support.pictures import BLACK, COLOURS, GREY, GRID, SCALE, TEXT_SIZE, Panel, elided

from PIL import Image, ImageFont

RANK_1, IOU = "Rank-1", "IoU"    # columns of the table
GAIN = "both minus the better stream"
ALONE = " alone"    # the end of those of a stream
# Beside options: no option's names.
METHOD_FILE, READER_FILE, DONE = "the method's file", "the reader's file", "is done"


@dataclass
class Options:
    seeds: int = option(
        3, "seeds 1..N of each variant; of 2 or 3 the interval is wide, of 1 there is none",
        least=1, most=31, group="comparison")
    out: str = option(
        os.path.join("runs", "compare"), "where the runs are kept; what is done there is not run "
        "again", group="comparison")
    jobs: int = option(
        1, "runs at once, each with its share of the cores; keep to one number: sums of fewer "
        "threads have another order",
        least=1, most=256, group="comparison")
    figure: str = option("", "FILE.png: draw every seed, and the intervals", group="comparison")


# -------------------------------------------------------------- variants ----

# FILE.py:CLASS and C:\data are none.
VARIANT = re.compile(r"(?!-)(.*?):(?=\s|-|$)(.*)", re.DOTALL)
EXPECTED = 'expected "NAME: OPTIONS of train.py", such as "whole:" or "no gait: --gait off"'


class Variant(NamedTuple):
    """slug: its name in a path; words: train.py's command line; config: what it makes of them;
    marks: see marks_of."""
    name: str
    slug: str
    words: list
    config: train.Config
    marks: dict


def marks_of(config):
    """What tells whether a run that is there is the wanted one: its options, and the code of one's
    own, which changes more often than its name. Without the seed, which the folder names, and the
    loader processes: their default is the machine's, and they change nothing."""
    marks = json.loads(json.dumps(asdict(config)))
    del marks["seed"], marks["workers"]
    own = {METHOD_FILE: config.method, READER_FILE: config.reader}
    for mark, code in own.items():
        if code not in (*METHODS, NO_READER):
            path, _, _ = code.rpartition(":")
            with open(path, encoding="utf-8", errors="replace") as file:
                marks[mark] = file.read()
    return marks


def read_variant(text, for_all):
    """Raises UserError."""
    name, own = VARIANT.fullmatch(text).groups()
    slug = re.sub(r"\W+", "-", name.lower()).strip("-")
    try:
        if not slug:
            raise UserError(f"a name without letters; {EXPECTED}")
        words = [*for_all, *shlex.split(own)]    # its own are the last, and override
        given_here = [word for word in words if re.match("--(seed|run|resume)(=|$)", word)]
        if given_here:
            raise UserError(f"{given_here[0]} is for compare.py to give; see --seeds and --out")
        config, *_ = train.read_command_line(words)    # refuses now what it would refuse then
    except (UserError, ValueError) as error:
        raise UserError(f'variant "{name}": {error}') from None
    return Variant(name, slug, words, config, marks_of(config))


def read_command_line():
    """-> Options, Variants. Raises UserError."""
    parser = Parser(description=__doc__.split("\n\n")[0], epilog="Any option of train.py: in a "
                    "variant for its runs, outside for all runs.")
    parser.usage = '%(prog)s [options] "NAME: OPTIONS" ...'
    add_options(parser, Options, {})
    given, words = parser.parse_known_args()
    options = Options(**given_options(given))
    check_ranges(options)
    if not options.out:
        raise UserError("--out is empty; name a folder: is a shell variable unset?")
    if options.figure and not options.figure.lower().endswith(".png"):
        raise UserError(f"--figure {options.figure}; expected a name that ends in .png")
    texts = [word for word in words if VARIANT.fullmatch(word)]
    for_all = [word for word in words if word not in texts]
    if for_all and not for_all[0].startswith("-"):
        raise UserError(f"{for_all[0]} is neither an option nor a variant; {EXPECTED}")
    if not texts:
        raise UserError(f"no variant; {EXPECTED}")
    variants = [read_variant(text, for_all) for text in texts]
    if len({variant.slug for variant in variants}) < len(variants):
        names = ", ".join(variant.name for variant in variants)
        raise UserError(f"two variants of the same name among {names}; expected each its own "
                        "letters: rename one")
    return options, variants


# ------------------------------------------------------------------ runs ----

class Run:
    """A seed of a variant: train.py's folder OUT/NAME-seedN. Beside it NAME-seedN.log holds what it
    says, and NAME-seedN.json the run's marks and whether it is done: config.json does not know the
    method's file, and results.json may be of an earlier epoch (--evaluate-every)."""

    def __init__(self, variant, seed, out):
        self.variant, self.seed = variant, seed
        self.name = f"{printable(variant.name)}, seed {seed}"
        self.folder = os.path.join(out, f"{variant.slug}-seed{seed}")
        self.results_file = os.path.join(self.folder, "results.json")
        self.checkpoint = os.path.join(self.folder, "last.pt")
        self.process = None    # or train.py's
        self.told_before = 0    # bytes of the log

    def is_done(self):
        """Raises UserError if the folder holds a run of other marks. What was stopped before its
        first checkpoint is no obstacle: train.py begins it anew."""
        has_results = os.path.exists(self.results_file)
        if not has_results and not os.path.exists(self.checkpoint):
            return False
        try:
            with open(self.folder + ".json", encoding="utf-8") as file:
                found = dict(json.load(file))
        except (OSError, ValueError, TypeError):
            found = {}
        wanted = self.variant.marks
        differ = [mark for mark in wanted if mark not in found or found[mark] != wanted[mark]]
        if differ:
            raise UserError(f"{self.folder} holds another run ({', '.join(differ[:3])} differ); "
                            f'expected one of these options: give "{self.variant.name}" another '
                            "name, choose another --out, or remove that folder")
        return has_results and DONE in found

    def command(self):
        config, words = self.variant.config, self.variant.words
        where = ["--run", self.folder, "--seed", str(self.seed)]
        # A checkpoint knows all but what no file may say, and what is the machine's.
        if os.path.exists(self.checkpoint):
            where = ["--resume", self.folder]
            words = ["--workers", str(config.workers)]
            words += ["--method", config.method, "--reader", config.reader]
            words += ["--cache", config.cache] if config.cache else []
        return [sys.executable, os.path.abspath(train.__file__), *where, *words]

    def start(self, environment):
        now, before = marks_of(self.variant.config), self.variant.marks
        changed = [mark for mark in now if now[mark] != before[mark]]
        if changed:
            raise UserError(f"{changed[0]} was changed during the comparison; expected the same "
                            "for all seeds: give the new one another name")
        # Another comparison's, or left by one that was killed: its marks are not ours to write.
        if RunFolder(self.folder).is_alive():
            raise UserError(f"{self.folder} belongs to a run that is alive; wait for it, stop it, "
                            "or choose another --out")
        write_json(self.folder + ".json", self.variant.marks)
        with open(self.folder + ".log", "ab") as log:
            self.told_before = log.tell()    # by a run that was stopped
            # In a session of its own: a terminal's Ctrl-C would reach it beside our SIGTERM.
            self.process = subprocess.Popen(self.command(), stdin=subprocess.DEVNULL, stdout=log,
                                            stderr=log, env=environment, start_new_session=True)

    def finish(self):
        """Waits for it. Raises UserError if it has failed."""
        code = self.process.wait()
        if code != 0:
            with open(self.folder + ".log", "rb") as log:
                log.seek(self.told_before)
                lines = log.read().decode("utf-8", "replace").splitlines()
            last = in_short("".join(lines[-1:]).removeprefix("error: "), 300) or "without a word"
            raise UserError(f"{self.name} ended with exit code {code}: {last}; what is done stays: "
                            f"see {self.folder}.log, then give the same command again")
        write_json(self.folder + ".json", {**self.variant.marks, DONE: True})
        _, seconds, _ = self.results()
        self.tell(f"{seconds:.0f} s")

    def results(self):
        """-> the data set's name, the seconds it took, {column: figure}: means of both directions,
        in per cent but for the IoU. Raises UserError."""
        def both(directions, name):
            return 100 * mean(direction[name] for direction in directions.values())

        try:
            with open(self.results_file, encoding="utf-8") as file:
                found = json.load(file)
            figures = {RANK_1: both(found["directions"], "rank-1"),
                       "mAP": both(found["directions"], "mAP")}
            if found.get("silhouette_iou") is not None:
                figures[IOU] = found["silhouette_iou"]
            alone = {stream + ALONE: both(directions, "rank-1")
                     for stream, directions in (found.get("streams") or {}).items()}
            figures.update(alone)
            if alone:
                figures[GAIN] = figures[RANK_1] - max(alone.values())
            return found["dataset"], float(found["seconds"]), figures
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise UserError(f"{self.results_file} cannot be used ({error!r}); expected train.py's: "
                            f"remove {self.folder}") from None

    def tell(self, how):
        _, _, figures = self.results()
        tell(f"{self.name}: {how}, {RANK_1} {figures[RANK_1]:.1f}")


def train_all(runs, jobs):
    """Trains what is not done, so many at once; tells a line of each run."""
    done = [run for run in runs if run.is_done()]
    waiting = [run for run in runs if run not in done]
    for run in done:
        run.tell("done before")
    configs = [run.variant.config for run in waiting]
    for config in {(c.data, c.people, c.auxiliary, c.reader): c for c in configs}.values():
        # Draws walkers, once; refuses a wrong --data now.
        if not train.training_data(replace(config)).test:
            raise UserError(f"nothing to test on in {as_typed(config.data)}; expected a test set, "
                            "or there is nothing to compare")
    environment = dict(os.environ)
    if jobs > 1:    # one alone has all threads, as `python train.py` has
        environment.setdefault("OMP_NUM_THREADS", str(max(1, os.cpu_count() // jobs)))
    try:
        for i, run in enumerate(waiting):
            if i >= jobs:
                waiting[i - jobs].finish()
            run.start(environment)
        for run in waiting[-jobs:]:
            run.finish()
    except BaseException:
        begun = [run for run in waiting if run.process is not None]
        for run in begun:
            run.process.terminate()    # a Ctrl-C, for train.py; nothing, for one that has ended
        for run in begun:
            run.process.wait()
        raise


# ----------------------------------------------------------------- table ----

# 97.5 % quantiles of Student's t with 1, 2, 3, ... 30 degrees of freedom.
T_QUANTILES = [
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228,
    2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086,
    2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042]


def paired(values, others):
    """Figures of two variants -> their differences, seed by seed."""
    return [a - b for a, b in zip(values, others, strict=True)]


def interval(differences):
    """-> their mean, and half the width of its 95 % interval; 0 of a single seed, which has none.
    """
    n = len(differences)
    half = T_QUANTILES[n - 2] * stdev(differences) / math.sqrt(n) if n > 1 else 0.0
    return mean(differences), half


def in_words(differences):
    """"+1.2 (-0.3 to +2.7)"."""
    middle, half = interval(differences)
    ends = f" ({middle - half:+.1f} to {middle + half:+.1f})" if len(differences) > 1 else ""
    return f"{middle:+.1f}{ends}"


def spread(values, column):
    """"71.2 ± 1.3"; of one value itself."""
    if column == GAIN:
        return in_words(values)
    digits = 3 if column == IOU else 1
    words = f"{mean(values):.{digits}f}"
    return f"{words} ± {stdev(values):.{digits}f}" if len(values) > 1 else words


def rows_of(runs):
    """Runs -> {variant: {column: the figure of each seed}}, without what some seed does not
    have."""
    figures = {}
    for run in runs:
        figures.setdefault(run.variant.name, []).append(run.results()[2])
    return {name: {column: [seed[column] for seed in seeds] for column in seeds[0]
                   if all(column in seed for seed in seeds)}
            for name, seeds in figures.items()}


def table(rows, dataset):
    """rows: see rows_of -> Markdown, and what to know of it."""
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    first, *others = rows
    seeds = len(rows[first][RANK_1])
    last = [f"{RANK_1} minus that of {first}"] if others else []
    lines = [["", *columns, *last], ["---"] * (1 + len(columns) + len(last))]
    for name, row in rows.items():
        cells = [spread(row[column], column) if column in row else "" for column in columns]
        lines.append([name, *cells, *[""] * len(last)])
        if name != first:
            lines[-1][-1] = in_words(paired(row[RANK_1], rows[first][RANK_1]))
    escaped = [[printable(cell).replace("|", "\\|") for cell in line] for line in lines]
    words = "".join(f"| {' | '.join(line)} |\n" for line in escaped)
    command = printable(shlex.join(["python", "compare.py", *sys.argv[1:]]))
    which = "Seed 1"
    advice = "One seed has no deviation and no interval: no difference means anything yet."
    if seeds > 1:
        which = f"Seeds 1 to {seeds}"
        advice = ("Mean ± standard deviation (95 % interval of the paired difference).\n"
                  "A difference whose interval holds 0 cannot be told from none by these seeds.")
    return f"{words}\n{which}, {printable(dataset)}: `{command}`\n{advice}"


# --------------------------------------------------------------- picture ----

class Chart(Panel):
    """Values from left to right, a row for each variant from top to bottom."""
    ROW = 46

    def __init__(self, sheet, left, rows, title, values):
        low, high = min(values), max(values)
        steps = 1, 2, 5, 10, 20, 50, 100, 200, 500
        step = next(step for step in steps if (high - low) / step <= 6)
        low, high = step * math.floor(low / step), step * (math.floor(high / step) + 1)
        box = left, 44, left + 380, 44 + self.ROW * rows
        super().__init__(sheet, box, 1, low, high, log=False)
        self.text((self.left + self.right) / 2, 24, title, "mm")
        for value in range(low, high + 1, step):
            x = self.x_of(value)
            self.stroke([(x, self.top), (x, self.bottom)], GRID)
            self.text(x, self.bottom + 14, f"{value}", "mm")

    def x_of(self, value):
        return self.left + (self.right - self.left) * (value - self.low) / (self.high - self.low)

    def y_of(self, row):
        return self.top + self.ROW * (row + 0.5)


def draw_scores(sheet, rows, font):
    """The left half: Rank-1 of each seed and its mean, of the whole and of each stream alone."""
    columns = dict.fromkeys(column for row in rows.values() for column in row)
    columns = [RANK_1, *(column for column in columns if column.endswith(ALONE))]
    colours = dict(zip(columns, COLOURS, strict=False))
    values = [row.get(column, []) for row in rows.values() for column in columns]
    chart = Chart(sheet, 170, len(rows), "", sum(values, []))
    x = chart.left
    for column, colour in colours.items():
        words = f"{RANK_1} (%)" if column == RANK_1 else column
        chart.dot(x + 4, 24, colour, 4)
        chart.text(x + 14, 24, words, "lm")
        x += 40 + font.getlength(words)
    for i, (name, row) in enumerate(rows.items()):
        chart.text(chart.left - 10, chart.y_of(i), elided(printable(name), 150, font), "rm")
        for j, column in enumerate(columns):
            y = chart.y_of(i) + 12 * (j - (len(columns) - 1) / 2)
            for value in row.get(column, []):
                chart.dot(chart.x_of(value), y, colours[column])
            if column in row:
                middle = chart.x_of(mean(row[column]))
                chart.stroke([(middle, y - 5), (middle, y + 5)], BLACK, 3)


def draw(rows):
    """rows: see rows_of -> a PIL image: each seed's Rank-1 as a dot, the means as bars; the paired
    differences to the first variant with their intervals, grey where they hold 0."""
    first, *others = rows
    scores = [row[RANK_1] for row in rows.values()]
    sheet = Image.new("RGB", (SCALE * 1016, SCALE * (76 + Chart.ROW * len(rows))), "white")
    font = ImageFont.load_default(TEXT_SIZE)
    draw_scores(sheet, rows, font)
    if not others:
        return sheet.reduce(SCALE // 2)

    differences = [interval(paired(values, scores[0])) for values in scores[1:]]
    ends = [middle + side * half for middle, half in differences for side in (-1, 1)]
    has_interval = len(scores[0]) > 1
    title = f"minus that of {printable(first)}" + ", 95 % interval" * has_interval
    chart = Chart(sheet, 606, len(rows), elided(title, 380, font), [0, *ends])
    chart.stroke([(chart.x_of(0), chart.top), (chart.x_of(0), chart.bottom)], BLACK)
    for i, (middle, half) in enumerate(differences, 1):
        colour = COLOURS[0] if has_interval and abs(middle) > half else GREY
        y = chart.y_of(i)
        chart.stroke([(chart.x_of(middle + side * half), y) for side in (-1, 1)], colour, 3)
        chart.dot(chart.x_of(middle), y, colour, 5)
    return sheet.reduce(SCALE // 2)


def main():
    options, variants = read_command_line()
    os.makedirs(options.out, exist_ok=True)
    if options.figure:
        check_writable(options.figure)
    # Seed by seed: of what is stopped early, pairs are whole.
    seeds = range(1, options.seeds + 1)
    runs = [Run(variant, seed, options.out) for seed in seeds for variant in variants]
    try:
        train_all(runs, options.jobs)
    except KeyboardInterrupt:
        raise KeyboardInterrupt("interrupted; what is done stays: go on by the same "
                                "command") from None
    rows = rows_of(runs)
    datasets = sorted({run.results()[0] for run in runs})
    say(table(rows, " and ".join(datasets)))
    if options.figure:
        write_picture(options.figure, draw(rows))


if __name__ == "__main__":
    cli(main)
