"""Differentiable operators, each with several backends behind one function."""

from mfuser.ops.dispatch import BackendError, available, explain, resolve
from mfuser.ops.ms_deform_attn import ms_deform_attn
from mfuser.ops.selective_scan import selective_scan

__all__ = ["BackendError", "available", "explain", "ms_deform_attn", "resolve", "selective_scan"]
