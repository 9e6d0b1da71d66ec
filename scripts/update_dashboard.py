"""Write deploy/grafana/dashboards/bitneck.json; with --check only tell whether it is what this script writes."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

TARGET = Path(__file__).resolve().parent.parent / "deploy" / "grafana" / "dashboards" / "bitneck.json"
RATE = "[$__rate_interval]"

#   title, unit, [(query, legend)]
PANELS: tuple[tuple[str, str, tuple[tuple[str, str], ...]], ...] = (
    ("Frames by outcome", "reqps", ((f"sum by (outcome) (rate(bitneck_frames_total{RATE}))", "{{outcome}}"),)),
    ("Payload", "Bps", ((f"sum by (point) (rate(bitneck_payload_bytes_total{RATE}))", "{{point}}"),)),
    (
        "Frames by operating point",
        "reqps",
        ((f"sum by (point) (rate(bitneck_point_frames_total{RATE}))", "{{point}}"),),
    ),
    (
        "Queue wait",
        "s",
        tuple(
            (f"histogram_quantile({q}, sum by (le) (rate(bitneck_queue_wait_seconds_bucket{RATE})))", f"p{q * 100:g}")
            for q in (0.5, 0.9, 0.99)
        ),
    ),
    (
        "Decode and compute, p90",
        "s",
        tuple(
            (f"histogram_quantile(0.9, sum by (le) (rate(bitneck_{name}_seconds_bucket{RATE})))", name)
            for name in ("decode", "compute")
        ),
    ),
    (
        "Frames in a pass",
        "none",
        (
            (
                f"sum(rate(bitneck_batch_frames_sum{RATE})) / sum(rate(bitneck_batch_frames_count{RATE}))",
                "mean",
            ),
        ),
    ),
    ("Streams and sessions", "none", (("sum(bitneck_streams)", "streams"), ("sum(bitneck_open_sessions)", "sessions"))),
    ("Sessions opened", "none", ((f"sum by (how) (increase(bitneck_sessions_total{RATE}))", "{{how}}"),)),
    ("Operating point switches", "reqps", ((f"sum(rate(bitneck_point_switches_total{RATE}))", "switches"),)),
    ("Frames that wait", "none", (("sum(bitneck_queue_frames)", "frames"),)),
    (
        "Reloads",
        "none",
        ((f"sum by (model, outcome) (increase(bitneck_reloads_total{RATE}))", "{{model}} {{outcome}}"),),
    ),
    ("Ready servers", "none", (("sum(bitneck_ready)", "ready"),)),
    (
        "Answers to subscribers and sinks",
        "reqps",
        (
            (f"sum(rate(bitneck_published_answers_total{RATE}))", "published"),
            (f"sum by (sink) (rate(bitneck_sink_delivered_answers_total{RATE}))", "{{sink}}"),
        ),
    ),
    ("Sinks behind", "s", (("max by (sink) (bitneck_sink_behind_seconds)", "{{sink}}"),)),
    (
        "Answers lost to sinks and subscribers",
        "none",
        (
            (f"sum by (sink, reason) (increase(bitneck_sink_dropped_answers_total{RATE}))", "{{sink}}: {{reason}}"),
            (f"sum by (sink) (increase(bitneck_sink_refused_answers_total{RATE}))", "{{sink}}: refused"),
            (f"sum(increase(bitneck_missed_answers_total{RATE}))", "subscribers"),
        ),
    ),
)


def dashboard() -> dict[str, Any]:
    source = {"type": "prometheus", "uid": "prometheus"}
    panels = [
        {
            "id": k + 1,
            "title": title,
            "type": "timeseries",
            "datasource": source,
            "gridPos": {"x": 8 * (k % 3), "y": 8 * (k // 3), "w": 8, "h": 8},
            "fieldConfig": {"defaults": {"unit": unit, "min": 0}, "overrides": []},
            "targets": [
                {"refId": chr(ord("A") + j), "datasource": source, "expr": query, "legendFormat": legend}
                for j, (query, legend) in enumerate(queries)
            ],
        }
        for k, (title, unit, queries) in enumerate(PANELS)
    ]
    return {
        "uid": "bitneck-cloud",
        "title": "bitneck cloud",
        "tags": ["bitneck"],
        "schemaVersion": 41,
        "refresh": "10s",
        "time": {"from": "now-30m", "to": "now"},
        "panels": panels,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    text = json.dumps(dashboard(), indent=1) + "\n"
    if parser.parse_args().check:
        sys.exit(
            0 if TARGET.is_file() and TARGET.read_text() == text else f"{TARGET} is not up to date: run {__file__}"
        )
    TARGET.write_text(text)


if __name__ == "__main__":
    main()
