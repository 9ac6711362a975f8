"""Tiny random reward models in the published formats, written to a folder offline."""

import json
from collections import OrderedDict

import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

from flowbp.shapes.recipe.models import build_tokenizer

PROMPTS = ["a red circle", "two blue stars and a green square"]


def images(height=40, width=32, batch=2, dtype=torch.float32):
    """Smooth pictures in [0, 1]: sums of a few waves of random phase."""
    rng = torch.Generator().manual_seed(height * width)
    y, x = torch.linspace(0, 1, height).view(-1, 1), torch.linspace(0, 1, width)
    phase = 6.3 * torch.rand(batch, 3, 2, 1, 1, generator=rng)
    return (0.5 + 0.2 * torch.sin(7 * y + phase[:, :, 0]) + 0.2 * torch.cos(5 * x + 3 * y + phase[:, :, 1])).to(dtype)


def randomise(model):
    """Weights at which every input matters: std 1 / sqrt(fan-in) for matrices, .1 for the rest."""
    rng = torch.Generator().manual_seed(0)
    for p in model.parameters():
        p.data = torch.randn(p.shape, generator=rng) * (p[0].numel() ** -0.5 if p.dim() > 1 else 0.1)
    return model.eval()


def clip_folder(folder):
    """A CLIPModel with tokenizer and image processor, as PickScore and CLIP are published."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

    tokenizer = build_tokenizer()
    tower = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, hidden_act="gelu")
    text = tower | dict(vocab_size=len(tokenizer), max_position_embeddings=12, eos_token_id=tokenizer.eos_token_id)
    config = CLIPConfig(text_config=text, vision_config=tower | dict(image_size=28, patch_size=14), projection_dim=24)
    randomise(CLIPModel(config)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}).save_pretrained(folder)
    return folder


class OpenCLIP(nn.Module):
    """An open_clip ViT by its published names and formulas, independent of transformers."""

    def __init__(self, vocabulary, width=32, heads=16, embedding=24, patch=14, size=28, context=12, layers=2):
        super().__init__()
        self.visual = nn.Module()
        self.visual.conv1 = nn.Conv2d(3, width, patch, patch, bias=False)
        self.visual.class_embedding = nn.Parameter(torch.empty(width))
        self.visual.positional_embedding = nn.Parameter(torch.empty((size // patch) ** 2 + 1, width))
        self.visual.ln_pre, self.visual.ln_post = nn.LayerNorm(width), nn.LayerNorm(width)
        self.visual.transformer = self.tower(width, heads, layers)
        self.visual.proj = nn.Parameter(torch.empty(width, embedding))
        self.token_embedding = nn.Embedding(vocabulary, width)
        self.positional_embedding = nn.Parameter(torch.empty(context, width))
        self.transformer = self.tower(width, heads, layers)
        self.ln_final = nn.LayerNorm(width)
        self.text_projection = nn.Parameter(torch.empty(width, embedding))
        self.logit_scale = nn.Parameter(torch.tensor(4.6))

    @staticmethod
    def tower(width, heads, layers):
        blocks = []
        for _ in range(layers):
            block = nn.Module()
            block.ln_1, block.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
            block.attn = nn.MultiheadAttention(width, heads, batch_first=True)
            block.mlp = nn.Sequential(
                OrderedDict(c_fc=nn.Linear(width, 2 * width), gelu=nn.GELU(), c_proj=nn.Linear(2 * width, width))
            )  # fmt: skip
            blocks.append(block)
        tower = nn.Module()
        tower.resblocks = nn.ModuleList(blocks)
        return tower

    @staticmethod
    def run(tower, x, mask=None):
        for block in tower.resblocks:
            h = block.ln_1(x)
            x = x + block.attn(h, h, h, attn_mask=mask, need_weights=False)[0]
            x = x + block.mlp(block.ln_2(x))
        return x

    def encode_image(self, pixels):
        v = self.visual
        x = v.conv1(pixels).flatten(2).transpose(1, 2)
        x = torch.cat([v.class_embedding.expand(len(x), 1, -1), x], dim=1) + v.positional_embedding
        return v.ln_post(self.run(v.transformer, v.ln_pre(x))[:, 0]) @ v.proj

    def encode_text(self, ids, last):
        """ids [B, context]; last [B]: the position of the end token."""
        x = self.token_embedding(ids) + self.positional_embedding
        mask = torch.full((x.shape[1], x.shape[1]), float("-inf")).triu(1)
        x = self.ln_final(self.run(self.transformer, x, mask))
        return x[torch.arange(len(x)), last] @ self.text_projection

    def score(self, pixels, ids, last):
        return F.cosine_similarity(self.encode_image(pixels), self.encode_text(ids, last))


RATING = [(0, 1024), (2, 128), (4, 64), (6, 16), (7, 1)]  # place and outputs of each layer


def rating_weights(width, rng):
    state = {}
    for place, outputs in RATING:
        state[f"layers.{place}.weight"] = torch.randn(outputs, width, generator=rng) * width**-0.5
        state[f"layers.{place}.bias"] = torch.randn(outputs, generator=rng)
        width = outputs
    return state


def rate(state, x):
    for place, _ in RATING:
        x = x @ state[f"layers.{place}.weight"].T + state[f"layers.{place}.bias"]
    return x.squeeze(-1)


def aesthetic_folder(folder):
    clip_folder(folder)
    save_file(rating_weights(24, torch.Generator().manual_seed(1)), folder / "sac+logos+ava1-l14-linearMSE.safetensors")
    return folder


class BLIP:
    """ImageReward by its published names and formulas (ViT-L and BERT with cross-attention, smaller), independent of
    transformers.
    """

    def __init__(self, vocabulary, vision=32, text=24, layers=2, patch=14, size=28):
        rng = torch.Generator().manual_seed(0)
        self.layers, self.patch, self.state = layers, patch, {}

        def add(prefix, name, *shape):
            scale = (
                0.3 if len(shape) == 1 or "token" in name or "embed" in name else torch.Size(shape[1:]).numel() ** -0.5
            )
            self.state[f"{prefix}.{name}"] = torch.randn(shape, generator=rng) * scale

        def linear(prefix, name, inputs, outputs):
            add(prefix, f"{name}.weight", outputs, inputs)
            add(prefix, f"{name}.bias", outputs)

        def norm(prefix, name, width):
            self.state[f"{prefix}.{name}.weight"] = 1 + 0.1 * torch.randn(width, generator=rng)
            self.state[f"{prefix}.{name}.bias"] = 0.1 * torch.randn(width, generator=rng)

        v, t = "blip.visual_encoder", "blip.text_encoder"
        add(v, "cls_token", 1, 1, vision)
        add(v, "pos_embed", 1, (size // patch) ** 2 + 1, vision)
        add(v, "patch_embed.proj.weight", vision, 3, patch, patch)
        add(v, "patch_embed.proj.bias", vision)
        norm(v, "norm", vision)
        for i in range(layers):
            norm(v, f"blocks.{i}.norm1", vision)
            norm(v, f"blocks.{i}.norm2", vision)
            linear(v, f"blocks.{i}.attn.qkv", vision, 3 * vision)
            linear(v, f"blocks.{i}.attn.proj", vision, vision)
            linear(v, f"blocks.{i}.mlp.fc1", vision, 2 * vision)
            linear(v, f"blocks.{i}.mlp.fc2", 2 * vision, vision)
        self.state[f"{t}.embeddings.position_ids"] = torch.arange(40)[None]
        add(t, "embeddings.word_embeddings.weight", vocabulary, text)
        add(t, "embeddings.position_embeddings.weight", 40, text)
        norm(t, "embeddings.LayerNorm", text)
        for i in range(layers):
            for kind, source in (("attention", text), ("crossattention", vision)):
                linear(t, f"encoder.layer.{i}.{kind}.self.query", text, text)
                linear(t, f"encoder.layer.{i}.{kind}.self.key", source, text)
                linear(t, f"encoder.layer.{i}.{kind}.self.value", source, text)
                linear(t, f"encoder.layer.{i}.{kind}.output.dense", text, text)
                norm(t, f"encoder.layer.{i}.{kind}.output.LayerNorm", text)
            linear(t, f"encoder.layer.{i}.intermediate.dense", text, 2 * text)
            linear(t, f"encoder.layer.{i}.output.dense", 2 * text, text)
            norm(t, f"encoder.layer.{i}.output.LayerNorm", text)
        linear("blip", "vision_proj", vision, 8)  # of BLIP's pre-training, not read
        linear("blip", "text_proj", text, 8)
        self.state |= {f"mlp.{key}": value for key, value in rating_weights(text, rng).items()}

    def linear(self, name, x):
        return x @ self.state[f"{name}.weight"].T + self.state[f"{name}.bias"]

    def norm(self, name, x, eps):
        return F.layer_norm(x, x.shape[-1:], self.state[f"{name}.weight"], self.state[f"{name}.bias"], eps)

    @staticmethod
    def attend(q, k, v, heads, mask=None):
        q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
        scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
        scores = scores if mask is None else scores.masked_fill(mask[:, None, None] == 0, float("-inf"))
        return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)

    def score(self, pixels, ids, mask):
        v, t, s = "blip.visual_encoder", "blip.text_encoder", self.state
        x = (
            F.conv2d(pixels, s[f"{v}.patch_embed.proj.weight"], s[f"{v}.patch_embed.proj.bias"], self.patch)
            .flatten(2)
            .transpose(1, 2)
        )
        x = torch.cat([s[f"{v}.cls_token"].expand(len(x), 1, -1), x], 1) + s[f"{v}.pos_embed"]
        for i in range(self.layers):
            block = f"{v}.blocks.{i}"
            q, k, value = self.linear(f"{block}.attn.qkv", self.norm(f"{block}.norm1", x, 1e-6)).chunk(3, -1)
            x = x + self.linear(f"{block}.attn.proj", self.attend(q, k, value, 16))
            x = x + self.linear(
                f"{block}.mlp.fc2", F.gelu(self.linear(f"{block}.mlp.fc1", self.norm(f"{block}.norm2", x, 1e-6)))
            )
        image = self.norm(f"{v}.norm", x, 1e-6)
        y = (
            s[f"{t}.embeddings.word_embeddings.weight"][ids]
            + s[f"{t}.embeddings.position_embeddings.weight"][: ids.shape[1]]
        )
        y = self.norm(f"{t}.embeddings.LayerNorm", y, 1e-12)
        for i in range(self.layers):
            layer = f"{t}.encoder.layer.{i}"
            for kind, seen in (("attention", mask), ("crossattention", None)):
                source = y if kind == "attention" else image
                q, k, value = (
                    self.linear(f"{layer}.{kind}.self.{part}", z)
                    for part, z in (("query", y), ("key", source), ("value", source))
                )
                read = self.linear(f"{layer}.{kind}.output.dense", self.attend(q, k, value, 12, seen))
                y = self.norm(f"{layer}.{kind}.output.LayerNorm", y + read, 1e-12)
            wide = F.gelu(self.linear(f"{layer}.intermediate.dense", y))
            y = self.norm(f"{layer}.output.LayerNorm", y + self.linear(f"{layer}.output.dense", wide), 1e-12)
        raw = rate({key.removeprefix("mlp."): value for key, value in s.items() if key.startswith("mlp.")}, y[:, 0])
        return (raw - 0.16717362830052426) / 1.0333394966054072


def bert_tokenizer():
    from transformers import BertTokenizer

    words = "a red blue green circle stars star square two and".split()
    return BertTokenizer(
        vocab={token: i for i, token in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words])}
    )


def imagereward_folder(folder):
    tokenizer = bert_tokenizer()
    torch.save(BLIP(len(tokenizer)).state, folder / "ImageReward.pt")
    tokenizer.save_pretrained(folder)
    return folder


def eos_last(tokenizer):
    """The tokenizer of `shapes` with its end token last in the vocabulary, as CLIP's is."""
    from transformers import CLIPTokenizer

    vocabulary = tokenizer.get_vocab()
    first, last = "<|endoftext|>", max(vocabulary, key=vocabulary.get)
    vocabulary[first], vocabulary[last] = vocabulary[last], vocabulary[first]
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    return CLIPTokenizer(vocab=vocabulary, merges=[tuple(m) for m in merges], model_max_length=12)


def hpsv2_folder(folder):
    tokenizer = eos_last(build_tokenizer())
    model = randomise(OpenCLIP(len(tokenizer)))
    torch.save({"state_dict": model.state_dict()}, folder / "HPS_v2.1_compressed.pt")
    tokenizer.save_pretrained(folder)
    return folder


def qwen_tokenizer(folder):
    """One token a byte, and the marks of a chat with pictures."""
    from transformers import AddedToken, Qwen2Tokenizer
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    vocab = {token: i for i, token in enumerate([*bytes_to_unicode().values(), "<|endoftext|>"])}
    tokenizer = Qwen2Tokenizer(vocab=vocab, merges=[])
    marks = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
    tokenizer.add_tokens([AddedToken(mark, special=True) for mark in marks])
    tokenizer.save_pretrained(folder)
    return tokenizer


def qwen_model(config_class, model_class, tokenizer, extra_tokens=0, **vision):
    text = dict(
        vocab_size=len(tokenizer) + extra_tokens, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2, rope_parameters=dict(rope_type="default", rope_theta=1e4, mrope_section=[1, 1, 2]),
    )  # fmt: skip
    named = dict(
        image="<|image_pad|>", video="<|video_pad|>", vision_start="<|vision_start|>", vision_end="<|vision_end|>"
    )
    ids = {f"{name}_token_id": tokenizer.convert_tokens_to_ids(mark) for name, mark in named.items()}
    config = config_class(
        text_config=text, vision_config=dict(depth=2, num_heads=2, **vision), tie_word_embeddings=False, **ids
    )
    return randomise(model_class(config))


def hpsv3_folder(folder):
    """HPSv3.safetensors with the names that transformers 4.45 gave."""
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    vision = dict(embed_dim=32, hidden_size=32, mlp_ratio=2)
    tokenizer = qwen_tokenizer(folder)
    model = qwen_model(Qwen2VLConfig, Qwen2VLForConditionalGeneration, tokenizer, extra_tokens=1, **vision)
    state = {
        key.replace("model.visual.", "visual.").replace("model.language_model.", "model."): v
        for key, v in model.state_dict().items()
    }
    rng = torch.Generator().manual_seed(1)
    for place, inputs, outputs in ((0, 32, 1024), (3, 1024, 16), (5, 16, 2)):
        state[f"rm_head.{place}.weight"] = torch.randn(outputs, inputs, generator=rng) * inputs**-0.5
        state[f"rm_head.{place}.bias"] = torch.randn(outputs, generator=rng)
    save_file(state, folder / "HPSv3.safetensors")
    (folder / "instruction.txt").write_text("Rate {prompt}: <|Reward|> END")
    model.config.text_config.vocab_size -= 1  # the base does not know the reward token
    model.config.save_pretrained(folder)
    return folder


def unifiedreward_folder(folder):
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    vision = dict(hidden_size=32, out_hidden_size=32, intermediate_size=48, fullatt_block_indexes=[1])
    qwen_model(Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, qwen_tokenizer(folder), **vision).save_pretrained(
        folder
    )
    (folder / "instruction.txt").write_text("Rate {prompt}")
    return folder


FOLDERS = {
    "clip": clip_folder,
    "pickscore": clip_folder,
    "hpsv2": hpsv2_folder,
    "aesthetic": aesthetic_folder,
    "imagereward": imagereward_folder,
    "hpsv3": hpsv3_folder,
    "unifiedreward": unifiedreward_folder,
}
