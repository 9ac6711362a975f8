"""Files of a stranger: what reads them runs none of their code, follows none of their links, and is not made to show or
to hold more than a run needs.
"""

import json
import re
import sys

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from typer.testing import CliRunner

from flowbp.backbones import load_backbone
from flowbp.cli import commands as cli
from flowbp.config import ConfigError, RunConfig, dump, flatten, load, loading
from flowbp.evaluation.runs import read_run
from flowbp.given import cut, find, read_text, short
from flowbp.runtime.weights import read_lora
from flowbp.shapes import PIPELINE

STRANGER = {"method": "stranger:Method", "reward": {"name": "stranger:reward"}, "output": "run"}
DEMO = yaml.safe_load(dump(load("demo")))
SMALL = ["rollout.num_steps=12", "data.batch_size=1", "evaluation.num_steps=1"]


@pytest.fixture
def strangers(tmp_path, monkeypatch):
    """Two folders of runs. Their configs name code that leaves a mark when it runs, as does a package that nobody
    named.
    """
    monkeypatch.setattr(sys, "path", [*sys.path])
    for folder in (tmp_path / "a", tmp_path / "b"):
        folder.mkdir()
        config = yaml.safe_load(dump(load("demo", SMALL))) | STRANGER
        config["evaluation"] |= {"checker": "stranger:load_checker", "monitors": {"m": {"name": "stranger:reward"}}}
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
        (folder / "metrics.jsonl").write_text('{"step": 1, "seconds": 1, "peak_mb": 1, "reward": 0.5}\n' * 2)
        for name in ("stranger", "xformers", "bitsandbytes"):
            (folder / f"{name}.py").write_text(f"open({str(tmp_path / 'mark')!r}, 'w')\n")
    yield tmp_path
    sys.modules.pop("stranger", None)


@pytest.mark.parametrize(
    ("command", "says"),
    [
        ("estimate a", "stranger:Method is code that a file names"),
        ("estimate a method=refl", "the reward stranger:reward is code of your own"),
        ("compare a b --out out", "comparison.html"),
        ("presets a", "name: stranger:Method"),
        ("sample a cat --out out.png", "wrote out.png"),
        ("export a out.safetensors", "holds no pytorch_lora_weights.safetensors"),
        ("doctor", "flowbp doctor"),
    ],
)
def test_a_command_that_reads_runs_no_code_of_a_config(command, says, strangers, monkeypatch):
    monkeypatch.chdir(strangers)
    result = CliRunner().invoke(cli.app, command.split())
    assert says in " ".join(f"{result.output} {result.exception}".split())
    assert not (strangers / "mark").exists() and str(strangers / "a") not in sys.path


def test_code_that_is_typed_or_trained_with_runs(strangers):
    with pytest.raises(ConfigError, match="cannot import the method 'stranger:Method'"):
        load(strangers / "a", ["method=stranger:Method"], run_code=False)
    (strangers / "mark").unlink()
    sys.modules.pop("stranger", None)
    with pytest.raises(ConfigError, match="cannot import the method 'stranger:Method'"):
        load(strangers / "a")
    assert (strangers / "mark").exists()
    assert find("checker", "flowbp.shapes.checker:load_checker")


def test_a_pipeline_that_brings_code_of_its_own_is_refused(strangers):
    index = json.loads((PIPELINE / "model_index.json").read_text())
    for part, value in {"transformer": ["stranger", "Network"], "vae": ["stranger", "VAE"]}.items():
        folder = strangers / part
        (folder / part).mkdir(parents=True)
        (folder / part / "stranger.py").write_text((strangers / "a" / "stranger.py").read_text())
        (folder / "model_index.json").write_text(json.dumps(index | {part: value}))
        with pytest.raises(ValueError, match=f"has code of its own for its {part}"):
            load_backbone(str(folder))
    (folder / "model_index.json").write_text(json.dumps(index | {"_class_name": ["stranger", "Pipeline"]}))
    with pytest.raises(ValueError, match="names no pipeline: .* is .'stranger', 'Pipeline'"):
        load_backbone(str(folder))
    assert not (strangers / "mark").exists()


# -- what a message shows ----------------------------------------------------------------------------------------------

LONG = "x" * 5000
KEYS = sorted(flatten(RunConfig.model_validate(DEMO).model_dump(mode="json")))
SECTIONS = [key for key, value in DEMO.items() if isinstance(value, dict)]


def with_value(key, value):
    """The demo's config with another value of `key`, as nested mappings."""
    config = json.loads(json.dumps(DEMO))
    *sections, last = key.split(".")
    section = config
    for name in sections:
        section = section.setdefault(name, {})
    section[last] = value
    return config


@pytest.mark.parametrize("key", [*KEYS, LONG, *(f"{section}.{LONG}" for section in SECTIONS)])
@pytest.mark.parametrize("value", [LONG, [[LONG] * 9] * 9], ids=["text", "list"])
def test_a_message_shows_eighty_characters_of_a_value(key, value, monkeypatch):
    monkeypatch.setattr(loading, "read", lambda name: [with_value(key, value)])
    with pytest.raises(ConfigError) as refused:
        load("config.yaml")
    assert "x" * 81 not in str(refused.value) and len(str(refused.value)) < 2000


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]\n", "an alias is not read here.*line 2"),
        ("a: &a {b: *a}\n", "an alias is not read here"),
        (f"{LONG[:900]}: 1\n{LONG[:900]}: 2\n", "stands here again"),
        (f"'{LONG}", "not valid YAML"),
        ("[" * 1000, "not valid YAML"),
        ("seed: 0x" + "f" * 6000, "seed: Input should be less than"),
        ("seed: " + "9" * 6000, "Exceeds the limit"),
        ("x" * 100_000, "longer than the 65,536 characters"),
    ],
)
def test_yaml_that_stands_for_more_than_it_is_is_refused(text, says, tmp_path):
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(ConfigError) as refused:
        load(tmp_path)
    message = str(refused.value)
    assert re.search(says, message, re.DOTALL) and "x" * 81 not in message and len(message) < 2000


VALUES = st.integers() | st.text() | st.floats()


@settings(deadline=None, max_examples=10)
@given(st.recursive(VALUES, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=9))
def test_a_short_text_of_anything_is_short(value):
    assert len(short(value)) <= 80 and len(cut(value)) <= 80
    assert len(short([value] * 9)) <= 80 and len(short(10**5000)) <= 80


@pytest.mark.parametrize("depth", [100, 1000])
def test_overrides_may_nest_as_deep_as_they_like(depth):
    for override in (f"method={'[' * depth}", f"{'a.' * depth}a=1", f"method={'{a: ' * depth}", f"seed={'9' * 5000}"):
        with pytest.raises(ConfigError) as refused:
            load("demo", [override])
        assert len(str(refused.value)) < 2000


# -- what is held ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "override",
    [
        "rollout.num_steps=1000000000",
        "rollout.height=16777216",
        "rollout.width=16777216",
        "data.batch_size=1000000000",
        "data.accumulate=1000000000000",
        "memory.nodes_per_forward=1000000000",
        "memory.reward_batch=1000000000",
        "tuning.rank=1000000000",
        "backbone.max_sequence_length=1000000000",
        "steps=1000000000000",
        "checkpoint_every=1000000000000",
        "reward.smooth={copies: 1000000000}",
        "reward.smooth={shift: 1000000000}",
        "method={name: draft-lv, num_renoised: 1000000000}",
        "method={name: flowbp-sparse, num_active: 1000000000}",
        "method={name: drtune, early_stop_steps: 1000000000}",
        "evaluation.num_steps=1000000000",
        "evaluation.samples=1000000000000",
        "evaluation.batch_size=1000000000",
        "evaluation.grid=1000000000",
        "evaluation.validation_samples=1000000000000",
    ],
)
def test_a_size_that_no_run_has_is_refused_before_it_is_allocated(override):
    with pytest.raises(ConfigError, match=r"1000000000|16777216"):
        load("demo", [override])


def test_a_file_is_read_up_to_a_size(tmp_path):
    (tmp_path / "a").write_text("äbc")
    assert read_text(tmp_path / "a", 3) == "äbc"
    with pytest.raises(ValueError, match="longer than the 2 characters"):
        read_text(tmp_path / "a", 2)


def test_a_tensor_may_not_have_a_name_that_takes_minutes_to_read(tmp_path):
    save_file({"transformer." * 10_000: torch.ones(1)}, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="a tensor's name has more than 1000"):
        read_lora(tmp_path / "a.safetensors")


# -- links and pictures ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["config.yaml", "metrics.jsonl", "environment.json", "scores_before.csv"])
def test_a_link_out_of_the_folder_of_a_run_is_refused(name, strangers):
    (strangers / "secret").write_text("secret")
    (strangers / "a" / name).unlink(missing_ok=True)
    (strangers / "a" / name).symlink_to(strangers / "secret")
    with pytest.raises(ValueError, match="is a link that leads out of"):
        read_run(strangers / "a", "a")


def test_a_page_embeds_pictures_and_nothing_else(strangers, monkeypatch):
    monkeypatch.chdir(strangers)
    picture = strangers / "a" / "samples_after.png"
    for content in (b"secret", b"\x89PNG\r\n\x1a\nsecret", b""):
        picture.write_bytes(content)
        result = CliRunner().invoke(cli.app, ["compare", "a", "b"])
        assert "is no PNG that a page can show" in str(result.exception)
    (strangers / "secret.png").write_bytes(content)
    picture.unlink()
    picture.symlink_to(strangers / "secret.png")
    result = CliRunner().invoke(cli.app, ["compare", "a", "b"])
    assert "is a link that leads out of a" in str(result.exception)


@pytest.mark.parametrize(
    "line", ["[" * 100_000, "1", "{}", '{"step": 1, "seconds": "1", "peak_mb": 1}', "{", "9" * 5000]
)
def test_metrics_that_no_run_wrote_are_refused_by_name(line, strangers):
    (strangers / "a" / "metrics.jsonl").write_text(f"{line}\n")
    with pytest.raises(OSError, match="metrics.jsonl is damaged") as raised:
        read_run(strangers / "a", "a")
    assert len(str(raised.value)) < 400
