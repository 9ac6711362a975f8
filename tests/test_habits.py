"""What contributors rely on: markers that nobody sets by hand, workflows that GitHub accepts, commands that exist."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))
TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def test_no_test_is_marked_fast_slow_or_gpu_by_hand():
    by_hand = re.compile(r"pytest\.mark\.(fast|slow|gpu)\b")
    assert not [path for path in (ROOT / "tests").rglob("*.py") if by_hand.search(path.read_text())]


def test_every_test_is_fast_or_slow(request):
    marks = [{mark.name for mark in item.iter_markers()} & {"fast", "slow"} for item in request.session.items]
    assert all(len(found) == 1 for found in marks)


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_github_accepts_the_workflow(path):
    """By the schema that check-jsonschema brings with it."""
    pytest.importorskip("check_jsonschema")
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.github-workflows", str(path)]
    found = subprocess.run(command, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout + found.stderr


def test_the_source_distribution_holds_every_folder_of_the_checkout():
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.splitlines()
    folders = {path.partition("/")[0] for path in tracked if "/" in path} - {"flowbp", "flowbp_kernels"}
    assert folders <= set(re.findall(r"^graft (\S+)$", (ROOT / "MANIFEST.in").read_text(), re.MULTILINE))


@pytest.mark.parametrize("path", [*WORKFLOWS, ROOT / ".ci/run", ROOT / "CONTRIBUTING.md"], ids=lambda path: path.name)
def test_every_target_of_make_that_is_named_exists(path):
    lines = path.read_text().replace("`", "\n")
    calls = re.findall(r"^(?:\s*- run: )?make ((?:[a-z-]+ ?)+)", lines, re.MULTILINE)
    assert {target for call in calls for target in call.split()} <= TARGETS
