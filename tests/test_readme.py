"""What the README says, held to."""
import json
import re

from test_scripts import ROOT, TINY, TINY_LSMRL, run, together

README = (ROOT / "README.md").read_text()


def test_ci_runs_the_readme_s_test_command():
    command = "pip install -r requirements.txt && python -m pytest"
    assert f"```\n{command}\n```" in README
    assert re.sub(r"\s-q\b", "", (ROOT / ".ci" / "run").read_text()).count(command) == 1


def test_files_and_functions_it_names_exist():
    for name in re.findall(r"\]\(([^)#]+)\)", README):
        assert (ROOT / name).exists(), name
    source = "".join(p.read_text() for p in ROOT.glob("*.py"))
    page = README.split("## The methods in two pages")[1].split("## Results")[0]
    names = re.findall(r"`([A-Za-z_.]+)`", page)
    assert len(names) > 12
    for name in names:
        assert re.search(rf"(def|class) {name.split('.')[-1]}\b", source), name


def test_the_worked_examples_run(walkers, tmp_path):
    examples = re.findall(r"```python\n(.*?)```", README, re.S)

    def follow(example):
        text, tiny, losses = example
        assert len(text.splitlines()) <= 30
        folder = tmp_path / min(losses)
        (tmp_path / f"{folder.name}.py").write_text(text)
        result = run(tmp_path / f"{folder.name}.py", "--method", "mine", "--data", walkers, "--run", folder, *tiny, env={"PYTHONPATH": str(ROOT)})
        assert result.returncode == 0, result.stderr
        line = json.loads((folder / "log.jsonl").read_text().splitlines()[0])
        assert all(line[loss] > 0 for loss in losses)

    together(follow, *zip(examples, (TINY, TINY_LSMRL[2:]), ({"centres_gait", "centres_appearance"}, {"contrast"}), strict=True))
