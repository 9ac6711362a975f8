"""Configuration: strict, typed, and readable when it refuses."""

import sys
from pathlib import Path

import pytest
import yaml

from flowbp import presets
from flowbp.active_sets import DirichletPair, UniformPair
from flowbp.config import ConfigError, build_method, changed, dump, load, parse_overrides
from flowbp.config.loading import sealed
from flowbp.methods import METHODS, FlowBPLagrange, LeapAlign
from flowbp.runtime.run_folder import RunFolder


@pytest.mark.parametrize("name", presets.names())
def test_every_preset_loads_and_its_resolved_copy_loads_back_equal(name, tmp_path):
    config = load(name)
    (tmp_path / "config.yaml").write_text(dump(config))
    assert load(tmp_path / "config.yaml") == config


@pytest.mark.parametrize("name", METHODS)
def test_every_method_is_built_by_its_name(name):
    assert build_method(name) == METHODS[name]() == build_method({"name": name})


def test_configuration_is_the_constructor():
    assert build_method(
        {"name": "leapalign", "alpha": 0.5, "pairs": {"name": "uniform", "max_j_rev": 10}}
    ) == LeapAlign(alpha=0.5, pairs=UniformPair(max_j_rev=10))
    assert build_method({"name": "flowbp-lagrange", "pairs": "dirichlet"}) == FlowBPLagrange(pairs=DirichletPair())


def test_a_method_of_ones_own_is_named_by_its_module():
    assert build_method({"name": "flowbp.methods.leapalign:LeapAlign", "alpha": 0.2}) == LeapAlign(alpha=0.2)


def test_overrides_nest_and_keep_types():
    assert parse_overrides(["method.alpha=0.3", "optimizer.lr=1e-4", "ema=null", "tuning.targets=[a, b]"]) == {
        "method": {"alpha": 0.3},
        "optimizer": {"lr": 1e-4},
        "ema": None,
        "tuning": {"targets": ["a", "b"]},
    }


def test_another_method_does_not_inherit_the_fields_of_the_preset_one():
    assert load("demo", ["method.name=refl"]).method == METHODS["refl"]()


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["stepz=3"], "unknown key 'stepz'; did you mean 'steps'"),
        (["optimizer.learning_rate=3"], "optimizer: unknown key 'learning_rate'"),
        (["method.name=flowbp-sprse"], "method: unknown method 'flowbp-sprse'; did you mean 'flowbp-sparse'"),
        (
            ["method={name: flowbp-sparse, num_activ: 3}"],
            "unknown FlowBPSparse key 'num_activ'; did you mean 'num_active'",
        ),
        (["method.name=flowbp-sparse", "method.num_active=many"], "num_active = 'many'"),
        (["method={name: leapalign, pairs: unifrm}"], "unknown pair sampler 'unifrm'; did you mean 'uniform'"),
        (["method=nowhere:Method"], "cannot import the method 'nowhere:Method'"),
        (["guidance.scal=2"], "unknown Guidance key 'scal'; did you mean 'scale'"),
        (["no-equals-sign"], "must read key.path=value"),
        (["steps=["], "override 'steps=\\[': the value is not YAML"),
        (["method=json:loads"], "method: method 'json:loads' is .*: name a dataclass"),
        (["method=[1]"], r"method: \[1\] is no method: give a name"),
        (["method={name: leapalign, pairs: 3}"], "3 is no pair sampler: give a name"),
        (["method={name: leapalign, pairs: {max_j_rev: 0}}"], "max_j_rev must be at least 1"),
        (["method.pairs.alpha=[1, 2, -3]"], "method: dirichlet alpha must be three positive numbers"),
        (["reward.nmae=clip"], "reward: unknown key 'nmae'; did you mean 'name'"),
        (["reward={name: hpsv22, model: null}"], "reward: unknown reward 'hpsv22'; did you mean 'hpsv2'"),
        (["evaluation.monitors={hps: {name: hpsv22}}"], "evaluation.monitors.hps: unknown reward 'hpsv22'"),
        (["evaluation.checker=shape"], "known: shapes, a loader of your own as module:function"),
        (["lr=1e-4"], "unknown key 'lr'; did you mean optimizer.lr?"),
        (["output=$NOWHERE/a"], "output: \\$NOWHERE/a names a user or a variable that is not known here"),
        (["steps=0300"], "override 'steps=0300': .*0300 would be read in base 60 or 8"),
        (["tuning.mode=full", "tuning.mode.rank=3"], "mode is 'full', which has no rank: give mode once"),
        (["rollout.num_steps=3000000"], "rollout.num_steps: .*less than or equal to 1000, got 3000000"),
        (["compile=inducter"], "compile: unknown compile backend 'inducter'; did you mean 'inductor'"),
    ],
)
def test_bad_configuration_names_the_key_and_the_nearest_known_one(overrides, says):
    with pytest.raises(ConfigError, match=says):
        load("demo", overrides)


NUMBERS = {  # kind: its keys, and values that are not of it
    "whole, at least 1": (
        "steps checkpoint_every rollout.num_steps data.batch_size data.accumulate memory.nodes_per_forward "
        "memory.reward_batch tuning.rank "
        "backbone.max_sequence_length evaluation.samples evaluation.batch_size evaluation.num_steps evaluation.grid "
        "evaluation.every",
        ["0", "-1", "1.5", "yes", "many"],
    ),
    "whole, at least 0": ("seed evaluation.seed optimizer.warmup", ["-1", "0.5", "no", "1e30"]),
    "a multiple of 8": ("rollout.height rollout.width", ["0", "33", ".inf"]),
    "positive": (
        "optimizer.lr optimizer.eps optimizer.max_grad_norm optimizer.max_sample_grad_norm tuning.alpha reward.weight",
        ["0", "-1", ".inf", ".nan", "yes"],
    ),
    "at least 0": ("optimizer.weight_decay memory.budget_gb guidance.scale guidance.embedded", ["-1", ".inf", ".nan"]),
    "from 0 to below 1": ("tuning.dropout", ["-.1", "1", ".nan"]),
    "between 0 and 1": ("ema", ["0", "1", ".nan"]),
    "any": ("reward.hinge method.alpha method.tau reward.smooth.noise", [".inf", ".nan", "high"]),
    "two from 0 to below 1": ("optimizer.betas", ["[2, 3]", "[0.9, .nan]", "[0.9]", "0.9"]),
}


@pytest.mark.parametrize(
    "override", [f"{key}={value}" for keys, values in NUMBERS.values() for key in keys.split() for value in values]
)
def test_a_number_that_cannot_be_meant_is_refused_where_the_config_is_read(override):
    with pytest.raises(ConfigError) as refusal:
        load("demo", [override])
    assert all(part in str(refusal.value) for part in override.partition("=")[0].split("."))


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["memory.budget_gb=3"], "memory: budget_gb=3.0 needs recompute=auto, not never"),
        (["tuning.mode=full", "tuning.dropout=0.1"], "tuning: dropout=0.1 is a setting of LoRA: leave it out"),
        (["tuning.mode=full", "tuning.targets=[to_q]"], "is a setting of LoRA"),
        (["tuning.targets=[]"], "tuning.targets: .*at least 1 item"),
        (["evaluation.validation_prompts=dev.txt"], "validation_prompts=dev.txt needs every"),
        (["evaluation.best=monitor"], "best=monitor needs every"),
        (["evaluation.every=1", "evaluation.patience=2"], "patience=2 needs best"),
        (
            ["backbone.name=flux.1-dev", "rollout.height=520"],
            "draws images whose sides are multiples of 16 pixels, not 520 x 32",
        ),
        (
            ["reward={name: 'module:function', model: here}"],
            "module:function is code of your own: model, .* are not for it",
        ),
        (["reward.sha256=abc"], "reward.sha256: .*got 'abc'"),
        (["reward={diversity: {model: shapes}}"], "^'diversity' names two metrics"),
        (["reward={monitor: {model: shapes}}"], "^'monitor' names two metrics"),
        (["reward={sweep_seconds: {model: shapes}}"], "^'sweep_seconds' names two metrics"),
        (["reward={a/b: {model: shapes}}"], "reward.a/b"),
        (["reward={}"], "reward: .*at least 1 item"),
        (
            ["method={name: flowbp-sparse, num_active: 13}"],
            r"with rollout.num_steps=12: num_active must lie in \[1, 12\]",
        ),
        (
            ["method={name: refl}", "rollout.num_steps=8"],
            r"^method refl with rollout.num_steps=8: last_n must lie in \[1, 8\].* got 11",
        ),
        (["method={name: flowbp-bridge, num_active: 1}"], r"a bridge needs num_active in \[2, 12\]"),
        (["method.alpha=2"], r"bridge alpha must lie in \[0, 1\], got 2.0"),
        (["method.rescale=-1"], "rescale must be a finite number of 0 or more, got -1.0"),
        (["method.max_dj=-1"], "similarity max_dj must be positive"),
        (["method.active=none"], "no node of .* has a gradient weight"),
    ],
)
def test_settings_that_contradict_each_other_are_refused_where_the_config_is_read(overrides, says):
    with pytest.raises(ConfigError, match=says):
        load("demo", overrides)


def test_the_fields_of_a_pair_sampler_go_to_the_method_s_own_when_none_is_named():
    assert load("demo", ["method.pairs.max_j_rev=4"]).method.pairs == DirichletPair(max_j_rev=4)


def test_an_unknown_preset_names_the_known_ones():
    with pytest.raises(ConfigError, match="no config file 'dem', and unknown preset 'dem'; did you mean 'demo'"):
        load("dem")


def test_a_broken_file_says_so(tmp_path):
    (tmp_path / "broken.yaml").write_text("steps: [1")
    with pytest.raises(ConfigError, match="not valid YAML"):
        load(tmp_path / "broken.yaml")
    (tmp_path / "list.yaml").write_text("- 1")
    with pytest.raises(ConfigError, match="must hold a mapping"):
        load(tmp_path / "list.yaml")


def test_classes_and_functions_of_your_own_are_found_beside_the_config_and_in_the_working_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [place for place in sys.path if place])  # as a console script has it
    for folder, module in ((tmp_path / "here", "found_here"), (tmp_path / "beside", "found_beside")):
        folder.mkdir()
        (folder / f"{module}.py").write_text("from flowbp.methods import ReFL\nclass Mine(ReFL):\n    pass\n")
    config = tmp_path / "beside" / "run.yaml"
    config.write_text(dump(load("demo")))
    monkeypatch.chdir(tmp_path / "here")
    for module in ("found_here", "found_beside"):
        assert type(load(config, [f"method={module}:Mine"]).method).__module__ == module
    assert sys.path.index(str(tmp_path / "here")) < sys.path.index(str(tmp_path / "beside"))  # the first one found wins
    with pytest.raises(ConfigError, match=f"No module named 'found_nowhere'; modules are searched in {tmp_path}/here"):
        load(config, ["method=found_nowhere:Mine"])


@pytest.mark.parametrize(
    "overrides",
    [["method=leapalign", "method.alpha=0.3"], ["method.alpha=0.3", "method=leapalign"]],
)
def test_a_name_and_fields_of_it_are_one_mapping_in_any_order(overrides):
    assert load("demo", overrides).method == LeapAlign(alpha=0.3)


def test_a_file_is_read_as_it_is_meant_or_refused_with_its_line(tmp_path):
    whole = dump(load("demo"))
    for text, says in {
        whole + "\nseed: 3\n": "the key 'seed' stands here again",
        whole.replace("seed: 42", "seed: 0300"): "0300 would be read in base 60 or 8",
        whole.replace("seed: 42", "seed: 1:30"): "1:30 would be read in base 60 or 8",
        "[" * 5000: "recursion",
    }.items():
        (tmp_path / "run.yaml").write_text(text)
        with pytest.raises(ConfigError, match=f"run.yaml is not valid YAML.*{says}"):
            load(tmp_path / "run.yaml")
    (tmp_path / "run.yaml").write_text(whole.replace("seed: 42", "seed: 42  # é"), encoding="utf-8")
    assert load(tmp_path / "run.yaml").seed == 42


def test_a_key_that_one_of_two_configs_lacks_is_a_difference():
    before, after = {"a": 1, "b": {"c": 2, "d": 3}}, {"a": 1, "b": {"d": 4}, "e": 5}
    assert changed(before, after) == {"b.c": (2, None), "b.d": (3, 4), "e": (None, 5)}


@pytest.mark.parametrize(("written", "read"), [("true", "all"), ("all", "all"), ("node", "node"), ("false", False)])
def test_weights_are_sharded_over_all_processes_or_over_a_node(written, read):
    assert load("demo", [f"memory.shard={written}"]).memory.shard == read


@pytest.mark.parametrize(("was", "now"), [(True, "all"), (False, "false")])
def test_a_run_that_was_told_only_whether_to_shard_goes_on(was, now, tmp_path):
    run, config = tmp_path / "run", load("demo", [f"output={tmp_path / 'run'}", f"memory.shard={now}"])
    old = config.model_dump(mode="json")
    old["memory"] = {key: value for key, value in old["memory"].items() if key != "gather"} | {"shard": was}
    run.mkdir()
    (run / "config.yaml").write_text(yaml.safe_dump(old))
    (run / "metrics.jsonl").write_text("")
    assert load(run) == config
    RunFolder(run).check(config, resume=True, overwrite=False)
    other = load(run, ["memory.shard=node"])
    with pytest.raises(ValueError, match="changes memory.shard from (all|False) to node"):
        RunFolder(run).check(other, resume=True, overwrite=False)


def test_paths_know_the_home_folder_and_variables(monkeypatch):
    monkeypatch.setenv("HOME", "/home/somebody")
    monkeypatch.setenv("RUNS", "/data/runs")
    config = load("demo", ["output=$RUNS/a", "data.cache=~/cache", "backbone.name=${RUNS}/model"])
    found = str(config.output), str(config.data.cache), config.backbone.name
    assert found == ("/data/runs/a", "/home/somebody/cache", "/data/runs/model")


def test_relative_paths_of_a_stored_config_mean_the_same_from_any_folder(tmp_path, monkeypatch):
    (tmp_path / "here" / "shapes").mkdir(parents=True)  # a name of the embedded model, whatever lies there
    (tmp_path / "here" / "prompts.txt").write_text("a red circle\n")
    monkeypatch.chdir(tmp_path / "here")
    given = ["data.prompts=prompts.txt", "data.cache=cache", "evaluation.prompts=./prompts.txt", "output=out"]
    config = load("demo", given)
    (tmp_path / "config.yaml").write_text(dump(config))
    monkeypatch.chdir(tmp_path)
    again = load(tmp_path / "config.yaml")
    assert again == config and again.backbone.name == "shapes" and again.output == Path("out")
    here = tmp_path / "here"
    assert again.data.prompts == again.evaluation.prompts == str(here / "prompts.txt")
    assert again.data.cache == here / "cache"
    assert load("demo", ["data.prompts=nowhere.txt"]).data.prompts == "nowhere.txt"


def test_a_config_that_changed_since_its_run_wrote_it_is_refused(tmp_path):
    file, text = tmp_path / "config.yaml", sealed(dump(load("demo")))
    file.write_text(text)
    assert load(file) == load("demo")
    file.write_text(text.replace("seed: 42", "seed: 43"))
    with pytest.raises(ConfigError, match="config.yaml has changed since its run wrote it: .* delete its first line"):
        load(file)
    file.write_text(file.read_text().partition("\n")[2])
    assert load(file).seed == 43
