"""Adapting whole models: select layers, rewrite them, report."""
