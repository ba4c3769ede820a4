"""Process that answers prompts with vLLM. ``vllm_engine`` starts this file with the Python that has vLLM.

That Python's environment has other versions of torch and transformers than raydpo's, and no raydpo: this file imports the
standard library and vLLM only.

It reads one JSON object a line from standard input, and writes one a line to standard output:

- First request: ``engine``, keyword arguments of ``vllm.LLM``. The reply, once the model is loaded, is ``{}``.
- A request with ``load``, keyword arguments of ``vllm.lora.request.LoRARequest``: the reply, once the adapter is loaded, is
  ``{}``.
- Each other request: ``prompts``, lists of token ids, ``sampling``, keyword arguments of ``vllm.SamplingParams`` for each,
  and ``adapter``, as ``load`` or null. The reply has ``answers``, lists of token ids.
- Any reply may have ``error`` instead: what failed.
"""

from __future__ import annotations

import json
import os
import queue
import sys
import threading
import traceback
from collections.abc import Callable
from typing import Any


def load(engine: dict[str, Any]) -> Callable[..., dict[str, Any]]:
    """Load a model, and return the function that answers a request."""
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    model = LLM(**engine)

    def answer(
        load: dict[str, Any] | None = None,
        prompts: list[list[int]] | None = None,
        sampling: list[dict[str, Any]] | None = None,
        adapter: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        if load is not None:
            if not model.llm_engine.add_lora(LoRARequest(**load)):
                raise RuntimeError(f"vLLM did not load the adapter {load['lora_path']}")
            return {}
        found = model.generate(
            [{"prompt_token_ids": ids} for ids in prompts or ()],
            [SamplingParams(**one) for one in sampling or ()],
            lora_request=None if adapter is None else LoRARequest(**adapter),
            use_tqdm=False,
        )
        return {"answers": [list(one.outputs[0].token_ids) for one in found]}

    return answer


def _read(lines: queue.SimpleQueue[str]) -> None:
    """Pass on the lines of standard input. It ends when the process that reads the answers does: then this one frees its GPU
    at once, also while it generates answers."""
    for line in sys.stdin:
        lines.put(line)
    os._exit(0)


def main() -> None:
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # vLLM writes its log to standard output
    lines: queue.SimpleQueue[str] = queue.SimpleQueue()
    threading.Thread(target=_read, args=(lines,), daemon=True).start()
    answer = None
    while True:
        request, reply = json.loads(lines.get()), {}
        try:
            if answer is None:
                answer = load(**request)
            else:
                reply = answer(**request)
        except Exception as error:
            traceback.print_exc()
            reply = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(reply), file=replies, flush=True)


if __name__ == "__main__":
    main()
