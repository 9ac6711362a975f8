"""The backbone of each pipeline class. To add one, add a file and a line here."""

from flowbp.backbones.base import Backbone
from flowbp.backbones.flux import FluxBackbone
from flowbp.backbones.flux2 import Flux2Backbone
from flowbp.backbones.sd3 import SD3Backbone
from flowbp.backbones.zimage import ZImageBackbone

BACKBONES: dict[str, type[Backbone]] = {
    "StableDiffusion3Pipeline": SD3Backbone,
    "FluxPipeline": FluxBackbone,
    "Flux2KleinPipeline": Flux2Backbone,
    "ZImagePipeline": ZImageBackbone,
}
