"""How the builtin model was made: scenes, questions, tokenizer, two stages of training, export and evaluation."""
