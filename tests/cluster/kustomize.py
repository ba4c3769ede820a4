"""A small ``kustomize build`` for cluster/kuberay: resources, namespace, images, and JSON patches by target.

There is no kustomize on PyPI. Features that the files do not use are refused."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import yaml

KNOWN = {"apiVersion", "kind", "namespace", "resources", "images", "patches"}


def build(directory: Path) -> list[dict[str, Any]]:
    """Build the resources of a directory with a kustomization.yaml.

    Raises:
        ValueError: if a resource is missing or duplicate, a patch has no target, or no container uses an image.
    """
    settings = yaml.safe_load((directory / "kustomization.yaml").read_text())
    if unknown := set(settings) - KNOWN:
        raise ValueError(f"{directory}: {unknown} is not known here")
    found: list[dict[str, Any]] = []
    for name in settings["resources"]:
        place = directory / name
        # Through JSON, so that YAML anchors become copies, as in kustomize.
        found += build(place) if place.is_dir() else [copy.deepcopy(one) for one in _documents(place)]
    names = [(one["kind"], one["metadata"]["name"]) for one in found]
    if len(set(names)) < len(names):
        raise ValueError(f"{directory}: a resource is there twice: {names}")
    for one in found:
        if "namespace" in settings:
            one["metadata"]["namespace"] = settings["namespace"]
    for patch in settings.get("patches", []):
        target = patch["target"]
        met = [
            one
            for one in found
            if one["kind"] == target["kind"] and target.get("name", one["metadata"]["name"]) == one["metadata"]["name"]
        ]
        if not met:
            raise ValueError(f"{directory}: no resource for the patch of {target}")
        text = patch["patch"] if "patch" in patch else (directory / patch["path"]).read_text()
        for one in met:
            for operation in yaml.safe_load(text):
                _apply(one, **operation)
    for image in settings.get("images", []):
        containers = [one for one in _containers(found) if one["image"] == image["name"]]
        if not containers:
            raise ValueError(f"{directory}: no container has the image {image['name']}")
        for one in containers:
            one["image"] = f"{image['newName']}:{image['newTag']}"
    return found


def _documents(file: Path) -> list[dict[str, Any]]:
    return [_unshared(one) for one in yaml.safe_load_all(file.read_text()) if one]


def _unshared(node: Any) -> Any:
    if isinstance(node, dict):
        return {key: _unshared(value) for key, value in node.items()}
    return [_unshared(value) for value in node] if isinstance(node, list) else node


def _apply(resource: dict[str, Any], op: str, path: str, value: Any) -> None:
    """Apply one operation of RFC 6902: add or replace."""
    *steps, last = (step.replace("~1", "/").replace("~0", "~") for step in path[1:].split("/"))
    node: Any = resource
    for step in steps:
        node = node[int(step)] if isinstance(node, list) else node[step]
    if isinstance(node, list):
        node.insert(len(node) if last == "-" else int(last), value)
    elif op == "replace" and last not in node:
        raise ValueError(f"{path} is not there to be replaced")
    else:
        node[last] = value


def _containers(node: Any) -> list[dict[str, Any]]:
    if isinstance(node, list):
        return [one for entry in node for one in _containers(entry)]
    if not isinstance(node, dict):
        return []
    return node.get("containers", []) + [one for value in node.values() for one in _containers(value)]
