"""The benchmark of whole steps: it runs on a CPU in small, and its full-size models have the published numbers of
parameters.
"""

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import train_step  # noqa: E402


def test_every_phase_of_every_case_is_measured(tmp_path, capsys):
    cases = [
        "--backbone",
        "flux.2-klein-base-4b",
        "--method",
        "flowbp-sparse",
        "leapalign",
        "--active",
        "1",
        "2",
        "--apply",
        "off",
        "on",
    ]
    sizes = ["--size", "tiny", "--tuning", "full", "--checkpointing", "on", "--steps", "4", "--repeats", "1"]
    train_step.main([*cases, *sizes, "--json", str(tmp_path / "steps.json")])
    report = json.loads((tmp_path / "steps.json").read_text())
    assert report["machine"]["versions"]["torch"] == torch.__version__ and "commit" in report["machine"]
    assert len(report["rows"]) == 2 * 2 * (2 + 1)  # LeapAlign has no num_active: one row a mode, on or off
    assert [row["apply"] for row in report["rows"]] == [False, True] * 6
    for row in report["rows"]:
        assert min(row["seconds"].values()) > 0 and sum(row["seconds"].values()) <= 1.001 * row["step_seconds"]
        assert row["seconds"].keys() == row["peak_mb"].keys() == set(train_step.PHASES)
    assert "leapalign" in capsys.readouterr().out


def test_every_switch_for_a_gpu_is_a_row_of_every_round(tmp_path, caplog):
    """On a CPU, but for the kernel that it does not have."""
    switches = [switch for switch in train_step.SWITCHES if switch != "attention-cudnn"]
    cases = ["--active", "1", "--mode", "sweep", "--checkpointing", "on", "--rounds", "2", "--switch", *switches]
    sizes = ["--size", "tiny", "--steps", "2", "--repeats", "1", "--json", str(tmp_path / "steps.json")]
    train_step.main([*cases, *sizes])
    assert "backbone.cuda_graph=true has no effect" in caplog.text
    rows = json.loads((tmp_path / "steps.json").read_text())["rows"]
    assert [row["switch"] for row in rows] == switches * 2 and all("seconds" in row for row in rows)


def test_running_out_of_memory_is_a_row_not_an_end(tmp_path, monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError("no more")

    monkeypatch.setattr("flowbp.training.trainer.backward", full)
    cases = [
        "--size",
        "tiny",
        "--active",
        "1",
        "--checkpointing",
        "off",
        "--steps",
        "2",
        "--json",
        str(tmp_path / "steps.json"),
    ]
    train_step.main(cases)
    assert [row["out_of_memory"] for row in json.loads((tmp_path / "steps.json").read_text())["rows"]] == ["sweep"] * 2


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("sd3.5-medium", 2_243_171_520),
        ("sd3.5-large", 8_056_627_520),
        ("z-image", 6_154_908_736),
        ("flux.1-dev", 11_901_408_320),
        ("flux.2-klein-base-4b", 3_875_544_576),
        ("flux.2-klein-base-9b", 9_078_581_248),
    ],
)
def test_a_full_size_backbone_has_its_published_size_and_runs(name, parameters):
    backbone = train_step.random_backbone(name, "meta", torch.bfloat16, tiny=False)
    assert sum(p.numel() for p in backbone.denoiser.parameters()) == parameters
    rows, columns = backbone.token_grid(512, 512)
    x = torch.empty(1, *backbone.latent_shape(rows, columns), device="meta")
    conditioning = backbone.encode(["a"]) | (
        {"guidance": torch.ones(1, device="meta")} if backbone.embeds_guidance else {}
    )
    assert backbone.velocity(x, torch.tensor(0.5, device="meta"), conditioning).shape == x.shape
    assert train_step.random_reward("meta", torch.bfloat16, tiny=False)(backbone.decode(x), ["a"]).shape == (1,)


def test_phases_add_up_and_see_the_memory_of_their_own_part():
    phases = train_step.MemoryPhases()
    with phases("large"):
        torch.ones(50_000_000).sum()  # 200 MB
    for _ in range(2):
        with phases("small"):
            torch.ones(1000).sum()
    assert phases.seconds.keys() == phases.peak_mb.keys() == {"large", "small"} and min(phases.seconds.values()) > 0
    assert phases.peak_mb["large"] > phases.peak_mb["small"] + 150
