# SPDX-License-Identifier: Apache-2.0
"""A user's program with `sgl.Engine`: engine_program.py MODEL, prints one JSON line.

A file of its own, because the engine's processes are spawned and import their main module again.
"""

from __future__ import annotations

import json
import sys


def main() -> None:
    import sglang as sgl

    options = {"sink": 16, "budget": 48, "local": 32, "block": 32, "sub_block": 8, "min_len": 0}
    engine = sgl.Engine(
        model_path=sys.argv[1],
        attention_backend="tokenselect",
        tokenselect=options,
        device="cpu",
        dtype="float32",
        skip_tokenizer_init=True,
        grammar_backend="none",
        max_total_tokens=20000,
    )
    prompt = [3 + i * 7 % 500 for i in range(600)]
    output = engine.generate(input_ids=prompt, sampling_params={"temperature": 0.0, "max_new_tokens": 4})
    report = engine.get_server_info()["internal_states"][0]["tokenselect"]
    engine.shutdown()
    print(json.dumps({"output_ids": output["output_ids"], "options": options, "report": report}))


if __name__ == "__main__":
    main()
