"""Results shown: tables for a terminal, one HTML file for everybody else.

Reads `results`, computes nothing of its own.
"""
