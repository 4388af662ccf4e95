"""Figures and the HTML page, made from files only."""
