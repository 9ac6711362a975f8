"""Configuration: strict, typed, and readable when it refuses."""

import pytest

from flowbp import presets
from flowbp.active_sets import DirichletPair, UniformPair
from flowbp.config import ConfigError, build_method, dump, load, parse_overrides
from flowbp.methods import METHODS, FlowBPLagrange, LeapAlign


@pytest.mark.parametrize("name", presets.names())
def test_every_preset_loads_and_its_resolved_copy_loads_back_equal(name, tmp_path):
    config = load(name)
    (tmp_path / "config.yaml").write_text(dump(config))
    assert load(tmp_path / "config.yaml") == config


@pytest.mark.parametrize("name", METHODS)
def test_every_method_is_built_by_its_name(name):
    assert build_method(name) == METHODS[name]() == build_method({"name": name})


def test_configuration_is_the_constructor():
    assert build_method({"name": "leapalign", "alpha": 0.5, "pairs": {"name": "uniform", "max_j_rev": 10}}) == LeapAlign(
        alpha=0.5, pairs=UniformPair(max_j_rev=10)
    )
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
        (["method={name: flowbp-sparse, num_activ: 3}"], "unknown FlowBPSparse key 'num_activ'; did you mean 'num_active'"),
        (["method.name=flowbp-sparse", "method.num_active=many"], "num_active = 'many'"),
        (["method={name: leapalign, pairs: unifrm}"], "unknown pair sampler 'unifrm'; did you mean 'uniform'"),
        (["method=nowhere:Method"], "cannot import method 'nowhere:Method'"),
        (["guidance.scal=2"], "unknown Guidance key 'scal'; did you mean 'scale'"),
        (["optimizer.lr=-1"], "optimizer.lr: .*greater than 0, got -1"),
        (["steps=0"], "steps: .*greater than or equal to 1, got 0"),
        (["no-equals-sign"], "must read key.path=value"),
        (["steps=["], "override 'steps=\\[': the value is not YAML"),
        (["method=json:loads"], "method: method 'json:loads' is .*: name a dataclass"),
        (["method=[1]"], r"method: \[1\] is no method: give a name"),
        (["seed=-1"], "seed: .*greater than or equal to 0, got -1"),
        (["reward.hinge=high"], "^reward.hinge: .*got 'high'"),
    ],
)
def test_bad_configuration_names_the_key_and_the_nearest_known_one(overrides, says):
    with pytest.raises(ConfigError, match=says):
        load("demo", overrides)


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
