"""`make demo`: asks the application of a config one question about a picture, over HTTP, and checks the answer."""

from __future__ import annotations

import argparse
import base64
import sys
import time
from functools import partial
from pathlib import Path

from openai import OpenAI, OpenAIError

import llava_serve

from .config import ConfigError, read_config
from .local_cluster import LocalClusterError, free_port, local_cluster

IMAGE = Path(llava_serve.__file__).parent / "builtin" / "demo.png"
QUESTION = "What colour is the circle?"
ANSWER = "red"


def main(argv: list[str] | None = None) -> int:
    """The exit status is 0 only if the answer is the right one."""
    parser = argparse.ArgumentParser(prog=f"python -m {__package__}.demo", description=__doc__)
    parser.add_argument("--config", type=Path, help="the packaged one by default")
    parser.add_argument("--model", help="model, instead of the config's: a folder, or a hub id in the local cache")
    parser.add_argument("--image", type=Path, default=IMAGE)
    parser.add_argument("--question", default=QUESTION)
    parser.add_argument("--answer", default=ANSWER, help="text that the answer must contain")
    options = parser.parse_args(argv)
    try:
        config = read_config(options.config, port=free_port(), model=options.model)
        print("Starting Ray and the replicas ...", flush=True)
        with local_cluster(config, tell=partial(print, flush=True)) as running:
            try:
                answer = ask(running.url, options.image, options.question)
            except OpenAIError as error:
                raise LocalClusterError(f"The question was not answered: {error}\nLog: {running.log}") from None
    except (ConfigError, LocalClusterError) as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    if options.answer.lower() not in answer.lower():
        print(f"The right answer contains {options.answer!r}.", file=sys.stderr)
        return 1
    return 0


def ask(url: str, image: Path, question: str) -> str:
    """Sends a picture and a question through the official client, and prints the answer and its speed."""
    data_url = "data:image/png;base64," + base64.b64encode(image.read_bytes()).decode()
    with OpenAI(base_url=f"{url}/v1", api_key="none") as client:
        model = client.models.list().data[0].id
        start = time.perf_counter()
        completion = client.chat.completions.create(
            model=model,
            messages=[
                {
                    "role": "user",
                    "content": [
                        {"type": "image_url", "image_url": {"url": data_url}},
                        {"type": "text", "text": question},
                    ],
                }
            ],
            temperature=0,
            max_tokens=64,
        )
        seconds = time.perf_counter() - start
    answer = completion.choices[0].message.content or ""
    tokens = completion.usage.completion_tokens if completion.usage else 0
    print(f"Model:     {model}")
    print(f"Picture:   {image}")
    print(f"Question:  {question}")
    print(f"Answer:    {answer}")
    print(f"Speed:     {tokens} tokens in {seconds:.2f} s, {tokens / seconds:.1f} tokens/s", flush=True)
    return answer


if __name__ == "__main__":
    sys.exit(main())
