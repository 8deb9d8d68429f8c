#!/usr/bin/env python3
"""Are merged PEFT adapters of every form, on every family of models, what PEFT computes without merging them?

usage: matrix.py --program NEUROADA_CKPT --work DIR [--family X] [--form Y] [--again] [--again-failed]

Python with torch, transformers and peft. README.md beside this file says the rest.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
import traceback
import warnings
from collections import Counter
from pathlib import Path

sys.dont_write_bytecode = True
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from families import FAMILIES, build  # noqa: E402
from forms import FORMS  # noqa: E402

# What one cell shows for each outcome, and what that means.
OUTCOMES = {
    "equal": ("=", "merged, and the outputs are equal"),
    "asked-equal": ("?", "the program asked what the file does not tell; answered truthfully, the outputs are equal"),
    "refused-rightly": ("r", "refused, and no checkpoint with the base's tensors could hold the trained model"),
    "refused": ("G", "refused, though the trained model could be stored: a gap"),
    "wrong": ("**X**", "merged, and the outputs are not equal"),
    "asked-wrong": ("**?X**", "asked and answered truthfully, and the outputs are not equal"),
    "not-in-place": ("**I**", "equal as a new checkpoint, but not merged in place, or not taken out again exactly"),
    "equal-to-file": ("f", "equal to what PEFT loads from the file, which is not what was trained"),
    "equal-to-peft-merge": ("p", "every weight is as trained; PEFT's unmerged model is not what PEFT itself merges"),
    "crash": ("**C**", "the program ended in another way"),
    "too-weak": ("w", "the adapter does not change the outputs clearly"),
    "does-not-apply": ("·", "PEFT itself refuses, or the family has no such module"),
    "harness-error": ("**E**", "this test failed"),
}
# Outcomes that nothing has to be done about.
SETTLED = ("equal", "asked-equal", "refused-rightly", "equal-to-file", "equal-to-peft-merge", "does-not-apply")
# Outcomes that make the command fail. A refusal is safe, and no failure.
FAILURES = ("wrong", "asked-wrong", "not-in-place", "crash", "too-weak", "harness-error")
# A worker that says nothing for so long has hung, in seconds.
PATIENCE = 300


def main() -> int:
    args = arguments()
    args.work.mkdir(parents=True, exist_ok=True)
    results = args.work / "results.jsonl"
    if args.worker:
        work(args.worker, args.form, args.program, args.work, results)
        return 0
    families, forms = args.family or list(FAMILIES), args.form or list(FORMS)
    for family in families:
        known = read(results)
        todo = [form for form in forms if is_due(known.get((family, form)), args)]
        while todo:
            print(f"{family}: {len(todo)} cells", flush=True)
            n_before = len(lines(results))
            code = run_worker(family, todo, args)
            done = {entry["form"] for entry in lines(results)[n_before:]}
            todo = [form for form in todo if form not in done]
            if todo:
                reason = f"the process that ran the cell ended with {code}"
                entry = {"family": family, "form": todo.pop(0), "outcome": "harness-error", "reason": reason}
                append(results, entry)
    counts = summarise(results, args.work / "summary.md")
    return 1 if any(counts[outcome] for outcome in FAILURES) else 0


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--program", type=Path, required=True, help="the neuroada-ckpt to test")
    parser.add_argument("--work", type=Path, required=True, help="folder for models, adapters and results; kept")
    parser.add_argument("--family", action="append", choices=list(FAMILIES), help="only this one; may be repeated")
    parser.add_argument("--form", action="append", choices=list(FORMS), help="only this one; may be repeated")
    parser.add_argument("--again", action="store_true", help="run finished cells again")
    parser.add_argument("--again-failed", action="store_true", help="run those again that something is wrong with")
    parser.add_argument("--worker", choices=list(FAMILIES), help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.program, args.work = args.program.resolve(), args.work.resolve()
    if not args.program.is_file():
        parser.error(f"{args.program}: no such program")
    return args


def is_due(entry: dict | None, args: argparse.Namespace) -> bool:
    return entry is None or args.again or args.again_failed and entry["outcome"] not in SETTLED


# Results --------------------------------------------------------------------------------------------------------------


def lines(results: Path) -> list[dict]:
    if not results.exists():
        return []
    return [json.loads(line) for line in results.read_text().splitlines() if line.strip()]


def read(results: Path) -> dict[tuple[str, str], dict]:
    """The last result of each cell."""
    return {(entry["family"], entry["form"]): entry for entry in lines(results)}


def append(results: Path, entry: dict) -> None:
    with results.open("a") as file:
        file.write(json.dumps(entry, default=str) + "\n")


# Workers --------------------------------------------------------------------------------------------------------------


def run_worker(family: str, forms: list[str], args: argparse.Namespace) -> int:
    """Runs cells of one family in a process of their own; 0 where it finished."""
    command = [sys.executable, __file__, "--program", args.program, "--work", args.work, "--worker", family]
    for form in forms:
        command += ["--form", form]
    process = subprocess.Popen([str(word) for word in command])
    results = args.work / "results.jsonl"
    last, seen = time.monotonic(), 0
    while True:
        try:
            return process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            size = results.stat().st_size if results.exists() else 0
            if size != seen:
                last, seen = time.monotonic(), size
            if time.monotonic() - last > PATIENCE:
                process.kill()
                process.wait()
                return -9


def work(family: str, forms: list[str], program: Path, folder: Path, results: Path) -> None:
    """Runs the cells, one after the other, and writes a line for each."""
    warnings.filterwarnings("ignore")
    import torch
    import transformers

    from cell import open_base, run_cell

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    version = hashlib.sha256(program.read_bytes()).hexdigest()[:12]
    place = folder / "bases" / family
    if not (place / "config.json").exists():
        unfinished = place.with_name(family + ".unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        build(family).save_pretrained(unfinished)
        unfinished.rename(place)
    base = open_base(family, place)
    for form in forms:
        start = time.monotonic()
        cell = folder / "cells" / family / form
        try:
            result = run_cell(base, form, program, cell)
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"[:300]
            result = {"family": family, "form": form, "outcome": "harness-error", "reason": reason}
            result["traceback"] = traceback.format_exc()
        if result["outcome"] in ("equal", "asked-equal", "does-not-apply"):
            shutil.rmtree(cell, ignore_errors=True)
        result |= {"seconds": round(time.monotonic() - start, 2), "program": version}
        append(results, result)
        print(f"  {form}: {result['outcome']}", flush=True)


# The summary ----------------------------------------------------------------------------------------------------------


def summarise(results: Path, target: Path) -> Counter:
    """Writes the table and the lists; gives the number of cells by outcome."""
    known = read(results)
    families = [family for family in FAMILIES if any(key[0] == family for key in known)]
    forms = [form for form in FORMS if any(key[1] == form for key in known)]
    text = ["# Merged adapters beside PEFT's unmerged models", ""]
    text += ["| mark | means |", "| --- | --- |"]
    text += [f"| {mark} | {outcome}: {meaning} |" for outcome, (mark, meaning) in OUTCOMES.items()]
    text += ["", "| family | " + " | ".join(forms) + " |", "| --- |" + " --- |" * len(forms)]
    for family in families:
        marks = [known.get((family, form), {}).get("outcome") for form in forms]
        text.append(f"| {family} | " + " | ".join(OUTCOMES[mark][0] if mark else "" for mark in marks) + " |")
    counts = Counter(entry["outcome"] for entry in known.values())
    text += ["", f"{len(known)} cells: " + ", ".join(f"{counts[o]} {o}" for o in OUTCOMES if counts[o]) + "."]
    trips = Counter(entry["round_trip"] == "equal" for entry in known.values() if "round_trip" in entry)
    text += ["", f"Merged in place and taken out again: {trips.total()} of them, {trips[True]} exactly."]
    versions = Counter(entry["program"] for entry in known.values() if "program" in entry)
    text += ["", "Programs (SHA-256): " + ", ".join(f"{v} in {n} cells" for v, n in versions.most_common()) + "."]
    for outcome, (_, meaning) in OUTCOMES.items():
        entries = [known[family, form] for family in families for form in forms if (family, form) in known]
        entries = [entry for entry in entries if entry["outcome"] == outcome and outcome != "equal"]
        if not entries:
            continue
        text += ["", f"## {outcome}: {len(entries)}", "", f"{meaning[0].upper()}{meaning[1:]}.", ""]
        for entry in entries:
            reason = entry.get("reason") or entry.get("asked") or ""
            given = f" (answered {' '.join(entry['answers'])})" if entry.get("answers") else ""
            text.append(f"- {entry['family']}, {entry['form']}: {reason}{given}")
    target.write_text("\n".join(text) + "\n")
    print(f"{len(known)} cells, {', '.join(f'{counts[o]} {o}' for o in OUTCOMES if counts[o])}: {target}")
    return counts


if __name__ == "__main__":
    sys.exit(main())
