"""Converting a model to 4-bit weights, layer by layer: calibration, measuring, writing."""
