"""Continuous batching over a vision-language model. It knows token ids only: no text, no templates, no HTTP."""
