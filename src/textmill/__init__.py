"""textmill serves large language models over HTTP behind TGI's contract. Importing this costs nothing."""

__version__ = "0.1.0"
