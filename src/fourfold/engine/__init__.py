"""One worker's heart: requests become steps, steps become tokens."""
