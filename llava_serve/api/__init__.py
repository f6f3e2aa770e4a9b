"""The web app: OpenAI's API over anything that prepares prompts and generates chunks."""
