"""Quantization: which linears (layout), how their inputs are reshaped (methods), from what data (calibrate),
kept as one file (artifact)."""
