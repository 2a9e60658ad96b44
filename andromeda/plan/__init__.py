"""What a run needs, before it is started: parameters, FLOPs, memory, time and cost, computed from its configuration."""

from andromeda.plan.estimate import HardwareSetup, RunPlan, plan

__all__ = ["HardwareSetup", "RunPlan", "plan"]
