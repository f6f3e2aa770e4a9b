"""GuideLLM's benchmark of texts; it needs the model's tokenizer."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from checks import MODEL, check, main, same

REQUESTS = 4


@check("run with 2 streams")
def concurrent() -> None:
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        command = [
            *(str(Path(sys.executable).with_name("guidellm")), "run", "--disable-console-interactive"),
            *("--backend", f"kind=openai_http,target={os.environ['LLAVA_URL']},model={MODEL}"),
            *("--tokenizer", f"kind=huggingface_auto,model={os.environ['LLAVA_TOKENIZER']}"),
            *("--data", "kind=synthetic_text,prompt_tokens=32,output_tokens=8"),
            *("--profile", "kind=concurrent,streams=2"),
            *("--constraint", f"kind=max_requests,count={REQUESTS}"),
            *("--output", f"kind=json,path={report}"),
        ]
        subprocess.run(command, check=True, stdout=sys.stderr, cwd=folder)
        [benchmark] = json.loads(report.read_text())["benchmarks"]
    totals = benchmark["metrics"]["request_totals"]
    same((totals["successful"], totals["total"]), (REQUESTS, REQUESTS))


main()
