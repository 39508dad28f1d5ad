"""Where descriptors and memory kinds live: one protocol, one module per kind."""
