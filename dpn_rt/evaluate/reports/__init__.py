"""Scored answers files -> tables, plots and a page."""
