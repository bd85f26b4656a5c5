"""A process that serves checkpoints by the real vLLM, offline: vllm_process.py PROMPT.json NEW [--compiled] FOLDER….

Prints one JSON object a folder, in a line of its own: log-probabilities of the prompt's tokens from the second on, the
greedy continuation, and the class that transformers opens the folder with in this same process; or "failed", and why.
One process for many folders: to import vLLM takes longer than to serve a small model.
"""

import gc
import json
import os
import sys
import traceback

os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1",
}  # fmt: skip

from transformers import AutoModelForCausalLM  # noqa: E402
from vllm import LLM, SamplingParams  # noqa: E402
from vllm.distributed import cleanup_dist_env_and_memory  # noqa: E402


def serve(folder: str, prompt: list[int], new: int, eager: bool) -> dict:
    served = LLM(folder, dtype="float32", enforce_eager=eager, max_model_len=64, max_num_seqs=2, seed=0)
    asked = SamplingParams(temperature=0, max_tokens=new, prompt_logprobs=0, ignore_eos=True)
    found = served.generate([{"prompt_token_ids": prompt}], asked, use_tqdm=False)[0]
    scores = [of[token].logprob for of, token in zip(found.prompt_logprobs[1:], prompt[1:], strict=True)]
    opened = type(AutoModelForCausalLM.from_pretrained(folder)).__name__
    return {"logprobs": scores, "continued": list(found.outputs[0].token_ids), "opened": opened}


def main() -> None:
    prompt, new, *folders = sys.argv[1:]
    eager = "--compiled" not in folders
    for folder in (folder for folder in folders if not folder.startswith("--")):
        try:
            result = serve(folder, json.loads(prompt), int(new), eager)
        except Exception:  # the next one may work: the test says which did not
            result = {"failed": traceback.format_exc()[-3000:]}
        print("\n" + json.dumps(result), flush=True)
        gc.collect()
        cleanup_dist_env_and_memory()


if __name__ == "__main__":
    main()
