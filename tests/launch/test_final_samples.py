"""The samples that a training leaves beside the model come from the prompts as it trained on them."""

import json

from conftest import make_model, make_tokenizer

from trl_drcd.launch import training
from trl_drcd.scripts import train_text

TEMPLATE = "{% for turn in messages %}{% if fast %}fast {% endif %}{{ turn['content'] }} {% endfor %}"


def test_final_samples_use_the_chat_template_s_arguments(tmp_path, monkeypatch):
    words = make_tokenizer()
    words.chat_template = TEMPLATE
    make_model(words).save_pretrained(tmp_path / "m")
    words.save_pretrained(tmp_path / "m")
    rows = [{"prompt": [{"role": "user", "content": text}]} for text in ("slow harp", "a tune")]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    taken, sample = [], training.sample_prompts

    def watched(*args, **kwargs):
        samples = sample(*args, **kwargs)
        taken.append(samples)
        return samples

    monkeypatch.setattr(training, "sample_prompts", watched)
    settings = {
        "model_name_or_path": tmp_path / "m", "dataset": tmp_path / "p.jsonl", "output_dir": tmp_path / "out",
        "max_steps": 1, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 1, "use_cpu": True,
        "max_completion_length": 4, "gradient_checkpointing": False, "bf16": False, "report_to": "none",
        "chat_template_kwargs": '{"fast": true}', "save_strategy": "no", "diversity_coef": 0,
    }  # fmt: skip
    train_text.main([word for name, value in settings.items() for word in (f"--{name}", str(value))])
    assert taken[0].chat_template_kwargs == {"fast": True}
    assert (tmp_path / "out" / "samples").is_dir()
