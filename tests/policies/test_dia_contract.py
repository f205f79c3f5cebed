"""Dia in the suite that every family passes."""

from contract import PolicyContract
from tiny_dia import TINY, make_dia, make_tokenizer

from trl_drcd.policies.dia import LORA_TARGETS


class TestDia(PolicyContract):
    steps = TINY.steps
    longest_delay = max(TINY.delays)
    lora_targets = LORA_TARGETS

    def make_tokenizer(self):
        return make_tokenizer()

    def make_model(self, tokenizer, seed):
        return make_dia(seed)
