"""Averages the gradients of parameters over replicas of a pipeline."""

from .gradient_reduction import GradientReduction
from .local_group import LocalGroup
from .member import Member, Work
from .process_group import ProcessGroupMember

__all__ = ["GradientReduction", "LocalGroup", "Member", "ProcessGroupMember", "Work"]
