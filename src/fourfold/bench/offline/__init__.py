"""`fourfold bench offline`: the engine alone on one model, beside other engines in the same run.

`config` holds the options and `cases` what their names mean. `engines` is what runs in an engine's
own process: it reads a `task`, loads `ours` or one of the `others`, and `measure` makes a case's
figures of either. `floors` are what the device allows, `trace` is its timeline. `main` takes turns
between the engines and records the medians, beside `marks`.
"""
