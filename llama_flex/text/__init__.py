"""Text: tokenizer backends, chat templates and their worker process, streaming detokenization."""
