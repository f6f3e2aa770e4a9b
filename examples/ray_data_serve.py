"""Asks the running application about the rows of a data set: `ray.data.llm` over the application's own handle."""

import base64
from pathlib import Path
from typing import Any

import ray
from ray.data.llm import ServeDeploymentProcessorConfig, build_processor

import llava_serve

PICTURE = str(Path(llava_serve.__file__).parent / "builtin" / "demo.png")
ROWS = [
    {"row": 1, "picture": PICTURE, "question": "What colour is the circle?"},
    {"row": 2, "picture": PICTURE, "question": "How many shapes are there?"},
    {"row": 3, "picture": __file__, "question": "What is this?"},  # no picture: this row gets an error, not an answer
]
# The application's replicas do the work, and this job only waits. With Ray's default of one CPU for each task and actor
# it would wait for ever on a cluster whose CPUs the application has taken.
ONLY_WAITS = {"num_cpus": 0}


def as_request(row: dict[str, Any]) -> dict[str, Any]:
    """A chat completion for the method `chat`. A priority above 0 is batch work: online requests go first."""
    url = "data:;base64," + base64.b64encode(Path(row["picture"]).read_bytes()).decode()
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": row["question"]}]
    messages = [{"role": "user", "content": content}]
    fields = {"messages": messages, "temperature": 0, "max_tokens": 32, "priority": 1}
    return {"method": "chat", "request_kwargs": fields}


def as_answer(row: dict[str, Any]) -> dict[str, Any]:
    """The fields of the completion have become columns; rows with an error do not come here."""
    return {"row": row["row"], "answer": row["choices"][0]["message"]["content"]}


ray.init(address="auto", log_to_driver=False)  # RAY_ADDRESS says which cluster
processor = build_processor(
    ServeDeploymentProcessorConfig(deployment_name="Ingress", app_name="llava", should_continue_on_error=True),
    preprocess=as_request,
    postprocess=as_answer,
    preprocess_map_kwargs=ONLY_WAITS,
    postprocess_map_kwargs=ONLY_WAITS,
)
processor.get_stage_by_name("ServeDeploymentStage").map_batches_kwargs.update(ONLY_WAITS)
for row in sorted(processor(ray.data.from_items(ROWS)).take_all(), key=lambda row: row["row"]):
    # An error has Ray's traceback before its sentence.
    print(row["row"], row["answer"] or row["__inference_error__"].splitlines()[-1])
