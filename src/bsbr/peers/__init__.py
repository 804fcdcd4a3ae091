"""Attentions that BSBR is compared with, one small file each, on [B, T, H, D] like the ops."""

from bsbr.peers.additive import AdditiveConfig, additive_attention
from bsbr.peers.cost import Cost, cost
from bsbr.peers.full import FullConfig, full_attention
from bsbr.peers.gated_delta import GatedDeltaConfig, gated_delta_attention, gated_delta_layer, gated_delta_weights
from bsbr.peers.linear import LinearConfig, linear_attention
from bsbr.peers.local import local_attention
from bsbr.peers.moba import moba_attention
from bsbr.peers.named import PEERS, make
from bsbr.peers.nsa import NSAConfig, nsa_attention, nsa_weights
from bsbr.peers.settings import PeerConfig, Shape
from bsbr.peers.value_only import ValueOnlyConfig, value_only_attention
from bsbr.peers.window import WindowConfig, window_attention

__all__ = [
    "PEERS",
    "AdditiveConfig",
    "Cost",
    "FullConfig",
    "GatedDeltaConfig",
    "LinearConfig",
    "NSAConfig",
    "PeerConfig",
    "Shape",
    "ValueOnlyConfig",
    "WindowConfig",
    "additive_attention",
    "cost",
    "full_attention",
    "gated_delta_attention",
    "gated_delta_layer",
    "gated_delta_weights",
    "linear_attention",
    "local_attention",
    "make",
    "moba_attention",
    "nsa_attention",
    "nsa_weights",
    "value_only_attention",
    "window_attention",
]
