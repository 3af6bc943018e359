"""What the README and docs/ tell to type is understood: commands, Python, links to files."""
import re
import shlex
import shutil

from lsmrl import LSMRL
from model import DinoGRL
from scripts import ROOT, TINY, TINY_LSMRL, here
from support.options import METHODS, load_method
from test_parallel import small_step

import pytest

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXTS = {page: page.read_text(encoding="utf-8").replace("\\\n", " ") for page in PAGES}
# In a line of its own, or `within a line`; after torchrun's own options.
COMMANDS = sorted({command.strip() for text in TEXTS.values() for command in re.findall(
    r"(?:python3?|torchrun .*--) (\w+\.py\b[^`\n#|]*)", text) if " --" in command})
BLOCKS = re.findall(r"```python\n(.*?)```", "".join(TEXTS.values()), re.S)
OWN_OPTIONS = {f"--{name}" for name in re.findall(r"^    (\w+): \w+ = ", "".join(BLOCKS), re.M)}


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_files_that_a_page_links_to_exist(page):
    for link in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text(encoding="utf-8")):
        assert "://" in link or (page.parent / link).exists(), link


@pytest.fixture(scope="module")
def known():
    """{script: the options that its --help lists}. Variants of compare.py and runs that evaluate.py
    and search.py load take those of train.py too."""
    def listed(*words):
        return set(re.findall(r"--[a-z][a-z0-9-]*", here(*words, "--help").stdout))

    of_train = set().union(*(listed("train.py", "--method", name) for name in METHODS))
    loading = "compare.py", "evaluate.py", "search.py"
    found = {script: of_train | listed(script) for script in loading}
    found |= {script: listed(script) for script in ("data.py", "walkers.py")}
    return found | {"train.py": of_train}


@pytest.mark.parametrize("command", COMMANDS)
def test_the_options_of_a_command_are_known(command, known):
    script, *words = shlex.split(command)
    words = [part for word in words for part in word.split()]    # of variants too
    for word in words:
        if word.startswith("--"):
            assert word.partition("=")[0] in known[script] | OWN_OPTIONS, word


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_a_method_in_the_pages_trains_and_embeds(number, tmp_path):
    """Other Python is compiled at least."""
    compile(BLOCKS[number], "a block of a page", "exec")
    names = re.findall(r"^class (\w+)\(.*(?:DinoGRL|LSMRL)\):", BLOCKS[number], re.M)
    for name in names:
        file = tmp_path / f"block_{number}.py"
        file.write_text(BLOCKS[number])
        words = {DinoGRL: TINY, LSMRL: TINY_LSMRL}
        method = load_method(f"{file}:{name}")
        base = next(base for base in words if issubclass(method, base))
        model, batch = small_step([*words[base], "--method", f"{file}:{name}"])
        losses, _ = model(*batch)
        assert sum(losses.values()).isfinite()
        assert len(model.eval().embed(*batch[:2])) == 16


def test_a_search_from_python_runs_in_another_folder(run_of, walkers, tmp_path, monkeypatch):
    [block] = [block for block in BLOCKS if "embed_images" in block]
    shutil.copytree(run_of("dinogrl"), tmp_path / "runs" / "dinogrl-walkers-1")
    places = {"unknown": "0005/ir", "day/a": "0006/rgb", "day/b": "0007/rgb"}
    for name, place in places.items():
        shutil.copytree(next((walkers / "Test" / place).iterdir()), tmp_path / name)
    monkeypatch.chdir(tmp_path)
    exec(compile(block, "footage.md", "exec"), {})
