"""A small part of `make soak`: each kind of fault a few times, and nothing falls."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from reliability.soak import DONE, FELL

SOAK = Path(__file__).with_name("soak.py")


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """In a program of its own: forks of this one would share what other tests have started."""
    file = tmp_path_factory.mktemp("soak") / "report.json"
    command = [sys.executable, str(SOAK), "--short", "--json", str(file)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert file.exists(), done.stdout + done.stderr
    return json.loads(file.read_text())


@pytest.mark.parametrize("name", [name for name in DONE if name != "killed ranks"])  # tests/distributed kills those
def test_faults_are_made(name, report):
    assert report["counts"][name] > 0


@pytest.mark.parametrize("name", FELL)
def test_nothing_falls(name, report):
    assert not report["counts"][name], report["fallen"]
