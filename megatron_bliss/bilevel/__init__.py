"""The bilevel mathematics in plain torch, testable with toy models."""
