"""One HTML page about an evaluation, complete in itself: no scripts, no network, for light and dark screens and phones.

  page.py      the page and its sections          shown.py    what of a response may be printed
  rows.py      one row in full, links to it       figures.py  drawings
  trace.py     tokens coloured by P(malicious)    markup.py   tables and text
"""

from saess_jax.report.page import write_report

__all__ = ["write_report"]
