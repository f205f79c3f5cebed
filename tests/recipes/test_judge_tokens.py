"""Tokens of a study are judged again, without its models."""

import io
import json
import tarfile
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file, save_file

from recipes import judge_tokens
from trl_drcd.evaluation.arguments import EvaluateArguments
from trl_drcd.evaluation.results import read_results

ROOT = Path(__file__).parents[2]
STUDY, CONFIG = ROOT / "results" / "music" / "means", ROOT / "recipes" / "music" / "evaluate_means.yaml"
PROMPTS, EACH = 4, 8


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """The base's row of the committed study with its first prompts, and the configuration for as many."""
    folder = tmp_path_factory.mktemp("study")
    base = next(row for row in read_results(STUDY / "results.jsonl") if row.name == "base")
    (folder / "results.jsonl").write_text(json.dumps(base.to_json()) + "\n")
    with tarfile.open(STUDY / "tokens.tar.xz") as archive:
        name = next(name for name in archive.getnames() if name.startswith("base_"))
        (folder / name).write_bytes(archive.extractfile(name).read())
    tensors = load_file(folder / name)
    lengths = tensors["lengths"][: PROMPTS * EACH].clone()
    ids = tensors["ids"][: int(lengths.sum())].clone()
    save_file({"ids": ids, "lengths": lengths}, folder / name, {"seconds": "1.0"})
    with tarfile.open(folder / "tokens.tar.xz", "w:xz") as archive:
        archive.add(folder / name, name)
    (folder / "config.yaml").write_text(yaml.safe_dump(yaml.safe_load(CONFIG.read_text()) | {"num_prompts": PROMPTS}))
    return folder


def judged(study, monkeypatch, *words):
    monkeypatch.chdir(ROOT)
    output = study / "judged"
    judge_tokens.main([str(study), str(study / "config.yaml"), "--output", str(output), *words])
    (row,) = read_results(output / "results.jsonl")
    return row


def test_the_same_judges_give_what_was_committed(study, monkeypatch, capsys):
    row, before = judged(study, monkeypatch), read_results(study / "results.jsonl")[0]
    for key in ("adherence", "diversity", "diversity_second"):
        assert row.per_prompt[key] == pytest.approx(before.per_prompt[key][:PROMPTS], abs=2e-5)
    assert row.metrics["kl"] == before.metrics["kl"] and "Rows: " in capsys.readouterr().out


def test_another_embedder_measures_its_own_diversity(study, monkeypatch):
    row, before = (
        judged(study, monkeypatch, "--embedder", "recipes/tiny_music/models/descriptors"),
        read_results(study / "results.jsonl")[0],
    )
    assert row.per_prompt["diversity"] == pytest.approx(before.per_prompt["diversity_second"][:PROMPTS], abs=2e-5)
    assert row.per_prompt["adherence"] == pytest.approx(before.per_prompt["adherence"][:PROMPTS], abs=2e-5)


def test_texts_are_decoded_by_the_tokenizer(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    decode = judge_tokens.decoder(EvaluateArguments(str(tmp_path), "unused"))
    ids = tokenizer("slow harp")["input_ids"]
    assert decode([ids, [*ids, tokenizer.eos_token_id]]) == ["slow harp", "slow harp"]


def test_rows_and_tokens_that_are_missing_are_named(study, monkeypatch, tmp_path):
    with pytest.raises(SystemExit, match=r"`rows=\['guided'\]` are not in"):
        judged(study, monkeypatch, "--rows", "guided")
    (tmp_path / "results.jsonl").write_text((study / "results.jsonl").read_text())
    with tarfile.open(tmp_path / "tokens.tar.xz", "w:xz") as archive:
        archive.addfile(tarfile.TarInfo("other.safetensors"), io.BytesIO())
    with pytest.raises(SystemExit, match=r"tokens.tar.xz has no tokens of \['base'\]"):
        judge_tokens.main([str(tmp_path), str(study / "config.yaml"), "--output", str(tmp_path / "out")])


def test_rows_whose_tokens_are_not_kept_are_left_out_by_name(study, monkeypatch, capsys, tmp_path):
    for name in ("config.yaml", "tokens.tar.xz"):
        (tmp_path / name).write_bytes((study / name).read_bytes())
    line = json.loads((study / "results.jsonl").read_text())
    other = line | {"name": "hot", "point": "hot", "samples": "hot_00000000_000000000000"}
    (tmp_path / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in (line, other)))
    assert judged(tmp_path, monkeypatch).name == "base"
    assert "Left out, for their tokens are not kept: hot" in capsys.readouterr().out
    with pytest.raises(SystemExit, match=r"has no tokens of \['hot'\]"):
        judged(tmp_path, monkeypatch, "--rows", "hot")


def test_every_row_of_the_study_has_its_tokens(tmp_path):
    with tarfile.open(STUDY / "tokens.tar.xz") as archive:
        names = archive.getnames()
    for name in names:
        (tmp_path / name).touch()
    rows = read_results(STUDY / "results.jsonl")
    assert {judge_tokens.tokens_of(row, tmp_path).name for row in rows} == set(names) and len(names) == 39


def test_rows_of_another_study_have_their_tokens_there(study, monkeypatch, tmp_path):
    (tmp_path / "results.jsonl").write_text((study / "results.jsonl").read_text())
    with tarfile.open(tmp_path / "tokens.tar.xz", "w:xz") as archive:
        archive.addfile(tarfile.TarInfo("other.safetensors"), io.BytesIO())
    monkeypatch.chdir(ROOT)
    rows = judge_tokens.judge(
        tmp_path, EvaluateArguments(**yaml.safe_load((study / "config.yaml").read_text())), also=[study]
    )
    before = read_results(study / "results.jsonl")[0]
    assert rows[0].per_prompt["adherence"] == pytest.approx(before.per_prompt["adherence"][:PROMPTS], abs=2e-5)
