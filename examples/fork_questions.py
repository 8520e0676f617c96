# SPDX-License-Identifier: Apache-2.0
"""Many questions about one long document: an SGLang frontend program that forks.

    make serve                           # in another terminal; make serve ARGS="--device cuda" on a GPU
    python examples/fork_questions.py

A fork sends what the program holds so far, the document, to the server once; each branch adds a question. So the
radix cache has the keys of the document for all branches, and TokenSelect chooses from them for each question anew.
It asks any server that was started with --attention-backend tokenselect, but the questions are put the way the
checkpoint of `make serve` was trained to answer them.
"""

from __future__ import annotations

import argparse
import sys

import sglang as sgl

from sglang_tokenselect.demo import attended_between
from sglang_tokenselect.demo_questions import LENGTHS, QUESTIONS, draw_samples, short_question, token_counter
from sglang_tokenselect.needle import checkpoint_path, tasks


@sgl.function
def quiz(s, document, questions):
    """Reads the document, then answers all questions at once, each in a branch of its own."""
    s += document
    s.sync()  # what `s` takes in comes from a thread of its own; fork() sends only what has arrived
    branches = s.fork(len(questions))
    branches += questions  # one for each
    branches += sgl.gen("answer", max_tokens=32, temperature=0, stop="\n")
    branches.join()  # waits; s["answer"] is now the list of the branches' answers
    s["usage"] = [branch.get_meta_info("answer") for branch in branches]


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--url", default="http://127.0.0.1:30000", help="of the server (default: %(default)s)")
    parser.add_argument(
        "--length", type=int, default=16384, choices=LENGTHS, metavar="TOKENS", help="of the document: %(default)s"
    )
    parser.add_argument(
        "--questions", type=int, default=8, choices=QUESTIONS, metavar="N", help="1 to 12 (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the document (default: %(default)s)")
    return parser.parse_args()


def counters(server: sgl.RuntimeEndpoint) -> dict[str, int]:
    """TokenSelect's, summed over all requests since the server started."""
    return server.get_server_info()["internal_states"][0]["tokenselect"]["counters"]


def main() -> int:
    args = parse_args()
    samples = draw_samples(args.length, args.questions, args.seed, token_counter(checkpoint_path()))
    try:
        server = sgl.RuntimeEndpoint(args.url)
        before = counters(server)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        sys.exit(f"--url: expected a server with --attention-backend tokenselect at {args.url}, got {error!r}")

    state = quiz.run(samples[0].context.text, [sample.question for sample in samples], backend=server)
    decode = attended_between(before, counters(server))

    print(f"{'asked for':28}{'expected':16}answer")
    num_right = 0
    for sample, answer in zip(samples, state["answer"], strict=True):
        is_right = tasks.score(answer, sample.answers) == 1.0
        num_right += is_right
        expected = ", ".join(sample.answers)
        print(f"{short_question(sample):28}{expected:16}{'✓' if is_right else '✗ wrong:'} {answer.strip()}")

    prompt, cached = (sum(usage[name] for usage in state["usage"]) for name in ("prompt_tokens", "cached_tokens"))
    print(f"{num_right} of {len(samples)} right")
    print(f"prompts of all branches: {prompt:,} tokens, {cached:,} ({cached / prompt:.1%}) from the radix cache")
    print(f"attended per decode step: {decode['attended']:,.0f} tokens, {decode['attended_share']:.1%} of those cached")
    return 0 if num_right == len(samples) else 1


if __name__ == "__main__":
    sys.exit(main())
