"""Text and tables as HTML; everything that comes from outside is escaped here."""

from __future__ import annotations

import html
from collections.abc import Sequence

from saess_jax.metrics import percent
from saess_jax.terminal import printable

NAMES = {"base": "base model", "plain": "trained, without [CLS]", "saess": "SA-ESS"}
NONE = "–"

STYLE = """
:root { color-scheme: light dark; --ink: #1d2329; --soft: #5d6771; --line: #d9dee3; --page: #fcfcfb;
  --panel: #f3f4f3; --link: #24679b; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e7ea; --soft: #9aa4ad; --line: #343b42; --page: #15181b; --panel: #1e2226; --link: #7db9e8; }
}
html { -webkit-text-size-adjust: 100%; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", sans-serif; overflow-wrap: anywhere; }
main { max-width: 50rem; margin: 0 auto; padding: 2.5rem 1.1rem 5rem; }
h1 { font-size: 1.4rem; line-height: 1.35; font-weight: 600; margin: .3rem 0 1rem; }
h2 { font-size: 1.15rem; margin: 3rem 0 .4rem; padding-top: 1rem; border-top: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 1.6rem 0 .2rem; }
a { color: var(--link); } nav { margin: 1rem 0; font-size: .9rem; } nav a { margin-right: 1rem;
  white-space: nowrap; }
p { margin: .5rem 0; } .soft, figcaption { color: var(--soft); font-size: .88rem; }
figure { margin: 1rem 0; max-width: 40rem; } figure svg { width: 100%; height: auto; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(20rem, 100%), 1fr)); gap: 0 2rem; }
.scroll { overflow-x: auto; margin: .6rem 0; } table { border-collapse: collapse; width: 100%; font-size: .88rem;
  font-variant-numeric: tabular-nums; }
th, td { text-align: left; vertical-align: top; padding: .4rem .8rem .4rem 0; border-bottom: 1px solid var(--line);
  overflow-wrap: break-word; }
th { color: var(--soft); font-weight: 500; } thead th { vertical-align: bottom; }
th[scope=rowgroup] { color: var(--ink); font-weight: 600; padding-top: 1.1rem; }
td:last-child, th:last-child { padding-right: 0; }
.list .text { min-width: 11rem; }
details { margin: .5rem 0; } summary { cursor: pointer; color: var(--soft); font-size: .88rem; }
.row { background: var(--panel); border-radius: 8px; padding: .2rem 1rem; scroll-margin-top: 4rem; }
.row:target { outline: 2px solid var(--link); } .row th { width: 8.5rem; }
.trace { background: var(--panel); border-radius: 8px; padding: .8rem 1rem;
  font: .85rem/2.1 ui-monospace, Menlo, Consolas, monospace; }
.trace span { white-space: pre-wrap; padding: .15rem .05rem; border-bottom: 3px solid transparent;
  background: rgb(201 69 63 / calc(.75 * var(--p, 0))); }
.trace .alarm { border-bottom: 3px dotted #c9453f; } .trace .confirmed { border-bottom-color: #c9453f; }
.trace .malicious { border-bottom: 3px double #c9453f; }
.trace b { background: var(--ink); color: var(--page); border-radius: 4px; padding: .1rem .45rem; font-weight: 600;
  margin: 0 .2rem; white-space: nowrap; } .trace i { color: var(--soft); }
.tag { border: 1px solid var(--line); border-radius: 99px; padding: .05rem .55rem; font-size: .8rem;
  white-space: nowrap; }
@media (max-width: 40rem) {
  .row { padding: .2rem .7rem; } .row th { width: 5.5rem; }
  .list thead { display: none; } .list tr { display: block; border-bottom: 1px solid var(--line); padding: .4rem 0; }
  .list td { display: inline-block; border: 0; padding: 0 .9rem 0 0; } .list td.text { display: block; padding: 0; }
  .list td[data-head]::before { content: attr(data-head) " "; color: var(--soft); }
}
"""


class Raw(str):
  """HTML that is escaped already."""


def escape(text: str) -> str:
  return text if isinstance(text, Raw) else html.escape(text)


def section(title: str, body: str, name: str) -> str:
  """A section that links can name; "" without a body."""
  return f"<section id='{name}'><h2>{escape(title)}</h2>\n{body}</section>\n" if body else ""


def table(heads: Sequence[str], lines: Sequence[Sequence[str]], caption: str = "") -> str:
  """A table of texts; cells of class `Raw` are put in as they are."""
  body = "".join(f"<tr>{''.join(f'<td>{escape(value)}</td>' for value in line)}</tr>\n" for line in lines)
  head = f"<thead><tr>{''.join(f'<th>{escape(value)}</th>' for value in heads)}</tr></thead>"
  return f"{_caption(caption)}<div class='scroll'><table>{head}\n<tbody>{body}</tbody></table></div>\n"


def listing(heads: Sequence[str], lines: Sequence[Sequence[str]], caption: str = "") -> str:
  """A table that becomes a list on a phone: columns with a head in capitals, such as "REQUEST", get lines of their own,
  numbers stand behind their heads."""
  text = [head.isupper() for head in heads]
  kinds = [" class='text'" if wide else f' data-head="{escape(head)}"' if head else ""
           for head, wide in zip(heads, text)]
  body = "".join(
      f"<tr>{''.join(f'<td{kind}>{escape(value)}</td>' for kind, value in zip(kinds, line, strict=True))}</tr>\n"
      for line in lines)
  head = "".join(f"<th>{escape(value.lower() if wide else value)}</th>" for value, wide in zip(heads, text))
  return (f"{_caption(caption)}<div class='scroll'><table class='list'><thead><tr>{head}</tr></thead>\n"
          f"<tbody>{body}</tbody></table></div>\n")


def _caption(text: str) -> str:
  """Above what scrolls: as the table's own it would be as wide as that, and cut off."""
  return f"<p class='soft'>{escape(text)}</p>\n" if text else ""


def folded(summary: str, body: str) -> str:
  return f"<details><summary>{escape(summary)}</summary>\n{body}</details>\n" if body else ""


def shorten(text: str, limit: int = 240) -> str:
  text = text if len(text) <= limit else text[:limit].rstrip() + " …"
  return printable(text)


def share(rate: dict[str, float] | None) -> str:
  """"12% [8, 17]" on one line, or a dash."""
  return NONE if rate is None or not rate["n"] else percent(rate).replace(" ", "\N{NO-BREAK SPACE}")


def count(rate: dict[str, float] | None) -> str:
  return "" if rate is None else f"{rate['count']} of {rate['n']}"


def beside(text: str) -> Raw:
  """`text` as a link to responses.jsonl, which lies beside the page; a browser cannot be sent to one of its lines."""
  return Raw(f'<a href="responses.jsonl">{escape(text)}</a>')
