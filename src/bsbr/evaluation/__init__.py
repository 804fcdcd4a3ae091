"""How close a converted model is to its original, and what it costs: measured, with intervals, resumable."""
