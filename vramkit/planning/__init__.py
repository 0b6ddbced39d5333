"""Plans: how a pipeline runs within a budget, worked out before it runs, kept while it does, and explained."""

from vramkit.planning.fitting import Fit, fit
from vramkit.planning.plans import ComponentPlan, Decode, PhasePlan, Plan
from vramkit.planning.sources import plan

__all__ = ["ComponentPlan", "Decode", "Fit", "PhasePlan", "Plan", "fit", "plan"]
