"""The predicted memory of a step against what a step takes, counted in live bytes on tiny models."""

import gc
import json
import re
from pathlib import Path

import pytest
import torch
from live_phases import LivePhases, at_home, held, plain
from tiny_pipelines import TINY_PIPELINES, tiny_pipeline
from typer.testing import CliRunner

from flowbp.backbones import QUANTISERS, load_backbone
from flowbp.cli.commands import app
from flowbp.config import load
from flowbp.estimate.estimate import MARGIN, changes, estimate, quantised, suggest, without_masters
from flowbp.estimate.passes import _reward, block_bytes, reward_pass
from flowbp.presets import cards
from flowbp.runtime.embeddings import embed_once, text_encoders
from flowbp.runtime.inputs import parse_size
from flowbp.training.trainer import Trainer
from flowbp_kernels.live_bytes import LiveBytes
from flowbp_kernels.offload import Visits

RECIPES = Path(__file__).parents[1] / "docs" / "recipes.json"
CHECKPOINTED = ["memory.reward_batch=1", "memory.checkpointing=true"]


@pytest.fixture(scope="module")
def backbones(tmp_path_factory):
    """Overrides by pipeline class: tiny random pipelines at a size where activations are most of the memory."""
    folder, found = tmp_path_factory.mktemp("pipelines"), {}
    guidances = {
        "StableDiffusion3Pipeline": "scale=3.0",
        "FluxPipeline": "embedded=3.5",
        "Flux2KleinPipeline": "scale=2.0",
        "ZImagePipeline": "scale=2.0",
    }
    for name, guidance in guidances.items():
        for key, wider in {name: 1, f"wide {name}": 8}.items():
            tiny_pipeline(name, wider=wider).save_pretrained(folder / key)
            found[key] = [f"backbone.name={folder / key}", "backbone.max_sequence_length=48", f"guidance.{guidance}"]
    return found


def tiny(tmp_path, *overrides, side=128):
    sizes = [
        f"rollout.height={side}",
        f"rollout.width={side}",
        "data.batch_size=4",
        "rollout.num_steps=6",
        "steps=2",
        "evaluation=null",
        "memory.recompute=always",
    ]
    return load("demo", [f"output={tmp_path / 'run'}", *sizes, *overrides])


def needs(overrides):
    """Skip where the library of a method is not installed."""
    for override in overrides:
        if (method := override.rpartition("=")[2]) in QUANTISERS:
            pytest.importorskip(QUANTISERS[method])


def measured_peaks(trainer):
    """Of each part of the second step, which finds the optimizer's moments made."""
    trainer.optimizer.param_groups[0]["foreach"] = True  # as on a GPU
    trainer.step(0)
    gc.collect()
    with LiveBytes(held(trainer)) as live:
        trainer.phases = LivePhases(live)
        trainer.step(1)
    home = at_home(trainer.model.backbone.denoiser) if trainer.config.memory.offload else 0
    return {phase: peak - home for phase, peak in trainer.phases.peaks.items()}


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("StableDiffusion3Pipeline", []),
        ("StableDiffusion3Pipeline", ["memory.checkpointing=true", "memory.vae_checkpointing=true"]),
        ("StableDiffusion3Pipeline", ["tuning.mode=full", "memory.reward_batch=1", "data.accumulate=2"]),
        ("FluxPipeline", ["memory.reward_batch=1"]),
        ("FluxPipeline", ["memory.reward_batch=1", "memory.recompute=never"]),
        ("FluxPipeline", ["memory.reward_batch=1", "tuning.mode=full", "memory.checkpointing=true"]),
        (
            "Flux2KleinPipeline",
            ["memory.reward_batch=1", "method={name: flowbp-sparse, num_active: 4}", "memory.nodes_per_forward=2"],
        ),
        (
            "Flux2KleinPipeline",
            ["memory.reward_batch=1", "method={name: flowbp-sparse, num_active: 4}"]
            + ["memory.nodes_per_forward=2", "memory.recompute=never"],
        ),
        ("ZImagePipeline", ["memory.reward_batch=1"]),
        ("FluxPipeline", ["memory.reward_batch=1", "tuning.mode=full", "backbone.dtype=bfloat16"]),
        ("Flux2KleinPipeline", ["memory.reward_batch=1", "tuning.mode=full", "memory.recompute=never", "ema=null"]),
        ("wide FluxPipeline", ["memory.reward_batch=1", "backbone.quantise.weights=nf4"]),
        ("wide FluxPipeline", [*CHECKPOINTED, "backbone.dtype=bfloat16", "backbone.quantise.weights=nf4"]),
        ("wide FluxPipeline", [*CHECKPOINTED, "backbone.dtype=bfloat16", "backbone.quantise.weights=int8"]),
        ("wide ZImagePipeline", [*CHECKPOINTED, "backbone.quantise.weights=float8"]),
        ("wide FluxPipeline", [*CHECKPOINTED, "memory.offload=blocks"]),
        ("wide StableDiffusion3Pipeline", [*CHECKPOINTED, "memory.offload=blocks"]),
        ("wide Flux2KleinPipeline", [*CHECKPOINTED, "memory.offload=blocks", "backbone.quantise.weights=int8"]),
    ],
)
def test_the_peak_of_every_part_is_predicted_within_5_percent(name, overrides, backbones, tmp_path, capsys):
    needs(overrides)
    config = tiny(tmp_path, *backbones[name], *overrides)
    trainer = Trainer(config)
    predicted, measured = estimate(config), measured_peaks(trainer)
    ratios = {phase: predicted.peaks[phase] / peak for phase, peak in measured.items()}
    with capsys.disabled():
        shown = ", ".join(f"{phase} {ratio:.3f} of {measured[phase] / 1e6:.2f} MB" for phase, ratio in ratios.items())
        print(f"\n{name} {' '.join(overrides)}: {shown}")
    assert ratios.keys() == {"rollout", "reward", "sweep", "update"}
    assert ratios == pytest.approx(dict.fromkeys(ratios, 1.0), abs=0.05)
    assert max(predicted.peaks[phase] for phase in measured) == pytest.approx(max(measured.values()), rel=0.05)
    assert predicted.trained == sum(p.numel() for p in trainer.model.parameters.values())
    adapters = predicted.trained if config.tuning.mode == "lora" else 0
    if config.backbone.quantise is None:  # a tensor of packed weights has another number of elements
        parameters = trainer.model.backbone.denoiser.parameters()
        assert predicted.network.parameters == sum(p.numel() for p in parameters) - adapters


@pytest.mark.parametrize("name", TINY_PIPELINES)
def test_the_text_encoders_have_the_device_to_themselves(name, backbones, tmp_path, capsys):
    config = tiny(tmp_path, *backbones[name])
    backbone = load_backbone(**config.backbone.model_dump())
    predicted, parts = estimate(config).peaks["embedding"], list(backbone.pipe.components.values())
    devices = {part: [] for part in parts if isinstance(part, torch.nn.Module)}
    for part, moves in devices.items():
        part.to = lambda device, moves=moves: moves.append(str(device))
    with LiveBytes(
        t for encoder in text_encoders(backbone).values() for t in (*encoder.parameters(), *encoder.buffers())
    ) as live:
        embed_once(backbone, [f"{i} red circles" for i in range(40)], tmp_path, "cpu")
    with capsys.disabled():
        print(f"\n{name}: embedding {predicted / live.peak:.3f} of {live.peak / 1e6:.2f} MB")
    assert predicted == pytest.approx(live.peak, rel=0.05)
    assert [type(part).__name__ for part, moves in devices.items() if set(moves) == {"cpu"}] == [
        type(part).__name__ for part in devices if part not in (backbone.denoiser, backbone.pipe.vae)
    ]


@pytest.mark.parametrize(
    ("name", "override"),
    [
        ("StableDiffusion3Pipeline", "backbone.quantise.text_encoders=int8"),
        ("StableDiffusion3Pipeline", "memory.offload=blocks"),
        ("Flux2KleinPipeline", "memory.offload=blocks"),
    ],
)
def test_text_encoders_take_fewer_bytes_quantised_or_layer_by_layer(name, override, backbones, tmp_path, capsys):
    needs([override])
    config = tiny(tmp_path, *backbones[name], "memory.checkpointing=true", override)
    backbone, offload = load_backbone(**config.backbone.model_dump()), config.memory.offload is not None
    encoders = text_encoders(backbone).values()
    with LiveBytes(plain(t for encoder in encoders for t in (*encoder.parameters(), *encoder.buffers()))) as live:
        embed_once(backbone, [f"{i} red circles" for i in range(40)], tmp_path, "cpu", offload)
    measured = live.peak - (sum(map(at_home, encoders)) if offload else 0)
    predicted = estimate(config).peaks["embedding"]
    with capsys.disabled():
        print(f"\n{name} {override}: embedding {predicted / measured:.3f} of {measured / 1e6:.2f} MB")
    assert predicted == pytest.approx(measured, rel=0.05)


@pytest.mark.parametrize(
    "overrides",
    [
        ["guidance.scale=3"],
        ["guidance.scale=3", "memory.nodes_per_forward=2", "data.accumulate=2"],
        ["memory.recompute=never"],
    ],
)
def test_a_step_copies_as_many_bytes_as_predicted(overrides, tmp_path, monkeypatch):
    method = "method={name: flowbp-sparse, num_active: 3}"
    config = tiny(tmp_path, "memory.checkpointing=true", "memory.offload=blocks", method, *overrides, side=32)
    trainer, copied, fetch = Trainer(config), [], Visits._fetch

    def counted(visits, visitor):
        copied.extend({id(home): home.nbytes for _, _, home in visitor.homes}.values())  # one may have two names
        return fetch(visits, visitor)

    monkeypatch.setattr(Visits, "_fetch", counted)
    trainer.step(0)
    monkeypatch.undo()  # the estimate copies too
    found = estimate(config)
    assert sum(copied) == found.copied > 0
    assert f"{found.network.home_bytes / 1e9:.1f} GB in pinned CPU memory" in found.notes[-1]


def test_copied_gradients_are_whole_and_sharded_ones_where_backward_passes_accumulate(backbones, tmp_path):
    full = ["tuning.mode=full", *backbones["FluxPipeline"]]
    sharded = tiny(tmp_path, *full, "memory.shard=true")
    one, four, copied = estimate(sharded), estimate(sharded, 4), estimate(tiny(tmp_path, *full), 4)
    for name in ("trained weights", "optimizer", "moving average"):
        assert four.resident[name] == one.resident[name] // 4 and copied.resident[name] == one.resident[name]
    # K replays, reduced in the last
    assert four.working["gradients"] == one.working["gradients"] == copied.working["gradients"]
    assert four.working["one node's graph"] == one.working["one node's graph"]
    last_only = estimate(tiny(tmp_path, *full, "memory.shard=true", "method={name: refl, last_n: 4}"), 4)
    split = estimate(tiny(tmp_path, *full, "memory={shard: true, shard_gradients: true}"), 4)
    for each in (last_only, split):
        assert each.working["gradients"] == one.working["gradients"] // 4
        assert 0 < each.working["gradients of two blocks"] <= one.working["gradients"]
    assert four.peaks["sweep"] < one.peaks["sweep"] == copied.peaks["sweep"]
    whole, split = (
        estimate(load("flux.1-dev/flowbp-bridge", [f"memory.shard_gradients={word}"]), 8) for word in ("false", "true")
    )
    assert whole.working["gradients"] == 4 * whole.trained  # float32, where FSDP2 adds them up and reduces them
    assert split.peaks["sweep"] < 0.7 * whole.peaks["sweep"]  # 57 blocks
    (checkpoint,) = (note for note in whole.notes if "checkpoint" in note)
    gathered = 4 * whole.trained * (4 if load("flux.1-dev/flowbp-bridge").ema else 3)  # masters, moments and average
    assert checkpoint.endswith(f": {gathered / 1e9:.1f} GB")


def test_two_blocks_and_what_is_outside_of_blocks_are_gathered_at_a_time():
    class Block(torch.nn.Linear):
        pass

    blocks = [Block(size, 1, bias=False) for size in (2, 5, 3)]
    network = torch.nn.Sequential(*blocks, torch.nn.Linear(7, 1, bias=False))
    network._no_split_modules = ["Block"]
    assert block_bytes(network, lambda p: True) == 4 * (5 + 3 + 7)
    assert block_bytes(network, lambda p: p.numel() < 5) == 4 * (2 + 3)


@pytest.mark.parametrize(
    ("guidance", "memory", "calls"),
    [
        ("guidance.scale=1", "memory.recompute=always", (6, 3, 6)),
        ("guidance.scale=1", "memory.recompute=never", (6, 0, 6)),
        ("guidance.scale=1", "memory.checkpointing=true", (6, 3, 9)),
        ("guidance.scale=3", "memory.recompute=always", (12, 3, 6)),
        ("guidance={scale: 3, detach_negative: false}", "memory.recompute=always", (12, 6, 12)),
        ("guidance={scale: 3, interval: [0, 0.45]}", "memory.recompute=always", (6 + 1, 3, 6)),
    ],
)
def test_network_calls_are_those_of_the_plan(guidance, memory, calls, tmp_path):
    found = estimate(tiny(tmp_path, "method={name: flowbp-sparse, num_active: 3}", guidance, memory, side=32))
    assert tuple(found.calls.values()) == calls
    assert found.relative_cost == sum(calls) / calls[0]


def test_the_cached_rollout_is_what_the_plan_reads(tmp_path):
    found = estimate(tiny(tmp_path, "method={name: flowbp-sparse, num_active: 3}", side=32))
    # 3 nodes, noise, sample and reward input; batch of 4, float32
    assert found.working["cached rollout"] == (3 + 3) * 4 * (4 * 8 * 8 * 8)


def test_copies_are_decoded_and_scored_as_samples_are(tmp_path):
    copies, samples = (
        tiny(tmp_path, f"method={{name: draft-lv, num_renoised: {copies}}}", f"data.batch_size={batch}", side=32)
        for copies, batch in ((2, 4), (0, 12))
    )
    assert reward_pass(copies).peak_bytes == reward_pass(samples).peak_bytes > 0


def test_moments_in_8_bits_are_a_quarter_of_float32(tmp_path):
    plain, small = (
        estimate(tiny(tmp_path, f"optimizer.name={name}", side=32)).resident["optimizer"]
        for name in ("adamw", "adamw8bit")
    )
    assert plain == 4 * small > 0


@pytest.mark.parametrize("override", ["tuning.targets=[attn.to_q]", "tuning.rank=4", "tuning.mode=full"])
def test_an_estimate_is_of_the_parameters_that_its_config_trains(override, tmp_path):
    assert estimate(tiny(tmp_path, override, side=32)).trained != estimate(tiny(tmp_path, side=32)).trained


def test_a_moving_average_is_in_float32_whatever_the_network_is_in(tmp_path):
    narrow = ["tuning.mode=full", "backbone.dtype=bfloat16", "tuning.master_weights=false", "ema=0.9"]
    found = estimate(tiny(tmp_path, *narrow, side=32))
    assert found.resident["moving average"] == 4 * found.trained == 2 * found.resident["trained weights"]


@pytest.mark.parametrize("share", [0.9, 0.5, 0.3])
def test_a_suggestion_fits_and_keeps_the_samples_of_a_step(share, tmp_path):
    overrides = ["tuning.mode=full", f"output={tmp_path}", "data.batch_size=8"]
    before = load("demo", overrides)
    memory = share * estimate(before).peak
    *_, (added, processes, promised) = suggest("demo", overrides, memory)
    after = load("demo", [*overrides, *added])
    assert added and promised.fits(memory) and estimate(after, processes) == promised
    assert after.data.batch_size * after.data.accumulate == before.data.batch_size


def test_blocks_travel_before_bits_are_lost_and_with_the_largest_batch(backbones):
    saving = [*CHECKPOINTED, "memory.vae_checkpointing=true", "memory.recompute=always"]
    overrides = [*backbones["wide FluxPipeline"], *saving, "data.batch_size=4"]
    one = estimate(load("demo", [*overrides, "data.batch_size=1", "data.accumulate=4"])).peak
    memory = (one - 1) / (1 - MARGIN)  # no micro-batch fits
    *_, (added, _, found) = suggest("demo", overrides, memory)
    assert found.fits(memory) and found.config.memory.offload == "blocks" and found.config.backbone.quantise is None
    larger = [*overrides, *added, f"data.batch_size={2 * found.config.data.batch_size}"]
    assert found.config.data.batch_size == 4 or not estimate(load("demo", larger)).fits(memory)
    instead, quantised_run = quantised("demo", overrides, added, memory)
    assert "backbone.quantise.weights=int8" in instead and "memory.offload=null" in instead
    assert quantised_run.fits(memory) and quantised_run.copied == 0 < found.copied


@pytest.mark.parametrize("name", cards())
def test_a_preset_fits_its_card_and_the_pages_have_its_figures(name):
    found, memory = estimate(load(name)), parse_size(name.rpartition("/")[2])
    assert found.fits(memory) and found.peaks["embedding"] > 0 and found.config.tuning.mode == "lora"
    (row,) = (row for row in json.loads(RECIPES.read_text())["rows"] if row["name"] == name)
    assert (row["card"], row["peaks"], row["copied"]) == (memory, found.peaks, found.copied)


def test_every_batch_that_divides_a_step_is_tried_down_to_one_sample():
    tried = [change for _, change in changes(load("demo", ["data.batch_size=6", "data.accumulate=2"]))]
    expected = [[f"data.batch_size={b}", f"data.accumulate={12 // b}"] for b in (3, 2, 1)]
    assert [change for change in tried if "batch_size" in change[0] and len(change) == 2] == expected


def test_where_nothing_fits_the_smallest_found_is_told(tmp_path):
    start = ["tuning.mode=full", f"tuning.init={tmp_path}"]  # a LoRA would start elsewhere, so it is not suggested
    *_, (added, processes, smallest) = suggest("demo", [f"output={tmp_path}", *start], 1.0)
    assert not smallest.fits(1.0) and smallest.peak < estimate(load("demo", start)).peak
    assert "memory.shard=all" in added and "tuning.mode=lora" not in added and processes > 1


@pytest.mark.parametrize(
    ("text", "size"), [("24GB", 24e9), ("24 GiB", 24 * 2**30), ("80e9", 80e9), ("1.5tb", 1.5e12), ("512M", 512e6)]
)
def test_sizes_are_read(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "24", "24 apples", "0GB", "-1GB", "1.2.3GB", "nan"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(ValueError, match="write 24GB, 24GiB or 80e9"):
        parse_size(text)


def test_a_backbone_out_of_reach_says_what_is_known(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(OSError, match="architecture is known offline: sd3.5-medium"):
        estimate(tiny(tmp_path, "backbone.name=nobody/nothing"))


def test_a_reward_in_tf32_takes_the_memory_of_one_in_float32():
    clip = load("demo").reward["reward"]
    by_dtype = {dtype: _reward(clip.model_copy(update={"dtype": dtype})) for dtype in ("float32", "tf32", "bfloat16")}
    assert by_dtype["tf32"].weight_bytes == by_dtype["float32"].weight_bytes == 2 * by_dtype["bfloat16"].weight_bytes


def test_what_is_not_counted_is_said(tmp_path):
    own = estimate(tiny(tmp_path, "reward={name: 'my_module:score'}", side=32))
    assert "code of your own" in own.notes[0]
    assert "not counted" in estimate(tiny(tmp_path, "reward={name: hpsv3}", side=32)).notes[0]


@pytest.mark.parametrize(
    ("preset", "parameters"),
    [
        ("demo", 2_309_408),
        ("flux.1-dev/flowbp-bridge", 11_901_408_320),
    ],
)
def test_the_command_line_tells_peak_and_fit(preset, parameters, tmp_path):
    shown = CliRunner().invoke(
        app, ["estimate", preset, "--json", str(tmp_path / "estimate.json"), "--gpu-memory", "1TB"]
    )
    assert shown.exit_code == 0, shown.output
    found = json.loads((tmp_path / "estimate.json").read_text())
    assert found["parameters"] == parameters and found["peak"] == max(found["peaks"].values()) > 4 * found["trained"]
    assert f"{parameters:,}" in shown.output.replace("\n", "") and "fits:" in shown.output and "peak in" in shown.output


def test_where_it_does_not_fit_the_price_of_doing_without_master_weights_is_told():
    overrides = ["tuning.mode=full", "backbone.dtype=bfloat16", "optimizer.lr=1e-5"]
    shown = CliRunner().invoke(app, ["estimate", "demo", *overrides, "--gpu-memory", "30MB"])
    run = load("demo", overrides)
    whole, narrow = estimate(run), without_masters(run)
    saved = 4 * whole.trained + 2 * 2 * whole.trained  # the masters; moments in 2 bytes instead of 4
    assert sum(whole.resident.values()) - sum(narrow.resident.values()) == saved
    said = " ".join(shown.output.split())
    (price,) = re.findall(r"\(tuning.master_weights=false\) it takes ([0-9.]+) GB", said)
    assert float(price) == pytest.approx(narrow.peak / 1e9, rel=0.02) and "optimizer.lr=1e-05 round to nothing" in said
    assert not estimate(load("demo")).resident["master weights"]  # LoRA is in float32 as it is


def test_the_command_line_tells_what_travels():
    overrides = ["memory.checkpointing=true", "memory.offload=blocks", "memory.recompute=always"]
    said = " ".join(CliRunner().invoke(app, ["estimate", "demo", *overrides]).output.split())
    found = estimate(load("demo", overrides))
    assert f"copies {found.copied / 1e9:.3f} GB to the device in a step: {found.copied / 25e9:.3g} s at 25 GB/s" in said
    assert "pinned CPU memory" in said and "frozen weights" in said


def test_the_command_line_suggests_what_fits(tmp_path):
    shown = CliRunner().invoke(app, ["estimate", "demo", "--gpu-memory", "60MB"])
    assert (
        shown.exit_code == 0
        and "does not fit" in shown.output
        and "memory.vae_checkpointing=true memory.reward_batch=1" in shown.output
    )
