"""Figures and the page that people read.

A figure is described once (`chart`), from a fit alone (`law_figures`, `multiplier_figures`), and drawn twice: on paper
with matplotlib (`static`) and on screen with plotly (`interactive`). The page (`page`) assembles figures, tables and
provenance into one HTML file that opens without a network.
"""
