"""Ask a model the test questions about the island of Wick, and count the right answers.

    python examples/island/ask.py [--model MODEL] [--adapter FOLDER] [--limit N]

An answer is greedy, and right if it contains the word that `test.jsonl` names.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

from openelm_mlx import batch_generate, load

QUESTIONS = Path(__file__).parent / "test.jsonl"


def main() -> None:
    parser = argparse.ArgumentParser(description="Ask a model about the island of Wick.")
    parser.add_argument("--model", default="openelm-tiny", help="a name or a folder")
    parser.add_argument("--adapter", help="a folder that `openelm finetune` wrote")
    parser.add_argument("--limit", type=int, help="ask only so many questions")
    args = parser.parse_args()

    lines = QUESTIONS.read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines[: args.limit]]
    prompts = [[{"role": "user", "content": record["prompt"]}] for record in records]
    engine = load(args.model, adapter=args.adapter)
    right = 0
    for record, answer in zip(records, batch_generate(engine, prompts, max_tokens=32), strict=True):
        found = re.search(rf"\b{record['word']}\b", answer.text, re.IGNORECASE) is not None
        right += found
        text = " ".join(answer.text.split())
        print(f"{'right' if found else 'wrong'}  {record['prompt']}  {text}")
    print(f"{right} of {len(records)} right")


if __name__ == "__main__":
    main()
