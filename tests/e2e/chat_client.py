"""Streams one chat answer through the openai SDK and prints it as JSON; run on a host of a test.

Arguments: base URL, question, number of tokens. Prints "first" when the first token came, then
{"text", "seconds", "error"}, where `error` is null if the answer came whole.
"""

import json
import sys
import time

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
    print(json.dumps({"text": text, "seconds": seconds, "error": error}))


if __name__ == "__main__":
    main()
