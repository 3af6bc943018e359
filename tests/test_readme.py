"""What the README and docs/ say, held to; and how the code reads, in numbers."""
import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

from scripts import ROOT, TINY, TINY_LSMRL, fails, here, run, together
from support.footage import find_footage, read_frame

import pytest

README = (ROOT / "README.md").read_text()
DOCS = {path.name: path.read_text() for path in (ROOT / "docs").glob("*.md")}
SOURCES = [path for path in ROOT.rglob("*.py") if ".git" not in path.parts]
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text()


def test_ci_runs_the_readme_s_test_command():
    command = "pip install -r requirements.txt && python -m pytest"
    assert f"```\n{command}\n```" in README
    ci = re.sub(r"\s-q\b", "", (ROOT / ".ci" / "run").read_text())
    assert ci.count(command) == 1 and "ruff check" in ci


def test_the_pages_are_short():
    assert len(README.encode()) <= 14 * 1024
    assert len(DOCS) == 8 and all(len(text.encode()) < 8 * 1024 for text in DOCS.values())


PAGES = ["README.md", "CONTRIBUTING.md", *(f"docs/{name}" for name in DOCS)]


@pytest.mark.parametrize("page", PAGES)
def test_files_and_headings_it_links_to_exist(page):
    text = (ROOT / page).read_text()
    for link in re.findall(r"\]\(([^)]+)\)", text):
        path, _, heading = link.partition("#")
        if "://" in link:
            continue
        assert ((ROOT / page).parent / path).exists(), link
        titles = [title.lower() for title in re.findall(r"^#+ (.+)$", text, re.M)]
        slugs = [re.sub(r"[^a-z0-9 -]", "", title).replace(" ", "-") for title in titles]
        assert not heading or heading in slugs, link


def test_the_table_of_files_is_whole_and_its_line_counts_are_true():
    rows = re.findall(r"^\| \[([\w/.]+)\]\([^)]*\) \| (\d+) \|", README, re.M)
    counted = {name: int(lines) for name, lines in rows}
    files = [path for path in SOURCES if "tests" not in path.parts and path.name != "__init__.py"]
    names = [path.relative_to(ROOT).as_posix() for path in files]
    assert sorted(counted) == sorted(names)
    for name, lines in counted.items():
        assert lines == len((ROOT / name).read_text().splitlines()), name


# Options of torchrun, of argparse, of tests/benchmark.py.
OTHERS = ("nproc_per_node", "nnodes", "node_rank", "master_addr", "help", "quick")


def test_what_the_pages_name_exists():
    source = "".join(path.read_text() for path in SOURCES if "tests" not in path.parts)
    for page in (README, CONTRIBUTING, *DOCS.values()):
        for option in re.findall(r"(?<![\w-])--([a-z][a-z0-9_-]+)", page):
            name = option.replace("-", "_")
            known = rf"\b{name}: (int|str|float|bool|tuple)\b|\"--{option}\""
            assert option in OTHERS or re.search(known, source), option


def test_the_worked_examples_run(walkers, tmp_path):
    examples = re.findall(r"```python\n(.*?)```", DOCS["method.md"], re.S)
    options = (TINY, TINY_LSMRL[2:], TINY)
    losses = ({"centres_gait", "centres_appearance"}, {"contrast"}, {"triplet_gait"})

    def follow(number):
        assert len(examples[number].splitlines()) <= 25
        script, folder = tmp_path / f"idea{number}.py", tmp_path / f"run{number}"
        script.write_text(examples[number])
        method = ["--method", f"{script}:Mine"]
        result = run("train.py", *method, "--data", walkers, "--run", folder, *options[number])
        assert result.returncode == 0, result.stderr
        line = json.loads((folder / "log.jsonl").read_text().splitlines()[0])
        assert all(line["losses"][name] > 0 for name in losses[number])
        if number == 2:
            assert json.loads((folder / "config.json").read_text())["pull"] == 0.01
        result = run("evaluate.py", *method, "--checkpoint", folder)
        assert result.returncode == 0 and "infrared->visible" in result.stdout, result.stderr

    assert len(examples) == 3
    together(follow, 0, 1, 2)


def test_the_search_page_s_commands_are_known(tmp_path):
    """Its options at least are read: what is missing is the run."""
    command = re.search(r"\$ python (evaluate\.py .+)", DOCS["footage.md"])[1].split()
    checkpoint = command.index("--checkpoint") + 1
    command[checkpoint] = tmp_path / "no-run"
    command[command.index("--save") + 1] = tmp_path / "day.npz"
    fails(here(*command), "no file", "no-run")


def test_what_stfl_costs_is_what_the_page_says(tmp_path):
    [script] = re.findall(r"```python\n(.*?)```", DOCS["lsmrl.md"], re.S)
    (tmp_path / "cost.py").write_text(script)
    ended = subprocess.run([sys.executable, tmp_path / "cost.py"], capture_output=True, text=True,
                           env={**os.environ, "PYTHONPATH": str(ROOT)})
    counted = re.findall(r"^(.+?) +([\d.]+) M +([\d.]+) GFLOP$", ended.stdout, re.M)
    assert len(counted) == 5, ended.stderr
    for name, parameters, gflop in counted:
        row = re.search(rf"^\| {name}.*", DOCS["lsmrl.md"], re.M)[0]
        assert f"{gflop}" in row and (f"{parameters} M" in row or parameters == "0.0"), row


STAND_IN = """
import numpy as np
import torch
from types import SimpleNamespace as Any


class YOLO:
    def __init__(self, name):
        pass

    def track(self, video, **how):
        red = np.zeros((100, 80, 3), np.uint8)
        red[:, :, 2] = 200    # BGR
        boxes = torch.tensor([[4.0, 5, 34, 95], [40, 5, 70, 35]])    # the second is too small
        yield Any(orig_img=red, boxes=Any(xyxy=boxes[:0], id=None))
        for _ in range(3):
            yield Any(orig_img=red, boxes=Any(xyxy=boxes, id=torch.tensor([7.0, 8.0])))
"""


def test_the_script_that_cuts_a_video_writes_what_the_search_reads(tmp_path):
    """With a stand-in for ultralytics, whose detector is not at hand."""
    [script] = re.findall(r"```python\n(.*?)```", DOCS["footage.md"], re.S)
    (tmp_path / "cut.py").write_text(script)
    (tmp_path / "ultralytics.py").write_text(STAND_IN)
    out = tmp_path / "night"
    subprocess.run([sys.executable, "cut.py", "night.mp4", out], cwd=tmp_path, check=True)
    [(name, frames)] = find_footage(str(out)).items()
    assert name == "00007" and len(frames) == 3
    red, green, _ = read_frame(frames[0], (90, 30)).float().mean((1, 2))
    assert red > 150 and green < 50


# ------------------------------------------------------------ how it reads ----

@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_lines_and_functions_are_short(path):
    text = Path(path).read_text(encoding="utf-8")
    wide = [i for i, line in enumerate(text.splitlines(), 1) if len(line) > 100]
    functions = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef)]
    long = [f.name for f in functions if f.end_lineno - f.lineno + 1 > 60]
    assert not wide and not long


def test_the_training_loop_is_one_page_and_nothing_of_it_is_torchrun_s():
    lines = (ROOT / "train.py").read_text().splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("    for epoch in range("))
    length = next(i for i, line in enumerate(lines[start + 1:], 1)
                  if line and not line.startswith("        "))
    loop = "\n".join(lines[start:start + length])
    assert length <= 60 and ".backward()" in loop and "dist." not in loop


def test_nothing_in_support_imports_a_file_of_the_top_level():
    top = {path.stem for path in ROOT.glob("*.py")}
    for path in (ROOT / "support").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names = [node.module]
            assert not top & set(names), path.name
