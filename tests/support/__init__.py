"""What tests share. Tests import it, and never each other."""
