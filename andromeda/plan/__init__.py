"""What a run will need before it is started: parameters, FLOPs, memory, time and cost, computed from its configuration."""

from andromeda.plan.estimate import Place, Plan, plan

__all__ = ["Place", "Plan", "plan"]
