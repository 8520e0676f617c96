# SPDX-License-Identifier: Apache-2.0
"""An agent whose context grows with each tool result: a chain of look-ups, with the OpenAI client.

    make serve                           # in another terminal; make serve ARGS="--device cuda" on a GPU
    python examples/agent_loop.py        # with --dense: where the chain breaks without selection

An archive has pages that hide four numbers each. A page ends with a question for one of them, or for one of a page
read before; the tool opens the page with that number. So a wrong answer ends the walk, and no page may be forgotten.
Each turn sends the whole conversation: the radix cache has all of it but the new page, and TokenSelect attends to as
many of its tokens in the last turn as in the first.

It talks to any server that was started with --attention-backend tokenselect --enable-cache-report, but the questions
are put the way the checkpoint of `make serve` was trained to answer them.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import sys
import time
import urllib.request
from dataclasses import replace

import openai
from openai.types import CompletionUsage

from sglang_tokenselect.demo import attended_between
from sglang_tokenselect.demo_questions import token_counter
from sglang_tokenselect.needle import checkpoint_path, tasks, words

PER_PAGE = 4
FIRST_PAGE, END, NO_PAGE = "000000", "That was the last page.", "There is no page with this number."
DENSE = {"custom_params": {"tokenselect": {"dense": True}}}  # a request's own options


def write_archive(num_pages: int, page_tokens: int, seed: int) -> dict[str, str]:
    """All pages by the numbers that open them; the last answer opens the end."""
    rng, count_tokens = random.Random(tasks.held_out(seed)), token_counter(checkpoint_path())
    facts = tasks.draw_facts(rng, values_per_key=[1] * PER_PAGE * num_pages, names_per_chain=[])
    archive, number, unasked = {}, FIRST_PAGE, []
    for index in range(num_pages):
        hidden = replace(facts, needles=facts.needles[index * PER_PAGE :][:PER_PAGE])
        page = tasks.make_context(rng.getrandbits(32), page_tokens, count_tokens=count_tokens, facts=hidden)
        unasked += hidden.needles
        asked = unasked.pop(rng.randrange(len(unasked)))
        archive[number] = page.text + tasks.ask_number(page, asked).question
        [number] = asked.values
    return {**archive, number: END}


def open_page(archive: dict[str, str], number: str) -> str:
    """The agent's tool."""
    return archive.get(number, NO_PAGE)


def ask(client: openai.OpenAI, messages: list[dict], **request) -> tuple[str, float, CompletionUsage]:
    """The answer, the seconds until its first token, and what it took."""
    begin, first, text = time.monotonic(), None, ""
    request |= {"temperature": 0, "max_tokens": 32, "stream": True, "stream_options": {"include_usage": True}}
    for chunk in client.chat.completions.create(messages=messages, **request):
        if chunk.choices and chunk.choices[0].delta.content:
            first = first or time.monotonic()
            text += chunk.choices[0].delta.content
    return text, (first or time.monotonic()) - begin, chunk.usage  # which the last chunk has


def walk(archive: dict[str, str], url: str, **request) -> bool:
    """Goes from page to page by the model's answers. Whether it came to the end."""
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    result = open_page(archive, FIRST_PAGE)
    messages = [{"role": "user", "content": result}]
    print("turn  context  cached  attended  first token  answer")
    while result not in (END, NO_PAGE):
        before, turn = counters(url), len(messages) // 2 + 1
        answer, seconds, usage = ask(client, messages, **request)
        attended = attended_between(before, counters(url)).get("attended", 0)
        cached = usage.prompt_tokens_details.cached_tokens if usage.prompt_tokens_details else 0
        sizes = f"{usage.prompt_tokens:9,}{cached:8,}{attended:10,.0f}"
        print(f"{turn:4}{sizes}{seconds:11.2f} s  {' '.join(answer.split())}", flush=True)

        number = "".join(re.findall(r"\d{6}", answer)[:1])
        result = open_page(archive, number)
        function = {"name": "open_page", "arguments": json.dumps({"number": number})}
        call = {"id": f"call_{turn}", "type": "function", "function": function}
        messages.append({"role": "assistant", "content": answer, "tool_calls": [call]})
        messages.append({"role": "tool", "tool_call_id": call["id"], "content": result})
    print(result)
    return result == END


def counters(url: str) -> dict[str, int]:
    """TokenSelect's, summed over all requests since the server started."""
    with urllib.request.urlopen(f"{url}/server_info", timeout=60) as response:
        return json.load(response)["internal_states"][0]["tokenselect"]["counters"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    pages = range(1, len(words.KEYS) // PER_PAGE + 1)
    parser.add_argument("--url", default="http://127.0.0.1:30000", help="of the server (default: %(default)s)")
    parser.add_argument("--model", default="default", help="its name, where the server has several")
    parser.add_argument("--turns", type=int, default=16, choices=pages, metavar="N", help="default: %(default)s")
    parser.add_argument("--page-tokens", type=int, default=1000, metavar="N", help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="of the archive (default: %(default)s)")
    parser.add_argument("--dense", action="store_true", help="ask for attention to everything")
    args = parser.parse_args()
    archive = write_archive(args.turns, args.page_tokens, args.seed)
    try:
        counters(args.url)
    except (OSError, ValueError, KeyError) as error:
        sys.exit(f"--url: expected a server with --attention-backend tokenselect at {args.url}, got {error!r}")
    return 0 if walk(archive, args.url, model=args.model, extra_body=DENSE if args.dense else {}) else 1


if __name__ == "__main__":
    sys.exit(main())
