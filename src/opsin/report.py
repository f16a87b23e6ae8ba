"""What a run says in the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from opsin.plan import Plan
from opsin.sites import AXES, SiteTable


def final_report(summary: Mapping[str, Any], folder: Path) -> str:
    return f"files: {folder}"


def sites_report(sites: SiteTable, members: int, batch: int, plan: Plan) -> str:
    return "\n".join(f"{s.name} {s.shape(members, batch)}" for s in sites)
