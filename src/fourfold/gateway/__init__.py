"""Admits requests, turns text to tokens and back, and follows each request to its end."""
