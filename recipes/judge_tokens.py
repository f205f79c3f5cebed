"""
Another judge, or another embedder, on the samples of a study, without its models and without sampling.

`tokens.tar.xz` of a study holds the token ids of all rows of its `results.jsonl`. They are decoded and judged as the
study's configuration says, but for the parts given here, and the rows are written with their new metrics: the scripts
that decide the study's hypotheses read them as they read the old ones. Without other parts, the metrics of the study
come out again. KL and entropy, for which the models are needed, are left as they were.

    python recipes/judge_tokens.py results/music/means recipes/music/evaluate_means.yaml
    python recipes/judge_tokens.py results/music/means recipes/music/evaluate_means.yaml --judge outputs/my_judge
    python recipes/judge_tokens.py results/music/hidden recipes/music/evaluate_hidden.yaml --also results/music/study
    python recipes/hypotheses.py outputs/judged/results.jsonl
"""

from __future__ import annotations

import argparse
import json
import tarfile
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tqdm import tqdm
from transformers import AutoTokenizer

from trl_drcd.audio.codecs import SpectralCodec
from trl_drcd.diversity import one_channel
from trl_drcd.evaluation.arguments import EvaluateArguments
from trl_drcd.evaluation.judging import Judges
from trl_drcd.evaluation.listening import kept_tokens
from trl_drcd.evaluation.metrics import Drawn, measure
from trl_drcd.evaluation.plan import HeldOut, held_out_prompts
from trl_drcd.evaluation.points import with_quality
from trl_drcd.evaluation.results import Result, read_results, rounded
from trl_drcd.evaluation.sampling import Completion
from trl_drcd.files import write_text
from trl_drcd.validation.messages import one_line_errors
from trl_drcd.validation.yaml_files import read_yaml

PARTS = (
    "embedder", "second_embedder", "judge", "clap", "cross_encoder", "reward_model", "preference", "reference",
)  # fmt: skip


def tokens_of(row: Result, folder: Path) -> Path | None:
    """
    The file with a row's token ids, whose name begins like that of the row's folder of samples; `None` without one.

    Raises:
        ValueError: If there is more than one.
    """
    stem = str(row.samples).rpartition("_")[0]
    found = sorted(folder.glob(f"{stem}_*.safetensors"))
    if len(found) > 1:
        raise ValueError(f"the tokens of `{row.name}` must be one file {stem}_*.safetensors, got {len(found)}")
    return found[0] if found else None


def decoder(args: EvaluateArguments) -> Callable[[list[list[int]]], list[Completion]]:
    """From token ids to sounds by the study's codec, or without one to texts by its tokenizer."""
    if args.codec:
        codec = SpectralCodec.from_pretrained(args.codec)
        return lambda ids: one_channel(list(codec.decode(ids)))
    tokenizer = AutoTokenizer.from_pretrained(args.model, trust_remote_code=False)
    return lambda ids: list(tokenizer.batch_decode(ids, skip_special_tokens=True))


def judged(row: Result, file: Path, held_out: HeldOut, judges: Judges, decode: Callable[..., Any]) -> Result:
    """The row with the metrics that these judges give."""
    samples = kept_tokens(file, held_out, row.samples_per_prompt, None)
    assert samples is not None  # `tokens_of` has found it
    completions = decode(samples.token_ids)
    metrics, by_prompt = measure(Drawn(samples, completions, judges, row.seed))
    per_prompt = {key: rounded(values) for key, values in by_prompt.items()}
    return replace(row, metrics={**row.metrics, **metrics}, per_prompt={**row.per_prompt, **per_prompt})


def judge(
    study: Path, args: EvaluateArguments, names: list[str] | None = None, also: Sequence[Path] = ()
) -> list[Result]:
    """
    Judge the rows of a study whose tokens are kept.

    Args:
        study (`Path`): Folder with `results.jsonl` and `tokens.tar.xz`.
        args ([`EvaluateArguments`]): The study's settings, with the parts to judge with.
        names (`list[str]`, *optional*): Rows; all by default.
        also (`Sequence[Path]`, *optional*): Studies whose rows stand in this one too; their tokens are read.

    Returns:
        `list[Result]`: The rows with their new metrics. Without `names`, rows whose tokens are not kept are left out,
        which a line says.

    Raises:
        FileNotFoundError: If a file is missing, or the tokens of all rows, or of one of `names`.
        ValueError: If the study has no row of a name.
    """
    rows = read_results(study / "results.jsonl")
    if unknown := sorted(set(names or []) - {row.name for row in rows}):
        raise ValueError(f"`rows={unknown}` are not in {study / 'results.jsonl'}, which has {[r.name for r in rows]}")
    rows = [row for row in rows if names is None or row.name in names]
    held_out, judges, decode = held_out_prompts(args), Judges.load(args, {}), decoder(args)
    with tempfile.TemporaryDirectory() as folder:
        for part in (*also, study):
            with tarfile.open(part / "tokens.tar.xz") as archive:
                # By hand: files of this folder alone, with the Python 3.11.0 to 3.11.3 too, which have no filters
                for member in archive:
                    if member.isfile() and (content := archive.extractfile(member)):
                        (Path(folder) / Path(member.name).name).write_bytes(content.read())
        files = {row.name: file for row in rows if (file := tokens_of(row, Path(folder)))}
        if lacking := [row.name for row in rows if row.name not in files]:
            if names or not files:
                raise FileNotFoundError(f"{study / 'tokens.tar.xz'} has no tokens of {lacking}")
            print(f"Left out, for their tokens are not kept: {', '.join(lacking)}")
        rows = [row for row in rows if row.name in files]
        done = [judged(row, files[row.name], held_out, judges, decode) for row in tqdm(rows, unit="row")]
    return with_quality(done, args.omega)


def main(argv: list[str] | None = None) -> None:
    """Judge the rows, write them, and print how far each metric moved at most."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path, help="folder with results.jsonl and tokens.tar.xz")
    parser.add_argument("config", help="YAML file of its evaluation")
    for part in PARTS:
        parser.add_argument(f"--{part}", help="in place of the study's own")
    parser.add_argument("--also", nargs="+", type=Path, default=[], help="studies whose rows stand in this one too")
    parser.add_argument("--rows", nargs="+", help="names of rows; all by default")
    parser.add_argument("--output", type=Path, default=Path("outputs/judged"), help="folder to write results.jsonl to")
    given = parser.parse_args(argv)
    with one_line_errors(parser.prog):
        parts = {part: value for part in PARTS if (value := getattr(given, part)) is not None}
        args = EvaluateArguments(**{**read_yaml(given.config), **parts})
        before = {row.name: row.metrics for row in read_results(given.study / "results.jsonl")}
        rows = judge(given.study, args, given.rows, given.also)
        write_text(given.output / "results.jsonl", "".join(json.dumps(row.to_json()) + "\n" for row in rows))
    for key in rows[0].metrics:
        moved = [abs(r.metrics[key]["mean"] - before[r.name][key]["mean"]) for r in rows if key in before[r.name]]
        print(f"{key}: {len(moved)} rows, " + (f"moved by at most {max(moved):.2g}" if moved else "new"))
    print(f"Rows: {given.output / 'results.jsonl'}")


if __name__ == "__main__":
    main()
