"""The mathematics of the attention: pure functions of tensors, [B, T, H, D] at every door.

B rows, T tokens, HQ query heads, H key heads, G = HQ // H, D and Dv widths of a key and a value head, N retrieval
blocks, S selected blocks or queries of a segment, Z rows times key heads.
"""

from bsbr.ops.attention import bsbr_attention, resolve_backend
from bsbr.ops.merge import merge_attn_states
from bsbr.ops.reference import reference_attention
from bsbr.ops.summaries import CALIBRATION, UNCALIBRATED, Summaries, log_mass, summarize

__all__ = [
    "CALIBRATION",
    "UNCALIBRATED",
    "Summaries",
    "bsbr_attention",
    "log_mass",
    "merge_attn_states",
    "reference_attention",
    "resolve_backend",
    "summarize",
]
