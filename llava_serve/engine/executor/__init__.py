"""The part of the engine that computes. All of its tensors are here."""
