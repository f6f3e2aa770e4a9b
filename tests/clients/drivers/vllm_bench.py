"""`vllm bench serve`, with texts and with pictures; it needs the model's tokenizer."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from checks import MODEL, check, main, same

REQUESTS = 4
TOKENS = 8


def bench(endpoint: str, *arguments: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        command = [
            *(str(Path(sys.executable).with_name("vllm")), "bench", "serve"),
            *("--base-url", os.environ["LLAVA_URL"], "--endpoint", endpoint),
            *("--model", MODEL, "--tokenizer", os.environ["LLAVA_TOKENIZER"]),
            *("--num-prompts", str(REQUESTS), "--random-input-len", "32", "--random-output-len", str(TOKENS)),
            *("--random-range-ratio", "0", "--ignore-eos", "--save-result", "--result-dir", folder),
            *arguments,
        ]
        subprocess.run(command, check=True, stdout=sys.stderr, cwd=folder)
        [path] = Path(folder).glob("*.json")
        result = json.loads(path.read_text())
    same((result["completed"], result["failed"]), (REQUESTS, 0))
    same(result["total_output_tokens"], REQUESTS * TOKENS)


@check("chat with pictures")
def pictures() -> None:
    bench(
        "/v1/chat/completions",
        *("--backend", "openai-chat", "--dataset-name", "random-mm", "--random-mm-base-items-per-request", "1"),
        *("--random-mm-limit-mm-per-prompt", '{"image": 1, "video": 0}'),
        *("--random-mm-bucket-config", "{(64, 64, 1): 1.0}"),
    )


@check("completions")
def texts() -> None:
    bench("/v1/completions", "--backend", "openai", "--dataset-name", "random")


main()
