"""What the engine computes with: every tensor is in here."""
