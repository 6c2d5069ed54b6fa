"""The look of report.html: system fonts, light and dark, colours (after Okabe and Ito) for colour-blind eyes too."""

from __future__ import annotations

STYLE = """
:root {
  color-scheme: light dark;
  --page: #fff; --ink: #1c2024; --muted: #656d76; --faint: #e4e7eb; --panel: #f6f7f9;
  --draft: #cfe6f5; --target: #fbdcc4; --warn: #fff4d6; --warn-ink: #6b4e00;
  --s0: #0072b2; --s1: #c64f00; --s2: #00835f; --s3: #a8518a; --s4: #8a6d00; --s5: #4a7fa5;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #14171a; --ink: #e4e7ea; --muted: #98a1aa; --faint: #2c3238; --panel: #1c2126;
    --draft: #123f5c; --target: #5c3213; --warn: #3a2f10; --warn-ink: #f2d98a;
    --s0: #56b4e9; --s1: #f28a45; --s2: #35c79b; --s3: #dd92c2; --s4: #e3c14a; --s5: #9cc4df;
  }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 15px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
  font-variant-numeric: tabular-nums; }
main { max-width: 1120px; margin: 0 auto; padding: 40px 24px 80px; }
h1 { font-size: 30px; line-height: 1.2; margin: 0 0 10px; font-weight: 650; letter-spacing: -0.01em; }
h2 { font-size: 19px; margin: 56px 0 4px; font-weight: 650; }
h3 { font-size: 14px; margin: 0 0 8px; font-weight: 650; }
h3 span { color: var(--muted); font-weight: 400; overflow-wrap: anywhere; }
p { margin: 0 0 12px; max-width: 76ch; }
.kicker { color: var(--muted); margin: 0 0 4px; }
.lead { font-size: 18px; line-height: 1.5; margin: 0 0 14px; }
.note, .facts { color: var(--muted); font-size: 13.5px; }
.cards { display: grid; gap: 16px; margin: 26px 0 0;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 280px), 1fr)); }
.card { border: 1px solid var(--faint); border-top: 3px solid currentColor;
  border-radius: 6px; padding: 14px 18px 12px; }
.card > * { color: var(--ink); }
.card h3 { display: flex; justify-content: space-between; }
.card .pair { display: grid; grid-template-columns: 1fr 1fr; gap: 12px; }
.big { font-size: 34px; line-height: 1.15; font-weight: 600; letter-spacing: -0.02em; }
.what { font-size: 13px; }
.ci { color: var(--muted); font-size: 13px; }
.card dl { display: grid; grid-template-columns: 1fr auto; gap: 3px 12px; margin: 14px 0 0; padding-top: 10px;
  border-top: 1px solid var(--faint); font-size: 13.5px; }
.card dt { color: var(--muted); } .card dd { margin: 0; text-align: right; }
.warnings { background: var(--warn); color: var(--warn-ink); border-radius: 6px; padding: 12px 18px; margin: 22px 0 0; }
.warnings ul { margin: 4px 0 0; padding-left: 18px; }
.plots { display: grid; gap: 24px 40px; margin-top: 18px;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 440px), 1fr)); }
.plots.three { grid-template-columns: repeat(auto-fit, minmax(min(100%, 310px), 1fr)); gap: 24px 28px; }
figure { margin: 0; min-width: 0; }
figcaption { font-size: 14px; font-weight: 600; margin-bottom: 8px; }
figcaption span { color: var(--muted); font-weight: 400; }
svg { display: block; width: 100%; height: auto; overflow: visible; }
svg text { font-size: 12.5px; fill: var(--ink); }
svg .tick, svg .title { fill: var(--muted); }
svg .strong { font-weight: 600; } svg .conclusion { font-size: 21px; font-weight: 600; letter-spacing: -0.01em; }
svg .name { font-weight: 600; }
svg .grid { stroke: var(--faint); } svg .axis { stroke: var(--muted); }
svg .line { fill: none; stroke: currentColor; stroke-width: 1.8; stroke-linejoin: round; }
svg .whisker { stroke: currentColor; stroke-width: 1.6; } svg .error { stroke: var(--ink); stroke-width: 1.4; }
svg .marker { fill: currentColor; } svg .hollow { fill: var(--page); stroke: currentColor; stroke-width: 1.6; }
svg .bar { fill: currentColor; } svg .muted { color: var(--muted); } svg .muted .bar { opacity: 0.5; }
.s0 { color: var(--s0); } .s1 { color: var(--s1); } .s2 { color: var(--s2); }
.s3 { color: var(--s3); } .s4 { color: var(--s4); } .s5 { color: var(--s5); }
svg text.s0 { fill: var(--s0); } svg text.s1 { fill: var(--s1); } svg text.s2 { fill: var(--s2); }
svg text.s3 { fill: var(--s3); } svg text.s4 { fill: var(--s4); } svg text.s5 { fill: var(--s5); }
.scroll { overflow-x: auto; margin-top: 14px; }
table { border-collapse: collapse; font-size: 13px; }
th { text-align: left; white-space: normal !important; color: var(--muted); font-weight: 500; vertical-align: bottom; }
th, td { padding: 5px 12px 5px 0; border-bottom: 1px solid var(--faint); white-space: nowrap; }
tr.all td { font-weight: 600; }
table.facts-table { width: 100%; } table + h3 { margin-top: 26px; } h3 + .scroll { margin-top: 0; }
table.facts-table td { vertical-align: top; white-space: normal; overflow-wrap: anywhere; color: var(--ink); }
table.facts-table td:first-child { color: var(--muted); white-space: nowrap; }
.columns { display: grid; gap: 26px 40px; margin-top: 14px;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 300px), 1fr)); }
dl.definitions { margin: 14px 0 0; } dl.definitions dt { font-weight: 600; margin-top: 8px; }
dl.definitions dd { margin: 0; color: var(--muted); max-width: 90ch; }
pre, code { font: 13px/1.6 ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; margin: 0 0 12px; }
.command, .recipe { background: var(--panel); border-radius: 6px; padding: 12px 16px; }
.legend span { padding: 1px 6px; border-radius: 3px; color: var(--ink); }
.example { border-top: 1px solid var(--faint); padding: 18px 0 8px; }
.prompt { color: var(--muted); max-height: 13em; overflow: auto;
  border-left: 3px solid var(--faint); padding-left: 14px; }
.facts { margin: 0 0 6px; max-width: none; }
.answer { position: relative; background: var(--panel); border-radius: 6px; padding: 12px 16px 14px; line-height: 1.8; }
.d { background: var(--draft); } .t { background: var(--target); }
.d, .t { border-radius: 3px; padding: 1px 0; box-shadow: inset -1px 0 var(--panel); }
.again { text-decoration: underline dotted; text-underline-offset: 4px; text-decoration-color: var(--muted); }
.newline { color: var(--muted); font-style: normal; opacity: 0.7; }
.answer:hover .round:not(:hover) { opacity: 0.45; }
.round:hover::after { content: attr(data-says); position: absolute; top: -1.9em; right: 0; background: var(--ink);
  color: var(--page); font: 13px/1.5 system-ui, sans-serif; padding: 2px 10px; border-radius: 4px;
  white-space: nowrap; }
details { margin: 8px 0 12px; } summary { cursor: pointer; color: var(--muted); font-size: 13.5px; }
details > .facts { margin-top: 12px; }
@media (max-width: 640px) {
  main { padding: 24px 16px 56px; }
  h1 { font-size: 25px; } h2 { margin-top: 44px; } .lead { font-size: 16.5px; }
  svg text { font-size: 14.5px; } .three svg text { font-size: 13px; }
}
@media print { .answer, .card, figure { break-inside: avoid; } }
"""
