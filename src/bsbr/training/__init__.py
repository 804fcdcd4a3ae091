"""Training: from random weights, and fitting what a conversion adds."""
