"""UR-Align and UR-IQ, as the FlowBP paper reports them: UnifiedReward-7b-v1.5 is asked in words and writes a number
from 1 to 5.

The model runs behind any server with OpenAI's chat interface (sglang, vLLM). The two questions belong to the authors of
the paper and stand in their code: flowbp/eval/rewards/unifiedreward_scorer.py of github.com/RuoyuWang-2077/FlowBP. Save
them as ur-align.txt and ur-iq.txt, {prompt} in place of the caption, without the line "<image>". Then score a run:

    export UNIFIED_REWARD_URL=http://127.0.0.1:17140/v1 UNIFIED_REWARD_QUESTIONS=.
    PYTHONPATH=examples flowbp eval RUN 'evaluation.monitors.ur-align={name: "unified_reward:Alignment"}' \
        'evaluation.monitors.ur-iq={name: "unified_reward:ImageQuality"}'

A written number has no gradient, so these are monitors and never rewards to train on.
"""

import base64
import io
import json
import os
import re
import urllib.request
from pathlib import Path

import torch
from PIL import Image

MODEL = "CodeGoat24/UnifiedReward-7b-v1.5"
SIDE = 512  # pixels to which the paper's evaluation resizes every image


class Question:
    """Scores images [B, 3, H, W] in [0, 1] by the answers to the question in the file `name`.txt: [B], nan where no
    number was written.
    """

    name: str

    def __init__(self, device: str):
        self.device = device
        self.url = os.environ["UNIFIED_REWARD_URL"].rstrip("/") + "/chat/completions"
        self.question = Path(os.environ["UNIFIED_REWARD_QUESTIONS"], f"{self.name}.txt").read_text(encoding="utf-8")

    def __call__(self, images, prompts):
        pixels = (images.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
        scores = [self.ask(Image.fromarray(picture), prompt) for picture, prompt in zip(pixels, prompts, strict=True)]
        return torch.tensor(scores, device=self.device)

    def ask(self, picture: Image.Image, prompt: str) -> float:
        """The number after "Final Score:" in the greedy answer."""
        png = io.BytesIO()
        picture.resize((SIDE, SIDE)).save(png, format="PNG")
        image = {
            "type": "image_url",
            "image_url": {"url": "data:image/png;base64," + base64.b64encode(png.getvalue()).decode()},
        }
        content = [image, {"type": "text", "text": self.question.replace("{prompt}", prompt)}]
        body = {"model": MODEL, "temperature": 0.0, "messages": [{"role": "user", "content": content}]}
        request = urllib.request.Request(self.url, json.dumps(body).encode(), {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=120) as response:
            answer = json.load(response)["choices"][0]["message"]["content"]
        found = re.search(r"Final Score:\s*([1-5](?:\.\d+)?)", answer, re.IGNORECASE)
        return float(found[1]) if found else float("nan")


class Alignment(Question):
    name = "ur-align"


class ImageQuality(Question):
    name = "ur-iq"
