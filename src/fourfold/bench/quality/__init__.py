"""`fourfold bench quality`: what a precision costs, on real text.

`config` holds the options, `main` measures: perplexity of the text's own tokens and how often the
likeliest next token is the one that float32 computes.
"""
