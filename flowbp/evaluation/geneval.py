"""Does an image show what its prompt says? GenEval's judgement by an object detector (Ghosh et al. 2023, arXiv
2310.11513).

Each prompt comes with what its image must hold, in a line of evaluation_metadata.jsonl:

    {"tag": "position", "prompt": "a photo of a dog right of a bench", "include": [{"class": "bench", "count": 1},
     {"class": "dog", "count": 1, "position": ["right of", 0]}], "exclude": []}

All `include` clauses must hold and no `exclude` clause may. An include clause with count n is judged on the n most
confident detections of its class, and fails if there are fewer. "color" asks for that colour in all n. "position"
[relation, i] asks all n to stand in that relation to every object of the i-th include clause. An exclude clause is
broken by `count` detections or more. Detections count above a score of .3, or .9 for the tag "counting", at most 16 a
class.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Literal, Self

import numpy as np
import torch
from PIL import Image
from pydantic import BaseModel, Field, NonNegativeInt, PositiveInt, StringConstraints, ValidationError, model_validator
from torch import Tensor
from torch.nn import functional as F

from flowbp.config.loading import readable
from flowbp.config.schema import GenEvalConfig
from flowbp.given import cut, once, read_data, read_text, short
from flowbp.rewards import load_reward
from flowbp.rewards.clip import CLIPReward, image_features
from flowbp.rewards.preprocessing import fit_short_side, normalise

GENEVAL = read_data(__file__, "geneval.yaml")
COLOURS, RELATIONS, TEMPLATES, COCO_NAMES = (GENEVAL[key] for key in ("colours", "relations", "templates", "names"))
BACKGROUND = 0.6  # grey #999 around a masked object
MOST_OBJECTS = 16  # of a class
SLACK = 0.1  # share of the two objects' sizes; a smaller offset is no relation


@dataclass(frozen=True)
class Detection:
    """An object in an image. box: (left, top, right, bottom) in pixels. mask: [H, W] bool, if the detector segments."""

    box: tuple[float, float, float, float]
    score: float
    mask: np.ndarray | None = None


Detections = Mapping[str, Sequence[Detection]]  # by class, most confident first


class Clause(BaseModel, frozen=True):
    """`count` objects of a class, perhaps of a colour and in a relation to the objects of an earlier include clause."""

    name: str = Field(alias="class")
    count: PositiveInt
    colour: Literal[*COLOURS] | None = Field(None, alias="color")
    position: tuple[Literal[*RELATIONS], NonNegativeInt] | None = None


class Requirement(BaseModel, frozen=True):
    """What the image of a prompt must hold and must not: an object of evaluation_metadata.jsonl. Raises ValidationError
    for a colour, relation or reference that GenEval does not have.
    """

    tag: str
    prompt: Annotated[str, StringConstraints(strip_whitespace=True)]
    include: tuple[Clause, ...] = ()
    exclude: tuple[Clause, ...] = ()

    @model_validator(mode="after")
    def refers_backwards(self) -> Self:
        for i, clause in enumerate(self.include):
            if clause.position is not None and clause.position[1] >= i:
                raise ValueError(f"the position {clause.position} of clause {i} must name an earlier clause")
        return self


def load_requirements(path: str) -> dict[str, Requirement]:
    """The requirement of each prompt of an evaluation_metadata.jsonl. Raises ValueError for a line that is none, or
    that contradicts another.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path!r} is no file: a detector judges the prompts of a .jsonl of GenEval's metadata")
    requirements: dict[str, Requirement] = {}
    for number, line in enumerate(read_text(Path(path)).split("\n"), 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            requirement = Requirement.model_validate(json.loads(line, object_pairs_hook=once))
        except (ValueError, RecursionError) as error:
            cause = readable(error.errors()[0]) if isinstance(error, ValidationError) else repr(error)
            raise ValueError(f"{where}: {cut(cause, 300)}; a line has tag, prompt, include and exclude") from error
        prompt = requirement.prompt
        if requirements.setdefault(prompt, requirement) != requirement:
            raise ValueError(f"{where}: {short(prompt)} stands there twice with other requirements; word one otherwise")
    return requirements


# -- the judgement -----------------------------------------------------------------------------------------------------


def relations(a: Sequence[float], b: Sequence[float]) -> set[str]:
    """The relations in which box a stands to box b.

    d is the offset of their centres. Along each axis it is shortened by .1 of the sum of their sizes, then divided by
    |d|. A relation holds where the result exceeds .5 in its direction.
    """
    (a0, a1), (b0, b1) = (np.asarray(box, dtype=float)[:4].reshape(2, 2) for box in (a, b))
    offset = (a0 + a1 - b0 - b1) / 2
    rest = np.maximum(abs(offset) - SLACK * (abs(a1 - a0) + abs(b1 - b0)), 0) * np.sign(offset)
    if (abs(rest) < 1e-3).all():
        return set()
    x, y = rest / np.linalg.norm(offset)
    holds = {"left of": x < -0.5, "right of": x > 0.5, "above": y < -0.5, "below": y > 0.5}
    return {relation for relation, true in holds.items() if true}


@dataclass
class GenEval:
    """The scorer (images [B, 3, H, W] in [0, 1], prompts) -> [B]: 1 where every requirement of the prompt is met, else
    0.

    detect: (image [3, H, W] in [0, 1], classes) -> what is there.  name_colours: (image, detections, class) -> one of
    COLOURS for each detection.
    """

    requirements: Mapping[str, Requirement]
    detect: Callable[[Tensor, Sequence[str]], Detections]
    name_colours: Callable[[Tensor, Sequence[Detection], str], list[str]]
    threshold: float = 0.3
    counting_threshold: float = 0.9

    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        right = [self.is_right(image, prompt) for image, prompt in zip(images, prompts, strict=True)]
        return torch.tensor(right, dtype=torch.float32)

    def is_right(self, image: Tensor, prompt: str) -> bool:
        """Whether the image [3, H, W] shows what its prompt says. Raises ValueError for one without a requirement."""
        if prompt not in self.requirements:
            raise ValueError(f"no GenEval metadata for the prompt {short(prompt)}: evaluation.prompts must be its file")
        requirement = self.requirements[prompt]
        least = self.counting_threshold if requirement.tag == "counting" else self.threshold
        classes = list(dict.fromkeys(clause.name for clause in (*requirement.include, *requirement.exclude)))
        detected = {
            name: [d for d in sorted(detections, key=lambda d: -d.score) if d.score > least][:MOST_OBJECTS]
            for name, detections in self.detect(image, classes).items()
        }
        held: list[Sequence[Detection]] = []  # the objects of each include clause so far
        for clause in requirement.include:
            objects = detected.get(clause.name, [])[: clause.count]
            held.append(objects)
            if len(objects) < clause.count:
                return False
            if clause.colour is not None and set(self.name_colours(image, objects, clause.name)) != {clause.colour}:
                return False
            if clause.position is not None:
                relation, target = clause.position
                if any(relation not in relations(a.box, b.box) for a in objects for b in held[target]):
                    return False
        return all(len(detected.get(clause.name, [])) < clause.count for clause in requirement.exclude)


# -- networks ----------------------------------------------------------------------------------------------------------


def load_geneval(config: GenEvalConfig, metadata: Sequence[str], device: str = "cpu") -> GenEval:
    """The scorer that `config` describes, for the prompts of the files `metadata`."""
    requirements = {prompt: requirement for path in metadata for prompt, requirement in load_requirements(path).items()}
    networks = TransformersDetector(config.detector, device), ClipColours(load_reward("clip", config.colours, device))
    return GenEval(requirements, *networks, config.threshold, config.counting_threshold)


class TransformersDetector:
    """A detector of transformers: zero-shot (OWLv2, Grounding DINO), segmenting (Mask2Former, MaskFormer) or of fixed
    classes (DETR), as its config tells.

    model: a local folder or Hub id. A detector of fixed classes must know every class that it is asked for: for
    GenEval's prompts, those of COCO.
    """

    def __init__(self, model: str, device: str = "cpu"):
        from transformers import AutoConfig, AutoImageProcessor, AutoModelForUniversalSegmentation, pipeline
        from transformers.models.auto import modeling_auto

        config = AutoConfig.from_pretrained(model)
        self.zero_shot = config.model_type in modeling_auto.MODEL_FOR_ZERO_SHOT_OBJECT_DETECTION_MAPPING_NAMES
        self.segments = config.model_type in ("mask2former", "maskformer")
        self.labels = {label: coco_name(name) for label, name in config.id2label.items()}
        if self.segments:
            self.processor = AutoImageProcessor.from_pretrained(model)
            self.network = AutoModelForUniversalSegmentation.from_pretrained(model).to(device).eval()
        elif self.zero_shot or config.model_type in modeling_auto.MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES:
            task = "zero-shot-object-detection" if self.zero_shot else "object-detection"
            self.find = pipeline(task, model=model, device=device)
        else:
            usable = "use Mask2Former, MaskFormer, a detector of boxes as DETR is, or a zero-shot one as OWLv2"
            raise ValueError(f"{model} is a {config.model_type}, no detector that is known here: {usable}")

    @torch.no_grad()
    def __call__(self, image: Tensor, classes: Sequence[str]) -> dict[str, list[Detection]]:
        """Detections of each class, at any score."""
        found: dict[str, list[Detection]] = {coco_name(name): [] for name in classes}
        if not self.zero_shot and (unknown := ", ".join(sorted(found.keys() - set(self.labels.values())))):
            raise ValueError(f"the detector does not know {unknown}: use one that knows COCO's classes, or OWLv2")
        if self.segments:
            self.segment(image, found)
        else:
            labels = {"candidate_labels": list(classes)} if self.zero_shot else {}
            for row in self.find(as_picture(image), threshold=0.0, **labels):
                box = tuple(float(row["box"][key]) for key in ("xmin", "ymin", "xmax", "ymax"))
                found.get(coco_name(row["label"]), []).append(Detection(box, row["score"]))
        return {name: found[coco_name(name)] for name in classes}

    def segment(self, image: Tensor, found: Mapping[str, list[Detection]]) -> None:
        """Append to `found` the predictions of its classes, each with its own mask, by Mask2Former's published rule.

        Of all pairs of a query and a class the likeliest count, as many as there are queries. A score is the class's
        probability times the mean probability within the mask. (The pipeline of transformers paints all masks into one
        map, where weak ones hide strong ones.)
        """
        inputs = self.processor(images=[as_picture(image)], return_tensors="pt").to(self.network.device)
        outputs = self.network(**inputs)
        chances = outputs.class_queries_logits[0].softmax(dim=-1)[:, :-1]
        best = chances.flatten().topk(len(chances))
        for chance, place in zip(best.values.tolist(), best.indices.tolist(), strict=True):
            query, label = divmod(place, chances.shape[1])
            if self.labels[label] not in found:
                continue
            logits = F.interpolate(outputs.masks_queries_logits[:, [query]], image.shape[-2:], mode="bilinear")[0, 0]
            mask = (logits > 0).cpu().numpy()
            if box := Image.fromarray(mask).getbbox():
                score = chance * logits[logits > 0].sigmoid().mean().item()
                found[self.labels[label]].append(Detection(box, score, mask))


def coco_name(name: str) -> str:
    """A class by COCO's name, in lower case."""
    return COCO_NAMES.get(name.lower(), name.lower())


def as_picture(image: Tensor) -> Image.Image:
    """[3, H, W] in [0, 1] -> a Pillow image."""
    return Image.fromarray((image.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy())


class ClipColours:
    """Names the colour of detections: the one of `COLOURS` whose text lies nearest to the crop in CLIP's space.

    A colour's text is the mean of three templates. If the detector segments, all but the object is painted grey first.
    Crops are prepared as by open_clip, which GenEval uses.
    """

    def __init__(self, clip: CLIPReward):
        self.clip, self.texts = clip, cache(self.embed)

    @torch.no_grad()
    def __call__(self, image: Tensor, detections: Sequence[Detection], name: str) -> list[str]:
        clip = self.clip
        crops = torch.cat([fit_short_side(crop(image, detection)[None], clip.size) for detection in detections])
        embedded = F.normalize(image_features(clip.model, normalise(crops, clip.mean, clip.std)), dim=-1)
        return [COLOURS[i] for i in (embedded @ self.texts(name).T).argmax(dim=1).tolist()]

    def embed(self, name: str) -> Tensor:
        """One unit vector a colour, for objects of the class `name`. `texts` remembers them."""
        model = self.clip.model
        lines = [template.format(colour=colour, name=name) for colour in COLOURS for template in TEMPLATES]
        tokens = self.clip.tokenizer(lines, padding=True, truncation=True, return_tensors="pt").to(model.device)
        embedded = F.normalize(model.get_text_features(**tokens).pooler_output, dim=-1)
        return F.normalize(embedded.view(len(COLOURS), len(TEMPLATES), -1).mean(dim=1), dim=-1)


def crop(image: Tensor, detection: Detection) -> Tensor:
    """The detection's part of the image [3, H, W], at least one pixel wide and high, grey outside its mask."""
    if detection.mask is not None:
        image = torch.where(torch.from_numpy(detection.mask).to(image.device), image, BACKGROUND)
    height, width = image.shape[-2:]
    x0, y0, x1, y1 = detection.box
    left, top = min(max(int(x0), 0), width - 1), min(max(int(y0), 0), height - 1)
    return image[:, top : max(int(np.ceil(y1)), top + 1), left : max(int(np.ceil(x1)), left + 1)]
