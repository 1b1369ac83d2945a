"""What a precision costs: `fourfold bench quality` on real text, `fourfold bench layers` by layer.

`config` holds the options of the first, `main` measures: perplexity of the text's own tokens, how
often the likeliest next token is the one that float32 computes, and whether facts (`needles`) are
found again. `layers_config` holds the options of the second, `layers` takes three models' `streams`
through one layer at a time: in bfloat16, as served, and in `plain` float32.
"""
