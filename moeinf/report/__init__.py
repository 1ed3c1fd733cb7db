"""Pictures of traces: one self-contained HTML file that reads well on a phone and a laptop.

`analysis` computes, `figures` draws (matplotlib, the `report` extra), `page` writes HTML.
"""

from moeinf.report.page import write_pngs, write_report

__all__ = ["write_pngs", "write_report"]
