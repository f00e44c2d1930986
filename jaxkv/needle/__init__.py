"""The tokenizer, the rows and the training of the shipped checkpoint."""
