"""Training data: sources, record formats, chat encoding, packing, mixing, and the embedded world. Imports no torch."""
