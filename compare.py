"""The quick baseline for a new idea: several seeds of several variants of a run, side by side.

    python compare.py "whole:" "no fusion: --pbmge off" "no gait: --gait off"
    python compare.py --seeds 5 --data PATH "whole:" "mine: --method my_idea.py:Mine --pull 0.1"
        -> for each seed of each variant: python train.py ... --run OUT/NAME-seedN
        -> a table: mean ± standard deviation, and the paired difference to the first variant

The same command continues after a stop; after a change of code or data, choose another --out. Under
one seed all variants see the same batches. The interval (95 %, Student's t) covers chance in
training, not the choice of test people.

Quick question: why does the interval of 3 seeds reach 4.3 standard errors to either side, not 2?
(Three numbers give a poor estimate of their own spread. With 10 seeds the factor is 2.3.)
"""
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev

import train
from support.files import UserError, in_short, read_json, read_lines, read_log
from support.options import Parser, add_options, cli, fill, option

RANK_1, MINUS = "Rank-1", " minus "
# 97.5 % quantiles of Student's t with 1, 2, 3, ... degrees of freedom.
T_QUANTILES = [12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262]


@dataclass
class Options:
    seeds: int = option(3, "seeds 1..N; 1 gives no interval, 3 a wide one")
    out: str = option("runs/compare", "folder of the runs")
    jobs: int = option(1, "runs at the same time, which share the CPU cores")


def read_command_line():
    """-> Options, {name of a folder: variant}. Raises UserError."""
    parser = Parser(description=__doc__.split("\n\n")[0])
    parser.usage = '%(prog)s [options of all runs] "NAME: OPTIONS of train.py" ...'
    add_options(parser, Options)
    given, words = parser.parse_known_args()
    texts = [word for word in words if ": " in word + " "]    # not FILE.py:CLASS
    for_all = [word for word in words if word not in texts]
    variants = {}
    for text in texts:
        name, own = text.split(":", 1)
        try:
            words = for_all + shlex.split(own)    # an option of its own overrides one for all
            variant = train.read_command_line(words)
            if not train.training_data(variant.config).test:
                raise UserError("there is no test set to compare on; choose another --data")
        except (UserError, ValueError) as error:
            raise UserError(f'variant "{name}": {error}') from None
        variant.name, variant.words = name, words
        variants[re.sub(r"\W+", "-", name.lower())] = variant
    if len(variants) < len(texts) or not texts:
        raise UserError('no variant, or two of the same name; expected "NAME: OPTIONS of train.py"')
    return fill(Options, vars(given)), variants


def is_done(folder, variant, _seed):
    """Raises UserError if the folder holds a run with other options."""
    if not (folder / "config.json").exists():
        return False
    stored = read_json(folder / "config.json")
    found = stored["config"] | stored["options"]
    # Tuples become lists, as in config.json.
    wanted = json.loads(json.dumps(vars(variant.config) | vars(variant.options)))
    differ = {name for name in wanted if wanted[name] != found.get(name)} - {"seed", "workers"}
    if differ:
        raise UserError(f"{folder} holds another run ({', '.join(sorted(differ)[:3])} differ); "
                        "choose another --out or another name, or remove that folder")
    # An epoch that was evaluated has its Rank-1 in the log: is it the last one?
    return (folder / "results.json").exists() and all(
        line["epoch"] == wanted["epochs"] and "rank-1" in line
        for line in read_log(folder, wanted["epochs"])[-1:])


def start(folder, variant, seed):
    """-> the process of a run; what it prints goes to a file beside its folder."""
    if (folder / "last.pt").exists():
        words = ["--resume", folder, "--reader", variant.config.reader,
                 "--method", variant.config.method]    # never taken from a checkpoint alone
    else:
        shutil.rmtree(folder, ignore_errors=True)    # stopped before its first checkpoint
        words = [*variant.words, "--run", folder, "--seed", str(seed)]
    with open(f"{folder}.log", "ab") as log:
        return subprocess.Popen([sys.executable, train.__file__, *words], stdout=log, stderr=log)


def finish(folder, process):
    """Wait for a run. Raises UserError if it failed."""
    if process.wait() != 0:
        lines = ["", *read_lines(f"{folder}.log")]
        raise UserError(f"{folder} failed: {in_short(lines[-1])}; see {folder}.log, then try again")
    print(f"{folder} is done", file=sys.stderr)


def train_all(runs, jobs):
    """Train what is not done, `jobs` runs at the same time. Raises UserError."""
    if jobs > 1:    # a single run may use all threads, as `python train.py` does
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, os.cpu_count() // jobs)))
    running = []
    try:
        for run in [run for run in runs if not is_done(*run)]:
            if len(running) == jobs:
                finish(*running[0])
                del running[0]
            running.append((run[0], start(*run)))
        for run in running:
            finish(*run)
    finally:
        for _, process in running:    # after an error or Ctrl-C; a finished run ignores it
            process.terminate()
            process.wait()


def rows_of(runs):
    """-> {variant: {column: the figure of each seed, in per cent}}."""
    def both(directions, score="rank-1"):
        return 100 * mean(scores[score] for scores in directions.values())

    rows = defaultdict(lambda: defaultdict(list))
    for folder, variant, _ in runs:
        results = read_json(folder / "results.json")
        figures = {RANK_1: both(results["directions"]),
                   "mAP": both(results["directions"], "mAP")}
        if results["silhouette_iou"] is not None:
            figures["IoU"] = 100 * results["silhouette_iou"]
        alone = {f"{name} alone": both(own) for name, own in results["streams"].items()}
        if alone:
            figures |= alone
            figures["both minus the better stream"] = figures[RANK_1] - max(alone.values())
        for column, figure in figures.items():
            rows[variant.name][column].append(figure)
    first, *others = rows
    for name in others:
        pairs = zip(rows[name][RANK_1], rows[first][RANK_1], strict=True)
        rows[name][f"{RANK_1}{MINUS}that of {first}"] = [a - b for a, b in pairs]
    return rows


def in_words(column, values):
    """"71.2 ± 1.3"; for a difference its 95 % interval too, "+1.2 (-0.3 to +2.7)"."""
    n, middle = len(values), mean(values)
    sign = "+" if MINUS in column else ""
    if n == 1:
        return f"{middle:{sign}.1f}"
    if sign:
        # Slightly too wide for more than 10 seeds.
        half = T_QUANTILES[min(n, 10) - 2] * stdev(values) / n ** 0.5
        return f"{middle:+.1f} ({middle - half:+.1f} to {middle + half:+.1f})"
    return f"{middle:.1f} ± {stdev(values):.1f}"


def table(rows):
    """-> Markdown, with the command and how to read it."""
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    lines = [["", *columns], ["---"] * (1 + len(columns))]
    for name, row in rows.items():
        cells = [in_words(column, row[column]) if column in row else "" for column in columns]
        lines.append([name, *cells])
    words = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    command = shlex.join(sys.argv[1:])
    return (f"{words}\nSeeds 1 to {len(row[RANK_1])}: `python compare.py {command}`\n"
            "Mean ± standard deviation; mean difference (95 % interval; with 0: not significant).")


def main():
    options, variants = read_command_line()
    os.makedirs(options.out, exist_ok=True)
    # Seed by seed: a comparison that is stopped early has whole pairs.
    runs = [(Path(options.out, f"{slug}-seed{seed}"), variant, seed)
            for seed in range(1, options.seeds + 1) for slug, variant in variants.items()]
    train_all(runs, options.jobs)
    print(table(rows_of(runs)))


if __name__ == "__main__":
    cli(main)
