"""The model: vision tower, projector and language model, and how their weights are loaded."""
