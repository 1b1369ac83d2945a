"""Every number the README states: how it is measured, recorded and shown.

`record` is the one schema of all benchmark records, `figures` knows how to read a figure, `tables`
writes the README's tables, and `serve` loads an OpenAI-compatible server (`fourfold bench serve`).
"""
