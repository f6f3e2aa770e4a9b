"""From messages to spans: templates, and the conversations that they render."""
