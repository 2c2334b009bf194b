"""The whole host on a machine without a GPU: what the driver asks for, what every process replaces, vLLM's side."""
