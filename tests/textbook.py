"""Attention in NumPy, from docs/examples/attention.py: what the references are checked with."""

import importlib.util
from pathlib import Path

_PATH = Path(__file__).resolve().parents[1] / "docs" / "examples" / "attention.py"
_spec = importlib.util.spec_from_file_location("attention_example", _PATH)
_module = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_module)

softmax = _module.softmax
log_sum_exp = _module.log_sum_exp
cross_attention = _module.cross_attention
self_attention = _module.self_attention
window_attention = _module.window_attention
causal_attention = _module.causal_attention
multi_head_attention = _module.multi_head_attention
