"""How each quarter of the work is computed: prefill and decode, attention and FFN."""
