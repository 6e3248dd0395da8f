"""llmforge compiles large language models into one engine per GPU rank, and runs them."""

__version__ = "0.1.0"
