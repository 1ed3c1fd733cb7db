"""Pictures of traces: one self-contained HTML file that reads well on a phone and a laptop.

`analysis` computes the numbers, `findings` writes one sentence about each picture, `figures` draws
them (matplotlib, the `report` extra), and `page` writes the HTML.
"""

from moeinf.report.page import write_pngs, write_report

__all__ = ["write_pngs", "write_report"]
