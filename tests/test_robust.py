"""The same on any machine: streams that have gone, few open files, processes that are not forked,
threads that sleep, paths with backslashes."""
import ast
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

from scripts import (
    HOUR,
    ROOT,
    TINY_LSMRL,
    fails,
    finished,
    log_of,
    results_of,
    run,
    run_anew,
    same_bits,
    succeeds,
    tensors_of,
    together,
    trained,
)
from support.files import UserError
from support.options import load_method

import pytest

posix = pytest.mark.skipif(os.name == "nt", reason="a shell, forked processes, limits")


# ------------------------------------------------------------- streams ----

def shell(line):
    """A line of bash in which python is ours, and which ends with python's exit code."""
    python = f"python() {{ {shlex.quote(sys.executable)} \"$@\"; }}; {line}"
    ended = subprocess.run(["bash", "-c", python], cwd=ROOT, stdin=subprocess.DEVNULL,
                           capture_output=True, text=True, timeout=HOUR,
                           env={**os.environ, "OMP_NUM_THREADS": "1"})
    return finished(ended.returncode, ended.stdout, ended.stderr)


@posix
def test_a_reader_that_goes_is_named_and_the_files_are_written(walkers, tmp_path):
    """As by | head -1: the first line is read, then nobody reads any more."""
    folder = tmp_path / "run"
    result = run("train.py", "--data", walkers, "--run", folder, *TINY_LSMRL, reader=True,
                 moments=[{"at": "step", "number": 1, "what": "close"}])
    fails(result, "standard output cannot be written", "| head")
    assert "disk" not in result.stderr and "permissions" not in result.stderr
    assert tensors_of(folder)["epoch"] == 1 and results_of(folder)["directions"]
    assert log_of(folder)[0]["rank-1"] and (folder / "curves.png").exists()


@posix
@pytest.mark.parametrize("script", ["train.py", "evaluate.py"])
def test_help_that_nobody_reads_is_no_traceback(script):
    moments = [{"at": "start", "what": "close"}]
    result = run(script, "--help", reader=True, moments=moments)
    fails(result, "standard output cannot be written", "| head")


@posix
def test_a_full_standard_output_is_not_the_disk_s_fault(walkers):
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full here")
    result = shell(f"python data.py {shlex.quote(str(walkers))} > /dev/full")
    fails(result, "standard output cannot be written", "No space left")
    assert "disk" not in result.stderr


@posix
def test_a_closed_standard_error_ends_no_run(walkers, tmp_path):
    words = ["--data", walkers, "--run", tmp_path / "run", *TINY_LSMRL, "--workers", 1]
    line = shlex.join(["python", "train.py", *map(str, words)])
    result = shell(f"{line} 2>&- 0<&-")
    assert result.returncode == 0 and "infrared->visible" in result.stdout and not result.stderr
    # Nothing took the place of what was closed, and got what was meant for it.
    assert tensors_of(tmp_path / "run")["epoch"] == 1
    assert len(log_of(tmp_path / "run")) == 1 and results_of(tmp_path / "run")
    for path in (tmp_path / "run").iterdir():
        assert b"frames/s" not in path.read_bytes(), path
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["data"] == [str(walkers)]


@posix
@pytest.mark.parametrize("limit", [24, 34])
def test_few_open_files_are_named(limit, walkers, tmp_path):
    result = run("train.py", "--data", walkers, "--run", tmp_path / "run", *TINY_LSMRL,
                 "--workers", 4, limits={"RLIMIT_NOFILE": limit})
    fails(result, "too many open files; raise the limit (ulimit -n) or lower --workers")


@posix
def test_sigterm_stops_an_evaluation_too(walkers, tmp_path):
    trained("--data", walkers, "--run", tmp_path / "run", *TINY_LSMRL, "--epochs", 0)
    result = run("evaluate.py", "--checkpoint", tmp_path / "run", "--workers", 1,
                 moments=[{"at": "embedding", "number": 2, "what": "SIGTERM"}])
    assert result.returncode == 130 and not result.stdout
    assert result.stderr == "interrupted\n"


FORKING = """
import os
import signal
import sys


def end_child():
    # The moment at which Python would forget it.
    os.kill(os.getpid(), signal.SIGTERM)


os.register_at_fork(after_in_child=end_child)
from support.options import cli, tell    # its part comes after ours


def main():
    pid = os.fork()
    if pid == 0:
        signal.pause()
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGTERM
    tell("the child has ended")
    os.kill(os.getpid(), signal.SIGTERM)


cli(main)
"""


@posix
def test_a_child_that_is_ended_while_it_is_forked_ends(tmp_path):
    (tmp_path / "forking.py").write_text(FORKING)
    result = run_anew(tmp_path / "forking.py", env={"PYTHONPATH": str(ROOT)})
    assert result.returncode == 130
    assert result.stderr == "the child has ended\ninterrupted\n"


# ------------------------------------------------------- start methods ----

BEGIN = """
import multiprocessing
import runpy
import sys

multiprocessing.set_start_method(sys.argv[1])
multiprocessing.set_forkserver_preload(["torch"])    # once, not in each process
del sys.argv[:2]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
# Python runs it first, in every process that is not forked.
SITE = """
from pathlib import Path
Path(__file__).with_name("begun").touch()
"""


def example_of(method):
    """The worked example in docs/method.md that changes a part of this class."""
    page = (ROOT / "docs" / "method.md").read_text()
    found = [block for block in re.findall(r"```python\n(.*?)```", page, re.S)
             if f"class Mine({method}):" in block]
    assert len(found) == 1
    return found[0]


def scripts_under(start_method, folder, scripts, walkers):
    """Runs scripts whose processes begin in this way, for a method of one's own."""
    folder.mkdir()
    (folder / "begin.py").write_text(BEGIN)
    (folder / "sitecustomize.py").write_text(SITE)
    (folder / "my_idea.py").write_text(example_of("LSMRL"))
    mine = ["--method", f"{folder / 'my_idea.py'}:Mine", "--workers", 1]
    words = {
        "train.py": ["--data", walkers, "--run", folder / "run", *TINY_LSMRL[2:], *mine],
        "evaluate.py": ["--checkpoint", folder / "run", "--json", folder / "r.json", *mine],
        "data.py": [walkers]}
    for script in scripts:
        succeeds(run(folder / "begin.py", start_method, ROOT / script, *words[script],
                     env={"PYTHONPATH": str(folder)}))
        begun = folder / "begun"
        assert begun.exists() == (start_method != "fork"), script
        begun.unlink(missing_ok=True)


@posix
def test_every_script_works_however_processes_begin(walkers, tmp_path):
    kinds = {"fork": ["data.py"], "spawn": ["train.py", "evaluate.py"],
             "forkserver": ["train.py", "data.py"]}

    def follow(kind):
        scripts_under(kind, tmp_path / kind, kinds[kind], walkers)

    together(follow, *kinds)
    mine = f"{tmp_path / 'fork' / 'my_idea.py'}:Mine"
    trained("--data", walkers, "--run", tmp_path / "fork" / "run", *TINY_LSMRL[2:],
            "--method", mine, "--workers", 1)
    results = results_of(tmp_path / "fork" / "run")["directions"]
    for kind in "spawn", "forkserver":
        same_bits(tensors_of(tmp_path / "fork" / "run"), tensors_of(tmp_path / kind / "run"))
        assert results_of(tmp_path / kind / "run")["directions"] == results
    evaluated = json.loads((tmp_path / "spawn" / "r.json").read_text())
    assert evaluated["directions"] == results


# ------------------------------------------------- what torch finds when it comes ----

IMPORTS = """
import json
import os
import sys


class AtTorch:
    '''Ends the process where torch would be imported, and says what it would find.'''

    @staticmethod
    def find_spec(name, path=None, target=None):
        if name == "torch":
            found = ["support" in sys.modules, os.environ.get("OMP_WAIT_POLICY"),
                     os.environ.get("GOMP_SPINCOUNT")]
            print(json.dumps(found), flush=True)
            os._exit(0)


sys.meta_path.insert(0, AtTorch)
for given in json.loads(sys.argv[2]):
    if os.fork() == 0:
        for name in "OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME":
            os.environ.pop(name, None)
        os.environ.update(given)
        __import__(sys.argv[1])
        print("null", flush=True)    # it needs no torch
        os._exit(0)
    assert os.wait()[1] == 0
"""


@posix
def test_threads_sleep_unless_the_user_has_chosen(tmp_path):
    """libgomp reads the variables when torch is imported, and never again."""
    given = [{}, {"GOMP_SPINCOUNT": "7"}, {"OMP_WAIT_POLICY": "active"}]
    (tmp_path / "imports.py").write_text(IMPORTS)
    scripts = [path.stem for path in ROOT.glob("*.py")
               if "cli(main)" in path.read_text(encoding="utf-8")]
    assert {"train", "evaluate", "data", "walkers"} <= set(scripts)

    def ask(script):
        result = run_anew(tmp_path / "imports.py", script, json.dumps(given),
                     env={"PYTHONPATH": str(ROOT)})
        return [json.loads(line) for line in succeeds(result).stdout.splitlines()]

    for script, found in zip(scripts, together(ask, *scripts), strict=True):
        expected = [[True, "passive", "1000"], [True, None, "7"], [True, "active", None]]
        assert found == ([None] * 3 if script == "walkers" else expected), script


# ------------------------------------------------------------ backslashes ----

SOURCES = sorted([*ROOT.glob("*.py"), *(ROOT / "support").glob("*.py")])


# BUPTCampus's word "RGB/IR", and the values of a loss of several streams.
NO_PATHS = {"data.py": r"\w+\.split\('/'\)", "train.py": r"'/'\.join\(values\)"}
METHODS_OF_TEXT = {"split", "rsplit", "partition", "rpartition", "find", "rfind", "index", "strip",
                   "lstrip", "rstrip", "startswith", "endswith", "removesuffix", "join", "count"}


def separators(node):
    """The constants among what a call or a sum takes text apart at, or puts it together with."""
    words = []
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
        if node.func.attr in METHODS_OF_TEXT:
            words = [*node.args, node.func.value]
    elif isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        words = [node.left, node.right]
    return [word.value for word in words if isinstance(word, ast.Constant)]


@pytest.mark.parametrize("path", SOURCES, ids=[path.name for path in SOURCES])
def test_no_path_is_taken_apart_at_slashes(path):
    """Nor put together with them: os.path knows better."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if {"/", "\\"} & set(separators(node)):
            found.append(ast.unparse(node))
    allowed = NO_PATHS.get(path.name, "none")
    assert [code for code in found if not re.fullmatch(allowed, code)] == []


def test_a_method_with_a_drive_letter_is_split_at_its_last_colon(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"no file .*C:\\ideas\\mine.py; check"):
        load_method(r"C:\ideas\mine.py:Mine")
    for name in r"C:\ideas\mine.py", r"C:\ideas\mine", "mine.py", "mine.py:", "mine.py:a b":
        with pytest.raises(UserError, match="is not known; expected dinogrl, lsmrl, or FILE"):
            load_method(name)
    if os.name != "nt":
        # A name like any other, here.
        (tmp_path / r"C:\mine.py").write_text("class Mine:\n    Options = None\n")
        assert load_method(r"C:\mine.py:Mine").__name__ == "Mine"
        assert Path(sys.modules["C:\\mine"].__file__) == tmp_path / r"C:\mine.py"
