"""A plan as a person reads it, and as JSON."""

from __future__ import annotations

import json
import shlex
import textwrap
from typing import Any

from .plan import Plan
from .settings import hidden

REASON_WIDTH = 72
GIB = 1 << 30


def as_dict(plan: Plan) -> dict[str, Any]:
    """The plan as `--json` prints it; docs/launcher.md describes the keys."""
    fit = plan.fit
    return {
        "model": plan.model,
        "evidence": plan.evidence,
        "settings": [vars(entry) for entry in map(hidden, plan.settings)],
        "budget_bytes": [{"what": what, "bytes": size} for what, size in fit.lines],
        "other_budget": fit.other_budget,
        "pools": vars(fit.pools),
        "bytes_per_full_token": round(fit.token_bytes, 3),
        "window_tokens": {"needed": fit.window_needed, "available": fit.pools.swa},
        "context_by_concurrency": {str(count): tokens for count, tokens in fit.concurrency().items()},
        "notes": list(plan.notes),
        "prediction": plan.prediction,
        "command": plan.command(),
    }


def as_json(plan: Plan) -> str:
    """One JSON object."""
    return json.dumps(as_dict(plan), indent=2)


def as_text(plan: Plan) -> str:
    """Settings with reasons, the memory budget, notes and the command."""
    parts = [f"Plan for {plan.model} (evidence: {plan.evidence})", "", *_settings(plan), "", *_budget(plan), ""]
    if plan.prediction:
        parts += [*textwrap.wrap(plan.prediction, 118), ""]
    for note in plan.notes:
        parts += textwrap.wrap(note, 118, initial_indent="note: ", subsequent_indent="      ")
    return "\n".join([*parts, "Command:", "  " + shlex.join(plan.command())])


def _settings(plan: Plan) -> list[str]:
    rows = [
        (entry.name if entry.kind == "env" else f"--{entry.name}", entry.shown(), entry)
        for entry in map(hidden, plan.settings)
    ]
    names = max(len(name) for name, _, _ in rows)
    widest = max((len(value) for _, value, _ in rows if len(value) <= 24), default=0)
    lines = []
    for name, value, entry in rows:
        reason = textwrap.wrap(entry.reason, REASON_WIDTH) or [""]
        beside = [] if len(value) > widest else [reason.pop(0)]
        lines.append("  ".join([f"  {name:<{names}}", f"{value:<{widest}}", *beside]))
        lines += [f"  {'':<{names}}  {'':<{widest}}  {line}" for line in reason]
    return lines


def _budget(plan: Plan) -> list[str]:
    fit = plan.fit
    width = max(len(what) for what, _ in fit.lines)
    lines = ["Memory of one rank:"]
    lines += [f"  {what:<{width}}  {size / GIB:8.2f} GiB" for what, size in fit.lines]
    lines += [f"  {fit.other_budget}"] if fit.other_budget else []
    pools = fit.pools
    lines.append(
        f"  The pools hold {pools.full} tokens of context at {fit.token_bytes:.0f} bytes; the window pool {pools.swa} "
        f"tokens, {fit.window_needed} needed."
    )
    context = ", ".join(f"{count} x {tokens}" for count, tokens in fit.concurrency().items())
    lines += textwrap.wrap(
        f"Requests x tokens of context that fit at once: {context}.", 116, initial_indent="  ", subsequent_indent="  "
    )
    return lines
