"""A mistake is told before the libraries of models are imported."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

# In one process, so that what one answer imported is seen by all after it.
SCRIPT = """
import json, sys
from typer.testing import CliRunner
from flowbp import cli
HEAVY = {"diffusers", "transformers", "peft", "matplotlib", "torch._dynamo"}
answers = {}
for line in json.loads(sys.argv[1]):
    result = CliRunner().invoke(cli.app, line.split("|"))
    answers[line] = str(result.exception or result.output), sorted(HEAVY & sys.modules.keys())
print(json.dumps(answers))
"""
MISTAKES = {  # a command: what the answer says
    "train|demo|output=own": "own exists and is not a run of flowbp",
    "train|demo|data.prompts=nowhere.txt": "prompt file 'nowhere.txt' does not exist",
    "train|demo|evaluation.prompts=own.py": "is of an unknown kind",
    "train|demo|backbone.name=shape": "unknown backbone 'shape'; did you mean 'shapes'?",
    "train|demo|backbone.name=own": "own holds no model_index.json",
    "train|demo|reward=own:missing": "module 'own' has no attribute 'missing'",
    "train|demo|reward=own:number": "is 3: name a function",
    "train|demo|reward=own:numbers": "must return a tensor, got a list",
    "train|demo|reward=own:constant": "does not depend on the images",
    "train|demo|reward=own:paints": "writes into the images",
    "train|demo|reward=own:raises": "raised KeyError in",
    "train|demo|evaluation.checker=own:missing": "cannot import the checker 'own:missing'",
    "train|demo|evaluation.monitors.other.name=own:numbers": "must return a tensor",
    "sample|demo|a cat|--out|nodir/x.png": "make nodir first",
    "sample|demo|a cat|--out|x.yaml": "must end in .png",
    "sample|demo|a cat|--weights|own": "own holds no pytorch_lora_weights.safetensors",
    "eval|demo|--weights|nowhere": "do not exist",
    "eval|demo|--out|own": "own holds what flowbp eval did not write",
    "compare|own|run": "own holds no config.yaml",
    "export|own|nodir/x.safetensors": "make nodir first",
    "estimate|demo|--gpu-memory|24": "'24' is no size of a GPU",
    "estimate|demo|--json|nodir/x.json": "make nodir first",
    "estimate|demo|backbone.name=own": "own holds no model_index.json",
    "plan|refl|--png|nodir/x.png": "make nodir first",
    "rewards|own:missing": "module 'own' has no attribute 'missing'",
    "rewards|shapes": "shapes is a model of the reward clip",
}
OWN = """
import torch
number = 3
weight = torch.ones(1, requires_grad=True)
def numbers(images, prompts): return [0.5 for _ in prompts]
def constant(images, prompts): return weight.expand(len(prompts))
def paints(images, prompts):
    copy = images * 1
    images.detach().zero_()
    return copy.mean((1, 2, 3))
def raises(images, prompts): return {}["score"]
"""


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mistakes")
    (folder / "own").mkdir()
    (folder / "own/thesis.txt").write_text("mine")
    (folder / "own.py").write_text(OWN)
    paths = [str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", SCRIPT, json.dumps(list(MISTAKES))]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("command", MISTAKES)
def test_a_mistake_is_told_before_the_libraries_of_models_are_imported(command, answers):
    said, heavy = answers[command]
    assert MISTAKES[command] in " ".join(said.split()) and not heavy
    assert "Traceback" not in said and "[Errno" not in said
