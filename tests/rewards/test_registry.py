"""Finding rewards: local folders first, digests checked, and an error that says what to fetch and where to name it."""

import hashlib
import logging
import pickle
from pathlib import Path

import pytest
import tiny_rewards as tiny
import torch
from tiny_rewards import PROMPTS, images
from typer.testing import CliRunner

from flowbp.cli.commands import app
from flowbp.rewards import REWARDS, load_reward
from flowbp.rewards.hpsv2 import HPSv2
from flowbp.rewards.registry import HubFiles, pin
from flowbp.rewards.weights import read_state_dict


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.hpsv2_folder(tmp_path_factory.mktemp("hpsv2"))


def test_a_reward_is_loaded_from_a_local_folder_and_says_how_to_pin_it(folder, caplog):
    with caplog.at_level(logging.WARNING):
        reward = load_reward("hpsv2", str(folder))
    digest = hashlib.sha256((folder / "HPS_v2.1_compressed.pt").read_bytes()).hexdigest()
    assert (
        f"nothing pins HPS_v2.1_compressed.pt; to read the same again, put into its config  sha256: {digest}"
        in caplog.text
    )
    torch.testing.assert_close(reward(images(), PROMPTS), HPSv2(folder, folder)(images(), PROMPTS))


def test_the_digest_of_a_checkpoint_is_checked_before_it_is_read(folder, caplog):
    digest = hashlib.sha256((folder / "HPS_v2.1_compressed.pt").read_bytes()).hexdigest()
    with caplog.at_level(logging.WARNING):
        for written in (digest, digest.upper()):
            load_reward("hpsv2", str(folder), sha256=written)
    assert "pins" not in caplog.text
    with pytest.raises(ValueError, match=f"has the sha256 {digest}, not 00"):
        load_reward("hpsv2", str(folder), sha256="0" * 64)


def test_a_folder_of_the_hub_cache_is_pinned_by_its_commit():
    assert pin(Path("hub/models--a--b/snapshots/5f0e"), "model.safetensors") == "revision: 5f0e"


def test_a_revision_pins_what_the_hub_gives(folder, monkeypatch, caplog):
    asked = []
    monkeypatch.setattr("flowbp.rewards.registry.locate", lambda files: asked.append(files) or folder)
    for revision in ("5f0e", None):
        load_reward("hpsv2", "owner/name", revision=revision)
        assert ("nothing pins" in caplog.text) == (revision is None)
    assert ("owner/name", "5f0e") in [(files.repository, files.revision) for files in asked]


def test_a_digest_cannot_pin_a_checkpoint_of_several_files(tmp_path):
    with pytest.raises(ValueError, match="comes in several files, which no sha256 covers: pin it with revision="):
        load_reward("unifiedreward", str(tiny.unifiedreward_folder(tmp_path)), sha256="0" * 64)


def test_a_published_digest_is_checked_without_being_asked(tmp_path):
    tiny.clip_folder(tmp_path)
    torch.save({}, tmp_path / "sac+logos+ava1-l14-linearMSE.pth")
    with pytest.raises(ValueError, match="not 21dd590f3ccdc646"):
        load_reward("aesthetic", str(tmp_path))


def test_a_folder_that_lacks_a_file_says_which_command_fetches_it(tmp_path):
    with pytest.raises(FileNotFoundError) as error:
        load_reward("hpsv2", str(tmp_path))
    message = str(error.value)
    assert f"{tmp_path} lacks HPS_v2.1_compressed.pt, tokenizer.json" in message
    assert f"hf download xswu/HPSv2 HPS_v2.1_compressed.pt --local-dir {tmp_path}" in message
    assert f"reward: {{name: hpsv2, model: {tmp_path}}}" in message


@pytest.mark.parametrize("name", REWARDS)
def test_without_a_network_every_reward_says_what_to_fetch_and_where_to_put_it(name, monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        FileNotFoundError, match=rf"hf download (?s:.*)--local-dir rewards/{name}(?s:.*)model: rewards/{name}"
    ):
        load_reward(name)


def test_another_format_of_the_checkpoint_serves_as_well(folder, tmp_path):
    from safetensors.torch import save_file

    state = torch.load(folder / "HPS_v2.1_compressed.pt")["state_dict"]
    save_file(state, tmp_path / "HPS_v2.1_compressed.safetensors")
    tiny.eos_last(tiny.build_tokenizer()).save_pretrained(tmp_path)
    expected = load_reward("hpsv2", str(folder))(images(), PROMPTS)
    torch.testing.assert_close(load_reward("hpsv2", str(tmp_path))(images(), PROMPTS), expected)


def test_a_checkpoint_that_would_run_code_is_refused(tmp_path):
    class Malicious:
        def __reduce__(self):
            return print, ("code ran",)

    (tmp_path / "weights.pt").write_bytes(pickle.dumps(Malicious(), protocol=2))
    with pytest.raises(ValueError, match="could run code: convert it to .safetensors"):
        read_state_dict(tmp_path, "weights")


def test_an_unknown_reward_names_the_nearest():
    with pytest.raises(ValueError, match="unknown reward 'imagerewrd'; did you mean 'imagereward'"):
        load_reward("imagerewrd")


def test_patterns_and_revisions_go_into_the_download_command():
    files = HubFiles("a/b", ("model*.safetensors", "config.json"), revision="1234")
    expected = 'hf download a/b --include "model*.safetensors" --include "config.json" --revision 1234 --local-dir c'
    assert files.download_command("c") == expected


def test_the_command_line_lists_every_reward_and_how_to_fetch_one():
    cli = CliRunner()
    table = cli.invoke(app, ["rewards"], env={"COLUMNS": "200"})
    assert table.exit_code == 0 and all(name in table.output for name in REWARDS)
    assert "does not compare with the numbers that the model writes" in REWARDS["unifiedreward"].scores
    one = cli.invoke(app, ["rewards", "hpsv2"], env={"COLUMNS": "200"})
    assert one.exit_code == 0 and "hf download xswu/HPSv2" in one.output and "0.55" in one.output
    asked = cli.invoke(app, ["rewards", "hpsv3"], env={"COLUMNS": "200"})
    assert "rewards/hpsv3/instruction.txt" in asked.output and "github.com/MizzenAI/HPSv3" in asked.output
    assert isinstance(cli.invoke(app, ["rewards", "hpsvv"]).exception, ValueError)
