"""Streams one chat answer through the openai SDK and prints it as JSON; run on a host of a test.

Arguments: base URL, question, number of tokens. Prints "first" when the first token came, then
{"text", "seconds", "error", "num_compiles"}, where `error` is null if the answer came whole, and
`num_compiles` is what the server's metrics say of its engine.
"""

import json
import re
import sys
import time

import httpx
import openai

MODEL = "smollm2-135m-instruct"


def main() -> None:
    base_url, question, num_tokens = sys.argv[1:]
    client = openai.OpenAI(base_url=base_url, api_key="none", max_retries=0, timeout=300)
    started_s = time.monotonic()
    text, error, finish_reason = "", None, None
    try:
        stream = client.chat.completions.create(
            model=MODEL,
            messages=[{"role": "user", "content": question}],
            max_tokens=int(num_tokens),
            temperature=0,
            stream=True,
            extra_body={"ignore_eos": True},
        )
        for chunk in stream:
            if not chunk.choices:
                continue
            choice = chunk.choices[0]
            if choice.delta.content:
                if not text:
                    print("first", flush=True)
                text += choice.delta.content
            finish_reason = choice.finish_reason or finish_reason
    except openai.OpenAIError as raised:
        error = str(raised)
    if error is None and finish_reason is None:
        error = "the stream ended without a finish reason"
    seconds = time.monotonic() - started_s
    num_compiles = None if error else read_num_compiles(base_url.removesuffix("/v1"))
    print(
        json.dumps({"text": text, "seconds": seconds, "error": error, "num_compiles": num_compiles})
    )


def read_num_compiles(base_url: str) -> int:
    """Programs that the engine compiled while serving; its figures reach the router each second."""
    deadline_s = time.monotonic() + 30
    while time.monotonic() < deadline_s:
        text = httpx.get(f"{base_url}/metrics", timeout=30).text
        figures = dict(re.findall(r"qwen_on_ray:engine_(steps|compiles)_total\{.*\} (\S+)", text))
        if float(figures["steps"]) > 0:
            return int(float(figures["compiles"]))
        time.sleep(0.2)
    raise TimeoutError("the engine's figures did not reach the router")


if __name__ == "__main__":
    main()
