"""Many workers as one engine: who computes what, and what becomes of it when one of them dies."""
