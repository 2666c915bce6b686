"""Figures, tables and one page from run folders alone: `python -m fedsim.report RUN... --out DIR`."""
