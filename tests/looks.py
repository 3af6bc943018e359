"""Checks of the looks of this repository, for .ci/run alone: a student's change is never refused
by them. `python tests/looks.py --write` puts the line counts into the tables of files."""
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ROW = re.compile(r"^\| \[([\w/]+\.py)\]\([\w./]+\) \| (\d+) \|", re.MULTILINE)
TABLES = ROOT / "README.md", ROOT / "docs/README.md"

tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
files = [name for name in tracked.stdout.split("\n") if (ROOT / name).is_file()]
lines_of = {name: len((ROOT / name).read_text(encoding="utf-8").splitlines())
            for name in files if name.endswith(".py")}
listed = {}
for table in TABLES:
    text = table.read_text(encoding="utf-8")
    if "--write" in sys.argv:
        text = ROW.sub(lambda row: row[0].replace(f"| {row[2]} |", f"| {lines_of[row[1]]} |"), text)
        table.write_text(text, encoding="utf-8")
    listed |= {name: int(number) for name, number in ROW.findall(text)}

wrong = []
expected = {name for name in lines_of if not name.startswith(("tests/", ".ci/"))}
expected -= {"support/__init__.py"}
wrong += [f"tables of files: {name} is missing or surplus" for name in expected ^ listed.keys()]
wrong += [f"tables of files: {name} has {lines_of.get(name)} lines, not {number}"
          for name, number in listed.items() if lines_of.get(name) != number]
for page in (name for name in files if name.endswith(".md")):
    content = (ROOT / page).read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", content):
        if not (ROOT / page).parent.joinpath(target).exists():
            wrong.append(f"{page}: no file {target}")
    most = 12_000 if page == "README.md" else 8_000
    if len(content.encode()) > most and not page.startswith("assets/"):
        wrong.append(f"{page}: {len(content.encode()):,} bytes, at most {most:,}")
print("\n".join(wrong) or f"{len(files)} files look right")
sys.exit(len(wrong) > 0)
