"""Training data: from texts to batches whose order is known beforehand.

`documents` reads texts from files, `bpe` trains a tokenizer on them, `encoding` makes ids of them
and `tokenizing` writes these into `shards`: token ids on disk with the ends of their documents.
`grammar` writes made-up text there whose entropy is known. `batches` cuts rows from shards.
`packages` gathers a corpus of real text from what is installed on this machine, and `sampling` one
from a model.
"""
