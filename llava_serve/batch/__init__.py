"""Jobs of many questions: a file of them in, a file of answers out. Imports no torch until the model is loaded."""
