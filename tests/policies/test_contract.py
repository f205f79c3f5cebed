"""The families of this package, and a toy with a depth decoder, in the suite that every family passes."""

from pathlib import Path

import torch
from conftest import make_model, make_tokenizer
from contract import PolicyContract
from test_musicgen import BOOKS, make_musicgen, make_t5_tokenizer
from toy import ToyConfig, ToyModel

from trl_drcd.policies import CausalLMPolicy, MusicgenPolicy, policy_class
from trl_drcd.policies.musicgen import LORA_TARGETS


class TestCausalLM(PolicyContract):
    def make_tokenizer(self):
        return make_tokenizer()

    def make_model(self, tokenizer, seed):
        return make_model(tokenizer, seed)


class TestMusicgenMono(PolicyContract):
    steps = 9
    longest_delay = BOOKS - 1
    lora_targets = LORA_TARGETS
    channels = 1

    def make_tokenizer(self):
        return make_t5_tokenizer()

    def make_model(self, tokenizer, seed):
        return make_musicgen(seed, channels=self.channels)


class TestMusicgenStereo(TestMusicgenMono):
    channels = 2


class TestDepthDecoder(PolicyContract):
    """Hidden states `(B, S, K, H)`: nothing but the policy is its own."""

    steps = 4

    def make_tokenizer(self):
        return make_tokenizer()

    def make_model(self, tokenizer, seed):
        torch.manual_seed(seed)
        return ToyModel(
            ToyConfig(
                vocab_size=len(tokenizer), codebook_size=7, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
                num_attention_heads=2, num_key_value_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=2,
                initializer_range=0.4, tie_word_embeddings=False,
            )
        ).eval()  # fmt: skip


def test_each_is_its_own_family(tmp_path):
    tokenizer = make_tokenizer()
    assert policy_class(make_model(tokenizer)) is CausalLMPolicy
    assert policy_class(make_musicgen()) is MusicgenPolicy
    toy = TestDepthDecoder().make_model(tokenizer, 0)
    toy.save_pretrained(tmp_path)
    assert policy_class(toy) is policy_class(str(tmp_path)) is ToyConfig.drcd_policy


def test_the_page_shows_the_toy_as_it_is():
    page = (Path(__file__).parents[2] / "docs/your_own_family.md").read_text()
    imports, shown = (block.partition("```")[0] for block in page.split("```python\n")[1:3])
    source = Path(__file__).with_name("toy.py").read_text()
    for line in filter(None, imports.split("\n")):
        module, _, names = line.partition(" import ")
        known = "".join(other for other in source.split("\n") if other.startswith(f"{module} import "))
        assert {*names.split(", ")} <= {*known.partition(" import ")[2].split(", ")} or line == known, line
    assert shown.strip() in source and shown.startswith("class ToyPolicy") and "drcd_policy" in shown
