"""How tensors pass between replicas: what a group offers its members, and the group within one process."""

from .local import LocalGroup
from .member import Member, Work

__all__ = ["LocalGroup", "Member", "Work"]
