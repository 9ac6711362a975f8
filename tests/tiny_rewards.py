"""Tiny random reward models in the published formats, written to a folder offline."""

from collections import OrderedDict

import torch
from torch import nn
from torch.nn import functional as F

from flowbp.shapes.models import build_tokenizer

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


def clip_folder(folder, eos_first=False):
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


def eos_last(tokenizer):
    """The tokenizer of `shapes` with its end token last in the vocabulary, as CLIP's is."""
    from transformers import CLIPTokenizer

    vocabulary = tokenizer.get_vocab()
    first, last = "<|endoftext|>", max(vocabulary, key=vocabulary.get)
    vocabulary[first], vocabulary[last] = vocabulary[last], vocabulary[first]
    import json

    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    return CLIPTokenizer(vocab=vocabulary, merges=[tuple(m) for m in merges], model_max_length=12)


def hpsv2_folder(folder):
    tokenizer = eos_last(build_tokenizer())
    model = randomise(OpenCLIP(len(tokenizer)))
    torch.save({"state_dict": model.state_dict()}, folder / "HPS_v2.1_compressed.pt")
    tokenizer.save_pretrained(folder)
    return folder
