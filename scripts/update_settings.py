"""Write docs/settings.md from the settings models: ``--check`` only compares."""

import argparse
import sys
from pathlib import Path

from bitneck.settings.flags import default_text, group_of
from bitneck.settings.model import Settings, Table, has_flag
from bitneck_cloud.answers.sinks.settings import JsonlTable, MqttTable, SinkTable, WebhookTable
from bitneck_cloud.settings import CloudSettings
from bitneck_edge.settings import EdgeSettings

PAGE = Path(__file__).resolve().parent.parent / "docs" / "settings.md"
HEAD = """# Settings

<!-- `python scripts/update_settings.py` writes this page from the settings models. -->

Each setting works as a flag, as an environment variable and as a key of a TOML file (`--config FILE`, or
the variable that ends in `_CONFIG`). A flag wins over the environment, the environment over the file,
the file over the default. Unknown keys are errors.

The key in the file is the setting's name, such as `tls_ca = "ca.pem"`. Lists are arrays in the file; in the
environment they are separated by commas, or a JSON list. Tables of the file (`[groups]`, `[[rates]]`) are
JSON in flags and in the environment; tables that hold secrets (`[[sinks]]`) have no flag.

Variables that Kubernetes makes for a service with a name such as `bitneck-cloud` are passed over
(`BITNECK_CLOUD_SERVICE_HOST`, `BITNECK_CLOUD_PORT`, ...).

A command has the flags that have an effect in it; `--help` lists them.
"""


def table(model: type[Settings]) -> str:
    """One table for each group of settings."""
    lines: list[str] = []
    groups = dict.fromkeys(group_of(field) for field in model.model_fields.values())
    for group in groups:
        lines += [
            "",
            f"### {group}",
            "",
            "| setting | flag | variable | default | what it does |",
            "|---|---|---|---|---|",
        ]
        for name, field in model.model_fields.items():
            if group_of(field) == group:
                default = f"`{default_text(field)}`" if default_text(field) else ""
                flag = f"`{model.flag(name)}`" if has_flag(field) else ""
                cells = (f"`{name}`", flag, f"`{model.variable(name)}`", default, field.description)
                lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def keys(model: type[Table], heading: str, beside: type[Table] | None = None) -> str:
    """The keys of one kind of table, without those that it has in common with others, default included."""
    shared = beside.model_fields if beside is not None else {}
    lines = ["", f"### {heading}", "", "| key | default | what it does |", "|---|---|---|"]
    for name, field in model.model_fields.items():
        if name == "kind" or (name in shared and field.default == shared[name].default):
            continue
        default = "needed" if field.is_required() else f"`{default_text(field)}`" if default_text(field) else ""
        lines.append(f"| `{field.alias or name}` | {default} | {field.description} |")
    return "\n".join(lines)


def main() -> None:
    """Write the page, or compare it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; fail if the page is not up to date")
    arguments = parser.parse_args()
    sinks = [
        keys(SinkTable, "All kinds"),
        *(
            keys(model, f'`kind = "{kind}"`', SinkTable)
            for kind, model in (("mqtt", MqttTable), ("webhook", WebhookTable), ("jsonl", JsonlTable))
        ),
    ]
    page = (
        f"{HEAD}\n## The edge client\n{table(EdgeSettings)}\n\n## The cloud server\n{table(CloudSettings)}\n\n"
        "## Sinks\n\nThe keys of a table `[[sinks]]`; see [sinks.md](sinks.md).\n" + "\n".join(sinks) + "\n"
    )
    if not arguments.check:
        PAGE.write_text(page, encoding="utf-8")
    elif not PAGE.is_file() or PAGE.read_text(encoding="utf-8") != page:
        sys.exit(f"{PAGE} is not up to date; run `python scripts/update_settings.py`")


if __name__ == "__main__":
    main()
