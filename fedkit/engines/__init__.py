"""The same strategies on other engines."""
