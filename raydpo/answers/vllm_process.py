"""Process that answers prompts with vLLM. ``vllm_engine`` starts this file with the Python that has vLLM.

That Python's environment has other versions of torch and transformers than raydpo's, and no raydpo: this file imports the
standard library and vLLM only.

It reads one JSON object a line from standard input, and writes one a line to standard output:

- First request: ``engine``, keyword arguments of ``vllm.LLM``, and ``adapter``, the directory of an adapter or null. The
  reply, once the model is loaded, is ``{}``.
- Each further request: ``prompts``, lists of token ids, and ``sampling``, keyword arguments of ``vllm.SamplingParams`` for
  each. The reply has ``answers``, lists of token ids.
- Either reply may have ``error`` instead: what failed.
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


def load(engine: dict[str, Any], adapter: str | None) -> Callable[..., dict[str, Any]]:
    """Load a model, and return the function that answers a request."""
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    model = LLM(**engine)
    lora = None if adapter is None else LoRARequest("policy", 1, adapter)

    def answer(prompts: list[list[int]], sampling: list[dict[str, Any]]) -> dict[str, Any]:
        found = model.generate(
            [{"prompt_token_ids": ids} for ids in prompts],
            [SamplingParams(**one) for one in sampling],
            lora_request=lora,
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
