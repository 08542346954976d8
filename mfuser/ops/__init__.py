"""Differentiable operators, each with several backends behind one function."""

from mfuser.ops.dispatch import BackendError, available, explain, ran_since, resolve, tally
from mfuser.ops.ms_deform_attn import ms_deform_attn
from mfuser.ops.mvfuser import mvfuser
from mfuser.ops.selective_scan import selective_scan

__all__ = ["BackendError", "available", "explain", "ms_deform_attn", "mvfuser", "ran_since", "resolve", "selective_scan", "tally"]
