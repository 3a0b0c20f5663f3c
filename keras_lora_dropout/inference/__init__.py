"""Predicting with N mask instances."""
