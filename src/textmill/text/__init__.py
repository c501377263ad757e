"""Text in and out of tokens: tokenizers, incremental decoding, stop strings, chat templates. Never imports torch."""
