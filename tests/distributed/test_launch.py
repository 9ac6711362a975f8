"""The launchers of several processes start `flowbp train`: N processes log the steps of one with N times the batch, and one speaks."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LAUNCHERS = {
    "torchrun": ["torch.distributed.run", "--standalone", "--nproc-per-node", "2"],
    "accelerate": ["accelerate.commands.launch", "--config_file", str(ROOT / "configs/accelerate/2-cpus.yaml"), "--main_process_port", "0"],
}


def steps(output, batch_size, launcher=()):
    command = [sys.executable, *(["-m", *launcher] if launcher else []), "-m", "flowbp", "train", "demo", "steps=2", "evaluation=null"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "FLOWBP_CACHE": str(output.parent / "cache")}
    done = subprocess.run(
        [*command, f"data.batch_size={batch_size}", f"output={output}"], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("report:") == done.stderr.count("embed: 0/") == done.stderr.count("train: 0/2") == 1
    assert "Warning" not in done.stderr
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return steps(tmp_path_factory.mktemp("alone") / "run", 8)


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS.values(), ids=LAUNCHERS)
def test_two_launched_processes_train_as_one_with_twice_the_batch(launcher, alone, tmp_path):
    for row, expected in zip(steps(tmp_path / "run", 4, launcher), alone, strict=True):
        assert row["nodes"] == expected["nodes"]
        for key in ("reward", "loss", "grad_norm"):
            assert row[key] == pytest.approx(expected[key], rel=1e-3), key  # float32 sums in another order
