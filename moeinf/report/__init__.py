"""Pictures of traces: one self-contained HTML file that reads well on a phone and a laptop.

`analysis` computes, `findings` says it in a sentence, `figures` draws (matplotlib, the `report`
extra), `page` writes HTML.
"""

from moeinf.report.page import write_pngs, write_report

__all__ = ["write_pngs", "write_report"]
