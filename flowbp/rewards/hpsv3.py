"""HPSv3 (Ma et al. 2025, arXiv 2508.03789): Qwen2-VL-7B reads instruction, prompt and image, and a head reads the score
off the model's state at a special token.

Key names and head shape are from the published source; the real checkpoint was not loaded here.
"""

from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AddedToken, AutoConfig, AutoTokenizer, Qwen2VLModel

from flowbp.rewards.qwen import inputs, instruction
from flowbp.rewards.weights import below, frozen_head, frozen_model, read_state_dict, renamed


class HPSv3:
    """The mean mu of the head's (mu, sigma), about 0 to 15.

    model: a folder with HPSv3.safetensors and instruction.txt (see `qwen.instruction`).
    base: a folder with config and tokenizer of Qwen2-VL-7B-Instruct.
    The picture is resized to about 448 x 448 pixels (256 tokens). Positions count up through text and image alike,
    because the published code, which trained the model, hands none to the language model; Qwen2-VL's own positions
    would be two-dimensional inside the image.
    """

    PIXELS = 256 * 28 * 28
    REWARD_TOKEN = "<|Reward|>"

    def __init__(self, model: str | Path, base: str | Path, device: str = "cpu", dtype: str = "bfloat16"):
        self.instruction = instruction(model, "the code of HPSv3 (github.com/MizzenAI/HPSv3)", self.REWARD_TOKEN)
        state, dtype = read_state_dict(model, "HPSv3"), getattr(torch, dtype)
        self.head = reward_head(below(state, "rm_head.", "HPSv3"), dtype).to(device)
        named = renamed(state, "Qwen2-VL").items()
        qwen = {key: value for key, value in named if not key.startswith(("lm_head.", "rm_head."))}
        config = AutoConfig.from_pretrained(base, local_files_only=True)
        config.text_config.vocab_size = len(qwen["language_model.embed_tokens.weight"])
        self.model = frozen_model(Qwen2VLModel, config, qwen, dtype, "HPSv3").to(device)

        self.tokenizer = AutoTokenizer.from_pretrained(base, local_files_only=True)
        self.tokenizer.add_tokens([AddedToken(self.REWARD_TOKEN, special=True)])
        self.reward_id = self.tokenizer.convert_tokens_to_ids(self.REWARD_TOKEN)
        if self.reward_id != (last := config.text_config.vocab_size - 1):
            places = f"{self.REWARD_TOKEN} at {self.reward_id}, the checkpoint at {last}"
            raise ValueError(f"the tokenizer of {base} puts {places}: pass the one of Qwen2-VL-7B-Instruct")

    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        texts = [self.instruction.replace("{prompt}", prompt) for prompt in prompts]
        arguments = inputs(self.tokenizer, self.model.dtype, images, texts, self.PIXELS, self.PIXELS)
        ids = arguments["input_ids"]
        positions = torch.arange(ids.shape[1], device=ids.device).expand(3, *ids.shape)
        states = self.model(**arguments, position_ids=positions, use_cache=False).last_hidden_state
        at_token = states[ids == self.reward_id].to(self.head[0].weight.dtype)
        if len(at_token) != len(images):
            raise ValueError(f"a prompt holds {self.REWARD_TOKEN}, where HPSv3 would read its score: take it out")
        return self.head(at_token)[:, 0]


def reward_head(weights: dict[str, Tensor], dtype: torch.dtype) -> nn.Sequential:
    """width -> 1024 -> 16 -> 2 with ReLUs, in float32 at least. Layer 2 was dropout."""
    wide, narrow = nn.Linear(weights["0.weight"].shape[1], 1024), nn.Linear(1024, 16)
    layers = {"0": wide, "1": nn.ReLU(), "3": narrow, "4": nn.ReLU(), "5": nn.Linear(16, 2)}
    return frozen_head(layers, weights, dtype)
