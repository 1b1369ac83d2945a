"""Our tensor RPC: pages of keys and values from one worker's memory into another's."""
