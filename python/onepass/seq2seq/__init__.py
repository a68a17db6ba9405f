"""Whole sequence-to-sequence systems: encoder, decoders, search, training."""
