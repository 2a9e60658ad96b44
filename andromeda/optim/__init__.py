"""How parameters are updated: their roles, the optimizers, the schedule of the learning rate, and clipping."""

from andromeda.optim.build import Optimizer, build_optimizer
from andromeda.optim.clip import clip
from andromeda.optim.groups import roles
from andromeda.optim.muon import Muon
from andromeda.optim.schedule import build_schedule

__all__ = ["Muon", "Optimizer", "build_optimizer", "build_schedule", "clip", "roles"]
