"""How parameters are updated: their roles, the optimizers, the schedule of the learning rate, and clipping."""

from andromeda.optim.clipping import clip_gradients
from andromeda.optim.muon import Muon
from andromeda.optim.optimizer import OptimizerContainer, build_optimizer, default_lr, find_optimizer, optimizer_state_bytes
from andromeda.optim.optimizer_kind import OptimizerKind
from andromeda.optim.param_groups import parameter_roles
from andromeda.optim.schedules import build_schedule

__all__ = [
    "Muon",
    "OptimizerContainer",
    "OptimizerKind",
    "build_optimizer",
    "build_schedule",
    "clip_gradients",
    "default_lr",
    "find_optimizer",
    "optimizer_state_bytes",
    "parameter_roles",
]
