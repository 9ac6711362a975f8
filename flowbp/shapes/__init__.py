"""`shapes`: a small text-to-image flow model with its world, its checker and two rewards, for work on a laptop CPU.

`PIPELINE` is a diffusers StableDiffusion3Pipeline folder of 32 x 32 images; `REWARD` and `MONITOR` are transformers
CLIPModel folders with their tokenizer. `python -m flowbp.shapes.recipe all --out DIR` trains all three again.
"""

from pathlib import Path

from .checker import check, check_batch
from .prompts import Prompt, prompts

_WEIGHTS = Path(__file__).parent / "weights"
PIPELINE, REWARD, MONITOR = (_WEIGHTS / name for name in ("pipeline", "reward", "monitor"))

__all__ = ["MONITOR", "PIPELINE", "REWARD", "Prompt", "check", "check_batch", "prompts"]
