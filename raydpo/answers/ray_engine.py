"""Answers by ray.data.llm: vLLM in actors of Ray's own, for models that need several GPUs a replica.

It needs vLLM in raydpo's own environment, in the version that Ray's extra ``llm`` names: Ray imports vLLM's internals. For
models that fit on one GPU, engine vllm takes any version, from an environment of its own.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from raydpo.answers.draws import ROWS, answers_identity, draws_of
from raydpo.answers.vllm_engine import MEMORY, check_servable, engine_settings, sampling_settings
from raydpo.cluster.actors import original_error
from raydpo.cluster.doctor import vllm_of_ray
from raydpo.cluster.nodes import holds, nodes_with
from raydpo.cluster.resources import Resources
from raydpo.errors import ConfigError, RaydpoError, one_line
from raydpo.model.files import adapter_files
from raydpo.reference.identity import on_this_machine, proved_here
from raydpo.reference.score import ReferenceSpec

__all__ = ["RayAnswering", "check_ray_llm"]


def check_ray_llm(section: str) -> None:
    """Check that this environment has vLLM in the version that Ray needs.

    Args:
        section: section of the configuration with ``engine``, for messages.

    Raises:
        ConfigError: if it has none, or another.
    """
    version, (found, pinned) = importlib.metadata.version("ray"), vllm_of_ray()
    install = f"pip install 'ray[llm]=={version}' on every node, or set {section}.engine=vllm"
    if found is None:
        raise ConfigError(f"{section}.engine is ray, which needs vLLM in raydpo's own environment; {install}")
    if found != pinned is not None:
        raise ConfigError(
            f"{section}.engine is ray, but vLLM is {found}, and Ray {version} imports parts of vLLM {pinned}; {install}"
        )


@dataclass(frozen=True, kw_only=True)
class RayAnswering:
    """Work as ``Answering``, with ray.data.llm; see ``cluster.work.WholeTask``.

    Attributes:
        spec, max_tokens, stop, section: as in ``Answering``.
        positions: tokens of the longest prompt and its longest answer.
        tensor_parallel: GPUs of a replica.
    """

    spec: ReferenceSpec
    max_tokens: int
    stop: tuple[int, ...]
    positions: int
    tensor_parallel: int = 1
    section: str = "rounds.sample"

    engine = "ray"

    @property
    def identity(self) -> dict[str, Any]:
        return answers_identity(self.spec.identity.digest, self.engine, self.max_tokens, self.stop)

    def run(self, blocks: Mapping[str, pa.Table], resources: Resources, doing: str) -> Iterator[tuple[str, pa.Table]]:
        """Yield the name of each block and its answers, when all of them are there.

        Args:
            blocks: rows of ``draws.ROWS``, by name.
            resources: what the workers have together is divided into replicas.

        Raises:
            ConfigError: if vLLM is missing or does not serve the model, or the workers have too few GPUs.
            ModelError: if the files on a node are another model.
            RaydpoError: if vLLM fails. Blocks without failed answers were yielded before.
        """
        import ray
        from ray.data.llm import build_processor

        check_ray_llm(self.section)
        replicas = self._replicas(resources)
        adapter = None if self.spec.adapter is None else adapter_files(self.spec.adapter).config
        check_servable(self.spec.quantization, self.spec.identity.rope_length, adapter, self.section, self.engine)
        context = ray.data.DataContext.get_current().copy()
        context.enable_progress_bars = False
        context.print_on_execution_start = False
        context.execution_no_progress_timeout_s = -1  # loading a large model takes long
        try:
            _prove_everywhere(self.spec, resources)
            with ray.data.DataContext.current(context):
                largest = max(block.num_rows for block in blocks.values())
                tables = [self._rows(name, block) for name, block in blocks.items()]
                processor = build_processor(
                    self._settings(replicas, largest, resources), preprocess=dict, postprocess=_answer
                )
                rows = processor(ray.data.from_arrow(tables)).iter_rows()
            yield from _whole_blocks(rows, {name: block.num_rows for name, block in blocks.items()}, doing)
        except RaydpoError:
            raise
        except Exception as error:
            raise original_error(error, doing) from error

    def _replicas(self, resources: Resources) -> int:
        gpus = int(resources.workers * resources.gpus_per_worker)
        if gpus < self.tensor_parallel:
            raise ConfigError(
                f"{self.section}.tensor_parallel {self.tensor_parallel} needs as many GPUs, but score.workers "
                f"{resources.workers} x score.gpus_per_worker {resources.gpus_per_worker:g} gives {gpus}; raise "
                f"score.workers, or set {self.section}.engine=transformers"
            )
        return gpus // self.tensor_parallel

    def _settings(self, replicas: int, batch: int, resources: Resources) -> Any:
        from ray.data.llm import vLLMEngineProcessorConfig

        settings = engine_settings(self.spec, self.positions)
        return vLLMEngineProcessorConfig(
            model_source=settings.pop("model"),
            engine_kwargs=settings
            | {
                "tensor_parallel_size": self.tensor_parallel,
                "gpu_memory_utilization": MEMORY["cuda"],
                "disable_log_stats": True,
            },
            concurrency=replicas,
            batch_size=batch,
            accelerator_type=resources.accelerator,
            should_continue_on_error=True,  # a failed answer must not cost those that are made
            log_engine_metrics=False,
            chat_template_stage=False,
            tokenize_stage=False,
            detokenize_stage=False,
        )

    def _rows(self, name: str, block: pa.Table) -> pa.Table:
        """Return a block as ray.data.llm wants it: one row for each answer, since it keeps one answer of a request."""
        prompts = [np.array(ids, np.int32) for ids in block["prompt_ids"].to_pylist()]
        same = {"top_p": 1.0, "seed": None}  # all rows of a table have the same fields
        sampling = sampling_settings(prompts, draws_of(block), self.max_tokens, self.stop)
        return pa.table(
            {
                "block": [name] * block.num_rows,
                "row": list(range(block.num_rows)),
                "tokenized_prompt": block["prompt_ids"],
                "sampling_params": [same | one for one in sampling],
                # vLLM loads an adapter for rows whose model is not that of the engine. Each run has an engine of its own.
                "model": [self.spec.adapter or self.spec.path] * block.num_rows,
            }
        )


def _answer(row: dict[str, Any]) -> dict[str, Any]:
    """What is kept of a row. ray.data.llm passes a failed row on as it is, with ``__inference_error__``."""
    return {"block": row["block"], "row": row["row"], "answer_ids": list(row["generated_tokens"])}


def _whole_blocks(rows: Iterable[dict[str, Any]], sizes: Mapping[str, int], doing: str) -> Iterator[tuple[str, pa.Table]]:
    """Collect rows, in any order, and yield each block that is complete.

    Raises:
        RaydpoError: if rows failed or did not come, after the last block.
    """
    found: dict[str, dict[int, list[int]]] = {name: {} for name in sizes}
    failed: list[str] = []
    for row in rows:
        name, number = row["block"], int(row["row"])
        if error := row.get("__inference_error__"):
            failed.append(f"row {number} of {name}: {one_line(error, 300)}")
            continue
        mine = found[name]
        mine[number] = [int(one) for one in row["answer_ids"]]
        if len(mine) == sizes[name]:
            answers = pa.array([mine[place] for place in range(sizes[name])], ROWS.field("prompt_ids").type)
            yield name, pa.table({"answer_ids": answers})
            del found[name]
    if failed:
        raise RaydpoError(
            f"{doing}: vLLM failed on {len(failed):,} answers (first: {failed[0]}); complete blocks are stored"
        )
    if found:
        lacking = sum(sizes[name] - len(rows) for name, rows in found.items())
        raise RaydpoError(
            f"{doing}: ray.data.llm returned {lacking:,} answers too few; complete blocks are stored, run it again"
        )


def _prove_everywhere(spec: ReferenceSpec, resources: Resources) -> None:
    """Prove that each node that may answer has the files of ``spec``, which Ray's own actors do not do.

    Raises:
        ModelError: naming the node, if one has others.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    one = dataclasses.replace(resources, workers=1)
    nodes = [node for node in nodes_with(one.accelerator, one.labels) if holds(node["Resources"], one.bundle)]
    look = ray.remote(num_cpus=0, max_retries=0)(_prove)
    ray.get(
        [
            look.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)).remote(spec)
            for node in nodes
        ]
    )


def _prove(spec: ReferenceSpec) -> None:
    with proved_here(on_this_machine(spec)):
        pass
