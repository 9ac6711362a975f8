"""GenEval's judgement: known boxes give the verdict that its rules say, and a real detector class fits in."""

import json
import random
import re
from collections import Counter
from hashlib import sha256
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny_rewards import clip_folder
from tokenizers.processors import TemplateProcessing
from transformers import BatchFeature

from flowbp.config.schema import GenEvalConfig
from flowbp.evaluation.geneval import (
    COLOURS,
    RELATIONS,
    ClipColours,
    Detection,
    GenEval,
    Requirement,
    TransformersDetector,
    crop,
    load_geneval,
    load_requirements,
    relations,
)
from flowbp.runtime.data import load_prompts
from flowbp.shapes.recipe.models import build_tokenizer

DOG, BENCH = (0, 0, 10, 10), (40, 0, 50, 10)


def requirement(tag="position", include=(), exclude=()):
    return Requirement.model_validate({"tag": tag, "prompt": "p", "include": list(include), "exclude": list(exclude)})


def dog_and_bench(relation):
    return [{"class": "bench", "count": 1}, {"class": "dog", "count": 1, "position": [relation, 0]}]


def found(**boxes):
    return {name: [Detection(box, 0.95 - 0.01 * i) for i, box in enumerate(listed)] for name, listed in boxes.items()}


@pytest.mark.parametrize(
    ("a", "expected"),
    [
        ((0, 40, 10, 50), {"left of"}),
        ((80, 40, 90, 50), {"right of"}),
        ((40, 0, 50, 10), {"above"}),
        ((40, 80, 50, 90), {"below"}),
        ((0, 0, 10, 10), {"left of", "above"}),
        ((41, 41, 51, 51), set()),  # within a tenth of both sizes
        ((40, 40, 50, 50), set()),
        ((43, 40, 53, 50), set()),  # beyond it by a third of the offset
        ((28, 20, 78, 70), set()),  # five times as large: both sizes count
        ((36, 20, 86, 70), {"right of"}),
    ],
)
def test_relations_are_those_of_the_centres_less_a_tenth_of_the_sizes(a, expected):
    assert relations(a, (40, 40, 50, 50)) == expected


@pytest.mark.parametrize(
    ("include", "exclude", "boxes", "right"),
    [
        ([{"class": "dog", "count": 2}], [], {"dog": [DOG, BENCH]}, True),
        ([{"class": "dog", "count": 2}], [], {"dog": [DOG]}, False),
        ([{"class": "dog", "count": 2}], [{"class": "dog", "count": 3}], {"dog": [DOG, BENCH]}, True),
        ([{"class": "dog", "count": 2}], [{"class": "dog", "count": 3}], {"dog": [DOG, BENCH, DOG]}, False),
        ([{"class": "dog", "count": 1}, {"class": "bench", "count": 1}], [], {"dog": [DOG]}, False),
        (dog_and_bench("left of"), [], {"dog": [DOG], "bench": [BENCH]}, True),
        (dog_and_bench("above"), [], {"dog": [DOG], "bench": [BENCH]}, False),
        (dog_and_bench("left of"), [], {"dog": [DOG]}, False),
        # The most confident dog alone is asked.
        (dog_and_bench("left of"), [], {"dog": [DOG, (90, 0, 99, 10)], "bench": [BENCH]}, True),
        ([{"class": "dog", "count": 1, "color": "red"}], [], {"dog": [DOG]}, True),
        ([{"class": "dog", "count": 1, "color": "blue"}], [], {"dog": [DOG]}, False),
        ([{"class": "dog", "count": 2, "color": "red"}], [], {"dog": [DOG, BENCH]}, False),
    ],
)
def test_known_boxes_give_the_known_verdict(include, exclude, boxes, right):
    by_place = {DOG: "red", BENCH: "green"}
    colours = lambda image, objects, name: [by_place[d.box] for d in objects]  # noqa: E731
    judge = GenEval({"p": requirement("t", include, exclude)}, lambda *_: found(**boxes), colours)
    assert judge.is_right(torch.zeros(3, 8, 8), "p") == right


def test_at_most_sixteen_objects_of_a_class_count():
    dogs = [{"class": "dog", "count": 16}], [{"class": "dog", "count": 17}]
    judge = GenEval({"dogs": requirement("t", *dogs)}, lambda *_: found(dog=[DOG] * 20), None)
    assert judge.is_right(torch.zeros(3, 8, 8), "dogs")


def test_counting_asks_for_more_confidence_than_the_other_tags():
    def detect(image, classes):
        return {"dog": [Detection(DOG, 0.5)]}

    prompts = {tag: requirement(tag, [{"class": "dog", "count": 1}]) for tag in ("counting", "single_object")}
    assert GenEval(prompts, detect, None)(torch.zeros(2, 3, 8, 8), ["counting", "single_object"]).tolist() == [0.0, 1.0]
    assert GenEval(prompts, detect, None, threshold=0.5)(torch.zeros(1, 3, 8, 8), ["single_object"]).tolist() == [0.0]
    with pytest.raises(ValueError, match="no GenEval metadata for the prompt 'a cat'"):
        GenEval(prompts, detect, None)(torch.zeros(1, 3, 8, 8), ["a cat"])


@pytest.mark.parametrize(
    ("clause", "says"),
    [
        ({"color": "beige"}, "should be 'red', 'orange'.*beige"),
        ({"position": ["behind", 0]}, "should be 'left of', 'right of'.*behind"),
        ({"position": ["above", 1]}, "earlier clause"),
    ],
)
def test_metadata_that_cannot_be_judged_is_refused(clause, says):
    with pytest.raises(ValueError, match=says):
        requirement("t", [{"class": "a", "count": 1}, {"class": "dog", "count": 1} | clause])


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        (['{"tag": "t", "prompt": "p"}', "", '{"tag": "t"}'], "line 3: prompt: Field required"),
        (
            ['{"tag": "t", "prompt": "p", "include": [{"class": "a", "count": 1, "position": ["above"]}]}'],
            "line 1: include.0.position.1: Field required",
        ),
        (["[1]"], "line 1: .* valid dictionary .*, got .1.; a line has tag, prompt, include"),
        (["[" * 100_000], "line 1: RecursionError"),
        (['{"tag": "t", "prompt": "p", "prompt": "q"}'], "line 1: ValueError.*a key stands there twice"),
        (
            ['{"tag": "t", "prompt": "p", "include": [{"class": "a", "count": 1e999}]}'],
            "line 1: include.0.count: .*finite number, got inf",
        ),
        (
            ['{"tag": "t", "prompt": "p", "include": [{"class": "a", "count": -1}]}'],
            "line 1: include.0.count: .*greater than 0, got -1",
        ),
        (
            ['{"tag": "t", "prompt": "p", "include": [{"class": [1], "count": 1}]}'],
            "line 1: include.0.class: .*valid string, got .1.",
        ),
        (['{"tag": "t", "prompt": "p"}', '{"tag": "counting", "prompt": "p"}'], "line 2: 'p' stands there twice"),
    ],
)
def test_a_malformed_metadata_line_is_named(lines, says, tmp_path):
    path = tmp_path / "evaluation_metadata.jsonl"
    path.write_text("\n".join(lines))
    with pytest.raises(ValueError, match=says):
        load_requirements(str(path))
    with pytest.raises(FileNotFoundError, match="'shapes:test' is no file: a detector judges the prompts of a .jsonl"):
        load_requirements("shapes:test")


class MeanColour:
    """A CLIP whose space is RGB: an image lies at its mean colour, a text at the colour that it names."""

    RGB = {
        "red": (1.0, 0, 0),
        "blue": (0, 0, 1.0),
        "green": (0, 1.0, 0),
        "yellow": (1.0, 1.0, 0),
        "white": (1.0, 1.0, 1.0),
    }
    device, dtype, model = "cpu", torch.float32, property(lambda self: self)
    size, mean, std = 28, (0.0,) * 3, (1.0,) * 3

    def get_image_features(self, pixel_values):
        self.seen = pixel_values
        return SimpleNamespace(pooler_output=pixel_values.mean(dim=(2, 3)))

    def tokenizer(self, lines, **_):
        found = [
            next((rgb for name, rgb in self.RGB.items() if f"a {name}" in line), (-1.0, -1.0, -1.0)) for line in lines
        ]
        return BatchFeature({"colours": torch.tensor(found)})

    def get_text_features(self, colours):
        return SimpleNamespace(pooler_output=colours)


def test_a_colour_is_that_of_the_crop_with_all_but_the_object_greyed():
    image = torch.zeros(3, 16, 16)
    image[2, :8], image[0, 8:], image[1, 12:] = 1.0, 1.0, 1.0  # blue above, red and then yellow below
    lower_right = np.zeros((16, 16), dtype=bool)
    lower_right[12:, 8:] = True
    boxes = [
        Detection((0, 0, 16, 8), 1.0),
        Detection((2, 8, 9, 11.5), 1.0),
        Detection((0, 0, 16, 16), 1.0, lower_right),
    ]
    assert ClipColours(MeanColour())(image, boxes, "dog") == ["blue", "red", "white"]
    small = Detection((8, 12, 16, 16), 1.0, lower_right)
    assert ClipColours(MeanColour())(image, [small], "dog") == ["yellow"]
    assert crop(image, Detection((20, -3, 20, -3), 1.0)).shape == (3, 1, 1)
    whole_pixels = crop(image, Detection((2.5, 8.5, 9.5, 11.5), 1.0))
    assert torch.equal(whole_pixels, image[:, 8:12, 2:10])


def test_the_crop_of_a_colour_is_centred_as_torchvision_centres_it():
    """GenEval prepares crops by open_clip's transform: of 31 columns, 28 from the third on."""
    clip, image = MeanColour(), torch.rand(3, 28, 31, generator=torch.Generator().manual_seed(0))
    ClipColours(clip)(image, [Detection((0, 0, 31, 28), 1.0)], "dog")
    assert torch.equal(clip.seen[0], image[..., 2:30])


COCO = """person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light, fire hydrant, stop sign,
parking meter, bench, bird, cat, dog, horse, sheep, cow, elephant, bear, zebra, giraffe, backpack, umbrella, handbag,
tie, suitcase, frisbee, skis, snowboard, sports ball, kite, baseball bat, baseball glove, skateboard, surfboard, tennis
racket, bottle, wine glass, cup, fork, knife, spoon, bowl, banana, apple, sandwich, orange, broccoli, carrot, hot dog,
pizza, donut, cake, chair, couch, potted plant, bed, dining table, toilet, tv, laptop, mouse, remote, keyboard, cell
phone, microwave, oven, toaster, sink, refrigerator, book, clock, vase, scissors, teddy bear, hair drier, toothbrush"""
COCO = COCO.replace("\n", " ").split(", ")
OTHER = {"mouse": "computer mouse", "remote": "tv remote", "keyboard": "computer keyboard"}  # as GenEval's prompts say
OLD = dict(motorcycle="motorbike", airplane="aeroplane", couch="sofa", tv="tvmonitor") | {
    "potted plant": "pottedplant",
    "dining table": "diningtable",
}  # as some detectors say

# -- all prompts of the benchmark --------------------------------------------------------------------------------------

NAMES = [OTHER.get(name, name) for name in COCO]
NUMBERS = {"two": 2, "three": 3, "four": 4}


def entry_of(prompt):
    """What evaluation_metadata.jsonl says of one of GenEval's prompts."""
    text = prompt.removeprefix("a photo of ")
    number, _, plural = text.partition(" ")
    if number in NUMBERS:
        (name,) = (name for name in NAMES if plural in (f"{name}s", f"{name}es"))
        include, exclude = ([{"class": name, "count": NUMBERS[number] + more}] for more in (0, 1))
        return {"tag": "counting", "include": include, "exclude": exclude, "prompt": prompt}
    first, word, second = re.fullmatch(f"an? (.+?)(?: (and|{'|'.join(RELATIONS)}) an? (.+))?", text).groups()
    include = []
    for part in filter(None, (first, second)):
        colour = "" if part in NAMES else part.split()[0]
        clause = {"class": part.removeprefix(f"{colour} "), "count": 1}
        include.append(clause | {"color": colour} if colour else clause)
    if word in RELATIONS:
        include = [include[1], include[0] | {"position": [word, 0]}]
    tags = {"and": ("two_object", "color_attr"), None: ("single_object", "colors")}
    tag = tags[word]["color" in include[0]] if word in tags else "position"
    return {"tag": tag, "include": include, "prompt": prompt}


def drawn(entry, draw):
    """What a detector might see: ({class: detections}, {box: colour}), mostly as the prompt says."""
    u, found, colours = random.Random(f"{draw} {entry['prompt']}").random, {}, {}
    for clause in entry["include"]:
        seen = found.setdefault(clause["class"], [])
        for _ in range(clause["count"] + (u() < 0.1) - (u() < 0.1) + 17 * (u() < 0.02)):
            x, y = int(300 * u()), int(300 * u())
            box = (x, y, x + 20 + int(80 * u()), y + 20 + int(80 * u()))
            seen.append(Detection(box, 1 - 0.8 * u() ** 4))
            colours[box] = clause.get("color") if u() < 0.85 else COLOURS[int(10 * u())]
    return found, colours


@pytest.fixture(scope="module")
def metadata(tmp_path_factory):
    """The entries of GenEval's 553 prompts, in a file of the official bytes."""
    prompts = Path(__file__).with_name("geneval_prompts.txt").read_text().splitlines()
    entries, path = [entry_of(prompt) for prompt in prompts], tmp_path_factory.mktemp("geneval") / "metadata.jsonl"
    path.write_text("".join(f"{json.dumps(entry)}\n" for entry in entries))
    # of prompts/evaluation_metadata.jsonl in djghosh13/geneval at af4902f
    assert sha256(path.read_bytes()).hexdigest() == "5c48e0813e812e3c373fa5c8ed07a8f0a483be30272b4427b0559c8048e67c13"
    return entries, path


def judged(requirements, prompt, found, colours):
    judge = GenEval(requirements, lambda *_: found, lambda _, objects, name: [colours[d.box] for d in objects])
    return judge.is_right(torch.zeros(3, 8, 8), prompt)


def verdicts(entries, requirements, draws=10):
    """By tag, the number of detections drawn for its prompts that are right; and the digest of all verdicts."""
    right, bits = Counter(), ""
    for entry, draw in product(entries, range(draws)):
        correct = judged(requirements, entry["prompt"], *drawn(entry, draw))
        right[entry["tag"]] += correct
        bits += str(int(correct))
    return dict(right), sha256(bits.encode()).hexdigest()


def test_all_553_official_prompts_are_read_and_judged_as_the_official_code_judges_them(metadata):
    entries, path = metadata
    requirements = load_requirements(str(path))
    assert list(requirements) == [entry["prompt"] for entry in entries] and len(entries) == 553
    assert [prompt.text for prompt in load_prompts(str(path))] == list(requirements)
    # What evaluate_image of evaluation/evaluate_images.py (the same commit) says of the same detections and colours.
    right = {
        "single_object": 717,
        "two_object": 780,
        "counting": 186,
        "colors": 719,
        "position": 228,
        "color_attr": 590,
    }
    digest = "e500b77087c4dddbb61af08b53dd377afd9bb323eb2cde19906719739764965f"
    assert verdicts(entries, requirements) == (right, digest)


@pytest.fixture(scope="module", params=[{}, OLD], ids=["coco", "old names"])
def segmenter(request, tmp_path_factory):
    """A tiny Mask2Former of random weights that knows COCO's classes."""
    from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, SwinConfig
    from transformers.models.mask2former.image_processing_pil_mask2former import Mask2FormerImageProcessorPil

    folder = tmp_path_factory.mktemp("mask2former")
    stages = dict(out_features=["stage1", "stage2", "stage3", "stage4"])
    backbone = SwinConfig(embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 1, 1], window_size=2, **stages)
    config = Mask2FormerConfig(
        backbone_config=backbone, feature_size=32, mask_feature_size=32, hidden_dim=32, encoder_feedforward_dim=16,
        encoder_layers=1, decoder_layers=2, num_attention_heads=2, dim_feedforward=16, num_queries=8,
        id2label={i: request.param.get(name, name) for i, name in enumerate(COCO)},
    )  # fmt: skip
    torch.manual_seed(0)
    Mask2FormerForUniversalSegmentation(config).save_pretrained(folder)
    Mask2FormerImageProcessorPil(size={"height": 64, "width": 64}).save_pretrained(folder)
    return TransformersDetector(str(folder))


def test_every_detection_of_a_segmenter_has_its_own_mask_and_box(segmenter, monkeypatch):
    """A confident dog and a confident cat, and six predictions of next to no score whose masks lie over them."""
    names = ["dog", "cat", "person", "person", "person", "dog", "cat", "dog"]
    classes, masks = torch.zeros(1, 8, len(COCO) + 1), torch.full((1, 8, 320, 400), -20.0)
    for query, name in enumerate(names):
        classes[0, query, COCO.index(name)] = 8.0 if query < 2 else 1.0
    masks[0, 0, 80:280, 20:160], masks[0, 1, 80:280, 220:360], masks[0, 2:7] = 20.0, 20.0, 20.0  # the last has no pixel
    outputs = SimpleNamespace(class_queries_logits=classes, masks_queries_logits=masks)
    monkeypatch.setattr(segmenter.network, "forward", lambda **_: outputs)
    found = segmenter(torch.rand(3, 320, 400), ["cat", "dog"])
    for name, box in (("dog", (20, 80, 160, 280)), ("cat", (220, 80, 360, 280))):
        first, *others = sorted(found[name], key=lambda d: -d.score)
        assert first.box == box and first.mask.sum() == 140 * 200 and first.mask.shape == (320, 400)
        assert first.score == pytest.approx(classes.softmax(-1).max().item(), abs=1e-6)
        assert [other.mask.sum() for other in others] == [320 * 400]


def test_scores_and_masks_of_a_segmenter_are_those_that_transformers_gives_one_by_one(segmenter, monkeypatch):
    rng = torch.Generator().manual_seed(0)
    classes, masks = torch.randn(1, 8, len(COCO) + 1, generator=rng), torch.randn(1, 8, 384, 384, generator=rng)
    outputs = SimpleNamespace(class_queries_logits=3 * classes, masks_queries_logits=masks)
    monkeypatch.setattr(segmenter.network, "forward", lambda **_: outputs)
    expected = segmenter.processor.post_process_instance_segmentation(
        outputs, threshold=0.0, target_sizes=[(384, 384)], return_binary_maps=True
    )[0]
    found = segmenter(torch.rand(3, 384, 384), COCO)
    assert sum(map(len, found.values())) == len(expected["segments_info"]) == 8
    for segment, mask in zip(expected["segments_info"], expected["segmentation"], strict=True):
        same = [d for d in found[COCO[segment["label_id"]]] if np.array_equal(d.mask, mask.bool().numpy())]
        assert [d.score for d in same] == [pytest.approx(segment["score"], abs=2e-6)]


def test_every_class_of_genevals_prompts_is_known_by_genevals_name(segmenter):
    names = [OTHER.get(name, name) for name in COCO]
    found = segmenter(torch.rand(3, 48, 64, generator=torch.Generator().manual_seed(0)), names)
    assert list(found) == names and 0 < sum(map(len, found.values())) <= 8
    with pytest.raises(ValueError, match="the detector does not know unicorn: "):
        segmenter(torch.rand(3, 48, 64), ["dog", "unicorn"])


def test_a_detector_of_boxes_is_not_asked_for_masks(tmp_path):
    from transformers import DetrConfig, DetrForObjectDetection, ResNetConfig
    from transformers.models.detr.image_processing_pil_detr import DetrImageProcessorPil

    backbone = ResNetConfig(embedding_size=8, hidden_sizes=[8] * 4, depths=[1] * 4, out_features=["stage4"])
    tower = dict(encoder_layers=1, decoder_layers=1, encoder_ffn_dim=8, decoder_ffn_dim=8)
    heads = dict(encoder_attention_heads=2, decoder_attention_heads=2, d_model=16, num_queries=4)
    labels = dict(id2label={0: "sofa", 1: "dog"}, use_timm_backbone=False, use_pretrained_backbone=False)
    torch.manual_seed(0)
    DetrForObjectDetection(
        DetrConfig(backbone_config=backbone, backbone=None, **tower, **heads, **labels)
    ).save_pretrained(tmp_path)
    DetrImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    found = TransformersDetector(str(tmp_path))(torch.rand(3, 40, 40), ["couch", "dog"])
    assert sum(map(len, found.values())) == 4 and all(d.mask is None for listed in found.values() for d in listed)


def test_a_model_that_is_no_detector_is_refused_before_it_is_loaded(tmp_path):
    from transformers import CLIPConfig, EomtConfig

    for config in (EomtConfig(), CLIPConfig()):
        config.save_pretrained(tmp_path)
        with pytest.raises(
            ValueError, match=f"is a {config.model_type}, no detector that is known here: use Mask2Former"
        ):
            TransformersDetector(str(tmp_path))


@pytest.fixture(scope="module")
def detector(tmp_path_factory):
    """The folder of a tiny OWLv2 of random weights."""
    from transformers import Owlv2Config, Owlv2ForObjectDetection
    from transformers.models.owlv2.image_processing_pil_owlv2 import Owlv2ImageProcessorPil

    folder = tmp_path_factory.mktemp("owl")
    tokenizer = build_tokenizer()
    tower = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    ends = dict(bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id)
    text = tower | dict(vocab_size=len(tokenizer), max_position_embeddings=16) | ends
    config = Owlv2Config(text_config=text, vision_config=tower | dict(image_size=32, patch_size=8), projection_dim=32)
    torch.manual_seed(0)
    Owlv2ForObjectDetection(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    Owlv2ImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)
    return str(folder)


def without_start_token(detector):
    """OWL takes a first token of 0 for padding, and this vocabulary starts its texts with 0."""
    detector.find.tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="$A", special_tokens=[])
    return detector


def test_a_detector_of_transformers_judges_prompts_from_the_metadata_file(detector, tmp_path):
    lines = [
        {
            "tag": "single_object",
            "prompt": "a circle",
            "include": [{"class": "circle", "count": 1, "color": "red"}],
            "exclude": [],
        },
        {
            "tag": "counting",
            "prompt": "two stars",
            "include": [{"class": "star", "count": 2}],
            "exclude": [{"class": "star", "count": 3}],
        },
    ]
    path = tmp_path / "evaluation_metadata.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)) + "\n")
    assert [tuple(prompt) for prompt in load_prompts(str(path))] == [
        ("a circle", "single_object"),
        ("two stars", "counting"),
    ]
    images = torch.rand(2, 3, 40, 40, generator=torch.Generator().manual_seed(0))
    detected = without_start_token(TransformersDetector(detector))(images[0], ["circle", "star"])
    assert (
        set(detected) == {"circle", "star"}
        and all(len(d.box) == 4 and 0 <= d.score <= 1 for d in detected["circle"])
        and detected["circle"]
    )
    clip = str(clip_folder(tmp_path / "clip"))
    strict = load_geneval(
        GenEvalConfig(detector=detector, colours=clip, threshold=1.0, counting_threshold=1.0), [str(path)]
    )
    assert strict(images, ["a circle", "two stars"]).tolist() == [0.0, 0.0]
    lax = load_geneval(
        GenEvalConfig(detector=detector, colours=clip, threshold=0.0, counting_threshold=0.0), [str(path)]
    )
    without_start_token(lax.detect)
    assert not lax.is_right(images[1], "two stars"), "more than two"
    assert set(lax(images, ["a circle", "two stars"]).tolist()) <= {0.0, 1.0}
