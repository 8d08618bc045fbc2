"""How weights travel from the trainer into vLLM's workers: one file a transport, its two sides in it."""
