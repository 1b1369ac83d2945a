"""`fourfold bench offline`: the engine alone on one model, beside other engines in the same run.

`config` holds the options, `engines` the contestants (each runs in a process of its own), `main`
takes turns between them and records the medians.
"""
