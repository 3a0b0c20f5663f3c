"""Training under N mask instances."""
