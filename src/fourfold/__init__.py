"""Fourfold: serves sparse Mixture-of-Experts language models, and trains the ones it serves."""

__version__ = "0.1.0"
