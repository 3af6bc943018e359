"""The quick baseline for a new idea: several seeds of several variants of a run, side by side.

    python compare.py "whole:" "no fusion: --pbmge off" "no gait: --gait off"
    python compare.py --seeds 5 --data PATH "whole:" "mine: --method my_idea.py:Mine --pull 0.1"

A variant is "NAME: OPTIONS of train.py". Options outside the quotes apply to every run.

    each seed of each variant -> python train.py ... --run OUT/NAME-seedN -> results.json
    -> a table: mean ± standard deviation, and the paired difference to the first variant

The same command continues after a stop and repeats no finished run. A run is recognised by its
options alone: after a change of code or data, choose another --out.

A paired difference compares two variants under the same seed: both have seen the same batches, so
an easy seed helps both and cancels. The table shows the mean difference over the seeds with its
95 % confidence interval (Student's t). If the interval contains 0, the difference is not
significant. The interval covers the luck of the seed; the test people are the same in all runs.

Quick question: why does the interval of 3 seeds reach 4.3 standard errors to either side, not 2?
(Three numbers give a poor estimate of their own spread. With 10 seeds the factor is 2.3.)
"""
import json
import math
import os
import shlex
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, stdev

import train
from support.files import UserError, in_short, write_picture
from support.options import Parser, add_options, cli, fill, option
from support.pictures import BLACK, COLOURS, GREY, Chart, Sheet, round_numbers

# Columns of the table; ALONE ends those of a single stream.
RANK_1, IOU, ALONE, GAIN = "Rank-1", "IoU", " alone", "both minus the better stream"
# 97.5 % quantiles of Student's t with 1, 2, 3, ... degrees of freedom.
T_QUANTILES = [12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262]


@dataclass
class Options:
    seeds: int = option(3, "seeds 1..N of each variant; with 2 or 3 the interval is wide, with 1 "
                        "there is none", group="comparison")
    out: str = option("runs/compare", "folder of the runs; finished runs in it are not repeated",
                      group="comparison")
    jobs: int = option(1, "runs at the same time, each with its share of the CPU cores; do not "
                       "change it midway: it changes the order of sums", group="comparison")
    figure: str = option("", "FILE.png: draw every seed and the intervals", group="comparison")


# ------------------------------------------------------------------ runs ----

def read_variant(text, for_all):
    """-> what train.py makes of its options, with its name and its words. Draws walkers if --data
    is missing. Raises UserError."""
    name, own = text.split(":", 1)
    try:
        words = for_all + shlex.split(own)    # an option of its own overrides one for all
        variant = train.read_command_line(words)
        dataset = train.training_data(variant.config)
    except (UserError, ValueError) as error:
        raise UserError(f'variant "{name}": {error}') from None
    if not dataset.test:
        raise UserError(f"{variant.config.data} has no test set, so there is nothing to compare; "
                        "choose another --data")
    variant.name, variant.words = name, words
    return variant


def read_command_line():
    """-> Options, a list of variants. Raises UserError."""
    parser = Parser(description=__doc__.split("\n\n")[0], epilog="All other options are those of "
                    "train.py: inside a variant for its runs, outside for all runs.")
    parser.usage = '%(prog)s [options] "NAME: OPTIONS" ...'
    add_options(parser, Options)
    given, words = parser.parse_known_args()
    texts = [word for word in words if ": " in word + " "]    # not FILE.py:CLASS
    for_all = [word for word in words if word not in texts]
    if not texts:
        raise UserError('no variant; expected "NAME: OPTIONS of train.py", such as "whole:" or '
                        '"no gait: --gait off"')
    variants = [read_variant(text, for_all) for text in texts]
    if len({variant.name for variant in variants}) < len(variants):
        raise UserError("two variants have the same name; rename one")
    return fill(Options, vars(given)), variants


class Run:
    """One seed of a variant: train.py's folder OUT/NAME-seedN, and what it prints beside it, in
    NAME-seedN.log."""

    def __init__(self, variant, seed, out):
        self.variant, self.seed = variant, seed
        self.folder = Path(out, f"{variant.name.replace(' ', '-')}-seed{seed}")
        self.printed = Path(f"{self.folder}.log")

    def results(self):
        return json.loads((self.folder / "results.json").read_text())

    def is_done(self):
        """Raises UserError if the folder holds a run with other options."""
        stored, log = self.folder / "config.json", self.folder / "log.jsonl"
        if not stored.exists():
            return False
        found = json.loads(stored.read_text())
        found = found["config"] | found["options"]
        wanted = asdict(self.variant.config) | asdict(self.variant.options)
        wanted = json.loads(json.dumps(wanted))    # tuples become lists, as in config.json
        differ = [name for name in wanted if found.get(name) != wanted[name]
                  and name not in ("seed", "workers")]
        if differ:
            raise UserError(f"{self.folder} holds another run ({', '.join(differ[:3])} differ); "
                            "choose another --out or another name, or remove that folder")
        # Intermediate evaluations write results.json too: has the last epoch been reached?
        lines = log.read_text().splitlines() if log.exists() else ['{"epoch": 0}']
        is_last = json.loads(lines[-1])["epoch"] == wanted["epochs"]
        return is_last and (self.folder / "results.json").exists()

    def start(self):
        config = self.variant.config
        if (self.folder / "last.pt").exists():
            # train.py runs no Python file that only a checkpoint names.
            words = ["--resume", self.folder, "--method", config.method]
            words += ["--reader", config.reader] if config.reader else []
        else:
            shutil.rmtree(self.folder, ignore_errors=True)    # stopped before its first checkpoint
            words = [*self.variant.words, "--run", self.folder, "--seed", str(self.seed)]
        with open(self.printed, "ab") as log:
            self.process = subprocess.Popen([sys.executable, train.__file__, *words], stdout=log,
                                            stderr=log, stdin=subprocess.DEVNULL)

    def finish(self):
        """Wait for it. Raises UserError if it has failed."""
        code = self.process.wait()
        if code != 0:
            lines = ["", *self.printed.read_text(errors="replace").splitlines()]
            raise UserError(f"{self.folder} ended with exit code {code}: {in_short(lines[-1])}; "
                            f"see {self.printed}; the same command continues")
        print(f"{self.folder}: {self.results()['seconds']:.0f} s", file=sys.stderr)


def train_all(runs, jobs):
    """Train what is not done, `jobs` runs at the same time."""
    waiting = [run for run in runs if not run.is_done()]
    print(f"{len(runs) - len(waiting)} of {len(runs)} runs were done before", file=sys.stderr)
    if jobs > 1:    # a single run may use all threads, as `python train.py` does
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, os.cpu_count() // jobs)))
    running = []
    try:
        for run in waiting:
            if len(running) == jobs:
                running[0].finish()
                del running[0]
            run.start()
            running.append(run)
        for run in running:
            run.finish()
    finally:
        for run in running:    # after an error or Ctrl-C; a finished run ignores it
            run.process.terminate()
            run.process.wait()


# ----------------------------------------------------------------- table ----

def figures_of(results):
    """results.json -> {column: figure}: means of both directions, in per cent but for the IoU."""
    def both(directions, score):
        return 100 * mean(scores[score] for scores in directions.values())

    directions, streams = results["directions"], results["streams"]
    figures = {RANK_1: both(directions, "rank-1"), "mAP": both(directions, "mAP")}
    if results["silhouette_iou"] is not None:
        figures[IOU] = results["silhouette_iou"]
    alone = {stream + ALONE: both(streams[stream], "rank-1") for stream in streams}
    if alone:
        figures |= alone | {GAIN: figures[RANK_1] - max(alone.values())}
    return figures


def interval(differences):
    """-> their mean, and half the width of its 95 % interval; 0 for one seed, which has none."""
    n = len(differences)
    if n == 1:
        return differences[0], 0.0
    quantile = T_QUANTILES[min(n, 10) - 2]    # more than 10 seeds: slightly too wide
    return mean(differences), quantile * stdev(differences) / math.sqrt(n)


def against(first, row):
    """Two rows -> the interval of the differences in Rank-1, seed by seed."""
    pairs = zip(row[RANK_1], first[RANK_1], strict=True)
    return interval([value - of_first for value, of_first in pairs])


def in_words(middle, half):
    """"+1.2 (-0.3 to +2.7)"."""
    return f"{middle:+.1f}" + f" ({middle - half:+.1f} to {middle + half:+.1f})" * (half > 0)


def spread(values, column):
    """"71.2 ± 1.3"; for one seed the value alone."""
    if column == GAIN:
        return in_words(*interval(values))
    digits = 3 if column == IOU else 1
    deviation = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{mean(values):.{digits}f}{deviation}"


def table(rows, datasets):
    """rows: {variant: {column: the figure of each seed}} -> Markdown, with the command and how to
    read it."""
    first, *others = rows
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    lines = [["", *columns, f"{RANK_1} minus that of {first}"]]
    lines.append(["---"] * len(lines[0]))
    for name, row in rows.items():
        cells = [spread(row[column], column) if column in row else "" for column in columns]
        difference = in_words(*against(rows[first], row)) if name in others else ""
        lines.append([name, *cells, difference])
    words = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    command = shlex.join(["python", "compare.py", *sys.argv[1:]])
    seeds = len(rows[first][RANK_1])
    advice = ("Mean ± standard deviation (95 % interval of the paired difference).\n"
              "If the interval contains 0, the difference is not significant.")
    if seeds == 1:
        advice = "One seed has no deviation and no interval: a difference means nothing yet."
    return f"{words}\nSeeds 1 to {seeds}, {datasets}: `{command}`\n{advice}"


def draw(rows):
    """rows: see table -> PIL image. Left: Rank-1 of each seed as a dot and the mean as a bar, of
    the whole and of each stream alone. Right: the paired differences to the first variant with
    their intervals, grey if the interval contains 0."""
    lines = [(name, column) for name, row in rows.items() for column in row
             if column == RANK_1 or column.endswith(ALONE)]
    labels = ["", *(name if column == RANK_1 else column for name, column in lines), ""]
    heights = range(-len(lines), 2)    # line i is at y = -i, between two empty ones
    first = next(iter(rows))
    differences = {name: against(rows[first], row) for name, row in rows.items()}
    ends = [middle + side * half for middle, half in differences.values() for side in (-1, 1)]

    sheet = Sheet(4300, 336 + 100 * len(heights), font_size=52)
    left = Chart(sheet, 680, 2300, f"{RANK_1} (%) of each seed, and the mean", range(0, 101, 20),
                 heights, lambda y: labels[1 - y])
    right = Chart(sheet, 2500, 4120, f"minus that of {first}, 95 % interval",
                  round_numbers(min(ends), max(ends)), heights, lambda y: "")
    right.line([(0, heights[0]), (0, heights[-1])], BLACK, 4)
    for i, (name, column) in enumerate(lines):
        values = rows[name][column]
        for value in values:
            left.dot(value, -i, COLOURS[column != RANK_1])
        left.line([(mean(values), -i - 0.3), (mean(values), -i + 0.3)], BLACK, 12)
        if column == RANK_1 and name != first:
            middle, half = differences[name]
            colour = COLOURS[0] if abs(middle) > half > 0 else GREY
            right.line([(middle - half, -i), (middle + half, -i)], colour, 12)
            right.dot(middle, -i, colour, 20)
    return sheet.image.reduce(2)


def main():
    options, variants = read_command_line()
    os.makedirs(options.out, exist_ok=True)
    # Seed by seed: a comparison that is stopped early has whole pairs.
    seeds = range(1, options.seeds + 1)
    runs = [Run(variant, seed, options.out) for seed in seeds for variant in variants]
    try:
        train_all(runs, options.jobs)
    except KeyboardInterrupt:
        raise KeyboardInterrupt("interrupted; the same command continues") from None
    rows = {variant.name: {} for variant in variants}
    for run in runs:
        for column, figure in figures_of(run.results()).items():
            rows[run.variant.name].setdefault(column, []).append(figure)
    datasets = sorted({run.results()["dataset"] for run in runs})
    print(table(rows, " and ".join(datasets)))
    if options.figure:
        write_picture(options.figure, draw(rows))


if __name__ == "__main__":
    cli(main)
