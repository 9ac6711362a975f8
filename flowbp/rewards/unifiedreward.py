"""UnifiedReward 2.0 (Wang et al. 2025, arXiv 2503.05236): a Qwen2.5-VL that writes ratings. The reward is the expected
value of the rating.

The answer format is from the published source; the real checkpoint was not loaded here.
"""

from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForImageTextToText, AutoTokenizer

from flowbp.rewards.qwen import inputs, instruction
from flowbp.rewards.weights import load_frozen


class UnifiedReward:
    """The expected alignment rating, 1 to 5.

    The model answers "Alignment Score (1-5): 2.69...", which has no gradient. This reward puts the answer up to the
    number into the model's mouth and returns sum_d d p(d) over the digits d = 1 ... 5 that may come next, with p
    renormalised over them. That is differentiable, and coarser than the written number: a model that is sure to write
    2.69 scores 2.0. So scores lie about .5 below the written ones, are flat between whole numbers and do not compare
    with published ones. (The expectation of the second digit takes five more passes of the network.) Alignment is the
    first score of the answer, so no other text has to be supplied before it.

    model: a folder with a Qwen2-VL or Qwen2.5-VL checkpoint, its tokenizer, and instruction.txt (see
        `qwen.instruction`).
    """

    PIXELS = 4 * 28 * 28, 16384 * 28 * 28  # at least, at most
    ANSWER = "Alignment Score (1-5): "

    def __init__(self, model: str | Path, device: str = "cpu", dtype: str = "bfloat16"):
        self.instruction = instruction(model, "the code of UnifiedReward (github.com/CodeGoat24/UnifiedReward)")
        kind = AutoConfig.from_pretrained(model, local_files_only=True).model_type
        if kind not in ("qwen2_vl", "qwen2_5_vl"):
            raise ValueError(f"{model} is a {kind}; this reward reads a qwen2_vl or qwen2_5_vl")
        self.model = load_frozen(AutoModelForImageTextToText, model, getattr(torch, dtype)).to(device)
        self.tokenizer = AutoTokenizer.from_pretrained(model, local_files_only=True)
        self.digits = self.tokenizer.convert_tokens_to_ids(list("12345"))

    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        texts = [self.instruction.replace("{prompt}", prompt) for prompt in prompts]
        arguments = inputs(self.tokenizer, self.model.dtype, images, texts, *self.PIXELS, self.ANSWER)
        states = self.model.model(**arguments, use_cache=False).last_hidden_state
        precision = torch.promote_types(states.dtype, torch.float32)
        last = states[torch.arange(len(states)), arguments["attention_mask"].sum(dim=1) - 1].to(precision)
        logits = last @ self.model.lm_head.weight[self.digits].to(precision).T
        return logits.softmax(dim=-1) @ torch.arange(1, 6, device=logits.device, dtype=precision)
