"""The command line: one module per command, each a parser and a short main."""
