"""Training data: from texts to batches whose order is known beforehand.

`documents` reads texts from files, `bpe` trains a tokenizer on them, `encoding` makes ids of them
and `tokenizing` writes these into `shards`: token ids on disk with the ends of their documents.
`batches` cuts rows from shards, or takes them from a `markov` or `grammar` source, which never ends
and whose entropy is known. `packages` gathers a corpus of real text from what is installed on this
machine, and `sampling` one from a model.
"""
