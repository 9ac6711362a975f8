"""A mistake is told before torch and the libraries of models are imported."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._dynamo import register_backend
from torch._dynamo.backends.registry import lookup_backend

from flowbp.config import ConfigError
from flowbp.config.values import BACKENDS, known_backend

# In one process, so that what one answer imported is seen by all after it.
SCRIPT = """
import json, sys
from typer.testing import CliRunner
from flowbp.cli import commands as cli
sys.modules["bitsandbytes"] = None  # as where it is not installed
HEAVY = {"torch", "accelerate", "diffusers", "transformers", "peft", "matplotlib", "torch._dynamo"}
answers = {}
for line in json.loads(sys.argv[1]):
    result = CliRunner().invoke(cli.app, line.split("|"))
    answers[line] = str(result.exception or result.output), sorted(HEAVY & sys.modules.keys())
print(json.dumps(answers))
"""
WITHOUT_TORCH = {  # a command: what the answer says
    "train|demo|optimizer.lr=-1": "optimizer.lr: Input should be greater than 0",
    "train|demo|compile=inductr": "unknown compile backend 'inductr'; did you mean 'inductor'?",
    "sweep|demo|optimizer.lr=-1,2": "optimizer.lr: Input should be greater than 0",
    "sweep|demo|seeds=a": "seeds=a names no seed",
    "train|demo|guidance.scale=-1": "guidance scale must be a finite number",
    "train|demo|reward.smooth.copies=0": "smoothing needs 1 to 1000 copies",
    "train|demo|reward.name=hpsv": "unknown reward 'hpsv'",
    "train|demo|optimizer.name=adamw8bit": "optimizer.name=adamw8bit: no bitsandbytes here",
    "train|demo|output=own.py/run": "own.py/run cannot be made (Not a directory): choose another output=",
    "train|demo|output=own": "own exists and is not a run of flowbp",
    "train|demo|data.prompts=nowhere.txt": "prompt file 'nowhere.txt' does not exist",
    "train|demo|evaluation.prompts=own.py": "is of an unknown kind",
    "train|demo|reward=nowhere:missing": "No module named 'nowhere'",
    "sample|demo|a cat|--out|nodir/x.png": "make nodir first",
    "sample|demo|a cat|--out|x.yaml": "must end in .png",
    "eval|demo|evaluation=null": "this config has no evaluation",
    "eval|demo|optimizer.lr=-1": "optimizer.lr: Input should be greater than 0",
    "eval|demo|--out|own": "own holds what flowbp eval did not write",
    "compare|own": "a comparison needs two runs or more, got 1",
    "compare|own|own": "a run is compared with itself: own",
    "compare|own|run": "own holds no config.yaml",
    "export|own|nodir/x.safetensors": "make nodir first",
    "estimate|demo|--gpu-memory|24": "'24' is no size of a GPU",
    "estimate|demo|--json|nodir/x.json": "make nodir first",
    "estimate|demo|optimizer.lr=-1": "optimizer.lr: Input should be greater than 0",
    "plan|refl|--png|nodir/x.png": "make nodir first",
    "rewards|nowhere:missing": "No module named 'nowhere'",
    "rewards|shapes": "shapes is a model of the reward clip",
}
OWN_CODE = {  # which imports torch
    "train|demo|reward=own:missing": "module 'own' has no attribute 'missing'",
    "train|demo|reward=own:number": "is 3: name a function",
    "train|demo|reward=own:numbers": "must return a tensor, got a list",
    "train|demo|reward=own:constant": "does not depend on the images",
    "train|demo|reward=own:paints": "writes into the images",
    "train|demo|reward=own:raises": "raised KeyError in",
    "train|demo|evaluation.checker=own:missing": "cannot import the checker 'own:missing'",
    "train|demo|evaluation.monitors.other.name=own:numbers": "must return a tensor",
    "rewards|own:missing": "module 'own' has no attribute 'missing'",
}
OF_MODELS = {
    "train|demo|backbone.name=shape": "unknown backbone 'shape'; did you mean 'shapes'?",
    "train|demo|backbone.name=own": "own holds no model_index.json",
    "sample|demo|a cat|--weights|own": "own holds no pytorch_lora_weights.safetensors",
    "eval|demo|--weights|nowhere": "nowhere holds no pytorch_lora_weights.safetensors",
    "eval|demo|--weights|six=out/num_steps=6": "out/num_steps=6 holds no pytorch_lora_weights.safetensors",
    "estimate|demo|backbone.name=own": "own holds no model_index.json",
}
MISTAKES = WITHOUT_TORCH | OWN_CODE | OF_MODELS
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
    assert not (folder / "runs").exists()
    return json.loads(done.stdout)


@pytest.mark.parametrize("command", MISTAKES)
def test_a_mistake_is_told_before_the_libraries_of_models_are_imported(command, answers):
    said, heavy = answers[command]
    allowed = set() if command in WITHOUT_TORCH else {"torch", "accelerate"}
    assert MISTAKES[command] in " ".join(said.split()) and set(heavy) <= allowed
    assert "Traceback" not in said and "[Errno" not in said


def test_every_preset_is_read_without_torch():
    script = """
import sys
from flowbp import presets
from flowbp.config import dump, load
for name in presets.names():
    dump(load(name))
load("demo", ["compile=inductor"])
assert "numpy" in sys.modules and not {"torch", "accelerate", "diffusers", "transformers"} & sys.modules.keys()
"""
    subprocess.run([sys.executable, "-c", script], check=True)


def test_every_backend_of_torch_is_known_before_torch_is_imported():
    registered = torch.compiler.list_backends(exclude_tags=None)  # by torch, and by tests that ran before
    own = {name for name in registered if lookup_backend(name).__module__.startswith("torch.")}
    assert own - set(BACKENDS) == {name for name in own if name.endswith("TESTING_ONLY")}


def test_a_backend_of_ones_own_is_known_where_it_is_registered():
    with pytest.raises(ConfigError, match="unknown compile backend 'mine'"):
        known_backend("mine")
    register_backend(lambda graph, inputs: graph.forward, name="mine")
    assert known_backend("mine") == "mine"
