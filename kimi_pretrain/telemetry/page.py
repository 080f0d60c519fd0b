"""The HTML of a report: one file, no scripts, nothing loaded from elsewhere."""

import base64
import math
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from kimi_pretrain.telemetry.quantities import count, decimal, duration, percent, printable
from kimi_pretrain.telemetry.recorded import Recorded

_STYLE = """
:root { --ink: #1f2328; --muted: #6e7781; --line: #e6e8eb; --wash: #f6f8fa; }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2.5rem 1.5rem 4rem; max-width: 62rem; background: #fff;
  color: var(--ink); font: 16px/1.55 system-ui, -apple-system, "Segoe UI", sans-serif; }
h1 { font-size: 1.75rem; line-height: 1.2; margin: 0 0 .25rem; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2.75rem 0 .25rem; }
p { margin: .25rem 0 .75rem; max-width: 46rem; }
.muted { color: var(--muted); }
dl.tiles { display: flex; flex-wrap: wrap; gap: 1px; margin: 1.75rem 0 0; overflow: hidden;
  background: var(--line); border: 1px solid var(--line); border-radius: 8px; }
dl.tiles > div { flex: 1 1 11rem; background: #fff; padding: .75rem 1rem; }
dt { color: var(--muted); font-size: .8rem; }
dd { margin: 0; font-size: 1.35rem; font-variant-numeric: tabular-nums; white-space: nowrap; }
dd small { color: var(--muted); font-size: .8rem; }
img { display: block; width: 100%; height: auto; margin: .5rem 0; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(20rem, 1fr)); gap: 0 1rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem 1.25rem .3rem 0; text-align: right; border-bottom: 1px solid var(--line);
  white-space: nowrap; }
th { color: var(--muted); font-weight: 500; }
pre { background: var(--wash); border-radius: 8px; padding: 1rem 1.25rem; margin: .5rem 0;
  font: 13px/1.5 ui-monospace, "DejaVu Sans Mono", monospace; overflow-x: auto;
  white-space: pre-wrap; overflow-wrap: anywhere; }
summary { cursor: pointer; font-size: 1.15rem; font-weight: 600; margin-top: 2.75rem; }
"""
_EVALUATIONS = 12


def render(run: Recorded, figures: Mapping[str, Path]) -> str:
    """The page of a run; every text of the run is escaped, every figure is embedded."""
    name = printable(run.directory.resolve().name)
    body = "\n".join(
        part
        for part in (
            f"<h1>{escape(name)}</h1>",
            f'<p class="muted">{escape(_status(run))}</p>',
            _tiles(run),
            _figures(run, figures),
            _evaluations(run),
            _sample(run),
            _config(run),
        )
        if part
    )
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        # Whatever a sample may contain, the page can load and run nothing.
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; '
        "img-src data:; style-src 'unsafe-inline'\">\n"
        f"<title>{escape(name)} · kimi_pretrain</title>\n<style>{_STYLE}</style>\n</head>\n"
        f"<body>\n{body}\n</body>\n</html>\n"
    )


def _status(run: Recorded) -> str:
    model, data = run.config["model"], run.config["data"]
    last = int(run.steps["step"][-1])
    if run.summary is not None:
        state = f"finished at step {last:,}"
    else:
        state = f"at step {last:,}, not finished"
    broken = int((~np.isfinite(run.steps["loss"])).sum())
    if broken:
        state += f", {broken} of its losses not finite"
    return printable(f"{model['name']} on {data['name']}, {state}")


def _tiles(run: Recorded) -> str:
    summary = run.summary or {}
    heldout = summary.get("heldout_loss", _last(run.evals["heldout_loss"]))
    bits = summary.get("bits_per_byte", _last(run.evals["bits_per_byte"]))
    rate = run.steps["tokens_per_second"]
    tiles = [
        ("held-out loss", decimal(heldout, 4), "nats/token"),
        ("bigram model", decimal(summary.get("bigram_loss"), 4), "nats/token"),
        ("held-out text", decimal(bits, 4), "bits/byte"),
        ("train loss", decimal(_last(run.steps["loss"]), 4), "nats/token"),
        ("tokens", count(_last(run.steps["tokens"]) or 0), ""),
        ("time in steps", duration(float(np.nansum(run.steps["step_seconds"]))), ""),
        ("throughput", count(_median(rate) or 0), "tokens/s"),
        ("MFU", percent(_median(run.steps["mfu"])), ""),
    ]
    cells = "".join(
        f"<div><dt>{label}</dt><dd>{value} <small>{unit}</small></dd></div>"
        for label, value, unit in tiles
        if value != "-"
    )
    return f'<dl class="tiles">{cells}</dl>'


def _figures(run: Recorded, figures: Mapping[str, Path]) -> str:
    tau = "off" if run.tau is None else f"{run.tau:g}"
    parts = [
        "<h2>Loss</h2>",
        "<p>Training loss of each step, thin, and its centred moving average over 2 % of the "
        "run. The bigram model has seen the same tokens.</p>",
        _image(figures, "loss"),
        "<h2>Attention logits and QK-Clip</h2>",
        f"<p>The largest scaled logit before softmax. {_logits_shown(run)} QK-Clip acts above "
        f"tau = {escape(tau)}.</p>",
        _image(figures, "max_logit"),
    ]
    if "expert_load" in figures:
        parts += [
            "<h2>Expert load</h2>",
            "<p>Tokens of each routed expert over an even share: white is balanced, red is "
            "overloaded, blue is starved.</p>",
            _image(figures, "expert_load"),
        ]
    pair = _image(figures, "learning_rate") + _image(figures, "grad_norm")
    parts += [
        "<h2>Schedule and speed</h2>",
        "<p>Time counts the steps themselves, without evaluations and checkpoints.</p>",
        f'<div class="pair">{pair}</div>',
        _image(figures, "throughput"),
    ]
    return "\n".join(parts)


def _logits_shown(run: Recorded) -> str:
    bound = "the upper bound that the log-sum-exp gives while a head stays below tau"
    if run.heads is not None and run.heads.exact:
        return (
            "Coloured: of every head, exact, on held-out text at each evaluation. Grey: the "
            f"largest of all heads over each training step's batch, or {bound}."
        )
    return f"Over each training step's batch, or {bound}."


def _image(figures: Mapping[str, Path], name: str) -> str:
    data = base64.b64encode(figures[name].read_bytes()).decode()
    return f'<img alt="{name.replace("_", " ")}" src="data:image/png;base64,{data}">'


def _evaluations(run: Recorded) -> str:
    """The last evaluations, with the loss of each domain."""
    if run.evals.rows == 0:
        return ""
    names = ["step", "held-out", "bits/byte", *run.domains]
    columns = [
        run.evals["heldout_loss"],
        run.evals["bits_per_byte"],
        *run.domains.values(),
    ]
    rows = [
        [f"{int(run.evals['step'][index]):,}", *(decimal(_real(c[index]), 4) for c in columns)]
        for index in range(max(0, run.evals.rows - _EVALUATIONS), run.evals.rows)
    ]
    head = "".join(f"<th>{escape(printable(name))}</th>" for name in names)
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    return (
        "<h2>Held-out loss by domain</h2>\n<p>Nats per token.</p>\n"
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _sample(run: Recorded) -> str:
    summary = run.summary or {}
    if not summary.get("sample"):
        return ""
    prompt = escape(printable(summary.get("prompt", "")))
    text = escape(printable(summary["sample"]))
    return f'<h2>Sample</h2>\n<pre><span class="muted">{prompt}</span>{text}</pre>'


def _config(run: Recorded) -> str:
    text = escape(printable(run.config_text))
    return f"<details><summary>Configuration</summary>\n<pre>{text}</pre></details>"


def _last(values: np.ndarray) -> float | None:
    return _real(values[-1]) if len(values) else None


def _median(values: np.ndarray) -> float | None:
    finite = values[np.isfinite(values)]
    return float(np.median(finite)) if finite.size else None


def _real(value: Any) -> float | None:
    """None for nan, which is how a column says that a row had no such number."""
    return None if math.isnan(value) else float(value)
