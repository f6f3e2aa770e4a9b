"""A load client for any OpenAI-compatible server: what is sent, how it is sent, and what is reported.

It imports neither torch nor ray, and shares no code with the server that it measures.
"""
