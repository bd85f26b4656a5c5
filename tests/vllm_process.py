"""A process that serves checkpoints by the real vLLM, offline: vllm_process.py FOLDER TOKENS.json NEW [--compiled].

Prints one JSON object: log-probabilities of the prompt's tokens from the second on, the greedy continuation, and the
class that transformers opens the folder with in this same process.
"""

import json
import os
import sys

os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1",
}  # fmt: skip

from transformers import AutoModelForCausalLM  # noqa: E402
from vllm import LLM, SamplingParams  # noqa: E402


def main() -> None:
    folder, prompt, new = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3])
    served = LLM(
        folder, dtype="float32", enforce_eager="--compiled" not in sys.argv, max_model_len=64, max_num_seqs=2, seed=0
    )
    asked = SamplingParams(temperature=0, max_tokens=new, prompt_logprobs=0, ignore_eos=True)
    found = served.generate([{"prompt_token_ids": prompt}], asked, use_tqdm=False)[0]
    scores = [of[token].logprob for of, token in zip(found.prompt_logprobs[1:], prompt[1:], strict=True)]
    opened = type(AutoModelForCausalLM.from_pretrained(folder)).__name__
    result = {"logprobs": scores, "continued": list(found.outputs[0].token_ids), "opened": opened}
    print("\n" + json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
