"""Attentions that BSBR is compared with, one small file each, on [B, T, H, D] like the ops."""

from bsbr.peers.additive import AdditiveConfig, additive_attention
from bsbr.peers.full import full_attention
from bsbr.peers.local import local_attention
from bsbr.peers.moba import moba_attention
from bsbr.peers.value_only import ValueOnlyConfig, value_only_attention

__all__ = [
    "AdditiveConfig",
    "ValueOnlyConfig",
    "additive_attention",
    "full_attention",
    "local_attention",
    "moba_attention",
    "value_only_attention",
]
