"""Answers the rows of a data set without an application: each actor of a pool has an engine of its own."""

from pathlib import Path
from typing import Any

import numpy as np
import ray

import llava_serve
from llava_serve import LLM, SamplingParams

PICTURE = str(Path(llava_serve.__file__).parent / "builtin" / "demo.png")
ROWS = [
    {"row": 1, "picture": PICTURE, "question": "What colour is the circle?"},
    {"row": 2, "picture": PICTURE, "question": "How many shapes are there?"},
]


class Answerer:
    """The engine is loaded once for each actor, and answers the rows of a batch together."""

    def __init__(self, model: str) -> None:
        self.llm = LLM(model)
        self.greedy = SamplingParams(temperature=0, max_new_tokens=32)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        pictures = [[picture] for picture in batch["picture"]]
        results = self.llm.generate(list(batch["question"]), pictures, self.greedy)
        return {"row": batch["row"], "answer": np.array([result.text for result in results])}


ray.init(address="local", log_to_driver=False)  # a Ray of its own; on a cluster: address="auto"
answers = ray.data.from_items(ROWS).map_batches(
    Answerer,
    fn_constructor_args=("builtin",),
    batch_size=256,  # several times the engine's max_num_seqs, so that it is full until the end of the batch
    num_cpus=1,  # this actor works: it takes its CPUs, or num_gpus=1
    compute=ray.data.ActorPoolStrategy(size=1),
)
for row in sorted(answers.take_all(), key=lambda row: row["row"]):
    print(row["row"], row["answer"])
