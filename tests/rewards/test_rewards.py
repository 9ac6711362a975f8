"""Every reward: its score by an independent formula, its gradient by finite differences, and what holds for all of
them.
"""

import re

import pytest
import tiny_rewards as tiny
import torch
from safetensors.torch import load_file
from tiny_rewards import PROMPTS, images
from transformers import CLIPTokenizer

from flowbp.rewards import ImageEncoder, load_reward
from flowbp.rewards.clip import CLIPReward, PickScore
from flowbp.rewards.hpsv2 import HPSv2, clean, clip_from_open_clip
from flowbp.rewards.preprocessing import fit_long_side, normalise
from flowbp.rewards.qwen import instruction, patchify, smart_size


@pytest.fixture
def reward(request, folders):
    return lambda **options: load_reward(request.param, str(folders[request.param]), **options)


every_reward = pytest.mark.parametrize("reward", tiny.FOLDERS, indirect=True)


# -- what holds for all ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reward", "h", "tolerance"),
    # Qwen computes in float32.
    [(name, 1e-2, 1e-3) if name in ("hpsv3", "unifiedreward") else (name, 1e-5, 1e-5) for name in tiny.FOLDERS],
    indirect=["reward"],
)
def test_the_gradient_equals_finite_differences_down_to_the_pixels(reward, h, tolerance):
    reward = reward(dtype="float64")
    x = images(dtype=torch.float64).requires_grad_()
    scores = reward(x, PROMPTS)
    (g,) = torch.autograd.grad(scores.sum(), x)
    assert scores.shape == (2,) and g.abs().amax(dim=(1, 2, 3)).min() > 0
    direction = g / g.norm()
    with torch.no_grad():
        slope = (reward(x + h * direction, PROMPTS) - reward(x - h * direction, PROMPTS)).sum() / (2 * h)
    assert slope.item() == pytest.approx(g.norm().item(), rel=tolerance)


@every_reward
def test_a_score_does_not_depend_on_its_batch(reward):
    reward = reward(dtype="float64")
    x = images(dtype=torch.float64)
    together = reward(x, PROMPTS)
    for i in (0, 1):
        torch.testing.assert_close(reward(x[i : i + 1], PROMPTS[i : i + 1])[0], together[i], rtol=1e-10, atol=1e-10)
    assert together[0] != together[1]


@every_reward
def test_bfloat16_weights_give_nearly_the_same_float32_score(reward):
    exact, rough = reward()(images(), PROMPTS), reward(dtype="bfloat16")(images(), PROMPTS)
    assert exact.dtype == rough.dtype == torch.float32
    torch.testing.assert_close(rough, exact, rtol=0.05, atol=0.05)


def test_the_temperature_of_pickscore_is_not_rounded_with_its_weights(folders):
    cosine, score = (
        load_reward(name, str(folders["pickscore"]), dtype="bfloat16")(images(), PROMPTS)
        for name in ("clip", "pickscore")
    )
    exact = load_file(folders["pickscore"] / "model.safetensors")["logit_scale"].exp()
    assert exact.bfloat16() != exact
    torch.testing.assert_close(score, exact * cosine, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", ["clip", "pickscore", "hpsv2", "aesthetic"])
def test_rewards_of_the_clip_class_embed_images(name, folders):
    reward, x = load_reward(name, str(folders[name]), dtype="bfloat16"), images()
    embedded = reward.embed(x)
    assert isinstance(reward, ImageEncoder) and embedded.dtype == torch.float32
    torch.testing.assert_close(embedded.norm(dim=1), torch.ones(2))
    torch.testing.assert_close(reward.embed(x.flip(0))[0], embedded[1], rtol=0, atol=1e-2)
    assert not embedded[0].equal(embedded[1])


@every_reward
def test_no_weight_of_a_reward_is_trainable(reward):
    modules = [value for value in vars(reward()).values() if isinstance(value, torch.nn.Module)]
    assert modules and not any(p.requires_grad or m.training for m in modules for p in m.parameters())


# -- each by an independent formula ------------------------------------------------------------------------------------


def test_clip_reward_is_the_cosine_that_transformers_own_processor_and_model_give(folders):
    from transformers import CLIPImageProcessor, CLIPModel

    x = images(28, 28)
    folder = folders["clip"]
    model = CLIPModel.from_pretrained(folder)
    tokens = CLIPTokenizer.from_pretrained(folder)(PROMPTS, padding=True, truncation=True, return_tensors="pt")
    eight_bit = [(image * 255).round().byte().permute(1, 2, 0).numpy() for image in x]
    pixels = CLIPImageProcessor.from_pretrained(folder)(eight_bit, return_tensors="pt").pixel_values
    expected = model(**tokens, pixel_values=pixels).logits_per_image.diagonal()
    scale = model.logit_scale.exp()
    # The processor rounds x to 8 bits.
    torch.testing.assert_close(CLIPReward(folder)(x, PROMPTS), expected / scale, rtol=0, atol=5e-3)
    torch.testing.assert_close(PickScore(folder)(x, PROMPTS), CLIPReward(folder)(x, PROMPTS) * scale)


def test_hpsv2_equals_the_open_clip_model_whose_weights_it_reads(folders):
    tokenizer = tiny.eos_last(tiny.build_tokenizer())
    model = tiny.randomise(tiny.OpenCLIP(len(tokenizer)))
    tokens = tokenizer(PROMPTS, padding="max_length", truncation=True, return_tensors="pt")
    last = tokens.attention_mask.sum(dim=1) - 1
    ids = tokens.input_ids * tokens.attention_mask  # open_clip pads with 0, transformers with the end token
    x = images(40, 30)
    expected = model.score(normalise(fit_long_side(x, 28)), ids, last)
    torch.testing.assert_close(HPSv2(folders["hpsv2"], folders["hpsv2"])(x, PROMPTS), expected, rtol=0, atol=1e-6)


# Of CLIP's vocabulary, the merges that the odd prompts below take, in their order, and the tokens that remain.
MERGES = """i+n o+n</w> a+l e+r</w> a+t</w> e+l s+i '+s</w> e+n</w> g+h p+p gh+t</w> p+e o+p h+i n+i a+f in+e</w> â+Ģ
si+g ni+ght</w> âĢ+¦</w> s+al op+en</w> sig+n</w> c+at</w> pp+er</w> c+af f+ine</w> ã+Ĥ Ã+©</w> el+d</w>
sal+t</w> k+night</w> pe+pper</w> â+Ħ m+at</w> âĦ+¢</w> caf+Ã©</w> '+"</w> Â+º</w> Â+½</w> Â+²</w>"""
TOKENS = {
    'n': 77, '"</w>': 257, '&</w>': 261, ',</w>': 267, '5</w>': 276, '6</w>': 277, '<</w>': 283, 'a</w>': 320,
    'x</w>': 343, '¬</w>': 361, 'on</w>': 525, "'s</w>": 568, 'hi': 677, 'âĢ¦</w>': 959, 'open</w>': 1488,
    'sign</w>': 2292, 'cat</w>': 2368, 'fine</w>': 3797, 'ãĤ': 3909, 'eld</w>': 5684, 'salt</w>': 6611,
    'knight</w>': 7355, 'pepper</w>': 8253, 'mat</w>': 9063, 'âĦ¢</w>': 11675, 'cafÃ©</w>': 15304, '\'"</w>': 19479,
    'Âº</w>': 28059, 'Â½</w>': 33613, 'Â²</w>': 41175, '<|startoftext|>': 49406, '<|endoftext|>': 49407,
}  # fmt: skip


@pytest.fixture(scope="module")
def clips_tokenizer():
    """CLIP's own tokens for the odd prompts; pieces of them that no prompt keeps have ids above."""
    merges = [tuple(pair.split("+")) for pair in MERGES.split()]
    pieces = {piece for pair in merges for piece in (*pair, "".join(pair))} - TOKENS.keys()
    vocab = TOKENS | {piece: 50000 + i for i, piece in enumerate(sorted(pieces))}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=77)


@pytest.mark.parametrize(
    # What ftfy 6.3.1, html.unescape and the white-space rule of hpsv2's tokenizer make of it; and the ids that
    # open_clip's `SimpleTokenizer`, as hpsv2 1.2.0 ships it, gives between those of start and end.
    ("prompt", "read", "ids"),
    [
        ("salt &amp;amp; pepper, 5 &lt; 6", "salt & pepper, 5 < 6", [6611, 261, 8253, 267, 276, 283, 277]),
        (
            "\u201ca knight\u2019s \u2018shield\u2019\u201d",
            "\"a knight's 'shield'\"",
            [257, 320, 7355, 568, 568, 677, 5684, 19479],
        ),
        ("a sign, &ldquo;open&rdquo;", 'a sign, "open"', [320, 2292, 267, 257, 1488, 257]),
        (
            "\uff21 \uff43\uff41\uff54\uff0c \ufb01ne \uff76\uff9e",
            "A cat, fine \u30ac",
            [320, 2368, 267, 3797, 3909, 361],
        ),
        (" a\u00a0cat\n\ton\u3000a  mat ", "a cat on a mat", [320, 2368, 525, 320, 9063]),
        (  # What it leaves as it is, and NFKC would not.
            "\u00bd a caf\u00e9\u2026 x\u00b2 \u2122 n\u00ba 5",
            "\u00bd a caf\u00e9\u2026 x\u00b2 \u2122 n\u00ba 5",
            [33613, 320, 15304, 959, 343, 41175, 11675, 77, 28059, 276],
        ),
    ],
)
def test_hpsv2_reads_an_odd_prompt_as_its_own_tokenizer_does(prompt, read, ids, folders, clips_tokenizer):
    assert clean(prompt) == read
    assert clips_tokenizer(clean(prompt)).input_ids == [49406, *ids, 49407]
    reward = HPSv2(folders["hpsv2"], folders["hpsv2"])
    odd, x = ["a red&nbsp;circle", "two blue\u3000 stars and a green \uff53\uff51\uff55\uff41\uff52\uff45"], images()
    assert torch.equal(reward(x, odd), reward(x, PROMPTS))


@pytest.mark.parametrize(
    ("name", "left"), [("clip", 1), ("pickscore", 1), ("hpsv2", None), ("aesthetic", 2), ("imagereward", 2)]
)
def test_a_picture_is_cropped_where_the_published_code_crops_it(name, left, folders):
    """31 - 28 = 3 columns: torchvision takes 2 off the left (LAION, ImageReward), CLIPImageProcessor 1."""
    reward, x = load_reward(name, str(folders[name])), images(28, 31)
    for offset in (0, 1, 2, 3):
        same = torch.equal(reward(x, PROMPTS), reward(x[..., offset : offset + 28], PROMPTS))
        assert same == (offset == left)


def test_the_aesthetic_rating_is_a_linear_function_of_the_unit_image_embedding(folders):
    from transformers import CLIPModel

    folder, x = folders["aesthetic"], images(28, 28)
    embedding = CLIPModel.from_pretrained(folder).get_image_features(pixel_values=normalise(x)).pooler_output
    weights = load_file(folder / "sac+logos+ava1-l14-linearMSE.safetensors")
    expected = tiny.rate(weights, embedding / embedding.norm(dim=-1, keepdim=True))
    torch.testing.assert_close(load_reward("aesthetic", str(folder))(x, PROMPTS), expected, rtol=1e-5, atol=1e-5)


def test_imagereward_equals_the_blip_model_whose_weights_it_reads(folders):
    tokenizer = tiny.bert_tokenizer()
    tokens = tokenizer(PROMPTS, padding="max_length", max_length=35, return_tensors="pt")
    x = images(28, 28)
    expected = tiny.BLIP(len(tokenizer)).score(normalise(x), tokens.input_ids, tokens.attention_mask)
    torch.testing.assert_close(
        load_reward("imagereward", str(folders["imagereward"]))(x, PROMPTS), expected, rtol=0, atol=2e-6
    )


def test_hpsv2_sees_the_ends_of_a_wide_picture(folders):
    x = images(20, 60).requires_grad_()
    (g,) = torch.autograd.grad(HPSv2(folders["hpsv2"], folders["hpsv2"])(x, PROMPTS).sum(), x)
    assert g[..., :5].abs().max() > 0 and g[..., -5:].abs().max() > 0
    (g,) = torch.autograd.grad(CLIPReward(folders["clip"])(x, PROMPTS).sum(), x)
    assert g[..., :5].abs().max() == 0, "CLIP's own transform crops them away"


def test_patches_are_those_of_qwens_own_processor():
    from transformers import Qwen2VLImageProcessor

    x = (images(56, 84) * 255).round() / 255
    pictures = [(image * 255).round().byte().permute(1, 2, 0).numpy() for image in x]
    expected = Qwen2VLImageProcessor()(pictures, return_tensors="pt")
    patches, grid = patchify(normalise(x))
    torch.testing.assert_close(patches, expected.pixel_values, rtol=0, atol=1e-5)
    assert torch.equal(grid, expected.image_grid_thw)


@pytest.mark.parametrize("size", [(512, 512), (720, 1280), (832, 1216), (1216, 832), (300, 100), (30, 2000)])
@pytest.mark.parametrize("pixels", [(56 * 56, 28 * 28 * 1280), (256 * 28 * 28, 256 * 28 * 28)])
def test_the_size_of_a_picture_is_that_of_qwens_own_processor(size, pixels):
    from transformers import Qwen2VLImageProcessor

    processor = Qwen2VLImageProcessor(min_pixels=pixels[0], max_pixels=pixels[1])
    grid = processor([torch.zeros(*size, 3, dtype=torch.uint8).numpy()], return_tensors="pt").image_grid_thw
    assert [14 * int(n) for n in grid[0, 1:]] == list(smart_size(*size, *pixels))


def test_hpsv3_reads_the_head_at_its_token_with_positions_that_count_up(folders):
    from transformers import AutoTokenizer, Qwen2VLConfig, Qwen2VLForConditionalGeneration

    folder, x = folders["hpsv3"], images(56, 84)
    state = load_file(folder / "HPSv3.safetensors")
    head = {key: state.pop(key) for key in list(state) if key.startswith("rm_head.")}
    config = Qwen2VLConfig.from_pretrained(folder)
    config.text_config.vocab_size += 1
    model = Qwen2VLForConditionalGeneration(config).eval()
    model.load_state_dict(
        {re.sub(r"^(visual)", r"model.\1", re.sub(r"^model", "model.language_model", k)): v for k, v in state.items()}
    )
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<|Reward|>"], special_tokens=True)
    patches, grid = patchify(normalise(x))
    for i, prompt in enumerate(PROMPTS):
        image = f"<|vision_start|>{'<|image_pad|>' * 6}<|vision_end|>"
        turn = f"<|im_start|>user\n{image}Rate {prompt}: <|Reward|> END<|im_end|>\n"
        text = f"<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{turn}<|im_start|>assistant\n"
        ids = tokenizer(text, return_tensors="pt").input_ids
        positions = torch.arange(ids.shape[1]).expand(3, 1, -1)
        pixels = patches.chunk(2)[i]
        hidden = model.model(
            input_ids=ids, pixel_values=pixels, image_grid_thw=grid[:1], position_ids=positions
        ).last_hidden_state
        y = hidden[ids == len(tokenizer) - 1]
        for place in (0, 3, 5):
            y = y @ head[f"rm_head.{place}.weight"].T + head[f"rm_head.{place}.bias"]
            y = y if place == 5 else y.relu()
        score = load_reward("hpsv3", str(folder), dtype="float32")(x, PROMPTS)[i]
        torch.testing.assert_close(score, y[0, 0], rtol=1e-5, atol=1e-5)


def test_unifiedreward_is_the_expected_digit_of_the_models_own_logits(folders):
    from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration

    folder, x = folders["unifiedreward"], images(56, 84)
    model, tokenizer = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    patches, grid = patchify(normalise(x))
    for i, prompt in enumerate(PROMPTS):
        turn = f"<|im_start|>user\n<|vision_start|>{'<|image_pad|>' * 6}<|vision_end|>Rate {prompt}<|im_end|>\n"
        start = f"<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{turn}<|im_start|>assistant\n"
        ids = tokenizer(start + "Alignment Score (1-5): ", return_tensors="pt").input_ids
        kinds = (ids == model.config.image_token_id).int()
        logits = model(
            input_ids=ids, pixel_values=patches.chunk(2)[i], image_grid_thw=grid[:1], mm_token_type_ids=kinds
        ).logits[0, -1]
        p = logits[[tokenizer.convert_tokens_to_ids(d) for d in "12345"]].softmax(0)
        expected = sum((d + 1) * p[d] for d in range(5))
        score = load_reward("unifiedreward", str(folder), dtype="float32")(x, PROMPTS)[i]
        torch.testing.assert_close(score, expected, rtol=1e-5, atol=1e-5)


def test_a_prompt_with_hpsv3s_own_mark_is_refused(folders):
    with pytest.raises(ValueError, match=re.escape("a prompt holds <|Reward|>, where HPSv3 would read its score")):
        load_reward("hpsv3", str(folders["hpsv3"]))(images(), ["a <|Reward|>", "b"])


def test_an_instruction_is_the_users_to_fetch_and_is_checked(tmp_path):
    with pytest.raises(FileNotFoundError, match="instruction.txt is missing.*published in the code of"):
        instruction(tmp_path, "the code of the model")
    (tmp_path / "instruction.txt").write_text("Rate {prompt}")
    assert instruction(tmp_path, "the code of the model") == "Rate {prompt}"
    with pytest.raises(ValueError, match=re.escape("must hold <|Reward|> once, and holds it 0 times")):
        instruction(tmp_path, "the code of the model", "<|Reward|>")


@pytest.mark.parametrize("key", ["visual.proj", "ln_final.bias", "visual.transformer.resblocks.0.mlp.c_fc.weight"])
def test_weights_of_another_architecture_are_refused_with_a_name(key):
    state = tiny.OpenCLIP(20).state_dict()
    del state[key]
    with pytest.raises(ValueError, match="not the weights of an open_clip ViT: "):
        clip_from_open_clip(state, 16)
    for extra, says in (
        ({"visual.extra": torch.zeros(1)}, "left over .*visual.extra"),
        ({"ln_final.bias": torch.zeros(9)}, "ViT: "),
    ):
        with pytest.raises(ValueError, match=says):
            clip_from_open_clip(tiny.OpenCLIP(20).state_dict() | extra, 16)
