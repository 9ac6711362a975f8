"""Strange input: configs, plans, prompt files, LoRA files and calls of the ops, drawn by hypothesis.

The one rule: what a user gave wrongly is a ValueError or an OSError, whose message names it.
"""

import copy
import dataclasses
import json
import random
import struct
import traceback
from collections.abc import Callable
from pathlib import Path

import hypothesis
import numpy as np
import torch
import yaml
from hypothesis import HealthCheck
from hypothesis import strategies as st

import flowbp_kernels as ops
from flowbp.backbones import load_backbone
from flowbp.config import RunConfig, build_method, dump, flatten, load
from flowbp.methods import METHODS
from flowbp.runtime.data import SUFFIXES, load_prompts
from flowbp.runtime.weights import load_weights

OWN = (ValueError, OSError)

numbers = st.one_of(
    st.integers(-2, 40),
    st.integers(),
    st.floats(),
    st.sampled_from([0.0, -0.0, 1.0, 1e308, float("nan"), float("inf"), 2**63, 10**400]),
)
text = st.one_of(st.text(max_size=12), st.sampled_from(["", "~", "$X", "shapes", "on", "1e-4", "a:b", "../..", "\0"]))
scalars = st.one_of(numbers, text, st.none(), st.booleans())
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3), max_leaves=6
)


# -- configs and plans -------------------------------------------------------------------------------------------------

DEMO = yaml.safe_load(dump(load("demo")))
SECTIONS = list(RunConfig.model_fields)
keys = st.one_of(st.sampled_from([*flatten(DEMO), *SECTIONS]), text)


@st.composite
def configs(draw) -> str:
    """The demo's config with some keys changed or gone, as YAML, sometimes with characters changed."""
    whole = copy.deepcopy(DEMO)
    for key in draw(st.lists(keys, min_size=1, max_size=3)):
        at, parts = whole, key.split(".")
        for part in parts[:-1]:
            at = at.get(part) if isinstance(at, dict) else None
        if isinstance(at, dict):
            if draw(st.booleans()) or parts[-1] not in at:
                at[parts[-1]] = draw(values)
            else:
                del at[parts[-1]]
    written = yaml.safe_dump(whole, allow_unicode=True)
    return mutated(written, draw(st.randoms(use_true_random=False)), draw(st.integers(0, 2)))


def mutated(content, draw: random.Random, times: int):
    """`content`, text or bytes, with some places deleted, doubled or replaced."""
    alphabet = [chr(i) for i in range(256)] if isinstance(content, str) else [bytes([i]) for i in range(256)]
    for _ in range(times):
        if not content:
            break
        at, length = draw.randrange(len(content)), draw.choice([1, 1, 2, 30])
        piece = draw.choice([content[:0], content[at : at + length] * 2, draw.choice(alphabet) * length])
        content = content[:at] + piece + content[at + length :]
    return content


def read_config(content: str, folder: Path) -> None:
    file = folder / "config.yaml"
    file.write_bytes(content.encode(errors="surrogatepass"))
    load(file)


overrides = st.lists(st.tuples(keys, values | text).map(lambda pair: f"{pair[0]}={pair[1]}"), max_size=3)


def read_overrides(given: list[str], folder: Path) -> None:
    load("demo", given)


methods = st.tuples(
    st.sampled_from(list(METHODS)).flatmap(
        lambda name: st.fixed_dictionaries(
            {"name": st.just(name)},
            optional={field.name: scalars | values for field in dataclasses.fields(METHODS[name])},
        )
    ),
    st.one_of(st.integers(1, 30).map(lambda n: np.linspace(1, 0, n + 1)), st.lists(st.floats(), max_size=6), scalars),
    st.integers(0, 99),
)


def draw_plan(given: tuple, folder: Path) -> None:
    spec, sigmas, seed = given
    build_method(spec).plan(sigmas, np.random.default_rng(seed))


# -- files -------------------------------------------------------------------------------------------------------------

ROWS = [
    b"a red circle\ntwo blue stars\n",
    b'{"prompt": "a red circle", "tag": "one"}\n{"text": "two", "category": null}\n',
    b'[{"prompt": "a"}, "b"]',
    b'{"anime": ["a", "b"], "paint": [{"prompt": "c"}]}',
    b'prompt,category,item_id\n"a, b",x,1\nc,y,2\n',
    b'Prompt\tCategory\n"a"\tx\n',
]


@st.composite
def prompt_files(draw) -> tuple[str, bytes]:
    content = draw(st.sampled_from(ROWS) | st.binary(max_size=60) | values.map(lambda v: json.dumps(v).encode()))
    if draw(st.integers(0, 20)) == 0:
        content = draw(st.sampled_from([b"[" * 5000, b'{"a":' * 5000, b"\xef\xbb\xbf" + content, b'"' * 200_000]))
    changed = mutated(content, draw(st.randoms(use_true_random=False)), draw(st.integers(0, 3)))
    return draw(st.sampled_from(SUFFIXES)), changed


def read_prompts(given: tuple[str, bytes], folder: Path) -> None:
    suffix, content = given
    file = folder / f"prompts{suffix}"
    file.write_bytes(content)
    load_prompts(str(file))


BACKBONE = load_backbone("shapes", max_sequence_length=1)
NETWORK = BACKBONE.pipe.transformer
LAYERS = [name for name, module in NETWORK.named_modules() if isinstance(module, torch.nn.Linear)]
ENDINGS = [".lora_A.weight", ".lora_B.weight", ".alpha", ".lora_down.weight", ".lora_up.weight", "", ".weight"]
ADAPTERS = ['{"transformer.r": 2, "transformer.lora_alpha": 4}', "{"]
endings = st.sampled_from([ENDINGS[:2], ENDINGS[:3], ENDINGS[3:5]]) | st.lists(st.sampled_from(ENDINGS))
shapes = st.sampled_from([[2, 64], [64, 2], [1], [], [0, 64], [64, 0]]) | st.lists(st.integers(0, 9), max_size=3)
DTYPES = ["F32", "F16", "BF16", "I64", "BOOL", "F8_E4M3", "F64", "U8", "F4", "C64"]
SIZES = {"F32": 4, "F16": 2, "BF16": 2, "I64": 8, "F64": 8, "C64": 8}


@st.composite
def lora_files(draw) -> bytes:
    """A file of safetensors whose names, dtypes and shapes are nearly those of a LoRA, sometimes with bytes changed."""
    header, data = {}, b""
    for layer in draw(st.lists(st.sampled_from(LAYERS), max_size=2)):
        prefix = draw(st.sampled_from(["transformer.", "lora_unet_", "diffusion_model.", "", "unet."]))
        for ending in draw(endings):
            dtype, shape = draw(st.sampled_from(["F32"] * 5 + DTYPES)), draw(shapes)
            end = len(data) + int(np.prod(shape)) * SIZES.get(dtype, 1)
            header[prefix + layer + ending] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), end]}
            data += draw(st.sampled_from([b"\0", b"\x3c", b"\xff"])) * (end - len(data))
    if draw(st.booleans()):
        header["__metadata__"] = {"lora_adapter_metadata": draw(values.map(json.dumps) | st.sampled_from(ADAPTERS))}
    encoded = json.dumps(header).encode()
    whole = struct.pack("<Q", len(encoded)) + encoded + data
    return mutated(whole, draw(st.randoms(use_true_random=False)), draw(st.sampled_from([0, 0, 1, 2])))


def read_lora(content: bytes, folder: Path) -> None:
    file = folder / "lora.safetensors"
    file.write_bytes(content)
    BACKBONE.pipe.transformer = copy.deepcopy(NETWORK)
    load_weights(BACKBONE, file)


# -- ops ---------------------------------------------------------------------------------------------------------------

strange = scalars | st.sampled_from([1 + 2j, torch.float32, [[0], [1, 2]], [None], ["a"], object()])
tensors = st.builds(
    lambda shape, dtype, stride: torch.zeros([2 * n if stride else n for n in shape], dtype=dtype)[
        tuple(slice(None, None, 2) if stride else slice(None) for _ in shape)
    ],
    st.sampled_from([(2, 3), (4, 2, 3), (2,), (), (0, 3), (3, 2), (1, 2, 3)]),
    st.sampled_from([torch.float32] * 4 + [torch.float64, torch.bfloat16, torch.int64, torch.bool, torch.complex64]),
    st.booleans(),
)
rules = st.lists(numbers, max_size=4) | tensors | strange
CALLS: dict[Callable, list] = {
    ops.quadrature_update: [tensors, tensors, rules, rules],
    ops.leap_residuals: [tensors, tensors, tensors, tensors, rules, st.tuples(rules, rules) | strange],
    ops.cfg_euler_step: [tensors, tensors, tensors, numbers | rules, numbers | rules],
    ops.cfg_multistep_step: [tensors, tensors, tensors, *[numbers | rules] * 2, tensors, rules, rules],
    ops.bridge_cotangents: [tensors, tensors, rules, rules],
    ops.straight_through: [tensors, tensors],
}
calls = st.sampled_from(list(CALLS)).flatmap(
    lambda op: st.tuples(st.just(op), *(kind | strange if i else kind for i, kind in enumerate(CALLS[op])))
)


def call_op(given: tuple, folder: Path) -> None:
    op, *arguments = given
    op(*arguments)


KINDS: dict[str, tuple[st.SearchStrategy, Callable]] = {
    "configs": (configs(), read_config),
    "overrides": (overrides, read_overrides),
    "plans": (methods, draw_plan),
    "prompt files": (prompt_files(), read_prompts),
    "LoRA files": (lora_files(), read_lora),
    "op calls": (calls, call_op),
}


def fuzz(kind: str, count: int, folder: Path, seed: int, on_foreign: Callable[[str], None]) -> int:
    """Try `count` inputs of a kind. on_foreign: gets what an input that raised another error than our own led to.

    Returns how many were tried.
    """
    (strategy, use), tried = KINDS[kind], 0

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=count,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        phases=[hypothesis.Phase.generate],
    )
    @hypothesis.given(strategy)
    def attempt(given) -> None:
        nonlocal tried
        tried += 1
        try:
            use(given, folder)
        except OWN as error:
            if not str(error):
                on_foreign(f"{kind}: {given!r:.300}: {error!r} has no message")
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            on_foreign(f"{kind}: {error!r:.200} at {Path(where.filename).name}:{where.lineno}: {given!r:.300}")

    attempt()
    return tried
