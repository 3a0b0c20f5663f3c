"""Data to teach a language model to answer."""
