"""The public names of flowbp: `__init__.py` reads from here which module holds each, and so do editors."""

import logging

from flowbp.backbones import load_backbone as load_backbone
from flowbp.backbones.base import bind_velocity as bind_velocity
from flowbp.config import RunConfig as RunConfig
from flowbp.guidance import Guidance as Guidance
from flowbp.guidance import GuidedVelocity as GuidedVelocity
from flowbp.methods import METHODS as METHODS
from flowbp.methods import DRaFTLV as DRaFTLV
from flowbp.methods import DRTune as DRTune
from flowbp.methods import FlowBPBridge as FlowBPBridge
from flowbp.methods import FlowBPLagrange as FlowBPLagrange
from flowbp.methods import FlowBPSparse as FlowBPSparse
from flowbp.methods import LeapAlign as LeapAlign
from flowbp.methods import ReFL as ReFL
from flowbp.plan import Bridge as Bridge
from flowbp.plan import PosteriorMean as PosteriorMean
from flowbp.plan import SurrogatePlan as SurrogatePlan
from flowbp.rewards import load_reward as load_reward
from flowbp.surrogate import backward as backward
from flowbp.surrogate import reward_input as reward_input
from flowbp.training.run import train as train
from flowbp.trajectory import Trajectory as Trajectory
from flowbp.trajectory import rollout as rollout
from flowbp.trajectory import rollout_with_graph as rollout_with_graph

__version__: str
log: logging.Logger
