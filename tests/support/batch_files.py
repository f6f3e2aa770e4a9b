"""Batch jobs on small files, without a model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from llava_serve.batch.forms import key_of
from llava_serve.batch.job import BatchJob
from llava_serve.batch.plan import Plan
from llava_serve.errors import LlavaServeError
from llava_serve.inputs import Prompt
from llava_serve.results import Completion, GenerationResult

RESULT = GenerationResult("prompt", [1, -200], 17, (Completion(0, "Red.", (5, 2), "stop"),), num_image_tokens=16)


def job(tmp_path: Path, text: str, name: str = "in.jsonl", **options: Any) -> BatchJob:
    (tmp_path / name).write_text(text, encoding="utf-8")
    return BatchJob(input=tmp_path / name, output=tmp_path / "out.jsonl", **options)


def prompts(batch: BatchJob) -> list[Prompt]:
    plan = Plan(batch)
    found = [plan.form.prompt(item) for item in plan.items()]
    plan.output.close()
    return found


def faults(batch: BatchJob) -> list[str]:
    """Why each line cannot be used; those that can are left out."""
    plan = Plan(batch)
    found = []
    for item in plan.items():
        try:
            plan.form.prompt(item)
        except LlavaServeError as error:
            found.append(error.message)
    plan.output.close()
    return found


def answer_all(batch: BatchJob, result: GenerationResult | LlavaServeError = RESULT) -> list[str]:
    """Writes an answer to all that is left, and gives the ids that were."""
    plan = Plan(batch)
    asked = []
    for item in plan.items():
        asked.append(str(key_of(plan.form, item)))
        plan.output.append(item.position, plan.form.line(item, result))
    plan.output.sort()
    plan.output.close()
    return asked


def lines(batch: BatchJob) -> list[dict[str, Any]]:
    return [json.loads(line) for line in batch.output.read_text("utf-8").splitlines()]


def rows(*values: dict[str, Any]) -> str:
    return "".join(json.dumps(value) + "\n" for value in values)


def row(name: object, question: str = "What?", **more: Any) -> dict[str, Any]:
    return {"id": name, "question": question} | more


def request(name: str, **body: Any) -> dict[str, Any]:
    body = {"messages": [{"role": "user", "content": "What?"}]} | body
    return {"custom_id": name, "method": "POST", "url": "/v1/chat/completions", "body": body}
