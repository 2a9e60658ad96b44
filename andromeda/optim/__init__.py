"""How parameters are updated: their roles, the optimizers, the schedule of the learning rate, and clipping."""

from andromeda.optim.build import Optimizer, build_optimizer
from andromeda.optim.clipping import clip
from andromeda.optim.muon import Muon
from andromeda.optim.param_groups import roles
from andromeda.optim.schedules import build_schedule

__all__ = ["Muon", "Optimizer", "build_optimizer", "build_schedule", "clip", "roles"]
