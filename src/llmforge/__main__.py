"""`python -m llmforge` is `llmforge`."""

from llmforge.cli.main import main

if __name__ == "__main__":
    main()
