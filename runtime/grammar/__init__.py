"""JSON schemas to GBNF grammars."""
