"""A systemd unit and its environment file for each process."""

from __future__ import annotations

from ..deployment import Deployment, Process

PYTHON = "/opt/sglang-sm120/.venv/bin"
"""Where docs/two-cards.md puts the checkout."""
KEYS = "/etc/sglang-sm120.env"


def files(deployment: Deployment, image: str) -> tuple[dict[str, str], list[str]]:
    """`sglang-sm120-NAME.service` for every process and `.env` where it has variables; where each goes."""
    found, steps = {}, []
    for one in deployment.processes:
        unit = f"sglang-sm120-{one.name}"
        found[f"{unit}.service"] = _unit(one, unit)
        keys = f", {' and '.join(one.secrets())} into {KEYS} (mode 600)" if one.secrets() else ""
        environment = ""
        if one.variables():
            entries = (f"# {entry.reason}\n{entry.name}={_set(entry.value)}\n" for entry in one.variables())
            found[f"{unit}.env"] = "".join(entries)
            environment = f", {unit}.env into /etc"
        steps.append(
            f"on {one.host}: {unit}.service into /etc/systemd/system{environment}{keys}, "
            f"then systemctl daemon-reload && systemctl enable --now {unit}"
        )
    return found, steps


def _unit(one: Process, unit: str) -> str:
    lines = [
        "[Unit]",
        f"Description=DeepSeek-V4 (sglang-sm120): {one.name}",
        "After=network-online.target nvidia-persistenced.service",
        "Wants=network-online.target",
        "",
        "[Service]",
        "User=sglang",
        "WorkingDirectory=~",
        f"Environment=PATH={PYTHON}:/usr/local/cuda/bin:/usr/local/bin:/usr/bin:/bin",
        *([f"EnvironmentFile=/etc/{unit}.env"] if one.variables() else []),
        *([f"EnvironmentFile={KEYS}"] if one.secrets() else []),
    ]
    command = [f"ExecStart=/usr/bin/env python -m {one.module}"]
    for words, reason in one.words(_quoted, lambda name: f"${{{name}}}"):
        command += [f"    # {reason}", f"    {' '.join(words)}"]
    lines += [line if line.lstrip().startswith("#") else f"{line} \\" for line in command[:-1]] + command[-1:]
    lines += [
        "# SGLang's first process ends the others, after the requests in flight.",
        "KillMode=mixed", "TimeoutStopSec=60", "Restart=on-failure", "RestartSec=10", "LimitNOFILE=65535",
        "LimitMEMLOCK=infinity", "", "[Install]", "WantedBy=multi-user.target",
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


def _quoted(word: str) -> str:
    """A word of ExecStart: systemd expands `%`, `$` and backslashes."""
    word = word.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%").replace("$", "$$")
    return word if word and all(letter.isalnum() or letter in "-_./:,=+@%$\\" for letter in word) else f'"{word}"'


def _set(value: object) -> str:
    """A value in an environment file, in which no `%` or `$` is expanded."""
    escaped = str(value).replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'
